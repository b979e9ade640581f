//! The shared index: a table in shared memory that only the node writes and every client reads in place.
//! Not the objects' bytes (`segment`) and not the pins (`page`). Invariant: a reader never misses a key that is in the
//! index for the whole of its lookup, and never returns words that did not belong together.

pub(crate) mod layout;
pub(crate) mod seqlock;
pub(crate) mod slot;
pub(crate) mod table;

#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod reader;
#[cfg(not(loom))]
mod record;
#[cfg(not(loom))]
mod writer;

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(not(loom))]
pub use self::{entry::*, memory::IndexMemory, reader::IndexReader, writer::IndexWriter};

#[cfg(not(loom))]
mod entry {
    use hetmem_core::{Extent, Generation, ObjectId, ObjectMeta, SlotId, Tier};

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

    /// An object in the index, pinned: its extent is not reused before [`crate::ClientPage::unpin`].
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
}
