//! A slot's words and what they mean. Not how they are guarded (`seqlock`, `slot`). Invariant: `IndexEntry` values
//! that come out of `Record::decode` satisfy what `ObjectMeta::check` and `publish` ask of them.

use hetmem_core::{
    Checksum, DIMS_MAX, DType, Epoch, Extent, Generation, Key, NodeId, ObjectId, ObjectMeta, SegmentId,
    Shape, StoreError, Tier,
};

use crate::index::IndexEntry;
use crate::index::layout::{
    CHECKSUM, EPOCH, FINGERPRINT, GENERATION, Geometry, HEAD, LEN_BYTES, NUMBER, OFFSET, ORIGIN, PLACE,
    SLOT_WORDS, TAIL, TAIL_WORDS,
};
use crate::sync::{AtomicU64, Ordering};

/// The words of a slot as they were read, the key and the sequence left out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    words: [u64; TAIL],
    dims: [u64; DIMS_MAX],
}

fn dims_in(head: u64) -> usize {
    (head >> 24 & 0xff) as usize
}

/// Whether a key lies inside its slot, behind this many dimensions.
fn fits(key_len: usize, dims: usize) -> bool {
    dims + key_len.div_ceil(8) <= TAIL_WORDS
}

/// The key as little-endian words, the last one filled up with zeros.
fn key_words(key: &[u8]) -> impl Iterator<Item = u64> {
    let (whole, rest) = key.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let last = (!rest.is_empty()).then(|| u64::from_le_bytes(last));
    whole.iter().map(|word| u64::from_le_bytes(*word)).chain(last)
}

impl Record {
    /// Nothing read yet.
    pub(crate) const EMPTY: Self = Self { words: [0; TAIL], dims: [0; DIMS_MAX] };

    /// Reads the slot if it shows `key`, and returns the generation, not 0. What was read may be torn: the caller
    /// looks at the sequence again. It stays where it is read to, since moving it costs as much as reading it.
    #[inline]
    pub(crate) fn read(
        &mut self,
        memory: &[AtomicU64],
        geometry: &Geometry,
        slot: u32,
        words: &[AtomicU64],
        key: &Key,
        fingerprint: u64,
    ) -> Option<u64> {
        let words: &[AtomicU64; SLOT_WORDS] = words.try_into().ok()?;
        let load = |position: usize| words[position].load(Ordering::Relaxed);
        let key = key.as_str().as_bytes();
        let head = load(HEAD);
        if load(FINGERPRINT) != fingerprint || head & 0xffff != key.len() as u64 || load(GENERATION) == 0 {
            return None;
        }
        let dims = dims_in(head).min(DIMS_MAX);
        let stored = if fits(key.len(), dims) {
            &words[TAIL + dims..]
        } else {
            memory.get(geometry.long_key_at(slot)..)?
        };
        if !key_words(key).zip(stored).all(|(word, stored)| word == stored.load(Ordering::Relaxed)) {
            return None;
        }
        for (position, word) in self.words.iter_mut().enumerate() {
            *word = load(position);
        }
        for (dim, stored) in self.dims[..dims].iter_mut().zip(&words[TAIL..]) {
            *dim = stored.load(Ordering::Relaxed);
        }
        // Two loads of one word need not agree while the slot changes; the generation is claimed in a pin word, where
        // 0 would claim nothing.
        Some(self.words[GENERATION]).filter(|generation| *generation != 0)
    }

    /// What the words mean.
    #[inline]
    pub(crate) fn decode(&self, key: &Key) -> Result<IndexEntry, StoreError> {
        self.sensible().ok_or_else(|| {
            StoreError::corrupt(
                key,
                format!("its entry in the shared index makes no sense: {:x?}", self.words),
            )
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "fields are cut out of words")]
    fn sensible(&self) -> Option<IndexEntry> {
        let [head, place] = [self.words[HEAD], self.words[PLACE]];
        let meta = ObjectMeta {
            dtype: DType::from_code((head >> 16) as u8)?,
            shape: Shape::new(self.dims.get(..dims_in(head))?).ok()?,
            len_bytes: self.words[LEN_BYTES],
            checksum: Checksum::from_parts((head >> 32) as u8, self.words[CHECKSUM])?,
        };
        meta.check().ok()?;
        Some(IndexEntry {
            object: ObjectId {
                origin: NodeId(self.words[ORIGIN]),
                epoch: Epoch(self.words[EPOCH]),
                number: self.words[NUMBER],
            },
            meta,
            generation: Generation(self.words[GENERATION]),
            extent: Extent {
                segment: SegmentId(place as u32),
                offset: self.words[OFFSET],
                len_bytes: meta.len_bytes,
            },
            tier: Tier::from_code((place >> 32) as u32)?,
        })
    }
}

/// Writes the slot's words, except its sequence. The caller holds the sequence odd.
pub(crate) fn write(
    memory: &[AtomicU64],
    geometry: &Geometry,
    slot: u32,
    words: &[AtomicU64],
    key: &Key,
    entry: &IndexEntry,
) {
    let store = |position: usize, word: u64| words[position].store(word, Ordering::Relaxed);
    let bytes = key.as_str().as_bytes();
    let meta = &entry.meta;
    let dims = meta.shape.dims();
    let head = bytes.len() as u64
        | u64::from(meta.dtype.code()) << 16
        | (dims.len() as u64) << 24
        | u64::from(meta.checksum.algorithm()) << 32;
    store(GENERATION, entry.generation.0);
    store(FINGERPRINT, key.fingerprint());
    store(OFFSET, entry.extent.offset);
    store(LEN_BYTES, meta.len_bytes);
    store(PLACE, u64::from(entry.extent.segment.0) | u64::from(entry.tier.code()) << 32);
    store(HEAD, head);
    store(CHECKSUM, meta.checksum.value());
    store(ORIGIN, entry.object.origin.0);
    store(EPOCH, entry.object.epoch.0);
    store(NUMBER, entry.object.number);
    for (position, dim) in dims.iter().enumerate() {
        store(TAIL + position, *dim);
    }
    let place = if fits(bytes.len(), dims.len()) {
        &words[TAIL + dims.len()..]
    } else {
        &memory[geometry.long_key_at(slot)..]
    };
    for (word, place) in key_words(bytes).zip(place) {
        place.store(word, Ordering::Relaxed);
    }
}
