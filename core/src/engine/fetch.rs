//! Gets from other nodes: who is asked, where the bytes land, when they may be believed. Not the owner's side
//! (`owner`). Invariant: a fetch succeeds only if its lease, counted from before the question and less a fifth for
//! clocks that run at different rates, had not run out when the last byte was there.

use std::collections::{BTreeMap, VecDeque};

use super::action::Action;
use super::cluster::Pending;
use super::lifecycle::State;
use super::objects::Object;
use super::room::Purpose;
use super::space::Owner;
use super::timer::{Time, Timer};
use super::{Engine, THRESHOLD_DEFAULT};
use crate::error::{ErrorKind, StoreError};
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Generation, LinkId, NodeId, ObjectId, TransferId};
use crate::wire::{ClientReply, Granted, Holder, IfExists, PeerMessage, PutHints, Range};

/// How soon a fetch that met a passing obstacle tries again, in milliseconds.
const RETRY_MS: u64 = 20;
/// Keys whose holder is remembered.
const HINTS_MAX: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FetchId(pub(super) u64);

/// What a fetch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// The bytes; kept here for later readers or not.
    Object { keep: bool },
    /// Only the metadata.
    Stat,
    /// Only whether it exists.
    Existence,
}

#[derive(Debug)]
struct FetchWaiter {
    client: ClientId,
    request: u64,
    deadline: Time,
    timeout_ms: u64,
}

#[derive(Debug)]
enum Stage {
    /// Waits for a link, a retry, or the directory's answer.
    Waiting,
    /// A GET is under way.
    Asked { link: LinkId, request: u64, at: Time },
    /// Bytes are known to be at a peer, and there is no room for them yet.
    NeedsRoom { link: LinkId, source: Source },
    /// The payload of the answer is landing.
    Landing { link: LinkId },
    /// A read is under way.
    Reading {
        link: LinkId,
        transfer: TransferId,
        granted: Granted,
        valid_until: Time,
    },
}

/// What a peer has answered.
#[derive(Clone, Copy, Debug)]
struct Source {
    object: ObjectId,
    meta: ObjectMeta,
    /// None: the answer held the bytes, but there was no room for them; ask again.
    granted: Option<(Granted, Time)>,
}

#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) key: Key,
    range: Option<Range>,
    want: Want,
    waiters: Vec<FetchWaiter>,
    stage: Stage,
    tried: Vec<NodeId>,
}

/// Which node gave a key's object last.
#[derive(Debug, Default)]
pub(super) struct Hints {
    nodes: BTreeMap<Key, NodeId>,
    order: VecDeque<Key>,
}

impl Hints {
    fn remember(&mut self, key: &Key, node: NodeId) {
        if self.nodes.insert(key.clone(), node).is_none() {
            self.order.push_back(key.clone());
        }
        if self.order.len() > HINTS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.nodes.remove(&oldest);
        }
    }

    fn get(&self, key: &Key) -> Option<NodeId> {
        self.nodes.get(key).copied()
    }

    pub(super) fn forget(&mut self, key: &Key) {
        // Its place in `order` stays until it comes up: forgetting is rare, and the list is bounded.
        self.nodes.remove(key);
    }

    pub(super) fn forget_node(&mut self, node: NodeId) {
        self.nodes.retain(|_, hint| *hint != node);
    }
}

impl Engine {
    /// Starts a get from other nodes, or joins one that is under way.
    pub(super) fn fetch(
        &mut self,
        client: ClientId,
        request: u64,
        key: Key,
        range: Option<Range>,
        want: Want,
        timeout_ms: u64,
    ) {
        let deadline = self.now.after_ms(timeout_ms);
        let waiter = FetchWaiter {
            client,
            request,
            deadline,
            timeout_ms,
        };
        let same = |fetch: &Fetch| fetch.key == key && fetch.range == range && fetch.want == want;
        let joinable = matches!(want, Want::Object { keep: true });
        if joinable && let Some((&id, fetch)) = self.fetches.iter_mut().find(|(_, fetch)| same(fetch)) {
            fetch.waiters.push(waiter);
            self.timers.set(deadline, Timer::Fetch(id));
            return;
        }
        let id = FetchId(self.next_fetch);
        self.next_fetch += 1;
        let fetch = Fetch {
            key,
            range,
            want,
            waiters: vec![waiter],
            stage: Stage::Waiting,
            tried: Vec::new(),
        };
        self.fetches.insert(id, fetch);
        self.timers.set(deadline, Timer::Fetch(id));
        self.fetch_start(id);
    }

    /// Asks the node that is most likely to have the object.
    fn fetch_start(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get(&id) else {
            return;
        };
        let key = fetch.key.clone();
        let hinted = self.hints.get(&key).filter(|node| !fetch.tried.contains(node));
        if let Some(node) = hinted
            && self.link_to(node).is_some()
        {
            return self.fetch_ask(id, node);
        }
        if self.directory.is_some() {
            let holders = self.live_holders(&key, self.config.member.node);
            if holders.is_empty() {
                return self.ask_everyone(key, super::cluster::AskFor::Fetch(id));
            }
            return self.fetch_from(id, &holders);
        }
        match self
            .directory_link
            .and_then(|link| self.links.get(&link))
            .and_then(|link| link.node)
        {
            Some(node) => self.fetch_ask(id, node),
            None => {
                let why = StoreError::unavailable(
                    "the directory",
                    format!("get {key:?}: there is no link to the node that keeps it; it is being dialled"),
                );
                self.fetch_obstacle(id, &why);
            }
        }
    }

    /// Asks the first of these nodes that was not tried.
    pub(super) fn fetch_from(&mut self, id: FetchId, holders: &[Holder]) {
        let Some(fetch) = self.fetches.get(&id) else {
            return;
        };
        let fresh = holders.iter().find(|holder| !fetch.tried.contains(&holder.node));
        let Some(holder) = fresh.cloned() else {
            let why = StoreError::PeerLost {
                operation: "get".into(),
                subject: fetch.key.to_string(),
                peer: holders
                    .iter()
                    .map(|holder| holder.address.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
                why: "none of the nodes that are said to hold it gave it".into(),
            };
            if let Some(fetch) = self.fetches.get_mut(&id) {
                fetch.tried.clear();
            }
            return self.fetch_obstacle(id, &why);
        };
        if self.link_to(holder.node).is_some() {
            return self.fetch_ask(id, holder.node);
        }
        // The answer comes when the link is up: `link_established` starts waiting fetches again.
        self.hints.remember(&self.fetches[&id].key.clone(), holder.node);
        self.dial(&holder.address);
        self.timers
            .set(self.now.after_ms(RETRY_MS * 10), Timer::Retry(id));
    }

    fn fetch_ask(&mut self, id: FetchId, node: NodeId) {
        let Some(link) = self.link_to(node) else { return };
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return;
        };
        let (range, inline_max) = match fetch.want {
            Want::Object { .. } => (
                fetch.range,
                self.config.threshold_bytes.unwrap_or(THRESHOLD_DEFAULT),
            ),
            Want::Stat | Want::Existence => (
                Some(Range {
                    start: 0,
                    len_bytes: 0,
                }),
                0,
            ),
        };
        let message = PeerMessage::Get {
            key: fetch.key.clone(),
            range,
            inline_max,
        };
        let at = self.now;
        let request = self.ask_peer(link, message, Pending::Get { fetch: id });
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::Asked { link, request, at };
        }
    }

    /// How many bytes a fetch is for, once the object's length is known.
    fn wanted_len(fetch: &Fetch, meta: &ObjectMeta) -> Result<u64, StoreError> {
        match fetch.range {
            None => Ok(meta.len_bytes),
            Some(range) => range.check(&fetch.key, meta.len_bytes).map(|()| range.len_bytes),
        }
    }

    /// DATA: the object is the payload of this very message.
    pub(super) fn fetch_data(
        &mut self,
        link: LinkId,
        request: u64,
        id: FetchId,
        object: ObjectId,
        meta: ObjectMeta,
        payload_len: u64,
    ) {
        let Some(fetch) = self.fetches.get(&id) else {
            return;
        };
        match fetch.want {
            Want::Object { .. } => {}
            Want::Stat | Want::Existence => return self.fetch_described(id, link, object, meta),
        }
        let wanted = Self::wanted_len(fetch, &meta);
        if wanted != Ok(payload_len) {
            let why = StoreError::protocol(format!(
                "get {:?}: the answer has {payload_len} bytes of payload, {wanted:?} were asked",
                fetch.key
            ));
            return self.fetch_failed(id, &why);
        }
        let Some(extent) = self.space_now(payload_len) else {
            return self.fetch_needs_room(
                id,
                link,
                Source {
                    object,
                    meta,
                    granted: None,
                },
                payload_len,
            );
        };
        let Some(generation) = self.insert_fetched(id, object, meta, extent) else {
            return;
        };
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::Landing { link };
        }
        self.landing.insert(request, (generation, id));
        if payload_len == 0 {
            return self.landed(request, Ok(()));
        }
        self.out.push(Action::Land { request, extent });
    }

    fn fetch_described(&mut self, id: FetchId, link: LinkId, object: ObjectId, meta: ObjectMeta) {
        let Some(fetch) = self.fetches.remove(&id) else {
            return;
        };
        if let Some(node) = self.links.get(&link).and_then(|link| link.node) {
            self.hints.remember(&fetch.key, node);
        }
        let holders = self.holder_names_from(link);
        for waiter in fetch.waiters {
            let reply = match fetch.want {
                Want::Existence => ClientReply::Exists,
                _ => ClientReply::Stat {
                    object,
                    meta,
                    tier: None,
                    pinned: false,
                    holders: holders.clone(),
                },
            };
            self.reply(waiter.client, waiter.request, Ok(reply));
        }
    }

    /// GRANT: the object may be read until the lease runs out.
    pub(super) fn fetch_grant(
        &mut self,
        link: LinkId,
        id: FetchId,
        object: ObjectId,
        meta: ObjectMeta,
        granted: Granted,
    ) {
        let Some(fetch) = self.fetches.get(&id) else {
            return;
        };
        let Stage::Asked { at, .. } = fetch.stage else {
            return;
        };
        if !matches!(fetch.want, Want::Object { .. }) {
            self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
            return self.fetch_described(id, link, object, meta);
        }
        let len_bytes = match Self::wanted_len(fetch, &meta) {
            Ok(len_bytes) if len_bytes == granted.extent.len_bytes => len_bytes,
            Ok(len_bytes) => {
                let why = StoreError::protocol(format!(
                    "get {:?}: {} bytes were granted, {len_bytes} were asked",
                    fetch.key, granted.extent.len_bytes
                ));
                return self.fetch_failed(id, &why);
            }
            Err(why) => return self.fetch_failed(id, &why),
        };
        let valid_until = at.after_ms(u64::from(granted.lease_ms) * 4 / 5);
        self.fetch_needs_room(
            id,
            link,
            Source {
                object,
                meta,
                granted: Some((granted, valid_until)),
            },
            len_bytes,
        );
    }

    fn fetch_needs_room(&mut self, id: FetchId, link: LinkId, source: Source, len_bytes: u64) {
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::NeedsRoom { link, source };
        }
        self.want_space(Purpose::Fetch { fetch: id }, Owner::Node, len_bytes);
    }

    /// There is room for what a peer holds.
    pub(super) fn fetch_into(&mut self, id: FetchId, extent: Extent) {
        let Some((link, source)) = self.fetches.get(&id).and_then(|fetch| match fetch.stage {
            Stage::NeedsRoom { link, source } => Some((link, source)),
            _ => None,
        }) else {
            let _ = self.space.free(extent);
            return;
        };
        let fresh = source.granted.filter(|(_, valid_until)| self.now < *valid_until);
        let (Some((granted, valid_until)), true) = (fresh, self.links.contains_key(&link)) else {
            // The bytes were in the answer and could not be kept, or the lease ran out while there was no room.
            let _ = self.space.free(extent);
            return self.fetch_again(id);
        };
        let Some(generation) = self.insert_fetched(id, source.object, source.meta, extent) else {
            return;
        };
        let transfer = TransferId(self.next_transfer);
        self.next_transfer += 1;
        self.transfers.insert(transfer, (generation, id));
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::Reading {
                link,
                transfer,
                granted,
                valid_until,
            };
        }
        self.out.push(Action::Read {
            link,
            transfer,
            remote: granted.extent,
            local: extent,
        });
    }

    fn insert_fetched(
        &mut self,
        id: FetchId,
        object: ObjectId,
        meta: ObjectMeta,
        extent: Extent,
    ) -> Option<Generation> {
        let fetch = self.fetches.get(&id)?;
        let transient = fetch.want != Want::Object { keep: true };
        Some(self.objects.insert(Object {
            key: fetch.key.clone(),
            id: object,
            meta,
            extent,
            state: State::Filling,
            slot: None,
            hints: PutHints::default(),
            if_exists: IfExists::Keep,
            writer: None,
            in_place: false,
            copied_here: true,
            leases: 0,
            sends: 0,
            filling: true,
            transient,
        }))
    }

    /// The payload of a DATA is in its place, or never will be.
    pub(super) fn landed(&mut self, request: u64, result: Result<(), StoreError>) {
        let Some((generation, id)) = self.landing.remove(&request) else {
            return;
        };
        if let Some(object) = self.objects.get_mut(generation) {
            object.filling = false;
        }
        if !self.fetches.contains_key(&id) {
            // Nobody waits for it any more.
            return self.free_object(generation);
        }
        match result {
            Ok(()) => self.fetch_complete(id, generation, Path::Eager),
            Err(why) => {
                self.free_object(generation);
                self.fetch_obstacle(id, &why);
            }
        }
    }

    /// A read has ended.
    pub(super) fn read_done(&mut self, transfer: TransferId, result: Result<(), StoreError>) {
        let Some((generation, id)) = self.transfers.remove(&transfer) else {
            return;
        };
        if let Some(object) = self.objects.get_mut(generation) {
            object.filling = false;
        }
        let Some(&Stage::Reading {
            link,
            granted,
            valid_until,
            ..
        }) = self.fetches.get(&id).map(|f| &f.stage)
        else {
            // Its fetch was given up; this was what the extent waited for.
            return self.free_object(generation);
        };
        self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
        match result {
            Ok(()) if self.now <= valid_until => self.fetch_complete(id, generation, Path::Read),
            Ok(()) => {
                // Late: the owner may have reused the extent. Time never turns a late read into a success.
                self.free_object(generation);
                self.fetch_again(id);
            }
            Err(why) => {
                self.free_object(generation);
                if let Some(node) = self.links.get(&link).and_then(|link| link.node)
                    && let Some(fetch) = self.fetches.get_mut(&id)
                {
                    fetch.tried.push(node);
                }
                self.fetch_obstacle(id, &why);
            }
        }
    }

    fn fetch_complete(&mut self, id: FetchId, generation: Generation, path: Path) {
        let Some(fetch) = self.fetches.remove(&id) else {
            return;
        };
        match path {
            Path::Eager => self.counters.eager += 1,
            _ => self.counters.read += 1,
        }
        let link = match fetch.stage {
            Stage::Landing { link, .. } | Stage::Reading { link, .. } => Some(link),
            _ => None,
        };
        if let Some(node) = link
            .and_then(|link| self.links.get(&link))
            .and_then(|link| link.node)
        {
            self.hints.remember(&fetch.key, node);
        }
        let mut generation = generation;
        if fetch.want == (Want::Object { keep: true }) {
            let checksum = self
                .objects
                .get(generation)
                .map_or(crate::Checksum::None, |o| o.meta.checksum);
            // Someone may have put or fetched the same key meanwhile; then that object is the answer.
            let _ = self.publish(generation, checksum);
            match self.objects.sealed(&fetch.key) {
                Some((sealed, _)) => generation = sealed,
                None => {
                    let why = StoreError::too_large("get", "number of objects (max_objects)", 0, 0);
                    return self.answer_all(fetch.waiters, &why);
                }
            }
        }
        let Some(extent) = self.objects.get(generation).map(|object| object.extent) else {
            return;
        };
        for waiter in fetch.waiters {
            self.locate(waiter.client, waiter.request, generation, extent, path);
        }
        if self
            .objects
            .get(generation)
            .is_some_and(|object| object.transient)
        {
            // From here on only the pins that were just made hold it.
            self.withdraw(generation);
        }
    }

    fn answer_all(&mut self, waiters: Vec<FetchWaiter>, why: &StoreError) {
        for waiter in waiters {
            self.counters.failed += 1;
            self.reply(waiter.client, waiter.request, Err(why.clone()));
        }
    }

    /// The fetch cannot succeed.
    pub(super) fn fetch_failed(&mut self, id: FetchId, why: &StoreError) {
        let Some(fetch) = self.fetches.remove(&id) else {
            return;
        };
        self.leave_stage(fetch.stage);
        if fetch.want == Want::Existence && why.kind() == ErrorKind::NotFound {
            for waiter in fetch.waiters {
                let error = StoreError::timed_out("wait", &fetch.key, 0);
                self.reply(waiter.client, waiter.request, Err(error));
            }
            return;
        }
        self.answer_all(fetch.waiters, why);
    }

    /// Something passing is in the way: tries again until the deadline, and remembers why it could not.
    pub(super) fn fetch_obstacle(&mut self, id: FetchId, why: &StoreError) {
        let passing = matches!(
            why.kind(),
            ErrorKind::PeerLost | ErrorKind::Busy | ErrorKind::Stale | ErrorKind::TimedOut | ErrorKind::Os
        );
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return;
        };
        let alone = self.directory.is_some() && self.peers.is_empty();
        if !passing || alone {
            return self.fetch_failed(id, why);
        }
        self.hints.forget(&fetch.key);
        fetch.stage = Stage::Waiting;
        self.timers.set(self.now.after_ms(RETRY_MS), Timer::Retry(id));
    }

    /// Asks again from the start, soon.
    fn fetch_again(&mut self, id: FetchId) {
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::Waiting;
            fetch.tried.clear();
            self.timers.set(self.now.after_ms(RETRY_MS), Timer::Retry(id));
        }
    }

    pub(super) fn fetch_retry(&mut self, id: FetchId) {
        if self
            .fetches
            .get(&id)
            .is_some_and(|fetch| matches!(fetch.stage, Stage::Waiting))
        {
            self.fetch_start(id);
        }
    }

    /// A link to a node is there: fetches that waited for it go on.
    pub(super) fn fetches_waiting_start(&mut self) {
        let waiting: Vec<FetchId> = self
            .fetches
            .iter()
            .filter(|(_, f)| matches!(f.stage, Stage::Waiting))
            .map(|(&id, _)| id)
            .collect();
        for id in waiting {
            self.fetch_start(id);
        }
    }

    /// FAILED or LOCATED in answer to a GET.
    pub(super) fn fetch_refused(&mut self, link: LinkId, id: FetchId, why: &StoreError) {
        let node = self.links.get(&link).and_then(|link| link.node);
        let from_directory = self.directory_link == Some(link);
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return;
        };
        fetch.stage = Stage::Waiting;
        match why.kind() {
            ErrorKind::NotFound if from_directory => self.fetch_failed(id, why),
            ErrorKind::NotFound => {
                // A holder that was remembered or named has dropped it meanwhile.
                fetch.tried.extend(node);
                let key = fetch.key.clone();
                self.hints.forget(&key);
                self.fetch_start(id);
            }
            _ => self.fetch_obstacle(id, why),
        }
    }

    pub(super) fn fetch_located(&mut self, id: FetchId, holders: &[Holder]) {
        if let Some(fetch) = self.fetches.get_mut(&id) {
            fetch.stage = Stage::Waiting;
            self.fetch_from(id, holders);
        }
    }

    /// The link over which a fetch was under way has gone.
    pub(super) fn fetches_lost(&mut self, link: LinkId, peer: &str, why: &StoreError) {
        let node = self.links.get(&link).and_then(|link| link.node);
        let of_link = |stage: &Stage| match stage {
            Stage::Asked { link: of, .. } => *of == link,
            // A read or a landing ends by its own completion, which says when no more bytes land.
            _ => false,
        };
        let lost: Vec<FetchId> = self
            .fetches
            .iter()
            .filter(|(_, f)| of_link(&f.stage))
            .map(|(&id, _)| id)
            .collect();
        for id in lost {
            let Some(fetch) = self.fetches.get_mut(&id) else {
                continue;
            };
            fetch.tried.extend(node);
            let why = StoreError::PeerLost {
                operation: "get".into(),
                subject: fetch.key.to_string(),
                peer: peer.to_owned(),
                why: why.to_string().into(),
            };
            self.fetch_obstacle(id, &why);
        }
    }

    pub(super) fn fetch_deadline(&mut self, id: FetchId) {
        let now = self.now;
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return;
        };
        let (late, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut fetch.waiters)
            .into_iter()
            .partition(|waiter| waiter.deadline <= now);
        fetch.waiters = waiting;
        let key = fetch.key.clone();
        for waiter in late {
            let error = StoreError::timed_out("get", &key, waiter.timeout_ms);
            self.counters.failed += 1;
            self.reply(waiter.client, waiter.request, Err(error));
        }
        self.drop_fetch_without_waiters(id);
    }

    pub(super) fn forget_fetch_waiters_of(&mut self, client: ClientId) {
        let ids: Vec<FetchId> = self.fetches.keys().copied().collect();
        for id in ids {
            if let Some(fetch) = self.fetches.get_mut(&id) {
                fetch.waiters.retain(|waiter| waiter.client != client);
            }
            self.drop_fetch_without_waiters(id);
        }
    }

    fn drop_fetch_without_waiters(&mut self, id: FetchId) {
        if self
            .fetches
            .get(&id)
            .is_some_and(|fetch| fetch.waiters.is_empty())
            && let Some(fetch) = self.fetches.remove(&id)
        {
            self.leave_stage(fetch.stage);
            self.forget_space_request_of_fetch(id);
        }
    }

    /// Gives up what a fetch held. An extent into which bytes may still land stays until they cannot any more.
    fn leave_stage(&mut self, stage: Stage) {
        match stage {
            Stage::Waiting | Stage::Landing { .. } => {}
            Stage::Asked { request, .. } => {
                // A grant that still comes is released at once, see `late_answer`.
                self.abandon(request);
            }
            Stage::NeedsRoom { link, source } => {
                if let Some((granted, _)) = source.granted {
                    self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
                }
            }
            Stage::Reading {
                link,
                transfer,
                granted,
                ..
            } => {
                self.out.push(Action::CancelRead { transfer });
                self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
            }
        }
    }
}
