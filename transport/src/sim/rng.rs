//! The only source of chance in the simulation. Not for secrets. Invariant: the same seed gives the same numbers on
//! every machine, for ever (a failing seed must stay replayable).

/// SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in `low..=high`.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low);
        if span == u64::MAX { self.next() } else { low + self.next() % (span + 1) }
    }

    /// True `parts` times in a million.
    pub(super) fn chance(&mut self, parts: u32) -> bool {
        self.next() % 1_000_000 < u64::from(parts)
    }

    /// An index into something of `len` elements, at least one.
    pub(super) fn index(&mut self, len: usize) -> usize {
        let len = len.max(1) as u64;
        usize::try_from(self.next() % len).unwrap_or(0)
    }
}
