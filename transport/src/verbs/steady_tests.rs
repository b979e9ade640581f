//! What sends and reads cost besides themselves, once a link is warm: calls of the plugin that open or register something,
//! and memory. Over real libibverbs, with a table between that counts. Not how long anything takes. Needs a device with the
//! address that `HETMEM_VERBS_ADDRESS` names (tests/vm).
//!
//! Holds unsafe code: functions of the plugin's table that count and hand on, and an allocator that does so.
#![allow(unsafe_code)]
#![allow(clippy::print_stdout, reason = "says why nothing was tested, and what was counted")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, SegmentId, StoreError, TransferId};

use super::abi;
use super::plugin::Plugin;
use super::{VerbsConfig, VerbsFabric};
use crate::fabric::{
    Access, Fabric, FabricEvent, FabricSink, Landing, LandingPart, LandingToken, SendToken, Sent,
};
use crate::memory::HeapRegion;

const LEN: u64 = 1 << 10;
const SEGMENT: SegmentId = SegmentId(1);
const WARM_UP: u64 = 100;
const MEASURED: u64 = 1_000;
/// Allocations of both ends together, for a send that lands and a read: what a frame and its payload are described by. One
/// more each is a change that somebody should know of.
const ALLOCATIONS_MAX: u64 = 7;
/// None of them is for bytes of objects.
const ALLOCATION_LEN_MAX: usize = 1 << 10;

struct Counts {
    /// Calls that open or register something.
    opened: AtomicU64,
    posted: AtomicU64,
    armed: AtomicU64,
    allocated: AtomicU64,
    longest: AtomicU64,
}

static COUNTS: Counts = Counts {
    opened: AtomicU64::new(0),
    posted: AtomicU64::new(0),
    armed: AtomicU64::new(0),
    allocated: AtomicU64::new(0),
    longest: AtomicU64::new(0),
};

struct Counting;

impl Counting {
    fn count(len: usize) {
        COUNTS.allocated.fetch_add(1, Ordering::Relaxed);
        COUNTS.longest.fetch_max(len as u64, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to `System` unchanged, which keeps the trait's promises; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size());
        // SAFETY: the caller's promise about `layout` is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise that `pointer` came from here with `layout` is handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        Self::count(len);
        // SAFETY: as in `dealloc`; `len` is the caller's promise too.
        unsafe { System.realloc(pointer, layout, len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The real plugin's functions.
static REAL: OnceLock<&'static abi::Table> = OnceLock::new();

/// Declares functions of the table that count and hand on.
macro_rules! counted {
    ($($function:ident: $counter:ident ($($argument:ident: $type:ty),*);)*) => {$(
        unsafe extern "C" fn $function($($argument: $type),*) -> i32 {
            COUNTS.$counter.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the caller's promises are handed on.
            unsafe { (REAL.get().expect("set before the table is used").$function)($($argument),*) }
        }
    )*};
}

counted! {
    region_open: opened (device: *mut abi::Device, memory: *const abi::Memory, out: *mut *mut abi::Region,
        keys: *mut abi::Keys, failure: *mut abi::Failure);
    queue_pair_open: opened (device: *mut abi::Device, connection: *mut abi::Connection, with: *mut abi::QueuePair,
        failure: *mut abi::Failure);
    queue_open: opened (device: *mut abi::Device, entries: u32, out: *mut *mut abi::Queue, failure: *mut abi::Failure);
    pool_open: opened (device: *mut abi::Device, buffers: u32, out: *mut *mut abi::Pool, failure: *mut abi::Failure);
    post: posted (connection: *mut abi::Connection, work: *const abi::Work, count: u32, failed_at: *mut u32,
        failure: *mut abi::Failure);
    queue_arm: armed (queue: *mut abi::Queue, failure: *mut abi::Failure);
}

/// Counts what it hears of.
#[derive(Default)]
struct Heard {
    links: AtomicU64,
    read: AtomicU64,
    sent: AtomicU64,
    landed: AtomicU64,
    failed: AtomicU64,
    link: AtomicU64,
}

impl FabricSink for Heard {
    fn message(&self, _: LinkId, _: FrameHeader, _: &[u8]) -> Landing {
        let extent = Extent { segment: SEGMENT, offset: 0, len_bytes: LEN };
        Landing::Into { parts: vec![LandingPart::Extent(extent)], token: LandingToken(1) }
    }

    fn event(&self, event: FabricEvent) {
        let counter = match event {
            FabricEvent::LinkUp { link, .. } => {
                self.link.store(link.0, Ordering::SeqCst);
                &self.links
            }
            FabricEvent::ReadDone { result: Ok(_), .. } => &self.read,
            FabricEvent::SendDone { result: Ok(()), .. } => &self.sent,
            FabricEvent::Landed { result: Ok(_), .. } => &self.landed,
            _ => &self.failed,
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

fn until(fabric: &VerbsFabric, what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !fabric.progress(Duration::from_secs(1), &done) {
        assert!(since.elapsed() < Duration::from_secs(60), "{what} took too long");
    }
}

/// The table that counts, over the plugin; none where there is no device, which it says.
fn counting() -> Option<(Plugin, VerbsConfig)> {
    let Ok(address) = std::env::var("HETMEM_VERBS_ADDRESS") else {
        println!("skipped: HETMEM_VERBS_ADDRESS names no address of an RDMA device");
        return None;
    };
    let path = std::env::var_os("HETMEM_VERBS_PLUGIN").map(std::path::PathBuf::from);
    let real = Plugin::load(path.as_deref()).expect("the plugin").table();
    let real = REAL.get_or_init(|| real);
    let table = abi::Table { region_open, queue_pair_open, queue_open, pool_open, post, queue_arm, ..**real };
    let plugin = Plugin::stand_in(Box::leak(Box::new(table)));
    Some((plugin, VerbsConfig { listen: format!("{address}:0"), ..VerbsConfig::default() }))
}

#[test]
fn a_warm_link_opens_and_registers_nothing_for_reads_and_sends() -> Result<(), StoreError> {
    let Some((plugin, config)) = counting() else { return Ok(()) };
    let iwarp = plugin.devices().iter().any(|device| device.transport == abi::TRANSPORT_IWARP);
    let (reader_hears, owner_hears) = (Arc::new(Heard::default()), Arc::new(Heard::default()));
    let reader = VerbsFabric::start_over(plugin, &config, Arc::clone(&reader_hears) as _)?;
    let owner = VerbsFabric::start_over(plugin, &config, Arc::clone(&owner_hears) as _)?;
    let memory = || Arc::new(HeapRegion::new(usize::try_from(LEN).expect("short")));
    reader.register(SEGMENT, memory(), Access::Local)?;
    let key = owner.register(SEGMENT, memory(), Access::RemoteRead)?;
    let link = reader.connect(&owner.address())?;
    until(&reader, "connecting", || reader_hears.links.load(Ordering::SeqCst) == 1);
    until(&owner, "connecting", || owner_hears.links.load(Ordering::SeqCst) == 1);
    let answer = LinkId(owner_hears.link.load(Ordering::SeqCst));
    let local = Extent { segment: SEGMENT, offset: 0, len_bytes: LEN };
    let turns = |count: u64, from: u64| -> Result<(), StoreError> {
        for turn in from + 1..=from + count {
            reader.read(link, TransferId(turn), RemoteExtent { key, offset: 0, len_bytes: LEN }, local)?;
            until(&reader, "a read", || reader_hears.read.load(Ordering::SeqCst) == turn);
            let frame = encode(FrameKind::Peer, turn, &7_u8, LEN)?;
            assert_eq!(owner.send(answer, frame, &[local], SendToken(turn))?, Sent::Pending);
            until(&reader, "a send", || reader_hears.landed.load(Ordering::SeqCst) == turn);
            until(&owner, "a send", || owner_hears.sent.load(Ordering::SeqCst) == turn);
        }
        Ok(())
    };
    turns(WARM_UP, 0)?;
    let opened = COUNTS.opened.load(Ordering::SeqCst);
    let before = [&COUNTS.posted, &COUNTS.armed, &COUNTS.allocated].map(|it| it.load(Ordering::SeqCst));
    COUNTS.longest.store(0, Ordering::SeqCst);
    turns(MEASURED, WARM_UP)?;
    let [posted, armed, allocated] = [&COUNTS.posted, &COUNTS.armed, &COUNTS.allocated]
        .map(|it| it.load(Ordering::SeqCst))
        .into_iter()
        .zip(before)
        .map(|(after, before)| after - before)
        .collect::<Vec<_>>()[..]
    else {
        unreachable!("three counters");
    };
    let longest = COUNTS.longest.load(Ordering::SeqCst);
    println!(
        "{MEASURED} reads and {MEASURED} sends of {LEN} bytes: {posted} posts, {armed} times armed, {allocated} allocations, \
         the longest of {longest} bytes"
    );
    assert_eq!(COUNTS.opened.load(Ordering::SeqCst) - opened, 0, "something was opened or registered");
    // On iWARP a message now and then says that buffers are lent again.
    let more = if iwarp { MEASURED / 4 } else { 0 };
    assert!((2 * MEASURED..=2 * MEASURED + more).contains(&posted), "{posted} posts");
    assert!(allocated <= ALLOCATIONS_MAX * MEASURED + u64::from(iwarp) * 16, "{allocated} allocations");
    // There a queue may still grow.
    let longest_max = if iwarp { 4 * ALLOCATION_LEN_MAX } else { ALLOCATION_LEN_MAX };
    assert!(longest <= longest_max as u64, "an allocation of {longest} bytes");
    assert_eq!(reader_hears.failed.load(Ordering::SeqCst) + owner_hears.failed.load(Ordering::SeqCst), 0);
    Ok(())
}
