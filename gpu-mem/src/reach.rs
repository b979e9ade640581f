//! Where a device finds a piece of memory by itself, so that a kernel can touch it. Not copies, which reach more.
//! Invariant: an address that is given is good for all bytes of the span, and for writing if that was asked, while the
//! span and what is given with it are held.
//!
//! unsafe: asks the driver for the address of pinned host memory.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;

use crate::device::Device;
use crate::pinned::Hold;
use crate::span::{Memory, Place, Span};
use crate::stream::{Held, add_pin};
use crate::table::Address;

/// What a kernel does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Finds the spans of one call, and gathers what has to be held for it. Mostly a span lies in the memory of the one before:
/// then nobody is asked.
pub(crate) struct Reacher<'a> {
    device: &'a Device,
    /// The latest that is read, and the latest that is written.
    known: [Option<Known>; 2],
    memories: Vec<Memory>,
    pins: Vec<Hold>,
}

/// A part of some memory, by offset, and where kernels find its first byte.
struct Known {
    /// Of memory that is held, so that no other has it.
    identity: *const (),
    offsets: Range<u64>,
    address: u64,
}

impl<'a> Reacher<'a> {
    pub(crate) fn new(device: &'a Device) -> Self {
        Self { device, known: [None, None], memories: Vec::new(), pins: Vec::new() }
    }

    /// Where kernels find the span; none if they do not.
    pub(crate) fn find(&mut self, span: &Span, access: Access) -> Option<u64> {
        let place = usize::from(access == Access::Write);
        let identity = span.memory().identity();
        let end = span.offset().checked_add(span.len_bytes())?;
        let known = self.known.get(place)?.as_ref().filter(|known| {
            known.identity == identity && known.offsets.start <= span.offset() && end <= known.offsets.end
        });
        if let Some(known) = known {
            return Some(known.address + (span.offset() - known.offsets.start));
        }
        let (known, pin) = located(self.device, span, access)?;
        self.memories.push(span.memory().clone());
        pin.into_iter().for_each(|pin| add_pin(&mut self.pins, pin));
        let address = known.address + (span.offset() - known.offsets.start);
        *self.known.get_mut(place)? = Some(known);
        Some(address)
    }

    /// What has to be held while `count` copies or launches are under way, and `more`.
    pub(crate) fn held(mut self, count: usize, more: impl IntoIterator<Item = Hold>) -> Held {
        self.pins.extend(more);
        Held::new(count, self.memories, self.pins)
    }
}

/// As much of the span's memory as kernels find in a row, the span in it, and what keeps it pinned.
fn located(device: &Device, span: &Span, access: Access) -> Option<(Known, Option<Hold>)> {
    if access == Access::Write {
        span.check_writable().ok()?;
    }
    let identity = span.memory().identity();
    match span.place() {
        Place::Device(address) => span.is_within_reach(device.ordinal()).then(|| {
            let offsets = 0..span.memory().len_bytes();
            (Known { identity, offsets, address: address.saturating_sub(span.offset()) }, None)
        }),
        Place::Host(base) => {
            let len = usize::try_from(span.len_bytes()).ok()?;
            let found = device
                .gpus()
                .pinned()
                .find_mapped(base.addr(), len, device.ordinal(), |start| address_of(device, start))?;
            // What is registered for reading alone faults when a kernel writes it, whatever this process may.
            if access == Access::Write && found.read_only {
                return None;
            }
            let offsets = span.offset()..span.offset().checked_add(found.rest as u64)?;
            Some((Known { identity, offsets, address: found.address }, Some(found.hold)))
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
