//! Host memory of a test: a piece of heap that nobody has pinned. Not a test. Invariant: its bytes are only moved through
//! raw pointers.
//!
//! unsafe: the promise of `HostMemory`, and copies in and out.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_gpu_mem::HostMemory;

/// A piece of heap, on pages of its own.
pub(crate) struct Heap {
    base: *mut u8,
    layout: Layout,
    writable: bool,
    /// Set when it is freed.
    gone: Arc<AtomicBool>,
}

// SAFETY: the allocation belongs to this value, and all access goes through raw pointers.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

// SAFETY: neither moved nor freed before drop, and no reference into it is ever made.
unsafe impl HostMemory for Heap {
    fn base(&self) -> *mut u8 {
        self.base
    }

    fn len_bytes(&self) -> u64 {
        self.layout.size() as u64
    }

    fn is_writable(&self) -> bool {
        self.writable
    }
}

impl Heap {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let layout = Layout::from_size_align(bytes.len(), 4096).expect("a size");
        // SAFETY: tests ask for at least one byte, and as many are copied as there are.
        let base = unsafe { alloc_zeroed(layout) };
        assert!(!base.is_null());
        // SAFETY: as above.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(base, bytes.len()) };
        Self { base, layout, writable: true, gone: Arc::default() }
    }

    pub(crate) fn read_only(bytes: &[u8]) -> Self {
        let mut heap = Self::new(bytes);
        heap.writable = false;
        heap
    }

    /// Set when it is freed.
    pub(crate) fn gone(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.gone)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.size()];
        // SAFETY: as many bytes as the allocation has.
        unsafe { self.base.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Release);
        // SAFETY: allocated with this layout in `new`, freed once.
        unsafe { dealloc(self.base, self.layout) };
    }
}
