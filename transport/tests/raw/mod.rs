//! A peer made of raw sockets, which speaks as much of docs/tcp-fabric.md as a test needs, and a node to do it to.
//! Not the fabric's own code: the bytes are written down here a second time. Invariant: none.
#![allow(dead_code, clippy::missing_panics_doc, reason = "each test uses a part; a failed test panics")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hetmem_core::wire::{FrameHeader, FrameKind, HEADER_LEN, decode, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, ReadStats, TcpConfig, TcpFabric,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const SEGMENT: SegmentId = SegmentId(1);
pub(crate) const REGION_LEN: usize = 8 << 20;

/// The body of a fabric's frame, as docs/tcp-fabric.md has it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Handshake {
    Open { version_min: u16, version_max: u16, listen_port: u16, token: [u8; 16] },
    Opened { version: u16, token: [u8; 16] },
    Refused { error: StoreError },
    Stream { token: [u8; 16] },
}

#[derive(Default)]
pub(crate) struct Sink {
    pub(crate) ups: Mutex<Vec<LinkId>>,
    pub(crate) downs: Mutex<Vec<(LinkId, StoreError)>>,
    pub(crate) reads: Mutex<Vec<(TransferId, Result<ReadStats, StoreError>)>>,
    pub(crate) messages: AtomicU64,
}

impl FabricSink for Sink {
    fn message(&self, _link: LinkId, _header: FrameHeader, _body: &[u8]) -> Landing {
        self.messages.fetch_add(1, Ordering::SeqCst);
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        match event {
            FabricEvent::LinkUp { link, .. } => self.ups.lock().push(link),
            FabricEvent::LinkDown { link, why } => self.downs.lock().push((link, why)),
            FabricEvent::ReadDone { transfer, result } => self.reads.lock().push((transfer, result)),
            FabricEvent::SendDone { .. } | FabricEvent::Landed { .. } => {}
        }
    }
}

pub(crate) struct Node {
    pub(crate) fabric: Arc<TcpFabric>,
    pub(crate) sink: Arc<Sink>,
    pub(crate) memory: Arc<HeapRegion>,
    pub(crate) key: RemoteKey,
}

impl Node {
    pub(crate) fn start(config: TcpConfig) -> Self {
        let sink = Arc::<Sink>::default();
        let fabric = TcpFabric::start(config, Arc::clone(&sink) as _).expect("listen");
        let memory = Arc::new(HeapRegion::new(REGION_LEN));
        let key = fabric.register(SEGMENT, Arc::clone(&memory) as _, Access::RemoteRead).expect("register");
        Self { fabric, sink, memory, key }
    }

    pub(crate) fn wait(&self, what: &str, until: impl Fn(&Sink) -> bool) {
        assert!(self.fabric.progress(PATIENCE, &|| until(&self.sink)), "waited in vain: {what}");
    }

    pub(crate) fn raw(&self) -> TcpStream {
        TcpStream::connect(self.fabric.address()).expect("connect")
    }

    /// A raw connection that has finished its handshake, and the token for data streams.
    pub(crate) fn raw_link(&self) -> (TcpStream, [u8; 16]) {
        let known = self.sink.ups.lock().len();
        let mut stream = self.raw();
        let open = Handshake::Open { version_min: 1, version_max: 1, listen_port: 9, token: [1; 16] };
        say(&mut stream, &open);
        let Handshake::Opened { token, .. } = hear(&mut stream) else {
            panic!("not opened");
        };
        self.wait("LinkUp", |sink| sink.ups.lock().len() > known);
        (stream, token)
    }

    /// A read into this node's memory; the link's other end is a raw socket.
    pub(crate) fn read(&self, link: LinkId, transfer: u64, len_bytes: u64) {
        let remote = RemoteExtent { key: RemoteKey(5), offset: 0, len_bytes };
        let local = Extent { segment: SEGMENT, offset: 0, len_bytes };
        self.fabric.read(link, TransferId(transfer), remote, local).expect("read");
    }

    pub(crate) fn read_result(&self) -> Result<ReadStats, StoreError> {
        self.wait("the end of a read", |sink| !sink.reads.lock().is_empty());
        self.sink.reads.lock().remove(0).1
    }
}

pub(crate) fn say(stream: &mut TcpStream, message: &Handshake) {
    let frame = encode(FrameKind::Fabric, 0, message, 0).expect("small");
    stream.write_all(frame.as_bytes()).expect("write");
}

pub(crate) fn hear(stream: &mut TcpStream) -> Handshake {
    let mut head = [0; HEADER_LEN];
    stream.read_exact(&mut head).expect("a header");
    let header = FrameHeader::parse(&head).expect("a header");
    let mut body = vec![0; header.body_len as usize];
    stream.read_exact(&mut body).expect("a body");
    decode(&body).expect("a handshake")
}

/// Waits until the other end has closed. A reset is as good as an end.
pub(crate) fn assert_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
}

pub(crate) fn request(number: u32, key: RemoteKey, offset: u64, len_bytes: u64) -> Vec<u8> {
    let mut bytes = b"HTMR".to_vec();
    bytes.extend_from_slice(&number.to_le_bytes());
    for field in [key.0, offset, len_bytes] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

/// The head of an answer that promises all bytes.
pub(crate) fn answer(number: u32, len_bytes: u64) -> Vec<u8> {
    let mut bytes = b"HA\0\0".to_vec();
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&len_bytes.to_le_bytes());
    bytes
}
