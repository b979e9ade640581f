//! One record of the publication ring: 32 words that say what a producer has put where. Not how a place is claimed
//! (`claim`). Invariant: what the node reads was copied out of shared memory before it is looked at, and a `PutAhead`
//! satisfies what `Key` and `ObjectMeta::check` ask; where its bytes are, the engine checks.

use hetmem_core::engine::PutAhead;
use hetmem_core::wire::PutHints;
use hetmem_core::{Checksum, DIMS_MAX, DType, Key, ObjectMeta, Shape, StoreError};

use crate::sync::{AtomicU64, Ordering};

/// Words of a record.
pub(crate) const RECORD_WORDS: usize = 32;
// Positions of a record's words; word 0 is the place's sequence number.
const CHUNK: usize = 1;
const OFFSET: usize = 2;
const LEN_BYTES: usize = 3;
/// Key length (16 bits), dtype (8), dimensions (8), checksum algorithm (8), flags (8), from the low end. 0: nothing was
/// put after all.
const HEAD: usize = 4;
const CHECKSUM: usize = 5;
const TTL_MS: usize = 6;
/// Dimensions, then the key.
const TAIL: usize = 8;
const TAIL_WORDS: usize = RECORD_WORDS - TAIL;

const PIN: u64 = 1;
const CACHE: u64 = 2;
const TTL: u64 = 4;
const FLAGS: u64 = PIN | CACHE | TTL;

/// Whether a record has room for this key and this many dimensions.
pub(crate) fn fits(key: &Key, dims: usize) -> bool {
    dims + key.as_str().len().div_ceil(8) <= TAIL_WORDS
}

/// Writes all words but the sequence number. The key fits.
pub(crate) fn write(
    words: &[AtomicU64],
    (chunk, offset): (u64, u64),
    key: &Key,
    meta: &ObjectMeta,
    hints: &PutHints,
) {
    let store = |position: usize, word: u64| words[position].store(word, Ordering::Relaxed);
    let bytes = key.as_str().as_bytes();
    let dims = meta.shape.dims();
    let flags = if hints.pin { PIN } else { 0 }
        | if hints.cache { CACHE } else { 0 }
        | if hints.ttl_ms.is_some() { TTL } else { 0 };
    let head = bytes.len() as u64
        | u64::from(meta.dtype.code()) << 16
        | (dims.len() as u64) << 24
        | u64::from(meta.checksum.algorithm()) << 32
        | flags << 40;
    store(CHUNK, chunk);
    store(OFFSET, offset);
    store(LEN_BYTES, meta.len_bytes);
    store(HEAD, head);
    store(CHECKSUM, meta.checksum.value());
    store(TTL_MS, hints.ttl_ms.unwrap_or(0));
    for (position, dim) in dims.iter().enumerate() {
        store(TAIL + position, *dim);
    }
    let (whole, rest) = bytes.as_chunks::<8>();
    let mut position = TAIL + dims.len();
    for word in whole {
        store(position, u64::from_le_bytes(*word));
        position += 1;
    }
    if !rest.is_empty() {
        store(position, rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)));
    }
}

/// A claimed place of which nothing came.
pub(crate) fn write_nothing(words: &[AtomicU64]) {
    words[HEAD].store(0, Ordering::Relaxed);
}

/// Reads a record, whatever its words are; `None` if nothing was put.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Protocol`] if it is none.
pub(crate) fn read(words: &[AtomicU64]) -> Result<Option<PutAhead>, StoreError> {
    let mut copy = [0; RECORD_WORDS];
    for (word, copy) in words.iter().zip(&mut copy) {
        *copy = word.load(Ordering::Relaxed);
    }
    if copy[HEAD] == 0 {
        return Ok(None);
    }
    parse(&copy).map(Some).map_err(|why| StoreError::protocol(format!("a published record: {why}")))
}

fn parse(words: &[u64; RECORD_WORDS]) -> Result<PutAhead, StoreError> {
    let head = words[HEAD];
    let (key_len, dims) = ((head & 0xffff) as usize, (head >> 24 & 0xff) as usize);
    let flags = head >> 40;
    if flags & !FLAGS != 0 || dims > DIMS_MAX {
        return Err(StoreError::invalid("record", format!("{dims} dimensions, flags {flags:#x}")));
    }
    let tail = &words[TAIL + dims..];
    if key_len > tail.len() * 8 {
        return Err(StoreError::invalid("record", format!("a key of {key_len} bytes")));
    }
    let mut key = [0; TAIL_WORDS * 8];
    for (word, bytes) in tail.iter().zip(key.as_chunks_mut::<8>().0) {
        *bytes = word.to_le_bytes();
    }
    let dtype = head >> 16 & 0xff;
    let dtype = DType::from_code(dtype as u8)
        .ok_or_else(|| StoreError::invalid("record", format!("element type {dtype}")))?;
    let algorithm = head >> 32 & 0xff;
    let checksum = Checksum::from_parts(algorithm as u8, words[CHECKSUM])
        .ok_or_else(|| StoreError::invalid("record", format!("checksum algorithm {algorithm}")))?;
    let shape = Shape::new(&words[TAIL..TAIL + dims])?;
    let meta = ObjectMeta { dtype, shape, len_bytes: words[LEN_BYTES], checksum };
    meta.check()?;
    Ok(PutAhead {
        chunk: words[CHUNK],
        offset: words[OFFSET],
        key: Key::from_bytes(&key[..key_len])?,
        meta,
        hints: PutHints {
            pin: flags & PIN != 0,
            cache: flags & CACHE != 0,
            ttl_ms: (flags & TTL != 0).then_some(words[TTL_MS]),
            ..PutHints::default()
        },
    })
}
