//! One piece of a device's memory on its way through host memory, to or from a socket: the device copies one part while
//! the socket has another. Not the copies (`memory`), nor the sockets. Invariant: a part of the ring is handed to a socket
//! only while no copy of it is under way, and what is told to be done was copied.

use std::sync::Arc;

use crate::memory::{Copying, Ring, StagingWay};
use crate::region::{Piece, Unmoved};

/// Bytes of one copy. A copy of a GPU costs 6 to 10 us to begin, whatever its length, as measured by others (gdrcopy's
/// README); at 25 GB/s or more that is a fifth of what 1 MiB takes, and a socket takes longer for 1 MiB than both.
const CHUNK_LEN: usize = 1 << 20;
/// One for the socket, one for the device.
const CHUNKS: usize = 2;

/// A piece, and how far it has got.
pub(crate) struct Staged {
    piece: Piece,
    /// Copies under way, by their part of the ring.
    copies: [Option<Arc<dyn Copying>>; CHUNKS],
    room: Piece,
    ring: Box<dyn Ring>,
    /// Bytes that the socket gave or took, and bytes of which copies were begun.
    done: usize,
    begun: usize,
}

impl Staged {
    /// # Errors
    /// See `Piece::ring`.
    pub(crate) fn new(piece: Piece) -> Result<Self, Unmoved> {
        let ring = piece.ring((CHUNKS * CHUNK_LEN).min(piece.len()))?;
        let room = Piece::of_ring(ring.memory().ok_or(Unmoved::Closed)?);
        Ok(Self { piece, copies: [const { None }; CHUNKS], room, ring, done: 0, begun: 0 })
    }

    /// Where the part of the ring that belongs to a byte of the piece begins, its number, and how many bytes of the piece
    /// pass through it.
    fn chunk(&self, byte: usize) -> (usize, usize, usize) {
        let number = byte / CHUNK_LEN % CHUNKS;
        (number * CHUNK_LEN, number, (self.piece.len() - byte / CHUNK_LEN * CHUNK_LEN).min(CHUNK_LEN))
    }

    fn wait(&mut self, number: usize) -> Result<(), Unmoved> {
        let copy = self.copies.get_mut(number).and_then(Option::take);
        copy.map_or(Ok(()), |copy| copy.wait()).map_err(Unmoved::Device)
    }

    fn begin(&mut self, way: StagingWay) -> Result<(), Unmoved> {
        let (at, number, len) = self.chunk(self.begun);
        let part = self.piece.part(self.begun, len);
        let copy = part.begin_copy(way, (&mut *self.ring, at))?;
        if let Some(place) = self.copies.get_mut(number) {
            *place = Some(copy);
        }
        self.begun += len;
        Ok(())
    }

    /// What of the ring the rest of the current chunk goes through, and whether the piece ends with it.
    fn current(&self) -> (Piece, bool) {
        let (at, _, len) = self.chunk(self.done);
        let from = self.done % CHUNK_LEN;
        let room = self.room.part(at + from, len - from);
        (room, self.done - from + len == self.piece.len())
    }

    /// Room for the next bytes that a socket gives, and whether the piece ends with it.
    ///
    /// # Errors
    /// Those of the copy that had the room before.
    pub(crate) fn room(&mut self) -> Result<(Piece, bool), Unmoved> {
        let (_, number, _) = self.chunk(self.done);
        self.wait(number)?;
        Ok(self.current())
    }

    /// So many bytes are in the room; what is complete is copied to the device.
    ///
    /// # Errors
    /// See `Piece::begin_copy`.
    pub(crate) fn received(&mut self, count: usize) -> Result<(), Unmoved> {
        self.done = (self.done + count).min(self.piece.len());
        if self.done > self.begun && (self.done.is_multiple_of(CHUNK_LEN) || self.done == self.piece.len()) {
            self.begin(StagingWay::In)?;
        }
        Ok(())
    }

    /// Waits until all that was received is on the device.
    ///
    /// # Errors
    /// Those of the copies.
    pub(crate) fn finish(&mut self) -> Result<(), Unmoved> {
        (0..CHUNKS).try_for_each(|number| self.wait(number))
    }

    /// Begins to copy as much from the device as the ring has room for.
    ///
    /// # Errors
    /// See `Piece::begin_copy`.
    pub(crate) fn prime(&mut self) -> Result<(), Unmoved> {
        while self.begun < self.piece.len() && self.begun / CHUNK_LEN < self.done / CHUNK_LEN + CHUNKS {
            self.begin(StagingWay::Out)?;
        }
        Ok(())
    }

    /// Bytes for the socket to take, and whether the piece ends with them.
    ///
    /// # Errors
    /// Those of the copies; see `Piece::begin_copy`.
    pub(crate) fn ready(&mut self) -> Result<(Piece, bool), Unmoved> {
        self.prime()?;
        let (_, number, _) = self.chunk(self.done);
        self.wait(number)?;
        Ok(self.current())
    }

    /// The socket took so many.
    pub(crate) fn sent(&mut self, count: usize) {
        self.done = (self.done + count).min(self.piece.len());
    }
}
