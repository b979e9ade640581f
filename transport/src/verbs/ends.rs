//! One end of one connection: what was posted to its queue pair and has not come back. Not why it was posted. Invariant:
//! work comes back in the order in which it was posted; when all of it has, or the end is dropped, the adapter touches
//! nothing for it.
//!
//! Holds unsafe code: work names memory by its address. Pieces come from `Slots::piece`, whose slots stay lent until their
//! work is back, and from `Adapter::stretch`, of extents that callers of the fabric leave alone until they are told.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::time::Instant;

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
    /// Reads of the peer; what is posted here is what it asks to be written instead.
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
    /// None while a thread of its own makes it.
    pub(super) connection: Option<Connection>,
    pub(super) role: Role,
    pub(super) stage: Stage,
    /// Nothing but a first byte is posted before something has come from the peer. On iWARP only: see `state::iwarp`.
    pub(super) heard: bool,
    /// When that byte was last posted.
    pub(super) said: Option<Instant>,
    /// Which adapter, once the way is known.
    pub(super) adapter: Option<usize>,
    pub(super) made: Option<Made>,
    posted: u64,
    done: u64,
    signalled: u64,
    under_way: VecDeque<Of>,
    batch: Batch,
}

/// One piece of work.
pub(super) enum What<'a> {
    /// Sends bytes that travel inside of it.
    Inline { bytes: &'a [u8] },
    /// Sends registered memory.
    Send { pieces: &'a [abi::Piece] },
    /// Reads the peer's memory.
    Read { into: abi::Piece, address: u64, key: u32 },
    /// Writes it, and tells the peer by a number if that was the last of something.
    Write { piece: abi::Piece, address: u64, key: u32, told: Option<u32> },
}

/// Work that is not posted yet. Kept, so that posting allocates nothing.
#[derive(Default)]
struct Batch {
    work: Vec<abi::Work>,
    /// Of all of it, in its order.
    pieces: Vec<abi::Piece>,
    /// What travels inside of it.
    inline: Vec<u8>,
    /// How much of that each piece of work has.
    inline_lens: Vec<usize>,
}

// SAFETY: the pointers in it are set and used inside of one call.
unsafe impl Send for Batch {}

impl End {
    pub(super) fn new(connection: Connection, role: Role, stage: Stage) -> Self {
        Self {
            connection: Some(connection),
            role,
            stage,
            heard: true,
            said: None,
            adapter: None,
            made: None,
            posted: 0,
            done: 0,
            signalled: 0,
            under_way: VecDeque::new(),
            batch: Batch::default(),
        }
    }

    /// # Errors
    /// If it is being made.
    pub(super) fn connection(&mut self) -> Result<&mut Connection, StoreError> {
        let away = || StoreError::unavailable("its connection", "it is being made");
        self.connection.as_mut().ok_or_else(away)
    }

    /// Ends it: all of its work comes back.
    pub(super) fn disconnect(&self) {
        if let Some(connection) = &self.connection {
            connection.disconnect();
        }
    }

    /// Makes the queue pair.
    pub(super) fn pair(&mut self, number: usize, adapter: &Adapter, lane: usize) -> Result<(), StoreError> {
        let limits = &adapter.limits;
        let asked = Made {
            number: 0,
            work_max: WORK_MAX.min(limits.work_max.max(1)),
            pieces_max: limits.pieces_max.clamp(1, 30),
            inline_bytes_max: INLINE_LEN,
        };
        let gone = || StoreError::unavailable("its completion queue", "there is none");
        let queue = &adapter.queues.get(lane).ok_or_else(gone)?.queue;
        let (device, pool) = (&adapter.device, &adapter.pool);
        let connection = self.connection()?;
        let made = connection.queue_pair(device, queue, pool, asked).or_else(|_| {
            // Not every adapter can do inline work.
            connection.queue_pair(device, queue, pool, Made { inline_bytes_max: 0, ..asked })
        })?;
        self.adapter = Some(number);
        self.made = Some(Made { work_max: made.work_max.min(WORK_MAX), ..made });
        Ok(())
    }

    /// How much work more may be posted.
    pub(super) fn room(&self) -> usize {
        let most = self.made.map_or(0, |made| made.work_max as usize);
        let ready = self.stage == Stage::Up && self.heard && self.connection.is_some();
        if ready { most.saturating_sub(self.under_way.len()) } else { 0 }
    }

    /// Adds a piece of work to those that `flush` posts; it counts as under way from here on.
    pub(super) fn add(&mut self, what: What<'_>, of: Of, signal: bool) {
        let (mut kind, mut flags, mut remote, mut immediate) = (abi::WORK_SEND, 0, (0, 0), 0);
        let (pieces_start, inline_start) = (self.batch.pieces.len(), self.batch.inline.len());
        match what {
            What::Inline { bytes } => {
                flags = abi::FLAG_INLINE;
                self.batch.inline.extend_from_slice(bytes);
            }
            What::Send { pieces } => self.batch.pieces.extend_from_slice(pieces),
            What::Read { into, address, key } => {
                (kind, remote) = (abi::WORK_READ, (address, key));
                self.batch.pieces.push(into);
            }
            What::Write { piece, address, key, told } => {
                (kind, remote) = (abi::WORK_WRITE, (address, key));
                if let Some(number) = told {
                    (kind, immediate) = (abi::WORK_WRITE_TOLD, number);
                }
                self.batch.pieces.push(piece);
            }
        }
        self.posted += 1;
        // Whatever comes next may be long in coming.
        let most = self.made.map_or(1, |made| u64::from(made.work_max / 4));
        if signal || self.posted - self.signalled >= SIGNAL_EVERY.min(most) {
            flags |= abi::FLAG_SIGNALED;
            self.signalled = self.posted;
        }
        self.batch.work.push(abi::Work {
            id: self.posted,
            pieces: std::ptr::null(),
            piece_count: u32::try_from(self.batch.pieces.len() - pieces_start).unwrap_or(0),
            kind,
            flags,
            immediate,
            remote_address: remote.0,
            remote_key: remote.1,
            _reserved: 0,
        });
        self.batch.inline_lens.push(self.batch.inline.len() - inline_start);
        self.under_way.push_back(of);
    }

    /// Posts what was added, as one list. If that fails, the end is to be ended, and what was added comes back then.
    pub(super) fn flush(&mut self) -> Result<(), StoreError> {
        let Batch { work, pieces, inline, inline_lens } = &mut self.batch;
        // Inline bytes are pieces too, at the end, so that what points at the others stays.
        let mut inline_at = inline.as_ptr() as u64;
        let others = pieces.len();
        for &len in inline_lens.iter().filter(|len| **len > 0) {
            let len_bytes = u32::try_from(len).unwrap_or(0);
            pieces.push(abi::Piece { address: inline_at, len_bytes, key: 0 });
            inline_at += len as u64;
        }
        let (mut next, mut next_inline) = (0, others);
        for (work, &inline_len) in work.iter_mut().zip(&*inline_lens) {
            let (start, count) =
                if inline_len > 0 { (next_inline, 1) } else { (next, work.piece_count as usize) };
            work.pieces = pieces[start..start + count].as_ptr();
            if inline_len > 0 {
                work.piece_count = 1;
                next_inline += 1;
            } else {
                next += count;
            }
        }
        let posted = match &mut self.connection {
            // SAFETY: pieces and inline bytes are in the batch; what the pieces name is as the header says.
            Some(connection) if !work.is_empty() => unsafe { connection.post(work) },
            // There is no room while there is no connection, so there is no work.
            _ => Ok(()),
        };
        work.clear();
        pieces.clear();
        inline.clear();
        inline_lens.clear();
        posted.map_err(|(_, why)| why)
    }

    /// How much is back by a completion with this number: all before it too, which was not signalled.
    pub(super) fn back_by(&self, number: u64) -> u64 {
        number.saturating_sub(self.done).min(self.under_way.len() as u64)
    }

    /// The first that is under way is back.
    pub(super) fn came_back(&mut self) -> Option<Of> {
        let of = self.under_way.pop_front();
        self.done += u64::from(of.is_some());
        of
    }

    /// What has not come back; to be asked only when the queue pair is closed.
    pub(super) fn take_all(&mut self) -> Vec<Of> {
        self.under_way.drain(..).collect()
    }
}
