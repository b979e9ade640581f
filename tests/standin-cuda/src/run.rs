//! What a stream's worker does with one piece of work. unsafe: copies through addresses that were checked, and calls what
//! the program gave to `cuLaunchHostFunc`. Not the order of work (`stream`). Invariant: device memory is touched only while
//! its mapping's `Alive` is held and the device's rights allow it.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use hetmem_kernels::launch::{Fault, Memory};

use crate::abi::{ACCESS_READ, ACCESS_READ_WRITE, DevicePtr};
use crate::call;
use crate::code::{Code, Outcome};
use crate::copy::{Copy, End, Fill, Side};
use crate::device::Device;
use crate::driver::{self, Driver};
use crate::event::Event;
use crate::module::Launch;
use crate::raw::{copy_out, fill_bytes, move_bytes};
use crate::space::{Alive, Mapping};
use crate::stream::Position;

pub(crate) enum Work {
    Copy(Copy),
    Fill(Fill),
    /// A kernel.
    Launch(Launch),
    Record(Arc<Event>, u64),
    /// Waits for a record of an event.
    Until(Arc<Event>, u64),
    /// Waits for another stream.
    After(Position),
    Call(HostCall),
    /// Ends an allocation.
    Free(Arc<Mapping>),
}

/// A function of the program with its argument.
#[derive(Clone, Copy)]
pub(crate) struct HostCall {
    pub(crate) function: extern "C" fn(*mut c_void),
    pub(crate) argument: *mut c_void,
}

// SAFETY: cuda.h says that the function is called on a thread of the driver; that the argument can be used there is the
// program's promise.
unsafe impl Send for HostCall {}

/// Does one piece of work. In a context that is in an error nothing happens, but what others wait for is reached.
///
/// # Errors
/// What the context is in from now on.
pub(crate) fn carry_out(work: Work, device: &Device) -> Outcome {
    match work {
        Work::Record(event, record) => event.reach(record),
        Work::Until(event, record) => event.wait(record),
        Work::After(position) => position.wait(),
        Work::Free(mapping) => mapping.end_life()?,
        _ if device.check().is_err() => {}
        Work::Copy(copy) => move_all(&copy)?,
        Work::Fill(fill) => fill_all(&fill)?,
        Work::Launch(launch) => {
            let driver = driver::get().ok_or(Code::NOT_INITIALIZED)?;
            launch.carry_out(&mut Reached { driver, device: device.ordinal })?;
        }
        Work::Call(HostCall { function, argument }) => call::as_host_function(|| function(argument)),
    }
    Ok(())
}

/// Takes bytes of the caller, which is inside a call that reads them.
pub(crate) fn stage(address: usize, len: usize) -> Box<[u8]> {
    // SAFETY: the caller vouches for its memory until the copy that it asks for is over.
    unsafe { copy_out(address, len) }
}

/// Memory as kernels of a device see it: all that is mapped with rights for it, and pinned host memory.
struct Reached {
    driver: &'static Driver,
    device: usize,
}

impl Reached {
    fn side(&self, address: u64, len: usize, rights: i32) -> Result<Side, Fault> {
        let fault = Fault::Address { address, len_bytes: len as u64 };
        let pointer = DevicePtr(usize::try_from(address).map_err(|_| fault)?);
        let found = End::Device(pointer, self.device).find(self.driver, len, rights);
        found.map(|(side, _)| side).map_err(|_| fault)
    }

    fn copy(&self, copy: &Copy, address: u64) -> Result<(), Fault> {
        move_all(copy).map_err(|_| Fault::Address { address, len_bytes: copy.len as u64 })
    }
}

impl Memory for Reached {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let (source, len) = (self.side(address, bytes.len(), ACCESS_READ)?, bytes.len());
        let target = Side::Host(bytes.as_mut_ptr().expose_provenance());
        self.copy(&Copy { target, source, len }, address)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (target, len) = (self.side(address, bytes.len(), ACCESS_READ_WRITE)?, bytes.len());
        let source = Side::Host(bytes.as_ptr().expose_provenance());
        self.copy(&Copy { target, source, len }, address)
    }
}

/// A part of one side that lies in one mapping, or in none.
#[derive(Clone, Copy)]
struct Span<'a> {
    address: usize,
    len: usize,
    of: Option<(&'a Mapping, usize)>,
}

impl Side {
    fn spans(&self, len: usize) -> Vec<Span<'_>> {
        match self {
            Self::Device { pieces, device } => pieces
                .iter()
                .map(|piece| Span {
                    address: piece.address,
                    len: piece.len,
                    of: Some((&*piece.mapping, *device)),
                })
                .collect(),
            Self::Host(address) => vec![Span { address: *address, len, of: None }],
            Self::Staged(bytes) => vec![Span { address: bytes.as_ptr().expose_provenance(), len, of: None }],
        }
    }
}

impl<'a> Span<'a> {
    /// The first `len` bytes, which are not more than there are, and the rest.
    fn split(self, len: usize) -> (Self, Self) {
        (Self { len, ..self }, Self { address: self.address + len, len: self.len - len, of: self.of })
    }

    fn mapping(self) -> Option<&'a Mapping> {
        self.of.map(|(mapping, _)| mapping)
    }
}

fn move_all(copy: &Copy) -> Outcome {
    let (targets, sources) = (copy.target.spans(copy.len), copy.source.spans(copy.len));
    let (mut targets, mut sources) = (targets.into_iter(), sources.into_iter());
    let (mut target, mut source) = (targets.next(), sources.next());
    while let (Some(to), Some(from)) = (target, source) {
        let len = to.len.min(from.len);
        let ((to, to_rest), (from, from_rest)) = (to.split(len), from.split(len));
        move_one(to, from)?;
        target = if to_rest.len > 0 { Some(to_rest) } else { targets.next() };
        source = if from_rest.len > 0 { Some(from_rest) } else { sources.next() };
    }
    Ok(())
}

fn move_one(target: Span<'_>, source: Span<'_>) -> Outcome {
    let _alive = held(target, ACCESS_READ_WRITE, source)?;
    written(target, || {
        // SAFETY: device memory is mapped with these rights while `_alive` is held; the caller of C vouches for host memory
        // until the copy is over, which it learns from the stream; staged bytes are in the work itself.
        unsafe { move_bytes(target.address, source.address, target.len) };
    })
}

fn fill_all(fill: &Fill) -> Outcome {
    for span in fill.target.spans(fill.len) {
        let nothing = Span { address: 0, len: 0, of: None };
        let _alive = held(span, ACCESS_READ_WRITE, nothing)?;
        written(span, || {
            // SAFETY: as in `move_one`.
            unsafe { fill_bytes(span.address, fill.byte, span.len) };
        })?;
    }
    Ok(())
}

/// Writes to a span, and lets NICs see it where that is another copy of the bytes.
fn written(target: Span<'_>, write: impl FnOnce()) -> Outcome {
    match target.mapping() {
        Some(mapping) => mapping.physical.written(target.address - mapping.address, target.len, write),
        None => {
            write();
            Ok(())
        }
    }
}

/// Keeps both mappings alive. They are locked in the order of their addresses, and one mapping only once, so that no two
/// workers and an unmapping thread wait for each other.
fn held<'a>(
    target: Span<'a>,
    rights: i32,
    source: Span<'a>,
) -> Outcome<(Option<Alive<'a>>, Option<Alive<'a>>)> {
    let mut wanted = [target.mapping(), source.mapping()];
    let key = |mapping: &Option<&Mapping>| mapping.map_or(0, |mapping| mapping.id);
    wanted.sort_by_key(key);
    if key(&wanted[0]) == key(&wanted[1]) {
        wanted[0] = None;
    }
    let [first, second] = wanted;
    let alive = (first.map(Mapping::alive).transpose()?, second.map(Mapping::alive).transpose()?);
    let allows = |span: Span<'_>, rights: i32| {
        span.of.is_none_or(|(mapping, device)| {
            // The guard of this mapping is one of the two.
            let guard = if key(&first) == mapping.id { &alive.0 } else { &alive.1 };
            guard.as_ref().is_some_and(|guard| guard.rights(device) & rights == rights)
        })
    };
    if allows(target, rights) && allows(source, ACCESS_READ) { Ok(alive) } else { Err(Code::ILLEGAL_ADDRESS) }
}
