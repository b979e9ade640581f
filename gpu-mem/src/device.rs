//! One device, opened: its memory, its segments, its streams. Not the list of devices (`gpus`). Invariant: the
//! device's primary context is retained while a `Device` of it lives.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;

use hetmem_core::StoreError;

use crate::capacity::{self, Bar1, CapacityFacts};
use crate::context::Context;
use crate::imported::Imported;
use crate::physical::{AccessRights, granularity_bytes};
use crate::segment::{Segment, check_abilities};
use crate::stream::Stream;
use crate::{GpuDevice, Gpus, NvmlDevice};

/// A device whose primary context is retained. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    gpus: Gpus,
    context: Arc<Context>,
    info: Arc<GpuDevice>,
}

/// Memory of a device, as the driver counts it now, for all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that can be allocated, not necessarily in one piece.
    pub free_bytes: u64,
    /// Bytes of the device.
    pub total_bytes: u64,
}

impl Device {
    pub(crate) fn new(gpus: Gpus, context: Arc<Context>, info: GpuDevice) -> Self {
        Self { gpus, context, info: Arc::new(info) }
    }

    /// The driver's number of the device in this process.
    #[must_use]
    pub fn ordinal(&self) -> u16 {
        self.info.ordinal
    }

    /// What the probe found.
    #[must_use]
    pub fn info(&self) -> &GpuDevice {
        &self.info
    }

    /// The GPUs that it is one of.
    #[must_use]
    pub fn gpus(&self) -> &Gpus {
        &self.gpus
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Free and total bytes, now.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver cannot tell.
    pub fn memory(&self) -> Result<MemoryInfo, StoreError> {
        let (free_bytes, total_bytes) =
            self.context.memory_bytes().map_err(|failed| failed.error("ask for free GPU memory"))?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    /// The unit in which segments are made, in bytes (2 MiB on most devices).
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] if the device cannot have segments.
    pub fn granularity_bytes(&self) -> Result<u64, StoreError> {
        check_abilities(&self.info)?;
        let rdma = self.info.attributes.gpudirect_rdma_with_virtual_memory;
        let granularity = granularity_bytes(&self.context, rdma);
        granularity.map(|bytes| bytes as u64).map_err(|failed| failed.error("ask for GPU granularity"))
    }

    /// How many bytes of segments `auto` means on this device, now: what is free, less a reserve for others, and where
    /// NICs reach only a part of the memory at a time (BAR1), no more than that. A multiple of the granularity; 0: no
    /// tier.
    ///
    /// # Errors
    /// As [`Device::memory`] and [`Device::granularity_bytes`].
    pub fn capacity_auto_bytes(&self) -> Result<u64, StoreError> {
        let memory = self.memory()?;
        let bar1 = self.nvml().and_then(|nvml| {
            Some(Bar1 { total_bytes: nvml.bar1_bytes?, used_bytes: nvml.bar1_used_bytes.unwrap_or(0) })
        });
        Ok(capacity::auto_bytes(CapacityFacts {
            free_bytes: memory.free_bytes,
            total_bytes: memory.total_bytes,
            // Without GPUDirect RDMA no NIC needs the BAR.
            bar1: bar1.filter(|_| self.info.attributes.gpudirect_rdma),
            granularity_bytes: self.granularity_bytes()?,
        }))
    }

    /// What NVML said of this device when the GPUs were opened.
    #[must_use]
    pub fn nvml(&self) -> Option<&NvmlDevice> {
        let nvml = self.gpus.probe().nvml.as_ref().ok()?;
        nvml.devices.iter().find(|device| device.uuid == self.info.uuid)
    }

    /// Allocates a segment of at least `len_bytes` bytes (rounded up to the granularity), maps it for this device and
    /// every peer, and makes a descriptor for other processes. Its bytes are undefined.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::NoSpace`] if the device lacks memory, [`hetmem_core::ErrorKind::Unavailable`] if it
    /// cannot have segments, [`hetmem_core::ErrorKind::Invalid`] for a length of 0, [`hetmem_core::ErrorKind::Os`]
    /// for what else the driver refuses. Nothing is left behind.
    pub fn create_segment(&self, len_bytes: u64) -> Result<Segment, StoreError> {
        Segment::create(self, len_bytes)
    }

    /// Maps another process's segment, of which `fd` is the descriptor and `len_bytes` the whole length. The descriptor
    /// may be closed afterwards.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if it is no such descriptor or of another length,
    /// [`hetmem_core::ErrorKind::Unavailable`] if the device cannot have segments. Nothing is left behind.
    pub fn import_segment(
        &self,
        fd: impl AsFd,
        len_bytes: u64,
        wanted: AccessRights,
    ) -> Result<Imported, StoreError> {
        Imported::import(self, fd.as_fd(), len_bytes, wanted)
    }

    /// A new stream, which does not wait for the null stream.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver has none.
    pub fn stream(&self) -> Result<Stream, StoreError> {
        Stream::new(self)
    }

    /// Makes what NICs have written into this device's memory so far visible to the work of every device; blocks until
    /// it is. Whether it is needed: [`crate::flush::decide`].
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] if the driver cannot, with the reason.
    pub fn flush_writes(&self) -> Result<(), StoreError> {
        self.context.flush_writes().map_err(|failed| {
            if failed.is_sticky() {
                failed.error("flush remote writes")
            } else {
                self.context.flush_absence(&failed).into()
            }
        })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("ordinal", &self.info.ordinal).finish_non_exhaustive()
    }
}
