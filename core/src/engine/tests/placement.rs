//! Objects that change their tier: which, when, and what their readers see of it. Not the decisions by themselves
//! (`crate::placement`). No GPU: a tier is a name here.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::tiers::{gpus, hinted};
use super::world::*;
use crate::engine::{GpuUse, Input};
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::placement::{HIGH_PERCENT, LOW_PERCENT, REST_MS};
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Generation, Tier, TierHint};
use crate::wire::{ClientMessage, ClientReply, IfExists, Located, PutHints, Range};

const GPU: Tier = Tier::Gpu(0);
const MIB: u64 = 1 << 20;
/// Of the GPU in these tests.
const CAPACITY: u64 = 4 * MIB;
const HIGH: u64 = CAPACITY / 100 * HIGH_PERCENT;
const LEN: usize = 64 << 10;

fn roomy() -> Shape {
    Shape { capacity_bytes: 64 * MIB, quota_bytes: 32 * MIB, ..gpus(&[]) }
}

impl World {
    fn on_gpu(&self) -> u64 {
        let tiers = self.status(0).tiers;
        tiers.iter().find(|tier| tier.tier == GPU).expect("a GPU").used_bytes
    }

    fn place(&self, name: &str) -> Option<(Tier, Extent, Generation)> {
        let shown = self.nodes[0].index.values().find(|shown| shown.key == key(name))?;
        Some((shown.tier, shown.extent, shown.generation))
    }

    fn tier_of(&self, name: &str) -> Tier {
        self.place(name).unwrap_or_else(|| panic!("{name} is gone")).0
    }

    /// A reader on the GPU, who lets go at once.
    fn read_on_gpu(&mut self, client: ClientId, name: &str, expected: &[u8]) -> Located {
        let located = self.get_in((0, client), name, None, TierHint::from(GPU)).expect(name);
        self.read((0, client), &located, expected);
        located
    }

    fn put_objects(&mut self, client: ClientId, count: u8, hints: PutHints) {
        for number in 0..count {
            self.put_in(client, &format!("o{number}"), &pattern(number, LEN), hints).expect("room");
            assert!(self.on_gpu() <= CAPACITY);
        }
    }
}

#[test]
fn a_gpu_that_fills_up_gives_what_is_not_read_to_host_memory() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    world.put_in(client, "hot", &pattern(200, LEN), hinted(GPU, false)).expect("room");
    for number in 0..120 {
        world.put_in(client, &format!("o{number}"), &pattern(number, LEN), hinted(GPU, false)).expect("room");
        // A reader of the index shows up when the pins are looked at.
        let located = world.get_in((0, client), "hot", None, None).expect("hot");
        world.read((0, client), &located, &pattern(200, LEN));
        assert!(world.on_gpu() <= HIGH + LEN as u64, "{} after {number}", world.on_gpu());
    }
    world.advance(500);
    assert!(world.on_gpu() <= HIGH);
    assert!(world.on_gpu() >= CAPACITY / 100 * LOW_PERCENT - LEN as u64, "and no more than it has to");
    assert_eq!(world.tier_of("hot"), GPU, "it was read all the while");
    let status = world.status(0);
    assert_eq!((status.counters.evicted, status.objects), (0, 121), "nothing is lost");
    assert_eq!(status.counters.demoted, world.nodes[0].moves);
    for number in 0..120 {
        let located = world.get_in((0, client), &format!("o{number}"), None, None).expect("there");
        world.read((0, client), &located, &pattern(number, LEN));
    }
    world.assert_drained();
}

/// It is in no hurry: who holds the old place reads it on, and its memory is not used again before.
#[test]
fn readers_of_the_old_place_are_not_disturbed() {
    let mut world = World::shaped(1, &roomy());
    let (client, reader) = (world.client(0, 1), world.client(0, 2));
    world.put_objects(client, 50, hinted(GPU, false));
    let held = world.get_in((0, reader), "o0", None, None).expect("o0");
    assert_eq!(held.tier, GPU);
    for number in 50..90 {
        world.put_in(client, &format!("o{number}"), &pattern(number, LEN), hinted(GPU, false)).expect("room");
    }
    world.advance(1_000);
    let (tier, extent, generation) = world.place("o0").expect("o0");
    assert_eq!(tier, Tier::Host);
    assert_ne!((extent, generation), (held.extent, held.generation));
    assert_eq!(world.status(0).draining, 1);
    world.read((0, reader), &held, &pattern(0, LEN));
    world.assert_drained();
}

/// A peer that reads under a lease gets the bytes; one that remembers the place is told that they are not there.
#[test]
fn peers_that_know_the_old_place_get_the_bytes_or_ask_again() {
    let shape = Shape { threshold_bytes: Some(0), reached: vec![GPU], ..roomy() };
    let mut world = World::shaped(2, &shape);
    let (client, away) = (world.client(0, 1), world.client(1, 1));
    world.put_in(client, "k", &pattern(7, LEN), hinted(GPU, false)).expect("room");
    let get = |keep| ClientMessage::Get {
        key: key("k"),
        range: None,
        timeout_ms: 3_000,
        keep,
        threshold_bytes: None,
        tier: None,
    };
    world.hold_reads = true;
    let request = world.ask(1, away, get(false));
    world.settle();
    let demoted = world.nodes[0].moves;
    world.put_objects(client, 60, hinted(GPU, false));
    world.advance(u64::from(LEASE_MS) / 4);
    assert!(world.nodes[0].moves > demoted && world.tier_of("k") == Tier::Host);
    world.hold_reads = false;
    let read = world.held.pop().expect("a read");
    world.finish_read(read);
    world.settle();
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("no answer") };
    world.read((1, away), &located, &pattern(7, LEN));
    // From here on the place is remembered that it had when it was granted.
    let again = world.call(1, away, get(false)).expect("again");
    let ClientReply::Located(located) = again else { panic!("{again:?}") };
    world.read((1, away), &located, &pattern(7, LEN));
    world.advance(2 * u64::from(LEASE_MS));
    world.assert_drained();
}

#[test]
fn what_is_pinned_stays_also_if_it_is_pinned_while_it_moves() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    let pinned = PutHints { pin: true, ..hinted(GPU, false) };
    world.put_in(client, "pinned", &pattern(99, LEN), pinned).expect("room");
    world.put_objects(client, 50, hinted(GPU, false));
    world.hold_copies = true;
    for number in 50..54 {
        world.put_in_later(client, &format!("o{number}"), &pattern(number, LEN));
    }
    let moving: Vec<(usize, Generation)> = world.copies.clone();
    assert!(!moving.is_empty(), "something is on its way");
    for number in 0..50 {
        world
            .call(0, client, ClientMessage::Pin { key: key(&format!("o{number}")), pin: true })
            .expect("pinned");
    }
    world.finish_copies();
    for number in 0..50 {
        assert_eq!(world.tier_of(&format!("o{number}")), GPU, "o{number} was pinned in time");
    }
    assert_eq!(world.tier_of("pinned"), GPU);
    // All that may not move leaves no room for more.
    let refused =
        world.put_in(client, "big", &pattern(1, 60_000), PutHints { pin: true, ..hinted(GPU, false) });
    assert!(refused.is_ok(), "there is some");
    let (reservation, extent, _) =
        world.reserve_in(client, "big 2", 2 * MIB, hinted(GPU, false), Tier::Host).expect("host memory");
    world.write(0, extent, &pattern(2, 2 << 20));
    let error = world.seal(0, client, reservation).expect_err("no room on the GPU");
    assert!(matches!(error, StoreError::NoSpace { tier: GPU, .. }), "{error}");
    world.assert_drained();
}

#[test]
fn a_move_that_fails_or_is_overtaken_by_a_delete_changes_nothing_else() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    world.put_objects(client, 54, hinted(GPU, false));
    world.hold_copies = true;
    let new = [54, 55].map(|number| world.put_in_later(client, &format!("o{number}"), &pattern(number, LEN)));
    let (sealing, moving): (Vec<_>, Vec<_>) =
        std::mem::take(&mut world.copies).into_iter().partition(|(_, generation)| new.contains(generation));
    assert!(sealing.len() == 2 && !moving.is_empty(), "{sealing:?}, {moving:?}");
    for (node, generation) in sealing {
        world.feed(node, Input::CopyDone { generation, result: Ok(()) });
    }
    for (node, generation) in moving {
        let result = Err(StoreError::os("cuMemcpyBatchAsync", "the device is lost"));
        world.feed(node, Input::CopyDone { generation, result });
    }
    world.settle();
    assert_eq!(world.nodes[0].moves, 0, "none has moved");
    for number in 0..56 {
        let name = format!("o{number}");
        let located = world.get_in((0, client), &name, None, None).expect("it is there");
        world.read((0, client), &located, &pattern(number, LEN));
    }
    // They rest, and then it is tried again.
    world.copies.clear();
    world.advance(REST_MS + 3 * HEARTBEAT_MS);
    let under_way = world.copies.clone();
    assert!(!under_way.is_empty(), "it is tried again");
    for number in 0..56 {
        let delete = ClientMessage::Delete { key: key(&format!("o{number}")) };
        assert_eq!(world.call(0, client, delete), Ok(ClientReply::Deleted { existed: true }));
    }
    world.finish_copies();
    world.assert_drained();
    assert!(world.place("o0").is_none());
}

/// What fills the GPU was written there by a client, in memory granted to it: that makes way when it is empty.
#[test]
fn memory_granted_to_others_makes_way_when_nothing_is_left_in_it() {
    let mut world = World::shaped(1, &Shape { gpus: roomy_gpu(), ..roomy() });
    let (a, b) = (world.client(0, 1), world.client(0, 2));
    for number in 0..2 {
        world.put_from(a, &format!("a{number}"), &pattern(number, 1 << 20), GPU).expect("room");
    }
    let bytes = pattern(9, 3 << 20);
    let (reservation, extent, _) =
        world.reserve_in(b, "b", 3 * MIB, hinted(GPU, false), Tier::Host).expect("host memory");
    world.write(0, extent, &bytes);
    world.seal(0, b, reservation).expect("room on the GPU");
    assert_eq!((world.tier_of("b"), world.tier_of("a0"), world.tier_of("a1")), (GPU, Tier::Host, Tier::Host));
    for number in 0..2 {
        let located = world.get_in((0, a), &format!("a{number}"), None, None).expect("there");
        world.read((0, a), &located, &pattern(number, 1 << 20));
    }
    world.assert_drained();
}

/// One GPU, of which a client may have all.
fn roomy_gpu() -> Vec<GpuUse> {
    gpus(&[]).gpus.into_iter().take(1).map(|gpu| GpuUse { client_quota_bytes: CAPACITY, ..gpu }).collect()
}

#[test]
fn a_gpu_that_reads_an_object_again_keeps_it() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    let bytes = pattern(3, LEN);
    world.put(0, client, "k", &bytes);
    let range = Range { start: 10, len_bytes: 100 };
    for _ in 0..5 {
        let part = world.get_in((0, client), "k", Some(range), TierHint::from(GPU)).expect("a part");
        world.read((0, client), &part, &bytes[10..110]);
    }
    assert_eq!((world.tier_of("k"), world.nodes[0].moves), (Tier::Host, 0), "parts do not count");
    let first = world.read_on_gpu(client, "k", &bytes);
    assert_eq!((first.path, world.tier_of("k")), (Path::LocalCopy, Tier::Host), "once is not again");
    let second = world.read_on_gpu(client, "k", &bytes);
    assert_eq!(
        (second.path, world.tier_of("k")),
        (Path::LocalCopy, GPU),
        "with the copy that the reader was given"
    );
    assert_eq!(world.place("k").map(|(_, extent, _)| extent), Some(second.extent));
    let third = world.read_on_gpu(client, "k", &bytes);
    assert_eq!((third.path, world.nodes[0].moves), (Path::Local, 1));
    assert_eq!(world.status(0).counters.promoted, 1);
    // Where it is pinned it stays.
    let pinned = PutHints { pin: true, ..PutHints::default() };
    world.put_in(client, "pinned", &bytes, pinned).expect("room");
    for _ in 0..4 {
        world.read_on_gpu(client, "pinned", &bytes);
    }
    assert_eq!(world.tier_of("pinned"), Tier::Host);
    world.assert_drained();
}

/// More than the GPU has room for, read in turn for ever: what has found a place keeps it, and nothing goes back and forth.
#[test]
fn a_working_set_that_is_too_large_comes_to_rest() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    for number in 0..100 {
        world.put(0, client, &format!("o{number}"), &pattern(number, LEN));
    }
    let mut moves = Vec::new();
    for _ in 0..12 {
        for number in 0..100 {
            world.read_on_gpu(client, &format!("o{number}"), &pattern(number, LEN));
            world.advance(20);
        }
        world.advance(REST_MS);
        moves.push(world.nodes[0].moves);
    }
    assert!(moves[2] > 30, "it has filled the GPU: {moves:?}");
    assert_eq!(moves[2], moves[11], "and that was that: {moves:?}");
    assert_eq!(world.status(0).counters.demoted, 0);
    world.assert_drained();
}

#[test]
fn memory_of_a_gpu_that_nobody_uses_is_given_back() {
    let mut world = World::shaped(1, &roomy());
    let client = world.client(0, 1);
    world.put(0, client, "k", &pattern(1, LEN));
    world.read_on_gpu(client, "k", &pattern(1, LEN));
    let segments = |world: &World| world.status(0).tiers[1].segments;
    assert_eq!(segments(&world), 1);
    world.advance(3 * HEARTBEAT_MS);
    assert_eq!(segments(&world), 1, "not at once");
    world.advance(12 * HEARTBEAT_MS);
    assert_eq!(segments(&world), 0);
    world.read_on_gpu(client, "k", &pattern(1, LEN));
    world.read_on_gpu(client, "k", &pattern(1, LEN));
    world.advance(30 * HEARTBEAT_MS);
    assert_eq!((segments(&world), world.tier_of("k")), (1, GPU), "not while something is in it");
    world.assert_drained();
}

impl World {
    /// A put to the GPU that waits for its copy.
    fn put_in_later(&mut self, client: ClientId, name: &str, bytes: &[u8]) -> Generation {
        let (reservation, extent, _) = self
            .reserve_in(client, name, bytes.len() as u64, hinted(GPU, false), Tier::Host)
            .expect("host memory");
        self.write(0, extent, bytes);
        let seal = ClientMessage::Seal { reservation, checksum: crate::Checksum::None };
        self.ask(0, client, seal);
        self.settle();
        reservation
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put { name: u8, len: usize, tier: Tier, pin: bool },
    Read { name: u8, on_gpu: bool, hold: bool },
    LetGo,
    Delete(u8),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let tier = prop_oneof![Just(Tier::Host), Just(GPU), Just(GPU)];
    prop_oneof![
        5 => (0..24_u8, 1..300_000_usize, tier, prop::bool::weighted(0.1))
            .prop_map(|(name, len, tier, pin)| Step::Put { name, len, tier, pin }),
        5 => (0..24_u8, any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(name, on_gpu, hold)| Step::Read { name, on_gpu, hold }),
        1 => Just(Step::LetGo),
        1 => (0..24_u8).prop_map(Step::Delete),
        1 => (1..15_000_u64).prop_map(Step::Wait),
    ]
}

/// What should be there: the bytes of each object, and where it has to stay.
#[derive(Default)]
struct Model {
    objects: BTreeMap<u8, Vec<u8>>,
    pinned: BTreeMap<u8, Tier>,
    held: Vec<(Located, Vec<u8>)>,
    count: u8,
}

impl Model {
    fn take(&mut self, world: &mut World, client: ClientId, step: &Step) {
        match *step {
            Step::Put { name, len, tier, pin } => {
                self.count = self.count.wrapping_add(1);
                let bytes = pattern(self.count, len);
                let hints = PutHints { pin, ..hinted(tier, false) };
                let reserved = world.try_reserve(client, &format!("{name}"), len as u64, hints);
                let Some((reservation, extent, _)) = reserved else {
                    return assert!(self.objects.contains_key(&name), "an object of the key is there");
                };
                world.write(0, extent, &bytes);
                match world.seal(0, client, reservation) {
                    Ok(_) => {
                        self.objects.insert(name, bytes);
                        if pin {
                            self.pinned.insert(name, tier);
                        }
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
                }
            }
            Step::Read { name, on_gpu, hold } => {
                let tier = if on_gpu { GPU } else { Tier::Host };
                let hint = TierHint { tier, or_host: true };
                let Some(bytes) = self.objects.get(&name) else { return };
                let located = world.get_in((0, client), &format!("{name}"), None, hint).expect("it is there");
                assert_eq!(world.nodes[0].bytes(located.extent), bytes);
                if hold {
                    self.held.push((located, bytes.clone()));
                } else {
                    world.unpin(0, client, located.generation);
                }
            }
            Step::LetGo => self.let_go(world, client),
            Step::Delete(name) => {
                let delete = ClientMessage::Delete { key: key(&format!("{name}")) };
                let existed = self.objects.remove(&name).is_some();
                self.pinned.remove(&name);
                assert_eq!(world.call(0, client, delete), Ok(ClientReply::Deleted { existed }));
            }
            Step::Wait(ms) => world.advance(ms),
        }
    }

    fn let_go(&mut self, world: &mut World, client: ClientId) {
        for (located, bytes) in self.held.drain(..) {
            world.read((0, client), &located, &bytes);
        }
    }

    /// Every object is found with its bytes, those that are to stay where they were put, and held ones as they were.
    fn check(&self, world: &World) {
        let shown = world.nodes[0].index.len();
        assert_eq!(shown, self.objects.len(), "no object is lost, none comes back");
        for (name, bytes) in &self.objects {
            let (tier, extent, _) = world.place(&format!("{name}")).expect("it is shown");
            assert_eq!(world.nodes[0].tiers[&extent.segment], tier);
            assert!(world.nodes[0].bytes(extent) == &bytes[..], "the bytes of {name}");
            assert!(self.pinned.get(name).is_none_or(|of| *of == tier), "{name} was to stay");
        }
        for (located, bytes) in &self.held {
            assert!(world.nodes[0].bytes(located.extent) == &bytes[..], "what is held does not change");
        }
    }
}

impl World {
    fn try_reserve(
        &mut self,
        client: ClientId,
        name: &str,
        len_bytes: u64,
        hints: PutHints,
    ) -> Option<(Generation, Extent, Tier)> {
        let meta = ObjectMeta::bytes(len_bytes).expect("a length");
        let (key, if_exists, writes) = (key(name), IfExists::Keep, Tier::Host);
        let message = ClientMessage::Reserve { key, meta, hints, if_exists, writes };
        match self.call(0, client, message).expect("host memory") {
            ClientReply::Reserved { reservation, extent, tier, map } => {
                if map.is_some() {
                    let mapped = ClientMessage::Mapped { segment: extent.segment };
                    assert_eq!(self.call(0, client, mapped), Ok(ClientReply::Done));
                }
                Some((reservation, extent, tier))
            }
            ClientReply::Sealed { kept: true, .. } => None,
            other => panic!("reserve {name}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn objects_move_and_nobody_notices(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::shaped(1, &roomy());
        let client = world.client(0, 1);
        let mut model = Model::default();
        for step in &steps {
            model.take(&mut world, client, step);
            model.check(&world);
        }
        model.let_go(&mut world, client);
        world.advance(3 * REST_MS);
        model.check(&world);
        let on_gpu: BTreeSet<u8> =
            model.objects.keys().copied().filter(|name| world.tier_of(&format!("{name}")) == GPU).collect();
        let stays = on_gpu.iter().all(|name| model.pinned.contains_key(name));
        prop_assert!(world.on_gpu() <= HIGH || stays, "{} on the GPU: {:?}", world.on_gpu(), on_gpu);
        // Left alone, and with the same reads again and again, it comes to rest.
        let moves = world.nodes[0].moves;
        world.advance(3 * REST_MS);
        prop_assert_eq!(world.nodes[0].moves, moves, "nothing moves by itself");
        let mut counts = Vec::new();
        for _ in 0..6 {
            for name in model.objects.keys().copied().collect::<Vec<_>>() {
                model.take(&mut world, client, &Step::Read { name, on_gpu: true, hold: false });
            }
            world.advance(2 * REST_MS);
            counts.push(world.nodes[0].moves);
        }
        prop_assert_eq!(counts[3], counts[5], "no ping-pong: {:?}", counts);
        world.assert_drained();
    }
}
