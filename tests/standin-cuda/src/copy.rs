//! What a copy or a fill may touch, found when it is submitted. Not its carrying out (`run`). Invariant: a plan holds the
//! mappings that it names, so their memory cannot become something else's before it has run.

use std::sync::Arc;

use crate::abi::{ACCESS_READ, ACCESS_READ_WRITE, DevicePtr};
use crate::code::{Code, Outcome};
use crate::device::Device;
use crate::driver::Driver;
use crate::pinned::Standing;
use crate::pointers::HostPtr;
use crate::run::{self, Work};
use crate::space::Piece;
use crate::stream::Stream;

/// One end of a copy as C names it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// Of this device's memory, or host memory that it can reach; accessed with the rights of the device of this ordinal.
    Device(DevicePtr, usize),
    Host(HostPtr),
}

/// One end of a copy, found.
#[derive(Debug)]
pub(crate) enum Side {
    Device {
        pieces: Vec<Piece>,
        /// Whose rights count.
        device: usize,
    },
    /// Host memory of the caller, which keeps it until the copy is over.
    Host(usize),
    /// Bytes that were taken when the copy was submitted.
    Staged(Box<[u8]>),
}

#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) target: Side,
    pub(crate) source: Side,
    pub(crate) len: usize,
}

#[derive(Debug)]
pub(crate) struct Fill {
    pub(crate) target: Side,
    pub(crate) byte: u8,
    pub(crate) len: usize,
}

/// When the caller gets its thread back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Return {
    /// As soon as the copy may be left to the stream: pageable memory is staged or waited for, as by a real driver.
    Safe,
    /// As before, but the source may be changed at once.
    Read,
    Done,
}

impl End {
    /// Where unified addressing says it is.
    pub(crate) fn of_any(pointer: DevicePtr, device: usize) -> Self {
        match pointer.is_of_device() {
            true => Self::Device(pointer, device),
            false => Self::Host(HostPtr::of_address(pointer.0)),
        }
    }

    /// The side, and whether it is pageable host memory.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a range that is not all mapped, or without the rights.
    pub(crate) fn find(self, driver: &Driver, len: usize, rights: i32) -> Outcome<(Side, bool)> {
        let (address, is_tagged) = match self {
            Self::Device(pointer, _) => (pointer.address().ok_or(Code::INVALID_VALUE)?, true),
            Self::Host(pointer) => (pointer.address(), false),
        };
        match driver.pinned.standing(address, len) {
            Standing::Pinned { read_only, .. } if read_only && rights == ACCESS_READ_WRITE => {
                return Err(Code::INVALID_VALUE);
            }
            Standing::Pinned { .. } => return Ok((Side::Host(address), false)),
            Standing::Straddling => return Err(Code::INVALID_VALUE),
            Standing::Pageable => {}
        }
        match self {
            Self::Device(pointer, device) => {
                let pieces = driver.space.locate(pointer, len)?;
                let allows = |piece: &Piece| piece.mapping.rights(device) & rights == rights;
                if pieces.iter().all(allows) {
                    Ok((Side::Device { pieces, device }, false))
                } else {
                    Err(Code::INVALID_VALUE)
                }
            }
            // A device pointer where cuda.h wants a host pointer, or null.
            Self::Host(_) if !is_tagged && (address == 0 || address >= DevicePtr::TAG) => {
                Err(Code::INVALID_VALUE)
            }
            Self::Host(_) => Ok((Side::Host(address), true)),
        }
    }
}

/// A copy that was checked, ready for a stream.
pub(crate) struct Plan {
    copy: Copy,
    /// What the caller has to wait for.
    target_is_pageable: bool,
}

impl Plan {
    /// Checks both ends and takes the bytes of a source that the caller may change afterwards.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a range that is not all mapped, or without the rights.
    pub(crate) fn new(
        driver: &Driver,
        (target, source): (End, End),
        len: usize,
        wanted: Return,
    ) -> Outcome<Self> {
        let (target, target_is_pageable) = target.find(driver, len, ACCESS_READ_WRITE)?;
        let (source, source_is_pageable) = source.find(driver, len, ACCESS_READ)?;
        let is_staged = wanted == Return::Read || (source_is_pageable && wanted == Return::Safe);
        let source = match source {
            Side::Host(address) if is_staged => Side::Staged(run::stage(address, len)),
            source => source,
        };
        Ok(Self { copy: Copy { target, source, len }, target_is_pageable })
    }

    /// Hands it to a stream, and waits for it where the caller has to.
    ///
    /// # Errors
    /// The error that the context is in.
    pub(crate) fn submit(self, driver: &Driver, stream: &Arc<Stream>, wanted: Return) -> Outcome {
        stream.submit(driver, Work::Copy(self.copy))?;
        if self.target_is_pageable || wanted == Return::Done { stream.synchronize() } else { Ok(()) }
    }
}

/// Copies `len` bytes on a stream.
///
/// # Errors
/// As [`Plan::new`] and [`Plan::submit`].
pub(crate) fn submit(
    driver: &Driver,
    stream: &Arc<Stream>,
    ends: (End, End),
    len: usize,
    wanted: Return,
) -> Outcome {
    if len == 0 {
        return Ok(());
    }
    Plan::new(driver, ends, len, wanted)?.submit(driver, stream, wanted)
}

/// Sets `len` bytes on a stream.
///
/// # Errors
/// As [`submit`].
pub(crate) fn fill(
    driver: &Driver,
    stream: &Arc<Stream>,
    target: DevicePtr,
    byte: u8,
    len: usize,
) -> Outcome {
    if len == 0 {
        return Ok(());
    }
    let device: &Device = stream.device();
    let (target, _) = End::Device(target, device.ordinal).find(driver, len, ACCESS_READ_WRITE)?;
    stream.submit(driver, Work::Fill(Fill { target, byte, len }))
}
