//! The node that keeps the directory is killed: the next of the list takes it over, and hands it back. Not a single
//! directory without a list (`kill_nodes`). Invariant: nothing that was sealed on a node that lives is forgotten, and
//! nothing that was deleted comes back.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use hetmem_client::{ErrorKind, GetOptions, ObjectMeta, Path, PutOptions, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, PATIENCE, Serve, eventually, free_port};
use rustix::process::Signal;

const LEN: usize = 300_000;

fn put(store: &Store, name: &str, replicas: u8) -> u32 {
    let options = PutOptions { replicas, ..PutOptions::default() };
    let meta = ObjectMeta::bytes(LEN as u64).expect("a length");
    store.put_with(&key(name), meta, &bytes_of(name, LEN, 0), &options).expect("room").replicas
}

fn is_found(store: &Store, name: &str) -> Result<Path, String> {
    let options = GetOptions { keep: false, timeout: PATIENCE, ..GetOptions::default() };
    let object = store.get_with(&key(name), &options).map_err(|error| error.to_string())?;
    assert!(*object == *bytes_of(name, LEN, 0), "{name} has other bytes");
    Ok(object.path())
}

fn is_gone(store: &Store, name: &str) -> Result<(), String> {
    match store.get_with(&key(name), &GetOptions { keep: false, timeout: PATIENCE, ..GetOptions::default() })
    {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("it is there".to_owned()),
    }
}

fn follows(node: &Daemon, store: &Store, keeper: &str) {
    node.settles(store, &format!("{keeper} keeps the directory"), |status| {
        status.directory.as_deref() == Some(keeper) && status.keeps_directory == (status.name == keeper)
    });
}

#[test]
fn the_next_of_the_list_takes_the_directory_over_and_hands_it_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = [free_port(), free_port()];
    let list = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    let first = Serve::new(folder.path(), "first").listen(ports[0]).join(&list);
    let mut keeper = first.start();
    let mut second = Serve::new(folder.path(), "second").listen(ports[1]).join(&list).start();
    let mut third = Serve::new(folder.path(), "third").join(&list).start();
    let (there, away) = (second.connect(), third.connect());
    for (node, store) in [(&second, &there), (&third, &away)] {
        follows(node, store, "first");
    }
    for (store, name) in [(&keeper.connect(), "on-first"), (&there, "on-second"), (&away, "on-third")] {
        assert_eq!(put(store, name, 2), 2);
        assert_eq!(put(store, &format!("{name}/deleted"), 3), 3);
    }
    put(&there, "alone", 1);
    assert_eq!(is_found(&away, "alone"), Ok(Path::Read), "from here on its place is known");

    // What is known goes on being read while nobody keeps the directory.
    let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (stop, reads, away) = (&stop, &reads, &away);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(is_found(away, "alone"), Ok(Path::Read));
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        eventually("reads", || if reads.load(Ordering::Relaxed) > 10 { Ok(()) } else { Err(String::new()) });
        keeper.kill();
        // Asked while there is no directory; answered by the next one.
        assert!(there.delete(&key("on-third/deleted")).expect("the next directory does it"));
        follows(&second, &there, "second");
        follows(&third, away, "second");
        let before = reads.load(Ordering::Relaxed);
        eventually("reads", || {
            if reads.load(Ordering::Relaxed) > before + 10 { Ok(()) } else { Err(String::new()) }
        });
        stop.store(true, Ordering::Relaxed);
    });
    for (node, store) in [(&second, &there), (&third, &away)] {
        for name in ["on-first", "on-second", "on-third", "alone", "on-first/deleted", "on-second/deleted"] {
            is_found(store, name).unwrap_or_else(|why| panic!("{name} from {}: {why}", node.name));
        }
        is_gone(store, "on-third/deleted").expect("it was deleted");
    }
    second.settles(&there, "what can be on two nodes is", |status| status.under_replicated == 2);
    assert!(away.delete(&key("on-first/deleted")).expect("there is a directory"));
    second.settles(&there, "one for three nodes is left", |status| status.under_replicated == 1);

    // The first one comes back with an empty memory.
    let mut again = first.start();
    let here = again.connect();
    follows(&again, &here, "first");
    follows(&second, &there, "first");
    follows(&third, &away, "first");
    for store in [&here, &there, &away] {
        for name in ["on-first", "on-second", "on-third", "alone", "on-second/deleted"] {
            is_found(store, name).expect("it is somewhere");
        }
        for name in ["on-first/deleted", "on-third/deleted"] {
            is_gone(store, name).expect("it was deleted");
        }
    }
    again.settles(&here, "the new node has room", |status| status.under_replicated == 0);
    assert!(here.delete(&key("on-second/deleted")).expect("there is a directory"));
    let mut left: Vec<String> = away.list("").map(|listed| listed.expect("a list").key.to_string()).collect();
    left.sort();
    assert_eq!(left, ["alone", "on-first", "on-second", "on-third"]);
    for node in [&mut again, &mut second, &mut third] {
        node.assert_sound();
    }
}

#[test]
fn what_was_deleted_while_a_node_hung_stays_deleted_whoever_keeps_the_directory_then() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = [free_port(), free_port()];
    let list = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    let mut first = Serve::new(folder.path(), "first").listen(ports[0]).join(&list).start();
    let mut second = Serve::new(folder.path(), "second").listen(ports[1]).join(&list).start();
    let mut hangs = Serve::new(folder.path(), "hangs").join(&list).start();
    let (there, away) = (second.connect(), hangs.connect());
    follows(&second, &there, "first");
    follows(&hangs, &away, "first");
    assert_eq!(put(&away, "deleted", 3), 3);
    assert_eq!(put(&away, "stays", 1), 1);
    hangs.signal(Signal::STOP);
    first.settles(&first.connect(), "the silent node is given up", |status| {
        status.peers.iter().filter(|peer| peer.linked).count() == 1
    });
    assert!(there.delete(&key("deleted")).expect("it is on two more nodes"));
    first.kill();
    follows(&second, &there, "second");
    hangs.signal(Signal::CONT);
    follows(&hangs, &away, "second");
    eventually("it is dropped by the node that comes back with it", || is_gone(&away, "deleted"));
    assert_eq!(is_found(&there, "stays"), Ok(Path::Read));
    is_gone(&there, "deleted").expect("nobody has it");
    second.assert_sound();
    hangs.assert_sound();
}

#[test]
fn a_node_knows_itself_in_a_list_of_host_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = [free_port(), free_port()];
    let list = ports.map(|port| format!("localhost:{port}")).join(",");
    let mut first = Serve::new(folder.path(), "first").listen(ports[0]).join(&list).start();
    let mut second = Serve::new(folder.path(), "second").listen(ports[1]).join(&list).start();
    let (here, there) = (first.connect(), second.connect());
    follows(&first, &here, "first");
    follows(&second, &there, "first");
    put(&there, "k", 1);
    assert!(is_found(&here, "k").is_ok());
    first.assert_sound();
    first.kill();
    follows(&second, &there, "second");
    assert_eq!(
        second.connect().status().expect("a status").counters.refused,
        0,
        "not even its own connections"
    );
    is_gone(&there, "never-put").expect("it is sure");
    second.assert_sound();
}
