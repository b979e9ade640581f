//! A segment of GPU memory: one physical allocation, mapped once, exported to processes and to NICs. Not how it is cut
//! into extents, and not its end (`teardown`). Invariant: a segment is unmapped only when nobody holds it any more,
//! and whoever copies or has registered it with a NIC holds it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use hetmem_core::StoreError;

use crate::device::Device;
use crate::physical::{AccessRights, Physical, Range, granularity_bytes};
use crate::{GpuDevice, Unavailable};

const CREATE: &str = "create GPU segment";

/// A segment of a device's memory, made by this process.
pub struct Segment {
    dma_buf: OnceLock<Result<OwnedFd, Unavailable>>,
    descriptor: OwnedFd,
    // Unmapped before the allocation is released, and both before the context.
    range: Range,
    _physical: Physical,
    device: Device,
    len_bytes: u64,
    rdma: bool,
    peers: Vec<u16>,
    granting: AtomicBool,
    registrations: AtomicUsize,
}

/// A segment that a NIC has registered. Held for as long as the NIC can reach the memory.
pub struct Registered {
    segment: Arc<Segment>,
}

impl Segment {
    /// See [`Device::create_segment`].
    pub(crate) fn create(device: &Device, len_bytes: u64) -> Result<Self, StoreError> {
        check_abilities(device.info())?;
        let rdma = device.info().attributes.gpudirect_rdma_with_virtual_memory;
        let context = device.context();
        let granularity = granularity_bytes(context, rdma).map_err(|failed| failed.error(CREATE))?;
        let rounded = usize::try_from(len_bytes)
            .ok()
            .filter(|len| *len > 0)
            .and_then(|len| len.checked_next_multiple_of(granularity))
            .ok_or_else(|| StoreError::invalid("segment", format!("{len_bytes} bytes cannot be had")))?;
        let physical = Physical::create(context, rounded, rdma).map_err(|failed| {
            let free = device.memory().map_or(0, |memory| memory.free_bytes);
            failed.error_in_tier(CREATE, device.ordinal(), rounded as u64, free)
        })?;
        let range = physical.map().map_err(|failed| failed.error(CREATE))?;
        let peers = give_access(device, &range)?;
        let descriptor = physical.export().map_err(|failed| failed.error(CREATE))?;
        Ok(Self {
            dma_buf: OnceLock::new(),
            descriptor,
            range,
            _physical: physical,
            device: device.clone(),
            len_bytes: rounded as u64,
            rdma,
            peers,
            granting: AtomicBool::new(true),
            registrations: AtomicUsize::new(0),
        })
    }

    /// Its length in bytes: what was asked for, rounded up to the device's granularity.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The device whose memory it is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The ordinals of the other devices that read and write it directly.
    #[must_use]
    pub fn peers(&self) -> &[u16] {
        &self.peers
    }

    /// The address of its first byte on the device, in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.address()
    }

    /// What another process imports it by. Whoever has it can map the memory, and cannot be made to unmap it.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// A dma-buf of the whole segment, which a NIC registers, and where in it the segment starts, in bytes. Exported
    /// at the first call.
    ///
    /// # Errors
    /// Why this driver or device exports none, the same at every call.
    pub fn dma_buf(&self) -> Result<(BorrowedFd<'_>, u64), &Unavailable> {
        let exported = self.dma_buf.get_or_init(|| self.export_dma_buf());
        exported.as_ref().map(|fd| (fd.as_fd(), 0))
    }

    /// Whether NICs can be given this memory at all: by dma-buf, or by address where nvidia-peermem is loaded.
    #[must_use]
    pub fn is_rdma_capable(&self) -> bool {
        self.rdma
    }

    fn export_dma_buf(&self) -> Result<OwnedFd, Unavailable> {
        const REMEDY: &str = "the open flavour of the NVIDIA kernel module and Linux 5.12 or newer export dma-buf; \
                              else load nvidia-peermem";
        let absent = |why: String| Unavailable { what: "dma-buf".into(), why, remedy: REMEDY.into() };
        let name = format!("gpu:{}", self.device.ordinal());
        if !self.device.info().attributes.dma_buf {
            return Err(absent(format!("the driver exports none for {name}")));
        }
        if !self.rdma {
            return Err(absent(format!("{name} has no GPUDirect RDMA for virtual memory")));
        }
        self.range.dma_buf().map_err(|failed| absent(failed.reason()))
    }

    /// Registers it with a NIC, as far as this crate is concerned: the NIC's registration holds the result and is
    /// ended before it is dropped.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Stale`] if the segment is being torn down.
    pub fn register(self: &Arc<Self>) -> Result<Registered, StoreError> {
        self.check_granting("register with a NIC")?;
        self.registrations.fetch_add(1, Ordering::AcqRel);
        Ok(Registered { segment: Arc::clone(self) })
    }

    pub(crate) fn check_granting(&self, operation: &'static str) -> Result<(), StoreError> {
        if self.granting.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(StoreError::stale(
            operation,
            format!("segment of gpu:{}", self.device.ordinal()),
            "it is being torn down",
        ))
    }

    pub(crate) fn close_grants(&self) {
        self.granting.store(false, Ordering::Release);
    }

    /// How many NIC registrations hold it.
    pub(crate) fn registrations(&self) -> usize {
        self.registrations.load(Ordering::Acquire)
    }
}

/// Own device and every peer that can; only the own one where the driver refuses the peers.
fn give_access(device: &Device, range: &Range) -> Result<Vec<u16>, StoreError> {
    let own = device.ordinal();
    let devices = &device.gpus().probe().devices;
    let peers: Vec<u16> =
        devices.iter().filter(|other| other.peers.contains(&own)).map(|other| other.ordinal).collect();
    let numbers: Vec<i32> = std::iter::once(own).chain(peers.iter().copied()).map(i32::from).collect();
    match range.set_access(&numbers, AccessRights::ReadWrite) {
        Ok(()) => Ok(peers),
        Err(_) if !peers.is_empty() => {
            let alone = range.set_access(&[i32::from(own)], AccessRights::ReadWrite);
            alone.map(|()| Vec::new()).map_err(|failed| failed.error(CREATE))
        }
        Err(failed) => Err(failed.error(CREATE)),
    }
}

/// What a device needs for segments.
pub(crate) fn check_abilities(info: &GpuDevice) -> Result<(), StoreError> {
    let name = format!("gpu:{} as a tier", info.ordinal);
    if !info.attributes.virtual_memory {
        return Err(StoreError::unavailable(
            name,
            "the device has no virtual memory management (a virtual or MIG device may lack it: use the whole GPU)",
        ));
    }
    if !info.attributes.posix_descriptor_export {
        return Err(StoreError::unavailable(
            name,
            "the driver exports no memory as POSIX descriptors (needs Linux and a driver that is not a vGPU's)",
        ));
    }
    Ok(())
}

impl Registered {
    /// The segment.
    #[must_use]
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Before the reference goes, so that a registration is never taken for a copy that has ended.
        self.segment.registrations.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registered").field(&self.segment).finish()
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("device", &self.device.ordinal())
            .field("address", &format_args!("{:#x}", self.address()))
            .field("len_bytes", &self.len_bytes)
            .finish_non_exhaustive()
    }
}
