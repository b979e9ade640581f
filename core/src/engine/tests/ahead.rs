//! Puts that ask nobody: what is granted ahead, taken in, refused, and taken back.

use super::world::*;
use crate::engine::{Attachment, Input, PutAhead};
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent};
use crate::wire::{ClientMessage, ClientReply, IfExists, PutHints};

/// A chunk that a client was granted and has mapped.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    number: u64,
    extent: Extent,
    objects: u32,
}

fn grant(world: &mut World, node: usize, client: ClientId) -> Result<Chunk, StoreError> {
    let ring = !world.nodes[node].rings.contains_key(&client);
    match world.call(node, client, ClientMessage::Ahead { ring }) {
        Ok(ClientReply::Ahead { chunk, extent, objects, .. }) => {
            let mapped = ClientMessage::Mapped { segment: extent.segment };
            assert_eq!(world.call(node, client, mapped), Ok(ClientReply::Done));
            Ok(Chunk { number: chunk, extent, objects })
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    }
}

fn record(chunk: Chunk, offset: u64, name: &str, len_bytes: u64) -> PutAhead {
    let meta = ObjectMeta::bytes(len_bytes).expect("a length");
    PutAhead { chunk: chunk.number, offset, key: key(name), meta, hints: PutHints::default() }
}

/// Writes an object and publishes it; nobody is asked, and nothing is drained.
fn put(world: &mut World, client: ClientId, chunk: Chunk, offset: u64, name: &str, bytes: &[u8]) {
    let (position, number) = world.ring(0, client).claim().expect("it is open");
    assert_eq!(number, chunk.number);
    let extent = Extent {
        segment: chunk.extent.segment,
        offset: chunk.extent.offset + offset,
        len_bytes: bytes.len() as u64,
    };
    world.write(0, extent, bytes);
    let put = record(chunk, offset, name, bytes.len() as u64);
    world.ring(0, client).complete(position, Some(put));
}

#[test]
fn whoever_asks_finds_what_was_published() {
    let mut world = World::new(2);
    let (writer, reader, away) = (world.client(0, 1), world.client(0, 2), world.client(1, 1));
    let chunk = grant(&mut world, 0, writer).expect("memory");
    assert_eq!(
        world.nodes[0].attachments[2],
        Attachment::Ahead { segment: Some(chunk.extent.segment), ring: true }
    );
    let bytes = [pattern(1, 1_000), pattern(2, 0), pattern(3, 5_000)];
    put(&mut world, writer, chunk, 0, "a", &bytes[0]);
    put(&mut world, writer, chunk, 1_024, "empty", &bytes[1]);
    put(&mut world, writer, chunk, 4_096, "b", &bytes[2]);
    assert_eq!(world.status(0).objects, 0, "nobody has asked");
    assert_eq!(world.fetch(0, reader, "a", &bytes[0]), Path::Local);
    assert_eq!(world.status(0).objects, 3, "all that was published is taken in");
    world.fetch(0, reader, "empty", &bytes[1]);
    world.fetch(1, away, "b", &bytes[2]);
    assert_eq!((world.status(0).counters.puts, world.status(0).counters.ahead), (3, 3));

    let waiting = ClientMessage::Wait { key: key("later"), timeout_ms: 1_000 };
    let request = world.ask(1, away, waiting);
    world.settle();
    assert!(world.nodes[0].engine.awaits_objects(), "so clients are to ring");
    put(&mut world, writer, chunk, 9_216, "later", &[1]);
    world.feed(
        0,
        Input::ClientRequest {
            client: writer,
            request: 0,
            message: ClientMessage::Drain,
            payload: bytes::Bytes::new(),
        },
    );
    world.settle();
    assert_eq!(world.answer(1, away, request), Some(Ok(ClientReply::Exists)));
    assert!(world.answer(0, writer, 0).is_none(), "a drain has no answer");
    world.leave(0, writer);
    world.assert_drained();
}

#[test]
fn a_key_that_exists_is_kept() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let chunk = grant(&mut world, 0, client).expect("memory");
    let first = pattern(1, 100);
    world.put(0, client, "k", &first);
    put(&mut world, client, chunk, 0, "k", &pattern(2, 100));
    put(&mut world, client, chunk, 128, "other", &pattern(3, 100));
    put(&mut world, client, chunk, 256, "other", &pattern(4, 100));
    world.fetch(0, client, "k", &first);
    world.fetch(0, client, "other", &pattern(3, 100));
    let refused = world.try_put(0, client, "other", &first, PutHints::default(), IfExists::Error);
    World::assert_kind(refused, ErrorKind::AlreadyExists);
    assert_eq!(world.status(0).objects, 2);
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn what_was_published_before_its_client_left_is_there_and_what_was_begun_is_not() {
    let mut world = World::new(1);
    let (client, other) = (world.client(0, 1), world.client(0, 2));
    let chunk = grant(&mut world, 0, client).expect("memory");
    let begun = world.ring(0, client).claim().expect("it is open");
    put(&mut world, client, chunk, 64, "k", &[7; 10]);
    assert!(world.status(0).tiers[0].ahead_bytes > 0);
    world.leave(0, client);
    world.fetch(0, other, "k", &[7; 10]);
    assert_eq!((begun.0, world.status(0).objects, world.status(0).tiers[0].ahead_bytes), (0, 1, 0));
    world.feed(0, Input::ClientProcessGone { client });
    world.assert_drained();
}

#[test]
fn records_that_lie_end_their_session_and_cost_nothing_that_was_stored() {
    let good = |chunk: Chunk| record(chunk, 0, "k", 100);
    type Lie = fn(PutAhead, Chunk) -> PutAhead;
    let lies: [(&str, Lie); 8] = [
        ("another chunk", |put, chunk| PutAhead { chunk: chunk.number + 1, ..put }),
        ("no chunk", |put, _| PutAhead { chunk: 0, ..put }),
        ("behind its end", |put, chunk| PutAhead { offset: chunk.extent.len_bytes, ..put }),
        ("over its end", |put, chunk| PutAhead { offset: chunk.extent.len_bytes - 64, ..put }),
        ("at no granule", |put, _| PutAhead { offset: 8, ..put }),
        ("far away", |put, _| PutAhead { offset: u64::MAX - 63, ..put }),
        ("a page at no page", |put, chunk| PutAhead {
            offset: 64,
            meta: ObjectMeta::bytes(4_096.min(chunk.extent.len_bytes - 64)).expect("a length"),
            ..put
        }),
        ("where another one is", |put, _| PutAhead { offset: 128, ..put }),
    ];
    for (what, lie) in lies {
        let mut world = World::new(1);
        let (client, other) = (world.client(0, 1), world.client(0, 2));
        world.put(0, other, "stored", &[1; 100]);
        let chunk = grant(&mut world, 0, client).expect("memory");
        put(&mut world, client, chunk, 128, "fine", &[2; 64]);
        let (position, _) = world.ring(0, client).claim().expect("open");
        world.ring(0, client).complete(position, Some(lie(good(chunk), chunk)));
        world.fetch(0, other, "stored", &[1; 100]);
        assert_eq!(world.nodes[0].closed_clients, [client], "{what}");
        world.fetch(0, other, "fine", &[2; 64]);
        world.leave(0, client);
        world.assert_drained();
    }
}

#[test]
fn nothing_is_taken_in_from_memory_that_others_cannot_map_yet() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let granted = world.call(0, client, ClientMessage::Ahead { ring: true });
    let Ok(ClientReply::Ahead { chunk, extent, objects, .. }) = granted else { panic!("{granted:?}") };
    let chunk = Chunk { number: chunk, extent, objects };
    put(&mut world, client, chunk, 0, "k", &[1; 8]);
    world.advance(200);
    assert_eq!(world.nodes[0].closed_clients, [client], "it has not said that it has mapped the segment");
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn a_chunk_is_good_for_so_many_objects_and_each_has_a_slot() {
    let mut world = World::shaped(1, &Shape { objects_max: 64, ..Shape::default() });
    let (client, other) = (world.client(0, 1), world.client(0, 2));
    let chunk = grant(&mut world, 0, client).expect("memory");
    assert_eq!(chunk.objects, 8, "an eighth of the free slots");
    let mut puts = 0;
    while world.try_put(0, other, &format!("o{puts}"), &[1], PutHints::default(), IfExists::Keep).is_ok() {
        puts += 1;
    }
    assert_eq!(puts, 64 - 8, "the slots that are kept are nobody else's");
    World::assert_kind(grant(&mut world, 0, other), ErrorKind::Busy);
    for number in 0..u64::from(chunk.objects) {
        put(&mut world, client, chunk, number * 64, &format!("a{number}"), &[2; 64]);
    }
    world.fetch(0, other, "a7", &[2; 64]);
    assert_eq!((world.status(0).objects, world.nodes[0].closed_clients.len()), (64, 0));
    put(&mut world, client, chunk, 8 * 64, "one more", &[2; 64]);
    World::assert_kind(world.get(0, other, "one more"), ErrorKind::NotFound);
    assert_eq!(world.nodes[0].closed_clients, [client]);
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn a_client_goes_from_chunk_to_chunk_and_the_old_one_is_free_when_all_of_it_is_over() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let first = grant(&mut world, 0, client).expect("memory");
    let second = grant(&mut world, 0, client).expect("the next");
    World::assert_kind(grant(&mut world, 0, client), ErrorKind::Busy);
    assert_eq!(first.extent.segment, second.extent.segment, "the segment is mapped already");
    let granted = world.status(0).tiers[0].ahead_bytes;
    assert_eq!(granted, first.extent.len_bytes + second.extent.len_bytes);

    let (slow, _) = world.ring(0, client).claim().expect("open");
    world.ring(0, client).switch();
    put(&mut world, client, second, 0, "second", &[2; 64]);
    world.fetch(0, client, "second", &[2; 64]);
    assert_eq!(world.status(0).tiers[0].ahead_bytes, granted - 64, "a put is under way in the first");
    world.ring(0, client).complete(slow, Some(record(first, 0, "slow", 64)));
    world.fetch(0, client, "slow", &[0; 64]);
    assert_eq!(world.status(0).tiers[0].ahead_bytes, second.extent.len_bytes - 64);
    let third = grant(&mut world, 0, client).expect("another next");
    assert_eq!(third.number, 3);
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn memory_that_is_not_used_goes_back() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let chunk = grant(&mut world, 0, client).expect("memory");
    for number in 0..5 {
        world.advance(1_500);
        put(&mut world, client, chunk, number * 64, &format!("{number}"), &[1; 64]);
        world.fetch(0, client, &format!("{number}"), &[1; 64]);
    }
    assert!(world.status(0).tiers[0].ahead_bytes > 0, "it is used now and then");
    let (slow, _) = world.ring(0, client).claim().expect("open");
    world.advance(4_100);
    assert!(world.ring(0, client).claim().is_none(), "it is taken back");
    assert!(world.status(0).tiers[0].ahead_bytes > 0, "and a put is under way in it");
    world.ring(0, client).complete(slow, Some(record(chunk, 5 * 64, "slow", 64)));
    world.fetch(0, client, "slow", &[0; 64]);
    assert_eq!(world.status(0).tiers[0].ahead_bytes, 0);
    let again = grant(&mut world, 0, client).expect("memory again");
    put(&mut world, client, again, 0, "again", &[3; 64]);
    world.fetch(0, client, "again", &[3; 64]);
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn memory_is_taken_back_when_room_is_short_and_never_granted_at_the_cost_of_what_is_stored() {
    let shape = Shape { capacity_bytes: 1 << 20, quota_bytes: 512 << 10, ..Shape::default() };
    let mut world = World::shaped(1, &shape);
    let (client, other) = (world.client(0, 1), world.client(0, 2));
    grant(&mut world, 0, client).expect("memory");
    grant(&mut world, 0, client).expect("and the next");
    let mut stored = 0;
    while world
        .try_put(0, other, &format!("o{stored}"), &[1; 16_384], PutHints::default(), IfExists::Keep)
        .is_ok()
    {
        stored += 1;
    }
    assert_eq!(world.status(0).tiers[0].ahead_bytes, 0, "it was taken back first");
    assert_eq!(stored, 64, "all of the tier");
    World::assert_kind(grant(&mut world, 0, client), ErrorKind::NoSpace);
    assert_eq!(world.status(0).objects, 64);
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn without_a_ring_there_is_no_memory_ahead() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    world.nodes[0].fail_rings = true;
    World::assert_kind(grant(&mut world, 0, client), ErrorKind::Os);
    assert_eq!(world.status(0).tiers[0].ahead_bytes, 0);
    world.nodes[0].fail_rings = false;
    assert!(grant(&mut world, 0, client).is_ok());
    world.leave(0, client);
    world.assert_drained();
}

#[test]
fn an_object_with_a_time_to_live_goes_and_a_pinned_one_stays() {
    let mut world = World::new(1);
    let client = world.client(0, 1);
    let chunk = grant(&mut world, 0, client).expect("memory");
    for (number, (name, hints)) in [
        ("short", PutHints { ttl_ms: Some(100), ..PutHints::default() }),
        ("pinned", PutHints { pin: true, cache: true, ..PutHints::default() }),
    ]
    .into_iter()
    .enumerate()
    {
        let (position, _) = world.ring(0, client).claim().expect("open");
        let put = PutAhead { hints, ..record(chunk, 64 * number as u64, name, 8) };
        world.ring(0, client).complete(position, Some(put));
    }
    world.fetch(0, client, "short", &[0; 8]);
    world.advance(150);
    World::assert_kind(world.get(0, client, "short"), ErrorKind::NotFound);
    world.fetch(0, client, "pinned", &[0; 8]);
    world.leave(0, client);
    world.assert_drained();
}
