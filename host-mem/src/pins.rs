//! Pin words: where a reader says which generation it holds in place. Not the page they lie in (`page`), and not the
//! decision about what to reclaim. Invariant: a word goes from 0 to a generation by one compare-and-swap, which both
//! claims the word and publishes the pin, and back to 0 by one store; no holder can be killed in between.

use crate::sync::{AtomicU64, Ordering, fence};

/// The pin words of one client, as both sides see them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pins<'page> {
    /// One generation each, or 0.
    pub(crate) words: &'page [AtomicU64],
    /// Words from this position on have never been used. Never goes down; spares the node the scan of the rest.
    pub(crate) used: &'page AtomicU64,
}

impl Pins<'_> {
    /// Claims the first free word from `start` on for `generation` (not 0). The caller fences and then checks that
    /// what it wanted to pin was still there.
    #[inline]
    pub(crate) fn claim(self, generation: u64, start: usize) -> Option<usize> {
        let count = self.words.len();
        let start = if start < count { start } else { 0 };
        (start..count).chain(0..start).find(|position| self.claim_at(generation, *position))
    }

    #[inline]
    fn claim_at(self, generation: u64, position: usize) -> bool {
        let word = &self.words[position];
        if word.load(Ordering::Relaxed) != 0 {
            return false;
        }
        // Before the claim: a scan that sees this pin must also see that the word is in use.
        if self.used.load(Ordering::Relaxed) <= position as u64 {
            self.used.fetch_max(position as u64 + 1, Ordering::Relaxed);
        }
        word.compare_exchange(0, generation, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Gives a word back. What the holder read before is read before.
    #[inline]
    pub(crate) fn release(self, position: usize) {
        if let Some(word) = self.words.get(position) {
            word.store(0, Ordering::Release);
        }
    }

    /// Every pinned generation.
    ///
    /// Starts with a full fence. A reader pins, fences, and looks at the slot again; the node withdraws, fences, and
    /// looks at the pins: one of the two sees the other. So a generation that was withdrawn before this call and is
    /// not among the results is pinned by nobody and never will be.
    pub(crate) fn each(self, mut pinned: impl FnMut(u64)) {
        fence(Ordering::SeqCst);
        let used = self.used.load(Ordering::Relaxed);
        let used = usize::try_from(used).map_or(self.words.len(), |used| used.min(self.words.len()));
        for word in &self.words[..used] {
            let generation = word.load(Ordering::Relaxed);
            if generation != 0 {
                pinned(generation);
            }
        }
        // Pairs with `release`: the holder's reads came before what the caller does with the extent.
        fence(Ordering::Acquire);
    }
}
