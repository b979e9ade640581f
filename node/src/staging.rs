//! Rings of pinned host memory by which bytes of a GPU come and go over TCP. Not the sockets, nor when a copy begins
//! (`hetmem_transport`). Invariant: a ring's host memory is used by nobody else until its copies have ended, and a ring
//! alone keeps no segment from going.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use hetmem_core::StoreError;
use hetmem_gpu_mem::{Device, Event, HostMemory, Memory, PinnedBuffer, Segment, Span, Stream};
use hetmem_transport::{Copying, RegionMemory, Ring, Staging, StagingWay};

use crate::memory::PinnedRegion;

/// Bytes of a ring, unless more is asked for. Rings are kept, since pinning memory takes longer than what it is for.
const RING_BYTES: u64 = 2 << 20;
/// The most rings of one GPU that are kept while nobody uses them.
const IDLE_MAX: usize = 8;

/// The rings of one GPU that are not in use.
pub(crate) struct Rings {
    device: Device,
    idle: Mutex<Vec<Parts>>,
}

/// Host memory, and the stream on which it is copied.
struct Parts {
    memory: Arc<PinnedBuffer>,
    stream: Stream,
}

impl Rings {
    pub(crate) fn new(device: Device) -> Arc<Self> {
        Arc::new(Self { device, idle: Mutex::default() })
    }

    fn take(&self, len_bytes: u64) -> Result<Parts, StoreError> {
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(parts) = kept.filter(|parts| parts.memory.len_bytes() >= len_bytes) {
            return Ok(parts);
        }
        let memory = Arc::new(PinnedBuffer::new(&self.device, len_bytes.max(RING_BYTES))?);
        Ok(Parts { memory, stream: self.device.stream()? })
    }

    fn keep(&self, parts: Parts) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(parts);
        }
    }
}

/// How bytes of one segment come and go.
pub(crate) struct GpuStaging {
    segment: Weak<Segment>,
    rings: Arc<Rings>,
}

impl GpuStaging {
    pub(crate) fn new(segment: &Arc<Segment>, rings: Arc<Rings>) -> Self {
        Self { segment: Arc::downgrade(segment), rings }
    }
}

impl Staging for GpuStaging {
    fn ring(&self, len_bytes: usize) -> Result<Box<dyn Ring>, StoreError> {
        let parts = Some(self.rings.take(len_bytes as u64)?);
        Ok(Box::new(GpuRing { segment: Weak::clone(&self.segment), parts, rings: Arc::clone(&self.rings) }))
    }
}

struct GpuRing {
    segment: Weak<Segment>,
    /// There until it is dropped.
    parts: Option<Parts>,
    rings: Arc<Rings>,
}

impl Ring for GpuRing {
    fn memory(&self) -> Option<Arc<dyn RegionMemory>> {
        let memory = Arc::clone(&self.parts.as_ref()?.memory);
        Some(Arc::new(PinnedRegion(memory)))
    }

    fn begin(
        &mut self,
        way: StagingWay,
        at: usize,
        offset: u64,
        len_bytes: usize,
    ) -> Result<Arc<dyn Copying>, StoreError> {
        let gone = || StoreError::stale("copy", "a segment of a GPU", "it was retired");
        let (parts, segment) =
            (self.parts.as_ref().ok_or_else(gone)?, self.segment.upgrade().ok_or_else(gone)?);
        let (at, len_bytes) = (at as u64, len_bytes as u64);
        let host = Memory::Host(Arc::clone(&parts.memory) as Arc<dyn HostMemory>);
        let (host, device) =
            (Span::new(host, at, len_bytes)?, Span::new(Memory::Device(segment), offset, len_bytes)?);
        match way {
            StagingWay::In => parts.stream.copy(&host, &device)?,
            StagingWay::Out => parts.stream.copy(&device, &host)?,
        }
        Ok(Arc::new(Begun(parts.stream.record()?)))
    }
}

impl Drop for GpuRing {
    fn drop(&mut self) {
        let Some(parts) = self.parts.take() else { return };
        // One whose copies ended badly is given up: its stream waits for them when it goes.
        if parts.stream.synchronize().is_ok() {
            self.rings.keep(parts);
        }
    }
}

/// A copy, by the event behind it.
struct Begun(Event);

impl Copying for Begun {
    fn is_over(&self) -> bool {
        // A copy that failed is over.
        self.0.is_done().unwrap_or(true)
    }

    fn wait(&self) -> Result<(), StoreError> {
        self.0.synchronize()
    }
}
