//! Bytes that follow from a key, so that any process can tell whether an object is the right one. Not random
//! numbers of any quality. Invariant: the same key, length and version give the same bytes for ever.

use hetmem_core::{Key, fingerprint};

/// The bytes of the object of this key; `version` tells several objects that took one key in turn apart.
#[must_use]
pub fn bytes_of(key: &str, len_bytes: usize, version: u64) -> Vec<u8> {
    let mut state =
        fingerprint(key.as_bytes()) ^ version.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (len_bytes as u64);
    let mut bytes = vec![0; len_bytes];
    for chunk in bytes.chunks_mut(8) {
        let word = next(&mut state).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    bytes
}

/// SplitMix64: the next number of a sequence that starts anywhere.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// A number below `limit`, which is not 0.
pub fn below(state: &mut u64, limit: usize) -> usize {
    usize::try_from(next(state) >> 1).unwrap_or_default() % limit
}

/// A key.
///
/// # Panics
/// If it is none.
#[must_use]
pub fn key(name: &str) -> Key {
    Key::new(name).expect("a valid key")
}
