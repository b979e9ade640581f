//! Many objects at once, from real nodes: thousands of keys on two owners, some of them missing, owners and clients that
//! die in the middle. Not what it costs (`hetmem bench remote`).

use std::path::Path as FilePath;
use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, Key, Path, Store};
use hetmem_node::{Config, Node};
use hetmem_tests::content::{below, key};
use hetmem_tests::daemon::{Daemon, Serve};
use hetmem_tests::load::{Load, content_of, name_of};

/// Objects that a client can hold at a time.
const PINS: usize = 16_384;

/// Two owners, the first of which keeps the directory, and their stores.
fn owners(folder: &FilePath) -> [(Daemon, Store); 2] {
    let first = Serve::new(folder, "first").host("256MiB").start();
    let second = Serve::new(folder, "second").host("256MiB").join(&first.address).start();
    [first, second].map(|node| {
        let store = node.connect();
        (node, store)
    })
}

fn reader(folder: &FilePath, first: &Daemon) -> (Daemon, Store) {
    let node = Serve::new(folder, "reader").host("256MiB").join(&first.address).start();
    let store = node.connect();
    (node, store)
}

/// Puts objects of various lengths on the owners in turns.
fn put_all(owners: &[(Daemon, Store); 2], prefix: &str, count: u64, len_max: usize) -> Vec<Key> {
    let mut state = 11;
    let put = |number: u64| {
        let name = name_of(prefix, number, below(&mut state, len_max));
        let owner = usize::from(number % 2 == 1);
        owners[owner].1.put_bytes(&key(&name), &content_of(&name)).expect("room");
        key(&name)
    };
    (0..count).map(put).collect()
}

fn is_empty(node: &Daemon, monitor: &Store) {
    node.settles(monitor, "nothing is held", |status| {
        let used: u64 = status.tiers.iter().map(|tier| tier.used_bytes).sum();
        (status.clients, status.objects, status.draining, used) == (1, 0, 0, 0)
    });
}

#[test]
fn ten_thousand_keys_on_two_owners() {
    let folder = tempfile::tempdir().expect("a folder");
    let owners = owners(folder.path());
    let keys = put_all(&owners, "dict", 10_000, 3_000);
    let (mut node, store) = reader(folder.path(), &owners[0].0);
    let options = GetOptions { keep: false, threshold_bytes: Some(u64::MAX), ..GetOptions::default() };
    let mut staged = 0;
    for round in 0..2 {
        let objects = store.get_many_with(&keys, &options);
        for (number, (key, object)) in keys.iter().zip(&objects).enumerate() {
            let object = object.as_ref().expect("it was put");
            assert!(**object == *content_of(key.as_str()), "{key} has other bytes");
            let receipt = object.receipt();
            let from = if number % 2 == 1 { "second" } else { "first" };
            assert_eq!((&*receipt.from.node, receipt.path), (from, Path::Eager), "{key}");
            // Who has it is asked of the directory once.
            let round_trips = if round == 0 && number % 2 == 1 { 2 } else { 1 };
            assert_eq!((receipt.bytes, receipt.round_trips), (object.len() as u64, round_trips), "{key}");
            assert_eq!((receipt.fabric.as_deref(), receipt.threshold_bytes), (Some("tcp"), Some(u64::MAX)));
            assert!(receipt.staged_bytes <= receipt.bytes, "{receipt:?}");
            staged += receipt.staged_bytes;
        }
        drop(objects);
        is_empty(&node, &store);
    }
    let all: u64 = keys.iter().map(|key| content_of(key.as_str()).len() as u64).sum();
    assert!(staged < all / 4, "{staged} of {all} bytes twice were staged");
    assert_eq!(store.status().expect("it answers").counters.eager, 20_000);

    // The same inside a node's process, and what is kept is there the next time.
    let settings = [
        ("name", "inside".to_owned()),
        ("socket", folder.path().join("inside.sock").display().to_string()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("host", "128MiB".to_owned()),
        ("huge_pages", "off".to_owned()),
        ("join", owners[0].0.address.clone()),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value)).into();
    let inside = Node::start(Config::load(None, settings).expect("a configuration")).expect("a node");
    let session = Store::over(inside.session().expect("a session")).expect("a store");
    for path in [Path::Eager, Path::Local] {
        let kept = GetOptions { keep: true, ..options };
        for (key, object) in keys.iter().zip(session.get_many_with(&keys, &kept)) {
            let object = object.expect("it was put");
            assert!(*object == *content_of(key.as_str()), "{key} has other bytes");
            assert_eq!(object.path(), path, "{key}");
        }
    }
    let known = owners[0].1.stat(&keys[0]).expect("it is there").holders;
    assert_eq!(known, ["first", "inside"], "what is kept is announced");
    node.assert_sound();
}

#[test]
fn a_key_that_cannot_be_had_costs_no_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let owners = owners(folder.path());
    let there = put_all(&owners, "there", 300, 60_000);
    let (mut node, store) = reader(folder.path(), &owners[0].0);
    // Missing ones in between, some in place, some twice.
    let mut keys = Vec::new();
    for (number, key_there) in there.iter().enumerate() {
        keys.push(key_there.clone());
        if number % 7 == 0 {
            keys.push(key(&format!("missing/{number}")));
        }
        if number % 11 == 0 {
            keys.push(there[number / 2].clone());
        }
    }
    for some in there.iter().step_by(5) {
        drop(store.get(some).expect("it was put"));
    }
    for verify in [false, true] {
        let options = GetOptions { keep: false, verify, ..GetOptions::default() };
        for (key, object) in keys.iter().zip(store.get_many_with(&keys, &options)) {
            match object {
                Ok(object) => assert!(*object == *content_of(key.as_str()), "{key} has other bytes"),
                Err(error) => {
                    assert!(key.as_str().starts_with("missing/"), "{key}: {error}");
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                    assert!(error.to_string().contains(key.as_str()), "{error} names its key");
                }
            }
        }
    }
    // More than a client can hold: the first ones are handed out, and letting go of them makes it all good again.
    let tiny = put_all(&owners, "tiny", 100, 1_000);
    let many: Vec<Key> = tiny.iter().cycle().take(PINS + 500).cloned().collect();
    let options = GetOptions { keep: false, ..GetOptions::default() };
    for key in there.iter().step_by(5) {
        store.evict(key, false).expect("its owner has it");
    }
    let objects = store.get_many_with(&many, &options);
    let held = objects.iter().filter(|object| object.is_ok()).count();
    assert!((PINS - 64..=PINS).contains(&held), "{held} objects are held");
    for error in objects.into_iter().filter_map(Result::err) {
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    is_empty(&node, &store);
    assert!(store.get_many_with(&many[..200], &options).iter().all(Result::is_ok));
    is_empty(&node, &store);
    node.assert_sound();
}

#[test]
fn an_owner_that_dies_costs_only_its_own_objects() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut owners = owners(folder.path());
    let keys = put_all(&owners, "dict", 4_000, 30_000);
    let (mut node, store) = reader(folder.path(), &owners[0].0);
    let options = GetOptions { keep: false, timeout: Duration::from_secs(3), ..GetOptions::default() };
    let objects = std::thread::scope(|scope| {
        let getting = scope.spawn(|| store.get_many_with(&keys, &options));
        let eager = || store.status().expect("it answers").counters.eager;
        while eager() == 0 && !getting.is_finished() {
            std::thread::yield_now();
        }
        owners[1].0.kill();
        getting.join().expect("no panic")
    });
    for (number, (key, object)) in keys.iter().zip(objects).enumerate() {
        match object {
            Ok(object) => assert!(*object == *content_of(key.as_str()), "{key} has other bytes"),
            Err(error) => {
                assert!(number % 2 == 1, "{key} is on the owner that lives: {error}");
                let kinds = [ErrorKind::PeerLost, ErrorKind::NotFound, ErrorKind::TimedOut];
                assert!(kinds.contains(&error.kind()), "{key}: {error}");
            }
        }
    }
    is_empty(&node, &store);
    node.assert_sound();
    owners[0].0.assert_sound();
}

#[test]
fn a_client_that_is_killed_leaves_nothing_of_its_batch() {
    let folder = tempfile::tempdir().expect("a folder");
    let owners = owners(folder.path());
    let _ = put_all(&owners, "small", 3_000, 4_000);
    let _ = put_all(&owners, "large", 60, 400_000);
    let (mut node, monitor) = reader(folder.path(), &owners[0].0);
    let program = FilePath::new(env!("CARGO_BIN_EXE_hetmem-test-client"));
    let mut state = 5;
    for round in 0..12 {
        let prefix = if round % 3 == 2 { "large" } else { "small" };
        let mut load = Load::start_as(program, &node.socket, prefix, round, "batches");
        load.goes_on(1 + below(&mut state, 2));
        std::thread::sleep(Duration::from_micros(below(&mut state, 40_000) as u64));
        load.cut_off();
        is_empty(&node, &monitor);
    }
    for (owner, store) in &owners {
        owner.settles(store, "no lease, and nothing is being sent", |status| {
            (status.leases, status.draining) == (0, 0)
        });
    }
    node.assert_sound();
    for (mut owner, store) in owners {
        // What a killed reader had asked for goes nowhere; what is deleted now is free.
        for listed in store.list("") {
            let _ = store.delete(&listed.expect("a list").key).expect("deleted");
        }
        is_empty(&owner, &store);
        owner.assert_sound();
    }
}
