//! Where generation words of peers land: one slot of a small registered region per word under way. Not what they mean
//! (the engine). Invariant: a slot is given to one read at a time, from before the fabric is asked until it has said
//! that the read is over, so a word is loaded from it after its last byte and before the next one's first.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hetmem_core::{Extent, SegmentId, StoreError, TransferId};
use parking_lot::Mutex;

use crate::memory::WordsRegion;

/// The number under which the slots are registered: the engine counts its segments from 1, and the index is 0.
pub(crate) const WORDS_SEGMENT: SegmentId = SegmentId(u32::MAX);
/// Words that may be under way at once. Beyond that a get asks its peer, which is always right.
const WORDS_MAX: usize = 4096;
const WORD_LEN: u64 = 8;

pub(crate) struct Words {
    region: Arc<WordsRegion>,
    slots: Mutex<Slots>,
}

struct Slots {
    free: Vec<usize>,
    used: HashMap<TransferId, usize>,
}

impl Default for Words {
    fn default() -> Self {
        let words = (0..WORDS_MAX).map(|_| AtomicU64::new(0)).collect();
        let slots = Slots { free: (0..WORDS_MAX).rev().collect(), used: HashMap::new() };
        Self { region: Arc::new(WordsRegion(words)), slots: Mutex::new(slots) }
    }
}

impl Words {
    /// The memory, to be registered under [`WORDS_SEGMENT`] for local use.
    pub(crate) fn region(&self) -> Arc<WordsRegion> {
        Arc::clone(&self.region)
    }

    /// Where a word may land.
    ///
    /// # Errors
    /// `Busy` if every slot waits for a word.
    pub(crate) fn begin(&self, transfer: TransferId) -> Result<Extent, StoreError> {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.free.pop() else {
            return Err(StoreError::busy("read a generation", format!("{WORDS_MAX} are being read")));
        };
        slots.used.insert(transfer, slot);
        Ok(Extent { segment: WORDS_SEGMENT, offset: slot as u64 * WORD_LEN, len_bytes: WORD_LEN })
    }

    /// A read is over. If it was one of a word, that word (of no meaning if the read failed).
    pub(crate) fn finish(&self, transfer: TransferId) -> Option<u64> {
        let mut slots = self.slots.lock();
        let slot = slots.used.remove(&transfer)?;
        slots.free.push(slot);
        // Loaded before the lock is released: from then on the slot may be another read's.
        Some(self.region.0[slot].load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_one_reads_at_a_time() {
        let words = Words::default();
        let first = words.begin(TransferId(1)).expect("a slot");
        let second = words.begin(TransferId(2)).expect("a slot");
        assert_ne!(first.offset, second.offset);
        words.region.0[usize::try_from(second.offset / 8).expect("small")].store(7, Ordering::Release);
        assert_eq!(words.finish(TransferId(2)), Some(7));
        assert_eq!(words.finish(TransferId(2)), None, "it is over");
        assert_eq!(words.finish(TransferId(3)), None, "it is no read of a word");
        for transfer in 3..u64::try_from(WORDS_MAX).expect("small") + 2 {
            words.begin(TransferId(transfer)).expect("a slot");
        }
        assert!(words.begin(TransferId(9_999)).is_err(), "every slot is in use");
        assert!(words.finish(TransferId(1)).is_some());
        assert_eq!(words.begin(TransferId(9_999)).expect("a slot"), first);
    }
}
