//! Host memory for copies to and from GPUs: the promise that others make about theirs, its registration with the
//! driver, and pinned memory of the store's own. Not the copies (`stream`). Invariant: memory is unregistered before
//! it goes, and stays registered while a copy that found it so is under way.
//!
//! unsafe: the promise about others' memory, the driver's functions for host memory, and copies in and out of pinned
//! memory, which devices write at any time.
#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use hetmem_core::StoreError;

use crate::Gpus;
use crate::context::Context;
use crate::device::Device;
use crate::pinned::{Hold, PinnedRanges};

/// `CU_MEMHOSTREGISTER_PORTABLE` and `CU_MEMHOSTALLOC_PORTABLE`: pinned for every device, not only the current one.
const PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_DEVICEMAP` and `CU_MEMHOSTALLOC_DEVICEMAP`: kernels reach it.
const DEVICE_MAP: c_uint = 2;
/// `CU_MEMHOSTREGISTER_READ_ONLY`.
const READ_ONLY: c_uint = 8;

/// Host memory that GPUs may copy from and to.
///
/// # Safety
/// The implementor guarantees that `base()..base() + len_bytes()` stays mapped and readable, and writable where
/// `is_writable` says so, at the same address and of the same length, until the value is dropped, and that writing
/// any byte of it at any time breaks no Rust reference. Other processes may write it too.
pub unsafe trait HostMemory: Send + Sync {
    /// The first byte.
    fn base(&self) -> *mut u8;

    /// How many bytes follow `base`.
    fn len_bytes(&self) -> u64;

    /// Whether this process may write it; copies into it are refused otherwise.
    fn is_writable(&self) -> bool {
        true
    }
}

/// Host memory that is registered with the driver, so that copies of it run at the speed of the link. Dropped, it is
/// unregistered, after the copies that were under way.
pub struct HostRegistration {
    registered: Arc<Registered>,
}

/// Held by the registration and by every copy that relies on it.
struct Registered {
    ranges: Arc<PinnedRanges>,
    context: Arc<Context>,
    memory: Arc<dyn HostMemory>,
}

impl Gpus {
    /// Registers host memory for copies by every device. Needs a context: that of a device in use, else of the first.
    ///
    /// `read_only` memory is registered as such where the driver can; it needs that for memory which this process may
    /// not write.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver refuses, with the remedy: a limit on locked memory, bytes that are
    /// registered already. Copies of such memory still work, more slowly.
    pub fn register_host(
        &self,
        memory: Arc<dyn HostMemory>,
        read_only: bool,
    ) -> Result<HostRegistration, StoreError> {
        const OPERATION: &str = "register host memory with the GPU driver";
        let len_bytes = memory.len_bytes();
        let len = usize::try_from(len_bytes).ok().filter(|len| *len > 0);
        let len = len.ok_or_else(|| {
            StoreError::invalid("host memory", format!("{len_bytes} bytes cannot be registered"))
        })?;
        let context = self.any_context()?;
        let can_read_only =
            self.probe().devices.iter().all(|device| device.attributes.read_only_host_register);
        let read_only = read_only && can_read_only;
        let flags = PORTABLE | DEVICE_MAP | if read_only { READ_ONLY } else { 0 };
        let base = memory.base();
        let entered = context.enter().map_err(|failed| failed.error(OPERATION))?;
        // SAFETY: `memory` promises these bytes until it is dropped, and `Registered` unregisters them before.
        let code = unsafe { (entered.calls().host_register)(base.cast::<c_void>(), len, flags) };
        entered
            .calls()
            .check("cuMemHostRegister_v2", code)
            .map_err(|failed| failed.error_of_host_memory(OPERATION, len_bytes))?;
        drop(entered);
        let registered = Arc::new(Registered { ranges: Arc::clone(self.pinned()), context, memory });
        let hold: Hold = Arc::clone(&registered) as Hold;
        self.pinned().insert(base.addr(), len, read_only, &hold);
        Ok(HostRegistration { registered })
    }
}

impl HostRegistration {
    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.registered.memory.len_bytes()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let base = self.memory.base();
        self.ranges.remove(base.addr());
        let Ok(entered) = self.context.enter() else {
            return;
        };
        // SAFETY: registered by `register_host` at this address; no copy that relies on it is under way, since each
        // holds `self`. The memory itself goes after this.
        let _ = unsafe { (entered.calls().host_unregister)(base.cast()) };
    }
}

/// Pinned host memory of the store's own, zeroed: the ring through which bytes of a GPU are staged for TCP.
pub struct PinnedBuffer {
    base: NonNull<u8>,
    len: usize,
    /// Held by copies too; the memory is freed with the last of them.
    pinned: Arc<Pinned>,
}

/// The allocation, held by the buffer and by every copy that relies on it.
struct Pinned {
    ranges: Arc<PinnedRanges>,
    context: Arc<Context>,
    address: usize,
    base: SendPointer,
}

/// An address that belongs to the process, not to a thread.
struct SendPointer(*mut c_void);

// SAFETY: the allocation belongs to the process until `Pinned` is dropped; it is only accessed through raw pointers.
unsafe impl Send for SendPointer {}
// SAFETY: as above; concurrent copies may tear, as they may in memory that devices write.
unsafe impl Sync for SendPointer {}
// SAFETY: as for `SendPointer`.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as for `SendPointer`.
unsafe impl Sync for PinnedBuffer {}

// SAFETY: the allocation is neither moved nor freed before drop, and no reference into it is ever made.
unsafe impl HostMemory for PinnedBuffer {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn len_bytes(&self) -> u64 {
        self.len as u64
    }
}

impl PinnedBuffer {
    /// `len_bytes` zeroed bytes, pinned for every device; `device` is the one whose context is used.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver has none, with the remedy.
    pub fn new(device: &Device, len_bytes: u64) -> Result<Self, StoreError> {
        const OPERATION: &str = "allocate pinned host memory";
        let len = usize::try_from(len_bytes).ok().filter(|len| *len > 0);
        let len = len.ok_or_else(|| {
            StoreError::invalid("pinned buffer", format!("{len_bytes} bytes cannot be had"))
        })?;
        let context = device.context();
        let mut base: *mut c_void = ptr::null_mut();
        let entered = context.enter().map_err(|failed| failed.error(OPERATION))?;
        // SAFETY: a writable pointer; the flags exist.
        let code = unsafe { (entered.calls().host_alloc)(&raw mut base, len, PORTABLE | DEVICE_MAP) };
        entered
            .calls()
            .check("cuMemHostAlloc", code)
            .map_err(|failed| failed.error_of_host_memory(OPERATION, len_bytes))?;
        drop(entered);
        let Some(first) = NonNull::new(base.cast::<u8>()) else {
            return Err(StoreError::os(OPERATION, "the driver gave address 0"));
        };
        // SAFETY: `len` bytes that were just allocated and that nobody else knows.
        unsafe { first.as_ptr().write_bytes(0, len) };
        let ranges = Arc::clone(device.gpus().pinned());
        let address = first.as_ptr().addr();
        let pinned =
            Arc::new(Pinned { ranges, context: Arc::clone(context), address, base: SendPointer(base) });
        let hold: Hold = Arc::clone(&pinned) as Hold;
        device.gpus().pinned().insert(address, len, false, &hold);
        Ok(Self { base: first, len, pinned })
    }

    /// Copies bytes in. A copy that runs at the same time may see some of them.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if they do not fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let at = self.place(offset, bytes.len())?;
        // SAFETY: just checked to be inside the allocation, which `self` holds; `bytes` cannot overlap it, since no
        // reference into it is ever made.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(at, bytes.len()) };
        Ok(())
    }

    /// Copies bytes out. A copy that runs at the same time may have changed some of them.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if they are not all inside.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        let at = self.place(offset, bytes.len())?;
        // SAFETY: as in `write`.
        unsafe { at.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn place(&self, offset: u64, len: usize) -> Result<*mut u8, StoreError> {
        let start = usize::try_from(offset).ok();
        match start.and_then(|start| Some((start, start.checked_add(len)?))) {
            Some((start, end)) if end <= self.len => Ok(self.base.as_ptr().wrapping_add(start)),
            _ => Err(StoreError::invalid(
                "range",
                format!("{len} bytes at {offset} are not inside a pinned buffer of {} bytes", self.len),
            )),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.ranges.remove(self.address);
        let Ok(entered) = self.context.enter() else {
            return;
        };
        // SAFETY: allocated by `PinnedBuffer::new`, freed once; the buffer and all copies that rely on it are gone.
        let _ = unsafe { (entered.calls().host_free)(self.base.0) };
    }
}

impl fmt::Debug for HostRegistration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostRegistration").field("len_bytes", &self.len_bytes()).finish_non_exhaustive()
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedBuffer")
            .field("len_bytes", &self.len)
            .field("copies", &(Arc::strong_count(&self.pinned) - 1))
            .finish_non_exhaustive()
    }
}
