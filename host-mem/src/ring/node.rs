//! A publication ring as the node sees it. Not what is done with the records (the engine). Invariants: every word is
//! taken for the client's word only, and what cannot be true is an error; no call waits for the client; a position is
//! drained once, whatever its sequence number says afterwards.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hetmem_core::StoreError;
use hetmem_core::engine::{PutAhead, RingState};
use rustix::fs::SealFlags;

use crate::mapping::{Access, Mapping};
use crate::ring::claim::{CHUNKS, POSITIONS};
use crate::ring::layout::{self, BELL, GONE, MAGIC, PLACES, RING_LEN, VERSION};
use crate::ring::record;
use crate::sync::{Ordering, fence};
use crate::{memfd, os};

/// The node's side of a ring.
#[derive(Debug)]
pub struct NodeRing {
    mapping: Mapping,
    fd: Arc<OwnedFd>,
    tail: u64,
    /// From `tail` on, whether the record was drained. A producer that is in the middle of one holds up no other.
    drained: VecDeque<bool>,
    chunk: u64,
    next: Option<u64>,
}

impl NodeRing {
    /// A fresh ring, with memory for all of it, sealed against changes of its length.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] when there are no descriptors or no memory left.
    pub fn create() -> Result<Self, StoreError> {
        let fd = memfd::create("hetmem-ring", RING_LEN, None)?;
        let mapping = Mapping::new(fd.as_fd(), RING_LEN, Access::Write)?;
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, RING_LEN)
            .map_err(|errno| os::error("populate publication ring", errno))?;
        memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        layout::ring(&mapping).reset();
        for (word, value) in layout::header(&mapping).iter().zip([MAGIC, VERSION, u64::from(PLACES)]) {
            word.store(value, Ordering::Relaxed);
        }
        Ok(Self { mapping, fd: Arc::new(fd), tail: 0, drained: VecDeque::new(), chunk: 0, next: None })
    }

    /// To be passed to the client, writable.
    #[must_use]
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Records that may wait to be drained at a time.
    #[must_use]
    pub const fn places() -> u32 {
        PLACES
    }

    /// Whether anything was claimed that was not drained yet. One load; costs a cache line if the client is at work.
    #[must_use]
    pub fn has_news(&self) -> bool {
        layout::ring(&self.mapping).state().position != self.tail % POSITIONS
    }

    /// What the claim word says.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if that cannot be.
    fn look(&mut self) -> Result<RingState, StoreError> {
        let state = layout::ring(&self.mapping).state();
        let waiting = state.position.wrapping_sub(self.tail) % POSITIONS;
        if waiting > u64::from(PLACES) {
            return Err(StoreError::protocol(format!(
                "its publication ring shows {waiting} records, there are {PLACES} places"
            )));
        }
        if state.chunk != self.chunk % CHUNKS {
            match self.next.take_if(|next| state.chunk == *next % CHUNKS) {
                Some(next) => self.chunk = next,
                None => {
                    return Err(StoreError::protocol(format!(
                        "its publication ring claims from chunk {}, it was granted {} and {:?}",
                        state.chunk, self.chunk, self.next
                    )));
                }
            }
        }
        Ok(RingState { chunk: self.chunk, open: state.open, head: self.tail + waiting, tail: self.tail })
    }

    /// Takes every record that is complete.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the ring makes no sense; `puts` then has what did until there.
    pub fn drain(&mut self, puts: &mut Vec<PutAhead>) -> Result<RingState, StoreError> {
        let look = self.look()?;
        for position in self.tail..look.head {
            #[expect(clippy::cast_possible_truncation, reason = "at most PLACES")]
            let behind = (position - self.tail) as usize;
            if behind == self.drained.len() {
                self.drained.push_back(false);
            }
            let ring = layout::ring(&self.mapping);
            if self.drained[behind] || !ring.is_filled(position % POSITIONS) {
                continue;
            }
            self.drained[behind] = true;
            let put = record::read(layout::record(&self.mapping, position));
            ring.drained(position % POSITIONS);
            puts.extend(put?);
        }
        while self.drained.front() == Some(&true) {
            self.drained.pop_front();
            self.tail += 1;
        }
        Ok(RingState { tail: self.tail, ..look })
    }

    /// A chunk was granted: it is claimed from at once if the client has none, else when it is through with that one.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the ring makes no sense.
    pub fn grant(&mut self, chunk: u64) -> Result<RingState, StoreError> {
        let look = self.look()?;
        if look.open {
            self.next = Some(chunk);
            return Ok(look);
        }
        layout::ring(&self.mapping).open(chunk);
        self.chunk = chunk;
        self.look()
    }

    /// Nothing is claimed from here on, of any chunk.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the ring makes no sense; it is closed all the same.
    pub fn close(&mut self) -> Result<RingState, StoreError> {
        layout::ring(&self.mapping).close();
        let look = self.look();
        self.next = None;
        look
    }

    /// The session is over: what is complete can be drained once more, and whoever completes a record from here on
    /// sees that nobody will.
    pub fn retire(&mut self) {
        layout::signals(&self.mapping).fetch_or(GONE, Ordering::AcqRel);
        layout::ring(&self.mapping).close();
    }

    /// Asks the client to say so when it has completed a record. Records that are complete already are not told of:
    /// look at the ring after this.
    pub fn set_bell(&self) {
        let signals = layout::signals(&self.mapping);
        if signals.load(Ordering::Relaxed) & BELL == 0 {
            signals.fetch_or(BELL, Ordering::AcqRel);
        }
        // The client fills, fences and looks at the bell; this side sets it, fences and looks at the ring.
        fence(Ordering::SeqCst);
    }
}
