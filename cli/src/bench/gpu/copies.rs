//! Copies between host memory and a GPU by the store's way, beside pinned memory and a bare stream; copies on a device and
//! between devices. Not gets. Invariant: both sides of a row move the same bytes to the same place, in turns.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use hetmem_client::StoreError;
use hetmem_core::SegmentId;
use hetmem_gpu_mem::{Copier, Device, HostMemory, Memory, PinnedBuffer, Segment, Span, Stream};
use hetmem_host_mem::{PagePolicy, Segment as HostSegment, SegmentOwner};

use super::{Bench, GIB, MIB, NO_TARGET};
use crate::bench::rows::{Pair, Row, Target, timed};
use crate::bench::skipped;

const PINNED: &str = "pinned memory, one copy on a stream";

pub(super) fn measure(bench: &Bench, rows: &mut Vec<Row>) -> Result<(), StoreError> {
    for len in bench.lens([MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB], 1)? {
        match Ends::new(bench, len) {
            Ok(ends) => {
                rows.push(ends.row(bench, Way::ToGpu)?);
                rows.push(ends.row(bench, Way::ToHost)?);
            }
            Err(why) => skipped(&format!("copies of {len} bytes"), &why.to_string()),
        }
    }
    for len in bench.lens([64 * MIB, GIB], 2)? {
        rows.push(on_device(bench, len)?);
        for peer in &bench.device.info().peers {
            match to_peer(bench, *peer, len) {
                Ok(row) => rows.push(row),
                Err(why) => skipped(&format!("copies to gpu:{peer}"), &why.to_string()),
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ToGpu,
    ToHost,
}

/// As much memory of each kind.
struct Ends {
    len: u64,
    gpu: Span,
    /// What the store has: shared memory that is registered with the driver.
    shared: Span,
    /// What the bare copy has.
    pinned: Span,
    stream: Stream,
    copier: Copier,
    _registration: hetmem_gpu_mem::HostRegistration,
}

fn span(memory: Memory, len: u64) -> Result<Span, StoreError> {
    Span::new(memory, 0, len)
}

fn device_span(device: &Device, len: u64) -> Result<Span, StoreError> {
    let segment: Arc<Segment> = Arc::new(device.create_segment(len)?);
    span(Memory::Device(segment), len)
}

impl Ends {
    fn new(bench: &Bench, len: u64) -> Result<Self, StoreError> {
        let device = &bench.device;
        let shared = HostSegment::create(SegmentId(1), len, SegmentOwner::Node, PagePolicy::Auto)?;
        let shared = hetmem_node::copied_memory(Arc::new(shared));
        let registration = bench.gpus.register_host(Arc::clone(&shared), false)?;
        let pinned: Arc<dyn HostMemory> = Arc::new(PinnedBuffer::new(device, len)?);
        Ok(Self {
            len,
            gpu: device_span(device, len)?,
            shared: span(Memory::Host(shared), len)?,
            pinned: span(Memory::Host(pinned), len)?,
            stream: device.stream()?,
            copier: Copier::new(bench.gpus.clone()),
            _registration: registration,
        })
    }

    fn row(&self, bench: &Bench, way: Way) -> Result<Row, StoreError> {
        let ends = |host: &Span| match way {
            Way::ToGpu => (host.clone(), self.gpu.clone()),
            Way::ToHost => (self.gpu.clone(), host.clone()),
        };
        let (bare, ours) = (ends(&self.pinned), ends(&self.shared));
        let pair = Pair {
            workload: bench.workload,
            op: if way == Way::ToGpu { "host to GPU" } else { "GPU to host" },
            size_bytes: self.len,
            moves: true,
            ceiling_name: PINNED,
            target: Target::AtLeast(0.95),
            rounds: bench.size.rounds(),
            samples: samples(self.len),
        };
        pair.measure(&mut || on_stream(&self.stream, &bare), &mut || self.by_copier(&ours))
    }

    /// As a node does: handed to the copier, until it says that the copy has ended.
    fn by_copier(&self, (from, to): &(Span, Span)) -> Result<f64, StoreError> {
        let (sender, receiver) = sync_channel(1);
        let (from, to) = (from.clone(), to.clone());
        let (us, done) = timed(|| {
            self.copier.submit(
                from,
                to,
                Box::new(move |result| {
                    // Who waits for it lives.
                    let _ = sender.send(result);
                }),
            );
            receiver.recv()
        });
        let copied = done.map_err(|_| StoreError::os("copy", "the copier has not said how it went"))??;
        if !copied.pinned {
            return Err(StoreError::unavailable("registered memory", "the driver staged the copy"));
        }
        Ok(us)
    }
}

/// Copies in one round: fewer of long ones.
fn samples(len: u64) -> usize {
    if len >= 256 * MIB { 3 } else { 10 }
}

/// One copy, until the stream is past it.
fn on_stream(stream: &Stream, (from, to): &(Span, Span)) -> Result<f64, StoreError> {
    let (us, done) = timed(|| stream.copy(from, to).and_then(|()| stream.synchronize()));
    done.map(|()| us)
}

/// A copy inside a device. It reads and writes each byte, so the memory moves twice what the rate says.
fn on_device(bench: &Bench, len: u64) -> Result<Row, StoreError> {
    let device = &bench.device;
    let (from, to) = (device_span(device, len)?, device_span(device, len)?);
    let pinned: Arc<dyn HostMemory> = Arc::new(PinnedBuffer::new(device, len)?);
    let pinned = span(Memory::Host(pinned), len)?;
    let stream = device.stream()?;
    let (bare, ours) = ((pinned, to.clone()), (from, to));
    let row = pair(bench, "on the device", len, "host to GPU, pinned");
    let mut row = row.measure(&mut || on_stream(&stream, &bare), &mut || on_stream(&stream, &ours))?;
    NO_TARGET.clone_into(&mut row.target);
    Ok(row)
}

fn to_peer(bench: &Bench, peer: u16, len: u64) -> Result<Row, StoreError> {
    let (device, other) = (&bench.device, bench.gpus.device(peer)?);
    let (from, to) = (device_span(device, len)?, device_span(device, len)?);
    let far = device_span(&other, len)?;
    let stream = device.stream()?;
    let (bare, ours) = ((from.clone(), to), (from, far));
    let op = format!("to gpu:{peer}");
    let row = pair(bench, &op, len, "on the device");
    let mut row = row.measure(&mut || on_stream(&stream, &bare), &mut || on_stream(&stream, &ours))?;
    NO_TARGET.clone_into(&mut row.target);
    Ok(row)
}

fn pair<'a>(bench: &Bench, op: &'a str, len: u64, ceiling_name: &'a str) -> Pair<'a> {
    Pair {
        workload: bench.workload,
        op,
        size_bytes: len,
        moves: true,
        ceiling_name,
        target: Target::AtLeast(1.0),
        rounds: bench.size.rounds(),
        samples: samples(len),
    }
}
