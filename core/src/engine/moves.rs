//! Objects that change their tier on this node: demoted to host memory before a GPU has no room, promoted to a GPU that
//! reads them again and again. Not when that is right (`crate::placement`), nor the copies that readers are given
//! (`crossing`). Invariant: a key is found all the while, in the old place until the new one has all its bytes; the old
//! extent stays until its pins and leases are gone; and a move that comes to nothing has changed nothing.

use std::collections::BTreeMap;

use super::action::Action;
use super::objects::Object;
use super::room::{DRAIN_MS, Purpose};
use super::space::{Owner, Space};
use super::timer::{Time, Timer};
use super::{Engine, State};
use crate::error::StoreError;
use crate::placement::{self, Candidate, Room};
use crate::tier::{Extent, Generation, Tier};
use crate::wire::Role;

/// Moves to host memory that are under way.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Objects that are being copied, by the generation of the copy.
    copying: BTreeMap<Generation, Generation>,
    /// Bytes of all of them, by the tier that they leave.
    leaving: BTreeMap<Tier, u64>,
}

impl Moves {
    pub(super) fn is_copying(&self, copy: Generation) -> bool {
        self.copying.contains_key(&copy)
    }

    /// Whether an object is on its way out of a tier.
    pub(super) fn any_leaves(&self, tier: Tier) -> bool {
        self.leaving_bytes(tier) > 0
    }

    fn leaving_bytes(&self, tier: Tier) -> u64 {
        self.leaving.get(&tier).copied().unwrap_or(0)
    }
}

impl Engine {
    /// How full a tier is.
    pub(super) fn room_of(&self, tier: Tier) -> Room {
        Room {
            capacity_bytes: self.space.capacity_bytes(tier),
            used_bytes: self.space.used_bytes(tier),
            leaving_bytes: self.objects.draining_bytes(tier).saturating_add(self.moves.leaving_bytes(tier)),
        }
    }

    fn candidate(&self, object: &Object) -> Candidate {
        Candidate {
            len_bytes: object.extent.len_bytes,
            pinned: object.hints.pin,
            rests: self.now < object.rests_until,
        }
    }

    /// Begins to demote where more is used than is meant to be.
    pub(super) fn keep_watermarks(&mut self) {
        let gpus: Vec<Tier> = self.space.tiers().filter(|tier| *tier != Tier::Host).collect();
        for tier in gpus {
            // Counted only where it may matter: used bytes are those that stay, and more.
            let used_bytes = self.space.used_bytes(tier);
            let all = Room { capacity_bytes: self.space.capacity_bytes(tier), used_bytes, leaving_bytes: 0 };
            if all.surplus_bytes() > 0 {
                let surplus_bytes = self.room_of(tier).surplus_bytes();
                let bytes = placement::budget_bytes(surplus_bytes, self.moves.leaving_bytes(tier));
                self.demote(tier, bytes, |_, _| true);
            }
        }
    }

    /// Begins to demote objects of this many bytes together, of those that are of use; whether any was found.
    pub(super) fn demote(
        &mut self,
        tier: Tier,
        len_bytes: u64,
        useful: impl Fn(&Object, &Space) -> bool,
    ) -> bool {
        if len_bytes == 0 || tier == Tier::Host {
            return false;
        }
        let mut queue = std::mem::take(&mut self.eviction);
        let movers = queue.movers(tier, len_bytes, |generation| {
            self.objects.get(*generation).is_some_and(|object| {
                let idle = object.state == State::Sealed && object.copies == 0;
                idle && placement::may_demote(self.candidate(object)) && useful(object, &self.space)
            })
        });
        self.eviction = queue;
        for generation in &movers {
            let len_bytes = self.objects.get(*generation).map_or(0, |object| object.extent.len_bytes);
            *self.moves.leaving.entry(tier).or_default() += len_bytes;
            if let Some(object) = self.objects.get_mut(*generation) {
                object.copies += 1;
            }
            let purpose = Purpose::Move { source: *generation };
            self.want_space(purpose, Tier::Host, Owner::Node, len_bytes);
        }
        !movers.is_empty()
    }

    /// Whether an object that waits for room elsewhere is still to move. A move that is not is over.
    pub(super) fn is_move_wanted(&mut self, source: Generation) -> bool {
        let wanted = self.is_movable(source);
        if !wanted {
            self.end_move(source);
        }
        wanted
    }

    /// Whether it is still what it was when its move began: the object of its key, and not asked to stay since.
    fn is_movable(&self, source: Generation) -> bool {
        self.objects.get(source).is_some_and(|object| object.state == State::Sealed && !object.hints.pin)
    }

    /// The object stays where it is, or is out of the way, or its copy takes its place next.
    fn end_move(&mut self, source: Generation) {
        let Some(object) = self.objects.get_mut(source) else {
            return;
        };
        object.copies = object.copies.saturating_sub(1);
        let (tier, len_bytes) = (object.tier, object.extent.len_bytes);
        let (state, fingerprint) = (object.state, object.key.fingerprint());
        if let Some(leaving) = self.moves.leaving.get_mut(&tier) {
            *leaving = leaving.saturating_sub(len_bytes);
        }
        if state == State::Sealed {
            self.eviction.insert_mover(tier, source, fingerprint, len_bytes);
        }
        self.reader_left(source);
    }

    /// There is room in host memory.
    pub(super) fn move_into(&mut self, source: Generation, to: Extent) {
        let Some(object) = self.objects.get(source).filter(|_| self.is_movable(source)) else {
            let _ = self.space.free(to);
            return self.end_move(source);
        };
        let from = object.extent;
        let copy = object.copied_to(to, self.space.tier(to.segment));
        let generation = self.objects.insert(copy);
        self.moves.copying.insert(generation, source);
        self.out.push(Action::Copy { generation, from, to });
    }

    /// There is none: it stays where it is for a while.
    pub(super) fn move_missing(&mut self, source: Generation) {
        self.move_failed(source);
    }

    fn move_failed(&mut self, source: Generation) {
        self.end_move(source);
        let rests_until = self.now.after_ms(placement::REST_MS);
        let Some(object) = self.objects.get_mut(source).filter(|object| object.state == State::Sealed) else {
            return;
        };
        object.rests_until = rests_until;
        // Whoever waits for the room that it would have left looks for other.
        self.space_freed = true;
    }

    /// The copy has ended.
    pub(super) fn moved(&mut self, copy: Generation, result: &Result<(), StoreError>) {
        let Some(source) = self.moves.copying.remove(&copy) else {
            return;
        };
        if let Some(object) = self.objects.get_mut(copy) {
            object.filling = false;
        }
        // Deleted, asked to stay, or not copied: what was there is as it was.
        if result.is_err() || !self.is_movable(source) {
            self.free_object(copy);
            self.space_freed = true;
            return self.move_failed(source);
        }
        self.end_move(source);
        if self.switch(source, copy, self.now.after_ms(placement::REST_MS)) {
            self.counters.demoted += 1;
            self.gpu_grew = true;
        }
    }

    /// A GPU was given a copy of a whole object of host memory: from now on that is the object, if it is worth its room
    /// there. Whether it is.
    pub(super) fn promote(&mut self, source: Generation, copy: Generation) -> bool {
        let Some(to) = self.objects.get(copy).map(|copy| (copy.tier, copy.extent)) else {
            return false;
        };
        let Some(object) = self.objects.get_mut(source) else {
            return false;
        };
        let whole = to.1.len_bytes == object.meta.len_bytes;
        if object.state != State::Sealed || object.tier != Tier::Host || to.0 == Tier::Host || !whole {
            return false;
        }
        object.gpu_reads = object.gpu_reads.saturating_add(1);
        let reads = object.gpu_reads;
        // Where somebody else copies it at the same time, that one may come by it as well.
        let promotes = self.objects.get(source).is_some_and(|object| {
            object.copies == 0 && placement::promotes(self.candidate(object), reads, self.room_of(to.0))
        });
        if !promotes || !self.switch(source, copy, Time::default()) {
            return false;
        }
        self.counters.promoted += 1;
        true
    }

    /// Makes another place the object's, in one step for whoever looks; the old one goes with its last reader.
    fn switch(&mut self, old: Generation, new: Generation, rests_until: Time) -> bool {
        let Some((from, old_len)) =
            self.objects.get(old).map(|object| (object.tier, object.extent.len_bytes))
        else {
            return false;
        };
        let Some(slot) = self.objects.replace(old, new, rests_until) else {
            return false;
        };
        self.eviction.forget(from, old);
        let Some(object) = self.objects.get(new) else {
            return false;
        };
        let (tier, fingerprint, len_bytes) = (object.tier, object.key.fingerprint(), object.extent.len_bytes);
        if object.role == Role::Copy || object.hints.cache {
            self.eviction.insert(tier, new, fingerprint, len_bytes);
        }
        if tier != Tier::Host {
            self.eviction.insert_mover(tier, new, fingerprint, len_bytes);
        }
        if let Some(at) = object.expires {
            self.timers.unset(at, Timer::Ttl(old));
            self.timers.set(at, Timer::Ttl(new));
        }
        self.out.push(Action::Publish { slot, object: object.published(new) });
        self.timers.set(self.now.after_ms(DRAIN_MS), Timer::Drain);
        // Whoever waits for room may have that of the old place.
        self.scan_wanted |= !self.waiting_space.is_empty();
        self.scan_if_worth_it(old_len);
        true
    }
}
