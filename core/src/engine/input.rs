//! What comes into the engine, and its configuration. Not where it comes from. Invariant: none.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::receipt::Moved;
use crate::tier::{ClientId, Generation, LandingId, LinkId, RemoteKey, SegmentId, SlotId, Tier, TransferId};
use crate::wire::{Batch, ClientMessage, Member, PeerMessage, PutHints};

/// Objects up to this many bytes come inside the answer, until something better is known (one more round
/// trip of 2 to 5 us costs as much as copying 16 to 59 KiB at 8 to 12 GB/s).
pub const THRESHOLD_DEFAULT: u64 = 32 * 1024;

/// The least time that a request waits for a directory, in milliseconds.
const AWAIT_MS_MIN: u64 = 5_000;

/// Which of the node's fabrics; the node numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FabricId(pub u8);

/// Generations that live clients pin, collected from their pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pinned(Vec<Generation>);

impl FromIterator<Generation> for Pinned {
    fn from_iter<I: IntoIterator<Item = Generation>>(pinned: I) -> Self {
        Self::from(pinned.into_iter().collect::<Vec<_>>())
    }
}

impl From<Vec<Generation>> for Pinned {
    fn from(mut pinned: Vec<Generation>) -> Self {
        pinned.sort_unstable();
        Self(pinned)
    }
}

impl Pinned {
    /// To be asked about generations in rising order.
    pub(super) fn rising(&self) -> Rising<'_> {
        Rising(&self.0)
    }
}

/// What of the pinned generations is not below the last one that was asked about.
pub(super) struct Rising<'a>(&'a [Generation]);

impl Rising<'_> {
    /// Whether a generation, not below the one before, is pinned.
    pub(super) fn contains(&mut self, generation: Generation) -> bool {
        while let [first, rest @ ..] = self.0
            && *first < generation
        {
            self.0 = rest;
        }
        self.0.first() == Some(&generation)
    }
}

/// What the engine knows of a fabric.
#[derive(Clone, Debug)]
pub struct FabricUse {
    /// Its number in [`Input::LinkUp`].
    pub id: FabricId,
    /// Its name, for receipts and status.
    pub name: Arc<str>,
    /// The index, registered with it.
    pub index_key: RemoteKey,
    /// How many extents one send of it may gather.
    pub gather_max: usize,
    /// The GPU tiers whose segments it can be given as the target of reads. What is wanted in another one lands in host
    /// memory, and is copied from there.
    pub tiers: Vec<Tier>,
    /// Whether bytes of a GPU pass through host memory on this fabric, a part of them at a time. They are read then, out of
    /// a GPU and into it, but they are no payload: what is small is copied by the GPU for all who ask at once.
    pub stages_gpus: bool,
}

/// One GPU's memory, as far as the store may use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuUse {
    /// The N of its tier, `gpu:N`.
    pub ordinal: u16,
    /// What the device is called by everybody: `GPU-` and a UUID.
    pub uuid: Arc<str>,
    /// Bytes of the tier.
    pub capacity_bytes: u64,
    /// The most bytes of it in segments granted to one client.
    pub client_quota_bytes: u64,
    /// What the length of a segment is a multiple of, in bytes: the driver's granularity.
    pub granule_bytes: u64,
}

/// What an engine is told once.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// This node.
    pub member: Member,
    /// Where the nodes listen that may keep the directory, in order, this one included if it is one of them; none if
    /// this one keeps it alone.
    pub join: Vec<String>,
    /// Bytes of the host tier.
    pub capacity_bytes: u64,
    /// The most bytes of it in segments granted to one client.
    pub client_quota_bytes: u64,
    /// The GPU tiers, and, for whoever asks for one that is not among them, why there are no others.
    pub gpus: Vec<GpuUse>,
    /// As a sentence without a full stop.
    pub why_no_gpu: Arc<str>,
    /// Slots of the shared index.
    pub objects_max: u32,
    /// The fabrics that this node has.
    pub fabrics: Vec<FabricUse>,
    /// Where slot 0's generation word is in the index, in bytes.
    pub generation_base: u64,
    /// Bytes from one slot's generation word to the next.
    pub generation_stride: u64,
    /// The eager threshold, in bytes, if it is forced.
    pub threshold_bytes: Option<u64>,
    /// How long a remote reader may take, in milliseconds.
    pub lease_ms: u32,
    /// How often nodes say that they are alive, in milliseconds; five missed ones are a death.
    pub heartbeat_ms: u64,
}

impl EngineConfig {
    /// What is known of one of the node's fabrics.
    pub(super) fn fabric(&self, id: FabricId) -> Option<&FabricUse> {
        self.fabrics.iter().find(|fabric| fabric.id == id)
    }

    /// How long a node of the list is missed before the next one takes its place, in milliseconds.
    pub(super) const fn missed_ms(&self) -> u64 {
        self.heartbeat_ms.saturating_mul(super::links::MISSED_MAX)
    }

    /// How long a request waits for a directory, in milliseconds: so long that one is there again after the node that
    /// kept it has died.
    pub(super) const fn await_ms(&self) -> u64 {
        let several = self.missed_ms().saturating_mul(4);
        if several > AWAIT_MS_MIN { several } else { AWAIT_MS_MIN }
    }
}

/// An object that a client has put without asking: it wrote the bytes into memory granted ahead, and said so in its
/// publication ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutAhead {
    /// The number of the chunk that the bytes are in.
    pub chunk: u64,
    /// Where in the chunk they start, in bytes.
    pub offset: u64,
    /// Its name.
    pub key: Key,
    /// What its bytes mean.
    pub meta: ObjectMeta,
    /// Its future.
    pub hints: PutHints,
}

/// How far a client has got with its publication ring. Positions count the objects that it has begun to put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// The number of the chunk that it uses, or used last; 0 if it never had one.
    pub chunk: u64,
    /// Whether it may go on with it.
    pub open: bool,
    /// Begun before this position.
    pub head: u64,
    /// All that was begun before this position has been taken in.
    pub tail: u64,
}

/// What a read has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadEnd {
    /// Its bytes.
    pub moved: Moved,
    /// The word, if one was wanted: as the owner's memory held it after the last byte was read there.
    pub word: Option<u64>,
    /// Trips to the owner and back that followed one another.
    pub round_trips: u32,
    /// Whether the owner has written the bytes, rather than that this node read them.
    pub pushed: bool,
}

/// What happened.
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants say what happened, their fields are named as in `Action`")]
pub enum Input {
    /// The first input.
    Start,
    /// Time has passed.
    Tick,

    /// A client has connected. A trusted one runs inside the node's process.
    ClientJoined { client: ClientId, trusted: bool },
    /// A client asks.
    ClientRequest { client: ClientId, request: u64, message: ClientMessage, payload: Bytes },
    /// What a client's publication ring held. Comes before every input whose answer could be that an object is not
    /// there, and once more before `ClientLeft`.
    PutsAhead { client: ClientId, puts: Vec<PutAhead>, ring: RingState },
    /// The answer to `Action::GrantAhead` and `Action::RecallAhead`.
    AheadChanged { client: ClientId, ring: RingState },
    /// A client's session has ended; its page is no longer looked at.
    ClientLeft { client: ClientId },
    /// The process of a client that left has ended: nobody can write to its segments any more.
    ClientProcessGone { client: ClientId },

    /// A connection can be used. `address` is what was dialled, or where the peer comes from.
    LinkUp { link: LinkId, fabric: FabricId, address: String, inbound: bool },
    /// A connection has ended; nothing is read or sent through it any more.
    LinkDown { link: LinkId, why: StoreError },
    /// `Action::Connect` came to nothing.
    ConnectFailed { address: String, why: StoreError },
    /// A peer says something. If `payload_len` is not 0, the answer, or that to the `PinScan` that it asks for,
    /// may hold one `Action::Land` for it.
    PeerMessage { link: LinkId, request: u64, message: PeerMessage, payload_len: u64 },
    /// The same for several in one frame, with the bytes of all their payloads. There may be many `Action::Land`.
    PeerBatch { link: LinkId, batch: Batch, payload_len: u64 },
    /// A peer sent something that is no message.
    Refused { link: LinkId, why: StoreError },
    /// What `Action::Land` wanted of a payload is in its places, or never will be. `Moved` is about the payload: how
    /// many of its bytes landed, and how many at its start passed through a third buffer, skipped ones included.
    Landed { landing: LandingId, result: Result<Moved, StoreError> },
    /// A read has ended; no more bytes land.
    ReadDone { transfer: TransferId, result: Result<ReadEnd, StoreError> },
    /// The payload of a send is no longer read from its extents.
    SendDone { send: u64 },

    /// The answer to `Action::ScanPins`: every generation that a live client pins, and slots that were read.
    PinScan { pinned: Pinned, touched: Vec<SlotId> },
    /// A segment is there, registered under these keys.
    SegmentReady { segment: SegmentId, keys: Vec<(FabricId, RemoteKey)> },
    /// A segment could not be made.
    SegmentFailed { segment: SegmentId, why: StoreError },
    /// `Action::Copy` has ended.
    CopyDone { generation: Generation, result: Result<(), StoreError> },
}
