//! Segments as clients map them: read-only, or writable where the node granted it. Not the node's own mapping
//! (`segment`). Invariants: a view's file cannot shrink, so no access faults; two `ExtentMut` of one view never
//! overlap, and nothing else writes where one is out.
//!
//! Holds unsafe code: slices of mapped ranges whose exclusiveness is kept here.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hetmem_core::{Checksum, StoreError};

use crate::mapping::{Access, Mapping};
use crate::ring::AheadClaim;
use crate::segment::outside;
use crate::{copy, memfd};

/// Views up to this many bytes are mapped page by page at once; beyond it that would take longer than it saves.
const PREFAULT_LEN_MAX: u64 = 2 << 30;

/// A client's read-only view of a segment.
#[derive(Debug)]
pub struct ReadMapping {
    mapping: Mapping,
}

impl ReadMapping {
    /// Maps `len_bytes` bytes of a received descriptor, which is closed: the mapping keeps the memory.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the file is shorter or not sealed against truncation;
    /// [`hetmem_core::ErrorKind::Os`] if it cannot be mapped.
    pub fn map(fd: OwnedFd, len_bytes: u64) -> Result<Self, StoreError> {
        Ok(Self { mapping: map(fd, len_bytes, Access::Read)? })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Bytes in place; `None` if any of them lies outside.
    ///
    /// The bytes stay what they are while their generation is pinned. They change under the reader only if the
    /// client that made the object scribbles over memory that it has sealed, which `seal = copy` rules out.
    #[must_use]
    #[inline]
    pub fn bytes(&self, offset: u64, len_bytes: u64) -> Option<&[u8]> {
        let (start, len) = self.mapping.range(offset, len_bytes)?;
        // SAFETY: inside the mapping, which lives as long as `self`; unchanging as the documentation says.
        Some(unsafe { std::slice::from_raw_parts(start, len) })
    }

    /// Lets go of the memory of a segment that its node has retired, so that the node's own release frees it. The
    /// addresses stay this mapping's and read as zeros from now on: nothing in the segment can be pinned any more.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the system refuses; the memory is then held until this is dropped.
    pub fn release(&self) -> Result<(), StoreError> {
        self.mapping.replace_by_zeros()
    }
}

/// A client's writable view of a segment that was granted to it.
#[derive(Debug)]
pub struct WriteMapping {
    mapping: Mapping,
    /// The parts that an `ExtentMut` or a running `fill` has to itself. Few at a time: a search is a glance.
    claimed: Mutex<Vec<Range<u64>>>,
}

impl WriteMapping {
    /// Maps `len_bytes` bytes of a received descriptor, which is closed.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the file is shorter or not sealed against truncation;
    /// [`hetmem_core::ErrorKind::Os`] if it cannot be mapped writable, as when it was closed to writers.
    pub fn map(fd: OwnedFd, len_bytes: u64) -> Result<Self, StoreError> {
        Ok(Self { mapping: map(fd, len_bytes, Access::Write)?, claimed: Mutex::default() })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Copies `bytes` in at `offset`. Several threads may fill disjoint extents at a time.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside the segment;
    /// [`hetmem_core::ErrorKind::Busy`] where an [`ExtentMut`] or another thread's fill overlaps.
    pub fn fill(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let claim = self.claim(offset, bytes.len() as u64)?;
        let _until_done = Unclaim { view: self, range: &claim.range };
        // SAFETY: the claim has checked that the range is inside the mapping, and keeps other writers away.
        unsafe { copy::to(claim.start, bytes) };
        Ok(())
    }

    /// The same, and the checksum of the bytes ([`hetmem_core::checksum::of`]).
    ///
    /// # Errors
    /// As [`WriteMapping::fill`].
    pub fn fill_with_checksum(&self, offset: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let claim = self.claim(offset, bytes.len() as u64)?;
        let _until_done = Unclaim { view: self, range: &claim.range };
        // SAFETY: as in `fill`.
        Ok(unsafe { copy::to_with_checksum(claim.start, bytes) })
    }

    /// Copies `bytes` in at `offset`, for which they were claimed in a publication ring; returns their checksum if it is
    /// wanted. Takes no lock: the claim is one.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside the segment.
    #[inline]
    pub(crate) fn fill_claimed(
        &self,
        offset: u64,
        bytes: &[u8],
        checksum: bool,
        _claim: &AheadClaim<'_>,
    ) -> Result<Checksum, StoreError> {
        let Some((target, _)) = self.mapping.range(offset, bytes.len() as u64) else {
            return Err(outside(
                "fill",
                "granted to this client",
                offset,
                bytes.len() as u64,
                self.len_bytes(),
            ));
        };
        // SAFETY: the range is inside the mapping; the claim's compare-and-swap gave it to nobody else in this
        // process, and the node grants chunks from memory that nothing else of this client is in.
        unsafe {
            if checksum {
                return Ok(Checksum::Xxh3Blocks(copy::to_with_checksum(target, bytes)));
            }
            copy::to(target, bytes);
        }
        Ok(Checksum::None)
    }

    /// Exclusive access to an extent that this client has reserved and not sealed. It owns a share of the mapping,
    /// so it may outlive everything else and go to another thread.
    ///
    /// # Errors
    /// As [`WriteMapping::fill`].
    pub fn extent_mut(self: &Arc<Self>, offset: u64, len_bytes: u64) -> Result<ExtentMut, StoreError> {
        let claim = self.claim(offset, len_bytes)?;
        Ok(ExtentMut { view: Arc::clone(self), claim })
    }

    /// Claims a range; whoever asked gives it back with `unclaim`.
    fn claim(&self, offset: u64, len_bytes: u64) -> Result<Claim, StoreError> {
        let Some((start, len)) = self.mapping.range(offset, len_bytes) else {
            return Err(outside("fill", "granted to this client", offset, len_bytes, self.len_bytes()));
        };
        let range = offset..offset + len_bytes;
        let mut claimed = self.claimed();
        if claimed.iter().any(|other| other.start < range.end && range.start < other.end) {
            return Err(StoreError::busy(
                "fill",
                format!("{len_bytes} bytes at {offset} are being written by another writer in this process"),
            ));
        }
        claimed.push(range.clone());
        Ok(Claim { start, len, range })
    }

    fn unclaim(&self, range: &Range<u64>) {
        let mut claimed = self.claimed();
        if let Some(position) = claimed.iter().position(|other| other == range) {
            claimed.swap_remove(position);
        }
    }

    fn claimed(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        // No code that can panic runs under this lock.
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range of a view that nobody else writes, and where it is.
#[derive(Debug)]
struct Claim {
    start: *mut u8,
    len: usize,
    range: Range<u64>,
}

/// Gives a range back when dropped.
struct Unclaim<'view> {
    view: &'view WriteMapping,
    range: &'view Range<u64>,
}

impl Drop for Unclaim<'_> {
    fn drop(&mut self) {
        self.view.unclaim(self.range);
    }
}

/// Exclusive access to part of a [`WriteMapping`]: derefs to `[u8]`.
///
/// Sound because the view hands a range out once at a time, the node grants a segment to one client only, and nobody
/// reads an extent before its writer has sealed it.
#[derive(Debug)]
pub struct ExtentMut {
    view: Arc<WriteMapping>,
    claim: Claim,
}

// SAFETY: the pointer leads into a mapping that the value holds a share of, and to a range that is its own.
unsafe impl Send for ExtentMut {}
// SAFETY: `&ExtentMut` gives shared access to the bytes only.
unsafe impl Sync for ExtentMut {}

impl ExtentMut {
    /// Bytes from the segment's start.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.claim.range.start
    }

    /// Copies all of `bytes` to the extent's position `at`, past the caches where that is faster, and returns the
    /// checksum of `bytes`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte lies outside the extent.
    pub fn fill_with_checksum(&mut self, at: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let len = self.claim.len as u64;
        let target = usize::try_from(at).ok().and_then(|at| self.get_mut(at..at.checked_add(bytes.len())?));
        let Some(target) = target else {
            return Err(StoreError::invalid(
                "fill",
                format!("{} bytes at {at} are not inside the reserved {len} bytes", bytes.len()),
            ));
        };
        Ok(copy::copy_with_checksum(target, bytes))
    }
}

impl Deref for ExtentMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping that `self.view` keeps; nobody else writes there.
        unsafe { std::slice::from_raw_parts(self.claim.start, self.claim.len) }
    }
}

impl DerefMut for ExtentMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.claim.start, self.claim.len) }
    }
}

impl Drop for ExtentMut {
    fn drop(&mut self) {
        self.view.unclaim(&self.claim.range);
    }
}

fn map(fd: OwnedFd, len_bytes: u64, access: Access) -> Result<Mapping, StoreError> {
    memfd::check_sealed(fd.as_fd(), "segment", len_bytes)?;
    let mapping = Mapping::new(fd.as_fd(), len_bytes, access)?;
    if len_bytes <= PREFAULT_LEN_MAX {
        mapping.prefault(access);
    }
    // The mapping keeps the memory; a client with many segments needs few descriptors.
    drop(fd);
    Ok(mapping)
}
