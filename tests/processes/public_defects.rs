//! What went wrong in public in systems of this kind, where it takes real processes to show. The others are beside the
//! engine (core/src/engine/tests/public_defects.rs) and beside the segments (host-mem/src/segment_tests.rs).

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use hetmem_client::GetOptions;
use hetmem_tests::content::{below, bytes_of, key};
use hetmem_tests::daemon::Serve;

/// Ray #201: a worker was killed while it was blocked in a get; sealing its object made the store write to the dead
/// worker's socket, and that ended the store. Here clients are killed while they wait for a key, on the node where it
/// is then put and on another one; both nodes go on, and who waits beside the dead is told.
#[test]
fn plasma_201_an_object_that_killed_clients_wait_for_is_put_and_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut home = Serve::new(folder.path(), "home").start();
    let mut away = Serve::new(folder.path(), "away").join(&home.address).start();
    let (here, there) = (home.connect(), away.connect());
    let mut state = 1;
    for round in 0..4 {
        let name = format!("awaited-{round}");
        let sockets = [&home.socket, &away.socket];
        let mut victims: Vec<_> = (0..6)
            .map(|number| {
                let mut client = Command::new(env!("CARGO_BIN_EXE_hetmem-test-client"))
                    .arg(sockets[number % 2])
                    .args([&name, "0", "wait"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .spawn()
                    .expect("a client");
                let mut line = String::new();
                let out = client.stdout.take().expect("a pipe");
                BufReader::new(out).read_line(&mut line).expect("a line");
                assert_eq!(line.trim(), "waiting");
                client
            })
            .collect();
        // Some are killed before the node has heard of their question, most after.
        std::thread::sleep(Duration::from_micros(below(&mut state, 30_000) as u64));
        for victim in &mut victims {
            victim.kill().expect("it waits");
        }
        here.put_bytes(&key(&name), &bytes_of(&name, 300_000, 0)).expect("the node goes on");
        for victim in &mut victims {
            victim.wait().expect("it is gone");
        }
        let patience = Duration::from_secs(60);
        there.wait(&key(&name), patience).expect("it is there");
        let options = GetOptions { verify: true, ..GetOptions::default() };
        for store in [&here, &there] {
            let object = store.get_with(&key(&name), &options).expect("it is served");
            assert!(*object == *bytes_of(&name, 300_000, 0));
        }
    }
    for (node, store) in [(&mut home, here), (&mut away, there)] {
        node.settles(&store, "nothing is left of the dead", |status| {
            (status.clients, status.draining, status.leases) == (1, 0, 0)
        });
        node.assert_sound();
    }
}
