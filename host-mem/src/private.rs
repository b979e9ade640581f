//! Private views of a segment: writable memory that begins with the segment's bytes and keeps what is written to itself.
//! Not shared memory (`view`): a write copies the page it falls on, for this view alone. Invariant: a view's addresses
//! are its own from `map` to `drop`, and lie inside a file that cannot shrink.
//!
//! Holds unsafe code: mapping and unmapping.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use hetmem_core::StoreError;
use rustix::fs::fstatfs;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{memfd, os};

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS: i128 = 0x9584_58f6;

/// A part of a segment, copied page by page as it is written.
///
/// Pages that were not written show what the segment holds: whoever has the view keeps the object pinned.
#[derive(Debug)]
pub struct PrivateView {
    base: NonNull<u8>,
    mapped_len: usize,
    /// Of the first byte asked for, from `base`.
    start: usize,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, until `drop`; the view hands out its address only.
unsafe impl Send for PrivateView {}
// SAFETY: as above.
unsafe impl Sync for PrivateView {}

impl PrivateView {
    /// Maps `len_bytes` bytes (not 0) at `offset` of a segment's descriptor. None where the segment is on reserved huge
    /// pages: a written page would need another one of them, and the process would be killed where there is none.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the file is shorter or not sealed against truncation;
    /// [`hetmem_core::ErrorKind::Os`] if it cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<Option<Self>, StoreError> {
        let outside = || StoreError::protocol(format!("{len_bytes} bytes at {offset} cannot be mapped"));
        let end = offset.checked_add(len_bytes).ok_or_else(outside)?;
        memfd::check_sealed(fd, "segment", end)?;
        let kind = fstatfs(fd).map_err(|errno| os::error("look at shared memory", errno))?;
        if len_bytes == 0 || i128::from(kind.f_type) == HUGETLBFS {
            return Ok(None);
        }
        let page = rustix::param::page_size() as u64;
        let first = offset / page * page;
        let length = |bytes: u64| usize::try_from(bytes).map_err(|_| outside());
        let (mapped_len, start, len) = (length(end - first)?, length(offset - first)?, length(len_bytes)?);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            mmap(ptr::null_mut(), mapped_len, rights, MapFlags::PRIVATE | MapFlags::NORESERVE, fd, first)
        };
        let base = base.map_err(|errno| os::error("map shared memory privately", errno))?;
        let base = NonNull::new(base.cast())
            .ok_or_else(|| StoreError::os("map shared memory privately", "the kernel chose address 0"))?;
        Ok(Some(Self { base, mapped_len, start, len }))
    }

    /// The first byte; valid for reads and writes of `len_bytes` while `self` lives.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.base.as_ptr().wrapping_add(self.start)
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len
    }
}

impl Drop for PrivateView {
    fn drop(&mut self) {
        // SAFETY: these addresses were mapped by `map` and belong to `self`; whoever used them had borrowed or held it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.mapped_len) };
    }
}

#[cfg(test)]
mod tests {
    use hetmem_core::SegmentId;

    use super::*;
    use crate::{PagePolicy, ReadMapping, Segment, SegmentOwner};

    #[test]
    fn what_is_written_stays_in_its_own_view() {
        let segment =
            Segment::create(SegmentId(1), 2 << 20, SegmentOwner::Node, PagePolicy::Off).expect("memory");
        let (offset, bytes) = (5_000, [7_u8; 9_000]);
        segment.write(offset, &bytes).expect("inside");
        let shared =
            ReadMapping::map(segment.descriptor().try_clone_to_owned().expect("a descriptor"), 2 << 20);
        let shared = shared.expect("mapped");
        let view = |at, len| {
            PrivateView::map(segment.descriptor(), at, len).map(|view| view.expect("no huge pages"))
        };
        let (one, other) = (view(offset, 9_000).expect("mapped"), view(offset, 9_000).expect("mapped"));
        // SAFETY: the view lives to the end of this test and has 9,000 bytes.
        unsafe { ptr::write_bytes(one.address(), 1, 4_500) };
        // SAFETY: as above.
        let (one, other) = unsafe {
            (
                std::slice::from_raw_parts(one.address(), 9_000),
                std::slice::from_raw_parts(other.address(), 9_000),
            )
        };
        assert!(one[..4_500].iter().all(|byte| *byte == 1) && one[4_500..].iter().all(|byte| *byte == 7));
        assert_eq!(other, bytes);
        assert_eq!(shared.bytes(offset, 9_000), Some(&bytes[..]));
        assert!(view(2 << 20, 1).is_err() && view(u64::MAX, 2).is_err(), "outside of the file");
    }
}
