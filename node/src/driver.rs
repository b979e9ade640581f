//! The engine and the memory that its actions touch, behind one lock. Not sockets and not fabrics: what concerns
//! them is handed out and carried out after the lock is released (`carry`, `outbox`). Invariant: actions on memory
//! are carried out in the engine's order, under the lock, before the next input.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use hetmem_core::engine::{Action, Attachment, Engine, Input, RingState, Time};
use hetmem_core::wire::{ClientReply, Located};
use hetmem_core::{ClientId, Extent, Generation, LandingId, SegmentId, StoreError, Tier};
use hetmem_gpu_mem::Span;
use hetmem_host_mem::{IndexEntry, IndexMemory, IndexWriter, NodePage};
use parking_lot::Mutex;

use crate::clients::Clients;
use crate::fabrics::{Fabrics, VERBS, id_of};
use crate::outbox::Outbox;
use crate::rings::Rings;
use crate::segments::Job;
use crate::tiers::{TierSegment, Tiers};
use crate::visibility::Visibility;

/// A descriptor to send beside a reply, kept open until it is sent.
pub(crate) enum Descriptors {
    None,
    Session(Arc<IndexMemory>, Arc<NodePage>),
    Segment(TierSegment),
    /// A publication ring, and a granted segment.
    Ahead(Option<Arc<OwnedFd>>, Option<TierSegment>),
}

/// What is done after the lock is released.
pub(crate) enum Later {
    Reply {
        client: ClientId,
        request: u64,
        reply: Result<ClientReply, StoreError>,
        descriptors: Descriptors,
    },
    ReplyItems {
        client: ClientId,
        request: u64,
        items: Items,
    },
    Close {
        client: ClientId,
        why: StoreError,
    },
    /// A copy that a GPU makes.
    Copy {
        generation: Generation,
        from: Span,
        to: Span,
    },
    Note(hetmem_core::engine::Event),
}

/// What is known of the keys of a request for many, in their order.
pub(crate) type Items = Vec<Option<Result<Located, StoreError>>>;

pub(crate) struct Core {
    pub(crate) engine: Engine,
    pub(crate) index: IndexWriter,
    pub(crate) pages: HashMap<ClientId, Arc<NodePage>>,
    pub(crate) segments: HashMap<SegmentId, TierSegment>,
    pub(crate) rings: Rings,
    /// Requests for many keys of which some have an answer.
    items: HashMap<(ClientId, u64), Items>,
    /// Generations that the last look at the pins has found.
    pinned: usize,
    /// Hits of clients that are gone.
    past_hits: u64,
}

pub(crate) struct Driver {
    pub(crate) core: Mutex<Core>,
    pub(crate) fabrics: OnceLock<Arc<Fabrics>>,
    pub(crate) tiers: Tiers,
    pub(crate) visibility: Visibility,
    /// Itself, for copies that end when they end.
    pub(crate) own: Weak<Self>,
    pub(crate) clients: Clients,
    pub(crate) outbox: Outbox,
    pub(crate) jobs: Sender<Job>,
    /// Frames and sessions of clients that were refused for what they sent.
    pub(crate) refused: AtomicU64,
    started: Instant,
}

/// What an input made the engine want, beyond memory.
#[derive(Default)]
struct Wanted {
    later: Vec<Later>,
    landing: Option<Places>,
}

/// Where parts of a payload go: each from a byte of it on.
pub(crate) type Places = (LandingId, Vec<(u64, Extent)>);

impl Driver {
    pub(crate) fn new(
        engine: Engine,
        index: IndexWriter,
        jobs: Sender<Job>,
        (tiers, visibility): (Tiers, Visibility),
    ) -> Arc<Self> {
        let core = Core {
            engine,
            index,
            pages: HashMap::new(),
            segments: HashMap::new(),
            rings: Rings::default(),
            items: HashMap::new(),
            pinned: 0,
            past_hits: 0,
        };
        Arc::new_cyclic(|own| Self {
            core: Mutex::new(core),
            fabrics: OnceLock::new(),
            tiers,
            visibility,
            own: Weak::clone(own),
            clients: Clients::default(),
            outbox: Outbox::default(),
            jobs,
            refused: AtomicU64::new(0),
            started: Instant::now(),
        })
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Hands an input in and carries out what follows.
    pub(crate) fn feed(&self, input: Input) {
        let _ = self.feed_landing(input);
    }

    /// The same; where the input is a frame with a payload, says where that goes.
    pub(crate) fn feed_landing(&self, input: Input) -> Option<Places> {
        self.with_core(|core, wanted| {
            if may_miss(&input) {
                self.drain_rings(core, wanted);
            }
            self.run(core, input, wanted);
            if core.engine.awaits_objects() && !core.rings.is_empty() {
                core.rings.set_bells();
                self.drain_rings(core, wanted);
            }
        })
    }

    /// The session of a client is over: what it has put without asking is there, and then nothing of it is.
    pub(crate) fn client_left(&self, client: ClientId) {
        self.with_core(|core, wanted| {
            if let Some(last) = core.rings.drain_last(client) {
                self.run(core, last, wanted);
            }
            core.forget_page(client);
            self.run(core, Input::ClientLeft { client }, wanted);
            // From here on the engine locates nothing for it.
            core.forget_items(client);
        });
    }

    fn with_core(&self, work: impl FnOnce(&mut Core, &mut Wanted)) -> Option<Places> {
        let mut wanted = Wanted::default();
        work(&mut self.core.lock(), &mut wanted);
        let mut copies = Vec::new();
        for later in wanted.later {
            match later {
                Later::Copy { generation, from, to } => copies.push((generation, from, to)),
                later => self.carry_out(later),
            }
        }
        self.copy(copies);
        self.drain_outbox();
        wanted.landing
    }

    fn drain_rings(&self, core: &mut Core, wanted: &mut Wanted) {
        for drained in core.rings.drain() {
            if let (Input::PutsAhead { client, .. }, Some(why)) = (&drained.input, drained.broken) {
                wanted.later.push(Later::Close { client: *client, why });
            }
            self.run(core, drained.input, wanted);
        }
    }

    /// Time has passed.
    pub(crate) fn tick(&self) {
        let due = {
            let core = self.core.lock();
            core.engine.next_timer().is_some_and(|at| at <= self.now()) || core.rings.has_news()
        };
        if due {
            self.feed(Input::Tick);
        }
        self.retry_deferred();
    }

    pub(crate) fn next_timer(&self) -> Option<std::time::Duration> {
        let at = self.core.lock().engine.next_timer()?;
        Some(std::time::Duration::from_nanos(at.0.saturating_sub(self.now().0)))
    }

    fn run(&self, core: &mut Core, input: Input, wanted: &mut Wanted) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for action in core.engine.handle(self.now(), input) {
                if let Some(next) = self.act(core, action, wanted) {
                    inputs.push_front(next);
                }
            }
        }
    }

    /// Carries one action out on memory, or hands it on. Returns the input that follows at once, if one does.
    fn act(&self, core: &mut Core, action: Action, wanted: &mut Wanted) -> Option<Input> {
        match action {
            Action::Reply { client, request, reply, attachment } => {
                let descriptors = core.descriptors(client, attachment);
                let reply = reply.map(|reply| self.complete(core, reply));
                wanted.later.push(Later::Reply { client, request, reply, descriptors });
            }
            Action::PinAndReply { client, request, located } => {
                let reply = core.pin(client, located).map(ClientReply::Located);
                wanted.later.push(Later::Reply { client, request, reply, descriptors: Descriptors::None });
            }
            Action::GrantAhead { client, request, chunk, reply, attachment } => {
                let (ring, reply, descriptors) = match core.rings.grant(client, chunk) {
                    Ok(ring) => (ring, Ok(reply), core.descriptors(client, Some(attachment))),
                    Err(why) => (RingState::default(), Err(why), Descriptors::None),
                };
                wanted.later.push(Later::Reply { client, request, reply, descriptors });
                return Some(Input::AheadChanged { client, ring });
            }
            Action::RecallAhead { client } => {
                let ring = core.rings.recall(client);
                return Some(Input::AheadChanged { client, ring });
            }
            Action::Item { client, request, item, located } => {
                let located = located.and_then(|located| core.pin(client, located));
                core.keep_item((client, request), item, located);
            }
            Action::ReplyItems { client, request, count } => {
                let items = core.take_items((client, request), count);
                wanted.later.push(Later::ReplyItems { client, request, items });
            }
            Action::CloseClient { client, why } => wanted.later.push(Later::Close { client, why }),
            Action::Note(event) => wanted.later.push(Later::Note(event)),
            Action::Fill { extent, bytes } => core.fill(extent, &bytes),
            Action::Publish { slot, object } => {
                let entry = IndexEntry {
                    object: object.object,
                    meta: object.meta,
                    generation: object.generation,
                    extent: object.extent,
                    tier: object.tier,
                };
                if let Err(error) = core.index.publish(slot, &object.key, &entry) {
                    // Readers then ask the node, which knows the object: slower, never wrong.
                    tracing::error!(key = %object.key, %error, "the index did not take an object");
                }
            }
            Action::Withdraw { slot } => {
                core.index.withdraw(slot);
            }
            Action::ScanPins => return Some(core.scan_pins()),
            Action::CloseToWriters { segment } => core.close_to_writers(segment),
            Action::CreateSegment { segment, tier, len_bytes, owner } => {
                let _ = self.jobs.send(Job::Create { segment, tier, len_bytes, owner });
            }
            Action::RetireSegment { segment, len_bytes } => {
                let memory = core.segments.remove(&segment);
                let _ = self.jobs.send(Job::Retire { segment, len_bytes, memory });
            }
            Action::Copy { generation, from, to } => {
                let ends = (core.segments.get(&from.segment), core.segments.get(&to.segment));
                match ends {
                    (Some(TierSegment::Host(a)), Some(TierSegment::Host(b))) => {
                        let (from, to) = ((Arc::clone(a), from), (Arc::clone(b), to));
                        let _ = self.jobs.send(Job::Copy { generation, from, to });
                    }
                    (Some(a), Some(b)) => match (a.span(from), b.span(to)) {
                        (Ok(from), Ok(to)) => wanted.later.push(Later::Copy { generation, from, to }),
                        (Err(why), _) | (_, Err(why)) => {
                            return Some(Input::CopyDone { generation, result: Err(why) });
                        }
                    },
                    _ => {
                        let why = StoreError::stale("copy", generation, "a segment is gone");
                        return Some(Input::CopyDone { generation, result: Err(why) });
                    }
                }
            }
            Action::Land { landing, start, extent } => {
                wanted.landing.get_or_insert_with(|| (landing, Vec::new())).1.push((start, extent));
            }
            Action::Read { link, transfer, bytes: Some((_, local)), .. } => {
                if let Some(TierSegment::Gpu(segment)) = core.segments.get(&local.segment)
                    && id_of(link) == VERBS
                {
                    self.visibility.begin(transfer, segment.device().ordinal());
                }
                self.outbox.push(action);
            }
            Action::Connect { .. }
            | Action::Disconnect { .. }
            | Action::Send { .. }
            | Action::SendBatch { .. }
            | Action::Read { .. }
            | Action::CancelRead { .. } => self.outbox.push(action),
        }
        None
    }

    /// Adds to a reply what the engine does not know.
    fn complete(&self, core: &Core, mut reply: ClientReply) -> ClientReply {
        if let ClientReply::Status(status) = &mut reply {
            status.counters.hits = core.hits();
            status.counters.refused += self.refused.load(Ordering::Relaxed);
            if let Some(fabrics) = self.fabrics.get() {
                status.counters.refused += fabrics.refused();
                status.counters.fallbacks = fabrics.fallbacks();
            }
            for tier in &mut status.tiers {
                tier.pages = match tier.tier {
                    Tier::Host => core.pages_in_words(),
                    Tier::Gpu(_) => String::new(),
                };
            }
        }
        reply
    }
}

/// Whether the answer to an input could be that an object is not there.
const fn may_miss(input: &Input) -> bool {
    !matches!(
        input,
        Input::ReadDone { .. }
            | Input::SendDone { .. }
            | Input::Landed { .. }
            | Input::CopyDone { .. }
            | Input::SegmentReady { .. }
            | Input::SegmentFailed { .. }
    )
}

impl Core {
    fn descriptors(&self, client: ClientId, attachment: Option<Attachment>) -> Descriptors {
        match attachment {
            None => Descriptors::None,
            Some(Attachment::Session) => match self.pages.get(&client) {
                Some(page) => Descriptors::Session(self.index.memory(), Arc::clone(page)),
                None => Descriptors::None,
            },
            Some(Attachment::Segment(segment)) => match self.segments.get(&segment) {
                Some(segment) => Descriptors::Segment(segment.clone()),
                None => Descriptors::None,
            },
            Some(Attachment::Ahead { segment, ring }) => {
                let ring = if ring { self.rings.descriptor(client) } else { None };
                Descriptors::Ahead(ring, segment.and_then(|segment| self.segments.get(&segment)).cloned())
            }
        }
    }

    fn pin(&self, client: ClientId, mut located: Located) -> Result<Located, StoreError> {
        let pin = self.pages.get(&client).and_then(|page| page.pin_for_client(located.generation));
        match pin {
            Some(pin) => {
                located.pin = pin;
                Ok(located)
            }
            None => Err(StoreError::busy("get", "this client holds as many objects as its page has pins")),
        }
    }

    fn keep_item(&mut self, of: (ClientId, u64), item: u32, located: Result<Located, StoreError>) {
        let items = self.items.entry(of).or_default();
        let place = item as usize;
        if items.len() <= place {
            items.resize_with(place + 1, || None);
        }
        items[place] = Some(located);
    }

    fn take_items(&mut self, of: (ClientId, u64), count: u32) -> Items {
        let mut items = self.items.remove(&of).unwrap_or_default();
        items.resize_with(count as usize, || None);
        items
    }

    /// A client has left and gets no answer any more. The pins of what was kept for it are gone with its page.
    pub(crate) fn forget_items(&mut self, client: ClientId) {
        self.items.retain(|(of, _), _| *of != client);
    }

    fn fill(&self, extent: Extent, bytes: &[u8]) {
        let written = match self.segments.get(&extent.segment).and_then(TierSegment::host) {
            Some(segment) => segment.write(extent.offset, bytes),
            None => Err(StoreError::stale("fill", extent.segment, "there is no such segment")),
        };
        if let Err(error) = written {
            // The engine's books and the segments disagree; the checksum will tell readers.
            tracing::error!(%error, "bytes could not be written");
        }
    }

    fn close_to_writers(&self, segment: SegmentId) {
        // Of GPU memory there is no descriptor that only reads: who maps it is trusted.
        if let Some(segment) = self.segments.get(&segment).and_then(TierSegment::host)
            && let Err(error) = segment.close_to_writers()
        {
            tracing::error!(segment = %segment.id(), %error, "a granted segment stays open to its writer");
        }
    }

    fn scan_pins(&mut self) -> Input {
        // Mostly there are as many as the last time.
        let mut pinned: Vec<Generation> = Vec::with_capacity(self.pinned);
        let mut touched = Vec::new();
        for page in self.pages.values() {
            page.pinned(&mut pinned);
            page.drain_touches(|slot| touched.push(slot));
        }
        self.pinned = pinned.len();
        Input::PinScan { pinned: pinned.into(), touched }
    }

    fn hits(&self) -> u64 {
        self.pages.values().map(|page| page.hits()).fold(self.past_hits, u64::wrapping_add)
    }

    /// A client's page is not looked at any more: its pins are gone.
    pub(crate) fn forget_page(&mut self, client: ClientId) {
        if let Some(page) = self.pages.remove(&client) {
            self.past_hits = self.past_hits.wrapping_add(page.hits());
        }
    }

    fn pages_in_words(&self) -> String {
        let hosts = self.segments.values().filter_map(TierSegment::host);
        let mut kinds: Vec<String> = hosts.map(|segment| segment.pages().to_string()).collect();
        kinds.sort();
        kinds.dedup();
        kinds.join(", ")
    }
}
