//! The shared index.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use hetmem_core::{Extent, Generation, Key, ObjectId, ObjectMeta, SlotId, StoreError, Tier};

use crate::page::ClientPage;

fn unbuilt() -> StoreError {
    StoreError::unavailable("index", "not built yet")
}

/// What the index says about an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Which object of the key.
    pub object: ObjectId,
    /// What the bytes mean.
    pub meta: ObjectMeta,
    /// The extent's generation; never 0.
    pub generation: Generation,
    /// Where the bytes are; as long as `meta.len_bytes`.
    pub extent: Extent,
    /// The tier of the extent's segment.
    pub tier: Tier,
}

/// An object in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its place in the index.
    pub slot: SlotId,
    /// What the index says about it.
    pub entry: IndexEntry,
}

/// An object in the index, pinned: its extent is not reused before `ClientPage::unpin(pin)`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pin holds its extent until ClientPage::unpin"]
pub struct Pinned {
    /// Its place in the index.
    pub slot: SlotId,
    /// What the index says about it.
    pub entry: IndexEntry,
    /// The pin word that holds it.
    pub pin: u32,
}

/// The memory of an index, for registration with a fabric.
#[derive(Debug)]
pub struct IndexMemory {
    fd: OwnedFd,
}

impl IndexMemory {
    /// The memfd.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
    /// All of it, in bytes; mostly untouched.
    pub fn len_bytes(&self) -> u64 {
        0
    }
    /// The first byte of the mapping, valid while this value lives.
    pub fn base(&self) -> *mut u8 {
        std::ptr::null_mut()
    }
    /// One aligned word; `None` outside.
    pub fn load_u64(&self, offset: u64) -> Option<u64> {
        let _ = offset;
        None
    }
}

/// The node's side: the only writer.
#[derive(Debug)]
pub struct IndexWriter {
    memory: Arc<IndexMemory>,
}

impl IndexWriter {
    /// An empty index.
    ///
    /// # Errors
    /// `Os`, `Invalid`.
    pub fn create(objects_max: u32) -> Result<Self, StoreError> {
        let _ = objects_max;
        Err(unbuilt())
    }
    /// Slots.
    pub fn objects_max(&self) -> u32 {
        0
    }
    /// Its memory, to be shared with fabrics.
    pub fn memory(&self) -> Arc<IndexMemory> {
        Arc::clone(&self.memory)
    }
    /// The memfd, to be passed to clients.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.descriptor()
    }
    /// All of it, in bytes.
    pub fn len_bytes(&self) -> u64 {
        0
    }
    /// Bytes from the index's start to a slot's generation word.
    pub fn generation_offset(&self, slot: SlotId) -> u64 {
        let _ = slot;
        0
    }
    /// Shows `key` in `slot`, or moves it if it is there already.
    ///
    /// # Errors
    /// `Invalid` for a slot outside the index or in use by another key, or a generation of 0.
    pub fn publish(&mut self, slot: SlotId, key: &Key, entry: &IndexEntry) -> Result<(), StoreError> {
        let _ = (slot, key, entry);
        Err(unbuilt())
    }
    /// Takes what is in `slot` out; whether there was anything.
    pub fn withdraw(&mut self, slot: SlotId) -> bool {
        let _ = slot;
        false
    }
}

/// A client's view of the index.
#[derive(Debug)]
pub struct IndexReader {}

impl IndexReader {
    /// Maps the descriptor that came with `Welcome`.
    ///
    /// # Errors
    /// `Protocol` if it is no index of this layout.
    pub fn map(fd: OwnedFd) -> Result<Self, StoreError> {
        let _ = fd;
        Err(unbuilt())
    }
    /// Slots.
    pub fn objects_max(&self) -> u32 {
        0
    }
    /// Finds and pins. `fingerprint` is `key.fingerprint()`.
    ///
    /// # Errors
    /// `Busy` when all pin words are in use; `Corrupt` when the entry makes no sense.
    pub fn get(&self, key: &Key, fingerprint: u64, page: &ClientPage) -> Result<Option<Pinned>, StoreError> {
        let _ = (key, fingerprint, page);
        Err(unbuilt())
    }
    /// Finds without pinning.
    ///
    /// # Errors
    /// `Corrupt` when the entry makes no sense.
    pub fn find(&self, key: &Key, fingerprint: u64) -> Result<Option<Found>, StoreError> {
        let _ = (key, fingerprint);
        Err(unbuilt())
    }
}
