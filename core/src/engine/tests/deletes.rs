//! Deletes: everywhere, once they are acknowledged, and whatever is under way meanwhile.

use super::world::*;
use crate::error::ErrorKind;
use crate::receipt::Path;
use crate::wire::{ClientMessage, ClientReply, IfExists, PutHints};

fn delete(name: &str) -> ClientMessage {
    ClientMessage::Delete { key: key(name) }
}

#[test]
fn a_delete_reaches_every_holder_from_anywhere() {
    for from in 0..3 {
        let mut world = World::new(3);
        let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
        let bytes = pattern(1, 100);
        world.put(1, clients[1], "k", &bytes);
        for node in 0..3 {
            world.fetch(node, clients[node], "k", &bytes);
        }
        let gone = Ok(ClientReply::Deleted { existed: true });
        assert_eq!(world.call(from, clients[from], delete("k")), gone);
        for node in 0..3 {
            assert!(world.nodes[node].index.is_empty());
            World::assert_kind(world.get(node, clients[node], "k"), ErrorKind::NotFound);
        }
        let never = Ok(ClientReply::Deleted { existed: false });
        assert_eq!(world.call(from, clients[from], delete("k")), never);
        world.assert_drained();
        world.put(2, clients[2], "k", &pattern(2, 50));
        world.fetch(0, clients[0], "k", &pattern(2, 50));
    }
}

#[test]
fn a_delete_finds_every_object_of_the_key() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    for node in 1..3 {
        world.put(node, clients[node], "k", &pattern(1, 100));
    }
    assert_eq!(world.call(0, clients[0], delete("k")), Ok(ClientReply::Deleted { existed: true }));
    for node in 0..3 {
        World::assert_kind(world.get(node, clients[node], "k"), ErrorKind::NotFound);
    }
    world.assert_drained();
}

#[test]
fn a_copy_under_way_does_not_bring_a_deleted_object_back() {
    let mut world = World::shaped(2, &Shape { threshold_bytes: Some(0), ..Shape::default() });
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 100));
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    assert_eq!(world.call(0, home, delete("k")), Ok(ClientReply::Deleted { existed: true }));
    world.put(0, home, "k", &pattern(2, 100));
    let read = world.held.remove(0);
    world.finish_read(read);
    world.hold_reads = false;
    world.advance(100);
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("located") };
    assert_eq!(world.nodes[1].bytes(located.extent), pattern(2, 100), "the object that is there now");
    world.unpin(1, away, located.generation);
    world.assert_drained();
}

#[test]
fn a_time_to_live_ends_on_every_node_and_spares_other_objects() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    let hints = PutHints { ttl_ms: Some(1_000), ..PutHints::default() };
    assert!(world.try_put(1, clients[1], "k", &[1], hints, IfExists::Keep).is_ok());
    assert!(world.try_put(0, clients[0], "d", &[1], hints, IfExists::Keep).is_ok());
    for (node, name) in [(0, "k"), (2, "k"), (1, "d")] {
        world.fetch(node, clients[node], name, &[1]);
    }
    world.put(2, clients[2], "d", &[2]);
    world.advance(1_100);
    for (node, name) in [(0, "k"), (1, "k"), (2, "k")] {
        World::assert_kind(world.get(node, clients[node], name), ErrorKind::NotFound);
    }
    assert_eq!(world.fetch(2, clients[2], "d", &[2]), Path::Local);
    world.fetch(0, clients[0], "d", &[2]);
    world.assert_drained();
}

#[test]
fn without_the_directory_a_delete_says_so() {
    let mut world = World::new(2);
    let away = world.client(1, 1);
    world.put(1, away, "k", &[1]);
    world.unreachable.insert("a0".to_owned());
    let link = world.link_between(1, 0).expect("a link");
    world.cut(1, link);
    world.settle();
    World::assert_kind(world.call(1, away, delete("k")), ErrorKind::Unavailable);
    assert_eq!(world.fetch(1, away, "k", &[1]), Path::Local);
    world.unreachable.clear();
    world.advance(3_000);
    assert_eq!(world.call(1, away, delete("k")), Ok(ClientReply::Deleted { existed: true }));
    world.assert_drained();
}

#[test]
fn if_exists_is_one_question_to_the_directory() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    let put = |world: &mut World, node: usize, if_exists| {
        let bytes = pattern(u8::try_from(node).expect("few"), 10);
        world.try_put(node, clients[node], "k", &bytes, PutHints::default(), if_exists)
    };
    assert!(put(&mut world, 1, IfExists::Error).is_ok());
    for node in 0..3 {
        World::assert_kind(put(&mut world, node, IfExists::Error), ErrorKind::AlreadyExists);
    }
    let kept = put(&mut world, 1, IfExists::Keep);
    assert!(matches!(kept, Ok(ClientReply::Sealed { kept: true, .. })), "{kept:?}");
    let both = put(&mut world, 2, IfExists::Keep);
    assert!(matches!(both, Ok(ClientReply::Sealed { kept: false, .. })), "{both:?}");
    world.assert_drained();
    assert_eq!(world.call(0, clients[0], delete("k")), Ok(ClientReply::Deleted { existed: true }));
    assert!(put(&mut world, 0, IfExists::Error).is_ok());
    World::assert_kind(put(&mut world, 2, IfExists::Error), ErrorKind::AlreadyExists);
}

#[test]
fn exclusive_puts_need_the_directory() {
    let mut world = World::new(2);
    let away = world.client(1, 1);
    world.unreachable.insert("a0".to_owned());
    let link = world.link_between(1, 0).expect("a link");
    world.cut(1, link);
    world.settle();
    let put = world.try_put(1, away, "k", &[1], PutHints::default(), IfExists::Error);
    World::assert_kind(put, ErrorKind::Unavailable);
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn of_two_deletes_the_second_waits_for_the_first() {
    let mut world = World::new(2);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(1, away, "k", &pattern(1, 100));
    let requests = [world.ask(0, home, delete("k")), world.ask(0, home, delete("k"))];
    let mut answered = 0;
    while answered < 2 {
        assert!(world.step(), "both are answered");
        for request in requests {
            if world.answer(0, home, request).is_some() {
                answered += 1;
                assert!(world.nodes[1].index.is_empty(), "whatever was answered first, the object is gone");
            }
        }
    }
    world.assert_drained();
}

#[test]
fn an_exclusive_put_that_fails_leaves_nothing_in_the_directory() {
    let mut world = World::shaped(2, &Shape { objects_max: 1, ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(1, away, "full", &[1]);
    let put = world.try_put(1, away, "k", &[1], PutHints::default(), IfExists::Error);
    World::assert_kind(put, ErrorKind::TooLarge);
    let list = ClientMessage::List { prefix: "k".to_owned(), after: None, limit: 10 };
    let nothing = Ok(ClientReply::Listed { objects: Vec::new(), more: false });
    assert_eq!(world.call(0, home, list), nothing);
    let put = world.try_put(0, home, "k", &[2], PutHints::default(), IfExists::Error);
    assert!(put.is_ok(), "{put:?}");
}

#[test]
fn an_exclusive_put_is_refused_by_a_copy_that_came_meanwhile() {
    let mut world = World::shaped(2, &Shape { objects_max: 1, ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let meta = crate::ObjectMeta::bytes(8).expect("a length");
    let hints = PutHints::default();
    let reserve = ClientMessage::Reserve {
        key: key("k"),
        meta,
        hints,
        if_exists: IfExists::Error,
        writes: crate::Tier::Host,
    };
    let Ok(ClientReply::Reserved { reservation, extent, .. }) = world.call(1, away, reserve) else {
        panic!("a reservation");
    };
    let _ = world.call(1, away, ClientMessage::Mapped { segment: extent.segment });
    world.put(0, home, "k", &pattern(1, 8));
    // The copy takes the only slot of the index, from which it could be evicted.
    world.fetch(1, away, "k", &pattern(1, 8));
    World::assert_kind(world.seal(1, away, reservation), ErrorKind::AlreadyExists);
    assert_eq!(world.fetch(1, away, "k", &pattern(1, 8)), Path::Local);
    world.assert_drained();
}
