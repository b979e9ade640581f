//! Objects on several nodes: puts that ask for it, replicas that stay, their repair, and reads that move on.

use super::world::*;
use crate::engine::{Event, Input};
use crate::error::ErrorKind;
use crate::receipt::Path;
use crate::tier::{ClientId, Epoch, LinkId, NodeId};
use crate::wire::{
    Announced, ClientMessage, ClientReply, Holder, IfExists, Located, PeerMessage, PutHints, Range, Role,
};
use crate::{ObjectId, StoreError};

/// Beyond what a node may be away before what it held is made anew.
const HEALED_MS: u64 = 8 * HEARTBEAT_MS;

fn hints(replicas: u8) -> PutHints {
    PutHints { replicas, ..PutHints::default() }
}

/// On how many nodes a put says that its object is.
fn put_on(world: &mut World, node: usize, client: ClientId, name: &str, bytes: &[u8], replicas: u8) -> u32 {
    match world.try_put(node, client, name, bytes, hints(replicas), IfExists::Keep) {
        Ok(ClientReply::Sealed { replicas, .. }) => replicas,
        other => panic!("put {name}: {other:?}"),
    }
}

fn clients(world: &mut World) -> Vec<ClientId> {
    (0..world.nodes.len()).map(|node| world.client(node, 1)).collect()
}

fn evict(name: &str, force: bool) -> ClientMessage {
    ClientMessage::Evict { key: key(name), force }
}

fn under_replicated(world: &World) -> (u64, Vec<String>) {
    let status = world.status(0);
    (status.under_replicated, status.under_replicated_keys.iter().map(ToString::to_string).collect())
}

fn requests(world: &World, node: usize) -> usize {
    world.nodes[node].sent.iter().filter(|m| matches!(m, PeerMessage::Replicate { .. })).count()
}

#[test]
fn a_put_is_on_as_many_nodes_as_it_is_to_be_and_outlives_any_of_them() {
    for origin in 0..3 {
        for replicas in 2..=3 {
            for lost in 0..3 {
                let mut world = World::new(3);
                let clients = clients(&mut world);
                let bytes = pattern(1, 100_000);
                let short = &bytes[..700];
                for (name, bytes) in [("k", short), ("l", &bytes[..60_000])] {
                    assert_eq!(
                        put_on(&mut world, origin, clients[origin], name, bytes, replicas),
                        replicas.into()
                    );
                    assert_eq!(world.holders(name).len(), usize::from(replicas));
                }
                world.assert_drained();
                world.kill(lost);
                for node in (0..3).filter(|node| lost != 0 && *node != lost) {
                    world.fetch(node, clients[node], "k", short);
                    world.fetch(node, clients[node], "l", &bytes[..60_000]);
                }
                if lost == 0 {
                    // Nobody keeps the directory; what is here is here.
                    for node in world.holders("k") {
                        assert_eq!(world.fetch(node, clients[node], "k", short), Path::Local);
                    }
                    assert!(!world.holders("k").is_empty() && !world.holders("l").is_empty());
                }
            }
        }
    }
}

#[test]
fn what_is_written_in_place_is_replicated_too_and_so_is_the_only_one_of_its_key() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    let answer = world.reserve_with(1, clients[1], "k", 5_000, hints(2));
    let Ok(ClientReply::Reserved { reservation, extent, .. }) = answer else { panic!("{answer:?}") };
    let _ = world.call(1, clients[1], ClientMessage::Mapped { segment: extent.segment });
    world.write(1, extent, &pattern(3, 5_000));
    let sealed = world.seal(1, clients[1], reservation);
    assert!(matches!(sealed, Ok(ClientReply::Sealed { replicas: 2, kept: false, .. })), "{sealed:?}");
    assert_eq!(world.fetch(0, clients[0], "k", &pattern(3, 5_000)), Path::Local);
    let sealed = world.try_put(1, clients[1], "only", &[1], hints(2), IfExists::Error);
    assert!(matches!(sealed, Ok(ClientReply::Sealed { replicas: 2, kept: false, .. })), "{sealed:?}");
    assert_eq!(world.holders("only"), [0, 1]);
    World::assert_kind(
        world.try_put(0, clients[0], "only", &[1], hints(2), IfExists::Error),
        ErrorKind::AlreadyExists,
    );
    world.assert_drained();
}

#[test]
fn hints_that_cannot_be_met_are_refused() {
    let mut world = World::new(2);
    let client = world.client(0, 1);
    for (replicas, cache) in [(0, false), (17, false), (u8::MAX, false), (2, true)] {
        let hints = PutHints { replicas, cache, ..PutHints::default() };
        let put = world.try_put(0, client, "k", &[1], hints, IfExists::Keep);
        World::assert_kind(put, ErrorKind::Invalid);
        World::assert_kind(world.reserve_with(0, client, "k", 8, hints), ErrorKind::Invalid);
    }
    world.assert_drained();
    assert_eq!(world.used(0), 0);
}

#[test]
fn what_cannot_be_met_now_is_said_and_made_later() {
    let mut world = World::new(1);
    let home = world.client(0, 1);
    assert_eq!(put_on(&mut world, 0, home, "k", &[1, 2], 3), 1, "nobody else is there");
    assert_eq!(under_replicated(&world), (1, vec!["k".to_owned()]));
    world.add(config(1, 1, list(1), &Shape::default()));
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k"), under_replicated(&world).0), (vec![0, 1], 1), "two of three");
    assert_eq!(world.status(1).under_replicated, 1, "told with a heartbeat");
    world.add(config(2, 1, list(1), &Shape::default()));
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k"), under_replicated(&world)), (vec![0, 1, 2], (0, Vec::new())));
    let healed = world.nodes[0].events.iter().filter(|event| **event == Event::Healed).count();
    assert_eq!(healed, 1);
    world.advance(2 * HEARTBEAT_MS);
    assert_eq!(world.status(1).under_replicated, 0);
    assert_eq!(world.status(2).counters.replicas, 1);
    world.assert_drained();
}

#[test]
fn a_replica_is_not_evicted_and_a_copy_is() {
    let shape = Shape { capacity_bytes: 1 << 20, quota_bytes: 0, ..Shape::default() };
    let mut world = World::shaped(2, &shape);
    let clients = clients(&mut world);
    let bytes = pattern(1, 50_000);
    for number in 0..4 {
        assert_eq!(put_on(&mut world, 1, clients[1], &format!("r{number}"), &bytes, 2), 2);
        world.put(1, clients[1], &format!("c{number}"), &bytes);
        world.fetch(0, clients[0], &format!("c{number}"), &bytes);
    }
    World::assert_kind(world.call(0, clients[0], evict("r0", false)), ErrorKind::Denied);
    for number in 0..12 {
        world.put(0, clients[0], &format!("own{number}"), &bytes);
    }
    world.advance(200);
    assert!(world.status(0).counters.evicted > 0);
    for number in 0..4 {
        assert_eq!(world.holders(&format!("r{number}")), [0, 1]);
        assert_eq!(world.holders(&format!("c{number}")), [1], "a copy gave way");
    }
    // Nothing more may go: the next put fails rather than take a replica.
    for number in 12..20 {
        let meta = hints(1);
        let _ = world.try_put(0, clients[0], &format!("own{number}"), &bytes, meta, IfExists::Keep);
    }
    assert_eq!(world.holders("r0"), [0, 1]);
    world.assert_drained();
}

#[test]
fn copies_give_way_to_a_replica() {
    let shape = Shape { capacity_bytes: 1 << 20, quota_bytes: 0, ..Shape::default() };
    let mut world = World::default();
    world.add(config(0, 1, Vec::new(), &shape));
    world.add(config(1, 1, list(1), &Shape::default()));
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 60_000);
    for number in 0..30 {
        world.put(1, away, &format!("c{number}"), &bytes);
        world.fetch(0, home, &format!("c{number}"), &bytes);
    }
    for number in 0..5 {
        assert_eq!(put_on(&mut world, 1, away, &format!("r{number}"), &bytes, 2), 2);
    }
    world.assert_drained();
}

#[test]
fn a_copy_becomes_a_replica_where_it_is() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    world.put(1, clients[1], "k", &[7; 100]);
    world.fetch(0, clients[0], "k", &[7; 100]);
    let gets = world.nodes[0].sent.len();
    // The put keeps what is there, and sees to it that it is on two nodes from now on.
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[7; 100], 2), 2);
    let asked = |message: &PeerMessage| matches!(message, PeerMessage::Get { .. });
    assert!(!world.nodes[0].sent[gets..].iter().any(asked), "no byte is moved");
    World::assert_kind(world.call(0, clients[0], evict("k", false)), ErrorKind::Denied);
    world.kill(1);
    assert_eq!(world.fetch(0, clients[0], "k", &[7; 100]), Path::Local);
    assert_eq!(under_replicated(&world).0, 1, "that two are wanted is known");
}

/// Found by the simulation: seed 688,831.
#[test]
fn a_replica_stays_though_it_was_refused_as_a_copy_before() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    world.put(0, clients[0], "k", &[7; 100]);
    let asked = world.ask_get(1, clients[1], "k", true);
    let announces = |message: &PeerMessage| matches!(message, PeerMessage::Announce { .. });
    let request = loop {
        if let Some(request) = world.delay(0, announces) {
            break request;
        }
        assert!(world.step(), "the copy is announced");
    };
    world.settle();
    located(world.nodes[1].answers.remove(&(clients[1], asked)));
    assert_eq!(put_on(&mut world, 0, clients[0], "k", &[7; 100], 2), 2);
    let link = world.link_between(1, 0).expect("a link");
    let message = PeerMessage::Announced { refused: vec![key("k")] };
    world.feed(1, Input::PeerMessage { link, request, message, payload_len: 0 });
    world.settle();
    assert_eq!(world.holders("k"), [0, 1], "as the put was told");
    assert_eq!(world.nodes[1].index.len(), 1);
}

#[test]
fn a_put_that_keeps_a_copy_makes_a_replica_of_it() {
    let mut world = World::new(3);
    let clients = clients(&mut world);
    world.put(1, clients[1], "k", &[7; 100]);
    world.fetch(2, clients[2], "k", &[7; 100]);
    assert_eq!(put_on(&mut world, 2, clients[2], "k", &[7; 100], 2), 2, "with the node that put it first");
    assert_eq!(world.holders("k"), [1, 2]);
    world.kill(1);
    world.advance(HEALED_MS);
    assert_eq!(world.holders("k"), [0, 2]);
    world.assert_drained();
}

#[test]
fn a_put_that_keeps_a_cache_makes_it_stay() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    let cache = PutHints { cache: true, ..PutHints::default() };
    assert!(world.try_put(1, clients[1], "k", &[7; 100], cache, IfExists::Keep).is_ok());
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[7; 100], 2), 2);
    for node in [0, 1] {
        World::assert_kind(world.call(node, clients[node], evict("k", false)), ErrorKind::Denied);
    }
    world.advance(HEALED_MS);
    assert_eq!((under_replicated(&world).0, requests(&world, 0)), (0, 0));
}

#[test]
fn what_is_lost_is_made_anew_but_not_at_once() {
    for lost in 1..3 {
        let mut world = World::new(4);
        let clients = clients(&mut world);
        let bytes = pattern(1, 90_000);
        for number in 0..40 {
            let origin = 1 + number % 3;
            let name = format!("k{number}");
            assert_eq!(put_on(&mut world, origin, clients[origin], &name, &bytes[..1_000 + number], 2), 2);
        }
        world.advance(100);
        assert_eq!((under_replicated(&world).0, requests(&world, 0)), (0, 0));
        world.kill(lost);
        let lacking = under_replicated(&world).0;
        assert!(lacking > 5, "{lacking}");
        world.advance(4 * HEARTBEAT_MS);
        assert_eq!(requests(&world, 0), 0, "it may come back");
        world.advance(HEALED_MS);
        assert_eq!(under_replicated(&world), (0, Vec::new()));
        assert_eq!(requests(&world, 0) as u64, lacking, "each once");
        for number in 0..40 {
            assert_eq!(world.holders(&format!("k{number}")).len(), 2);
        }
        world.assert_drained();
    }
}

#[test]
fn a_node_that_comes_back_leaves_a_surplus_that_may_go() {
    let mut world = World::new(4);
    let clients = clients(&mut world);
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[5; 100], 2), 2);
    let before = world.holders("k");
    let replica = *before.iter().find(|node| **node != 1).expect("a replica");
    if replica == 0 {
        return a_node_that_comes_back_leaves_a_surplus_of(&mut world, &clients, 1);
    }
    a_node_that_comes_back_leaves_a_surplus_of(&mut world, &clients, replica);
}

fn a_node_that_comes_back_leaves_a_surplus_of(world: &mut World, clients: &[ClientId], away: usize) {
    for node in (0..4).filter(|node| *node != away) {
        world.part(away, node, true);
    }
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k").len(), under_replicated(world).0), (3, 0), "one more, and the one away");
    for node in (0..4).filter(|node| *node != away) {
        world.part(away, node, false);
    }
    world.advance(3_000);
    let holders = world.holders("k");
    assert_eq!(holders.len(), 3);
    let may_go: Vec<usize> = holders
        .iter()
        .copied()
        .filter(|node| world.call(*node, clients[*node], evict("k", false)).is_ok())
        .collect();
    assert_eq!(may_go.len(), 1, "one of three is too much");
    assert_ne!(may_go, [1], "not the original");
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k").len(), under_replicated(world).0), (2, 0));
    assert_eq!(requests(world, 0), 1, "nothing is made anew because of that");
    world.assert_drained();
}

#[test]
fn copies_may_go_once_their_node_knows_who_holds_the_object_for_good() {
    let mut world = World::new(4);
    let clients = clients(&mut world);
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[5; 100], 2), 2);
    for node in 0..4 {
        world.fetch(node, clients[node], "k", &[5; 100]);
    }
    world.kill(1);
    world.advance(HEALED_MS + 3_000);
    let may_go = |world: &mut World, node: usize| world.call(node, clients[node], evict("k", false)).is_ok();
    let gone = [0, 2, 3].into_iter().filter(|node| may_go(&mut world, *node)).count();
    assert_eq!(gone, 1, "two hold it for good, the third does not have to");
    world.assert_drained();
}

#[test]
fn deletes_and_times_to_live_end_on_every_node_whoever_is_lost() {
    let mut world = World::new(3);
    let clients = clients(&mut world);
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[1], 3), 3);
    let delete = ClientMessage::Delete { key: key("k") };
    assert_eq!(world.call(2, clients[2], delete), Ok(ClientReply::Deleted { existed: true }));
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k"), under_replicated(&world).0), (Vec::new(), 0));
    let ttl = PutHints { ttl_ms: Some(5_000), ..hints(2) };
    let put = world.try_put(1, clients[1], "t", &[1], ttl, IfExists::Keep);
    assert!(matches!(put, Ok(ClientReply::Sealed { replicas: 2, .. })), "{put:?}");
    world.kill(1);
    world.advance(HEALED_MS);
    assert_eq!(world.holders("t"), [0, 2], "made anew, with what is left of its time");
    world.advance(5_100 - HEALED_MS);
    assert!(world.holders("t").is_empty());
    World::assert_kind(world.get(2, clients[2], "t"), ErrorKind::NotFound);
    assert_eq!(under_replicated(&world).0, 0);
    world.assert_drained();
}

#[test]
fn a_replica_ends_by_its_own_clock_where_nobody_can_tell() {
    let mut world = World::new(3);
    let clients = clients(&mut world);
    let ttl = PutHints { ttl_ms: Some(2_000), ..hints(3) };
    assert!(world.try_put(1, clients[1], "t", &[1], ttl, IfExists::Keep).is_ok());
    world.kill(0);
    world.kill(1);
    world.advance(1_000);
    assert_eq!(world.fetch(2, clients[2], "t", &[1]), Path::Local);
    world.advance(1_200);
    assert!(world.holders("t").is_empty());
}

#[test]
fn force_takes_a_replica_and_it_is_made_anew() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    assert_eq!(put_on(&mut world, 1, clients[1], "k", &[1], 2), 2);
    for node in [0, 1] {
        assert_eq!(world.call(node, clients[node], evict("k", true)), Ok(ClientReply::Done));
        assert_eq!(under_replicated(&world), (1, vec!["k".to_owned()]));
        world.advance(HEALED_MS);
        assert_eq!((world.holders("k"), under_replicated(&world).0), (vec![0, 1], 0));
    }
    world.assert_drained();
}

#[test]
fn a_directory_that_starts_again_learns_what_is_wanted() {
    let mut world = World::new(4);
    let clients = clients(&mut world);
    for number in 0..20 {
        assert_eq!(put_on(&mut world, 1, clients[1], &format!("k{number}"), &[1], 2), 2);
    }
    world.restart(0, config(0, 2, Vec::new(), &Shape::default()));
    world.advance(3_000);
    assert_eq!(under_replicated(&world).0, 0, "what the directory's own node held is made anew");
    world.kill(1);
    assert_eq!(under_replicated(&world).0, 20, "the replicas say that two are wanted");
    world.advance(HEALED_MS);
    assert_eq!(under_replicated(&world).0, 0);
    for number in 0..20 {
        assert_eq!(world.holders(&format!("k{number}")).len(), 2);
    }
}

#[test]
fn repair_waits_for_room_and_says_which_objects_lack() {
    let small = Shape { capacity_bytes: 1 << 20, quota_bytes: 0, ..Shape::default() };
    let mut world = World::default();
    world.add(config(0, 1, Vec::new(), &small));
    world.add(config(1, 1, list(1), &Shape::default()));
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 60_000);
    for number in 0..30 {
        let _ = world.try_put(0, home, &format!("full{number}"), &bytes, hints(1), IfExists::Keep);
    }
    for number in 0..10 {
        assert_eq!(put_on(&mut world, 1, away, &format!("k{number}"), &bytes, 2), 1, "no room");
    }
    let (count, names) = under_replicated(&world);
    assert_eq!((count, names.len(), names[0].as_str()), (10, 8, "k0"), "the first few");
    world.advance(20_000);
    let asked = requests(&world, 0);
    assert!(asked <= 10 * 20, "{asked} requests in 20 s");
    assert_eq!(under_replicated(&world).0, 10);
    for number in 0..15 {
        let delete = ClientMessage::Delete { key: key(&format!("full{number}")) };
        assert!(world.call(0, home, delete).is_ok());
    }
    world.advance(12_000);
    assert_eq!(under_replicated(&world).0, 0);
    world.assert_drained();
}

#[test]
fn many_repairs_are_made_a_few_at_a_time() {
    let mut world = World::shaped(3, &Shape { threshold_bytes: Some(0), ..Shape::default() });
    let clients = clients(&mut world);
    for number in 0..100 {
        assert_eq!(put_on(&mut world, 1, clients[1], &format!("k{number}"), &[1; 50], 2), 2);
    }
    world.hold_reads = true;
    world.kill(1);
    world.advance(HEALED_MS);
    let mut rounds = 0;
    while let Some(read) = world.held.pop() {
        assert!(world.held.len() < 16, "{} under way at a time", world.held.len() + 1);
        rounds += usize::from(world.held.len() == 15);
        world.finish_read(read);
        world.advance(2);
    }
    assert!(rounds > 50, "as many as may be, as long as there are more: {rounds}");
    assert_eq!(under_replicated(&world).0, 0);
    world.hold_reads = false;
    world.assert_drained();
}

fn answers(world: &World) -> usize {
    let replicated = |message: &&PeerMessage| matches!(message, PeerMessage::Replicated);
    world.nodes.iter().flat_map(|node| &node.sent).filter(replicated).count()
}

/// What a node answers to REPLICATE of an object, asked by a peer that the test plays.
fn ask_for(world: &mut World, node: usize, object: Announced, holders: Vec<Holder>) -> Option<PeerMessage> {
    let link = world.link_between(node, 1 - node).expect("a link");
    let before = world.nodes[node].sent.len();
    let message = PeerMessage::Replicate { object, holders };
    world.feed(node, Input::PeerMessage { link, request: 9_999, message, payload_len: 0 });
    world.settle();
    let answers =
        |message: &&PeerMessage| matches!(message, PeerMessage::Replicated | PeerMessage::Failed { .. });
    world.nodes[node].sent[before..].iter().find(answers).cloned()
}

fn why(answer: Option<PeerMessage>) -> ErrorKind {
    match answer {
        Some(PeerMessage::Failed { error }) => error.kind(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_replica_that_cannot_be_is_refused_for_a_reason() {
    let mut world = World::new(2);
    let clients = clients(&mut world);
    let id = world.put(1, clients[1], "k", &[1; 50]);
    let there = || vec![Holder { node: NodeId(2), address: "a1".to_owned() }];
    let replica = |name: &str, object: ObjectId, len_bytes: u64| Announced {
        role: Role::Replica,
        replicas: 2,
        ..announced(name, object, len_bytes)
    };
    let here = vec![Holder { node: NodeId(1), address: "a0".to_owned() }];
    assert_eq!(why(ask_for(&mut world, 0, replica("k", id, 50), here)), ErrorKind::NotFound, "itself alone");
    let long = replica("k", id, u64::MAX);
    assert_eq!(why(ask_for(&mut world, 0, long, there())), ErrorKind::TooLarge);
    let other = ObjectId { number: 77, ..id };
    let answer = ask_for(&mut world, 0, replica("k", other, 50), there());
    assert_eq!(why(answer), ErrorKind::Stale, "the holder has another object of the key");
    assert_eq!(ask_for(&mut world, 0, replica("k", id, 50), there()), Some(PeerMessage::Replicated));
    assert_eq!(ask_for(&mut world, 0, replica("k", id, 50), there()), Some(PeerMessage::Replicated), "again");
    world.put(0, clients[0], "own", &[1]);
    let answer = ask_for(&mut world, 0, replica("own", other, 50), there());
    assert_eq!(why(answer), ErrorKind::AlreadyExists);
    let delete = ClientMessage::Delete { key: key("k") };
    assert_eq!(world.call(1, clients[1], delete), Ok(ClientReply::Deleted { existed: true }));
    assert_eq!(why(ask_for(&mut world, 0, replica("k", id, 50), there())), ErrorKind::Stale, "deleted");
    world.assert_drained();
}

#[test]
fn only_so_many_replicas_are_fetched_at_a_time() {
    let shape = Shape { threshold_bytes: Some(0), ..Shape::default() };
    let mut world = World::shaped(2, &shape);
    let clients = clients(&mut world);
    world.hold_reads = true;
    let link = world.link_between(0, 1).expect("a link");
    for number in 0..70 {
        let name = format!("k{number}");
        let id = world.put(1, clients[1], &name, &[1; 50]);
        let object = Announced { role: Role::Replica, replicas: 2, ..announced(&name, id, 50) };
        let holders = vec![Holder { node: NodeId(2), address: "a1".to_owned() }];
        let message = PeerMessage::Replicate { object, holders };
        world.feed(0, Input::PeerMessage { link, request: 5_000 + number, message, payload_len: 0 });
        world.settle();
    }
    let busy =
        |m: &&PeerMessage| matches!(m, PeerMessage::Failed { error } if error.kind() == ErrorKind::Busy);
    assert_eq!(world.nodes[0].sent.iter().filter(busy).count(), 6);
    world.hold_reads = false;
    for read in std::mem::take(&mut world.held) {
        world.finish_read(read);
    }
    world.settle();
    assert_eq!(answers(&world), 64);
    world.assert_drained();
}

#[test]
fn a_node_that_does_not_answer_holds_a_put_up_only_so_long() {
    let shape = Shape { threshold_bytes: Some(0), ..Shape::default() };
    let mut world = World::shaped(2, &shape);
    let clients = clients(&mut world);
    world.hold_reads = true;
    let meta = crate::ObjectMeta::bytes(50).expect("a length");
    let put = ClientMessage::Put { key: key("k"), meta, hints: hints(2), if_exists: IfExists::Keep };
    let request = world.ask_with(1, clients[1], put, &[1; 50]);
    world.advance(9_000);
    assert!(world.answer(1, clients[1], request).is_none());
    assert!(world.get(1, clients[1], "k").is_ok(), "it can be read meanwhile");
    world.advance(2_000);
    let answer = world.answer(1, clients[1], request);
    assert!(matches!(answer, Some(Ok(ClientReply::Sealed { replicas: 1, .. }))), "{answer:?}");
    // What was on its way arrives.
    world.hold_reads = false;
    for read in std::mem::take(&mut world.held) {
        world.finish_read(read);
    }
    world.advance(HEALED_MS);
    assert_eq!((world.holders("k"), under_replicated(&world).0), (vec![0, 1], 0));
}

#[test]
fn a_put_asks_the_next_node_when_one_is_lost_or_cannot_be_reached() {
    for reachable in [false, true] {
        let shape = Shape { threshold_bytes: Some(0), ..Shape::default() };
        let mut world = World::shaped(4, &shape);
        let clients = clients(&mut world);
        for node in 0..3 {
            if !reachable {
                world.unreachable.insert(format!("a{node}"));
            }
        }
        world.hold_reads = reachable;
        let meta = crate::ObjectMeta::bytes(50).expect("a length");
        let put = ClientMessage::Put { key: key("k"), meta, hints: hints(2), if_exists: IfExists::Keep };
        let request = world.ask_with(3, clients[3], put, &[1; 50]);
        world.settle();
        if reachable {
            let first = world.held[0].node;
            world.hold_reads = false;
            if first != 0 {
                world.kill(first);
            } else {
                let read = world.held.remove(0);
                world.finish_read(read);
            }
            world.settle();
        } else {
            world.advance(3_000);
        }
        let answer = world.answer(3, clients[3], request);
        // The directory's node is linked in any case.
        assert!(matches!(answer, Some(Ok(ClientReply::Sealed { replicas: 2, .. }))), "{answer:?}");
        assert_eq!(world.holders("k").len(), 2);
    }
}

// Reads.

/// A reader of three, with a large object on the two others.
fn reader_of_two() -> (World, Vec<ClientId>, Vec<u8>) {
    let shape = Shape { threshold_bytes: Some(0), ..Shape::default() };
    let mut world = World::shaped(4, &shape);
    let clients = clients(&mut world);
    let bytes = pattern(9, 40_000);
    let answer = world.try_put(1, clients[1], "k", &bytes, hints(3), IfExists::Keep);
    assert!(matches!(answer, Ok(ClientReply::Sealed { replicas: 3, .. })), "{answer:?}");
    world.advance(100);
    (world, clients, bytes)
}

fn located(answer: Option<Answer>) -> Located {
    match answer {
        Some(Ok(ClientReply::Located(located))) => located,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_whose_holder_is_lost_goes_on_at_another_at_once() {
    for range in [None, Some(Range { start: 1_000, len_bytes: 30_000 })] {
        let (mut world, clients, bytes) = reader_of_two();
        let reader = (0..4).find(|node| !world.holders("k").contains(node)).expect("one has it not");
        world.hold_reads = true;
        let get = ClientMessage::Get {
            key: key("k"),
            range,
            timeout_ms: 3_000,
            keep: true,
            threshold_bytes: None,
            tier: None,
        };
        let request = world.ask(reader, clients[reader], get);
        world.settle();
        let mut tried = Vec::new();
        for _ in 0..2 {
            let read = *world.held.first().expect("a read is under way");
            let holder = (0..4).find(|node| world.link_between(reader, *node) == Some(read.link));
            let holder = holder.expect("a holder");
            tried.push(holder);
            match range {
                Some(_) => world.fail_held(read),
                None => world.kill(holder),
            }
            world.settle();
        }
        assert_eq!(world.held.len(), 1, "without a moment's pause");
        world.hold_reads = false;
        let read = world.held.remove(0);
        let giver = (0..4).find(|node| world.link_between(reader, *node) == Some(read.link));
        world.finish_read(read);
        world.settle();
        let located = located(world.answer(reader, clients[reader], request));
        let expected = range.map_or(&bytes[..], |_| &bytes[1_000..31_000]);
        assert_eq!(world.nodes[reader].bytes(located.extent), expected);
        let carried = located.carried.expect("from a peer");
        assert_eq!(*carried.from, format!("n{}", giver.expect("a giver")));
        tried.push(giver.expect("a giver"));
        tried.sort_unstable();
        tried.dedup();
        assert_eq!(tried.len(), 3, "each holder once");
        world.unpin(reader, clients[reader], located.generation);
    }
}

#[test]
fn a_holder_that_refuses_is_passed_over_at_once() {
    let (mut world, clients, bytes) = reader_of_two();
    let holders = world.holders("k");
    let reader = (1..4).find(|node| !holders.contains(node));
    let Some(reader) = reader else { return };
    world.fetch(reader, clients[reader], "k", &bytes);
    assert_eq!(world.call(reader, clients[reader], evict("k", true)), Ok(ClientReply::Done));
    // The place that it remembers, and every holder but one, have given the object up.
    for holder in &holders[1..] {
        assert_eq!(world.call(*holder, clients[*holder], evict("k", true)), Ok(ClientReply::Done));
    }
    let now = world.now;
    world.fetch(reader, clients[reader], "k", &bytes);
    assert_eq!(world.now, now, "no pause");
}

#[test]
fn the_nearest_holder_is_asked_and_of_equals_not_always_the_same() {
    let mut world = World::new(4);
    let clients = clients(&mut world);
    for peer in 1..4 {
        // A get makes a link.
        world.put(0, clients[0], &format!("l{peer}"), &[1]);
        world.fetch(peer, clients[peer], &format!("l{peer}"), &[1]);
    }
    let engine = &mut world.nodes[0].engine;
    let nodes = [NodeId(2), NodeId(3), NodeId(4)];
    for (node, ns) in nodes.iter().zip([900_000, 40_000, 50_000_000]) {
        engine.peers.get_mut(node).expect("a peer").round_trip_ns = Some(ns);
    }
    let nearest = |engine: &crate::engine::Engine, number: usize| {
        engine.nearest(&key(&format!("k{number}")), nodes.into_iter())
    };
    assert!((0..50).all(|number| nearest(engine, number) == Some(NodeId(3))));
    engine.peers.get_mut(&NodeId(2)).expect("a peer").round_trip_ns = Some(45_000);
    let seconds = (0..200).filter(|number| nearest(engine, *number) == Some(NodeId(2))).count();
    assert!((50..150).contains(&seconds), "{seconds} of 200 go to one of two that are equally near");
    engine.peers.get_mut(&NodeId(3)).expect("a peer").round_trip_ns = None;
    assert!(
        (0..50).all(|number| nearest(engine, number) == Some(NodeId(2))),
        "one that was not measured is last"
    );
    assert_eq!(engine.nearest(&key("k"), std::iter::empty()), None);
}

#[test]
fn replicas_go_where_there_is_room_and_are_spread() {
    let mut world = World::new(4);
    let engine = &mut world.nodes[0].engine;
    let nodes = [NodeId(2), NodeId(3), NodeId(4)];
    for (node, room) in nodes.iter().zip([4_000_000, 4_000_000, 500]) {
        engine.peers.get_mut(node).expect("a peer").room_bytes = Some(room);
    }
    let mut first = [0; 3];
    for number in 0..300 {
        let order = engine.roomiest(&key(&format!("k{number}")), 1_000, nodes.into_iter());
        assert_eq!(order.len(), 3);
        first[nodes.iter().position(|node| *node == order[0]).expect("one of them")] += 1;
        assert_eq!(order[2], NodeId(4), "there is no room for it");
    }
    assert!(first[0] > 100 && first[1] > 100, "{first:?}");
    engine.peers.get_mut(&NodeId(2)).expect("a peer").room_bytes = Some(1_000_000);
    let more = (0..300)
        .filter(|number| {
            engine.roomiest(&key(&format!("k{number}")), 1_000, nodes.into_iter())[0] == NodeId(3)
        })
        .count();
    assert!(more > 220, "{more} of 300 go to the one with four times the room");
}

#[test]
fn round_trips_and_room_are_told_with_heartbeats() {
    let mut world = World::new(3);
    world.advance(3 * HEARTBEAT_MS);
    let status = world.status(1);
    assert_eq!(status.peers.len(), 2);
    for peer in &status.peers {
        let expected = if peer.linked { Some(1) } else { None };
        assert_eq!(peer.round_trip_ns, expected, "as long as time stands still");
        assert_eq!(peer.room_bytes, Some(Shape::default().capacity_bytes), "{}", peer.name);
    }
    let client = world.client(2, 1);
    for number in 0..40 {
        world.put(2, client, &format!("k{number}"), &[0; 60_000]);
    }
    world.advance(3 * HEARTBEAT_MS);
    let status = world.status(1);
    let peer = status.peers.iter().find(|peer| peer.name == "n2").expect("a peer");
    assert!(
        peer.room_bytes.expect("told") < Shape::default().capacity_bytes * 3 / 4,
        "through the directory"
    );
}

#[test]
fn surplus_is_believed_of_the_directory_alone() {
    let mut world = World::new(3);
    let clients = clients(&mut world);
    assert_eq!(put_on(&mut world, 0, clients[0], "k", &[1], 3), 3);
    let id = world.nodes[2].index.values().next().expect("a replica").object;
    let message = PeerMessage::Surplus {
        key: key("k"),
        object: id,
        lasting: vec![(NodeId(1), Epoch(1)), (NodeId(2), Epoch(1))],
    };
    let link = LinkId(500);
    world.feed(2, Input::LinkUp { link, fabric: FABRIC, address: "x".to_owned(), inbound: true });
    let member = crate::wire::Member {
        node: NodeId(99),
        epoch: Epoch(1),
        name: "x".to_owned(),
        address: "x".to_owned(),
    };
    let hello = PeerMessage::Hello { member, version_min: 1, version_max: 1, keeps: true };
    for message in [hello, message.clone()] {
        world.feed(2, Input::PeerMessage { link, request: 0, message, payload_len: 0 });
    }
    World::assert_kind(world.call(2, clients[2], evict("k", false)), ErrorKind::Denied);
    let link = world.link_between(2, 0).expect("a link");
    world.feed(2, Input::PeerMessage { link, request: 0, message, payload_len: 0 });
    world.feed(2, Input::LinkDown { link: LinkId(500), why: StoreError::unavailable("it", "gone") });
    assert_eq!(world.call(2, clients[2], evict("k", false)), Ok(ClientReply::Done));
}
