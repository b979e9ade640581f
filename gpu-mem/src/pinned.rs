//! Which host memory is pinned for GPUs, and what keeps it so. Not the pinning (`host`). Invariant: an entry is there
//! only while its owner is pinned, and whoever finds one holds the owner, so that memory stays pinned while a copy of
//! it is under way.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use crate::gpus::lock;

/// What keeps memory pinned while it is held.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;

/// Pinned ranges of this process, by first address.
#[derive(Debug, Default)]
pub(crate) struct PinnedRanges {
    ranges: Mutex<BTreeMap<usize, Pinned>>,
}

#[derive(Debug)]
struct Pinned {
    len: usize,
    /// Registered so that devices may only read it.
    read_only: bool,
    /// Where kernels of a device, by ordinal, find its first byte: asked once. None: they do not.
    addresses: BTreeMap<u16, Option<u64>>,
    owner: Weak<dyn Any + Send + Sync>,
}

/// Pinned memory as kernels see it.
pub(crate) struct Mapped {
    /// The first byte that was asked for.
    pub(crate) address: u64,
    /// How many bytes from there on are of the same range.
    pub(crate) rest: usize,
    /// Whether kernels may not write it.
    pub(crate) read_only: bool,
    pub(crate) hold: Hold,
}

impl PinnedRanges {
    /// `len` bytes from `base` are pinned for as long as `owner` lives and has not removed them.
    pub(crate) fn insert(&self, base: usize, len: usize, read_only: bool, owner: &Hold) {
        let owner = Arc::downgrade(owner);
        lock(&self.ranges).insert(base, Pinned { len, read_only, addresses: BTreeMap::new(), owner });
    }

    /// The owner that goes takes its range away, before it unpins.
    pub(crate) fn remove(&self, base: usize) {
        let mut ranges = lock(&self.ranges);
        // A range that was pinned anew at this address meanwhile has a living owner.
        if ranges.get(&base).is_some_and(|pinned| pinned.owner.strong_count() == 0) {
            ranges.remove(&base);
        }
    }

    /// What keeps all of these bytes pinned, if they are.
    pub(crate) fn find(&self, base: usize, len: usize) -> Option<Hold> {
        let ranges = lock(&self.ranges);
        let (start, pinned) = ranges.range(..=base).next_back()?;
        let end = base.checked_add(len)?;
        (end <= start.checked_add(pinned.len)?).then(|| pinned.owner.upgrade()).flatten()
    }
}

impl PinnedRanges {
    /// Where kernels of a device find these bytes, if all of them are pinned. `ask` asks the driver where they find the
    /// first byte of a pinned range.
    pub(crate) fn find_mapped(
        &self,
        base: usize,
        len: usize,
        ordinal: u16,
        ask: impl FnOnce(usize) -> Option<u64>,
    ) -> Option<Mapped> {
        let end = base.checked_add(len)?;
        let mut ranges = lock(&self.ranges);
        let (start, pinned) = ranges.range_mut(..=base).next_back()?;
        let range_end = start.checked_add(pinned.len)?;
        if end > range_end {
            return None;
        }
        // Held before the driver is asked, so that it is still pinned then.
        let hold = pinned.owner.upgrade()?;
        let first = *pinned.addresses.entry(ordinal).or_insert_with(|| ask(*start));
        let address = first?.checked_add((base - start) as u64)?;
        Some(Mapped { address, rest: range_end - base, read_only: pinned.read_only, hold })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_ranges_of_living_owners_are_pinned() {
        let ranges = PinnedRanges::default();
        let owner: Hold = Arc::new(());
        ranges.insert(100, 50, false, &owner);
        for (base, len, pinned) in
            [(100, 50, true), (120, 30, true), (120, 31, false), (99, 2, false), (150, 1, false)]
        {
            assert_eq!(ranges.find(base, len).is_some(), pinned, "{len} bytes at {base}");
        }
        assert!(ranges.find(usize::MAX, 2).is_none());
        ranges.remove(100);
        assert!(ranges.find(100, 50).is_some(), "its owner lives");
        drop(owner);
        assert!(ranges.find(100, 50).is_none());
        ranges.remove(100);
        assert!(lock(&ranges.ranges).is_empty());
    }

    #[test]
    fn who_finds_a_range_holds_its_owner() {
        let ranges = PinnedRanges::default();
        let owner: Hold = Arc::new(());
        let seen = Arc::downgrade(&owner);
        ranges.insert(0, 8, false, &owner);
        let hold = ranges.find(0, 8).expect("pinned");
        drop(owner);
        assert!(seen.upgrade().is_some());
        drop(hold);
        assert!(seen.upgrade().is_none());
    }

    #[test]
    fn a_device_is_asked_once_where_it_finds_a_range() {
        let ranges = PinnedRanges::default();
        let owner: Hold = Arc::new(());
        ranges.insert(100, 50, true, &owner);
        let found = ranges.find_mapped(110, 40, 0, |start| Some(start as u64 + 1000)).expect("pinned");
        assert_eq!((found.address, found.rest, found.read_only), (1110, 40, true));
        drop(found);
        let found = ranges.find_mapped(101, 1, 0, |_| panic!("asked twice")).expect("pinned");
        assert_eq!(found.address, 1101);
        assert!(ranges.find_mapped(110, 41, 0, |_| Some(0)).is_none(), "not all of it is pinned");
        assert!(ranges.find_mapped(100, 1, 1, |_| None).is_none(), "another device does not reach it");
        drop((found, owner));
        assert!(ranges.find_mapped(100, 1, 0, |_| Some(0)).is_none());
    }
}
