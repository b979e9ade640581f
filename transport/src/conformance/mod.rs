//! What every fabric must do, as tests that run on any of them: `conformance_suite!` makes one test per promise.
//! Not the tests of one fabric's own means (sockets, seeds). Invariant: nothing here knows which fabric it runs on;
//! no test waits by sleeping, and none asserts an upper time bound.
#![allow(missing_docs, clippy::missing_panics_doc, reason = "each test is named after what it asks for")]

mod gathers;
mod losses;
mod reads;
mod sends;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hetmem_core::wire::{Frame, FrameHeader, FrameKind, decode, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};
use parking_lot::Mutex;

pub use self::gathers::*;
pub use self::losses::*;
pub use self::reads::*;
pub use self::sends::*;
use crate::fabric::{
    Access, Fabric, FabricEvent, FabricSink, Landing, LandingStats, LandingToken, ReadStats, SendToken, Sent,
};
use crate::memory::HeapRegion;

/// Makes pairs of one fabric.
pub trait Bench {
    /// Two fabrics that can reach each other and are not connected.
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair;

    /// An address at which nobody listens.
    fn nobody(&self) -> String;

    /// How many bytes of a payload may pass through a buffer.
    fn staged_max(&self, payload_len: u64) -> u64 {
        payload_len.min(4096)
    }
}

/// Two fabrics.
pub struct Pair {
    pub a: Arc<dyn Fabric>,
    pub b: Arc<dyn Fabric>,
    /// Ends `b` as if its process had died.
    pub kill_b: Box<dyn FnOnce()>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("a", &self.a.address())
            .field("b", &self.b.address())
            .finish_non_exhaustive()
    }
}

/// One test per promise of the seam, for the bench that the expression makes; they do nothing unless `when` holds, which says
/// why not.
#[macro_export]
macro_rules! conformance_suite {
    ($bench:expr) => {
        $crate::conformance_suite!($bench, when true);
    };
    ($bench:expr, when $ready:expr) => {
        $crate::conformance_suite!(@tests $bench, $ready,
            connecting_is_heard_at_both_ends,
            connecting_to_nobody_ends_in_a_link_down,
            frames_arrive_whole_and_in_order,
            payloads_land_where_the_sink_says,
            a_payload_that_nobody_wants_is_dropped,
            a_full_queue_is_busy_and_loses_nothing,
            a_sink_that_takes_its_time_loses_nothing,
            large_payloads_go_both_ways_at_once,
            wrong_sends_are_refused_by_name,
            landings_that_cannot_be_fail_alone,
            a_sink_may_call_back,
            payloads_are_gathered_in_order_and_scattered_with_gaps,
            more_parts_than_one_call_takes,
            what_is_skipped_goes_nowhere_and_empty_parts_are_nothing,
            scattered_landings_that_cannot_be_fail_alone,
            deregistering_a_part_of_a_landing_ends_all_of_it,
            deregistering_a_part_of_a_send_ends_all_of_it,
            a_link_lost_in_the_middle_ends_gathers_and_scatters,
            a_link_can_be_made_again,
            nothing_is_heard_after_stop,
        );
        $crate::conformance_reads!($bench, when $ready);
    };
    (@tests $bench:expr, $ready:expr, $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                if $ready {
                    $crate::conformance::$name(&$bench);
                }
            }
        )*
    };
}

/// Those of its tests that are about reads.
#[macro_export]
macro_rules! conformance_reads {
    ($bench:expr, when $ready:expr) => {
        $crate::conformance_suite!(@tests $bench, $ready,
            reads_bring_every_byte,
            a_word_is_read,
            a_checked_read_brings_its_word_too,
            wrong_words_are_refused,
            an_empty_read_is_done,
            many_reads_at_once,
            thousands_of_reads_end_one_by_one,
            wrong_reads_are_refused_by_name,
            a_cancelled_read_touches_nothing_afterwards,
            deregistering_the_target_fails_its_reads,
            deregistering_the_source_fails_its_reads,
            deregistering_one_source_leaves_reads_of_another_alone,
            a_lost_peer_fails_what_was_under_way,
            disconnecting_fails_what_was_under_way,
        );
    };
}

/// How long a test waits for what must come. Virtual in a simulation.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of each side's region: the largest read, and room for odd offsets.
const REGION_LEN: usize = (64 << 20) + (1 << 20);
/// Each side's region that its peer may read.
const SHARED: SegmentId = SegmentId(1);
/// Each side's region that only itself may use.
const PRIVATE: SegmentId = SegmentId(2);
const PRIVATE_LEN: usize = 2 << 20;

/// What a sink does with a message, besides writing it down.
type Answer = Box<dyn Fn(LinkId, FrameHeader, &[u8]) -> Landing + Send + Sync>;

/// A sink that writes everything down.
#[derive(Default)]
struct Recorder {
    log: Mutex<Log>,
    answer: Mutex<Option<Arc<Answer>>>,
}

#[derive(Default)]
struct Log {
    ups: Vec<(LinkId, String, bool)>,
    downs: Vec<(LinkId, StoreError)>,
    messages: Vec<(LinkId, FrameHeader, Vec<u8>)>,
    reads: HashMap<TransferId, Result<ReadStats, StoreError>>,
    sends: HashMap<SendToken, Result<(), StoreError>>,
    landings: HashMap<LandingToken, Result<LandingStats, StoreError>>,
    calls: u64,
}

impl FabricSink for Recorder {
    fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
        let answer = self.answer.lock().clone();
        let landing = answer.map_or(Landing::Discard, |answer| answer(link, header, body));
        let mut log = self.log.lock();
        log.calls += 1;
        assert!(log.is_up(link), "a message from link {link}, which is not up");
        log.messages.push((link, header, body.to_vec()));
        landing
    }

    fn event(&self, event: FabricEvent) {
        let mut log = self.log.lock();
        log.calls += 1;
        match event {
            FabricEvent::LinkUp { link, address, inbound } => {
                assert!(!log.ups.iter().any(|(up, ..)| *up == link), "link {link} came up twice");
                log.ups.push((link, address, inbound));
            }
            FabricEvent::LinkDown { link, why } => {
                assert!(!log.downs.iter().any(|(down, _)| *down == link), "link {link} went down twice");
                log.downs.push((link, why));
            }
            FabricEvent::ReadDone { transfer, result } => {
                assert!(log.reads.insert(transfer, result).is_none(), "transfer {transfer} ended twice");
            }
            FabricEvent::SendDone { token, result } => {
                assert!(log.sends.insert(token, result).is_none(), "send {token:?} ended twice");
            }
            FabricEvent::Landed { link, token, result } => {
                assert!(log.is_up(link), "a landing of link {link} after its end");
                assert!(log.landings.insert(token, result).is_none(), "landing {token:?} ended twice");
            }
        }
    }
}

impl Log {
    fn is_up(&self, link: LinkId) -> bool {
        self.ups.iter().any(|(up, ..)| *up == link) && !self.downs.iter().any(|(down, _)| *down == link)
    }
}

/// One fabric, what it has said, and its memory.
struct Side {
    fabric: Arc<dyn Fabric>,
    sink: Arc<Recorder>,
    memory: Arc<HeapRegion>,
    key: RemoteKey,
    private: Arc<HeapRegion>,
    private_key: RemoteKey,
    next: AtomicU64,
}

impl Side {
    fn new(fabric: Arc<dyn Fabric>, sink: Arc<Recorder>) -> Self {
        let (memory, private) =
            (Arc::new(HeapRegion::new(REGION_LEN)), Arc::new(HeapRegion::new(PRIVATE_LEN)));
        let key = fabric.register(SHARED, Arc::clone(&memory) as _, Access::RemoteRead).expect("register");
        let private_key =
            fabric.register(PRIVATE, Arc::clone(&private) as _, Access::Local).expect("register");
        Self { fabric, sink, memory, key, private, private_key, next: AtomicU64::new(1) }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn answers(&self, answer: impl Fn(LinkId, FrameHeader, &[u8]) -> Landing + Send + Sync + 'static) {
        *self.sink.answer.lock() = Some(Arc::new(Box::new(answer)));
    }

    /// Waits until something about this side's log holds.
    fn wait(&self, what: &str, until: impl Fn(&Log) -> bool) {
        let held = self.fabric.progress(PATIENCE, &|| until(&self.sink.log.lock()));
        assert!(held, "waited in vain: {what}");
    }

    /// Sends, for a test that does not ask when the payload is free.
    fn post(&self, link: LinkId, frame: &Frame, payload: &[Extent]) {
        let (_, Sent::Done | Sent::Pending) = self.send(link, frame, payload);
    }

    /// Sends, waiting as long as the fabric is busy.
    fn send(&self, link: LinkId, frame: &Frame, payload: &[Extent]) -> (SendToken, Sent) {
        let token = SendToken(self.number());
        loop {
            match self.fabric.send(link, frame.clone(), payload, token) {
                Ok(sent) => return (token, sent),
                Err(StoreError::Busy { .. }) => {
                    self.fabric.progress(Duration::from_millis(1), &|| false);
                }
                Err(error) => panic!("send: {error}"),
            }
        }
    }

    /// Begins a read of the peer's shared region.
    fn begin_read(&self, link: LinkId, remote: RemoteExtent, offset: u64) -> TransferId {
        let transfer = TransferId(self.number());
        let local = Extent { segment: SHARED, offset, len_bytes: remote.len_bytes };
        self.fabric.read(link, transfer, remote, local).expect("read");
        transfer
    }

    fn read_result(&self, transfer: TransferId) -> Result<ReadStats, StoreError> {
        self.wait("the end of a read", |log| log.reads.contains_key(&transfer));
        self.sink.log.lock().reads[&transfer].clone()
    }
}

/// Two connected sides; `a` has connected.
struct Connected {
    a: Side,
    b: Side,
    link_a: LinkId,
    link_b: LinkId,
    kill_b: Box<dyn FnOnce()>,
}

fn sides(bench: &dyn Bench) -> (Side, Side, Box<dyn FnOnce()>) {
    let (sink_a, sink_b) = (Arc::<Recorder>::default(), Arc::<Recorder>::default());
    let pair = bench.pair(Arc::clone(&sink_a) as _, Arc::clone(&sink_b) as _);
    (Side::new(pair.a, sink_a), Side::new(pair.b, sink_b), pair.kill_b)
}

fn connected(bench: &dyn Bench) -> Connected {
    let (a, b, kill_b) = sides(bench);
    let (link_a, link_b) = connect(&a, &b);
    Connected { a, b, link_a, link_b, kill_b }
}

/// Connects, and returns both ends' names of the link.
fn connect(a: &Side, b: &Side) -> (LinkId, LinkId) {
    let known = b.sink.log.lock().ups.len();
    let link = a.fabric.connect(&b.fabric.address()).expect("connect");
    a.wait("LinkUp of who connects", |log| log.is_up(link));
    b.wait("LinkUp of who is connected to", |log| log.ups.len() > known);
    let inbound = b.sink.log.lock().ups[known].0;
    (link, inbound)
}

/// A frame that carries a number.
fn frame(number: u64, payload_len: u64) -> Frame {
    encode(FrameKind::Peer, number, &number, payload_len).expect("small")
}

fn number_in(body: &[u8]) -> u64 {
    decode(body).expect("a number")
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
