//! Finding room: requests that need an extent, what is tried for them, and what waits. Not the books (`space`).
//! Invariant: a request in the queue has something under way that will look at it again.

use bytes::Bytes;

use super::action::{Action, Event};
use super::crossing::CrossingId;
use super::fetch::FetchId;
use super::input::{FabricId, Pinned};
use super::objects::Object;
use super::space::{Growth, Owner, Space};
use super::timer::{Time, Timer};
use super::{Engine, State};
use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::tier::{ClientId, Extent, Generation, RemoteKey, SegmentId, SlotId, Tier};
use crate::wire::{IfExists, PutHints};

/// How often a request may evict and look again before it is told that there is no space.
const ROUNDS_MAX: u32 = 8;
/// How long a request waits for memory to be made or readers to leave, in milliseconds.
const WAIT_MS: u64 = 10_000;
/// The first segment granted to a client, unless its object is longer.
const FIRST_GRANT_LEN: u64 = 16 << 20;
/// The same on a GPU, where another process pays for each segment that it imports.
const FIRST_GPU_GRANT_LEN: u64 = 64 << 20;
/// The same in host memory if it is only for objects that are put without asking.
const AHEAD_GRANT_LEN: u64 = 2 << 20;
/// How soon draining objects are looked at again, in milliseconds.
pub(super) const DRAIN_MS: u64 = 50;

/// Bytes that may be handed out and withdrawn before pins are looked at: what is free again is to be used again.
const UNSCANNED_BYTES_MAX: u64 = 16 << 20;

/// The last look at the pins, and what came since.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scans {
    /// Objects that were held then.
    left: usize,
    /// Bytes of objects that were handed out and withdrawn at once since then.
    bytes: u64,
}

/// How far the memory of a starting node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartUp {
    /// Segments are being made.
    Making,
    /// All are there.
    Ready,
    /// One could not be made: the node has less memory than it was configured for.
    Failed(StoreError),
}

/// A put as its client described it.
#[derive(Clone, Debug)]
pub(super) struct NewObject {
    pub(super) key: Key,
    pub(super) meta: ObjectMeta,
    pub(super) hints: PutHints,
    pub(super) if_exists: IfExists,
}

/// What an extent is wanted for.
#[derive(Debug)]
pub(super) enum Purpose {
    Put {
        client: ClientId,
        request: u64,
        object: NewObject,
        payload: Bytes,
    },
    Reserve {
        client: ClientId,
        request: u64,
        object: NewObject,
    },
    Fetch {
        fetch: FetchId,
    },
    SealCopy {
        generation: Generation,
    },
    /// What somebody wants in another tier.
    Cross {
        crossing: CrossingId,
    },
    /// An object that leaves a GPU for host memory.
    Move {
        source: Generation,
    },
    /// A chunk to publish objects in. Never worth what somebody has stored.
    Ahead {
        client: ClientId,
        request: u64,
        ring: bool,
    },
}

#[derive(Debug)]
pub(super) struct SpaceRequest {
    pub(super) purpose: Purpose,
    tier: Tier,
    pub(super) owner: Owner,
    pub(super) len_bytes: u64,
    deadline: Time,
    rounds: u32,
    /// Whether a segment may be made for it; not after one could not be.
    may_grow: bool,
    /// Whether draining objects were looked at since this request came.
    scanned: bool,
    /// Whether memory that was granted ahead was asked back for it.
    recalled: bool,
}

impl SpaceRequest {
    /// Where there was no room: looks somewhere else from now on, if there is something else.
    fn moves_on(&mut self) -> bool {
        let or_host = match &self.purpose {
            // It has nothing to lose: what is wanted elsewhere is copied there once it is here.
            Purpose::Fetch { .. } => true,
            Purpose::Reserve { object, .. } => object.hints.tier.is_some_and(|hint| hint.or_host),
            _ => false,
        };
        match self.purpose {
            Purpose::Ahead { .. } => false,
            _ if self.tier != Tier::Host => {
                if or_host {
                    self.tier = Tier::Host;
                }
                or_host
            }
            // What does not fit into memory granted to the client may fit into the node's own.
            _ => std::mem::replace(&mut self.owner, Owner::Node) != Owner::Node,
        }
    }
}

/// Whether the place of an object is of use to this owner: in a segment of its own, or of the node's, which makes way.
fn is_of(space: &Space, object: &Object, owner: Owner) -> bool {
    space.owner(object.extent.segment).is_some_and(|of| of == owner || of == Owner::Node)
}

enum Outcome {
    Found(Extent),
    Wait,
    NoSpace,
}

impl Engine {
    /// Finds an extent now or later; `space_found` or `space_missing` goes on from there.
    pub(super) fn want_space(&mut self, purpose: Purpose, tier: Tier, owner: Owner, len_bytes: u64) {
        let deadline = self.now.after_ms(WAIT_MS);
        let request = SpaceRequest {
            purpose,
            tier,
            owner,
            len_bytes,
            deadline,
            rounds: 0,
            may_grow: true,
            scanned: false,
            recalled: false,
        };
        self.try_space(request);
    }

    fn try_space(&mut self, mut request: SpaceRequest) {
        let wanted = match request.purpose {
            Purpose::Fetch { fetch } => self.fetches.contains(fetch),
            Purpose::Cross { crossing } => self.is_crossing_wanted(crossing),
            Purpose::Move { source } => self.is_move_wanted(source),
            _ => true,
        };
        if !wanted {
            return;
        }
        loop {
            match self.look_for_space(&mut request) {
                Outcome::Found(extent) => return self.space_found(request.purpose, request.owner, extent),
                Outcome::Wait => {
                    self.timers.set(request.deadline, Timer::Space);
                    self.waiting_space.push_back(request);
                    return;
                }
                Outcome::NoSpace if request.moves_on() => {
                    request.rounds = 0;
                    request.may_grow = true;
                }
                Outcome::NoSpace => {
                    let error = self.no_space(&request);
                    return self.space_missing(request.purpose, error);
                }
            }
        }
    }

    fn look_for_space(&mut self, request: &mut SpaceRequest) -> Outcome {
        let (tier, owner, len_bytes) = (request.tier, request.owner, request.len_bytes);
        if let Some(extent) = self.space.allocate(tier, owner, len_bytes) {
            return Outcome::Found(extent);
        }
        let first_len = match (&request.purpose, tier) {
            (Purpose::Ahead { .. }, _) => AHEAD_GRANT_LEN,
            (_, Tier::Host) => FIRST_GRANT_LEN,
            (_, Tier::Gpu(_)) => FIRST_GPU_GRANT_LEN,
        };
        let growth =
            if request.may_grow { self.space.grow(tier, owner, len_bytes, first_len) } else { Growth::None };
        match growth {
            Growth::Create { retire, segment, len_bytes } => {
                for (segment, len_bytes) in retire {
                    self.out.push(Action::RetireSegment { segment, len_bytes });
                }
                let client = match owner {
                    Owner::Client(client) => Some(client),
                    Owner::Node | Owner::Left(_) => None,
                };
                self.out.push(Action::CreateSegment { segment, tier, len_bytes, owner: client });
                return Outcome::Wait;
            }
            Growth::UnderWay => return Outcome::Wait,
            Growth::None => {}
        }
        if matches!(request.purpose, Purpose::Ahead { .. }) {
            return Outcome::NoSpace;
        }
        if !request.scanned && self.objects.draining_count() > 0 {
            request.scanned = true;
            self.scan_wanted = true;
            return Outcome::Wait;
        }
        if tier == Tier::Host && !request.recalled && self.recall_ahead() {
            request.recalled = true;
            return Outcome::Wait;
        }
        // The end of each move is looked at again.
        if self.moves.any_leaves(tier) {
            return Outcome::Wait;
        }
        if request.rounds < ROUNDS_MAX && self.make_room_on_gpu(tier, owner, len_bytes) {
            request.rounds += 1;
            return Outcome::Wait;
        }
        if request.rounds < ROUNDS_MAX && self.evict(tier, owner, len_bytes) {
            request.rounds += 1;
            request.scanned = true;
            return Outcome::Wait;
        }
        Outcome::NoSpace
    }

    fn no_space(&self, request: &SpaceRequest) -> StoreError {
        let operation = match &request.purpose {
            Purpose::Put { object, .. } | Purpose::Reserve { object, .. } => format!("put {:?}", object.key),
            Purpose::Fetch { fetch } => match self.fetches.get(*fetch) {
                Some(fetch) => format!("get {:?}", fetch.key),
                None => "get".to_owned(),
            },
            Purpose::SealCopy { generation } => match self.objects.get(*generation) {
                Some(object) => format!("put {:?}", object.key),
                None => "seal".to_owned(),
            },
            Purpose::Cross { crossing } => match self.key_of_crossing(*crossing) {
                Some(key) => format!("get {key:?}"),
                None => "get".to_owned(),
            },
            Purpose::Move { .. } => "move".to_owned(),
            Purpose::Ahead { .. } => "ahead".to_owned(),
        };
        StoreError::NoSpace {
            operation: operation.into(),
            tier: request.tier,
            requested: request.len_bytes,
            free: self.space.free_bytes(request.tier),
        }
    }

    /// Begins to move objects out of a GPU, if what they leave, with what is free or leaves already, is enough. True if
    /// there will be more room, or may be.
    fn make_room_on_gpu(&mut self, tier: Tier, owner: Owner, len_bytes: u64) -> bool {
        if tier == Tier::Host {
            return false;
        }
        let free = self.space.free_bytes(tier).saturating_add(self.room_of(tier).leaving_bytes);
        if free.saturating_add(self.eviction.mover_bytes(tier)) < len_bytes {
            return false;
        }
        // What leaves may leave holes that are too small: as much again goes with each round.
        // A segment granted to somebody else makes way as well, but only when nothing is left in it.
        self.demote(tier, len_bytes, |object, space| is_of(space, object, owner))
            || self.demote(tier, len_bytes, |_, _| true)
    }

    /// Withdraws objects that may go, if together they can make the room that is wanted. True if any went.
    fn evict(&mut self, tier: Tier, owner: Owner, len_bytes: u64) -> bool {
        let evictable = self.eviction.bytes(tier);
        // A put that cannot succeed must not cost anything that was stored.
        if evictable == 0 || self.space.free_bytes(tier).saturating_add(evictable) < len_bytes {
            return false;
        }
        // Thousands may want room in one pass; to ask every object about each of them would hold up everyone.
        if self.nothing_evictable == Some((tier, owner)) {
            return false;
        }
        let found = self.evict_where(tier, len_bytes, |object, space| is_of(space, object, owner));
        if !found {
            self.nothing_evictable = Some((tier, owner));
        }
        found
    }

    /// Withdraws one object that may go, for its slot in the index: of host memory first, of which there is more.
    pub(super) fn evict_for_slot(&mut self) {
        let tiers: Vec<Tier> = self.space.tiers().collect();
        let _ = tiers.into_iter().any(|tier| self.evict_where(tier, 1, |_, _| true));
    }

    fn evict_where(&mut self, tier: Tier, len_bytes: u64, useful: impl Fn(&Object, &Space) -> bool) -> bool {
        let mut queue = std::mem::take(&mut self.eviction);
        let victims = queue.victims(tier, len_bytes, |generation| {
            self.objects
                .get(*generation)
                .is_some_and(|object| self.may_evict(object) && useful(object, &self.space))
        });
        self.eviction = queue;
        let mut bytes = 0;
        for generation in &victims {
            bytes += self.objects.get(*generation).map_or(0, |object| object.extent.len_bytes);
            self.withdraw(*generation);
        }
        if victims.is_empty() {
            return false;
        }
        self.counters.evicted += victims.len() as u64;
        self.out.push(Action::Note(Event::Evicted { objects: victims.len() as u64, len_bytes: bytes }));
        true
    }

    /// Whether an object may be dropped to make room: a copy of what others hold for good, or one that was put as cache;
    /// without a reader that would hold its extent anyway.
    pub(super) fn may_evict(&self, object: &Object) -> bool {
        object.state == State::Sealed
            && !object.hints.pin
            && (object.hints.cache || self.is_elsewhere(object))
            && object.only_pins_hold()
    }

    /// Looks at every waiting request again, oldest first.
    pub(super) fn retry_space(&mut self) {
        for request in std::mem::take(&mut self.waiting_space) {
            self.try_space(request);
        }
    }

    pub(super) fn space_deadlines(&mut self) {
        let now = self.now;
        let (late, waiting) =
            std::mem::take(&mut self.waiting_space).into_iter().partition(|r| r.deadline <= now);
        self.waiting_space = waiting;
        for request in Vec::from_iter::<std::collections::VecDeque<SpaceRequest>>(late) {
            let error = self.no_space(&request);
            self.space_missing(request.purpose, error);
        }
    }

    fn space_found(&mut self, purpose: Purpose, owner: Owner, extent: Extent) {
        self.gpu_grew |= self.space.tier(extent.segment) != Tier::Host;
        match purpose {
            Purpose::Put { client, request, object, payload } => {
                self.put_into(client, request, object, payload, extent);
            }
            Purpose::Reserve { client, request, object } => {
                self.reserve_in(client, request, object, extent, owner != Owner::Node);
            }
            Purpose::Fetch { fetch } => self.fetch_into(fetch, extent),
            Purpose::SealCopy { generation } => self.seal_copy_into(generation, extent),
            Purpose::Cross { crossing } => self.cross_into(crossing, extent),
            Purpose::Move { source } => self.move_into(source, extent),
            Purpose::Ahead { client, request, ring } => self.ahead_into(client, request, ring, extent),
        }
    }

    fn space_missing(&mut self, purpose: Purpose, error: StoreError) {
        match purpose {
            Purpose::Put { client, request, .. } | Purpose::Reserve { client, request, .. } => {
                self.reply(client, request, Err(error));
            }
            Purpose::Fetch { fetch } => self.fetch_failed(fetch, &error),
            Purpose::SealCopy { generation } => self.seal_elsewhere(generation, error),
            Purpose::Cross { crossing } => self.cross_missing(crossing, &error),
            Purpose::Move { source } => self.move_missing(source),
            Purpose::Ahead { client, request, .. } => self.ahead_refused(client, request, error),
        }
    }

    /// Drops what waits for a client that left.
    pub(super) fn forget_space_requests_of(&mut self, gone: ClientId) {
        self.waiting_space.retain(|request| match request.purpose {
            Purpose::Put { client, .. } | Purpose::Reserve { client, .. } | Purpose::Ahead { client, .. } => {
                client != gone
            }
            Purpose::Fetch { .. }
            | Purpose::SealCopy { .. }
            | Purpose::Cross { .. }
            | Purpose::Move { .. } => true,
        });
    }

    /// How far the first segments are.
    #[must_use]
    pub fn start_up(&self) -> StartUp {
        match &self.first_failure {
            Some(error) => StartUp::Failed(error.clone()),
            None if self.first_segments.is_empty() => StartUp::Ready,
            None => StartUp::Making,
        }
    }

    pub(super) fn segment_ready(&mut self, segment: SegmentId, keys: Vec<(FabricId, RemoteKey)>) {
        self.first_segments.remove(&segment);
        if !self.space.ready(segment, keys) {
            return;
        }
        if let (Some(Owner::Client(client)), Some(len_bytes)) =
            (self.space.owner(segment), self.space.len_bytes(segment))
        {
            self.out.push(Action::Note(Event::SegmentGranted { segment, client, len_bytes }));
        }
        self.retry_space();
        self.retire_returned();
    }

    pub(super) fn segment_failed(&mut self, segment: SegmentId, why: &StoreError) {
        let of = self.space.failed(segment);
        for request in &mut self.waiting_space {
            request.may_grow &= Some((request.tier, request.owner)) != of;
        }
        if self.first_segments.remove(&segment) {
            self.first_failure = Some(why.clone());
        }
        self.out.push(Action::Note(Event::SegmentFailed { segment, why: why.to_string() }));
        self.retry_space();
    }

    fn retire_returned(&mut self) {
        let retirable = self.space.retirable();
        self.retire(retirable);
    }

    /// Gives memory of GPUs back that has not been used for a while: what else runs there has use for it.
    pub(super) fn retire_idle(&mut self) {
        let idle = self.space.idle_on_gpus();
        self.retire(idle);
    }

    fn retire(&mut self, empty: Vec<SegmentId>) {
        for segment in empty {
            if let Some(len_bytes) = self.space.retire(segment) {
                self.out.push(Action::RetireSegment { segment, len_bytes });
                self.out.push(Action::Note(Event::SegmentRetired { segment, len_bytes }));
            }
        }
    }

    /// The client says that it no longer maps a granted segment.
    pub(super) fn return_segment(&mut self, client: ClientId, segment: SegmentId) -> Result<(), StoreError> {
        if !self.space.returned(segment, client) {
            return Err(StoreError::denied(
                "return",
                format!("segment {segment} was not granted to this client"),
            ));
        }
        self.retire_returned();
        Ok(())
    }

    /// Takes an object out of everyone's reach; its extent is freed when its last reader has gone.
    pub(super) fn withdraw(&mut self, generation: Generation) {
        self.scan_wanted |= self.take_out(generation);
    }

    /// The same for one that was pinned just now for whoever gets it: it cannot be free yet, but others before it may
    /// be. A look at the pins costs as much as there are, so it is worth it when as many objects have come to those
    /// that the last look left, or many bytes.
    pub(super) fn withdraw_handed_out(&mut self, generation: Generation) {
        let len_bytes = self.objects.get(generation).map_or(0, |object| object.extent.len_bytes);
        self.take_out(generation);
        self.scan_if_worth_it(len_bytes);
    }

    /// So many bytes more are out of everyone's reach, and may be free by now.
    pub(super) fn scan_if_worth_it(&mut self, len_bytes: u64) {
        self.scans.bytes += len_bytes;
        self.scan_wanted |=
            self.objects.draining_count() >= 2 * self.scans.left || self.scans.bytes >= UNSCANNED_BYTES_MAX;
    }

    fn take_out(&mut self, generation: Generation) -> bool {
        let Some(object) = self.objects.get(generation) else {
            return false;
        };
        let (was_sealed, tier) = (object.state == State::Sealed, object.tier);
        let announced = object.announced(self.now);
        if let Some(slot) = self.objects.drain(generation) {
            self.out.push(Action::Withdraw { slot });
        }
        if was_sealed {
            self.eviction.forget(tier, generation);
            self.withdraw_from_directory(announced);
        }
        self.timers.set(self.now.after_ms(DRAIN_MS), Timer::Drain);
        true
    }

    pub(super) fn drain_again(&mut self) {
        if self.objects.draining_count() > 0 {
            self.scan_wanted = true;
            self.timers.set(self.now.after_ms(DRAIN_MS), Timer::Drain);
        }
    }

    /// Frees what nobody reads any more. `pinned` was taken after the last withdrawal.
    pub(super) fn pin_scan(&mut self, pinned: &Pinned, touched: &[SlotId]) {
        for slot in touched {
            if let Some(generation) = self.objects.generation_of_slot(*slot)
                && let Some(object) = self.objects.get(generation)
            {
                self.eviction.touch(object.tier, generation);
            }
        }
        let mut pinned = pinned.rising();
        let free: Vec<Generation> = self
            .objects
            .draining()
            .filter(|generation| !pinned.contains(*generation))
            .filter(|generation| self.objects.get(*generation).is_some_and(Object::only_pins_hold))
            .collect();
        for generation in &free {
            self.free_object(*generation);
        }
        self.scans = Scans { left: self.objects.draining_count(), bytes: 0 };
        if !self.waiting_space.is_empty() {
            self.retry_space();
        }
        self.retire_returned();
    }

    /// Takes an object out of the books and gives its extent back.
    pub(super) fn free_object(&mut self, generation: Generation) {
        let Some(object) = self.objects.remove(generation) else {
            return;
        };
        if let Err(error) = self.space.free(object.extent) {
            // The books of objects and of extents disagree: nothing is handed out twice, the extent is lost.
            debug_assert!(false, "{error}");
        }
    }
}
