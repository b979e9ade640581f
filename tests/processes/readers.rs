//! Readers keep what they hold, whatever happens to the object meanwhile. Not gets under load (`kill_nodes`).

use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, Object, PutOptions, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::Serve;

const LEN: usize = 3 << 20;

/// Puts objects until there is no space; returns their names.
fn fill(store: &Store, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    loop {
        let name = format!("{prefix}-{}", names.len());
        match store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0)) {
            Ok(_) => names.push(name),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                return names;
            }
        }
    }
}

fn is_unchanged(object: &Object, name: &str) {
    assert!(object.verify().expect("its checksum agrees"), "it has a checksum");
    assert!(**object == *bytes_of(name, LEN, 0), "{name} has changed under its reader");
}

#[test]
fn a_held_object_outlives_its_deletion_and_its_memory_is_reused_after() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "held").start();
    let (reader, writer) = (node.connect(), node.connect());
    // The whole store, so that what comes next has to be in the memory of what goes.
    let names = fill(&writer, "first");
    assert!(names.len() > 5, "{} objects fit", names.len());
    let held: Vec<Object> =
        names.iter().step_by(2).map(|name| reader.get(&key(name)).expect("it was put")).collect();
    for name in &names {
        assert!(writer.delete(&key(name)).expect("deleted"));
        assert_eq!(reader.get(&key(name)).expect_err("it is deleted").kind(), ErrorKind::NotFound);
    }
    let mut again = fill(&writer, "second");
    assert!(!again.is_empty() && again.len() < names.len(), "{} of {}", again.len(), names.len());
    for (object, name) in held.iter().zip(names.iter().step_by(2)) {
        is_unchanged(object, name);
    }
    let draining = writer.status().expect("it answers").draining;
    assert_eq!(draining, held.len() as u64, "what is held waits");
    drop(held);
    node.settles(&writer, "nothing is held", |status| status.draining == 0);
    again.extend(fill(&writer, "third"));
    assert!(again.len() + 1 >= names.len(), "{} objects fitted, now {}", names.len(), again.len());
    for name in &again {
        is_unchanged(&reader.get(&key(name)).expect("it was put"), name);
    }
    node.assert_sound();
}

#[test]
fn a_held_copy_of_another_node_survives_its_eviction_and_deletion() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "origin").start();
    let mut second = Serve::new(folder.path(), "copies").join(&first.address).start();
    let (here, there) = (first.connect(), second.connect());
    let name = "copied";
    here.put_bytes(&key(name), &bytes_of(name, LEN, 0)).expect("room");
    let held = there.get(&key(name)).expect("it is on the other node");
    // Copies make room for what is put, held ones too; their memory is not touched.
    let filled = fill(&there, "fill");
    assert!(filled.len() > 5, "{} objects fit", filled.len());
    is_unchanged(&held, name);
    assert!(here.delete(&key(name)).expect("deleted"));
    assert_eq!(there.get(&key(name)).expect_err("deleted everywhere").kind(), ErrorKind::NotFound);
    is_unchanged(&held, name);
    drop(held);
    second.settles(&there, "nothing is held", |status| status.draining == 0);
    first.assert_sound();
    second.assert_sound();
}

#[test]
fn objects_that_may_go_make_room_and_others_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "evicts").start();
    let store = node.connect();
    let put = |name: &str, options: PutOptions| {
        let bytes = bytes_of(name, LEN, 0);
        let meta = hetmem_client::ObjectMeta::bytes(bytes.len() as u64).expect("a length");
        store.put_with(&key(name), meta, &bytes, &options).map(|_| ())
    };
    let cache = PutOptions { cache: true, ..PutOptions::default() };
    let pinned = PutOptions { pin: true, ..cache };
    put("stays", PutOptions::default()).expect("room");
    put("pinned", pinned).expect("room");
    // Three times what fits.
    for number in 0..60 {
        put(&format!("cache-{number}"), cache).expect("others make room");
    }
    for name in ["stays", "pinned", "cache-59"] {
        let options = GetOptions { timeout: Duration::from_secs(5), verify: true, ..GetOptions::default() };
        let object = store.get_with(&key(name), &options).expect("it stays");
        is_unchanged(&object, name);
    }
    assert!(store.status().expect("it answers").counters.evicted > 20);
    node.assert_sound();
}
