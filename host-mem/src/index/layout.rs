//! The byte layout of the index: where its parts are and how long. Not what goes on in them. Invariant: everything
//! follows from `objects_max`, so two processes that agree on it and on the version agree on every offset
//! (docs/shared-memory.md).

#[cfg(not(loom))]
use hetmem_core::{KEY_LEN_MAX, StoreError};

/// "HETMIDX1" read as text.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"HETMIDX1");
/// Goes up with every change of the layout.
pub(crate) const VERSION: u64 = 1;
/// The most objects an index can be made for.
pub(crate) const OBJECTS_MAX: u32 = 1 << 28;

/// Words in a cache line.
#[cfg(not(loom))]
pub(crate) const LINE_WORDS: usize = 8;
/// Entries in a bucket.
#[cfg(not(loom))]
pub(crate) const CELLS: usize = 7;
/// One entry per bucket lets the model checker reach overflow chains with two keys.
#[cfg(loom)]
pub(crate) const CELLS: usize = 1;
#[cfg(loom)]
pub(crate) const LINE_WORDS: usize = 2;
/// The position of a bucket's link.
pub(crate) const LINK: usize = CELLS;

/// The header's word that names a thread of the node while it runs.
#[cfg(not(loom))]
pub(crate) const ALIVE: usize = 64;

// Positions of a slot's words.
pub(crate) const SEQ: usize = 0;
pub(crate) const GENERATION: usize = 1;

#[cfg(not(loom))]
pub(crate) use slot_words::*;

#[cfg(not(loom))]
mod slot_words {
    /// Words in a slot: three cache lines.
    pub(crate) const SLOT_WORDS: usize = 24;
    pub(crate) const FINGERPRINT: usize = 2;
    pub(crate) const OFFSET: usize = 3;
    pub(crate) const LEN_BYTES: usize = 4;
    /// Segment (low half) and tier code (high half).
    pub(crate) const PLACE: usize = 5;
    /// Key length (16 bits), dtype (8), dimensions (8), checksum algorithm (8), from the low end.
    pub(crate) const HEAD: usize = 6;
    pub(crate) const CHECKSUM: usize = 7;
    pub(crate) const ORIGIN: usize = 8;
    pub(crate) const EPOCH: usize = 9;
    pub(crate) const NUMBER: usize = 10;
    /// Dimensions, then the key if it fits.
    pub(crate) const TAIL: usize = 11;
    pub(crate) const TAIL_WORDS: usize = SLOT_WORDS - TAIL;
}

/// Words set aside for a key that does not fit into its slot.
#[cfg(not(loom))]
pub(crate) const LONG_KEY_WORDS: usize = KEY_LEN_MAX / 8;

/// Where the parts of an index are, in words from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) objects_max: u32,
    /// A power of two.
    pub(crate) bucket_count: usize,
    pub(crate) overflow: u64,
    pub(crate) buckets: usize,
    pub(crate) overflows: usize,
    #[cfg(not(loom))]
    pub(crate) generations: usize,
    #[cfg(not(loom))]
    pub(crate) slots: usize,
    #[cfg(not(loom))]
    pub(crate) long_keys: usize,
    /// All words.
    pub(crate) end: usize,
}

impl Geometry {
    /// Where the bucket of a fingerprint starts.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "only the low bits count")]
    pub(crate) fn bucket_at(&self, fingerprint: u64) -> usize {
        self.buckets + (fingerprint as usize & (self.bucket_count - 1)) * LINE_WORDS
    }

    /// Where an overflow bucket starts, if there is one of this number.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "below the number of overflow buckets")]
    pub(crate) fn overflow_at(&self, number: u64) -> Option<usize> {
        (number < self.overflow).then(|| self.overflows + number as usize * LINE_WORDS)
    }

    pub(crate) fn overflow_count(&self) -> u64 {
        self.overflow
    }
}

#[cfg(not(loom))]
impl Geometry {
    /// The layout for this many objects.
    pub(crate) fn new(objects_max: u32) -> Result<Self, StoreError> {
        if objects_max == 0 || objects_max > OBJECTS_MAX {
            return Err(StoreError::invalid(
                "objects_max",
                format!("an index has room for 1 to {OBJECTS_MAX} objects, {objects_max} were asked for"),
            ));
        }
        const PAGE_WORDS: usize = 512;
        let objects = objects_max as usize;
        let bucket_count = objects.div_ceil(4).next_power_of_two();
        // In a chain of n objects with overflow, (n - 7) / 7 rounded up is at most n / 7.
        let overflow = objects / CELLS;
        let mut end = PAGE_WORDS;
        let mut part = |words: usize| {
            let start = end;
            end = (start + words).next_multiple_of(PAGE_WORDS);
            start
        };
        Ok(Self {
            objects_max,
            bucket_count,
            overflow: overflow as u64,
            buckets: part(bucket_count * LINE_WORDS),
            overflows: part(overflow * LINE_WORDS),
            generations: part(objects),
            slots: part(objects * SLOT_WORDS),
            long_keys: part(objects * LONG_KEY_WORDS),
            end,
        })
    }

    /// The header's words: what a reader compares with its own reckoning.
    pub(crate) fn header(&self) -> [u64; 10] {
        let bytes = |words: usize| words as u64 * 8;
        [
            MAGIC,
            VERSION,
            u64::from(self.objects_max),
            self.bucket_count as u64,
            self.overflow,
            bytes(self.buckets),
            bytes(self.overflows),
            bytes(self.generations),
            bytes(self.slots),
            bytes(self.long_keys),
        ]
    }

    /// Where a slot starts, if there is one of this number.
    #[inline]
    pub(crate) fn slot_at(&self, slot: u32) -> Option<usize> {
        (slot < self.objects_max).then(|| self.slots + slot as usize * SLOT_WORDS)
    }

    /// Where the long key of a slot starts. The slot exists.
    pub(crate) fn long_key_at(&self, slot: u32) -> usize {
        self.long_keys + slot as usize * LONG_KEY_WORDS
    }
}
