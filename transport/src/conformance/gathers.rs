//! Payloads of several extents on either side. Not those of one (`sends`). Invariant: as in the module above.

use std::sync::Arc;

use hetmem_core::{ErrorKind, Extent, SegmentId};

use super::{Bench, Connected, PRIVATE, SHARED, Side, connected, frame, pattern};
use crate::fabric::{Landing, LandingPart, LandingToken, Sent};

fn shared(offset: u64, len_bytes: u64) -> Extent {
    Extent { segment: SHARED, offset, len_bytes }
}

fn private(offset: u64, len_bytes: u64) -> Extent {
    Extent { segment: PRIVATE, offset, len_bytes }
}

fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len_bytes).sum()
}

/// Writes the bytes of `seed` into extents, one after the other.
fn fill(side: &Side, extents: &[Extent], seed: u64) -> Vec<u8> {
    let bytes = pattern(seed, usize::try_from(total(extents)).expect("small"));
    let mut rest = bytes.as_slice();
    for extent in extents {
        let (part, others) = rest.split_at(usize::try_from(extent.len_bytes).expect("small"));
        memory(side, extent.segment).write(usize::try_from(extent.offset).expect("small"), part);
        rest = others;
    }
    bytes
}

fn memory(side: &Side, segment: SegmentId) -> &crate::memory::HeapRegion {
    if segment == SHARED { &side.memory } else { &side.private }
}

fn read(side: &Side, extent: Extent) -> Vec<u8> {
    let offset = usize::try_from(extent.offset).expect("small");
    memory(side, extent.segment).read(offset, usize::try_from(extent.len_bytes).expect("small"))
}

/// Sends extents of `a` and lets them land in parts of `b`; returns how.
fn land(
    (a, b, link): (&Side, &Side, hetmem_core::LinkId),
    number: u64,
    extents: &[Extent],
    parts: Vec<LandingPart>,
) -> Result<crate::LandingStats, hetmem_core::StoreError> {
    b.answers(move |_, header, _| Landing::Into {
        parts: parts.clone(),
        token: LandingToken(header.request),
    });
    let (token, sent) = a.send(link, &frame(number, total(extents)), extents);
    b.wait("the landing", |log| log.landings.contains_key(&LandingToken(number)));
    if sent == Sent::Pending {
        a.wait("SendDone", |log| log.sends.contains_key(&token));
    }
    b.sink.log.lock().landings[&LandingToken(number)].clone()
}

pub fn payloads_are_gathered_in_order_and_scattered_with_gaps(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    for (number, scale) in [1_u64, 37, 4_096, 40_000].into_iter().enumerate() {
        let number = number as u64;
        // Of two segments, backwards in memory, with neighbours and an empty one among them.
        let extents = [
            shared(9 * scale, 2 * scale),
            private(5, scale + 3),
            shared(0, scale),
            shared(scale, scale),
            shared(7, 0),
        ];
        let extents = &extents[..a.fabric.gather_max().min(5)];
        let bytes = fill(&a, extents, number);
        let len = bytes.len() as u64;
        let to = [private(100, len / 3), shared(3, len / 5), shared(len, 0), shared(5 * scale + 70, len / 4)];
        let (skip, left) = (len / 7 + 1, len - len / 3 - len / 5 - len / 4);
        let skip = skip.min(left);
        for extent in to {
            // What lies around the targets has to stay.
            memory(&b, extent.segment).write(0, &vec![0xa5; 300_000]);
        }
        let parts = vec![
            LandingPart::Extent(to[0]),
            LandingPart::Skip(skip),
            LandingPart::Extent(to[1]),
            LandingPart::Extent(to[2]),
            LandingPart::Extent(to[3]),
            LandingPart::Skip(left - skip),
        ];
        let stats = land((&a, &b, link_a), number, extents, parts).expect("landed");
        assert_eq!(stats.bytes, total(&to), "skipped bytes do not land");
        assert!(stats.staged_bytes <= bench.staged_max(len), "{stats:?}");
        let mut start = 0;
        for (extent, gap) in to.into_iter().zip([skip, 0, 0, 0]) {
            let end = start + usize::try_from(extent.len_bytes).expect("small");
            assert!(read(&b, extent) == bytes[start..end], "scale {scale}: {extent:?}");
            start = end + usize::try_from(gap).expect("small");
            for beside in [extent.offset - 1, extent.offset + extent.len_bytes] {
                let within = to.iter().any(|other| {
                    other.segment == extent.segment
                        && (other.offset..other.offset + other.len_bytes).contains(&beside)
                });
                let byte = read(&b, Extent { offset: beside, len_bytes: 1, ..extent });
                assert!(within || byte == [0xa5], "scale {scale}: the byte at {beside} beside {extent:?}");
            }
        }
    }
}

pub fn more_parts_than_one_call_takes(bench: &dyn Bench) {
    const COUNT: u64 = 3_000;
    let Connected { a, b, link_a, .. } = connected(bench);
    let many = a.fabric.gather_max().min(3_000) as u64;
    for (number, len) in [1_u64, 100, 1_001].into_iter().enumerate() {
        let number = number as u64;
        let extents: Vec<Extent> = (0..many).map(|place| shared(place * 1_100, len)).collect();
        let bytes = fill(&a, &extents, number + 10);
        // As many parts as there are bytes, up to COUNT, each apart from the next.
        let part = (bytes.len() as u64).div_ceil(COUNT);
        let mut parts = Vec::new();
        let mut left = bytes.len() as u64;
        while left > 0 {
            let len = part.min(left);
            parts.push(LandingPart::Extent(shared(parts.len() as u64 * (part + 1), len)));
            left -= len;
        }
        let stats = land((&a, &b, link_a), number, &extents, parts.clone()).expect("landed");
        assert_eq!(stats.bytes, bytes.len() as u64);
        let landed: Vec<u8> = parts
            .iter()
            .flat_map(|part| match part {
                LandingPart::Extent(extent) => read(&b, *extent),
                LandingPart::Skip(_) => Vec::new(),
            })
            .collect();
        assert!(landed == bytes, "{many} extents of {len} bytes into {} parts", parts.len());
    }
}

pub fn what_is_skipped_goes_nowhere_and_empty_parts_are_nothing(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let len = 3_u64 << 20;
    let bytes = fill(&a, &[shared(0, len)], 1);
    // Longer than any buffer for what is dropped.
    let (before, after) = (1 << 20, len - (1 << 20) - 10);
    let parts = vec![
        LandingPart::Skip(0),
        LandingPart::Skip(before),
        LandingPart::Extent(shared(77, 0)),
        LandingPart::Extent(shared(500, 10)),
        LandingPart::Skip(after),
    ];
    let stats = land((&a, &b, link_a), 1, &[shared(0, len)], parts).expect("landed");
    assert_eq!(stats.bytes, 10);
    let from = 1 << 20;
    assert_eq!(b.memory.read(500, 10), bytes[from..from + 10]);
    assert!(b.memory.read(0, 500) == vec![0; 500] && b.memory.read(510, 1_000) == vec![0; 1_000]);
    let parts = vec![LandingPart::Skip(len)];
    let stats = land((&a, &b, link_a), 2, &[shared(0, len)], parts).expect("landed");
    assert_eq!(stats.bytes, 0);
    // The stream is still in step.
    a.post(link_a, &frame(3, 0), &[]);
    b.wait("the next frame", |log| log.messages.len() == 3);
}

pub fn scattered_landings_that_cannot_be_fail_alone(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let payload = shared(0, 70_000);
    let bytes = fill(&a, &[payload], 4);
    let whole = LandingPart::Extent(shared(0, 70_000));
    let wrong = [
        vec![whole, LandingPart::Skip(1)],
        vec![LandingPart::Extent(shared(0, 60_000)), LandingPart::Skip(9_999)],
        vec![LandingPart::Extent(shared(0, 60_000)), LandingPart::Extent(private(0, 10_001))],
        vec![LandingPart::Skip(u64::MAX), whole],
        vec![LandingPart::Extent(shared(0, 60_000)), LandingPart::Extent(private(9 << 20, 10_000))],
        vec![
            LandingPart::Skip(60_000),
            LandingPart::Extent(Extent { segment: SegmentId(99), offset: 0, len_bytes: 10_000 }),
        ],
        vec![],
    ];
    for (number, parts) in wrong.into_iter().enumerate() {
        let said = format!("{parts:?}");
        let error = land((&a, &b, link_a), number as u64, &[payload], parts).expect_err("no such place");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{said}: {error}");
        assert!(b.memory.read(0, 70_000) == vec![0; 70_000], "{said}: nothing lands");
    }
    land((&a, &b, link_a), 100, &[payload], vec![whole]).expect("the link goes on");
    assert!(b.memory.read(0, 70_000) == bytes);
}

pub fn deregistering_a_part_of_a_landing_ends_all_of_it(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let len = 24_u64 << 20;
    let payload = shared(0, len);
    let (first, last) = (private(0, 1 << 20), shared(0, len - (1 << 20)));
    b.answers(move |_, header, _| {
        let parts = vec![LandingPart::Extent(first), LandingPart::Extent(last)];
        Landing::Into { parts, token: LandingToken(header.request) }
    });
    a.post(link_a, &frame(1, len), &[payload]);
    b.wait("the frame", |log| log.messages.len() == 1);
    b.fabric.deregister(SHARED);
    assert_eq!(Arc::strong_count(&b.memory), 1, "the fabric has let go of the memory");
    let before = b.memory.read(0, 1 << 20);
    b.wait("the landing", |log| log.landings.contains_key(&LandingToken(1)));
    let landed = b.sink.log.lock().landings[&LandingToken(1)].clone();
    // All of it may have been there before.
    if let Err(error) = landed {
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    }
    assert!(b.memory.read(0, 1 << 20) == before, "nothing lands in memory that was deregistered");
    a.post(link_a, &frame(2, 0), &[]);
    b.wait("the next frame", |log| log.messages.len() == 2);
}

pub fn deregistering_a_part_of_a_send_ends_all_of_it(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let len = 24_u64 << 20;
    let extents = [private(0, 1 << 20), shared(0, len - (1 << 20))];
    b.answers(move |_, header, _| {
        Landing::whole(Extent { segment: SHARED, offset: 0, len_bytes: len }, LandingToken(header.request))
    });
    let (token, sent) = a.send(link_a, &frame(1, len), &extents);
    a.fabric.deregister(SHARED);
    assert_eq!(Arc::strong_count(&a.memory), 1, "the fabric has let go of the memory");
    if sent == Sent::Pending {
        a.wait("SendDone", |log| log.sends.contains_key(&token));
    }
    // A payload that was announced and cannot follow takes its link along; a landing that was promised is told.
    b.wait("the landing or the link's end", |log| {
        log.messages.is_empty() && !log.downs.is_empty() || log.landings.contains_key(&LandingToken(1))
    });
    let (a, b) = (a.sink.log.lock(), b.sink.log.lock());
    assert_eq!(b.landings.len(), b.messages.len());
    if matches!(a.sends.get(&token), Some(Ok(())) | None) {
        assert!(b.landings.values().all(Result::is_ok), "what was taken over arrives");
    }
}

pub fn a_link_lost_in_the_middle_ends_gathers_and_scatters(bench: &dyn Bench) {
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    let len = 16_u64 << 20;
    let extents = [shared(0, len - 100), private(0, 50), private(1_000, 50)];
    b.answers(move |_, header, _| {
        let parts = vec![
            LandingPart::Extent(private(0, 1 << 20)),
            LandingPart::Skip(1 << 20),
            LandingPart::Extent(shared(0, header.payload_len - (2 << 20))),
        ];
        Landing::Into { parts, token: LandingToken(header.request) }
    });
    let mut pending = Vec::new();
    for number in 0..3 {
        let (token, sent) = a.send(link_a, &frame(number, len), &extents);
        pending.extend((sent == Sent::Pending).then_some(token));
    }
    b.wait("the first frame", |log| !log.messages.is_empty());
    b.fabric.disconnect(link_b);
    b.wait("LinkDown", |log| log.downs.iter().any(|(down, _)| *down == link_b));
    let log = b.sink.log.lock();
    assert_eq!(log.landings.len(), log.messages.len(), "every landing that was promised has ended");
    drop(log);
    let mark = vec![0x77; 1 << 20];
    b.memory.write(0, &mark);
    b.private.write(0, &mark);
    a.wait("LinkDown of the peer", |log| log.downs.iter().any(|(down, _)| *down == link_a));
    assert!(pending.iter().all(|token| a.sink.log.lock().sends.contains_key(token)));
    assert!(b.memory.read(0, 1 << 20) == mark && b.private.read(0, 1 << 20) == mark, "bytes landed late");
}
