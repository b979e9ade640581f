//! Gets from places that are remembered, while the owner's engine does nothing: the owner is a node of this process,
//! so that its engine can be held; its readers are processes of their own. Not what the engine decides (its own
//! tests). Invariant: nothing here depends on how long a get takes, except those that must time out.

use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, Path, Range, Store};
use hetmem_node::{Config, Node};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve};

const LEN: usize = 3 << 20;
/// Nobody is held to be dead for its silence while its engine is held.
const HEARTBEAT_MS: &str = "60000";

fn owner(folder: &std::path::Path) -> Node {
    let flags = [
        ("name", "owner".to_owned()),
        ("socket", folder.join("owner.sock").display().to_string()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("host", "64MiB".to_owned()),
        ("huge_pages", "off".to_owned()),
        ("heartbeat_ms", HEARTBEAT_MS.to_owned()),
    ];
    let flags = flags.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    Node::start(Config::load(None, flags).expect("a configuration")).expect("a node")
}

fn reader(folder: &std::path::Path, name: &str, owner: &Node) -> (Daemon, Store) {
    let node = Serve::new(folder, name).flag("heartbeat-ms", HEARTBEAT_MS).join(owner.address()).start();
    let store = node.connect();
    (node, store)
}

fn options(range: Option<Range>, timeout: Duration) -> GetOptions {
    GetOptions { keep: false, range, timeout, ..GetOptions::default() }
}

/// Gets a part, or all, of "seen" and compares it.
fn read(store: &Store, range: Option<Range>) {
    let patience = Duration::from_secs(60);
    let object = store.get_with(&key("seen"), &options(range, patience)).expect("it is there");
    let all = bytes_of("seen", LEN, 0);
    let (start, len) = range.map_or((0, LEN), |range| {
        (usize::try_from(range.start).expect("small"), usize::try_from(range.len_bytes).expect("small"))
    });
    assert!(*object == all[start..start + len], "{len} bytes from {start}");
    assert_eq!(object.path(), Path::Read);
}

#[test]
fn a_node_whose_engine_is_held_is_read_where_it_was_read_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let owner = owner(folder.path());
    let inside = Store::over(owner.session().expect("a session")).expect("a store");
    for name in ["seen", "unseen"] {
        inside.put_bytes(&key(name), &bytes_of(name, LEN, 0)).expect("room");
    }
    let readers = ["one", "two", "three"].map(|name| reader(folder.path(), name, &owner));
    for (_, store) in &readers {
        read(store, None);
    }
    let held = owner.hold_engine();
    for round in 0..3 {
        // More questions than the owner has threads for them; none is answered.
        for (_, store) in &readers {
            let answer = store.get_with(&key("unseen"), &options(None, Duration::from_millis(200)));
            assert_eq!(answer.expect_err("nobody answers").kind(), ErrorKind::TimedOut, "round {round}");
        }
        for (_, store) in &readers {
            read(store, None);
            read(store, Some(Range { start: 1 << 20, len_bytes: 1 << 20 }));
            read(store, Some(Range { start: 12_345, len_bytes: 100_000 }));
        }
    }
    drop(held);
    for (_, store) in &readers {
        let patience = Duration::from_secs(60);
        let object = store.get_with(&key("unseen"), &options(None, patience)).expect("it is answered again");
        assert!(*object == *bytes_of("unseen", LEN, 0));
        let counters = store.status().expect("a status").counters;
        assert_eq!((counters.known, counters.outdated), (9, 0));
    }
    inside.delete(&key("seen")).expect("the directory is here");
    for (mut node, store) in readers {
        let patience = Duration::from_secs(60);
        let answer = store.get_with(&key("seen"), &options(None, patience));
        assert_eq!(answer.expect_err("it is deleted").kind(), ErrorKind::NotFound);
        node.assert_sound();
    }
}
