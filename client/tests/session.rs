//! One socket, many callers, a scripted node at the other end. Not the store's operations (`store.rs`).

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hetmem_client::{ErrorKind, Key, Listed, StoreError, UnixSession};
use hetmem_core::wire::{ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, decode, encode};
use hetmem_host_mem::{Session, socket};

const LONG: Duration = Duration::from_secs(60);

/// The node's end of the socket.
struct Peer(OwnedFd);

impl Peer {
    /// The next question and its number; `None` when the client has gone.
    fn question(&self) -> Option<(u64, ClientMessage)> {
        let mut buffer = vec![0; socket::PACKET_LEN_MAX];
        let len = socket::recv(&self.0, &mut buffer, &mut Vec::new()).expect("a packet or the end");
        if len == 0 {
            return None;
        }
        let (header, rest) = buffer[..len].split_first_chunk::<HEADER_LEN>().expect("a header");
        let header = FrameHeader::parse(header).expect("a header");
        let body = &rest[..header.body_len as usize];
        Some((header.request, decode(body).expect("a message")))
    }

    fn answer(&self, request: u64, reply: &Result<ClientReply, StoreError>) {
        let frame = encode(FrameKind::Reply, request, reply, 0).expect("an answer");
        self.raw(frame.as_bytes());
    }

    fn raw(&self, bytes: &[u8]) {
        socket::send(&self.0, &[IoSlice::new(bytes)], &[]).expect("the client is there");
    }
}

fn connected() -> (Arc<UnixSession>, Peer) {
    let (ours, theirs) = socket::pair().expect("two ends");
    let session = UnixSession::over(ours, "a test".to_owned()).expect("a session");
    (Arc::new(session), Peer(theirs))
}

fn list(prefix: &str) -> ClientMessage {
    ClientMessage::List { prefix: prefix.to_owned(), after: None, limit: 1 }
}

/// An answer that repeats what was asked, so that a mix-up shows.
fn echo(message: &ClientMessage, copies: usize) -> Result<ClientReply, StoreError> {
    let ClientMessage::List { prefix, .. } = message else {
        return Ok(ClientReply::Done);
    };
    let listed = Listed { key: Key::new(prefix).expect("a key"), len_bytes: 7, holders: Vec::new() };
    Ok(ClientReply::Listed { objects: vec![listed; copies], more: false })
}

fn ask(session: &UnixSession, prefix: &str) -> String {
    let answer = session.call(&list(prefix), &[], LONG).expect("an answer");
    match answer.reply {
        ClientReply::Listed { objects, .. } => objects[0].key.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn answers_in_any_order_find_their_askers() {
    const THREADS: usize = 8;
    const CALLS: usize = 300;
    let (session, peer) = connected();
    let node = thread::spawn(move || {
        let mut held = HashMap::new();
        let mut answered = 0;
        while let Some((request, message)) = peer.question() {
            held.insert(request, message);
            // While more calls are left than two askers can have, a third will ask.
            let wait_for_more = held.len() < 3 && THREADS * CALLS - answered > 2 * CALLS;
            if !wait_for_more {
                // A hash map's order is no order.
                for (request, message) in held.drain() {
                    peer.answer(request, &echo(&message, 1));
                    answered += 1;
                }
            }
        }
        answered
    });
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let session = &session;
            scope.spawn(move || {
                for call in 0..CALLS {
                    let prefix = format!("{thread}/{call}");
                    assert_eq!(ask(session, &prefix), prefix);
                }
            });
        }
    });
    drop(session);
    assert_eq!(node.join().expect("the node"), THREADS * CALLS);
}

#[test]
fn refusals_arrive_as_the_node_said_them() {
    let (session, peer) = connected();
    let node = thread::spawn(move || {
        let (request, _) = peer.question().expect("a question");
        peer.answer(request, &Err(StoreError::not_found("stat", "k")));
    });
    let error = session.call(&list("k"), &[], LONG).expect_err("refused");
    assert_eq!(error, StoreError::not_found("stat", "k"));
    node.join().expect("the node");
}

#[test]
fn a_timeout_names_the_call_and_hurts_no_other() {
    let (session, peer) = connected();
    let node = thread::spawn(move || {
        let (never, _) = peer.question().expect("the first question");
        let (request, message) = peer.question().expect("the second");
        // Late, and of interest to nobody.
        peer.answer(never, &Ok(ClientReply::Done));
        peer.answer(request, &echo(&message, 1));
    });
    let timeout = Duration::from_millis(40);
    let key = Key::new("slow").expect("a key");
    let started = Instant::now();
    let error = session.call(&ClientMessage::Delete { key }, &[], timeout).expect_err("no answer");
    assert!(started.elapsed() >= timeout);
    assert_eq!(error, StoreError::timed_out("delete", "slow", 40));
    assert_eq!(ask(&session, "next"), "next");
    node.join().expect("the node");
}

#[test]
fn a_follower_times_out_while_another_reads() {
    let (session, peer) = connected();
    let patient = {
        let session = Arc::clone(&session);
        thread::spawn(move || ask(&session, "patient"))
    };
    let (first, first_message) = peer.question().expect("the reader's question");
    let error = session.call(&list("hasty"), &[], Duration::from_millis(30)).expect_err("no answer");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    peer.answer(first, &echo(&first_message, 1));
    assert_eq!(patient.join().expect("the reader"), "patient");
}

#[test]
fn a_node_that_goes_releases_everyone() {
    let (session, peer) = connected();
    let callers: Vec<_> = (0..5)
        .map(|number| {
            let session = Arc::clone(&session);
            thread::spawn(move || session.call(&list(&number.to_string()), &[], LONG).map(drop))
        })
        .collect();
    for _ in 0..5 {
        peer.question().expect("a question");
    }
    drop(peer);
    for caller in callers {
        let error = caller.join().expect("a caller").expect_err("the node is gone");
        assert_eq!(error.kind(), ErrorKind::PeerLost);
        assert!(error.to_string().contains("hetmem serve"), "{error}");
    }
    let error = session.call(&list("later"), &[], LONG).expect_err("still gone");
    assert_eq!(error.kind(), ErrorKind::PeerLost);
}

/// What is no answer ends the session, with what was wrong.
#[test]
fn garbage_is_named_and_ends_the_session() {
    let reply: Result<ClientReply, StoreError> = Ok(ClientReply::Done);
    let good = encode(FrameKind::Reply, 1, &reply, 0).expect("an answer").into_bytes();
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    for (bytes, word) in [
        (b"HTM".to_vec(), "3 bytes"),
        (changed(0, b'X'), "does not speak hetmem"),
        (changed(6, 2), "Client"),
        (changed(16, 200), "200"),
        (changed(24, 9), "says"),
        (changed(HEADER_LEN, 77), "no answer"),
        ([&good[..], &[0]].concat(), "says"),
    ] {
        let (session, peer) = connected();
        peer.raw(&bytes);
        let error = session.call(&list("k"), &[], LONG).expect_err(word);
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert!(error.to_string().contains(word), "{error} should say {word:?}");
    }
}

/// More is asked than the socket holds, of a node that reads on only when its own long answers are taken: neither
/// may block the other for ever.
#[test]
fn a_full_socket_is_emptied_while_asking() {
    const THREADS: usize = 16;
    const CALLS: usize = 20;
    let (session, peer) = connected();
    let node = thread::spawn(move || {
        let mut answered = 0;
        while let Some((request, message)) = peer.question() {
            peer.answer(request, &echo(&message, 200));
            answered += 1;
        }
        answered
    });
    let payload = vec![0; socket::PAYLOAD_LEN_MAX];
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (session, payload) = (&session, &payload);
            scope.spawn(move || {
                for call in 0..CALLS {
                    let prefix = format!("{}/{thread}/{call}", "long".repeat(60));
                    let answer = session.call(&list(&prefix), payload, LONG).expect("an answer");
                    let ClientReply::Listed { objects, .. } = answer.reply else {
                        panic!("{:?}", answer.reply);
                    };
                    assert!(objects.len() == 200 && objects[0].key.as_str() == prefix);
                }
            });
        }
    });
    drop(session);
    assert_eq!(node.join().expect("the node"), THREADS * CALLS);
}

#[test]
fn a_payload_over_the_limit_is_refused_before_it_is_sent() {
    let (session, _peer) = connected();
    let payload = vec![0; socket::PAYLOAD_LEN_MAX + 1];
    let error = session.call(&list("k"), &payload, LONG).expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

#[test]
fn nobody_at_the_socket_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("none.sock");
    let error = UnixSession::connect(&path).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(text.contains("hetmem serve") && text.contains("none.sock"), "{text}");
}
