//! A piece of GPU memory with which RDMA devices are tried at start. Not how they are tried (`hetmem_transport`).
//! Invariant: bytes that were filled in are there when `fill` returns, and `look` sees what an adapter has written.

use std::sync::Arc;

use hetmem_core::StoreError;
use hetmem_gpu_mem::{Device, HostMemory, Memory, PinnedBuffer, Segment, Span, Stream};
use hetmem_transport::{RegionMemory, Scratch};

use crate::memory::GpuRegion;

/// Bytes of it that are used; it is as long as the driver's granularity.
const LEN_BYTES: u64 = 64 << 10;

pub(crate) struct GpuScratch {
    region: Arc<dyn RegionMemory>,
    segment: Arc<Segment>,
    stage: Arc<PinnedBuffer>,
    stream: Stream,
}

impl GpuScratch {
    pub(crate) fn new(device: &Device) -> Result<Self, StoreError> {
        let segment = Arc::new(device.create_segment(LEN_BYTES)?);
        Ok(Self {
            region: Arc::new(GpuRegion { registered: segment.register()?, staging: None }),
            segment,
            stage: Arc::new(PinnedBuffer::new(device, LEN_BYTES)?),
            stream: device.stream()?,
        })
    }

    fn spans(&self, offset: usize, len: usize) -> Result<(Span, Span), StoreError> {
        let (offset, len) = (offset as u64, len as u64);
        let stage = Memory::Host(Arc::clone(&self.stage) as Arc<dyn HostMemory>);
        let device = Memory::Device(Arc::clone(&self.segment));
        Ok((Span::new(stage, offset, len)?, Span::new(device, offset, len)?))
    }
}

impl Scratch for GpuScratch {
    fn memory(&self) -> Arc<dyn RegionMemory> {
        Arc::clone(&self.region)
    }

    fn fill(&self, offset: usize, bytes: &[u8]) -> Result<(), StoreError> {
        self.stage.write(offset as u64, bytes)?;
        let (stage, device) = self.spans(offset, bytes.len())?;
        self.stream.copy(&stage, &device)?;
        self.stream.synchronize()
    }

    fn look(&self, offset: usize, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        // Where the driver can flush what adapters wrote, it is asked to; where it cannot, the copy is what orders it.
        let _ = self.segment.device().flush_writes();
        let (stage, device) = self.spans(offset, len_bytes)?;
        self.stream.copy(&device, &stage)?;
        self.stream.synchronize()?;
        let mut bytes = vec![0; len_bytes];
        self.stage.read(offset as u64, &mut bytes)?;
        Ok(bytes)
    }
}
