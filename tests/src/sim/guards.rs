//! Who is reading or writing which bytes of a simulated node's memory. Not the engine's books: filled in from what
//! actions and fabric events say, so that the engine's mistakes show. Invariant: of two holds that overlap, both read,
//! or one is the reservation that the other was made from.

use std::collections::BTreeMap;

use hetmem_core::{ClientId, Extent, Generation, LeaseId, SegmentId, SlotId, TransferId};

/// Why bytes are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// In the index: found by everyone.
    Published(SlotId),
    /// Read by a client through its pin.
    Pinned(ClientId, usize),
    /// The payload of a send.
    Sending(u64),
    /// Granted to a peer, until this time of the node's clock.
    Leased(LeaseId, u64),
    /// The source of a copy.
    CopiedFrom(Generation),
    /// The target of a copy.
    CopiedTo(Generation),
    /// A payload lands in it.
    Landing(u64),
    /// A read fills it.
    Reading(TransferId),
    /// A client writes it.
    Reserved(ClientId, Generation),
    /// The same in memory granted ahead, for the put of this position.
    Ahead(ClientId, u64),
}

impl Hold {
    /// Whether whoever holds it may change the bytes.
    pub(super) const fn writes(self) -> bool {
        matches!(
            self,
            Self::CopiedTo(_) | Self::Landing(_) | Self::Reading(_) | Self::Reserved(..) | Self::Ahead(..)
        )
    }
}

#[derive(Debug, Default)]
pub(super) struct Guards {
    segments: BTreeMap<SegmentId, Vec<(u64, u64, Hold)>>,
}

impl Guards {
    /// Who else holds any byte of this extent.
    pub(super) fn conflict(&self, extent: Extent, now: u64, allowed: impl Fn(Hold) -> bool) -> Option<Hold> {
        let (start, end) = (extent.offset, extent.offset + extent.len_bytes);
        let holds = self.segments.get(&extent.segment)?;
        let mut others = holds.iter().filter(|(from, to, hold)| {
            let over = matches!(hold, Hold::Leased(_, until) if *until <= now);
            *from < end && start < *to && !over && !allowed(*hold)
        });
        others.next().map(|(_, _, hold)| *hold)
    }

    /// Adds a hold, and says with whom it is in conflict.
    pub(super) fn add(&mut self, extent: Extent, hold: Hold, now: u64) -> Option<Hold> {
        if extent.len_bytes == 0 {
            return None;
        }
        let conflict = self.conflict(extent, now, |other| {
            let from_reservation = matches!(other, Hold::Reserved(..))
                && matches!(hold, Hold::Published(_) | Hold::CopiedFrom(_));
            from_reservation || (!hold.writes() && !other.writes())
        });
        let entry = (extent.offset, extent.offset + extent.len_bytes, hold);
        self.segments.entry(extent.segment).or_default().push(entry);
        conflict
    }

    /// The reservation that all of this extent lies in.
    pub(super) fn around(&self, extent: Extent) -> Option<Hold> {
        let (start, end) = (extent.offset, extent.offset + extent.len_bytes);
        let holds = self.segments.get(&extent.segment)?;
        let around = |(from, to, hold): &&(u64, u64, Hold)| {
            *from <= start && end <= *to && matches!(hold, Hold::Reserved(..))
        };
        holds.iter().find(around).map(|(_, _, hold)| *hold)
    }

    pub(super) fn remove(&mut self, segment: SegmentId, hold: Hold) {
        if let Some(holds) = self.segments.get_mut(&segment) {
            holds.retain(|(_, _, other)| *other != hold);
        }
    }

    pub(super) fn remove_where(&mut self, gone: impl Fn(Hold) -> bool) {
        for holds in self.segments.values_mut() {
            holds.retain(|(_, _, hold)| !gone(*hold));
        }
    }

    /// Forgets a segment, and says which hold on any byte of it stands against that.
    pub(super) fn retire(
        &mut self,
        segment: SegmentId,
        now: u64,
        gone: impl Fn(Hold) -> bool,
    ) -> Option<Hold> {
        let holds = self.segments.remove(&segment)?;
        let live = |hold: &Hold| !matches!(hold, Hold::Leased(_, until) if *until <= now) && !gone(*hold);
        holds.iter().map(|(_, _, hold)| *hold).find(live)
    }
}
