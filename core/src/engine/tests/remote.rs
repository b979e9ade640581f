//! Gets from another node: eager and by Read, leases, and what is never believed.

use super::world::*;
use crate::engine::Input;
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::ClientId;
use crate::wire::{ClientMessage, ClientReply, IfExists, PeerMessage, PutHints, Range};

pub(super) fn reading() -> Shape {
    Shape { threshold_bytes: Some(0), ..Shape::default() }
}

#[test]
fn small_objects_come_inside_the_answer_and_large_ones_are_read() {
    let mut world = World::shaped(2, &Shape { threshold_bytes: Some(32 << 10), ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    for (name, len_bytes, expected) in [
        ("small", 1_000, Path::Eager),
        ("edge", 32 << 10, Path::Eager),
        ("large", (32 << 10) + 1, Path::Read),
    ] {
        let bytes = pattern(1, len_bytes);
        world.put(0, home, name, &bytes);
        assert_eq!(world.fetch(1, away, name, &bytes), expected, "{name}");
        assert_eq!(world.fetch(1, away, name, &bytes), Path::Local, "{name} was kept");
    }
    world.put(1, away, "other way", &pattern(2, 100));
    world.fetch(0, home, "other way", &pattern(2, 100));
    assert_eq!((world.status(1).counters.eager, world.status(1).counters.read), (2, 1));
    world.assert_drained();
}

#[test]
fn the_threshold_can_be_forced() {
    for (threshold, path) in [(0, Path::Read), (u64::MAX, Path::Eager)] {
        let mut world = World::shaped(2, &Shape { threshold_bytes: Some(threshold), ..Shape::default() });
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 60_000);
        world.put(0, home, "k", &bytes);
        assert_eq!(world.fetch(1, away, "k", &bytes), path);
        world.put(0, home, "empty", &[]);
        assert_eq!(world.fetch(1, away, "empty", &[]), Path::Eager);
        world.assert_drained();
    }
}

#[test]
fn what_is_not_kept_is_gone_after_its_reader() {
    for shape in [Shape::default(), reading()] {
        let mut world = World::shaped(2, &shape);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 1_000);
        world.put(0, home, "k", &bytes);
        let request = world.ask_get(1, away, "k", false);
        world.settle();
        let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else {
            panic!("located");
        };
        assert_eq!(world.nodes[1].bytes(located.extent), bytes);
        assert!(world.nodes[1].index.is_empty());
        assert_eq!(world.status(1).draining, 1);
        world.unpin(1, away, located.generation);
        world.assert_drained();
        assert_eq!(world.used(1), 0);
    }
}

#[test]
fn parts_travel_alone() {
    for shape in [Shape::default(), reading()] {
        let mut world = World::shaped(2, &shape);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 60_000);
        world.put(0, home, "k", &bytes);
        let part = |start, len_bytes| ClientMessage::Get {
            key: key("k"),
            range: Some(Range { start, len_bytes }),
            timeout_ms: 1_000,
            keep: true,
            threshold_bytes: None,
            tier: None,
        };
        let Ok(ClientReply::Located(located)) = world.call(1, away, part(100, 500)) else {
            panic!("located")
        };
        assert_eq!(world.nodes[1].bytes(located.extent), &bytes[100..600]);
        assert_eq!(located.meta.len_bytes, 60_000);
        World::assert_kind(world.call(1, away, part(59_999, 2)), ErrorKind::Invalid);
        world.unpin(1, away, located.generation);
        world.assert_drained();
        assert_eq!(world.used(1), 0, "a part is not kept");
    }
}

#[test]
fn stat_exists_and_wait_ask_the_owner() {
    let mut world = World::new(2);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let exists = || ClientMessage::Wait { key: key("k"), timeout_ms: 0 };
    World::assert_kind(world.call(1, away, exists()), ErrorKind::TimedOut);
    let wait = world.ask(1, away, ClientMessage::Wait { key: key("k"), timeout_ms: 10_000 });
    let back = world.ask(0, home, ClientMessage::Wait { key: key("b"), timeout_ms: 10_000 });
    world.settle();
    assert!(world.answer(1, away, wait).is_none());
    let object = world.put(0, home, "k", &[1, 2, 3]);
    assert_eq!(world.answer(1, away, wait), Some(Ok(ClientReply::Exists)), "by WATCH and EXISTS");
    world.put(1, away, "b", &[4]);
    assert_eq!(world.answer(0, home, back), Some(Ok(ClientReply::Exists)), "by the announcement");
    assert_eq!(world.call(1, away, exists()), Ok(ClientReply::Exists));
    let stat = ClientMessage::Stat { key: key("k"), timeout_ms: 1_000 };
    let expected = ClientReply::Stat {
        object,
        meta: ObjectMeta::bytes(3).expect("a length"),
        tier: None,
        pinned: false,
        holders: vec!["n0".to_owned()],
    };
    assert_eq!(world.call(1, away, stat), Ok(expected));
    assert_eq!(world.used(1), 64, "only its own object is there");
    World::assert_kind(world.get(1, away, "nothing"), ErrorKind::NotFound);
    world.assert_drained();
}

#[test]
fn one_fetch_serves_all_who_ask_meanwhile() {
    let mut world = World::shaped(2, &reading());
    world.hold_reads = true;
    let (home, one, two) = (world.client(0, 1), world.client(1, 1), world.client(1, 2));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    let requests = [(one, world.ask_get(1, one, "k", true)), (two, world.ask_get(1, two, "k", true))];
    world.settle();
    assert_eq!(world.held.len(), 1);
    let read = world.held.remove(0);
    world.finish_read(read);
    world.settle();
    for (client, request) in requests {
        let Some(Ok(ClientReply::Located(located))) = world.answer(1, client, request) else {
            panic!("located");
        };
        assert_eq!(world.nodes[1].bytes(located.extent), bytes);
        world.unpin(1, client, located.generation);
    }
    world.assert_drained();
}

#[test]
fn a_lease_holds_the_extent_until_it_is_released() {
    let mut world = World::shaped(2, &reading());
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    let request = world.ask_get(1, away, "k", false);
    world.settle();
    assert_eq!(world.status(0).leases, 1);
    let evict = ClientMessage::Evict { key: key("k"), force: true };
    assert_eq!(world.call(0, home, evict), Ok(ClientReply::Done));
    world.advance(200);
    assert_eq!(world.status(0).draining, 1);
    assert_eq!(world.used(0), 1_024, "the extent waits for the lease");
    let read = world.held.remove(0);
    world.finish_read(read);
    world.settle();
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("located") };
    assert_eq!(world.nodes[1].bytes(located.extent), bytes);
    world.unpin(1, away, located.generation);
    world.assert_drained();
    assert_eq!(world.used(0), 0);
}

#[test]
fn a_lease_ends_with_its_time_and_the_late_read_is_no_success() {
    let mut world = World::shaped(2, &reading());
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 1_000));
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    let _ = world.call(0, home, ClientMessage::Evict { key: key("k"), force: true });
    world.advance(u64::from(LEASE_MS) - 1);
    assert_eq!((world.status(0).draining, world.status(0).leases), (1, 1));
    world.advance(1);
    assert_eq!((world.status(0).draining, world.status(0).leases), (0, 0));
    // The extent is used again before the read is through.
    world.put(0, home, "other", &pattern(2, 1_000));
    let read = world.held.remove(0);
    world.finish_read(read);
    world.settle();
    world.advance(3_000);
    World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::NotFound);
    world.assert_drained();
}

#[test]
fn a_read_counts_only_within_four_fifths_of_its_lease() {
    for (after_ms, expected) in [(800, 0), (801, 1)] {
        let mut world = World::shaped(2, &reading());
        (world.hold_reads, world.hold_words) = (true, true);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 1_000);
        world.put(0, home, "k", &bytes);
        let request = world.ask_get(1, away, "k", true);
        world.settle();
        world.advance(after_ms);
        let read = world.held.remove(0);
        world.finish_read(read);
        world.settle();
        assert_eq!(world.answer(1, away, request).is_some(), expected == 0, "after {after_ms} ms");
        assert_eq!(world.words.len(), expected, "the word is read after {after_ms} ms");
        for word in std::mem::take(&mut world.words) {
            world.finish_word(word);
        }
        world.settle();
        assert_eq!(world.answer(1, away, request).is_some(), expected == 1, "the word was unchanged");
        world.assert_drained();
    }
}

#[test]
fn a_lease_ends_with_its_link() {
    let mut world = World::shaped(2, &reading());
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    assert_eq!(world.status(0).leases, 1);
    let link = world.link_between(1, 0).expect("a link");
    world.cut(1, link);
    world.settle();
    assert_eq!(world.status(0).leases, 0);
    assert!(world.answer(1, away, request).is_none(), "it is tried again");
    world.hold_reads = false;
    world.advance(500);
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("located") };
    assert_eq!(world.nodes[1].bytes(located.extent), bytes);
    world.unpin(1, away, located.generation);
    world.assert_drained();
}

#[test]
fn only_the_link_that_got_a_lease_gives_it_back() {
    let mut world = World::shaped(3, &reading());
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 1_000));
    let _ = world.ask_get(1, away, "k", true);
    world.settle();
    let mut leases = world.nodes[0].sent.iter().filter_map(|message| match message {
        PeerMessage::Grant { granted, .. } => Some(granted.lease),
        _ => None,
    });
    let lease = leases.next_back().expect("a grant");
    let stranger = world.link_between(0, 2).expect("a link");
    let release = Input::PeerMessage {
        link: stranger,
        request: 0,
        message: PeerMessage::Release { lease },
        payload_len: 0,
    };
    world.feed(0, release);
    assert_eq!(world.status(0).leases, 1);
}

#[test]
fn a_send_holds_its_extent_until_it_is_done() {
    let mut world = World::new(2);
    world.hold_sends = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    world.fetch(1, away, "k", &bytes);
    let _ = world.call(0, home, ClientMessage::Delete { key: key("k") });
    world.advance(5_000);
    assert_eq!((world.status(0).draining, world.used(0)), (1, 1_024));
    for (node, send) in std::mem::take(&mut world.sends) {
        world.feed(node, Input::SendDone { send });
    }
    world.assert_drained();
    assert_eq!((world.used(0), world.used(1)), (0, 0));
}

/// A client of the second node, and its request, whose read from the first is under way.
fn reading_one() -> (World, ClientId, u64) {
    let mut world = World::shaped(2, &reading());
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 1_000));
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    (world, away, request)
}

#[test]
fn a_get_that_was_given_up_frees_its_extent_when_the_read_has_ended() {
    let (mut world, away, request) = reading_one();
    let transfer = world.held[0].transfer;
    world.held.clear();
    world.advance(3_000);
    World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::TimedOut);
    assert_eq!(world.used(1), 1_024, "bytes may still land in it");
    world.feed(1, Input::ReadDone { transfer, result: Ok(crate::engine::ReadEnd::default()) });
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn what_the_owner_has_written_is_not_said_to_have_been_read() {
    let (mut world, away, request) = reading_one();
    let transfer = world.held[0].transfer;
    world.held.clear();
    let end = crate::engine::ReadEnd { pushed: true, ..Default::default() };
    world.feed(1, Input::ReadDone { transfer, result: Ok(end) });
    world.settle();
    match world.answer(1, away, request) {
        Some(Ok(ClientReply::Located(located))) => assert_eq!(located.path, Path::Push),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_that_leaves_ends_its_fetch() {
    let (mut world, away, _) = reading_one();
    assert_eq!(world.held.len(), 1);
    world.leave(1, away);
    assert!(world.held.is_empty(), "the read was given up");
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn a_grant_that_comes_too_late_is_given_back() {
    let mut world = World::shaped(2, &reading());
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 1_000));
    // The question is under way when its asker leaves.
    let _ = world.ask_get(1, away, "k", true);
    world.feed(1, Input::ClientLeft { client: away });
    world.settle();
    assert_eq!(world.status(0).counters.served_grants, 1);
    world.assert_drained();
}

#[test]
fn answers_that_do_not_fit_the_question_are_errors() {
    let mut world = World::new(2);
    let away = world.client(1, 1);
    let request = world.ask_get(1, away, "k", true);
    let link = world.link_between(1, 0).expect("a link");
    let asked = 1 + u64::try_from(world.nodes[1].sent.len()).expect("few");
    let meta = ObjectMeta::bytes(10).expect("a length");
    let object = crate::ObjectId { origin: crate::NodeId(1), epoch: crate::Epoch(1), number: 1 };
    for guess in 1..asked + 1 {
        let message = PeerMessage::Data { object, meta, origin: crate::wire::Origin::HOST };
        world.feed(1, Input::PeerMessage { link, request: guess, message, payload_len: 9 });
    }
    World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::Protocol);
    let stray = PeerMessage::Announced { refused: vec![key("k")] };
    world.feed(1, Input::PeerMessage { link, request: 999, message: stray, payload_len: 0 });
    let heavy = PeerMessage::Alive;
    world.feed(1, Input::PeerMessage { link, request: 0, message: heavy, payload_len: 9 });
    assert_eq!(world.status(1).counters.refused, 1);
    world.feed(1, Input::Refused { link, why: StoreError::protocol("garbage") });
    assert_eq!(world.status(1).counters.refused, 2);
    world.advance(1_000);
    world.assert_drained();
}

#[test]
fn not_found_answers_only_those_who_asked_before() {
    let mut world = World::new(2);
    let (home, one, two) = (world.client(0, 1), world.client(1, 1), world.client(1, 2));
    let early = world.ask_get(1, one, "k", true);
    // The question reaches the node that keeps the directory, whose answer is under way when the object is put.
    assert!(world.step());
    world.ask_with(0, home, put("k", 3), &[1, 2, 3]);
    let late = world.ask_get(1, two, "k", true);
    world.settle();
    World::assert_kind(world.answer(1, one, early).expect("an answer"), ErrorKind::NotFound);
    let answer = world.answer(1, two, late).expect("an answer");
    assert!(matches!(answer, Ok(ClientReply::Located(_))), "{answer:?}");
}

fn put(name: &str, len_bytes: u64) -> ClientMessage {
    let meta = ObjectMeta::bytes(len_bytes).expect("a length");
    ClientMessage::Put { key: key(name), meta, hints: PutHints::default(), if_exists: IfExists::Keep }
}
