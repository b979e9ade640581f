//! Kernels beside what the device's own memory allows: batches of copies, conversions, checksums. Not gets. Invariant: both
//! sides of a row that has a target touch the same number of bytes, and times of device work are the device's.

use std::sync::Arc;

use hetmem_client::{DType, StoreError};
use hetmem_gpu_mem::{Cast, Device, HostMemory, Memory, PinnedBuffer, Segment, Span, Stream};

use super::{Bench, GIB, KIB, MIB, NO_TARGET};
use crate::bench::rows::{Pair, Row, Target, timed};
use crate::bench::skipped;

/// How near to the device's own copies, or to a reduction that only reads, a kernel is to come.
const NEAR: Target = Target::AtLeast(0.85);
/// Objects of the batch that copies one by one are compared with, and how much faster it is to be.
const BATCH: u64 = 10_000;
const BATCH_LEN: u64 = 4 * KIB;
const BATCH_GAIN: Target = Target::AtLeast(20.0);
/// What a device is kept busy with until the work that is timed has been queued.
const BUSY_LEN: u64 = 512 * MIB;

pub(super) fn measure(bench: &Bench, rows: &mut Vec<Row>) -> Result<(), StoreError> {
    if let Err(why) = bench.device.can_gather() {
        skipped("kernels", &why.to_string());
        return Ok(());
    }
    // From 256 MiB on, which no cache holds. What stands in for a GPU is tried with less.
    let totals = if bench.is_stand_in() { [MIB, 2 * MIB] } else { [256 * MIB, GIB] };
    for total in bench.lens(totals, 4)? {
        let room = Room::new(bench, total)?;
        for object_len in [64 * KIB, 256 * KIB, MIB] {
            rows.push(gather(bench, &room, object_len)?);
        }
        for (from, to) in [(DType::F32, DType::BF16), (DType::F32, DType::F16), (DType::BF16, DType::F32)] {
            rows.push(cast(bench, &room, from, to)?);
        }
        rows.extend(checksum(bench, &room)?);
    }
    let count = if bench.is_stand_in() { BATCH / 100 } else { BATCH };
    if bench.up_to >= count * BATCH_LEN {
        rows.extend(batch(bench, count, ("to host memory", true))?);
        rows.extend(batch(bench, count, ("on the device", false))?);
    }
    Ok(())
}

/// Two pieces of device memory, and a stream.
struct Room {
    len: u64,
    from: Arc<Segment>,
    to: Arc<Segment>,
    stream: Stream,
}

fn segment(device: &Device, len: u64) -> Result<Arc<Segment>, StoreError> {
    device.create_segment(len).map(Arc::new)
}

fn part(segment: &Arc<Segment>, offset: u64, len: u64) -> Result<Span, StoreError> {
    Span::new(Memory::Device(Arc::clone(segment)), offset, len)
}

impl Room {
    fn new(bench: &Bench, len: u64) -> Result<Self, StoreError> {
        let device = &bench.device;
        Ok(Self { len, from: segment(device, len)?, to: segment(device, len)?, stream: device.stream()? })
    }

    /// How long the device takes for work, in microseconds. It is kept busy until all of it is queued, so that what the
    /// processor does meanwhile does not count.
    fn device_us<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<f64, StoreError> {
        let len = self.len.min(BUSY_LEN);
        let busy = (part(&self.from, 0, len)?, part(&self.to, 0, len)?);
        for _ in 0..2 {
            self.stream.copy(&busy.0, &busy.1)?;
        }
        let start = self.stream.record_timed()?;
        let done = work()?;
        let end = self.stream.record_timed()?;
        self.stream.synchronize()?;
        drop(done);
        end.us_since(&start)
    }

    /// The device's own copy of so many bytes.
    fn copy_us(&self, len: u64) -> Result<f64, StoreError> {
        let (from, to) = (part(&self.from, 0, len)?, part(&self.to, 0, len)?);
        self.device_us(|| self.stream.copy(&from, &to))
    }

    fn pair<'a>(&self, bench: &Bench, op: &'a str, beside: &'a str) -> Pair<'a> {
        Pair {
            workload: bench.workload,
            op,
            size_bytes: self.len,
            moves: true,
            ceiling_name: beside,
            target: NEAR,
            rounds: bench.size.rounds(),
            samples: 5,
        }
    }
}

/// Objects from everywhere in the one segment, in no order, into the other without gaps.
fn gather(bench: &Bench, room: &Room, object_len: u64) -> Result<Row, StoreError> {
    let count = room.len / object_len;
    let pairs: Result<Vec<_>, StoreError> = (0..count)
        .map(|at| {
            // An odd factor visits each object of a power of two of them once.
            let source = at.wrapping_mul(0x9e37_79b1) % count;
            Ok((
                part(&room.from, source * object_len, object_len)?,
                part(&room.to, at * object_len, object_len)?,
            ))
        })
        .collect();
    let gathering = room.stream.prepare_gather(&pairs?)?;
    let op = format!("gather objects of {} KiB", object_len / KIB);
    let pair = room.pair(bench, &op, "one copy on the device");
    pair.measure(&mut || room.copy_us(room.len), &mut || room.device_us(|| gathering.launch()))
}

/// As many elements as float32 of them fill the room. The copy beside it reads and writes as many bytes together.
fn cast(bench: &Bench, room: &Room, from: DType, to: DType) -> Result<Row, StoreError> {
    let cast = Cast::new(from, to)?;
    let count = room.len / 4;
    let (read, written) = (count * cast.source_element_len(), count * cast.target_element_len());
    let (source, target) = (part(&room.from, 0, read)?, part(&room.to, 0, written)?);
    let op = format!("cast {from} to {to}, {count} elements");
    let mut pair = room.pair(bench, &op, "a copy of as many bytes");
    pair.size_bytes = (read + written) / 2;
    let len = pair.size_bytes;
    pair.measure(&mut || room.copy_us(len), &mut || {
        room.device_us(|| room.stream.cast(&source, &target, cast))
    })
}

/// Beside a kernel that only adds up the same bytes, and beside the device's copy of half of them, which it reads and writes.
fn checksum(bench: &Bench, room: &Room) -> Result<Vec<Row>, StoreError> {
    let source = part(&room.from, 0, room.len)?;
    let sums = part(&room.to, 0, 512)?;
    let spans = [source.clone()];
    let mut ours = || room.device_us(|| room.stream.checksums(&spans));
    let pair = room.pair(bench, "checksum, read in place", "a sum that only reads");
    let beside_sum = pair.measure(&mut || room.device_us(|| room.stream.sum(&source, &sums)), &mut ours)?;
    let pair = room.pair(bench, "checksum, read in place", "a copy of half as much");
    let mut beside_copy = pair.measure(&mut || room.copy_us(room.len / 2), &mut ours)?;
    NO_TARGET.clone_into(&mut beside_copy.target);
    Ok(vec![beside_sum, beside_copy])
}

/// Ten thousand short copies: by a kernel, by the driver's call for many, and one by one. The time is the caller's, from the
/// first call to the last byte.
fn batch(bench: &Bench, count: u64, (whither, to_host): (&str, bool)) -> Result<Vec<Row>, StoreError> {
    let (device, total) = (&bench.device, count * BATCH_LEN);
    let (from, stream) = (segment(device, total)?, device.stream()?);
    let target = if to_host {
        Memory::Host(Arc::new(PinnedBuffer::new(device, total)?) as Arc<dyn HostMemory>)
    } else {
        Memory::Device(segment(device, total)?)
    };
    let pairs: Result<Vec<(Span, Span)>, StoreError> = (0..count)
        .map(|at| {
            let to = Span::new(target.clone(), at * BATCH_LEN, BATCH_LEN)?;
            Ok((part(&from, (count - 1 - at) * BATCH_LEN, BATCH_LEN)?, to))
        })
        .collect();
    let pairs = pairs?;
    let wait = |issued: Result<(), StoreError>| issued.and_then(|()| stream.synchronize());
    let mut singly = || {
        let copy = |(from, to): &(Span, Span)| stream.copy(from, to);
        let (us, done) = timed(|| wait(pairs.iter().try_for_each(copy)));
        done.map(|()| us)
    };
    let mut together = || {
        let (us, done) = timed(|| wait(stream.copy_many(&pairs)));
        done.map(|()| us)
    };
    let op = format!("{count} copies of 4 KiB {whither}");
    let by = |how: &str| format!("{op}, {how}");
    let (by_kernel, by_driver) = (by("one launch"), by("one call of the driver"));
    let pair = |op| Pair {
        workload: bench.workload,
        op,
        size_bytes: total,
        moves: true,
        ceiling_name: "one by one",
        target: BATCH_GAIN,
        rounds: bench.size.rounds(),
        samples: 3,
    };
    let mut rows = vec![pair(&by_kernel).measure(&mut singly, &mut together)?];
    if bench.gpus.batch_copies().is_ok() {
        bench.gpus.set_gather_from(usize::MAX);
        let row = pair(&by_driver).measure(&mut singly, &mut together);
        bench.gpus.restore_gather_from();
        let mut row = row?;
        NO_TARGET.clone_into(&mut row.target);
        rows.push(row);
    }
    Ok(rows)
}
