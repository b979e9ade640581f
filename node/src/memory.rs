//! The promises that the node's memory makes to fabrics and to GPUs. This file holds unsafe code: it vouches for mappings
//! that `hetmem_host_mem` and `hetmem_gpu_mem` own. Not the mappings. Invariant: a region keeps its memory alive.
#![allow(unsafe_code)]

use std::sync::Arc;

use hetmem_gpu_mem::{HostMemory, PinnedBuffer, Registered};
use hetmem_host_mem::{IndexMemory, Segment};
use hetmem_transport::{DeviceMemory, RegionMemory, Staging};

use crate::staging::GpuStaging;

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

/// A segment that GPUs copy from and to.
pub(crate) struct CopiedSegment(pub(crate) Arc<Segment>);

// SAFETY: as for `SegmentRegion`: mapped until the `Arc` is dropped, and no reference into it is ever made.
unsafe impl HostMemory for CopiedSegment {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }

    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }
}

/// The same for who measures copies beside a node.
#[doc(hidden)]
#[must_use]
pub fn copied_memory(segment: Arc<Segment>) -> Arc<dyn HostMemory> {
    Arc::new(CopiedSegment(segment))
}

/// Host memory by which bytes of a GPU pass.
pub(crate) struct PinnedRegion(pub(crate) Arc<PinnedBuffer>);

// SAFETY: a pinned buffer is mapped readable and writable at one address and length until it is dropped, which the `Arc`
// delays until this region is dropped; it hands out no references into its bytes.
unsafe impl RegionMemory for PinnedRegion {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }

    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }
}

/// A segment of a GPU, for adapters, and for fabrics that its bytes reach by way of host memory.
pub(crate) struct GpuRegion {
    pub(crate) registered: Registered,
    pub(crate) staging: Option<GpuStaging>,
}

// SAFETY: a GPU segment keeps its address and length until it is dropped, which `Registered` delays until this region is
// dropped; it is memory of a device (`device()`), which no processor touches.
unsafe impl RegionMemory for GpuRegion {
    fn base(&self) -> *mut u8 {
        // An address of the device: adapters are told it, nobody follows it.
        let address = usize::try_from(self.registered.segment().address());
        std::ptr::without_provenance_mut(address.unwrap_or_default())
    }

    fn len_bytes(&self) -> u64 {
        self.registered.segment().len_bytes()
    }

    fn device(&self) -> Option<DeviceMemory<'_>> {
        let segment = self.registered.segment();
        Some(DeviceMemory {
            number: segment.device().ordinal(),
            dma_buf: segment.dma_buf().ok(),
            staging: self.staging.as_ref().map(|staging| staging as &dyn Staging),
        })
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
