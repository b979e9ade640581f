//! The books of the tiers: segments, who may write to them, and the extents in them. Not the memory.
//! Invariant: unassigned bytes of a tier and all its segments together are its capacity; a segment that a client can
//! write to holds only extents of that client, until its process is gone.

use std::collections::BTreeMap;

use super::input::{FabricId, GpuUse};
use crate::alloc::{Arena, PAGE_LEN};
use crate::error::StoreError;
use crate::tier::{ClientId, Extent, RemoteKey, SegmentId, Tier};

/// Extents start at multiples of this, so that any element type and any vector load is aligned.
pub(super) const ALIGN: u64 = 64;
/// Segments of the node's own are at most this long: importers and NICs take segments as a whole.
const SEGMENT_LEN_MAX: u64 = 4 << 30;
/// On a GPU they are at least this long: what another process imports costs it by the piece.
const GPU_SEGMENT_LEN_MIN: u64 = 256 << 20;

/// Who may write to a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Node,
    Client(ClientId),
    /// The session has ended, the process may still hold its mapping.
    Left(ClientId),
}

#[derive(Debug)]
struct SegmentBooks {
    tier: Tier,
    len_bytes: u64,
    owner: Owner,
    /// `None` until the segment is there.
    arena: Option<Arena>,
    keys: Vec<(FabricId, RemoteKey)>,
    /// Whether its descriptor may go to others than its owner.
    closed_to_writers: bool,
    returned: bool,
    /// How often it was seen to be empty in a row.
    seen_empty: u8,
}

/// How often an empty segment of the node's own on a GPU is seen so, once in each heartbeat, before it is given back: to make
/// another one takes milliseconds, and others may want its memory for themselves.
const SEEN_EMPTY_MAX: u8 = 10;

/// What can be done about a lack of room.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// Retire these empty segments, then make this one.
    Create { retire: Vec<(SegmentId, u64)>, segment: SegmentId, len_bytes: u64 },
    /// One that will do is being made.
    UnderWay,
    /// Nothing.
    None,
}

/// One tier as a whole.
#[derive(Debug)]
struct Pool {
    capacity_bytes: u64,
    client_quota_bytes: u64,
    unassigned_bytes: u64,
    granule: u64,
    /// How long a segment of the node's own is.
    own_len: u64,
}

impl Pool {
    fn host(capacity_bytes: u64, client_quota_bytes: u64) -> Self {
        let granule = if capacity_bytes >= 32 << 20 { 2 << 20 } else { 64 << 10 };
        let capacity_bytes = capacity_bytes / granule * granule;
        let own_len = (capacity_bytes / 8 / granule * granule).clamp(granule, SEGMENT_LEN_MAX);
        Self::new(capacity_bytes, client_quota_bytes, granule, own_len)
    }

    fn gpu(gpu: &GpuUse) -> Self {
        let granule = gpu.granule_bytes.max(PAGE_LEN);
        let capacity_bytes = gpu.capacity_bytes / granule * granule;
        let eighth = (capacity_bytes / 8).clamp(GPU_SEGMENT_LEN_MIN, SEGMENT_LEN_MAX);
        let own_len = (eighth.min(capacity_bytes) / granule * granule).max(granule);
        Self::new(capacity_bytes, gpu.client_quota_bytes, granule, own_len)
    }

    fn new(capacity_bytes: u64, client_quota_bytes: u64, granule: u64, own_len: u64) -> Self {
        let client_quota_bytes = client_quota_bytes.min(capacity_bytes);
        Self { capacity_bytes, client_quota_bytes, unassigned_bytes: capacity_bytes, granule, own_len }
    }

    fn round(&self, len_bytes: u64) -> u64 {
        len_bytes.max(1).div_ceil(self.granule).saturating_mul(self.granule)
    }
}

#[derive(Debug)]
pub(super) struct Space {
    pools: BTreeMap<Tier, Pool>,
    next_segment: u32,
    segments: BTreeMap<SegmentId, SegmentBooks>,
}

impl Space {
    pub(super) fn new(capacity_bytes: u64, client_quota_bytes: u64, gpus: &[GpuUse]) -> Self {
        let host = (Tier::Host, Pool::host(capacity_bytes, client_quota_bytes));
        let gpus = gpus.iter().map(|gpu| (Tier::Gpu(gpu.ordinal), Pool::gpu(gpu)));
        Self {
            pools: std::iter::once(host).chain(gpus).collect(),
            next_segment: 1,
            segments: BTreeMap::new(),
        }
    }

    /// The tiers of this node, host first.
    pub(super) fn tiers(&self) -> impl Iterator<Item = Tier> + '_ {
        self.pools.keys().copied()
    }

    pub(super) fn has_tier(&self, tier: Tier) -> bool {
        self.pools.contains_key(&tier)
    }

    fn segments_of(&self, tier: Tier) -> impl Iterator<Item = &SegmentBooks> {
        self.segments.values().filter(move |books| books.tier == tier)
    }

    fn new_segment(&mut self, tier: Tier, len_bytes: u64, owner: Owner) -> SegmentId {
        let segment = SegmentId(self.next_segment);
        self.next_segment += 1;
        if let Some(pool) = self.pools.get_mut(&tier) {
            pool.unassigned_bytes = pool.unassigned_bytes.saturating_sub(len_bytes);
        }
        let books = SegmentBooks {
            tier,
            len_bytes,
            owner,
            arena: None,
            keys: Vec::new(),
            closed_to_writers: owner == Owner::Node,
            returned: false,
            seen_empty: 0,
        };
        self.segments.insert(segment, books);
        segment
    }

    /// The node's own segments at start: half of the host tier; the rest is for grants and for what turns up. None on a
    /// GPU: its memory is the training job's, and is taken when objects come to it.
    pub(super) fn first_segments(&mut self) -> Vec<(SegmentId, u64)> {
        let mut made = Vec::new();
        while let Some(pool) = self.pools.get(&Tier::Host)
            && pool.unassigned_bytes >= pool.own_len
            && pool.unassigned_bytes.saturating_mul(2) > pool.capacity_bytes
        {
            let len_bytes = pool.own_len;
            made.push((self.new_segment(Tier::Host, len_bytes, Owner::Node), len_bytes));
        }
        made
    }

    pub(super) fn ready(&mut self, segment: SegmentId, keys: Vec<(FabricId, RemoteKey)>) -> bool {
        let Some(books) = self.segments.get_mut(&segment) else {
            return false;
        };
        books.arena = Some(Arena::new(books.len_bytes, ALIGN));
        books.keys = keys;
        true
    }

    /// A segment could not be made. Whoever makes segments keeps its bytes for a later attempt. Returns for whom it
    /// was.
    pub(super) fn failed(&mut self, segment: SegmentId) -> Option<(Tier, Owner)> {
        let books = self.segments.remove(&segment)?;
        self.give_back(books.tier, books.len_bytes);
        Some((books.tier, books.owner))
    }

    fn give_back(&mut self, tier: Tier, len_bytes: u64) {
        if let Some(pool) = self.pools.get_mut(&tier) {
            pool.unassigned_bytes += len_bytes;
        }
    }

    /// An extent in a segment of this owner, if one has room.
    pub(super) fn allocate(&mut self, tier: Tier, owner: Owner, len_bytes: u64) -> Option<Extent> {
        let usable = self
            .segments
            .iter_mut()
            .filter(|(_, books)| books.tier == tier && books.owner == owner && !books.returned);
        for (&segment, books) in usable {
            if let Some(arena) = &mut books.arena
                && let Some(offset) = arena.allocate(len_bytes.max(1))
            {
                books.seen_empty = 0;
                return Some(Extent { segment, offset, len_bytes });
            }
        }
        None
    }

    pub(super) fn free(&mut self, extent: Extent) -> Result<(), StoreError> {
        let arena = self.segments.get_mut(&extent.segment).and_then(|books| books.arena.as_mut());
        let Some(arena) = arena else {
            return Err(StoreError::stale("free", extent.segment, "there is no such segment"));
        };
        arena.free(extent.offset).map(|_| ()).map_err(|error| {
            StoreError::stale("free", extent.segment, format!("offset {}: {error}", extent.offset))
        })
    }

    /// Makes two extents of one: the first keeps `len_bytes` bytes.
    pub(super) fn split(
        &mut self,
        segment: SegmentId,
        offset: u64,
        len_bytes: u64,
    ) -> Result<(), StoreError> {
        let arena = self.segments.get_mut(&segment).and_then(|books| books.arena.as_mut());
        let Some(arena) = arena else {
            return Err(StoreError::stale("split", segment, "there is no such segment"));
        };
        arena.split(offset, len_bytes)
    }

    /// `first_len`: the shortest segment that is granted to a client, in bytes, where it may have that much.
    pub(super) fn grow(&mut self, tier: Tier, owner: Owner, len_bytes: u64, first_len: u64) -> Growth {
        let Some(pool) = self.pools.get(&tier) else {
            return Growth::None;
        };
        let (least, granule) = (pool.round(len_bytes), pool.granule);
        if least > pool.capacity_bytes {
            return Growth::None;
        }
        let under_way = self
            .segments_of(tier)
            .any(|books| books.owner == owner && books.arena.is_none() && books.len_bytes >= least);
        if under_way {
            return Growth::UnderWay;
        }
        let Some(wanted) = self.wanted_len(tier, pool, owner, least, first_len) else {
            return Growth::None;
        };
        let mut retire = Vec::new();
        let mut free = pool.unassigned_bytes;
        // The node's own empty segments go first, then those of clients that keep nothing in them: they get others when
        // they need them, and what they still map is never handed out again.
        for owned in [true, false] {
            for (&segment, books) in self.segments.iter().filter(|(_, books)| books.tier == tier) {
                if free >= least {
                    break;
                }
                let useless = match books.owner {
                    // A segment that is as long as what is needed, or longer, would have been used as it is.
                    Owner::Node => owned && (owner != Owner::Node || books.len_bytes < least),
                    Owner::Client(_) => !owned && books.owner != owner,
                    Owner::Left(_) => false,
                };
                if useless && books.arena.as_ref().is_some_and(Arena::is_empty) {
                    retire.push((segment, books.len_bytes));
                    free += books.len_bytes;
                }
            }
        }
        if free < least {
            return Growth::None;
        }
        for (segment, _) in &retire {
            self.retire(*segment);
        }
        let len_bytes = wanted.min(free / granule * granule);
        let segment = self.new_segment(tier, len_bytes, owner);
        Growth::Create { retire, segment, len_bytes }
    }

    /// How long a new segment should be, at least `least`; none if the owner may not have that much.
    fn wanted_len(&self, tier: Tier, pool: &Pool, owner: Owner, least: u64, first_len: u64) -> Option<u64> {
        let Owner::Client(client) = owner else {
            return Some(least.max(pool.own_len));
        };
        let granted = self.granted_to(tier, client);
        let left = pool.client_quota_bytes.saturating_sub(granted) / pool.granule * pool.granule;
        if left < least {
            return None;
        }
        // Doubling what a client has keeps the number of descriptors small without taking the tier at once.
        let wanted = granted.max(pool.round(first_len)).min(pool.own_len);
        Some(wanted.max(least).min(left))
    }

    fn granted_to(&self, tier: Tier, client: ClientId) -> u64 {
        let owners = [Owner::Client(client), Owner::Left(client)];
        let granted = self.segments_of(tier).filter(|books| owners.contains(&books.owner));
        granted.map(|books| books.len_bytes).sum()
    }

    /// Takes a segment out of the books; nothing is in it. Returns its length.
    pub(super) fn retire(&mut self, segment: SegmentId) -> Option<u64> {
        let books = self.segments.get(&segment)?;
        if books.arena.as_ref().is_some_and(|arena| !arena.is_empty()) {
            return None;
        }
        let SegmentBooks { tier, len_bytes, .. } = self.segments.remove(&segment)?;
        self.give_back(tier, len_bytes);
        Some(len_bytes)
    }

    /// The client has no mapping of it any more, or says so: it is retired as soon as it is empty, never reused,
    /// since a client's word is no proof.
    pub(super) fn returned(&mut self, segment: SegmentId, client: ClientId) -> bool {
        match self.segments.get_mut(&segment) {
            Some(books) if books.owner == Owner::Client(client) => {
                books.returned = true;
                true
            }
            _ => false,
        }
    }

    /// Segments of the node's own on GPUs in which nothing has been for a while. Asked once in each heartbeat.
    pub(super) fn idle_on_gpus(&mut self) -> Vec<SegmentId> {
        let mut idle = Vec::new();
        for (&segment, books) in &mut self.segments {
            let empty = books.arena.as_ref().is_some_and(Arena::is_empty);
            if books.tier == Tier::Host || books.owner != Owner::Node || !empty {
                books.seen_empty = 0;
                continue;
            }
            books.seen_empty = books.seen_empty.saturating_add(1);
            if books.seen_empty >= SEEN_EMPTY_MAX {
                idle.push(segment);
            }
        }
        idle
    }

    pub(super) fn retirable(&self) -> Vec<SegmentId> {
        let empty = |books: &SegmentBooks| books.arena.as_ref().is_some_and(Arena::is_empty);
        let left = |books: &SegmentBooks| books.returned;
        self.segments
            .iter()
            .filter(|(_, books)| left(books) && empty(books))
            .map(|(&segment, _)| segment)
            .collect()
    }

    /// The session has ended, the process may still write to what it maps: nothing new is put there, and a segment is
    /// retired when it is empty. A process that connects again and again would else take all of the memory with it.
    pub(super) fn client_left(&mut self, client: ClientId) {
        for books in self.segments.values_mut().filter(|books| books.owner == Owner::Client(client)) {
            books.owner = Owner::Left(client);
            books.returned = true;
        }
    }

    /// The process is gone: what it could write to is now like the node's own. Returns the segments that it never
    /// acknowledged to have mapped, which have to be closed to writers now.
    pub(super) fn adopt_segments_of(&mut self, client: ClientId) -> Vec<SegmentId> {
        let owners = [Owner::Client(client), Owner::Left(client)];
        let mut open = Vec::new();
        for (&segment, books) in &mut self.segments {
            if !owners.contains(&books.owner) {
                continue;
            }
            books.owner = Owner::Node;
            books.returned = false;
            if !std::mem::replace(&mut books.closed_to_writers, true) {
                open.push(segment);
            }
        }
        open
    }

    /// The tier of a segment; host for one that is not in the books any more, in which nothing can be.
    pub(super) fn tier(&self, segment: SegmentId) -> Tier {
        self.segments.get(&segment).map_or(Tier::Host, |books| books.tier)
    }

    pub(super) fn owner(&self, segment: SegmentId) -> Option<Owner> {
        self.segments.get(&segment).map(|books| books.owner)
    }

    pub(super) fn len_bytes(&self, segment: SegmentId) -> Option<u64> {
        self.segments.get(&segment).map(|books| books.len_bytes)
    }

    /// Whether readers may have its descriptor.
    pub(super) fn is_closed_to_writers(&self, segment: SegmentId) -> bool {
        self.segments.get(&segment).is_some_and(|books| books.closed_to_writers)
    }

    pub(super) fn close_to_writers(&mut self, segment: SegmentId) {
        if let Some(books) = self.segments.get_mut(&segment) {
            books.closed_to_writers = true;
        }
    }

    pub(super) fn key(&self, segment: SegmentId, fabric: FabricId) -> Option<RemoteKey> {
        let books = self.segments.get(&segment)?;
        books.keys.iter().find(|(id, _)| *id == fabric).map(|(_, key)| *key)
    }

    pub(super) fn capacity_bytes(&self, tier: Tier) -> u64 {
        self.pools.get(&tier).map_or(0, |pool| pool.capacity_bytes)
    }

    pub(super) fn used_bytes(&self, tier: Tier) -> u64 {
        self.segments_of(tier).filter_map(|books| books.arena.as_ref()).map(Arena::used_bytes).sum()
    }

    pub(super) fn free_bytes(&self, tier: Tier) -> u64 {
        self.capacity_bytes(tier).saturating_sub(self.used_bytes(tier))
    }

    pub(super) fn granted_bytes(&self, tier: Tier) -> u64 {
        let granted = self.segments_of(tier).filter(|books| books.owner != Owner::Node);
        granted.map(|books| books.len_bytes).sum()
    }

    pub(super) fn segment_count(&self, tier: Tier) -> usize {
        self.segments_of(tier).count()
    }

    /// One minus the largest piece that can be had at once over all free bytes, in percent.
    pub(super) fn fragmentation_percent(&self, tier: Tier) -> u32 {
        let arenas = self.segments_of(tier).filter_map(|books| books.arena.as_ref());
        let unassigned = self.pools.get(&tier).map_or(0, |pool| pool.unassigned_bytes);
        let largest = arenas.map(Arena::largest_free_bytes).max().unwrap_or(0).max(unassigned);
        let free = self.free_bytes(tier).max(1);
        let percent = 100 - (u128::from(largest.min(free)) * 100 / u128::from(free));
        u32::try_from(percent).unwrap_or(100)
    }
}
