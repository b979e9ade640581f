//! Layouts and numbers of cuda.h (CUDA 12.8) that cross the C boundary. Not the codes (`code`). Invariant: every type
//! here is made of integers alone, so any bytes that C hands over are a value of it.

use std::ffi::{c_int, c_uchar, c_uint, c_ushort};
use std::fmt;
use std::ops::Range;

use crate::config;

// Device pointers are `unsigned long long`; here they are the size of an address as well.
const _: () = assert!(size_of::<usize>() == 8);

/// A device pointer. Its value is that of the real mapping with [`DevicePtr::TAG`] added; with
/// `HETMEM_STANDIN_PEER_MEMORY` that of the real mapping, which lies in [`DevicePtr::WINDOW`] then.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DevicePtr(pub(crate) usize);

impl DevicePtr {
    /// Above every address that a process of 64-bit Linux is given unless it asks for more, and not canonical: a
    /// processor that loads from such an address faults.
    pub(crate) const TAG: usize = 1 << 52;

    /// Addresses that a process of 64-bit Linux is not given unless it asks for them.
    pub(crate) const WINDOW: Range<usize> = 1 << 44..1 << 45;

    pub(crate) fn of_address(address: usize) -> Self {
        Self(if config::get().peer_memory { address } else { address + Self::TAG })
    }

    /// The address behind what is a device pointer, as whoever passes it says; none if it cannot be one.
    pub(crate) fn address(self) -> Option<usize> {
        if config::get().peer_memory {
            return Some(self.0);
        }
        self.0.checked_sub(Self::TAG).filter(|address| *address < Self::TAG)
    }

    /// Whether it is a device pointer and not a host one, where it may be either.
    pub(crate) fn is_of_device(self) -> bool {
        if config::get().peer_memory { Self::WINDOW.contains(&self.0) } else { self.address().is_some() }
    }
}

impl fmt::Debug for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A handle of an object of this library: a number with a tag of its kind, never the address of anything.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Handle(pub(crate) usize);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location {
    pub(crate) kind: c_int,
    pub(crate) id: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllocationFlags {
    pub(crate) compression: c_uchar,
    pub(crate) gpu_direct_rdma_capable: c_uchar,
    pub(crate) usage: c_ushort,
    pub(crate) reserved: [c_uchar; 4],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllocationProp {
    pub(crate) kind: c_int,
    pub(crate) requested_handle_types: c_int,
    pub(crate) location: Location,
    pub(crate) win32_metadata: usize,
    pub(crate) flags: AllocationFlags,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessDesc {
    pub(crate) location: Location,
    pub(crate) flags: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemcpyAttributes {
    pub(crate) source_order: c_int,
    pub(crate) source_hint: Location,
    pub(crate) target_hint: Location,
    pub(crate) flags: c_uint,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpcEventHandle {
    pub(crate) reserved: [u8; 64],
}

/// What the driver says that it supports: CUDA 13.0, whose PTX is what it takes. The functions that changed with it are
/// there under their older names, as in a driver.
pub(crate) const DRIVER_VERSION: c_int = 13_000;
pub(crate) const PTX_VERSION_MAX: (u32, u32) = (9, 0);

pub(crate) const ALLOCATION_PINNED: c_int = 1;
pub(crate) const HANDLE_NONE: c_int = 0;
pub(crate) const HANDLE_POSIX_FD: c_int = 1;
pub(crate) const LOCATION_DEVICE: c_int = 1;
pub(crate) const ACCESS_NONE: c_int = 0;
pub(crate) const ACCESS_READ: c_int = 1;
pub(crate) const ACCESS_READ_WRITE: c_int = 3;
pub(crate) const RANGE_DMA_BUF: c_int = 1;

pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
pub(crate) const EVENT_FLAGS: c_uint = 1 | 2 | 4;
pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
/// Portable, device-mapped, I/O memory, read-only.
pub(crate) const HOST_REGISTER_FLAGS: c_uint = 1 | 2 | 4 | 8;
pub(crate) const HOST_REGISTER_READ_ONLY: c_uint = 8;
/// Portable, device-mapped, write-combined.
pub(crate) const HOST_ALLOC_FLAGS: c_uint = 1 | 2 | 4;

pub(crate) const FLUSH_OPTION_HOST: c_int = 1;
pub(crate) const ORDERING_NONE: c_int = 0;
pub(crate) const ORDERING_OWNER: c_int = 100;
pub(crate) const ORDERING_ALL_DEVICES: c_int = 200;

pub(crate) const MEMORY_TYPE_HOST: c_uint = 1;
pub(crate) const MEMORY_TYPE_DEVICE: c_uint = 2;
