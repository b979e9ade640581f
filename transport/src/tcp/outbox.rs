//! The frames of one control stream that the socket has not taken yet. Not their meaning. Invariant: bytes go out
//! in the order of the sends, each frame directly followed by its payload, which is gathered from its regions at
//! the moment of writing; and the queue never holds more than `FRAMES_MAX` frames or `BYTES_MAX` bytes of frames.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use hetmem_core::StoreError;
use rustix::io::Errno;

use super::reads::WORD_LEN;
use super::sys::Socket;
use crate::fabric::SendToken;
use crate::payload::Gather;
use crate::region::{Piece, Unmoved};

/// The most frames that wait on one link. Enough for a burst of answers, small enough to be felt.
pub(super) const FRAMES_MAX: usize = 1024;
/// The most bytes of frames (headers and bodies; payloads stay where they are) that wait on one link: four of the
/// longest bodies.
pub(super) const BYTES_MAX: usize = 4 << 20;
/// Bytes written before other connections get their turn.
const WRITE_BUDGET: usize = 8 << 20;

/// One frame under way.
pub(super) struct Outgoing {
    pub(super) head: Vec<u8>,
    pub(super) payload: Option<Gather>,
    /// A word that goes behind the head. It is loaded when its turn has come: what was asked for before is read before.
    pub(super) word: Option<Piece>,
    pub(super) token: SendToken,
    pub(super) sent: usize,
}

impl Outgoing {
    /// Bytes of its own, its word included, whether that was loaded already or not.
    fn head_len(&self) -> usize {
        self.head.len() + if self.word.is_some() { WORD_LEN } else { 0 }
    }

    fn len(&self) -> usize {
        self.head_len() + self.payload.as_ref().map_or(0, Gather::len)
    }
}

/// How far writing got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    /// Nothing is left.
    All,
    /// The socket is full; an event follows when it is not.
    Blocked,
    /// There is more to write, but it was a lot already.
    Enough,
}

/// A payload that the link is done with.
pub(super) type Settled = (SendToken, Result<(), StoreError>);

#[derive(Default)]
pub(super) struct Outbox {
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether another frame of `len` bytes may wait.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.queue.len() < FRAMES_MAX && self.queued_bytes + len <= BYTES_MAX
    }

    pub(super) fn push(&mut self, outgoing: Outgoing) {
        self.queued_bytes += outgoing.head_len();
        self.queue.push_back(outgoing);
    }

    /// Writes as much as the socket takes, and adds the payloads that are done to `settled`.
    ///
    /// # Errors
    /// The stream cannot go on: the socket failed, or a payload went away in the middle.
    pub(super) fn write(&mut self, socket: &Socket, settled: &mut Vec<Settled>) -> Result<Wrote, StoreError> {
        let mut budget = WRITE_BUDGET;
        loop {
            let next = self.queue.get_mut(1);
            let more = next.as_ref().is_some_and(|next| next.word.is_some());
            if let Some(payload) = next.and_then(|next| next.payload.as_mut()) {
                // What comes of it is seen when its turn has come.
                let _ = payload.prime();
            }
            let Some(front) = self.queue.front_mut() else {
                return Ok(Wrote::All);
            };
            let before = front.sent;
            let wrote = write_one(socket, front, more);
            budget = budget.saturating_sub(front.sent - before);
            let result = match wrote {
                Ok(true) => Ok(()),
                Ok(false) => return Ok(Wrote::Blocked),
                Err(Failure::Skipped(error)) => Err(error),
                Err(Failure::Broken(error)) => return Err(error),
            };
            if let Some(done) = self.queue.pop_front() {
                self.queued_bytes -= done.head_len();
                if done.payload.is_some() {
                    settled.push((done.token, result));
                }
            }
            if budget == 0 && !self.queue.is_empty() {
                return Ok(Wrote::Enough);
            }
        }
    }

    /// Gives everything up.
    pub(super) fn drain(&mut self, why: &StoreError) -> Vec<Settled> {
        self.queued_bytes = 0;
        let payloads = self.queue.drain(..).filter(|outgoing| outgoing.payload.is_some());
        payloads.map(|outgoing| (outgoing.token, Err(why.clone()))).collect()
    }
}

/// Why a frame did not go out.
pub(super) enum Failure {
    /// Its payload is gone, but none of it was sent: the stream is whole.
    Skipped(StoreError),
    /// The stream is not whole, or the socket failed.
    Broken(StoreError),
}

/// Writes one frame until it is out (true) or the socket is full (false). If more follows at once, the end of its payload
/// may wait for that, so that who receives is woken once.
pub(super) fn write_one(socket: &Socket, outgoing: &mut Outgoing, more: bool) -> Result<bool, Failure> {
    if let Some(word) = outgoing.word.take() {
        let Some(bytes) = word.word() else {
            let error = StoreError::stale("send", "a word", "its segment was deregistered");
            return Err(Failure::Broken(error));
        };
        outgoing.head.extend_from_slice(&bytes);
    }
    let len = outgoing.len();
    while outgoing.sent < len {
        let head = outgoing.head.get(outgoing.sent..).unwrap_or_default();
        let wrote = match &mut outgoing.payload {
            None => socket.send(head).map_err(Unmoved::Os),
            Some(gather) => gather.send(socket.as_fd(), head, more),
        };
        match wrote {
            Ok(count) => outgoing.sent += count,
            Err(Unmoved::Os(Errno::AGAIN)) => return Ok(false),
            Err(Unmoved::Os(Errno::INTR)) => {}
            Err(Unmoved::Os(error)) => return Err(Failure::Broken(StoreError::os("send", error))),
            Err(Unmoved::Device(error)) => return Err(Failure::Broken(error)),
            Err(Unmoved::Closed) => {
                let why = format!(
                    "the segment of its payload was deregistered after {} of {len} bytes",
                    outgoing.sent
                );
                let error = StoreError::stale("send", "payload", why);
                return Err(if outgoing.sent == 0 {
                    Failure::Skipped(error)
                } else {
                    Failure::Broken(error)
                });
            }
        }
    }
    Ok(true)
}
