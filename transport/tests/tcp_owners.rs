//! What the TCP fabric does about owners and senders that end in the middle, lie, or never finish.

mod raw;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{ErrorKind, Extent, LinkId, StoreError, TransferId};
use hetmem_transport::{Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, TcpConfig, TcpFabric};
use parking_lot::Mutex;

use raw::{Handshake, Node, PATIENCE, REGION_LEN, SEGMENT, Sink, answer, assert_closed, hear, say};

/// An owner made of raw sockets, to which a node has connected.
struct RawOwner {
    listener: TcpListener,
    control: TcpStream,
}

impl RawOwner {
    fn connected(node: &Node) -> (Self, LinkId) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("address").to_string();
        let link = node.fabric.connect(&address).expect("connect");
        let (mut control, _) = listener.accept().expect("accept");
        let Handshake::Open { version_max: 1, .. } = hear(&mut control) else {
            panic!("not an open");
        };
        say(&mut control, &Handshake::Opened { version: 1, token: [8; 16] });
        node.wait("LinkUp", |sink| sink.ups.lock().contains(&link));
        (Self { listener, control }, link)
    }

    /// Accepts a data stream and checks what it shows.
    fn stream(&self) -> TcpStream {
        let (mut stream, _) = self.listener.accept().expect("accept");
        let Handshake::Stream { token } = hear(&mut stream) else {
            panic!("not a stream");
        };
        assert_eq!(token, [8; 16]);
        stream
    }
}

/// The number and length of the next request.
fn next_request(stream: &mut TcpStream) -> (u32, u64) {
    let mut bytes = [0; 32];
    stream.read_exact(&mut bytes).expect("a request");
    assert_eq!(&bytes[..4], b"HTMR");
    let number = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
    (number, u64::from_le_bytes(bytes[24..].try_into().expect("8 bytes")))
}

#[test]
fn an_owner_that_dies_in_the_middle_of_an_answer_is_named() {
    let node = Node::start(TcpConfig::default());
    let (owner, link) = RawOwner::connected(&node);
    let address = owner.listener.local_addr().expect("address").to_string();
    node.read(link, 1, 3 << 20);
    let mut stream = owner.stream();
    let (number, len) = next_request(&mut stream);
    stream.write_all(&answer(number, len)).expect("write");
    stream.write_all(&vec![1; 500_000]).expect("write");
    drop((stream, owner));
    let error = node.read_result().expect_err("dead");
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    assert!(error.to_string().contains(&address) && error.to_string().contains("read"), "{error}");
    node.wait("LinkDown", |sink| sink.downs.lock().len() == 1);
}

#[test]
fn a_stream_that_ends_is_replaced() {
    let node = Node::start(TcpConfig::default());
    let (owner, link) = RawOwner::connected(&node);
    node.read(link, 1, 1 << 20);
    let mut first = owner.stream();
    let (number, len) = next_request(&mut first);
    first.write_all(&answer(number, len)).expect("write");
    first.write_all(&vec![1; 70_000]).expect("write");
    drop(first);
    let mut second = owner.stream();
    let (number, len) = next_request(&mut second);
    assert_eq!(len, 1 << 20);
    second.write_all(&answer(number, len)).expect("write");
    second.write_all(&vec![2; 1 << 20]).expect("write");
    let stats = node.read_result().expect("read");
    assert_eq!((stats.bytes, stats.reissued), (1 << 20, 1));
    assert!(node.memory.read(0, 1 << 20) == vec![2; 1 << 20]);
}

#[test]
fn an_owner_that_answers_nonsense_is_given_up() {
    let node = Node::start(TcpConfig::default());
    let (owner, link) = RawOwner::connected(&node);
    node.read(link, 1, 1000);
    type Lie = fn(u32, u64) -> Vec<u8>;
    let lies: [Lie; 3] =
        [|_, _| vec![0xee; 16], |number, len| answer(number + 1, len), |number, len| answer(number, len + 1)];
    for lie in lies {
        let mut stream = owner.stream();
        let (number, len) = next_request(&mut stream);
        stream.write_all(&lie(number, len)).expect("write");
        assert_closed(&mut stream);
    }
    let error = node.read_result().expect_err("nonsense");
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert_eq!(node.fabric.refused(), 3);
    assert!(node.sink.downs.lock().is_empty(), "the link itself did nothing wrong");
}

#[test]
fn a_cancelled_read_ends_though_the_owner_never_answers() {
    let node = Node::start(TcpConfig::default());
    let (owner, link) = RawOwner::connected(&node);
    node.read(link, 1, 2 << 20);
    let mut stream = owner.stream();
    let (number, len) = next_request(&mut stream);
    stream.write_all(&answer(number, len)).expect("write");
    stream.write_all(&vec![1; 1000]).expect("write");
    node.fabric.cancel(TransferId(1));
    assert!(node.read_result().is_err());
    node.memory.write(0, &vec![9; 2 << 20]);
    // What still comes goes nowhere: the stream was closed.
    let _ = stream.write_all(&vec![1; 1 << 20]);
    assert_closed(&mut stream);
    assert!(node.memory.read(0, 2 << 20) == vec![9; 2 << 20]);
    drop(owner.control);
}

#[test]
fn a_landing_ends_when_the_link_does() {
    struct IntoMemory(Sink, Mutex<Vec<Result<(), StoreError>>>);
    impl FabricSink for IntoMemory {
        fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
            self.0.message(link, header, body);
            let extent = Extent { segment: SEGMENT, offset: 0, len_bytes: header.payload_len };
            Landing::whole(extent, hetmem_transport::LandingToken(1))
        }
        fn event(&self, event: FabricEvent) {
            match event {
                FabricEvent::Landed { result, .. } => self.1.lock().push(result.map(|_| ())),
                event => self.0.event(event),
            }
        }
    }
    let sink = Arc::new(IntoMemory(Sink::default(), Mutex::default()));
    let fabric = TcpFabric::start(TcpConfig::default(), Arc::clone(&sink) as _).expect("listen");
    fabric.register(SEGMENT, Arc::new(HeapRegion::new(REGION_LEN)), Access::Local).expect("register");
    let mut stream = TcpStream::connect(fabric.address()).expect("connect");
    say(&mut stream, &Handshake::Open { version_min: 1, version_max: 1, listen_port: 9, token: [1; 16] });
    hear(&mut stream);
    stream.write_all(encode(FrameKind::Peer, 1, &1_u64, 1 << 20).expect("small").as_bytes()).expect("write");
    stream.write_all(&vec![1; 100_000]).expect("write");
    assert!(fabric.progress(PATIENCE, &|| sink.0.messages.load(Ordering::SeqCst) == 1));
    drop(stream);
    assert!(fabric.progress(PATIENCE, &|| sink.0.downs.lock().len() == 1));
    let landed = sink.1.lock();
    assert_eq!(landed.len(), 1);
    assert_eq!(landed[0].clone().expect_err("cut off").kind(), ErrorKind::PeerLost);
}
