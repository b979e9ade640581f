//! Engine time and the list of what is due. Not a clock. Invariant: a timer may fire after its cause has gone, so
//! whoever handles one checks that it still means something.

use std::collections::BTreeSet;

use super::fetch::FetchId;
use crate::tier::{ClientId, Generation, LeaseId};

/// Nanoseconds since some moment of the caller's choice; never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// This much later.
    #[must_use]
    pub const fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }

    /// Milliseconds from `earlier` to here, 0 if it is later.
    #[must_use]
    pub const fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Heartbeat,
    Reconnect,
    Redial,
    Keep,
    Repair,
    Lease(LeaseId),
    Ttl(Generation),
    Fetch(FetchId),
    /// A request for many keys.
    Many(ClientId, u64),
    Retry(FetchId),
    Wait,
    Space,
    Drain,
    Ahead(ClientId),
    Operation(u64),
}

#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Time, Timer)>);

impl Timers {
    pub(super) fn set(&mut self, at: Time, timer: Timer) {
        self.0.insert((at, timer));
    }

    /// Takes out a timer whose cause has gone, so that what is never due does not pile up.
    pub(super) fn unset(&mut self, at: Time, timer: Timer) {
        self.0.remove(&(at, timer));
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.0.first().map(|(at, _)| *at)
    }

    pub(super) fn due(&mut self, now: Time) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        self.0.pop_first().map(|(_, timer)| timer)
    }
}
