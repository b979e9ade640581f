//! What loom checks of the publication ring: producers that claim, write and fill against a node that drains, and
//! closes. The code is that of the ring; only the atomics, two places, and records of one word differ.
//!
//! Holds unsafe code: what the model checker needs in place of shared memory.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::ring::claim::{Claimed, Limits, Refused, Ring};
use crate::sync::AtomicU64;

const PLACES: usize = 2;
const GRANULES: usize = 3;

struct Memory {
    word: AtomicU64,
    slots: [AtomicU64; PLACES],
    /// A chunk's granules: loom fails when one thread writes them while another may read or write.
    granules: [UnsafeCell<u64>; GRANULES],
    /// Which granule a record speaks of, written before it is filled.
    records: [UnsafeCell<usize>; PLACES],
}

impl Memory {
    fn new() -> Self {
        let memory = Self {
            word: AtomicU64::new(0),
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
            granules: std::array::from_fn(|_| UnsafeCell::new(0)),
            records: std::array::from_fn(|_| UnsafeCell::new(0)),
        };
        memory.ring().reset();
        memory.ring().open(1);
        memory
    }

    fn ring(&self) -> Ring<'_> {
        Ring { word: &self.word, slots: &self.slots, stride: 1 }
    }

    /// A producer: whether its put has returned.
    fn put(&self, value: u64) -> bool {
        let limits = Limits { chunk: 1, granules: GRANULES as u64, first: 0, claims: 9 };
        let claimed = match self.ring().claim(&limits, 1, 1) {
            Ok(claimed) => claimed,
            Err(Refused::Closed | Refused::Full | Refused::Exhausted) => return false,
        };
        let Claimed { position, granule } = claimed;
        let granule = usize::try_from(granule).expect("few");
        self.granules[granule].with_mut(|bytes| {
            // SAFETY: claimed by this thread alone, which is what the model checks: loom reports a conflict.
            #[allow(unsafe_code)]
            unsafe {
                *bytes = value;
            }
        });
        self.records[usize::try_from(position).expect("few") % PLACES].with_mut(|record| {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            unsafe {
                *record = granule;
            }
        });
        self.ring().fill(position);
        true
    }

    /// The node: takes what is there from `tail` on, in order.
    fn drain(&self, tail: &mut u64, taken: &mut Vec<u64>) {
        let head = self.ring().state().position;
        while *tail < head && self.ring().is_filled(*tail) {
            let granule = self.records[usize::try_from(*tail).expect("few") % PLACES].with(|record| {
                // SAFETY: filled and not drained, so no producer writes; loom reports a conflict.
                #[allow(unsafe_code)]
                unsafe {
                    *record
                }
            });
            let value = self.granules[granule].with(|bytes| {
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    *bytes
                }
            });
            taken.push(value);
            self.ring().drained(*tail);
            *tail += 1;
        }
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn loom_every_put_that_returns_is_drained_once() {
    check(2, || {
        let memory = Arc::new(Memory::new());
        let producers = [7, 8].map(|value| {
            let memory = Arc::clone(&memory);
            thread::spawn(move || (value, memory.put(value)))
        });
        let (mut tail, mut taken) = (0, Vec::new());
        memory.drain(&mut tail, &mut taken);
        let put: Vec<u64> = producers
            .into_iter()
            .map(|producer| producer.join().expect("the producer's checks hold"))
            .filter_map(|(value, put)| put.then_some(value))
            .collect();
        assert_eq!(put.len(), 2, "there is room for both");
        memory.drain(&mut tail, &mut taken);
        taken.sort_unstable();
        assert_eq!(taken, put);
    });
}

#[test]
fn loom_a_place_is_used_again_after_it_was_drained() {
    check(3, || {
        let memory = Arc::new(Memory::new());
        assert!(memory.put(1) && memory.put(2));
        let producer = thread::spawn({
            let memory = Arc::clone(&memory);
            move || memory.put(3)
        });
        let (mut tail, mut taken) = (0, Vec::new());
        memory.drain(&mut tail, &mut taken);
        let put = producer.join().expect("the producer's checks hold");
        memory.drain(&mut tail, &mut taken);
        assert_eq!(taken, if put { vec![1, 2, 3] } else { vec![1, 2] });
    });
}

#[test]
fn loom_nothing_is_claimed_once_the_ring_is_closed() {
    check(3, || {
        let memory = Arc::new(Memory::new());
        let producer = thread::spawn({
            let memory = Arc::clone(&memory);
            move || memory.put(5)
        });
        let closed = memory.ring().close();
        // What was not claimed by then is the node's, at once.
        for granule in usize::try_from(closed.granules).expect("few")..GRANULES {
            memory.granules[granule].with_mut(|bytes| {
                // SAFETY: nobody has claimed it or will; loom reports a conflict.
                #[allow(unsafe_code)]
                unsafe {
                    *bytes = 99;
                }
            });
        }
        let put = producer.join().expect("the producer's checks hold");
        assert_eq!(put, closed.position == 1);
        let (mut tail, mut taken) = (0, Vec::new());
        memory.drain(&mut tail, &mut taken);
        assert_eq!(taken, if put { vec![5] } else { vec![] });
    });
}
