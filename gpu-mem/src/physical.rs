//! Virtual memory management: physical allocations of a device, made or imported, and the ranges of addresses where
//! they are mapped. Not what is stored there (`segment`, `imported`). Invariant: a `Range` is unmapped before its
//! addresses are given back, an allocation is released once, and nothing that failed half-way leaks.
//!
//! unsafe: calls the driver's functions for memory.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::context::Context;
use crate::failure::{Failed, NOT_SUPPORTED};
use crate::table::{Address, Allocation};

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const POSIX_DESCRIPTOR: c_uint = 1;
/// `CU_MEM_ALLOC_GRANULARITY_RECOMMENDED`.
const RECOMMENDED: c_uint = 1;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
const DMA_BUF: c_uint = 1;

/// What a mapping may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessRights {
    /// Copies from it, and kernels that read it.
    ReadOnly,
    /// Everything.
    ReadWrite,
}

/// A physical allocation, held by one reference.
pub(crate) struct Physical {
    context: Arc<Context>,
    raw: Allocation,
    len: usize,
}

/// Addresses of this process; mapped to an allocation once `map` has succeeded.
pub(crate) struct Range {
    context: Arc<Context>,
    address: Address,
    len: usize,
    mapped: bool,
}

/// What is asked of an allocation of this device.
fn properties(device: c_int, rdma: bool) -> sys::CUmemAllocationProp {
    // SAFETY: a C structure of numbers and one pointer, for all of which zero is a value; the enumerations among them
    // have a variant of value 0.
    let mut properties: sys::CUmemAllocationProp = unsafe { zeroed() };
    properties.type_ = sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = sys::CUmemAllocationHandleType(POSIX_DESCRIPTOR);
    properties.location = location(device);
    properties.allocFlags.gpuDirectRDMACapable = u8::from(rdma);
    properties
}

fn location(device: c_int) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// The unit in which a device's memory is best allocated, in bytes.
pub(crate) fn granularity_bytes(context: &Context, rdma: bool) -> Result<usize, Failed> {
    let properties = properties(context.device(), rdma);
    let entered = context.enter()?;
    let mut granularity = 0_usize;
    // SAFETY: a writable size_t and a structure that the call only reads.
    let code =
        unsafe { (entered.calls().granularity)(&raw mut granularity, &raw const properties, RECOMMENDED) };
    entered.calls().check("cuMemGetAllocationGranularity", code)?;
    Ok(granularity.max(1))
}

impl Physical {
    /// Allocates `len` bytes, a multiple of the granularity, that can be exported as a descriptor; with `rdma` also
    /// to NICs.
    pub(crate) fn create(context: &Arc<Context>, len: usize, rdma: bool) -> Result<Self, Failed> {
        let properties = properties(context.device(), rdma);
        let entered = context.enter()?;
        let mut raw: Allocation = 0;
        // SAFETY: a writable handle and a structure that the call only reads; no flags exist.
        let code = unsafe { (entered.calls().create)(&raw mut raw, len, &raw const properties, 0) };
        entered.calls().check("cuMemCreate", code)?;
        Ok(Self { context: Arc::clone(context), raw, len })
    }

    /// Another process's allocation, from the descriptor that it was exported as. The descriptor stays the caller's.
    pub(crate) fn import(context: &Arc<Context>, fd: BorrowedFd<'_>, len: usize) -> Result<Self, Failed> {
        let entered = context.enter()?;
        let mut raw: Allocation = 0;
        let fd = ptr::without_provenance_mut::<c_void>(usize::try_from(fd.as_raw_fd()).unwrap_or(usize::MAX));
        // SAFETY: a writable handle; for this type the second argument is the number of a descriptor, which is open
        // for the length of the call.
        let code = unsafe { (entered.calls().import)(&raw mut raw, fd, POSIX_DESCRIPTOR) };
        entered.calls().check("cuMemImportFromShareableHandle", code)?;
        Ok(Self { context: Arc::clone(context), raw, len })
    }

    /// A descriptor that other processes can import.
    pub(crate) fn export(&self) -> Result<OwnedFd, Failed> {
        let entered = self.context.enter()?;
        let mut fd: c_int = -1;
        // SAFETY: for this type the first argument is a writable int; the allocation is held by `self`.
        let code = unsafe { (entered.calls().export)(&raw mut fd, self.raw, POSIX_DESCRIPTOR, 0) };
        entered.calls().check("cuMemExportToShareableHandle", code)?;
        own(fd, "cuMemExportToShareableHandle")
    }

    /// Maps the whole of it at fresh addresses, where nobody has access yet.
    pub(crate) fn map(&self) -> Result<Range, Failed> {
        let entered = self.context.enter()?;
        let calls = entered.calls();
        let mut address: Address = 0;
        // SAFETY: a writable address; the driver chooses it, with the alignment that it needs.
        let code = unsafe { (calls.address_reserve)(&raw mut address, self.len, 0, 0, 0) };
        calls.check("cuMemAddressReserve", code)?;
        let mut range = Range { context: Arc::clone(&self.context), address, len: self.len, mapped: false };
        // SAFETY: the whole of the reservation just made, which nothing is mapped to; the driver keeps the allocation
        // for as long as it is mapped.
        let code = unsafe { (calls.map)(address, self.len, 0, self.raw, 0) };
        calls.check("cuMemMap", code)?;
        range.mapped = true;
        Ok(range)
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let Ok(entered) = self.context.enter() else {
            return;
        };
        // SAFETY: the one reference that `self` holds, given back once.
        let _ = unsafe { (entered.calls().release)(self.raw) };
    }
}

impl Range {
    /// The first address.
    pub(crate) fn address(&self) -> Address {
        self.address
    }

    /// Gives these devices (by the driver's numbers) access to the whole of it.
    pub(crate) fn set_access(&self, devices: &[c_int], rights: AccessRights) -> Result<(), Failed> {
        let flags = match rights {
            AccessRights::ReadOnly => sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READ,
            AccessRights::ReadWrite => sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let wanted: Vec<_> = devices
            .iter()
            .map(|device| sys::CUmemAccessDesc { location: location(*device), flags })
            .collect();
        let entered = self.context.enter()?;
        // SAFETY: a range that is mapped, and as many structures as said, which the call only reads.
        let code =
            unsafe { (entered.calls().set_access)(self.address, self.len, wanted.as_ptr(), wanted.len()) };
        entered.calls().check("cuMemSetAccess", code)
    }

    /// A dma-buf of the whole of it, for NICs. It starts at the range's first byte.
    pub(crate) fn dma_buf(&self) -> Result<OwnedFd, Failed> {
        let call = "cuMemGetHandleForAddressRange";
        let entered = self.context.enter()?;
        let Some(range_handle) = entered.calls().range_handle else {
            return Err(Failed { call, code: NOT_SUPPORTED, text: "no such function".to_owned() });
        };
        let mut fd: c_int = -1;
        // SAFETY: for this type the first argument is a writable int; the range is mapped. Without flags the buffer
        // is of the kind that every NIC can import.
        let code = unsafe { range_handle(&raw mut fd, self.address, self.len, DMA_BUF, 0) };
        entered.calls().check(call, code)?;
        own(fd, call)
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        let Ok(entered) = self.context.enter() else {
            return;
        };
        if self.mapped {
            // SAFETY: mapped by `Physical::map`; whoever copies to or from it holds it until the copy has ended.
            let _ = unsafe { (entered.calls().unmap)(self.address, self.len) };
        }
        // SAFETY: reserved by `Physical::map` with this length, and no longer mapped.
        let _ = unsafe { (entered.calls().address_free)(self.address, self.len) };
    }
}

/// A descriptor that the driver has just made for this process, closed on exec from here on.
fn own(fd: c_int, call: &'static str) -> Result<OwnedFd, Failed> {
    if fd < 0 {
        return Err(Failed { call, code: 0, text: format!("gave {fd} for a descriptor") });
    }
    // SAFETY: the driver made it for the caller, and nobody else closes it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(|errno| Failed {
        call,
        code: 0,
        text: format!("fcntl of its descriptor: {errno}"),
    })?;
    Ok(fd)
}

impl fmt::Debug for Physical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Physical").field("context", &self.context).field("len", &self.len).finish()
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Range")
            .field("address", &format_args!("{:#x}", self.address))
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
