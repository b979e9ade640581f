//! One writer, many readers of a few words, after Boehm ("Can seqlocks get along with programming language memory
//! models?"). Not a lock for readers: they write nothing. Invariant: a sequence number is odd while its words change.

use crate::sync::{AtomicU64, Ordering, fence};

/// Changes the words that `seq` guards. The caller is the only writer.
pub(crate) fn write(seq: &AtomicU64, change: impl FnOnce()) {
    let before = seq.load(Ordering::Relaxed);
    seq.store(before | 1, Ordering::Relaxed);
    fence(Ordering::Release);
    change();
    seq.store((before | 1).wrapping_add(1), Ordering::Release);
}

/// Starts a read; `None` while the words change.
#[inline]
pub(crate) fn begin(seq: &AtomicU64) -> Option<u64> {
    // Read-only memory allows only relaxed loads, so the order comes from fences.
    let before = seq.load(Ordering::Relaxed);
    fence(Ordering::Acquire);
    (before & 1 == 0).then_some(before)
}

/// Whether all words read since `begin` belong together.
#[inline]
pub(crate) fn unchanged(seq: &AtomicU64, before: u64) -> bool {
    fence(Ordering::Acquire);
    seq.load(Ordering::Relaxed) == before
}
