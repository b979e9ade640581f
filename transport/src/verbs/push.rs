//! Pushes: the owner writes what it would otherwise have read, into memory that the reader has opened to its writes for
//! just that. Not when that is done instead of a read (`proof`). Invariant: what is open is one read's own target, and it
//! is closed again before that read is over; who asks is told the outcome by a number in the last write, or by a refusal
//! behind all that was written.

use hetmem_core::{RemoteExtent, SegmentId, StoreError};

use super::abi;
use super::adapters::Adapter;
use super::ends::{End, Of, What};
use super::plugin::Registered;
use super::wire::{PushAsk, PushSaid};

/// The reader's side: what it wants to be written.
pub(super) struct Wanted {
    from: RemoteExtent,
    /// Names it towards the owner, on one connection.
    number: u32,
    /// While the owner may write: the target's own registration.
    open: Option<Registered>,
    pub(super) is_done: bool,
}

impl Wanted {
    pub(super) fn new(from: RemoteExtent, number: u32) -> Self {
        Self { from, number, open: None, is_done: false }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Opens the target and asks the owner to write there; false if there is no buffer for that now.
    pub(super) fn ask(
        &mut self,
        (segment, offset): (SegmentId, u64),
        end: &mut End,
        adapter: &mut Adapter,
    ) -> Result<bool, StoreError> {
        let (address, open) = adapter.open_to_writes(segment, offset, self.from.len_bytes)?;
        let ask = PushAsk { number: self.number, from: self.from, address, key: open.keys().remote };
        let said = say(&PushSaid::Ask(ask), end, adapter);
        self.open = Some(open).filter(|_| said);
        Ok(said)
    }

    /// The owner may write no more.
    pub(super) fn close(&mut self) {
        self.open = None;
    }
}

/// The owner's side: what is to be written, or answered otherwise.
pub(super) enum Push {
    Write { ask: PushAsk, segment: SegmentId, base: u64, done: u64 },
    Refuse { number: u32 },
}

impl Push {
    /// Adds the next of it to what the end posts: whether there was room for that, and whether it is through.
    pub(super) fn add_next(
        &mut self,
        end: &mut End,
        adapter: &mut Adapter,
        slice_bytes: u64,
    ) -> (bool, bool) {
        match self {
            Self::Refuse { number } => {
                let said = say(&PushSaid::Refused { number: *number }, end, adapter);
                (said, said)
            }
            Self::Write { ask, segment, base, done } => {
                let most = (ask.from.len_bytes - *done).min(slice_bytes);
                let Some(piece) = adapter.stretch(*segment, *base, ask.from.offset + *done, most) else {
                    // It was deregistered meanwhile.
                    *self = Self::Refuse { number: ask.number };
                    return (true, false);
                };
                let address = ask.address.wrapping_add(*done);
                *done += u64::from(piece.len_bytes);
                let last = *done == ask.from.len_bytes;
                let told = last.then_some(ask.number);
                end.add(
                    What::Write { piece, address, key: ask.key, told },
                    Of::Part { slot: None, last_of: None },
                    last,
                );
                (true, last)
            }
        }
    }
}

/// Sends a message on a data connection; false if there is no buffer for it now.
fn say(said: &PushSaid, end: &mut End, adapter: &mut Adapter) -> bool {
    let bytes = said.to_bytes();
    let inline = end.made.is_some_and(|made| bytes.len() <= made.inline_bytes_max as usize);
    if inline {
        end.add(What::Inline { bytes: &bytes }, Of::Part { slot: None, last_of: None }, true);
        return true;
    }
    let Some(slot) = adapter.frames.take() else { return false };
    adapter.frames.write(slot, 0, &bytes);
    let pieces: [abi::Piece; 1] = [adapter.frames.piece(slot, 0, bytes.len())];
    end.add(What::Send { pieces: &pieces }, Of::Part { slot: Some(slot), last_of: None }, true);
    true
}
