//! The engine's view of itself. Not metrics about time: whoever drives the engine has the clock. Invariant: none.

use super::Engine;
use crate::tier::Tier;
use crate::wire::{PeerStatus, Status, TierStatus};

impl Engine {
    fn directory_name(&self) -> Option<String> {
        let keeper = self.directory.is_some().then_some(self.config.member.node);
        keeper.or_else(|| self.directory_node()).map(|node| self.name_of(node))
    }

    /// What users see of this node. The caller adds what only it knows (pages, hits).
    #[must_use]
    pub fn status(&self) -> Status {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let tier = |tier: Tier| {
            // Only host memory is granted ahead.
            let ahead_bytes = if tier == Tier::Host { self.ahead_bytes() } else { 0 };
            TierStatus {
                tier,
                capacity_bytes: self.space.capacity_bytes(tier),
                used_bytes: self.space.used_bytes(tier).saturating_sub(ahead_bytes),
                ahead_bytes,
                granted_bytes: self.space.granted_bytes(tier),
                segments: count(self.space.segment_count(tier)),
                fragmentation_percent: self.space.fragmentation_percent(tier),
                pages: String::new(),
            }
        };
        let peer = |peer: &super::Peer| {
            let [answers, places] = self.thresholds_in_words(peer.member.node);
            let fabric = peer.link.and_then(|link| self.fabric_of(link));
            PeerStatus {
                node: peer.member.node,
                name: peer.member.name.clone(),
                address: peer.member.address.clone(),
                linked: peer.link.is_some(),
                fabric: fabric.map_or_else(String::new, |fabric| fabric.name.to_string()),
                threshold_bytes: answers.bytes,
                threshold_why: answers.why,
                known_from_bytes: places.bytes,
                known_from_why: places.why,
                round_trip_ns: peer.round_trip_ns,
                room_bytes: peer.room_bytes,
            }
        };
        Status {
            node: self.config.member.node,
            name: self.config.member.name.clone(),
            epoch: self.config.member.epoch,
            address: self.config.member.address.clone(),
            keeps_directory: self.directory.is_some(),
            directory: self.directory_name(),
            under_replicated: match self.directory {
                Some(_) => self.repair.count(),
                None => self.under_replicated,
            },
            under_replicated_keys: self.repair.first_keys(),
            objects: self.objects.sealed_count() as u64,
            draining: self.objects.draining_count() as u64,
            reservations: self.objects.unsealed_count() as u64,
            leases: self.leases.len() as u64,
            clients: count(self.clients.len()),
            tiers: self.space.tiers().map(tier).collect(),
            peers: self.peers.values().map(peer).collect(),
            counters: self.counters,
        }
    }
}
