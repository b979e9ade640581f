//! Gets of objects in GPU memory by a process that has their segment mapped. Not the first get, which maps it (`costs`).
//! Invariant: node and reader are processes of their own, and a sample is one get with its release.

use std::sync::Arc;

use hetmem_client::{Checksum, GpuReserved, Key, ObjectMeta, PutOptions, Store, StoreError};
use hetmem_gpu_mem::{HostMemory, Memory, PinnedBuffer, Span};

use super::other_end::Reader;
use super::{Bench, GIB, KIB, MIB};
use crate::bench::baseline::UnixEcho;
use crate::bench::rows::{Pair, Row, Target, timed};
use crate::bench::skipped;
use crate::demo::nodes::{Folder, Process};

/// Samples in a round.
const SAMPLES: usize = 1000;
/// The longest that a get may take, in microseconds.
const MOST_US: f64 = 10.0;

pub(super) fn measure(bench: &Bench, rows: &mut Vec<Row>) -> Result<(), StoreError> {
    let lens = bench.lens([4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB], 2)?;
    let Some(longest) = lens.iter().max() else {
        return Ok(());
    };
    let folder = Folder::create()?;
    let ordinal = bench.device.ordinal();
    // Room for the longest in a segment of its own, whatever else has been cut.
    let room = (2 * longest).max(256 * MIB).min(bench.device.info().memory_bytes);
    let node = Process::start(
        "bench",
        &[
            ("socket", folder.path().join("node.sock").display().to_string()),
            ("listen", "127.0.0.1:0".to_owned()),
            ("host", "64MiB".to_owned()),
            ("gpu", format!("{ordinal}={room}")),
        ],
    )?;
    let store = Store::connect(Some(&node.socket))?;
    let mut echo = UnixEcho::start(folder.path())?;
    for len in lens {
        match row(bench, &node, &store, &mut echo, len) {
            Ok(row) => rows.push(row),
            Err(why) => skipped(&format!("gets of {len} bytes"), &why.to_string()),
        }
    }
    Ok(())
}

fn row(
    bench: &Bench,
    node: &Process,
    store: &Store,
    echo: &mut UnixEcho,
    len: u64,
) -> Result<Row, StoreError> {
    let name = format!("bench/gpu/{len}");
    let key = Key::new(&name)?;
    put(bench, store, &key, len)?;
    let mut reader = Reader::start(&node.socket, &name, bench.device.ordinal())?;
    let pair = Pair {
        workload: bench.workload,
        op: "get and release, another process",
        size_bytes: len,
        moves: false,
        ceiling_name: "Unix-socket round trip",
        target: Target::AtMost(1.0),
        rounds: bench.size.rounds(),
        samples: SAMPLES,
    };
    let mut row = pair.measure(
        &mut || {
            let (us, done) = timed(|| echo.round_trip());
            done.map(|()| us)
        },
        &mut || reader.sample(SAMPLES),
    )?;
    row.target = format!("p50 under {MOST_US} us");
    drop(reader);
    store.delete(&key)?;
    Ok(row)
}

/// Puts an object that is written on the GPU, so that no host memory of the node is needed.
fn put(bench: &Bench, store: &Store, key: &Key, len: u64) -> Result<(), StoreError> {
    let meta = ObjectMeta::bytes(len)?;
    let reserved = store.reserve_gpu(key, meta, bench.device.ordinal(), &PutOptions::default())?;
    let GpuReserved::Open(reservation) = reserved else {
        return Err(StoreError::unavailable("GPU memory for the benchmark", "the node gave other memory"));
    };
    let device = reservation.device().clone();
    let stream = device.stream()?;
    let piece = len.min(16 * MIB);
    let bytes: Arc<dyn HostMemory> = Arc::new(PinnedBuffer::new(&device, piece)?);
    let target = reservation.span()?;
    let mut at = 0;
    while at < len {
        let part = piece.min(len - at);
        let from = Span::new(Memory::Host(Arc::clone(&bytes)), 0, part)?;
        stream.copy(&from, &Span::new(target.memory().clone(), target.offset() + at, part)?)?;
        at += part;
    }
    drop(target);
    reservation.seal_after(&stream, Checksum::None).map(drop)
}
