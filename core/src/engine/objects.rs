//! The books of objects: by generation, by key, and the slots of the shared index. Not their memory (`space`).
//! Invariant: a key maps to at most one sealed object, and that object has a slot.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::action::PublishedObject;
use super::lifecycle::State;
use super::numbers::Numbered;
use super::timer::Time;
use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Epoch, Extent, Generation, NodeId, ObjectId, SlotId, Tier};
use crate::wire::{Announced, IfExists, PutHints, Role};

#[derive(Debug)]
pub(super) struct Object {
    pub(super) key: Key,
    pub(super) id: ObjectId,
    pub(super) meta: ObjectMeta,
    pub(super) extent: Extent,
    /// The tier of the extent's segment.
    pub(super) tier: Tier,
    pub(super) state: State,
    pub(super) slot: Option<SlotId>,
    pub(super) hints: PutHints,
    pub(super) if_exists: IfExists,
    /// The client that writes it; only while it is reserved.
    pub(super) writer: Option<ClientId>,
    /// Whether that client writes it through its own mapping.
    pub(super) in_place: bool,
    /// What this node's bytes are to the object.
    pub(super) role: Role,
    /// On how many nodes it is to be, as this node says; 0 if it does not know. An original says so only once its put
    /// is through with the others.
    pub(super) replicas: u8,
    /// When its time to live is over.
    pub(super) expires: Option<Time>,
    /// Of a copy: who holds the object for good, if this node was told. If not, its origin does.
    pub(super) lasting: Vec<(NodeId, Epoch)>,
    pub(super) leases: u32,
    pub(super) sends: u32,
    /// Copies of it to other tiers that are under way, or wait for room there.
    pub(super) copies: u32,
    /// A read, landing or copy into the extent is under way.
    pub(super) filling: bool,
    /// Bytes that came through a buffer that is neither source nor target, while it was put.
    pub(super) staged_bytes: u64,
    /// How its bytes came to their place.
    pub(super) path: Path,
    /// Reads by GPUs since it came to its place.
    pub(super) gpu_reads: u8,
    /// It is not moved to another tier before.
    pub(super) rests_until: Time,
}

/// What a copy is of, and where its bytes will be.
pub(super) struct NewCopy {
    pub(super) key: Key,
    pub(super) id: ObjectId,
    pub(super) meta: ObjectMeta,
    pub(super) extent: Extent,
    pub(super) tier: Tier,
    pub(super) path: Path,
}

impl Object {
    /// A copy of an object that is elsewhere, whose bytes are on their way.
    pub(super) fn arriving(NewCopy { key, id, meta, extent, tier, path }: NewCopy) -> Self {
        Self {
            key,
            id,
            meta,
            extent,
            tier,
            state: State::Filling,
            slot: None,
            hints: PutHints::default(),
            if_exists: IfExists::Keep,
            writer: None,
            in_place: false,
            role: Role::Copy,
            replicas: 0,
            expires: None,
            lasting: Vec::new(),
            leases: 0,
            sends: 0,
            copies: 0,
            filling: true,
            staged_bytes: 0,
            path,
            gpu_reads: 0,
            rests_until: Time::default(),
        }
    }

    /// A copy of it, or of a part of it, whose bytes are on their way to another place on this node.
    pub(super) fn copied_to(&self, extent: Extent, tier: Tier) -> Self {
        let (key, id, meta, path) = (self.key.clone(), self.id, self.meta, Path::LocalCopy);
        Self::arriving(NewCopy { key, id, meta, extent, tier, path })
    }

    pub(super) fn announced(&self, now: Time) -> Announced {
        Announced {
            key: self.key.clone(),
            object: self.id,
            len_bytes: self.meta.len_bytes,
            role: if self.hints.cache { Role::Copy } else { self.role },
            replicas: self.replicas,
            ttl_ms: self.expires.map(|at| at.ms_since(now)),
        }
    }

    /// Whether only pins can still hold it.
    pub(super) const fn only_pins_hold(&self) -> bool {
        self.leases == 0 && self.sends == 0 && self.copies == 0 && !self.filling
    }

    pub(super) fn published(&self, generation: Generation) -> PublishedObject {
        PublishedObject {
            key: self.key.clone(),
            object: self.id,
            meta: self.meta,
            generation,
            extent: self.extent,
            tier: self.tier,
        }
    }
}

#[derive(Debug)]
pub(super) struct Objects {
    table: Numbered<Generation, Box<Object>>,
    keys: BTreeMap<Key, Generation>,
    slots: BTreeMap<SlotId, Generation>,
    free_slots: Vec<SlotId>,
    next_slot: u32,
    slots_max: u32,
    /// Free slots that are kept for objects whose put is not taken in yet.
    slots_kept: u32,
    next_generation: u64,
    next_object: u64,
    /// What of which tier each keeps from being used again.
    draining: BTreeMap<Generation, (Tier, u64)>,
    draining_bytes: BTreeMap<Tier, u64>,
}

impl Objects {
    pub(super) fn new(slots_max: u32) -> Self {
        Self {
            table: Numbered::default(),
            keys: BTreeMap::new(),
            slots: BTreeMap::new(),
            free_slots: Vec::new(),
            next_slot: 0,
            slots_max,
            slots_kept: 0,
            next_generation: 1,
            next_object: 1,
            draining: BTreeMap::new(),
            draining_bytes: BTreeMap::new(),
        }
    }

    pub(super) fn next_object_number(&mut self) -> u64 {
        self.next_object += 1;
        self.next_object - 1
    }

    pub(super) fn insert(&mut self, object: Object) -> Generation {
        let generation = Generation(self.next_generation);
        self.next_generation += 1;
        self.table.insert(generation, Box::new(object));
        generation
    }

    pub(super) fn get(&self, generation: Generation) -> Option<&Object> {
        self.table.get(generation).map(|object| &**object)
    }

    pub(super) fn get_mut(&mut self, generation: Generation) -> Option<&mut Object> {
        self.table.get_mut(generation).map(|object| &mut **object)
    }

    /// The sealed object of a key.
    pub(super) fn sealed(&self, key: &Key) -> Option<(Generation, &Object)> {
        let generation = *self.keys.get(key)?;
        Some((generation, self.get(generation)?))
    }

    /// Whether the index has no slot left but for those that are kept.
    pub(super) fn is_full(&self) -> bool {
        self.free_slots() == 0
    }

    /// Slots of the index that are neither used nor kept.
    pub(super) fn free_slots(&self) -> usize {
        let fresh = self.slots_max.saturating_sub(self.next_slot) as usize;
        (self.free_slots.len() + fresh).saturating_sub(self.slots_kept as usize)
    }

    /// Keeps free slots for puts that were not asked for. There are that many.
    pub(super) fn keep_slots(&mut self, count: u32) {
        self.slots_kept = self.slots_kept.saturating_add(count);
    }

    pub(super) fn give_slots_back(&mut self, count: u32) {
        self.slots_kept = self.slots_kept.saturating_sub(count);
    }

    pub(super) fn generation_of_slot(&self, slot: SlotId) -> Option<Generation> {
        self.slots.get(&slot).copied()
    }

    /// Makes an object with this generation the sealed one of its key and gives it a slot.
    ///
    /// # Errors
    /// `AlreadyExists` if its key has one; `NoSpace`-like `TooLarge` if the index is full; a wrong step.
    pub(super) fn seal(&mut self, generation: Generation, checksum: Checksum) -> Result<SlotId, StoreError> {
        let is_full = self.is_full();
        let Some(object) = self.table.get_mut(generation) else {
            return Err(StoreError::stale("seal", generation, "there is no such reservation"));
        };
        if self.keys.contains_key(&object.key) {
            return Err(StoreError::AlreadyExists { key: object.key.to_string() });
        }
        let slot = match self.free_slots.pop_if(|_| !is_full) {
            Some(slot) => slot,
            None if !is_full && self.next_slot < self.slots_max => {
                self.next_slot += 1;
                SlotId(self.next_slot - 1)
            }
            None => {
                let limit = u64::from(self.slots_max);
                return Err(StoreError::too_large(
                    "put",
                    "number of objects (max_objects)",
                    limit + 1,
                    limit,
                ));
            }
        };
        if let Err(error) = object.state.advance(State::Sealed, object.key.as_str()) {
            self.free_slots.push(slot);
            return Err(error);
        }
        object.meta.checksum = checksum;
        object.slot = Some(slot);
        object.writer = None;
        object.filling = false;
        self.keys.insert(object.key.clone(), generation);
        self.slots.insert(slot, generation);
        Ok(slot)
    }

    /// Makes another place that of a sealed object: what has its bytes there takes its key, its slot and all that is known
    /// of it, and is not moved before `rests_until`. The old one is out of reach of new readers. Returns the slot.
    pub(super) fn replace(&mut self, old: Generation, new: Generation, rests_until: Time) -> Option<SlotId> {
        let was = self.table.get_mut(old).filter(|was| was.state == State::Sealed)?;
        was.state.advance(State::Draining, was.key.as_str()).ok()?;
        let (meta, slot, hints, if_exists) = (was.meta, was.slot.take()?, was.hints, was.if_exists);
        let (role, replicas, expires, path) = (was.role, was.replicas, was.expires, was.path);
        let (key, lasting) = (was.key.clone(), std::mem::take(&mut was.lasting));
        let is = self.table.get_mut(new)?;
        is.state.advance(State::Sealed, is.key.as_str()).ok()?;
        (is.meta, is.slot, is.hints, is.if_exists) = (meta, Some(slot), hints, if_exists);
        (is.role, is.replicas, is.expires, is.path) = (role, replicas, expires, path);
        (is.lasting, is.rests_until) = (lasting, rests_until);
        self.keys.insert(key, new);
        self.slots.insert(slot, new);
        self.begins_to_drain(old);
        Some(slot)
    }

    /// Takes an object out of reach of new readers. Returns its slot if it had one.
    pub(super) fn drain(&mut self, generation: Generation) -> Option<SlotId> {
        let object = self.table.get_mut(generation)?;
        let was_sealed = object.state == State::Sealed;
        object.state.advance(State::Draining, object.key.as_str()).ok()?;
        object.writer = None;
        let slot = object.slot.take();
        if was_sealed {
            self.keys.remove(&object.key);
        }
        self.begins_to_drain(generation);
        let slot = slot?;
        self.slots.remove(&slot);
        self.free_slots.push(slot);
        Some(slot)
    }

    /// Takes an object out of the books. Its extent can be freed.
    pub(super) fn remove(&mut self, generation: Generation) -> Option<Box<Object>> {
        if let Some((tier, len_bytes)) = self.draining.remove(&generation)
            && let Some(bytes) = self.draining_bytes.get_mut(&tier)
        {
            *bytes = bytes.saturating_sub(len_bytes);
        }
        self.table.remove(generation)
    }

    fn begins_to_drain(&mut self, generation: Generation) {
        if let Some(object) = self.table.get(generation) {
            let (tier, len_bytes) = (object.tier, object.extent.len_bytes);
            self.draining.insert(generation, (tier, len_bytes));
            *self.draining_bytes.entry(tier).or_default() += len_bytes;
        }
    }

    /// Bytes of all that is draining in a tier.
    pub(super) fn draining_bytes(&self, tier: Tier) -> u64 {
        self.draining_bytes.get(&tier).copied().unwrap_or(0)
    }

    /// In rising order.
    pub(super) fn draining(&self) -> impl Iterator<Item = Generation> + '_ {
        self.draining.keys().copied()
    }

    pub(super) fn is_draining(&self, generation: Generation) -> bool {
        self.draining.contains_key(&generation)
    }

    pub(super) fn draining_count(&self) -> usize {
        self.draining.len()
    }

    pub(super) fn sealed_count(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn unsealed_count(&self) -> usize {
        self.table.len() - self.keys.len() - self.draining.len()
    }

    pub(super) fn iter_sealed(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.keys.iter().filter_map(|(key, generation)| Some((key, self.get(*generation)?)))
    }

    /// Sealed keys that start with `prefix`, in order, after `after`.
    pub(super) fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> impl Iterator<Item = &'a Object> + 'a {
        let start = match after {
            Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix),
        };
        self.keys
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(move |(key, _)| key.as_str().starts_with(prefix))
            .filter_map(|(_, generation)| self.get(*generation))
    }
}
