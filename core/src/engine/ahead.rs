//! Puts that ask nobody: memory that is granted to clients ahead, and the objects that they publish in it. Not the ring
//! in which they say so (`hetmem-host-mem`), and not the finding of room (`room`). Invariants: what a client says of a
//! chunk is checked against what is left of it; a chunk is free again only when its client can begin no put in it any
//! more and all that it has begun there was taken in, or when the client is gone; every put that is begun has a slot of
//! the index kept for it.

use std::collections::BTreeMap;

use super::Engine;
use super::action::{Action, Attachment};
use super::input::{PutAhead, RingState};
use super::room::NewObject;
use super::room::Purpose;
use super::space::Owner;
use super::timer::{Time, Timer};
use crate::alloc::PAGE_LEN;
use crate::error::StoreError;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Tier};
use crate::wire::{ClientReply, IfExists};

/// The most objects that one chunk is good for, and the fewest places that a publication ring has.
pub const AHEAD_OBJECTS_MAX: u32 = 2_048;
/// A chunk is good for this many at least, or there is none: the index is nearly full.
const OBJECTS_MIN: usize = 4;
/// Of the index's free slots, one in so many is kept for one chunk.
const SLOTS_SHARE: usize = 8;
/// The longest chunk, in bytes: a thousand objects of 1 KiB.
const CHUNK_LEN_MAX: u64 = 1 << 20;
/// The shortest.
const CHUNK_LEN_MIN: u64 = 16 << 10;
/// A tier has room for at least this many chunks.
const CHUNKS_MIN: u64 = 64;
/// Memory that was not used for this long goes back, in milliseconds.
const IDLE_MS: u64 = 2_000;
/// Objects start at multiples of this, as extents do.
const GRANULE: u64 = super::space::ALIGN;

/// Memory that one client may publish objects in.
#[derive(Debug)]
struct Chunk {
    number: u64,
    extent: Extent,
    /// What nothing was published in: length by offset, both from the chunk's start, all of it in use in the arena.
    holes: BTreeMap<u64, u64>,
    objects_left: u32,
    /// Once the client can begin nothing more in it: the position before which everything was begun.
    until: Option<u64>,
}

/// What was granted to one client.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    last_number: u64,
    /// A request for a chunk waits for room.
    asked: bool,
    current: Option<Chunk>,
    /// What the client goes on with when that is used up.
    next: Option<Chunk>,
    past: Vec<Chunk>,
    used: Time,
}

impl Ahead {
    fn chunk_mut(&mut self, number: u64) -> Option<&mut Chunk> {
        let now = self.current.iter_mut().chain(&mut self.next);
        now.chain(&mut self.past).find(|chunk| chunk.number == number)
    }

    fn is_open(&self) -> bool {
        self.current.is_some() || self.next.is_some()
    }

    fn bytes(&self) -> u64 {
        let all = self.current.iter().chain(&self.next).chain(&self.past);
        all.flat_map(|chunk| chunk.holes.values()).sum()
    }

    /// Takes out the chunks in which nothing can be put any more.
    fn moved_to(&mut self, ring: RingState) -> Vec<Chunk> {
        if self.next.as_ref().is_some_and(|next| next.number == ring.chunk) {
            let before = std::mem::replace(&mut self.current, self.next.take());
            self.past.extend(before.map(|chunk| Chunk { until: Some(ring.head), ..chunk }));
        }
        if !ring.open {
            let closed = self.current.take().into_iter().chain(self.next.take());
            self.past.extend(closed.map(|chunk| Chunk { until: Some(ring.head), ..chunk }));
        }
        let is_over = |chunk: &mut Chunk| chunk.until.is_some_and(|until| until <= ring.tail);
        self.past.extract_if(.., is_over).collect()
    }
}

impl Chunk {
    /// Where an object lies in the memory of the chunk that nothing was published in: the hole's start and length.
    fn hole_around(&self, put: &PutAhead) -> Result<(u64, u64), StoreError> {
        let len_bytes = granules(put.meta.len_bytes);
        let align = if len_bytes >= PAGE_LEN { PAGE_LEN } else { GRANULE };
        let end = put.offset.checked_add(len_bytes);
        let hole = self.holes.range(..=put.offset).next_back().map(|(&start, &len)| (start, len));
        match (hole, end) {
            (Some((start, len)), Some(end)) if end <= start + len && put.offset.is_multiple_of(align) => {
                Ok((start, len))
            }
            _ => Err(StoreError::protocol(format!(
                "put {:?}: {} bytes at {} of chunk {} are not free to publish in",
                put.key, put.meta.len_bytes, put.offset, self.number
            ))),
        }
    }
}

fn granules(len_bytes: u64) -> u64 {
    // Metadata was checked: far from overflow.
    len_bytes.max(1).next_multiple_of(GRANULE)
}

impl Engine {
    /// The client wants memory to publish objects in.
    pub(super) fn ahead_request(
        &mut self,
        client: ClientId,
        request: u64,
        ring: bool,
    ) -> Result<Option<ClientReply>, StoreError> {
        self.ahead_objects()?;
        let len_bytes = self.chunk_len();
        let Some(state) = self.clients.get_mut(&client) else {
            return Ok(None);
        };
        if state.ahead.asked || state.ahead.next.is_some() {
            return Err(StoreError::busy("ahead", "this client has not begun with what it was granted last"));
        }
        state.ahead.asked = true;
        let purpose = Purpose::Ahead { client, request, ring };
        self.want_space(purpose, Tier::Host, Owner::Client(client), len_bytes);
        Ok(None)
    }

    fn chunk_len(&self) -> u64 {
        (self.space.capacity_bytes(Tier::Host) / CHUNKS_MIN / PAGE_LEN * PAGE_LEN)
            .clamp(CHUNK_LEN_MIN, CHUNK_LEN_MAX)
    }

    /// How many objects a new chunk is good for.
    fn ahead_objects(&self) -> Result<u32, StoreError> {
        let objects = self.objects.free_slots() / SLOTS_SHARE;
        if objects < OBJECTS_MIN {
            return Err(StoreError::busy("ahead", format!("the index has {objects} slots left for it")));
        }
        Ok(u32::try_from(objects).unwrap_or(u32::MAX).min(AHEAD_OBJECTS_MAX))
    }

    /// There is room for a chunk.
    pub(super) fn ahead_into(&mut self, client: ClientId, request: u64, ring: bool, extent: Extent) {
        let objects = self.ahead_objects();
        let (Some(state), Ok(objects)) = (self.clients.get_mut(&client), objects) else {
            let _ = self.space.free(extent);
            return self.ahead_refused(client, request, StoreError::busy("ahead", "the index is full"));
        };
        let ahead = &mut state.ahead;
        ahead.asked = false;
        ahead.last_number += 1;
        ahead.used = self.now;
        let number = ahead.last_number;
        let holes = BTreeMap::from([(0, extent.len_bytes)]);
        ahead.next = Some(Chunk { number, extent, holes, objects_left: objects, until: None });
        let mut segment = None;
        if !self.space.is_closed_to_writers(extent.segment) {
            state.unmapped.insert(extent.segment);
            state.mapped.insert(extent.segment);
            segment = Some(extent.segment);
        }
        self.objects.keep_slots(objects);
        self.timers.set(self.now.after_ms(IDLE_MS), Timer::Ahead(client));
        let segment_len = self.space.len_bytes(extent.segment).unwrap_or_default();
        let reply = ClientReply::Ahead { chunk: number, extent, objects, segment_len, ring };
        let attachment = Attachment::Ahead { segment, ring };
        self.out.push(Action::GrantAhead { client, request, chunk: number, reply, attachment });
    }

    /// There is none.
    pub(super) fn ahead_refused(&mut self, client: ClientId, request: u64, why: StoreError) {
        if let Some(state) = self.clients.get_mut(&client) {
            state.ahead.asked = false;
        }
        self.reply(client, request, Err(why));
    }

    /// A client's ring was drained.
    pub(super) fn puts_ahead(&mut self, client: ClientId, puts: Vec<PutAhead>, ring: RingState) {
        for put in puts {
            if let Err(why) = self.take_in(client, put) {
                self.out.push(Action::CloseClient { client, why });
                return;
            }
        }
        self.ahead_changed(client, ring);
    }

    /// A client goes on with another chunk, or is through with what it had begun in an earlier one.
    pub(super) fn ahead_changed(&mut self, client: ClientId, ring: RingState) {
        let Some(state) = self.clients.get_mut(&client) else {
            return;
        };
        let over = state.ahead.moved_to(ring);
        let freed = !over.is_empty();
        for chunk in over {
            self.free_chunk(chunk);
        }
        // Who asked for it to be taken back waits also where some of it is still being written.
        if freed || !ring.open {
            self.retry_space();
        }
    }

    fn free_chunk(&mut self, chunk: Chunk) {
        self.objects.give_slots_back(chunk.objects_left);
        let Chunk { extent, .. } = chunk;
        for (start, len_bytes) in chunk.holes {
            let hole = Extent { segment: extent.segment, offset: extent.offset + start, len_bytes };
            if let Err(error) = self.space.free(hole) {
                debug_assert!(false, "{error}");
            }
        }
    }

    /// Takes one object in, as if its put had been asked for. A key that exists is kept.
    fn take_in(&mut self, client: ClientId, put: PutAhead) -> Result<(), StoreError> {
        let Some(state) = self.clients.get_mut(&client) else {
            return Ok(());
        };
        let chunk = state.ahead.chunk_mut(put.chunk).filter(|chunk| chunk.objects_left > 0);
        let Some(chunk) = chunk else {
            let why = format!("put {:?}: chunk {} is not this client's to publish in", put.key, put.chunk);
            return Err(StoreError::protocol(why));
        };
        let segment = chunk.extent.segment;
        if !self.space.is_closed_to_writers(segment) {
            let why =
                format!("put {:?}: segment {segment} was granted but never acknowledged as mapped", put.key);
            return Err(StoreError::protocol(why));
        }
        let (start, len) = chunk.hole_around(&put)?;
        let (end, hole_end) = (put.offset + granules(put.meta.len_bytes), start + len);
        chunk.holes.remove(&start);
        if start < put.offset {
            chunk.holes.insert(start, put.offset - start);
            self.space.split(segment, chunk.extent.offset + start, put.offset - start)?;
        }
        let offset = chunk.extent.offset + put.offset;
        if end < hole_end {
            chunk.holes.insert(end, hole_end - end);
            self.space.split(segment, offset, end - put.offset)?;
        }
        chunk.objects_left -= 1;
        state.ahead.used = self.now;
        self.objects.give_slots_back(1);
        self.publish_ahead(put, Extent { segment, offset, len_bytes: 0 });
        Ok(())
    }

    fn publish_ahead(&mut self, put: PutAhead, at: Extent) {
        let extent = Extent { len_bytes: put.meta.len_bytes, ..at };
        if self.objects.sealed(&put.key).is_some() {
            let _ = self.space.free(extent);
            return;
        }
        let checksum = put.meta.checksum;
        let PutAhead { key, meta, hints, .. } = put;
        let new = NewObject { key, meta, hints, if_exists: IfExists::Keep };
        let generation = self.insert_new(new, extent, None, Path::Ahead);
        self.counters.ahead += 1;
        if let Err(error) = self.publish(generation, checksum) {
            debug_assert!(false, "a slot was kept for it, and its key was free: {error}");
        }
    }

    /// Room is short: takes back what clients have not begun to use. True if that is under way.
    pub(super) fn recall_ahead(&mut self) -> bool {
        let clients: Vec<ClientId> = self
            .clients
            .iter()
            .filter(|(_, state)| state.ahead.is_open())
            .map(|(&client, _)| client)
            .collect();
        for &client in &clients {
            self.out.push(Action::RecallAhead { client });
        }
        !clients.is_empty()
    }

    /// Takes back what a client has not used for a while.
    pub(super) fn ahead_idle(&mut self, client: ClientId) {
        let Some(state) = self.clients.get(&client).filter(|state| state.ahead.is_open()) else {
            return;
        };
        let due = state.ahead.used.after_ms(IDLE_MS);
        if due <= self.now {
            self.out.push(Action::RecallAhead { client });
        } else {
            self.timers.set(due, Timer::Ahead(client));
        }
    }

    /// The client is gone, and its ring was drained for the last time.
    pub(super) fn ahead_of_gone(&mut self, ahead: Ahead) {
        let all = ahead.current.into_iter().chain(ahead.next).chain(ahead.past);
        for chunk in all {
            self.free_chunk(chunk);
        }
    }

    /// Bytes granted ahead that nothing was published in.
    pub(super) fn ahead_bytes(&self) -> u64 {
        self.clients.values().map(|state| state.ahead.bytes()).sum()
    }

    /// Whether somebody waits for objects to exist, so that clients are to say at once when they have put one.
    #[must_use]
    pub fn awaits_objects(&self) -> bool {
        !self.waiting_keys.is_empty()
    }
}
