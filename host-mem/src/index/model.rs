//! What loom checks: every interleaving, and every old value that the memory model lets a thread see, of a reader
//! that gets and pins against a writer that withdraws, reclaims and publishes again. The code is that of the index
//! and the pins; only the atomics, one entry per bucket, and slots of three words differ.
//!
//! Holds unsafe code: what the model checker needs in place of shared memory.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::index::layout::{GENERATION, Geometry, LINE_WORDS, SEQ};
use crate::index::seqlock;
use crate::index::slot::{self, Taken};
use crate::index::table::{Chains, Probe, Table};
use crate::pins::Pins;
use crate::sync::{AtomicU64, Ordering};

/// The third word of the model's slots: which key they show.
const KEY: usize = 2;

fn words<const N: usize>() -> [AtomicU64; N] {
    std::array::from_fn(|_| AtomicU64::new(0))
}

/// One slot, one extent, one client's pins.
struct Store {
    slot: [AtomicU64; 3],
    pins: [AtomicU64; 2],
    used: AtomicU64,
    /// The bytes: loom fails when one thread writes them while another may read.
    extent: UnsafeCell<u64>,
}

impl Store {
    fn new() -> Self {
        let store =
            Self { slot: words(), pins: words(), used: AtomicU64::new(0), extent: UnsafeCell::new(1) };
        store.show(1, 7);
        store
    }

    fn pins(&self) -> Pins<'_> {
        Pins { words: &self.pins, used: &self.used }
    }

    fn show(&self, generation: u64, key: u64) {
        seqlock::write(&self.slot[SEQ], || {
            self.slot[GENERATION].store(generation, Ordering::Relaxed);
            self.slot[KEY].store(key, Ordering::Relaxed);
        });
    }

    fn pinned(&self, generation: u64) -> bool {
        let mut found = false;
        self.pins().each(|pinned| found |= pinned == generation);
        found
    }

    /// The reader: what it has pinned is what it found, for as long as it is pinned.
    fn get(&self, key: u64) {
        let taken = slot::take(&self.slot, self.pins(), 0, |slot| {
            let generation = slot[GENERATION].load(Ordering::Relaxed);
            (slot[KEY].load(Ordering::Relaxed) == key && generation != 0).then_some(generation)
        });
        if let Taken::Pinned(position) = taken {
            let generation = self.pins[position].load(Ordering::Relaxed);
            self.extent.with(|bytes| {
                // SAFETY: the pin keeps the writer away, which is what the model checks: loom reports a conflict.
                #[allow(unsafe_code)]
                let bytes = unsafe { *bytes };
                assert_eq!(bytes, generation, "the extent of a pinned object is another object's");
            });
            self.pins().release(position);
        }
    }

    /// The writer: withdraws the object, and uses its extent again only if nobody has it pinned.
    fn replace(&self, generation: u64, next: u64, key: u64) {
        self.show(0, 0);
        if self.pinned(generation) {
            return;
        }
        self.extent.with_mut(|bytes| {
            // SAFETY: withdrawn and not pinned, so nobody reads; loom reports a conflict.
            #[allow(unsafe_code)]
            unsafe {
                *bytes = next;
            }
        });
        self.show(next, key);
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn loom_a_pinned_extent_is_not_reused() {
    check(3, || {
        let store = Arc::new(Store::new());
        let reader = thread::spawn({
            let store = Arc::clone(&store);
            move || store.get(7)
        });
        store.replace(1, 2, 7);
        reader.join().expect("the reader's checks hold");
    });
}

#[test]
fn loom_two_readers_share_pin_words() {
    check(2, || {
        let store = Arc::new(Store::new());
        let readers = [(); 2].map(|()| {
            let store = Arc::clone(&store);
            thread::spawn(move || store.get(7))
        });
        store.replace(1, 2, 7);
        for reader in readers {
            reader.join().expect("the reader's checks hold");
        }
    });
}

/// A bucket and an overflow bucket.
struct Buckets {
    geometry: Geometry,
    words: [AtomicU64; 2 * LINE_WORDS],
}

impl Buckets {
    fn new() -> Self {
        let geometry = Geometry {
            objects_max: 2,
            bucket_count: 1,
            overflow: 1,
            buckets: 0,
            overflows: LINE_WORDS,
            end: 2 * LINE_WORDS,
        };
        Self { geometry, words: words() }
    }

    fn table(&self) -> Table<'_> {
        Table { geometry: &self.geometry, words: &self.words }
    }

    fn shows(&self, slot: u32) -> Option<bool> {
        let probe = |found| {
            if found == slot { Probe::Found(()) } else { Probe::Differs }
        };
        match self.table().search(0, probe) {
            Probe::Found(()) => Some(true),
            Probe::Differs => Some(false),
            Probe::Unsteady => None,
        }
    }
}

#[test]
fn loom_an_entry_that_moves_is_not_missed() {
    check(3, || {
        let buckets = Arc::new(Buckets::new());
        let mut chains = Chains::default();
        assert!(chains.insert(buckets.table(), 0, 0) && chains.insert(buckets.table(), 0, 1));
        let reader = thread::spawn({
            let buckets = Arc::clone(&buckets);
            move || {
                // `None` is to look again, which the model need not do for ever.
                assert_ne!(buckets.shows(1), Some(false), "slot 1 is in the chain all the time");
            }
        });
        assert!(chains.remove(buckets.table(), 0, 0));
        assert!(chains.insert(buckets.table(), 0, 5));
        reader.join().expect("the reader's checks hold");
        assert_eq!(buckets.shows(1), Some(true));
        assert_eq!(buckets.shows(0), Some(false));
    });
}
