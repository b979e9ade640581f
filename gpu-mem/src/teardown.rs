//! The end of a segment, in the one order that is right: stop grants, drain copies, deregister from NICs, revoke
//! importers, unmap, release. Not who does these things. Invariant: each state is reached only from the one before,
//! and memory is unmapped only when nobody holds the segment.
//!
//! Revoking has a limit that no order changes: a process that has imported a segment keeps its mapping until it drops
//! it or ends. The physical memory lives until then. What can be done is to ask, and to end a process's session.

use std::sync::Arc;

use crate::segment::Segment;

/// A segment of which no new span and no new registration is made.
#[derive(Debug)]
pub struct Stopped {
    segment: Arc<Segment>,
}

/// A segment that no copy reads or writes any more.
#[derive(Debug)]
pub struct Drained {
    segment: Arc<Segment>,
}

/// A segment that no NIC reaches any more. Importers are to be asked now; dropped, it is unmapped and released.
#[derive(Debug)]
pub struct Deregistered {
    segment: Segment,
}

impl Segment {
    /// The first step: from here on new spans and registrations of it are refused. What is under way goes on.
    #[must_use]
    pub fn stop_grants(self: Arc<Self>) -> Stopped {
        self.close_grants();
        Stopped { segment: self }
    }
}

impl Stopped {
    /// The second step, once every copy has ended: all that hold the segment besides this are NIC registrations.
    ///
    /// # Errors
    /// Itself, while a span or another holder lives; ask again when a copy has ended.
    pub fn drained(self) -> Result<Drained, Self> {
        // In this order: a registration that goes in between is counted as a holder once more, never once less.
        let holders = Arc::strong_count(&self.segment) - 1;
        if holders > self.segment.registrations() {
            return Err(self);
        }
        Ok(Drained { segment: self.segment })
    }
}

impl Drained {
    /// The third step, once every NIC has deregistered it.
    ///
    /// # Errors
    /// Itself, while a registration or another holder lives.
    pub fn deregistered(self) -> Result<Deregistered, Self> {
        match Arc::try_unwrap(self.segment) {
            Ok(segment) => Ok(Deregistered { segment }),
            Err(segment) => Err(Self { segment }),
        }
    }
}

impl Deregistered {
    /// Bytes that are given back to the device when this is dropped and no importer is left.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.segment.len_bytes()
    }
}
