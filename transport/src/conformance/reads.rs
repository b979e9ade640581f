//! One-sided reads. Not what ends them early (`losses`). Invariant: as in the module above.

use hetmem_core::{ErrorKind, Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, TransferId};

use super::{Bench, Connected, PRIVATE, PRIVATE_LEN, SHARED, Side, connected, pattern};

fn whole(side: &Side, offset: u64, len_bytes: u64) -> RemoteExtent {
    RemoteExtent { key: side.key, offset, len_bytes }
}

pub fn reads_bring_every_byte(bench: &dyn Bench) {
    let Connected { a, b, link_a, link_b, .. } = connected(bench);
    for (reader, owner, link) in [(&a, &b, link_a), (&b, &a, link_b)] {
        for (len, from, to) in [
            (1, 0, 0),
            (8, 8, 3),
            (8, 5, 16),
            (4096, 1, 77),
            (65_537, 4095, 13),
            (1 << 20, 0, 0),
            (64 << 20, 3, 12_345),
        ] {
            let bytes = pattern(len as u64, len);
            owner.memory.write(from, &bytes);
            reader.memory.write(to + len, &[0xa5]);
            let transfer = reader.begin_read(link, whole(owner, from as u64, len as u64), to as u64);
            let stats = reader.read_result(transfer).expect("read");
            assert_eq!((stats.bytes, stats.staged_bytes), (len as u64, 0));
            assert!(stats.slices >= 1);
            assert!(reader.memory.read(to, len) == bytes, "{len} bytes from {from} to {to}");
            assert_eq!(reader.memory.read(to + len, 1), [0xa5], "the byte after the target is untouched");
        }
    }
}

pub fn a_word_is_read(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    for value in 1..50_u64 {
        b.memory.write(4096, &value.to_ne_bytes());
        let transfer = a.begin_read(link_a, whole(&b, 4096, 8), 64);
        a.read_result(transfer).expect("read");
        assert_eq!(a.memory.read(64, 8), value.to_ne_bytes());
    }
}

pub fn a_checked_read_brings_its_word_too(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let word_at = 1 << 20;
    for (number, len) in [0_usize, 1, 8, 4096, 70_000, 1 << 20, (3 << 20) + 5].into_iter().enumerate() {
        let (bytes, value) = (pattern(number as u64, len), 7_000 + number as u64);
        b.memory.write(word_at, &value.to_le_bytes());
        b.memory.write(2 << 20, &bytes);
        let transfer = TransferId(a.number());
        let local = Extent { segment: SHARED, offset: 64, len_bytes: len as u64 };
        let wanted = (whole(&b, 2 << 20, len as u64), local);
        // Without bytes, and with none of them, only the word is read.
        let wanted = (number > 0).then_some(wanted);
        a.fabric.read_checked(link_a, transfer, wanted, whole(&b, word_at as u64, 8)).expect("read");
        let stats = a.read_result(transfer).expect("read");
        assert_eq!((stats.bytes, stats.word), (len as u64, Some(value)), "{len} bytes");
        assert!(stats.round_trips == 1 || (stats.round_trips == 2 && len > 0), "{stats:?}");
        assert!(a.memory.read(64, len) == bytes, "{len} bytes");
    }
    let none = a.begin_read(link_a, whole(&b, 0, 64), 0);
    assert_eq!(a.read_result(none).expect("read").word, None, "it asked for none");
}

pub fn wrong_words_are_refused(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let local = Extent { segment: SHARED, offset: 0, len_bytes: 100 };
    let bytes = Some((whole(&b, 0, 100), local));
    let begin = |word| {
        let transfer = TransferId(a.number());
        a.fabric.read_checked(link_a, transfer, bytes, word).map(|()| transfer)
    };
    let error = begin(whole(&b, 0, 9)).expect_err("nine bytes");
    assert!(error.to_string().contains("9 bytes"), "{error}");
    let unknown = RemoteExtent { key: RemoteKey(0x4321), offset: 0, len_bytes: 8 };
    let private = RemoteExtent { key: b.private_key, offset: 0, len_bytes: 8 };
    for (word, kind) in [(unknown, ErrorKind::Stale), (private, ErrorKind::Denied)] {
        let error = a.read_result(begin(word).expect("begun")).expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
    }
    a.read_result(begin(whole(&b, 8, 8)).expect("begun")).expect("the link goes on");
}

pub fn an_empty_read_is_done(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let transfer = a.begin_read(link_a, whole(&b, 100, 0), 0);
    assert_eq!(a.read_result(transfer).expect("read").bytes, 0);
}

pub fn many_reads_at_once(bench: &dyn Bench) {
    const COUNT: usize = 300;
    let Connected { a, b, link_a, .. } = connected(bench);
    let source = pattern(1, 8 << 20);
    b.memory.write(0, &source);
    let mut reads = Vec::new();
    let mut to = 0;
    for number in 0..COUNT {
        let len = [8, 100, 4096, 70_000, 400_000][number % 5] + number;
        let from = (number * 20_011) % ((8 << 20) - len);
        reads.push((a.begin_read(link_a, whole(&b, from as u64, len as u64), to as u64), from, to, len));
        to += len;
    }
    for (transfer, from, to, len) in reads {
        a.read_result(transfer).expect("read");
        assert!(a.memory.read(to, len) == source[from..from + len], "{len} bytes from {from}");
    }
}

/// A state dict of thousands of tensors that are all read, and some of them given up while they wait.
pub fn thousands_of_reads_end_one_by_one(bench: &dyn Bench) {
    const COUNT: usize = 6_000;
    const LEN: u64 = 5_000;
    let Connected { a, b, link_a, .. } = connected(bench);
    let source = pattern(2, 32 << 20);
    b.memory.write(0, &source);
    let place = |number: usize| number as u64 * (LEN + 3);
    let reads: Vec<TransferId> =
        (0..COUNT).map(|number| a.begin_read(link_a, whole(&b, place(number), LEN), place(number))).collect();
    reads.iter().skip(1).step_by(3).for_each(|transfer| a.fabric.cancel(*transfer));
    for (number, transfer) in reads.iter().enumerate() {
        match a.read_result(*transfer) {
            Ok(_) => {
                let at = usize::try_from(place(number)).expect("small");
                let len = usize::try_from(LEN).expect("small");
                assert!(a.memory.read(at, len) == source[at..at + len], "read {number}");
            }
            Err(error) => assert!(number % 3 == 1 && error.to_string().contains("cancelled"), "{error}"),
        }
    }
    let after = a.begin_read(link_a, whole(&b, 0, LEN), 0);
    a.read_result(after).expect("the link goes on");
}

pub fn wrong_reads_are_refused_by_name(bench: &dyn Bench) {
    let Connected { a, b, link_a, .. } = connected(bench);
    let end = b.memory.read(0, 0).len() as u64 + super::REGION_LEN as u64;
    let refused = [
        (whole(&b, end, 1), ErrorKind::Invalid, format!("1 bytes at {end}")),
        (whole(&b, end - 10, 11), ErrorKind::Invalid, format!("11 bytes at {}", end - 10)),
        (whole(&b, u64::MAX, 16), ErrorKind::Invalid, format!("16 bytes at {}", u64::MAX)),
        (
            RemoteExtent { key: RemoteKey(0x1234), offset: 0, len_bytes: 8 },
            ErrorKind::Stale,
            "1234".to_owned(),
        ),
        (
            RemoteExtent { key: b.private_key, offset: 0, len_bytes: 8 },
            ErrorKind::Denied,
            format!("segment {PRIVATE}"),
        ),
    ];
    let bytes = pattern(2, 3 << 20);
    b.memory.write(0, &bytes);
    for (remote, kind, word) in refused {
        let beside = a.begin_read(link_a, whole(&b, 0, 3 << 20), 4096);
        let transfer = a.begin_read(link_a, remote, 0);
        let error = a.read_result(transfer).expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(&word), "{error} should say {word}");
        a.read_result(beside).expect("a read beside it goes on");
        assert!(a.memory.read(4096, 3 << 20) == bytes);
    }
    assert!(a.sink.log.lock().is_up(link_a), "a refusal is no loss");
    refused_at_once(&a, &b, link_a);
}

fn refused_at_once(a: &Side, b: &Side, link: LinkId) {
    let private_len = PRIVATE_LEN as u64;
    let wrong = [
        (link, SHARED, 0, 9, 8, "9 remote bytes"),
        (link, SegmentId(99), 0, 8, 8, "segment 99"),
        (link, PRIVATE, private_len - 7, 8, 8, "8 bytes at 2097145"),
        (LinkId(987_654), SHARED, 0, 8, 8, "link 987654"),
    ];
    for (link, segment, offset, remote_len, len_bytes, word) in wrong {
        let local = Extent { segment, offset, len_bytes };
        let transfer = TransferId(a.number());
        let error = a.fabric.read(link, transfer, whole(b, 0, remote_len), local).expect_err("wrong");
        assert!(error.to_string().contains(word), "{error} should say {word}");
    }
    let first = a.begin_read(link, whole(b, 0, 1 << 20), 0);
    let local = Extent { segment: SHARED, offset: 0, len_bytes: 8 };
    if !a.sink.log.lock().reads.contains_key(&first) {
        // Only in a simulation is it certain to be in progress still, so success proves nothing here.
        if let Err(error) = a.fabric.read(link, first, whole(b, 0, 8), local) {
            assert!(error.to_string().contains("in progress"), "{error}");
            a.read_result(first).expect("the first goes on");
        }
    }
}

/// Cancels large reads at various moments, and looks whether their target stays as it is afterwards while a read
/// beside them goes on.
pub fn a_cancelled_read_touches_nothing_afterwards(bench: &dyn Bench) {
    const LEN: usize = 24 << 20;
    const BESIDE: usize = 4 << 20;
    let Connected { a, b, link_a, .. } = connected(bench);
    let bytes = pattern(3, BESIDE);
    b.memory.write(0, &bytes);
    let mark = vec![0x77; LEN];
    for round in 0..6_usize {
        let cancelled = a.begin_read(link_a, whole(&b, 0, LEN as u64), 0);
        let beside = a.begin_read(link_a, whole(&b, 0, BESIDE as u64), LEN as u64);
        // From "before any byte" to "after many".
        let seen = a.memory.read(round << 20, 8);
        if round > 0 {
            let landed = || a.memory.read(round << 20, 8) != seen;
            a.fabric.progress(std::time::Duration::from_millis(20), &landed);
        }
        a.fabric.cancel(cancelled);
        let result = a.read_result(cancelled);
        a.memory.write(0, &mark);
        if let Err(error) = &result {
            assert!(error.to_string().contains("cancelled"), "{error}");
        }
        a.read_result(beside).expect("a read beside a cancelled one goes on");
        assert!(a.memory.read(LEN, BESIDE) == bytes);
        let after = a.begin_read(link_a, whole(&b, 0, 1 << 20), (LEN + BESIDE) as u64);
        a.read_result(after).expect("the link goes on");
        assert!(a.memory.read(0, LEN) == mark, "round {round}: bytes landed after the end ({result:?})");
    }
    a.fabric.cancel(TransferId(123_456));
    assert!(a.sink.log.lock().is_up(link_a));
}
