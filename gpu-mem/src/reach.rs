//! Where a device finds a piece of memory by itself, so that a kernel can touch it. Not copies, which reach more.
//! Invariant: an address that is given is good for all bytes of the span, and for writing if that was asked, while the
//! span and what is given with it are held.
//!
//! unsafe: asks the driver for the address of pinned host memory.
#![allow(unsafe_code)]

use std::ffi::c_void;

use crate::device::Device;
use crate::pinned::Hold;
use crate::span::{Place, Span};
use crate::table::Address;

/// An address for a device's kernels.
pub(crate) struct Reached {
    pub(crate) address: u64,
    /// What keeps host memory pinned.
    pub(crate) pin: Option<Hold>,
}

/// What a kernel does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Where kernels of a device find the span; none if they do not.
pub(crate) fn reached(device: &Device, span: &Span, access: Access) -> Option<Reached> {
    if access == Access::Write {
        span.check_writable().ok()?;
    }
    match span.place() {
        Place::Device(address) => {
            span.is_within_reach(device.ordinal()).then_some(Reached { address, pin: None })
        }
        Place::Host(base) => {
            let len = usize::try_from(span.len_bytes()).ok()?;
            let found = device
                .gpus()
                .pinned()
                .find_mapped(base.addr(), len, device.ordinal(), |start| address_of(device, start))?;
            // What is registered for reading alone faults when a kernel writes it, whatever this process may.
            (access == Access::Read || !found.read_only)
                .then_some(Reached { address: found.address, pin: Some(found.hold) })
        }
    }
}

/// The address at which kernels of the device find pinned memory that begins here.
fn address_of(device: &Device, start: usize) -> Option<u64> {
    let entered = device.context().enter().ok()?;
    let ask = entered.calls().host_address?;
    let mut address: Address = 0;
    // SAFETY: a writable place; `start` is an address of pinned memory, of which the caller holds the owner. A context is
    // current. The driver follows no pointer.
    let code = unsafe { ask(&raw mut address, std::ptr::without_provenance_mut::<c_void>(start), 0) };
    (code == crate::failure::SUCCESS).then_some(address)
}
