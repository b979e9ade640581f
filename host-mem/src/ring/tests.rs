//! Publication rings in real shared memory, both sides in one process; and everything that a hostile client could
//! write there.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::engine::{PutAhead, RingState};
use hetmem_core::wire::PutHints;
use hetmem_core::{Checksum, DType, ErrorKind, Extent, Key, ObjectMeta, SegmentId, checksum};
use proptest::prelude::*;

use super::claim::State;
use super::layout::{self, PLACES};
use super::{AheadChunk, NodeRing, ProducerRing, Refused, record};
use crate::mapping::{Access, Mapping};
use crate::{PagePolicy, Segment, SegmentOwner, WriteMapping};

const SEGMENT_LEN: u64 = 1 << 20;

struct Pair {
    node: NodeRing,
    client: ProducerRing,
    segment: Segment,
    memory: Arc<WriteMapping>,
}

fn key(name: &str) -> Key {
    Key::new(name).expect("a key")
}

impl Pair {
    fn new() -> Self {
        let node = NodeRing::create().expect("a ring");
        let client = ProducerRing::map(duplicate(&node)).expect("the same ring");
        let segment = Segment::create(SegmentId(3), SEGMENT_LEN, SegmentOwner::Client, PagePolicy::Off)
            .expect("memory");
        let fd = segment.descriptor().try_clone_to_owned().expect("a descriptor is left");
        let memory = Arc::new(WriteMapping::map(fd, SEGMENT_LEN).expect("it is open to writers"));
        Self { node, client, segment, memory }
    }

    fn chunk(&self, number: u64, offset: u64, len_bytes: u64, objects: u32) -> AheadChunk {
        let extent = Extent { segment: SegmentId(3), offset, len_bytes };
        AheadChunk::new(number, extent, objects, Arc::clone(&self.memory)).expect("inside the segment")
    }

    /// Grants a chunk and begins with it.
    fn grant(&mut self, number: u64, offset: u64, len_bytes: u64, objects: u32) -> AheadChunk {
        self.node.grant(number).expect("the ring is sound");
        let mut chunk = self.chunk(number, offset, len_bytes, objects);
        assert!(self.client.begin(&mut chunk, None));
        chunk
    }

    fn put(&self, chunk: &AheadChunk, name: &str, bytes: &[u8]) -> Result<(), Refused> {
        let mut claim = self.client.claim(chunk, bytes.len() as u64)?;
        let checksum = claim.fill(bytes, true).expect("as many as were claimed");
        let meta = ObjectMeta::bytes(bytes.len() as u64).expect("a length").with_checksum(checksum);
        assert!(!claim.publish(&key(name), &meta, &PutHints::default()).gone);
        Ok(())
    }

    fn drain(&mut self) -> (Vec<PutAhead>, RingState) {
        drain(&mut self.node)
    }
}

fn drain(node: &mut NodeRing) -> (Vec<PutAhead>, RingState) {
    let mut puts = Vec::new();
    let state = node.drain(&mut puts).expect("the ring is sound");
    (puts, state)
}

fn duplicate(node: &NodeRing) -> OwnedFd {
    node.descriptor().try_clone().expect("a descriptor is left")
}

/// The ring's memory, as a client that does what it likes sees it.
fn raw(node: &NodeRing) -> Mapping {
    Mapping::new(node.descriptor().as_fd(), layout::RING_LEN, Access::Write).expect("it can be mapped")
}

#[test]
fn what_is_published_is_drained_once_with_all_that_was_said() {
    let mut pair = Pair::new();
    assert!(!pair.node.has_news());
    let chunk = pair.grant(1, 8192, 65_536, 100);
    let bytes: Vec<u8> = (0..=250).cycle().take(5_000).collect();
    pair.put(&chunk, "first", &bytes[..100]).expect("room");
    pair.put(&chunk, "empty", &[]).expect("room");
    pair.put(&chunk, "page", &bytes).expect("room");
    pair.put(&chunk, "less", &bytes[..4_032]).expect("room");
    pair.put(&chunk, "as good as a page", &bytes[..4_033]).expect("room");
    assert!(pair.node.has_news());
    let (puts, state) = pair.drain();
    assert_eq!(state, RingState { chunk: 1, open: true, head: 5, tail: 5 });
    let places: Vec<_> = puts.iter().map(|put| (put.key.as_str(), put.chunk, put.offset)).collect();
    // As the node's own allocator: lengths in granules, and pages from a page on.
    let expected = [
        ("first", 1, 0),
        ("empty", 1, 128),
        ("page", 1, 4096),
        ("less", 1, 9152),
        ("as good as a page", 1, 16384),
    ];
    assert_eq!(places, expected);
    let page = &puts[2];
    assert_eq!(page.meta.checksum, Checksum::Xxh3Blocks(checksum::of(&bytes)));
    assert_eq!(pair.segment.read(8192 + page.offset, 5_000).expect("inside"), bytes);
    assert!(!pair.node.has_news());
    assert!(pair.drain().0.is_empty());
}

#[test]
fn records_say_everything_that_a_put_can() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, 65_536, 100);
    let meta = ObjectMeta::tensor(DType::BF16, &[3, 0, 5, 1, 1, 1, 1, 7]).expect("a shape");
    let hints = PutHints { pin: true, cache: true, ttl_ms: Some(u64::MAX), ..PutHints::default() };
    let longest = "k".repeat(8 * (24 - 8));
    for name in ["a", "exactly8", "nine byte", "schlüssel", &longest] {
        assert!(ProducerRing::fits(&key(name), &meta));
        let claim = pair.client.claim(&chunk, 0).expect("room");
        claim.publish(&key(name), &meta, &hints);
        let (puts, _) = pair.drain();
        let [put] = &puts[..] else { panic!("{puts:?}") };
        assert_eq!((put.key.as_str(), put.meta, put.hints), (name, meta, hints));
    }
    assert!(!ProducerRing::fits(&key(&format!("{longest}x")), &meta));
}

#[test]
fn one_that_is_in_the_middle_of_a_put_holds_up_no_other() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, 65_536, 100);
    let slow = pair.client.claim(&chunk, 64).expect("room");
    let given_up = pair.client.claim(&chunk, 64).expect("room");
    pair.put(&chunk, "fast", &[1; 64]).expect("room");
    let mut puts = Vec::new();
    let state = pair.node.drain(&mut puts).expect("sound");
    assert_eq!((puts.len(), state.head, state.tail), (1, 3, 0));
    assert_eq!(puts[0].key, key("fast"));
    drop(given_up);
    let state = pair.node.drain(&mut puts).expect("sound");
    assert_eq!((puts.len(), state.tail), (1, 0), "nothing came of it, and the first is still under way");
    slow.publish(&key("slow"), &ObjectMeta::bytes(64).expect("a length"), &PutHints::default());
    let state = pair.node.drain(&mut puts).expect("sound");
    assert_eq!((puts.len(), state.tail), (2, 3));
}

#[test]
fn a_chunk_has_so_many_bytes_and_is_good_for_so_many_objects() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, 4096 + 128, 100);
    assert!(!pair.client.claim(&chunk, 64).expect("room").is_past_middle());
    // A page starts at a page, and then there is room for two granules.
    assert!(pair.client.claim(&chunk, 4096).is_err(), "it would start at 4096 and have 128 bytes");
    assert!(!pair.client.claim(&chunk, 2112).expect("room").is_past_middle());
    assert!(pair.client.claim(&chunk, 1920).expect("room").is_past_middle());
    assert!(pair.client.claim(&chunk, 128).is_ok());
    assert_eq!(pair.client.claim(&chunk, 1).expect_err("full"), Refused::Exhausted);
    pair.drain();

    pair.node.grant(2).expect("sound");
    let mut second = pair.chunk(2, 65_536, 65_536, 2);
    assert!(pair.client.begin(&mut second, Some(&chunk)), "from an open chunk to the next");
    assert!(pair.put(&second, "a", &[1]).is_ok() && pair.put(&second, "b", &[2]).is_ok());
    assert_eq!(pair.put(&second, "c", &[3]), Err(Refused::Exhausted), "two objects");
    assert_eq!(pair.put(&chunk, "c", &[3]), Err(Refused::Closed), "the first is not claimed from any more");
    let (puts, state) = pair.drain();
    assert_eq!((puts.len(), state.chunk), (2, 2));
}

#[test]
fn a_ring_that_is_not_drained_is_full_and_goes_round_afterwards() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, SEGMENT_LEN, 1 << 20);
    for turn in 0..3 {
        for number in 0..PLACES {
            pair.put(&chunk, &format!("{turn}/{number}"), &[1; 8]).expect("a free place");
        }
        assert_eq!(pair.put(&chunk, "one more", &[1; 8]), Err(Refused::Full));
        let (puts, _) = pair.drain();
        let names: BTreeSet<&str> = puts.iter().map(|put| put.key.as_str()).collect();
        assert_eq!(names.len(), PLACES as usize);
        assert!(names.iter().all(|name| name.starts_with(&format!("{turn}/"))));
    }
}

#[test]
fn what_is_taken_back_is_not_claimed_and_what_was_begun_is_drained() {
    let mut pair = Pair::new();
    let mut chunk = pair.grant(1, 0, 65_536, 100);
    let begun = pair.client.claim(&chunk, 64).expect("room");
    let state = pair.node.close().expect("sound");
    assert_eq!((state.open, state.head), (false, 1));
    assert_eq!(pair.client.claim(&chunk, 64).expect_err("closed"), Refused::Closed);
    begun.publish(&key("begun"), &ObjectMeta::bytes(64).expect("a length"), &PutHints::default());
    let (puts, state) = pair.drain();
    assert_eq!((puts.len(), state.open, state.tail), (1, false, 1));
    assert!(!pair.client.begin(&mut chunk, None), "it is not open");
    // A next one that was never begun is taken back with the first.
    let first = pair.grant(2, 0, 65_536, 100);
    pair.node.grant(3).expect("sound");
    pair.node.close().expect("sound");
    let mut next = pair.chunk(3, 65_536, 65_536, 100);
    assert!(!pair.client.begin(&mut next, Some(&first)));
    // The next grant opens by itself.
    let chunk = pair.grant(4, 131_072, 65_536, 100);
    pair.put(&chunk, "again", &[0; 64]).expect("room");
    assert_eq!(pair.drain().0[0].chunk, 4);
}

#[test]
fn a_bell_is_rung_once_and_whoever_is_late_sees_that_the_session_is_over() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, 65_536, 100);
    let meta = ObjectMeta::bytes(0).expect("a length");
    let publish = |pair: &Pair| {
        let claim = pair.client.claim(&chunk, 0).expect("room");
        claim.publish(&key("k"), &meta, &PutHints::default())
    };
    assert!(!publish(&pair).bell);
    pair.node.set_bell();
    assert!(publish(&pair).bell);
    assert!(!publish(&pair).bell, "it has been rung");
    let late = pair.client.claim(&chunk, 0).expect("room");
    pair.node.retire();
    drain(&mut pair.node);
    assert!(late.publish(&key("late"), &meta, &PutHints::default()).gone);
    assert_eq!(pair.client.claim(&chunk, 0).expect_err("closed"), Refused::Closed);
}

#[test]
fn many_threads_put_while_the_node_drains_and_nothing_is_lost_or_doubled() {
    const THREADS: usize = 8;
    const EACH: usize = 3_000;
    let Pair { mut node, client, segment, memory } = Pair::new();
    node.grant(1).expect("sound");
    let extent = Extent { segment: SegmentId(3), offset: 0, len_bytes: SEGMENT_LEN };
    let mut chunk = AheadChunk::new(1, extent, 1 << 20, memory).expect("inside");
    assert!(client.begin(&mut chunk, None));
    let done = AtomicBool::new(false);
    let mut puts: Vec<PutAhead> = Vec::new();
    let put: BTreeSet<String> = std::thread::scope(|scope| {
        let (client, chunk) = (&client, &chunk);
        let producers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut put = Vec::new();
                    for number in 0..EACH {
                        let name = format!("{thread}/{number}");
                        let bytes = name.as_bytes().repeat(2);
                        let Ok(mut claim) = client.claim(chunk, bytes.len() as u64) else {
                            std::thread::yield_now();
                            continue;
                        };
                        let sum = claim.fill(&bytes, true).expect("as many as were claimed");
                        let meta = ObjectMeta::bytes(bytes.len() as u64).expect("a length");
                        claim.publish(&key(&name), &meta.with_checksum(sum), &PutHints::default());
                        put.push(name);
                    }
                    put
                })
            })
            .collect();
        let drained = scope.spawn(|| {
            let mut puts = Vec::new();
            while !done.load(Ordering::Acquire) {
                node.drain(&mut puts).expect("sound");
            }
            node.drain(&mut puts).expect("sound");
            puts
        });
        let put = producers.into_iter().flat_map(|producer| producer.join().expect("no panic")).collect();
        done.store(true, Ordering::Release);
        puts = drained.join().expect("no panic");
        put
    });
    assert!(put.len() > PLACES as usize, "{} puts", put.len());
    assert_eq!(puts.len(), put.len(), "none twice");
    for found in &puts {
        assert!(put.contains(found.key.as_str()));
        let bytes = segment.read(found.offset, found.meta.len_bytes).expect("inside");
        assert_eq!(bytes, found.key.as_str().as_bytes().repeat(2));
        assert_eq!(found.meta.checksum, Checksum::Xxh3Blocks(checksum::of(&bytes)));
    }
}

#[test]
fn words_that_cannot_be_are_an_error() {
    let too_far = |state: State| State { position: state.position + u64::from(PLACES) + 1, ..state };
    let before_the_tail = |state: State| State { position: state.position.wrapping_sub(1), ..state };
    let other_chunk = |state: State| State { chunk: 77, ..state };
    for (what, change) in
        [("too far", too_far as fn(State) -> State), ("backwards", before_the_tail), ("chunk", other_chunk)]
    {
        let mut pair = Pair::new();
        let chunk = pair.grant(1, 0, 65_536, 100);
        pair.put(&chunk, "k", &[1]).expect("room");
        pair.drain();
        let memory = raw(&pair.node);
        let ring = layout::ring(&memory);
        ring.word.store(change(ring.state()).word(), Ordering::Release);
        let error = pair.node.drain(&mut Vec::new()).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert!(pair.node.close().is_err() && pair.node.grant(2).is_err());
    }
}

#[test]
fn a_record_that_is_shown_again_is_not_drained_again() {
    let mut pair = Pair::new();
    let chunk = pair.grant(1, 0, 65_536, 100);
    let _slow = pair.client.claim(&chunk, 64).expect("room");
    pair.put(&chunk, "k", &[1]).expect("room");
    assert_eq!(drain(&mut pair.node).0.len(), 1);
    let memory = raw(&pair.node);
    layout::ring(&memory).fill(1);
    assert_eq!(drain(&mut pair.node).0.len(), 0, "its position was drained");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the words of a record are, it is a put that makes sense, nothing, or an error.
    #[test]
    fn any_words_are_a_put_or_an_error(
        words in prop::collection::vec(prop_oneof![any::<u64>(), 0..20_u64, Just(0x0002_0000_0001)], record::RECORD_WORDS),
        head in prop_oneof![any::<u64>(), (0..200_u64, 0..30_u64, 0..10_u64, 0..3_u64, 0..9_u64)
            .prop_map(|(key, dtype, dims, sum, flags)| key | dtype << 16 | dims << 24 | sum << 32 | flags << 40)],
    ) {
        let mut words = words;
        words[4] = head;
        let shared: Vec<_> = words.iter().map(|word| std::sync::atomic::AtomicU64::new(*word)).collect();
        match record::read(&shared) {
            Ok(Some(put)) => {
                prop_assert!(put.meta.check().is_ok());
                prop_assert!(!put.key.as_str().is_empty());
            }
            Ok(None) => prop_assert_eq!(head, 0),
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Protocol),
        }
    }

    /// Whatever a client writes into its ring, the node's calls end, and none returns more than there are places.
    #[test]
    fn no_words_make_the_node_wait_or_panic(
        words in prop::collection::vec((0..(layout::RING_LEN / 8), prop_oneof![any::<u64>(), 0..5_000_u64]), 1..200),
        claim in any::<u64>(),
    ) {
        let mut pair = Pair::new();
        let _chunk = pair.grant(1, 0, 65_536, 100);
        let memory = raw(&pair.node);
        for (at, word) in words {
            memory.words()[usize::try_from(at).expect("inside")].store(word, Ordering::Relaxed);
        }
        for _ in 0..3 {
            let mut puts = Vec::new();
            let _ = pair.node.drain(&mut puts);
            prop_assert!(puts.len() <= PLACES as usize);
            let _ = pair.node.grant(2);
            layout::ring(&memory).word.store(claim, Ordering::Relaxed);
            let _ = pair.node.close();
        }
        pair.node.retire();
        let _ = pair.node.drain(&mut Vec::new());
    }
}
