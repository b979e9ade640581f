//! Taking what is in a slot: read it, pin its generation, look again. Not the meaning of its words (`record`).
//! Invariant: `Taken::Pinned` means that the words belong together and that the generation cannot be reclaimed.

use crate::index::layout::SEQ;
use crate::index::seqlock;
use crate::pins::Pins;
use crate::sync::{AtomicU64, Ordering, full_fence_after_update};

/// How an attempt ended.
pub(crate) enum Taken {
    /// What `read` has read belongs together; the position of the pin.
    Pinned(usize),
    /// Another key, or none, is here.
    Differs,
    /// The slot changed meanwhile: look again.
    Unsteady,
    /// Every pin word is in use.
    NoPins,
}

/// Reads a slot with `read`, which gives the generation (not 0) or `None` if this is not the wanted key, and pins it.
#[inline]
pub(crate) fn take(
    slot: &[AtomicU64],
    pins: Pins<'_>,
    start: usize,
    read: impl FnOnce(&[AtomicU64]) -> Option<u64>,
) -> Taken {
    let Some(seq) = seqlock::begin(&slot[SEQ]) else {
        return Taken::Unsteady;
    };
    let Some(generation) = read(slot) else {
        return if seqlock::unchanged(&slot[SEQ], seq) { Taken::Differs } else { Taken::Unsteady };
    };
    // Words that do not belong together may pin a generation that is not this key's, for a moment.
    let Some(position) = pins.claim(generation, start) else {
        return Taken::NoPins;
    };
    full_fence_after_update();
    if slot[SEQ].load(Ordering::Relaxed) == seq {
        return Taken::Pinned(position);
    }
    pins.release(position);
    Taken::Unsteady
}

/// The same without a pin: whether the wanted key is here, `None` to look again. The words belong together, and may be old as soon as they are returned.
#[inline]
pub(crate) fn look(slot: &[AtomicU64], read: impl FnOnce(&[AtomicU64]) -> Option<u64>) -> Option<bool> {
    let seq = seqlock::begin(&slot[SEQ])?;
    let found = read(slot).is_some();
    seqlock::unchanged(&slot[SEQ], seq).then_some(found)
}
