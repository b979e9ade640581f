//! Host memory that the driver knows: allocated here, or registered. Not device memory. Invariant: ranges do not overlap,
//! and one that is taken out was waited for by whoever takes it.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::code::{Code, Outcome};
use crate::raw::{PAGE, Pages};

#[derive(Debug, Default)]
pub(crate) struct Pinned(Mutex<BTreeMap<usize, Range>>);

#[derive(Debug)]
struct Range {
    len: usize,
    /// The ordinal of the context's device.
    device: usize,
    read_only: bool,
    /// The memory itself, where it was allocated here.
    pages: Option<Pages>,
}

/// How a range of host memory lies to those that are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Pageable,
    /// All of it in one pinned range.
    Pinned {
        start: usize,
        len: usize,
        device: usize,
        read_only: bool,
    },
    /// It begins in a pinned range and leaves it.
    Straddling,
}

impl Pinned {
    fn ranges(&self) -> MutexGuard<'_, BTreeMap<usize, Range>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates host memory; gives its address.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub(crate) fn allocate(&self, device: usize, len: usize) -> Outcome<usize> {
        let pages = Pages::anonymous(len)?;
        let address = pages.address();
        self.ranges().insert(address, Range { len, device, read_only: false, pages: Some(pages) });
        Ok(address)
    }

    /// # Errors
    /// `HOST_MEMORY_ALREADY_REGISTERED` if some of it is known, `INVALID_VALUE` if this process cannot access it so.
    pub(crate) fn register(&self, device: usize, address: usize, len: usize, read_only: bool) -> Outcome {
        let end = address.checked_add(len).ok_or(Code::INVALID_VALUE)?;
        let mut ranges = self.ranges();
        let before = ranges.range(..end).next_back();
        if before.is_some_and(|(start, range)| start + range.len > address) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        let maps = fs::read_to_string("/proc/self/maps").map_err(|_| Code::OPERATING_SYSTEM)?;
        if !is_mapped(&maps, address / PAGE * PAGE, end.next_multiple_of(PAGE), !read_only) {
            return Err(Code::INVALID_VALUE);
        }
        ranges.insert(address, Range { len, device, read_only, pages: None });
        Ok(())
    }

    /// Whether a range begins here that was allocated, or registered; none if no range begins here.
    pub(crate) fn is_allocated(&self, address: usize) -> Option<bool> {
        self.ranges().get(&address).map(|range| range.pages.is_some())
    }

    /// Forgets the range that begins here, and frees it if it was allocated.
    pub(crate) fn remove(&self, address: usize) {
        self.ranges().remove(&address);
    }

    pub(crate) fn remove_all_of(&self, device: usize) {
        self.ranges().retain(|_, range| range.device != device);
    }

    pub(crate) fn standing(&self, address: usize, len: usize) -> Standing {
        let ranges = self.ranges();
        match ranges.range(..=address).next_back() {
            Some((&start, range)) if address < start + range.len => {
                if address.checked_add(len).is_some_and(|end| end <= start + range.len) {
                    let &Range { len, device, read_only, .. } = range;
                    Standing::Pinned { start, len, device, read_only }
                } else {
                    Standing::Straddling
                }
            }
            _ => Standing::Pageable,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.ranges().len()
    }
}

/// Whether all of a range is mapped readable, and writable if that is asked for. `maps` is what /proc/self/maps says.
fn is_mapped(maps: &str, start: usize, end: usize, writable: bool) -> bool {
    let mut reached = start;
    for line in maps.lines() {
        let mut words = line.split(' ');
        let Some((low, high)) = words.next().and_then(|range| range.split_once('-')) else { continue };
        let (low, high) = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16));
        let (Ok(low), Ok(high), Some(rights)) = (low, high, words.next()) else { continue };
        if high <= reached {
            continue;
        }
        let is_accessible = rights.starts_with('r') && (!writable || rights.get(1..2) == Some("w"));
        if reached >= end || low > reached || !is_accessible {
            break;
        }
        reached = high;
    }
    reached >= end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_looked_for_across_lines() {
        let maps = "1000-3000 rw-p 0\n3000-4000 r--p 0\n6000-7000 ---p 0\n";
        assert!(is_mapped(maps, 0x1000, 0x3000, true));
        assert!(is_mapped(maps, 0x2000, 0x4000, false));
        assert!(!is_mapped(maps, 0x2000, 0x4000, true));
        assert!(!is_mapped(maps, 0x3000, 0x5000, false));
        assert!(!is_mapped(maps, 0x6000, 0x7000, false));
        assert!(!is_mapped(maps, 0x8000, 0x9000, false));
        assert!(!is_mapped("", 0x1000, 0x2000, false));
    }

    #[test]
    fn ranges_do_not_overlap() {
        let (pinned, memory) = (Pinned::default(), vec![0_u8; 8 * PAGE]);
        let start = memory.as_ptr().addr();
        assert_eq!(pinned.register(0, start, 2 * PAGE, false), Ok(()));
        let overlapping = pinned.register(0, start + PAGE, 2 * PAGE, false);
        assert_eq!(overlapping, Err(Code::HOST_MEMORY_ALREADY_REGISTERED));
        assert_eq!(pinned.standing(start + 2 * PAGE - 1, 2), Standing::Straddling);
        assert_eq!(pinned.standing(start + 2 * PAGE, 1), Standing::Pageable);
        pinned.remove(start);
        assert_eq!(pinned.count(), 0);
    }
}
