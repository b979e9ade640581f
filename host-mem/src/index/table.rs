//! The hash table of the index: buckets of one cache line, chained through a pool of overflow buckets. Not the slots
//! (`slot`). Invariants: an entry stays in its cell for as long as its key is present, except that in a chain with
//! overflow buckets a removal moves the chain's last entry into the hole, under the chain's version; so all buckets
//! of a chain but the last are full, and overflow buckets are never more than a seventh of the objects.

use crate::index::layout::{CELLS, Geometry, LINE_WORDS, LINK};
use crate::sync::{AtomicU64, Ordering, fence};

/// The high half of a chain's first link word counts its moves; odd while one is going on.
const VERSION_ONE: u64 = 1 << 32;
const LINK_MASK: u64 = VERSION_ONE - 1;

/// What a look at one slot gave.
pub(crate) enum Probe<T> {
    /// The key is here.
    Found(T),
    /// Another key is here.
    Differs,
    /// The slot changed meanwhile.
    Unsteady,
}

/// The buckets of an index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'memory> {
    pub(crate) geometry: &'memory Geometry,
    pub(crate) words: &'memory [AtomicU64],
}

impl<'memory> Table<'memory> {
    fn line(self, at: usize) -> &'memory [AtomicU64] {
        &self.words[at..at + LINE_WORDS]
    }

    #[inline]
    fn head(self, fingerprint: u64) -> &'memory [AtomicU64] {
        self.line(self.geometry.bucket_at(fingerprint))
    }

    /// The overflow bucket behind a link word; `None` at the end of the chain or for a link that leads nowhere.
    #[inline]
    fn next(self, link: u64) -> Option<&'memory [AtomicU64]> {
        let number = (link & LINK_MASK).checked_sub(1)?;
        Some(self.line(self.geometry.overflow_at(number)?))
    }

    /// Looks for a key by its fingerprint; `probe` says whether it is the one in a slot. [`Probe::Differs`] means
    /// that the key was absent at some moment since the call.
    #[inline]
    pub(crate) fn search<T>(self, fingerprint: u64, mut probe: impl FnMut(u32) -> Probe<T>) -> Probe<T> {
        let head = self.head(fingerprint);
        let version = head[LINK].load(Ordering::Relaxed) / VERSION_ONE;
        fence(Ordering::Acquire);
        let mut line = head;
        // A chain that is cut apart under our feet could lead in circles.
        for _ in 0..=self.geometry.overflow_count() {
            let cells: [u64; CELLS] = std::array::from_fn(|cell| line[cell].load(Ordering::Relaxed));
            let link = line[LINK].load(Ordering::Relaxed);
            // An entry that was seen makes its slot visible, and the second look at the version comes last.
            fence(Ordering::Acquire);
            for cell in cells {
                if cell >> 32 != fingerprint >> 32 || cell & LINK_MASK == 0 {
                    continue;
                }
                match probe(slot_of(cell)) {
                    Probe::Differs => {}
                    done => return done,
                }
            }
            match self.next(link) {
                Some(next) => line = next,
                None => break,
            }
        }
        let now = head[LINK].load(Ordering::Relaxed) / VERSION_ONE;
        if version == now && version & 1 == 0 { Probe::Differs } else { Probe::Unsteady }
    }
}

fn entry(fingerprint: u64, slot: u32) -> u64 {
    (fingerprint & !LINK_MASK) | (u64::from(slot) + 1)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half of the entry")]
fn slot_of(entry: u64) -> u32 {
    (entry as u32).wrapping_sub(1)
}

/// The writer's books about the overflow pool. They are outside the shared memory: readers need none of it.
#[derive(Debug, Default)]
pub(crate) struct Chains {
    free: Vec<u64>,
    /// Buckets of the pool below this number have been used.
    touched: u64,
}

impl Chains {
    /// Adds an entry; `false` if the pool has no bucket left, which the geometry rules out.
    pub(crate) fn insert(&mut self, table: Table<'_>, fingerprint: u64, slot: u32) -> bool {
        let mut line = table.head(fingerprint);
        loop {
            if let Some(cell) = line[..CELLS].iter().find(|cell| cell.load(Ordering::Relaxed) == 0) {
                cell.store(entry(fingerprint, slot), Ordering::Release);
                return true;
            }
            match table.next(line[LINK].load(Ordering::Relaxed)) {
                Some(next) => line = next,
                None => break,
            }
        }
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.touched < table.geometry.overflow_count() => {
                self.touched += 1;
                self.touched - 1
            }
            None => return false,
        };
        let Some(fresh) = table.next(number + 1) else {
            return false;
        };
        fresh[0].store(entry(fingerprint, slot), Ordering::Relaxed);
        let version = line[LINK].load(Ordering::Relaxed) & !LINK_MASK;
        line[LINK].store(version | (number + 1), Ordering::Release);
        true
    }

    /// Takes an entry out; whether it was there.
    pub(crate) fn remove(&mut self, table: Table<'_>, fingerprint: u64, slot: u32) -> bool {
        let wanted = entry(fingerprint, slot);
        let head = table.head(fingerprint);
        let (mut line, mut before, mut hole) = (head, None, None);
        loop {
            if hole.is_none() {
                hole = line[..CELLS].iter().find(|cell| cell.load(Ordering::Relaxed) == wanted);
            }
            match table.next(line[LINK].load(Ordering::Relaxed)) {
                Some(next) => (line, before) = (next, Some(line)),
                None => break,
            }
        }
        let Some(hole) = hole else { return false };
        let Some(before) = before else {
            hole.store(0, Ordering::Release);
            return true;
        };
        self.fill_hole(head, before, line, hole);
        true
    }

    /// Moves the last entry of a chain into `hole`, and frees the last bucket if that leaves it empty. A reader that
    /// passed the hole before and the last bucket afterwards sees another version and looks again.
    fn fill_hole(&mut self, head: &[AtomicU64], before: &[AtomicU64], last: &[AtomicU64], hole: &AtomicU64) {
        let odd = head[LINK].load(Ordering::Relaxed) + VERSION_ONE;
        head[LINK].store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        let used = last[..CELLS].iter().rposition(|cell| cell.load(Ordering::Relaxed) != 0);
        if let Some(used) = used {
            let moved = last[used].load(Ordering::Relaxed);
            // The same cell if the hole is the last entry: the second store wins.
            hole.store(moved, Ordering::Release);
            last[used].store(0, Ordering::Release);
        }
        if used.is_none_or(|used| used == 0) {
            let link = before[LINK].load(Ordering::Relaxed);
            self.free.extend((link & LINK_MASK).checked_sub(1));
            before[LINK].store(link & !LINK_MASK, Ordering::Relaxed);
        }
        let even = head[LINK].load(Ordering::Relaxed).wrapping_add(VERSION_ONE);
        head[LINK].store(even, Ordering::Release);
    }
}
