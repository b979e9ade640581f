//! The devices that connections go through, each with a completion queue for every lane (`shared`), one pool of receive
//! buffers, and the segments as registered with it. Not which of them a link uses: its route says that. Invariant: every
//! segment is registered with every adapter, or with none if one refuses.

use std::collections::BTreeMap;
use std::sync::Arc;

use hetmem_core::{RemoteKey, SegmentId, StoreError};

use super::abi;
use super::ladder::{Way, climb};
use super::plugin::{Device, Pool, Queue, Refusal, Registered, device_name};
use super::proof::{MemoryKind, Proof};
use super::slots::Slots;
use super::wire::{CHUNKS_MAX, Described, RemoteChunk};
use crate::fabric::Access;
use crate::memory::RegionMemory;

/// Bytes of a receive buffer, and so the most that one send carries.
pub(super) const BUFFER_LEN: usize = 16 << 10;
/// Receive buffers of an adapter, and as many for frames that go out.
const BUFFERS: u32 = 512;
/// Receive buffers that one link's messages may fill on iWARP, which ends a connection for one too few; on InfiniBand and
/// RoCE whoever sends waits. Four are for empty messages: two that say that buffers are lent again, and the first one of
/// each connection.
const BUFFERS_OF_LINK: u32 = 16;
/// Frames' parts that may be on the way to a peer there, and after how many the peer says that buffers are lent again.
pub(super) const PARTS_MAX: u32 = BUFFERS_OF_LINK - 4;
pub(super) const PARTS_LENT: u32 = PARTS_MAX / 2;
/// Words that are being read.
const WORDS: u32 = 1024;
/// Entries of a completion queue.
const COMPLETIONS: u32 = 32 << 10;

/// A segment that is registered with the fabric.
pub(super) struct Segment {
    pub(super) key: RemoteKey,
    pub(super) memory: Arc<dyn RegionMemory>,
    pub(super) access: Access,
}

/// A segment as registered with one adapter.
struct Held {
    memory: Arc<dyn RegionMemory>,
    way: Way,
    chunks: Vec<Chunk>,
}

/// The completions of one lane's connections, with the channel that tells of them.
pub(super) struct Watched {
    pub(super) queue: Arc<Queue>,
    /// What completes next wakes a thread, if nothing was taken from the queue since this was set.
    pub(super) armed: bool,
}

/// A part of a segment, as registered with one adapter.
struct Chunk {
    start: u64,
    len_bytes: u64,
    registered: Registered,
}

pub(super) struct Adapter {
    segments: BTreeMap<SegmentId, Held>,
    /// Whether peers are to ask for pushes rather than read, whatever was proven.
    push: bool,
    proofs: Vec<Proof>,
    pub(super) receives: Arc<Slots>,
    pub(super) frames: Slots,
    pub(super) words: Slots,
    pub(super) pool: Arc<Pool>,
    /// One for each lane.
    pub(super) queues: Vec<Watched>,
    pub(super) limits: abi::DeviceLimits,
    /// Of the send that is being put together; kept, so that nothing is allocated for it.
    pub(super) pieces: Vec<abi::Piece>,
    pub(super) device: Arc<Device>,
}

impl Adapter {
    /// Opens what is needed of a device, registers all segments with it and posts its receive buffers.
    pub(super) fn open(
        device: Arc<Device>,
        segments: &BTreeMap<SegmentId, Segment>,
        lanes: usize,
        (push, proofs): (bool, Vec<Proof>),
    ) -> Result<Self, StoreError> {
        let limits = device.limits()?;
        let wanted = if limits.transport == abi::TRANSPORT_IWARP { 2 * BUFFERS } else { BUFFERS };
        let buffers = wanted.min(limits.buffers_max.max(1));
        let queue = || {
            let queue = device.queue(COMPLETIONS.min(limits.completions_max.max(1)))?;
            queue.arm()?;
            Ok::<_, StoreError>(Watched { queue, armed: true })
        };
        let queues = (0..lanes).map(|_| queue()).collect::<Result<_, _>>()?;
        let pool = device.pool(buffers)?;
        let mut adapter = Self {
            segments: BTreeMap::new(),
            push,
            proofs,
            receives: Arc::new(Slots::open(&device, buffers, BUFFER_LEN)?),
            frames: Slots::open(&device, BUFFERS, BUFFER_LEN)?,
            words: Slots::open(&device, WORDS, 8)?,
            pool,
            queues,
            limits,
            pieces: Vec::new(),
            device,
        };
        adapter.by_push(MemoryKind::Host)?;
        for (&number, segment) in segments {
            adapter.register(number, segment)?;
        }
        for slot in 0..buffers {
            adapter.post_receive(slot)?;
        }
        Ok(adapter)
    }

    pub(super) fn is_iwarp(&self) -> bool {
        self.limits.transport == abi::TRANSPORT_IWARP
    }

    /// The most links that may go through it.
    pub(super) fn links_max(&self) -> usize {
        if self.is_iwarp() { self.receives.count() / BUFFERS_OF_LINK as usize } else { usize::MAX }
    }

    pub(super) fn name(&self) -> String {
        device_name(&self.limits)
    }

    /// Whether peers are to ask for such memory to be written rather than read it.
    ///
    /// # Errors
    /// `Unavailable` if neither can be.
    fn by_push(&self, kind: MemoryKind) -> Result<bool, StoreError> {
        let proof = self.proofs.iter().find(|proof| proof.kind == kind);
        let by_push = self.push || proof.map_or(Ok(false), Proof::by_push)?;
        if by_push && self.limits.transport == abi::TRANSPORT_IWARP {
            let why = "it is iWARP, which has no Write with immediate";
            return Err(StoreError::unavailable(format!("push over {}", self.name()), why));
        }
        Ok(by_push)
    }

    /// Whether it was seen to put peers' bytes into memory of the device with this number.
    pub(super) fn reads_into(&self, device: u16) -> bool {
        let proof = self.proofs.iter().find(|proof| proof.kind == MemoryKind::Device(device));
        proof.is_some_and(Proof::is_target)
    }

    /// Lends a slot to the adapter, to be received into.
    pub(super) fn post_receive(&self, slot: u32) -> Result<(), StoreError> {
        self.pool.post(receive_id(slot), &self.receives.piece(slot, 0, BUFFER_LEN))
    }

    /// Registers a segment, in chunks that the device can have; nothing of it if one of them fails.
    pub(super) fn register(&mut self, number: SegmentId, segment: &Segment) -> Result<(), StoreError> {
        self.by_push(MemoryKind::of(&*segment.memory))?;
        let len = segment.memory.len_bytes();
        let most = self.limits.region_bytes_max.max(1);
        if len.div_ceil(most) > CHUNKS_MAX as u64 {
            let why = format!("{len} bytes; {} registers {CHUNKS_MAX} times {most} at most", self.name());
            return Err(StoreError::invalid("segment", why));
        }
        let mut access = abi::ACCESS_LOCAL_WRITE;
        if segment.access == Access::RemoteRead {
            access |= abi::ACCESS_REMOTE_READ;
        }
        if self.is_iwarp() {
            access |= abi::ACCESS_REMOTE_WRITE;
        }
        let register = |way| {
            let (mut chunks, mut start) = (Vec::new(), 0);
            while start < len {
                let len_bytes = most.min(len - start);
                let registered = self.device.register(&segment.memory, (start, len_bytes), way, access)?;
                chunks.push(Chunk { start, len_bytes, registered });
                start += len_bytes;
            }
            Ok(chunks)
        };
        let (chunks, way) = match segment.memory.device() {
            None => (register(Way::Host).map_err(|refusal: Refusal| refusal.why)?, Way::Host),
            Some(device) => {
                let (chunks, way) = climb(&device, register)?;
                tracing::info!(segment = %number, device = self.name(), ?way, "memory of a device is registered");
                (chunks, way)
            }
        };
        self.segments.insert(number, Held { memory: Arc::clone(&segment.memory), way, chunks });
        Ok(())
    }

    /// Deregisters a segment: the adapter does not touch it any more.
    pub(super) fn deregister(&mut self, number: SegmentId) {
        self.segments.remove(&number);
    }

    /// What peers are told of a segment.
    pub(super) fn describe(&self, number: SegmentId, segment: &Segment) -> Described {
        if segment.access != Access::RemoteRead {
            return Described::Local { segment: number.0 };
        }
        let base = segment.memory.base() as u64;
        let chunks = self.segments.get(&number).into_iter().flat_map(|held| &held.chunks);
        let chunk = |chunk: &Chunk| RemoteChunk {
            address: base + chunk.start,
            len_bytes: chunk.len_bytes,
            key: chunk.registered.keys().remote,
        };
        let by_push = self.by_push(MemoryKind::of(&*segment.memory)).unwrap_or(false);
        Described::Readable { segment: number.0, chunks: chunks.map(chunk).collect(), by_push }
    }

    /// Opens a part of a segment to the writes of peers that are told its key: a registration of its own, which closes it
    /// again when it is dropped. Where it starts, for peers.
    pub(super) fn open_to_writes(
        &self,
        number: SegmentId,
        offset: u64,
        len_bytes: u64,
    ) -> Result<(u64, Registered), StoreError> {
        let gone = || StoreError::stale("read", "target", format!("segment {number} was deregistered"));
        let held = self.segments.get(&number).ok_or_else(gone)?;
        let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_WRITE;
        let registered = self.device.register(&held.memory, (offset, len_bytes), held.way, access)?;
        Ok((held.memory.base() as u64 + offset, registered))
    }

    /// The stretch of a segment that starts at `offset` and is in one chunk, at most `len` bytes of it; none if the segment
    /// is not registered any more.
    pub(super) fn stretch(&self, number: SegmentId, base: u64, offset: u64, len: u64) -> Option<abi::Piece> {
        let held = self.segments.get(&number)?;
        let chunk = held.chunks.iter().find(|chunk| offset < chunk.start + chunk.len_bytes)?;
        let len = len.min(chunk.start + chunk.len_bytes - offset).min(1 << 30);
        Some(abi::Piece {
            address: base + offset,
            len_bytes: u32::try_from(len).ok()?,
            key: chunk.registered.keys().local,
        })
    }
}

/// Tells receives from work in completions.
const RECEIVE: u64 = 1 << 63;

fn receive_id(slot: u32) -> u64 {
    RECEIVE | u64::from(slot)
}

/// The slot of a completion's number, if it is of a receive.
pub(super) fn receive_slot(id: u64) -> Option<u32> {
    u32::try_from(id & !RECEIVE).ok().filter(|_| id & RECEIVE != 0)
}
