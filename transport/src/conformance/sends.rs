//! Links, frames and payloads. Not reads. Invariant: as in the module above.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hetmem_core::{ErrorKind, Extent, LinkId, SegmentId};

use super::{Bench, Connected, PRIVATE, SHARED, connect, connected, frame, number_in, pattern, sides};
use crate::fabric::{Landing, LandingToken, SendToken, Sent};

pub fn connecting_is_heard_at_both_ends(bench: &dyn Bench) {
    let (a, b, _) = sides(bench);
    let (link_a, link_b) = connect(&a, &b);
    assert_eq!(a.sink.log.lock().ups, [(link_a, b.fabric.address(), false)]);
    assert_eq!(b.sink.log.lock().ups, [(link_b, a.fabric.address(), true)]);
    // And the other way round, at the same time as the first.
    connect(&b, &a);
    assert!(a.sink.log.lock().is_up(link_a));
}

pub fn connecting_to_nobody_ends_in_a_link_down(bench: &dyn Bench) {
    let (a, ..) = sides(bench);
    let link = a.fabric.connect(&bench.nobody()).expect("connect");
    a.wait("LinkDown", |log| log.downs.iter().any(|(down, _)| *down == link));
    let log = a.sink.log.lock();
    assert!(log.ups.is_empty());
    assert!(log.downs[0].1.to_string().contains(&bench.nobody()), "{} names the address", log.downs[0].1);
    drop(log);
    assert!(a.fabric.connect("").is_err());
}

pub fn frames_arrive_whole_and_in_order(bench: &dyn Bench) {
    const COUNT: u64 = 2000;
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    for number in 0..COUNT {
        let (token, sent) = a.send(link_a, &frame(number, 0), &[]);
        assert_eq!(sent, Sent::Done, "a frame without payload needs no event");
        assert!(!a.sink.log.lock().sends.contains_key(&token));
        b.post(link_b, &frame(number, 0), &[]);
    }
    for (side, link) in [(&a, link_a), (&b, link_b)] {
        side.wait("all frames", |log| log.messages.len() as u64 == COUNT);
        for (expected, (from, header, body)) in side.sink.log.lock().messages.iter().enumerate() {
            assert_eq!((*from, header.request, header.payload_len), (link, expected as u64, 0));
            assert_eq!(number_in(body), expected as u64);
        }
    }
}

pub fn payloads_land_where_the_sink_says(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    b.answers(|_, header, _| {
        let extent = Extent { segment: SHARED, offset: 5 + header.request, len_bytes: header.payload_len };
        Landing::whole(extent, LandingToken(header.request))
    });
    for (number, len) in [1, 8, 100, 4000, 4096, 65_537, 300_000, 1 << 20].into_iter().enumerate() {
        let number = number as u64;
        let bytes = pattern(number, len);
        a.memory.write(3, &bytes);
        let payload = Extent { segment: SHARED, offset: 3, len_bytes: len as u64 };
        let (token, sent) = a.send(link_a, &frame(number, len as u64), &[payload]);
        b.wait("the landing", |log| log.landings.contains_key(&LandingToken(number)));
        let stats = b.sink.log.lock().landings[&LandingToken(number)].clone().expect("landed");
        assert_eq!(stats.bytes, len as u64);
        assert!(stats.staged_bytes <= bench.staged_max(stats.bytes), "{stats:?}");
        let at = 5 + usize::try_from(number).expect("small");
        assert!(b.memory.read(at, len) == bytes, "{len} bytes came through");
        if sent == Sent::Pending {
            a.wait("SendDone", |log| log.sends.contains_key(&token));
            assert_eq!(a.sink.log.lock().sends[&token], Ok(()));
        } else {
            assert!(!a.sink.log.lock().sends.contains_key(&token), "done is said once");
        }
    }
}

pub fn a_payload_that_nobody_wants_is_dropped(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    for len_bytes in [1, 5000, 3 << 20] {
        let payload = Extent { segment: SHARED, offset: 0, len_bytes };
        a.post(link_a, &frame(1, len_bytes), &[payload]);
        a.post(link_a, &frame(2, 0), &[]);
    }
    b.wait("all frames", |log| log.messages.len() == 6);
    let numbers: Vec<u64> = b.sink.log.lock().messages.iter().map(|(_, header, _)| header.request).collect();
    assert_eq!(numbers, [1, 2, 1, 2, 1, 2]);
    assert!(b.sink.log.lock().landings.is_empty());
}

pub fn a_full_queue_is_busy_and_loses_nothing(bench: &dyn Bench) {
    const LEN: u64 = 256 << 10;
    const LIMIT: u64 = 1 << 20;
    let Connected { a, b, link_a, .. } = connected(bench);
    a.memory.write(0, &pattern(9, 256 << 10));
    let payload = Extent { segment: SHARED, offset: 0, len_bytes: LEN };
    let (mut taken, mut pending) = (0_u64, Vec::new());
    loop {
        assert!(taken < LIMIT, "no queue may grow without bound");
        match a.fabric.send(link_a, frame(taken, LEN), &[payload], SendToken(taken)) {
            Ok(sent) => {
                if sent == Sent::Pending {
                    pending.push(SendToken(taken));
                }
                taken += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                break;
            }
        }
    }
    a.wait("all extents to be free", |log| pending.iter().all(|token| log.sends.contains_key(token)));
    a.post(link_a, &frame(taken, 0), &[]);
    b.wait("all frames", |log| log.messages.len() as u64 == taken + 1);
    let log = b.sink.log.lock();
    assert!(log.messages.iter().enumerate().all(|(at, (_, header, _))| header.request == at as u64));
}

pub fn a_sink_that_takes_its_time_loses_nothing(bench: &dyn Bench) {
    const COUNT: u64 = 4_000;
    let Connected { a, b, link_a, .. } = connected(bench);
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = parking_lot::Mutex::new(gate);
    b.answers(move |_, _, _| {
        // Until the other end has dropped it.
        let _ = gate.lock().recv();
        Landing::Discard
    });
    let mut taken = 0;
    while taken < COUNT && a.fabric.send(link_a, frame(taken, 0), &[], SendToken(taken)).is_ok() {
        taken += 1;
    }
    drop(open);
    for number in taken..COUNT {
        a.post(link_a, &frame(number, 0), &[]);
    }
    b.wait("all frames", |log| log.messages.len() as u64 == COUNT);
    let log = b.sink.log.lock();
    assert!(log.messages.iter().enumerate().all(|(at, (_, header, _))| header.request == at as u64));
}

pub fn large_payloads_go_both_ways_at_once(bench: &dyn Bench) {
    const LEN: usize = 12 << 20;
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    // Out of the first half of the memory, into the second.
    let half = |offset: usize| Extent { segment: SHARED, offset: offset as u64, len_bytes: LEN as u64 };
    let bytes = [&a, &b].map(|side| {
        side.answers(move |_, header, _| Landing::whole(half(LEN), LandingToken(header.request)));
        let bytes = pattern(side.key.0, LEN);
        side.memory.write(0, &bytes);
        bytes
    });
    a.post(link_a, &frame(1, LEN as u64), &[half(0)]);
    b.post(link_b, &frame(1, LEN as u64), &[half(0)]);
    for (side, of_peer) in [(&a, &bytes[1]), (&b, &bytes[0])] {
        side.wait("the landing", |log| log.landings.contains_key(&LandingToken(1)));
        side.sink.log.lock().landings[&LandingToken(1)].clone().expect("landed");
        assert!(side.memory.read(LEN, LEN) == *of_peer, "every byte came through");
    }
}

pub fn wrong_sends_are_refused_by_name(bench: &dyn Bench) {
    let Connected { a, link_a, .. } = connected(bench);
    let outside = Extent { segment: PRIVATE, offset: 7, len_bytes: 9 << 20 };
    let nowhere = Extent { segment: SegmentId(99), offset: 0, len_bytes: 10 };
    let inside = Extent { segment: SHARED, offset: 0, len_bytes: 10 };
    let many = a.fabric.gather_max() + 1;
    let wrong = [
        (link_a, frame(1, 9 << 20), vec![outside], ErrorKind::Invalid, "9437184 bytes at 7"),
        (link_a, frame(1, 10), vec![nowhere], ErrorKind::Invalid, "segment 99"),
        (link_a, frame(1, 11), vec![inside], ErrorKind::Invalid, "11 bytes of payload"),
        (link_a, frame(1, 11), vec![], ErrorKind::Invalid, "11 bytes of payload"),
        (link_a, frame(1, 19), vec![inside; 2], ErrorKind::Invalid, "its 2 extents have 20"),
        (link_a, frame(1, 10 * many as u64), vec![inside; many], ErrorKind::Invalid, "gathered at once"),
        (LinkId(987_654), frame(1, 0), vec![], ErrorKind::PeerLost, "link 987654"),
    ];
    for (link, frame, payload, kind, word) in wrong {
        let error = a.fabric.send(link, frame, &payload, SendToken(1)).expect_err("wrong");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error} should say {word}");
    }
    let again = a.fabric.register(SHARED, Arc::clone(&a.memory) as _, crate::Access::Local);
    assert!(again.expect_err("registered already").to_string().contains("segment 1"));
}

pub fn landings_that_cannot_be_fail_alone(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    b.answers(|_, header, _| {
        let (segment, len_bytes) = match header.request {
            0 => (SegmentId(99), header.payload_len),
            1 => (SHARED, header.payload_len - 1),
            _ => (SHARED, header.payload_len),
        };
        let token = LandingToken(header.request);
        Landing::whole(Extent { segment, offset: 0, len_bytes }, token)
    });
    let bytes = pattern(4, 70_000);
    a.memory.write(0, &bytes);
    for number in 0..3 {
        let payload = Extent { segment: SHARED, offset: 0, len_bytes: 70_000 };
        a.post(link_a, &frame(number, 70_000), &[payload]);
    }
    b.wait("all landings", |log| log.landings.len() == 3);
    let log = b.sink.log.lock();
    for number in 0..2 {
        let error = log.landings[&LandingToken(number)].clone().expect_err("no place");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    assert!(log.landings[&LandingToken(2)].is_ok());
    assert!(b.memory.read(0, 70_000) == bytes);
}

/// Every frame is answered from inside the sink, with a payload.
pub fn a_sink_may_call_back(bench: &dyn Bench) {
    const COUNT: u64 = 20;
    let Connected { a, b, link_a, .. } = connected(bench);
    let answered = Arc::new(AtomicU64::new(0));
    let (fabric, count) = (Arc::downgrade(&b.fabric), Arc::clone(&answered));
    b.answers(move |link, header, _| {
        let fabric = fabric.upgrade().expect("alive");
        let payload = Extent { segment: SHARED, offset: 0, len_bytes: 1000 };
        // Counted first: the asker may see the answer before `send` has returned.
        count.fetch_add(1, Ordering::SeqCst);
        // A simulated queue may be full for no reason: as often as it takes.
        while fabric.send(link, frame(header.request, 1000), &[payload], SendToken(header.request)).is_err() {
        }
        Landing::Discard
    });
    for number in 0..COUNT {
        a.post(link_a, &frame(number, 0), &[]);
        a.wait("the answer", |log| log.messages.len() as u64 == number + 1);
    }
    assert_eq!(answered.load(Ordering::SeqCst), COUNT);
}
