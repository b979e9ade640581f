//! Clients are killed at random moments while others go on. Not their sockets alone: whole processes, with SIGKILL.

use std::path::Path;
use std::time::Duration;

use hetmem_client::{GetOptions, Store};
use hetmem_tests::content::{below, key};
use hetmem_tests::daemon::{Daemon, Serve};
use hetmem_tests::load::{Load, SHARED, content_of};

const ROUNDS: u64 = 6;
const VICTIMS: u64 = 3;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hetmem-test-client"))
}

/// Every byte of an object is what its name says, and its checksum agrees.
fn verify(store: &Store, name: &str) {
    let options = GetOptions { verify: true, ..GetOptions::default() };
    let object = store.get_with(&key(name), &options).expect("it was put, and nobody has deleted it");
    assert!(*object == *content_of(name), "{name} has other bytes");
}

/// Nothing is left of the clients that are gone.
fn settle(node: &Daemon, monitor: &Store, clients: u32) -> Duration {
    node.settles(monitor, &format!("{clients} clients and nothing left of others"), |status| {
        (status.clients, status.reservations, status.draining, status.leases) == (clients, 0, 0, 0)
    })
}

#[test]
fn killed_clients_leave_nothing_behind_and_disturb_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "killed-clients").start();
    let monitor = node.connect();
    for name in SHARED {
        monitor.put_bytes(&key(name), &content_of(name)).expect("room");
    }
    let mut steady = Load::start(program(), &node.socket, "steady", 1, false);
    settle(&node, &monitor, 2);
    let mut state = 7;
    for round in 0..ROUNDS {
        let start = |victim| {
            let prefix = format!("victim-{round}-{victim}");
            let seed = round * VICTIMS + victim;
            let load = Load::start(program(), &node.socket, &prefix, seed, true);
            (prefix, load)
        };
        let mut victims: Vec<_> = (0..VICTIMS).map(start).collect();
        for (at, (_, load)) in victims.iter().enumerate() {
            // Some are killed while they work, some while they connect.
            if at > 0 {
                load.goes_on(1 + below(&mut state, 40));
            }
        }
        std::thread::sleep(Duration::from_micros(below(&mut state, 20_000) as u64));
        let alive: Vec<_> = victims.iter_mut().map(|(prefix, load)| (prefix.clone(), load.kill())).collect();
        let took = settle(&node, &monitor, 2);
        println!("round {round}: all of {VICTIMS} killed clients was back after {took:?}");
        for (prefix, alive) in alive {
            alive.iter().for_each(|name| verify(&monitor, name));
            // Also what was sealed when the client had not heard of it yet.
            for listed in monitor.list(&format!("{prefix}/")) {
                let listed = listed.expect("a list");
                verify(&monitor, listed.key.as_str());
                assert!(monitor.delete(&listed.key).expect("deleted"), "{} was listed", listed.key);
            }
        }
        SHARED.iter().for_each(|name| verify(&monitor, name));
        steady.goes_on(20);
    }
    let (status, last) = steady.stop();
    assert!(status.success() && last == "done", "{status}: {last}");
    for name in SHARED {
        assert!(monitor.delete(&key(name)).expect("deleted"));
    }
    node.settles(&monitor, "empty", |status| {
        let used: u64 = status.tiers.iter().map(|tier| tier.used_bytes).sum();
        (status.clients, status.objects, used) == (1, 0, 0)
    });
    node.assert_sound();
}
