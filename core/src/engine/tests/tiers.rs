//! Objects of GPU tiers: where puts and gets find room, what is copied between tiers and for whom, and what a fabric is
//! never handed. No GPU: a tier is a name here.

use super::world::*;
use crate::engine::{Event, GpuUse, Input};
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::receipt::Path;
use crate::tier::{ClientId, Extent, Generation, Tier, TierHint};
use crate::wire::{ClientMessage, ClientReply, IfExists, Located, PeerMessage, PutHints, Range};

const GPU: Tier = Tier::Gpu(0);
const OTHER: Tier = Tier::Gpu(1);
const MIB: u64 = 1 << 20;

/// Nodes with two GPUs of 4 MiB each.
pub(super) fn gpus(reached: &[Tier]) -> Shape {
    let gpu = |ordinal| GpuUse {
        ordinal,
        uuid: format!("GPU-{ordinal}").into(),
        capacity_bytes: 4 * MIB,
        client_quota_bytes: 2 * MIB,
        granule_bytes: 256 << 10,
    };
    Shape { gpus: vec![gpu(0), gpu(1)], reached: reached.to_vec(), ..Shape::default() }
}

pub(super) fn hinted(tier: Tier, or_host: bool) -> PutHints {
    PutHints { tier: Some(TierHint { tier, or_host }), ..PutHints::default() }
}

/// What is asked of the whole of "k" in GPU memory.
fn get_on_gpu() -> ClientMessage {
    ClientMessage::Get {
        key: key("k"),
        range: None,
        timeout_ms: 3_000,
        keep: true,
        threshold_bytes: None,
        tier: Some(GPU.into()),
    }
}

impl World {
    pub(super) fn put_in(&mut self, client: ClientId, name: &str, bytes: &[u8], hints: PutHints) -> Answer {
        self.try_put(0, client, name, bytes, hints, IfExists::Keep)
    }

    pub(super) fn reserve_in(
        &mut self,
        client: ClientId,
        name: &str,
        len_bytes: u64,
        hints: PutHints,
        writes: Tier,
    ) -> Result<(Generation, Extent, Tier), StoreError> {
        let meta = ObjectMeta::bytes(len_bytes).expect("a length");
        let message =
            ClientMessage::Reserve { key: key(name), meta, hints, if_exists: IfExists::Keep, writes };
        self.call(0, client, message).map(|reply| match reply {
            ClientReply::Reserved { reservation, extent, tier, map } => {
                assert!(map.is_some(), "written in place");
                let mapped = ClientMessage::Mapped { segment: extent.segment };
                assert_eq!(self.call(0, client, mapped), Ok(ClientReply::Done));
                (reservation, extent, tier)
            }
            other => panic!("reserve {name}: {other:?}"),
        })
    }

    /// Puts an object that is written in GPU memory.
    pub(super) fn put_from(&mut self, client: ClientId, name: &str, bytes: &[u8], writes: Tier) -> Answer {
        let hints = PutHints::default();
        let (reservation, extent, tier) =
            self.reserve_in(client, name, bytes.len() as u64, hints, writes).expect("room");
        assert_eq!(tier, writes);
        self.write(0, extent, bytes);
        self.seal(0, client, reservation)
    }

    pub(super) fn get_in(
        &mut self,
        (node, client): (usize, ClientId),
        name: &str,
        range: Option<Range>,
        tier: impl Into<Option<TierHint>>,
    ) -> Result<Located, StoreError> {
        let message = ClientMessage::Get {
            key: key(name),
            range,
            timeout_ms: 3_000,
            keep: true,
            threshold_bytes: None,
            tier: tier.into(),
        };
        self.call(node, client, message).map(|reply| match reply {
            ClientReply::Located(located) => located,
            other => panic!("get {name}: {other:?}"),
        })
    }

    pub(super) fn finish_copies(&mut self) {
        self.hold_copies = false;
        for (node, generation) in std::mem::take(&mut self.copies) {
            self.feed(node, Input::CopyDone { generation, result: Ok(()) });
        }
        self.settle();
    }

    /// Checks what was located, and lets go of it.
    pub(super) fn read(&mut self, (node, client): (usize, ClientId), located: &Located, expected: &[u8]) {
        assert_eq!(self.nodes[node].bytes(located.extent), expected);
        assert_eq!(
            self.nodes[node].tiers[&located.extent.segment], located.tier,
            "the tier is the segment's"
        );
        self.unpin(node, client, located.generation);
    }
}

#[test]
fn a_put_from_host_memory_is_moved_to_the_gpu_at_seal() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let (small, large) = (pattern(1, 1_000), pattern(2, 300_000));
    let answer = world.put_in(client, "small", &small, hinted(GPU, false));
    let Ok(ClientReply::Sealed { path: Path::Copied, staged_bytes: 1_000, .. }) = answer else {
        panic!("its bytes passed through the message and through host memory: {answer:?}");
    };
    let (reservation, extent, tier) =
        world.reserve_in(client, "large", 300_000, hinted(OTHER, false), Tier::Host).expect("room");
    assert_eq!(tier, Tier::Host);
    world.write(0, extent, &large);
    let answer = world.seal(0, client, reservation);
    let Ok(ClientReply::Sealed { path: Path::Copied, staged_bytes: 300_000, .. }) = answer else {
        panic!("{answer:?}");
    };
    for (name, bytes, tier) in [("small", &small, GPU), ("large", &large, OTHER)] {
        let located = world.get_in((0, client), name, None, None).expect(name);
        assert_eq!((located.tier, located.path, located.copied_from), (tier, Path::Local, None));
        world.read((0, client), &located, bytes);
        let stat = world.call(0, client, ClientMessage::Stat { key: key(name), timeout_ms: 10 });
        assert!(matches!(stat, Ok(ClientReply::Stat { tier: Some(of), .. }) if of == tier), "{stat:?}");
    }
    let used = world.status(0).tiers.iter().map(|tier| (tier.tier, tier.used_bytes)).collect::<Vec<_>>();
    assert_eq!(used, [(Tier::Host, 0), (GPU, 1_024), (OTHER, 300_032)]);
    world.assert_drained();
}

#[test]
fn a_put_from_the_gpu_stays_where_it_was_written_unless_it_is_wanted_elsewhere() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let bytes = pattern(1, 50_000);
    let answer = world.put_from(client, "k", &bytes, GPU);
    let Ok(ClientReply::Sealed { path: Path::InPlace, staged_bytes: 0, .. }) = answer else {
        panic!("{answer:?}");
    };
    let located = world.get_in((0, client), "k", None, None).expect("the object");
    assert_eq!(located.tier, GPU);
    world.read((0, client), &located, &bytes);
    for (name, hint) in [("to host", Tier::Host), ("to the other", OTHER)] {
        let (reservation, extent, _) =
            world.reserve_in(client, name, 50_000, hinted(hint, false), GPU).expect("room");
        world.write(0, extent, &bytes);
        world.seal(0, client, reservation).expect("sealed");
        let located = world.get_in((0, client), name, None, None).expect(name);
        assert_eq!(located.tier, hint, "{name}");
        world.read((0, client), &located, &bytes);
    }
    world.assert_drained();
}

#[test]
fn a_get_finds_the_bytes_where_it_wants_them() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let bytes = pattern(1, 10_000);
    world.put(0, client, "host", &bytes);
    world.put_from(client, "gpu", &bytes, GPU).expect("sealed");
    let tiers = [Tier::Host, GPU, OTHER];
    for (name, from) in [("host", Tier::Host), ("gpu", GPU)] {
        for to in tiers {
            let located = world.get_in((0, client), name, None, TierHint::from(to)).expect(name);
            let copied = from != to;
            assert_eq!(located.tier, to, "{name} in {to}");
            assert_eq!(located.copied_from, copied.then_some(from));
            assert_eq!(located.path, if copied { Path::LocalCopy } else { Path::Local });
            world.read((0, client), &located, &bytes);
            let range = Range { start: 1_000, len_bytes: 500 };
            let part = world.get_in((0, client), name, Some(range), TierHint::from(to)).expect(name);
            assert_eq!((part.tier, part.extent.len_bytes, part.meta.len_bytes), (to, 500, 10_000));
            world.read((0, client), &part, &bytes[1_000..1_500]);
        }
    }
    world.put(0, client, "empty", &[]);
    let empty = world.get_in((0, client), "empty", None, TierHint::from(GPU)).expect("no bytes are anywhere");
    world.read((0, client), &empty, &[]);
    world.assert_drained();
}

#[test]
fn readers_of_the_same_bytes_share_a_copy_and_it_goes_with_the_last_of_them() {
    let mut world = World::shaped(1, &gpus(&[]));
    let (a, b) = (world.client(0, 1), world.client(0, 2));
    let bytes = pattern(1, 10_000);
    world.put(0, a, "k", &bytes);
    world.hold_copies = true;
    let (first, second) = (world.ask(0, a, get_on_gpu()), world.ask(0, b, get_on_gpu()));
    world.settle();
    assert_eq!(world.copies.len(), 1, "one copy for both");
    // Deleted while it is copied: who asked before gets it all the same.
    assert_eq!(
        world.call(0, a, ClientMessage::Delete { key: key("k") }),
        Ok(ClientReply::Deleted { existed: true })
    );
    assert_eq!(world.status(0).draining, 1, "what is copied stays in place");
    world.finish_copies();
    let of = |answer: Option<Answer>| match answer {
        Some(Ok(ClientReply::Located(located))) => located,
        other => panic!("{other:?}"),
    };
    let (first, second) = (of(world.answer(0, a, first)), of(world.answer(0, b, second)));
    assert_eq!(first.extent, second.extent);
    world.read((0, a), &first, &bytes);
    world.advance(200);
    world.read((0, b), &second, &bytes);
    world.assert_drained();
    assert_eq!(world.used(0), 0);
}

#[test]
fn a_client_that_leaves_while_its_copy_is_made_leaves_nothing() {
    let mut world = World::shaped(1, &gpus(&[]));
    let (a, b) = (world.client(0, 1), world.client(0, 2));
    world.put(0, a, "k", &pattern(1, 10_000));
    world.hold_copies = true;
    world.ask(0, b, get_on_gpu());
    world.settle();
    world.leave(0, b);
    world.finish_copies();
    world.assert_drained();
}

#[test]
fn a_copy_that_fails_is_an_error_and_costs_nothing() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let bytes = pattern(1, 10_000);
    world.put(0, client, "k", &bytes);
    world.hold_copies = true;
    let request = world.ask(0, client, get_on_gpu());
    world.settle();
    let (node, generation) = world.copies.pop().expect("a copy");
    let result = Err(StoreError::os("cuMemcpyBatchAsync", "the device is lost"));
    world.feed(node, Input::CopyDone { generation, result });
    world.settle();
    let answer = world.answer(0, client, request).expect("an answer");
    assert_eq!(answer.expect_err("the copy failed").kind(), ErrorKind::Os);
    world.hold_copies = false;
    world.fetch(0, client, "k", &bytes);
    world.assert_drained();
}

#[test]
fn no_room_names_the_tier_and_host_memory_stands_in_only_where_that_is_allowed() {
    let shape = Shape { capacity_bytes: 32 * MIB, quota_bytes: 16 * MIB, ..gpus(&[]) };
    let mut world = World::shaped(1, &shape);
    let client = world.client(0, 1);
    let big = pattern(1, 3 << 20);
    world.put_in(client, "small", &pattern(2, 100), PutHints::default()).expect("sealed");
    let stays = PutHints { pin: true, ..PutHints::default() };
    let (fills, ..) = world.reserve_in(client, "fills", 2 * MIB, stays, GPU).expect("room");
    world.seal(0, client, fills).expect("sealed");
    // Written by the client in its own part of the tier, of which it has no more.
    let refused = world.reserve_in(client, "more", 2 * MIB, PutHints::default(), GPU).expect_err("its quota");
    assert!(matches!(refused, StoreError::NoSpace { tier: GPU, requested, .. } if requested == 2 * MIB));
    let (reservation, _, tier) =
        world.reserve_in(client, "more", 2 * MIB, hinted(GPU, true), GPU).expect("host memory");
    assert_eq!(tier, Tier::Host);
    let sealed = world.seal(0, client, reservation);
    assert!(
        matches!(sealed, Ok(ClientReply::Sealed { path: Path::Copied, .. })),
        "the node has room: {sealed:?}"
    );
    // Moved by the node, which has no room any more either.
    for or_host in [false, true] {
        let hints = hinted(GPU, or_host);
        let (reservation, extent, _) =
            world.reserve_in(client, "big", 3 * MIB, hints, Tier::Host).expect("host memory");
        world.write(0, extent, &big);
        let sealed = world.seal(0, client, reservation);
        match sealed {
            Ok(ClientReply::Sealed { path: Path::InPlace, .. }) if or_host => {}
            Err(StoreError::NoSpace { tier: GPU, .. }) if !or_host => {}
            other => panic!("or_host {or_host}: {other:?}"),
        }
    }
    let stays = TierHint { tier: GPU, or_host: true };
    let located = world.get_in((0, client), "big", None, stays).expect("in host memory");
    assert_eq!((located.tier, located.copied_from), (Tier::Host, None));
    world.read((0, client), &located, &big);
    let refused = world.get_in((0, client), "big", None, TierHint::from(GPU)).expect_err("no room");
    assert!(matches!(refused, StoreError::NoSpace { tier: GPU, requested, .. } if requested == 3 * MIB));
    assert!(refused.to_string().contains("big"), "{refused}");
    let too_large = world.put_in(client, "k", &[], PutHints::default());
    too_large.expect("an empty object has room anywhere");
    world.assert_drained();
}

#[test]
fn a_tier_that_is_not_there_is_named_with_those_that_are() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let hints = hinted(Tier::Gpu(7), false);
    let error = world.put_in(client, "k", b"bytes", hints).expect_err("no such GPU");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("gpu:7") && error.to_string().contains("gpu:0, gpu:1"), "{error}");
    world.put_in(client, "k", b"bytes", hinted(Tier::Gpu(7), true)).expect("host memory");
    let located = world.get_in((0, client), "k", None, TierHint { tier: Tier::Gpu(7), or_host: true });
    assert_eq!(located.expect("host memory").tier, Tier::Host);
    let error = world.get_in((0, client), "k", None, TierHint::from(Tier::Gpu(7))).expect_err("no such GPU");
    assert_eq!(error.kind(), ErrorKind::Unavailable);

    let mut bare = World::new(1);
    let client = bare.client(0, 1);
    let error = bare.put_in(client, "k", b"bytes", hinted(GPU, false)).expect_err("no GPU");
    assert!(error.to_string().contains("none was configured"), "the reason is the configuration's: {error}");
}

/// What a node gives to a peer whose link does not reach its GPU goes through host memory, and both are told.
#[test]
fn a_link_that_does_not_reach_the_gpu_is_given_a_copy_in_host_memory() {
    for (threshold, path) in [(Some(0), Path::Read), (Some(u64::MAX), Path::Eager)] {
        let shape = Shape { threshold_bytes: threshold, ..gpus(&[]) };
        let mut world = World::shaped(2, &shape);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 60_000);
        world.put_from(home, "k", &bytes, GPU).expect("sealed");
        let range = Range { start: 100, len_bytes: 5_000 };
        let part = world.get_in((1, away), "k", Some(range), None).expect("a part");
        assert_eq!((part.tier, part.path), (Tier::Host, path));
        world.read((1, away), &part, &bytes[100..5_100]);
        // Wanted on the other node's GPU: it lands in host memory there, and is copied.
        let located = world.get_in((1, away), "k", None, TierHint::from(OTHER)).expect("the object");
        assert_eq!((located.tier, located.copied_from), (OTHER, Some(Tier::Host)));
        let carried = located.carried.clone().expect("it came from a peer");
        assert_eq!((carried.from_tier, carried.moved.staged_bytes), (GPU, 60_000));
        world.read((1, away), &located, &bytes);
        let grants = |message: &PeerMessage| match message {
            PeerMessage::Grant { granted, .. } => Some(granted.generation),
            _ => None,
        };
        let granted: Vec<Generation> = world.nodes[0].sent.iter().filter_map(grants).collect();
        assert!(granted.iter().all(|generation| generation.0 == 0), "no place of a copy is remembered");
        world.advance(2 * u64::from(LEASE_MS));
        world.assert_drained();
    }
}

#[test]
fn a_link_that_reaches_both_gpus_moves_bytes_from_one_to_the_other() {
    for (threshold, path) in [(Some(0), Path::Read), (Some(u64::MAX), Path::Eager)] {
        let shape = Shape { threshold_bytes: threshold, ..gpus(&[GPU, OTHER]) };
        let mut world = World::shaped(2, &shape);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 60_000);
        world.put_from(home, "k", &bytes, GPU).expect("sealed");
        let located = world.get_in((1, away), "k", None, TierHint::from(OTHER)).expect("the object");
        // What comes inside an answer lands in host memory, whatever is reached.
        let lands = if path == Path::Read { OTHER } else { Tier::Host };
        let copied_from = (lands == Tier::Host).then_some(lands);
        assert_eq!((located.tier, located.path, located.copied_from), (OTHER, path, copied_from));
        let carried = located.carried.clone().expect("it came from a peer");
        assert_eq!((carried.from_tier, carried.moved.staged_bytes), (GPU, 0));
        world.read((1, away), &located, &bytes);
        // It was kept there: the next reader finds it, or a copy of it.
        let again = world.get_in((1, away), "k", None, None).expect("the object");
        assert_eq!((again.tier, again.path), (lands, Path::Local));
        world.read((1, away), &again, &bytes);
        world.assert_drained();
    }
}

/// What is large is read out of one GPU and into the other, a part at a time through host memory; what is small goes as
/// a payload, which is copied to host memory first. Both are told as staged.
#[test]
fn a_fabric_that_stages_gpus_reads_out_of_them_and_into_them_and_sends_nothing_of_them() {
    for (threshold, path) in [(Some(0), Path::Read), (Some(u64::MAX), Path::Eager)] {
        let shape = Shape { threshold_bytes: threshold, stages_gpus: true, ..gpus(&[GPU, OTHER]) };
        let mut world = World::shaped(2, &shape);
        let (home, away) = (world.client(0, 1), world.client(1, 1));
        let bytes = pattern(1, 60_000);
        world.put_from(home, "k", &bytes, GPU).expect("sealed");
        let located = world.get_in((1, away), "k", None, TierHint::from(OTHER)).expect("the object");
        let copied_from = (path == Path::Eager).then_some(Tier::Host);
        assert_eq!((located.tier, located.path, located.copied_from), (OTHER, path, copied_from));
        let carried = located.carried.clone().expect("it came from a peer");
        assert_eq!((carried.from_tier, carried.moved.staged_bytes), (GPU, 60_000));
        world.read((1, away), &located, &bytes);
        let remembered = world.nodes[0].sent.iter().any(|message| match message {
            PeerMessage::Grant { granted, .. } => granted.generation.0 != 0,
            _ => false,
        });
        assert_eq!(remembered, path == Path::Read, "the place of the object itself may be");
        world.advance(2 * u64::from(LEASE_MS));
        world.assert_drained();
    }
}

/// An adapter may reach a GPU and yet not take one of its segments.
#[test]
fn a_segment_that_no_adapter_took_is_neither_read_into_nor_out_of() {
    let shape = Shape { threshold_bytes: Some(0), ..gpus(&[GPU, OTHER]) };
    let mut world = World::shaped(2, &shape);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    world.nodes.iter_mut().for_each(|node| node.registers_no_gpu = true);
    let bytes = pattern(1, 60_000);
    world.put_from(home, "k", &bytes, GPU).expect("sealed");
    world.put(0, home, "host", &bytes);
    for (name, staged_bytes) in [("k", 60_000), ("host", 0)] {
        let located = world.get_in((1, away), name, None, TierHint::from(OTHER)).expect(name);
        assert_eq!((located.tier, located.copied_from), (OTHER, Some(Tier::Host)));
        assert_eq!(located.carried.clone().expect("from a peer").moved.staged_bytes, staged_bytes);
        world.read((1, away), &located, &bytes);
    }
    world.advance(2 * u64::from(LEASE_MS));
    world.assert_drained();
}

#[test]
fn a_fetch_that_finds_no_room_on_the_gpu_lands_in_host_memory() {
    let shape = Shape { threshold_bytes: Some(0), ..gpus(&[GPU, OTHER]) };
    let mut world = World::shaped(2, &shape);
    let (home, away) = (world.client(0, 1), world.client(1, 1));
    let bytes = pattern(1, 512 << 10);
    let (reservation, extent, _) =
        world.reserve_in(home, "k", 512 << 10, PutHints::default(), Tier::Host).expect("room");
    world.write(0, extent, &bytes[..512 << 10]);
    world.seal(0, home, reservation).expect("sealed");
    world.nodes[1].events.clear();
    // One when it lands, one when it is copied from there.
    world.fail_segments = 2;
    let either = TierHint { tier: GPU, or_host: true };
    let located = world.get_in((1, away), "k", None, either).expect("host memory");
    assert_eq!(located.tier, Tier::Host);
    world.read((1, away), &located, &bytes[..512 << 10]);
    let failed = |event: &Event| matches!(event, Event::SegmentFailed { .. });
    assert!(world.nodes[1].events.iter().any(failed), "{:?}", world.nodes[1].events);
    world.assert_drained();
}

/// Room in one tier is not made by what lies in another.
#[test]
fn cached_objects_go_only_for_those_of_their_tier() {
    let mut world = World::shaped(1, &gpus(&[]));
    let client = world.client(0, 1);
    let bytes = pattern(1, 60_000);
    let cached = PutHints { cache: true, ..hinted(GPU, false) };
    for number in 0..200 {
        world.put_in(client, &format!("gpu {number}"), &bytes, cached).expect("others went for it");
    }
    world.put_in(client, "host", &bytes, PutHints { cache: true, ..PutHints::default() }).expect("sealed");
    let evicted = world.status(0).counters.evicted;
    assert!(evicted >= 200 * 60_000 / (4 << 20), "{evicted} went");
    world.put_in(client, "one more", &bytes, cached).expect("others went for it");
    assert_eq!(world.get_in((0, client), "host", None, None).expect("it stays").tier, Tier::Host);
    let gone = world.status(0).tiers.iter().map(|tier| tier.used_bytes).collect::<Vec<_>>();
    assert!(gone[1] <= 4 * MIB && gone[0] >= 60_000, "{gone:?}");
}
