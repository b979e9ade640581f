//! Puts: reserving, writing, sealing, publishing, giving up. Not the finding of room (`room`). Invariant: an object is
//! shown to readers only when all its bytes are in place.

use bytes::Bytes;

use super::action::{Action, Attachment};
use super::awaiting::Exclusive;
use super::objects::Object;
use super::room::{NewObject, Purpose};
use super::space::Owner;
use super::timer::{Time, Timer};
use super::{Engine, INLINE_PUT_MAX, State};
use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::placement;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Generation, ObjectId, SegmentId, SlotId, Tier, TierHint};
use crate::wire::{ClientReply, IfExists, PutHints, Role};

/// An object that was there is the answer to a put.
fn kept((object, slot, tier): (ObjectId, Option<SlotId>, Tier)) -> ClientReply {
    ClientReply::Sealed { object, kept: true, slot, tier, path: Path::Kept, staged_bytes: 0, replicas: 1 }
}

impl Engine {
    /// Where an object of so many bytes is to be that its client writes in this tier.
    fn final_tier(&self, hints: &PutHints, writes: Tier, len_bytes: u64) -> Result<Tier, StoreError> {
        let capacity_bytes = self.space.capacity_bytes(writes);
        let tier = placement::tier_of_new(hints.tier, writes, len_bytes, capacity_bytes);
        hints.tier.map_or(Ok(tier), |hint| self.tier_of(hint))
    }

    /// Checks a put, and answers at once if the object that is there is kept.
    fn check_new(&self, object: &NewObject, writes: Tier) -> Result<Option<ClientReply>, StoreError> {
        object.meta.check()?;
        object.hints.check(&object.key)?;
        let tier = self.final_tier(&object.hints, writes, object.meta.len_bytes)?;
        let or_host = object.hints.tier.is_some_and(|hint| hint.or_host);
        let host = if or_host { self.space.capacity_bytes(Tier::Host) } else { 0 };
        let limit = self.space.capacity_bytes(tier).max(host);
        if object.meta.len_bytes > limit {
            let operation = format!("put {:?} in {tier}", object.key);
            return Err(StoreError::too_large(
                operation,
                "object length in bytes",
                object.meta.len_bytes,
                limit,
            ));
        }
        match self.objects.sealed(&object.key) {
            None => Ok(None),
            Some(_) if object.if_exists == IfExists::Error => {
                Err(StoreError::AlreadyExists { key: object.key.to_string() })
            }
            Some((_, there)) => Ok(Some(kept((there.id, there.slot, there.tier)))),
        }
    }

    pub(super) fn put(
        &mut self,
        client: ClientId,
        request: u64,
        object: NewObject,
        payload: Bytes,
    ) -> Result<Option<ClientReply>, StoreError> {
        let len_bytes = payload.len() as u64;
        if len_bytes != object.meta.len_bytes {
            return Err(StoreError::invalid(
                "payload",
                format!(
                    "put {:?}: {len_bytes} bytes, the metadata says {}",
                    object.key, object.meta.len_bytes
                ),
            ));
        }
        if len_bytes > u64::from(INLINE_PUT_MAX) {
            let limit = u64::from(INLINE_PUT_MAX);
            return Err(StoreError::too_large(
                "put",
                "payload in bytes (reserve and seal instead)",
                len_bytes,
                limit,
            ));
        }
        if let Some(kept) = self.check_new(&object, Tier::Host)? {
            self.answer_put(client, request, &object.key, object.hints.replicas, Ok(kept));
            return Ok(None);
        }
        let purpose = Purpose::Put { client, request, object, payload };
        self.want_space(purpose, Tier::Host, Owner::Node, len_bytes);
        Ok(None)
    }

    pub(super) fn put_into(
        &mut self,
        client: ClientId,
        request: u64,
        object: NewObject,
        payload: Bytes,
        extent: Extent,
    ) {
        let checksum = object.meta.checksum;
        let generation = self.insert_new(object, extent, Some(client), Path::Inline);
        if let Some(object) = self.objects.get_mut(generation) {
            object.staged_bytes = payload.len() as u64;
        }
        if !payload.is_empty() {
            self.out.push(Action::Fill { extent, bytes: payload });
        }
        self.settle(client, request, generation, checksum);
    }

    pub(super) fn insert_new(
        &mut self,
        new: NewObject,
        extent: Extent,
        writer: Option<ClientId>,
        path: Path,
    ) -> Generation {
        let id = self.new_object_id();
        let tier = self.space.tier(extent.segment);
        self.objects.insert(Object {
            key: new.key,
            id,
            meta: new.meta,
            extent,
            tier,
            state: State::Reserved,
            slot: None,
            hints: new.hints,
            if_exists: new.if_exists,
            writer,
            in_place: matches!(path, Path::InPlace | Path::Ahead),
            role: Role::Original,
            replicas: 1,
            expires: None,
            lasting: Vec::new(),
            leases: 0,
            sends: 0,
            copies: 0,
            filling: false,
            staged_bytes: 0,
            path,
            gpu_reads: 0,
            rests_until: Time::default(),
        })
    }

    pub(super) fn new_object_id(&mut self) -> ObjectId {
        let number = self.objects.next_object_number();
        ObjectId { origin: self.config.member.node, epoch: self.config.member.epoch, number }
    }

    pub(super) fn reserve(
        &mut self,
        client: ClientId,
        request: u64,
        object: NewObject,
        writes: Tier,
    ) -> Result<Option<ClientReply>, StoreError> {
        let or_host = object.hints.tier.is_some_and(|hint| hint.or_host);
        let writes = self.tier_of(TierHint { tier: writes, or_host })?;
        if let Some(kept) = self.check_new(&object, writes)? {
            self.answer_put(client, request, &object.key, object.hints.replicas, Ok(kept));
            return Ok(None);
        }
        let len_bytes = object.meta.len_bytes;
        let purpose = Purpose::Reserve { client, request, object };
        self.want_space(purpose, writes, Owner::Client(client), len_bytes);
        Ok(None)
    }

    pub(super) fn reserve_in(
        &mut self,
        client: ClientId,
        request: u64,
        object: NewObject,
        extent: Extent,
        in_place: bool,
    ) {
        let path = if in_place { Path::InPlace } else { Path::Written };
        let reservation = self.insert_new(object, extent, Some(client), path);
        let Some(state) = self.clients.get_mut(&client) else {
            self.abort(reservation);
            return;
        };
        state.reservations.insert(reservation);
        let mut attachment = None;
        if in_place && !self.space.is_closed_to_writers(extent.segment) {
            state.unmapped.insert(extent.segment);
            state.mapped.insert(extent.segment);
            attachment = Some(Attachment::Segment(extent.segment));
        }
        let map = if in_place { self.space.len_bytes(extent.segment) } else { None };
        let tier = self.space.tier(extent.segment);
        let reply = Ok(ClientReply::Reserved { reservation, extent, tier, map });
        self.out.push(Action::Reply { client, request, reply, attachment });
    }

    pub(super) fn mapped(&mut self, client: ClientId, segment: SegmentId) -> Result<(), StoreError> {
        let granted = self.clients.get_mut(&client).is_some_and(|state| state.unmapped.remove(&segment));
        if granted {
            self.space.close_to_writers(segment);
            self.out.push(Action::CloseToWriters { segment });
            return Ok(());
        }
        if self.space.owner(segment) == Some(Owner::Client(client)) {
            return Ok(());
        }
        Err(StoreError::denied("mapped", format!("segment {segment} was not granted to this client")))
    }

    pub(super) fn reservation_of(
        &self,
        client: ClientId,
        reservation: Generation,
    ) -> Result<&Object, StoreError> {
        match self.objects.get(reservation) {
            Some(object) if object.state == State::Reserved && object.writer == Some(client) => Ok(object),
            _ => Err(StoreError::stale("reservation", reservation, "this client has no such reservation")),
        }
    }

    pub(super) fn write(
        &mut self,
        client: ClientId,
        reservation: Generation,
        offset: u64,
        payload: Bytes,
    ) -> Result<(), StoreError> {
        let object = self.reservation_of(client, reservation)?;
        if object.in_place {
            return Err(StoreError::invalid(
                "write",
                "this reservation is written in place, through its mapping",
            ));
        }
        let extent = object.extent.slice(offset, payload.len() as u64)?;
        if let Some(object) = self.objects.get_mut(reservation) {
            object.staged_bytes += payload.len() as u64;
        }
        self.out.push(Action::Fill { extent, bytes: payload });
        Ok(())
    }

    pub(super) fn seal_request(
        &mut self,
        client: ClientId,
        request: u64,
        reservation: Generation,
        checksum: Checksum,
    ) -> Result<Option<ClientReply>, StoreError> {
        let object = self.reservation_of(client, reservation)?;
        if object.in_place && !self.space.is_closed_to_writers(object.extent.segment) {
            return Err(StoreError::invalid(
                "seal",
                format!("segment {} was granted but never acknowledged as mapped", object.extent.segment),
            ));
        }
        if let Some(state) = self.clients.get_mut(&client) {
            state.reservations.remove(&reservation);
        }
        self.settle(client, request, reservation, checksum);
        Ok(None)
    }

    /// Seals an object whose bytes are there, and moves them first if they are to be elsewhere.
    fn settle(&mut self, client: ClientId, request: u64, generation: Generation, checksum: Checksum) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        // A tier that was there when the put began is there now.
        let tier =
            self.final_tier(&object.hints, object.tier, object.extent.len_bytes).unwrap_or(object.tier);
        let moves = object.extent.len_bytes > 0 && tier != object.tier;
        let stays = !object.hints.seal_copy || !object.in_place;
        if stays && !moves {
            return self.seal(client, request, generation, checksum);
        }
        let len_bytes = object.extent.len_bytes;
        if let Some(object) = self.objects.get_mut(generation) {
            if let Err(error) = object.state.advance(State::Filling, object.key.as_str()) {
                return self.reply(client, request, Err(error));
            }
            object.meta.checksum = checksum;
            object.filling = true;
            // The request number travels in the pending table: the copy outlives this call.
            self.pending_copies.insert(generation, (client, request));
        }
        self.want_space(Purpose::SealCopy { generation }, tier, Owner::Node, len_bytes);
    }

    /// There is no room where an object is to be. Where it is written, or in host memory, it may stay if its producer
    /// said so.
    pub(super) fn seal_elsewhere(&mut self, generation: Generation, error: StoreError) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let or_host = object.hints.tier.is_some_and(|hint| hint.or_host);
        let was_for_host = matches!(error, StoreError::NoSpace { tier: Tier::Host, .. });
        if !or_host || was_for_host {
            return self.seal_failed(generation, error);
        }
        if object.tier != Tier::Host || (object.hints.seal_copy && object.in_place) {
            let len_bytes = object.extent.len_bytes;
            return self.want_space(Purpose::SealCopy { generation }, Tier::Host, Owner::Node, len_bytes);
        }
        let Some((client, request)) = self.pending_copies.remove(&generation) else {
            return;
        };
        let checksum = object.meta.checksum;
        if let Some(object) = self.objects.get_mut(generation) {
            object.filling = false;
        }
        self.seal(client, request, generation, checksum);
    }

    pub(super) fn seal_copy_into(&mut self, generation: Generation, to: Extent) {
        let Some(object) = self.objects.get(generation) else {
            // It was given up while it waited for room.
            let _ = self.space.free(to);
            return;
        };
        let from = object.extent;
        self.copy_targets.insert(generation, to);
        self.out.push(Action::Copy { generation, from, to });
    }

    pub(super) fn copy_done(&mut self, generation: Generation, result: Result<(), StoreError>) {
        let Some(to) = self.copy_targets.remove(&generation) else {
            return;
        };
        if let Err(error) = result {
            let _ = self.space.free(to);
            return self.seal_failed(generation, error);
        }
        let Some((client, request)) = self.pending_copies.remove(&generation) else {
            return;
        };
        let Some(object) = self.objects.get_mut(generation) else {
            return;
        };
        let from = std::mem::replace(&mut object.extent, to);
        object.tier = self.space.tier(to.segment);
        object.filling = false;
        object.in_place = false;
        object.path = Path::Copied;
        // All of them, through however many buffers.
        object.staged_bytes = from.len_bytes;
        let checksum = object.meta.checksum;
        let _ = self.space.free(from);
        self.seal(client, request, generation, checksum);
    }

    /// A copy at seal came to nothing.
    pub(super) fn seal_failed(&mut self, generation: Generation, error: StoreError) {
        if let Some((client, request)) = self.pending_copies.remove(&generation) {
            self.reply(client, request, Err(error));
        }
        self.free_object(generation);
    }

    /// Makes an object visible, asking the directory first where the put must be the only one of its key.
    fn seal(&mut self, client: ClientId, request: u64, generation: Generation, checksum: Checksum) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        // If the key was taken here meanwhile, `seal_now` says so.
        if object.if_exists == IfExists::Keep || self.objects.sealed(&object.key).is_some() {
            return self.seal_now(client, request, generation, checksum);
        }
        let deadline = self.now.after_ms(self.config.await_ms());
        self.ask_exclusive(Exclusive { client, request, generation, checksum, deadline });
    }

    /// Makes an object visible here and answers its client.
    pub(super) fn seal_now(
        &mut self,
        client: ClientId,
        request: u64,
        generation: Generation,
        checksum: Checksum,
    ) {
        let put = self.objects.get(generation).map(|object| (object.key.clone(), object.hints.replicas));
        let reply = self.publish(generation, checksum);
        match put {
            Some((key, replicas)) => self.answer_put(client, request, &key, replicas, reply),
            None => self.reply(client, request, reply),
        }
    }

    /// Seals, shows and announces an object. If its key was taken meanwhile, the put gives way as its caller wished.
    pub(super) fn publish(
        &mut self,
        generation: Generation,
        checksum: Checksum,
    ) -> Result<ClientReply, StoreError> {
        self.make_slot(generation);
        let slot = match self.objects.seal(generation, checksum) {
            Ok(slot) => slot,
            Err(error) => {
                let gone = self.objects.get(generation).map(|object| (object.key.clone(), object.if_exists));
                self.free_object(generation);
                let there = gone.and_then(|(key, if_exists)| {
                    let (_, there) = self.objects.sealed(&key)?;
                    (if_exists == IfExists::Keep).then_some((there.id, there.slot, there.tier))
                });
                return there.map(kept).ok_or(error);
            }
        };
        let Some(object) = self.objects.get_mut(generation) else {
            return Err(StoreError::stale("seal", generation, "there is no such reservation"));
        };
        object.expires =
            object.expires.or_else(|| object.hints.ttl_ms.map(|ttl_ms| self.now.after_ms(ttl_ms)));
        let (id, key, hints) = (object.id, object.key.clone(), object.hints);
        let (path, staged_bytes) = (object.path, object.staged_bytes);
        let (announced, role, len_bytes) = (object.announced(self.now), object.role, object.extent.len_bytes);
        let tier = object.tier;
        self.out.push(Action::Publish { slot, object: object.published(generation) });
        if role == Role::Copy || hints.cache {
            self.eviction.insert(tier, generation, key.fingerprint(), len_bytes);
        }
        if tier != Tier::Host && len_bytes > 0 {
            self.eviction.insert_mover(tier, generation, key.fingerprint(), len_bytes);
        }
        if role == Role::Original {
            self.counters.puts += 1;
        }
        if let Some(at) = object.expires {
            self.timers.set(at, Timer::Ttl(generation));
        }
        self.announce(announced);
        self.key_exists(&key);
        let slot = Some(slot);
        Ok(ClientReply::Sealed { object: id, kept: false, slot, tier, path, staged_bytes, replicas: 1 })
    }

    /// Sees to it that the index has a free slot for an object, if another may go for that. Not the one of its own key:
    /// that is the reason why it needs none.
    pub(super) fn make_slot(&mut self, generation: Generation) {
        let taken = |object: &Object| self.objects.sealed(&object.key).is_some();
        if self.objects.is_full() && !self.objects.get(generation).is_some_and(taken) {
            self.evict_for_slot();
        }
    }

    pub(super) fn abort(&mut self, reservation: Generation) {
        let Some(object) = self.objects.get(reservation) else {
            return;
        };
        if let Some(state) = object.writer.and_then(|client| self.clients.get_mut(&client)) {
            state.reservations.remove(&reservation);
        }
        self.free_object(reservation);
        self.retry_space();
    }
}
