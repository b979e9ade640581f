//! Where objects were found at peers, so that they are read again with no message to the peer's engine; and the look
//! at the generation word that tells whether bytes are what they were taken for. Not whom to ask (`fetch`).
//! Invariant: bytes that were read while no lease of this node was alive are believed only if the owner's generation
//! word, read after the last of them was read, is the one that the owner named when it gave the place.
//!
//! Why that is enough: the owner changes the word (`Action::Withdraw`) before it frees the extent, no generation is
//! used twice in an incarnation, and a region key belongs to one registration of one incarnation for ever, so a place
//! of another incarnation cannot be read at all. The owner withdraws an object before it acknowledges its deletion, so
//! an unchanged word also says that no such acknowledgement was given before the word was read.

use std::collections::{BTreeMap, HashMap};

use super::Engine;
use super::action::Action;
use super::fetch::{Bytes, FetchId, Source, Stage, Want};
use super::input::ReadEnd;
use super::paths::Way;
use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::tier::{Extent, Generation, LinkId, NodeId, ObjectId, RemoteExtent, TransferId};
use crate::wire::{Granted, Origin, Range};

/// Keys whose place is remembered.
const LOCATIONS_MAX: usize = 65_536;

/// An object's place at a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// The link that it was granted over, and who was at its other end.
    pub(super) link: LinkId,
    node: NodeId,
    object: ObjectId,
    meta: ObjectMeta,
    origin: Origin,
    /// Of the whole object, whatever range was granted.
    extent: RemoteExtent,
    /// What the word holds for as long as the extent is the object's. Never 0, which stands for none.
    generation: Generation,
    generation_at: RemoteExtent,
}

impl Location {
    /// The place of the whole object of which `range` was granted; none if there can be no such place.
    fn of_grant(
        (link, node): (LinkId, NodeId),
        (object, meta, origin): (ObjectId, ObjectMeta, Origin),
        range: Option<Range>,
        granted: Granted,
    ) -> Option<Self> {
        let offset = granted.extent.offset.checked_sub(range.map_or(0, |range| range.start))?;
        offset.checked_add(meta.len_bytes)?;
        let extent = RemoteExtent { key: granted.extent.key, offset, len_bytes: meta.len_bytes };
        let Granted { generation, generation_at, .. } = granted;
        let place = Self { link, node, object, meta, origin, extent, generation, generation_at };
        (generation.0 != 0).then_some(place)
    }

    /// Where a part of the object is; none if the object as it is remembered has no such part.
    fn part(&self, range: Option<Range>) -> Option<RemoteExtent> {
        let Some(Range { start, len_bytes }) = range else {
            return Some(self.extent);
        };
        let end = start.checked_add(len_bytes)?;
        (end <= self.extent.len_bytes).then_some(RemoteExtent {
            key: self.extent.key,
            offset: self.extent.offset + start,
            len_bytes,
        })
    }
}

/// Places by key, the latest used of them.
#[derive(Debug, Default)]
pub(super) struct Locations {
    places: HashMap<Key, (u64, Location)>,
    /// Keys by their last use.
    uses: BTreeMap<u64, Key>,
    next_use: u64,
    /// Words that are being read, and for which fetch.
    words: BTreeMap<TransferId, FetchId>,
}

impl Locations {
    fn remember(&mut self, key: &Key, location: Location) {
        self.forget(key);
        self.places.insert(key.clone(), (self.next_use, location));
        self.uses.insert(self.next_use, key.clone());
        self.next_use += 1;
        if self.places.len() > LOCATIONS_MAX
            && let Some((_, oldest)) = self.uses.pop_first()
        {
            self.places.remove(&oldest);
        }
    }

    /// Whether a transfer is of a word alone.
    pub(super) fn is_word(&self, transfer: TransferId) -> bool {
        self.words.contains_key(&transfer)
    }

    fn get(&self, key: &Key) -> Option<Location> {
        self.places.get(key).map(|(_, location)| *location)
    }

    pub(super) fn forget(&mut self, key: &Key) {
        if let Some((used, _)) = self.places.remove(key) {
            self.uses.remove(&used);
        }
    }

    /// An object is not to be found any more; none: whatever object of the key.
    pub(super) fn forget_object(&mut self, key: &Key, object: Option<ObjectId>) {
        if self.get(key).is_some_and(|location| object.is_none_or(|object| object == location.object)) {
            self.forget(key);
        }
    }

    /// Places are good only while their link is up: with it go the leases and keys of the peer's incarnation.
    pub(super) fn forget_link(&mut self, link: LinkId) {
        let uses = &mut self.uses;
        self.places.retain(|_, (used, location)| {
            let stays = location.link != link;
            if !stays {
                uses.remove(used);
            }
            stays
        });
    }
}

impl Engine {
    /// Whether what is at a place may still be what was found there, as far as this node knows.
    fn is_known(&self, location: &Location) -> bool {
        let node = self.links.get(&location.link).and_then(|link| link.node);
        node == Some(location.node) && !self.deleted.contains(location.object)
    }

    /// Begins to read the object of a fetch where it was found before; false if it has to be asked for.
    pub(super) fn fetch_known(&mut self, id: FetchId) -> bool {
        let Some(fetch) = self.fetches.get(id).filter(|fetch| matches!(fetch.want, Want::Object { .. }))
        else {
            return false;
        };
        let Some(location) = self.locations.get(&fetch.key) else {
            return false;
        };
        if !self.is_known(&location) {
            self.locations.forget(&fetch.key.clone());
            return false;
        }
        if fetch.tried.contains(&location.node) {
            return false;
        }
        // What is asked for may be a part of another object of the key, and then the owner is to say so.
        let (range, forced) = (fetch.range, fetch.threshold_bytes.or(self.config.threshold_bytes));
        let Some(remote) = location.part(range) else {
            return false;
        };
        let least = forced.unwrap_or_else(|| self.known_from(location.node));
        if remote.len_bytes <= least {
            return false;
        }
        self.time(id);
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.inline_max = least;
        }
        let bytes = Bytes::Known { location, remote };
        let Location { object, meta, origin, .. } = location;
        let source = Source { object, meta, origin, bytes };
        self.fetch_needs_room(id, location.link, source, remote.len_bytes);
        true
    }

    /// There is room for bytes at a place that is known; false if it is not known any more.
    pub(super) fn fetch_reads_known(
        &mut self,
        id: FetchId,
        source: Source,
        (location, remote): (Location, RemoteExtent),
        local: Extent,
    ) -> bool {
        if !self.is_known(&location) {
            return false;
        }
        let Some(generation) = self.insert_fetched(id, source, local) else {
            return false;
        };
        let transfer = self.new_transfer();
        self.transfers.insert(transfer, (generation, id));
        self.set_stage(id, Stage::ReadingKnown { transfer, location });
        let (link, word) = (location.link, Some(location.generation_at));
        self.out.push(Action::Read { link, transfer, bytes: Some((remote, local)), word });
        true
    }

    /// Bytes were read that no lease protects, and the word after them; or they could not be. Nothing lands in the object
    /// any more.
    pub(super) fn known_read(
        &mut self,
        id: FetchId,
        location: Location,
        generation: Generation,
        result: &Result<ReadEnd, StoreError>,
    ) {
        match result {
            Ok(ReadEnd { word, moved, .. }) if *word == Some(location.generation.0) => {
                self.counters.known += 1;
                self.measure(id, Some(location.link), Way::Known, *moved);
                self.word_is_unchanged(id, location, generation);
            }
            Ok(_) | Err(_) => self.place_outdated(id, generation, true),
        }
    }

    fn word_is_unchanged(&mut self, id: FetchId, location: Location, generation: Generation) {
        self.remember(id, location);
        self.fetch_complete(id, Some(location.link), generation);
    }

    /// A granted read is through, its lease is alive: the place may be read again.
    pub(super) fn remember_place(
        &mut self,
        id: FetchId,
        link: LinkId,
        granted: Granted,
        generation: Generation,
    ) {
        if let Some(location) = self.place_of(id, link, granted, generation) {
            self.remember(id, location);
        }
    }

    /// A granted read is through, and its lease had run out by then. Time says nothing; the word does.
    pub(super) fn check_late_read(
        &mut self,
        id: FetchId,
        link: LinkId,
        granted: Granted,
        generation: Generation,
    ) {
        match self.place_of(id, link, granted, generation) {
            Some(location) => self.check_word(id, location, generation),
            None => self.place_outdated(id, generation, false),
        }
    }

    fn place_of(
        &self,
        id: FetchId,
        link: LinkId,
        granted: Granted,
        generation: Generation,
    ) -> Option<Location> {
        let node = self.links.get(&link)?.node?;
        let object = self.objects.get(generation)?;
        let fetch = self.fetches.get(id)?;
        Location::of_grant((link, node), (object.id, object.meta, fetch.origin), fetch.range, granted)
    }

    fn remember(&mut self, id: FetchId, location: Location) {
        if let Some(fetch) = self.fetches.get(id)
            && self.is_known(&location)
        {
            self.locations.remember(&fetch.key, location);
        }
    }

    fn check_word(&mut self, id: FetchId, location: Location, generation: Generation) {
        let transfer = self.new_transfer();
        self.locations.words.insert(transfer, id);
        self.set_stage(id, Stage::CheckingWord { transfer, location, generation });
        let (link, word) = (location.link, Some(location.generation_at));
        self.out.push(Action::Read { link, transfer, bytes: None, word });
    }

    /// The owner's word is there, or cannot be read.
    pub(super) fn word_read(&mut self, transfer: TransferId, result: &Result<ReadEnd, StoreError>) {
        let Some(id) = self.locations.words.remove(&transfer) else {
            return;
        };
        let stage = self.fetches.get(id).map(|fetch| &fetch.stage);
        let Some(&Stage::CheckingWord { transfer: of, location, generation }) = stage else {
            return;
        };
        if of != transfer {
            return;
        }
        match result {
            Ok(ReadEnd { word, round_trips, .. }) if *word == Some(location.generation.0) => {
                self.fetch_round_trips(id, *round_trips);
                self.word_is_unchanged(id, location, generation);
            }
            Ok(_) | Err(_) => self.place_outdated(id, generation, false),
        }
    }

    /// What was read may be anything. A place that was only remembered was worth a try: the object is asked for at
    /// once. One that was granted just now is not.
    fn place_outdated(&mut self, id: FetchId, generation: Generation, known: bool) {
        self.free_object(generation);
        if let Some(fetch) = self.fetches.get(id) {
            self.locations.forget(&fetch.key);
        }
        if known {
            self.counters.outdated += 1;
            self.set_stage(id, Stage::Waiting);
            self.fetch_start(id);
        } else {
            let why = "its lease ran out while it was read, and its place was given up meanwhile";
            self.fetch_unfilled(id, self.fetch_stale(id, why));
        }
        self.space_freed = true;
    }

    /// Nobody waits for the word any more; nothing lands in the object either.
    pub(super) fn give_up_word(&mut self, transfer: TransferId, generation: Generation) {
        self.locations.words.remove(&transfer);
        self.free_object(generation);
        self.space_freed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::{Epoch, LeaseId, RemoteKey};

    fn granted(offset: u64, len_bytes: u64) -> Granted {
        Granted {
            extent: RemoteExtent { key: RemoteKey(5), offset, len_bytes },
            generation: Generation(9),
            generation_at: RemoteExtent { key: RemoteKey(1), offset: 64, len_bytes: 8 },
            lease: LeaseId(1),
            lease_ms: 1_000,
        }
    }

    fn location(link: u64, number: u64, range: Option<Range>, granted: Granted) -> Option<Location> {
        let object = ObjectId { origin: NodeId(1), epoch: Epoch(1), number };
        let meta = ObjectMeta::bytes(100).expect("a length");
        Location::of_grant((LinkId(link), NodeId(1)), (object, meta, Origin::HOST), range, granted)
    }

    #[test]
    fn a_granted_range_says_where_the_whole_object_is() {
        let range = Some(Range { start: 30, len_bytes: 20 });
        let place = location(1, 1, range, granted(1_030, 20)).expect("a place");
        assert_eq!(place.extent, RemoteExtent { key: RemoteKey(5), offset: 1_000, len_bytes: 100 });
        let part = place.part(Some(Range { start: 90, len_bytes: 10 })).expect("inside");
        assert_eq!((part.offset, part.len_bytes), (1_090, 10));
        for (start, len_bytes) in [(90, 11), (u64::MAX, 2), (101, 0)] {
            assert_eq!(place.part(Some(Range { start, len_bytes })), None, "{len_bytes} from {start}");
        }
        assert_eq!(location(1, 1, range, granted(29, 20)), None, "it would begin before its region");
        assert_eq!(location(1, 1, None, granted(u64::MAX - 5, 100)), None, "it would have no end");
        let no_generation = Granted { generation: Generation(0), ..granted(0, 100) };
        assert_eq!(location(1, 1, None, no_generation), None, "0 is what a withdrawn slot shows");
    }

    #[test]
    fn the_places_used_last_stay_and_a_link_takes_its_own_along() {
        let mut places = Locations::default();
        let key = |number: usize| Key::new(&format!("k{number}")).expect("a key");
        let place = |link| location(link, 1, None, granted(0, 100)).expect("a place");
        for number in 0..LOCATIONS_MAX {
            places.remember(&key(number), place(1 + number as u64 % 2));
        }
        places.remember(&key(0), place(1));
        places.remember(&key(LOCATIONS_MAX), place(1));
        assert!(places.get(&key(0)).is_some(), "used again");
        assert!(places.get(&key(1)).is_none(), "the one that was not used for longest");
        places.forget_link(LinkId(2));
        assert!(places.get(&key(3)).is_none() && places.get(&key(2)).is_some());
        let other = ObjectId { number: 2, ..place(1).object };
        places.forget_object(&key(2), Some(other));
        assert!(places.get(&key(2)).is_some());
        places.forget_object(&key(2), Some(place(1).object));
        assert!(places.get(&key(2)).is_none());
        assert_eq!(places.uses.len(), places.places.len());
    }
}
