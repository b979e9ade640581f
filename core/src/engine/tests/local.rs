//! What a node does for its own clients, alone.

use super::world::*;
use crate::engine::{Attachment, INLINE_PUT_MAX, Input};
use crate::error::ErrorKind;
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Generation, SegmentId};
use crate::wire::{ClientMessage, ClientReply, IfExists, PutHints, Range};

#[test]
fn hello_comes_first_and_once_for_every_version() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    assert_eq!(world.nodes[0].attachments, [Attachment::Session]);
    let hello = ClientMessage::Hello { version_min: 900, version_max: 901 };
    let error = world.call(0, client, hello).expect_err("another version");
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("900"), "{error}");

    let rude = ClientId(2);
    world.feed(0, Input::ClientJoined { client: rude, trusted: false });
    let request = world.ask(0, rude, ClientMessage::Status);
    assert_eq!(world.nodes[0].closed_clients, [rude]);
    assert!(world.answer(0, rude, request).is_none());
}

#[test]
fn put_get_delete() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let bytes = pattern(1, 1_000);
    world.put(0, client, "a", &bytes);
    world.put(0, client, "empty", &[]);
    assert_eq!(world.fetch(0, client, "a", &bytes), Path::Local);
    assert_eq!(world.fetch(0, client, "empty", &[]), Path::Local);
    let part = ClientMessage::Get {
        key: key("a"),
        range: Some(Range { start: 10, len_bytes: 20 }),
        timeout_ms: 100,
        keep: true,
        threshold_bytes: None,
        tier: None,
    };
    let Ok(ClientReply::Located(located)) = world.call(0, client, part) else { panic!("a part") };
    assert_eq!(world.nodes[0].bytes(located.extent), &bytes[10..30]);
    world.unpin(0, client, located.generation);
    let outside = ClientMessage::Get {
        key: key("a"),
        range: Some(Range { start: 990, len_bytes: 11 }),
        timeout_ms: 100,
        keep: true,
        threshold_bytes: None,
        tier: None,
    };
    World::assert_kind(world.call(0, client, outside), ErrorKind::Invalid);
    let delete = || ClientMessage::Delete { key: key("a") };
    assert_eq!(world.call(0, client, delete()), Ok(ClientReply::Deleted { existed: true }));
    assert_eq!(world.call(0, client, delete()), Ok(ClientReply::Deleted { existed: false }));
    World::assert_kind(world.get(0, client, "a"), ErrorKind::NotFound);
    world.assert_drained();
    assert_eq!(world.used(0), 64, "the empty object takes one granule");
}

#[test]
fn reserve_map_seal() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let answer = world.reserve(0, client, "big", 300_000);
    let Ok(ClientReply::Reserved { reservation, extent, map: Some(map), .. }) = answer else {
        panic!("{answer:?}");
    };
    let memory = &world.nodes[0].segments[&extent.segment];
    assert_eq!(map, memory.len() as u64);
    assert_eq!(world.nodes[0].owners[&extent.segment], Some(client));
    assert_eq!(world.nodes[0].attachments.last(), Some(&Attachment::Segment(extent.segment)));

    let other = world.client(0, 2);
    let descriptor = ClientMessage::Segment { segment: extent.segment };
    World::assert_kind(world.call(0, other, descriptor.clone()), ErrorKind::Denied);
    World::assert_kind(world.seal(0, client, reservation), ErrorKind::Invalid);
    let mapped = ClientMessage::Mapped { segment: extent.segment };
    World::assert_kind(world.call(0, other, mapped.clone()), ErrorKind::Denied);
    assert_eq!(world.call(0, client, mapped.clone()), Ok(ClientReply::Done));
    assert!(world.nodes[0].closed.contains(&extent.segment));
    assert_eq!(world.call(0, client, mapped), Ok(ClientReply::Done), "again is no harm");

    let bytes = pattern(3, 300_000);
    world.write(0, extent, &bytes);
    World::assert_kind(world.seal(0, other, reservation), ErrorKind::Stale);
    assert!(matches!(world.seal(0, client, reservation), Ok(ClientReply::Sealed { kept: false, .. })));
    World::assert_kind(world.seal(0, client, reservation), ErrorKind::Stale);
    let reply = world.call(0, other, descriptor);
    assert!(matches!(reply, Ok(ClientReply::Segment { .. })), "{reply:?}");
    assert_eq!(world.fetch(0, other, "big", &bytes), Path::Local);

    let second = world.reserve(0, client, "more", 1_000);
    let Ok(ClientReply::Reserved { extent: next, reservation, .. }) = second else { panic!("{second:?}") };
    assert_eq!(next.segment, extent.segment, "the granted segment has room");
    let abort = ClientMessage::Abort { reservation };
    assert_eq!(world.call(0, client, abort.clone()), Ok(ClientReply::Done));
    World::assert_kind(world.call(0, client, abort), ErrorKind::Stale);
    world.assert_drained();
}

#[test]
fn without_a_grant_bytes_are_written_by_the_node() {
    let mut world = World::shaped(1, &Shape { quota_bytes: 0, ..Shape::default() });
    let client = world.client(0, 1);
    let answer = world.reserve(0, client, "k", 100);
    let Ok(ClientReply::Reserved { reservation, map: None, .. }) = answer else { panic!("{answer:?}") };
    let bytes = pattern(4, 100);
    for (offset, part) in [(0, &bytes[..60]), (60, &bytes[60..])] {
        let write = ClientMessage::Write { reservation, offset };
        let request = world.ask_with(0, client, write, part);
        assert_eq!(world.answer(0, client, request), Some(Ok(ClientReply::Done)));
    }
    let request = world.ask_with(0, client, ClientMessage::Write { reservation, offset: 99 }, &[1, 2]);
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::Invalid);
    assert!(world.seal(0, client, reservation).is_ok());
    assert_eq!(world.fetch(0, client, "k", &bytes), Path::Local);
    let request = world.ask_with(0, client, ClientMessage::Write { reservation, offset: 0 }, &[1]);
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::Stale);
    world.assert_drained();
}

#[test]
fn seal_copy_moves_the_bytes_out_of_the_clients_reach() {
    let mut world = World::new(1);
    world.hold_copies = true;
    let client = world.client(0, 1);
    let hints = PutHints { seal_copy: true, ..PutHints::default() };
    let answer = world.reserve_with(0, client, "k", 5_000, hints);
    let Ok(ClientReply::Reserved { reservation, extent, .. }) = answer else { panic!("{answer:?}") };
    let _ = world.call(0, client, ClientMessage::Mapped { segment: extent.segment });
    let bytes = pattern(5, 5_000);
    world.write(0, extent, &bytes);
    let seal = ClientMessage::Seal { reservation, checksum: crate::Checksum::None };
    let request = world.ask(0, client, seal);
    world.settle();
    assert!(world.answer(0, client, request).is_none(), "the copy is still under way");
    let (node, generation) = world.copies.pop().expect("a copy");
    world.feed(node, Input::CopyDone { generation, result: Ok(()) });
    let sealed = world.answer(0, client, request);
    assert!(matches!(sealed, Some(Ok(ClientReply::Sealed { .. }))), "{sealed:?}");
    world.write(0, extent, &pattern(6, 5_000));
    let located = world.get(0, client, "k").expect("the object");
    assert_eq!(world.nodes[0].bytes(located.extent), bytes);
    assert_eq!(world.nodes[0].owners[&located.extent.segment], None, "the node's own segment");
    world.unpin(0, client, located.generation);
    world.assert_drained();
}

#[test]
fn a_failed_copy_fails_the_seal_and_leaves_nothing() {
    let mut world = World::new(1);
    world.hold_copies = true;
    let client = world.client(0, 1);
    let hints = PutHints { seal_copy: true, ..PutHints::default() };
    let Ok(ClientReply::Reserved { reservation, extent, .. }) =
        world.reserve_with(0, client, "k", 5_000, hints)
    else {
        panic!("a reservation");
    };
    let _ = world.call(0, client, ClientMessage::Mapped { segment: extent.segment });
    let seal = ClientMessage::Seal { reservation, checksum: crate::Checksum::None };
    let request = world.ask(0, client, seal);
    let (node, generation) = world.copies.pop().expect("a copy");
    let why = crate::StoreError::os("copy", "it failed");
    world.feed(node, Input::CopyDone { generation, result: Err(why) });
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::Os);
    world.assert_drained();
    assert_eq!(world.used(0), 0);
}

#[test]
fn if_exists_keep_and_error() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let first = world.put(0, client, "k", &pattern(1, 10));
    let keep = world.try_put(0, client, "k", &pattern(2, 10), PutHints::default(), IfExists::Keep);
    let Ok(ClientReply::Sealed { object, kept: true, .. }) = keep else { panic!("{keep:?}") };
    assert_eq!(object, first);
    let error = world.try_put(0, client, "k", &pattern(3, 10), PutHints::default(), IfExists::Error);
    World::assert_kind(error, ErrorKind::AlreadyExists);
    assert_eq!(world.fetch(0, client, "k", &pattern(1, 10)), Path::Local);

    // Both reserve before either seals: the second gives way as its caller wished.
    for (name, if_exists) in [("r1", IfExists::Keep), ("r2", IfExists::Error)] {
        let meta = ObjectMeta::bytes(8).expect("a length");
        let reserve = ClientMessage::Reserve {
            key: key(name),
            meta,
            hints: PutHints::default(),
            if_exists,
            writes: crate::Tier::Host,
        };
        let Ok(ClientReply::Reserved { reservation, extent, .. }) = world.call(0, client, reserve) else {
            panic!("a reservation");
        };
        let _ = world.call(0, client, ClientMessage::Mapped { segment: extent.segment });
        world.put(0, client, name, &pattern(9, 8));
        let sealed = world.seal(0, client, reservation);
        match if_exists {
            IfExists::Keep => assert!(matches!(sealed, Ok(ClientReply::Sealed { kept: true, .. }))),
            IfExists::Error => World::assert_kind(sealed, ErrorKind::AlreadyExists),
        }
        assert_eq!(world.fetch(0, client, name, &pattern(9, 8)), Path::Local);
    }
    world.assert_drained();
}

#[test]
fn what_cannot_be_put_is_refused_with_the_values() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let put = |len_bytes: u64| ClientMessage::Put {
        key: key("k"),
        meta: ObjectMeta::bytes(len_bytes).expect("a length"),
        hints: PutHints::default(),
        if_exists: IfExists::Keep,
    };
    let request = world.ask_with(0, client, put(4), &[1, 2, 3]);
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::Invalid);
    let long = vec![0; INLINE_PUT_MAX as usize + 1];
    let request = world.ask_with(0, client, put(long.len() as u64), &long);
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::TooLarge);
    World::assert_kind(world.reserve(0, client, "k", 9 << 20), ErrorKind::TooLarge);
    let mut meta = ObjectMeta::bytes(4).expect("a length");
    meta.len_bytes = 5;
    let reserve = ClientMessage::Reserve {
        key: key("k"),
        meta,
        hints: PutHints::default(),
        if_exists: IfExists::Keep,
        writes: crate::Tier::Host,
    };
    World::assert_kind(world.call(0, client, reserve), ErrorKind::Invalid);
    let request = world.ask_with(0, client, ClientMessage::Status, &[1]);
    World::assert_kind(world.answer(0, client, request).expect("an answer"), ErrorKind::Protocol);
    for reservation in [Generation(0), Generation(77)] {
        World::assert_kind(world.seal(0, client, reservation), ErrorKind::Stale);
    }
    let segment = SegmentId(99);
    World::assert_kind(world.call(0, client, ClientMessage::Segment { segment }), ErrorKind::Stale);
    World::assert_kind(world.call(0, client, ClientMessage::Return { segment }), ErrorKind::Denied);
    let pin = ClientMessage::Pin { key: key("nothing"), pin: true };
    World::assert_kind(world.call(0, client, pin), ErrorKind::NotFound);
    let evict = ClientMessage::Evict { key: key("nothing"), force: true };
    World::assert_kind(world.call(0, client, evict), ErrorKind::NotFound);
    world.assert_drained();
}

#[test]
fn an_object_with_a_time_to_live_goes_when_it_is_over() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let hints = PutHints { ttl_ms: Some(500), ..PutHints::default() };
    assert!(world.try_put(0, client, "k", &[1, 2, 3], hints, IfExists::Keep).is_ok());
    world.advance(499);
    assert!(world.get(0, client, "k").is_ok());
    world.advance(2);
    World::assert_kind(world.get(0, client, "k"), ErrorKind::NotFound);
    assert_eq!(world.status(0).draining, 1, "it is still pinned");
    world.leave(0, client);
    world.assert_drained();
    assert_eq!(world.used(0), 0);
}

#[test]
fn waits_are_answered_by_a_put_or_a_deadline() {
    let mut world = World::new(1);
    let (one, two) = (world.client(0, 1), world.client(0, 2));
    let wait = |timeout_ms| ClientMessage::Wait { key: key("k"), timeout_ms };
    World::assert_kind(world.call(0, one, wait(0)), ErrorKind::TimedOut);
    let (short, long) = (world.ask(0, one, wait(100)), world.ask(0, one, wait(10_000)));
    world.advance(150);
    World::assert_kind(world.answer(0, one, short).expect("an answer"), ErrorKind::TimedOut);
    assert!(world.answer(0, one, long).is_none());
    world.put(0, two, "k", &[1]);
    assert_eq!(world.answer(0, one, long), Some(Ok(ClientReply::Exists)));
    for timeout_ms in [0, 100] {
        assert_eq!(world.call(0, one, wait(timeout_ms)), Ok(ClientReply::Exists));
    }
}

#[test]
fn lists_in_pages() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    for name in ["b/2", "a", "b/1", "b/3", "c"] {
        world.put(0, client, name, &pattern(1, 7));
    }
    let page = |world: &mut World, after: Option<&str>| {
        let list = ClientMessage::List { prefix: "b/".to_owned(), after: after.map(key), limit: 2 };
        match world.call(0, client, list) {
            Ok(ClientReply::Listed { objects, more }) => {
                assert!(objects.iter().all(|o| o.len_bytes == 7 && o.holders == ["n0"]));
                (objects.into_iter().map(|o| o.key.to_string()).collect::<Vec<_>>(), more)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(page(&mut world, None), (vec!["b/1".to_owned(), "b/2".to_owned()], true));
    assert_eq!(page(&mut world, Some("b/2")), (vec!["b/3".to_owned()], false));
    assert_eq!(page(&mut world, Some("b/3")), (vec![], false));
}

#[test]
fn stat_says_what_an_object_is() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let object = world.put(0, client, "k", &[1, 2, 3, 4]);
    let _ = world.call(0, client, ClientMessage::Pin { key: key("k"), pin: true });
    let stat = ClientMessage::Stat { key: key("k"), timeout_ms: 100 };
    let expected = ClientReply::Stat {
        object,
        meta: ObjectMeta::bytes(4).expect("a length"),
        tier: Some(crate::Tier::Host),
        pinned: true,
        holders: vec!["n0".to_owned()],
    };
    assert_eq!(world.call(0, client, stat), Ok(expected));
    let nothing = ClientMessage::Stat { key: key("nothing"), timeout_ms: 100 };
    World::assert_kind(world.call(0, client, nothing), ErrorKind::NotFound);
}

#[test]
fn a_client_that_leaves_takes_its_reservations_and_pins_along() {
    let mut world = World::new(1);
    let (one, two) = (world.client(0, 1), world.client(0, 2));
    world.put(0, one, "k", &pattern(1, 100));
    let located = world.get(0, one, "k").expect("the object");
    let answer = world.reserve(0, one, "r", 1_000);
    let Ok(ClientReply::Reserved { extent, .. }) = answer else { panic!("{answer:?}") };
    let wait = world.ask(0, one, ClientMessage::Wait { key: key("w"), timeout_ms: 10_000 });
    let delete = ClientMessage::Delete { key: key("k") };
    assert_eq!(world.call(0, two, delete), Ok(ClientReply::Deleted { existed: true }));
    assert_eq!(world.status(0).draining, 1, "pinned by the first client");
    assert_eq!(world.status(0).reservations, 1);
    world.leave(0, one);
    world.put(0, two, "w", &[1]);
    assert!(world.answer(0, one, wait).is_none(), "nobody is there to be answered");
    world.assert_drained();
    assert_eq!(located.object.number, 1);

    // Its process may still write to its segment, so nobody else gets it: it is empty, and goes.
    assert_eq!(world.status(0).tiers[0].granted_bytes, 0);
    let descriptor = ClientMessage::Segment { segment: extent.segment };
    World::assert_kind(world.call(0, two, descriptor), ErrorKind::Stale);
}

#[test]
fn what_a_client_that_left_has_sealed_stays_apart_until_its_process_ends() {
    let mut world = World::new(1);
    let (one, two) = (world.client(0, 1), world.client(0, 2));
    let answer = world.reserve(0, one, "k", 1_000);
    let Ok(ClientReply::Reserved { reservation, extent, .. }) = answer else { panic!("{answer:?}") };
    let _ = world.call(0, one, ClientMessage::Mapped { segment: extent.segment });
    assert!(world.seal(0, one, reservation).is_ok());
    world.leave(0, one);
    let granted = world.status(0).tiers[0].granted_bytes;
    assert!(granted > 0, "its process may still write");
    assert!(world.get(0, two, "k").is_ok());
    world.feed(0, Input::ClientProcessGone { client: one });
    assert_eq!(world.status(0).tiers[0].granted_bytes, 0, "like the node's own from now on");
    assert!(world.get(0, two, "k").is_ok());
}

#[test]
fn a_returned_segment_is_retired_once_it_is_empty() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let answer = world.reserve(0, client, "k", 1_000);
    let Ok(ClientReply::Reserved { reservation, extent, .. }) = answer else { panic!("{answer:?}") };
    let segment = extent.segment;
    let _ = world.call(0, client, ClientMessage::Mapped { segment });
    assert!(world.seal(0, client, reservation).is_ok());
    assert_eq!(world.call(0, client, ClientMessage::Return { segment }), Ok(ClientReply::Done));
    assert!(world.nodes[0].segments.contains_key(&segment), "an object is in it");
    let _ = world.call(0, client, ClientMessage::Delete { key: key("k") });
    assert!(!world.nodes[0].segments.contains_key(&segment));
    world.assert_drained();
}
