//! The bytes of simulated objects: a function of the object's tag and the place, so that a byte of another object, or
//! of another place, is recognised. Not checksums. Invariant: eight bytes of two tags agree by chance only.

use super::rng::mix;

fn word(tag: u64, index: u64) -> [u8; 8] {
    mix(tag ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93)).to_le_bytes()
}

/// Bytes `start..start + len` of the object with this tag.
pub(super) fn of(tag: u64, start: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 16);
    let skip = usize::try_from(start % 8).unwrap_or(0);
    let mut index = start / 8;
    while bytes.len() < len + skip {
        bytes.extend_from_slice(&word(tag, index));
        index += 1;
    }
    bytes.truncate(len + skip);
    bytes.drain(..skip);
    bytes
}

/// Whether `bytes` are those of this tag from `start` on.
pub(super) fn are_of(tag: u64, start: u64, bytes: &[u8]) -> bool {
    let mut index = start / 8;
    let skip = usize::try_from(start % 8).unwrap_or(0);
    let (head, rest) = bytes.split_at(if skip == 0 { 0 } else { (8 - skip).min(bytes.len()) });
    if !head.is_empty() {
        if head != &word(tag, index)[skip..skip + head.len()] {
            return false;
        }
        index += 1;
    }
    let (words, tail) = rest.as_chunks::<8>();
    let whole = words.iter().zip(index..).all(|(bytes, index)| *bytes == word(tag, index));
    whole && *tail == word(tag, index + words.len() as u64)[..tail.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_parts_of_the_whole() {
        let whole = of(7, 0, 100);
        for (start, len) in [(0, 100), (3, 20), (8, 8), (95, 5), (13, 0)] {
            let part = &whole[start..][..len];
            assert_eq!(of(7, start as u64, len), part);
            assert!(are_of(7, start as u64, part));
        }
        for wrong in 0..whole.len() {
            let mut spoiled = whole.clone();
            spoiled[wrong] ^= 1;
            for start in [0, 3, 8] {
                assert_eq!(are_of(7, start as u64, &spoiled[start..]), wrong < start, "{wrong} of {start}");
            }
        }
        assert!(!are_of(8, 0, &whole));
        assert!(!are_of(7, 1, &whole[..50]));
    }
}
