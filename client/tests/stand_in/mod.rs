//! A node for tests: real shared memory, no engine, no peers. Not a model of the engine: it answers just enough,
//! and wrongly where a test asks for it. Invariant: every question is in `asked`.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use hetmem_client::{Checksum, Key, Listed, ObjectMeta, Path, StoreError, Tier};
use hetmem_core::wire::{ClientMessage, ClientReply, IfExists, Located, LocatedMany};
use hetmem_core::{ClientId, Epoch, Extent, Generation, NodeId, ObjectId, SegmentId, SlotId};
use hetmem_host_mem::{
    Answer, IndexEntry, IndexWriter, NodePage, PagePolicy, Segment, SegmentOwner, Session, socket,
};

const OWN: SegmentId = SegmentId(1);
const GRANTED: SegmentId = SegmentId(700);
const SEGMENT_LEN: u64 = 4 << 20;
pub(crate) const INLINE_PUT_MAX: u32 = 4096;

/// What the node does that a good one would not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Located extents reach outside their segment.
    Outside,
    /// Located extents are in GPU memory.
    Gpu,
    /// Located extents are shorter than what was asked for.
    Short,
    /// Segments come without their descriptor.
    NoDescriptor,
    /// Pages of lists never move on.
    SamePage,
    /// What is reserved is in one segment of a GPU, and the answer with its descriptor comes after all others.
    LateDescriptor,
    /// Every question is answered with `Exists`.
    WrongReply,
    /// Of many objects the last is left out.
    OneFewer,
    /// Of many objects the first comes once more at the end.
    OneMore,
}

pub(crate) struct StandIn {
    page: NodePage,
    state: Mutex<State>,
}

struct State {
    index: IndexWriter,
    own: Segment,
    granted: Segment,
    grants: bool,
    mapped: bool,
    fault: Fault,
    used: BTreeMap<SegmentId, u64>,
    next: u64,
    slots: u32,
    reservations: BTreeMap<Generation, (Key, ObjectMeta, Extent)>,
    objects: BTreeMap<Key, Held>,
    asked: Vec<&'static str>,
}

#[derive(Clone, Copy)]
struct Held {
    meta: ObjectMeta,
    extent: Extent,
    generation: Generation,
    slot: SlotId,
}

fn object_id(generation: Generation) -> ObjectId {
    ObjectId { origin: NodeId(1), epoch: Epoch(1), number: generation.0 }
}

impl StandIn {
    pub(crate) fn new() -> Self {
        let segment = |id, owner| Segment::create(id, SEGMENT_LEN, owner, PagePolicy::Off).expect("memory");
        Self {
            page: NodePage::create().expect("a page"),
            state: Mutex::new(State {
                index: IndexWriter::create(1024).expect("an index"),
                own: segment(OWN, SegmentOwner::Node),
                granted: segment(GRANTED, SegmentOwner::Client),
                grants: true,
                mapped: false,
                fault: Fault::None,
                used: BTreeMap::new(),
                next: 1,
                slots: 0,
                reservations: BTreeMap::new(),
                objects: BTreeMap::new(),
                asked: Vec::new(),
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panics inside")
    }

    /// From now on reservations are not writable by the client.
    pub(crate) fn grant_nothing(&self) {
        self.state().grants = false;
    }

    pub(crate) fn fail_with(&self, fault: Fault) {
        self.state().fault = fault;
    }

    /// Takes the questions asked since the last time.
    pub(crate) fn asked(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.state().asked)
    }

    pub(crate) fn reservations(&self) -> usize {
        self.state().reservations.len()
    }

    /// How many objects the client holds.
    pub(crate) fn pinned(&self) -> usize {
        let mut pinned = HashSet::new();
        self.page.pinned(&mut pinned);
        pinned.len()
    }

    /// An object that another node is said to hold: not in the index.
    pub(crate) fn add_remote(&self, key: &Key, bytes: &[u8]) {
        self.state().add_remote(key, bytes);
    }

    /// Changes a byte of an object behind everyone's back.
    pub(crate) fn spoil(&self, key: &Key) {
        let state = self.state();
        let extent = state.objects[key].extent;
        state.segment(extent.segment).write(extent.offset, &[0xee]).expect("inside");
    }

    fn own_fds(&self) -> Vec<OwnedFd> {
        let state = self.state();
        [state.index.descriptor(), self.page.descriptor()]
            .map(|fd| fd.try_clone_to_owned().expect("a descriptor"))
            .into()
    }
}

impl State {
    fn times_asked(&self, question: &str) -> usize {
        self.asked.iter().filter(|asked| **asked == question).count()
    }

    fn segment(&self, id: SegmentId) -> &Segment {
        if id == OWN { &self.own } else { &self.granted }
    }

    fn allocate(&mut self, segment: SegmentId, len_bytes: u64) -> Extent {
        let used = self.used.entry(segment).or_default();
        let offset = *used;
        *used += len_bytes.next_multiple_of(64);
        Extent::new(segment, offset, len_bytes, SEGMENT_LEN).expect("tests put little")
    }

    fn generation(&mut self) -> Generation {
        self.next += 1;
        Generation(self.next)
    }

    fn add_remote(&mut self, key: &Key, bytes: &[u8]) {
        let checksum = Checksum::Xxh3Blocks(hetmem_core::checksum::of(bytes));
        let meta = ObjectMeta::bytes(bytes.len() as u64).expect("short").with_checksum(checksum);
        let extent = self.allocate(OWN, meta.len_bytes);
        self.own.write(extent.offset, bytes).expect("inside");
        let generation = self.generation();
        let slot = SlotId(u32::MAX);
        let held = Held { meta, extent, generation, slot };
        self.objects.insert(key.clone(), held);
    }

    fn publish(
        &mut self,
        key: &Key,
        meta: ObjectMeta,
        extent: Extent,
        generation: Generation,
    ) -> ClientReply {
        let object = object_id(generation);
        let slot = SlotId(self.slots);
        self.slots += 1;
        let entry = IndexEntry { object, meta, generation, extent, tier: Tier::Host };
        self.index.publish(slot, key, &entry).expect("room");
        let held = Held { meta, extent, generation, slot };
        self.objects.insert(key.clone(), held);
        let path = if extent.segment == GRANTED { Path::InPlace } else { Path::Inline };
        let (slot, tier) = (Some(slot), Tier::Host);
        ClientReply::Sealed { object, kept: false, slot, tier, path, staged_bytes: 0, replicas: 1 }
    }

    fn kept(&self, key: &Key, if_exists: IfExists) -> Result<Option<ClientReply>, StoreError> {
        let Some(held) = self.objects.get(key) else {
            return Ok(None);
        };
        if if_exists == IfExists::Error {
            return Err(StoreError::AlreadyExists { key: key.to_string() });
        }
        Ok(Some(ClientReply::Sealed {
            tier: Tier::Host,
            object: object_id(held.generation),
            kept: true,
            slot: None,
            path: Path::Kept,
            staged_bytes: 0,
            replicas: 1,
        }))
    }

    fn reserve(&mut self, key: &Key, meta: ObjectMeta) -> (ClientReply, Vec<OwnedFd>) {
        let segment = if self.grants { GRANTED } else { OWN };
        let extent = self.allocate(segment, meta.len_bytes);
        let reservation = self.generation();
        self.reservations.insert(reservation, (key.clone(), meta, extent));
        let mut fds = Vec::new();
        if self.grants && !self.mapped {
            fds.push(self.granted.descriptor().as_fd().try_clone_to_owned().expect("a descriptor"));
        }
        let tier = if self.fault == Fault::LateDescriptor { Tier::Gpu(0) } else { Tier::Host };
        let map = self.grants.then_some(SEGMENT_LEN);
        let reply = ClientReply::Reserved { reservation, extent, tier, map };
        (reply, fds)
    }

    fn seal(&mut self, reservation: Generation, checksum: Checksum) -> Result<ClientReply, StoreError> {
        let Some((key, meta, extent)) = self.reservations.remove(&reservation) else {
            return Err(StoreError::stale("seal", reservation, "no such reservation"));
        };
        if extent.segment == GRANTED && !self.mapped {
            return Err(StoreError::invalid("seal", "never acknowledged as mapped"));
        }
        Ok(self.publish(&key, meta.with_checksum(checksum), extent, reservation))
    }

    fn locate(
        &self,
        key: &Key,
        range: Option<hetmem_client::Range>,
        page: &NodePage,
    ) -> Result<Located, StoreError> {
        let held = self.objects.get(key).ok_or_else(|| StoreError::not_found("get", key))?;
        let mut extent = match range {
            None => held.extent,
            Some(range) => {
                range.check(key, held.meta.len_bytes)?;
                held.extent.slice(range.start, range.len_bytes)?
            }
        };
        match self.fault {
            Fault::Outside => extent.offset = SEGMENT_LEN - 1,
            Fault::Short => extent.len_bytes -= 1,
            _ => {}
        }
        Ok(Located {
            object: object_id(held.generation),
            meta: held.meta,
            extent,
            tier: if self.fault == Fault::Gpu { Tier::Gpu(0) } else { Tier::Host },
            generation: held.generation,
            pin: page.pin_for_client(held.generation).expect("a pin"),
            path: Path::Read,
            copied_from: None,
            carried: None,
        })
    }

    fn locate_many(&self, keys: &[Key], page: &NodePage) -> LocatedMany {
        let (first, count) = (keys.first(), keys.len());
        let (surplus, count) = match self.fault {
            Fault::OneFewer => (None, count - 1),
            Fault::OneMore => (first, count),
            _ => (None, count),
        };
        let keys = keys.iter().take(count).chain(surplus);
        LocatedMany::of(keys.map(|key| self.locate(key, None, page)))
    }

    fn list(&self, prefix: &str, after: Option<&Key>) -> ClientReply {
        let after = if self.fault == Fault::SamePage { None } else { after };
        let wanted = |key: &&Key| key.as_str().starts_with(prefix) && after.is_none_or(|after| *key > after);
        let mut keys: Vec<&Key> = self.objects.keys().filter(wanted).take(4).collect();
        let more = keys.len() == 4;
        keys.truncate(3);
        let listed = |key: &Key| Listed {
            key: key.clone(),
            len_bytes: self.objects[key].meta.len_bytes,
            holders: vec!["stand-in".to_owned()],
        };
        ClientReply::Listed { objects: keys.into_iter().map(listed).collect(), more }
    }
}

impl Session for StandIn {
    fn call(&self, message: &ClientMessage, payload: &[u8], _: Duration) -> Result<Answer, StoreError> {
        let mut state = self.state();
        state.asked.push(message.name());
        let mut descriptors = Vec::new();
        if state.fault == Fault::WrongReply {
            let reply = ClientReply::Exists;
            return Ok(Answer { reply, descriptors });
        }
        let reply = match message {
            ClientMessage::Hello { version_max, .. } => {
                drop(state);
                descriptors = self.own_fds();
                ClientReply::Welcome {
                    version: *version_max,
                    client: ClientId(1),
                    node: "stand-in".to_owned(),
                    objects_max: 1024,
                    inline_put_max: INLINE_PUT_MAX,
                    gpus: Vec::new(),
                }
            }
            ClientMessage::Put { key, meta, if_exists, .. } => match state.kept(key, *if_exists)? {
                Some(kept) => kept,
                None => {
                    assert_eq!(payload.len() as u64, meta.len_bytes);
                    let extent = state.allocate(OWN, meta.len_bytes);
                    state.own.write(extent.offset, payload)?;
                    let generation = state.generation();
                    state.publish(key, *meta, extent, generation)
                }
            },
            ClientMessage::Reserve { key, meta, if_exists, .. } => match state.kept(key, *if_exists)? {
                Some(kept) => kept,
                None => {
                    let (reply, fds) = state.reserve(key, *meta);
                    descriptors = fds;
                    if state.fault == Fault::LateDescriptor && state.times_asked("reserve") == 1 {
                        drop(state);
                        while self.state().times_asked("reserve") == 1 {
                            std::thread::yield_now();
                        }
                        std::thread::sleep(Duration::from_millis(100));
                    } else if state.fault == Fault::LateDescriptor {
                        descriptors.clear();
                    }
                    reply
                }
            },
            ClientMessage::Mapped { segment } => {
                assert_eq!(*segment, GRANTED);
                state.granted.close_to_writers()?;
                state.mapped = true;
                ClientReply::Done
            }
            ClientMessage::Write { reservation, offset } => {
                assert!(payload.len() <= socket::PAYLOAD_LEN_MAX);
                let extent = state.reservations[reservation].2;
                let part = extent.slice(*offset, payload.len() as u64)?;
                state.segment(part.segment).write(part.offset, payload)?;
                ClientReply::Done
            }
            ClientMessage::Seal { reservation, checksum } => state.seal(*reservation, *checksum)?,
            ClientMessage::Abort { reservation } => {
                state.reservations.remove(reservation);
                ClientReply::Done
            }
            ClientMessage::Get { key, range, .. } => {
                ClientReply::Located(state.locate(key, *range, &self.page)?)
            }
            ClientMessage::GetMany { keys, .. } => {
                ClientReply::LocatedMany(state.locate_many(keys, &self.page))
            }
            ClientMessage::Segment { segment } => {
                if state.fault != Fault::NoDescriptor {
                    let fd = state.segment(*segment).descriptor();
                    descriptors.push(fd.try_clone_to_owned().expect("a descriptor"));
                }
                ClientReply::Segment { len_bytes: SEGMENT_LEN, tier: Tier::Host, retired: Vec::new() }
            }
            ClientMessage::Wait { key, timeout_ms } => match state.objects.contains_key(key) {
                true => ClientReply::Exists,
                false => return Err(StoreError::timed_out("wait", key, *timeout_ms)),
            },
            ClientMessage::List { prefix, after, .. } => state.list(prefix, after.as_ref()),
            ClientMessage::Delete { key } => {
                let held = state.objects.remove(key);
                if let Some(held) = held {
                    state.index.withdraw(held.slot);
                }
                ClientReply::Deleted { existed: held.is_some() }
            }
            ClientMessage::Pin { .. } => ClientReply::Done,
            other => panic!("no test asks {other:?}"),
        };
        Ok(Answer { reply, descriptors })
    }
}
