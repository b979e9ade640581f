//! A client's own page: its pin words, what it got lately, and how often. Not the index. Invariant: everything in it
//! is the client's word only, so whatever a client writes there costs nobody but itself: a false pin holds memory
//! back within its quota of pins, a pin that it hides spoils its own reads.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use hetmem_core::{Generation, SlotId, StoreError};
use rustix::fs::SealFlags;

use crate::mapping::{Access, Mapping};
use crate::memfd;
use crate::os;
use crate::pins::Pins;

/// Objects that one client can hold at a time.
pub const PINS: usize = 16_384;
/// "HETMPAG1" read as text.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"HETMPAG1");
/// Goes up with every change of the layout.
pub(crate) const VERSION: u64 = 1;

// Positions in words; docs/shared-memory.md shows them in bytes.
const USED: usize = 8;
/// Threads count and sample in lanes of their own, so that they do not pass one cache line around.
const LANES: usize = 8;
const LANE_WORDS: usize = 8;
const COUNTERS: usize = 64;
const RINGS: usize = 512;
const RING_LEN: usize = 64;
const WORDS: usize = 1024;
const END: usize = WORDS + PINS;
/// The length of the file in bytes.
pub const PAGE_LEN: u64 = END as u64 * 8;

fn pins(mapping: &Mapping) -> Pins<'_> {
    let words = mapping.words();
    Pins { words: &words[WORDS..END], used: &words[USED] }
}

fn counter(mapping: &Mapping, lane: usize) -> &AtomicU64 {
    &mapping.words()[COUNTERS + lane * LANE_WORDS]
}

fn ring(mapping: &Mapping, lane: usize) -> &[AtomicU64] {
    &mapping.words()[RINGS + lane * RING_LEN..][..RING_LEN]
}

/// The node's view of a client's page.
#[derive(Debug)]
pub struct NodePage {
    mapping: Mapping,
    fd: OwnedFd,
    /// Where the node looks for a free word first.
    start: AtomicU32,
}

impl NodePage {
    /// A fresh page, with memory for all of it, sealed against changes of its length.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] when there are no descriptors or no memory left.
    pub fn create() -> Result<Self, StoreError> {
        let fd = memfd::create("hetmem-client-page", PAGE_LEN, None)?;
        let mapping = Mapping::new(fd.as_fd(), PAGE_LEN, Access::Write)?;
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, PAGE_LEN)
            .map_err(|errno| os::error("populate client page", errno))?;
        memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let words = mapping.words();
        words[0].store(MAGIC, Ordering::Relaxed);
        words[1].store(VERSION, Ordering::Relaxed);
        words[2].store(PINS as u64, Ordering::Relaxed);
        Ok(Self { mapping, fd, start: AtomicU32::new(0) })
    }

    /// To be passed to the client, writable.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Adds every pinned generation.
    ///
    /// Starts with a full fence: a generation that was withdrawn from the index before this call, and is not pinned
    /// now, is not pinned by this client and never will be.
    pub fn pinned(&self, into: &mut impl Extend<Generation>) {
        pins(&self.mapping).each(|generation| {
            into.extend([Generation(generation)]);
        });
    }

    /// Pins on the client's behalf, so that a reply can hand over an object that stays; `None` when the client has no
    /// pin word left.
    #[must_use]
    pub fn pin_for_client(&self, generation: Generation) -> Option<u32> {
        if generation.0 == 0 {
            return None;
        }
        let start = self.start.load(Ordering::Relaxed) as usize;
        let pin = u32::try_from(pins(&self.mapping).claim(generation.0, start)?).ok()?;
        // The client gives the word back soon, so it is a good place to look next.
        self.start.store(pin, Ordering::Relaxed);
        Some(pin)
    }

    /// Takes a pin of [`NodePage::pin_for_client`] back whose reply was never sent.
    pub fn unpin_for_client(&self, pin: u32, generation: Generation) {
        if let Some(word) = pins(&self.mapping).words.get(pin as usize) {
            let _ = word.compare_exchange(generation.0, 0, Ordering::Release, Ordering::Relaxed);
        }
    }

    /// Hands out and clears a sample of the slots that the client got lately. The numbers are the client's word only
    /// and may lie outside the index.
    pub fn drain_touches(&self, mut touched: impl FnMut(SlotId)) {
        for lane in 0..LANES {
            for word in ring(&self.mapping, lane) {
                if word.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let slot = word.swap(0, Ordering::Relaxed);
                if let Some(slot) = slot.checked_sub(1).and_then(|slot| u32::try_from(slot).ok()) {
                    touched(SlotId(slot));
                }
            }
        }
    }

    /// Gets that the client answered itself from the index: the client's word only.
    #[must_use]
    pub fn hits(&self) -> u64 {
        (0..LANES).map(|lane| counter(&self.mapping, lane).load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }
}

/// Threads of this process that have ever touched a page.
static THREADS: AtomicUsize = AtomicUsize::new(0);

#[derive(Clone, Copy)]
pub(crate) struct Place {
    lane: usize,
    /// Where this thread most likely finds a free pin word.
    pub(crate) start: usize,
}

thread_local! {
    static PLACE: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Each thread starts in a cache line of its own, as close to the front as that allows.
#[inline]
fn place() -> Place {
    PLACE.get().unwrap_or_else(|| {
        let number = THREADS.fetch_add(1, Ordering::Relaxed);
        let place = Place { lane: number % LANES, start: number * LANE_WORDS % PINS };
        PLACE.set(Some(place));
        place
    })
}

/// The client's view of its page.
#[derive(Debug)]
pub struct ClientPage {
    mapping: Mapping,
}

impl ClientPage {
    /// Maps the descriptor that came with `Welcome`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if it is no page of this layout.
    pub fn map(fd: OwnedFd) -> Result<Self, StoreError> {
        memfd::check_sealed(fd.as_fd(), "client page", PAGE_LEN)?;
        let mapping = Mapping::new(fd.as_fd(), PAGE_LEN, Access::Write)?;
        drop(fd);
        mapping.prefault(Access::Write);
        let header = [0, 1, 2].map(|word| mapping.words()[word].load(Ordering::Relaxed));
        if header != [MAGIC, VERSION, PINS as u64] {
            return Err(StoreError::protocol(format!(
                "client page starts with {header:x?}, this build uses version {VERSION} with {PINS} pins"
            )));
        }
        Ok(Self { mapping })
    }

    /// Claims a pin word for `generation`; `None` when all are in use. What is pinned counts only if it is looked at
    /// again afterwards: [`crate::IndexReader::get`] does all of it.
    #[must_use = "a pin holds its extent until `unpin`"]
    pub fn pin(&self, generation: Generation) -> Option<u32> {
        if generation.0 == 0 {
            return None;
        }
        let place = place();
        let pin = pins(&self.mapping).claim(generation.0, place.start)?;
        self.pinned_at(place, pin)
    }

    #[inline]
    fn pinned_at(&self, place: Place, pin: usize) -> Option<u32> {
        PLACE.set(Some(Place { start: pin + 1, ..place }));
        u32::try_from(pin).ok()
    }

    /// Gives a pin word back: what was read before this call was read in time. One store.
    #[inline]
    pub fn unpin(&self, pin: u32) {
        let position = pin as usize;
        pins(&self.mapping).release(position);
        PLACE.set(Some(Place { start: position, ..place() }));
    }

    /// Counts a hit and notes the slot. [`crate::IndexReader::get`] does it.
    ///
    /// Threads that share a lane may lose each other's counts: a locked addition would cost a tenth of a get, and
    /// both numbers only guide.
    #[inline]
    pub fn touch(&self, slot: SlotId) {
        self.touch_in(place(), slot);
    }

    /// The same for a thread that knows its place.
    #[inline]
    pub(crate) fn touch_in(&self, Place { lane, .. }: Place, slot: SlotId) {
        let counter = counter(&self.mapping, lane);
        let hits = counter.load(Ordering::Relaxed);
        counter.store(hits.wrapping_add(1), Ordering::Relaxed);
        #[expect(clippy::cast_possible_truncation, reason = "only the low bits count")]
        let position = hits as usize % RING_LEN;
        ring(&self.mapping, lane)[position].store(u64::from(slot.0) + 1, Ordering::Relaxed);
    }

    /// The pin words and where this thread looks first.
    #[inline]
    pub(crate) fn pins(&self) -> (Pins<'_>, Place) {
        (pins(&self.mapping), place())
    }

    /// Tells the thread that it has claimed a word.
    #[inline]
    pub(crate) fn claimed(&self, place: Place, pin: usize) -> u32 {
        self.pinned_at(place, pin).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn pages() -> (NodePage, ClientPage) {
        let node = NodePage::create().expect("a page");
        let fd = node.descriptor().try_clone_to_owned().expect("a descriptor is left");
        let client = ClientPage::map(fd).expect("the same page");
        (node, client)
    }

    fn pinned(node: &NodePage) -> HashSet<Generation> {
        let mut pinned = HashSet::new();
        node.pinned(&mut pinned);
        pinned
    }

    fn touched(node: &NodePage) -> Vec<u32> {
        let mut slots = Vec::new();
        node.drain_touches(|slot| slots.push(slot.0));
        slots.sort_unstable();
        slots
    }

    #[test]
    fn pins_of_both_sides_are_one_set() {
        let (node, client) = pages();
        let mine = client.pin(Generation(5)).expect("free");
        let other = node.pin_for_client(Generation(6)).expect("free");
        assert_ne!(mine, other);
        assert_eq!(pinned(&node), HashSet::from([Generation(5), Generation(6)]));
        client.unpin(other);
        assert_eq!(pinned(&node), HashSet::from([Generation(5)]));
        let again = node.pin_for_client(Generation(7)).expect("free");
        node.unpin_for_client(again, Generation(8));
        assert!(pinned(&node).contains(&Generation(7)), "only what the node has pinned itself");
        node.unpin_for_client(again, Generation(7));
        client.unpin(mine);
        assert!(pinned(&node).is_empty());
        assert_eq!((client.pin(Generation(0)), node.pin_for_client(Generation(0))), (None, None));
        client.unpin(u32::MAX);
    }

    #[test]
    fn threads_pin_without_losing_any() {
        let (node, client) = pages();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let client = &client;
                scope.spawn(move || {
                    let pins: Vec<_> = (1..=1000)
                        .map(|number| client.pin(Generation(thread * 1000 + number)).expect("free"))
                        .collect();
                    pins.iter().skip(1).for_each(|pin| client.unpin(*pin));
                });
            }
        });
        assert_eq!(pinned(&node), (0..4).map(|thread| Generation(thread * 1000 + 1)).collect());
    }

    #[test]
    fn touches_arrive_once_and_hits_add_up() {
        let (node, client) = pages();
        for slot in [3, 5, 3] {
            client.touch(SlotId(slot));
        }
        assert_eq!((touched(&node), node.hits()), (vec![3, 3, 5], 3));
        assert_eq!(touched(&node), Vec::<u32>::new());
        for slot in 0..1000 {
            client.touch(SlotId(slot));
        }
        let late = touched(&node);
        assert!(late.len() == RING_LEN && late.contains(&999), "the latest of many: {late:?}");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| client.touch(SlotId(1))));
            }
        });
        assert_eq!(node.hits(), 3003);
    }

    #[test]
    fn whatever_a_client_writes_costs_only_its_own_pins() {
        let (node, client) = pages();
        for garbage in [u64::MAX, 1, u64::MAX / 2] {
            client.mapping.words().iter().for_each(|word| word.store(garbage, Ordering::Relaxed));
            assert_eq!(pinned(&node), HashSet::from([Generation(garbage)]));
            assert_eq!(node.pin_for_client(Generation(4)), None, "its own quota is used up");
            node.unpin_for_client(u32::MAX, Generation(4));
            assert!(touched(&node).len() <= LANES * RING_LEN);
            let _ = node.hits();
        }
        // A client that hides its pins spoils its own reads only; others have pages of their own.
        let (other, theirs) = pages();
        let _held = theirs.pin(Generation(9)).expect("free");
        assert_eq!(pinned(&other), HashSet::from([Generation(9)]));
        client.mapping.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        assert!(pinned(&node).is_empty());
        assert!(node.pin_for_client(Generation(4)).is_some());
    }

    #[test]
    fn files_that_are_no_page_are_refused() {
        let (node, client) = pages();
        assert!(rustix::fs::ftruncate(node.descriptor(), 0).is_err());
        client.mapping.words()[1].store(VERSION + 1, Ordering::Relaxed);
        let fd = node.descriptor().try_clone_to_owned().expect("a descriptor is left");
        let error = ClientPage::map(fd).expect_err("another version");
        assert_eq!(error.kind(), hetmem_core::ErrorKind::Protocol, "{error}");
        let unsealed = memfd::create("page", PAGE_LEN, None).expect("a file");
        assert!(ClientPage::map(unsealed).expect_err("not sealed").to_string().contains("sealed"));
    }
}
