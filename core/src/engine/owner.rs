//! What this node gives to others: DATA, GRANT, leases, and when an extent is free of them. Not what it asks for
//! itself (`fetch`). Invariant: while a lease lives, its object's extent is not freed.

use super::Engine;
use super::crossing::Reader;
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{Extent, Generation, LeaseId, LinkId, RemoteExtent, RemoteKey, SegmentId, SlotId, Tier};
use crate::wire::{Granted, Origin, PeerMessage, Range};

/// Leases that may be out at once: a bound on what peers can make this node keep.
const LEASES_MAX: usize = 65_536;
/// Bytes of a generation word.
const GENERATION_LEN: u64 = 8;

#[derive(Debug)]
pub(super) struct Lease {
    generation: Generation,
    link: LinkId,
    until: Time,
}

impl Engine {
    /// Answers GET if the object is here; false if it is not.
    pub(super) fn serve_get(
        &mut self,
        link: LinkId,
        request: u64,
        key: &Key,
        range: Option<Range>,
        inline_max: u64,
    ) -> bool {
        let Some((generation, object)) = self.objects.sealed(key) else {
            return false;
        };
        let (tier, meta, slot) = (object.tier, object.meta, object.slot);
        self.eviction.touch(tier, generation);
        let part = match range {
            None => Ok(object.extent),
            Some(range) => range
                .check(key, meta.len_bytes)
                .and_then(|()| object.extent.slice(range.start, range.len_bytes)),
        };
        let extent = match part {
            Ok(extent) => extent,
            Err(error) => {
                self.answer_peer(link, request, PeerMessage::Failed { error });
                return true;
            }
        };
        let staged = tier != Tier::Host && self.fabric_of(link).is_some_and(|fabric| fabric.stages_gpus);
        let reached = tier == Tier::Host
            || (self.key_for(link, extent.segment).is_some() && !(staged && extent.len_bytes <= inline_max));
        if !reached && extent.len_bytes > 0 {
            let reader = Reader::Peer { link, request, inline_max };
            self.cross(reader, generation, extent, Tier::Host);
            return true;
        }
        let origin = Origin { tier, staged };
        self.serve(link, request, (generation, extent), (slot, origin), inline_max);
        true
    }

    /// Answers GET with bytes that were copied for it out of an object of another tier.
    pub(super) fn serve_copy(
        &mut self,
        link: LinkId,
        request: u64,
        copy: Generation,
        (source, inline_max): (Generation, u64),
    ) {
        if !self.links.contains_key(&link) {
            return;
        }
        let tier = self.objects.get(source).map_or(Tier::Host, |object| object.tier);
        let Some(extent) = self.objects.get(copy).map(|object| object.extent) else {
            return;
        };
        let origin = Origin { tier, staged: true };
        self.serve(link, request, (copy, extent), (None, origin), inline_max);
    }

    pub(super) fn refuse_peer(&mut self, link: LinkId, request: u64, error: &StoreError) {
        if self.links.contains_key(&link) {
            self.answer_peer(link, request, PeerMessage::Failed { error: error.clone() });
        }
    }

    fn serve(
        &mut self,
        link: LinkId,
        request: u64,
        (generation, extent): (Generation, Extent),
        (slot, origin): (Option<SlotId>, Origin),
        inline_max: u64,
    ) {
        let Some((object, meta)) = self.objects.get(generation).map(|object| (object.id, object.meta)) else {
            return;
        };
        if extent.len_bytes <= inline_max {
            self.counters.served_eager += 1;
            let message = PeerMessage::Data { object, meta, origin };
            let payload = (extent.len_bytes > 0).then_some((extent, generation));
            return self.note(link, request, message, payload);
        }
        let message = match self.grant(link, generation, extent, slot) {
            Ok(granted) => {
                self.counters.served_grants += 1;
                PeerMessage::Grant { object, meta, origin, granted: Box::new(granted) }
            }
            Err(error) => PeerMessage::Failed { error },
        };
        self.answer_peer(link, request, message);
    }

    /// What names a segment to the peer of a link.
    pub(super) fn key_for(&self, link: LinkId, segment: SegmentId) -> Option<RemoteKey> {
        let fabric = self.links.get(&link).map(|link| link.fabric)?;
        self.space.key(segment, fabric)
    }

    pub(super) fn send_done(&mut self, send: u64) {
        for generation in self.sends.remove(&send).unwrap_or_default() {
            if let Some(object) = self.objects.get_mut(generation) {
                object.sends = object.sends.saturating_sub(1);
                self.reader_left(generation);
            }
        }
    }

    fn grant(
        &mut self,
        link: LinkId,
        generation: Generation,
        extent: Extent,
        slot: Option<SlotId>,
    ) -> Result<Granted, StoreError> {
        let no_key = || StoreError::unavailable("a registration", "the object's segment is not registered");
        let key = self.key_for(link, extent.segment).ok_or_else(no_key)?;
        let index = self.fabric_of(link).map(|fabric| fabric.index_key).ok_or_else(no_key)?;
        if self.leases.len() >= LEASES_MAX {
            return Err(StoreError::busy("get", format!("{LEASES_MAX} leases are out")));
        }
        let lease = LeaseId(self.next_lease);
        self.next_lease += 1;
        let until = self.now.after_ms(u64::from(self.config.lease_ms));
        self.leases.insert(lease, Lease { generation, link, until });
        self.timers.set(until, Timer::Lease(lease));
        if let Some(object) = self.objects.get_mut(generation) {
            object.leases += 1;
        }
        // What has no slot has no word: 0 stands for none, and its lease alone says how long it may be read.
        let slot_at = slot.map_or(0, |slot| u64::from(slot.0) * self.config.generation_stride);
        let word = self.config.generation_base + slot_at;
        Ok(Granted {
            extent: RemoteExtent { key, offset: extent.offset, len_bytes: extent.len_bytes },
            generation: if slot.is_some() { generation } else { Generation(0) },
            generation_at: RemoteExtent { key: index, offset: word, len_bytes: GENERATION_LEN },
            lease,
            lease_ms: self.config.lease_ms,
        })
    }

    pub(super) fn lease_over(&mut self, lease: LeaseId) {
        if self.leases.get(&lease).is_some_and(|lease| lease.until <= self.now) {
            self.end_lease(lease);
        }
    }

    /// RELEASE: only the link that got a lease can give it back.
    pub(super) fn release(&mut self, link: LinkId, lease: LeaseId) {
        if self.leases.get(&lease).is_some_and(|lease| lease.link == link) {
            self.end_lease(lease);
        }
    }

    /// The fabric serves no read of a link that is down, so its leases have ended.
    pub(super) fn leases_lost(&mut self, link: LinkId) {
        let lost: Vec<LeaseId> =
            self.leases.iter().filter(|(_, lease)| lease.link == link).map(|(&id, _)| id).collect();
        for lease in lost {
            self.end_lease(lease);
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        let Some(Lease { generation, until, .. }) = self.leases.remove(&lease) else {
            return;
        };
        self.timers.unset(until, Timer::Lease(lease));
        if let Some(object) = self.objects.get_mut(generation) {
            object.leases = object.leases.saturating_sub(1);
            self.reader_left(generation);
        }
    }

    /// Somebody who held an object in place has gone: if it is draining, it may be free now.
    pub(super) fn reader_left(&mut self, generation: Generation) {
        if self.objects.is_draining(generation) {
            self.scan_wanted = true;
        }
    }
}
