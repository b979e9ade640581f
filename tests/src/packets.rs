//! Packets and frames by hand, for what no honest client or peer sends. Not clients. Invariant: nothing here waits for
//! ever.

use std::collections::VecDeque;
use std::io::{IoSlice, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::Path;

use hetmem_core::wire::{
    self, Batch, ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, PROTOCOL_MAX, PROTOCOL_MIN,
    PeerMessage,
};
use hetmem_core::{Epoch, NodeId, StoreError, fingerprint};
use hetmem_host_mem::socket;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::daemon::PATIENCE;

/// The first message of every client.
pub const HELLO: ClientMessage =
    ClientMessage::Hello { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX };

/// A client's message as bytes.
///
/// # Panics
/// If it cannot be encoded.
#[must_use]
pub fn packet(request: u64, message: &ClientMessage) -> Vec<u8> {
    wire::encode(FrameKind::Client, request, message, 0).expect("a short message").into_bytes()
}

/// One end of a node's Unix socket.
#[derive(Debug)]
pub struct RawClient(pub OwnedFd);

impl RawClient {
    /// Connects, and says nothing yet.
    ///
    /// # Panics
    /// If nobody listens there.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let socket = socket::connect(path).expect("a node listens");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("a socket");
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).expect("a socket");
        Self(socket)
    }

    /// Connects and introduces itself; returns the descriptors of the index and of its page too.
    ///
    /// # Panics
    /// If it is not let in.
    #[must_use]
    pub fn greet(path: &Path) -> (Self, OwnedFd, OwnedFd) {
        let client = Self::connect(path);
        client.send(&packet(1, &HELLO)).expect("the node reads");
        let (_, reply, descriptors) = client.receive().expect("an answer");
        assert!(matches!(reply, Ok(ClientReply::Welcome { .. })), "{reply:?}");
        let [index, page] = <[OwnedFd; 2]>::try_from(descriptors).expect("index and page");
        (client, index, page)
    }

    /// Sends a packet of any bytes.
    ///
    /// # Errors
    /// The system's, as when the node has closed.
    pub fn send(&self, bytes: &[u8]) -> Result<(), rustix::io::Errno> {
        let mut nothing = rustix::net::SendAncillaryBuffer::default();
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut nothing, flags).map(|_| ())
    }

    /// The next answer; none once the node has closed.
    ///
    /// # Panics
    /// If nothing comes at all, or no answer.
    #[must_use]
    pub fn receive(&self) -> Option<(u64, Result<ClientReply, StoreError>, Vec<OwnedFd>)> {
        let mut buffer = vec![0; socket::PACKET_LEN_MAX];
        let mut descriptors = Vec::new();
        let len = match socket::recv(&self.0, &mut buffer, &mut descriptors) {
            Ok(0) => return None,
            Ok(len) => len,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("neither an answer nor an end: {error}"),
        };
        let header = FrameHeader::parse(buffer.first_chunk().expect("a header")).expect("a header");
        let reply = wire::decode(&buffer[HEADER_LEN..len]).expect("an answer");
        Some((header.request, reply, descriptors))
    }

    /// Waits until the node has closed the session; returns the errors that it answered before.
    pub fn ends(&self) -> Vec<StoreError> {
        let answers = std::iter::from_fn(|| self.receive());
        answers.filter_map(|(_, reply, _)| reply.err()).collect()
    }
}

/// A connection to a node's TCP fabric, and what came in a batch and was not looked at yet.
#[derive(Debug)]
pub struct RawPeer(pub TcpStream, VecDeque<(u64, PeerMessage)>);

/// The tokens of the TCP fabric's handshake.
pub type Token = [u8; 16];

impl RawPeer {
    /// Connects, and says nothing yet.
    ///
    /// # Panics
    /// If nobody listens there.
    #[must_use]
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("a node listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        Self(stream, VecDeque::new())
    }

    /// The first frame of a control stream (docs/tcp-fabric.md).
    ///
    /// # Panics
    /// Never: it is short.
    #[must_use]
    pub fn open_frame(versions: (u16, u16)) -> Vec<u8> {
        // An enum's variant is its number: Open is 0.
        let open = (0_u32, versions.0, versions.1, 9_u16, [7_u8; 16]);
        wire::encode(FrameKind::Fabric, 0, &open, 0).expect("short").into_bytes()
    }

    /// The first frame of a data stream.
    ///
    /// # Panics
    /// Never: it is short.
    #[must_use]
    pub fn stream_frame(token: Token) -> Vec<u8> {
        wire::encode(FrameKind::Fabric, 0, &(3_u32, token), 0).expect("short").into_bytes()
    }

    /// Connects and does the fabric's handshake; the node's HELLO comes next.
    ///
    /// # Panics
    /// If it is refused.
    #[must_use]
    pub fn open(address: &str) -> (Self, Token) {
        let mut peer = Self::connect(address);
        peer.send(&Self::open_frame((PROTOCOL_MIN, PROTOCOL_MAX)));
        let (header, body) = peer.frame().expect("an answer");
        assert_eq!(header.kind, FrameKind::Fabric);
        let (variant, _, token): (u32, u16, Token) = wire::decode(&body).expect("Opened");
        assert_eq!(variant, 1, "Opened");
        (peer, token)
    }

    /// Opens a link, introduces itself as a node of this name and joins; the node's HELLO has been read.
    ///
    /// # Panics
    /// If it is refused.
    #[must_use]
    pub fn join(address: &str, name: &str) -> Self {
        let (mut peer, _) = Self::open(address);
        peer.say(0, &hello(name, (PROTOCOL_MIN, PROTOCOL_MAX)), 0);
        let hello = peer.hears(|message| matches!(message, PeerMessage::Hello { .. }));
        assert!(hello.is_some(), "a HELLO");
        peer.say(0, &PeerMessage::Join { heir: false }, 0);
        peer
    }

    /// Sends any bytes; the node may close meanwhile.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    /// Sends a message; `payload_len` bytes are to follow it.
    ///
    /// # Panics
    /// If it cannot be encoded.
    pub fn say(&mut self, request: u64, message: &PeerMessage, payload_len: u64) {
        let frame = wire::encode(FrameKind::Peer, request, message, payload_len).expect("a short message");
        self.send(frame.as_bytes());
    }

    /// Sends several messages in one frame; `payload_len` bytes are to follow it.
    ///
    /// # Panics
    /// If they cannot be encoded.
    pub fn say_batch(&mut self, batch: &Batch, payload_len: u64) {
        let frame = wire::encode(FrameKind::Batch, 0, batch, payload_len).expect("a short batch");
        self.send(frame.as_bytes());
    }

    /// The next frame; none once the node has closed.
    ///
    /// # Panics
    /// If nothing comes at all, or no frame.
    pub fn frame(&mut self) -> Option<(FrameHeader, Vec<u8>)> {
        let mut head = [0; HEADER_LEN];
        if !self.filled(&mut head) {
            return None;
        }
        let header = FrameHeader::parse(&head).expect("a header");
        let payload_len = usize::try_from(header.payload_len).expect("a payload that fits");
        let mut body = vec![0; header.body_len as usize + payload_len];
        if !self.filled(&mut body) {
            return None;
        }
        body.truncate(header.body_len as usize);
        Some((header, body))
    }

    fn filled(&mut self, buffer: &mut [u8]) -> bool {
        match self.0.read_exact(buffer) {
            Ok(()) => true,
            Err(error) => {
                let kind = error.kind();
                assert!(
                    !matches!(kind, std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
                    "neither a frame nor an end"
                );
                false
            }
        }
    }

    /// The next message like this, with its request; none if the node closes first.
    pub fn hears(&mut self, wanted: impl Fn(&PeerMessage) -> bool) -> Option<(u64, PeerMessage)> {
        loop {
            while let Some((request, message)) = self.1.pop_front() {
                if wanted(&message) {
                    return Some((request, message));
                }
            }
            let (header, body) = self.frame()?;
            if header.kind == FrameKind::Batch {
                let batch = wire::decode::<Batch>(&body).ok()?;
                self.1.extend(batch.0.into_iter().map(|batched| (batched.request, batched.message)));
            } else {
                self.1.push_back((header.request, wire::decode(&body).ok()?));
            }
        }
    }

    /// Waits until the node has closed; returns all that it had sent.
    ///
    /// # Panics
    /// If it does not close.
    pub fn ends(&mut self) -> Vec<u8> {
        let mut received = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.0.read(&mut buffer) {
                Ok(0) => return received,
                Ok(count) => received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return received,
                Err(error) => panic!("the node does not close: {error}"),
            }
        }
    }
}

/// HELLO of a node that says it is called so.
#[must_use]
pub fn hello(name: &str, versions: (u16, u16)) -> PeerMessage {
    PeerMessage::Hello {
        member: wire::Member {
            node: NodeId(fingerprint(name.as_bytes())),
            epoch: Epoch(1),
            name: name.to_owned(),
            address: "127.0.0.1:9".to_owned(),
        },
        version_min: versions.0,
        version_max: versions.1,
        keeps: false,
    }
}
