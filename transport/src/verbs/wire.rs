//! What two ends of the verbs fabric say to each other beside frames: who connects and why, and which memory may be read.
//! Not frames. Invariant: any bytes decode to one of these or to nothing.

use std::fmt;

use hetmem_core::{Epoch, NodeId, RemoteExtent, RemoteKey, StoreError};

use super::abi::PRIVATE_MAX;

/// How private data begins, and the version of all that ends say to each other beside frames.
const MAGIC: [u8; 3] = *b"HMV";
const VERSION: u8 = 2;
const HELLO_LEN: usize = 32;
/// Regions of more chunks than that are not described.
pub(super) const CHUNKS_MAX: usize = 256;

/// How a description begins. A frame begins with another word (`hetmem_core::wire::MAGIC`). Not an immediate number, which
/// iWARP does not have.
const DESCRIPTION: [u8; 4] = *b"HMVR";

/// Whether a message that is not inside of a frame describes memory, and is not a frame.
pub(super) fn is_description(bytes: &[u8]) -> bool {
    bytes.starts_with(&DESCRIPTION)
}

/// Names a link to the end that is to open a data connection for it, or that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LinkToken(pub(super) u64);

/// Whether private data is a node's, of any version.
pub(super) fn is_greeting(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// Whose end of a connection it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) node: NodeId,
    pub(super) epoch: Epoch,
}

impl Owner {
    /// Whether both have said who they are, and are not the same incarnation of the same node. An end that belongs to no
    /// node, or not yet, says nothing.
    pub(super) fn is_another(self, other: Self) -> bool {
        self != Self::default() && other != Self::default() && self != other
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}, epoch {}", self.node, self.epoch.0)
    }
}

/// What a connection is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A new link: where this end listens, and what its data connections are to show.
    Control { port: u16, token: LinkToken },
    /// The answer to that.
    Welcome { token: LinkToken },
    /// A data connection of a link, and its answer.
    Data { token: LinkToken },
    /// The answer to what cannot be had: why is said by the version, or in the log of who refuses.
    Refused,
}

/// The private data of a connection's request or answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) what: Purpose,
    pub(super) owner: Owner,
}

impl Hello {
    pub(super) fn to_bytes(self) -> [u8; HELLO_LEN] {
        let (kind, port, token) = match self.what {
            Purpose::Control { port, token } => (1, port, token.0),
            Purpose::Welcome { token } => (2, 0, token.0),
            Purpose::Data { token } => (3, 0, token.0),
            Purpose::Refused => (4, 0, 0),
        };
        let mut bytes = [0; HELLO_LEN];
        bytes[..3].copy_from_slice(&MAGIC);
        (bytes[3], bytes[4]) = (VERSION, kind);
        bytes[6..8].copy_from_slice(&port.to_be_bytes());
        bytes[8..16].copy_from_slice(&token.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.owner.node.0.to_be_bytes());
        bytes[24..].copy_from_slice(&self.owner.epoch.0.to_be_bytes());
        bytes
    }

    /// Of what came; a connection manager may have added zeros.
    ///
    /// # Errors
    /// `Protocol` if it is none, or of another version.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let none = || StoreError::protocol("it does not greet as a node does");
        let Some((head, rest)) = bytes.split_first_chunk::<8>().filter(|_| is_greeting(bytes)) else {
            return Err(none());
        };
        if head[3] != VERSION {
            let why = format!("it speaks version {} of RDMA connections, this node {VERSION}", head[3]);
            return Err(StoreError::protocol(why));
        }
        let number = |at: usize| {
            let number = rest.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(none)?;
            Ok::<_, StoreError>(u64::from_be_bytes(*number))
        };
        let (port, token) = (u16::from_be_bytes([head[6], head[7]]), LinkToken(number(0)?));
        let owner = Owner { node: NodeId(number(8)?), epoch: Epoch(number(16)?) };
        let what = match head[4] {
            1 => Purpose::Control { port, token },
            2 => Purpose::Welcome { token },
            3 => Purpose::Data { token },
            4 => Purpose::Refused,
            _ => return Err(none()),
        };
        Ok(Self { what, owner })
    }
}

const _: () = assert!(HELLO_LEN <= PRIVATE_MAX);

/// A part of a peer's region, as its adapter names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RemoteChunk {
    pub(super) address: u64,
    pub(super) len_bytes: u64,
    pub(super) key: u32,
}

/// What an end says of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Described {
    /// Of a region: it is no more.
    Gone,
    /// Of a region: the peer may do nothing with this segment.
    Local { segment: u32 },
    /// Of a region: the peer may read these chunks of this segment, one after the other; whether it is to ask for them to
    /// be written instead, where it can.
    Readable { segment: u32, chunks: Vec<RemoteChunk>, by_push: bool },
    /// Of no region: all that there are have been described. The link is up when both ends have said so.
    All,
}

const REGION_HEAD_LEN: usize = 24;
const CHUNK_LEN: usize = 20;

// A description is one send.
const _: () = assert!(REGION_HEAD_LEN + CHUNKS_MAX * CHUNK_LEN <= super::adapters::BUFFER_LEN);

pub(super) fn describe(key: RemoteKey, described: &Described) -> Vec<u8> {
    let (kind, segment, chunks): (u32, u32, &[RemoteChunk]) = match described {
        Described::Gone => (0, 0, &[]),
        Described::Local { segment } => (1, *segment, &[]),
        Described::Readable { segment, chunks, by_push: false } => (2, *segment, chunks),
        Described::Readable { segment, chunks, by_push: true } => (4, *segment, chunks),
        Described::All => (3, 0, &[]),
    };
    let mut bytes = Vec::with_capacity(REGION_HEAD_LEN + chunks.len() * CHUNK_LEN);
    bytes.extend_from_slice(&DESCRIPTION);
    bytes.extend_from_slice(&key.0.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&segment.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(chunks.len()).unwrap_or(u32::MAX).to_be_bytes());
    for chunk in chunks {
        bytes.extend_from_slice(&chunk.address.to_be_bytes());
        bytes.extend_from_slice(&chunk.len_bytes.to_be_bytes());
        bytes.extend_from_slice(&chunk.key.to_be_bytes());
    }
    bytes
}

/// # Errors
/// `Protocol` if it is no description.
pub(super) fn described(bytes: &[u8]) -> Result<(RemoteKey, Described), StoreError> {
    let wrong = || StoreError::protocol(format!("{} bytes that describe no region", bytes.len()));
    let (head, rest) = bytes.split_first_chunk::<REGION_HEAD_LEN>().ok_or_else(wrong)?;
    let head = head.strip_prefix(&DESCRIPTION[..]).ok_or_else(wrong)?;
    let (key, head) = head.split_first_chunk::<8>().ok_or_else(wrong)?;
    let (kind, head) = head.split_first_chunk::<4>().ok_or_else(wrong)?;
    let (segment, count) = head.split_first_chunk::<4>().ok_or_else(wrong)?;
    let segment = u32::from_be_bytes(*segment);
    let count = u32::from_be_bytes(count.try_into().map_err(|_| wrong())?) as usize;
    if rest.len() != count * CHUNK_LEN || count > CHUNKS_MAX {
        return Err(wrong());
    }
    let chunk = |bytes: &[u8]| {
        let (address, rest) = bytes.split_first_chunk::<8>()?;
        let (len_bytes, key) = rest.split_first_chunk::<8>()?;
        Some(RemoteChunk {
            address: u64::from_be_bytes(*address),
            len_bytes: u64::from_be_bytes(*len_bytes),
            key: u32::from_be_bytes(key.try_into().ok()?),
        })
    };
    let chunks: Option<Vec<RemoteChunk>> = rest.chunks_exact(CHUNK_LEN).map(chunk).collect();
    let described = match (u32::from_be_bytes(*kind), chunks.ok_or_else(wrong)?) {
        (0, _) => Described::Gone,
        (1, _) => Described::Local { segment },
        (kind @ (2 | 4), chunks) => Described::Readable { segment, chunks, by_push: kind == 4 },
        (3, _) => Described::All,
        _ => return Err(wrong()),
    };
    Ok((RemoteKey(u64::from_be_bytes(*key)), described))
}

/// What a reader asks to be written into its memory instead of reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PushAsk {
    /// Comes with the last write.
    pub(super) number: u32,
    pub(super) from: RemoteExtent,
    /// Where to: all of it is open to the owner's writes under this key of the reader's adapter.
    pub(super) address: u64,
    pub(super) key: u32,
}

/// A message on a data connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PushSaid {
    /// To the owner.
    Ask(PushAsk),
    /// To the reader: nothing more is written for this number.
    Refused { number: u32 },
}

/// How such a message begins.
const PUSH: [u8; 4] = *b"HMVP";
const PUSH_LEN: usize = 48;

impl PushSaid {
    pub(super) fn to_bytes(self) -> [u8; PUSH_LEN] {
        let (kind, number, [key, offset, len_bytes, address], remote) = match self {
            Self::Ask(PushAsk {
                number,
                from: RemoteExtent { key, offset, len_bytes },
                address,
                key: remote,
            }) => (1_u32, number, [key.0, offset, len_bytes, address], remote),
            Self::Refused { number } => (2, number, [0; 4], 0),
        };
        let mut bytes = [0; PUSH_LEN];
        bytes[..4].copy_from_slice(&PUSH);
        for (place, word) in bytes[4..16].chunks_exact_mut(4).zip([kind, number, remote]) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        for (place, word) in bytes[16..].chunks_exact_mut(8).zip([key, offset, len_bytes, address]) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// # Errors
    /// `Protocol` if it is none.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let wrong = || StoreError::protocol(format!("{} bytes that ask for no push", bytes.len()));
        let whole: &[u8; PUSH_LEN] = bytes.try_into().map_err(|_| wrong())?;
        let small = |at: usize| u32::from_be_bytes([whole[at], whole[at + 1], whole[at + 2], whole[at + 3]]);
        let word = |at: usize| u64::from(small(at)) << 32 | u64::from(small(at + 4));
        let (number, key) = (small(8), small(12));
        let from = RemoteExtent { key: RemoteKey(word(16)), offset: word(24), len_bytes: word(32) };
        match small(4) {
            _ if whole[..4] != PUSH => Err(wrong()),
            1 => Ok(Self::Ask(PushAsk { number, from, address: word(40), key })),
            2 => Ok(Self::Refused { number }),
            _ => Err(wrong()),
        }
    }
}

/// The stretches of a peer's region that an extent of it is made of, in its order.
///
/// # Errors
/// As the owner's own look would find: `Denied`, or `Invalid` outside.
pub(super) fn stretches(described: &Described, extent: RemoteExtent) -> Result<Vec<RemoteChunk>, StoreError> {
    let (segment, chunks) = match described {
        Described::Readable { segment, chunks, .. } => (segment, chunks),
        Described::Local { segment } => {
            let why =
                format!("segment {segment} (key {:016x}) is registered for its own node only", extent.key.0);
            return Err(StoreError::denied("read", why));
        }
        Described::Gone | Described::All => return Err(StoreError::protocol("a description of no region")),
    };
    let len: u64 = chunks.iter().fold(0, |sum: u64, chunk| sum.saturating_add(chunk.len_bytes));
    if extent.offset.checked_add(extent.len_bytes).is_none_or(|end| end > len) {
        let RemoteExtent { offset, len_bytes, key } = extent;
        let why = format!(
            "read: {len_bytes} bytes at {offset} are not inside segment {segment} of {len} bytes (key {:016x})",
            key.0
        );
        return Err(StoreError::invalid("remote extent", why));
    }
    let (mut start, mut left, mut found) = (extent.offset, extent.len_bytes, Vec::new());
    for chunk in chunks {
        if start >= chunk.len_bytes {
            start -= chunk.len_bytes;
            continue;
        }
        let len_bytes = left.min(chunk.len_bytes - start);
        if len_bytes > 0 {
            found.push(RemoteChunk { address: chunk.address.wrapping_add(start), len_bytes, ..*chunk });
        }
        (start, left) = (0, left - len_bytes);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_come_back_and_garbage_is_an_error() {
        let token = LinkToken(0x0102_0304_0506_0708);
        let owner = Owner { node: NodeId(0x1122_3344_5566_7788), epoch: Epoch(77) };
        let all =
            [Purpose::Control { port: 7733, token }, Purpose::Welcome { token }, Purpose::Data { token }];
        for what in all.into_iter().chain([Purpose::Refused]) {
            let hello = Hello { what, owner };
            let bytes = hello.to_bytes();
            assert_eq!(Hello::parse(&bytes), Ok(hello));
            assert_eq!(Hello::parse(&[&bytes[..], &[0; 24]].concat()), Ok(hello), "with zeros behind it");
            assert!((0..bytes.len()).all(|len| Hello::parse(&bytes[..len]).is_err()));
            let mut wrong = bytes;
            wrong[3] += 1;
            let why = Hello::parse(&wrong).expect_err("another version").to_string();
            assert!(why.contains("version 3") && why.contains("this node 2"), "{why}");
            wrong = bytes;
            wrong[4] = 9;
            assert!(Hello::parse(&wrong).is_err());
        }
    }

    #[test]
    fn who_says_nothing_is_not_another() {
        let owner = |node, epoch| Owner { node: NodeId(node), epoch: Epoch(epoch) };
        assert!(owner(1, 2).is_another(owner(1, 3)) && owner(1, 2).is_another(owner(2, 2)));
        for (a, b) in [(owner(1, 2), owner(1, 2)), (owner(0, 0), owner(1, 2)), (owner(1, 2), owner(0, 0))] {
            assert!(!a.is_another(b), "{a} and {b}");
        }
    }

    #[test]
    fn descriptions_come_back_and_garbage_is_an_error() {
        let chunk =
            |number: u32| RemoteChunk { address: u64::from(number) << 40, len_bytes: 1 << 30, key: number };
        let readable = |by_push| {
            let chunks = (0..7).map(chunk).collect();
            Described::Readable { segment: 5, chunks, by_push }
        };
        let others = [Described::Gone, Described::Local { segment: 9 }, Described::All];
        for of in others.into_iter().chain([readable(false), readable(true)]) {
            let bytes = describe(RemoteKey(77), &of);
            assert!(is_description(&bytes));
            assert_eq!(described(&bytes).expect("whole"), (RemoteKey(77), of));
            for len in 0..bytes.len() {
                assert!(described(&bytes[..len]).is_err(), "cut at {len}");
            }
            assert!(described(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn pushes_come_back_and_garbage_is_an_error() {
        let from = RemoteExtent { key: RemoteKey(1 << 60 | 5), offset: 1 << 40 | 3, len_bytes: 1 << 33 | 1 };
        let ask = PushAsk { number: 0x0102_0304, from, address: 0x7f00_1234_5678_9abc, key: 0x8070_6050 };
        for said in [PushSaid::Ask(ask), PushSaid::Refused { number: 7 }] {
            let bytes = said.to_bytes();
            assert_eq!(PushSaid::parse(&bytes), Ok(said));
            assert!((0..bytes.len()).all(|len| PushSaid::parse(&bytes[..len]).is_err()));
            assert!(PushSaid::parse(&[&bytes[..], &[0]].concat()).is_err());
            for at in [0, 7] {
                let mut wrong = bytes;
                wrong[at] ^= 0x55;
                assert!(PushSaid::parse(&wrong).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn an_extent_is_found_across_chunks() {
        let chunks = [(1000, 100, 1), (5000, 50, 2), (9000, 10, 3)];
        let chunks = chunks.map(|(address, len_bytes, key)| RemoteChunk { address, len_bytes, key }).to_vec();
        let all = Described::Readable { segment: 1, chunks, by_push: false };
        let extent = |offset, len_bytes| RemoteExtent { key: RemoteKey(1), offset, len_bytes };
        let found = stretches(&all, extent(90, 65)).expect("inside");
        let found: Vec<_> = found.iter().map(|chunk| (chunk.address, chunk.len_bytes, chunk.key)).collect();
        assert_eq!(found, [(1090, 10, 1), (5000, 50, 2), (9000, 5, 3)]);
        assert_eq!(stretches(&all, extent(100, 50)).expect("inside").len(), 1);
        assert!(stretches(&all, extent(160, 0)).expect("at the end").is_empty());
        for (offset, len_bytes) in [(0, 161), (160, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let error = stretches(&all, extent(offset, len_bytes)).expect_err("outside");
            assert!(error.to_string().contains("160 bytes"), "{error}");
        }
        assert!(stretches(&Described::Local { segment: 1 }, extent(0, 1)).is_err());
    }
}
