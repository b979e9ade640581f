//! Which peer is asked where several could be: the nearest one for a read, one with room for a replica; and what is
//! measured for that. Not who holds what. Invariant: the same books give the same choice, and of peers that are equally
//! near, or have equally much room, different keys choose different ones.

use super::Engine;
use super::timer::Time;
use crate::fingerprint;
use crate::key::Key;
use crate::tier::{LinkId, NodeId, Tier};

/// A new round trip moves the estimate by one part in so many.
const SMOOTHING: u64 = 8;

/// A number that differs from key to key and from node to node.
fn spread(key: &Key, nodes: [NodeId; 2]) -> u64 {
    let mut bytes = [0; 24];
    for (place, number) in bytes.chunks_exact_mut(8).zip([key.fingerprint(), nodes[0].0, nodes[1].0]) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    fingerprint(&bytes)
}

impl Engine {
    /// An answer has come that took no work worth mentioning.
    pub(super) fn measure_round_trip(&mut self, link: LinkId, asked: Time) {
        let sample = self.now.0.saturating_sub(asked.0).max(1);
        let node = self.links.get(&link).and_then(|link| link.node);
        if let Some(peer) = node.and_then(|node| self.peers.get_mut(&node)) {
            peer.round_trip_ns = Some(match peer.round_trip_ns {
                None => sample,
                Some(before) => before - before / SMOOTHING + sample / SMOOTHING,
            });
        }
    }

    /// The nearest of these nodes. Round trips that differ by less than a factor of two are taken for equal.
    pub(super) fn nearest(&self, key: &Key, nodes: impl Iterator<Item = NodeId>) -> Option<NodeId> {
        let own = self.config.member.node;
        nodes.min_by_key(|node| {
            let round_trip_ns = self.peers.get(node).and_then(|peer| peer.round_trip_ns);
            let distance = round_trip_ns.map_or(u32::MAX, |ns| ns.max(1).ilog2());
            (distance, spread(key, [own, *node]), *node)
        })
    }

    /// These nodes in the order in which they are asked to hold `len_bytes` bytes more: those that have room for it
    /// first, and in proportion to the room that they have.
    pub(super) fn roomiest(
        &self,
        key: &Key,
        len_bytes: u64,
        nodes: impl Iterator<Item = NodeId>,
    ) -> Vec<NodeId> {
        let own = self.config.member.node;
        let mut ranked: Vec<_> = nodes
            .map(|node| {
                let room = if node == own {
                    self.room_bytes()
                } else {
                    // Of a node that has not said so it is not known whether it has more than this.
                    self.peers.get(&node).and_then(|peer| peer.room_bytes).unwrap_or(len_bytes)
                };
                let rank = u128::from(spread(key, [node, node])) * u128::from(room.max(1));
                (room >= len_bytes, rank, node)
            })
            .collect();
        ranked.sort_unstable_by(|a, b| b.cmp(a));
        ranked.into_iter().map(|(_, _, node)| node).collect()
    }

    /// Bytes that this node has room for in host memory: free, or held by what may go. None if it cannot take another object.
    pub(super) fn room_bytes(&self) -> u64 {
        if self.objects.is_full() && self.eviction.is_empty() {
            return 0;
        }
        // What is granted ahead is taken back where room is short.
        let idle = self.space.free_bytes(Tier::Host).saturating_add(self.ahead_bytes());
        idle.saturating_add(self.eviction.bytes(Tier::Host)).min(self.space.capacity_bytes(Tier::Host))
    }
}
