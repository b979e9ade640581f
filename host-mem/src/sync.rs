//! The atomics that the index and the pins are built from: std's, or loom's when the crate is built to be model
//! checked. Not locks: nothing here may ever wait for another process. Invariant: the protocol modules (`pins`,
//! `index::table`, `index::seqlock`) name no atomic from anywhere else.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A full fence right after a successful read-modify-write of the same thread.
///
/// On x86-64 every atomic read-modify-write is a locked instruction, which is a full barrier already; a second one
/// costs as much as the rest of a get. Only the compiler must not move the load that follows.
#[inline]
pub(crate) fn full_fence_after_update() {
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(loom))))]
    fence(Ordering::SeqCst);
}
