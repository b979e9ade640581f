//! What the TCP fabric does about peers that are not what they should be: garbage, other versions, drips, silence,
//! lies, sudden ends. The peer here is a raw socket that speaks just as much of docs/tcp-fabric.md as each test
//! needs. Beside each misbehaving connection a good one goes on.

mod raw;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{ErrorKind, Extent, LinkId, RemoteExtent, TransferId};
use hetmem_transport::{Fabric, SendToken, TcpConfig, TcpFabric};

use raw::{Handshake, Node, SEGMENT, Sink, assert_closed, hear, request, say};

/// A node with a good peer, to see that the good one is unharmed.
struct Guarded {
    node: Node,
    good: Node,
    link: LinkId,
}

impl Guarded {
    fn start(config: TcpConfig) -> Self {
        let (node, good) = (Node::start(config), Node::start(TcpConfig::default()));
        let link = good.fabric.connect(&node.fabric.address()).expect("connect");
        good.wait("LinkUp", |sink| sink.ups.lock().contains(&link));
        Self { node, good, link }
    }

    /// The good peer's frame arrives, its read comes back, and so many connections were refused meanwhile.
    fn assert_unharmed(&self, refused: u64) {
        let before = self.node.sink.messages.load(Ordering::SeqCst);
        let frame = encode(FrameKind::Peer, 1, &1_u64, 0).expect("small");
        let _ = self.good.fabric.send(self.link, frame, &[], SendToken(0)).expect("send");
        self.node.wait("the good peer's frame", |sink| sink.messages.load(Ordering::SeqCst) > before);
        let remote = RemoteExtent { key: self.node.key, offset: 0, len_bytes: 1 << 20 };
        let local = Extent { segment: SEGMENT, offset: 0, len_bytes: 1 << 20 };
        self.node.memory.write(0, &vec![0x3c; 1 << 20]);
        self.good.fabric.read(self.link, TransferId(1), remote, local).expect("read");
        self.good.read_result().expect("the good peer's read");
        assert!(self.good.memory.read(0, 1 << 20) == vec![0x3c; 1 << 20]);
        assert_eq!(self.node.fabric.refused(), refused);
    }
}

#[test]
fn garbage_is_closed_and_counted() {
    let guarded = Guarded::start(TcpConfig::default());
    let openings = [
        b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: */*\r\n\r\n".to_vec(),
        vec![0; 64],
        vec![0xff; 4096],
        // A frame of an engine before any introduction.
        encode(FrameKind::Peer, 0, &1_u64, 0).expect("small").into_bytes(),
    ];
    for (count, bytes) in openings.into_iter().enumerate() {
        let mut stream = guarded.node.raw();
        stream.write_all(&bytes).expect("write");
        assert_closed(&mut stream);
        guarded.assert_unharmed(count as u64 + 1);
    }
}

#[test]
fn oversized_lengths_are_not_believed() {
    let guarded = Guarded::start(TcpConfig::default());
    let header = |kind, body_len, payload_len| {
        FrameHeader { version: 1, kind, request: 0, body_len, payload_len }.to_bytes()
    };
    for (count, (body_len, payload_len)) in [(1025, 0), (u32::MAX, 0), (16, 1)].into_iter().enumerate() {
        let mut stream = guarded.node.raw();
        stream.write_all(&header(FrameKind::Fabric, body_len, payload_len)).expect("write");
        assert_closed(&mut stream);
        guarded.assert_unharmed(count as u64 + 1);
    }
    // The same once it is a link.
    for (count, (body_len, payload_len)) in [((1 << 20) + 1, 0), (8, u64::MAX)].into_iter().enumerate() {
        let (mut stream, _) = guarded.node.raw_link();
        stream.write_all(&header(FrameKind::Peer, body_len, payload_len)).expect("write");
        assert_closed(&mut stream);
        guarded.node.wait("LinkDown", |sink| sink.downs.lock().len() == count + 1);
        let why = guarded.node.sink.downs.lock()[count].1.to_string();
        assert!(why.contains("1048577") || why.contains(&u64::MAX.to_string()), "{why} says what came");
        guarded.assert_unharmed(count as u64 + 4);
    }
}

#[test]
fn frames_of_others_are_no_peer_messages() {
    let guarded = Guarded::start(TcpConfig::default());
    for (count, kind) in [FrameKind::Client, FrameKind::Reply, FrameKind::Fabric].into_iter().enumerate() {
        let (mut stream, _) = guarded.node.raw_link();
        stream.write_all(encode(kind, 0, &1_u64, 0).expect("small").as_bytes()).expect("write");
        assert_closed(&mut stream);
        guarded.assert_unharmed(count as u64 + 1);
    }
}

#[test]
fn another_version_is_told_both() {
    let guarded = Guarded::start(TcpConfig::default());
    let mut stream = guarded.node.raw();
    let open = Handshake::Open { version_min: 7, version_max: 9, listen_port: 9, token: [1; 16] };
    say(&mut stream, &open);
    let Handshake::Refused { error } = hear(&mut stream) else {
        panic!("not refused");
    };
    assert!(error.to_string().contains("7 to 9") && error.to_string().contains("1 to 1"), "{error}");
    assert_closed(&mut stream);
    guarded.assert_unharmed(1);
}

#[test]
fn silence_and_drips_end_at_the_deadline() {
    let config = TcpConfig { handshake_timeout: Duration::from_millis(100), ..TcpConfig::default() };
    let guarded = Guarded::start(config);
    let mut silent = guarded.node.raw();
    assert_closed(&mut silent);
    guarded.assert_unharmed(1);

    let mut drip = guarded.node.raw();
    let open = Handshake::Open { version_min: 1, version_max: 1, listen_port: 9, token: [1; 16] };
    let frame = encode(FrameKind::Fabric, 0, &open, 0).expect("small").into_bytes();
    drip.set_read_timeout(Some(Duration::from_millis(20))).expect("timeout");
    let mut sent = 0;
    let ended = loop {
        // All but the last byte, one at a time, for ever.
        if sent + 1 < frame.len() {
            let _ = drip.write_all(&frame[sent..=sent]);
            sent += 1;
        }
        match drip.read(&mut [0; 8]) {
            Ok(0) => break true,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break true,
            _ => break false,
        }
    };
    assert!(ended, "closed without an answer");
    guarded.assert_unharmed(2);
}

#[test]
fn a_listener_that_never_answers_is_given_up() {
    let mute = TcpListener::bind("127.0.0.1:0").expect("listen");
    let config = TcpConfig { handshake_timeout: Duration::from_millis(100), ..TcpConfig::default() };
    let node = Node::start(config);
    let address = mute.local_addr().expect("address").to_string();
    let link = node.fabric.connect(&address).expect("connect");
    node.wait("LinkDown", |sink| !sink.downs.lock().is_empty());
    let (down, why) = node.sink.downs.lock()[0].clone();
    assert_eq!((down, why.kind()), (link, ErrorKind::TimedOut), "{why}");
    assert!(why.to_string().contains(&address) && why.to_string().contains("100 ms"), "{why}");
}

#[test]
fn a_frame_that_drips_holds_up_nobody_else() {
    let guarded = Guarded::start(TcpConfig::default());
    let (mut stream, _) = guarded.node.raw_link();
    let frame = encode(FrameKind::Peer, 1, &vec![7_u8; 100_000], 0).expect("small").into_bytes();
    let before = guarded.node.sink.messages.load(Ordering::SeqCst);
    for part in frame.chunks(20_000) {
        assert_eq!(guarded.node.sink.messages.load(Ordering::SeqCst), before);
        stream.write_all(part).expect("write");
        guarded.assert_unharmed(0);
        let seen = guarded.node.sink.messages.swap(before, Ordering::SeqCst);
        assert!(
            (before + 1..=before + 2).contains(&seen),
            "the good peer's, and the last time the dripped one"
        );
    }
}

#[test]
fn a_port_in_use_is_named() {
    let node = Node::start(TcpConfig::default());
    let config = TcpConfig { listen: node.fabric.address(), ..TcpConfig::default() };
    let error = TcpFabric::start(config, Arc::<Sink>::default()).expect_err("in use").to_string();
    assert!(error.contains(&node.fabric.address()) && error.contains("another process"), "{error}");
    for (listen, word) in [("nowhere", "host:port"), ("203.0.113.1:0", "203.0.113.1")] {
        let config = TcpConfig { listen: listen.to_owned(), ..TcpConfig::default() };
        let error = TcpFabric::start(config, Arc::<Sink>::default()).expect_err("no such place").to_string();
        assert!(error.contains(word), "{error} should say {word}");
    }
    let config = TcpConfig { slice_bytes: 4096, ..TcpConfig::default() };
    assert!(TcpFabric::start(config, Arc::<Sink>::default()).is_err());
}

#[test]
fn too_many_are_refused() {
    let config = TcpConfig { handshakes_max: 3, links_max: 3, ..TcpConfig::default() };
    let guarded = Guarded::start(config);
    let silent: Vec<TcpStream> = (0..3).map(|_| guarded.node.raw()).collect();
    let mut fourth = guarded.node.raw();
    assert_closed(&mut fourth);
    assert_eq!(guarded.node.fabric.refused(), 1);
    for stream in silent {
        stream.shutdown(Shutdown::Both).expect("shutdown");
    }
    guarded.node.wait("the silent to be closed", |_| guarded.node.fabric.refused() == 4);
    let _links = [guarded.node.raw_link(), guarded.node.raw_link()];
    let mut stream = guarded.node.raw();
    say(&mut stream, &Handshake::Open { version_min: 1, version_max: 1, listen_port: 9, token: [1; 16] });
    let Handshake::Refused { error } = hear(&mut stream) else {
        panic!("not refused");
    };
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert_eq!(guarded.node.fabric.connect("127.0.0.1:1").expect_err("full").kind(), ErrorKind::Busy);
    guarded.assert_unharmed(5);
}

#[test]
fn data_streams_must_prove_themselves() {
    let config = TcpConfig { streams_per_peer_max: 2, ..TcpConfig::default() };
    let guarded = Guarded::start(config);
    let (_control, token) = guarded.node.raw_link();
    let mut forged = guarded.node.raw();
    say(&mut forged, &Handshake::Stream { token: [9; 16] });
    assert_closed(&mut forged);
    guarded.assert_unharmed(1);

    let mut garbage = guarded.node.raw();
    say(&mut garbage, &Handshake::Stream { token });
    garbage.write_all(&[0x55; 64]).expect("write");
    assert_closed(&mut garbage);
    guarded.assert_unharmed(2);

    // Two are allowed, and answered; the third is not.
    let request = request(1, guarded.node.key, 0, 4);
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = guarded.node.raw();
        say(&mut stream, &Handshake::Stream { token });
        stream.write_all(&request).expect("write");
        let mut answer = [0; 16 + 4];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer[16..], guarded.node.memory.read(0, 4));
        streams.push(stream);
    }
    let mut third = guarded.node.raw();
    say(&mut third, &Handshake::Stream { token });
    assert_closed(&mut third);
    guarded.assert_unharmed(3);
    assert_eq!(guarded.node.sink.downs.lock().len(), 0, "no link suffered");
}

/// A peer that asks for far more than it takes does not fill the owner's memory, and is served when it does.
#[test]
fn answers_that_nobody_takes_wait_in_the_socket() {
    const COUNT: u32 = 4000;
    let guarded = Guarded::start(TcpConfig::default());
    let (_control, token) = guarded.node.raw_link();
    let mut greedy = guarded.node.raw();
    say(&mut greedy, &Handshake::Stream { token });
    let mut reader = greedy.try_clone().expect("clone");
    let key = guarded.node.key;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..COUNT {
                greedy.write_all(&request(number, key, 0, 50_000)).expect("write");
            }
        });
        guarded.assert_unharmed(0);
        let mut answer = vec![0; 16 + 50_000];
        for number in 0..COUNT {
            reader.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer[4..8], number.to_le_bytes());
        }
    });
}
