//! Memory that fabrics read and write: the promise that others make about theirs, and a plain piece of heap for
//! tests and simulations. Not registration (`region`). Invariant: bytes are only moved through raw pointers, since
//! other processes may write the same memory at any time.
//!
//! Holds unsafe code: the promise about others' memory, and copies in and out of it.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use hetmem_core::StoreError;

/// Memory that a fabric may read from and write to.
///
/// # Safety
/// The implementor guarantees that `base()..base() + len_bytes()` stays mapped, readable and writable, at the same
/// address and of the same length, from before it is registered until the value is dropped, and that writing any
/// byte of it at any time breaks no Rust reference. Other processes may write it too. Of memory of a device (`device()`)
/// that is said of adapters, and processors do not touch it.
pub unsafe trait RegionMemory: Send + Sync {
    /// The first byte; of memory of a device, its address there.
    fn base(&self) -> *mut u8;

    /// How many bytes follow `base`.
    fn len_bytes(&self) -> u64;

    /// What adapters are told of memory that is a device's; none: it is the host's, mapped here.
    fn device(&self) -> Option<DeviceMemory<'_>> {
        None
    }
}

/// Memory of a device, a GPU say, as a fabric may come by it.
#[derive(Clone, Copy)]
pub struct DeviceMemory<'a> {
    /// Which of the devices of this process it is, as its owner numbers them: what adapters can do is tried with each.
    pub number: u16,
    /// For adapters: its dma-buf, if its driver exports one, and where in that it starts, in bytes.
    pub dma_buf: Option<(BorrowedFd<'a>, u64)>,
    /// For fabrics whose bytes a processor moves: what copies it, if anything does.
    pub staging: Option<&'a dyn Staging>,
}

/// Makes rings of host memory through which bytes of one segment of a device pass.
pub trait Staging: Send + Sync {
    /// A ring of so many bytes.
    ///
    /// # Errors
    /// Those of the device's driver.
    fn ring(&self, len_bytes: usize) -> Result<Box<dyn Ring>, StoreError>;
}

/// Host memory of which the device copies to and from its segment. Dropped, it waits for its copies.
pub trait Ring: Send {
    /// The host memory; none if it was given up.
    fn memory(&self) -> Option<Arc<dyn RegionMemory>>;

    /// Begins a copy of `len_bytes` bytes between `at` in the ring and `offset` in the segment.
    ///
    /// # Errors
    /// Those of the device's driver; nothing was begun then.
    fn begin(
        &mut self,
        way: StagingWay,
        at: usize,
        offset: u64,
        len_bytes: usize,
    ) -> Result<Arc<dyn Copying>, StoreError>;
}

/// Which way a copy of a [`Ring`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StagingWay {
    /// From the ring to the device.
    In,
    /// From the device to the ring.
    Out,
}

/// A copy that a device makes.
pub trait Copying: Send + Sync {
    /// Whether it has ended.
    fn is_over(&self) -> bool;

    /// Waits until it has ended. Copies end by themselves: nobody has to help them.
    ///
    /// # Errors
    /// Why the bytes are not where they should be.
    fn wait(&self) -> Result<(), StoreError>;
}

impl fmt::Debug for DeviceMemory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("number", &self.number)
            .field("dma_buf", &self.dma_buf)
            .field("staging", &self.staging.is_some())
            .finish()
    }
}

const ALIGNMENT: usize = 4096;

/// A zeroed piece of heap, aligned to 4 KiB, for tests and simulations.
pub struct HeapRegion {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation belongs to this value alone, and all access goes through raw pointers, never references.
unsafe impl Send for HeapRegion {}
// SAFETY: as above; concurrent copies may tear, as they may in memory that is shared between processes.
unsafe impl Sync for HeapRegion {}

// SAFETY: the allocation is neither moved nor freed before drop, and no reference into it is ever made.
unsafe impl RegionMemory for HeapRegion {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn len_bytes(&self) -> u64 {
        self.layout.size() as u64
    }
}

impl HeapRegion {
    /// `len_bytes` zeroed bytes (at least one).
    ///
    /// # Panics
    /// If the length is no possible size of an allocation.
    #[must_use]
    pub fn new(len_bytes: usize) -> Self {
        let layout = match Layout::from_size_align(len_bytes.max(1), ALIGNMENT) {
            Ok(layout) => layout,
            Err(error) => panic!("a region of {len_bytes} bytes: {error}"),
        };
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        match NonNull::new(base) {
            Some(base) => Self { base, layout },
            None => handle_alloc_error(layout),
        }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.layout.size()));
        // SAFETY: just checked to be inside the allocation, which lives as long as `self`; `bytes` cannot overlap
        // it, since no reference into it is ever made.
        unsafe {
            bytes.as_ptr().copy_to_nonoverlapping(self.base.as_ptr().add(offset), bytes.len());
        };
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If they are not all inside.
    #[must_use]
    pub fn read(&self, offset: usize, len_bytes: usize) -> Vec<u8> {
        assert!(offset.checked_add(len_bytes).is_some_and(|end| end <= self.layout.size()));
        let mut bytes = vec![0; len_bytes];
        // SAFETY: just checked to be inside the allocation, which lives as long as `self`.
        unsafe {
            self.base.as_ptr().add(offset).copy_to_nonoverlapping(bytes.as_mut_ptr(), len_bytes);
        };
        bytes
    }
}

impl Drop for HeapRegion {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl fmt::Debug for HeapRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeapRegion").field("len_bytes", &self.layout.size()).finish_non_exhaustive()
    }
}
