//! What a node's own clients ask. Not gets from other nodes (`fetch`), and not the room for puts (`room`).
//! Invariant: every request of a live client is answered exactly once.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};

use bytes::Bytes;

use super::action::{Action, Attachment, Event};
use super::ahead::Ahead;
use super::crossing::Reader;
use super::fetch::{Scope, Want};
use super::room::NewObject;
use super::timer::{Time, Timer};
use super::{Engine, INLINE_PUT_MAX, State};
use crate::error::StoreError;
use crate::key::Key;
use crate::receipt::{Carried, Path};
use crate::tier::{ClientId, Extent, Generation, SegmentId, Tier, TierHint};
use crate::wire::{
    ClientMessage, ClientReply, GpuTier, KEYS_PER_MESSAGE_MAX, Located, Range, Role, negotiate,
};

/// Retired segments that one answer names; more are named by the next.
const RETIRED_MAX: usize = 1024;

/// Keys in requests for many that one client may have waiting at once.
const BATCHED_KEYS_MAX: usize = 64 * KEYS_PER_MESSAGE_MAX;

/// Who is answered: a request, or one key of a request for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) client: ClientId,
    pub(super) request: u64,
    /// Which of many keys, if its request is for many.
    pub(super) item: Option<u32>,
    /// Where it wants bytes to be; none: where they are.
    pub(super) tier: Option<TierHint>,
}

impl Caller {
    pub(super) const fn of(client: ClientId, request: u64) -> Self {
        Self { client, request, item: None, tier: None }
    }

    pub(super) const fn is_one_of_many(self) -> bool {
        self.item.is_some()
    }
}

/// A request for many keys.
#[derive(Clone, Copy, Debug)]
struct Many {
    count: u32,
    /// Keys without an answer.
    left: u32,
    deadline: Time,
}

/// A session of a client.
#[derive(Debug, Default)]
pub(super) struct Client {
    /// Runs in the node's process: its end is the end of its mappings too.
    trusted: bool,
    greeted: bool,
    pub(super) reservations: BTreeSet<Generation>,
    /// Granted segments whose descriptor it has but has not yet acknowledged to have mapped.
    pub(super) unmapped: BTreeSet<SegmentId>,
    /// Segments whose descriptor it has.
    pub(super) mapped: BTreeSet<SegmentId>,
    /// Memory for puts that ask nobody.
    pub(super) ahead: Ahead,
    /// Requests for many keys that wait for some of them.
    many: BTreeMap<u64, Many>,
}

impl Engine {
    pub(super) fn reply(&mut self, client: ClientId, request: u64, reply: Result<ClientReply, StoreError>) {
        if self.clients.contains_key(&client) {
            self.out.push(Action::Reply { client, request, reply, attachment: None });
        }
    }

    /// Answers a request, or keeps the answer to one key until all of its request have one.
    pub(super) fn answer_caller(&mut self, caller: Caller, reply: Result<ClientReply, StoreError>) {
        let Caller { client, request, item, .. } = caller;
        match (item, reply) {
            (None, reply) => self.reply(client, request, reply),
            (Some(item), Err(error)) => self.item_over(client, request, item, Err(error)),
            // What is wanted of many keys is their bytes, and these are located.
            (Some(_), Ok(reply)) => debug_assert!(false, "{reply:?} is no answer to one of many keys"),
        }
    }

    fn item_over(&mut self, client: ClientId, request: u64, item: u32, located: Result<Located, StoreError>) {
        let Some(state) = self.clients.get_mut(&client) else {
            return;
        };
        let Some(many) = state.many.get_mut(&request) else {
            return;
        };
        many.left = many.left.saturating_sub(1);
        self.out.push(Action::Item { client, request, item, located });
        if let Many { count, left: 0, deadline } = *many {
            state.many.remove(&request);
            self.timers.unset(deadline, Timer::Many(client, request));
            self.out.push(Action::ReplyItems { client, request, count });
        }
    }

    pub(super) fn client_joined(&mut self, client: ClientId, trusted: bool) {
        self.clients.insert(client, Client { trusted, ..Client::default() });
    }

    pub(super) fn client_left(&mut self, client: ClientId) {
        let Some(state) = self.clients.remove(&client) else {
            return;
        };
        self.out.push(Action::Note(Event::ClientLeft { client, reservations: state.reservations.len() }));
        self.forget_space_requests_of(client);
        self.forget_fetch_waiters_of(client);
        for reservation in state.reservations {
            self.abort(reservation);
        }
        self.forget_waits_of(client);
        self.ahead_of_gone(state.ahead);
        self.forget_awaiting_of(client);
        self.crossings.forget(client);
        self.forget_deletes_of(client);
        for (request, many) in state.many {
            self.timers.unset(many.deadline, Timer::Many(client, request));
        }
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
            ClientMessage::Hello { version_min, version_max } => {
                return self.greet(client, request, version_min, version_max);
            }
            ClientMessage::Put { key, meta, hints, if_exists } => {
                let object = NewObject { key, meta, hints, if_exists };
                return self.put(client, request, object, payload);
            }
            ClientMessage::Reserve { key, meta, hints, if_exists, writes } => {
                let object = NewObject { key, meta, hints, if_exists };
                return self.reserve(client, request, object, writes);
            }
            ClientMessage::Mapped { segment } => self.mapped(client, segment)?,
            ClientMessage::Write { reservation, offset } => {
                self.write(client, reservation, offset, payload)?;
            }
            ClientMessage::Seal { reservation, checksum } => {
                return self.seal_request(client, request, reservation, checksum);
            }
            ClientMessage::Abort { reservation } => {
                self.reservation_of(client, reservation)?;
                self.abort(reservation);
            }
            ClientMessage::Get { key, range, timeout_ms, keep, threshold_bytes, tier } => {
                let want = Want::Object { keep: keep && range.is_none() };
                let caller = Caller { tier, ..Caller::of(client, request) };
                self.get(caller, key, Scope { range, want, threshold_bytes }, timeout_ms);
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
                self.list(client, request, prefix, after, limit);
                return Ok(None);
            }
            ClientMessage::Delete { key } => {
                self.delete_request(client, request, key);
                return Ok(None);
            }
            ClientMessage::Pin { key, pin } => self.pin_hint(&key, pin)?,
            ClientMessage::Evict { key, force } => self.evict_request(&key, force)?,
            ClientMessage::Ahead { ring } => return self.ahead_request(client, request, ring),
            // The ring was drained before this came here.
            ClientMessage::Drain if request == 0 => return Ok(None),
            ClientMessage::Drain => {}
            ClientMessage::Status => return Ok(Some(ClientReply::Status(Box::new(self.status())))),
            ClientMessage::GetMany { keys, timeout_ms, keep, threshold_bytes, tier } => {
                let scope = Scope { range: None, want: Want::Object { keep }, threshold_bytes };
                self.get_many(Caller { tier, ..Caller::of(client, request) }, keys, scope, timeout_ms)?;
                return Ok(None);
            }
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
            gpus: self
                .config
                .gpus
                .iter()
                .map(|gpu| GpuTier { ordinal: gpu.ordinal, uuid: gpu.uuid.to_string() })
                .collect(),
        };
        self.out.push(Action::Reply {
            client,
            request,
            reply: Ok(reply),
            attachment: Some(Attachment::Session),
        });
        Ok(None)
    }

    fn get(&mut self, caller: Caller, key: Key, scope: Scope, timeout_ms: u64) {
        self.counters.gets += 1;
        if !self.found_here(caller, &key, scope.range, scope.want) {
            self.fetch(caller, key, scope, timeout_ms);
        }
    }

    /// Every key is a get of its own; only the answer is one.
    fn get_many(
        &mut self,
        asked: Caller,
        keys: Vec<Key>,
        scope: Scope,
        timeout_ms: u64,
    ) -> Result<(), StoreError> {
        let Caller { client, request, .. } = asked;
        let Some(state) = self.clients.get_mut(&client) else {
            return Ok(());
        };
        if keys.is_empty() || keys.len() > KEYS_PER_MESSAGE_MAX {
            let why = format!("get many: {} keys, 1 to {KEYS_PER_MESSAGE_MAX} are accepted", keys.len());
            return Err(StoreError::invalid("keys", why));
        }
        let waiting: usize = state.many.values().map(|many| many.left as usize).sum();
        if waiting + keys.len() > BATCHED_KEYS_MAX {
            let why = format!("{waiting} keys of this client wait, at most {BATCHED_KEYS_MAX} may");
            return Err(StoreError::busy("get many", why));
        }
        let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        let Entry::Vacant(place) = state.many.entry(request) else {
            return Err(StoreError::protocol(format!("request {request} for many keys is being answered")));
        };
        let deadline = self.now.after_ms(timeout_ms);
        place.insert(Many { count, left: count, deadline });
        self.timers.set(deadline, Timer::Many(client, request));
        self.out.reserve(keys.len());
        for (item, key) in (0..count).zip(keys) {
            self.get(Caller { item: Some(item), ..asked }, key, scope, timeout_ms);
        }
        Ok(())
    }

    /// Answers what is wanted of an object if it is here; false if it is not.
    pub(super) fn found_here(&mut self, caller: Caller, key: &Key, range: Option<Range>, want: Want) -> bool {
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
                self.eviction.touch(object.tier, generation);
                match part {
                    Ok(extent) => self.locate(caller, generation, extent, (Path::Local, None)),
                    Err(error) => self.answer_caller(caller, Err(error)),
                }
            }
            Want::Stat => {
                let reply = ClientReply::Stat {
                    object: object.id,
                    meta: object.meta,
                    tier: Some(object.tier),
                    pinned: object.hints.pin,
                    holders: self.holder_names(key),
                };
                self.answer_caller(caller, Ok(reply));
            }
            Want::Existence => self.answer_caller(caller, Ok(ClientReply::Exists)),
        }
        true
    }

    /// Hands a part of an object over where its reader wants it, pinned for the client.
    pub(super) fn locate(
        &mut self,
        caller: Caller,
        generation: Generation,
        part: Extent,
        how: (Path, Option<Box<Carried>>),
    ) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let wanted = caller.tier.map_or(Ok(object.tier), |hint| self.tier_of(hint));
        match wanted {
            // No bytes are nowhere.
            Ok(tier) if tier == object.tier || part.len_bytes == 0 => {
                self.hand_out_part(caller, generation, part, how, None);
            }
            Ok(tier) => self.cross(Reader::Client { caller, how }, generation, part, tier),
            Err(error) => self.answer_caller(caller, Err(error)),
        }
    }

    /// Hands a whole object over, pinned for the client.
    pub(super) fn hand_out(
        &mut self,
        caller: Caller,
        generation: Generation,
        how: (Path, Option<Box<Carried>>),
        copied_from: Option<Tier>,
    ) {
        if let Some(extent) = self.objects.get(generation).map(|object| object.extent) {
            self.hand_out_part(caller, generation, extent, how, copied_from);
        }
    }

    fn hand_out_part(
        &mut self,
        Caller { client, request, item, .. }: Caller,
        generation: Generation,
        extent: Extent,
        (path, carried): (Path, Option<Box<Carried>>),
        copied_from: Option<Tier>,
    ) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let path = if copied_from.is_some() && path == Path::Local { Path::LocalCopy } else { path };
        let located = Located {
            object: object.id,
            meta: object.meta,
            extent,
            tier: object.tier,
            generation,
            pin: 0,
            path,
            copied_from,
            carried,
        };
        match item {
            Some(item) => self.item_over(client, request, item, Ok(located)),
            None if self.clients.contains_key(&client) => {
                self.out.push(Action::PinAndReply { client, request, located });
            }
            None => {}
        }
    }

    fn segment(
        &mut self,
        client: ClientId,
        request: u64,
        segment: SegmentId,
    ) -> Result<Option<ClientReply>, StoreError> {
        let Some(len_bytes) = self.space.len_bytes(segment) else {
            return Err(StoreError::stale("segment", segment, "there is no such segment (any more)"));
        };
        if !self.space.is_closed_to_writers(segment) {
            return Err(StoreError::denied("segment", format!("segment {segment} is still being granted")));
        }
        let mut retired = Vec::new();
        if let Some(state) = self.clients.get_mut(&client) {
            retired.extend(state.mapped.iter().filter(|mapped| self.space.len_bytes(**mapped).is_none()));
            retired.truncate(RETIRED_MAX);
            for segment in &retired {
                state.mapped.remove(segment);
            }
            state.mapped.insert(segment);
        }
        let tier = self.space.tier(segment);
        let reply = Ok(ClientReply::Segment { len_bytes, tier, retired });
        self.out.push(Action::Reply {
            client,
            request,
            reply,
            attachment: Some(Attachment::Segment(segment)),
        });
        Ok(None)
    }

    fn stat(&mut self, client: ClientId, request: u64, key: Key, timeout_ms: u64) {
        let caller = Caller::of(client, request);
        if !self.found_here(caller, &key, None, Want::Stat) {
            let scope = Scope { range: None, want: Want::Stat, threshold_bytes: None };
            self.fetch(caller, key, scope, timeout_ms);
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
        if !force && !self.is_elsewhere(object) {
            let why = match object.role {
                Role::Replica => format!("{key:?}: this is one of its {} replicas", object.replicas),
                Role::Original | Role::Copy => format!("{key:?}: no other node is known to hold it for good"),
            };
            return Err(StoreError::denied("evict", why));
        }
        self.withdraw(generation);
        Ok(())
    }

    pub(super) fn ttl_over(&mut self, generation: Generation) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        if object.state == State::Sealed && object.expires.is_some_and(|at| at <= self.now) {
            let (key, id) = (object.key.clone(), object.id);
            self.delete_expired(key, id);
        }
    }
}
