//! The promise that the node's memory makes to fabrics. This file holds unsafe code: it vouches for mappings that
//! `hetmem_host_mem` owns, and for the words that `words` reads. Not the mappings. Invariant: a region keeps its memory
//! alive.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use hetmem_host_mem::{IndexMemory, Segment};
use hetmem_transport::RegionMemory;

pub(crate) struct SegmentRegion(pub(crate) Arc<Segment>);

// SAFETY: a `Segment` is mapped readable and writable at one address and length from its creation until it is
// dropped, which the `Arc` delays until this region is dropped; it hands out no references into its bytes.
unsafe impl RegionMemory for SegmentRegion {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }

    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }
}

/// The generation words of the index: all of it that peers may read.
pub(crate) struct GenerationsRegion(pub(crate) Arc<IndexMemory>);

// SAFETY: `generations` lies inside the index, which is mapped readable and writable at one address and length until
// the `IndexMemory` is dropped, which the `Arc` delays until this region is dropped; it is only accessed through
// atomics, and it is registered for remote reads alone, so no fabric writes to it.
unsafe impl RegionMemory for GenerationsRegion {
    fn base(&self) -> *mut u8 {
        let (offset, _) = self.0.generations();
        self.0.base().wrapping_add(usize::try_from(offset).unwrap_or_default())
    }

    fn len_bytes(&self) -> u64 {
        self.0.generations().1
    }
}

/// Where generation words of peers land.
pub(crate) struct WordsRegion(pub(crate) Box<[AtomicU64]>);

// SAFETY: the boxed slice is neither moved nor freed nor resized before the region is dropped. All other access to
// it is by atomic loads, which stay sound whatever is written from elsewhere; no reference to its bytes is made.
unsafe impl RegionMemory for WordsRegion {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr().cast::<u8>().cast_mut()
    }

    fn len_bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }
}
