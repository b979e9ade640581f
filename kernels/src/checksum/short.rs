//! XXH3-64 of at most 240 bytes, seed 0: what one thread computes for the tail of an object. Not for whole blocks.
//! Invariant: every branch reads inside `bytes`.

use super::words::{PRIME64_1, PRIME64_2, PRIME64_3, SECRET, avalanche, fold, read_u32, read_u64};

/// The value of at most 240 bytes.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    match bytes.len() {
        0 => avalanche_xxh64(read_u64(&SECRET, 56) ^ read_u64(&SECRET, 64)),
        1..=3 => up_to_3(bytes),
        4..=8 => up_to_8(bytes),
        9..=16 => up_to_16(bytes),
        17..=128 => up_to_128(bytes),
        _ => up_to_240(bytes),
    }
}

fn up_to_3(bytes: &[u8]) -> u64 {
    let len = bytes.len();
    let (first, middle, last) = (bytes[0], bytes[len / 2], bytes[len - 1]);
    let word = u64::from(first) << 16 | u64::from(middle) << 24 | u64::from(last) | (len as u64) << 8;
    avalanche_xxh64(word ^ read_u32(&SECRET, 0) ^ read_u32(&SECRET, 4))
}

fn up_to_8(bytes: &[u8]) -> u64 {
    let len = bytes.len();
    let word = read_u32(bytes, len - 4) | read_u32(bytes, 0) << 32;
    let word = word ^ read_u64(&SECRET, 8) ^ read_u64(&SECRET, 16);
    let mixed = (word ^ word.rotate_left(49) ^ word.rotate_left(24)).wrapping_mul(MIX);
    let mixed = (mixed ^ (mixed >> 35).wrapping_add(len as u64)).wrapping_mul(MIX);
    mixed ^ (mixed >> 28)
}

const MIX: u64 = 0x9fb2_1c65_1e98_df25;

fn up_to_16(bytes: &[u8]) -> u64 {
    let len = bytes.len();
    let low = read_u64(bytes, 0) ^ read_u64(&SECRET, 24) ^ read_u64(&SECRET, 32);
    let high = read_u64(bytes, len - 8) ^ read_u64(&SECRET, 40) ^ read_u64(&SECRET, 48);
    let sum = (len as u64).wrapping_add(low.swap_bytes()).wrapping_add(high).wrapping_add(fold(low, high));
    avalanche(sum)
}

/// From both ends inwards, 16 bytes at a time; the two halves may overlap in the middle.
fn up_to_128(bytes: &[u8]) -> u64 {
    let len = bytes.len();
    let mut sum = (len as u64).wrapping_mul(PRIME64_1);
    for step in 0..=(len - 1) / 32 {
        sum = sum.wrapping_add(mix(bytes, 16 * step, 32 * step)).wrapping_add(mix(
            bytes,
            len - 16 * (step + 1),
            32 * step + 16,
        ));
    }
    avalanche(sum)
}

fn up_to_240(bytes: &[u8]) -> u64 {
    let len = bytes.len();
    let mut sum = (len as u64).wrapping_mul(PRIME64_1);
    for step in 0..8 {
        sum = sum.wrapping_add(mix(bytes, 16 * step, 16 * step));
    }
    sum = avalanche(sum);
    for step in 8..len / 16 {
        sum = sum.wrapping_add(mix(bytes, 16 * step, 16 * (step - 8) + 3));
    }
    avalanche(sum.wrapping_add(mix(bytes, len - 16, 136 - 17)))
}

/// 16 bytes of input under 16 bytes of the secret.
fn mix(bytes: &[u8], at: usize, secret_at: usize) -> u64 {
    fold(
        read_u64(bytes, at) ^ read_u64(&SECRET, secret_at),
        read_u64(bytes, at + 8) ^ read_u64(&SECRET, secret_at + 8),
    )
}

/// The finish of the older XXH64, which XXH3 keeps for its shortest inputs.
fn avalanche_xxh64(word: u64) -> u64 {
    let word = (word ^ (word >> 33)).wrapping_mul(PRIME64_2);
    let word = (word ^ (word >> 29)).wrapping_mul(PRIME64_3);
    word ^ (word >> 32)
}
