//! Books by numbers that this engine gives out itself, one after the other. Not for numbers that others choose: who
//! knows the hash could make all of theirs meet. Invariant: nothing depends on the order of the table, since what is
//! listed is sorted.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Numbers that were given out one after the other are looked for one after the other too: blocks of [`BLOCK`] stay
/// together, so that their entries share cache lines, and one multiplication spreads the blocks.
#[derive(Clone, Copy, Default)]
struct NumberHasher(u64);

/// Bits of a number within its block.
const BLOCK: u32 = 6;

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = self.0.rotate_left(29) ^ value;
    }

    fn finish(&self) -> u64 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        // A table takes its index from the low bits, and from the high ones a tag that tells entries of an index apart.
        let block = (self.0 >> BLOCK).wrapping_mul(GOLDEN).rotate_left(26) << BLOCK;
        let tag = self.0.wrapping_mul(GOLDEN) & (0x7f << 57);
        (block ^ tag) | (self.0 & ((1 << BLOCK) - 1))
    }
}

/// Values by number.
pub(super) struct Numbered<K, V>(HashMap<K, V, BuildHasherDefault<NumberHasher>>);

impl<K, V> Default for Numbered<K, V> {
    fn default() -> Self {
        Self(HashMap::default())
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Numbered<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<K: Copy + Hash + Ord, V> Numbered<K, V> {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get(&self, number: K) -> Option<&V> {
        self.0.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: K) -> Option<&mut V> {
        self.0.get_mut(&number)
    }

    pub(super) fn contains(&self, number: K) -> bool {
        self.0.contains_key(&number)
    }

    pub(super) fn insert(&mut self, number: K, value: V) {
        self.0.insert(number, value);
    }

    pub(super) fn remove(&mut self, number: K) -> Option<V> {
        self.0.remove(&number)
    }

    /// Whether any value is like this.
    pub(super) fn any(&self, like: impl FnMut(&V) -> bool) -> bool {
        self.0.values().any(like)
    }

    pub(super) fn sum(&self, of: impl FnMut(&V) -> usize) -> usize {
        self.0.values().map(of).sum()
    }

    /// The numbers of all values that are like this, rising.
    pub(super) fn numbers(&self, mut like: impl FnMut(&V) -> bool) -> Vec<K> {
        let mut numbers: Vec<K> =
            self.0.iter().filter(|(_, value)| like(value)).map(|(&number, _)| number).collect();
        numbers.sort_unstable();
        numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::Generation;

    #[test]
    fn what_is_listed_is_in_order() {
        let mut numbers = Numbered::default();
        for number in (0..1_000_u64).rev() {
            numbers.insert(Generation(number), number * 2);
        }
        for number in 0..500 {
            assert_eq!(numbers.remove(Generation(number * 2)), Some(number * 4));
        }
        let odd: Vec<Generation> = (0..500).map(|number| Generation(number * 2 + 1)).collect();
        assert_eq!((numbers.numbers(|_| true), numbers.len()), (odd, 500));
        assert_eq!(numbers.numbers(|value| *value < 10), [1, 3].map(Generation));
        assert!(numbers.any(|value| *value == 1_998) && !numbers.any(|value| *value == 4));
    }
}
