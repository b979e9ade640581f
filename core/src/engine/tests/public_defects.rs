//! What went wrong in public in systems of this kind, as it would look here. Each test names the report, says what the
//! defect was, and fails if what protects from it here is taken out. Not a history of this code's own mistakes.

use super::remote::reading;
use super::world::{HEARTBEAT_MS, LEASE_MS, Shape, World, config, key, pattern};
use crate::engine::Input;
use crate::error::ErrorKind;
use crate::receipt::Path;
use crate::tier::{ClientId, Generation, LeaseId, TransferId};
use crate::wire::{ClientMessage, ClientReply, IfExists, Located, PeerMessage, Range};

fn part(start: u64, len_bytes: u64) -> ClientMessage {
    ClientMessage::Get {
        key: key("k"),
        range: Some(Range { start, len_bytes }),
        timeout_ms: 3_000,
        keep: false,
        threshold_bytes: None,
        tier: None,
    }
}

fn replace_on_owner(world: &mut World, home: ClientId) {
    let evict = ClientMessage::Evict { key: key("k"), force: true };
    assert_eq!(world.call(0, home, evict), Ok(ClientReply::Done));
    world.advance(200);
    world.put(0, home, "other", &pattern(2, 1_000));
}

/// Mooncake #850: the master freed an object's memory when its lease was over; a get that was slower than its lease
/// read what was there by then and called it a success. Here that is a read whose last byte comes after the lease,
/// from an extent that holds another object: neither time nor the fabric's word may make a success of it. The same
/// goes for a read that began with no lease at all, at a place that is remembered.
#[test]
fn mooncake_850_a_slow_get_does_not_return_memory_that_was_reclaimed() {
    for remembered in [false, true] {
        let mut world = World::shaped(2, &reading());
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        world.put(0, home, "k", &pattern(1, 1_000));
        let extent = world.nodes[0].index.values().next().expect("the object").extent;
        if remembered {
            let request = world.ask_get(1, away, "k", false);
            world.settle();
            let Some(Ok(ClientReply::Located(Located { generation, .. }))) = world.answer(1, away, request)
            else {
                panic!("located")
            };
            world.unpin(1, away, generation);
        }
        world.hold_reads = true;
        let request = world.ask_get(1, away, "k", true);
        world.settle();
        assert_eq!(world.held.len(), 1);
        world.advance(u64::from(LEASE_MS) + 1);
        replace_on_owner(&mut world, home);
        let reused = world.nodes[0].index.values().next().expect("the other object").extent;
        assert_eq!(reused, extent, "the read reads the other object's bytes");
        world.hold_reads = false;
        for read in std::mem::take(&mut world.held) {
            world.finish_read(read);
        }
        world.advance(3_000);
        let answer = world.answer(1, away, request).expect("an answer");
        World::assert_kind(answer, ErrorKind::NotFound);
        assert!(world.nodes[1].index.is_empty(), "nor was it kept for others");
        world.assert_drained();
    }
}

/// Mooncake #4239: the get of one key looked at its lease before it called a read a success, and a variant of the
/// batch get did not. Here every get ends in the same few lines, and this looks at every way to them: whole and part,
/// kept and not, joined by a second one, by a remembered place, many at a time, with and without a reused extent.
#[test]
fn mooncake_4239_no_kind_of_get_goes_without_the_check() {
    for remembered in [false, true] {
        let mut world = World::shaped(2, &reading());
        let (home, away, other) = (world.client(0, 1), world.client(1, 1), world.client(1, 2));
        world.put(0, home, "k", &pattern(1, 1_000));
        if remembered {
            let Ok(ClientReply::Located(located)) = world.call(1, away, part(0, 1_000)) else {
                panic!("located")
            };
            world.unpin(1, away, located.generation);
        }
        world.hold_reads = true;
        let requests = [
            (away, world.ask_get(1, away, "k", true)),
            (other, world.ask_get(1, other, "k", true)),
            (away, world.ask_get(1, away, "k", false)),
            (away, world.ask(1, away, part(0, 1_000))),
            (other, world.ask(1, other, part(10, 500))),
            (other, world.ask(1, other, part(999, 1))),
        ];
        world.settle();
        let joined = if remembered { 0 } else { 1 };
        assert_eq!(
            world.held.len(),
            requests.len() - joined,
            "one has joined another, if its word is not read too"
        );
        world.advance(u64::from(LEASE_MS) + 1);
        replace_on_owner(&mut world, home);
        world.hold_reads = false;
        for read in std::mem::take(&mut world.held) {
            world.finish_read(read);
        }
        world.advance(3_000);
        for (client, request) in requests {
            World::assert_kind(world.answer(1, client, request).expect("an answer"), ErrorKind::NotFound);
        }
        world.assert_drained();
    }
}

/// Ray #201: a worker died while it was blocked in a get; when its object was sealed, the store wrote the answer to
/// the dead worker, failed, and died. Here the engine forgets who has left: what they waited for goes to nobody, no
/// pin is made for them (it would hold the object for ever), and those who wait beside them are answered.
#[test]
fn plasma_201_an_object_that_a_dead_client_waits_for_is_put_and_served() {
    let mut world = World::shaped(2, &reading());
    let (home, dead, alive) = (world.client(0, 1), world.client(1, 1), world.client(1, 2));
    let wait = || ClientMessage::Wait { key: key("k"), timeout_ms: 10_000 };
    let waiting =
        [(1, dead), (0, home)].map(|(node, client)| (node, client, world.ask(node, client, wait())));
    let waits = world.ask(1, alive, wait());
    world.settle();
    world.leave(1, dead);
    world.leave(0, home);
    let home = world.client(0, 2);
    world.put(0, home, "k", &pattern(1, 1_000));
    assert_eq!(world.answer(1, alive, waits), Some(Ok(ClientReply::Exists)));
    for (node, client, request) in waiting {
        assert_eq!(world.answer(node, client, request), None, "there is nobody to answer");
    }
    // The same in the middle of a read that another one waits for too.
    let dead = world.client(1, 3);
    world.hold_reads = true;
    let lost = world.ask_get(1, dead, "k", true);
    let request = world.ask_get(1, alive, "k", true);
    world.settle();
    world.leave(1, dead);
    for read in std::mem::take(&mut world.held) {
        world.finish_read(read);
    }
    world.settle();
    assert!(matches!(world.answer(1, alive, request), Some(Ok(ClientReply::Located(_)))));
    assert_eq!(world.answer(1, dead, lost), None);
    assert!(!world.nodes[1].pins.contains_key(&dead), "nobody would ever take it back");
    world.assert_drained();
}

/// Ray #3628: a client released an object that the store's books did not list as its own, and a check ended the store
/// and with it the node. Here whatever is given back twice, by the wrong one, or was never given is an error for who
/// said so, or nothing at all; books stay as they were.
#[test]
fn plasma_3628_giving_back_what_one_does_not_hold_ends_nothing() {
    let mut world = World::shaped(3, &reading());
    world.hold_reads = true;
    let (home, away, other) = (world.client(0, 1), world.client(1, 1), world.client(0, 2));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    let request = world.ask_get(1, away, "k", true);
    world.settle();
    assert_eq!(world.status(0).leases, 1);
    let Ok(ClientReply::Reserved { reservation, .. }) = world.reserve(0, home, "r", 100) else {
        panic!("reserved")
    };
    let abort = |reservation| ClientMessage::Abort { reservation };
    for stranger in [reservation, Generation(0), Generation(u64::MAX)] {
        World::assert_kind(world.call(0, other, abort(stranger)), ErrorKind::Stale);
    }
    let strangers = world.link_between(0, 2).expect("a link");
    for lease in [LeaseId(0), LeaseId(1), LeaseId(u64::MAX)] {
        let message = PeerMessage::Release { lease };
        world.feed(0, Input::PeerMessage { link: strangers, request: 0, message, payload_len: 0 });
    }
    for number in [0, 1, 2, u64::MAX] {
        let transfer = TransferId(number);
        world.feed(0, Input::SendDone { send: number });
        world.feed(
            0,
            Input::Landed { landing: crate::LandingId(number), result: Ok(crate::receipt::Moved::default()) },
        );
        world.feed(0, Input::ReadDone { transfer, result: Ok(crate::engine::ReadEnd::default()) });
        let word = crate::engine::ReadEnd { word: Some(1), ..Default::default() };
        world.feed(0, Input::ReadDone { transfer, result: Ok(word) });
        world.feed(0, Input::CopyDone { generation: Generation(number), result: Ok(()) });
    }
    assert_eq!((world.status(0).leases, world.status(0).reservations), (1, 1), "all is as it was");
    for read in std::mem::take(&mut world.held) {
        world.finish_read(read);
        // Said twice.
        let (node, transfer) = (read.node, read.transfer);
        world.feed(node, Input::ReadDone { transfer, result: Ok(crate::engine::ReadEnd::default()) });
        world.feed(node, Input::ReadDone { transfer, result: Ok(crate::engine::ReadEnd::default()) });
    }
    world.settle();
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("located") };
    assert_eq!(world.nodes[1].bytes(located.extent), bytes);
    let link = world.link_between(0, 1).expect("a link");
    let message = PeerMessage::Release { lease: LeaseId(1) };
    world.feed(0, Input::PeerMessage { link, request: 0, message, payload_len: 0 });
    assert_eq!(world.call(0, home, abort(reservation)), Ok(ClientReply::Done));
    World::assert_kind(world.call(0, home, abort(reservation)), ErrorKind::Stale);
    world.assert_drained();
}

/// Ray #14182: a store promised memory that it had not reserved, and whoever wrote to it got SIGBUS. That pages are
/// there before a segment is handed out is tested where segments are made; here: memory that cannot be had is an
/// answer to the put that wanted it, nothing is promised from it, and the store goes on with what it has.
#[test]
fn plasma_14182_memory_that_cannot_be_had_is_an_answer_and_no_promise() {
    let mut world = World::shaped(1, &Shape::default());
    let client = world.client(0, 1);
    world.put(0, client, "before", &pattern(1, 1_000));
    world.fail_segments = usize::MAX;
    let used = world.used(0);
    World::assert_kind(world.reserve(0, client, "large", 100 << 20), ErrorKind::TooLarge);
    let mut kept = Vec::new();
    loop {
        match world.reserve(0, client, &format!("r{}", kept.len()), 1 << 20) {
            Ok(ClientReply::Reserved { extent, .. }) => {
                let memory = world.nodes[0].segments.get(&extent.segment).expect("it is there");
                assert!(extent.offset + extent.len_bytes <= memory.len() as u64);
                kept.push(extent);
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                break;
            }
        }
        assert!(kept.len() <= 8, "more than the capacity was promised");
    }
    world.leave(0, client);
    world.advance(200);
    assert_eq!(world.used(0), used);
    let client = world.client(0, 2);
    assert_eq!(world.fetch(0, client, "before", &pattern(1, 1_000)), Path::Local);
}

/// The pauses between a node's attempts to connect to an address, in milliseconds.
fn pauses(world: &World, from: usize, to: &str) -> Vec<u64> {
    let dials = world.dials.iter().filter(|(node, address, _)| *node == from && address == to);
    let times: Vec<_> = dials.map(|(_, _, at)| *at).collect();
    times.windows(2).map(|pair| pair[1].ms_since(pair[0])).collect()
}

/// Every link between two nodes ends a millisecond after it came up, for so long.
fn flap(world: &mut World, one: usize, other: usize, ms: u64) {
    for _ in 0..ms {
        world.advance(1);
        while let Some(link) = world.link_between(one, other) {
            world.cut(one, link);
            world.settle();
        }
    }
}

/// Mooncake #3299: connections were rebuilt the moment they failed, failed again within milliseconds, and so on: a
/// storm of handshakes that carried nothing. Here links to a holder come up, are greeted, and break at once, while
/// gets keep on wanting one: the pauses grow to a second, and a connection that lasts is used as soon as it is there.
#[test]
fn mooncake_3299_links_that_fail_at_once_are_not_dialled_in_a_storm() {
    let mut world = World::shaped(3, &reading());
    let (away, holder) = (world.client(1, 1), world.client(2, 1));
    let bytes = pattern(1, 1_000);
    world.put(2, holder, "k", &bytes);
    world.advance(5_000);
    // A millisecond is long here: no read is through before its link breaks.
    world.hold_reads = true;
    for _ in 0..5 {
        let requests: Vec<u64> = (0..3).map(|_| world.ask_get(1, away, "k", false)).collect();
        flap(&mut world, 1, 2, 3_100);
        for request in requests {
            assert!(world.answer(1, away, request).expect("an answer").is_err());
        }
    }
    let storm = pauses(&world, 1, "a2");
    assert!((8..40).contains(&storm.len()), "dialled {} times in 15 s: {storm:?}", storm.len());
    assert!(storm.iter().all(|pause| *pause >= 50), "{storm:?}");
    assert!(storm.iter().skip(5).all(|pause| *pause >= 1_000), "{storm:?}");
    world.hold_reads = false;
    let request = world.ask_get(1, away, "k", false);
    world.advance(2_000);
    let Some(Ok(ClientReply::Located(located))) = world.answer(1, away, request) else { panic!("located") };
    assert_eq!(world.nodes[1].bytes(located.extent), bytes);
    world.unpin(1, away, located.generation);
    world.assert_drained();
}

/// The same for the link to the node that keeps the directory: that it greets is no sign that a link lasts.
#[test]
fn mooncake_3299_nor_is_the_directory() {
    let mut world = World::new(2);
    flap(&mut world, 1, 0, 20_000);
    let storm = pauses(&world, 1, "a0");
    assert!((8..40).contains(&storm.len()), "dialled {} times in 20 s: {storm:?}", storm.len());
    assert!(storm.iter().skip(7).all(|pause| *pause >= 1_000), "{storm:?}");
    world.advance(3_000);
    assert!(world.link_between(1, 0).is_some(), "a link that lasts is used");
    let client = world.client(1, 1);
    let hints = crate::wire::PutHints::default();
    let put = world.try_put(1, client, "k", &[1], hints, IfExists::Error);
    assert!(matches!(put, Ok(ClientReply::Sealed { .. })), "{put:?}");
    // A node that was there for long and starts again is found again at once.
    world.advance(10 * HEARTBEAT_MS + 5_000);
    let before = world.now;
    world.restart(0, config(0, 2, Vec::new(), &Shape::default()));
    world.advance(300);
    assert!(world.link_between(1, 0).is_some(), "{} ms after {before:?}", world.now.ms_since(before));
}

/// The same below a link that lives: every data stream that is opened for its reads fails at once. A read is not tried
/// again in a storm, nor its owner asked.
#[test]
fn mooncake_3299_nor_are_reads_that_fail_at_once() {
    let mut world = World::shaped(2, &reading());
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 1_000);
    world.put(0, home, "k", &bytes);
    world.fail_reads_of = Some(1);
    let requests: Vec<u64> = (0..10).map(|_| world.ask_get(1, away, "k", false)).collect();
    world.advance(2_900);
    assert!((30..150).contains(&world.reads), "{} reads for 10 gets in 2.9 s", world.reads);
    world.fail_reads_of = None;
    world.advance(100);
    world.advance(100);
    let mut found = 0;
    for request in requests {
        match world.answer(1, away, request).expect("an answer") {
            Ok(ClientReply::Located(located)) => {
                assert_eq!(world.nodes[1].bytes(located.extent), bytes);
                world.unpin(1, away, located.generation);
                found += 1;
            }
            other => World::assert_kind(other, ErrorKind::PeerLost),
        }
    }
    assert!(found > 0, "they do not come back in step, and some in time");
    world.assert_drained();
}
