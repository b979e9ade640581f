//! Which node keeps the directory, when that one is lost, and when it is back.

use super::world::*;
use crate::engine::Input;
use crate::error::{ErrorKind, StoreError};
use crate::receipt::Path;
use crate::tier::{ClientId, Epoch, LinkId, NodeId};
use crate::wire::{ClientMessage, ClientReply, IfExists, Member, PeerMessage, PutHints};

/// As long as a node of the list is missed before the next one takes its place.
const MISSED_MS: u64 = 5 * HEARTBEAT_MS;
/// Longer than that, the pauses between dialling included.
const TAKEN_MS: u64 = MISSED_MS + 3_000;

fn clients(world: &mut World) -> Vec<ClientId> {
    (0..world.nodes.len()).map(|node| world.client(node, 1)).collect()
}

fn keepers(world: &World, nodes: &[usize]) -> Vec<usize> {
    nodes.iter().copied().filter(|node| world.status(*node).keeps_directory).collect()
}

fn follows(world: &World, node: usize) -> Option<String> {
    world.status(node).directory
}

fn delete(name: &str) -> ClientMessage {
    ClientMessage::Delete { key: key(name) }
}

fn list_all() -> ClientMessage {
    ClientMessage::List { prefix: String::new(), after: None, limit: 100 }
}

fn listed(answer: Answer) -> Vec<String> {
    match answer {
        Ok(ClientReply::Listed { objects, .. }) => objects.iter().map(|o| o.key.to_string()).collect(),
        other => panic!("{other:?}"),
    }
}

fn restarted(world: &mut World, node: usize, heirs: usize) {
    world.restart(node, config(node, 2, list(heirs), &Shape::default()));
}

#[test]
fn the_first_of_the_list_keeps_the_directory_and_the_others_follow_it() {
    for heirs in 1..=3 {
        let world = World::listed(4, heirs);
        assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0]);
        for node in 0..4 {
            assert_eq!(follows(&world, node), Some("n0".to_owned()));
        }
    }
}

#[test]
fn a_node_finds_itself_in_the_list_whatever_it_is_called_there() {
    let mut world = World::default();
    let names = vec!["first".to_owned(), "second".to_owned()];
    world.aliases = [("first".to_owned(), 0), ("second".to_owned(), 1)].into();
    for node in 0..3 {
        world.add(config(node, 1, names.clone(), &Shape::default()));
    }
    world.advance(3_000);
    assert_eq!(keepers(&world, &[0, 1, 2]), [0]);
    assert!((0..3).all(|node| world.status(node).counters.refused == 0));
    world.kill(0);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[1, 2]), [1]);
    assert_eq!(follows(&world, 2), Some("n1".to_owned()));
}

#[test]
fn a_list_of_one_is_as_it_was() {
    let mut world = World::listed(3, 1);
    let clients = clients(&mut world);
    world.kill(0);
    world.advance(20_000);
    assert!(keepers(&world, &[1, 2]).is_empty());
    World::assert_kind(world.call(1, clients[1], delete("k")), ErrorKind::Unavailable);
}

#[test]
fn the_next_of_the_list_takes_the_directory_over_and_is_told_everything() {
    let mut world = World::listed(4, 3);
    let clients = clients(&mut world);
    for node in 1..4 {
        world.put(node, clients[node], &format!("k{node}"), &[1, 2, 3]);
    }
    let wait = world.ask(3, clients[3], ClientMessage::Wait { key: key("later"), timeout_ms: 60_000 });
    world.settle();
    world.kill(0);
    world.advance(MISSED_MS - 10);
    assert!(keepers(&world, &[1, 2, 3]).is_empty(), "it may come back");
    assert!((1..4).all(|node| follows(&world, node).is_none()));
    world.advance(3_000);
    assert_eq!(keepers(&world, &[1, 2, 3]), [1]);
    for node in 1..4 {
        assert_eq!(follows(&world, node), Some("n1".to_owned()));
        for other in 1..4 {
            world.fetch(node, clients[node], &format!("k{other}"), &[1, 2, 3]);
        }
        assert_eq!(listed(world.call(node, clients[node], list_all())), ["k1", "k2", "k3"]);
        World::assert_kind(world.get(node, clients[node], "nothing"), ErrorKind::NotFound);
    }
    world.put(2, clients[2], "later", &[1]);
    assert_eq!(world.answer(3, clients[3], wait), Some(Ok(ClientReply::Exists)), "watched again");
    world.kill(1);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[2, 3]), [2]);
    assert_eq!(listed(world.call(3, clients[3], list_all())), ["k1", "k2", "k3", "later"]);
    world.kill(2);
    world.advance(TAKEN_MS);
    assert!(keepers(&world, &[3]).is_empty(), "it is not in the list");
    assert_eq!(world.fetch(3, clients[3], "k3", &[1, 2, 3]), Path::Local);
    world.assert_drained();
}

#[test]
fn without_a_directory_what_is_known_goes_on_and_the_rest_waits() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    let large = pattern(1, 100_000);
    let large = &large[..60_000];
    for name in ["seen", "unseen", "hinted"] {
        world.put(2, clients[2], name, large);
    }
    let unkept = |world: &mut World, name: &str| {
        let get = ClientMessage::Get {
            key: key(name),
            range: None,
            timeout_ms: 20_000,
            keep: false,
            threshold_bytes: if name == "hinted" { Some(u64::MAX) } else { Some(0) },
            tier: None,
        };
        world.ask(3, clients[3], get)
    };
    for name in ["seen", "hinted"] {
        let request = unkept(&mut world, name);
        world.settle();
        let answer = world.answer(3, clients[3], request);
        let Some(Ok(ClientReply::Located(located))) = answer else { panic!("{answer:?}") };
        world.unpin(3, clients[3], located.generation);
    }
    world.kill(0);
    for name in ["seen", "hinted"] {
        let request = unkept(&mut world, name);
        world.settle();
        let answer = world.answer(3, clients[3], request);
        let Some(Ok(ClientReply::Located(located))) = answer else { panic!("{name}: {answer:?}") };
        assert_eq!(world.nodes[3].bytes(located.extent), large);
        world.unpin(3, clients[3], located.generation);
    }
    assert_eq!(world.status(3).counters.known, 1, "read where it was read before");
    world.put(3, clients[3], "late", &[1]);
    let waiting = [
        (3, unkept(&mut world, "unseen")),
        (3, world.ask(3, clients[3], delete("seen"))),
        (2, world.ask(2, clients[2], list_all())),
        (1, world.ask(1, clients[1], delete("nothing"))),
    ];
    let meta = crate::ObjectMeta::bytes(1).expect("a length");
    let (hints, if_exists) = (PutHints::default(), IfExists::Error);
    let put = |name: &str| ClientMessage::Put { key: key(name), meta, hints, if_exists };
    let exclusive = [
        (3, world.ask_with(3, clients[3], put("mine"), &[1])),
        (2, world.ask_with(2, clients[2], put("mine"), &[2])),
    ];
    world.advance(MISSED_MS - 100);
    for (node, request) in waiting.into_iter().chain(exclusive) {
        assert_eq!(world.answer(node, clients[node], request), None);
    }
    world.advance(3_000);
    assert_eq!(keepers(&world, &[1, 2, 3]), [1]);
    let answers =
        waiting.map(|(node, request)| world.answer(node, clients[node], request).expect("an answer"));
    assert!(matches!(answers[0], Ok(ClientReply::Located(_))), "{:?}", answers[0]);
    assert_eq!(answers[1], Ok(ClientReply::Deleted { existed: true }));
    let names = listed(answers[2].clone());
    assert!(names.contains(&"late".to_owned()) && names.contains(&"unseen".to_owned()), "{names:?}");
    assert_eq!(answers[3], Ok(ClientReply::Deleted { existed: false }));
    let won = exclusive
        .into_iter()
        .filter(|(node, request)| world.answer(*node, clients[*node], *request).expect("an answer").is_ok());
    assert_eq!(won.count(), 1, "there is one directory, and it decides");
    for node in 1..4 {
        World::assert_kind(world.get(node, clients[node], "seen"), ErrorKind::NotFound);
        world.fetch(node, clients[node], "late", &[1]);
    }
}

#[test]
fn a_time_to_live_that_ends_while_there_is_no_directory_ends_everywhere() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    let hints = PutHints { ttl_ms: Some(200), ..PutHints::default() };
    assert!(world.try_put(2, clients[2], "k", &[1], hints, IfExists::Keep).is_ok());
    world.fetch(3, clients[3], "k", &[1]);
    world.kill(0);
    world.advance(250);
    assert_eq!(world.holders("k"), [3], "a copy, whose node does not know of its time");
    world.advance(TAKEN_MS);
    assert!(world.holders("k").is_empty());
    World::assert_kind(world.get(3, clients[3], "k"), ErrorKind::NotFound);
}

#[test]
fn what_waits_for_a_directory_in_vain_is_told_why() {
    let mut world = World::listed(3, 2);
    let clients = clients(&mut world);
    world.put(2, clients[2], "k", &[1]);
    world.kill(0);
    world.kill(1);
    let meta = crate::ObjectMeta::bytes(1).expect("a length");
    let (hints, if_exists) = (PutHints::default(), IfExists::Error);
    let put = ClientMessage::Put { key: key("mine"), meta, hints, if_exists };
    let requests = [
        world.ask(2, clients[2], delete("k")),
        world.ask(2, clients[2], list_all()),
        world.ask_with(2, clients[2], put, &[1]),
        world.ask_get(2, clients[2], "nothing", true),
        world.ask(2, clients[2], ClientMessage::Wait { key: key("nothing"), timeout_ms: 0 }),
    ];
    world.advance(2_900);
    for request in requests {
        assert_eq!(world.answer(2, clients[2], request), None);
    }
    world.advance(3_000);
    for request in requests {
        let error = world.answer(2, clients[2], request).expect("an answer").expect_err("no directory");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        let said = error.to_string();
        assert!(said.contains("directory") && said.contains("a0, a1"), "{said}");
    }
    assert_eq!(world.fetch(2, clients[2], "k", &[1]), Path::Local);
    world.assert_drained();
    assert_eq!(world.status(2).objects, 1);
}

#[test]
fn questions_that_the_lost_directory_had_not_answered_are_asked_of_the_next() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    world.put(2, clients[2], "k", &[1]);
    world.put(3, clients[3], "l", &[1]);
    let meta = crate::ObjectMeta::bytes(1).expect("a length");
    let (hints, if_exists) = (PutHints::default(), IfExists::Error);
    let put = ClientMessage::Put { key: key("mine"), meta, hints, if_exists };
    // Nothing is delivered any more before the directory is lost.
    let requests = [
        world.ask(3, clients[3], delete("k")),
        world.ask(3, clients[3], list_all()),
        world.ask_with(3, clients[3], put, &[1]),
        world.ask_get(3, clients[3], "k", true),
    ];
    world.kill(0);
    world.advance(2_500);
    let answers = requests.map(|request| world.answer(3, clients[3], request).expect("an answer"));
    assert_eq!(answers[0], Ok(ClientReply::Deleted { existed: true }));
    assert!(listed(answers[1].clone()).contains(&"l".to_owned()));
    assert!(matches!(answers[2], Ok(ClientReply::Sealed { .. })), "{:?}", answers[2]);
    let got = &answers[3];
    let gone = matches!(got, Err(error) if error.kind() == ErrorKind::NotFound);
    assert!(gone || matches!(got, Ok(ClientReply::Located(_))), "before or after the delete: {got:?}");
}

#[test]
fn the_first_one_takes_the_directory_back_with_all_that_was_deleted() {
    let mut world = World::listed(5, 2);
    let clients = clients(&mut world);
    let hints = PutHints { replicas: 2, ..PutHints::default() };
    for number in 0..20 {
        let put = world.try_put(3, clients[3], &format!("k{number}"), &[1], hints, IfExists::Keep);
        assert!(matches!(put, Ok(ClientReply::Sealed { replicas: 2, .. })), "{put:?}");
    }
    world.kill(0);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[1, 2, 3, 4]), [1]);
    // The node with all originals is away while they are deleted.
    for node in [1, 2, 4] {
        world.part(3, node, true);
    }
    world.advance(2_000);
    for number in 0..20 {
        let name = format!("k{number}");
        let existed = !world.holders(&name).iter().all(|node| *node == 3);
        let deleted = world.call(4, clients[4], delete(&name));
        assert_eq!(deleted, Ok(ClientReply::Deleted { existed }));
    }
    let known: Vec<String> = (0..20)
        .map(|number| format!("k{number}"))
        .filter(|name| world.status(1).directory.is_some() && world.holders(name) == [3])
        .collect();
    assert!(known.len() > 10);
    restarted(&mut world, 0, 2);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[0, 1, 2, 4]), [0], "handed back");
    assert_eq!(follows(&world, 1), Some("n0".to_owned()));
    for node in [1, 2, 4] {
        world.part(3, node, false);
    }
    world.advance(TAKEN_MS);
    assert_eq!(follows(&world, 3), Some("n0".to_owned()));
    let left: Vec<usize> = (0..20).map(|number| world.holders(&format!("k{number}")).len()).collect();
    // What only the dead node and the absent one had, nobody could tell the delete of.
    let only_there = left.iter().filter(|count| **count > 0).count();
    assert!(only_there < 10, "{left:?}");
    let names = listed(world.call(2, clients[2], list_all()));
    assert_eq!(names.len(), only_there, "{names:?}");
    world.assert_drained();
}

/// An object that one node alone still has although its delete was acknowledged.
fn deleted_in_absence(world: &mut World, clients: &[ClientId]) {
    let hints = PutHints { replicas: 5, ..PutHints::default() };
    let put = world.try_put(4, clients[4], "k", &[1], hints, IfExists::Keep);
    assert!(matches!(put, Ok(ClientReply::Sealed { replicas: 5, .. })), "{put:?}");
    for node in 0..4 {
        world.part(4, node, true);
    }
    world.advance(2_000);
    assert_eq!(world.call(2, clients[2], delete("k")), Ok(ClientReply::Deleted { existed: true }));
    assert_eq!(world.holders("k"), [4]);
}

#[test]
fn a_successor_remembers_what_was_deleted() {
    for (lost, keeper) in [(vec![0], 1), (vec![0, 1], 2)] {
        let mut world = World::listed(5, 3);
        let clients = clients(&mut world);
        deleted_in_absence(&mut world, &clients);
        for node in lost {
            world.kill(node);
            world.advance(TAKEN_MS);
        }
        for node in 0..4 {
            world.part(4, node, false);
        }
        world.advance(TAKEN_MS);
        assert_eq!(follows(&world, 4), Some(format!("n{keeper}")));
        assert!(world.holders("k").is_empty(), "it is dropped by the node that comes back with it");
        World::assert_kind(world.get(4, clients[4], "k"), ErrorKind::NotFound);
    }
}

#[test]
fn a_node_of_the_list_that_starts_again_learns_what_was_deleted() {
    // Each in turn starts again with an empty memory; none of them saw the delete itself in the end.
    let mut world = World::listed(5, 3);
    let clients = clients(&mut world);
    deleted_in_absence(&mut world, &clients);
    for node in [1, 2, 0] {
        world.kill(node);
        world.advance(TAKEN_MS);
        restarted(&mut world, node, 3);
        world.advance(TAKEN_MS);
    }
    world.kill(0);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[1, 2, 3]), [1]);
    for node in 1..4 {
        world.part(4, node, false);
    }
    world.advance(TAKEN_MS);
    assert!(world.holders("k").is_empty());
}

#[test]
fn what_is_deleted_on_one_side_of_a_partition_is_deleted_on_both_after_it() {
    for side in [vec![0, 2], vec![1, 3]] {
        let mut world = World::listed(4, 2);
        let clients = clients(&mut world);
        let hints = PutHints { replicas: 4, ..PutHints::default() };
        assert!(world.try_put(3, clients[3], "k", &[1], hints, IfExists::Keep).is_ok());
        world.put(3, clients[3], "stays", &[2]);
        for (node, other) in [(0, 1), (0, 3), (2, 1), (2, 3)] {
            world.part(node, other, true);
        }
        world.advance(TAKEN_MS);
        assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0, 1], "one on each side");
        assert_eq!(follows(&world, 2), Some("n0".to_owned()));
        assert_eq!(follows(&world, 3), Some("n1".to_owned()));
        // Either side goes on: bytes that are there are read, and what is put is found there.
        for node in 0..4 {
            assert_eq!(world.fetch(node, clients[node], "k", &[1]), Path::Local);
        }
        world.put(2, clients[2], "here", &[3]);
        world.fetch(0, clients[0], "here", &[3]);
        let gone = world.call(side[1], clients[side[1]], delete("k"));
        assert_eq!(gone, Ok(ClientReply::Deleted { existed: true }));
        assert_eq!(world.holders("k").len(), 2);
        for (node, other) in [(0, 1), (0, 3), (2, 1), (2, 3)] {
            world.part(node, other, false);
        }
        world.advance(TAKEN_MS);
        assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0]);
        assert!(world.holders("k").is_empty(), "deleted on side {side:?}");
        for node in 0..4 {
            assert_eq!(follows(&world, node), Some("n0".to_owned()));
            World::assert_kind(world.get(node, clients[node], "k"), ErrorKind::NotFound);
            world.fetch(node, clients[node], "stays", &[2]);
            world.fetch(node, clients[node], "here", &[3]);
        }
        world.assert_drained();
    }
}

#[test]
fn of_two_directories_that_are_both_reached_the_earlier_one_is_followed() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    world.put(3, clients[3], "k", &[1]);
    // Only the two that may keep it do not reach each other.
    world.part(0, 1, true);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0, 1]);
    assert!([2, 3].into_iter().all(|node| follows(&world, node) == Some("n0".to_owned())));
    // A node that loses the first one follows the second, and comes back.
    world.part(0, 3, true);
    world.advance(3_000);
    assert_eq!(follows(&world, 3), Some("n1".to_owned()));
    world.fetch(1, clients[1], "k", &[1]);
    world.part(0, 3, false);
    world.advance(3_000);
    assert_eq!(follows(&world, 3), Some("n0".to_owned()));
    world.fetch(2, clients[2], "k", &[1]);
    world.part(0, 1, false);
    world.advance(TAKEN_MS);
    assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0]);
    world.assert_drained();
}

#[test]
fn a_short_loss_of_the_first_one_changes_nothing() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    world.put(3, clients[3], "k", &[1]);
    for _ in 0..5 {
        for node in 1..4 {
            world.part(0, node, true);
        }
        world.advance(MISSED_MS / 2);
        for node in 1..4 {
            world.part(0, node, false);
        }
        world.advance(2_500);
        assert_eq!(keepers(&world, &[0, 1, 2, 3]), [0]);
        assert_eq!(follows(&world, 1), Some("n0".to_owned()));
    }
    let taken = |event: &&crate::engine::Event| matches!(event, crate::engine::Event::DirectoryTaken);
    assert_eq!(world.nodes[1].events.iter().filter(taken).count(), 0);
    world.fetch(2, clients[2], "k", &[1]);
}

#[test]
fn a_node_that_starts_in_an_empty_list_waits_only_for_those_before_it() {
    let mut world = World::default();
    world.add(config(0, 1, list(3), &Shape::default()));
    assert_eq!(keepers(&world, &[0]), [0], "those after it do not answer: at once");
    let mut world = World::default();
    world.unreachable = list(3).into_iter().collect();
    world.add(config(0, 1, vec!["a1".to_owned(), "a0".to_owned()], &Shape::default()));
    assert!(keepers(&world, &[0]).is_empty());
    world.advance(MISSED_MS + 10);
    assert_eq!(keepers(&world, &[0]), [0]);
}

#[test]
fn absence_is_not_claimed_before_everyone_has_announced() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    world.put(3, clients[3], "k", &[1]);
    // The node that has it cannot be reached when the directory changes hands.
    world.kill(0);
    for node in 1..3 {
        world.part(3, node, true);
    }
    world.advance(MISSED_MS - 50);
    let get = ClientMessage::Get {
        key: key("k"),
        range: None,
        timeout_ms: 10_000,
        keep: true,
        threshold_bytes: None,
        tier: None,
    };
    let requests = [world.ask(1, clients[1], get.clone()), world.ask(2, clients[2], get)];
    world.advance(200);
    assert_eq!(keepers(&world, &[1, 2]), [1]);
    // It was known to be there.
    for (node, request) in [1, 2].into_iter().zip(requests) {
        assert_eq!(world.answer(node, clients[node], request), None, "node {node}");
    }
    for node in 1..3 {
        world.part(3, node, false);
    }
    world.advance(2_500);
    for (node, request) in [1, 2].into_iter().zip(requests) {
        let answer = world.answer(node, clients[node], request);
        let Some(Ok(ClientReply::Located(located))) = answer else { panic!("node {node}: {answer:?}") };
        world.unpin(node, clients[node], located.generation);
    }
    World::assert_kind(world.get(2, clients[2], "nothing"), ErrorKind::NotFound);
    world.assert_drained();
}

#[test]
fn a_put_goes_on_without_a_directory_and_is_on_several_nodes_too() {
    let mut world = World::listed(4, 2);
    let clients = clients(&mut world);
    world.put(2, clients[2], "l", &[1]);
    // A get makes a link; nobody tells of nodes now.
    world.fetch(3, clients[3], "l", &[1]);
    world.kill(0);
    let hints = PutHints { replicas: 2, ..PutHints::default() };
    let put = world.try_put(3, clients[3], "k", &[5], hints, IfExists::Keep);
    assert!(matches!(put, Ok(ClientReply::Sealed { replicas: 2, .. })), "{put:?}");
    world.kill(3);
    world.advance(TAKEN_MS);
    for node in [1, 2] {
        world.fetch(node, clients[node], "k", &[5]);
    }
    assert_eq!(world.status(1).under_replicated, 0);
    assert_eq!(world.holders("k"), [1, 2]);
}

#[test]
fn deletions_are_taken_from_who_has_to_do_with_a_directory_alone() {
    let mut world = World::listed(3, 2);
    let clients = clients(&mut world);
    let link = LinkId(700);
    for (node, joins) in [(0, false), (1, false), (2, false), (0, true)] {
        let name = format!("k{node}{joins}");
        let object = world.put(node, clients[node], &name, &[1]);
        world.feed(node, Input::LinkUp { link, fabric: FABRIC, address: "x".to_owned(), inbound: true });
        let stranger = "x".to_owned();
        let member = Member { node: NodeId(99), epoch: Epoch(1), name: stranger.clone(), address: stranger };
        let hello = PeerMessage::Hello { member, version_min: 1, version_max: 1, keeps: false };
        let join = joins.then_some(PeerMessage::Join { heir: false });
        let deletions = PeerMessage::Deletions { objects: vec![object] };
        for message in [Some(hello), join, Some(deletions)].into_iter().flatten() {
            world.feed(node, Input::PeerMessage { link, request: 0, message, payload_len: 0 });
        }
        world.settle();
        assert_eq!(world.holders(&name).is_empty(), joins, "node {node}");
        world.feed(node, Input::LinkDown { link, why: StoreError::unavailable("it", "gone") });
    }
    world.assert_drained();
}

#[test]
fn a_directory_that_starts_again_learns_the_latest_deletions_from_everyone() {
    let mut world = World::new(4);
    let clients = clients(&mut world);
    let hints = PutHints { replicas: 4, ..PutHints::default() };
    assert!(world.try_put(3, clients[3], "k", &[1], hints, IfExists::Keep).is_ok());
    for node in 0..3 {
        world.part(3, node, true);
    }
    assert_eq!(world.call(2, clients[2], delete("k")), Ok(ClientReply::Deleted { existed: true }));
    world.restart(0, config(0, 2, Vec::new(), &Shape::default()));
    for node in 0..3 {
        world.part(3, node, false);
    }
    world.advance(5_000);
    assert_eq!(follows(&world, 3), Some("n0".to_owned()));
    assert!(world.holders("k").is_empty());
}
