//! What the Python package asks of a client: private views of objects, gets that ask nobody, waits that a signal ends.
//! Invariant: as in `main`.

use std::sync::Arc;
use std::time::Duration;

use hetmem_client::{ErrorKind, ObjectMeta, PrivateBytes, PutOptions, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::Serve;

const LEN: usize = 300_000;

fn put(store: &Store, name: &str) -> Vec<u8> {
    let bytes = bytes_of(name, LEN, 0);
    let meta = ObjectMeta::bytes(LEN as u64).expect("a length");
    store.put_with(&key(name), meta, &bytes, &PutOptions::default()).expect("room");
    bytes
}

#[test]
fn a_private_view_is_written_by_nobody_else_and_by_its_owner_for_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Serve::new(folder.path(), "one").start();
    let store = Store::connect(Some(&node.socket)).expect("the node");
    let bytes = put(&store, "private");
    let object = Arc::new(store.get(&key("private")).expect("the object"));
    let view = PrivateBytes::of(&object).expect("mapped").expect("no reserved huge pages");
    assert_eq!(view.len_bytes(), LEN);
    assert!(!std::ptr::eq(view.address(), object.as_ptr()));
    // The view pins the object by itself: it is there, whole, after it was deleted and others came.
    drop(object);
    assert!(store.delete(&key("private")).expect("asked"));
    assert_eq!(store.status().expect("asked").draining, 1);
    put(&store, "other");
    drop(view);
    let settled = || store.status().expect("asked").draining == 0;
    while !settled() {
        std::thread::yield_now();
    }
    let empty = store.put_bytes(&key("empty"), &[]).map(|_| store.get(&key("empty")).expect("there"));
    let none = PrivateBytes::of(&Arc::new(empty.expect("room"))).expect("nothing to map");
    assert!(none.is_none());
    drop(bytes);
}

#[test]
fn a_get_here_asks_nobody_and_a_slice_keeps_the_pin() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Serve::new(folder.path(), "one").start();
    let store = Store::connect(Some(&node.socket)).expect("the node");
    assert!(store.get_here(&key("here")).expect("looked").is_none());
    let bytes = put(&store, "here");
    let object = store.get_here(&key("here")).expect("looked").expect("it is here");
    let part = object.slice(1_000, 5_000).expect("inside").slice(10, 20).expect("inside");
    assert_eq!(part[..], bytes[1_010..1_030]);
    let error = part.slice(10, 11).expect_err("outside");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_wait_ends_when_its_hook_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let node = Serve::new(folder.path(), "one").start();
    let store = Store::connect(Some(&node.socket)).expect("the node");
    store.interrupt_when(|| true);
    // One of the two reads the socket for both.
    let waits = || store.wait(&key("never"), Duration::from_secs(600)).expect_err("interrupted");
    let errors = std::thread::scope(|scope| {
        let other = scope.spawn(waits);
        [waits(), other.join().expect("no panic")]
    });
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains("never"), "{error}");
    }
    // One interruption is for all questions of a call: a node that answers nothing is waited for no more.
    let pid = rustix::process::Pid::from_raw(node.pid().cast_signed()).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    let keys: Vec<_> = (0..3_000).map(|number| key(&format!("none-{number}"))).collect();
    let kinds: Vec<_> = store
        .get_many(&keys)
        .iter()
        .map(|found| found.as_ref().map_err(|error| error.kind()).err())
        .collect();
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("continued");
    assert!(kinds.iter().all(|kind| *kind == Some(ErrorKind::Busy)) && kinds.len() == 3_000);
    // The session goes on.
    put(&store, "after");
    assert!(store.exists(&key("after")).expect("asked"));
}
