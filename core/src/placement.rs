//! In which tier an object belongs, and when it moves: pure functions of sizes, rooms, hints and reads. Not the moving
//! (`engine`), and not which object goes first (`evict`). Invariant: what is promoted brings no tier to where it is
//! demoted from, and what was demoted rests before it is promoted, so no object goes back and forth for want of room.
//!
//! GPU memory is the scarce tier: the training job lives in it too. So nothing goes there unasked but what GPUs have read
//! again and again; and what lies there goes to host memory before there is no room, the coldest first. What others hold
//! for good, or was put as cache, is dropped only when it cannot be moved.

use crate::tier::{Tier, TierHint};

/// A tier in which more than this part of the bytes is used gives objects up, in percent.
pub const HIGH_PERCENT: u64 = 85;
/// Until no more than this is used, in percent. The same bounds what is promoted.
pub const LOW_PERCENT: u64 = 75;
/// Reads by one GPU after which an object of host memory is kept there: the first of them may be the last.
pub const READS_TO_PROMOTE: u8 = 2;
/// How long an object that was demoted, or that could not be, is left where it is, in milliseconds.
pub const REST_MS: u64 = 10_000;
/// The most bytes of one tier that are on their way out at once, unless one object is longer: moves take the link that
/// readers copy over, and the room that they free comes when each of them has ended.
pub const MOVING_BYTES_MAX: u64 = 256 << 20;

/// How full a tier is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What may be used of it, in bytes.
    pub capacity_bytes: u64,
    /// Bytes of all extents in it.
    pub used_bytes: u64,
    /// Of these, bytes of objects that are being moved out, or that nobody finds any more and somebody still reads.
    pub leaving_bytes: u64,
}

impl Room {
    /// Bytes of what stays.
    #[must_use]
    pub const fn staying_bytes(self) -> u64 {
        self.used_bytes.saturating_sub(self.leaving_bytes)
    }

    /// Bytes above which it gives objects up.
    #[must_use]
    pub const fn high_bytes(self) -> u64 {
        percent_of(self.capacity_bytes, HIGH_PERCENT)
    }

    /// Bytes that it gives objects up down to.
    #[must_use]
    pub const fn low_bytes(self) -> u64 {
        percent_of(self.capacity_bytes, LOW_PERCENT)
    }

    /// How many bytes are to leave: none up to the high watermark, and all above the low one beyond it.
    #[must_use]
    pub const fn surplus_bytes(self) -> u64 {
        if self.staying_bytes() > self.high_bytes() { self.staying_bytes() - self.low_bytes() } else { 0 }
    }
}

/// Without an overflow, and rounded down.
const fn percent_of(bytes: u64, percent: u64) -> u64 {
    bytes / 100 * percent + bytes % 100 * percent / 100
}

/// The tier of a new object of `len_bytes` bytes: the one that its hint names; else where it was written, unless that is a
/// GPU and so much of it is never meant to be one object's. `capacity_bytes` is that of the tier that it was written in.
#[must_use]
pub fn tier_of_new(hint: Option<TierHint>, written: Tier, len_bytes: u64, capacity_bytes: u64) -> Tier {
    match hint {
        Some(hint) => hint.tier,
        None if written != Tier::Host && len_bytes > percent_of(capacity_bytes, LOW_PERCENT) => Tier::Host,
        None => written,
    }
}

/// What is known of an object that may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Bytes of it.
    pub len_bytes: u64,
    /// Whether its producer, or anybody, asked for it to stay.
    pub pinned: bool,
    /// Whether it rests: it was demoted a short while ago, or could not be.
    pub rests: bool,
}

/// Whether an object of host memory is to stay on a GPU that has read it `reads` times since it was last moved. `room` is
/// that of the GPU, with the bytes that its reader has been given there.
#[must_use]
pub fn promotes(candidate: Candidate, reads: u8, room: Room) -> bool {
    let Candidate { len_bytes, pinned, rests } = candidate;
    len_bytes > 0
        && !pinned
        && !rests
        && reads >= READS_TO_PROMOTE
        && room.staying_bytes() <= room.low_bytes()
}

/// Whether an object may leave a GPU for host memory.
#[must_use]
pub const fn may_demote(candidate: Candidate) -> bool {
    candidate.len_bytes > 0 && !candidate.pinned && !candidate.rests
}

/// How many of the bytes that are to leave a tier may be moved now, while `moving_bytes` are on their way.
#[must_use]
pub const fn budget_bytes(surplus_bytes: u64, moving_bytes: u64) -> u64 {
    let left = MOVING_BYTES_MAX.saturating_sub(moving_bytes);
    if surplus_bytes < left { surplus_bytes } else { left }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GPU: Tier = Tier::Gpu(0);
    const MIB: u64 = 1 << 20;

    fn room(used_bytes: u64, leaving_bytes: u64) -> Room {
        Room { capacity_bytes: 100 * MIB, used_bytes, leaving_bytes }
    }

    const COLD: Candidate = Candidate { len_bytes: MIB, pinned: false, rests: false };

    #[test]
    fn a_hint_decides_and_else_the_producer_does() {
        let hint = |tier| Some(TierHint { tier, or_host: false });
        for (hinted, written, len_bytes, expected) in [
            (hint(GPU), Tier::Host, MIB, GPU),
            (hint(GPU), GPU, 99 * MIB, GPU),
            (hint(Tier::Host), GPU, MIB, Tier::Host),
            (None, Tier::Host, 99 * MIB, Tier::Host),
            (None, GPU, 75 * MIB, GPU),
            (None, GPU, 75 * MIB + 1, Tier::Host),
            (None, GPU, 0, GPU),
        ] {
            assert_eq!(tier_of_new(hinted, written, len_bytes, 100 * MIB), expected, "{hinted:?} {written}");
        }
    }

    #[test]
    fn objects_leave_above_the_high_watermark_down_to_the_low_one() {
        for (used, leaving, surplus) in [
            (0, 0, 0),
            (85 * MIB, 0, 0),
            (85 * MIB + 1, 0, 10 * MIB + 1),
            (100 * MIB, 0, 25 * MIB),
            (100 * MIB, 15 * MIB, 0),
            (100 * MIB, 14 * MIB, 11 * MIB),
            // More is on its way out than there is: somebody counted twice, and nothing is lost by it.
            (10 * MIB, 20 * MIB, 0),
        ] {
            assert_eq!(room(used, leaving).surplus_bytes(), surplus, "{used} used, {leaving} leaving");
        }
        assert_eq!(budget_bytes(10, 0), 10);
        assert_eq!(budget_bytes(u64::MAX, MIB), MOVING_BYTES_MAX - MIB);
        assert_eq!(budget_bytes(10, u64::MAX), 0);
    }

    #[test]
    fn only_what_is_read_again_is_promoted_and_only_into_room() {
        assert!(promotes(COLD, 2, room(75 * MIB, 0)));
        assert!(!promotes(COLD, 1, room(0, 0)));
        assert!(!promotes(COLD, 9, room(75 * MIB + 1, 0)));
        assert!(promotes(COLD, 9, room(80 * MIB, 5 * MIB)));
        for other in [
            Candidate { pinned: true, ..COLD },
            Candidate { rests: true, ..COLD },
            Candidate { len_bytes: 0, ..COLD },
        ] {
            assert!(!promotes(other, 9, room(0, 0)) && !may_demote(other), "{other:?}");
        }
        assert!(may_demote(COLD));
    }

    proptest! {
        #[test]
        fn a_promotion_is_never_followed_by_a_demotion(
            capacity_bytes in any::<u64>(),
            used_bytes in any::<u64>(),
            leaving_bytes in any::<u64>(),
            reads in any::<u8>(),
        ) {
            let room = Room { capacity_bytes, used_bytes, leaving_bytes };
            prop_assert!(room.low_bytes() <= room.high_bytes() && room.high_bytes() <= capacity_bytes);
            if promotes(COLD, reads, room) {
                prop_assert_eq!(room.surplus_bytes(), 0);
            }
            // What is left after a surplus has gone is not above the watermark again.
            let after = Room { leaving_bytes: leaving_bytes.saturating_add(room.surplus_bytes()), ..room };
            prop_assert_eq!(after.surplus_bytes(), 0);
        }
    }
}
