//! Pages of this process, and bytes moved between addresses. unsafe: maps memory and copies through addresses that other
//! parts have checked. Not a table of what is where (`space`, `pinned`). Invariant: `Pages` unmaps exactly what it mapped,
//! once, and changes nothing outside of it.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::abi::DevicePtr;
use crate::code::{Code, Outcome};
use crate::config;

pub(crate) const PAGE: usize = 4096;
/// What device memory starts at a multiple of, in the window.
const WINDOW_STEP: usize = 2 << 20;

/// Address space of this process, reserved or mapped, that is given back when dropped.
#[derive(Debug)]
pub(crate) struct Pages {
    address: usize,
    len: usize,
}

fn pointer(address: usize) -> *mut c_void {
    with_exposed_provenance_mut(address)
}

/// Where device memory of `len` bytes should be: anywhere, or at the next place in the window of device pointers.
fn wanted(len: usize) -> *mut c_void {
    static NEXT: AtomicUsize = AtomicUsize::new(DevicePtr::WINDOW.start);
    if !config::get().peer_memory {
        return null_mut();
    }
    // A gap between neighbours, so that running over an end shows.
    pointer(NEXT.fetch_add(len.next_multiple_of(WINDOW_STEP) + WINDOW_STEP, Ordering::Relaxed))
}

fn read_write() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}

impl Pages {
    /// Address space with nothing in it, at a multiple of `alignment`, which is a power of two.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if there is none.
    pub(crate) fn reserve(len: usize, alignment: usize) -> Outcome<Self> {
        let all = len.checked_add(alignment).ok_or(Code::INVALID_VALUE)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free range, the wanted one if that is free.
        let start = unsafe { mmap_anonymous(wanted(all), all, ProtFlags::empty(), flags) };
        let start = start.map_err(Code::of_system)?.expose_provenance();
        let address = start.next_multiple_of(alignment);
        // What surrounds the aligned part, which is a number of pages on both sides, is given back.
        drop(Self { address: start, len: address - start });
        drop(Self { address: address + len, len: start + all - address - len });
        Ok(Self { address, len })
    }

    /// Zeroed memory of this process, of at least `len` bytes.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if there is none.
    pub(crate) fn anonymous(len: usize) -> Outcome<Self> {
        let len = len.checked_next_multiple_of(PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        // SAFETY: the kernel chooses a free range.
        let start = unsafe { mmap_anonymous(null_mut(), len, read_write(), MapFlags::PRIVATE) };
        Ok(Self { address: start.map_err(Code::of_system)?.expose_provenance(), len })
    }

    /// Part of a memory file, readable and writable.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn of_file(file: impl AsFd, offset: usize, len: usize) -> Outcome<Self> {
        // SAFETY: the kernel chooses a free range, the wanted one if that is free.
        let start = unsafe { mmap(wanted(len), len, read_write(), MapFlags::SHARED, file, offset as u64) };
        Ok(Self { address: start.map_err(Code::of_system)?.expose_provenance(), len })
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn within(&self, at: usize, len: usize) -> Outcome<usize> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len);
        if fits { Ok(self.address + at) } else { Err(Code::INVALID_VALUE) }
    }

    /// Puts part of a memory file at `at`, not accessible yet.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn place(&self, at: usize, len: usize, file: impl AsFd, offset: usize) -> Outcome {
        let address = self.within(at, len)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range is inside these pages, which nothing else uses; what was there is replaced.
        let placed = unsafe { mmap(pointer(address), len, ProtFlags::empty(), flags, file, offset as u64) };
        placed.map(drop).map_err(Code::of_system)
    }

    /// Lets this process access a placed part, or not.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn protect(&self, at: usize, len: usize, read: bool, write: bool) -> Outcome {
        let address = self.within(at, len)?;
        let mut flags = MprotectFlags::empty();
        flags.set(MprotectFlags::READ, read);
        flags.set(MprotectFlags::WRITE, write);
        // SAFETY: the range is inside these pages; no reference of Rust points there, and copies look at rights first.
        unsafe { mprotect(pointer(address), len, flags) }.map_err(Code::of_system)
    }

    /// Takes away what was placed at `at`; the addresses stay reserved.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn vacate(&self, at: usize, len: usize) -> Outcome {
        let address = self.within(at, len)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is inside these pages; the caller has ended all copies from and to it.
        let vacated = unsafe { mmap_anonymous(pointer(address), len, ProtFlags::empty(), flags) };
        vacated.map(drop).map_err(Code::of_system)
    }

    /// Copies `len` bytes at `at` from the same place of other pages, both of a file and accessible.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the range is not inside both.
    pub(crate) fn copy_from(&self, source: &Self, at: usize, len: usize) -> Outcome {
        // SAFETY: both ranges were just found to be inside pages that live as long as the borrows.
        unsafe { move_bytes(self.within(at, len)?, source.within(at, len)?, len) };
        Ok(())
    }

    /// The same, without touching pages that are equal already.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the range is not inside both.
    pub(crate) fn copy_changed_from(&self, source: &Self, at: usize, len: usize) -> Outcome {
        let end = at.checked_add(len).ok_or(Code::INVALID_VALUE)?;
        for start in (at..end).step_by(PAGE) {
            let len = PAGE.min(end - start);
            let (own, other) = (self.within(start, len)?, source.within(start, len)?);
            // SAFETY: as above. Bytes that another process writes meanwhile are taken now or at the next call.
            if unsafe { copy_out(own, len) != copy_out(other, len) } {
                self.copy_from(source, start, len)?;
            }
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: this range was mapped by this value, and whoever uses it holds the value.
            let _ = unsafe { munmap(pointer(self.address), self.len) };
        }
    }
}

/// Copies bytes between places that may overlap.
///
/// # Safety
/// Both ranges are accessible in these directions until this returns. Other threads and processes may write them
/// meanwhile: then any mix of bytes arrives, as with real hardware.
pub(crate) unsafe fn move_bytes(target: usize, source: usize, len: usize) {
    let (target, source) = (with_exposed_provenance_mut::<u8>(target), with_exposed_provenance::<u8>(source));
    // SAFETY: the caller vouches for both ranges.
    unsafe { std::ptr::copy(source, target, len) };
}

/// Sets bytes.
///
/// # Safety
/// The range is writable until this returns.
pub(crate) unsafe fn fill_bytes(target: usize, byte: u8, len: usize) {
    // SAFETY: the caller vouches for the range.
    unsafe { std::ptr::write_bytes(with_exposed_provenance_mut::<u8>(target), byte, len) };
}

/// Copies bytes into a buffer of their own.
///
/// # Safety
/// The range is readable until this returns.
pub(crate) unsafe fn copy_out(source: usize, len: usize) -> Box<[u8]> {
    let mut bytes = vec![0_u8; len].into_boxed_slice();
    // SAFETY: the caller vouches for the source; the target is this buffer.
    unsafe { move_bytes(bytes.as_mut_ptr().expose_provenance(), source, len) };
    bytes
}

/// A descriptor of its own for what a number of the caller names.
///
/// # Errors
/// `INVALID_VALUE` if it names nothing.
pub(crate) fn duplicate(number: c_int) -> Outcome<OwnedFd> {
    if number < 0 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: not -1. The caller keeps it open for the length of the call; a closed one only makes the call fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_dupfd_cloexec(borrowed, 3).map_err(|_| Code::INVALID_VALUE)
}
