//! The node's side of the index. Not the decision about what is in it (the engine). Invariants: there is one writer;
//! a key is in one slot at most, which the engine sees to; a slot's generation word is 0 from its withdrawal on.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hetmem_core::{Key, SlotId, StoreError};

use crate::index::layout::{FINGERPRINT, GENERATION, SEQ};
use crate::index::memory::IndexMemory;
use crate::index::record::{self, Record};
use crate::index::table::Chains;
use crate::index::{IndexEntry, seqlock};
use crate::sync::Ordering;

/// The only writer of an index.
#[derive(Debug)]
pub struct IndexWriter {
    memory: Arc<IndexMemory>,
    chains: Chains,
    objects: u32,
}

impl IndexWriter {
    /// An empty index for up to `objects_max` objects (1 to 2^28). Its memory file is long, and nearly all of it has
    /// no memory until it is used.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for another number; [`hetmem_core::ErrorKind::Os`] when there are no
    /// descriptors or no memory left.
    pub fn create(objects_max: u32) -> Result<Self, StoreError> {
        Ok(Self {
            memory: Arc::new(IndexMemory::create(objects_max)?),
            chains: Chains::default(),
            objects: 0,
        })
    }

    /// Slots.
    #[must_use]
    pub fn objects_max(&self) -> u32 {
        self.memory.objects_max()
    }

    /// Slots that show an object.
    #[must_use]
    pub fn objects(&self) -> u32 {
        self.objects
    }

    /// Its memory, to be shared with fabrics.
    #[must_use]
    pub fn memory(&self) -> Arc<IndexMemory> {
        Arc::clone(&self.memory)
    }

    /// The memory file, to be passed to clients.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.descriptor()
    }

    /// All of it, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    /// See [`IndexMemory::generation_offset`].
    #[must_use]
    pub fn generation_offset(&self, slot: SlotId) -> u64 {
        self.memory.generation_offset(slot)
    }

    /// Shows `key` in `slot`. If it is there already, the object has moved: readers see the old place or the new one.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for a slot outside the index or one that shows another key, for generation
    /// 0, and for an extent that is not as long as the object.
    pub fn publish(&mut self, slot: SlotId, key: &Key, entry: &IndexEntry) -> Result<(), StoreError> {
        let memory = Arc::clone(&self.memory);
        let refused = |why: String| Err(StoreError::invalid("index entry", why));
        let Some(words) = memory.slot(slot.0) else {
            return refused(format!("slot {slot} of {}", memory.objects_max()));
        };
        if entry.generation.0 == 0 || entry.extent.len_bytes != entry.meta.len_bytes {
            return refused(format!(
                "{key:?}: generation {}, extent of {} bytes for an object of {}",
                entry.generation, entry.extent.len_bytes, entry.meta.len_bytes
            ));
        }
        let fingerprint = key.fingerprint();
        let used = words[GENERATION].load(Ordering::Relaxed) != 0;
        let shows = |key| {
            let mut old = Record::default();
            old.read(memory.words(), memory.geometry(), slot.0, words, key, fingerprint).is_some()
        };
        if used && !shows(key) {
            return refused(format!("{key:?}: slot {slot} shows another key"));
        }
        seqlock::write(&words[SEQ], || {
            record::write(memory.words(), memory.geometry(), slot.0, words, key, entry);
        });
        self.store_generation(slot, entry.generation.0);
        if !used {
            if !self.chains.insert(memory.table(), fingerprint, slot.0) {
                self.hide(slot);
                return refused(format!("{key:?}: no overflow bucket left"));
            }
            self.objects += 1;
        }
        Ok(())
    }

    /// Takes what is in `slot` out; whether there was anything. New readers do not find it from now on; whoever pinned
    /// it before shows up in [`crate::NodePage::pinned`] afterwards.
    pub fn withdraw(&mut self, slot: SlotId) -> bool {
        let memory = Arc::clone(&self.memory);
        let Some(words) = memory.slot(slot.0) else {
            return false;
        };
        if words[GENERATION].load(Ordering::Relaxed) == 0 {
            return false;
        }
        let fingerprint = words[FINGERPRINT].load(Ordering::Relaxed);
        self.hide(slot);
        self.chains.remove(memory.table(), fingerprint, slot.0);
        self.objects -= 1;
        true
    }

    /// The slot shows nothing, to local and to remote readers.
    fn hide(&self, slot: SlotId) {
        self.store_generation(slot, 0);
        if let Some(words) = self.memory.slot(slot.0) {
            seqlock::write(&words[SEQ], || words[GENERATION].store(0, Ordering::Relaxed));
        }
    }

    fn store_generation(&self, slot: SlotId, generation: u64) {
        let word = self.memory.geometry().generations + slot.0 as usize;
        self.memory.words()[word].store(generation, Ordering::Release);
    }
}
