//! What the fuzzer runs, as functions, so that the corpora can be replayed by plain tests too: the wire decoder, a
//! node's Unix socket, the safetensors reader. Not the fuzzer (`tests/fuzz`). Invariant: whatever the bytes are, a
//! function returns; it panics only for a finding.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hetmem_client::Store;
use hetmem_core::StoreError;
use hetmem_core::wire::{
    self, Batch, ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, MAGIC, PROTOCOL_MAX,
    PeerMessage,
};
use hetmem_formats::safetensors::SafeTensors;
use hetmem_host_mem::socket;
use hetmem_node::{Config, Node};

use crate::packets::{HELLO, RawClient, packet};

/// A header and a body as they arrive: whatever decodes must be within its limits and survive being sent on.
///
/// # Panics
/// If a value that was decoded is encoded to something else than itself.
pub fn wire(data: &[u8]) {
    let Some((header, rest)) = data.split_first_chunk::<HEADER_LEN>() else { return };
    // The length of the input stands for the rest of the frame, so that the fuzzer need not guess it.
    let Ok(header) = FrameHeader::parse(header) else { return };
    assert_eq!(FrameHeader::parse(&header.to_bytes()).as_ref(), Ok(&header), "a header as it was parsed");
    match header.kind {
        FrameKind::Peer => again::<PeerMessage>(header.kind, rest, |message| {
            let _ = message.check();
        }),
        FrameKind::Batch => again::<Batch>(header.kind, rest, |batch| {
            let _ = batch.check(header.payload_len);
        }),
        FrameKind::Client => again::<ClientMessage>(header.kind, rest, |_| {}),
        FrameKind::Reply => again::<Result<ClientReply, StoreError>>(header.kind, rest, |_| {}),
        FrameKind::Fabric => {}
    }
}

/// Decodes, encodes and decodes again.
fn again<T>(kind: FrameKind, body: &[u8], look: impl Fn(&T))
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(value) = wire::decode::<T>(body) else { return };
    look(&value);
    let Ok(frame) = wire::encode(kind, 1, &value, 0) else { return };
    let bytes = frame.into_bytes();
    let decoded: T = wire::decode(&bytes[HEADER_LEN..]).expect("what was encoded can be decoded");
    assert_eq!(decoded, value, "decoded, encoded and decoded");
}

/// A file of any bytes: what is accepted is whole, without gaps, and the same when written and read again.
///
/// # Panics
/// If it is not.
pub fn safetensors(data: &[u8]) {
    let Ok(read) = SafeTensors::parse("fuzz", data) else { return };
    let described: Vec<_> = read.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.meta)).collect();
    let mut written = Vec::new();
    hetmem_formats::safetensors::write_header(&mut written, &described, read.metadata.as_ref())
        .expect("what was read can be written");
    for tensor in &read.tensors {
        let bytes = read.bytes_of(tensor);
        assert_eq!(bytes.len() as u64, tensor.meta.len_bytes, "{:?}", tensor.name);
        written.extend_from_slice(bytes);
    }
    let again = SafeTensors::parse("fuzz, written", &written).expect("what was written can be read");
    // Empty tensors lie where others end, in any order.
    let sorted = |tensors: &[hetmem_formats::safetensors::Tensor]| {
        let mut all: Vec<_> = tensors.iter().map(|tensor| (tensor.name.clone(), tensor.meta)).collect();
        all.sort_by(|one, other| one.0.cmp(&other.0));
        all
    };
    assert_eq!(sorted(&again.tensors), sorted(&read.tensors));
    assert_eq!(again.metadata, read.metadata);
}

/// Packets to one fuzzed input at most.
const PACKETS_MAX: usize = 64;
/// The memory of the fuzzed node, in bytes: little, so that it is full now and then.
const NODE_BYTES: &str = "8MiB";
/// How long the node may take to let go of a client that has gone. Far more than it needs; a node that takes this
/// long hangs.
const REST_MAX: Duration = Duration::from_secs(20);

/// A node that outlives all inputs, and an honest client of it.
struct Target {
    node: Node,
    store: Store,
    _folder: tempfile::TempDir,
}

impl Target {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let socket = folder.path().join("node.sock");
        let config = Config::load(
            None,
            vec![
                pair("name", "fuzzed"),
                pair("socket", &socket.display().to_string()),
                pair("listen", "127.0.0.1:0"),
                pair("host", NODE_BYTES),
                pair("max_objects", "1024"),
                pair("huge_pages", "off"),
            ],
        );
        let node = Node::start(config.expect("a configuration")).expect("a node");
        let store = Store::connect(Some(node.socket())).expect("the node listens");
        Self { node, store, _folder: folder }
    }

    /// Sends what the input says, as one client, and goes.
    fn play(&self, mut data: &[u8]) {
        let Some((&first, rest)) = data.split_first() else { return };
        data = rest;
        let client = if first & 1 == 0 {
            RawClient::connect(self.node.socket())
        } else {
            RawClient::greet(self.node.socket()).0
        };
        for number in 0..PACKETS_MAX {
            let Some((packet, rest)) = next_packet(data, number as u64 + 2) else { break };
            data = rest;
            if client.send(&packet).is_err() {
                break;
            }
        }
        if first & 2 != 0 {
            // Some clients read what they are answered; this one reads at least that the node got this far.
            let _ = client.send(&packet(u64::MAX, &HELLO));
            let _ = client.receive();
        }
    }

    /// The node still answers, has let go of the client, and is made empty for the next input.
    fn check(&self) {
        let started = Instant::now();
        loop {
            let status = self.store.status().expect("the node answers");
            if (status.clients, status.reservations, status.leases) == (1, 0, 0) {
                break;
            }
            assert!(started.elapsed() < REST_MAX, "the node does not let go of a client: {status:?}");
            std::thread::yield_now();
        }
        for listed in self.store.list("") {
            let key = listed.expect("the node lists").key;
            let _ = self.store.delete(&key).expect("the node deletes");
        }
    }
}

/// One packet: `mode, body length, payload length`, then their bytes. An odd mode sends these as they are, an even one
/// puts the header of a client's message before them.
fn next_packet(data: &[u8], request: u64) -> Option<(Vec<u8>, &[u8])> {
    let (&[mode, body_low, body_high, payload_low, payload_high], rest) = data.split_first_chunk::<5>()?;
    let body_len = usize::from(u16::from_le_bytes([body_low, body_high])).min(rest.len());
    let (body, rest) = rest.split_at(body_len);
    let payload_len = usize::from(u16::from_le_bytes([payload_low, payload_high])).min(rest.len());
    let (payload, rest) = rest.split_at(payload_len);
    let mut packet = Vec::with_capacity(HEADER_LEN + body_len + payload_len);
    if mode & 1 == 0 {
        let header = FrameHeader {
            version: PROTOCOL_MAX,
            kind: FrameKind::Client,
            request,
            body_len: u32::try_from(body_len).unwrap_or(u32::MAX),
            payload_len: payload_len as u64,
        };
        packet.extend_from_slice(&header.to_bytes());
        debug_assert!(packet.starts_with(&MAGIC.to_le_bytes()));
    }
    packet.extend_from_slice(body);
    packet.extend_from_slice(payload);
    packet.truncate(socket::PACKET_LEN_MAX);
    // An empty packet reads as the end of the connection.
    if packet.is_empty() {
        packet.push(0);
    }
    Some((packet, rest))
}

/// Messages as the input of [`client_socket`], after a greeting: for corpora.
#[must_use]
pub fn client_input(messages: &[(ClientMessage, &[u8])]) -> Vec<u8> {
    let mut input = vec![3];
    for (message, payload) in messages {
        let frame = wire::encode(FrameKind::Client, 1, message, 0).expect("a short message").into_bytes();
        let body = &frame[HEADER_LEN..];
        let len = |len: usize| u16::try_from(len).expect("short").to_le_bytes();
        input.push(0);
        input.extend_from_slice(&len(body.len()));
        input.extend_from_slice(&len(payload.len()));
        input.extend_from_slice(body);
        input.extend_from_slice(payload);
    }
    input
}

/// A client of a running node that sends any packets and goes: the node serves others as before and keeps nothing.
///
/// # Panics
/// If it does not.
pub fn client_socket(data: &[u8]) {
    static TARGET: OnceLock<Mutex<Target>> = OnceLock::new();
    let target = TARGET.get_or_init(|| Mutex::new(Target::start()));
    let target = target.lock().unwrap_or_else(PoisonError::into_inner);
    target.play(data);
    target.check();
}
