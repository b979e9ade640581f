//! Answers that come after their asker has given up: whatever they hold is given back. Over a real socket.

#[allow(dead_code, reason = "each test file uses its part")]
mod stand_in;

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use hetmem_client::{ConnectOptions, ErrorKind, GetOptions, Key, ObjectMeta, PutOptions, Reserved, Store};
use hetmem_core::wire::{ClientMessage, FrameHeader, FrameKind, HEADER_LEN, decode, encode};
use hetmem_host_mem::{Session, socket};
use stand_in::StandIn;

/// Serves one client over a socket. The first answer to a question of the name `held` waits for a word from the test.
fn serve(node: &StandIn, connection: &OwnedFd, held: &str, release: &mpsc::Receiver<()>) {
    let mut buffer = vec![0; socket::PACKET_LEN_MAX];
    let mut holding = true;
    loop {
        let len = socket::recv(connection, &mut buffer, &mut Vec::new()).expect("a packet or the end");
        if len == 0 {
            return;
        }
        let (header, rest) = buffer[..len].split_first_chunk::<HEADER_LEN>().expect("a header");
        let header = FrameHeader::parse(header).expect("a header");
        let (body, payload) = rest.split_at(header.body_len as usize);
        let message: ClientMessage = decode(body).expect("a message");
        let answer = node.call(&message, payload, Duration::ZERO);
        if holding && message.name() == held {
            holding = false;
            release.recv().expect("the test says when");
        }
        let (reply, fds) = match answer {
            Ok(answer) => (Ok(answer.reply), answer.descriptors),
            Err(error) => (Err(error), Vec::new()),
        };
        let frame = encode(FrameKind::Reply, header.request, &reply, 0).expect("an answer");
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        socket::send(connection, &[IoSlice::new(frame.as_bytes())], &fds).expect("the client is there");
    }
}

fn with_node(held: &'static str, test: impl FnOnce(&Path, &StandIn, &mpsc::Sender<()>)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("node.sock");
    let listener = socket::listen(&path).expect("a listener");
    let node = Arc::new(StandIn::new());
    let (release, released) = mpsc::channel();
    let server = thread::spawn({
        let node = Arc::clone(&node);
        move || {
            let accepted = socket::accept(&listener).expect("a client");
            serve(&node, &accepted.socket, held, &released);
        }
    });
    test(&path, &node, &release);
    server.join().expect("the node");
}

fn key(name: &str) -> Key {
    Key::new(name).expect("a key")
}

#[test]
fn a_late_object_is_unpinned() {
    with_node("get", |path, node, release| {
        node.add_remote(&key("far"), b"far away");
        let store = Store::connect(Some(path)).expect("connected");
        // The wait ends with the node's own deadline and a grace, so this takes a moment.
        let options = GetOptions { timeout: Duration::ZERO, ..GetOptions::default() };
        let error = store.get_with(&key("far"), &options).expect_err("held back");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(node.pinned(), 1, "the node has pinned it for a caller who has gone");
        release.send(()).expect("the node waits");
        // The next caller finds the late answer before its own.
        assert!(!store.exists(&key("nothing")).expect("asked"));
        assert_eq!(node.pinned(), 0);
        let object = store.get(&key("far")).expect("again");
        assert_eq!((&*object, node.pinned()), (&b"far away"[..], 1));
    });
}

#[test]
fn a_late_reservation_is_given_back_and_its_segment_kept() {
    with_node("reserve", |path, node, release| {
        let options = ConnectOptions { socket: Some(path.to_path_buf()), ..ConnectOptions::default() };
        let store = Store::connect_with(&options).expect("connected");
        let meta = ObjectMeta::bytes(50_000).expect("short");
        let hasty = PutOptions { timeout: Duration::from_millis(20), ..PutOptions::default() };
        let error = store.reserve(&key("a"), meta, &hasty).expect_err("held back");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(node.reservations(), 1);
        release.send(()).expect("the node waits");
        assert!(!store.exists(&key("a")).expect("asked"));
        // The abort went out while the answer above was waited for; a question behind it finds it done.
        assert!(!store.exists(&key("a")).expect("asked"));
        assert_eq!(node.reservations(), 0);
        let Reserved::Open(reservation) =
            store.reserve(&key("a"), meta, &PutOptions::default()).expect("room")
        else {
            panic!("nothing was there");
        };
        assert!(reservation.in_place());
        reservation.fill(&[3; 50_000]).expect("sealed");
        assert_eq!(store.get(&key("a")).expect("get").verify(), Ok(true));
    });
}

#[test]
fn many_gets_are_out_at_once_and_each_finds_its_object() {
    with_node("nothing", |path, node, _release| {
        let keys: Vec<Key> = (0..300).map(|number| key(&number.to_string())).collect();
        for key in &keys[..299] {
            node.add_remote(key, key.as_str().as_bytes());
        }
        let store = Store::connect(Some(path)).expect("connected");
        let mut results = store.get_many(&keys);
        let last = results.pop().expect("300 results").expect_err("not there");
        assert_eq!(last.kind(), ErrorKind::NotFound);
        for (key, result) in keys.iter().zip(results) {
            assert_eq!(&*result.expect("there"), key.as_str().as_bytes());
        }
        assert_eq!(node.pinned(), 0);
        assert_eq!(node.asked().iter().filter(|name| **name == "get").count(), 300);
    });
}
