//! Mappings of memory files. Not the files (`memfd`), and not what the bytes mean. Invariant: a `Mapping` owns its
//! addresses from `new` to `drop`, all of them lie inside a file that cannot shrink, and every access is checked
//! against its length. Other processes may change the bytes at any time.
//!
//! Holds unsafe code: mapping, advising and unmapping, and the views of what is mapped.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use hetmem_core::StoreError;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::os;

/// The size and alignment of the huge pages that matter here.
pub(crate) const HUGE_PAGE_LEN: usize = 2 << 20;
/// One thread populates this much at a time.
const POPULATE_LEN: usize = 32 << 20;

/// Linux 6.1; the same on every architecture.
const MADV_COLLAPSE: libc::c_int = 25;

/// What this process does with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// A shared mapping of a whole memory file.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, until `drop`; all access goes through raw pointers,
// atomics, or borrows whose exclusiveness the callers in `segment` establish.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len_bytes` bytes (not 0) of a file that was checked to have them and not to shrink.
    /// Aligned so that huge pages can be mapped as such.
    pub(crate) fn new(fd: BorrowedFd<'_>, len_bytes: u64, access: Access) -> Result<Self, StoreError> {
        let len = usize::try_from(len_bytes)
            .ok()
            .filter(|len| *len > 0 && *len < usize::MAX / 4)
            .ok_or_else(|| StoreError::invalid("mapping", format!("{len_bytes} bytes cannot be mapped")))?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        let failed = |errno| os::error("map shared memory", errno);
        if len < HUGE_PAGE_LEN {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
            let base = unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, fd, 0) };
            return Self::own(base.map_err(failed)?, len);
        }
        // 1 GiB is the alignment of the largest huge pages; address space is not scarce.
        let align = if len >= 1 << 30 { 1 << 30 } else { HUGE_PAGE_LEN };
        let whole = len.next_multiple_of(HUGE_PAGE_LEN);
        let reserved = whole + align;
        // SAFETY: as above; nothing is accessible in the reservation.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                reserved,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let start = start.map_err(failed)?.cast::<u8>();
        let before = start.align_offset(align);
        let aligned = start.wrapping_add(before);
        // SAFETY: `aligned..aligned + len` lies in the reservation made above, which nobody else knows.
        let mapped =
            unsafe { mmap(aligned.cast(), len, protection, MapFlags::SHARED | MapFlags::FIXED, fd, 0) };
        // SAFETY: what is left of the reservation on either side belongs to this function and holds nothing.
        unsafe {
            if before > 0 {
                let _ = munmap(start.cast(), before);
            }
            let (after, end) = (aligned.wrapping_add(whole), start.wrapping_add(reserved));
            if end > after {
                let _ = munmap(after.cast(), end as usize - after as usize);
            }
            if mapped.is_err() {
                let _ = munmap(aligned.cast(), whole);
            }
        }
        Self::own(mapped.map_err(failed)?, len)
    }

    fn own(base: *mut c_void, len: usize) -> Result<Self, StoreError> {
        let base = NonNull::new(base.cast())
            .ok_or_else(|| StoreError::os("map shared memory", "the kernel chose address 0"))?;
        Ok(Self { base, len })
    }

    /// The first byte; valid while `self` lives.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first of `len_bytes` bytes at `offset`, if all of them are inside.
    #[inline]
    pub(crate) fn range(&self, offset: u64, len_bytes: u64) -> Option<(*mut u8, usize)> {
        let end = offset.checked_add(len_bytes)?;
        let (offset, end) = (usize::try_from(offset).ok()?, usize::try_from(end).ok()?);
        // SAFETY: `offset <= end <= self.len`, so the result points into the mapping or one past its end.
        (end <= self.len).then(|| (unsafe { self.base().add(offset) }, end - offset))
    }

    /// The whole mapping as atomic words; readers of a read-only mapping use relaxed loads only.
    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn words(&self) -> &[std::sync::atomic::AtomicU64] {
        // SAFETY: the base is page-aligned, the length is inside the mapping, and `AtomicU64` allows any bytes and
        // any concurrent change; nothing in this crate accesses these mappings other than through atomics.
        unsafe { std::slice::from_raw_parts(self.base().cast(), self.len / 8) }
    }

    /// Makes all pages present, on huge pages where `huge` asks for it and the kernel has some.
    ///
    /// Huge pages come in two ways. Where the kernel gives them to page faults in shared memory, the first touch of
    /// each 2 MiB is enough. Where it does not (`shmem_enabled` is `never`, the default), it still collapses 2 MiB
    /// on request (`MADV_COLLAPSE`, Linux 6.1) if at least one of their pages exists; so one page of each is touched
    /// and then the collapse asked for, which costs no more than populating small pages.
    ///
    /// `INVAL` means that the kernel is too old to do it (before Linux 5.14).
    pub(crate) fn populate(&self, huge: bool) -> Result<(), Errno> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
        let parts: Vec<(usize, usize)> = (0..self.len)
            .step_by(POPULATE_LEN)
            .map(|start| (start, POPULATE_LEN.min(self.len - start)))
            .collect();
        let threads = threads.min(parts.len().div_ceil(2)).max(1);
        if threads == 1 {
            return parts.iter().try_for_each(|(start, len)| self.populate_part(*start, *len, huge));
        }
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            while let Some((start, len)) = parts.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
            {
                self.populate_part(*start, *len, huge)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            others
                .into_iter()
                .fold(mine, |result, other| result.and(other.join().unwrap_or(Err(Errno::FAULT))))
        })
    }

    fn populate_part(&self, start: usize, len: usize, huge: bool) -> Result<(), Errno> {
        let base = self.base().wrapping_add(start);
        if huge {
            for at in (0..len).step_by(HUGE_PAGE_LEN).filter(|at| at + HUGE_PAGE_LEN <= len) {
                // SAFETY: inside the mapping; populating does not change what the bytes are.
                let first =
                    unsafe { madvise(base.wrapping_add(at).cast(), 4096, Advice::LinuxPopulateWrite) };
                if first.is_err() {
                    break;
                }
            }
            // SAFETY: inside the mapping; a collapse keeps the bytes. That it can fail is no error: small pages do.
            let _ = unsafe { libc::madvise(base.cast(), len, MADV_COLLAPSE) };
        }
        // SAFETY: as above.
        unsafe { madvise(base.cast(), len, Advice::LinuxPopulateWrite) }
    }

    /// Asks for huge pages in page faults from now on; a kernel without them ignores it.
    pub(crate) fn prefer_huge(&self) {
        // SAFETY: inside the mapping; the advice changes no bytes.
        let _ = unsafe { madvise(self.base().cast(), self.len, Advice::LinuxHugepage) };
    }

    /// Puts untouched anonymous memory, readable as zeros, in the file's place.
    pub(crate) fn replace_by_zeros(&self) -> Result<(), StoreError> {
        // SAFETY: these addresses belong to `self` until `drop`, and stay mapped and readable. That their bytes
        // change is what every mapping in this crate allows at any time.
        let replaced = unsafe {
            rustix::mm::mmap_anonymous(
                self.base().cast(),
                self.len,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )
        };
        replaced.map(|_| ()).map_err(|errno| os::error("release a retired segment", errno))
    }

    /// Maps pages that exist already into this process, so that the first access does not fault. Best effort.
    pub(crate) fn prefault(&self, access: Access) {
        let advice = match access {
            Access::Read => Advice::LinuxPopulateRead,
            Access::Write => Advice::LinuxPopulateWrite,
        };
        // SAFETY: inside the mapping; populating changes no bytes.
        let _ = unsafe { madvise(self.base().cast(), self.len, advice) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A long mapping has the rest of its last 2 MiB too: huge pages are unmapped as a whole, and where there are
        // none that rest is still reserved.
        let whole = match self.len {
            len if len < HUGE_PAGE_LEN => len,
            len => len.next_multiple_of(HUGE_PAGE_LEN),
        };
        // SAFETY: these addresses were mapped by `new` and belong to `self`; borrows of them ended before `drop`.
        let _ = unsafe { munmap(self.base().cast(), whole) };
    }
}
