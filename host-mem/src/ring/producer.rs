//! A publication ring as its client sees it. Not where chunks come from (the node). Invariants: a claim is completed
//! once, with a record or with nothing; between the two calls its bytes are nobody else's to write.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hetmem_core::alloc::PAGE_LEN;
use hetmem_core::wire::PutHints;
use hetmem_core::{Checksum, Extent, Key, ObjectMeta, StoreError};

use crate::mapping::{Access, Mapping};
use crate::memfd;
use crate::ring::claim::{CHUNKS, Claimed, GRANULE_LEN, GRANULES_MAX, Limits, POSITIONS, Refused};
use crate::ring::layout::{self, BELL, GONE, MAGIC, PLACES, RING_LEN, VERSION};
use crate::ring::record;
use crate::sync::Ordering;
use crate::view::WriteMapping;

/// What the node wants of a client that has completed a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals {
    /// It wants to be told.
    pub bell: bool,
    /// It drains the ring no more: whether it has seen this record is unknown.
    pub gone: bool,
}

/// Memory that was granted ahead, mapped.
#[derive(Debug)]
pub struct AheadChunk {
    number: u64,
    extent: Extent,
    limits: Limits,
    memory: Arc<WriteMapping>,
}

impl AheadChunk {
    /// A chunk that the node has granted: its number, where it is, and how many objects it is good for.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if the extent is not inside the memory, or no chunk at all.
    pub fn new(
        number: u64,
        extent: Extent,
        objects: u32,
        memory: Arc<WriteMapping>,
    ) -> Result<Self, StoreError> {
        let granules = extent.len_bytes / GRANULE_LEN;
        let end = extent.offset.checked_add(extent.len_bytes);
        let inside = end.is_some_and(|end| end <= memory.len_bytes());
        if !inside || !extent.offset.is_multiple_of(PAGE_LEN) || granules == 0 || granules >= GRANULES_MAX {
            return Err(StoreError::protocol(format!(
                "{} bytes at {} of segment {} are no memory to publish objects in",
                extent.len_bytes, extent.offset, extent.segment
            )));
        }
        let limits = Limits { chunk: number % CHUNKS, granules, first: 0, claims: u64::from(objects) };
        Ok(Self { number, extent, limits, memory })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.extent.len_bytes
    }
}

/// Granules that an object takes, and the multiple at which they start: as extents of the node's own allocator.
fn room_for(len_bytes: u64) -> (u64, u64) {
    let granules = len_bytes.max(1).div_ceil(GRANULE_LEN);
    let page = PAGE_LEN / GRANULE_LEN;
    (granules, if granules >= page { page } else { 1 })
}

/// The client's side of a ring.
#[derive(Debug)]
pub struct ProducerRing {
    mapping: Mapping,
}

impl ProducerRing {
    /// Maps the descriptor that came with the first grant.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if it is no ring of this layout.
    pub fn map(fd: OwnedFd) -> Result<Self, StoreError> {
        memfd::check_sealed(fd.as_fd(), "publication ring", RING_LEN)?;
        let mapping = Mapping::new(fd.as_fd(), RING_LEN, Access::Write)?;
        drop(fd);
        mapping.prefault(Access::Write);
        let words = layout::header(&mapping);
        let header: [u64; 3] = std::array::from_fn(|word| words[word].load(Ordering::Relaxed));
        if header != [MAGIC, VERSION, u64::from(PLACES)] {
            return Err(StoreError::protocol(format!(
                "publication ring starts with {header:x?}, this build uses version {VERSION} with {PLACES} places"
            )));
        }
        Ok(Self { mapping })
    }

    /// Whether a record has room for the key and the shape.
    #[must_use]
    #[inline]
    pub fn fits(key: &Key, meta: &ObjectMeta) -> bool {
        record::fits(key, meta.shape.dims().len())
    }

    /// Begins to claim from a chunk, in place of `before` if that is still claimed from. False if the node has taken
    /// the chunk back: then it must not be used.
    #[must_use]
    pub fn begin(&self, chunk: &mut AheadChunk, before: Option<&AheadChunk>) -> bool {
        let ring = layout::ring(&self.mapping);
        let opened = match before {
            Some(before) => ring.switch(before.limits.chunk, chunk.limits.chunk),
            None => Err(Refused::Closed),
        };
        // Where there was none, or it was taken back meanwhile, the node has opened this one itself.
        let state = opened.unwrap_or_else(|_| ring.state());
        chunk.limits.first = state.position;
        state.open && state.chunk == chunk.limits.chunk
    }

    /// Claims room for an object of `len_bytes` bytes, and the place of its record.
    ///
    /// # Errors
    /// [`Refused`]: why there is none.
    #[inline]
    pub fn claim<'a>(&'a self, chunk: &'a AheadChunk, len_bytes: u64) -> Result<AheadClaim<'a>, Refused> {
        let (granules, align) = room_for(len_bytes);
        let Claimed { position, granule } =
            layout::ring(&self.mapping).claim(&chunk.limits, granules, align)?;
        Ok(AheadClaim { ring: self, chunk, position, offset: granule * GRANULE_LEN, len_bytes, open: true })
    }

    /// What the node wants.
    #[inline]
    fn signals(&self) -> Signals {
        let signals = layout::signals(&self.mapping);
        let word = signals.load(Ordering::Relaxed);
        if word == 0 {
            return Signals { bell: false, gone: false };
        }
        // One of many threads rings it.
        let bell = word & BELL != 0 && signals.fetch_and(!BELL, Ordering::AcqRel) & BELL != 0;
        Signals { bell, gone: word & GONE != 0 }
    }
}

/// Room for one object. Dropped, it is given up: the place of its record says that nothing came.
#[derive(Debug)]
pub struct AheadClaim<'a> {
    ring: &'a ProducerRing,
    chunk: &'a AheadChunk,
    position: u64,
    /// From the chunk's start.
    offset: u64,
    len_bytes: u64,
    open: bool,
}

impl AheadClaim<'_> {
    /// Whether half of the chunk is used, by bytes or by objects.
    #[must_use]
    #[inline]
    pub fn is_past_middle(&self) -> bool {
        let limits = &self.chunk.limits;
        let claims = self.position.wrapping_sub(limits.first) % POSITIONS;
        claims >= limits.claims / 2 || self.offset >= self.chunk.extent.len_bytes / 2
    }

    /// Copies the object's bytes in, and returns their checksum if it is wanted.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if there are not as many as were claimed.
    #[inline]
    pub fn fill(&mut self, bytes: &[u8], checksum: bool) -> Result<Checksum, StoreError> {
        if bytes.len() as u64 != self.len_bytes {
            let why = format!("{} bytes for a claim of {}", bytes.len(), self.len_bytes);
            return Err(StoreError::invalid("fill", why));
        }
        let offset = self.chunk.extent.offset + self.offset;
        self.chunk.memory.fill_claimed(offset, bytes, checksum, self)
    }

    /// Says that the object is there, with its bytes.
    #[inline]
    pub fn publish(mut self, key: &Key, meta: &ObjectMeta, hints: &PutHints) -> Signals {
        let words = layout::record(&self.ring.mapping, self.position);
        record::write(words, (self.chunk.number, self.offset), key, meta, hints);
        self.open = false;
        layout::ring(&self.ring.mapping).fill(self.position);
        self.ring.signals()
    }
}

impl Drop for AheadClaim<'_> {
    fn drop(&mut self) {
        if self.open {
            record::write_nothing(layout::record(&self.ring.mapping, self.position));
            layout::ring(&self.ring.mapping).fill(self.position);
        }
    }
}
