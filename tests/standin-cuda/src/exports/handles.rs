//! The C functions of virtual memory: reservations, handles, mappings, and what leaves the process as descriptors. Not the
//! books (`space`). Invariant: all of them but one that is switched off work without a current context.

use std::ffi::{c_int, c_ulonglong};
use std::os::fd::IntoRawFd as _;

use crate::abi::{
    ALLOCATION_PINNED, AccessDesc, AllocationFlags, AllocationProp, DevicePtr, HANDLE_NONE, HANDLE_POSIX_FD,
    Handle, LOCATION_DEVICE, Location, RANGE_DMA_BUF,
};
use crate::code::{Code, Outcome};
use crate::driver::Driver;
use crate::physical::{Physical, Traits};
use crate::pointers::{HostPtr, In, Out, OutAny};
use crate::raw::PAGE;
use crate::space::GRANULARITY;

export! {
    fn cuMemGetAllocationGranularity(granularity: Out<usize>, prop: In<AllocationProp>, option: c_int) |driver| {
        driver.need("vmm")?;
        traits_of(driver, prop.get()?, GRANULARITY)?;
        if option == 0 || option == 1 { granularity.put(GRANULARITY) } else { Err(Code::INVALID_VALUE) }
    }

    fn cuMemAddressReserve(
        pointer: Out<DevicePtr>,
        len: usize,
        alignment: usize,
        hint: DevicePtr,
        flags: c_ulonglong,
    ) |driver| {
        driver.need("vmm")?;
        // A hint may be passed over, and is.
        let _ = hint;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        pointer.put(driver.space.reserve(len, alignment)?)
    }

    fn cuMemAddressFree(pointer: DevicePtr, len: usize) |driver| {
        driver.need("vmm")?;
        driver.space.unreserve(pointer, len)
    }

    fn cuMemCreate(handle: Out<Handle>, len: usize, prop: In<AllocationProp>, flags: c_ulonglong) |driver| {
        driver.need("vmm")?;
        let prop = prop.get()?;
        if flags != 0 || len == 0 || !len.is_multiple_of(GRANULARITY) {
            return Err(Code::INVALID_VALUE);
        }
        let traits = traits_of(driver, prop, len)?;
        let device = driver.device(prop.location.id)?;
        handle.put(driver.space.hold(Physical::create(driver, device, traits)?))
    }

    fn cuMemRelease(handle: Handle) |driver| {
        driver.need("vmm")?;
        driver.space.release(handle)
    }

    fn cuMemMap(pointer: DevicePtr, len: usize, offset: usize, handle: Handle, flags: c_ulonglong) |driver| {
        driver.need("vmm")?;
        // cuda.h: the offset has to be 0 so far.
        if flags != 0 || offset != 0 {
            return Err(Code::INVALID_VALUE);
        }
        driver.space.map(pointer, len, handle)
    }

    fn cuMemUnmap(pointer: DevicePtr, len: usize) |driver| {
        driver.need("vmm")?;
        driver.space.unmap(pointer, len)
    }

    fn cuMemSetAccess(pointer: DevicePtr, len: usize, rights: In<AccessDesc>, count: usize) |driver| {
        driver.need("vmm")?;
        if count == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let rights = rights.get_all(count)?;
        rights.iter().try_for_each(|one| driver.space.grant(driver, (pointer, len), one.location, one.flags))
    }

    fn cuMemGetAccess(flags: Out<c_ulonglong>, location: In<Location>, pointer: DevicePtr) |driver| {
        driver.need("vmm")?;
        let location = location.get()?;
        if location.kind != LOCATION_DEVICE {
            return Err(Code::INVALID_VALUE);
        }
        let device = driver.device(location.id)?.ordinal;
        let mapping = driver.space.mapping_at(pointer).ok_or(Code::INVALID_VALUE)?;
        flags.put(c_ulonglong::try_from(mapping.rights(device)).unwrap_or(0))
    }

    fn cuMemExportToShareableHandle(target: OutAny, handle: Handle, kind: c_int, flags: c_ulonglong) |driver| {
        driver.need("vmm")?;
        driver.need("posix-fd")?;
        if kind != HANDLE_POSIX_FD {
            return Err(Code::NOT_SUPPORTED);
        }
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let descriptor = driver.space.held(handle)?.export()?;
        target.put::<c_int>(descriptor.into_raw_fd())
    }

    fn cuMemImportFromShareableHandle(handle: Out<Handle>, descriptor: HostPtr, kind: c_int) |driver| {
        driver.need("vmm")?;
        driver.need("posix-fd")?;
        if kind != HANDLE_POSIX_FD {
            return Err(Code::NOT_SUPPORTED);
        }
        // The pointer's value is the descriptor.
        let number = c_int::try_from(descriptor.address()).map_err(|_| Code::INVALID_VALUE)?;
        handle.put(driver.space.hold(Physical::import(driver, number)?))
    }

    fn cuMemGetAllocationPropertiesFromHandle(prop: Out<AllocationProp>, handle: Handle) |driver| {
        driver.need("vmm")?;
        let traits = driver.space.held(handle)?.traits;
        let flags = AllocationFlags {
            compression: 0,
            gpu_direct_rdma_capable: u8::from(traits.nic),
            usage: 0,
            reserved: [0; 4],
        };
        let id = c_int::try_from(traits.device).unwrap_or(c_int::MAX);
        prop.put(AllocationProp {
            kind: ALLOCATION_PINNED,
            requested_handle_types: traits.handle_types,
            location: Location { kind: LOCATION_DEVICE, id },
            win32_metadata: 0,
            flags,
        })
    }

    fn cuMemRetainAllocationHandle(handle: Out<Handle>, pointer: DevicePtr) |driver| {
        driver.need("vmm")?;
        handle.put(driver.space.retain(pointer)?)
    }

    fn cuMemGetHandleForAddressRange(
        target: OutAny,
        pointer: DevicePtr,
        len: usize,
        kind: c_int,
        flags: c_ulonglong,
    ) |driver| {
        driver.need("dma-buf")?;
        // The only flag is that of a mapping over PCIe beside one over a coherent link, which no device has here.
        if kind != RANGE_DMA_BUF || flags != 0 {
            return Err(if flags == 1 { Code::NOT_SUPPORTED } else { Code::INVALID_VALUE });
        }
        let mapping = driver.space.mapping_at(pointer).ok_or(Code::INVALID_VALUE)?;
        let offset = pointer.address().ok_or(Code::INVALID_VALUE)? - mapping.address;
        let end = offset.checked_add(len).ok_or(Code::INVALID_VALUE)?;
        let is_aligned = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
        if !is_aligned || end > mapping.len.next_multiple_of(PAGE) {
            return Err(Code::INVALID_VALUE);
        }
        if !mapping.physical.traits.nic {
            return Err(Code::NOT_SUPPORTED);
        }
        let descriptor = mapping.physical.export_to_nic(offset, len)?;
        target.put::<c_int>(descriptor.into_raw_fd())
    }
}

/// What memory with these properties is; an error for those that no device here has.
fn traits_of(driver: &Driver, prop: AllocationProp, size: usize) -> Outcome<Traits> {
    if prop.kind != ALLOCATION_PINNED || prop.location.kind != LOCATION_DEVICE {
        return Err(Code::INVALID_VALUE);
    }
    let device = driver.device(prop.location.id)?.ordinal;
    match prop.requested_handle_types {
        HANDLE_NONE => {}
        HANDLE_POSIX_FD => driver.need("posix-fd")?,
        _ => return Err(Code::NOT_SUPPORTED),
    }
    let nic = prop.flags.gpu_direct_rdma_capable != 0;
    if nic {
        driver.need("rdma")?;
        driver.need("rdma-vmm")?;
    }
    Ok(Traits { device, size, handle_types: prop.requested_handle_types, nic, stale: driver.config.stale })
}
