//! What ends while it is under way: regions, peers, links, fabrics. Invariant: as in the module above.

use std::sync::Arc;
use std::time::Duration;

use hetmem_core::{ErrorKind, Extent, RemoteExtent, SegmentId, TransferId};

use super::{Bench, Connected, Recorder, SHARED, Side, connect, connected, frame, pattern};
use crate::fabric::{Access, Landing, LandingToken, SendToken, Sent};
use crate::memory::HeapRegion;

const LARGE: u64 = 48 << 20;

fn begin_large_reads(a: &Side, b: &Side, link: hetmem_core::LinkId) -> Vec<TransferId> {
    let remote = RemoteExtent { key: b.key, offset: 0, len_bytes: LARGE / 4 };
    (0..4).map(|part| a.begin_read(link, remote, part * LARGE / 4)).collect()
}

pub fn deregistering_the_target_fails_its_reads(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let reads = begin_large_reads(&a, &b, link_a);
    a.fabric.deregister(SHARED);
    assert_eq!(Arc::strong_count(&a.memory), 1, "the fabric has let go of the memory");
    for transfer in reads {
        if let Err(error) = a.read_result(transfer) {
            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        }
    }
    a.fabric.deregister(SHARED);
    // The link and the other segment go on.
    let local = Extent { segment: super::PRIVATE, offset: 0, len_bytes: 1000 };
    let bytes = pattern(5, 1000);
    b.memory.write(0, &bytes);
    let transfer = TransferId(a.number());
    let remote = RemoteExtent { key: b.key, offset: 0, len_bytes: 1000 };
    a.fabric.read(link_a, transfer, remote, local).expect("read");
    a.read_result(transfer).expect("read");
    assert!(a.private.read(0, 1000) == bytes);
}

pub fn deregistering_the_source_fails_its_reads(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let reads = begin_large_reads(&a, &b, link_a);
    b.fabric.deregister(SHARED);
    assert_eq!(Arc::strong_count(&b.memory), 1, "the fabric has let go of the memory");
    for transfer in reads {
        if let Err(error) = a.read_result(transfer) {
            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        }
    }
    let again = a.begin_read(link_a, RemoteExtent { key: b.key, offset: 0, len_bytes: 8 }, 0);
    assert_eq!(a.read_result(again).expect_err("withdrawn").kind(), ErrorKind::Stale);
    assert!(a.sink.log.lock().is_up(link_a));
}

pub fn deregistering_one_source_leaves_reads_of_another_alone(bench: &dyn Bench) {
    const LEN: u64 = 2 << 20;
    let Connected { a, b, link_a, .. } = connected(bench);
    let other = Arc::new(HeapRegion::new(usize::try_from(LEN).expect("small")));
    let bytes = pattern(12, usize::try_from(LEN).expect("small"));
    other.write(0, &bytes);
    let key = b.fabric.register(SegmentId(3), other as _, Access::RemoteRead).expect("register");
    let known = (0..10_000).any(|_| {
        // Who reads hears of it in its own time.
        a.fabric.progress(Duration::from_millis(1), &|| false);
        let read = a.begin_read(link_a, RemoteExtent { key, offset: 0, len_bytes: 8 }, 0);
        a.read_result(read).is_ok()
    });
    assert!(known, "the peer is told of a region");
    let read = |(number, key)| {
        let remote = RemoteExtent { key, offset: 0, len_bytes: LEN };
        (a.begin_read(link_a, remote, number * LEN), number * LEN, key)
    };
    let keys = [b.key, key, key, b.key, key, key];
    let reads: Vec<_> = (0..).zip(keys).map(read).collect();
    b.fabric.deregister(SHARED);
    for (transfer, offset, of) in reads {
        match a.read_result(transfer) {
            Ok(_) if of == key => {
                let at = usize::try_from(offset).expect("small");
                assert!(a.memory.read(at, bytes.len()) == bytes, "every byte came through");
            }
            Ok(_) => {}
            Err(error) => {
                assert_eq!((of, error.kind()), (b.key, ErrorKind::Stale), "{error}");
            }
        }
    }
    assert!(a.sink.log.lock().is_up(link_a));
}

pub fn a_lost_peer_fails_what_was_under_way(bench: &dyn Bench) {
    let Connected { a, b, link_a, kill_b, .. } = connected(bench);
    let address = b.fabric.address();
    let reads = begin_large_reads(&a, &b, link_a);
    let payload = Extent { segment: SHARED, offset: 0, len_bytes: 4 << 20 };
    let mut pending = Vec::new();
    for number in 0..20 {
        let token = SendToken(1000 + number);
        if let Ok(Sent::Pending) = a.fabric.send(link_a, frame(number, 4 << 20), &[payload], token) {
            pending.push(token);
        }
    }
    drop(b);
    kill_b();
    a.wait("LinkDown", |log| log.downs.iter().any(|(down, _)| *down == link_a));
    let log = a.sink.log.lock();
    for transfer in reads {
        // Everything under way has been reported before LinkDown.
        if let Err(error) = &log.reads[&transfer] {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            assert!(error.to_string().contains("read"), "{error} names what was under way");
        }
    }
    assert!(pending.iter().all(|token| log.sends.contains_key(token)));
    let why = &log.downs[0].1;
    assert_eq!(why.kind(), ErrorKind::PeerLost, "{why}");
    assert!(why.to_string().contains(&address), "{why} names the peer");
    drop(log);
    let error = a.fabric.send(link_a, frame(1, 0), &[], SendToken(1)).expect_err("down");
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
}

pub fn disconnecting_fails_what_was_under_way(bench: &dyn Bench) {
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    b.answers(|_, header, _| {
        let extent = Extent { segment: SHARED, offset: 0, len_bytes: header.payload_len };
        Landing::whole(extent, LandingToken(header.request))
    });
    let reads = begin_large_reads(&a, &b, link_a);
    let payload = Extent { segment: SHARED, offset: 0, len_bytes: 16 << 20 };
    let (token, sent) = a.send(link_a, &frame(1, 16 << 20), &[payload]);
    a.fabric.disconnect(link_a);
    a.wait("LinkDown", |log| log.downs.iter().any(|(down, _)| *down == link_a));
    b.wait("LinkDown of the peer", |log| log.downs.iter().any(|(down, _)| *down == link_b));
    let log = a.sink.log.lock();
    assert!(reads.iter().all(|transfer| log.reads.contains_key(transfer)), "all reads ended before the link");
    assert_eq!(log.sends.contains_key(&token), sent == Sent::Pending);
    drop(log);
    let log = b.sink.log.lock();
    assert_eq!(log.landings.len(), log.messages.len(), "every landing that was promised has ended");
    drop(log);
    a.fabric.disconnect(link_a);
}

pub fn a_link_can_be_made_again(bench: &dyn Bench) {
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    b.fabric.disconnect(link_b);
    a.wait("LinkDown", |log| log.downs.iter().any(|(down, _)| *down == link_a));
    let (link, _) = connect(&a, &b);
    assert_ne!(link, link_a, "a link's number is not used twice");
    let bytes = pattern(8, 2 << 20);
    b.memory.write(0, &bytes);
    let remote = RemoteExtent { key: b.key, offset: 0, len_bytes: 2 << 20 };
    let transfer = a.begin_read(link, remote, 0);
    a.read_result(transfer).expect("read");
    assert!(a.memory.read(0, 2 << 20) == bytes);
}

pub fn nothing_is_heard_after_stop(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    begin_large_reads(&a, &b, link_a);
    a.fabric.stop();
    let calls = |sink: &Recorder| sink.log.lock().calls;
    let before = calls(&a.sink);
    assert_eq!(Arc::strong_count(&a.memory), 1, "the fabric has let go of the memory");
    b.wait("LinkDown of the peer", |log| log.downs.len() == 1);
    assert_eq!(calls(&a.sink), before);
    assert!(a.fabric.send(link_a, frame(1, 0), &[], SendToken(1)).is_err());
    a.fabric.stop();
}
