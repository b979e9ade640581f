//! The published test vectors of the object checksum. Not computed by the code under test: the values come from the
//! Python package `xxhash` 4.1.0 (libxxhash 0.8.4), which was given the definition in `hetmem_core::checksum` in
//! words. Invariant: a value here never changes; another construction is another algorithm number.
//!
//! The object of `n` bytes has the byte `i % 251` at position `i`. In Python:
//! `root = xxh3_64(b"".join(pack("<Q", xxh3_64(block).intdigest()) for block in blocks), seed=n)`.

use hetmem_core::Checksum;
use hetmem_core::checksum::{BLOCK_LEN, Root, block, of};
use proptest::prelude::*;
use twox_hash::XxHash3_64;

/// Length in bytes, plain XXH3-64 (seed 0) of the bytes, the object's checksum.
const VECTORS: &[(usize, u64, u64)] = &[
    (0, 0x2d06_8005_38d3_94c2, 0x2d06_8005_38d3_94c2),
    (1, 0xc44b_dff4_074e_ecdb, 0x406b_ec4a_2fcc_abcf),
    (240, 0x375a_384d_957f_e865, 0xf6b7_9678_ad8d_2225),
    (241, 0x02e8_cd95_421c_6d02, 0x9e13_7362_3b4b_d287),
    (16_384, 0x168f_7fb4_781d_0831, 0x7745_f622_6bde_efa9),
    (16_385, 0xfea3_8d91_7373_7a4b, 0xb5cc_6bae_3a85_8839),
    (100_000, 0x42c2_3aee_ad96_750d, 0xdf22_2199_138f_f194),
];

fn object(len_bytes: usize) -> Vec<u8> {
    (0..251).cycle().take(len_bytes).collect()
}

/// The definition, step by step, without the code under test: cut, hash, concatenate, hash with the length as seed.
fn by_definition(bytes: &[u8]) -> u64 {
    let mut values = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let end = (start + 16_384).min(bytes.len());
        values.extend_from_slice(&XxHash3_64::oneshot(&bytes[start..end]).to_le_bytes());
        start = end;
    }
    XxHash3_64::oneshot_with_seed(bytes.len() as u64, &values)
}

#[test]
fn published_vectors() {
    for &(len_bytes, plain, expected) in VECTORS {
        let bytes = object(len_bytes);
        assert_eq!(XxHash3_64::oneshot(&bytes), plain, "XXH3-64 of {len_bytes} bytes");
        assert_eq!(by_definition(&bytes), expected, "by definition, {len_bytes} bytes");
        assert_eq!(of(&bytes), expected, "{len_bytes} bytes");
        assert_eq!(Checksum::Xxh3Blocks(expected).verify("vector", &bytes), Ok(true));
        if len_bytes <= BLOCK_LEN {
            assert_eq!(block(&bytes), plain);
        }
    }
}

#[test]
fn blocks_can_be_hashed_apart() {
    for &(len_bytes, _, expected) in VECTORS {
        let bytes = object(len_bytes);
        let values: Vec<u64> = bytes.chunks(BLOCK_LEN).rev().map(block).collect();
        let mut root = Root::new(len_bytes as u64);
        values.into_iter().rev().for_each(|value| root.add(value));
        assert_eq!(root.finish(), expected, "{len_bytes} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn agrees_with_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..4 * 16_384 + 100)) {
        prop_assert_eq!(of(&bytes), by_definition(&bytes));
    }
}
