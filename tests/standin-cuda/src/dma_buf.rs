//! Descriptors for NICs: a dma-buf of the kernel where it makes them from memory files, else the memory file itself.
//! unsafe: an ioctl that rustix does not have. Not a check of what may be exported. Invariant: whoever maps the
//! descriptor finds the range's first byte at offset 0.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Result as IoResult;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use crate::code::{Code, Outcome};

/// `_IOW('u', 0x42, struct udmabuf_create)` of linux/udmabuf.h.
const UDMABUF_CREATE: Opcode = 0x4018_7542;
const UDMABUF_CLOEXEC: u32 = 1;

/// `struct udmabuf_create`.
#[repr(C)]
struct UdmabufCreate {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

// SAFETY: the number is that of an ioctl that reads one `udmabuf_create`, writes nothing, and returns a new descriptor.
unsafe impl Ioctl for UdmabufCreate {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        UDMABUF_CREATE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self).cast()
    }

    unsafe fn output_from_ptr(result: IoctlOutput, _: *mut c_void) -> IoResult<OwnedFd> {
        // SAFETY: the call has succeeded, so it returned a descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(result) })
    }
}

fn udmabuf(file: BorrowedFd<'_>, offset: usize, len: usize) -> Option<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/udmabuf").ok()?;
    let create = UdmabufCreate {
        memfd: u32::try_from(file.as_raw_fd()).ok()?,
        flags: UDMABUF_CLOEXEC,
        offset: offset as u64,
        size: len as u64,
    };
    // SAFETY: /dev/udmabuf takes this ioctl, and `create` lives until it returns. The file cannot shrink: it is sealed.
    unsafe { ioctl(&device, create) }.ok()
}

/// A descriptor of `len` bytes at `offset` of a sealed memory file.
///
/// # Errors
/// `INVALID_VALUE` for a range that only a dma-buf of the kernel could give, where the kernel makes none.
pub(crate) fn export(file: impl AsFd, offset: usize, len: usize) -> Outcome<OwnedFd> {
    let file = file.as_fd();
    match udmabuf(file, offset, len) {
        Some(descriptor) => Ok(descriptor),
        None if offset == 0 => reopen(file, OFlags::NONBLOCK),
        None => Err(Code::INVALID_VALUE),
    }
}

/// Opens a memory file once more, so that the new descriptor has flags, a position and locks of its own.
///
/// # Errors
/// What the system refused.
pub(crate) fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Outcome<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    open(path, OFlags::RDWR | OFlags::CLOEXEC | flags, Mode::empty()).map_err(Code::of_system)
}
