//! Objects that may leave a tier when room is needed: dropped, or moved to host memory. By tier: room in one is not made by
//! what lies in another. Not what may go (`room`, `moves`), and not the order (`crate::evict`). Invariant: an object is in
//! queues of the tier that its extent is in.

use std::collections::BTreeMap;

use crate::evict::S3Fifo;
use crate::tier::{Generation, Tier};

type Queues = BTreeMap<Tier, S3Fifo<Generation>>;

#[derive(Debug, Default)]
pub(super) struct Eviction {
    /// What may be dropped.
    dropped: Queues,
    /// What lies on a GPU.
    moved: Queues,
}

impl Eviction {
    pub(super) fn insert(&mut self, tier: Tier, generation: Generation, fingerprint: u64, len_bytes: u64) {
        self.dropped.entry(tier).or_default().insert(generation, fingerprint, len_bytes);
    }

    /// An object on a GPU.
    pub(super) fn insert_mover(
        &mut self,
        tier: Tier,
        generation: Generation,
        fingerprint: u64,
        len_bytes: u64,
    ) {
        self.moved.entry(tier).or_default().insert(generation, fingerprint, len_bytes);
    }

    pub(super) fn touch(&mut self, tier: Tier, generation: Generation) {
        for queues in [&mut self.dropped, &mut self.moved] {
            if let Some(queue) = queues.get_mut(&tier) {
                queue.touch(&generation);
            }
        }
    }

    /// It is not to be dropped any more.
    pub(super) fn remove(&mut self, tier: Tier, generation: Generation) {
        if let Some(queue) = self.dropped.get_mut(&tier) {
            queue.remove(&generation);
        }
    }

    /// It is gone from there.
    pub(super) fn forget(&mut self, tier: Tier, generation: Generation) {
        self.remove(tier, generation);
        if let Some(queue) = self.moved.get_mut(&tier) {
            queue.remove(&generation);
        }
    }

    /// Objects to drop that together have at least so many bytes and are let go by `evictable`; none if that is not
    /// possible.
    pub(super) fn victims(
        &mut self,
        tier: Tier,
        len_bytes: u64,
        evictable: impl FnMut(&Generation) -> bool,
    ) -> Vec<Generation> {
        self.dropped.get_mut(&tier).map_or_else(Vec::new, |queue| queue.victims(len_bytes, evictable))
    }

    /// Objects to move that together have at least so many bytes, or all that are let go by `movable`. They are taken out
    /// of the queue of those.
    pub(super) fn movers(
        &mut self,
        tier: Tier,
        len_bytes: u64,
        movable: impl FnMut(&Generation) -> bool,
    ) -> Vec<Generation> {
        self.moved.get_mut(&tier).map_or_else(Vec::new, |queue| queue.victims(len_bytes, movable))
    }

    /// Bytes of all objects of a tier that may be dropped.
    pub(super) fn bytes(&self, tier: Tier) -> u64 {
        self.dropped.get(&tier).map_or(0, S3Fifo::bytes)
    }

    /// Bytes of all objects of a tier that may be moved.
    pub(super) fn mover_bytes(&self, tier: Tier) -> u64 {
        self.moved.get(&tier).map_or(0, S3Fifo::bytes)
    }

    /// Whether nothing may be dropped.
    pub(super) fn is_empty(&self) -> bool {
        self.dropped.values().all(S3Fifo::is_empty)
    }
}
