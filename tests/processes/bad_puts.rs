//! Puts that cannot be: too much, too long, not what the metadata says. Not garbage (`hostile_unix`). What was there
//! before stays, whatever is refused.

use hetmem_client::{
    DType, ErrorKind, GetOptions, IfExists, Key, ObjectMeta, PutOptions, Reserved, Shape, Store, StoreError,
};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::Serve;

fn verify(store: &Store, name: &str, len: usize) {
    let options = GetOptions { verify: true, ..GetOptions::default() };
    let object = store.get_with(&key(name), &options).expect("it was put");
    assert!(*object == *bytes_of(name, len, 0), "{name} has other bytes");
}

#[test]
fn a_full_store_says_so_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "full").start();
    let store = node.connect();
    let (small, large) = (40_000, 2 << 20);
    let pinned = PutOptions { pin: true, ..PutOptions::default() };
    let meta = ObjectMeta::bytes(large as u64).expect("a length");
    store.put_with(&key("pinned"), meta, &bytes_of("pinned", large, 0), &pinned).expect("room");
    let mut names = Vec::new();
    let full = loop {
        let len = if names.len() % 4 == 0 { small } else { large };
        let name = format!("object-{}", names.len());
        match store.put_bytes(&key(&name), &bytes_of(&name, len, 0)) {
            Ok(_) => names.push((name, len)),
            Err(error) => break error,
        }
    };
    let StoreError::NoSpace { requested, free, tier, .. } = &full else { panic!("{full}") };
    assert_eq!((*requested, tier.to_string().as_str()), (large as u64, "host"), "{full}");
    let status = store.status().expect("it answers");
    let (used, capacity) = (status.tiers[0].used_bytes, status.tiers[0].capacity_bytes);
    assert_eq!(*free, capacity - used, "{full}: {used} of {capacity} are used");
    let words = full.to_string();
    for word in ["host", &requested.to_string(), &free.to_string(), "delete objects"] {
        assert!(words.contains(word), "{words} should say {word}");
    }
    assert!(names.len() > 20, "{} objects fitted", names.len());
    // Refused again and again: nothing goes for it.
    for _ in 0..10 {
        let again = store.put_bytes(&key("more"), &bytes_of("more", large, 0)).expect_err("it is full");
        assert_eq!(again.kind(), ErrorKind::NoSpace, "{again}");
    }
    for (name, len) in &names {
        verify(&store, name, *len);
    }
    verify(&store, "pinned", large);
    assert_eq!(store.status().expect("it answers").reservations, 0);
    // Room again for who made it; for others once it has gone, since what was granted to it is its own until then.
    for (name, _) in names.iter().take(8) {
        assert!(store.delete(&key(name)).expect("deleted"));
    }
    store.put_bytes(&key("more"), &bytes_of("more", large, 0)).expect("there is room now");
    let other = node.connect();
    verify(&other, "more", large);
    for (name, _) in names.iter().skip(8) {
        assert!(other.delete(&key(name)).expect("deleted"));
    }
    drop(store);
    node.settles(&other, "the first client has gone", |status| (status.clients, status.draining) == (1, 0));
    for number in 0..8 {
        let name = format!("other-{number}");
        other.put_bytes(&key(&name), &bytes_of(&name, large, 0)).expect("there is room now");
        verify(&other, &name, large);
    }
    node.assert_sound();
}

#[test]
fn an_object_longer_than_the_store_is_too_large() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "small").start();
    let store = node.connect();
    for len in [65 << 20, 1 << 40, hetmem_core::OBJECT_LEN_MAX] {
        let meta = ObjectMeta::bytes(len).expect("a length");
        let error =
            store.reserve(&key("long"), meta, &PutOptions::default()).expect_err("longer than the store");
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        assert!(error.to_string().contains(&len.to_string()), "{error}");
        assert!(error.to_string().contains(&(64_u64 << 20).to_string()), "{error}");
    }
    let error = ObjectMeta::bytes(u64::MAX).expect_err("longer than any object");
    assert!(matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::Invalid), "{error}");
    node.assert_sound();
}

#[test]
fn keys_that_are_none_are_refused_with_the_reason() {
    for (name, word) in [("", "empty"), (&"k".repeat(513)[..], "513"), ("a\0b", "NUL")] {
        let error = Key::new(name).expect_err("no key");
        assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::TooLarge), "{error}");
        assert!(error.to_string().contains(word), "{error} should say {word}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "keys").start();
    let store = node.connect();
    // The longest, and characters of all lengths.
    for name in ["k".repeat(512), "ключ/鍵/🔑 ".to_owned() + &"é".repeat(200)] {
        store.put_bytes(&key(&name), name.as_bytes()).expect("a valid key");
        assert!(*store.get(&key(&name)).expect("it was put") == *name.as_bytes());
        assert_eq!(
            store.list("").filter(|listed| listed.as_ref().expect("a list").key.as_str() == name).count(),
            1
        );
    }
    node.assert_sound();
}

#[test]
fn shapes_that_do_not_fit_their_bytes_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "shapes").start();
    let store = node.connect();
    let meta = ObjectMeta::tensor(DType::F32, &[3, 5]).expect("a shape");
    for len in [0, 59, 61, 60 * 1024 * 1024] {
        let error = store.put(&key("t"), meta, &vec![0; len]).expect_err("60 bytes belong there");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(
            error.to_string().contains("60 bytes") && error.to_string().contains(&len.to_string()),
            "{error}"
        );
    }
    for dims in [&[u64::MAX, 2][..], &[1 << 40, 1 << 40]] {
        let error = ObjectMeta::tensor(DType::F64, dims).expect_err("it overflows");
        assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::TooLarge), "{error}");
    }
    let error = Shape::new(&[1; 9]).expect_err("nine dimensions");
    assert!(error.to_string().contains('9'), "{error}");
    // A tensor without elements is one.
    let empty = ObjectMeta::tensor(DType::BF16, &[0, 7]).expect("a shape");
    store.put(&key("empty"), empty, &[]).expect("0 bytes");
    assert!(store.get(&key("empty")).expect("it was put").is_empty());
    node.assert_sound();
}

#[test]
fn an_existing_key_is_kept_or_refused_as_the_caller_wishes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "has").start();
    let mut second = Serve::new(folder.path(), "has-not").join(&first.address).start();
    let (here, there) = (first.connect(), second.connect());
    let meta = ObjectMeta::bytes(9).expect("a length");
    here.put(&key("k"), meta, b"the first").expect("room");
    assert!(here.put(&key("k"), meta, b"the other").expect("kept").kept);
    let only = PutOptions { if_exists: IfExists::Error, ..PutOptions::default() };
    second.settles(&there, "linked", |status| status.peers.iter().any(|peer| peer.linked));
    for store in [&here, &there] {
        let error = store.put_with(&key("k"), meta, b"the other", &only).expect_err("it exists");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    }
    match here.reserve(&key("k"), meta, &PutOptions::default()).expect("an answer") {
        Reserved::Kept(outcome) => assert!(outcome.kept),
        Reserved::Open(_) => panic!("memory for an object that exists"),
    }
    for store in [&here, &there] {
        assert!(*store.get(&key("k")).expect("it was put") == *b"the first");
    }
    first.assert_sound();
    second.assert_sound();
}
