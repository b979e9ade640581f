//! Receipts against what is documented (docs/receipts.md): which paths move bytes without a buffer in between, and
//! which do not. Not the measuring of thresholds. Invariant: every path of the table has a line here.

use hetmem_client::{
    ErrorKind, GetOptions, ObjectMeta, Path, PutOptions, Range, Receipt, Reserved, Store, ZeroCopy,
};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve};

const SMALL: usize = 2_000;
const LARGE: usize = 5 << 20;

fn two_nodes(folder: &std::path::Path) -> [(Daemon, Store); 2] {
    let owner = Serve::new(folder, "owner").start();
    let reader = Serve::new(folder, "reader").join(&owner.address).start();
    [owner, reader].map(|node| {
        let store = node.connect();
        (node, store)
    })
}

fn get(store: &Store, name: &str, len: usize, options: &GetOptions) -> Receipt {
    let object = store.get_with(&key(name), options).expect("it is there");
    let all = bytes_of(name, len, 0);
    match options.range {
        None => assert!(*object == all, "the bytes of {name}"),
        Some(Range { start, .. }) => {
            let start = usize::try_from(start).expect("small");
            assert!(*object == all[start..start + object.len()], "a part of {name}");
        }
    }
    object.receipt()
}

fn numbers(receipt: &Receipt) -> (Path, u64, u64, u32) {
    (receipt.path, receipt.bytes, receipt.staged_bytes, receipt.round_trips)
}

#[test]
fn puts_say_how_their_bytes_came_to_their_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Serve::new(folder.path(), "alone").start();
    let store = node.connect();
    let (small, large) = (bytes_of("s", SMALL, 0), bytes_of("l", LARGE, 0));
    let meta = |bytes: &[u8]| ObjectMeta::bytes(bytes.len() as u64).expect("a length");
    let put = |name: &str, bytes: &[u8], options: &PutOptions| {
        let outcome = store.put_with(&key(name), meta(bytes), bytes, options).expect("room");
        assert_eq!(*outcome.receipt.to.node, *store.node());
        assert!(outcome.receipt.elapsed.is_some() && outcome.receipt.fabric.is_none());
        numbers(&outcome.receipt)
    };
    let plain = PutOptions::default();
    let (small_len, large_len) = (SMALL as u64, LARGE as u64);
    assert_eq!(put("small", &small, &plain), (Path::Inline, small_len, small_len, 0));
    assert_eq!(put("large", &large, &plain), (Path::InPlace, large_len, 0, 0));
    assert_eq!(put("large", &large, &plain), (Path::Kept, 0, 0, 0));
    let copy = PutOptions { seal_copy: true, ..plain };
    assert_eq!(put("copied", &large, &copy), (Path::Copied, large_len, large_len, 0));
    let required = PutOptions { zero_copy: ZeroCopy::Required, ..plain };
    assert_eq!(put("small, in place", &small, &required), (Path::InPlace, small_len, 0, 0));
    let both = PutOptions { seal_copy: true, ..required };
    let refused = store.put_with(&key("both"), meta(&large), &large, &both).expect_err("it cannot be");
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
    assert!(refused.to_string().contains("zero copy"), "{refused}");
    let Reserved::Open(mut open) = store.reserve(&key("r"), meta(&large), &plain).expect("room") else {
        panic!("the key is free")
    };
    open.bytes_mut().copy_from_slice(&large);
    assert_eq!(numbers(&open.seal().expect("sealed").receipt), (Path::InPlace, large_len, 0, 0));
}

#[test]
fn a_client_without_memory_of_its_own_stages_or_refuses() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Serve::new(folder.path(), "stingy").flag("client-quota", "0").start();
    let store = node.connect();
    let bytes = bytes_of("w", LARGE, 0);
    let outcome = store.put_bytes(&key("w"), &bytes).expect("room");
    assert_eq!(numbers(&outcome.receipt), (Path::Written, LARGE as u64, LARGE as u64, 0));
    let required = PutOptions { zero_copy: ZeroCopy::Required, ..PutOptions::default() };
    let meta = ObjectMeta::bytes(LARGE as u64).expect("a length");
    let refused = store.put_with(&key("r"), meta, &bytes, &required).expect_err("it cannot be");
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
    assert!(refused.to_string().contains("client_quota"), "the remedy: {refused}");
    let found = store.exists(&key("r")).expect("the node answers");
    assert!(!found, "nothing is left of it");
    node.settles(&store, "the reservation is given back", |status| status.reservations == 0);
}

#[test]
fn gets_say_how_their_bytes_came_here() {
    let folder = tempfile::tempdir().expect("a folder");
    let [(_owner, there), (_reader, here)] = two_nodes(folder.path());
    for (name, len) in [("small", SMALL), ("large", LARGE), ("part", LARGE)] {
        there.put_bytes(&key(name), &bytes_of(name, len, 0)).expect("room");
    }
    let local = get(&there, "large", LARGE, &GetOptions::default());
    assert_eq!(numbers(&local), (Path::Local, 0, 0, 0));
    assert_eq!((local.fabric, local.elapsed, &local.from), (None, None, &local.to));

    let away = GetOptions { keep: false, ..GetOptions::default() };
    let eager = get(&here, "small", SMALL, &away);
    assert_eq!((eager.path, eager.bytes, eager.round_trips), (Path::Eager, SMALL as u64, 1));
    assert!(eager.staged_bytes <= eager.bytes && eager.threshold_bytes >= Some(SMALL as u64), "{eager:?}");
    assert_eq!((eager.fabric.as_deref(), &*eager.from.node), (Some("tcp"), "owner"));
    assert!(&*eager.to.node == "reader" && eager.elapsed.is_some());

    // A question and a read; then, where it was found, a read with the word behind it.
    for (trips, place) in [(2, "asked for"), (1, "known")] {
        let read = get(&here, "large", LARGE, &away);
        assert_eq!(numbers(&read), (Path::Read, LARGE as u64, 0, trips), "{place}");
    }
    let range = Some(Range { start: 1_000_001, len_bytes: 3 << 20 });
    let part = get(&here, "part", LARGE, &GetOptions { range, ..away });
    assert_eq!(numbers(&part), (Path::Read, 3 << 20, 0, 2));
    let kept = get(&here, "large", LARGE, &GetOptions::default());
    assert_eq!(kept.path, Path::Read);
    assert_eq!(get(&here, "large", LARGE, &GetOptions::default()).path, Path::Local);
}

#[test]
fn what_an_answer_brings_along_is_staged_and_refused_where_nothing_may_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let [(_owner, there), (_reader, here)] = two_nodes(folder.path());
    for name in ["a", "b", "c"] {
        there.put_bytes(&key(name), &bytes_of(name, SMALL, 0)).expect("room");
    }
    // Short enough to arrive with its header: those bytes pass through the connection's buffer.
    let sent = GetOptions { keep: false, threshold_bytes: Some(u64::MAX), ..GetOptions::default() };
    let staged: u64 = (0..20).map(|_| get(&here, "a", SMALL, &sent).staged_bytes).sum();
    assert!(staged > 0, "of twenty answers none came in one piece with its header");
    let read = GetOptions { threshold_bytes: Some(0), ..sent };
    let read = get(&here, "b", SMALL, &read);
    assert_eq!(numbers(&read), (Path::Read, SMALL as u64, 0, 2));
    assert_eq!(read.threshold_bytes, Some(0), "forced by the caller");
    // Where it was found, on one stream: the word comes behind the bytes.
    let known = GetOptions { threshold_bytes: Some(0), ..sent };
    assert_eq!(numbers(&get(&here, "b", SMALL, &known)), (Path::Read, SMALL as u64, 0, 1));
    let required = GetOptions { zero_copy: ZeroCopy::Required, ..sent };
    for _ in 0..20 {
        assert_eq!(get(&here, "c", SMALL, &required).staged_bytes, 0);
    }
}
