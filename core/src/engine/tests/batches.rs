//! Many keys in one question: what that costs, and that each key fares as if it had been asked for alone.

use super::world::*;
use crate::engine::{Action, Input};
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Epoch, LinkId, NodeId, ObjectId};
use crate::wire::{
    Announced, BATCH_MESSAGES_MAX, BATCH_PAYLOAD_LEN_MAX, Batch, Batched, ClientMessage, ClientReply, Holder,
    KEYS_PER_MESSAGE_MAX, Located, Member, PROTOCOL_MAX, PROTOCOL_MIN, PeerMessage, Role,
};

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}{number}")).collect()
}

/// What an object of this name holds.
fn content(name: &str, len_bytes: usize) -> Vec<u8> {
    pattern(name.bytes().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte)), len_bytes)
}

fn eager() -> Shape {
    Shape { threshold_bytes: Some(u64::MAX), ..Shape::default() }
}

fn put_all(world: &mut World, node: usize, client: ClientId, names: &[String], len_bytes: usize) {
    for name in names {
        world.put(node, client, name, &content(name, len_bytes));
    }
}

/// Compares what was located with what was put, and lets go of it.
fn check(world: &mut World, node: usize, client: ClientId, name: &str, located: &Located) -> Path {
    let len = usize::try_from(located.meta.len_bytes).expect("short");
    assert_eq!(world.nodes[node].bytes(located.extent), content(name, len), "the bytes of {name}");
    world.unpin(node, client, located.generation);
    located.path
}

fn kind(result: &Result<Located, StoreError>) -> ErrorKind {
    result.as_ref().expect_err("an error").kind()
}

#[test]
fn a_batch_costs_one_frame_each_way_and_one_pass_for_each() {
    let mut world = World::shaped(3, &eager());
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    let (here, there) = (names("a", 15), names("b", 15));
    put_all(&mut world, 0, clients[0], &here, 101);
    put_all(&mut world, 2, clients[2], &there, 4_001);
    let all: Vec<String> = here.iter().zip(&there).flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
    // Node 1 learns who holds what, and links up.
    let request = world.ask_many(1, clients[1], &all, false);
    world.settle();
    for (name, located) in all.iter().zip(world.many(1, clients[1], request).expect("an answer")) {
        assert_eq!(check(&mut world, 1, clients[1], name, &located.expect("it was put")), Path::Eager);
    }
    world.advance(100);
    for node in 0..3 {
        world.nodes[node].frames.clear();
        world.nodes[node].passes = 0;
        world.nodes[node].landings = 0;
    }
    let request = world.ask_many(1, clients[1], &all, false);
    world.settle();
    let asked: Vec<usize> = world.nodes[1].frames.iter().map(Vec::len).collect();
    assert_eq!(asked, [15, 15], "one question to each of two peers");
    for owner in [0, 2] {
        let answered: Vec<usize> = world.nodes[owner].frames.iter().map(Vec::len).collect();
        assert_eq!(answered, [15], "one answer from node {owner}");
        // The question, and the end of the send.
        assert_eq!(world.nodes[owner].passes, 2, "passes of node {owner}");
    }
    assert_eq!(world.nodes[1].landings, 2);
    // The request, two answers, two landings, and a look at the pins after the first of these.
    assert!(world.nodes[1].passes <= 7, "{} passes", world.nodes[1].passes);
    for (name, located) in all.iter().zip(world.many(1, clients[1], request).expect("an answer")) {
        let located = located.expect("it was put");
        let carried = located.carried.as_ref().expect("it came from a peer");
        assert_eq!((carried.moved.bytes, carried.round_trips), (located.meta.len_bytes, 1));
        assert_eq!(check(&mut world, 1, clients[1], name, &located), Path::Eager);
    }
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn each_key_fares_as_if_it_were_alone() {
    for keep in [false, true] {
        let mut world = World::shaped(3, &Shape { threshold_bytes: Some(1_000), ..Shape::default() });
        let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
        put_all(&mut world, 1, clients[1], &["here".to_owned()], 50);
        put_all(&mut world, 0, clients[0], &names("eager", 2), 500);
        put_all(&mut world, 0, clients[0], &names("granted", 2), 5_000);
        put_all(&mut world, 0, clients[0], &["empty".to_owned()], 0);
        put_all(&mut world, 2, clients[2], &names("elsewhere", 2), 300);
        let mut all = vec!["here".to_owned(), "none".to_owned(), "empty".to_owned()];
        all.extend(names("granted", 2).into_iter().chain(names("elsewhere", 2)).chain(names("eager", 2)));
        let request = world.ask_many(1, clients[1], &all, keep);
        world.settle();
        let answer = world.many(1, clients[1], request).expect("an answer");
        let expected = [
            Some(Path::Local),
            None,
            Some(Path::Eager),
            Some(Path::Read),
            Some(Path::Read),
            Some(Path::Eager),
            Some(Path::Eager),
            Some(Path::Eager),
            Some(Path::Eager),
        ];
        assert_eq!(answer.len(), expected.len());
        for ((name, result), path) in all.iter().zip(&answer).zip(expected) {
            match path {
                Some(path) => {
                    let located = result.as_ref().expect("it was put");
                    assert_eq!(check(&mut world, 1, clients[1], name, located), path, "{name}");
                }
                None => assert_eq!(kind(result), ErrorKind::NotFound, "{name}"),
            }
        }
        assert_eq!(world.nodes[1].index.len(), if keep { 8 } else { 1 });
        world.assert_drained();
    }
}

#[test]
fn what_is_deleted_meanwhile_does_not_come_and_the_rest_does() {
    let mut world = World::shaped(2, &eager());
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let all = names("k", 5);
    put_all(&mut world, 0, home, &all, 100);
    let object = world.put(0, home, "k2", &[]);
    let request = world.ask_many(1, away, &all, true);
    // The answer has arrived, and its payload lands, when the delete comes.
    assert!(world.step() && world.step());
    let link = world.link_between(1, 0).expect("a link");
    let message = PeerMessage::Drop { key: key("k2"), object };
    world.feed(1, Input::PeerMessage { link, request: 77, message, payload_len: 0 });
    let delete = world.ask(0, home, ClientMessage::Delete { key: key("k2") });
    world.settle();
    assert!(world.answer(0, home, delete).is_some());
    world.advance(100);
    let answer = world.many(1, away, request).expect("an answer");
    for (number, (name, result)) in all.iter().zip(&answer).enumerate() {
        if number == 2 {
            assert_eq!(kind(result), ErrorKind::NotFound);
        } else {
            check(&mut world, 1, away, name, result.as_ref().expect("it is there"));
        }
    }
    assert!(world.nodes[1].index.values().all(|shown| shown.key != key("k2")));
    world.assert_drained();
}

#[test]
fn a_key_that_comes_twice_is_answered_twice() {
    for keep in [false, true] {
        let mut world = World::shaped(2, &eager());
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        put_all(&mut world, 0, home, &names("k", 2), 100);
        let all: Vec<String> = ["k0", "k1", "k0", "none", "k0", "none"].map(str::to_owned).into();
        let request = world.ask_many(1, away, &all, keep);
        world.settle();
        let answer = world.many(1, away, request).expect("an answer");
        let asked = world.nodes[1].sent.iter().filter(|m| matches!(m, PeerMessage::Get { .. })).count();
        // "No such object" is no answer to who came after the question.
        assert_eq!(asked, if keep { 3 + 1 } else { 6 }, "those that are kept share one fetch");
        for (name, result) in all.iter().zip(&answer) {
            if name == "none" {
                assert_eq!(kind(result), ErrorKind::NotFound);
            } else {
                check(&mut world, 1, away, name, result.as_ref().expect("it is there"));
            }
        }
        world.assert_drained();
        assert_eq!(world.used(1), if keep { 256 } else { 0 });
    }
}

#[test]
fn where_there_is_no_room_for_some_the_rest_is_there() {
    let shape = Shape { capacity_bytes: 512 << 10, quota_bytes: 0, ..eager() };
    let mut world = World::shaped(2, &Shape { capacity_bytes: 8 << 20, ..eager() });
    let small = world.add(config(2, 1, vec!["a0".to_owned()], &shape));
    let (home, away) = (world.client(0, 1), world.client(small, 1));
    // 16 of them fill the small node.
    let all = names("k", 20);
    put_all(&mut world, 0, home, &all, 32 << 10);
    let request = world.ask_many(small, away, &all, false);
    world.advance(200);
    let answer = world.many(small, away, request).expect("an answer");
    let there = answer.iter().filter(|result| result.is_ok()).count();
    assert_eq!(there, 16);
    for (name, result) in all.iter().zip(&answer) {
        match result {
            Ok(located) => {
                check(&mut world, small, away, name, located);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
    }
    world.assert_drained();
    assert_eq!(world.used(small), 0);
}

#[test]
fn a_link_that_breaks_costs_only_what_was_not_there() {
    let mut world = World::shaped(3, &Shape { threshold_bytes: Some(1_000), ..Shape::default() });
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    world.hold_reads = true;
    put_all(&mut world, 2, clients[2], &names("eager", 3), 500);
    put_all(&mut world, 2, clients[2], &names("granted", 3), 5_000);
    put_all(&mut world, 0, clients[0], &names("safe", 3), 500);
    let all: Vec<String> = ["eager", "granted", "safe"].iter().flat_map(|prefix| names(prefix, 3)).collect();
    let request = world.ask_many(1, clients[1], &all, true);
    world.settle();
    assert_eq!(world.held.len(), 3, "reads are under way, all else has come");
    assert!(world.many(1, clients[1], request).is_none());
    assert_eq!(world.nodes[1].items[&(clients[1], request)].len(), 6);
    let link = world.link_between(1, 2).expect("a link");
    let to_directory = world.link_between(2, 0).expect("a link");
    world.unreachable.insert("a2".to_owned());
    world.cut(1, link);
    world.cut(2, to_directory);
    world.unreachable.insert("a0".to_owned());
    world.advance(4_000);
    let answer = world.many(1, clients[1], request).expect("an answer");
    for (name, result) in all.iter().zip(&answer) {
        if name.starts_with("granted") {
            assert_eq!(kind(result), ErrorKind::PeerLost, "{name}");
        } else {
            check(&mut world, 1, clients[1], name, result.as_ref().expect("it had come"));
        }
    }
    world.unreachable.clear();
    world.hold_reads = false;
    world.advance(3_000);
    world.assert_drained();
}

#[test]
fn a_client_that_leaves_leaves_nothing_of_its_batch() {
    for keep in [false, true] {
        let mut world = World::shaped(2, &Shape { threshold_bytes: Some(1_000), ..Shape::default() });
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        put_all(&mut world, 0, home, &names("eager", 3), 500);
        put_all(&mut world, 0, home, &names("granted", 3), 5_000);
        world.hold_reads = true;
        let all: Vec<String> = ["eager", "granted"].iter().flat_map(|prefix| names(prefix, 3)).collect();
        let _ = world.ask_many(1, away, &all, keep);
        world.settle();
        assert_eq!((world.held.len(), world.nodes[1].pins[&away].len()), (3, 3));
        world.leave(1, away);
        world.hold_reads = false;
        assert!(world.held.is_empty(), "what nobody waits for is given up");
        world.assert_drained();
        assert_eq!(world.used(1), if keep { 3 * 512 } else { 0 });
        assert!(world.nodes[1].engine.next_timer().expect("heartbeats") <= world.now.after_ms(HEARTBEAT_MS));
    }
}

#[test]
fn a_batch_that_is_late_keeps_what_it_has() {
    let mut world = World::shaped(2, &Shape { threshold_bytes: Some(1_000), ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    put_all(&mut world, 0, home, &["eager".to_owned()], 500);
    put_all(&mut world, 0, home, &["granted".to_owned()], 5_000);
    world.hold_reads = true;
    let all = ["eager", "granted"].map(str::to_owned);
    let request = world.ask_many(1, away, &all, false);
    world.advance(2_999);
    assert!(world.many(1, away, request).is_none());
    world.advance(2);
    let answer = world.many(1, away, request).expect("an answer");
    check(&mut world, 1, away, "eager", answer[0].as_ref().expect("it had come"));
    assert_eq!(kind(&answer[1]), ErrorKind::TimedOut);
    world.hold_reads = false;
    world.assert_drained();
}

#[test]
fn frames_end_where_their_bounds_are() {
    let shape = Shape { capacity_bytes: 64 << 20, objects_max: 10_000, ..eager() };
    let mut world = World::shaped(2, &shape);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    // An extent of its own for each: none of the lengths fills its last granule.
    for (count, len_bytes) in [(100, 100), (30, 100_001), (3, 1_500_000)] {
        let all: Vec<String> = names(&format!("{len_bytes}-"), count);
        for name in &all {
            let bytes = content(name, len_bytes);
            if len_bytes <= 60_000 {
                world.put(0, home, name, &bytes);
                continue;
            }
            let Ok(crate::wire::ClientReply::Reserved { reservation, extent, map, .. }) =
                world.reserve(0, home, name, len_bytes as u64)
            else {
                panic!("room")
            };
            world.write(0, extent, &bytes);
            if map.is_some() {
                let _ = world.call(0, home, ClientMessage::Mapped { segment: extent.segment });
            }
            assert!(world.seal(0, home, reservation).is_ok());
        }
        world.nodes[0].frames.clear();
        world.nodes[1].frames.clear();
        let request = world.ask_many(1, away, &all, false);
        world.settle();
        for (name, located) in all.iter().zip(world.many(1, away, request).expect("an answer")) {
            check(&mut world, 1, away, name, &located.expect("it was put"));
        }
        assert_eq!(world.nodes[1].frames.len(), 1, "all questions are one");
        let answers = &world.nodes[0].frames;
        for frame in answers {
            let payload_len: u64 = frame.iter().map(|batched| batched.payload_len).sum();
            assert!(frame.len() <= GATHER_MAX);
            assert!(payload_len <= BATCH_PAYLOAD_LEN_MAX || frame.len() == 1, "{payload_len} bytes");
        }
        let per_frame = GATHER_MAX.min(usize::try_from(BATCH_PAYLOAD_LEN_MAX).expect("short") / len_bytes);
        assert_eq!(answers.len(), count.div_ceil(per_frame.max(1)));
    }
    world.assert_drained();
}

#[test]
fn a_thousand_neighbours_are_one_extent() {
    let shape = Shape { capacity_bytes: 64 << 20, objects_max: 10_000, ..eager() };
    let mut world = World::shaped(2, &shape);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let all = names("k", 1_000);
    put_all(&mut world, 0, home, &all, 64);
    world.nodes[0].frames.clear();
    let request = world.ask_many(1, away, &all, true);
    world.settle();
    assert!(world.many(1, away, request).expect("an answer").iter().all(Result::is_ok));
    let answers: Vec<usize> = world.nodes[0].frames.iter().map(Vec::len).collect();
    assert!(answers[0] > 900, "few extents although {GATHER_MAX} are gathered at most: {answers:?}");
    // What was kept is announced at once, and so is what goes again.
    let announced = |message: &PeerMessage| match message {
        PeerMessage::Announce { objects, .. } => Some(objects.len()),
        _ => None,
    };
    let counts: Vec<usize> = world.nodes[1].sent.iter().filter_map(announced).collect();
    assert_eq!(counts.iter().sum::<usize>(), 1_000);
    assert!(counts.len() <= answers.len(), "{counts:?} announced after {answers:?} answers");
    world.assert_drained_but(1, away);
}

/// Announcements and withdrawals of one key reach the directory in their order, whatever they are merged with.
#[test]
fn announcing_and_withdrawing_keep_their_order() {
    let shape = Shape { capacity_bytes: 512 << 10, quota_bytes: 0, ..eager() };
    let mut world = World::shaped(1, &Shape { capacity_bytes: 8 << 20, ..eager() });
    let small = world.add(config(1, 1, vec!["a0".to_owned()], &shape));
    let (home, away) = (world.client(0, 1), world.client(small, 1));
    let all = names("k", 40);
    put_all(&mut world, 0, home, &all, 32 << 10);
    // More than fits: each that comes drives out others, some of them again and again.
    for round in 0..6 {
        let some: Vec<String> = all.iter().cycle().skip(round * 7).take(12).cloned().collect();
        let request = world.ask_many(small, away, &some, true);
        world.advance(200);
        for (name, located) in some.iter().zip(world.many(small, away, request).expect("an answer")) {
            check(&mut world, small, away, name, &located.expect("room is made"));
        }
    }
    world.advance(200);
    assert!(world.status(small).counters.evicted > 10);
    for name in &all {
        let here = world.nodes[small].index.values().any(|shown| shown.key == key(name));
        let stat = ClientMessage::Stat { key: key(name), timeout_ms: 1_000 };
        let Ok(crate::wire::ClientReply::Stat { holders, .. }) = world.call(0, home, stat) else {
            panic!("a stat")
        };
        assert_eq!(holders.contains(&"n1".to_owned()), here, "{name}: {holders:?}");
    }
    world.assert_drained();
}

#[test]
fn questions_that_cannot_be_are_refused() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    World::assert_kind(
        world.call(
            0,
            client,
            ClientMessage::GetMany {
                keys: vec![],
                timeout_ms: 1,
                keep: true,
                threshold_bytes: None,
                tier: None,
            },
        ),
        ErrorKind::Invalid,
    );
    let many = |count: usize, timeout_ms| ClientMessage::GetMany {
        keys: names("none", count).iter().map(|name| key(name)).collect(),
        timeout_ms,
        keep: true,
        threshold_bytes: None,
        tier: None,
    };
    World::assert_kind(world.call(0, client, many(KEYS_PER_MESSAGE_MAX + 1, 1)), ErrorKind::Invalid);
    // A peer that never answers keeps what is asked of it waiting.
    let liar = Liar::join(&mut world, &names("none", KEYS_PER_MESSAGE_MAX));
    let first = world.ask(0, client, many(2, 5_000));
    let (message, payload) = (many(1, 1), bytes::Bytes::new());
    let again = Input::ClientRequest { client, request: first, message, payload };
    let refused = world.nodes[0].engine.handle(world.now, again);
    let [Action::Reply { reply: Err(error), .. }] = &refused[..] else { panic!("{refused:?}") };
    assert_eq!(error.kind(), ErrorKind::Protocol, "a number that is in use: {error}");
    let waiting: Vec<u64> =
        (0..63).map(|_| world.ask(0, client, many(KEYS_PER_MESSAGE_MAX, 5_000))).collect();
    World::assert_kind(world.call(0, client, many(KEYS_PER_MESSAGE_MAX, 1)), ErrorKind::Busy);
    let other = world.client(0, 2);
    assert!(world.call(0, other, ClientMessage::Status).is_ok(), "others are not affected");
    liar.leave(&mut world);
    world.advance(6_000);
    for request in waiting {
        let answer = world.many(0, client, request).expect("an answer");
        assert!(answer.len() == KEYS_PER_MESSAGE_MAX && answer.iter().all(Result::is_err));
    }
    assert_eq!(world.many(0, client, first).expect("an answer").len(), 2);
    world.assert_drained();
}

// Peers that are played by the test.

const fn beat() -> PeerMessage {
    PeerMessage::Heartbeat { room_bytes: 0, under_replicated: 0 }
}

struct Liar {
    link: LinkId,
}

impl Liar {
    const NODE: NodeId = NodeId(50);

    /// Joins node 0, and says that it holds these.
    fn join(world: &mut World, names: &[String]) -> Self {
        let link = LinkId(900);
        let address = "liar".to_owned();
        let member = Member { node: Self::NODE, epoch: Epoch(1), name: "liar".to_owned(), address };
        let address = "liar".to_owned();
        world.feed(0, Input::LinkUp { link, fabric: FABRIC, address, inbound: true });
        let (version_min, version_max) = (PROTOCOL_MIN, PROTOCOL_MAX);
        let liar = Self { link };
        liar.says(world, 0, PeerMessage::Hello { member, version_min, version_max, keeps: false }, 0);
        liar.says(world, 0, PeerMessage::Join { heir: false }, 0);
        let objects = (0..).zip(names).map(|(number, name)| {
            let len_bytes = 100;
            let (object, role) = (Self::object(number), Role::Original);
            Announced { key: key(name), object, len_bytes, role, replicas: 0, ttl_ms: None }
        });
        liar.says(world, 1, PeerMessage::Announce { objects: objects.collect(), exclusive: false }, 0);
        world.nodes[0].frames.clear();
        liar
    }

    fn object(number: u64) -> ObjectId {
        ObjectId { origin: Self::NODE, epoch: Epoch(1), number }
    }

    fn says(&self, world: &mut World, request: u64, message: PeerMessage, payload_len: u64) {
        world.feed(0, Input::PeerMessage { link: self.link, request, message, payload_len });
    }

    fn leave(&self, world: &mut World) {
        let why = StoreError::unavailable("the liar", "it has gone");
        world.feed(0, Input::LinkDown { link: self.link, why });
    }

    /// DATA of 100 bytes in answer to this request.
    fn data(request: u64) -> Batched {
        let meta = ObjectMeta::bytes(100).expect("a length");
        let message =
            PeerMessage::Data { object: Self::object(request), meta, origin: crate::wire::Origin::HOST };
        Batched { request, payload_len: 100, message }
    }

    /// A frame of the liar arrives, with its payload.
    fn answers(&self, world: &mut World, batch: Vec<Batched>, payload: &[u8]) {
        let payload_len = payload.len() as u64;
        let input = Input::PeerBatch { link: self.link, batch: Batch(batch), payload_len };
        world.feed_payload(0, input, payload);
        world.settle();
    }
}

/// A node that has asked the liar for three keys, and the numbers of the questions.
fn asking() -> (World, ClientId, Liar, u64, Vec<u64>) {
    let mut world = World::shaped(1, &eager());
    let client = world.client(0, 1);
    let all = names("k", 3);
    let liar = Liar::join(&mut world, &all);
    let request = world.ask_many(0, client, &all, false);
    let asked = world.nodes[0].frames.pop().expect("a question");
    assert!(asked.iter().all(|batched| matches!(batched.message, PeerMessage::Get { .. })));
    let numbers: Vec<u64> = asked.iter().map(|batched| batched.request).collect();
    assert_eq!(numbers.len(), 3);
    (world, client, liar, request, numbers)
}

#[test]
fn an_answer_to_a_part_is_one_and_the_rest_waits() {
    let (mut world, client, liar, request, asked) = asking();
    let payload = pattern(1, 200);
    liar.answers(&mut world, vec![Liar::data(asked[2]), Liar::data(asked[0])], &payload);
    assert!(world.many(0, client, request).is_none());
    let failed = PeerMessage::Failed { error: StoreError::not_found("get", "k1") };
    liar.says(&mut world, asked[1], failed, 0);
    world.advance(3_100);
    let answer = world.many(0, client, request).expect("an answer");
    let bytes = |world: &World, at: usize| {
        let located = answer[at].as_ref().expect("it came");
        world.nodes[0].bytes(located.extent).to_vec()
    };
    assert_eq!((bytes(&world, 2), bytes(&world, 0)), (payload[..100].to_vec(), payload[100..].to_vec()));
    assert!(answer[1].is_err());
}

#[test]
fn answers_may_name_others_and_the_same_question_only_once() {
    let (mut world, client, liar, request, asked) = asking();
    let holders = vec![Holder { node: NodeId(77), address: "nowhere".to_owned() }];
    let located = Batched { request: asked[1], payload_len: 0, message: PeerMessage::Located { holders } };
    // The second DATA for one question, and one for a question that nobody has asked, are skipped.
    let (twice, stray) = (Liar::data(asked[0]), Liar::data(9_999));
    let batch = vec![Liar::data(asked[0]), twice, stray, located, Liar::data(asked[2])];
    let payload = pattern(3, 400);
    liar.answers(&mut world, batch, &payload);
    assert_eq!(world.status(0).counters.refused, 0);
    world.advance(3_100);
    let answer = world.many(0, client, request).expect("an answer");
    for (at, place) in [(0, 0), (2, 300)] {
        let located = answer[at].as_ref().expect("it came");
        assert_eq!(world.nodes[0].bytes(located.extent), &payload[place..place + 100]);
        world.unpin(0, client, located.generation);
    }
    assert!(answer[1].is_err(), "nobody is there");
    liar.leave(&mut world);
    world.assert_drained();
}

#[test]
fn hostile_batches_are_refused_as_a_whole_and_cost_nothing() {
    let long = |asked: u64| Batched { payload_len: 101, ..Liar::data(asked) };
    let heavy = Batched { request: 0, payload_len: 100, message: beat() };
    let answer = Batched { request: 0, payload_len: 0, message: beat() };
    type Lie = Box<dyn Fn(&[u64]) -> Vec<Batched>>;
    let lies: Vec<(Lie, usize, &str)> = vec![
        (Box::new(|_| Vec::new()), 0, "no messages"),
        (Box::new(move |_| vec![answer.clone(); BATCH_MESSAGES_MAX + 1]), 0, "too many"),
        (Box::new(|asked| vec![Liar::data(asked[0]), Liar::data(asked[1])]), 199, "a byte too few"),
        (Box::new(|asked| vec![Liar::data(asked[0]), Liar::data(asked[1])]), 201, "a byte too many"),
        (Box::new(move |asked| vec![Liar::data(asked[0]), heavy.clone()]), 200, "a heavy heartbeat"),
        (
            Box::new(|asked| {
                vec![Liar::data(asked[0]), Batched { payload_len: u64::MAX, ..Liar::data(asked[1]) }]
            }),
            99,
            "a sum that overflows",
        ),
    ];
    for (lie, payload_len, what) in lies {
        let (mut world, client, liar, request, asked) = asking();
        liar.answers(&mut world, lie(&asked), &pattern(1, payload_len));
        assert_eq!(world.status(0).counters.refused, 1, "{what}");
        assert_eq!(world.used(0), 0, "{what}: nothing is believed of it");
        liar.leave(&mut world);
        world.advance(3_100);
        let answer = world.many(0, client, request).expect("an answer");
        assert!(answer.iter().all(Result::is_err), "{what}");
        world.assert_drained();
    }
    // A length that is not the object's is an error of its key alone.
    let (mut world, client, liar, request, asked) = asking();
    let payload = pattern(5, 201);
    liar.answers(&mut world, vec![long(asked[0]), Liar::data(asked[1])], &payload);
    liar.leave(&mut world);
    world.advance(3_100);
    let answer = world.many(0, client, request).expect("an answer");
    assert_eq!(kind(&answer[0]), ErrorKind::Protocol);
    let located = answer[1].as_ref().expect("it came");
    assert_eq!(world.nodes[0].bytes(located.extent), &payload[101..]);
    world.unpin(0, client, located.generation);
    world.assert_drained();
    // What follows a message that is refused is not heard.
    let (mut world, client, liar, request, asked) = asking();
    let refused = Batched {
        request: 0,
        payload_len: 0,
        message: PeerMessage::Failed { error: StoreError::denied("join", "go away") },
    };
    liar.answers(&mut world, vec![refused.clone(), refused, Liar::data(asked[0])], &pattern(1, 100));
    assert_eq!(world.status(0).counters.refused, 1, "once, however many there are");
    liar.leave(&mut world);
    world.advance(3_100);
    assert!(world.many(0, client, request).expect("an answer").iter().all(Result::is_err));
    world.assert_drained();
}

/// That a node has let go of an object may be heard before its answer that it has it: two nodes that have dialled each
/// other have two links for a while.
#[test]
fn an_answer_that_is_out_of_date_does_not_get_into_the_books() {
    let mut world = World::shaped(1, &eager());
    let client = world.client(0, 1);
    let all = names("k", 1);
    let liar = Liar::join(&mut world, &all);
    let list = || ClientMessage::List { prefix: String::new(), after: None, limit: 10 };
    let gone = announced(&all[0], Liar::object(0), 100);
    liar.says(&mut world, 0, PeerMessage::Withdraw { objects: vec![gone.clone()] }, 0);
    let request = world.ask_many(0, client, &all, false);
    let asked = world.nodes[0].frames.pop().expect("a question").remove(0);
    assert!(matches!(asked.message, PeerMessage::Ask { .. }));
    liar.says(&mut world, asked.request, PeerMessage::Asked { object: Some(gone) }, 0);
    world.settle();
    let Ok(ClientReply::Listed { objects, .. }) = world.call(0, client, list()) else { panic!("a list") };
    assert!(objects.is_empty(), "{objects:?}");
    world.advance(3_100);
    assert!(world.many(0, client, request).expect("an answer")[0].is_err());
    liar.leave(&mut world);
    world.assert_drained();
}
