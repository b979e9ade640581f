//! Descriptors and memory come back: after many sessions of one process, after many processes, after many copies
//! between nodes. Not speed.

use std::path::Path;

use hetmem_client::{GetOptions, ObjectMeta, PutOptions, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve, descriptors_of, eventually, own_memory_of};
use hetmem_tests::load::Load;

/// Allocators keep some of what they got; three hundred leaks of a page are more than this.
const SLACK_BYTES: u64 = 1 << 20;

/// What a process has: descriptors, mappings, memory of its own.
#[derive(Clone, Copy, Debug)]
struct Use {
    descriptors: usize,
    mappings: usize,
    own_bytes: u64,
}

impl Use {
    fn of(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process of this user");
        Self {
            descriptors: descriptors_of(pid),
            mappings: maps.lines().count(),
            own_bytes: own_memory_of(pid),
        }
    }

    fn is_back(pid: u32, before: Self) {
        eventually("what was used is free again", || {
            let now = Self::of(pid);
            let grown = now.own_bytes.saturating_sub(before.own_bytes);
            // Heaps of threads come and go.
            let few = now.mappings <= before.mappings + 8;
            if now.descriptors <= before.descriptors && few && grown < SLACK_BYTES {
                Ok(())
            } else {
                Err(format!("{before:?} before, {now:?} now"))
            }
        });
    }
}

/// One session: connect, put small and large, get, hold, delete.
fn session(node: &Daemon, round: usize) {
    let store = node.connect();
    for len in [1000, 300_000] {
        let name = format!("round-{round}-{len}");
        let bytes = bytes_of(&name, len, 0);
        store.put_bytes(&key(&name), &bytes).expect("room");
        let object = store.get(&key(&name)).expect("it was put");
        assert!(*object == *bytes, "{name} has other bytes");
        if round.is_multiple_of(2) {
            drop(object);
            assert!(store.delete(&key(&name)).expect("deleted"));
        } else {
            assert!(store.delete(&key(&name)).expect("deleted"));
            drop(object);
        }
    }
    let meta = ObjectMeta::bytes(100_000).expect("a length");
    drop(store.reserve(&key("given-up"), meta, &PutOptions::default()).expect("room"));
}

fn is_empty(node: &Daemon, monitor: &Store) {
    node.settles(monitor, "empty", |status| {
        let used: u64 = status.tiers.iter().map(|tier| tier.used_bytes).sum();
        (status.clients, status.objects, status.reservations, status.draining, used) == (1, 0, 0, 0, 0)
    });
}

#[test]
fn three_hundred_sessions_of_one_process_leave_nothing() {
    // A process of its own: other tests of this one open descriptors too.
    if std::env::var_os(IN_CHILD).is_some() {
        return sessions();
    }
    let test = "leaks::three_hundred_sessions_of_one_process_leave_nothing";
    let own = std::env::current_exe().expect("this program has a path");
    let output = std::process::Command::new(own)
        .args(["--exact", test, "--nocapture"])
        .env(IN_CHILD, "1")
        .output()
        .expect("it runs");
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}

const IN_CHILD: &str = "HETMEM_TEST_IN_CHILD";

fn sessions() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "sessions").start();
    let monitor = node.connect();
    (0..40).for_each(|round| session(&node, round));
    is_empty(&node, &monitor);
    let before = (Use::of(node.pid()), Use::of(std::process::id()));
    (0..300).for_each(|round| session(&node, round));
    is_empty(&node, &monitor);
    Use::is_back(node.pid(), before.0);
    Use::is_back(std::process::id(), before.1);
    node.assert_sound();
}

#[test]
fn many_client_processes_leave_nothing_and_their_memory_is_the_nodes_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "processes").start();
    let monitor = node.connect();
    for name in hetmem_tests::load::SHARED {
        monitor.put_bytes(&key(name), &hetmem_tests::load::content_of(name)).expect("room");
    }
    let program = Path::new(env!("CARGO_BIN_EXE_hetmem-test-client"));
    let run = |round: u64| {
        let mut load =
            Load::start(program, &node.socket, &format!("process-{round}"), round, round.is_multiple_of(2));
        load.goes_on(10);
        let (status, last) = load.stop();
        assert!(status.success() && last == "done", "{status}: {last}");
    };
    (0..5).for_each(run);
    let settled = |what: &str| {
        node.settles(&monitor, what, |status| {
            let granted: u64 = status.tiers.iter().map(|tier| tier.granted_bytes).sum();
            // The monitor's own grant is the only one.
            let rest = (status.clients, status.reservations, status.draining);
            rest == (1, 0, 0) && granted <= 8 << 20
        });
    };
    settled("after 5 processes");
    let before = Use::of(node.pid());
    (5..35).for_each(run);
    settled("after 35 processes");
    // A segment that was granted becomes the node's; how many of which size there are may differ.
    let segments = monitor.status().expect("it answers").tiers[0].segments as usize;
    let before = Use { descriptors: before.descriptors + segments, ..before };
    Use::is_back(node.pid(), before);
    node.assert_sound();
}

#[test]
fn batches_between_nodes_leave_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "batches-from").start();
    let mut second = Serve::new(folder.path(), "batches-to").join(&first.address).start();
    let (here, there) = (first.connect(), second.connect());
    let names: Vec<_> = (0..400).map(|number| key(&format!("batch/{number}"))).collect();
    for (number, name) in names.iter().enumerate() {
        // Some by read.
        let len = if number % 20 == 0 { 100_000 } else { 1_000 + number };
        here.put_bytes(name, &bytes_of(name.as_str(), len, 0)).expect("room");
    }
    let round = |round: usize| {
        let options = GetOptions { keep: round.is_multiple_of(2), ..GetOptions::default() };
        for (name, object) in names.iter().zip(there.get_many_with(&names, &options)) {
            let object = object.expect("it is on the other node");
            assert!(*object == *bytes_of(name.as_str(), object.len(), 0), "{name} has other bytes");
        }
        if options.keep {
            names.iter().for_each(|name| there.evict(name, false).expect("the other node has it"));
        }
    };
    (0..10).for_each(round);
    is_empty(&second, &there);
    let before = (Use::of(first.pid()), Use::of(second.pid()));
    (10..60).for_each(round);
    is_empty(&second, &there);
    first.settles(&here, "nothing is held", |status| (status.leases, status.draining) == (0, 0));
    Use::is_back(first.pid(), before.0);
    Use::is_back(second.pid(), before.1);
    first.assert_sound();
    second.assert_sound();
}

#[test]
fn copies_between_nodes_leave_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "from").start();
    let mut second = Serve::new(folder.path(), "to").join(&first.address).start();
    let (here, there) = (first.connect(), second.connect());
    let round = |round: usize| {
        for (len, keep) in [(1000, true), (100_000, false), (700_000, true)] {
            let name = format!("copy-{round}-{len}");
            let bytes = bytes_of(&name, len, 0);
            here.put_bytes(&key(&name), &bytes).expect("room");
            let options = GetOptions { keep, ..GetOptions::default() };
            let object = there.get_with(&key(&name), &options).expect("it is on the other node");
            assert!(*object == *bytes, "{name} has other bytes");
            drop(object);
            assert!(here.delete(&key(&name)).expect("deleted"));
        }
    };
    (0..20).for_each(round);
    is_empty(&first, &here);
    is_empty(&second, &there);
    let before = (Use::of(first.pid()), Use::of(second.pid()));
    (20..220).for_each(round);
    is_empty(&first, &here);
    is_empty(&second, &there);
    first.settles(&here, "no lease", |status| status.leases == 0);
    Use::is_back(first.pid(), before.0);
    Use::is_back(second.pid(), before.1);
    first.assert_sound();
    second.assert_sound();
}
