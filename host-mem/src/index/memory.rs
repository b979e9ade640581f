//! The memory of an index: one sparse memory file, mapped writable by the node. Not its use (`writer`). Invariant: the
//! file has the length that its header's `objects_max` asks for, and only the node can write it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hetmem_core::{SlotId, StoreError};
use rustix::fs::SealFlags;

use crate::index::layout::{Geometry, SLOT_WORDS};
use crate::index::table::Table;
use crate::mapping::{Access, Mapping};
use crate::memfd;
use crate::sync::{AtomicU64, Ordering};

/// The memory of an index, for registration with a fabric. `Send` and `Sync`; lives as long as anybody holds it.
#[derive(Debug)]
pub struct IndexMemory {
    geometry: Geometry,
    mapping: Mapping,
    fd: OwnedFd,
}

impl IndexMemory {
    pub(crate) fn create(objects_max: u32) -> Result<Self, StoreError> {
        let geometry = Geometry::new(objects_max)?;
        let len_bytes = geometry.end as u64 * 8;
        let fd = memfd::create("hetmem-index", len_bytes, None)?;
        let mapping = Mapping::new(fd.as_fd(), len_bytes, Access::Write)?;
        // One page now, so that a system without memory says so here; the rest when it is used.
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, 4096)
            .map_err(|errno| crate::os::error("create index", errno))?;
        memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
        for (word, value) in mapping.words().iter().zip(geometry.header()) {
            word.store(value, Ordering::Relaxed);
        }
        Ok(Self { geometry, mapping, fd })
    }

    /// The memory file.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// All of it, in bytes. Memory is taken only for what is used.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// The first byte of the mapping, valid while this value lives.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// Slots.
    #[must_use]
    pub fn objects_max(&self) -> u32 {
        self.geometry.objects_max
    }

    /// Bytes from the index's start to a slot's generation word: the 8 bytes that a remote reader looks at. The word
    /// is the generation of the extent that the slot shows, or 0.
    #[must_use]
    pub fn generation_offset(&self, slot: SlotId) -> u64 {
        (self.geometry.generations as u64 + u64::from(slot.0)) * 8
    }

    /// Where all generation words are, dense and by slot: offset and length in bytes. Enough for a fabric to
    /// register, and all that it should: registering the whole index would take memory for all of it.
    #[must_use]
    pub fn generations(&self) -> (u64, u64) {
        (self.geometry.generations as u64 * 8, u64::from(self.geometry.objects_max) * 8)
    }

    /// One word at an offset that is a multiple of 8; `None` elsewhere or outside.
    #[must_use]
    pub fn load_u64(&self, offset: u64) -> Option<u64> {
        let word = usize::try_from(offset / 8).ok().filter(|_| offset.is_multiple_of(8))?;
        Some(self.mapping.words().get(word)?.load(Ordering::Acquire))
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    pub(crate) fn table(&self) -> Table<'_> {
        Table { geometry: &self.geometry, words: self.words() }
    }

    pub(crate) fn slot(&self, slot: u32) -> Option<&[AtomicU64]> {
        self.words().get(self.geometry.slot_at(slot)?..)?.get(..SLOT_WORDS)
    }
}
