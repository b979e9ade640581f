//! The segments that this process maps: all that it reads, and those granted to it for writing. Not their
//! lifetime, which is the node's. Invariant: a read mapping, once here, stays until the store goes, so that a
//! reader needs no lock (a retired segment's lets go of its memory and reads as zeros, and nobody can hold an object
//! in it); numbers of segments are never used twice by one incarnation of a node.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use hetmem_core::{Extent, SegmentId, StoreError};
use hetmem_host_mem::{ReadMapping, WriteMapping};
use parking_lot::{Condvar, Mutex};

const PER_CHUNK: usize = 256;
const CHUNKS: usize = 4096;

type Chunk = Box<[OnceLock<ReadMapping>]>;

/// Read mappings by segment number: two steps, no lock, never moved.
#[derive(Debug)]
pub(crate) struct ReadMappings {
    chunks: Box<[OnceLock<Chunk>]>,
}

impl ReadMappings {
    pub(crate) fn new() -> Self {
        Self { chunks: std::iter::repeat_with(OnceLock::new).take(CHUNKS).collect() }
    }

    /// The segment's mapping, if it is here.
    #[inline]
    pub(crate) fn get(&self, segment: SegmentId) -> Option<&ReadMapping> {
        let (chunk, place) = place_of(segment);
        self.chunks.get(chunk)?.get()?.get(place)?.get()
    }

    /// The bytes of an extent whose segment is here; `None` outside of it.
    #[inline]
    pub(crate) fn bytes(&self, extent: &Extent) -> Option<&[u8]> {
        self.get(extent.segment)?.bytes(extent.offset, extent.len_bytes)
    }

    /// Lets go of the memory of a segment that the node has retired.
    pub(crate) fn release(&self, segment: SegmentId) -> Result<(), StoreError> {
        self.get(segment).map_or(Ok(()), ReadMapping::release)
    }

    /// Maps a segment. When two threads do, the second mapping goes again.
    pub(crate) fn add(&self, segment: SegmentId, fd: OwnedFd, len_bytes: u64) -> Result<(), StoreError> {
        let (chunk, place) = place_of(segment);
        let Some(chunk) = self.chunks.get(chunk) else {
            return Err(StoreError::unavailable(
                format!("segment {segment}"),
                "this client has seen more segments than it can map: connect again",
            ));
        };
        let chunk = chunk.get_or_init(|| std::iter::repeat_with(OnceLock::new).take(PER_CHUNK).collect());
        if let Some(slot) = chunk.get(place)
            && slot.get().is_none()
        {
            let _ = slot.set(ReadMapping::map(fd, len_bytes)?);
        }
        Ok(())
    }
}

#[inline]
fn place_of(segment: SegmentId) -> (usize, usize) {
    let number = usize::try_from(segment.0).unwrap_or(usize::MAX);
    (number / PER_CHUNK, number % PER_CHUNK)
}

/// A segment that only this client writes.
#[derive(Clone, Debug)]
enum Grant {
    /// Mapped; `told` once the node knows, which is before anything in it is sealed.
    Mapped { mapping: Arc<WriteMapping>, told: bool },
    /// It could not be mapped.
    Failed(StoreError),
}

/// What a caller has to do before it may write into a granted segment.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) mapping: Arc<WriteMapping>,
    /// Whether the node still has to be told that the segment is mapped.
    pub(crate) tell: bool,
}

/// Granted segments by number.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    segments: Mutex<HashMap<SegmentId, Grant>>,
    /// A segment was added.
    added: Condvar,
}

impl Grants {
    /// Maps a segment whose descriptor has come. It comes until the node has been told that the segment is mapped,
    /// and never after, so whoever receives it must bring it here. The first mapping stays; the lock is held until
    /// it is there, since the node closes the segment to further ones as soon as it is told.
    pub(crate) fn add(&self, segment: SegmentId, fd: OwnedFd, len_bytes: u64) {
        let mut segments = self.segments.lock();
        if matches!(segments.get(&segment), Some(Grant::Mapped { .. })) {
            return;
        }
        let grant = match WriteMapping::map(fd, len_bytes) {
            Ok(mapping) => Grant::Mapped { mapping: Arc::new(mapping), told: false },
            Err(error) => Grant::Failed(error),
        };
        segments.insert(segment, grant);
        drop(segments);
        self.added.notify_all();
    }

    /// A granted segment's mapping. Its descriptor may have come with another thread's answer, which is then about
    /// to bring it: waits until `deadline`.
    pub(crate) fn get(&self, segment: SegmentId, deadline: Instant) -> Result<Granted, StoreError> {
        let mut segments = self.segments.lock();
        loop {
            match segments.get(&segment) {
                Some(Grant::Mapped { mapping, told }) => {
                    return Ok(Granted { mapping: Arc::clone(mapping), tell: !told });
                }
                Some(Grant::Failed(error)) => return Err(error.clone()),
                None => {}
            }
            if self.added.wait_until(&mut segments, deadline).timed_out() {
                return Err(StoreError::protocol(format!(
                    "segment {segment} was granted without a descriptor"
                )));
            }
        }
    }

    /// Lets go of a segment that the node has retired, as soon as nobody writes into it.
    pub(crate) fn release(&self, segment: SegmentId) {
        self.segments.lock().remove(&segment);
    }

    /// The node knows that the segment is mapped.
    pub(crate) fn told(&self, segment: SegmentId) {
        if let Some(Grant::Mapped { told, .. }) = self.segments.lock().get_mut(&segment) {
            *told = true;
        }
    }
}
