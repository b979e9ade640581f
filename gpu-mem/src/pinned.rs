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
    owner: Weak<dyn Any + Send + Sync>,
}

impl PinnedRanges {
    /// `len` bytes from `base` are pinned for as long as `owner` lives and has not removed them.
    pub(crate) fn insert(&self, base: usize, len: usize, owner: &Hold) {
        lock(&self.ranges).insert(base, Pinned { len, owner: Arc::downgrade(owner) });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_ranges_of_living_owners_are_pinned() {
        let ranges = PinnedRanges::default();
        let owner: Hold = Arc::new(());
        ranges.insert(100, 50, &owner);
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
        ranges.insert(0, 8, &owner);
        let hold = ranges.find(0, 8).expect("pinned");
        drop(owner);
        assert!(seen.upgrade().is_some());
        drop(hold);
        assert!(seen.upgrade().is_none());
    }
}
