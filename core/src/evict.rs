//! Which objects go when room is needed: S3-FIFO (Yang et al., SOSP 2023), counted in bytes. Not what may go: the
//! caller's predicate knows pins, leases and hints. Invariant: an object that was inserted and neither removed nor
//! proposed as a victim is in exactly one of the two queues.
//!
//! New objects enter a small queue, a tenth of all bytes; those that were used twice before they reach its end move
//! to the main queue, the others go and leave their fingerprint in a ghost queue. Who comes back while its
//! fingerprint is there enters the main queue at once. So a scan over many objects passes through the small queue
//! without touching what is used again and again.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;

/// Uses beyond this many are not counted: two bits.
const FREQUENCY_MAX: u8 = 3;
/// An object that was used this often in the small queue moves to the main queue.
const PROMOTE_AT: u8 = 2;
/// The small queue's share is one part in this many of all bytes, and the ghost queue covers the rest.
const SMALL_PARTS: u64 = 10;
/// What an object counts for in the ghost queue at least, so that empty ones do not fill memory.
const GHOST_LEN_MIN: u64 = 64;

#[derive(Clone, Copy, Debug)]
struct Entry {
    fingerprint: u64,
    len_bytes: u64,
    /// Names the one place in a queue that is not left over from an earlier one.
    place: u64,
    /// The last sweep in which the caller refused to let it go; 0 is none.
    refused: u64,
    frequency: u8,
    in_main: bool,
}

/// Objects in the order in which they would be evicted. All operations but [`S3Fifo::victims`] take constant time,
/// spread over the calls; the order depends on the calls alone.
#[derive(Clone)]
pub struct S3Fifo<Id> {
    entries: HashMap<Id, Entry>,
    small: Fifo<Id>,
    main: Fifo<Id>,
    /// Fingerprints of what left the small queue: their place in the ghost queue and length in bytes.
    ghosts: HashMap<u64, (u64, u64)>,
    ghost: Fifo<u64>,
    last_place: u64,
    last_sweep: u64,
}

/// One call of [`S3Fifo::victims`].
#[derive(Clone, Copy, Debug)]
struct Sweep {
    number: u64,
    /// The small queue gives way while it has at least this many bytes.
    small_share_bytes: u64,
    ghost_max_bytes: u64,
    /// The main queue had nothing that may go, when last looked at.
    main_spent: bool,
}

impl<Id> Default for S3Fifo<Id> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            small: Fifo::default(),
            main: Fifo::default(),
            ghosts: HashMap::new(),
            ghost: Fifo::default(),
            last_place: 0,
            last_sweep: 0,
        }
    }
}

impl<Id> fmt::Debug for S3Fifo<Id> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Fifo")
            .field("small", &(self.small.len, self.small.bytes))
            .field("main", &(self.main.len, self.main.bytes))
            .field("ghost", &(self.ghost.len, self.ghost.bytes))
            .finish_non_exhaustive()
    }
}

impl<Id: Copy + Eq + Hash> S3Fifo<Id> {
    /// No objects.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an object of `len_bytes` bytes. `fingerprint` is what it is recognised by when it comes back under
    /// another id: that of its key. An id that is there already is taken out first.
    pub fn insert(&mut self, id: Id, fingerprint: u64, len_bytes: u64) {
        self.remove(&id);
        let in_main = self.take_ghost(fingerprint);
        let entry = Entry { fingerprint, len_bytes, place: 0, refused: 0, frequency: 0, in_main };
        self.push(id, entry, in_main);
    }

    /// Notes a use. Whether the object is here.
    pub fn touch(&mut self, id: &Id) -> bool {
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        entry.frequency = (entry.frequency + 1).min(FREQUENCY_MAX);
        true
    }

    /// Takes an object out, as when it is deleted. Its fingerprint is not remembered. Whether it was here.
    pub fn remove(&mut self, id: &Id) -> bool {
        let Some(entry) = self.entries.remove(id) else {
            return false;
        };
        let queue = if entry.in_main { &mut self.main } else { &mut self.small };
        queue.vacate(entry.len_bytes);
        queue.compact(|id, place| self.entries.get(id).is_some_and(|entry| entry.place == place));
        true
    }

    /// Whether the object is here.
    #[must_use]
    pub fn contains(&self, id: &Id) -> bool {
        self.entries.contains_key(id)
    }

    /// How many objects are here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no object is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all objects here.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.small.bytes + self.main.bytes
    }

    /// Takes out the next objects to go, in order, until they have `need_bytes` bytes together or no other may go.
    ///
    /// `evictable` is asked at most once about each object in one call; those that it refuses stay, at the young end
    /// of the main queue. The work is at most a constant (under ten steps) for each object here, whatever is
    /// refused; the counts of uses fall where the sweep passes, also if nothing can go in the end.
    pub fn victims(&mut self, need_bytes: u64, mut evictable: impl FnMut(&Id) -> bool) -> Vec<Id> {
        let total_bytes = self.bytes();
        self.last_sweep += 1;
        let mut sweep = Sweep {
            number: self.last_sweep,
            small_share_bytes: total_bytes / SMALL_PARTS,
            ghost_max_bytes: total_bytes - total_bytes / SMALL_PARTS,
            main_spent: false,
        };
        let (mut victims, mut bytes) = (Vec::new(), 0_u64);
        while bytes < need_bytes
            && let Some((id, len_bytes)) = self.next_victim(&mut sweep, &mut evictable)
        {
            victims.push(id);
            bytes = bytes.saturating_add(len_bytes);
        }
        self.trim_ghosts(sweep.ghost_max_bytes);
        victims
    }

    /// The main queue is gone over again only after the small queue is empty, which happens once in a sweep: that
    /// keeps the work linear when almost everything is refused.
    fn next_victim(
        &mut self,
        sweep: &mut Sweep,
        evictable: &mut impl FnMut(&Id) -> bool,
    ) -> Option<(Id, u64)> {
        if !sweep.main_spent {
            if self.small.bytes >= sweep.small_share_bytes
                && let Some(victim) = self.evict_small(*sweep, evictable)
            {
                return Some(victim);
            }
            if let Some(victim) = self.evict_main(*sweep, evictable) {
                return Some(victim);
            }
            sweep.main_spent = true;
        }
        self.evict_small(*sweep, evictable).or_else(|| self.evict_main(*sweep, evictable))
    }

    /// Everything that it passes leaves the small queue: an object that is in use when its turn comes has outlived
    /// its trial.
    fn evict_small(&mut self, sweep: Sweep, evictable: &mut impl FnMut(&Id) -> bool) -> Option<(Id, u64)> {
        while let Some((id, mut entry)) = self.pop(false) {
            let promoted = entry.frequency >= PROMOTE_AT;
            if !promoted && evictable(&id) {
                self.entries.remove(&id);
                self.add_ghost(entry.fingerprint, entry.len_bytes);
                return Some((id, entry.len_bytes));
            }
            if !promoted {
                entry.refused = sweep.number;
            }
            entry.frequency = 0;
            self.push(id, entry, true);
        }
        None
    }

    /// Ends when a whole turn of the queue has met nothing but refusals: every other step lowers a count of uses.
    fn evict_main(&mut self, sweep: Sweep, evictable: &mut impl FnMut(&Id) -> bool) -> Option<(Id, u64)> {
        let mut refused_in_a_row = 0;
        while refused_in_a_row < self.main.len {
            let (id, mut entry) = self.pop(true)?;
            if entry.frequency > 0 {
                entry.frequency -= 1;
                refused_in_a_row = 0;
            } else if entry.refused != sweep.number && evictable(&id) {
                self.entries.remove(&id);
                return Some((id, entry.len_bytes));
            } else {
                entry.refused = sweep.number;
                refused_in_a_row += 1;
            }
            self.push(id, entry, true);
        }
        None
    }

    /// Puts an object at the young end of a queue.
    fn push(&mut self, id: Id, mut entry: Entry, in_main: bool) {
        self.last_place += 1;
        entry.place = self.last_place;
        entry.in_main = in_main;
        self.entries.insert(id, entry);
        let queue = if in_main { &mut self.main } else { &mut self.small };
        queue.push(id, entry.place, entry.len_bytes);
    }

    /// Takes the oldest object off a queue; its entry stays for the caller to change or remove.
    fn pop(&mut self, in_main: bool) -> Option<(Id, Entry)> {
        let queue = if in_main { &mut self.main } else { &mut self.small };
        while let Some((id, place)) = queue.order.pop_front() {
            if let Some(entry) = self.entries.get(&id).filter(|entry| entry.place == place) {
                queue.vacate(entry.len_bytes);
                return Some((id, *entry));
            }
        }
        None
    }

    fn add_ghost(&mut self, fingerprint: u64, len_bytes: u64) {
        self.take_ghost(fingerprint);
        self.last_place += 1;
        let len_bytes = len_bytes.max(GHOST_LEN_MIN);
        self.ghosts.insert(fingerprint, (self.last_place, len_bytes));
        self.ghost.push(fingerprint, self.last_place, len_bytes);
    }

    fn take_ghost(&mut self, fingerprint: u64) -> bool {
        let Some((_, len_bytes)) = self.ghosts.remove(&fingerprint) else {
            return false;
        };
        self.ghost.vacate(len_bytes);
        self.ghost.compact(|print, place| self.ghosts.get(print).is_some_and(|ghost| ghost.0 == place));
        true
    }

    fn trim_ghosts(&mut self, max_bytes: u64) {
        while self.ghost.bytes > max_bytes
            && let Some((fingerprint, place)) = self.ghost.order.pop_front()
        {
            if let Some(&(current, len_bytes)) = self.ghosts.get(&fingerprint)
                && current == place
            {
                self.ghosts.remove(&fingerprint);
                self.ghost.vacate(len_bytes);
            }
        }
    }
}

/// A queue from whose middle things leave without being looked for: what no longer counts is passed over later.
#[derive(Clone)]
struct Fifo<T> {
    /// Oldest first. A pair counts if its place is the current one of what it names.
    order: VecDeque<(T, u64)>,
    /// Pairs that count, and their bytes.
    len: usize,
    bytes: u64,
}

impl<T> Default for Fifo<T> {
    fn default() -> Self {
        Self { order: VecDeque::new(), len: 0, bytes: 0 }
    }
}

impl<T> Fifo<T> {
    fn push(&mut self, item: T, place: u64, len_bytes: u64) {
        self.order.push_back((item, place));
        self.len += 1;
        self.bytes += len_bytes;
    }

    /// One item of `len_bytes` bytes does not count any more.
    fn vacate(&mut self, len_bytes: u64) {
        self.len -= 1;
        self.bytes -= len_bytes;
    }

    /// Keeps what does not count fewer than what does, so that memory follows the number of objects.
    fn compact(&mut self, counts: impl Fn(&T, u64) -> bool) {
        if self.order.len() > 2 * self.len + 64 {
            self.order.retain(|(item, place)| counts(item, *place));
        }
    }
}
