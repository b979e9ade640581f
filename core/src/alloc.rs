//! Where in a segment a new extent goes: best fit over the holes, lowest offset first among equals. Not the memory:
//! the books are outside the bytes that they hand out, so one arena serves host and GPU segments alike.
//! Invariant: the blocks, free and used, cover the arena without gap or overlap, and no two neighbours are free.
//!
//! Two orders of holes make the best fit exact at logarithmic cost although large extents have to start at a page:
//! a hole with a whole page in it is filed under the bytes it has from its first page boundary, any other under its
//! length. So a large request looks at page-aligned room only, and small ones use up the crumbs between large
//! extents before they break into a page.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::error::StoreError;

/// Every extent starts at a multiple of this: a cache line, and the widest vector load.
pub const GRANULE_LEN_MIN: u64 = 64;
/// Extents of at least this many bytes start at a multiple of it, so that they can be mapped on their own.
pub const PAGE_LEN: u64 = 4096;
/// No arena uses more bytes than this; a sum of two offsets stays far from overflow.
const CAPACITY_MAX: u64 = 1 << 62;
/// The block before the first one: no block starts here.
const NO_BLOCK: u64 = u64::MAX;

/// A hole or a used extent, filed under its offset.
#[derive(Clone, Copy, Debug)]
struct Block {
    len_bytes: u64,
    /// Offset of the block that ends where this one starts, or [`NO_BLOCK`].
    before: u64,
    is_free: bool,
}

/// Books over `capacity_bytes` bytes that are somewhere else.
///
/// With `h` holes, allocating and freeing take `O(log h)`. The books' memory grows with the number of extents that
/// are live at once (about 60 bytes each), whatever the arena's length.
#[derive(Clone, Debug)]
pub struct Arena {
    capacity_bytes: u64,
    free_bytes: u64,
    granule: u64,
    page: u64,
    blocks: HashMap<u64, Block, BuildHasherDefault<OffsetHasher>>,
    /// Holes with at least one whole page: (bytes from the first page boundary to the end, offset).
    pages: BTreeSet<(u64, u64)>,
    /// The other holes: (length in bytes, offset).
    crumbs: BTreeSet<(u64, u64)>,
}

impl Arena {
    /// Books over `len_bytes` bytes of which none are used.
    ///
    /// Extents start at multiples of `align_bytes`, which is raised to a power of two of at least
    /// [`GRANULE_LEN_MIN`]; lengths are counted in the same unit, so an odd rest of the arena stays unused.
    #[must_use]
    pub fn new(len_bytes: u64, align_bytes: u64) -> Self {
        let granule = align_bytes.clamp(GRANULE_LEN_MIN, CAPACITY_MAX).next_power_of_two();
        let capacity_bytes = len_bytes.min(CAPACITY_MAX) / granule * granule;
        let mut arena = Self {
            capacity_bytes,
            free_bytes: capacity_bytes,
            granule,
            page: granule.max(PAGE_LEN),
            blocks: HashMap::default(),
            pages: BTreeSet::new(),
            crumbs: BTreeSet::new(),
        };
        if capacity_bytes > 0 {
            arena.add_hole(0, capacity_bytes, NO_BLOCK);
        }
        arena
    }

    /// The offset of an extent of at least `len_bytes` bytes; `None` if no hole is large enough.
    ///
    /// An extent of [`PAGE_LEN`] bytes or more starts at a multiple of that. An empty one takes one granule, so that
    /// every extent has an offset of its own. It never fails while a hole has room for the extent at its alignment.
    pub fn allocate(&mut self, len_bytes: u64) -> Option<u64> {
        let len_bytes = self.counted(len_bytes)?;
        if len_bytes >= self.page {
            let &(_, hole) = self.pages.range((len_bytes, 0)..).next()?;
            let offset = hole.next_multiple_of(self.page);
            self.carve(hole, offset, len_bytes)
        } else {
            let crumb = self.crumbs.range((len_bytes, 0)..).next();
            let &(_, hole) = crumb.or_else(|| self.pages.first())?;
            self.carve(hole, hole, len_bytes)
        }
    }

    /// Takes back the extent at `offset` and returns the bytes that this freed: its length in whole granules.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if no used extent starts there, as after it was freed already. Nothing changes.
    pub fn free(&mut self, offset: u64) -> Result<u64, StoreError> {
        let Some(&block) = self.blocks.get(&offset).filter(|block| !block.is_free) else {
            return Err(StoreError::invalid(
                "offset to free",
                format!("no extent in use starts at {offset}: it was freed before, or never allocated"),
            ));
        };
        let (mut start, mut len_bytes, mut before) = (offset, block.len_bytes, block.before);
        if let Some(hole) = self.unfile_hole(before) {
            self.blocks.remove(&offset);
            start = before;
            len_bytes += hole.len_bytes;
            before = hole.before;
        }
        let end = offset + block.len_bytes;
        if let Some(hole) = self.unfile_hole(end) {
            self.blocks.remove(&end);
            len_bytes += hole.len_bytes;
        }
        self.add_hole(start, len_bytes, before);
        self.free_bytes += block.len_bytes;
        Ok(block.len_bytes)
    }

    /// Makes two extents of the one at `offset`: the first keeps `len_bytes` bytes, the second starts where it ends.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if no used extent starts there, or `len_bytes` is no whole number of granules, 0,
    /// or not less than the extent has. Nothing changes.
    pub fn split(&mut self, offset: u64, len_bytes: u64) -> Result<(), StoreError> {
        let wrong = |why: String| StoreError::invalid("extent to split", why);
        let Some(&block) = self.blocks.get(&offset).filter(|block| !block.is_free) else {
            return Err(wrong(format!("no extent in use starts at {offset}")));
        };
        if len_bytes == 0 || len_bytes >= block.len_bytes || !len_bytes.is_multiple_of(self.granule) {
            return Err(wrong(format!(
                "{len_bytes} bytes are no part of the {} at {offset}, in granules of {}",
                block.len_bytes, self.granule
            )));
        }
        let middle = offset + len_bytes;
        self.blocks.insert(offset, Block { len_bytes, ..block });
        let rest = block.len_bytes - len_bytes;
        self.blocks.insert(middle, Block { len_bytes: rest, before: offset, is_free: false });
        self.set_before(middle + rest, middle);
        Ok(())
    }

    /// All bytes, free and used.
    #[must_use]
    pub const fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Free bytes, not necessarily in one piece.
    #[must_use]
    pub const fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes in extents, each counted in whole granules.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        self.capacity_bytes - self.free_bytes
    }

    /// The longest extent, in bytes, that [`Arena::allocate`] would find room for now.
    #[must_use]
    pub fn largest_free_bytes(&self) -> u64 {
        if let Some(&(usable, _)) = self.pages.last() {
            return usable;
        }
        // A crumb can be longer than this, but then what fits into it has to start at a page, which it has not.
        let longest = self.page - self.granule;
        self.crumbs.last().map_or(0, |&(len_bytes, _)| len_bytes.min(longest))
    }

    /// One minus the longest extent that can be had over all free bytes: 0 is one hole, near 1 is crumbs. 0 if full.
    #[must_use]
    pub fn fragmentation(&self) -> f64 {
        if self.free_bytes == 0 {
            return 0.0;
        }
        1.0 - self.largest_free_bytes() as f64 / self.free_bytes as f64
    }

    /// Whether no extent is in use.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.free_bytes == self.capacity_bytes
    }

    /// What an extent of `len_bytes` bytes takes, in whole granules; `None` if the arena never had that much.
    fn counted(&self, len_bytes: u64) -> Option<u64> {
        let len_bytes = len_bytes.max(1).checked_next_multiple_of(self.granule)?;
        (len_bytes <= self.free_bytes).then_some(len_bytes)
    }

    /// Makes `len_bytes` bytes at `offset` inside the hole a used extent; what is left of the hole on either side
    /// stays free.
    fn carve(&mut self, hole: u64, offset: u64, len_bytes: u64) -> Option<u64> {
        let Block { len_bytes: hole_len, mut before, .. } = self.unfile_hole(hole)?;
        let (end, hole_end) = (offset + len_bytes, hole + hole_len);
        debug_assert!(hole <= offset && end <= hole_end);
        if hole < offset {
            self.add_hole(hole, offset - hole, before);
            before = hole;
        }
        self.blocks.insert(offset, Block { len_bytes, before, is_free: false });
        if end < hole_end {
            self.add_hole(end, hole_end - end, offset);
        } else {
            self.set_before(end, offset);
        }
        self.free_bytes -= len_bytes;
        Some(offset)
    }

    /// Takes the hole that starts at `offset` out of the order of holes; its block stays for the caller to replace or
    /// remove. `None` if what starts there is no hole.
    fn unfile_hole(&mut self, offset: u64) -> Option<Block> {
        let hole = *self.blocks.get(&offset).filter(|block| block.is_free)?;
        match self.usable(offset, hole.len_bytes) {
            usable if usable >= self.page => self.pages.remove(&(usable, offset)),
            _ => self.crumbs.remove(&(hole.len_bytes, offset)),
        };
        Some(hole)
    }

    fn add_hole(&mut self, offset: u64, len_bytes: u64, before: u64) {
        self.blocks.insert(offset, Block { len_bytes, before, is_free: true });
        self.set_before(offset + len_bytes, offset);
        match self.usable(offset, len_bytes) {
            usable if usable >= self.page => self.pages.insert((usable, offset)),
            _ => self.crumbs.insert((len_bytes, offset)),
        };
    }

    /// Bytes from the first page boundary in the hole to its end.
    const fn usable(&self, offset: u64, len_bytes: u64) -> u64 {
        (offset + len_bytes).saturating_sub(offset.next_multiple_of(self.page))
    }

    fn set_before(&mut self, offset: u64, before: u64) {
        if let Some(block) = self.blocks.get_mut(&offset) {
            block.before = before;
        }
    }
}

/// Offsets are chosen here, not by an adversary: one multiplication spreads them, and the rotation brings its well
/// mixed high bits to where the table takes its index from (all low bits of an offset are zero).
#[derive(Clone, Copy, Debug, Default)]
struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn empty_and_impossible_requests() {
        let mut arena = Arena::new(4096, 64);
        let first = arena.allocate(0).expect("an empty extent");
        let second = arena.allocate(0).expect("another");
        assert_ne!(first, second);
        assert_eq!(arena.used_bytes(), 128);
        for len_bytes in [4096, u64::MAX, u64::MAX - 64] {
            assert_eq!(arena.allocate(len_bytes), None);
        }
        assert_eq!(arena.free(first), Ok(64));
        assert_eq!(arena.free(second), Ok(64));
        assert!(arena.is_empty());
        assert_eq!(arena.allocate(4096), Some(0));
        assert_eq!((arena.largest_free_bytes(), arena.fragmentation()), (0, 0.0));
        assert_eq!(arena.allocate(0), None);
    }

    #[test]
    fn freeing_what_is_not_used_is_an_error() {
        let mut arena = Arena::new(1 << 20, 64);
        let offset = arena.allocate(100).expect("room");
        for wrong in [offset + 64, offset + 1, 1 << 20, NO_BLOCK] {
            let error = arena.free(wrong).expect_err("not an extent");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(&wrong.to_string()), "{error}");
        }
        assert_eq!(arena.free(offset), Ok(128));
        assert!(arena.free(offset).is_err(), "freed twice");
        assert!(arena.is_empty());
    }

    #[test]
    fn odd_arenas() {
        for (len_bytes, align_bytes, capacity_bytes) in [
            (0, 64, 0),
            (63, 64, 0),
            (1000, 0, 960),
            (1000, 3, 960),
            (1 << 22, 1 << 21, 1 << 22),
            (1 << 44, 64, 1 << 44),
            (u64::MAX, 64, CAPACITY_MAX),
            (u64::MAX, u64::MAX, CAPACITY_MAX),
        ] {
            let mut arena = Arena::new(len_bytes, align_bytes);
            assert_eq!(arena.capacity_bytes(), capacity_bytes);
            assert_eq!(arena.free_bytes(), capacity_bytes);
            assert_eq!(arena.allocate(1).is_some(), capacity_bytes > 0);
        }
    }

    /// A long-lived large extent does not go to the end of the arena while an earlier hole is as good.
    #[test]
    fn small_extents_fill_crumbs_and_the_end_stays_free() {
        let mut arena = Arena::new(1 << 30, 64);
        let small = arena.allocate(100).expect("room");
        let large = arena.allocate(1 << 20).expect("room");
        assert_eq!((small, large), (0, PAGE_LEN));
        // The crumb between them takes small ones; the next large one follows the first.
        assert_eq!(arena.allocate(200), Some(128));
        assert_eq!(arena.allocate(1 << 20), Some(PAGE_LEN + (1 << 20)));
        arena.free(large).expect("in use");
        assert_eq!(arena.allocate(PAGE_LEN), Some(large));
        assert_eq!(arena.largest_free_bytes(), (1 << 30) - PAGE_LEN - (2 << 20));
    }

    /// A hole longer than a page in which no page begins takes small extents only.
    #[test]
    fn the_largest_free_length_can_be_had() {
        let mut arena = Arena::new(2 * PAGE_LEN, 64);
        let offsets: Vec<u64> = (0..128).map(|_| arena.allocate(64).expect("room")).collect();
        for offset in &offsets[1..127] {
            arena.free(*offset).expect("in use");
        }
        assert_eq!(arena.free_bytes(), 2 * PAGE_LEN - 128);
        assert_eq!(arena.largest_free_bytes(), PAGE_LEN - 64);
        assert_eq!(arena.allocate(PAGE_LEN - 63), None);
        assert_eq!(arena.allocate(PAGE_LEN - 64), Some(64));
    }
}
