//! One to three engines and everything that their actions touch. Not a transport: messages arrive in the order in
//! which they were sent, at once. Invariant: a payload that no `Land` claims is dropped.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::ObjectId;
use crate::engine::{
    Action, Attachment, Engine, EngineConfig, Event, FabricId, FabricUse, GpuUse, Input, Payload, Pinned,
    PublishedObject, ReadEnd, Time,
};
use crate::error::StoreError;
use crate::key::Key;
use crate::receipt::Moved;
use crate::tier::{
    ClientId, Epoch, Extent, Generation, LinkId, NodeId, RemoteExtent, RemoteKey, SegmentId, SlotId, Tier,
    TransferId,
};
use crate::wire::{Announced, Batched, ClientReply, Located, LocatedMany, Member, PeerMessage, Role};

use super::ring::Ring;

pub(super) const FABRIC: FabricId = FabricId(0);
pub(super) const LEASE_MS: u32 = 1_000;
pub(super) const HEARTBEAT_MS: u64 = 100;
/// Extents that one send gathers.
pub(super) const GATHER_MAX: usize = 20;

pub(super) fn key(name: &str) -> Key {
    Key::new(name).expect("a key")
}

/// Bytes that differ from object to object and from place to place.
pub(super) fn pattern(seed: u8, len_bytes: usize) -> Vec<u8> {
    let mut value = u32::from(seed) + 1;
    let next = |_| {
        value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        value.to_be_bytes()[0]
    };
    (0..len_bytes).map(next).collect()
}

/// The list of nodes that may keep the directory.
pub(super) fn list(heirs: usize) -> Vec<String> {
    (0..heirs).map(|node| format!("a{node}")).collect()
}

/// What a node says of an original that it holds.
pub(super) fn announced(name: &str, object: ObjectId, len_bytes: u64) -> Announced {
    Announced { key: key(name), object, len_bytes, role: Role::Original, replicas: 1, ttl_ms: None }
}

pub(super) type Answer = Result<ClientReply, StoreError>;

/// A read that a test holds back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) node: usize,
    pub(super) link: LinkId,
    pub(super) transfer: TransferId,
    bytes: Option<(RemoteExtent, Extent)>,
    word: Option<RemoteExtent>,
}

pub(super) struct Node {
    pub(super) engine: Engine,
    pub(super) address: String,
    reached: Vec<Tier>,
    stages_gpus: bool,
    /// Objects that have moved to another tier.
    pub(super) moves: u64,
    /// GPU segments that are made from now on are not registered, whatever is reached.
    pub(super) registers_no_gpu: bool,
    /// The tiers of segments.
    pub(super) tiers: BTreeMap<SegmentId, Tier>,
    pub(super) segments: BTreeMap<SegmentId, Vec<u8>>,
    pub(super) index: BTreeMap<SlotId, PublishedObject>,
    pub(super) pins: BTreeMap<ClientId, Vec<Generation>>,
    pub(super) closed: BTreeSet<SegmentId>,
    pub(super) owners: BTreeMap<SegmentId, Option<ClientId>>,
    pub(super) attachments: Vec<Attachment>,
    pub(super) events: Vec<Event>,
    pub(super) closed_clients: Vec<ClientId>,
    pub(super) sent: Vec<PeerMessage>,
    pub(super) rings: BTreeMap<ClientId, Ring>,
    /// No ring can be made.
    pub(super) fail_rings: bool,
    /// Frames that it sent with what is in them, inputs that it handled, payloads of which something landed.
    pub(super) frames: Vec<Vec<Batched>>,
    pub(super) passes: usize,
    pub(super) landings: usize,
    pub(super) answers: BTreeMap<(ClientId, u64), Answer>,
    pub(super) items: BTreeMap<(ClientId, u64), BTreeMap<u32, Result<Located, StoreError>>>,
    links: BTreeMap<LinkId, (usize, LinkId)>,
    next_link: u64,
    pub(super) next_request: u64,
}

#[derive(Default)]
pub(super) struct World {
    pub(super) now: Time,
    pub(super) nodes: Vec<Node>,
    queue: VecDeque<(usize, Input, Option<Vec<u8>>)>,
    pub(super) hold_reads: bool,
    pub(super) held: Vec<Held>,
    /// Reads of this node fail at once.
    pub(super) fail_reads_of: Option<usize>,
    pub(super) reads: usize,
    /// Bytes are read at once, generation words are held back.
    pub(super) hold_words: bool,
    pub(super) words: Vec<Held>,
    pub(super) hold_sends: bool,
    pub(super) sends: Vec<(usize, u64)>,
    pub(super) hold_copies: bool,
    pub(super) copies: Vec<(usize, Generation)>,
    pub(super) fail_segments: usize,
    /// Addresses that cannot be dialled.
    pub(super) unreachable: BTreeSet<String>,
    /// Other addresses of nodes.
    pub(super) aliases: BTreeMap<String, usize>,
    /// Pairs of nodes that cannot reach each other, and nodes that nobody reaches any more.
    parted: BTreeSet<(usize, usize)>,
    pub(super) dead: BTreeSet<usize>,
    /// Who dialled whom, and when.
    pub(super) dials: Vec<(usize, String, Time)>,
}

/// What a node of a test differs in.
#[derive(Clone)]
pub(super) struct Shape {
    pub(super) capacity_bytes: u64,
    pub(super) quota_bytes: u64,
    pub(super) objects_max: u32,
    pub(super) threshold_bytes: Option<u64>,
    pub(super) gpus: Vec<GpuUse>,
    /// The GPU tiers whose segments the fabric knows.
    pub(super) reached: Vec<Tier>,
    /// Whether their bytes pass through host memory there.
    pub(super) stages_gpus: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            capacity_bytes: 8 << 20,
            quota_bytes: 4 << 20,
            objects_max: 1_000,
            threshold_bytes: None,
            gpus: Vec::new(),
            reached: Vec::new(),
            stages_gpus: false,
        }
    }
}

pub(super) fn config(name: usize, epoch: u64, join: Vec<String>, shape: &Shape) -> EngineConfig {
    EngineConfig {
        member: Member {
            node: NodeId(name as u64 + 1),
            epoch: Epoch(epoch),
            name: format!("n{name}"),
            address: format!("a{name}"),
        },
        join,
        capacity_bytes: shape.capacity_bytes,
        client_quota_bytes: shape.quota_bytes,
        objects_max: shape.objects_max,
        fabrics: vec![FabricUse {
            id: FABRIC,
            name: "test".into(),
            index_key: RemoteKey(1),
            gather_max: GATHER_MAX,
            tiers: shape.reached.clone(),
            stages_gpus: shape.stages_gpus,
        }],
        generation_base: 0,
        generation_stride: 64,
        threshold_bytes: shape.threshold_bytes,
        lease_ms: LEASE_MS,
        heartbeat_ms: HEARTBEAT_MS,
        gpus: shape.gpus.clone(),
        why_no_gpu: "none was configured".into(),
    }
}

impl Node {
    fn new(config: EngineConfig) -> Self {
        Self {
            address: config.member.address.clone(),
            reached: config.fabrics.iter().flat_map(|fabric| fabric.tiers.clone()).collect(),
            stages_gpus: config.fabrics.iter().any(|fabric| fabric.stages_gpus),
            moves: 0,
            registers_no_gpu: false,
            tiers: BTreeMap::new(),
            engine: Engine::new(config),
            segments: BTreeMap::new(),
            index: BTreeMap::new(),
            pins: BTreeMap::new(),
            closed: BTreeSet::new(),
            owners: BTreeMap::new(),
            attachments: Vec::new(),
            events: Vec::new(),
            closed_clients: Vec::new(),
            sent: Vec::new(),
            rings: BTreeMap::new(),
            fail_rings: false,
            frames: Vec::new(),
            passes: 0,
            landings: 0,
            answers: BTreeMap::new(),
            items: BTreeMap::new(),
            links: BTreeMap::new(),
            next_link: 1,
            next_request: 1,
        }
    }

    fn pin(&mut self, client: ClientId, mut located: Located) -> Located {
        let pins = self.pins.entry(client).or_default();
        located.pin = u32::try_from(pins.len()).expect("few pins");
        pins.push(located.generation);
        located
    }

    /// The fabric is handed what it knows.
    fn assert_reached(&self, extent: Extent) {
        let tier = self.tiers[&extent.segment];
        assert!(tier == Tier::Host || self.reached.contains(&tier), "{extent:?} of {tier} is not registered");
    }

    /// As a payload, too.
    fn assert_sendable(&self, extent: Extent) {
        self.assert_reached(extent);
        let tier = self.tiers[&extent.segment];
        assert!(tier == Tier::Host || !self.stages_gpus, "{extent:?} of {tier} is no payload");
    }

    pub(super) fn bytes(&self, extent: Extent) -> &[u8] {
        let range = span(extent.offset, extent.len_bytes);
        &self.segments[&extent.segment][range]
    }
}

fn lost() -> StoreError {
    StoreError::PeerLost {
        operation: "read".into(),
        subject: "a link".to_owned(),
        peer: "a node".to_owned(),
        why: "it was cut".into(),
    }
}

fn span(offset: u64, len_bytes: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).expect("an offset");
    start..start + usize::try_from(len_bytes).expect("a length")
}

impl World {
    /// `count` nodes that have joined the first.
    pub(super) fn new(count: usize) -> Self {
        Self::shaped(count, &Shape::default())
    }

    pub(super) fn shaped(count: usize, shape: &Shape) -> Self {
        let mut world = Self::default();
        for node in 0..count {
            let join = (node > 0).then(|| "a0".to_owned()).into_iter().collect();
            world.add(config(node, 1, join, shape));
        }
        world.settle();
        world
    }

    /// `count` nodes, of which the first `heirs` may keep the directory.
    pub(super) fn listed(count: usize, heirs: usize) -> Self {
        let mut world = Self::default();
        for node in 0..count {
            world.add(config(node, 1, list(heirs), &Shape::default()));
        }
        // A node that is there sooner than the first one waits before it dials again.
        world.advance(1_000);
        world
    }

    pub(super) fn add(&mut self, config: EngineConfig) -> usize {
        self.nodes.push(Node::new(config));
        let node = self.nodes.len() - 1;
        self.feed(node, Input::Start);
        self.settle();
        node
    }

    /// Replaces a node by its next incarnation, after its links went down.
    pub(super) fn restart(&mut self, node: usize, config: EngineConfig) {
        let links: Vec<LinkId> = self.nodes[node].links.keys().copied().collect();
        for link in links {
            self.cut(node, link);
        }
        self.queue.retain(|(to, ..)| *to != node);
        self.dead.remove(&node);
        self.nodes[node] = Node::new(config);
        self.feed(node, Input::Start);
        self.settle();
    }

    /// A node dies, and all others learn that their links to it are down.
    pub(super) fn kill(&mut self, node: usize) {
        self.dead.insert(node);
        let links: Vec<LinkId> = self.nodes[node].links.keys().copied().collect();
        for link in links {
            self.cut(node, link);
        }
        self.queue.retain(|(to, ..)| *to != node);
        self.settle();
    }

    /// Two nodes do not reach each other any more, or do again.
    pub(super) fn part(&mut self, node: usize, peer: usize, apart: bool) {
        for pair in [(node, peer), (peer, node)] {
            if apart {
                self.parted.insert(pair);
            } else {
                self.parted.remove(&pair);
            }
        }
        while let Some(link) = self.link_between(node, peer).filter(|_| apart) {
            self.cut(node, link);
        }
        self.settle();
    }

    /// Both ends of a link learn that it is down.
    pub(super) fn cut(&mut self, node: usize, link: LinkId) {
        let Some((peer, theirs)) = self.nodes[node].links.remove(&link) else {
            return;
        };
        self.nodes[peer].links.remove(&theirs);
        for read in std::mem::take(&mut self.held) {
            let ends = (read.node, read.link);
            if ends == (node, link) || ends == (peer, theirs) {
                let why = lost();
                self.push(read.node, Input::ReadDone { transfer: read.transfer, result: Err(why) });
            } else {
                self.held.push(read);
            }
        }
        for (at, link) in [(node, link), (peer, theirs)] {
            let why = lost();
            self.push(at, Input::LinkDown { link, why });
        }
    }

    pub(super) fn link_between(&self, node: usize, peer: usize) -> Option<LinkId> {
        let to_peer = |(_, end): &(&LinkId, &(usize, LinkId))| end.0 == peer;
        self.nodes[node].links.iter().find(to_peer).map(|(&link, _)| link)
    }

    fn push(&mut self, node: usize, input: Input) {
        if !self.dead.contains(&node) {
            self.queue.push_back((node, input, None));
        }
    }

    /// Hands an input in and carries out what follows from it.
    pub(super) fn feed(&mut self, node: usize, input: Input) {
        self.feed_with(node, input, None);
    }

    /// The same for a frame with a payload.
    pub(super) fn feed_payload(&mut self, node: usize, input: Input, payload: &[u8]) {
        self.feed_with(node, input, Some(payload.to_vec()));
    }

    fn feed_with(&mut self, node: usize, input: Input, payload: Option<Vec<u8>>) {
        let may_miss = matches!(
            input,
            Input::ClientRequest { .. }
                | Input::PeerMessage { .. }
                | Input::PeerBatch { .. }
                | Input::Tick
                | Input::ClientLeft { .. }
        );
        if may_miss {
            self.drain_rings(node);
        }
        self.hand_in_with(node, input, payload);
    }

    pub(super) fn hand_in(&mut self, node: usize, input: Input) {
        self.hand_in_with(node, input, None);
    }

    fn hand_in_with(&mut self, node: usize, input: Input, payload: Option<Vec<u8>>) {
        let mut inputs = VecDeque::from([input]);
        let (mut landed, mut of) = (BTreeMap::new(), None);
        while let Some(input) = inputs.pop_front() {
            self.nodes[node].passes += 1;
            for action in self.nodes[node].engine.handle(self.now, input) {
                if let Action::Land { landing, start, extent } = action {
                    let tier = self.nodes[node].tiers[&extent.segment];
                    assert_eq!(tier, Tier::Host, "no processor puts bytes in a GPU");
                    let bytes = payload.as_ref().expect("a payload to land");
                    let part = span(start, extent.len_bytes);
                    assert!(landed.insert(part.end, part.start).is_none(), "byte {start} lands twice");
                    self.write(node, extent, &bytes[part]);
                    assert!(of.replace(landing).is_none_or(|of| of == landing), "one number for a payload");
                } else if let Some(next) = self.act(node, action) {
                    inputs.push_front(next);
                }
            }
        }
        let ends = landed.keys().zip(landed.values().skip(1));
        assert!(ends.into_iter().all(|(end, start)| end <= start), "parts overlap: {landed:?}");
        if let Some(landing) = of {
            let bytes = landed.iter().map(|(end, start)| (end - start) as u64).sum();
            let moved = crate::receipt::Moved { bytes, staged_bytes: 0 };
            self.nodes[node].landings += 1;
            self.push(node, Input::Landed { landing, result: Ok(moved) });
        }
    }

    fn act(&mut self, node: usize, action: Action) -> Option<Input> {
        let at = &mut self.nodes[node];
        match action {
            Action::Reply { client, request, reply, attachment } => {
                at.attachments.extend(attachment);
                self.answered(node, client, request, reply);
            }
            Action::PinAndReply { client, request, located } => {
                let located = at.pin(client, located);
                self.answered(node, client, request, Ok(ClientReply::Located(located)));
            }
            Action::GrantAhead { client, request, chunk, reply, attachment } => {
                let fails = at.fail_rings;
                let ring = if fails {
                    Default::default()
                } else {
                    at.attachments.push(attachment);
                    at.rings.entry(client).or_default().grant(chunk)
                };
                let why = StoreError::os("memfd_create", "no descriptor is left");
                self.answered(node, client, request, if fails { Err(why) } else { Ok(reply) });
                return Some(Input::AheadChanged { client, ring });
            }
            Action::RecallAhead { client } => {
                let ring = at.rings.get_mut(&client).map(Ring::close).unwrap_or_default();
                return Some(Input::AheadChanged { client, ring });
            }
            Action::Item { client, request, item, located } => {
                let located = located.map(|located| at.pin(client, located));
                let before = at.items.entry((client, request)).or_default().insert(item, located);
                assert!(before.is_none(), "item {item} of request {request} was answered twice");
            }
            Action::ReplyItems { client, request, count } => {
                let items = at.items.remove(&(client, request)).expect("items");
                assert!(items.keys().copied().eq(0..count), "all items and no others: {items:?}");
                let many = LocatedMany::of(items.into_values());
                self.answered(node, client, request, Ok(ClientReply::LocatedMany(many)));
            }
            Action::CloseClient { client, .. } => at.closed_clients.push(client),
            Action::Fill { extent, bytes } => {
                assert_eq!(at.tiers[&extent.segment], Tier::Host, "no processor writes to a GPU");
                self.write(node, extent, &bytes);
            }
            Action::Copy { generation, from, to } => {
                let bytes = at.bytes(from).to_vec();
                self.write(node, to, &bytes);
                if self.hold_copies {
                    self.copies.push((node, generation));
                } else {
                    self.push(node, Input::CopyDone { generation, result: Ok(()) });
                }
            }
            Action::Publish { slot, object } => {
                let new = (object.key.clone(), object.object, object.generation);
                if let Some(old) = at.index.insert(slot, object) {
                    at.moves += 1;
                    assert!(
                        (old.key, old.object) == (new.0, new.1) && old.generation < new.2,
                        "it has moved"
                    );
                }
            }
            Action::Withdraw { slot } => assert!(at.index.remove(&slot).is_some()),
            Action::ScanPins => {
                let pinned: Pinned = at.pins.values().flatten().copied().collect();
                return Some(Input::PinScan { pinned, touched: Vec::new() });
            }
            Action::CreateSegment { segment, tier, len_bytes, owner } => {
                if self.fail_segments > 0 {
                    self.fail_segments -= 1;
                    let why = StoreError::os("memfd_create", "no descriptor is left");
                    self.push(node, Input::SegmentFailed { segment, why });
                    return None;
                }
                at.segments.insert(segment, vec![0; span(0, len_bytes).end]);
                at.owners.insert(segment, owner);
                at.tiers.insert(segment, tier);
                let key = (FABRIC, RemoteKey(u64::from(segment.0) + 100));
                let reached = tier == Tier::Host || (at.reached.contains(&tier) && !at.registers_no_gpu);
                let keys = reached.then_some(key).into_iter().collect();
                self.push(node, Input::SegmentReady { segment, keys });
            }
            Action::CloseToWriters { segment } => {
                at.closed.insert(segment);
            }
            Action::RetireSegment { segment, len_bytes } => {
                let memory = at.segments.remove(&segment).expect("a segment");
                assert_eq!(memory.len() as u64, len_bytes);
            }
            Action::Note(event) => at.events.push(event),
            other => self.on_fabric(node, other),
        }
        None
    }

    fn on_fabric(&mut self, node: usize, action: Action) {
        match action {
            Action::Connect { address } => self.connect(node, address),
            Action::Disconnect { link } => self.cut(node, link),
            Action::Send { link, request, message, payload } => {
                self.nodes[node].sent.push(message.clone());
                let payload_len = payload.as_ref().map_or(0, Payload::len_bytes);
                let batched = Batched { request, payload_len, message: message.clone() };
                self.nodes[node].frames.push(vec![batched]);
                self.deliver(node, link, payload, |link, payload_len| Input::PeerMessage {
                    link,
                    request,
                    message,
                    payload_len,
                });
            }
            Action::SendBatch { link, batch, payload } => {
                assert!(batch.0.len() > 1, "one message goes alone");
                let payload_len = payload.as_ref().map_or(0, Payload::len_bytes);
                assert_eq!(batch.check(payload_len), Ok(()));
                self.nodes[node].sent.extend(batch.0.iter().map(|batched| batched.message.clone()));
                self.nodes[node].frames.push(batch.0.clone());
                self.deliver(node, link, payload, |link, payload_len| Input::PeerBatch {
                    link,
                    batch,
                    payload_len,
                });
            }
            Action::Read { link, transfer, bytes, word } => {
                let read = Held { node, link, transfer, bytes, word };
                bytes.iter().for_each(|(_, local)| self.nodes[node].assert_reached(*local));
                self.reads += 1;
                if self.fail_reads_of == Some(node) {
                    self.push(node, Input::ReadDone { transfer, result: Err(lost()) });
                } else if self.hold_reads && read.bytes.is_some() {
                    self.held.push(read);
                } else {
                    self.finish_read(read);
                }
            }
            Action::CancelRead { transfer } => {
                let is_it = |read: &mut Held| (read.node, read.transfer) == (node, transfer);
                let cancelled =
                    self.held.extract_if(.., is_it).chain(self.words.extract_if(.., is_it)).count();
                if cancelled > 0 {
                    let result = Err(StoreError::unavailable("the read", "it was given up"));
                    self.push(node, Input::ReadDone { transfer, result });
                }
            }
            other => panic!("{other:?} is not for the fabric"),
        }
    }

    /// A frame goes out and, if its link is there, is on its way.
    fn deliver(
        &mut self,
        node: usize,
        link: LinkId,
        payload: Option<Payload>,
        input: impl FnOnce(LinkId, u64) -> Input,
    ) {
        let at = &mut self.nodes[node];
        let extents = payload.iter().flat_map(|payload| &payload.extents);
        extents.clone().for_each(|extent| at.assert_sendable(*extent));
        let bytes: Vec<u8> = extents.flat_map(|extent| at.bytes(*extent)).copied().collect();
        let end = at.links.get(&link).copied();
        if let Some(Payload { send, extents }) = payload {
            assert!(!extents.is_empty() && extents.len() <= GATHER_MAX, "{} extents", extents.len());
            if self.hold_sends {
                self.sends.push((node, send));
            } else {
                self.push(node, Input::SendDone { send });
            }
        }
        let Some((peer, link)) = end else { return };
        self.queue.push_back((peer, input(link, bytes.len() as u64), Some(bytes)));
    }

    fn connect(&mut self, node: usize, address: String) {
        self.dials.push((node, address.clone(), self.now));
        let peer = self.nodes.iter().position(|peer| peer.address == address);
        let peer =
            peer.or_else(|| self.aliases.get(&address).copied()).filter(|peer| *peer < self.nodes.len());
        let open = |peer: &usize| !self.parted.contains(&(node, *peer)) && !self.dead.contains(peer);
        let Some(peer) = peer.filter(open).filter(|_| !self.unreachable.contains(&address)) else {
            let why = StoreError::unavailable(address.clone(), "nobody listens");
            return self.push(node, Input::ConnectFailed { address, why });
        };
        let (ours, theirs) = (self.new_link(node), self.new_link(peer));
        self.nodes[node].links.insert(ours, (peer, theirs));
        self.nodes[peer].links.insert(theirs, (node, ours));
        let from = self.nodes[node].address.clone();
        for (at, link, address, inbound) in [(node, ours, address, false), (peer, theirs, from, true)] {
            self.push(at, Input::LinkUp { link, fabric: FABRIC, address, inbound });
        }
    }

    fn new_link(&mut self, node: usize) -> LinkId {
        let at = &mut self.nodes[node];
        at.next_link += 1;
        LinkId(at.next_link - 1)
    }

    /// Lets a read that was held back fail, though its link stands.
    pub(super) fn fail_held(&mut self, read: Held) {
        self.held.retain(|held| (held.node, held.transfer) != (read.node, read.transfer));
        self.push(read.node, Input::ReadDone { transfer: read.transfer, result: Err(lost()) });
    }

    /// Lets a word that was held back be read now.
    pub(super) fn finish_word(&mut self, read: Held) {
        let bytes = read.bytes.map_or(0, |(_, local)| local.len_bytes);
        let moved = Moved { bytes, staged_bytes: 0 };
        let result = self.load_word(read).map(|word| ReadEnd { moved, word, round_trips: 1, pushed: false });
        self.push(read.node, Input::ReadDone { transfer: read.transfer, result });
    }

    fn load_word(&self, read: Held) -> Result<Option<u64>, StoreError> {
        let Some(word) = read.word else { return Ok(None) };
        let Some((peer, _)) = self.nodes[read.node].links.get(&read.link) else { return Err(lost()) };
        if word.key != RemoteKey(1) || word.len_bytes != 8 {
            return Err(StoreError::stale("read", "a word", "there is no such region"));
        }
        let slot = SlotId(u32::try_from(word.offset / 64).expect("a slot"));
        Ok(Some(self.nodes[*peer].index.get(&slot).map_or(0, |object| object.generation.0)))
    }

    /// Lets a read that was held back copy what is there now.
    pub(super) fn finish_read(&mut self, read: Held) {
        let Some(&(peer, _)) = self.nodes[read.node].links.get(&read.link) else {
            return self.push(read.node, Input::ReadDone { transfer: read.transfer, result: Err(lost()) });
        };
        if let Some((remote, local)) = read.bytes {
            let segment = SegmentId(u32::try_from(remote.key.0 - 100).expect("a key"));
            let remote = Extent { segment, offset: remote.offset, len_bytes: remote.len_bytes };
            if !self.nodes[peer].segments.contains_key(&segment) {
                let result = Err(StoreError::stale("read", segment, "its key names no region"));
                return self.push(read.node, Input::ReadDone { transfer: read.transfer, result });
            }
            let bytes = self.nodes[peer].bytes(remote).to_vec();
            self.write(read.node, local, &bytes);
        }
        if self.hold_words && read.word.is_some() {
            self.words.push(read);
        } else {
            self.finish_word(read);
        }
    }

    pub(super) fn write(&mut self, node: usize, extent: Extent, bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, extent.len_bytes);
        let range = span(extent.offset, extent.len_bytes);
        let end = extent.offset + extent.len_bytes;
        let shown = self.nodes[node].index.values().find(|shown| {
            let Extent { segment, offset, len_bytes } = shown.extent;
            segment == extent.segment && offset < end && extent.offset < offset + len_bytes
        });
        assert!(shown.is_none(), "{extent:?} is written, and its generation word still names {shown:?}");
        let memory = self.nodes[node].segments.get_mut(&extent.segment).expect("a segment");
        memory[range].copy_from_slice(bytes);
    }

    fn answered(&mut self, node: usize, client: ClientId, request: u64, answer: Answer) {
        let before = self.nodes[node].answers.insert((client, request), answer);
        assert!(before.is_none(), "request {request} was answered twice");
    }

    /// Delivers one thing that is under way; false if nothing is.
    pub(super) fn step(&mut self) -> bool {
        let Some((node, input, payload)) = self.queue.pop_front() else { return false };
        self.feed_with(node, input, payload);
        true
    }

    /// Takes a message to a node out of what is under way: it is as if it took long. Returns its request.
    pub(super) fn delay(&mut self, to: usize, which: impl Fn(&PeerMessage) -> bool) -> Option<u64> {
        let fits = |(node, input, _): &(usize, Input, Option<Vec<u8>>)| match input {
            Input::PeerMessage { message, .. } => *node == to && which(message),
            _ => false,
        };
        let at = self.queue.iter().position(fits)?;
        match self.queue.remove(at)?.1 {
            Input::PeerMessage { request, .. } => Some(request),
            _ => None,
        }
    }

    /// Delivers everything that is under way.
    pub(super) fn settle(&mut self) {
        let mut steps = 0;
        while let Some((node, input, payload)) = self.queue.pop_front() {
            steps += 1;
            assert!(steps < 100_000, "the cluster does not come to rest: {input:?}");
            self.feed_with(node, input, payload);
        }
    }

    /// Moves time on, one due timer after another.
    pub(super) fn advance(&mut self, ms: u64) {
        let end = self.now.after_ms(ms);
        self.settle();
        loop {
            let alive = (0..self.nodes.len()).filter(|node| !self.dead.contains(node));
            let timers = alive.filter_map(|node| self.nodes[node].engine.next_timer());
            let Some(next) = timers.min().filter(|next| *next <= end) else {
                break;
            };
            self.now = self.now.max(next);
            for node in 0..self.nodes.len() {
                if !self.dead.contains(&node) {
                    self.feed(node, Input::Tick);
                }
            }
            self.settle();
        }
        self.now = end;
    }
}
