//! Who is there: joining, losing, restarting, redirecting.

use super::world::*;
use crate::engine::{Event, Input};
use crate::error::{ErrorKind, StoreError};
use crate::receipt::Path;
use crate::tier::{Epoch, LinkId, NodeId};
use crate::wire::{ClientMessage, ClientReply, Member, PROTOCOL_MAX, PROTOCOL_MIN, PeerMessage};

fn member(name: &str, node: u64, epoch: u64) -> Member {
    Member { node: NodeId(node), epoch: Epoch(epoch), name: name.to_owned(), address: name.to_owned() }
}

fn hello(member: Member, version: u16) -> PeerMessage {
    PeerMessage::Hello { member, version_min: version, version_max: version, keeps: false }
}

/// A link to a peer that is played by the test, and what the node thinks of its HELLO.
fn greet(world: &mut World, node: usize, link: u64, message: PeerMessage) -> Option<StoreError> {
    let link = LinkId(link);
    let address = "elsewhere".to_owned();
    world.feed(node, Input::LinkUp { link, fabric: FABRIC, address, inbound: true });
    world.nodes[node].sent.clear();
    world.feed(node, Input::PeerMessage { link, request: 0, message, payload_len: 0 });
    world.nodes[node].sent.iter().find_map(|message| match message {
        PeerMessage::Failed { error } => Some(error.clone()),
        _ => None,
    })
}

#[test]
fn hellos_are_refused_for_a_reason() {
    let mut world = World::new(2);
    let version = PROTOCOL_MAX + 1;
    let error = greet(&mut world, 0, 100, hello(member("x", 50, 1), version)).expect("refused");
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains(&version.to_string()), "{error}");
    let error = greet(&mut world, 0, 101, hello(member("n0", 1, 9), PROTOCOL_MIN)).expect("refused");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("n0"), "{error}");
    let error = greet(&mut world, 0, 103, hello(member("n1", 2, 0), PROTOCOL_MIN)).expect("refused");
    assert_eq!(error.kind(), ErrorKind::Stale, "an older incarnation of a node that is there");
    assert_eq!(world.status(0).counters.refused, 3);
    assert_eq!(greet(&mut world, 0, 104, hello(member("x", 50, 1), PROTOCOL_MIN)), None);
    let early = PeerMessage::Alive;
    world
        .feed(0, Input::LinkUp { link: LinkId(105), fabric: FABRIC, address: "e".to_owned(), inbound: true });
    world.feed(0, Input::PeerMessage { link: LinkId(105), request: 0, message: early, payload_len: 0 });
    assert_eq!(world.status(0).counters.refused, 4, "something came before HELLO");
}

#[test]
fn joining_a_node_that_keeps_no_directory_is_answered() {
    let mut world = World::new(2);
    assert_eq!(greet(&mut world, 1, 100, hello(member("x", 50, 1), PROTOCOL_MIN)), None);
    let message = PeerMessage::Join { heir: true };
    world.feed(1, Input::PeerMessage { link: LinkId(100), request: 0, message, payload_len: 0 });
    assert_eq!(world.nodes[1].sent.last(), Some(&PeerMessage::Keeps { keeps: false }));
}

#[test]
fn a_third_node_is_found_through_the_directory() {
    let mut world = World::new(3);
    let (one, two) = (world.client(1, 1), world.client(2, 1));
    let bytes = pattern(1, 100_000);
    world.put(1, one, "k", &bytes[..100]);
    assert!(world.link_between(2, 1).is_none());
    assert_eq!(world.fetch(2, two, "k", &bytes[..100]), Path::Eager);
    assert!(world.link_between(2, 1).is_some(), "dialled after LOCATED");
    let located = |message: &PeerMessage| matches!(message, PeerMessage::Located { .. });
    assert_eq!(world.nodes[0].sent.iter().filter(|m| located(m)).count(), 1);
    assert_eq!(world.used(0), 0, "the directory's node never had the bytes");
    world.assert_drained();
}

#[test]
fn everyone_is_asked_before_not_found() {
    let mut world = World::new(3);
    let (one, two) = (world.client(1, 1), world.client(2, 1));
    world.put(1, one, "k", &[1, 2]);
    // The announcement is still under way: the directory does not know the key.
    let unknown = PeerMessage::Withdraw {
        objects: vec![announced("k", crate::ObjectId { origin: NodeId(2), epoch: Epoch(1), number: 1 }, 2)],
    };
    let link = world.link_between(0, 1).expect("a link");
    world.feed(0, Input::PeerMessage { link, request: 0, message: unknown, payload_len: 0 });
    assert_eq!(world.fetch(2, two, "k", &[1, 2]), Path::Eager);
    World::assert_kind(world.get(2, two, "nothing"), ErrorKind::NotFound);
    let asks = world.nodes[0].sent.iter().filter(|m| matches!(m, PeerMessage::Ask { .. })).count();
    assert_eq!(asks, 2, "one for each question: not the asker, once the other");
}

#[test]
fn a_lost_holder_is_replaced_by_another() {
    let mut world = World::shaped(3, &Shape { threshold_bytes: Some(0), ..Shape::default() });
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    let bytes = pattern(1, 1_000);
    world.put(1, clients[1], "k", &bytes);
    world.fetch(0, clients[0], "k", &bytes);
    // The directory's node has a copy too, but the third node remembers the second as the holder.
    world.hold_reads = true;
    let _ = world.call(0, clients[0], ClientMessage::Evict { key: key("k"), force: true });
    let request = world.ask_get(2, clients[2], "k", true);
    world.settle();
    assert_eq!(world.held.len(), 1);
    world.hold_reads = false;
    world.fetch(0, clients[0], "k", &bytes);
    let link = world.link_between(2, 1).expect("a link");
    world.unreachable.insert("a1".to_owned());
    world.cut(2, link);
    world.advance(1_000);
    let Some(Ok(ClientReply::Located(located))) = world.answer(2, clients[2], request) else {
        panic!("located");
    };
    assert_eq!(world.nodes[2].bytes(located.extent), bytes);
    world.unpin(2, clients[2], located.generation);
    world.assert_drained();
}

#[test]
fn an_unreachable_holder_is_passed_over() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    for node in 0..2 {
        world.put(node, clients[node], "k", &[7, 8, 9]);
    }
    world.put(1, clients[1], "alone", &[1]);
    world.unreachable.insert("a1".to_owned());
    world.fetch(2, clients[2], "k", &[7, 8, 9]);
    let request = world.ask_get(2, clients[2], "alone", true);
    world.advance(4_000);
    let error = world.answer(2, clients[2], request).expect("an answer").expect_err("unreachable");
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.to_string().contains("a1"), "{error}");
}

#[test]
fn the_only_holder_lost_on_the_way_is_peer_lost_and_then_not_found() {
    let mut world = World::shaped(2, &Shape { threshold_bytes: Some(0), ..Shape::default() });
    world.hold_reads = true;
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(1, away, "k", &pattern(1, 500));
    let request = world.ask_get(0, home, "k", true);
    world.settle();
    let link = world.link_between(0, 1).expect("a link");
    world.unreachable.insert("a0".to_owned());
    world.cut(0, link);
    world.advance(100);
    let error = world.answer(0, home, request).expect("an answer").expect_err("lost");
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    World::assert_kind(world.get(0, home, "k"), ErrorKind::NotFound);
    world.assert_drained();
}

#[test]
fn a_silent_peer_is_lost_after_five_heartbeats() {
    let mut world = World::new(1);
    assert_eq!(greet(&mut world, 0, 100, hello(member("mute", 50, 1), PROTOCOL_MIN)), None);
    assert_eq!(world.status(0).peers.len(), 1);
    world.advance(5 * HEARTBEAT_MS);
    assert_eq!(world.status(0).peers.len(), 1);
    world.advance(2 * HEARTBEAT_MS);
    // The test plays the fabric: LinkDown follows the Disconnect.
    world.feed(0, Input::LinkDown { link: LinkId(100), why: StoreError::unavailable("it", "gone") });
    assert!(world.status(0).peers.is_empty());
    let down = |event: &Event| matches!(event, Event::PeerDown { name, .. } if name == "mute");
    assert!(world.nodes[0].events.iter().any(down));
}

#[test]
fn a_restarted_node_has_lost_its_objects() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    world.put(1, clients[1], "lost", &[1]);
    world.put(1, clients[1], "copied", &[2]);
    world.fetch(2, clients[2], "copied", &[2]);
    let shape = Shape::default();
    world.restart(1, config(1, 2, vec!["a0".to_owned()], &shape));
    world.advance(500);
    World::assert_kind(world.get(2, clients[2], "lost"), ErrorKind::NotFound);
    World::assert_kind(world.get(0, clients[0], "lost"), ErrorKind::NotFound);
    let again = world.client(1, 2);
    assert_eq!(world.fetch(1, again, "copied", &[2]), Path::Eager, "from the node with the copy");
    world.put(1, again, "lost", &[3]);
    world.fetch(0, clients[0], "lost", &[3]);
    assert_eq!(world.status(0).peers.iter().filter(|peer| peer.linked).count(), 2);
    world.assert_drained();
}

#[test]
fn an_incarnation_that_is_still_linked_gives_way_to_the_next() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    assert_eq!(greet(&mut world, 0, 100, hello(member("x", 50, 1), PROTOCOL_MIN)), None);
    let object = |epoch| crate::ObjectId { origin: NodeId(50), epoch: Epoch(epoch), number: 1 };
    let announce = |name: &str, epoch| PeerMessage::Announce {
        objects: vec![announced(name, object(epoch), 1)],
        exclusive: false,
    };
    let says =
        |link: u64, message| Input::PeerMessage { link: LinkId(link), request: 5, message, payload_len: 0 };
    world.feed(0, says(100, PeerMessage::Join { heir: false }));
    world.feed(0, says(100, announce("old", 1)));
    assert_eq!(greet(&mut world, 0, 101, hello(member("x", 50, 2), PROTOCOL_MIN)), None);
    world.feed(0, says(101, announce("early", 2)));
    let refused = |message: &PeerMessage| matches!(message, PeerMessage::Failed { error } if error.kind() == ErrorKind::Unavailable);
    assert!(world.nodes[0].sent.iter().any(refused), "announced before it has joined");
    world.feed(0, says(101, PeerMessage::Join { heir: false }));
    world.feed(0, says(101, announce("new", 2)));
    // What the old incarnation still says is not believed, and its link going down does not hurt the new one.
    world.feed(0, says(100, announce("ghost", 1)));
    world.feed(0, Input::LinkDown { link: LinkId(100), why: StoreError::unavailable("it", "gone") });
    let list = ClientMessage::List { prefix: String::new(), after: None, limit: 10 };
    let Ok(ClientReply::Listed { objects, .. }) = world.call(0, client, list) else { panic!("a list") };
    let names: Vec<_> = objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!(names, ["new"]);
}

#[test]
fn a_directory_that_starts_again_is_told_everything() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    world.put(1, clients[1], "k", &[1]);
    let wait = world.ask(2, clients[2], ClientMessage::Wait { key: key("later"), timeout_ms: 60_000 });
    world.settle();
    let shape = Shape::default();
    world.restart(0, config(0, 2, Vec::new(), &shape));
    world.advance(5_000);
    assert_eq!(world.fetch(2, clients[2], "k", &[1]), Path::Eager);
    let list = ClientMessage::List { prefix: String::new(), after: None, limit: 10 };
    let Ok(ClientReply::Listed { objects, .. }) = world.call(2, clients[2], list) else { panic!("a list") };
    assert_eq!(objects.len(), 1);
    world.put(1, clients[1], "later", &[1]);
    assert_eq!(world.answer(2, clients[2], wait), Some(Ok(ClientReply::Exists)), "watched again");
    world.assert_drained();
}

#[test]
fn what_was_withdrawn_while_cut_off_leaves_the_directory() {
    let mut world = World::new(3);
    let clients: Vec<_> = (0..3).map(|node| world.client(node, 1)).collect();
    world.put(1, clients[1], "k", &[1]);
    world.put(1, clients[1], "stays", &[2]);
    world.unreachable.insert("a0".to_owned());
    // Only this end notices for now.
    let link = world.link_between(1, 0).expect("a link");
    world.feed(1, Input::LinkDown { link, why: StoreError::unavailable("it", "gone") });
    let evict = ClientMessage::Evict { key: key("k"), force: true };
    assert_eq!(world.call(1, clients[1], evict), Ok(ClientReply::Done));
    world.unreachable.clear();
    world.advance(3_000);
    World::assert_kind(world.get(2, clients[2], "k"), ErrorKind::NotFound);
    world.fetch(2, clients[2], "stays", &[2]);
}

#[test]
fn a_node_alone_waits_for_the_directory_and_says_what_it_waits_for() {
    let mut world = World::default();
    world.unreachable.insert("a0".to_owned());
    let shape = Shape::default();
    world.add(config(0, 1, Vec::new(), &shape));
    world.add(config(1, 1, vec!["a0".to_owned()], &shape));
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.put(0, home, "k", &[1]);
    let request = world.ask_get(1, away, "k", true);
    world.advance(3_100);
    let error = world.answer(1, away, request).expect("an answer").expect_err("no directory");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("directory"), "{error}");
    world.unreachable.clear();
    world.advance(3_000);
    world.fetch(1, away, "k", &[1]);
}

#[test]
fn a_link_that_breaks_before_hello_is_dialled_again() {
    let mut world = World::default();
    let shape = Shape::default();
    world.add(config(0, 1, Vec::new(), &shape));
    world.unreachable.insert("a0".to_owned());
    world.add(config(1, 1, vec!["a0".to_owned()], &shape));
    let link = LinkId(77);
    world.feed(1, Input::LinkUp { link, fabric: FABRIC, address: "a0".to_owned(), inbound: false });
    world.feed(1, Input::LinkDown { link, why: StoreError::unavailable("it", "gone") });
    world.unreachable.clear();
    world.advance(3_000);
    assert!(world.link_between(1, 0).is_some());
    assert!(world.status(1).peers.iter().any(|peer| peer.linked));
}
