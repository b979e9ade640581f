//! What the engine wants done. Not how. Invariant: actions are carried out in the order in which they come.

use bytes::Bytes;

use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::tier::{
    ClientId, Extent, Generation, LandingId, LinkId, NodeId, ObjectId, RemoteExtent, SegmentId, SlotId, Tier,
    TransferId,
};
use crate::wire::{Batch, ClientReply, Located, PeerMessage};

/// A descriptor that travels beside a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// The index and the client's page.
    Session,
    /// A segment, read-only or (granted, not yet mapped) writable.
    Segment(SegmentId),
    /// The client's publication ring, and a granted segment that is not mapped yet, in this order.
    Ahead {
        /// None if the client maps it.
        segment: Option<SegmentId>,
        /// Whether the client lacks the ring.
        ring: bool,
    },
}

/// What the shared index says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedObject {
    /// Its name.
    pub key: Key,
    /// Which object of that name.
    pub object: ObjectId,
    /// What its bytes mean.
    pub meta: ObjectMeta,
    /// The extent's generation.
    pub generation: Generation,
    /// Where the bytes are.
    pub extent: Extent,
    /// The tier of the extent's segment.
    pub tier: Tier,
}

/// The payload of a send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Repeated in `Input::SendDone`.
    pub send: u64,
    /// Where the bytes are, in their order; never none, and as many as the fabric gathers at most.
    pub extents: Vec<Extent>,
}

impl Payload {
    /// Bytes of all of it.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len_bytes).sum()
    }
}

/// Something for logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants say what happened")]
pub enum Event {
    PeerUp { node: NodeId, name: String, address: String },
    PeerDown { node: NodeId, name: String, why: String },
    DirectoryLost { why: String },
    DirectoryFound,
    DirectoryTaken,
    DirectoryHandedOver { to: String },
    UnderReplicated { objects: u64 },
    Healed,
    Evicted { objects: u64, len_bytes: u64 },
    ClientLeft { client: ClientId, reservations: usize },
    PeerRefused { link: LinkId, why: String },
    SegmentFailed { segment: SegmentId, why: String },
    SegmentGranted { segment: SegmentId, client: ClientId, len_bytes: u64 },
    SegmentRetired { segment: SegmentId, len_bytes: u64 },
}

/// What is to be done.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields are the types' own words")]
pub enum Action {
    /// Answer a client.
    Reply {
        client: ClientId,
        request: u64,
        reply: Result<ClientReply, StoreError>,
        attachment: Option<Attachment>,
    },
    /// Pin the generation in the client's page, put the place into `located.pin`, and answer with it; `Busy` if the
    /// page is full.
    PinAndReply { client: ClientId, request: u64, located: Located },
    /// One key of a request for many: pin what is located, as in `PinAndReply`, and keep it, or why there is nothing,
    /// until `ReplyItems`, or until the client has left.
    Item { client: ClientId, request: u64, item: u32, located: Result<Located, StoreError> },
    /// Answer with the items that were kept: all of them, `count`, in order.
    ReplyItems { client: ClientId, request: u64, count: u32 },
    /// End a session that broke the protocol.
    CloseClient { client: ClientId, why: StoreError },

    /// Write these bytes at the extent's start. The extent is in host memory.
    Fill { extent: Extent, bytes: Bytes },
    /// Copy between extents of equal length, of whichever tiers; `Input::CopyDone` follows.
    Copy { generation: Generation, from: Extent, to: Extent },
    /// Show an object in the shared index.
    Publish { slot: SlotId, object: PublishedObject },
    /// Take it out; the generation word changes before this ends.
    Withdraw { slot: SlotId },
    /// Let a client publish objects in a chunk, once it is through with the one that it has, and answer it.
    /// `AheadChanged` follows at once, before any other input; with an empty `RingState`, and another answer, if there
    /// can be no ring.
    GrantAhead { client: ClientId, request: u64, chunk: u64, reply: ClientReply, attachment: Attachment },
    /// Let a client begin no more puts in what it was granted; `AheadChanged` follows at once, before any other input.
    RecallAhead { client: ClientId },
    /// Look at every live client's pins; `Input::PinScan` follows at once, before any other input.
    ScanPins,

    /// Make a segment of a tier; `SegmentReady` or `SegmentFailed` follows.
    CreateSegment { segment: SegmentId, tier: Tier, len_bytes: u64, owner: Option<ClientId> },
    /// No new writable mapping of a granted segment from now on, where its tier has a way to see to that.
    CloseToWriters { segment: SegmentId },
    /// Deregister and release a segment. Nothing is in it.
    RetireSegment { segment: SegmentId, len_bytes: u64 },

    /// Connect to a peer; `LinkUp` or `ConnectFailed` with this address follows.
    Connect { address: String },
    /// End a connection; `LinkDown` follows.
    Disconnect { link: LinkId },
    /// Send a message. `SendDone` with the payload's number follows if there is one.
    Send { link: LinkId, request: u64, message: PeerMessage, payload: Option<Payload> },
    /// The same for several in one frame.
    SendBatch { link: LinkId, batch: Batch, payload: Option<Payload> },
    /// Let a part of the payload of the frame that is being handled, from this byte on, go here; this may come in
    /// answer to the `PinScan` that the frame led to. No two parts overlap. One `Landed` follows for all that have the
    /// same number.
    Land { landing: LandingId, start: u64, extent: Extent },
    /// Read from a peer: bytes into an extent as long, and after the last of them the 8 bytes that hold a generation;
    /// either may be missing. Exactly one `ReadDone` follows.
    Read {
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: Option<RemoteExtent>,
    },
    /// Make a read end soon; its `ReadDone` still follows.
    CancelRead { transfer: TransferId },

    /// For logs and metrics.
    Note(Event),
}
