//! The primary context of one device: retained here, made current for as long as a call needs it. Not memory, not
//! streams. Invariant: a context stays retained while its `Context` lives, and a thread's current context is the same
//! after an `Entered` as before it.
//!
//! unsafe: calls the driver's functions for contexts.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::marker::PhantomData;

use crate::Unavailable;
use crate::failure::{Failed, NOT_SUPPORTED};
use crate::kernels::Kernels;
use crate::table::{Calls, Opaque};

/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX`.
const FLUSH_CURRENT_CONTEXT: c_uint = 0;
/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES`: peers read segments too.
const FLUSH_TO_ALL_DEVICES: c_uint = 200;

/// A retained primary context.
pub(crate) struct Context {
    calls: &'static Calls,
    /// The driver's number of the device, and of its context.
    device: c_int,
    raw: Opaque,
    kernels: Kernels,
}

/// A context that is current for this thread. It belongs to the thread, as being current does.
pub(crate) struct Entered<'a> {
    context: &'a Context,
    not_send: PhantomData<*const ()>,
}

impl Context {
    /// Retains the primary context of a device, which creates it where nobody else in this process has.
    pub(crate) fn retain(calls: &'static Calls, ordinal: u16) -> Result<Self, Failed> {
        let mut device: c_int = 0;
        // SAFETY: `device` is a writable int for the length of the call.
        let code = unsafe { (calls.device_get)(&raw mut device, c_int::from(ordinal)) };
        calls.check("cuDeviceGet", code)?;
        let mut raw: Opaque = 0;
        // SAFETY: `raw` is a writable pointer-sized place; `device` came from cuDeviceGet.
        let code = unsafe { (calls.primary_retain)(&raw mut raw, device) };
        calls.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self { calls, device, raw, kernels: Kernels::default() })
    }

    /// The driver's handle, good while `self` lives.
    pub(crate) fn raw(&self) -> Opaque {
        self.raw
    }

    /// What is loaded into it.
    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The driver's number of the device.
    pub(crate) fn device(&self) -> c_int {
        self.device
    }

    /// Makes this the thread's current context until the result is dropped.
    pub(crate) fn enter(&self) -> Result<Entered<'_>, Failed> {
        // SAFETY: the context is retained while `self` lives, which the result borrows.
        let code = unsafe { (self.calls.push_current)(self.raw) };
        self.calls.check("cuCtxPushCurrent_v2", code)?;
        Ok(Entered { context: self, not_send: PhantomData })
    }

    /// Free and total bytes of the device's memory.
    pub(crate) fn memory_bytes(&self) -> Result<(u64, u64), Failed> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0_usize, 0_usize);
        // SAFETY: two writable size_t for the length of the call; a context is current.
        let code = unsafe { (self.calls.memory_info)(&raw mut free, &raw mut total) };
        self.calls.check("cuMemGetInfo_v2", code)?;
        Ok((free as u64, total as u64))
    }

    /// Makes what NICs have written so far visible to the work of all devices; blocks until it is.
    pub(crate) fn flush_writes(&self) -> Result<(), Failed> {
        let call = "cuFlushGPUDirectRDMAWrites";
        let Some(flush) = self.calls.flush_writes else {
            return Err(Failed { call, code: NOT_SUPPORTED, text: "no such function".to_owned() });
        };
        let _entered = self.enter()?;
        // SAFETY: takes two numbers of cuda.h; a context is current.
        let code = unsafe { flush(FLUSH_CURRENT_CONTEXT, FLUSH_TO_ALL_DEVICES) };
        self.calls.check(call, code)
    }

    /// The remedy where writes cannot be flushed.
    pub(crate) fn flush_absence(&self, failed: &Failed) -> Unavailable {
        failed.absence(
            "flush of remote writes",
            "update the NVIDIA driver; until then what a NIC writes into GPU memory goes through host memory",
        )
    }
}

impl Entered<'_> {
    pub(crate) fn calls(&self) -> &'static Calls {
        self.context.calls
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped: Opaque = 0;
        // SAFETY: a writable place; this thread pushed the context, since `Entered` cannot leave it.
        let _ = unsafe { (self.context.calls.pop_current)(&raw mut popped) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Others of this process may go on using the context, so what was loaded into it does not go by itself.
        let mut kernels = std::mem::take(&mut self.kernels);
        if let Ok(entered) = self.enter() {
            kernels.unload(entered.calls());
        }
        // SAFETY: retained once by `retain`, released once here; everything that uses it holds it.
        let _ = unsafe { (self.calls.primary_release)(self.device) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("device", &self.device).finish_non_exhaustive()
    }
}
