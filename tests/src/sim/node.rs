//! A simulated node: an engine, and models of the memory, index, pages and jobs that its actions touch. Not clients
//! and not the network. Invariant: actions are carried out as `hetmem-node` does: memory in order, a `PinScan` before
//! any other input, the fabric's in order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, Weak};

use hetmem_core::engine::{
    Action, Attachment, Engine, EngineConfig, Event, FabricId, FabricUse, GpuUse, Input, Payload, Pinned,
    PublishedObject, ReadEnd, RingState, Time,
};
use hetmem_core::receipt::Path;
use hetmem_core::wire::{
    Batch, ClientReply, FrameHeader, FrameKind, Located, LocatedMany, Member, PeerMessage, decode,
};
use hetmem_core::{
    ClientId, Epoch, Extent, Generation, Key, LandingId, LeaseId, LinkId, NodeId, ObjectId, RemoteExtent,
    RemoteKey, SegmentId, SlotId, StoreError, Tier, TransferId,
};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, LandingToken, RegionMemory, SimFabric,
};

use super::guards::{Guards, Hold};
use super::outbox::Message;
use super::plan::{MS, Plan};
use super::ring::Ring;
use super::world::{Due, World};

pub(super) const FABRIC: FabricId = FabricId(0);
const INDEX_SEGMENT: SegmentId = SegmentId(0);
const SLOT_LEN: u64 = 64;
pub(super) const HEARTBEAT_MS: u64 = 100;

/// A clock that runs a little too fast or too slow, and starts anywhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    pub(super) ppm: i64,
    pub(super) offset: u64,
}

impl Clock {
    fn scale(self) -> u128 {
        u128::try_from(1_000_000 + self.ppm).unwrap_or(1_000_000)
    }

    /// What the clock shows at a true time.
    pub(super) fn at(self, now: u64) -> u64 {
        let shown = u128::from(now) * self.scale() / 1_000_000;
        self.offset.saturating_add(u64::try_from(shown).unwrap_or(u64::MAX))
    }

    /// The first true time at which the clock shows this.
    fn when(self, shown: u64) -> u64 {
        let since = u128::from(shown.saturating_sub(self.offset));
        u64::try_from((since * 1_000_000).div_ceil(self.scale())).unwrap_or(u64::MAX)
    }
}

/// Where parts of a payload go: each from a byte of it on.
pub(super) type Places = (LandingId, Vec<(u64, Extent)>);

/// A read under way, the lease that it is under (whose, of which incarnation, until when of the owner's clock), and
/// which generation was there when it began.
struct Read {
    /// None if only a word is read.
    local: Option<Extent>,
    lease: Option<(usize, u64, u64)>,
    generation: Option<(RemoteKey, Generation)>,
    /// Whose index the word that is read with it is of.
    word_of: Option<RemoteKey>,
}

/// One client's pins. A place is taken by the client, or by the node on its behalf.
pub(super) struct Page {
    pub(super) pins: Vec<Option<Generation>>,
}

pub(super) struct Shown {
    pub(super) object: PublishedObject,
}

pub(super) struct Node {
    pub(super) name: String,
    pub(super) epoch: u64,
    pub(super) alive: bool,
    pub(super) clock: Clock,
    pub(super) engine: Engine,
    pub(super) fabric: Arc<SimFabric>,
    pub(super) segments: BTreeMap<SegmentId, Arc<HeapRegion>>,
    pub(super) keys: BTreeMap<RemoteKey, SegmentId>,
    pub(super) tiers: BTreeMap<SegmentId, Tier>,
    pub(super) index: BTreeMap<SlotId, Shown>,
    pub(super) by_key: BTreeMap<Key, SlotId>,
    /// What it has announced to hold for good.
    pub(super) promised: BTreeSet<ObjectId>,
    /// When the system last had no memory for a segment of it.
    pub(super) segment_failed: Option<u64>,
    words: Arc<HeapRegion>,
    words_key: RemoteKey,
    pub(super) pages: BTreeMap<ClientId, Page>,
    /// Requests for many keys of which some have an answer.
    pub(super) items: BTreeMap<(ClientId, u64), BTreeMap<u32, Result<Located, StoreError>>>,
    pub(super) touched: Vec<SlotId>,
    pub(super) guards: Guards,
    pub(super) rings: BTreeMap<ClientId, Ring>,
    pub(super) outbox: VecDeque<Action>,
    pub(super) emptying: bool,
    pub(super) deferred: BTreeMap<LinkId, VecDeque<Message>>,
    pub(super) dialling: BTreeMap<LinkId, String>,
    reads: BTreeMap<TransferId, Read>,
    /// The grants of each remote place that were not given back.
    grants: BTreeMap<(RemoteKey, u64), BTreeSet<(LeaseId, LinkId)>>,
    /// When the leases that this node gave run out, by its clock.
    granted_until: BTreeMap<LeaseId, u64>,
    /// Where reads that ended after their lease, or had none, have put their bytes; and whose index would have to
    /// hold which generation still for these to be an object.
    spoiled: BTreeMap<(SegmentId, u64), Option<(RemoteKey, Generation)>>,
    landings: BTreeMap<LandingId, Vec<(u64, Extent)>>,
    sends: BTreeMap<u64, Vec<Extent>>,
    leases: BTreeMap<LeaseId, (LinkId, SegmentId, u64)>,
    pub(super) copies: BTreeMap<Generation, (Extent, Extent)>,
}

/// Hears the fabric on behalf of one incarnation of a node.
struct Sink {
    world: Weak<Mutex<World>>,
    node: usize,
    epoch: u64,
}

impl Sink {
    fn with<R>(&self, f: impl FnOnce(&mut World) -> R) -> Option<R> {
        let world = self.world.upgrade()?;
        let mut world = world.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let node = &world.nodes[self.node];
        (node.alive && node.epoch == self.epoch).then(|| f(&mut world))
    }
}

impl FabricSink for Sink {
    fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
        let FrameHeader { kind, request, payload_len, .. } = header;
        let input = match kind {
            FrameKind::Batch => {
                decode(body).map(|batch: Batch| Input::PeerBatch { link, batch, payload_len })
            }
            _ => decode(body).map(|message: PeerMessage| Input::PeerMessage {
                link,
                request,
                message,
                payload_len,
            }),
        };
        let input = input.unwrap_or_else(|why| Input::Refused { link, why });
        match self.with(|world| world.feed(self.node, input)).flatten() {
            Some((landing, places)) => Landing::scattered(LandingToken(landing.0), payload_len, places),
            None => Landing::Discard,
        }
    }

    fn event(&self, event: FabricEvent) {
        self.with(|world| world.fabric_event(self.node, event));
    }
}

impl Node {
    pub(super) fn start(world: &World, number: usize, epoch: u64, clock: Clock) -> Self {
        let name = format!("n{number}");
        let plan = &world.plan;
        let sink = Arc::new(Sink { world: Weak::clone(&world.me), node: number, epoch });
        let fabric = world.net.fabric(&name, sink).expect("the name is free");
        let slots = usize::try_from(SLOT_LEN * u64::from(plan.objects_max)).expect("a small index");
        let words = Arc::new(HeapRegion::new(slots));
        let key = fabric
            .register(INDEX_SEGMENT, Arc::clone(&words) as _, Access::RemoteRead)
            .expect("the index is registered once");
        let engine = Engine::new(config(plan, number, epoch, key));
        Self {
            name,
            epoch,
            alive: true,
            clock,
            engine,
            fabric,
            segments: BTreeMap::new(),
            keys: BTreeMap::new(),
            tiers: BTreeMap::new(),
            index: BTreeMap::new(),
            by_key: BTreeMap::new(),
            promised: BTreeSet::new(),
            segment_failed: None,
            words,
            words_key: key,
            pages: BTreeMap::new(),
            items: BTreeMap::new(),
            touched: Vec::new(),
            guards: Guards::default(),
            rings: BTreeMap::new(),
            outbox: VecDeque::new(),
            emptying: false,
            deferred: BTreeMap::new(),
            dialling: BTreeMap::new(),
            reads: BTreeMap::new(),
            grants: BTreeMap::new(),
            granted_until: BTreeMap::new(),
            spoiled: BTreeMap::new(),
            landings: BTreeMap::new(),
            sends: BTreeMap::new(),
            leases: BTreeMap::new(),
            copies: BTreeMap::new(),
        }
    }

    /// When the engine wants to be called, in true time.
    pub(super) fn next_timer(&self) -> Option<u64> {
        let timer = self.engine.next_timer().filter(|_| self.alive)?;
        Some(self.clock.when(timer.0))
    }

    pub(super) fn memory(&self, extent: Extent) -> Option<(&HeapRegion, usize, usize)> {
        let region = self.segments.get(&extent.segment)?;
        let end = extent.offset.checked_add(extent.len_bytes)?;
        if end > region.len_bytes() {
            return None;
        }
        let offset = usize::try_from(extent.offset).ok()?;
        Some((region, offset, usize::try_from(extent.len_bytes).ok()?))
    }

    pub(super) fn write_word(&self, slot: SlotId, word: u64) {
        let at = usize::try_from(u64::from(slot.0) * SLOT_LEN).expect("a small index");
        self.words.write(at, &word.to_le_bytes());
    }
}

fn config(plan: &Plan, number: usize, epoch: u64, key: RemoteKey) -> EngineConfig {
    let name = format!("n{number}");
    EngineConfig {
        member: Member { node: NodeId(number as u64 + 1), epoch: Epoch(epoch), address: name.clone(), name },
        join: match plan.heirs {
            1 => (number > 0).then(|| "n0".to_owned()).into_iter().collect(),
            heirs => (0..heirs).map(|heir| format!("n{heir}")).collect(),
        },
        capacity_bytes: plan.capacity_bytes,
        client_quota_bytes: plan.quota_bytes,
        objects_max: plan.objects_max,
        fabrics: vec![FabricUse {
            id: FABRIC,
            name: "sim".into(),
            index_key: key,
            gather_max: plan.network.gather_max,
            tiers: plan.reached(),
            stages_gpus: plan.stages_gpus,
        }],
        generation_base: 0,
        generation_stride: SLOT_LEN,
        threshold_bytes: plan.threshold_bytes,
        lease_ms: plan.lease_ms,
        heartbeat_ms: HEARTBEAT_MS,
        gpus: (0..plan.gpus)
            .map(|ordinal| GpuUse {
                ordinal,
                uuid: format!("GPU-{ordinal}").into(),
                capacity_bytes: plan.gpu_bytes,
                client_quota_bytes: plan.gpu_bytes / 2,
                granule_bytes: 16 << 10,
            })
            .collect(),
        why_no_gpu: "none was configured".into(),
    }
}

impl World {
    /// Hands an input to a node and carries out what follows. Says where the payload of a frame goes.
    pub(super) fn feed(&mut self, at: usize, input: Input) -> Option<Places> {
        let landed = matches!(input, Input::ReadDone { .. } | Input::SendDone { .. } | Input::Landed { .. });
        if !landed {
            self.drain_rings(at);
        }
        let landing = self.hand_in(at, input);
        self.empty_outbox(at);
        landing
    }

    /// The same without a look at what clients have published.
    pub(super) fn hand_in(&mut self, at: usize, input: Input) -> Option<Places> {
        let mut landing = None;
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            self.trace_input(at, &input);
            self.before(at, &input);
            let now = Time(self.nodes[at].clock.at(self.now()));
            for action in self.nodes[at].engine.handle(now, input) {
                self.trace_action(at, &action);
                if let Some(next) = self.act(at, action, &mut landing) {
                    inputs.push_front(next);
                }
            }
        }
        if let Some((number, places)) = &landing {
            self.nodes[at].landings.insert(*number, places.clone());
        }
        landing
    }

    /// Takes back holds that an input says are over.
    fn before(&mut self, at: usize, input: &Input) {
        let node = &mut self.nodes[at];
        match input {
            Input::SendDone { send } => {
                for extent in node.sends.remove(send).unwrap_or_default() {
                    node.guards.remove(extent.segment, Hold::Sending(*send));
                }
            }
            Input::Landed { landing, .. } => {
                for (_, extent) in node.landings.remove(landing).unwrap_or_default() {
                    node.guards.remove(extent.segment, Hold::Landing(landing.0));
                }
            }
            Input::ReadDone { transfer, result } => {
                self.read_over(at, *transfer, result.as_ref().ok().copied());
            }
            Input::PeerMessage { link, message, .. } => node.hears(*link, message),
            Input::PeerBatch { link, batch, .. } => {
                batch.0.iter().for_each(|batched| node.hears(*link, &batched.message));
            }
            Input::LinkDown { link, .. } => {
                let of_link = node.leases.iter().filter(|(_, (of, ..))| of == link);
                let lost: Vec<LeaseId> = of_link.map(|(lease, _)| *lease).collect();
                for lease in lost {
                    node.end_lease(lease);
                }
            }
            Input::CopyDone { generation, .. } => {
                if let Some((from, to)) = node.copies.remove(generation) {
                    node.guards.remove(from.segment, Hold::CopiedFrom(*generation));
                    node.guards.remove(to.segment, Hold::CopiedTo(*generation));
                    // The object has moved, or its put has failed: what the client wrote to is free.
                    node.guards
                        .remove_where(|hold| matches!(hold, Hold::Reserved(_, of) if of == *generation));
                }
            }
            _ => {}
        }
    }

    /// Which generation of which index is at a place, as its owner shows it now.
    fn generation_at(&self, remote: RemoteExtent) -> Option<(RemoteKey, Generation)> {
        let owner = self.nodes.iter().find(|node| node.keys.contains_key(&remote.key))?;
        let segment = owner.keys[&remote.key];
        let around = |extent: Extent| {
            extent.segment == segment
                && extent.offset <= remote.offset
                && remote.offset + remote.len_bytes <= extent.offset + extent.len_bytes
        };
        let shown = owner.index.values().find(|shown| around(shown.object.extent))?;
        Some((owner.words_key, shown.object.generation))
    }

    /// The lease under which a node is about to read: the latest one of the place.
    fn lease_of(&self, at: usize, remote: RemoteExtent) -> Option<(usize, u64, u64)> {
        let (lease, _) = self.nodes[at].grants.get(&(remote.key, remote.offset))?.last()?;
        let owner = self.nodes.iter().position(|node| node.keys.contains_key(&remote.key))?;
        let until = *self.nodes[owner].granted_until.get(lease)?;
        Some((owner, self.nodes[owner].epoch, until))
    }

    /// A read has ended. If its lease had run out by then, its bytes may be anyone's, unless the word that was read after
    /// them says whose they are.
    fn read_over(&mut self, at: usize, transfer: TransferId, end: Option<ReadEnd>) {
        let Some(read) = self.nodes[at].reads.remove(&transfer) else { return };
        let now = self.now();
        let node = &mut self.nodes[at];
        let word = end.and_then(|end| Some((read.word_of?, Generation(end.word?))));
        let Some(local) = read.local else {
            // Only one place's bytes are asked about, but no two objects have one generation of one index.
            return node.spoiled.retain(|_, wanted| wanted.is_none() || *wanted != word);
        };
        node.guards.remove(local.segment, Hold::Reading(transfer));
        let late = read.lease.is_none_or(|(owner, epoch, until)| {
            let owner = &self.nodes[owner];
            owner.epoch == epoch && owner.clock.at(now) >= until
        });
        let place = (local.segment, local.offset);
        let node = &mut self.nodes[at];
        if !late || end.is_none() {
            node.spoiled.remove(&place);
            return;
        }
        self.tally.late_reads += u64::from(read.lease.is_some());
        self.tally.known_reads += u64::from(read.lease.is_none());
        if read.generation.is_some() && read.generation == word {
            node.spoiled.remove(&place);
        } else {
            node.spoiled.insert(place, read.generation);
        }
    }

    /// Adds a hold; a conflict is the engine's mistake.
    pub(super) fn hold(&mut self, at: usize, extent: Extent, hold: Hold) {
        let now = self.nodes[at].clock.at(self.now());
        if hold.writes() {
            self.nodes[at].spoiled.remove(&(extent.segment, extent.offset));
        }
        if let Some(other) = self.nodes[at].guards.add(extent, hold, now) {
            self.fail(format!("node {at}: {extent:?} is given to {hold:?} while it is held by {other:?}"));
        }
    }

    /// Writes into a node's memory on behalf of a hold that allows it.
    pub(super) fn write(&mut self, at: usize, extent: Extent, bytes: &[u8], allowed: impl Fn(Hold) -> bool) {
        if extent.len_bytes == 0 {
            return;
        }
        let now = self.nodes[at].clock.at(self.now());
        self.nodes[at].spoiled.remove(&(extent.segment, extent.offset));
        if let Some(other) = self.nodes[at].guards.conflict(extent, now, allowed) {
            return self.fail(format!("node {at}: {extent:?} is written while it is held by {other:?}"));
        }
        match self.nodes[at].memory(extent) {
            Some((region, offset, _)) => region.write(offset, bytes),
            None => self.fail(format!("node {at}: {extent:?} is written and is not in any segment")),
        }
    }

    fn act(&mut self, at: usize, action: Action, landing: &mut Option<Places>) -> Option<Input> {
        match action {
            Action::Reply { client, request, reply, attachment } => {
                let descriptor = match attachment {
                    Some(Attachment::Segment(segment)) => Some(segment),
                    _ => None,
                };
                self.replied(at, client, request, reply, descriptor);
            }
            Action::PinAndReply { client, request, located } => {
                let reply = self.pin(at, client, located).map(ClientReply::Located);
                self.replied(at, client, request, reply, None);
            }
            Action::GrantAhead { client, request, chunk, reply, .. } => {
                let fails = self.rng.percent(self.plan.segment_failures / 5) && !self.is_ending();
                let rings = &mut self.nodes[at].rings;
                if fails && !rings.contains_key(&client) {
                    self.tally.faults += 1;
                    let why = StoreError::os("memfd_create", "no descriptor is left");
                    self.replied(at, client, request, Err(why), None);
                    return Some(Input::AheadChanged { client, ring: RingState::default() });
                }
                let ring = rings.entry(client).or_default().grant(chunk);
                self.replied(at, client, request, Ok(reply), None);
                return Some(Input::AheadChanged { client, ring });
            }
            Action::RecallAhead { client } => {
                let ring = self.nodes[at].rings.get_mut(&client).map(Ring::close).unwrap_or_default();
                return Some(Input::AheadChanged { client, ring });
            }
            Action::Item { client, request, item, located } => {
                let located = located.and_then(|located| self.pin(at, client, located));
                let items = self.nodes[at].items.entry((client, request)).or_default();
                if items.insert(item, located).is_some() {
                    self.fail(format!("node {at}: item {item} of request {request} is answered again"));
                }
            }
            Action::ReplyItems { client, request, count } => {
                let items = self.nodes[at].items.remove(&(client, request)).unwrap_or_default();
                if !items.keys().copied().eq(0..count) {
                    self.fail(format!("node {at}: {count} items of request {request}: {items:?}"));
                }
                let many = LocatedMany::of(items.into_values());
                self.replied(at, client, request, Ok(ClientReply::LocatedMany(many)), None);
            }
            Action::CloseClient { client, why } => {
                self.fail(format!("node {at} closes client {client}, which did nothing wrong: {why}"));
            }
            Action::Fill { extent, bytes } => {
                if extent.len_bytes != bytes.len() as u64 {
                    self.fail(format!("node {at}: {} bytes fill {extent:?}", bytes.len()));
                    return None;
                }
                let within = self.nodes[at].reservation_around(extent);
                self.write(at, extent, &bytes, |hold| Some(hold) == within);
            }
            Action::Copy { generation, from, to } => {
                self.hold(at, from, Hold::CopiedFrom(generation));
                self.hold(at, to, Hold::CopiedTo(generation));
                self.nodes[at].copies.insert(generation, (from, to));
                let epoch = self.nodes[at].epoch;
                let delay = self.rng.between(10_000, 5 * MS);
                self.later(delay, Due::CopyPart { at, epoch, generation, last: false });
            }
            Action::Publish { slot, object } => self.publish(at, slot, object),
            Action::Withdraw { slot } => self.withdraw(at, slot),
            Action::ScanPins => {
                let node = &mut self.nodes[at];
                let pins = node.pages.values().flat_map(|page| page.pins.iter().flatten());
                let pinned: Pinned = pins.copied().collect();
                let touched = std::mem::take(&mut node.touched);
                return Some(Input::PinScan { pinned, touched });
            }
            Action::CloseToWriters { .. } => {}
            Action::CreateSegment { segment, tier, len_bytes, .. } => {
                let epoch = self.nodes[at].epoch;
                let delay = self.rng.between(10_000, 8 * MS);
                self.later(delay, Due::Segment { at, epoch, segment, tier, len_bytes });
            }
            Action::RetireSegment { segment, len_bytes } => self.retire(at, segment, len_bytes),
            Action::Land { landing: number, start, extent } => {
                if self.nodes[at].tiers.get(&extent.segment) != Some(&Tier::Host) {
                    self.fail(format!("node {at}: what came unasked is to land in {extent:?}"));
                }
                self.hold(at, extent, Hold::Landing(number.0));
                landing.get_or_insert_with(|| (number, Vec::new())).1.push((start, extent));
            }
            Action::Note(event) => self.note(at, &event),
            other => {
                self.hold_for_fabric(at, &other);
                self.nodes[at].outbox.push_back(other);
            }
        }
        None
    }

    /// Pins what is handed over to a client.
    fn pin(&mut self, at: usize, client: ClientId, mut located: Located) -> Result<Located, StoreError> {
        let place = (located.extent.segment, located.extent.offset);
        let empty = located.extent.len_bytes == 0;
        if self.nodes[at].tiers.get(&located.extent.segment) != Some(&located.tier) {
            self.fail(format!("node {at}: it is not in that tier: {located:?}"));
        }
        if located.path == Path::Read && !empty && self.nodes[at].spoiled.contains_key(&place) {
            self.fail(format!(
                "node {at}: a read without a live lease was a success, and its place had been given up: {located:?}"
            ));
        }
        let page = self.nodes[at].pages.get_mut(&client);
        let free = page.and_then(|page| {
            let place = page.pins.iter().position(Option::is_none)?;
            page.pins[place] = Some(located.generation);
            Some(place)
        });
        let Some(place) = free else { return Err(StoreError::busy("get", "the page is full")) };
        located.pin = u32::try_from(place).unwrap_or_default();
        self.hold(at, located.extent, Hold::Pinned(client, place));
        Ok(located)
    }

    fn hold_for_fabric(&mut self, at: usize, action: &Action) {
        match action {
            Action::Read { transfer, bytes, word, .. } => {
                let word_of = word.map(|word| word.key);
                let read = match bytes {
                    None => Read { local: None, lease: None, generation: None, word_of },
                    Some((remote, local)) => {
                        self.fabric_reaches(at, *local);
                        self.hold(at, *local, Hold::Reading(*transfer));
                        let lease = self.lease_of(at, *remote);
                        Read { local: Some(*local), lease, generation: self.generation_at(*remote), word_of }
                    }
                };
                self.nodes[at].reads.insert(*transfer, read);
            }
            Action::Send { link, message, payload, .. } => {
                self.says(at, *link, message);
                self.hold_for_send(at, payload.as_ref());
            }
            Action::SendBatch { link, batch, payload } => {
                batch.0.iter().for_each(|batched| self.says(at, *link, &batched.message));
                self.hold_for_send(at, payload.as_ref());
            }
            _ => {}
        }
    }

    /// The fabric is handed memory that it knows, whatever tier that is of.
    fn fabric_reaches(&mut self, at: usize, extent: Extent) {
        let known = self.nodes[at].keys.values().any(|segment| *segment == extent.segment);
        if !known && extent.len_bytes > 0 {
            self.fail(format!("node {at}: the fabric is handed {extent:?}, which is not registered with it"));
        }
    }

    fn hold_for_send(&mut self, at: usize, payload: Option<&Payload>) {
        let Some(Payload { send, extents }) = payload else { return };
        for extent in extents {
            self.fabric_reaches(at, *extent);
            let tier = self.nodes[at].tiers.get(&extent.segment);
            if self.plan.stages_gpus && tier != Some(&Tier::Host) {
                self.fail(format!(
                    "node {at}: {extent:?} of {tier:?} is to be a payload of a fabric that stages it"
                ));
            }
            self.hold(at, *extent, Hold::Sending(*send));
        }
        self.nodes[at].sends.insert(*send, extents.clone());
    }

    /// A node says something about leases, or promises to hold something for good.
    fn says(&mut self, at: usize, link: LinkId, message: &PeerMessage) {
        match message {
            PeerMessage::Announce { objects, .. } => {
                let lasting = objects.iter().filter(|announced| announced.role.is_lasting());
                self.nodes[at].promised.extend(lasting.map(|announced| announced.object));
            }
            PeerMessage::Release { lease } => {
                // What is read there from now on is read without it.
                for leases in self.nodes[at].grants.values_mut() {
                    leases.remove(&(*lease, link));
                }
            }
            PeerMessage::Grant { granted, .. } => {
                let Some(&segment) = self.nodes[at].keys.get(&granted.extent.key) else {
                    return self.fail(format!("node {at} grants a key that it does not have: {granted:?}"));
                };
                let extent =
                    Extent { segment, offset: granted.extent.offset, len_bytes: granted.extent.len_bytes };
                let until = self.nodes[at].clock.at(self.now()) + u64::from(granted.lease_ms) * MS;
                self.hold(at, extent, Hold::Leased(granted.lease, until));
                self.nodes[at].leases.insert(granted.lease, (link, segment, until));
                self.nodes[at].granted_until.insert(granted.lease, until);
            }
            _ => {}
        }
    }

    fn note(&mut self, at: usize, event: &Event) {
        match event {
            Event::PeerDown { .. } | Event::DirectoryLost { .. } => {
                let joined = self.now() > super::world::JOINED_NS;
                if joined && !self.plan.breaks_links() {
                    self.fail(format!("node {at}: a peer was lost in calm weather: {event:?}"));
                }
                self.disturbed();
            }
            Event::PeerUp { .. } | Event::DirectoryFound => self.disturbed(),
            Event::DirectoryTaken | Event::DirectoryHandedOver { .. } => {
                let joined = self.now() > super::world::JOINED_NS;
                self.tally.successions += u64::from(joined);
                if joined && !self.plan.breaks_links() {
                    self.fail(format!("node {at}: the directory changes hands in calm weather: {event:?}"));
                }
                self.disturbed();
            }
            Event::Evicted { objects, .. } => self.tally.evicted += objects,
            Event::PeerRefused { .. } if !self.plan.breaks_links() => {
                self.fail(format!("node {at}: a peer was refused in calm weather: {event:?}"));
            }
            _ => {}
        }
    }
}

impl Node {
    /// It hears something about leases.
    fn hears(&mut self, link: LinkId, message: &PeerMessage) {
        match message {
            PeerMessage::Release { lease } if self.leases.get(lease).is_some_and(|(of, ..)| *of == link) => {
                self.end_lease(*lease);
            }
            PeerMessage::Grant { granted, .. } => {
                let place = (granted.extent.key, granted.extent.offset);
                self.grants.entry(place).or_default().insert((granted.lease, link));
            }
            _ => {}
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        if let Some((_, segment, until)) = self.leases.remove(&lease) {
            self.guards.remove(segment, Hold::Leased(lease, until));
        }
    }

    /// The reservation, not written in place, that an extent lies in.
    fn reservation_around(&self, extent: Extent) -> Option<Hold> {
        self.guards.around(extent)
    }
}
