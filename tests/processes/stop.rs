//! Starting and stopping in order: SIGTERM, and what is in the way of a start. Not crashes.

use std::os::unix::net::UnixListener;

use hetmem_client::ErrorKind;
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve, eventually, free_port};
use rustix::process::Signal;

fn works(node: &mut Daemon) {
    let store = node.connect();
    let bytes = bytes_of("works", 100_000, 0);
    store.put_bytes(&key("works"), &bytes).expect("room");
    assert!(*store.get(&key("works")).expect("it was put") == *bytes);
    node.assert_sound();
}

#[test]
fn sigterm_and_sigint_end_a_node_in_order_and_it_starts_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let serve = Serve::new(folder.path(), "stopped").listen(free_port());
    for signal in [Signal::TERM, Signal::INT] {
        let mut node = serve.start();
        works(&mut node);
        let client = node.connect();
        let held = client.get(&key("works")).expect("it was put");
        node.signal(signal);
        let status = node.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", node.said());
        assert!(!node.socket.exists(), "its socket path is free");
        // Who still holds an object keeps its bytes; who asks learns that the node has gone.
        assert!(*held == *bytes_of("works", 100_000, 0));
        let error = client.status().expect_err("it has gone");
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert!(error.to_string().contains("hetmem serve"), "{error}");
    }
    works(&mut serve.start());
}

#[test]
fn a_node_stops_in_order_while_clients_ask() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "busy").start();
    let stores: Vec<_> = (0..3).map(|_| node.connect()).collect();
    std::thread::scope(|scope| {
        for (number, store) in stores.iter().enumerate() {
            scope.spawn(move || {
                let name = format!("key-{number}");
                let ends = |error: hetmem_client::StoreError| {
                    let kind = error.kind();
                    assert!(matches!(kind, ErrorKind::PeerLost | ErrorKind::Unavailable), "{error}");
                };
                loop {
                    if let Err(error) = store.put_bytes(&key(&name), &[7; 200_000]) {
                        return ends(error);
                    }
                    if let Err(error) = store.delete(&key(&name)) {
                        return ends(error);
                    }
                }
            });
        }
        eventually("clients are at work", || {
            let puts = node.connect().status().expect("it answers").counters.puts;
            if puts > 20 { Ok(()) } else { Err(format!("{puts} puts")) }
        });
        node.signal(Signal::TERM);
        let status = node.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", node.said());
    });
}

#[test]
fn the_socket_of_a_live_node_is_refused_and_that_of_a_dead_one_taken_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = Serve::new(folder.path(), "first");
    let mut live = first.start();
    let second = Serve::new(folder.path(), "second").socket(&live.socket);
    let end = second.try_start().expect_err("a live node answers there");
    assert_eq!(end.status.code(), Some(1));
    let path = live.socket.to_string_lossy().into_owned();
    assert!(end.said.contains(&path) && end.said.contains("a node answers"), "{}", end.said);
    works(&mut live);
    live.kill();
    assert!(live.socket.exists(), "a killed node leaves its socket");
    works(&mut second.start());
}

#[test]
fn a_socket_path_of_something_else_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").expect("written");
    let end = Serve::new(folder.path(), "file").socket(&file).try_start().expect_err("a file is there");
    assert!(end.said.contains("no socket"), "{}", end.said);
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "precious");
    // A socket of another kind at which another program listens.
    let other = folder.path().join("other.sock");
    let _listener = UnixListener::bind(&other).expect("bound");
    let end = Serve::new(folder.path(), "other").socket(&other).try_start().expect_err("somebody listens");
    assert!(end.said.contains("other.sock"), "{}", end.said);
    let long = folder.path().join("x".repeat(120));
    let end = Serve::new(folder.path(), "long").socket(&long).try_start().expect_err("too long");
    assert!(end.said.contains("107 bytes"), "{}", end.said);
}

#[test]
fn a_port_in_use_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let serve = Serve::new(folder.path(), "port").listen(port);
    let end = serve.try_start().expect_err("the port is taken");
    assert_eq!(end.status.code(), Some(1));
    assert!(end.said.contains(&format!("127.0.0.1:{port}")) && end.said.contains("in use"), "{}", end.said);
    assert!(!folder.path().join("port.sock").exists(), "nothing is left behind");
    drop(taken);
    works(&mut serve.start());
}

#[test]
fn listening_for_other_machines_is_warned_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "exposed").flag("listen", "0.0.0.0:0").start();
    node.says("other machines can connect");
    works(&mut node);
    let mut quiet = Serve::new(folder.path(), "loopback").start();
    works(&mut quiet);
    assert!(!quiet.said().contains("other machines"), "{}", quiet.said());
}
