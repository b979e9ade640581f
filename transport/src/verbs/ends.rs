//! One end of one connection: what was posted to its queue pair and has not come back. Not why it was posted. Invariant:
//! work comes back in the order in which it was posted; when all of it has, the adapter touches nothing for this end.

use std::collections::VecDeque;

use hetmem_core::{LinkId, StoreError, TransferId};

use super::abi;
use super::adapters::Adapter;
use super::plugin::{Connection, Made};
use crate::fabric::SendToken;

/// Work under way on one connection.
const WORK_MAX: u32 = 256;
/// Of the work, one in so many is signalled, so that room comes back.
const SIGNAL_EVERY: u64 = 64;
/// What is sent inside of the work itself, if the adapter can.
const INLINE_LEN: u32 = 220;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Frames of a link, both ways.
    Control(LinkId),
    /// Reads of this end.
    Reading(LinkId),
    /// Reads of the peer; nothing is posted here.
    Serving(LinkId),
}

/// What a piece of work was for.
#[derive(Debug)]
pub(super) enum Of {
    /// A part of a frame or of its payload; what the frame lay in, and who is told when it was the last part.
    Part { slot: Option<u32>, last_of: Option<SendToken> },
    /// A slice of a read; whether it was the last work of it.
    Slice { transfer: TransferId, last: bool },
    /// The word of a read.
    Word { transfer: TransferId, slot: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The way is looked for.
    Resolving,
    /// The peer is asked.
    Connecting,
    Up,
}

pub(super) struct End {
    pub(super) connection: Connection,
    pub(super) role: Role,
    pub(super) stage: Stage,
    /// Which adapter, once the way is known.
    pub(super) adapter: Option<usize>,
    pub(super) made: Option<Made>,
    posted: u64,
    done: u64,
    signalled: u64,
    under_way: VecDeque<Of>,
}

impl End {
    pub(super) fn new(connection: Connection, role: Role, stage: Stage) -> Self {
        Self {
            connection,
            role,
            stage,
            adapter: None,
            made: None,
            posted: 0,
            done: 0,
            signalled: 0,
            under_way: VecDeque::new(),
        }
    }

    /// Makes the queue pair.
    pub(super) fn pair(&mut self, number: usize, adapter: &Adapter) -> Result<(), StoreError> {
        let limits = &adapter.limits;
        let asked = Made {
            number: 0,
            work_max: WORK_MAX.min(limits.work_max.max(1)),
            pieces_max: limits.pieces_max.clamp(1, 30),
            inline_bytes_max: INLINE_LEN,
        };
        let (device, queue, pool) = (&adapter.device, &adapter.queue, &adapter.pool);
        let made = self.connection.queue_pair(device, queue, pool, asked).or_else(|_| {
            // Not every adapter can do inline work.
            self.connection.queue_pair(device, queue, pool, Made { inline_bytes_max: 0, ..asked })
        })?;
        self.adapter = Some(number);
        self.made = Some(Made { work_max: made.work_max.min(WORK_MAX), ..made });
        Ok(())
    }

    /// How much work more may be posted.
    pub(super) fn room(&self) -> usize {
        let most = self.made.map_or(0, |made| made.work_max as usize);
        if self.stage == Stage::Up { most.saturating_sub(self.under_way.len()) } else { 0 }
    }

    /// Posts one piece of work. If it fails, the end is to be ended; the work then counts as come back.
    ///
    /// # Safety
    /// As for `Connection::post`.
    #[allow(unsafe_code)]
    pub(super) unsafe fn post(
        &mut self,
        mut work: abi::Work,
        of: Of,
        signal: bool,
    ) -> Result<(), (Of, StoreError)> {
        work.id = self.posted + 1;
        // Whatever comes next may be long in coming.
        if signal || self.posted + 1 - self.signalled >= SIGNAL_EVERY {
            work.flags |= abi::FLAG_SIGNALED;
        }
        // SAFETY: as the caller says.
        match unsafe { self.connection.post(std::slice::from_ref(&work)) } {
            Ok(()) => {
                self.posted += 1;
                if work.flags & abi::FLAG_SIGNALED != 0 {
                    self.signalled = self.posted;
                }
                self.under_way.push_back(of);
                Ok(())
            }
            Err((_, why)) => Err((of, why)),
        }
    }

    /// What came back by a completion with this number: all before it too, which was not signalled. Whether each of them
    /// succeeded: all before the last have.
    pub(super) fn came_back(&mut self, number: u64) -> Vec<Of> {
        let count = number.saturating_sub(self.done).min(self.under_way.len() as u64);
        self.done += count;
        self.under_way.drain(..usize::try_from(count).unwrap_or(0)).collect()
    }

    /// What has not come back; to be asked only when the queue pair is closed.
    pub(super) fn take_all(&mut self) -> Vec<Of> {
        self.under_way.drain(..).collect()
    }
}
