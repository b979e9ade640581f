//! The C functions about allocations, host memory and pinned ranges. Not virtual memory (`handles`). Invariant: what is
//! freed or unregistered here is in use by no copy any more, as with a real driver, which waits too.

use std::ffi::c_uint;

use crate::abi::{DevicePtr, HOST_ALLOC_FLAGS, HOST_REGISTER_FLAGS, HOST_REGISTER_READ_ONLY, Handle};
use crate::code::{Code, Outcome};
use crate::device;
use crate::driver::Driver;
use crate::exports::streams;
use crate::pinned::Standing;
use crate::pointers::{HostPtr, Out};
use crate::run::Work;

export! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) |driver| {
        let device = device::current(driver)?;
        free.put(device.free_bytes())?;
        total.put(device.memory_bytes)
    }

    fn cuMemAlloc_v2(pointer: Out<DevicePtr>, len: usize) |driver| {
        let device = device::current(driver)?;
        pointer.put(driver.space.allocate(driver, device, len)?)
    }

    fn cuMemFree_v2(pointer: DevicePtr) |driver| {
        let device = device::current_or_failed(driver)?;
        if pointer == DevicePtr(0) {
            return Ok(());
        }
        let mapping = driver.space.take_allocation(pointer)?;
        wait_for_everything(driver);
        mapping.end_life()?;
        device.check()
    }

    fn cuMemAllocAsync(pointer: Out<DevicePtr>, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        pointer.put(driver.space.allocate(driver, stream.device(), len)?)
    }

    fn cuMemFreeAsync(pointer: DevicePtr, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        let mapping = driver.space.take_allocation(pointer)?;
        stream.submit(driver, Work::Free(mapping))
    }

    fn cuMemHostAlloc(pointer: Out<usize>, len: usize, flags: c_uint) |driver| {
        let device = device::current(driver)?;
        if len == 0 || flags & !HOST_ALLOC_FLAGS != 0 {
            return Err(Code::INVALID_VALUE);
        }
        pointer.put(driver.pinned.allocate(device.ordinal, len)?)
    }

    fn cuMemFreeHost(pointer: HostPtr) |driver| {
        let device = device::current_or_failed(driver)?;
        if driver.pinned.is_allocated(pointer.address()) != Some(true) {
            return Err(Code::INVALID_VALUE);
        }
        wait_for_everything(driver);
        driver.pinned.remove(pointer.address());
        device.check()
    }

    fn cuMemHostRegister_v2(pointer: HostPtr, len: usize, flags: c_uint) |driver| {
        let device = device::current(driver)?;
        if len == 0 || pointer.address() == 0 || flags & !HOST_REGISTER_FLAGS != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let read_only = flags & HOST_REGISTER_READ_ONLY != 0;
        driver.pinned.register(device.ordinal, pointer.address(), len, read_only)
    }

    fn cuMemHostUnregister(pointer: HostPtr) |driver| {
        let device = device::current_or_failed(driver)?;
        match driver.pinned.is_allocated(pointer.address()) {
            None => return Err(Code::HOST_MEMORY_NOT_REGISTERED),
            Some(true) => return Err(Code::INVALID_VALUE),
            Some(false) => {}
        }
        wait_for_everything(driver);
        driver.pinned.remove(pointer.address());
        device.check()
    }

    fn cuMemHostGetDevicePointer_v2(pointer: Out<DevicePtr>, host: HostPtr, flags: c_uint) |driver| {
        device::current(driver)?;
        let standing = driver.pinned.standing(host.address(), 1);
        if flags != 0 || !matches!(standing, Standing::Pinned { .. }) {
            return Err(Code::INVALID_VALUE);
        }
        pointer.put(DevicePtr::of_address(host.address()))
    }

    fn cuMemGetAddressRange_v2(base: Out<DevicePtr>, len: Out<usize>, pointer: DevicePtr) |driver| {
        device::current(driver)?;
        let (start, size) = range_of(driver, pointer)?;
        base.put_if_wanted(start);
        len.put_if_wanted(size);
        Ok(())
    }
}

/// The allocation, mapping or pinned range that a device pointer points into.
fn range_of(driver: &Driver, pointer: DevicePtr) -> Outcome<(DevicePtr, usize)> {
    if let Some(mapping) = driver.space.mapping_at(pointer) {
        return Ok((DevicePtr::of_address(mapping.address), mapping.len));
    }
    let address = pointer.address().ok_or(Code::NOT_FOUND)?;
    match driver.pinned.standing(address, 1) {
        Standing::Pinned { start, len, .. } => Ok((DevicePtr::of_address(start), len)),
        _ => Err(Code::NOT_FOUND),
    }
}

/// Copies of any device may use any memory.
fn wait_for_everything(driver: &Driver) {
    driver.devices.iter().for_each(|device| device.wait_for_all(driver));
}
