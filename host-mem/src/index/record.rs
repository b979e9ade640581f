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
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Record {
    generation: u64,
    offset: u64,
    len_bytes: u64,
    place: u64,
    head: u64,
    checksum: u64,
    origin: u64,
    epoch: u64,
    number: u64,
    shape: Shape,
}

fn dims_in(head: u64) -> usize {
    (head >> 24 & 0xff) as usize
}

/// Whether a key lies inside its slot, behind this many dimensions.
fn fits(key_len: usize, dims: usize) -> bool {
    dims + key_len.div_ceil(8) <= TAIL_WORDS
}

/// The key as little-endian words, the last one filled up with zeros: the whole words, and what is left.
#[inline]
fn key_words(key: &[u8]) -> (&[[u8; 8]], Option<u64>) {
    let (whole, rest) = key.as_chunks::<8>();
    if rest.is_empty() {
        return (whole, None);
    }
    let last = match key.last_chunk() {
        // One load and a shift: a copy of a few bytes costs more than the rest of the comparison.
        Some(end) => u64::from_le_bytes(*end) >> (64 - 8 * rest.len()),
        None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    (whole, Some(last))
}

/// Whether the words at `stored` are this key's.
#[inline]
fn shows(stored: &[AtomicU64], key: &[u8]) -> bool {
    let (whole, last) = key_words(key);
    let Some((stored, after)) = stored.split_at_checked(whole.len()) else {
        return false;
    };
    let same =
        |(word, stored): (&[u8; 8], &AtomicU64)| u64::from_le_bytes(*word) == stored.load(Ordering::Relaxed);
    whole.iter().zip(stored).all(same)
        && last.is_none_or(|last| after.first().is_some_and(|stored| stored.load(Ordering::Relaxed) == last))
}

impl Record {
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
        if !shows(stored, key) {
            return None;
        }
        *self = Self {
            generation: load(GENERATION),
            offset: load(OFFSET),
            len_bytes: load(LEN_BYTES),
            place: load(PLACE),
            head,
            checksum: load(CHECKSUM),
            origin: load(ORIGIN),
            epoch: load(EPOCH),
            number: load(NUMBER),
            shape: Shape::from_fn(dims, |dim| load(TAIL + dim))?,
        };
        // Two loads of one word need not agree while the slot changes; the generation is claimed in a pin word, where
        // 0 would claim nothing.
        Some(self.generation).filter(|generation| *generation != 0)
    }

    /// What the words mean.
    #[inline]
    pub(crate) fn decode(&self, key: &Key) -> Result<IndexEntry, StoreError> {
        self.sensible().ok_or_else(|| {
            StoreError::corrupt(key, format!("its entry in the shared index makes no sense: {self:x?}"))
        })
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields are cut out of words")]
    fn sensible(&self) -> Option<IndexEntry> {
        let Self { head, place, .. } = *self;
        if dims_in(head) != self.shape.dims().len() {
            return None;
        }
        let meta = ObjectMeta {
            dtype: DType::from_code((head >> 16) as u8)?,
            shape: self.shape,
            len_bytes: self.len_bytes,
            checksum: Checksum::from_parts((head >> 32) as u8, self.checksum)?,
        };
        if !meta.is_consistent() {
            return None;
        }
        Some(IndexEntry {
            object: ObjectId { origin: NodeId(self.origin), epoch: Epoch(self.epoch), number: self.number },
            meta,
            generation: Generation(self.generation),
            extent: Extent {
                segment: SegmentId(place as u32),
                offset: self.offset,
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
    let (whole, last) = key_words(bytes);
    let whole = whole.iter().map(|word| u64::from_le_bytes(*word));
    for (word, place) in whole.chain(last).zip(place) {
        place.store(word, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key is compared only where its fingerprint and length are the slot's, so no get of another key comes here.
    #[test]
    fn a_key_is_only_itself_at_every_length() {
        for len in 1..=40_usize {
            let key: Vec<u8> = (0..len).map(|at| u8::try_from(0xf0 - at).expect("a byte")).collect();
            let padded: Vec<u8> = key.iter().copied().chain([0; 8]).take(len.next_multiple_of(8)).collect();
            let stored = || -> Vec<AtomicU64> {
                let (words, _) = padded.as_chunks::<8>();
                words.iter().map(|word| AtomicU64::new(u64::from_le_bytes(*word))).collect()
            };
            let words = stored();
            assert!(shows(&words, &key), "{len}");
            assert!(!shows(&words[1..], &key), "{len}: a word is missing");
            for at in 0..padded.len() {
                let words = stored();
                words[at / 8].fetch_xor(1 << (at % 8 * 8), Ordering::Relaxed);
                assert!(!shows(&words, &key), "{len}: byte {at} differs");
            }
        }
    }
}
