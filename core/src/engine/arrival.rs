//! The bytes of gets from other nodes: where they land, and when they may be believed. Not whom to ask (`fetch`).
//! Invariant: a fetch succeeds only if its lease, counted from before the question and less a fifth for clocks that
//! run at different rates, had not run out when the last byte was there, or the owner's generation word was unchanged
//! after that (`locations`); and if its object was not deleted meanwhile.

use std::sync::Arc;

use super::Engine;
use super::action::Action;
use super::cluster::Incoming;
use super::fetch::{Bytes, Fetch, FetchFor, FetchId, FetchWaiter, Source, Stage, Want};
use super::input::ReadEnd;
use super::local::Caller;
use super::objects::{NewCopy, Object};
use super::paths::Way;
use super::replicas::ReplicaAsked;
use super::room::Purpose;
use super::space::Owner;
use super::timer::Time;
use crate::error::StoreError;
use crate::meta::ObjectMeta;
use crate::receipt::{Carried, Moved, Path};
use crate::tier::{Extent, Generation, LandingId, LinkId, ObjectId, Tier, TransferId};
use crate::wire::{ClientReply, Granted, Origin, PeerMessage};

/// Clients that waited for a fetch, and replicas that were asked for.
fn split(waiters: Vec<FetchWaiter>) -> (Vec<Caller>, Vec<ReplicaAsked>) {
    let (mut clients, mut replicas) = (Vec::new(), Vec::new());
    for waiter in waiters {
        match waiter.who {
            FetchFor::Client(caller) => clients.push(caller),
            FetchFor::Replica(asked) => replicas.push(*asked),
        }
    }
    (clients, replicas)
}

/// A part of a payload that lands in an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    generation: Generation,
    fetch: FetchId,
    /// Where in the payload it starts.
    start: u64,
    len_bytes: u64,
}

impl Part {
    /// How it came to its place, if so many bytes at the payload's start were staged.
    fn moved(&self, staged_bytes: u64) -> Moved {
        let staged_bytes = staged_bytes.saturating_sub(self.start).min(self.len_bytes);
        Moved { bytes: self.len_bytes, staged_bytes }
    }
}

impl Engine {
    /// How many bytes a fetch is for, once the object's length is known.
    fn wanted_len(fetch: &Fetch, meta: &ObjectMeta) -> Result<u64, StoreError> {
        match fetch.range {
            None => Ok(meta.len_bytes),
            Some(range) => range.check(&fetch.key, meta.len_bytes).map(|()| range.len_bytes),
        }
    }

    /// DATA: the object is the payload of this very message, which may be a part of its frame's.
    pub(super) fn fetch_data(
        &mut self,
        link: LinkId,
        request: u64,
        id: FetchId,
        (object, meta, origin): (ObjectId, ObjectMeta, Origin),
        Incoming { landing, start, len_bytes: payload_len }: Incoming,
    ) {
        if self.fetch_asked_at(id, request).is_none() {
            return;
        }
        if self.deleted.contains(object) {
            return self.fetch_deleted(id);
        }
        let Some(fetch) = self.fetches.get(id) else {
            return;
        };
        if !matches!(fetch.want, Want::Object { .. }) {
            return self.fetch_described(id, link, object, meta);
        }
        let wanted = Self::wanted_len(fetch, &meta);
        if wanted != Ok(payload_len) {
            let why = StoreError::protocol(format!(
                "get {:?}: the answer has {payload_len} bytes of payload, {wanted:?} were asked",
                fetch.key
            ));
            return self.fetch_failed(id, &why);
        }
        let source = Source { object, meta, origin, bytes: Bytes::InAnswer { landing, start } };
        self.fetch_needs_room(id, link, source, payload_len);
    }

    /// Answers those who only asked what it is.
    fn fetch_described(&mut self, id: FetchId, link: LinkId, object: ObjectId, meta: ObjectMeta) {
        let Some(fetch) = self.take_fetch(id) else {
            return;
        };
        if let Some(node) = self.links.get(&link).and_then(|link| link.node) {
            self.hints.remember(&fetch.key, node);
        }
        let holders = self.holder_names_from(link);
        for waiter in fetch.waiters {
            let reply = match fetch.want {
                Want::Existence => ClientReply::Exists,
                _ => ClientReply::Stat { object, meta, tier: None, pinned: false, holders: holders.clone() },
            };
            if let FetchFor::Client(caller) = waiter.who {
                self.answer_caller(caller, Ok(reply));
            }
        }
    }

    /// GRANT: the object may be read until the lease runs out.
    pub(super) fn fetch_grant(
        &mut self,
        link: LinkId,
        request: u64,
        id: FetchId,
        (object, meta, origin): (ObjectId, ObjectMeta, Origin),
        granted: Granted,
    ) {
        let refused = match (self.fetch_asked_at(id, request), self.fetches.get(id)) {
            (Some(at), Some(fetch)) if matches!(fetch.want, Want::Object { .. }) => {
                match Self::wanted_len(fetch, &meta) {
                    _ if self.deleted.contains(object) => None,
                    Ok(len_bytes) if len_bytes == granted.extent.len_bytes => {
                        let valid_until = at.after_ms(u64::from(granted.lease_ms) * 4 / 5);
                        let bytes = Bytes::Granted { granted, valid_until };
                        let source = Source { object, meta, origin, bytes };
                        return self.fetch_needs_room(id, link, source, len_bytes);
                    }
                    Ok(len_bytes) => Some(StoreError::protocol(format!(
                        "get {:?}: {} bytes were granted, {len_bytes} were asked",
                        fetch.key, granted.extent.len_bytes
                    ))),
                    Err(why) => Some(why),
                }
            }
            (Some(_), Some(_)) => {
                self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
                return self.fetch_described(id, link, object, meta);
            }
            _ => return self.tell_peer(link, PeerMessage::Release { lease: granted.lease }),
        };
        self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
        match refused {
            Some(why) => self.fetch_failed(id, &why),
            None => self.fetch_deleted(id),
        }
    }

    pub(super) fn fetch_needs_room(&mut self, id: FetchId, link: LinkId, source: Source, len_bytes: u64) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::NeedsRoom { link, source };
            fetch.origin = source.origin;
        }
        self.fetch_answered(id);
        let tier = match source.bytes {
            // What comes unasked is put in place by a processor.
            Bytes::InAnswer { .. } => Tier::Host,
            Bytes::Granted { .. } | Bytes::Known { .. } => self.fetch_tier(id, link),
        };
        self.want_space(Purpose::Fetch { fetch: id }, tier, Owner::Node, len_bytes);
    }

    /// Where the bytes of a fetch are to be read into: where the first who waits for them wants them, if its link reaches
    /// that.
    fn fetch_tier(&self, id: FetchId, link: LinkId) -> Tier {
        let wanted = self.fetches.get(id).and_then(|fetch| match &fetch.waiters.first()?.who {
            FetchFor::Client(caller) => caller.tier.map(|hint| hint.tier),
            FetchFor::Replica(_) => None,
        });
        let fabric = self.fabric_of(link);
        let reached = |tier: &Tier| {
            fabric.is_some_and(|fabric| fabric.tiers.contains(tier)) && self.space.has_tier(*tier)
        };
        wanted.filter(reached).unwrap_or(Tier::Host)
    }

    /// There is room for what a peer holds.
    pub(super) fn fetch_into(&mut self, id: FetchId, extent: Extent) {
        let Some((link, source)) = self.fetches.get(id).and_then(|fetch| match fetch.stage {
            Stage::NeedsRoom { link, source } => Some((link, source)),
            _ => None,
        }) else {
            let _ = self.space.free(extent);
            return;
        };
        // The fabric reaches the tier, but its adapter may not have taken this segment of it.
        if self.space.tier(extent.segment) != Tier::Host
            && extent.len_bytes > 0
            && self.key_for(link, extent.segment).is_none()
        {
            let _ = self.space.free(extent);
            return self.want_space(Purpose::Fetch { fetch: id }, Tier::Host, Owner::Node, extent.len_bytes);
        }
        self.fetch_has_room(id);
        match source.bytes {
            // An object without bytes has no payload that could be gone.
            Bytes::InAnswer { landing, start }
                if self.payload_at_hand == Some(landing) || extent.len_bytes == 0 =>
            {
                self.fetch_lands(id, link, (landing, start), source, extent);
            }
            Bytes::Granted { granted, valid_until }
                if self.now < valid_until && self.links.contains_key(&link) =>
            {
                self.fetch_reads(id, link, (granted, valid_until), source, extent);
            }
            Bytes::Known { location, remote }
                if self.fetch_reads_known(id, source, (location, remote), extent) => {}
            bytes => {
                // The payload was let go, or the lease ran out, or the link broke, while there was no room.
                let _ = self.space.free(extent);
                if let Bytes::Granted { granted, .. } = bytes {
                    self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
                }
                self.fetch_restart(id);
            }
        }
    }

    fn fetch_lands(
        &mut self,
        id: FetchId,
        link: LinkId,
        (landing, start): (LandingId, u64),
        source: Source,
        extent: Extent,
    ) {
        let Some(generation) = self.insert_fetched(id, source, extent) else {
            return;
        };
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::Landing { link };
        }
        let part = Part { generation, fetch: id, start, len_bytes: extent.len_bytes };
        if extent.len_bytes == 0 {
            return self.part_landed(part, Ok(Moved::default()));
        }
        self.landing.entry(landing).or_default().push(part);
        self.out.push(Action::Land { landing, start, extent });
    }

    fn fetch_reads(
        &mut self,
        id: FetchId,
        link: LinkId,
        (granted, valid_until): (Granted, Time),
        source: Source,
        extent: Extent,
    ) {
        let Some(generation) = self.insert_fetched(id, source, extent) else {
            return;
        };
        let transfer = self.new_transfer();
        self.transfers.insert(transfer, (generation, id));
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::Reading { link, transfer, granted, valid_until };
        }
        if extent.len_bytes == 0 {
            return self.read_done(transfer, Ok(ReadEnd::default()));
        }
        let bytes = Some((granted.extent, extent));
        self.out.push(Action::Read { link, transfer, bytes, word: None });
    }

    pub(super) fn new_transfer(&mut self) -> TransferId {
        self.next_transfer += 1;
        TransferId(self.next_transfer - 1)
    }

    pub(super) fn insert_fetched(
        &mut self,
        id: FetchId,
        source: Source,
        extent: Extent,
    ) -> Option<Generation> {
        let fetch = self.fetches.get(id)?;
        Some(self.objects.insert(Object::arriving(NewCopy {
            key: fetch.key.clone(),
            id: source.object,
            meta: source.meta,
            extent,
            tier: self.space.tier(extent.segment),
            path: Path::Read,
        })))
    }

    /// Nothing lands in the object any more. False if nobody waits for it, and then it is gone.
    fn filled(&mut self, generation: Generation, id: FetchId) -> bool {
        if let Some(object) = self.objects.get_mut(generation) {
            object.filling = false;
        }
        let waited_for = self.fetches.contains(id);
        if !waited_for {
            self.free_object(generation);
            self.space_freed = true;
        }
        waited_for
    }

    /// What lands of a payload is in its places, or never will be.
    pub(super) fn landed(&mut self, landing: LandingId, result: Result<Moved, StoreError>) {
        let parts = self.landing.remove(&landing).unwrap_or_default();
        self.out.reserve(parts.len());
        for part in parts {
            let result = match &result {
                Ok(Moved { staged_bytes, .. }) => Ok(part.moved(*staged_bytes)),
                Err(why) => Err(why.clone()),
            };
            self.part_landed(part, result);
        }
    }

    fn part_landed(&mut self, part: Part, result: Result<Moved, StoreError>) {
        let Part { generation, fetch: id, .. } = part;
        let link = match self.fetches.get(id).map(|fetch| &fetch.stage) {
            Some(&Stage::Landing { link }) => Some(link),
            _ => None,
        };
        if !self.filled(generation, id) {
            return;
        }
        match result {
            Ok(moved) => {
                self.fetch_moved(id, moved, Path::Eager);
                self.measure(id, link, Way::Eager, moved);
                self.fetch_complete(id, link, generation);
            }
            Err(why) => {
                self.free_object(generation);
                if let Some(link) = link {
                    self.fetch_tried(id, link);
                }
                self.fetch_moves_on(id, why);
            }
        }
    }

    /// A read has ended.
    pub(super) fn read_done(&mut self, transfer: TransferId, result: Result<ReadEnd, StoreError>) {
        if self.locations.is_word(transfer) {
            return self.word_read(transfer, &result);
        }
        let Some((generation, id)) = self.transfers.remove(&transfer) else {
            return;
        };
        if let Ok(ReadEnd { moved, round_trips, pushed, .. }) = result {
            self.fetch_moved(id, moved, if pushed { Path::Push } else { Path::Read });
            self.fetch_round_trips(id, round_trips);
        }
        let stage = self.fetches.get(id).map(|fetch| &fetch.stage);
        if let Some(&Stage::ReadingKnown { location, .. }) = stage {
            self.filled(generation, id);
            return self.known_read(id, location, generation, &result);
        }
        let Some(&Stage::Reading { link, granted, valid_until, .. }) = stage else {
            // Its fetch was given up; this was what the extent waited for.
            self.filled(generation, id);
            return;
        };
        self.filled(generation, id);
        self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
        match result {
            Ok(ReadEnd { moved, .. }) if self.now <= valid_until => {
                self.measure(id, Some(link), Way::Granted, moved);
                self.remember_place(id, link, granted, generation);
                self.fetch_complete(id, Some(link), generation);
            }
            // Late: the owner may have reused the extent. Time never turns a late read into a success.
            Ok(_) => self.check_late_read(id, link, granted, generation),
            Err(why) => {
                self.free_object(generation);
                self.fetch_tried(id, link);
                self.fetch_moves_on(id, why);
            }
        }
    }

    fn fetch_moved(&mut self, id: FetchId, moved: Moved, came_by: Path) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            (fetch.moved, fetch.came_by) = (moved, came_by);
        }
    }

    /// What is known about how the bytes of a fetch came here.
    fn carried(&mut self, fetch: &Fetch, link: Option<LinkId>) -> Option<Box<Carried>> {
        let node = self.links.get(&link?)?.node?;
        let fabric = self.fabric_of(link?).map(|fabric| Arc::clone(&fabric.name));
        let Moved { bytes, staged_bytes } = fetch.moved;
        let staged_bytes = if fetch.origin.staged { bytes } else { staged_bytes };
        Some(Box::new(Carried {
            fabric: fabric.unwrap_or_default(),
            from: self.shared_name_of(node),
            from_tier: fetch.origin.tier,
            moved: Moved { staged_bytes, ..fetch.moved },
            round_trips: fetch.round_trips,
            threshold_bytes: fetch.inline_max,
        }))
    }

    pub(super) fn fetch_stale(
        &self,
        id: FetchId,
        why: impl Into<std::borrow::Cow<'static, str>>,
    ) -> StoreError {
        let key = self.fetches.get(id).map(|fetch| fetch.key.to_string());
        StoreError::stale("get", key.unwrap_or_default(), why)
    }

    /// The bytes did not come, or not in time.
    pub(super) fn fetch_unfilled(&mut self, id: FetchId, why: StoreError) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::Waiting;
        }
        self.fetch_obstacle(id, why);
    }

    /// What a peer gave was deleted while it was under way; there may be another object of the key by now.
    fn fetch_deleted(&mut self, id: FetchId) {
        self.fetch_unfilled(id, self.fetch_stale(id, "the object was deleted while it was fetched"));
    }

    pub(super) fn fetch_complete(&mut self, id: FetchId, link: Option<LinkId>, generation: Generation) {
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let (extent, checksum) = (object.extent, object.meta.checksum);
        if self.deleted.contains(object.id) {
            self.free_object(generation);
            return self.fetch_deleted(id);
        }
        let Some(fetch) = self.take_fetch(id) else {
            return;
        };
        let path = fetch.came_by;
        match path {
            Path::Eager => self.counters.eager += 1,
            _ => self.counters.read += 1,
        }
        if let Some(node) = link.and_then(|link| self.links.get(&link)).and_then(|link| link.node)
            && fetch.hinted != Some(node)
        {
            self.hints.remember(&fetch.key, node);
        }
        let carried = self.carried(&fetch, link);
        let (clients, replicas) = split(fetch.waiters);
        self.fetched_for_good(generation, &replicas);
        let mut target = (generation, extent);
        let mut kept = false;
        if fetch.want == (Want::Object { keep: true }) {
            self.make_slot(generation);
            kept = !self.objects.is_full();
        }
        if kept {
            // Someone may have put the same key meanwhile; then that object is the answer.
            let published = self.publish(generation, checksum);
            match (self.objects.sealed(&fetch.key), published) {
                (Some((sealed, object)), _) => target = (sealed, object.extent),
                (None, Err(why)) => {
                    self.replicas_fetched(&replicas, &fetch.key, Some(&why));
                    for caller in clients {
                        self.counters.failed += 1;
                        self.answer_caller(caller, Err(why.clone()));
                    }
                    return;
                }
                // The directory did not let it stay; who asked before may still read it.
                (None, Ok(_)) => {}
            }
        }
        for caller in clients {
            self.locate(caller, target.0, target.1, (path, carried.clone()));
        }
        if !kept {
            // From here on only the pins that were just made hold it.
            self.withdraw_handed_out(generation);
        }
        self.replicas_fetched(&replicas, &fetch.key, None);
    }
}
