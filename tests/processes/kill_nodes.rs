//! Nodes are killed under load, and start again. Clients of the other node go on, get a clear answer about what is
//! lost, and find what is put on the new incarnation, never what the old one had.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hetmem_client::{ErrorKind, GetOptions, Store, StoreError};
use hetmem_tests::content::{below, bytes_of, key};
use hetmem_tests::daemon::{Daemon, PATIENCE, Serve, eventually, free_port};
use hetmem_tests::load::{content_of, name_of};
use rustix::process::Signal;

/// What a get may answer when the node that has the object is gone.
const CLEAR: [ErrorKind; 4] =
    [ErrorKind::PeerLost, ErrorKind::NotFound, ErrorKind::TimedOut, ErrorKind::Unavailable];

/// Names of objects of all paths: inside an answer, by one slice, by many.
fn names(prefix: &str) -> Vec<String> {
    let len = [1_000, 32_768, 100_000, 1_500_000];
    (0..12_usize).map(|at| name_of(prefix, at as u64, len[at % 4])).collect()
}

fn put_all(store: &Store, names: &[String]) {
    for name in names {
        store.put_bytes(&key(name), &content_of(name)).expect("room");
    }
}

fn options(keep: bool) -> GetOptions {
    GetOptions { timeout: Duration::from_secs(3), keep, verify: true, ..GetOptions::default() }
}

/// Gets an object of another node and checks every byte.
fn get(store: &Store, name: &str) -> Result<(), StoreError> {
    let object = store.get_with(&key(name), &options(false))?;
    assert!(*object == *content_of(name), "{name} has other bytes");
    Ok(())
}

fn listed(store: &Store) -> Vec<String> {
    store.list("").map(|listed| listed.expect("a list").key.to_string()).collect()
}

fn used_bytes(store: &Store) -> u64 {
    store.status().expect("it answers").tiers.iter().map(|tier| tier.used_bytes).sum()
}

/// Gets objects in turn until told to stop, or until `errors_max` gets have failed; counts the gets.
fn load(
    store: &Store,
    names: &[String],
    seed: u64,
    gets: &AtomicUsize,
    stop: &AtomicBool,
    errors_max: usize,
) {
    let (mut state, mut errors) = (seed, 0);
    while !stop.load(Ordering::Relaxed) && errors < errors_max {
        let name = &names[below(&mut state, names.len())];
        let started = Instant::now();
        match get(store, name) {
            Ok(()) => {
                gets.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                assert!(CLEAR.contains(&error.kind()), "get {name}: {error}");
                errors += 1;
            }
        }
        assert!(started.elapsed() < PATIENCE, "a get of 3 s hangs");
    }
}

/// Strikes `victim` while clients of both nodes get what the other has.
fn strike_under_load(
    victim: &mut Daemon,
    survivor: &Daemon,
    theirs: &[String],
    ours: &[String],
    strike: impl FnOnce(&mut Daemon),
) {
    let (gets, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (here, there) = (survivor.connect(), victim.connect());
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let (here, gets, stop) = (&here, &gets, &stop);
            scope.spawn(move || load(here, theirs, seed, gets, stop, 3));
        }
        let (gets, stop) = (&gets, &stop);
        scope.spawn(move || load(&there, ours, 9, gets, stop, 1));
        eventually("gets under load", || {
            let count = gets.load(Ordering::Relaxed);
            if count > 200 { Ok(()) } else { Err(format!("{count} gets")) }
        });
        strike(victim);
        // The clients of the survivor go on until each has learnt several times that an object is lost.
    });
}

#[test]
fn a_killed_node_takes_only_its_own_objects_with_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "survivor").start();
    let second = Serve::new(folder.path(), "victim").listen(free_port()).join(&first.address);
    let mut victim = second.start();
    let (here, there) = (first.connect(), victim.connect());
    let (ours, theirs) = (names("ours"), names("theirs"));
    put_all(&here, &ours);
    put_all(&there, &theirs);
    let kept = name_of("theirs/kept", 0, 200_000);
    put_all(&there, std::slice::from_ref(&kept));
    drop(here.get_with(&key(&kept), &options(true)).expect("it is on the other node"));
    let before = (used_bytes(&here), there.status().expect("it answers").epoch);
    drop(there);

    strike_under_load(&mut victim, &first, &theirs, &ours, Daemon::kill);

    let took = first.settles(&here, "nothing left of the dead node", |status| {
        let gone = status.peers.iter().all(|peer| !peer.linked);
        gone && (status.clients, status.reservations, status.draining, status.leases) == (1, 0, 0, 0)
    });
    println!("leases, reads and clients were back {took:?} after the last client had stopped");
    assert_eq!(used_bytes(&here), before.0, "extents that were to be filled are free again");
    let mut expected = ours.clone();
    expected.push(kept.clone());
    expected.sort();
    let mut left = listed(&here);
    left.sort();
    assert_eq!(left, expected, "its objects have left the directory, copies have not");
    get(&here, &kept).expect("a copy that is here");
    for name in &theirs {
        let error = get(&here, name).expect_err("it went with its node");
        assert!(CLEAR.contains(&error.kind()), "{error}");
    }

    let mut again = second.start();
    let there = again.connect();
    assert!(there.status().expect("it answers").epoch > before.1, "a new incarnation");
    first.settles(&here, "the node has joined again", |status| status.peers.iter().any(|peer| peer.linked));
    assert_eq!(there.status().expect("it answers").objects, 0);
    for name in &theirs {
        let error = get(&here, name).expect_err("the old incarnation's object").kind();
        assert_eq!(error, ErrorKind::NotFound, "{name}: the directory is sure now");
    }
    // The same key, another value: what comes is the new one, and both ways work again.
    let renewed = bytes_of("renewed", 300_000, 2);
    there.put_bytes(&key(&theirs[0]), &renewed).expect("room");
    let object = here.get_with(&key(&theirs[0]), &options(false)).expect("it was put");
    assert!(*object == *renewed, "the old incarnation's bytes");
    drop(object);
    put_all(&there, &names("later"));
    for name in names("later") {
        get(&here, &name).expect("it was put on the new incarnation");
    }
    for name in &ours {
        get(&there, name).expect("it never was on the node that was killed");
    }
    first.assert_sound();
    again.assert_sound();
}

#[test]
fn a_node_that_keeps_the_directory_comes_back_and_learns_everything_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let seed = Serve::new(folder.path(), "directory").listen(free_port());
    let mut first = seed.start();
    let mut second = Serve::new(folder.path(), "member").join(&first.address).start();
    let there = second.connect();
    let (ours, theirs) = (names("ours"), names("theirs"));
    put_all(&first.connect(), &ours);
    put_all(&there, &theirs);

    strike_under_load(&mut first, &second, &ours, &theirs, Daemon::kill);

    // Without a directory a node still has what it has, takes what is put, and says clearly what it cannot do.
    for name in &theirs {
        get(&there, name).expect("it is here");
    }
    let late = names("late");
    put_all(&there, &late);
    let error = there.get_with(&key("never-put"), &options(false)).expect_err("nobody can know");
    assert!(CLEAR.contains(&error.kind()), "{error}");
    second.settles(&there, "nothing left of the dead node", |status| {
        (status.clients, status.reservations, status.draining, status.leases) == (1, 0, 0, 0)
    });

    let mut again = seed.start();
    let here = again.connect();
    let took = again
        .settles(&here, "the member has joined again", |status| status.peers.iter().any(|peer| peer.linked));
    println!("the member was back {took:?} after the directory was ready");
    for name in theirs.iter().chain(&late) {
        eventually(&format!("{name} is announced again"), || {
            get(&here, name).map_err(|error| error.to_string())
        });
    }
    for name in &ours {
        let error = get(&there, name).expect_err("it went with its node").kind();
        assert_eq!(error, ErrorKind::NotFound, "{name}");
    }
    let mut expected = [theirs, late].concat();
    expected.sort();
    let mut left = listed(&here);
    left.sort();
    assert_eq!(left, expected);
    again.assert_sound();
    second.assert_sound();
}

#[test]
fn a_node_that_hangs_is_noticed_by_its_silence_and_comes_back_when_it_wakes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "awake").start();
    let mut second = Serve::new(folder.path(), "hangs").join(&first.address).start();
    let (here, there) = (first.connect(), second.connect());
    let (ours, theirs) = (names("ours"), names("theirs"));
    put_all(&here, &ours);
    put_all(&there, &theirs);
    let used = used_bytes(&here);
    // Its connections stay open: nothing but missed heartbeats tells.
    strike_under_load(&mut second, &first, &theirs, &ours, |node| node.signal(Signal::STOP));
    first.settles(&here, "the silent node is given up, with all that was held for it", |status| {
        let gone = status.peers.iter().all(|peer| !peer.linked);
        gone && (status.reservations, status.draining, status.leases) == (0, 0, 0)
    });
    assert_eq!(used_bytes(&here), used, "extents that were to be filled are free again");
    let mut left = listed(&here);
    left.sort();
    let mut expected = ours.clone();
    expected.sort();
    assert_eq!(left, expected, "its objects have left the directory");
    for name in &ours {
        get(&here, name).expect("it is here");
    }
    second.signal(Signal::CONT);
    for name in &theirs {
        eventually(&format!("{name} is announced again"), || {
            get(&here, name).map_err(|error| error.to_string())
        });
    }
    for name in &ours {
        get(&there, name).expect("both ways");
    }
    for (node, store) in [(&first, &here), (&second, &there)] {
        node.settles(store, "nothing is held", |status| {
            (status.reservations, status.draining, status.leases) == (0, 0, 0)
        });
    }
    first.assert_sound();
    second.assert_sound();
}
