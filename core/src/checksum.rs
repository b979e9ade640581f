//! The object checksum: XXH3-64 over independent blocks, then XXH3-64 over the block values. Not a defence against
//! an adversary. Invariant: the value depends on the bytes alone, never on how they were cut into calls.
//!
//! XXH3-64 is the published xxHash algorithm (seed 0, default secret; xxHash specification, version 0.2). Blocks
//! are independent and of one size, so that threads, or a GPU, can hash them all at once; docs/wire.md has the
//! definition and test vectors.

use std::fmt;
use std::hash::Hasher as _;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::error::StoreError;

/// Bytes per independent block. 16 KiB keeps the per-block finish under 5 % on a CPU and gives a GPU 16,384
/// blocks of eight 64-bit lanes in 256 MiB: enough threads to reach its memory bandwidth.
pub const BLOCK_LEN: usize = 16 * 1024;

/// An algorithm and its value. 0 = none, 1 = blocked XXH3-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Checksum {
    /// The producer asked for no checksum: nothing can be verified.
    None,
    /// Blocked XXH3-64, see [`of`].
    Xxh3Blocks(u64),
}

impl Checksum {
    /// The algorithm's number in shared memory and on the wire.
    #[must_use]
    pub const fn algorithm(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Xxh3Blocks(_) => 1,
        }
    }

    /// The 64-bit value; 0 where there is none.
    #[must_use]
    pub const fn value(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Xxh3Blocks(value) => value,
        }
    }

    /// Puts an algorithm number and a value together again; `None` for an unknown number.
    #[must_use]
    pub const fn from_parts(algorithm: u8, value: u64) -> Option<Self> {
        match algorithm {
            0 => Some(Self::None),
            1 => Some(Self::Xxh3Blocks(value)),
            _ => None,
        }
    }

    /// Compares this checksum with `bytes`; `Ok(false)` where there is nothing to compare with.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] naming both values if they differ.
    pub fn verify(self, subject: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let Self::Xxh3Blocks(expected) = self else {
            return Ok(false);
        };
        let found = of(bytes);
        if found == expected {
            return Ok(true);
        }
        Err(StoreError::corrupt(
            subject,
            format!(
                "checksum xxh3-blocks is {found:016x}, {expected:016x} was stored ({} bytes)",
                bytes.len()
            ),
        ))
    }
}

/// The value of one block: at most [`BLOCK_LEN`] bytes.
#[must_use]
pub fn block(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Puts block values, in order, together into the object's value.
///
/// The root is the XXH3-64 of the values as little-endian 64-bit words, seeded with the object's length in bytes,
/// so that neither an empty object nor a lost block at the end goes unnoticed.
#[derive(Clone)]
pub struct Root {
    len_bytes: u64,
    /// The values so far, while they are few: hashing in one go takes no allocation, and XXH3 of at most this many
    /// bytes no secret that is derived from the seed.
    few: [u8; FEW_LEN],
    used: usize,
    many: Option<XxHash3_64>,
}

/// Bytes of 30 block values.
const FEW_LEN: usize = 240;

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root").finish_non_exhaustive()
    }
}

impl Root {
    /// A root for an object of `len_bytes` bytes.
    #[must_use]
    #[inline]
    pub fn new(len_bytes: u64) -> Self {
        Self { len_bytes, few: [0; FEW_LEN], used: 0, many: None }
    }

    /// Adds the next block's value.
    #[inline]
    pub fn add(&mut self, block: u64) {
        let value = block.to_le_bytes();
        let end = self.used + value.len();
        if let Some(place) = self.few.get_mut(self.used..end) {
            place.copy_from_slice(&value);
            self.used = end;
            return;
        }
        let (seed, few) = (self.len_bytes, &self.few);
        let many = self.many.get_or_insert_with(|| {
            let mut many = XxHash3_64::with_seed(seed);
            many.write(few);
            many
        });
        many.write(&value);
    }

    /// The object's checksum.
    #[must_use]
    #[inline]
    pub fn finish(self) -> u64 {
        match self.many {
            Some(many) => many.finish(),
            None => XxHash3_64::oneshot_with_seed(self.len_bytes, &self.few[..self.used]),
        }
    }
}

/// The checksum of `bytes`.
#[must_use]
pub fn of(bytes: &[u8]) -> u64 {
    let mut root = Root::new(bytes.len() as u64);
    for part in bytes.chunks(BLOCK_LEN) {
        root.add(block(part));
    }
    root.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published XXH3-64 value of no bytes; of an object, it is the root over no blocks.
    #[test]
    fn known_values() {
        assert_eq!(block(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(of(b""), Root::new(0).finish());
        assert_eq!(of(b"abc"), {
            let mut root = Root::new(3);
            root.add(block(b"abc"));
            root.finish()
        });
    }

    #[test]
    fn few_blocks_and_many_are_put_together_alike() {
        for blocks in [0_u64, 1, 2, 29, 30, 31, 32, 100] {
            let len_bytes = blocks * BLOCK_LEN as u64;
            let mut root = Root::new(len_bytes);
            let mut plain = XxHash3_64::with_seed(len_bytes);
            for value in (0..blocks).map(|block| block.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
                root.add(value);
                plain.write(&value.to_le_bytes());
            }
            assert_eq!(root.finish(), plain.finish(), "{blocks} blocks");
        }
    }

    #[test]
    fn every_byte_and_the_length_count() {
        let bytes: Vec<u8> =
            (0..3 * BLOCK_LEN + 17).map(|at| (at % 251).try_into().unwrap_or_default()).collect();
        let whole = of(&bytes);
        for at in [0, BLOCK_LEN - 1, BLOCK_LEN, 2 * BLOCK_LEN + 5, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_ne!(of(&changed), whole, "byte {at}");
        }
        assert_ne!(of(&bytes[..3 * BLOCK_LEN]), whole);
        assert_ne!(of(&[0; 2]), of(&[0; 3]));
        let error = Checksum::Xxh3Blocks(whole ^ 1).verify("k", &bytes).expect_err("differs");
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
        assert_eq!(Checksum::Xxh3Blocks(whole).verify("k", &bytes), Ok(true));
        assert_eq!(Checksum::None.verify("k", &bytes), Ok(false));
    }
}
