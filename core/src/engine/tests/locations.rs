//! Gets from places that are remembered, and reads that come late: what the generation word decides.

use super::remote::reading;
use super::world::{LEASE_MS, Shape, World, key, pattern};
use crate::error::ErrorKind;
use crate::receipt::Path;
use crate::tier::ClientId;
use crate::wire::{ClientMessage, ClientReply, Located, PeerMessage, Range};

/// Two nodes, and an object on the first that the second has read once and not kept.
fn seen() -> (World, ClientId, ClientId, Vec<u8>) {
    let mut world = World::shaped(2, &reading());
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    read_away(&mut world, away, &bytes);
    world.advance(100);
    (world, home, away, bytes)
}

fn located(world: &mut World, client: ClientId, request: u64) -> Located {
    match world.answer(1, client, request) {
        Some(Ok(ClientReply::Located(located))) => located,
        other => panic!("{other:?}"),
    }
}

/// Gets "k" on the second node without keeping it.
fn read_away(world: &mut World, client: ClientId, expected: &[u8]) {
    let request = world.ask_get(1, client, "k", false);
    world.settle();
    let located = located(world, client, request);
    assert_eq!((world.nodes[1].bytes(located.extent), located.path), (expected, Path::Read));
    world.unpin(1, client, located.generation);
}

fn questions(world: &World) -> usize {
    world.nodes[1].sent.iter().filter(|message| matches!(message, PeerMessage::Get { .. })).count()
}

fn evict(world: &mut World, node: usize, client: ClientId) {
    let message = ClientMessage::Evict { key: key("k"), force: true };
    assert_eq!(world.call(node, client, message), Ok(ClientReply::Done));
}

#[test]
fn a_second_get_asks_nobody() {
    let (mut world, _, away, bytes) = seen();
    let (said, heard) = (world.nodes[1].sent.len(), world.nodes[0].sent.len());
    read_away(&mut world, away, &bytes);
    assert_eq!((world.nodes[1].sent.len(), world.nodes[0].sent.len()), (said, heard), "no message at all");
    let counters = world.status(1).counters;
    assert_eq!((counters.read, counters.known, counters.outdated), (2, 1, 0));
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn a_kept_copy_that_was_evicted_is_read_again_where_it_came_from() {
    let (mut world, _, away, bytes) = seen();
    world.fetch(1, away, "k", &bytes);
    evict(&mut world, 1, away);
    assert_eq!(world.fetch(1, away, "k", &bytes), Path::Read);
    assert_eq!((questions(&world), world.status(1).counters.known), (1, 2));
    assert_eq!(world.fetch(1, away, "k", &bytes), Path::Local, "it was kept again");
    world.assert_drained();
}

#[test]
fn a_part_is_sliced_from_the_whole_and_a_grant_of_a_part_names_the_whole() {
    let (mut world, _, away, bytes) = seen();
    let link = world.link_between(1, 0).expect("a link");
    let part = |start, len_bytes| ClientMessage::Get {
        key: key("k"),
        range: Some(Range { start, len_bytes }),
        timeout_ms: 1_000,
        keep: true,
        threshold_bytes: None,
        tier: None,
    };
    for forgotten in [false, true] {
        for (start, len_bytes) in [(700, 300), (0, 1), (1, 998)] {
            let Ok(ClientReply::Located(located)) = world.call(1, away, part(start, len_bytes)) else {
                panic!("located")
            };
            let (from, to) = (usize::try_from(start).unwrap(), usize::try_from(start + len_bytes).unwrap());
            assert_eq!(world.nodes[1].bytes(located.extent), &bytes[from..to]);
            world.unpin(1, away, located.generation);
        }
        read_away(&mut world, away, &bytes);
        assert_eq!(questions(&world), if forgotten { 2 } else { 1 });
        if !forgotten {
            world.nodes[1].engine.locations.forget_link(link);
        }
    }
    World::assert_kind(world.call(1, away, part(999, 2)), ErrorKind::Invalid);
    assert_eq!(questions(&world), 3, "the owner says what the object has");
    world.assert_drained();
}

#[test]
fn a_short_part_comes_inside_an_answer_as_ever() {
    let mut world = World::shaped(2, &Shape { threshold_bytes: Some(100), ..Shape::default() });
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &pattern(1, 1_000));
    read_away(&mut world, away, &pattern(1, 1_000));
    for (len_bytes, path) in [(100, Path::Eager), (101, Path::Read)] {
        let range = Some(Range { start: 0, len_bytes });
        let get = ClientMessage::Get {
            key: key("k"),
            range,
            timeout_ms: 1_000,
            keep: false,
            threshold_bytes: None,
            tier: None,
        };
        let Ok(ClientReply::Located(located)) = world.call(1, away, get) else { panic!("located") };
        assert_eq!(located.path, path, "{len_bytes} bytes");
        world.unpin(1, away, located.generation);
    }
    assert_eq!(questions(&world), 2);
    world.assert_drained();
}

#[test]
fn a_changed_word_is_a_miss_that_asks() {
    let (mut world, home, away, _) = seen();
    evict(&mut world, 0, home);
    let other = pattern(2, 1_000);
    world.put(0, home, "k", &other);
    read_away(&mut world, away, &other);
    assert_eq!((questions(&world), world.status(1).counters.outdated), (2, 1));
    read_away(&mut world, away, &other);
    assert_eq!(questions(&world), 2, "the new place is known");
    world.assert_drained();
}

/// The word of the same slot shows another object's generation: it is not the same slot but the same number that
/// counts.
#[test]
fn a_slot_and_an_extent_that_are_used_again_are_told_by_their_generation() {
    let (mut world, home, away, _) = seen();
    evict(&mut world, 0, home);
    world.advance(200);
    let extent = |world: &World| {
        let mut shown = world.nodes[0].index.iter();
        shown.next().map(|(slot, object)| (*slot, object.extent)).expect("an object")
    };
    world.put(0, home, "other", &pattern(2, 1_000));
    let reused = extent(&world);
    world.put(0, home, "k", &pattern(3, 1_000));
    assert_eq!((reused.0.0, reused.1.offset), (0, 0), "slot and extent of the first object");
    read_away(&mut world, away, &pattern(3, 1_000));
    assert_eq!(world.status(1).counters.outdated, 1);
    world.assert_drained();
}

#[test]
fn what_is_withdrawn_between_the_last_byte_and_the_word_is_no_success() {
    let (mut world, home, away, _) = seen();
    world.hold_words = true;
    let request = world.ask_get(1, away, "k", false);
    world.settle();
    assert_eq!(world.words.len(), 1, "the bytes are here");
    evict(&mut world, 0, home);
    let word = world.words.remove(0);
    world.finish_word(word);
    world.settle();
    assert!(world.answer(1, away, request).is_none_or(|answer| answer.is_err()));
    world.advance(3_000);
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

#[test]
fn a_link_that_goes_down_takes_its_places_along() {
    let (mut world, home, away, bytes) = seen();
    let link = world.link_between(1, 0).expect("a link");
    world.cut(1, link);
    world.advance(500);
    read_away(&mut world, away, &bytes);
    assert_eq!((questions(&world), world.status(1).counters.outdated), (2, 0), "asked, not tried");
    evict(&mut world, 0, home);
    world.assert_drained();
}

#[test]
fn a_node_that_started_again_is_asked() {
    let (mut world, _, away, _) = seen();
    let config = super::world::config(0, 2, Vec::new(), &reading());
    world.restart(0, config);
    world.advance(500);
    let home = world.client(0, 1);
    world.put(0, home, "k", &pattern(9, 1_000));
    read_away(&mut world, away, &pattern(9, 1_000));
    assert_eq!(world.status(1).counters.outdated, 0);
    world.assert_drained();
}

#[test]
fn a_deleted_object_is_not_read_where_it_was() {
    let (mut world, home, away, _) = seen();
    let deleted = world.call(0, home, ClientMessage::Delete { key: key("k") });
    assert_eq!(deleted, Ok(ClientReply::Deleted { existed: true }));
    world.hold_reads = true;
    World::assert_kind(world.get(1, away, "k"), ErrorKind::NotFound);
    assert!(world.held.is_empty(), "the place was forgotten with the delete");
    world.assert_drained();
}

/// The delete is acknowledged while the word is on its way: it was unchanged when it was loaded.
#[test]
fn a_delete_that_overtakes_the_word_wins() {
    let (mut world, home, away, _) = seen();
    world.hold_words = true;
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    let word = world.words.remove(0);
    // It is loaded here and arrives after the DROP.
    let owner = world.nodes[0].index.values().next().expect("the object").generation;
    let _ = world.call(0, home, ClientMessage::Delete { key: key("k") });
    let late = world.ask_get(1, away, "k", true);
    let end = crate::engine::ReadEnd { word: Some(owner.0), ..Default::default() };
    let input = crate::engine::Input::ReadDone { transfer: word.transfer, result: Ok(end) };
    world.feed(1, input);
    world.settle();
    world.advance(3_000);
    for request in [request, late] {
        World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::NotFound);
    }
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

/// Who comes while the word is on its way gets a read of its own: the word may be older than its question.
#[test]
fn nobody_joins_a_get_whose_word_is_being_read() {
    let (mut world, _, away, bytes) = seen();
    world.hold_words = true;
    let first = world.ask_get(1, away, "k", true);
    world.settle();
    let second = world.ask_get(1, away, "k", true);
    world.settle();
    assert_eq!(world.words.len(), 2);
    for word in std::mem::take(&mut world.words) {
        world.finish_word(word);
    }
    world.settle();
    for request in [first, second] {
        let located = located(&mut world, away, request);
        assert_eq!(world.nodes[1].bytes(located.extent), bytes);
        world.unpin(1, away, located.generation);
    }
    world.assert_drained();
    assert_eq!(world.used(1), 1_024, "one of the two was kept");
}

#[test]
fn a_get_that_is_given_up_at_its_word_holds_nothing() {
    let (mut world, _, away, _) = seen();
    world.hold_words = true;
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    assert_eq!(world.used(1), 1_024);
    world.advance(3_000);
    World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::TimedOut);
    assert!(world.words.is_empty(), "the read was ended");
    assert_eq!(world.used(1), 0, "nothing lands in it any more");
    world.assert_drained();
}

#[test]
fn a_get_that_is_given_up_while_a_known_place_is_read_frees_its_extent_when_the_read_has_ended() {
    let (mut world, _, away, _) = seen();
    world.hold_reads = true;
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    let transfer = world.held[0].transfer;
    world.held.clear();
    world.advance(3_000);
    World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::TimedOut);
    assert_eq!(world.used(1), 1_024, "bytes may still land in it");
    world.feed(1, crate::engine::Input::ReadDone { transfer, result: Ok(crate::engine::ReadEnd::default()) });
    world.assert_drained();
    assert_eq!(world.used(1), 0);
}

/// The owner's side of it: the word changes at once, the extent waits for pins, leases and sends, whichever goes last,
/// and only then another object gets it.
#[test]
fn the_word_changes_first_then_readers_go_then_the_extent_is_used_again() {
    for last in 0..3 {
        let mut world = World::shaped(3, &Shape { threshold_bytes: Some(500), ..Shape::default() });
        let (home, away, third) = (world.client(0, 1), world.client(1, 1), world.client(2, 1));
        let bytes = pattern(1, 1_000);
        world.put(0, home, "k", &bytes);
        let pinned = world.get(0, home, "k").expect("it is here");
        (world.hold_reads, world.hold_sends) = (true, true);
        let read = world.ask_get(1, away, "k", false);
        let range = Some(Range { start: 0, len_bytes: 400 });
        let part = ClientMessage::Get {
            key: key("k"),
            range,
            timeout_ms: 3_000,
            keep: false,
            threshold_bytes: None,
            tier: None,
        };
        let sent = world.ask(2, third, part);
        world.settle();
        assert_eq!((world.status(0).leases, world.sends.len()), (1, 1));
        let extent = pinned.extent;
        evict(&mut world, 0, home);
        assert!(world.nodes[0].index.is_empty(), "nothing in the index names it from now on");
        for step in [last + 1, last + 2, last] {
            world.advance(100);
            assert_eq!((world.status(0).draining, world.used(0)), (1, 1_024), "before step {step}");
            world.put(0, home, &format!("other {step}"), &pattern(2, 10));
            let mut shown = world.nodes[0].index.values();
            assert!(shown.all(|object| object.extent.offset != extent.offset), "it is given to nobody");
            let other = ClientMessage::Evict { key: key(&format!("other {step}")), force: true };
            assert_eq!(world.call(0, home, other), Ok(ClientReply::Done));
            match step % 3 {
                0 => world.unpin(0, home, pinned.generation),
                1 => {
                    let read = world.held.remove(0);
                    world.finish_read(read);
                }
                _ => {
                    let (node, send) = world.sends.remove(0);
                    world.feed(node, crate::engine::Input::SendDone { send });
                }
            }
        }
        world.advance(100);
        assert_eq!((world.status(0).draining, world.used(0)), (0, 0));
        world.put(0, home, "next", &bytes);
        let next = world.nodes[0].index.values().next().expect("an object");
        assert_eq!(next.extent, extent, "now it is another's");
        assert!(next.generation > pinned.generation, "of another generation");
        for (node, client, request) in [(1, away, read), (2, third, sent)] {
            assert!(matches!(world.answer(node, client, request), Some(Ok(_))), "it was in time");
        }
    }
}

#[test]
fn a_late_read_is_a_success_only_by_an_unchanged_word() {
    for still_there in [true, false] {
        let mut world = World::shaped(2, &reading());
        world.hold_reads = true;
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 1_000);
        world.put(0, home, "k", &bytes);
        let request = world.ask_get(1, away, "k", true);
        world.settle();
        world.advance(u64::from(LEASE_MS) + 1);
        if !still_there {
            evict(&mut world, 0, home);
            world.advance(200);
            world.put(0, home, "other", &pattern(2, 1_000));
        }
        let read = world.held.remove(0);
        world.hold_reads = false;
        world.finish_read(read);
        world.settle();
        if still_there {
            let located = located(&mut world, away, request);
            assert_eq!(world.nodes[1].bytes(located.extent), bytes);
            world.unpin(1, away, located.generation);
            assert_eq!(questions(&world), 1, "it was not asked again");
            evict(&mut world, 1, away);
            world.fetch(1, away, "k", &bytes);
            assert_eq!(questions(&world), 1, "and its place is known");
        } else {
            world.advance(3_000);
            World::assert_kind(world.answer(1, away, request).expect("an answer"), ErrorKind::NotFound);
        }
        world.assert_drained();
    }
}
