//! Objects on several nodes, as processes: one is killed while it is read from, and what it held is made anew. Not the
//! directory's own node (`succession`). Invariant: a get never shows that a holder was lost but by its receipt.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hetmem_client::{GetOptions, PutOptions, Range, Status, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, PATIENCE, Serve, binary, eventually, free_port};

const LEN: usize = 64 << 20;

fn replicas(replicas: u8) -> PutOptions {
    PutOptions { replicas, ..PutOptions::default() }
}

fn holders(store: &Store, name: &str) -> Vec<String> {
    store.stat(&key(name)).map(|stat| stat.holders).unwrap_or_default()
}

fn peer<'a>(status: &'a Status, name: &str) -> Option<&'a hetmem_core::wire::PeerStatus> {
    status.peers.iter().find(|peer| peer.name == name)
}

/// Three nodes; the first one keeps the directory, or else the second.
fn three(folder: &std::path::Path, host: &str) -> [Daemon; 3] {
    let ports = [free_port(), free_port()];
    let list = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    let serve = |name: &str| Serve::new(folder, name).host(host).join(&list);
    let nodes = [
        serve("first").listen(ports[0]).start(),
        serve("second").listen(ports[1]).start(),
        serve("third").start(),
    ];
    for node in &nodes {
        node.settles(&node.connect(), "the first node keeps the directory", |status| {
            status.directory.as_deref() == Some("first")
        });
    }
    nodes
}

/// Reads an object, and parts of it, again and again; collects who gave it.
fn read_on(
    store: &Store,
    stop: &AtomicBool,
    reads: &AtomicUsize,
    givers: &Mutex<BTreeSet<String>>,
    part: bool,
) {
    let all = bytes_of("large", LEN, 0);
    let range = part.then_some(Range { start: 1 << 20, len_bytes: (LEN as u64) - (2 << 20) });
    let expected = if part { &all[1 << 20..LEN - (1 << 20)] } else { &all[..] };
    while !stop.load(Ordering::Relaxed) {
        let options = GetOptions { keep: false, range, timeout: PATIENCE, ..GetOptions::default() };
        let object = store.get_with(&key("large"), &options).expect("some node has it");
        assert!(*object == *expected, "other bytes");
        let mut givers = givers.lock().expect("no panic");
        givers.insert(object.receipt().from.node.to_string());
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_get_does_not_notice_that_the_node_it_reads_from_is_killed_and_the_object_heals() {
    let folder = tempfile::tempdir().expect("a folder");
    let [mut first, mut second, mut third] = three(folder.path(), "320MiB");
    let (here, origin, reader) = (first.connect(), second.connect(), third.connect());
    let first_put = origin.put_bytes(&key("large"), &bytes_of("large", LEN, 0)).expect("room");
    assert_eq!((first_put.replicas, first_put.kept), (1, false));
    // From here on the reader knows its place at the origin.
    let options = GetOptions { keep: false, ..GetOptions::default() };
    drop(reader.get_with(&key("large"), &options).expect("it is at the origin"));
    // The reader has no room for a replica, so that it goes on reading from another node.
    let filler = |number: usize| key(&format!("filler/{number}"));
    let full = (0..200).find(|number| reader.put_bytes(&filler(*number), &vec![1; 8 << 20]).is_err());
    let full = full.expect("at some time there is no room");
    second.settles(&origin, "the origin knows that the reader is full", |status| {
        peer(status, "third").and_then(|peer| peer.room_bytes).is_some_and(|room| room < 64 << 20)
    });
    let put = origin.put_with(
        &key("large"),
        hetmem_client::ObjectMeta::bytes(LEN as u64).expect("a length"),
        &bytes_of("large", LEN, 0),
        &replicas(2),
    );
    let put = put.expect("it is there");
    assert_eq!((put.replicas, put.kept), (2, true), "what is kept is on two nodes from now on");
    eventually("the directory knows both", || {
        let holders = holders(&here, "large");
        if holders.len() == 2 { Ok(()) } else { Err(format!("{holders:?}")) }
    });
    for number in 0..full {
        reader.delete(&filler(number)).expect("deleted");
    }

    let (stop, reads, givers) = (AtomicBool::new(false), AtomicUsize::new(0), Mutex::new(BTreeSet::new()));
    std::thread::scope(|scope| {
        for part in [false, true] {
            let (stop, reads, givers, reader) = (&stop, &reads, &givers, &reader);
            scope.spawn(move || read_on(reader, stop, reads, givers, part));
        }
        eventually("reads are under way", || {
            let count = reads.load(Ordering::Relaxed);
            if count > 4 { Ok(()) } else { Err(format!("{count} reads")) }
        });
        assert!(givers.lock().expect("no panic").contains("second"), "the known place is at the origin");
        second.kill();
        let before = reads.load(Ordering::Relaxed);
        eventually("reads go on", || {
            let count = reads.load(Ordering::Relaxed) - before;
            if count > 6 { Ok(()) } else { Err(format!("{count} reads")) }
        });
        stop.store(true, Ordering::Relaxed);
    });
    assert!(givers.lock().expect("no panic").contains("first"), "{givers:?}");

    let took = first.settles(&here, "every object is on two nodes again", |status| {
        status.under_replicated == 0 && peer(status, "second").is_none()
    });
    eventually("on the two that are left", || {
        let holders: BTreeSet<String> = holders(&here, "large").into_iter().collect();
        let wanted = BTreeSet::from(["first".to_owned(), "third".to_owned()]);
        if holders == wanted { Ok(()) } else { Err(format!("{holders:?}")) }
    });
    println!("healed {took:?} after the reads");
    assert!(reader.get(&key("large")).expect("it is here").path() == hetmem_client::Path::Local);
    assert!(reader.evict(&key("large"), false).is_err(), "it is no mere copy");
    first.assert_sound();
    third.assert_sound();
}

#[test]
fn the_command_line_says_on_how_many_nodes_objects_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "alone").start();
    let store = node.connect();
    let file = folder.path().join("bytes");
    std::fs::write(&file, bytes_of("bytes", 100_000, 0)).expect("a file");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(binary());
        let output = command.args(args).arg("--socket").arg(&node.socket).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    let json = |args: &[&str]| serde_json::from_str::<serde_json::Value>(&run(args)).expect("JSON");
    let file = file.to_string_lossy().into_owned();
    let put = json(&["put", &file, "--key", "k", "--replicas", "2", "--json"]);
    assert_eq!((&put["replicas"], &put["replicas_wanted"]), (&1.into(), &2.into()), "nobody else is there");
    let said = run(&["put", &file, "--key", "l", "--replicas", "3"]);
    assert!(said.contains("on 1 nodes at least, 3 are wanted"), "{said}");
    let status = json(&["status", "--json"]);
    assert_eq!(status["under_replicated"], serde_json::json!({ "objects": 2, "first_keys": ["k", "l"] }));
    assert_eq!(
        (&status["node"]["keeps_directory"], &status["node"]["directory"]),
        (&true.into(), &"alone".into())
    );
    let said = run(&["status"]);
    assert!(said.contains("2 objects are on fewer nodes than they are to be: k, l"), "{said}");

    let mut other = Serve::new(folder.path(), "other").join(&node.address).start();
    node.settles(&store, "what two nodes can hold is on two", |status| {
        status.under_replicated == 1 && status.under_replicated_keys == [key("l")]
    });
    other.settles(&other.connect(), "the other node is told", |status| {
        status.under_replicated == 1 && status.under_replicated_keys.is_empty()
    });
    let mut third = Serve::new(folder.path(), "third").join(&node.address).start();
    node.settles(&store, "the third one was lacking", |status| status.under_replicated == 0);
    assert!(!run(&["status"]).contains("fewer nodes"));
    for node in [&mut node, &mut other, &mut third] {
        node.assert_sound();
    }
}

#[test]
fn a_time_to_live_ends_on_nodes_whose_origin_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let [mut first, mut second, mut third] = three(folder.path(), "64MiB");
    let origin = second.connect();
    let options = PutOptions { ttl: Some(Duration::from_secs(4)), ..replicas(3) };
    let meta = hetmem_client::ObjectMeta::bytes(1_000).expect("a length");
    let put = origin.put_with(&key("short"), meta, &bytes_of("short", 1_000, 0), &options).expect("room");
    assert_eq!(put.replicas, 3);
    second.kill();
    for node in [&first, &third] {
        let store = node.connect();
        node.settles(&store, "it is over", |status| status.objects == 0 && status.draining == 0);
    }
    assert!(!first.connect().exists(&key("short")).expect("the directory is there"));
    first.assert_sound();
    third.assert_sound();
}
