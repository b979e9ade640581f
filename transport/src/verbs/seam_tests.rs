//! What adapters do when work fails, through the plugin alone: two ends of one connection in one thread, on the device that
//! `HETMEM_VERBS_ADDRESS` names (tests/vm). Not the fabric, which has no failure of these kinds to show: it is never out
//! of receive buffers, and hears of a peer's end before its adapter has tried often enough.
//!
//! Holds unsafe code: posts work that names memory, which lives as long as the connection.
#![allow(unsafe_code)]
#![allow(clippy::print_stdout, reason = "says why nothing was tested")]

use std::ffi::c_void;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hetmem_core::wire::FrameHeader;
use hetmem_core::{LinkId, StoreError};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::abi;
use super::completion::{Class, class_of, explain};
use super::ladder::{Way, climb};
use super::loopback::{Loopback, event};
use super::plugin::{Context, Greeting, Made, Plugin, Registered};
use super::proof::{MemoryKind, Outcome, Scratch, prove};
use super::wire::{Hello, LinkToken, Owner, Purpose};
use super::{VerbsConfig, VerbsFabric};
use crate::fabric::{Fabric as _, FabricEvent, FabricSink, Landing};
use crate::memory::{DeviceMemory, HeapRegion, RegionMemory};

const PATIENCE: Duration = Duration::from_secs(30);
const LEN: usize = 4096;

/// A connection whose adapter tries once more and no oftener. It goes before what it uses.
struct Pair {
    loopback: Loopback,
    memory: Arc<HeapRegion>,
    registered: Registered,
}

/// None where there is no device; says so.
fn pair() -> Option<Pair> {
    let Ok(address) = std::env::var("HETMEM_VERBS_ADDRESS") else {
        println!("skipped: HETMEM_VERBS_ADDRESS names no address of an RDMA device");
        return None;
    };
    let plugin = std::env::var_os("HETMEM_VERBS_PLUGIN").map(std::path::PathBuf::from);
    let at = SocketAddr::new(address.parse().expect("an address"), 0);
    let plugin = Plugin::load(plugin.as_deref()).expect("the plugin");
    Some(connected(&Context::open(plugin).expect("RDMA"), at).expect("a connection"))
}

fn connected(context: &Arc<Context>, at: SocketAddr) -> Result<Pair, StoreError> {
    let once = Greeting { retries: 1, not_ready_retries: 1, ..Greeting::new(b"", (1, 1)) };
    let loopback = Loopback::connect(context, at, once, PATIENCE)?;
    let memory = Arc::new(HeapRegion::new(2 * LEN));
    let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ;
    let shared = Arc::clone(&memory) as Arc<dyn RegionMemory>;
    let registered = loopback.device.register(&shared, (0, 2 * LEN as u64), Way::Host, access)?;
    Ok(Pair { loopback, memory, registered })
}

impl Pair {
    /// iWARP ends a connection where InfiniBand and RoCE end a piece of work, and does not say which it was.
    fn is_iwarp(&self) -> bool {
        self.loopback.device.limits().expect("limits").transport == abi::TRANSPORT_IWARP
    }

    fn post(&mut self, kind: u32, change: impl FnOnce(&mut abi::Work, &mut abi::Piece)) {
        self.try_post(kind, change).expect("it is posted");
    }

    /// Work of end a: reads the second half of the memory into the first, or sends the first.
    fn try_post(
        &mut self,
        kind: u32,
        change: impl FnOnce(&mut abi::Work, &mut abi::Piece),
    ) -> Result<(), StoreError> {
        let (address, keys) = (self.memory.base() as u64, self.registered.keys());
        let mut piece = abi::Piece { address, len_bytes: 64, key: keys.local };
        let mut work = abi::Work {
            id: 7,
            pieces: std::ptr::null(),
            piece_count: 1,
            kind,
            flags: abi::FLAG_SIGNALED,
            immediate: 0,
            remote_address: address + LEN as u64,
            remote_key: keys.remote,
            _reserved: 0,
        };
        change(&mut work, &mut piece);
        work.pieces = &raw const piece;
        // SAFETY: the piece is there, and names memory that lives as long as the connection.
        unsafe { self.loopback.a.post(&[work]) }.map_err(|(_, why)| why)
    }

    /// How end a's work has ended.
    fn ended(&self) -> abi::Completion {
        let done = self.loopback.ended(PATIENCE).expect("the work ends");
        assert_eq!(done.id, 7);
        done
    }

    fn fails_with(&self, status: u32, class: Class) {
        let done = self.ended();
        println!("{}", explain(&done));
        assert_eq!((done.status, class_of(&done)), (status, class));
    }
}

#[test]
fn work_that_can_be_done_succeeds() {
    let Some(mut pair) = pair() else { return };
    pair.memory.write(LEN, &[5; 64]);
    pair.post(abi::WORK_READ, |_, _| {});
    assert_eq!(pair.ended().status, 0);
    assert_eq!(pair.memory.read(0, 64), [5; 64]);
}

/// Hears nothing.
struct Deaf;

impl FabricSink for Deaf {
    fn message(&self, _: LinkId, _: FrameHeader, _: &[u8]) -> Landing {
        Landing::Discard
    }

    fn event(&self, _: FabricEvent) {}
}

#[test]
fn a_node_of_another_version_is_told_so_when_it_is_refused() {
    let Some(Pair { loopback, .. }) = pair() else { return };
    let plugin = std::env::var_os("HETMEM_VERBS_PLUGIN").map(std::path::PathBuf::from);
    let listen = SocketAddr::new(loopback.device.address().ip(), 0).to_string();
    let config = VerbsConfig { plugin, listen, ..VerbsConfig::default() };
    let fabric = VerbsFabric::start(&config, Arc::new(Deaf)).expect("listen");
    let Loopback { context, device, queues, pools, .. } = &loopback;
    let at = fabric.address().parse().expect("an address");
    let mut later = context.resolve(at, 2_000, 9).expect("a way");
    event(context, abi::EVENT_ROUTED, PATIENCE).expect("it is found");
    let asked = Made { number: 0, work_max: 4, pieces_max: 1, inline_bytes_max: 0 };
    later.queue_pair(device, &queues[0], &pools[0], asked).expect("a queue pair");
    let what = Purpose::Control { port: 1, token: LinkToken(1) };
    let mut hello = Hello { what, owner: Owner::default() }.to_bytes();
    hello[3] += 1;
    // Soft iWARP says by the call that it was refused, and by the event.
    println!("{:?}", later.connect(Greeting::new(&hello, (1, 1))));
    let refused = event(context, abi::EVENT_REJECTED, PATIENCE).expect("it is refused");
    let said = Hello::parse(&refused.private[..refused.private_len as usize]).expect("a greeting");
    assert_eq!(said.what, Purpose::Refused);
    assert_eq!(fabric.refused(), 1);
}

#[test]
fn a_peer_without_a_receive_buffer_is_not_ready() {
    let Some(mut pair) = pair() else { return };
    pair.post(abi::WORK_SEND, |_, _| {});
    if pair.is_iwarp() {
        // TCP has taken the bytes, which is all that it says; then the connection ends.
        assert_eq!(pair.ended().status, 0);
        event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
    } else {
        pair.fails_with(13, Class::Reconnect);
    }
}

#[test]
fn a_buffer_in_time_is_time_enough() {
    let Some(mut pair) = pair() else { return };
    let piece = abi::Piece {
        address: pair.memory.base() as u64 + LEN as u64,
        len_bytes: 64,
        key: pair.registered.keys().local,
    };
    pair.loopback.pools[1].post(9, &piece).expect("room");
    pair.post(abi::WORK_SEND, |_, _| {});
    assert_eq!(pair.ended().status, 0);
}

#[test]
fn memory_that_the_peer_does_not_show_is_not_read() {
    let Some(mut pair) = pair() else { return };
    pair.post(abi::WORK_READ, |work, _| work.remote_key ^= 0xff00);
    if pair.is_iwarp() {
        pair.fails_with(5, Class::Reconnect);
        event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
    } else {
        pair.fails_with(10, Class::Work);
    }
}

/// Half of the memory's second half is open to writes; from `start` on, 64 bytes are written.
fn write_at(start: u64, withdraw: bool) -> Option<(Pair, abi::Completion)> {
    let mut pair = pair()?;
    let (open_at, open_len) = (LEN as u64, LEN as u64 / 2);
    let memory = Arc::clone(&pair.memory) as Arc<dyn RegionMemory>;
    let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_WRITE;
    let open = pair.loopback.device.register(&memory, (open_at, open_len), Way::Host, access);
    let open = open.expect("it is registered");
    let key = open.keys().remote;
    let kept = Some(open).filter(|_| !withdraw);
    pair.memory.write(0, &[9; 64]);
    pair.post(abi::WORK_WRITE, |work, _| {
        work.remote_address += start;
        work.remote_key = key;
    });
    let done = pair.ended();
    drop(kept);
    Some((pair, done))
}

#[test]
fn what_was_opened_to_writes_is_written_inside_of_it_alone_and_until_it_is_closed() {
    let Some((pair, done)) = write_at(64, false) else { return };
    assert_eq!(done.status, 0);
    assert_eq!(pair.memory.read(LEN + 64, 64), [9; 64]);
    for (start, withdraw) in [(LEN as u64 / 2 - 32, false), (64, true)] {
        let Some((pair, done)) = write_at(start, withdraw) else { return };
        if pair.is_iwarp() {
            // Whoever writes there hears only that the connection has ended.
            event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
        } else {
            println!("{}", explain(&done));
            assert_eq!((done.status, class_of(&done)), (10, Class::Work));
        }
        assert!(pair.memory.read(LEN, LEN).iter().all(|byte| *byte == 0), "nothing was written");
    }
}

#[test]
fn a_device_is_tried_in_every_direction_and_of_device_memory_it_is_said_why_not() {
    let Some(pair) = pair() else { return };
    let at = pair.loopback.device.address();
    let host: Arc<HeapRegion> = Arc::new(HeapRegion::new(super::proof::LEN));
    let proof = prove(&pair.loopback.context, at, &host);
    println!("{proof}");
    assert!(proof.is_whole() && proof.by_push() == Ok(false), "{proof}");
    let foreign = ForeignScratch(Arc::new(Foreign(dma_buf().expect("a dma-buf"))));
    let proof = prove(&pair.loopback.context, at, &foreign);
    println!("{proof}");
    assert_eq!(proof.kind, MemoryKind::Device(0));
    assert!(proof.outcomes.iter().all(|(_, outcome)| matches!(outcome, Outcome::Fails(_))), "{proof}");
    assert!(proof.by_push().is_err());
    let nobody = SocketAddr::from(([192, 0, 2, 1], 0));
    let proof = prove(&pair.loopback.context, nobody, &host);
    println!("{proof}");
    assert!(proof.outcomes.iter().all(|(_, outcome)| matches!(outcome, Outcome::Untried(_))), "{proof}");
    assert_eq!(proof.by_push(), Ok(false));
}

#[test]
fn memory_that_is_not_registered_here_is_not_written() {
    let Some(mut pair) = pair() else { return };
    pair.post(abi::WORK_READ, |_, piece| piece.key ^= 0xff00);
    pair.fails_with(4, Class::Work);
}

#[test]
fn a_peer_that_is_gone_acknowledges_nothing() {
    let Some(mut pair) = pair() else { return };
    drop(pair.loopback.b.take());
    if pair.is_iwarp() {
        // The event is all that is sure: what is posted then may be refused, or never come back.
        event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
        println!("posted afterwards: {:?}", pair.try_post(abi::WORK_READ, |_, _| {}));
        return;
    }
    pair.post(abi::WORK_READ, |_, _| {});
    pair.fails_with(12, Class::Reconnect);
    event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
}

#[test]
fn work_of_a_connection_that_was_ended_is_flushed() {
    let Some(mut pair) = pair() else { return };
    pair.loopback.a.disconnect();
    if pair.is_iwarp() {
        // Soft iWARP refuses it, and keeps reads of before until the queue pair is closed: the event is all that comes.
        event(&pair.loopback.context, abi::EVENT_DISCONNECTED, PATIENCE).expect("it is told");
        println!("posted afterwards: {:?}", pair.try_post(abi::WORK_READ, |_, _| {}));
        return;
    }
    pair.post(abi::WORK_READ, |_, _| {});
    pair.fails_with(5, Class::Reconnect);
}

/// Memory that says it is a device's: a dma-buf of the kernel's own, and an address that nobody knows.
struct Foreign(OwnedFd);

// SAFETY: the adapter is expected to refuse it, and no processor is led to it.
unsafe impl RegionMemory for Foreign {
    fn base(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(1 << 16)
    }

    fn len_bytes(&self) -> u64 {
        super::proof::LEN as u64
    }

    fn device(&self) -> Option<DeviceMemory<'_>> {
        Some(DeviceMemory { number: 0, dma_buf: Some((self.0.as_fd(), 0)), staging: None })
    }
}

struct ForeignScratch(Arc<Foreign>);

impl Scratch for ForeignScratch {
    fn memory(&self) -> Arc<dyn RegionMemory> {
        Arc::clone(&self.0) as _
    }

    fn fill(&self, _: usize, _: &[u8]) -> Result<(), StoreError> {
        panic!("no adapter takes it")
    }

    fn look(&self, _: usize, _: usize) -> Result<Vec<u8>, StoreError> {
        panic!("no adapter takes it")
    }
}

/// UDMABUF_CREATE of linux/udmabuf.h: makes a dma-buf of a memory file.
#[repr(C)]
struct MakeDmaBuf {
    memory_file: u32,
    flags: u32,
    offset: u64,
    len_bytes: u64,
}

// SAFETY: the kernel reads the fields, of the layout that the header has, and answers with a new descriptor.
unsafe impl Ioctl for MakeDmaBuf {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<Self>(b'u', 0x42)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self).cast()
    }

    unsafe fn output_from_ptr(answer: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call has succeeded, so this is a descriptor, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(answer) })
    }
}

fn dma_buf() -> rustix::io::Result<OwnedFd> {
    let file = memfd_create("dma-buf", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, super::proof::LEN as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK)?;
    let maker = open("/dev/udmabuf", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let memory_file = file.as_raw_fd().cast_unsigned();
    // SAFETY: as for `Ioctl` above.
    unsafe {
        ioctl(&maker, MakeDmaBuf { memory_file, flags: 0, offset: 0, len_bytes: super::proof::LEN as u64 })
    }
}

#[test]
fn soft_roce_takes_no_device_memory_and_says_why() {
    let Some(pair) = pair() else { return };
    let memory: Arc<dyn RegionMemory> = Arc::new(Foreign(dma_buf().expect("a dma-buf")));
    let device = memory.device().expect("it says so");
    let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ;
    let mut errnos = Vec::new();
    let refused = climb(&device, |way| {
        let refused = pair.loopback.device.register(&memory, (0, LEN as u64), way, access);
        refused.inspect_err(|refusal| errnos.push(refusal.errno))
    });
    let Err(why) = refused else { panic!("it was registered, and this test knows no adapter that does") };
    println!("{why}");
    assert_eq!(errnos, [Errno::OPNOTSUPP.raw_os_error(), Errno::FAULT.raw_os_error()]);
    for part in ["takes no dma-buf", "load nvidia-peermem", "staged through host memory"] {
        assert!(why.to_string().contains(part), "{why}");
    }
}
