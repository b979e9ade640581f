//! The memory and the index of a simulated node: what its engine shows, withdraws, retires and copies, with what has to
//! hold at each. Not the engine (`node`).

use std::sync::Arc;

use hetmem_core::engine::{Input, PublishedObject};
use hetmem_core::{Epoch, Generation, NodeId, SegmentId, SlotId, StoreError, Tier};
use hetmem_transport::{Access, Fabric, HeapRegion, RegionMemory};

use super::guards::Hold;
use super::node::{FABRIC, Node, Shown};
use super::plan::MS;
use super::world::{Due, World};

impl World {
    pub(super) fn publish(&mut self, at: usize, slot: SlotId, object: PublishedObject) {
        self.hold(at, object.extent, Hold::Published(slot));
        let node = &mut self.nodes[at];
        node.write_word(slot, object.generation.0);
        let before = node.by_key.insert(object.key.clone(), slot);
        let there = node.index.insert(slot, Shown { object: object.clone() });
        match (before, there) {
            (None, None) => {}
            // It has moved to another tier: whoever looks sees the one place or the other.
            (Some(known), Some(Shown { object: old }))
                if known == slot
                    && (&old.key, old.object) == (&object.key, object.object)
                    && old.generation < object.generation
                    && old.tier != object.tier =>
            {
                node.guards.remove(old.extent.segment, Hold::Published(slot));
                self.tally.moved += 1;
            }
            _ => self.fail(format!("node {at}: slot {slot} or its key is published twice")),
        }
    }

    pub(super) fn withdraw(&mut self, at: usize, slot: SlotId) {
        let node = &mut self.nodes[at];
        node.write_word(slot, 0);
        let Some(shown) = node.index.remove(&slot) else {
            return self.fail(format!("node {at}: slot {slot} is withdrawn and was not published"));
        };
        let object = shown.object;
        node.by_key.remove(&object.key);
        node.guards.remove(object.extent.segment, Hold::Published(slot));
        let epoch = node.epoch;
        let own = object.object.origin == NodeId(at as u64 + 1) && object.object.epoch == Epoch(epoch);
        self.replica_left(at, &object);
        if !own {
            return self.copy_left(at, &object);
        }
        let key = self.key_number(&object.key);
        if !self.history.may_leave(key, object.object, at, epoch) {
            self.fail(format!(
                "node {at}: original {:?} of {:?} left without a delete",
                object.object, object.key
            ));
        }
        let now = self.now();
        self.history.left(key, at, epoch, now);
    }

    /// A copy has left: it must not have been the last one of an object whose own node died.
    fn copy_left(&mut self, at: usize, object: &PublishedObject) {
        let origin = usize::try_from(object.object.origin.0).unwrap_or(0).wrapping_sub(1);
        let (key, now) = (self.key_number(&object.key), self.now());
        let there = |node: &Node| {
            let mut objects = node.index.values().map(|shown| &shown.object);
            node.alive && objects.any(|other| other.key == object.key)
        };
        let Some(died) = self.history.must_outlive(key, origin, object.object.epoch.0) else { return };
        let heard = self.is_calm(now, now) || self.is_only_death(died);
        if heard && !self.nodes.iter().any(there) {
            self.fail(format!(
                "node {at}: the last copy of {:?} of {:?} left, whose node died",
                object.object, object.key
            ));
        }
    }

    pub(super) fn retire(&mut self, at: usize, segment: SegmentId, len_bytes: u64) {
        let now = self.nodes[at].clock.at(self.now());
        let node = &mut self.nodes[at];
        node.fabric.deregister(segment);
        node.keys.retain(|_, of| *of != segment);
        node.tiers.remove(&segment);
        // Who has left may still write to what it maps; that memory is not the node's any more.
        let clients = &self.clients;
        let held = node.guards.retire(segment, now, |hold| {
            matches!(hold, Hold::Reserved(id, _) | Hold::Ahead(id, _) if !clients.get(&id).is_some_and(|client| client.alive))
        });
        let memory = node.segments.remove(&segment);
        if let Some(hold) = held {
            self.fail(format!("node {at}: segment {segment} is retired while {hold:?}"));
        }
        if memory.is_none_or(|memory| memory.len_bytes() != len_bytes) {
            self.fail(format!(
                "node {at}: segment {segment} of {len_bytes} bytes is retired and is not there"
            ));
        }
    }

    /// A segment is there, or could not be made.
    pub(super) fn segment_made(&mut self, at: usize, segment: SegmentId, tier: Tier, len_bytes: u64) {
        if self.rng.percent(self.plan.segment_failures) && !self.is_ending() {
            self.tally.faults += 1;
            self.nodes[at].segment_failed = Some(self.now());
            let why = StoreError::os("memfd_create", "no descriptor is left");
            self.feed(at, Input::SegmentFailed { segment, why });
            return;
        }
        let memory = Arc::new(HeapRegion::new(usize::try_from(len_bytes).expect("a small segment")));
        let reached = tier == Tier::Host || self.plan.gpus_reached;
        let node = &mut self.nodes[at];
        let mut keys = Vec::new();
        if reached {
            let registered = node.fabric.register(segment, Arc::clone(&memory) as _, Access::RemoteRead);
            let key = registered.expect("a segment is registered once");
            node.keys.insert(key, segment);
            keys.push((FABRIC, key));
        }
        node.segments.insert(segment, memory);
        node.tiers.insert(segment, tier);
        self.feed(at, Input::SegmentReady { segment, keys });
    }

    /// Half of a copy, then the rest, then its end.
    pub(super) fn copy_part(&mut self, at: usize, generation: Generation, last: bool) {
        let Some(&(from, to)) = self.nodes[at].copies.get(&generation) else { return };
        if !last && self.rng.percent(self.plan.copy_failures) && !self.is_ending() {
            self.tally.faults += 1;
            let result = Err(StoreError::os("copy", "it failed"));
            self.feed(at, Input::CopyDone { generation, result });
            return;
        }
        let half = from.len_bytes / 2;
        let (start, len) = if last { (half, from.len_bytes - half) } else { (0, half) };
        if let (Ok(from), Ok(to)) = (from.slice(start, len), to.slice(start, len)) {
            let bytes = self.nodes[at].memory(from).map(|(region, offset, len)| region.read(offset, len));
            self.write(at, to, &bytes.unwrap_or_default(), |hold| hold == Hold::CopiedTo(generation));
        }
        if last {
            self.feed(at, Input::CopyDone { generation, result: Ok(()) });
        } else {
            let epoch = self.nodes[at].epoch;
            let delay = self.rng.between(10_000, 5 * MS);
            self.later(delay, Due::CopyPart { at, epoch, generation, last: true });
        }
    }
}
