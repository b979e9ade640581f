//! The publication ring: how a client puts objects without asking. It writes them into memory that was granted to it
//! ahead and says so in a ring of records; the node drains the ring before it answers anybody. Not a queue of
//! messages, and not who gets memory (the engine). Invariant: a record that its client has completed is drained once,
//! whatever becomes of the client; and what a client writes here costs nobody but itself.

mod claim;
#[cfg(not(loom))]
mod node;
#[cfg(not(loom))]
mod producer;
#[cfg(not(loom))]
mod record;

#[cfg(loom)]
mod model;

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(not(loom))]
pub use claim::Refused;
#[cfg(not(loom))]
pub use {
    node::NodeRing,
    producer::{AheadChunk, AheadClaim, ProducerRing, Signals},
};

#[cfg(not(loom))]
mod layout {
    use super::claim::Ring;
    use super::record::RECORD_WORDS;
    use crate::mapping::Mapping;
    use crate::sync::AtomicU64;

    /// "HETMRNG1" read as text.
    pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"HETMRNG1");
    /// Goes up with every change of the layout.
    pub(super) const VERSION: u64 = 1;
    /// Records that may wait to be drained.
    pub(super) const PLACES: u32 = 2_048;

    // Positions in words; docs/shared-memory.md shows them in bytes.
    const CLAIM: usize = 8;
    const SIGNALS: usize = 16;
    const RECORDS: usize = 512;
    const END: usize = RECORDS + PLACES as usize * RECORD_WORDS;
    /// The length of the file in bytes.
    pub(super) const RING_LEN: u64 = END as u64 * 8;

    /// The node asks to be told of the next record.
    pub(super) const BELL: u64 = 1;
    /// The node drains the ring no more.
    pub(super) const GONE: u64 = 2;

    pub(super) fn ring(mapping: &Mapping) -> Ring<'_> {
        let words = mapping.words();
        Ring { word: &words[CLAIM], slots: &words[RECORDS..END], stride: RECORD_WORDS }
    }

    pub(super) fn signals(mapping: &Mapping) -> &AtomicU64 {
        &mapping.words()[SIGNALS]
    }

    /// The words of the place of a position.
    #[expect(clippy::cast_possible_truncation, reason = "below the number of places")]
    pub(super) fn record(mapping: &Mapping, position: u64) -> &[AtomicU64] {
        let place = (position % u64::from(PLACES)) as usize;
        &mapping.words()[RECORDS + place * RECORD_WORDS..][..RECORD_WORDS]
    }

    pub(super) fn header(mapping: &Mapping) -> &[AtomicU64] {
        &mapping.words()[..3]
    }
}
