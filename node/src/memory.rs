//! The promise that the node's memory makes to fabrics. This file holds unsafe code: it vouches for mappings that
//! `hetmem_host_mem` owns. Not the mappings. Invariant: a region keeps its memory
//! alive.
#![allow(unsafe_code)]

use std::sync::Arc;

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
