//! Room: full stores, eviction, what it may not touch, and who waits.

use super::world::*;
use crate::engine::Input;
use crate::error::ErrorKind;
use crate::receipt::Path;
use crate::tier::ClientId;
use crate::wire::{ClientMessage, ClientReply, IfExists, PutHints};

/// A tier of eight segments of 64 KiB.
fn small() -> Shape {
    let threshold_bytes = Some(u64::MAX);
    Shape { capacity_bytes: 512 << 10, quota_bytes: 128 << 10, threshold_bytes, ..Shape::default() }
}

const BLOCK: usize = 32 << 10;

fn name(number: usize) -> String {
    format!("k{number}")
}

fn fill(world: &mut World, node: usize, client: ClientId, hints: PutHints) -> usize {
    for number in 0.. {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        match world.try_put(node, client, &name(number), &bytes, hints, IfExists::Keep) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                let text = error.to_string();
                assert!(text.contains("host") && text.contains("32768") && text.contains("0 free"), "{text}");
                return number;
            }
        }
    }
    unreachable!("the tier is never full")
}

#[test]
fn a_full_store_says_so_and_loses_nothing() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    let count = fill(&mut world, 0, client, PutHints::default());
    assert_eq!(count, 16, "all of the tier is used");
    for number in 0..count {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        assert_eq!(world.fetch(0, client, &name(number), &bytes), Path::Local);
    }
    assert_eq!(world.status(0).counters.evicted, 0);
    let _ = world.call(0, client, ClientMessage::Delete { key: key("k3") });
    world.put(0, client, "new", &pattern(99, BLOCK));
    world.assert_drained();
}

#[test]
fn only_cache_objects_go_and_not_those_that_are_pinned() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    world.put(0, client, "original", &pattern(200, BLOCK));
    let pinned = PutHints { cache: true, pin: true, ..PutHints::default() };
    assert!(world.try_put(0, client, "pinned", &pattern(201, BLOCK), pinned, IfExists::Keep).is_ok());
    let cache = PutHints { cache: true, ..PutHints::default() };
    for number in 0..40 {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        let put = world.try_put(0, client, &name(number), &bytes, cache, IfExists::Keep);
        assert!(put.is_ok(), "{put:?}");
    }
    assert!(world.status(0).counters.evicted >= 26);
    assert_eq!(world.fetch(0, client, "original", &pattern(200, BLOCK)), Path::Local);
    assert_eq!(world.fetch(0, client, "pinned", &pattern(201, BLOCK)), Path::Local);
    world.assert_drained();
}

#[test]
fn a_reader_holds_an_evicted_object_in_place() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    let cache = PutHints { cache: true, ..PutHints::default() };
    for number in 0..16 {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        assert!(world.try_put(0, client, &name(number), &bytes, cache, IfExists::Keep).is_ok());
    }
    let read: Vec<_> = (0..16).map(|n| world.get(0, client, &name(n)).expect("the object")).collect();
    let put = world.try_put(0, client, "x", &pattern(77, BLOCK), cache, IfExists::Keep);
    World::assert_kind(put, ErrorKind::NoSpace);
    for (number, located) in read.iter().enumerate() {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        assert_eq!(world.nodes[0].bytes(located.extent), bytes, "in place while it is read");
        world.unpin(0, client, located.generation);
    }
    assert!(world.try_put(0, client, "x", &pattern(77, BLOCK), cache, IfExists::Keep).is_ok());
    world.assert_drained();
}

#[test]
fn copies_go_while_their_origin_lives() {
    let mut world = World::shaped(2, &small());
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    for number in 0..14 {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        world.put(0, home, &name(number), &bytes);
    }
    for number in 100..108 {
        world.put(1, away, &name(number), &pattern(u8::try_from(number).expect("few"), BLOCK));
    }
    for turn in 0..3 {
        for number in 0..14 {
            let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
            let path = world.fetch(1, away, &name(number), &bytes);
            assert!(turn > 0 || path == Path::Eager, "{path}");
        }
    }
    assert!(world.status(1).counters.evicted > 0);
    assert_eq!(world.status(0).counters.evicted, 0);
    for number in 100..108 {
        let bytes = pattern(u8::try_from(number).expect("few"), BLOCK);
        assert_eq!(world.fetch(1, away, &name(number), &bytes), Path::Local);
    }
    world.assert_drained();

    // Now the copies are the only ones.
    let link = world.link_between(1, 0).expect("a link");
    world.unreachable.insert("a0".to_owned());
    world.cut(1, link);
    world.settle();
    let before = world.status(1).objects;
    let put =
        world.try_put(1, away, "one more", &pattern(101, 2 * BLOCK), PutHints::default(), IfExists::Keep);
    World::assert_kind(put, ErrorKind::NoSpace);
    assert_eq!(world.status(1).objects, before);
}

#[test]
fn a_full_index_evicts_too() {
    let mut world = World::shaped(2, &Shape { objects_max: 4, ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    for number in 0..4 {
        world.put(0, home, &name(number), &[1, 2, 3]);
    }
    let put = world.try_put(0, home, "one more", &[1], PutHints::default(), IfExists::Keep);
    World::assert_kind(put, ErrorKind::TooLarge);
    for number in 0..4 {
        world.fetch(1, away, &name(number), &[1, 2, 3]);
    }
    for number in 10..14 {
        world.put(1, away, &name(number), &[4, 5, 6]);
    }
    for number in 0..4 {
        let path = world.fetch(1, away, &name(number), &[1, 2, 3]);
        assert_eq!(path, Path::Eager, "not kept, for there is no slot, but read");
    }
    assert_eq!(world.status(1).objects, 4);
    world.assert_drained();
}

#[test]
fn segments_are_made_for_what_is_longer_than_those_that_are_there() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    let answer = world.reserve(0, client, "long", 300 << 10);
    let Ok(ClientReply::Reserved { map: None, reservation, extent, .. }) = answer else {
        panic!("{answer:?}")
    };
    world.write(0, extent, &pattern(1, 300 << 10));
    assert!(world.seal(0, client, reservation).is_ok());
    assert_eq!(world.fetch(0, client, "long", &pattern(1, 300 << 10)), Path::Local);
    World::assert_kind(world.reserve(0, client, "longer", 400 << 10), ErrorKind::NoSpace);
    let _ = world.call(0, client, ClientMessage::Delete { key: key("long") });
    let answer = world.reserve(0, client, "longer", 400 << 10);
    assert!(matches!(answer, Ok(ClientReply::Reserved { .. })), "{answer:?}");
}

#[test]
fn a_segment_that_cannot_be_made_costs_a_put_but_no_memory() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    let capacity = world.status(0).tiers[0].capacity_bytes;
    world.fail_segments = 100;
    // Granted memory cannot be had: the node's own has room.
    let answer = world.reserve(0, client, "fallback", 1_000);
    let Ok(ClientReply::Reserved { map: None, reservation, .. }) = answer else { panic!("{answer:?}") };
    let _ = world.call(0, client, ClientMessage::Abort { reservation });
    World::assert_kind(world.reserve(0, client, "long", 300 << 10), ErrorKind::NoSpace);
    world.fail_segments = 0;
    assert_eq!(world.status(0).tiers[0].capacity_bytes, capacity);
    let answer = world.reserve(0, client, "long", 300 << 10);
    assert!(matches!(answer, Ok(ClientReply::Reserved { .. })), "{answer:?}");
}

#[test]
fn who_leaves_while_waiting_for_room_gets_none() {
    let mut world = World::shaped(1, &small());
    let client = world.client(0, 1);
    let meta = crate::ObjectMeta::bytes(1_000).expect("a length");
    let reserve = ClientMessage::Reserve {
        key: key("k"),
        meta,
        hints: PutHints::default(),
        if_exists: IfExists::Keep,
        writes: crate::Tier::Host,
    };
    // Its segment is still being made when the session ends.
    let request = world.ask(0, client, reserve);
    world.feed(0, Input::ClientLeft { client });
    world.settle();
    assert!(world.answer(0, client, request).is_none());
    world.feed(0, Input::ClientProcessGone { client });
    world.assert_drained();
    let other = world.client(0, 2);
    assert_eq!(fill(&mut world, 0, other, PutHints::default()), 16, "all memory is there");
}
