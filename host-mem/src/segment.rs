//! Segments as the node holds them: one allocation of host shared memory each, populated, sealed and mapped writable.
//! Not the clients' views of them (`view`), and not who may use which extent (the engine). Invariant: a segment's
//! file never changes its length, and all of it has memory, so no access inside it can fault in any process.
//!
//! Holds unsafe code: copies between raw ranges that `Mapping` has checked.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use hetmem_core::{SegmentId, StoreError, checksum};
use rustix::fs::{FallocateFlags, SealFlags, fallocate};
use rustix::io::Errno;

use crate::mapping::{Access, HUGE_PAGE_LEN, Mapping};
use crate::pages::{self, PageKind, PagePolicy};
use crate::{copy, memfd, os};

/// Who writes a segment's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentOwner {
    /// Only the node: closed to all other writers from the start.
    Node,
    /// One client besides the node, which maps it writable before [`Segment::close_to_writers`].
    Client,
}

/// One allocation of host shared memory, mapped writable in this process.
///
/// Reads and writes are plain memory accesses without locks. The engine sees to it that an extent has one writer
/// until it is sealed and none afterwards; where a client or a fabric breaks that, the bytes of that extent are
/// whatever they are, and nothing else is harmed: no reference to the memory outlives a call here.
#[derive(Debug)]
pub struct Segment {
    id: SegmentId,
    pages: PageKind,
    mapping: Mapping,
    fd: OwnedFd,
}

impl Segment {
    /// Allocates `len_bytes` bytes (a multiple of 2 MiB gets huge pages best), populates and seals them. What this
    /// costs is the clearing of the memory.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for a length of 0; [`hetmem_core::ErrorKind::Os`] when there are no
    /// descriptors or there is no memory left, with the remedy; [`hetmem_core::ErrorKind::Unavailable`] when huge
    /// pages are required and there are none.
    pub fn create(
        id: SegmentId,
        len_bytes: u64,
        owner: SegmentOwner,
        pages: PagePolicy,
    ) -> Result<Self, StoreError> {
        if len_bytes == 0 {
            return Err(StoreError::invalid("segment", "a segment has at least 1 byte, 0 were asked for"));
        }
        let segment = Self::allocate(id, len_bytes, pages)?;
        if pages == PagePolicy::Require && segment.pages == PageKind::Small {
            return Err(StoreError::unavailable(
                "huge pages",
                format!(
                    "segment {id} of {len_bytes} bytes got small pages; use multiples of {HUGE_PAGE_LEN} bytes, and \
                     see `hetmem doctor` for what this machine offers"
                ),
            ));
        }
        memfd::seal(&segment.fd, SealFlags::SHRINK | SealFlags::GROW)?;
        if owner == SegmentOwner::Node {
            segment.close_to_writers()?;
        }
        Ok(segment)
    }

    fn allocate(id: SegmentId, len_bytes: u64, pages: PagePolicy) -> Result<Self, StoreError> {
        let name = format!("hetmem-segment-{id}");
        let huge = pages != PagePolicy::Off;
        if let Some(page_bytes) = pages::reserved_for(len_bytes).filter(|_| huge) {
            // Another process may be faster; then ordinary memory does.
            if let Ok(segment) = Self::allocate_on(id, &name, len_bytes, PageKind::Huge(page_bytes), false) {
                return Ok(segment);
            }
        }
        memfd::check_available("create segment", len_bytes)?;
        let wanted = if huge { PageKind::Transparent } else { PageKind::Small };
        let mut segment = Self::allocate_on(id, &name, len_bytes, wanted, pages != PagePolicy::AtOnce)?;
        segment.pages = pages::kind_of(&segment.mapping);
        Ok(segment)
    }

    /// `collapse`: whether to ask for transparent huge pages where page faults do not give them.
    fn allocate_on(
        id: SegmentId,
        name: &str,
        len_bytes: u64,
        pages: PageKind,
        collapse: bool,
    ) -> Result<Self, StoreError> {
        let reserved = match pages {
            PageKind::Huge(page_bytes) => Some(page_bytes),
            PageKind::Transparent | PageKind::Small => None,
        };
        let fd = memfd::create(name, len_bytes, reserved)?;
        let mapping = Mapping::new(fd.as_fd(), len_bytes, Access::Write)?;
        if pages == PageKind::Transparent {
            mapping.prefer_huge();
        }
        let populated = match mapping.populate(collapse && pages == PageKind::Transparent) {
            Err(Errno::INVAL) => fallocate(&fd, FallocateFlags::empty(), 0, len_bytes),
            other => other,
        };
        populated.map_err(|errno| os::error("populate segment", errno))?;
        Ok(Self { id, pages, mapping, fd })
    }

    /// From now on nobody gets a new writable mapping, writes through the descriptor, or changes the seals; mappings
    /// that exist stay writable.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] (the kernel has no `F_SEAL_FUTURE_WRITE`: Linux 5.1 is needed).
    pub fn close_to_writers(&self) -> Result<(), StoreError> {
        match memfd::seal(&self.fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
            // Closed before.
            Err(_) if memfd::is_closed(self.fd.as_fd()) => Ok(()),
            other => other,
        }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// The pages it is on, as the kernel says.
    #[must_use]
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// To be passed to clients.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The first byte of the mapping, valid while this segment lives. For registration with a fabric or a GPU.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    fn range(&self, what: &'static str, offset: u64, len_bytes: u64) -> Result<(*mut u8, usize), StoreError> {
        self.mapping
            .range(offset, len_bytes)
            .ok_or_else(|| outside(what, self.id, offset, len_bytes, self.len_bytes()))
    }

    /// Copies `bytes` in at `offset`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside the segment.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let (target, _) = self.range("write", offset, bytes.len() as u64)?;
        // SAFETY: `bytes.len()` bytes from `target` are inside the mapping, which lives as long as `self`; `bytes` is
        // another allocation or, if it is a view of this segment, an extent that is sealed and not written any more.
        unsafe { copy::to(target, bytes) };
        Ok(())
    }

    /// The same, and the checksum of the bytes ([`hetmem_core::checksum::of`]).
    ///
    /// # Errors
    /// As [`Segment::write`].
    pub fn write_with_checksum(&self, offset: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let (target, _) = self.range("write", offset, bytes.len() as u64)?;
        // SAFETY: as in `write`.
        Ok(unsafe { copy::to_with_checksum(target, bytes) })
    }

    /// A copy of the bytes.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside the segment.
    pub fn read(&self, offset: u64, len_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let (source, len) = self.range("read", offset, len_bytes)?;
        let mut bytes = Vec::with_capacity(len);
        // SAFETY: `len` bytes from `source` are inside the mapping, and the vector has room for them.
        unsafe {
            std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), len);
            bytes.set_len(len);
        }
        Ok(bytes)
    }

    /// A copy of the bytes in memory of the caller's.
    ///
    /// # Errors
    /// As [`Segment::read`].
    pub fn read_into(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let (source, len) = self.range("read", offset, into.len() as u64)?;
        // SAFETY: `len` bytes from `source` are inside the mapping; `into` is borrowed exclusively, so it is no part
        // of the segment.
        unsafe { std::ptr::copy_nonoverlapping(source, into.as_mut_ptr(), len) };
        Ok(())
    }

    /// The checksum of bytes where they are.
    ///
    /// # Errors
    /// As [`Segment::read`].
    pub fn checksum(&self, offset: u64, len_bytes: u64) -> Result<u64, StoreError> {
        let (source, len) = self.range("checksum", offset, len_bytes)?;
        // SAFETY: inside the mapping. The bytes are sealed, or their writer spoils what it will be given itself.
        Ok(checksum::of(unsafe { std::slice::from_raw_parts(source, len) }))
    }

    /// Copies `len_bytes` bytes of another extent, which may be in this segment but must not overlap.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside either segment, or the extents overlap.
    pub fn copy_from(
        &self,
        to_offset: u64,
        from: &Self,
        from_offset: u64,
        len_bytes: u64,
    ) -> Result<(), StoreError> {
        let (target, len) = self.range("copy", to_offset, len_bytes)?;
        let (source, _) = from.range("copy", from_offset, len_bytes)?;
        if (target as usize).abs_diff(source as usize) < len {
            return Err(StoreError::invalid(
                "copy",
                format!(
                    "{len_bytes} bytes at {from_offset} and at {to_offset} of segment {} overlap",
                    self.id
                ),
            ));
        }
        // SAFETY: both ranges are inside their mappings and do not overlap.
        unsafe { copy::to(target, std::slice::from_raw_parts(source, len)) };
        Ok(())
    }

    /// One word at an offset that is a multiple of 8.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] outside the segment or at another offset.
    pub fn load_u64(&self, offset: u64) -> Result<u64, StoreError> {
        let (word, _) = self.range("load", offset, 8)?;
        if !offset.is_multiple_of(8) {
            return Err(StoreError::invalid("load", format!("offset {offset} is no multiple of 8")));
        }
        // SAFETY: eight bytes inside the mapping at an aligned address; other accesses to it are atomic or excluded.
        Ok(unsafe { AtomicU64::from_ptr(word.cast()) }.load(Ordering::Acquire))
    }
}

pub(crate) fn outside(
    what: &'static str,
    segment: impl std::fmt::Display,
    offset: u64,
    len_bytes: u64,
    has: u64,
) -> StoreError {
    StoreError::invalid(
        what,
        format!("{len_bytes} bytes at {offset} are not inside segment {segment} of {has} bytes"),
    )
}
