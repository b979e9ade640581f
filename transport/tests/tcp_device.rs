//! Memory of a device over TCP: it passes through a ring of host memory, one part of which the device copies while the
//! socket has another. The device is made up: its copies are made later, by a thread, and can be made to fail. Not a GPU
//! (`tests/gpu.rs` of the repository). Invariant: the device's bytes are touched by its own thread alone.
//!
//! unsafe: vouches for memory whose address nobody may follow.
#![allow(unsafe_code)]

mod raw;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use hetmem_core::{ErrorKind, Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};
use hetmem_transport::{
    Access, Copying, DeviceMemory, Fabric as _, HeapRegion, RegionMemory, Ring, Staging, StagingWay,
    TcpConfig, TcpFabric,
};
use parking_lot::{Condvar, Mutex};
use raw::Node;

const DEVICE: SegmentId = SegmentId(7);
const LEN: usize = 12 << 20;
/// What a copy takes at least.
const COPY: Duration = Duration::from_micros(300);

/// What the device is to do, and what it has done.
#[derive(Default)]
struct Device {
    memory: Mutex<Option<Arc<HeapRegion>>>,
    copies: AtomicUsize,
    rings: AtomicUsize,
    /// Copies fail from now on.
    broken: AtomicBool,
    /// Copies wait for this.
    held: Mutex<()>,
}

struct DeviceRegion(Arc<Device>);

// SAFETY: `base` is of no memory at all, and `device()` says that no processor may follow it.
unsafe impl RegionMemory for DeviceRegion {
    fn base(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(1 << 47)
    }

    fn len_bytes(&self) -> u64 {
        LEN as u64
    }

    fn device(&self) -> Option<DeviceMemory<'_>> {
        Some(DeviceMemory { number: 0, dma_buf: None, staging: Some(self) })
    }
}

impl Staging for DeviceRegion {
    fn ring(&self, len_bytes: usize) -> Result<Box<dyn Ring>, StoreError> {
        self.0.rings.fetch_add(1, Ordering::SeqCst);
        let (jobs, queue) = channel::<Job>();
        let (device, memory) = (Arc::clone(&self.0), Arc::new(HeapRegion::new(len_bytes)));
        let ring = Arc::clone(&memory);
        std::thread::spawn(move || queue.into_iter().for_each(|job| job.run(&device, &ring)));
        Ok(Box::new(DeviceRing { device: Arc::clone(&self.0), memory, jobs }))
    }
}

struct DeviceRing {
    device: Arc<Device>,
    memory: Arc<HeapRegion>,
    jobs: Sender<Job>,
}

impl Drop for DeviceRing {
    fn drop(&mut self) {
        self.device.rings.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Job {
    way: StagingWay,
    at: usize,
    offset: usize,
    len: usize,
    end: Arc<End>,
}

#[derive(Default)]
struct End {
    result: Mutex<Option<Result<(), StoreError>>>,
    over: Condvar,
}

impl Job {
    fn run(self, device: &Device, ring: &HeapRegion) {
        std::thread::sleep(COPY);
        drop(device.held.lock());
        let memory = device.memory.lock().clone();
        let result = match memory {
            Some(memory) if !device.broken.load(Ordering::SeqCst) => {
                match self.way {
                    StagingWay::In => memory.write(self.offset, &ring.read(self.at, self.len)),
                    StagingWay::Out => ring.write(self.at, &memory.read(self.offset, self.len)),
                }
                Ok(())
            }
            _ => Err(StoreError::unavailable("the made-up device", "it is broken")),
        };
        device.copies.fetch_add(1, Ordering::SeqCst);
        *self.end.result.lock() = Some(result);
        self.end.over.notify_all();
    }
}

impl Copying for End {
    fn is_over(&self) -> bool {
        self.result.lock().is_some()
    }

    fn wait(&self) -> Result<(), StoreError> {
        let mut result = self.result.lock();
        while result.is_none() {
            self.over.wait(&mut result);
        }
        result.clone().expect("just seen")
    }
}

impl Ring for DeviceRing {
    fn memory(&self) -> Option<Arc<dyn RegionMemory>> {
        Some(Arc::clone(&self.memory) as _)
    }

    fn begin(
        &mut self,
        way: StagingWay,
        at: usize,
        offset: u64,
        len: usize,
    ) -> Result<Arc<dyn Copying>, StoreError> {
        let end = Arc::<End>::default();
        let offset = usize::try_from(offset).expect("small");
        self.jobs.send(Job { way, at, offset, len, end: Arc::clone(&end) }).expect("its thread");
        Ok(end)
    }
}

/// A node with host memory and memory of a device.
struct Machine {
    node: Node,
    device: Arc<Device>,
    device_key: RemoteKey,
}

impl Machine {
    fn start() -> Self {
        let node = Node::start(TcpConfig::default());
        let device = Arc::new(Device::default());
        *device.memory.lock() = Some(Arc::new(HeapRegion::new(LEN)));
        let region = Arc::new(DeviceRegion(Arc::clone(&device)));
        let device_key = node.fabric.register(DEVICE, region, Access::RemoteRead).expect("register");
        Self { node, device, device_key }
    }

    fn fabric(&self) -> &TcpFabric {
        &self.node.fabric
    }

    fn link_to(&self, other: &Self) -> LinkId {
        self.fabric().connect(&other.fabric().address()).expect("connect");
        self.node.wait("the link", |sink| !sink.ups.lock().is_empty());
        self.node.sink.ups.lock()[0]
    }

    fn bytes(&self) -> Arc<HeapRegion> {
        self.device.memory.lock().clone().expect("there")
    }

    /// Until there is one, or none is left. Nobody is told of rings.
    fn wait_for_rings(&self, any: bool) {
        let until = Instant::now() + raw::PATIENCE;
        while (self.device.rings.load(Ordering::SeqCst) > 0) != any {
            assert!(Instant::now() < until, "waited in vain");
            std::thread::sleep(COPY);
        }
    }

    fn copies(&self) -> usize {
        self.device.copies.load(Ordering::SeqCst)
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at / 7 + at * 31 + seed) % 251).expect("small")).collect()
}

fn local(segment: SegmentId, offset: usize, len: usize) -> Extent {
    Extent { segment, offset: offset as u64, len_bytes: len as u64 }
}

fn remote(key: RemoteKey, offset: usize, len: usize) -> RemoteExtent {
    RemoteExtent { key, offset: offset as u64, len_bytes: len as u64 }
}

/// Every pair of memories, at lengths around those of the ring's parts and of slices, at odd places.
#[test]
fn bytes_of_a_device_come_and_go_through_its_ring() {
    let (owner, reader) = (Machine::start(), Machine::start());
    let link = reader.link_to(&owner);
    let mut number = 0;
    for len in [1, 8, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 5, (5 << 20) + 17] {
        for (from_device, to_device) in [(true, true), (true, false), (false, true), (false, false)] {
            number += 1;
            let (from, to) = (8 * number, 3 + number);
            let bytes = pattern(number, len);
            let source = if from_device { owner.bytes() } else { Arc::clone(&owner.node.memory) };
            let target = if to_device { reader.bytes() } else { Arc::clone(&reader.node.memory) };
            source.write(from, &bytes);
            target.write(to - 1, &vec![0xEE; len + 2]);
            let key = if from_device { owner.device_key } else { owner.node.key };
            let segment = if to_device { DEVICE } else { raw::SEGMENT };
            let copies = (owner.copies(), reader.copies());
            let (remote, local) = (remote(key, from, len), local(segment, to, len));
            reader.fabric().read(link, TransferId(number as u64), remote, local).expect("read");
            let stats = reader.node.read_result().expect("read");
            assert_eq!(stats.bytes, len as u64);
            if to_device {
                assert_eq!(stats.staged_bytes, len as u64, "all of it passed through the ring");
            }
            let came = target.read(to - 1, len + 2);
            assert!(came[1..=len] == bytes[..], "{len} bytes, {from_device} to {to_device}");
            assert_eq!((came[0], came[len + 1]), (0xEE, 0xEE), "and no byte beside them");
            assert_eq!(owner.copies() > copies.0, from_device);
            assert_eq!(reader.copies() > copies.1, to_device);
        }
    }
    owner.wait_for_rings(false);
    assert_eq!(reader.device.rings.load(Ordering::SeqCst), 0, "a read is over when its ring is");
}

/// Many at once, over all streams, with words behind them.
#[test]
fn reads_of_a_device_are_not_mixed_up() {
    let (owner, reader) = (Machine::start(), Machine::start());
    let link = reader.link_to(&owner);
    let all = pattern(5, LEN);
    owner.bytes().write(0, &all);
    owner.node.memory.write(0, &77_u64.to_le_bytes());
    let mut at = 0;
    let mut count = 0;
    for step in [100, 70_000, 3_000_000, 8, 1 << 20, 2_500_000, 40_001, 1, 2_100_000] {
        let (from, to) = (remote(owner.device_key, at, step), local(DEVICE, at, step));
        let word = remote(owner.node.key, 0, 8);
        reader.fabric().read_checked(link, TransferId(count), Some((from, to)), word).expect("read");
        at += step;
        count += 1;
    }
    for _ in 0..count {
        let stats = reader.node.read_result().expect("read");
        assert_eq!((stats.word, stats.staged_bytes), (Some(77), stats.bytes));
    }
    assert!(reader.bytes().read(0, at) == all[..at]);
}

#[test]
fn a_payload_is_never_a_devices() {
    let (owner, reader) = (Machine::start(), Machine::start());
    let link = reader.link_to(&owner);
    let frame = hetmem_core::wire::encode(hetmem_core::wire::FrameKind::Peer, 1, &7_u8, 100).expect("small");
    let sent = reader.fabric().send(link, frame, &[local(DEVICE, 0, 100)], Default::default());
    assert_eq!(sent.expect_err("refused").kind(), ErrorKind::Unavailable);
}

/// A device that fails fails what is read from or into it, and nothing else.
#[test]
fn a_broken_device_fails_its_own_reads() {
    let (owner, reader) = (Machine::start(), Machine::start());
    let link = reader.link_to(&owner);
    reader.device.broken.store(true, Ordering::SeqCst);
    let len = 3 << 20;
    let read = |number, key, segment| {
        let (from, to) = (remote(key, 0, len), local(segment, 0, len));
        reader.fabric().read(link, TransferId(number), from, to).expect("read");
        reader.node.read_result()
    };
    let why = read(1, owner.node.key, DEVICE).expect_err("its device is broken").to_string();
    assert!(why.contains("it is broken"), "{why}");
    owner.device.broken.store(true, Ordering::SeqCst);
    assert!(read(2, owner.device_key, raw::SEGMENT).is_err(), "the owner's device is broken");
    owner.node.memory.write(0, &pattern(3, len));
    read(3, owner.node.key, raw::SEGMENT).expect("host memory is as well as before");
    assert!(reader.node.memory.read(0, len) == pattern(3, len));
    assert!(reader.node.sink.downs.lock().is_empty());
}

/// What was begun ends before the memory goes; what was not is never begun.
#[test]
fn a_segment_of_a_device_goes_when_no_copy_of_it_is_under_way() {
    let (owner, reader) = (Machine::start(), Machine::start());
    let link = reader.link_to(&owner);
    for (machine, key, segment) in
        [(&owner, owner.device_key, raw::SEGMENT), (&reader, owner.node.key, DEVICE)]
    {
        let held = machine.device.held.lock();
        let copies = machine.copies();
        let (from, to) = (remote(key, 0, 6 << 20), local(segment, 0, 6 << 20));
        reader.fabric().read(link, TransferId(9), from, to).expect("read");
        machine.wait_for_rings(true);
        std::thread::sleep(20 * COPY);
        std::thread::scope(|scope| {
            let gone = scope.spawn(|| machine.fabric().deregister(DEVICE));
            std::thread::sleep(20 * COPY);
            assert_eq!(machine.copies(), copies, "none has ended");
            drop(held);
            gone.join().expect("deregistered");
        });
        let memory = machine.device.memory.lock().take().expect("there");
        assert_eq!(Arc::strong_count(&memory), 1, "nothing touches it any more");
        assert!(reader.node.read_result().is_err());
        machine.wait_for_rings(false);
    }
}
