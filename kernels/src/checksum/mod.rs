//! The object checksum as a GPU computes it: a warp of 32 threads per block of 16 KiB, four threads for each of the eight
//! accumulators. [`parts`] is what a launch is made of.
//!
//! Not the definition, which is `hetmem_core::checksum`. Invariant: [`of`] equals `hetmem_core::checksum::of` for
//! every input.
//!
//! A thread never reads another one's accumulator: what a neighbour contributes are input words, which it reads itself.
//! Between two scrambles what stripes add is added in any order, so four threads share the stripes of a round and join
//! their sums before it is scrambled. The blocks of an object have no contact at all. The root over the block values
//! (8 bytes per 16 KiB) is left to the host.

pub mod parts;
mod short;
mod words;

use hetmem_core::checksum::{BLOCK_LEN, Root};

use words::{PRIME32_1, PRIME32_2, PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME64_5};
use words::{SECRET, avalanche, fold, read_u64};

/// The kernel's entry.
pub const CHECKSUM: &str = "hetmem_checksum";
/// Accumulators of a block.
pub const LANES: usize = 8;
/// Bytes that all lanes take in together: one 64-bit word each.
pub const STRIPE_LEN: usize = 8 * LANES;
/// Stripes between two scrambles: the secret moves by 8 bytes per stripe until its end is reached.
const STRIPES_PER_ROUND: usize = (SECRET.len() - STRIPE_LEN) / 8;
/// Threads that share an accumulator, and so the stripes of a round: every fourth is one thread's.
const SHARERS: usize = 4;
/// Where the secret is read for the last stripe and for the merge; odd, so that no earlier key comes again.
const SECRET_LAST: usize = SECRET.len() - STRIPE_LEN - 7;
const SECRET_MERGE: usize = 11;
/// The longest input that XXH3 does not treat in stripes.
const SHORT_LEN_MAX: usize = 240;

/// Where each lane starts.
const START: [u64; LANES] =
    [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];

/// The checksum of `bytes`: equal to `hetmem_core::checksum::of`.
#[must_use]
pub fn of(bytes: &[u8]) -> u64 {
    let mut root = Root::new(bytes.len() as u64);
    for part in bytes.chunks(BLOCK_LEN) {
        root.add(block(part));
    }
    root.finish()
}

/// The values of the blocks of `bytes`, in order: what the kernel's grid writes, for the host to make the root of.
#[must_use]
pub fn blocks(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(BLOCK_LEN).map(block).collect()
}

/// The value of one block of at most [`BLOCK_LEN`] bytes: XXH3-64 with seed 0 and the default secret.
#[must_use]
pub fn block(bytes: &[u8]) -> u64 {
    if bytes.len() <= SHORT_LEN_MAX {
        return short::hash(bytes);
    }
    merge(std::array::from_fn(|at| lane(bytes, at)), bytes.len() as u64)
}

/// What the threads of accumulator `at` compute: its value after all stripes of `bytes`, which are longer than a stripe.
fn lane(bytes: &[u8], at: usize) -> u64 {
    let mut accumulator = START[at];
    // The last stripe ends with the input and may overlap the one before it, so it is not among these.
    let stripes = (bytes.len() - 1) / STRIPE_LEN;
    let rounds = stripes / STRIPES_PER_ROUND;
    for round in 0..rounds {
        let joined = joined(bytes, at, round * STRIPES_PER_ROUND, STRIPES_PER_ROUND);
        accumulator = scramble(accumulator.wrapping_add(joined), at);
    }
    let rest = joined(bytes, at, rounds * STRIPES_PER_ROUND, stripes % STRIPES_PER_ROUND);
    let last = product(&bytes[bytes.len() - STRIPE_LEN..], at, SECRET_LAST);
    accumulator.wrapping_add(rest).wrapping_add(last)
}

/// What `count` stripes from `first` on add to accumulator `at`: the sum of what its threads have found.
fn joined(bytes: &[u8], at: usize, first: usize, count: usize) -> u64 {
    let share = |sharer: usize| {
        let steps = (sharer..count).step_by(SHARERS);
        steps
            .map(|step| product(&bytes[(first + step) * STRIPE_LEN..], at, step * 8))
            .fold(0, u64::wrapping_add)
    };
    (0..SHARERS).map(share).fold(0, u64::wrapping_add)
}

/// What one stripe adds: the own word under its key as two halves multiplied, and the neighbour's word as it is.
fn product(stripe: &[u8], at: usize, secret_at: usize) -> u64 {
    let keyed = read_u64(stripe, 8 * at) ^ read_u64(&SECRET, secret_at + 8 * at);
    let neighbour = read_u64(stripe, 8 * (at ^ 1));
    neighbour.wrapping_add((keyed & 0xffff_ffff) * (keyed >> 32))
}

/// Spreads the high bits of an accumulator, which the 32-bit products of a round leave weak.
fn scramble(accumulator: u64, at: usize) -> u64 {
    let key = read_u64(&SECRET, SECRET.len() - STRIPE_LEN + 8 * at);
    (accumulator ^ (accumulator >> 47) ^ key).wrapping_mul(PRIME32_1)
}

/// What the warp computes at the end: the block's value.
fn merge(lanes: [u64; LANES], len_bytes: u64) -> u64 {
    let mut value = len_bytes.wrapping_mul(PRIME64_1);
    for pair in 0..LANES / 2 {
        let key = SECRET_MERGE + 16 * pair;
        value = value.wrapping_add(fold(
            lanes[2 * pair] ^ read_u64(&SECRET, key),
            lanes[2 * pair + 1] ^ read_u64(&SECRET, key + 8),
        ));
    }
    avalanche(value)
}

#[cfg(test)]
mod tests {
    use hetmem_core::checksum as core;

    use super::*;

    /// Bytes without a short period, so that a wrong offset shows.
    fn sample(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_core_at_every_length_that_has_a_form_of_its_own() {
        let bytes = sample(BLOCK_LEN + 1);
        let lengths = (0..=1100).chain([2047, 2048, 2049, BLOCK_LEN - 1, BLOCK_LEN, BLOCK_LEN + 1]);
        for len in lengths {
            assert_eq!(of(&bytes[..len]), core::of(&bytes[..len]), "{len} bytes");
        }
    }

    #[test]
    fn agrees_with_the_core_on_many_blocks_and_a_tail() {
        let bytes = sample((1 << 20) + 7);
        assert_eq!(of(&bytes), core::of(&bytes));
        let values = blocks(&bytes);
        assert_eq!(values.len(), 65);
        let expected: Vec<u64> = bytes.chunks(BLOCK_LEN).map(core::block).collect();
        assert_eq!(values, expected);
    }

    #[test]
    fn extreme_words_agree() {
        for byte in [0x00, 0x80, 0xff] {
            let bytes = vec![byte; BLOCK_LEN];
            for len in [1, 3, 8, 16, 128, 240, 241, 1024, 1025, BLOCK_LEN] {
                assert_eq!(block(&bytes[..len]), core::block(&bytes[..len]), "{len} x {byte:#x}");
            }
        }
    }
}
