//! Objects that may go when room is needed, by tier: room in one is not made by what lies in another. Not what may go
//! (`room`), and not the order (`crate::evict`). Invariant: an object is in the queue of the tier that its extent is in.

use std::collections::BTreeMap;

use crate::evict::S3Fifo;
use crate::tier::{Generation, Tier};

#[derive(Debug, Default)]
pub(super) struct Eviction(BTreeMap<Tier, S3Fifo<Generation>>);

impl Eviction {
    pub(super) fn insert(&mut self, tier: Tier, generation: Generation, fingerprint: u64, len_bytes: u64) {
        self.0.entry(tier).or_default().insert(generation, fingerprint, len_bytes);
    }

    pub(super) fn touch(&mut self, tier: Tier, generation: Generation) {
        if let Some(queue) = self.0.get_mut(&tier) {
            queue.touch(&generation);
        }
    }

    pub(super) fn remove(&mut self, tier: Tier, generation: Generation) {
        if let Some(queue) = self.0.get_mut(&tier) {
            queue.remove(&generation);
        }
    }

    /// Objects that together have at least so many bytes and are let go by `evictable`; none if that is not possible.
    pub(super) fn victims(
        &mut self,
        tier: Tier,
        len_bytes: u64,
        evictable: impl FnMut(&Generation) -> bool,
    ) -> Vec<Generation> {
        self.0.get_mut(&tier).map_or_else(Vec::new, |queue| queue.victims(len_bytes, evictable))
    }

    /// Bytes of all objects of a tier.
    pub(super) fn bytes(&self, tier: Tier) -> u64 {
        self.0.get(&tier).map_or(0, S3Fifo::bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.values().all(S3Fifo::is_empty)
    }
}
