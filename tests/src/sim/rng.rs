//! The only source of chance in the simulated cluster. Not for secrets. Invariant: the same seed gives the same
//! numbers on every machine, so that a failing seed stays replayable.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

/// One step of SplitMix64's output function: every bit of the input reaches every bit of the output.
pub(super) const fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Rng {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        let number = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        number
    }

    /// A number in `low..=high`.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high.saturating_sub(low).saturating_add(1)).max(1)
    }

    /// True in `percent` of a hundred cases.
    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// An index into something of `len` elements, at least one.
    pub(super) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.next() % (len.max(1) as u64)).unwrap_or(0)
    }

    /// One of these values.
    pub(super) fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.index(values.len())]
    }

    /// One of these values, each as often as its weight says.
    pub(super) fn weighted<T: Copy>(&mut self, values: &[(u64, T)]) -> T {
        let total: u64 = values.iter().map(|(weight, _)| weight).sum();
        let mut at = self.next() % total.max(1);
        for &(weight, value) in values {
            if at < weight {
                return value;
            }
            at -= weight;
        }
        values[0].1
    }
}
