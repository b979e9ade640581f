//! Simulated clients: what they ask, how they write and read in place, and how they die. Not the node's side.
//! Invariant: a client writes only where it has a reservation, and reads only what it has pinned and looked at again,
//! one step of virtual time after another.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use hetmem_core::engine::{INLINE_PUT_MAX, Input};
use hetmem_core::wire::{
    ClientMessage, ClientReply, IfExists, Located, PROTOCOL_MAX, PROTOCOL_MIN, PutHints, Range,
};
use hetmem_core::{Checksum, ClientId, Extent, Generation, ObjectMeta, SegmentId, SlotId, Tier, TierHint};

use super::guards::Hold;
use super::history::{History, Seen};
use super::pattern;
use super::plan::MS;
use super::ring::PuttingAhead;
use super::world::{Due, World};

/// How long a node waits for a directory, in milliseconds.
const AWAIT_MS: u64 = 5_000;
/// Keys of one question at most.
const KEYS_MAX: usize = 8;

/// A question that waits for its answer.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) request: u64,
    pub(super) began: u64,
    pub(super) deadline: u64,
    pub(super) answered: bool,
    pub(super) kind: Kind,
}

/// The keys of one question, some of them perhaps twice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    numbers: [usize; KEYS_MAX],
    count: usize,
}

impl Keys {
    pub(super) fn numbers(&self) -> &[usize] {
        &self.numbers[..self.count]
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Hello,
    Put { attempt: usize },
    Reserve { attempt: usize },
    Mapped,
    Write,
    Seal { attempt: usize, reservation: Generation },
    Abort,
    Get { key: usize, range: Option<Range>, timeout_ms: u64, began: u64 },
    GetMany { keys: Keys, timeout_ms: u64, began: u64 },
    Segment,
    Wait { key: usize, timeout_ms: u64 },
    Stat { key: usize },
    List { all: bool },
    Delete { deletion: usize },
    Pin,
    Evict { force: bool },
    Status,
    Return,
    Ahead,
}

/// An object that is being written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writing {
    pub(super) attempt: usize,
    pub(super) reservation: Generation,
    pub(super) extent: Extent,
    pub(super) in_place: bool,
    done: u64,
}

/// An object that is being read in place.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    key: usize,
    /// Where in the object the extent starts.
    start: u64,
    object_len: u64,
    extent: Extent,
    began: u64,
    place: usize,
    bytes: Vec<u8>,
    /// Whether the bytes are read once more at the end.
    twice: bool,
}

/// What a client found in the index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    key: usize,
    range: Option<Range>,
    began: u64,
    slot: SlotId,
    generation: Generation,
    extent: Extent,
    object_len: u64,
    place: Option<usize>,
}

#[derive(Clone, Debug)]
pub(super) enum Doing {
    Idle,
    Asking,
    Writing(Writing),
    Finding(Found),
    Reading(Reading),
    PuttingAhead(PuttingAhead),
}

/// What a client does once all is well: it looks at everything that has to be there.
#[derive(Clone, Debug, Default)]
pub(super) struct Tour {
    pub(super) keys: Vec<usize>,
    pub(super) listed: BTreeSet<usize>,
    pub(super) expected: Vec<usize>,
    pub(super) after: Option<usize>,
    pub(super) lists: bool,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: ClientId,
    pub(super) node: usize,
    pub(super) trusted: bool,
    /// Its process runs and its session stands.
    pub(super) alive: bool,
    pub(super) asked: Option<Asked>,
    pub(super) doing: Doing,
    /// Objects of one answer that are pinned and not read yet, by key, and when their get began.
    handed: VecDeque<(usize, u64, Located)>,
    next_request: u64,
    known: BTreeSet<SegmentId>,
    pub(super) granted: BTreeSet<SegmentId>,
    pub(super) tour: Option<Tour>,
    /// Memory that it was granted ahead, and maps first.
    chunk: Option<ClientReply>,
    /// When the last packet reaches the node, or the client.
    pub(super) upward_at: u64,
    pub(super) downward_at: u64,
}

impl Client {
    pub(super) fn new(id: ClientId, node: usize, trusted: bool, tour: Option<Tour>) -> Self {
        Self {
            id,
            node,
            trusted,
            alive: true,
            asked: None,
            doing: Doing::Idle,
            handed: VecDeque::new(),
            next_request: 1,
            known: BTreeSet::new(),
            granted: BTreeSet::new(),
            tour,
            chunk: None,
            upward_at: 0,
            downward_at: 0,
        }
    }

    /// The reservation that it writes, if it does.
    pub(super) fn writing(&self) -> Option<Writing> {
        match self.doing {
            Doing::Writing(writing) => Some(writing),
            _ => None,
        }
    }
}

impl World {
    /// How long an answer may take, in true time: what the node allows itself, with room for slow clocks.
    fn patience(&self, kind: &Kind, timeout_ms: u64) -> u64 {
        // The next node of a list is waited for.
        let list_ms = if self.plan.heirs > 1 { AWAIT_MS } else { 0 };
        let put_ms = |attempt: usize| {
            let attempt = &self.history.attempts[attempt];
            let asks_ms = if attempt.exclusive { list_ms } else { 0 };
            12_000 + asks_ms + if attempt.wanted > 1 { 10_000 } else { 0 }
        };
        let own_ms = match kind {
            Kind::Put { attempt } | Kind::Reserve { attempt } | Kind::Seal { attempt, .. } => {
                put_ms(*attempt)
            }
            Kind::Get { .. } | Kind::GetMany { .. } | Kind::Stat { .. } => timeout_ms,
            Kind::Wait { .. } => timeout_ms.max(list_ms),
            Kind::Delete { .. } => 5_000 + list_ms,
            Kind::List { .. } => 1_500 + list_ms,
            _ => 1_500,
        };
        (own_ms + own_ms / 10 + 1_000) * MS
    }

    pub(super) fn client(&mut self, id: ClientId) -> &mut Client {
        self.clients.get_mut(&id).expect("a client that is there")
    }

    fn ask(&mut self, id: ClientId, kind: Kind, timeout_ms: u64, message: ClientMessage, payload: Bytes) {
        let now = self.now();
        let delay = self.rng.between(5_000, 100_000);
        let deadline = now + self.patience(&kind, timeout_ms);
        let client = self.client(id);
        let request = client.next_request;
        client.next_request += 1;
        client.doing = Doing::Asking;
        client.asked = Some(Asked { request, began: now, deadline, answered: false, kind });
        client.upward_at = client.upward_at.max(now + delay);
        let (at, node) = (client.upward_at, client.node);
        let epoch = self.nodes[node].epoch;
        self.tally.operations += 1;
        let due = Due::ToNode { at: node, epoch, client: id, request, message, payload };
        self.at(at, due);
    }

    pub(super) fn ask_plain(&mut self, id: ClientId, kind: Kind, timeout_ms: u64, message: ClientMessage) {
        self.ask(id, kind, timeout_ms, message, Bytes::new());
    }

    /// A new client says hello.
    pub(super) fn join(&mut self, node: usize, tour: Option<Tour>) {
        let id = ClientId(self.next_client);
        self.next_client += 1;
        let trusted = tour.is_none() && self.rng.percent(20);
        self.clients.insert(id, Client::new(id, node, trusted, tour));
        let pins = vec![None; self.plan.pins];
        self.nodes[node].pages.insert(id, super::node::Page { pins });
        self.feed(node, Input::ClientJoined { client: id, trusted });
        let hello = ClientMessage::Hello { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX };
        self.ask_plain(id, Kind::Hello, 0, hello);
        if !self.is_ending() && self.rng.percent(self.plan.client_deaths) {
            let life = self.rng.between(0, 600 * MS);
            self.later(life, Due::Die { client: id });
        }
    }

    pub(super) fn step_later(&mut self, id: ClientId, low: u64, high: u64) {
        let delay = self.rng.between(low, high);
        self.later(delay, Due::Step { client: id });
    }

    /// A client goes on with what it does.
    pub(super) fn step(&mut self, id: ClientId) {
        let Some(client) = self.clients.get(&id).filter(|client| client.alive) else { return };
        match client.doing.clone() {
            Doing::Idle => self.next_operation(id),
            Doing::Asking => {}
            Doing::Writing(writing) => self.write_on(id, writing),
            Doing::Finding(found) => self.find_on(id, found),
            Doing::Reading(reading) => self.read_on(id, reading),
            Doing::PuttingAhead(putting) => self.put_on(id, putting),
        }
    }

    /// Reads the next object that was handed over with others, or does nothing for a moment.
    pub(super) fn rest(&mut self, id: ClientId) {
        if let Some((key, began, located)) = self.client(id).handed.pop_front() {
            return self.begin_located(id, key, 0, &located, began);
        }
        self.client(id).doing = Doing::Idle;
        let pause = self.plan.pause_ns;
        self.step_later(id, 0, pause);
    }

    fn next_operation(&mut self, id: ClientId) {
        if self.client(id).tour.is_some() {
            return self.tour_on(id);
        }
        if self.is_ending() {
            let killed = self.rng.percent(50);
            return self.leave(id, killed);
        }
        let plan = &self.plan;
        let choice = self.rng.clone().weighted(&[
            (plan.puts, 0),
            (45, 1),
            (6, 2),
            (3, 3),
            (3, 4),
            (3, 5),
            (plan.deletes, 6),
            (2, 7),
            (2, 8),
            (4, 9),
            (1, 10),
            (1, 11),
            (12, 12),
        ]);
        self.rng.next();
        let key = self.rng.index(self.plan.keys);
        match choice {
            0 => self.put(id, key),
            1 => self.get(id, key, None),
            2 => {
                let len_max = self.plan.len_max;
                let start = self.rng.between(0, len_max / 4);
                let len_bytes = self.rng.between(0, len_max / 4);
                self.get(id, key, Some(Range { start, len_bytes }));
            }
            3 => {
                let timeout_ms = 3_000;
                let message = ClientMessage::Stat { key: self.key(key), timeout_ms };
                self.ask_plain(id, Kind::Stat { key }, timeout_ms, message);
            }
            4 => {
                let timeout_ms = self.rng.between(1, 500);
                let message = ClientMessage::Wait { key: self.key(key), timeout_ms };
                self.ask_plain(id, Kind::Wait { key, timeout_ms }, timeout_ms, message);
            }
            5 => {
                let message = ClientMessage::Wait { key: self.key(key), timeout_ms: 0 };
                self.ask_plain(id, Kind::Wait { key, timeout_ms: 0 }, 5_000, message);
            }
            6 => {
                let now = self.now();
                let deletion = self.history.begin_delete(key, now);
                let message = ClientMessage::Delete { key: self.key(key) };
                self.ask_plain(id, Kind::Delete { deletion }, 0, message);
            }
            7 => {
                let prefix = if self.rng.percent(50) { "k" } else { "k1" }.to_owned();
                let after = self.rng.percent(50).then(|| self.key(key));
                let limit = u32::try_from(self.rng.between(1, 8)).unwrap_or(1);
                self.ask_plain(
                    id,
                    Kind::List { all: false },
                    0,
                    ClientMessage::List { prefix, after, limit },
                );
            }
            8 => {
                let pin = self.rng.percent(50);
                self.ask_plain(id, Kind::Pin, 0, ClientMessage::Pin { key: self.key(key), pin });
            }
            9 => {
                let force = self.rng.percent(25);
                self.ask_plain(
                    id,
                    Kind::Evict { force },
                    0,
                    ClientMessage::Evict { key: self.key(key), force },
                );
            }
            12 => self.get_many(id),
            10 => self.ask_plain(id, Kind::Status, 0, ClientMessage::Status),
            11 => match self.client(id).granted.first().copied() {
                Some(segment) => {
                    self.client(id).granted.remove(&segment);
                    let message = ClientMessage::Return { segment };
                    self.ask_plain(id, Kind::Return, 0, message);
                }
                None => self.rest(id),
            },
            _ => self.rest(id),
        }
    }

    /// A tier that there is, if there is more than one.
    fn wanted_tier(&mut self) -> Option<TierHint> {
        let gpus = self.plan.gpus;
        if gpus == 0 || self.rng.percent(40) {
            return None;
        }
        let gpu = u16::try_from(self.rng.index(usize::from(gpus) + 1)).unwrap_or_default();
        let tier = if gpu == gpus { Tier::Host } else { Tier::Gpu(gpu) };
        Some(TierHint { tier, or_host: self.rng.percent(50) })
    }

    // Puts.

    fn put(&mut self, id: ClientId, key: usize) {
        let now = self.now();
        let len = {
            let most = if self.rng.percent(10) { 16 } else { self.plan.len_max };
            self.rng.between(0, most) / self.rng.pick(&[1, 1, 4, 16])
        };
        let replicated = self.rng.percent(self.plan.replicated);
        let hints = PutHints {
            pin: self.rng.percent(10),
            cache: self.rng.percent(15) && !replicated,
            ttl_ms: self.rng.percent(10).then(|| self.rng.between(20, 800)),
            seal_copy: self.rng.percent(20),
            replicas: if replicated { self.rng.pick(&[2, 2, 3, 5]) } else { 1 },
            tier: self.wanted_tier(),
        };
        if self.rng.percent(40) {
            let hints = PutHints { seal_copy: false, tier: None, ..hints };
            if len <= u64::from(INLINE_PUT_MAX) && self.begin_ahead(id, key, len, hints) {
                return;
            }
            let message = ClientMessage::Ahead { ring: true };
            return self.ask_plain(id, Kind::Ahead, 0, message);
        }
        let if_exists = if self.rng.percent(20) { IfExists::Error } else { IfExists::Keep };
        let (node, tag) = (self.client(id).node, self.rng.next());
        let mut attempt = History::attempt(key, tag, len, (node, self.nodes[node].epoch), now);
        attempt.exclusive = if_exists == IfExists::Error;
        attempt.fleeting = hints.cache || hints.ttl_ms.is_some();
        attempt.wanted = hints.replicas;
        let attempt = self.history.begin_put(attempt);
        let meta = ObjectMeta::bytes(len).expect("a length");
        let key = self.key(key);
        if len <= u64::from(INLINE_PUT_MAX) && self.rng.percent(50) {
            let payload = pattern::of(tag, 0, usize::try_from(len).unwrap_or(0)).into();
            let message = ClientMessage::Put { key, meta, hints, if_exists };
            self.ask(id, Kind::Put { attempt }, 0, message, payload);
        } else {
            let writes = self.wanted_tier().map_or(Tier::Host, |hint| hint.tier);
            let message = ClientMessage::Reserve { key, meta, hints, if_exists, writes };
            self.ask_plain(id, Kind::Reserve { attempt }, 0, message);
        }
    }

    fn write_on(&mut self, id: ClientId, mut writing: Writing) {
        let segment = writing.extent.segment;
        if writing.in_place && !self.client(id).granted.contains(&segment) {
            self.client(id).granted.insert(segment);
            self.ask_plain(id, Kind::Mapped, 0, ClientMessage::Mapped { segment });
            self.client(id).doing = Doing::Writing(writing);
            return;
        }
        let left = writing.extent.len_bytes - writing.done;
        if left == 0 {
            return self.written(id, writing);
        }
        let least = left.min(writing.extent.len_bytes / 4 + 1);
        let len = self.rng.between(least.min(INLINE_PUT_MAX.into()), left.min(INLINE_PUT_MAX.into()));
        let tag = self.history.attempts[writing.attempt].tag;
        let chunk = pattern::of(tag, writing.done, usize::try_from(len).unwrap_or(0));
        let offset = writing.done;
        writing.done += len;
        if writing.in_place {
            let at = self.client(id).node;
            let own = Hold::Reserved(id, writing.reservation);
            if let Ok(part) = writing.extent.slice(offset, len) {
                self.write(at, part, &chunk, |hold| hold == own);
            }
            self.client(id).doing = Doing::Writing(writing);
            self.step_later(id, 1_000, MS);
        } else {
            let reservation = writing.reservation;
            self.ask(id, Kind::Write, 0, ClientMessage::Write { reservation, offset }, chunk.into());
            self.client(id).doing = Doing::Writing(writing);
        }
    }

    fn written(&mut self, id: ClientId, writing: Writing) {
        let Writing { attempt, reservation, extent, .. } = writing;
        if self.rng.percent(8) {
            let at = self.client(id).node;
            self.nodes[at].guards.remove(extent.segment, Hold::Reserved(id, reservation));
            self.ended(attempt, super::history::Outcome::Never(self.now()));
            return self.ask_plain(id, Kind::Abort, 0, ClientMessage::Abort { reservation });
        }
        let message = ClientMessage::Seal { reservation, checksum: Checksum::None };
        self.ask_plain(id, Kind::Seal { attempt, reservation }, 0, message);
    }

    // Gets.

    pub(super) fn get(&mut self, id: ClientId, key: usize, range: Option<Range>) {
        let (now, at) = (self.now(), self.client(id).node);
        let name = self.key(key);
        let node = &self.nodes[at];
        let slot = node.by_key.get(&name).copied();
        let shown = slot.and_then(|slot| Some((slot, &node.index.get(&slot)?.object)));
        let Some((slot, object)) = shown else {
            return self.ask_get(id, key, range, now);
        };
        let found = Found {
            key,
            range,
            began: now,
            slot,
            generation: object.generation,
            extent: object.extent,
            object_len: object.meta.len_bytes,
            place: None,
        };
        self.client(id).doing = Doing::Finding(found);
        self.hesitate(id);
    }

    /// Mostly goes on at once; now and then something comes in between.
    fn hesitate(&mut self, id: ClientId) {
        let most = if self.rng.percent(15) { 10 * MS } else { 50_000 };
        self.step_later(id, 0, most);
    }

    fn get_many(&mut self, id: ClientId) {
        let count = self.rng.index(KEYS_MAX) + 1;
        let numbers = std::array::from_fn(|_| self.rng.index(self.plan.keys));
        let keys = Keys { numbers, count };
        let (began, timeout_ms) = (self.now(), self.rng.pick(&[20, 300, 3_000]));
        let message = ClientMessage::GetMany {
            keys: keys.numbers().iter().map(|key| self.key(*key)).collect(),
            timeout_ms,
            keep: self.rng.percent(50),
            threshold_bytes: self.rng.percent(30).then_some(u64::MAX),
            tier: self.wanted_tier(),
        };
        self.ask_plain(id, Kind::GetMany { keys, timeout_ms, began }, timeout_ms, message);
    }

    fn ask_get(&mut self, id: ClientId, key: usize, range: Option<Range>, began: u64) {
        let touring = self.client(id).tour.is_some();
        let timeout_ms = if touring { 5_000 } else { self.rng.pick(&[20, 300, 3_000]) };
        let keep = self.rng.percent(70);
        let len_threshold = self.rng.pick(&[0, 1_024, u64::MAX]);
        let message = ClientMessage::Get {
            key: self.key(key),
            range,
            timeout_ms,
            keep,
            threshold_bytes: self.rng.percent(20).then_some(len_threshold),
            tier: self.wanted_tier(),
        };
        self.ask_plain(id, Kind::Get { key, range, timeout_ms, began }, timeout_ms, message);
    }

    /// Pins what the index showed, then looks whether it still shows that.
    fn find_on(&mut self, id: ClientId, mut found: Found) {
        let at = self.client(id).node;
        let node = &mut self.nodes[at];
        let Some(page) = node.pages.get_mut(&id) else { return };
        let Some(place) = found.place else {
            let Some(free) = page.pins.iter().position(Option::is_none) else {
                return self.ask_get(id, found.key, found.range, found.began);
            };
            page.pins[free] = Some(found.generation);
            node.touched.push(found.slot);
            found.place = Some(free);
            self.client(id).doing = Doing::Finding(found);
            return self.hesitate(id);
        };
        let shown = node.index.get(&found.slot);
        let same = shown.is_some_and(|shown| shown.object.generation == found.generation);
        let range = found.range.unwrap_or(Range { start: 0, len_bytes: found.object_len });
        let part = found.extent.slice(range.start, range.len_bytes);
        match part {
            Ok(extent) if same => {
                self.tally.hits += 1;
                self.hold(at, extent, Hold::Pinned(id, place));
                self.begin_reading(
                    id,
                    found.key,
                    (range.start, found.object_len),
                    extent,
                    found.began,
                    place,
                );
            }
            _ => {
                page.pins[place] = None;
                self.tally.misses += u64::from(!same);
                self.ask_get(id, found.key, found.range, found.began);
            }
        }
    }

    pub(super) fn begin_reading(
        &mut self,
        id: ClientId,
        key: usize,
        (start, object_len): (u64, u64),
        extent: Extent,
        began: u64,
        place: usize,
    ) {
        let twice = self.rng.percent(20);
        let reading = Reading { key, start, object_len, extent, began, place, bytes: Vec::new(), twice };
        self.client(id).doing = Doing::Reading(reading);
        self.step_later(id, 0, 50_000);
    }

    /// The same for an object that the node has pinned.
    fn begin_located(&mut self, id: ClientId, key: usize, start: u64, located: &Located, began: u64) {
        let place = usize::try_from(located.pin).unwrap_or(usize::MAX);
        self.begin_reading(id, key, (start, located.meta.len_bytes), located.extent, began, place);
    }

    fn read_on(&mut self, id: ClientId, mut reading: Reading) {
        let (at, segment) = (self.client(id).node, reading.extent.segment);
        let needs_map = reading.extent.len_bytes > 0 && !self.client(id).known.contains(&segment);
        if needs_map {
            self.client(id).known.insert(segment);
            self.ask_plain(id, Kind::Segment, 0, ClientMessage::Segment { segment });
            self.client(id).doing = Doing::Reading(reading);
            return;
        }
        let done = reading.bytes.len() as u64;
        let left = reading.extent.len_bytes - done;
        if left > 0 {
            let len = self.rng.between(left.min(reading.extent.len_bytes / 4 + 1), left);
            let part = reading.extent.slice(done, len);
            let chunk = part.ok().and_then(|part| {
                self.nodes[at].memory(part).map(|(region, offset, len)| region.read(offset, len))
            });
            let Some(chunk) = chunk else {
                return self.fail(format!("client {id}: {:?} is not there to be read", reading.extent));
            };
            reading.bytes.extend_from_slice(&chunk);
            self.client(id).doing = Doing::Reading(reading);
            return self.hesitate(id);
        }
        let seen = Seen {
            key: reading.key,
            start: reading.start,
            len: reading.object_len,
            bytes: &reading.bytes,
            began: reading.began,
            calm: self.is_calm(reading.began, reading.began),
        };
        if let Err(why) = self.history.saw(seen) {
            return self.fail(format!("client {id} of node {at}: {why}"));
        }
        self.tally.verified += reading.bytes.len() as u64;
        if std::mem::take(&mut reading.twice) {
            reading.bytes.clear();
            self.client(id).doing = Doing::Reading(reading);
            return self.step_later(id, MS, 300 * MS);
        }
        self.tally.reads += 1;
        let node = &mut self.nodes[at];
        node.guards.remove(segment, Hold::Pinned(id, reading.place));
        if let Some(page) = node.pages.get_mut(&id) {
            page.pins[reading.place] = None;
        }
        self.rest(id);
    }

    // Answers.

    /// An answer has reached its client; what it proves was checked when the node gave it.
    pub(super) fn hears(&mut self, id: ClientId, request: u64, reply: Option<ClientReply>) {
        let Some(client) = self.clients.get_mut(&id).filter(|client| client.alive) else { return };
        let Some(asked) = client.asked.take_if(|asked| asked.request == request) else { return };
        match (asked.kind, reply) {
            (Kind::Reserve { attempt }, Some(ClientReply::Reserved { reservation, extent, map, .. })) => {
                let in_place = map.is_some();
                client.doing = Doing::Writing(Writing { attempt, reservation, extent, in_place, done: 0 });
                self.step_later(id, 1_000, 200_000);
            }
            (Kind::Ahead, Some(chunk @ ClientReply::Ahead { extent, .. })) => {
                let segment = extent.segment;
                if client.granted.insert(segment) {
                    client.chunk = Some(chunk);
                    return self.ask_plain(id, Kind::Mapped, 0, ClientMessage::Mapped { segment });
                }
                self.begin_chunk(id, &chunk);
                self.rest(id);
            }
            (Kind::Mapped, Some(_)) if client.chunk.is_some() => {
                if let Some(chunk) = client.chunk.take() {
                    self.begin_chunk(id, &chunk);
                }
                self.rest(id);
            }
            (Kind::Mapped | Kind::Write | Kind::Segment, Some(_)) => self.step_later(id, 1_000, 200_000),
            (Kind::Get { key, range, began, .. }, Some(ClientReply::Located(located))) => {
                let start = range.map_or(0, |range| range.start);
                self.begin_located(id, key, start, &located, began);
            }
            (Kind::GetMany { keys, began, .. }, Some(ClientReply::LocatedMany(many))) => {
                let items = keys.numbers().iter().zip(many.into_located());
                client.handed = items.filter_map(|(key, item)| Some((*key, began, item.ok()?))).collect();
                self.tally.handed += client.handed.len() as u64;
                self.rest(id);
            }
            (Kind::List { all: true }, Some(ClientReply::Listed { objects, more })) => {
                let numbers: Vec<usize> = objects.iter().map(|listed| self.key_number(&listed.key)).collect();
                if let Some(tour) = &mut self.client(id).tour {
                    tour.lists = more;
                    tour.after = numbers.last().copied().or(tour.after);
                    tour.listed.extend(numbers);
                }
                self.rest(id);
            }
            _ => self.rest(id),
        }
    }
}
