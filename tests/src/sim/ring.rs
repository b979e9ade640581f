//! Publication rings of the simulation: clients that put without asking, and the draining that `hetmem-node` does. Not
//! shared memory: what may happen in it is drawn, one step of virtual time after another. Invariant: as in the real
//! one, a node that hears of anything takes in what was published before.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hetmem_core::engine::{Input, PutAhead, RingState};
use hetmem_core::wire::{ClientMessage, ClientReply, PutHints};
use hetmem_core::{ClientId, Extent, ObjectMeta};

use super::client::Doing;
use super::guards::Hold;
use super::history::{History, Outcome};
use super::pattern;
use super::plan::MS;
use super::world::{Due, World};

const GRANULE: u64 = 64;
const PAGE: u64 = 4096;

/// A chunk as its client knows it.
#[derive(Clone, Copy, Debug)]
struct Granted {
    number: u64,
    extent: Extent,
    objects: u32,
    used: u64,
}

/// What a put without asking says, once it is complete.
#[derive(Clone, Debug)]
pub(super) struct Record {
    position: u64,
    pub(super) attempt: usize,
    extent: Extent,
    put: PutAhead,
}

/// One client's ring, and what both sides know of it.
#[derive(Debug, Default)]
pub(super) struct Ring {
    state: RingState,
    next: Option<u64>,
    /// By position.
    complete: BTreeMap<u64, Record>,
    drained: BTreeSet<u64>,
    /// What the client goes on with.
    chunks: BTreeMap<u64, Granted>,
}

/// A put that was begun.
#[derive(Clone, Debug)]
pub(super) struct PuttingAhead {
    pub(super) record: Record,
    done: u64,
}

impl Ring {
    pub(super) fn grant(&mut self, chunk: u64) -> RingState {
        if self.state.open {
            self.next = Some(chunk);
        } else {
            self.state.chunk = chunk;
            self.state.open = true;
        }
        self.state
    }

    pub(super) fn close(&mut self) -> RingState {
        self.state.open = false;
        self.next = None;
        self.state
    }

    /// Claims room for an object: the position, the chunk's number and the object's place in it.
    fn claim(&mut self, len_bytes: u64) -> Option<(u64, u64, u64, Extent)> {
        if !self.state.open {
            return None;
        }
        let len = len_bytes.max(1).next_multiple_of(GRANULE);
        let align = if len >= PAGE { PAGE } else { GRANULE };
        let fits = |granted: &Granted| {
            granted.objects > 0 && granted.used.next_multiple_of(align) + len <= granted.extent.len_bytes
        };
        let current = self.chunks.get(&self.state.chunk).is_some_and(fits);
        if !current {
            // The client goes on with the next chunk, if it knows of it already.
            let next = self.next.filter(|next| self.chunks.get(next).is_some_and(fits))?;
            self.next = None;
            self.state.chunk = next;
        }
        let granted = self.chunks.get_mut(&self.state.chunk)?;
        let offset = granted.used.next_multiple_of(align);
        granted.used = offset + len;
        granted.objects -= 1;
        self.state.head += 1;
        let extent =
            Extent { segment: granted.extent.segment, offset: granted.extent.offset + offset, len_bytes };
        Some((self.state.head - 1, granted.number, offset, extent))
    }

    fn drain(&mut self) -> (Vec<Record>, RingState) {
        let complete = std::mem::take(&mut self.complete);
        self.drained.extend(complete.keys());
        while self.drained.remove(&self.state.tail) {
            self.state.tail += 1;
        }
        (complete.into_values().collect(), self.state)
    }
}

impl World {
    /// A client maps memory that it was granted, and may use it from now on.
    pub(super) fn begin_chunk(&mut self, id: ClientId, reply: &ClientReply) {
        let &ClientReply::Ahead { chunk, extent, objects, .. } = reply else { return };
        let at = self.client(id).node;
        if let Some(ring) = self.nodes[at].rings.get_mut(&id) {
            ring.chunks.insert(chunk, Granted { number: chunk, extent, objects, used: 0 });
        }
    }

    /// Begins a put that asks nobody; false if there is no memory for it.
    pub(super) fn begin_ahead(&mut self, id: ClientId, key: usize, len: u64, hints: PutHints) -> bool {
        let (now, at) = (self.now(), self.client(id).node);
        let Some(ring) = self.nodes[at].rings.get_mut(&id) else { return false };
        let Some((position, chunk, offset, extent)) = ring.claim(len) else { return false };
        let tag = self.rng.next();
        let mut attempt = History::attempt(key, tag, len, (at, self.nodes[at].epoch), now);
        attempt.fleeting = hints.cache || hints.ttl_ms.is_some();
        let attempt = self.history.begin_put(attempt);
        let meta = ObjectMeta::bytes(len).expect("a length");
        let put = PutAhead { chunk, offset, key: self.key(key), meta, hints };
        self.hold(at, extent, Hold::Ahead(id, position));
        self.tally.ahead += 1;
        let record = Record { position, attempt, extent, put };
        self.client(id).doing = Doing::PuttingAhead(PuttingAhead { record, done: 0 });
        self.step_later(id, 0, MS);
        true
    }

    /// Writes on; when all is there, the record says so and the put is over.
    pub(super) fn put_on(&mut self, id: ClientId, mut putting: PuttingAhead) {
        let at = self.client(id).node;
        let (done, extent) = (putting.done, putting.record.extent);
        let left = extent.len_bytes - done;
        if left > 0 {
            let len = self.rng.between(left.min(extent.len_bytes / 3 + 1), left);
            let tag = self.history.attempts[putting.record.attempt].tag;
            let bytes = pattern::of(tag, done, usize::try_from(len).unwrap_or(0));
            let own = Hold::Ahead(id, putting.record.position);
            if let Ok(part) = extent.slice(done, len) {
                self.write(at, part, &bytes, |hold| hold == own);
            }
            putting.done += len;
            self.client(id).doing = Doing::PuttingAhead(putting);
            return self.step_later(id, 0, MS);
        }
        // From now on whoever asks finds an object of the key.
        self.ended(putting.record.attempt, Outcome::Sealed(self.now()));
        if let Some(ring) = self.nodes[at].rings.get_mut(&id) {
            ring.complete.insert(putting.record.position, putting.record);
        }
        if self.nodes[at].engine.awaits_objects() {
            let delay = self.rng.between(5_000, 100_000);
            let epoch = self.nodes[at].epoch;
            let message = ClientMessage::Drain;
            self.later(
                delay,
                Due::ToNode { at, epoch, client: id, request: 0, message, payload: Bytes::new() },
            );
        }
        self.rest(id);
    }

    /// Takes in what clients of a node have published.
    pub(super) fn drain_rings(&mut self, at: usize) {
        let clients: Vec<ClientId> = self.nodes[at].rings.keys().copied().collect();
        for id in clients {
            self.drain_ring(at, id);
        }
    }

    fn drain_ring(&mut self, at: usize, id: ClientId) {
        let Some(ring) = self.nodes[at].rings.get_mut(&id) else { return };
        if ring.state.head == ring.state.tail {
            return;
        }
        let (records, ring) = ring.drain();
        for Record { extent, position, .. } in &records {
            self.nodes[at].guards.remove(extent.segment, Hold::Ahead(id, *position));
        }
        let puts = records.iter().map(|record| record.put.clone()).collect();
        self.hand_in(at, Input::PutsAhead { client: id, puts, ring });
        let now = self.now();
        for record in records {
            let place = |extent: Extent| (extent.segment, extent.offset);
            let mut objects = self.nodes[at].index.values().map(|shown| &shown.object);
            let shown = objects.find(|object| place(object.extent) == place(record.extent));
            if let Some(object) = shown.map(|object| object.object) {
                self.tally.sealed += 1;
                self.history.became(record.attempt, object, 0);
            } else {
                // Another object of the key was there, and is kept.
                self.ended(record.attempt, Outcome::Never(now));
            }
        }
    }

    /// A session is over: what was published is there, what was only begun never will be.
    pub(super) fn drain_last(&mut self, at: usize, id: ClientId) {
        self.drain_ring(at, id);
        self.nodes[at].rings.remove(&id);
    }
}
