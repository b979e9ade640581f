//! The C functions about contexts: primary ones, and which is current. Not what is in them. Invariant: a thread's current
//! context is the top of its own stack.

use std::ffi::{c_int, c_uint};

use crate::abi::Handle;
use crate::code::Code;
use crate::device;
use crate::pointers::Out;

export! {
    fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: c_int) |driver| {
        let device = driver.device(device)?;
        context.put(device.context_handle())?;
        device.retain();
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) |driver| {
        driver.device(device)?.release(driver)
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) |driver| {
        let device = driver.device(device)?;
        flags.put(0)?;
        active.put(c_int::from(device.is_retained()))
    }

    fn cuCtxSetCurrent(context: Handle) |driver| {
        let device = if context == Handle::default() { None } else { Some(device::of_context(driver, context)?) };
        device::with_stack(|stack| {
            stack.pop();
            stack.extend(device.map(|device| device.ordinal));
        });
        Ok(())
    }

    fn cuCtxGetCurrent(context: Out<Handle>) |driver| {
        let ordinal = device::with_stack(|stack| stack.last().copied());
        let device = ordinal.and_then(|ordinal| driver.devices.get(ordinal));
        context.put(device.map(device::Device::context_handle).unwrap_or_default())
    }

    fn cuCtxPushCurrent_v2(context: Handle) |driver| {
        let device = device::of_context(driver, context)?;
        device::with_stack(|stack| stack.push(device.ordinal));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<Handle>) |driver| {
        let ordinal = device::with_stack(Vec::pop).ok_or(Code::INVALID_CONTEXT)?;
        let device = driver.devices.get(ordinal).ok_or(Code::INVALID_CONTEXT)?;
        context.put_if_wanted(device.context_handle());
        Ok(())
    }

    fn cuCtxGetDevice(device: Out<c_int>) |driver| {
        device.put(device::current_or_failed(driver)?.number())
    }

    fn cuCtxSynchronize() |driver| {
        let device = device::current_or_failed(driver)?;
        device.wait_for_all(driver);
        device.check()
    }

    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) |driver| {
        device::current(driver)?;
        least.put_if_wanted(0);
        greatest.put_if_wanted(-5);
        Ok(())
    }

    fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint) |driver| {
        let (device, peer) = (device::current(driver)?, device::of_context(driver, peer)?);
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if device.ordinal == peer.ordinal {
            return Err(Code::INVALID_DEVICE);
        }
        driver.need("peer").map_err(|_| Code::PEER_ACCESS_UNSUPPORTED)?;
        device.enable_peer(peer.ordinal)
    }
}
