//! What one control stream has received: frames are cut out of a small buffer, and payloads go past it, straight
//! into their extents, however many these are. Not what frames mean. Invariant: a body is handed over only when it is
//! whole and its header was within every limit; of a payload, only what came in one piece with the frame before it is
//! staged (at most `BUFFER_LEN` bytes).

use std::os::fd::AsFd;

use hetmem_core::StoreError;
use hetmem_core::wire::{FrameHeader, HEADER_LEN};

use super::sys::{Got, Socket};
use crate::arriving::Arriving;
use crate::fabric::{LandingStats, LandingToken};

/// The buffer's usual length: a small object's answer fits, so it takes one call to receive; of a larger payload
/// this much is copied and the rest received in place.
const BUFFER_LEN: usize = 4096;
/// Its length while a payload is dropped.
const DISCARD_LEN: usize = 64 << 10;

pub(super) struct Inbox {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// How many bytes may wait: those of the frame that is being received, and no more of what follows it than a
    /// small frame brings along.
    wanted: usize,
    payload: Option<Arriving>,
}

/// What the received bytes give.
pub(super) enum Item<'a> {
    /// A frame, whose payload has not been looked at.
    Frame(FrameHeader, &'a [u8]),
    /// A payload is complete, or was dropped because its target had gone.
    Landed(LandingToken, Result<LandingStats, StoreError>),
    /// More bytes are needed.
    Hungry,
}

impl Inbox {
    /// An inbox that has received `bytes` already.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let mut buffer = vec![0; BUFFER_LEN.max(bytes.len())];
        buffer[..bytes.len()].copy_from_slice(bytes);
        Self { buffer, start: 0, end: bytes.len(), wanted: BUFFER_LEN, payload: None }
    }

    /// The bytes received and not used yet.
    pub(super) fn waiting(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks bytes as used.
    pub(super) fn skip(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// The next thing in what was received. After a frame with a payload, `expect` comes first.
    ///
    /// # Errors
    /// `Protocol` if this is no frame.
    pub(super) fn next(&mut self) -> Result<Item<'_>, StoreError> {
        if let Some(item) = self.next_of_payload() {
            return Ok(item);
        }
        let Some(head) = self.waiting().first_chunk::<HEADER_LEN>() else {
            return Ok(Item::Hungry);
        };
        let header = FrameHeader::parse(head)?;
        let frame_len = HEADER_LEN + header.body_len as usize;
        if self.waiting().len() < frame_len {
            self.make_room(frame_len);
            self.wanted = frame_len.max(BUFFER_LEN);
            return Ok(Item::Hungry);
        }
        self.wanted = BUFFER_LEN;
        let body = self.start + HEADER_LEN..self.start + frame_len;
        self.start = body.end;
        Ok(Item::Frame(header, &self.buffer[body]))
    }

    /// The payload of the frame just taken.
    pub(super) fn expect(&mut self, payload: Arriving) {
        self.payload = Some(payload);
    }

    /// Uses what was received for the payload under way; none if that was the end of one that nobody waits for.
    fn next_of_payload(&mut self) -> Option<Item<'static>> {
        let payload = self.payload.as_mut()?;
        let left = usize::try_from(payload.left()).unwrap_or(usize::MAX);
        let staged = left.min(self.end - self.start);
        if staged > 0 {
            payload.stage(&self.buffer[self.start..self.start + staged]);
            self.start += staged;
        }
        if payload.left() > 0 {
            return Some(Item::Hungry);
        }
        self.payload.take()?.end().map(|(token, result)| Item::Landed(token, result))
    }

    /// Receives once; says what came and whether the socket may have more.
    pub(super) fn receive(&mut self, socket: &Socket) -> Result<(Got, bool), StoreError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.buffer.len() > BUFFER_LEN && self.payload.is_none() {
                self.buffer.truncate(BUFFER_LEN);
                self.buffer.shrink_to_fit();
            }
        }
        // What follows the payload is staged, so only as much of it as a small frame has.
        let rest = self.buffer.len().min(BUFFER_LEN);
        let buffer = &mut self.buffer[..rest];
        match self.payload.as_mut().and_then(|payload| payload.receive(socket.as_fd(), buffer)) {
            Some(Ok((0, 0, _))) => return Ok((Got::End, false)),
            Some(Ok((landed, rest, drained))) => {
                self.end = rest;
                return Ok((Got::Bytes(landed + rest), !drained));
            }
            Some(Err(error)) => return Self::received(Got::of(Err(error)), 0),
            None => {}
        }
        let mut wanted = self.wanted;
        if let Some(payload) = &self.payload {
            let left = usize::try_from(payload.left()).unwrap_or(usize::MAX);
            wanted = wanted.saturating_add(left);
            if self.buffer.len() < DISCARD_LEN {
                self.buffer.resize(DISCARD_LEN, 0);
            }
        }
        self.make_room(1);
        let until = self.start.saturating_add(wanted).clamp(self.end + 1, self.buffer.len());
        let room = until - self.end;
        let got = socket.receive(&mut self.buffer[self.end..until]);
        if let Ok(Got::Bytes(count)) = got {
            self.end += count;
        }
        Self::received(got, room)
    }

    fn received(got: Result<Got, rustix::io::Errno>, room: usize) -> Result<(Got, bool), StoreError> {
        let got = got.map_err(|error| StoreError::os("receive", error))?;
        Ok((got, got == Got::Bytes(room)))
    }

    /// The landing that will not be completed, when the stream has ended.
    pub(super) fn abandon(&mut self) -> Option<LandingToken> {
        self.payload.take()?.abandon()
    }

    /// Makes room for `len` waiting bytes in all, or for one more than there are.
    fn make_room(&mut self, len: usize) {
        if self.start > 0 && (self.end == self.buffer.len() || self.start + len > self.buffer.len()) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = len.max(self.end + 1);
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
    }
}
