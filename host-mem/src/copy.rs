//! Copies of object bytes, alone or fused with the checksum. Not copies between tiers. Invariant: the checksum is
//! that of the bytes that were copied, block by block, however many threads did it.
//!
//! Holds unsafe code: streaming stores, within the bounds of the slices given.
#![allow(unsafe_code)]

use hetmem_core::checksum::{self, BLOCK_LEN, Root};

/// From this length on several threads copy, past the caches: the target is larger than what would stay in them, and
/// another thread costs less than it saves. Measured with `examples/measure.rs`.
const LARGE_COPY_LEN: usize = 16 << 20;
/// The same with a checksum, which gives the threads more to do.
const LARGE_CHECKSUM_LEN: usize = 8 << 20;
/// A thread has at least this much to do.
const THREAD_LEN_MIN: usize = 4 << 20;
/// More threads do not make one memory faster.
const THREADS_MAX: usize = 4;

/// Copies `src` to `dst`, which is as long, and returns the checksum of the bytes ([`hetmem_core::checksum::of`]).
///
/// # Panics
/// If the lengths differ.
pub fn copy_with_checksum(dst: &mut [u8], src: &[u8]) -> u64 {
    assert_eq!(dst.len(), src.len(), "a copy has a source and a target of one length");
    // SAFETY: `dst` is as long as `src`, borrowed exclusively, and so no part of it.
    unsafe { to_with_checksum(dst.as_mut_ptr(), src) }
}

/// Copies `src` to `dst`, which is as long: with several threads and past the caches where that is faster.
///
/// # Panics
/// If the lengths differ.
pub fn copy(dst: &mut [u8], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "a copy has a source and a target of one length");
    // SAFETY: as above.
    unsafe { to(dst.as_mut_ptr(), src) };
}

/// Copies `src` to `target`.
///
/// # Safety
/// `src.len()` bytes from `target` are valid for writes, are no part of `src`, and nobody else accesses them.
pub(crate) unsafe fn to(target: *mut u8, src: &[u8]) {
    if src.len() < LARGE_COPY_LEN {
        // SAFETY: the caller's promise.
        return unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), target, src.len()) };
    }
    in_parts(Target(target), src, |target, part| {
        for (number, block) in part.chunks(BLOCK_LEN).enumerate() {
            // SAFETY: the caller's promise holds for every part of it, and parts do not overlap.
            unsafe { stream(target.0.add(number * BLOCK_LEN), block) };
        }
        finish_streams();
    });
}

/// The same, and the checksum of `src`.
///
/// # Safety
/// As [`to`].
pub(crate) unsafe fn to_with_checksum(target: *mut u8, src: &[u8]) -> u64 {
    let mut root = Root::new(src.len() as u64);
    if src.len() < LARGE_CHECKSUM_LEN {
        for (number, block) in src.chunks(BLOCK_LEN).enumerate() {
            root.add(checksum::block(block));
            // SAFETY: the caller's promise holds for every part of it.
            unsafe {
                std::ptr::copy_nonoverlapping(block.as_ptr(), target.add(number * BLOCK_LEN), block.len());
            };
        }
        return root.finish();
    }
    let values = in_parts(Target(target), src, |target, part| {
        let values: Vec<u64> = part
            .chunks(BLOCK_LEN)
            .enumerate()
            .map(|(number, block)| {
                // The first reading brings the block into the cache, the second takes it from there.
                let value = checksum::block(block);
                // SAFETY: as in `to`.
                unsafe { stream(target.0.add(number * BLOCK_LEN), block) };
                value
            })
            .collect();
        finish_streams();
        values
    });
    for value in values.into_iter().flatten() {
        root.add(value);
    }
    root.finish()
}

#[derive(Clone, Copy)]
struct Target(*mut u8);

// SAFETY: the pointer is used by one thread at a time, for the part of the target that is that thread's.
unsafe impl Send for Target {}

impl Target {
    fn at(self, offset: usize) -> Self {
        Self(self.0.wrapping_add(offset))
    }
}

/// Runs `work` on parts of whole blocks, one thread each, and returns the results in order.
fn in_parts<T: Send>(target: Target, src: &[u8], work: impl Fn(Target, &[u8]) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX)
        .min(src.len() / THREAD_LEN_MIN)
        .max(1);
    let part_len = src.len().div_ceil(threads).next_multiple_of(BLOCK_LEN);
    let work = &work;
    std::thread::scope(|scope| {
        let others: Vec<_> = src
            .chunks(part_len)
            .enumerate()
            .skip(1)
            .map(|(number, part)| {
                let target = target.at(number * part_len);
                scope.spawn(move || work(target, part))
            })
            .collect();
        let mut results = vec![work(target, &src[..part_len.min(src.len())])];
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                // `work` panics on no input; if it did, the copy would not be whole.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

/// Copies one block past the caches. [`finish_streams`] makes it visible to other threads.
///
/// # Safety
/// As [`to`].
#[cfg(target_arch = "x86_64")]
unsafe fn stream(target: *mut u8, block: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    const LINE_LEN: usize = 64;
    // Streams need aligned targets, and pay only where whole lines are written.
    let before = target.align_offset(LINE_LEN).min(block.len());
    let lines = (block.len() - before) / LINE_LEN;
    let source = block.as_ptr();
    // SAFETY: the caller's promise; `before + lines * 64 <= block.len()`, streamed addresses are multiples of 64, and
    // SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, before);
        for line in 0..lines {
            let from = source.add(before + line * LINE_LEN).cast::<__m128i>();
            let into = target.add(before + line * LINE_LEN).cast::<__m128i>();
            let parts = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
            for (part, bytes) in parts.into_iter().enumerate() {
                _mm_stream_si128(into.add(part), bytes);
            }
        }
        let done = before + lines * LINE_LEN;
        std::ptr::copy_nonoverlapping(source.add(done), target.add(done), block.len() - done);
    }
}

/// Orders streamed stores before everything that this thread does next.
#[cfg(target_arch = "x86_64")]
fn finish_streams() {
    // SAFETY: SSE is part of x86-64; a store fence has no other effect.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

/// Copies one block.
///
/// # Safety
/// As [`to`].
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(target: *mut u8, block: &[u8]) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), target, block.len()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn finish_streams() {}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: usize) -> Vec<u8> {
        (0..=250).cycle().take(len).collect()
    }

    #[test]
    fn copies_and_checksums_agree_with_the_plain_ones() {
        let src = pattern(LARGE_COPY_LEN + 3 * BLOCK_LEN + 77);
        for (from, len) in [
            (0, 0),
            (0, 1),
            (3, BLOCK_LEN),
            (1, BLOCK_LEN + 1),
            (0, 1 << 20),
            (0, LARGE_CHECKSUM_LEN),
            (9, LARGE_CHECKSUM_LEN + 1),
            (5, LARGE_COPY_LEN + 2 * BLOCK_LEN + 13),
        ] {
            let src = &src[from..from + len];
            for shift in [0, 1, 63] {
                let mut whole = vec![0xee; len + 128];
                let value = copy_with_checksum(&mut whole[shift..shift + len], src);
                assert_eq!(value, checksum::of(src), "{len} bytes at {shift}");
                assert!(&whole[shift..shift + len] == src, "{len} bytes at {shift}");
                assert!(whole[..shift].iter().chain(&whole[shift + len..]).all(|byte| *byte == 0xee));
                whole.fill(0xee);
                copy(&mut whole[shift..shift + len], src);
                assert!(&whole[shift..shift + len] == src, "{len} bytes at {shift}");
                assert!(whole[..shift].iter().chain(&whole[shift + len..]).all(|byte| *byte == 0xee));
            }
        }
    }
}
