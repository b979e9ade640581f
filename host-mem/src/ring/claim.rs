//! How places in a publication ring and bytes of a chunk are claimed, filled and drained: one word and one sequence
//! number per place. Not the records (`record`), and not who grants chunks (the engine). Invariant: a place and the
//! bytes that go with it are claimed by one compare-and-swap, so whoever is killed next to it has claimed both or
//! neither; and once the node has taken the open bit away, nothing more is claimed.
//!
//! The claim word, from the low end: 24 bits of position (claims so far, modulo 2^24), 24 bits of granules claimed of
//! the chunk, 15 bits of the chunk's number, and the open bit.
//!
//! The sequence number of place `p % places` is `p` while position `p` may claim it, `p + 1` once `p`'s record is
//! there, and `p + places` when the node has drained it; all modulo 2^24.

use crate::sync::{AtomicU64, Ordering, fence};

/// Chunks are claimed in units of this many bytes: the granule of arenas.
pub(crate) const GRANULE_LEN: u64 = hetmem_core::alloc::GRANULE_LEN_MIN;
const POSITION_BITS: u32 = 24;
const GRANULE_BITS: u32 = 24;
const CHUNK_BITS: u32 = 15;
const OPEN: u64 = 1 << 63;
/// Positions are counted modulo this.
pub(crate) const POSITIONS: u64 = 1 << POSITION_BITS;
/// A chunk has fewer granules.
pub(crate) const GRANULES_MAX: u64 = 1 << GRANULE_BITS;
/// Numbers of chunks stand in the word modulo this.
pub(crate) const CHUNKS: u64 = 1 << CHUNK_BITS;

/// The claim word, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Modulo [`POSITIONS`].
    pub(crate) position: u64,
    pub(crate) granules: u64,
    /// Modulo [`CHUNKS`].
    pub(crate) chunk: u64,
    pub(crate) open: bool,
}

impl State {
    pub(crate) const fn of(word: u64) -> Self {
        Self {
            position: word & (POSITIONS - 1),
            granules: word >> POSITION_BITS & (GRANULES_MAX - 1),
            chunk: word >> (POSITION_BITS + GRANULE_BITS) & (CHUNKS - 1),
            open: word & OPEN != 0,
        }
    }

    pub(crate) const fn word(self) -> u64 {
        (self.position & (POSITIONS - 1))
            | (self.granules & (GRANULES_MAX - 1)) << POSITION_BITS
            | (self.chunk & (CHUNKS - 1)) << (POSITION_BITS + GRANULE_BITS)
            | if self.open { OPEN } else { 0 }
    }
}

/// What may be claimed of a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Its number, modulo [`CHUNKS`].
    pub(crate) chunk: u64,
    pub(crate) granules: u64,
    /// The position of its first claim, modulo [`POSITIONS`].
    pub(crate) first: u64,
    /// How many claims it is good for.
    pub(crate) claims: u64,
}

/// A place that is claimed, with its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claimed {
    /// Modulo [`POSITIONS`].
    pub(crate) position: u64,
    /// The first of the bytes, counted from the chunk's start.
    pub(crate) granule: u64,
}

/// Why nothing was claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The node has taken the chunk back, or another one is in use.
    Closed,
    /// The chunk has no more room, or is not good for another object.
    Exhausted,
    /// The node has not drained the ring.
    Full,
}

/// The claim word and the sequence numbers, as both sides see them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring<'memory> {
    pub(crate) word: &'memory AtomicU64,
    /// One word in `stride` is a sequence number, from the first on.
    pub(crate) slots: &'memory [AtomicU64],
    pub(crate) stride: usize,
}

impl Ring<'_> {
    pub(crate) fn places(self) -> u64 {
        (self.slots.len() / self.stride) as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "below the number of places")]
    fn sequence(&self, position: u64) -> &AtomicU64 {
        &self.slots[(position % self.places()) as usize * self.stride]
    }

    /// For the node, before anyone else knows the ring: position 0 is next, nothing is open.
    pub(crate) fn reset(self) {
        for place in 0..self.places() {
            self.sequence(place).store(place, Ordering::Relaxed);
        }
        self.word.store(0, Ordering::Release);
    }

    pub(crate) fn state(self) -> State {
        State::of(self.word.load(Ordering::Acquire))
    }

    /// Claims a place and `granules` granules, the first of them at a multiple of `align`.
    #[inline]
    pub(crate) fn claim(self, limits: &Limits, granules: u64, align: u64) -> Result<Claimed, Refused> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let state = State::of(word);
            if !state.open || state.chunk != limits.chunk {
                return Err(Refused::Closed);
            }
            let granule = state.granules.next_multiple_of(align);
            let end = granule + granules;
            let claims = state.position.wrapping_sub(limits.first) & (POSITIONS - 1);
            if end > limits.granules || claims >= limits.claims {
                return Err(Refused::Exhausted);
            }
            // Acquire: what the node read from the place is read before what is written there next.
            if self.sequence(state.position).load(Ordering::Acquire) != state.position {
                // A stale word shows a place that somebody else has claimed since.
                let now = self.word.load(Ordering::Acquire);
                if now != word {
                    word = now;
                    continue;
                }
                return Err(Refused::Full);
            }
            let next = State { position: state.position + 1, granules: end, ..state }.word();
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(Claimed { position: state.position, granule }),
                Err(now) => word = now,
            }
        }
    }

    /// For the producer: goes on with another chunk, if the old one is still open.
    pub(crate) fn switch(self, from: u64, to: u64) -> Result<State, Refused> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let state = State::of(word);
            if !state.open || state.chunk != from {
                return Err(Refused::Closed);
            }
            let next = State { chunk: to, granules: 0, ..state };
            match self.word.compare_exchange_weak(word, next.word(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(next),
                Err(now) => word = now,
            }
        }
    }

    /// For the producer: the record of a claimed position is there, and the bytes that it speaks of. A full fence
    /// follows, so that the caller can look whether the node wants to be told.
    #[inline]
    pub(crate) fn fill(self, position: u64) {
        self.sequence(position).swap((position + 1) & (POSITIONS - 1), Ordering::AcqRel);
        crate::sync::full_fence_after_update();
    }

    /// For the node: whether the record of a position is there.
    pub(crate) fn is_filled(self, position: u64) -> bool {
        self.sequence(position).load(Ordering::Acquire) == (position + 1) & (POSITIONS - 1)
    }

    /// For the node: the record of a position was read; the place may be claimed again.
    pub(crate) fn drained(self, position: u64) {
        let next = (position + self.places()) & (POSITIONS - 1);
        self.sequence(position).store(next, Ordering::Release);
    }

    /// For the node: nothing is claimed from here on. Returns what was claimed until then.
    pub(crate) fn close(self) -> State {
        let before = self.word.fetch_and(!OPEN, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        State::of(before)
    }

    /// For the node, with the ring closed: a chunk may be claimed from.
    pub(crate) fn open(self, chunk: u64) -> State {
        let state = State { granules: 0, chunk: chunk & (CHUNKS - 1), open: true, ..self.state() };
        self.word.store(state.word(), Ordering::Release);
        state
    }
}
