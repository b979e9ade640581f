//! The answers that come on one data stream, on the asking side. Not which are asked for (`reads`), and not the stream
//! (`stream`). Invariant: bytes that are received are those of the answers that are expected, in their order; those of a
//! slice go straight into its local extent, unless an answer before it on the stream was shorter than was hoped for.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use hetmem_core::{ErrorKind, StoreError};
use rustix::io::Errno;

use super::reads::{Answered, Expected, WORD_LEN};
use super::sys::Socket;
use super::wire::{ANSWER_LEN, Answer, error_from};
use crate::region::{Piece, Unmoved};
use crate::staged::Staged;

#[derive(Default)]
pub(super) struct Answers {
    under_way: Option<Incoming>,
    /// What the bytes of the current slice pass through, if they are for a device.
    staged: Option<Staged>,
    /// Received and not used yet: of a head or a word that is not whole; and, after a refusal came where a slice was
    /// expected, all that came with it.
    backlog: VecDeque<u8>,
}

/// The rest of an answer whose head is there.
enum Incoming {
    Bytes { local: Piece, done: usize, staged: usize },
    Word,
    Refusal { kind: ErrorKind, len: usize },
}

/// Where bytes of a slice are received: into this piece from so far on, after which the slice ends or it does not.
struct Room {
    piece: Piece,
    from: usize,
    is_last: bool,
}

impl Room {
    fn len(&self) -> usize {
        self.piece.len() - self.from
    }
}

/// What one call has brought.
pub(super) enum Received {
    /// Whether the socket may have more.
    Bytes(usize, bool),
    Nothing,
    End,
}

impl Answers {
    /// Receives once: the head of the next answer, its bytes, and the head of the one after that with its word, if it
    /// is one; as much of these as has come.
    ///
    /// # Errors
    /// The socket's, a head that is none, a slice whose memory was deregistered.
    pub(super) fn receive(&mut self, socket: &Socket, expected: &Expected) -> Result<Received, StoreError> {
        let mut head = [0; ANSWER_LEN + WORD_LEN];
        let mut tail = [0; ANSWER_LEN + WORD_LEN];
        let head_len = ANSWER_LEN - self.backlog.len().min(ANSWER_LEN);
        let (room, head_len) = match (&self.under_way, &expected.slice) {
            (Some(Incoming::Bytes { local, done, .. }), _) => {
                let (local, done) = (local.clone(), *done);
                (Some(self.room(local, done)?), 0)
            }
            (Some(Incoming::Word), _) => (None, WORD_LEN - self.backlog.len().min(WORD_LEN)),
            // Not more than it has: what follows it is another answer.
            (Some(Incoming::Refusal { len, .. }), _) => (None, (len - self.backlog.len()).min(head.len())),
            (None, Some(slice)) => match &slice.local {
                Some(local) => (Some(self.room(local.clone(), 0)?), head_len),
                None => (None, head_len + WORD_LEN),
            },
            (None, None) => (None, head_len),
        };
        let tail_len = match &room {
            Some(Room { is_last: false, .. }) => 0,
            _ => ANSWER_LEN + if expected.word_follows { WORD_LEN } else { 0 },
        };
        let (head, tail) = (&mut head[..head_len], &mut tail[..tail_len]);
        let (received, hoped) = match &room {
            Some(Room { piece, from, .. }) => (
                piece.receive(socket.as_fd(), head, *from, tail),
                head.len() + piece.len() - from + tail.len(),
            ),
            None => (socket.receive_into(head).map_err(Unmoved::Os), head.len()),
        };
        let count = match received {
            Ok(0) => return Ok(Received::End),
            Ok(count) => count,
            Err(Unmoved::Os(Errno::AGAIN | Errno::INTR)) => return Ok(Received::Nothing),
            Err(unmoved) => return Err(failed(unmoved)),
        };
        let in_head = count.min(head.len());
        self.backlog.extend(&head[..in_head]);
        if let Some(room) = room {
            let landed = (count - in_head).min(room.len());
            let after = &tail[..count - in_head - landed];
            self.landed(expected, &room, landed, after)?;
        }
        Ok(Received::Bytes(count, count == hoped))
    }

    /// Where the bytes of the current slice from `done` on are received.
    fn room(&mut self, local: Piece, done: usize) -> Result<Room, StoreError> {
        if !local.is_of_device() {
            return Ok(Room { piece: local, from: done, is_last: true });
        }
        let staged = match &mut self.staged {
            Some(staged) => staged,
            none => none.insert(Staged::new(local).map_err(failed)?),
        };
        let (piece, is_last) = staged.room().map_err(failed)?;
        Ok(Room { piece, from: 0, is_last })
    }

    /// Bytes came into a slice's room, and behind it, perhaps before its head was looked at.
    fn landed(
        &mut self,
        expected: &Expected,
        room: &Room,
        landed: usize,
        after: &[u8],
    ) -> Result<(), StoreError> {
        if self.under_way.is_none() && landed > 0 {
            self.begin(expected)?;
        }
        match &mut self.under_way {
            Some(Incoming::Bytes { done, .. }) => {
                *done += landed;
                self.staged.as_mut().map_or(Ok(()), |staged| staged.received(landed)).map_err(failed)?;
            }
            // It was refused: what lies in the room is the reason, and whatever follows that.
            Some(Incoming::Refusal { .. }) => {
                let text = room.piece.copy_out(room.from, landed);
                self.backlog.extend(text.ok_or_else(deregistered)?);
            }
            Some(Incoming::Word) | None => {}
        }
        self.backlog.extend(after);
        Ok(())
    }

    /// Looks at the head of the next answer.
    fn begin(&mut self, expected: &Expected) -> Result<(), StoreError> {
        let Some(slice) = &expected.slice else {
            return Err(StoreError::protocol("an answer came on a data stream that asked for nothing"));
        };
        let mut head = [0; ANSWER_LEN];
        for (byte, received) in head.iter_mut().zip(self.backlog.drain(..ANSWER_LEN)) {
            *byte = received;
        }
        let answer = Answer::parse(head, slice.number, slice.remote.len_bytes)?;
        self.under_way = Some(match (answer.error, slice.local.clone()) {
            (None, Some(local)) => Incoming::Bytes { local, done: 0, staged: 0 },
            (None, None) => Incoming::Word,
            (Some(kind), _) => {
                Incoming::Refusal { kind, len: usize::try_from(answer.len_bytes).unwrap_or(usize::MAX) }
            }
        });
        Ok(())
    }

    /// The next answer that is complete, if it is.
    ///
    /// # Errors
    /// A head that is none, a slice whose memory was deregistered.
    pub(super) fn next(&mut self, expected: &Expected) -> Result<Option<Answered>, StoreError> {
        if self.under_way.is_none() && self.backlog.len() >= ANSWER_LEN {
            self.begin(expected)?;
        }
        self.take_from_backlog()?;
        let answered = match &mut self.under_way {
            Some(Incoming::Bytes { local, done, .. }) if *done < local.len() => return Ok(None),
            Some(Incoming::Bytes { local, staged, .. }) => {
                let staged_bytes = match &mut self.staged {
                    Some(through) => {
                        through.finish().map_err(failed)?;
                        local.len()
                    }
                    None => *staged,
                };
                Answered::Bytes { staged_bytes: staged_bytes as u64 }
            }
            Some(Incoming::Word) if self.backlog.len() >= WORD_LEN => {
                let mut word = [0; WORD_LEN];
                for (byte, received) in word.iter_mut().zip(self.backlog.drain(..WORD_LEN)) {
                    *byte = received;
                }
                // As it lies in the owner's memory: the protocol fixes little-endian for what it means.
                Answered::Word(u64::from_le_bytes(word))
            }
            Some(Incoming::Refusal { kind, len }) if self.backlog.len() >= *len => {
                let text: Vec<u8> = self.backlog.drain(..*len).collect();
                Answered::Refused(error_from(*kind, &text))
            }
            Some(Incoming::Word | Incoming::Refusal { .. }) | None => return Ok(None),
        };
        (self.under_way, self.staged) = (None, None);
        Ok(Some(answered))
    }

    /// Bytes of the current slice that came with an answer before it.
    fn take_from_backlog(&mut self) -> Result<(), StoreError> {
        while let Some(Incoming::Bytes { local, done, .. }) = &self.under_way
            && *done < local.len()
            && !self.backlog.is_empty()
        {
            let (local, so_far) = (local.clone(), *done);
            let room = self.room(local, so_far)?;
            let count = self.backlog.len().min(room.len());
            let bytes: Vec<u8> = self.backlog.drain(..count).collect();
            if !room.piece.copy_in(room.from, &bytes) {
                return Err(deregistered());
            }
            if let Some(through) = &mut self.staged {
                through.received(count).map_err(failed)?;
            }
            if let Some(Incoming::Bytes { done, staged, .. }) = &mut self.under_way {
                *done += count;
                *staged += count;
            }
        }
        Ok(())
    }

    /// The stream has ended: nothing of the current slice is copied any more when this returns.
    pub(super) fn end(&mut self) {
        if let Some(mut staged) = self.staged.take() {
            // Its slice is asked for again, or its read fails.
            let _ = staged.finish();
        }
        self.under_way = None;
    }
}

/// Why bytes of a read did not come to their place.
fn failed(unmoved: Unmoved) -> StoreError {
    match unmoved {
        Unmoved::Os(error) => StoreError::os("receive a read's bytes", error),
        Unmoved::Device(error) => error,
        Unmoved::Closed => deregistered(),
    }
}

fn deregistered() -> StoreError {
    StoreError::stale("receive", "a read's bytes", "the local segment was deregistered")
}
