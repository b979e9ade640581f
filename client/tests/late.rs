//! Answers that come after their asker has given up: whatever they hold is given back. Over a real socket.

#[allow(dead_code, reason = "each test file uses its part")]
mod stand_in;

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use hetmem_client::{
    ConnectOptions, ErrorKind, GetOptions, Key, ObjectMeta, PutOptions, Range, Reserved, Store, StoreError,
};
use hetmem_core::wire::{ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, decode, encode};
use hetmem_host_mem::{Answer, Session, socket};
use stand_in::StandIn;

/// Bytes of a packet in which many objects are handed over: few, so that an answer is cut into several.
const PART_LEN_MAX: usize = 3_000;

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
        let hold = |holding: &mut bool| {
            if std::mem::take(holding) {
                release.recv().expect("the test says when");
            }
        };
        let send = |reply: Result<ClientReply, StoreError>, fds: &[OwnedFd]| {
            let frame = encode(FrameKind::Reply, header.request, &reply, 0).expect("an answer");
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            socket::send(connection, &[IoSlice::new(frame.as_bytes())], &fds).expect("the client is there");
        };
        match answer {
            Ok(Answer { reply: ClientReply::LocatedMany(many), .. }) => {
                for (number, part) in many.parts(PART_LEN_MAX).into_iter().enumerate() {
                    // The first part is there by then.
                    if number == 1 && message.name() == held {
                        hold(&mut holding);
                    }
                    send(Ok(ClientReply::LocatedMany(part)), &[]);
                }
                continue;
            }
            _ if message.name() == held => hold(&mut holding),
            _ => {}
        }
        match answer {
            Ok(answer) => send(Ok(answer.reply), &answer.descriptors),
            Err(error) => send(Err(error), &[]),
        }
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
fn many_objects_take_few_questions_and_each_key_gets_its_own() {
    with_node("nothing", |path, node, _release| {
        let keys: Vec<Key> = (0..3_000).map(|number| key(&number.to_string())).collect();
        for key in &keys[..2_999] {
            node.add_remote(key, key.as_str().as_bytes());
        }
        let store = Store::connect(Some(path)).expect("connected");
        let mut results = store.get_many(&keys);
        assert_eq!((results.len(), node.pinned()), (3_000, 2_999));
        let last = results.pop().expect("3000 results").expect_err("not there");
        assert_eq!(last.kind(), ErrorKind::NotFound);
        for (key, result) in keys.iter().zip(results) {
            assert_eq!(&*result.expect("there"), key.as_str().as_bytes());
        }
        assert_eq!(node.pinned(), 0);
        assert_eq!(node.asked().iter().filter(|name| **name == "get many").count(), 3);
        // Parts of objects are asked for one by one.
        let range = Some(Range { start: 1, len_bytes: 2 });
        let parts = store.get_many_with(&keys[100..200], &GetOptions { range, ..GetOptions::default() });
        for (key, part) in keys[100..200].iter().zip(parts) {
            assert_eq!(&*part.expect("there"), &key.as_str().as_bytes()[1..]);
        }
        assert_eq!(node.asked().iter().filter(|name| **name == "get").count(), 100);
    });
}

#[test]
fn of_many_late_objects_all_are_unpinned() {
    with_node("get many", |path, node, release| {
        let keys: Vec<Key> = (0..200).map(|number| key(&number.to_string())).collect();
        for key in &keys {
            node.add_remote(key, key.as_str().as_bytes());
        }
        let store = Store::connect(Some(path)).expect("connected");
        let options = GetOptions { timeout: Duration::ZERO, ..GetOptions::default() };
        let results = store.get_many_with(&keys, &options);
        assert_eq!(results.len(), 200);
        for result in results {
            assert_eq!(result.expect_err("a part is held back").kind(), ErrorKind::TimedOut);
        }
        let some = node.pinned();
        assert!(some > 0 && some < 200, "{some}: those in the part that came are given back");
        release.send(()).expect("the node waits");
        // The next caller finds the late parts before its own answer.
        assert!(!store.exists(&key("nothing")).expect("asked"));
        assert_eq!(node.pinned(), 0);
    });
}
