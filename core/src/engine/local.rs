//! What a node's own clients ask. Not gets from other nodes (`fetch`), and not the room for puts (`room`).
//! Invariant: every request of a live client is answered exactly once.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::action::{Action, Attachment, Event};
use super::cluster::Pending;
use super::directory::Verdict;
use super::fetch::Want;
use super::objects::Object;
use super::room::{NewObject, Purpose};
use super::space::Owner;
use super::timer::{Time, Timer};
use super::{Engine, INLINE_PUT_MAX, State};
use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::key::Key;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Generation, ObjectId, SegmentId, Tier};
use crate::wire::{ClientMessage, ClientReply, IfExists, Located, PeerMessage, Range, negotiate};

/// A session of a client.
#[derive(Debug, Default)]
pub(super) struct Client {
    /// Runs in the node's process: its end is the end of its mappings too.
    trusted: bool,
    greeted: bool,
    reservations: BTreeSet<Generation>,
    /// Granted segments whose descriptor it has but has not yet acknowledged to have mapped.
    unmapped: BTreeSet<SegmentId>,
}

/// Someone who waits for an object to exist.
#[derive(Debug)]
pub(super) struct WaitingKey {
    pub(super) who: Waiter,
    pub(super) deadline: Time,
    pub(super) timeout_ms: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Client { client: ClientId, request: u64 },
    Peer { node: crate::tier::NodeId },
}

impl Engine {
    pub(super) fn reply(&mut self, client: ClientId, request: u64, reply: Result<ClientReply, StoreError>) {
        if self.clients.contains_key(&client) {
            self.out.push(Action::Reply {
                client,
                request,
                reply,
                attachment: None,
            });
        }
    }

    pub(super) fn client_joined(&mut self, client: ClientId, trusted: bool) {
        self.clients.insert(
            client,
            Client {
                trusted,
                ..Client::default()
            },
        );
    }

    pub(super) fn client_left(&mut self, client: ClientId) {
        let Some(state) = self.clients.remove(&client) else {
            return;
        };
        self.out.push(Action::Note(Event::ClientLeft {
            client,
            reservations: state.reservations.len(),
        }));
        self.forget_space_requests_of(client);
        self.forget_fetch_waiters_of(client);
        for reservation in state.reservations {
            self.abort(reservation);
        }
        for waiting in self.waiting_keys.values_mut() {
            waiting.retain(|w| !matches!(w.who, Waiter::Client { client: of, .. } if of == client));
        }
        self.waiting_keys.retain(|_, waiting| !waiting.is_empty());
        self.space.client_left(client);
        if state.trusted {
            self.adopt_segments_of(client);
        }
        // Its pins are gone with its page.
        self.scan_wanted = true;
    }

    /// The process of a client is gone: nobody but the node can write to its segments any more.
    pub(super) fn adopt_segments_of(&mut self, client: ClientId) {
        for segment in self.space.adopt_segments_of(client) {
            self.out.push(Action::CloseToWriters { segment });
        }
        self.retry_space();
    }

    pub(super) fn client_request(
        &mut self,
        client: ClientId,
        request: u64,
        message: ClientMessage,
        payload: Bytes,
    ) {
        let Some(state) = self.clients.get(&client) else {
            return;
        };
        if !state.greeted && !matches!(message, ClientMessage::Hello { .. }) {
            let why = StoreError::protocol(format!("{} came before hello", message.name()));
            self.out.push(Action::CloseClient { client, why });
            return;
        }
        let result = self.answer(client, request, message, payload);
        if let Some(reply) = result.transpose() {
            self.reply(client, request, reply);
        }
    }

    /// Answers now (`Some`), or sees to it that someone answers later (`None`).
    fn answer(
        &mut self,
        client: ClientId,
        request: u64,
        message: ClientMessage,
        payload: Bytes,
    ) -> Result<Option<ClientReply>, StoreError> {
        let wants_payload = matches!(message, ClientMessage::Put { .. } | ClientMessage::Write { .. });
        if !wants_payload && !payload.is_empty() {
            return Err(StoreError::protocol(format!(
                "{} has a payload of {} bytes",
                message.name(),
                payload.len()
            )));
        }
        match message {
            ClientMessage::Hello {
                version_min,
                version_max,
            } => {
                return self.greet(client, request, version_min, version_max);
            }
            ClientMessage::Put {
                key,
                meta,
                hints,
                if_exists,
            } => {
                let object = NewObject {
                    key,
                    meta,
                    hints,
                    if_exists,
                };
                return self.put(client, request, object, payload);
            }
            ClientMessage::Reserve {
                key,
                meta,
                hints,
                if_exists,
            } => {
                return self.reserve(
                    client,
                    request,
                    NewObject {
                        key,
                        meta,
                        hints,
                        if_exists,
                    },
                );
            }
            ClientMessage::Mapped { segment } => self.mapped(client, segment)?,
            ClientMessage::Write { reservation, offset } => {
                self.write(client, reservation, offset, payload)?
            }
            ClientMessage::Seal {
                reservation,
                checksum,
            } => {
                return self.seal_request(client, request, reservation, checksum);
            }
            ClientMessage::Abort { reservation } => {
                self.reservation_of(client, reservation)?;
                self.abort(reservation);
            }
            ClientMessage::Get {
                key,
                range,
                timeout_ms,
                keep,
            } => {
                self.get(client, request, key, range, timeout_ms, keep);
                return Ok(None);
            }
            ClientMessage::Segment { segment } => return self.segment(client, request, segment),
            ClientMessage::Return { segment } => self.return_segment(client, segment)?,
            ClientMessage::Wait { key, timeout_ms } => {
                self.wait(client, request, key, timeout_ms);
                return Ok(None);
            }
            ClientMessage::Stat { key, timeout_ms } => {
                self.stat(client, request, key, timeout_ms);
                return Ok(None);
            }
            ClientMessage::List { prefix, after, limit } => {
                return self.list(client, request, &prefix, after.as_ref(), limit);
            }
            ClientMessage::Delete { key } => {
                self.delete_request(client, request, key);
                return Ok(None);
            }
            ClientMessage::Pin { key, pin } => self.pin_hint(&key, pin)?,
            ClientMessage::Evict { key, force } => self.evict_request(&key, force)?,
            ClientMessage::Status => return Ok(Some(ClientReply::Status(Box::new(self.status())))),
        }
        Ok(Some(ClientReply::Done))
    }

    fn greet(
        &mut self,
        client: ClientId,
        request: u64,
        version_min: u16,
        version_max: u16,
    ) -> Result<Option<ClientReply>, StoreError> {
        let version = negotiate(version_min, version_max)?;
        if let Some(state) = self.clients.get_mut(&client) {
            state.greeted = true;
        }
        let reply = ClientReply::Welcome {
            version,
            client,
            node: self.config.member.name.clone(),
            objects_max: self.config.objects_max,
            inline_put_max: INLINE_PUT_MAX,
        };
        self.out.push(Action::Reply {
            client,
            request,
            reply: Ok(reply),
            attachment: Some(Attachment::Session),
        });
        Ok(None)
    }

    /// Checks a put, and answers at once if the object that is there is kept.
    fn check_new(&self, object: &NewObject) -> Result<Option<ClientReply>, StoreError> {
        object.meta.check()?;
        if object.meta.len_bytes > self.space.capacity_bytes() {
            let operation = format!("put {:?}", object.key);
            let limit = self.space.capacity_bytes();
            return Err(StoreError::too_large(
                operation,
                "object length in bytes",
                object.meta.len_bytes,
                limit,
            ));
        }
        match self.objects.sealed(&object.key) {
            None => Ok(None),
            Some(_) if object.if_exists == IfExists::Error => Err(StoreError::AlreadyExists {
                key: object.key.to_string(),
            }),
            Some((_, there)) => Ok(Some(ClientReply::Sealed {
                object: there.id,
                kept: true,
                slot: there.slot,
            })),
        }
    }

    fn put(
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
        if let Some(kept) = self.check_new(&object)? {
            return Ok(Some(kept));
        }
        self.want_space(
            Purpose::Put {
                client,
                request,
                object,
                payload,
            },
            Owner::Node,
            len_bytes,
        );
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
        let generation = self.insert_new(object, extent, client, false);
        if !payload.is_empty() {
            self.out.push(Action::Fill {
                extent,
                bytes: payload,
            });
        }
        self.seal(client, request, generation, checksum);
    }

    fn insert_new(&mut self, new: NewObject, extent: Extent, client: ClientId, in_place: bool) -> Generation {
        let id = self.new_object_id();
        self.objects.insert(Object {
            key: new.key,
            id,
            meta: new.meta,
            extent,
            state: State::Reserved,
            slot: None,
            hints: new.hints,
            if_exists: new.if_exists,
            writer: Some(client),
            in_place,
            copied_here: false,
            leases: 0,
            sends: 0,
            filling: false,
        })
    }

    fn new_object_id(&mut self) -> ObjectId {
        let number = self.objects.next_object_number();
        ObjectId {
            origin: self.config.member.node,
            epoch: self.config.member.epoch,
            number,
        }
    }

    fn reserve(
        &mut self,
        client: ClientId,
        request: u64,
        object: NewObject,
    ) -> Result<Option<ClientReply>, StoreError> {
        if let Some(kept) = self.check_new(&object)? {
            return Ok(Some(kept));
        }
        let len_bytes = object.meta.len_bytes;
        self.want_space(
            Purpose::Reserve {
                client,
                request,
                object,
            },
            Owner::Client(client),
            len_bytes,
        );
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
        let reservation = self.insert_new(object, extent, client, in_place);
        let Some(state) = self.clients.get_mut(&client) else {
            self.abort(reservation);
            return;
        };
        state.reservations.insert(reservation);
        let mut attachment = None;
        if in_place && !self.space.is_closed_to_writers(extent.segment) {
            state.unmapped.insert(extent.segment);
            attachment = Some(Attachment::Segment(extent.segment));
        }
        let map = if in_place {
            self.space.len_bytes(extent.segment)
        } else {
            None
        };
        let reply = Ok(ClientReply::Reserved {
            reservation,
            extent,
            map,
        });
        self.out.push(Action::Reply {
            client,
            request,
            reply,
            attachment,
        });
    }

    fn mapped(&mut self, client: ClientId, segment: SegmentId) -> Result<(), StoreError> {
        let granted = self
            .clients
            .get_mut(&client)
            .is_some_and(|state| state.unmapped.remove(&segment));
        if granted {
            self.space.close_to_writers(segment);
            self.out.push(Action::CloseToWriters { segment });
            return Ok(());
        }
        if self.space.owner(segment) == Some(Owner::Client(client)) {
            return Ok(());
        }
        Err(StoreError::denied(
            "mapped",
            format!("segment {segment} was not granted to this client"),
        ))
    }

    fn reservation_of(&self, client: ClientId, reservation: Generation) -> Result<&Object, StoreError> {
        match self.objects.get(reservation) {
            Some(object) if object.state == State::Reserved && object.writer == Some(client) => Ok(object),
            _ => Err(StoreError::stale(
                "reservation",
                reservation,
                "this client has no such reservation",
            )),
        }
    }

    fn write(
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
        self.out.push(Action::Fill {
            extent,
            bytes: payload,
        });
        Ok(())
    }

    fn seal_request(
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
                format!(
                    "segment {} was granted but never acknowledged as mapped",
                    object.extent.segment
                ),
            ));
        }
        let (copy, len_bytes) = (object.hints.seal_copy && object.in_place, object.extent.len_bytes);
        if let Some(state) = self.clients.get_mut(&client) {
            state.reservations.remove(&reservation);
        }
        if !copy {
            self.seal(client, request, reservation, checksum);
            return Ok(None);
        }
        if let Some(object) = self.objects.get_mut(reservation) {
            object.state.advance(State::Filling, object.key.as_str())?;
            object.meta.checksum = checksum;
            object.filling = true;
            // The request number travels in the pending table: the copy outlives this call.
            self.pending_copies.insert(reservation, (client, request));
        }
        self.want_space(
            Purpose::SealCopy {
                generation: reservation,
            },
            Owner::Node,
            len_bytes,
        );
        Ok(None)
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
        object.filling = false;
        object.in_place = false;
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
        let announced = object.announced();
        if let Some(directory) = &mut self.directory {
            let verdict = directory.announce(self.config.member.node, &announced, true);
            let refused = (verdict == Verdict::Refused).then_some(announced.key);
            return self.exclusive_answer(
                client,
                request,
                generation,
                checksum,
                refused.into_iter().collect(),
            );
        }
        let Some(link) = self.directory_link else {
            let why = format!(
                "put {:?}: if_exists = error has to ask the node that keeps it, and there is no link to that; it is being dialled",
                announced.key
            );
            self.free_object(generation);
            return self.reply(
                client,
                request,
                Err(StoreError::unavailable("the directory", why)),
            );
        };
        let pending = Pending::Exclusive {
            client,
            request,
            generation,
            checksum,
        };
        let message = PeerMessage::Announce {
            objects: vec![announced],
            exclusive: true,
        };
        self.ask_peer(link, message, pending);
    }

    /// Makes an object visible here and answers its client.
    pub(super) fn seal_now(
        &mut self,
        client: ClientId,
        request: u64,
        generation: Generation,
        checksum: Checksum,
    ) {
        let reply = self.publish(generation, checksum);
        self.reply(client, request, reply);
    }

    /// Seals, shows and announces an object. If its key was taken meanwhile, the put gives way as its caller wished.
    pub(super) fn publish(
        &mut self,
        generation: Generation,
        checksum: Checksum,
    ) -> Result<ClientReply, StoreError> {
        self.make_slot();
        let slot = match self.objects.seal(generation, checksum) {
            Ok(slot) => slot,
            Err(error) => {
                let gone = self
                    .objects
                    .get(generation)
                    .map(|object| (object.key.clone(), object.if_exists));
                self.free_object(generation);
                let there = gone.and_then(|(key, if_exists)| {
                    let (_, there) = self.objects.sealed(&key)?;
                    (if_exists == IfExists::Keep).then_some((there.id, there.slot))
                });
                let Some((object, slot)) = there else {
                    return Err(error);
                };
                return Ok(ClientReply::Sealed {
                    object,
                    kept: true,
                    slot,
                });
            }
        };
        let Some(object) = self.objects.get(generation) else {
            return Err(StoreError::stale(
                "seal",
                generation,
                "there is no such reservation",
            ));
        };
        let (id, key, hints) = (object.id, object.key.clone(), object.hints);
        let (announced, copied_here, len_bytes) =
            (object.announced(), object.copied_here, object.extent.len_bytes);
        self.out.push(Action::Publish {
            slot,
            object: object.published(generation),
        });
        if copied_here || hints.cache {
            self.eviction.insert(generation, key.fingerprint(), len_bytes);
        }
        if !copied_here {
            self.counters.puts += 1;
        }
        if let Some(ttl_ms) = hints.ttl_ms {
            self.timers.set(self.now.after_ms(ttl_ms), Timer::Ttl(generation));
        }
        self.announce(announced);
        self.key_exists(&key);
        Ok(ClientReply::Sealed {
            object: id,
            kept: false,
            slot: Some(slot),
        })
    }

    /// Sees to it that the index has a free slot, if an object may go for that.
    pub(super) fn make_slot(&mut self) {
        if self.objects.is_full() {
            self.evict_for_slot();
        }
    }

    fn abort(&mut self, reservation: Generation) {
        let Some(object) = self.objects.get(reservation) else {
            return;
        };
        if let Some(state) = object.writer.and_then(|client| self.clients.get_mut(&client)) {
            state.reservations.remove(&reservation);
        }
        self.free_object(reservation);
        self.retry_space();
    }

    fn get(
        &mut self,
        client: ClientId,
        request: u64,
        key: Key,
        range: Option<Range>,
        timeout_ms: u64,
        keep: bool,
    ) {
        self.counters.gets += 1;
        let want = Want::Object {
            keep: keep && range.is_none(),
        };
        if !self.found_here(client, request, &key, range, want) {
            self.fetch(client, request, key, range, want, timeout_ms);
        }
    }

    /// Answers what is wanted of an object if it is here; false if it is not.
    pub(super) fn found_here(
        &mut self,
        client: ClientId,
        request: u64,
        key: &Key,
        range: Option<Range>,
        want: Want,
    ) -> bool {
        let Some((generation, object)) = self.objects.sealed(key) else {
            return false;
        };
        match want {
            Want::Object { .. } => {
                let part = match range {
                    None => Ok(object.extent),
                    Some(range) => range
                        .check(key, object.meta.len_bytes)
                        .and_then(|()| object.extent.slice(range.start, range.len_bytes)),
                };
                self.eviction.touch(&generation);
                match part {
                    Ok(extent) => self.locate(client, request, generation, extent, Path::Local),
                    Err(error) => self.reply(client, request, Err(error)),
                }
            }
            Want::Stat => {
                let reply = ClientReply::Stat {
                    object: object.id,
                    meta: object.meta,
                    tier: Some(Tier::Host),
                    pinned: object.hints.pin,
                    holders: self.holder_names(key),
                };
                self.reply(client, request, Ok(reply));
            }
            Want::Existence => self.reply(client, request, Ok(ClientReply::Exists)),
        }
        true
    }

    /// Hands an object over, pinned for the client.
    pub(super) fn locate(
        &mut self,
        client: ClientId,
        request: u64,
        generation: Generation,
        extent: Extent,
        path: Path,
    ) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let located = Located {
            object: object.id,
            meta: object.meta,
            extent,
            tier: Tier::Host,
            generation,
            pin: 0,
            path,
        };
        if self.clients.contains_key(&client) {
            self.out.push(Action::PinAndReply {
                client,
                request,
                located,
            });
        }
    }

    fn segment(
        &mut self,
        client: ClientId,
        request: u64,
        segment: SegmentId,
    ) -> Result<Option<ClientReply>, StoreError> {
        let Some(len_bytes) = self.space.len_bytes(segment) else {
            return Err(StoreError::stale(
                "segment",
                segment,
                "there is no such segment (any more)",
            ));
        };
        if !self.space.is_closed_to_writers(segment) {
            return Err(StoreError::denied(
                "segment",
                format!("segment {segment} is still being granted"),
            ));
        }
        let reply = Ok(ClientReply::Segment {
            len_bytes,
            tier: Tier::Host,
        });
        self.out.push(Action::Reply {
            client,
            request,
            reply,
            attachment: Some(Attachment::Segment(segment)),
        });
        Ok(None)
    }

    fn wait(&mut self, client: ClientId, request: u64, key: Key, timeout_ms: u64) {
        if self.objects.sealed(&key).is_some() {
            return self.reply(client, request, Ok(ClientReply::Exists));
        }
        if timeout_ms == 0 {
            return self.fetch(client, request, key, None, Want::Existence, 5_000);
        }
        if self.known_elsewhere(&key) {
            return self.reply(client, request, Ok(ClientReply::Exists));
        }
        if let Some(link) = self.directory_link {
            self.tell_peer(link, PeerMessage::Watch { key: key.clone() });
        }
        let deadline = self.now.after_ms(timeout_ms);
        self.timers.set(deadline, Timer::Wait);
        let who = Waiter::Client { client, request };
        self.waiting_keys.entry(key).or_default().push(WaitingKey {
            who,
            deadline,
            timeout_ms,
        });
    }

    /// Answers everyone who waits for this key.
    pub(super) fn key_exists(&mut self, key: &Key) {
        let Some(waiting) = self.waiting_keys.remove(key) else {
            return;
        };
        for waiting in waiting {
            match waiting.who {
                Waiter::Client { client, request } => self.reply(client, request, Ok(ClientReply::Exists)),
                Waiter::Peer { node } => self.tell_exists(node, key),
            }
        }
    }

    pub(super) fn wait_deadlines(&mut self) {
        let now = self.now;
        let mut late = Vec::new();
        for (key, waiting) in &mut self.waiting_keys {
            waiting.retain(|w| {
                if w.deadline > now {
                    return true;
                }
                if let Waiter::Client { client, request } = w.who {
                    late.push((client, request, StoreError::timed_out("wait", key, w.timeout_ms)));
                }
                false
            });
        }
        self.waiting_keys.retain(|_, waiting| !waiting.is_empty());
        for (client, request, error) in late {
            self.reply(client, request, Err(error));
        }
    }

    fn stat(&mut self, client: ClientId, request: u64, key: Key, timeout_ms: u64) {
        if !self.found_here(client, request, &key, None, Want::Stat) {
            self.fetch(client, request, key, None, Want::Stat, timeout_ms);
        }
    }

    fn pin_hint(&mut self, key: &Key, pin: bool) -> Result<(), StoreError> {
        let Some((generation, _)) = self.objects.sealed(key) else {
            return Err(StoreError::not_found("pin", key));
        };
        if let Some(object) = self.objects.get_mut(generation) {
            object.hints.pin = pin;
        }
        Ok(())
    }

    fn evict_request(&mut self, key: &Key, force: bool) -> Result<(), StoreError> {
        let Some((generation, object)) = self.objects.sealed(key) else {
            return Err(StoreError::not_found("evict", key));
        };
        let elsewhere = object.copied_here && self.is_alive(object.id.origin, object.id.epoch);
        if !force && !elsewhere {
            return Err(StoreError::denied(
                "evict",
                format!("{key:?}: no other node is known to hold it"),
            ));
        }
        self.withdraw(generation);
        Ok(())
    }

    pub(super) fn ttl_over(&mut self, generation: Generation) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        if object.state == State::Sealed && object.hints.ttl_ms.is_some() {
            let (key, id) = (object.key.clone(), object.id);
            self.delete_expired(key, id);
        }
    }
}
