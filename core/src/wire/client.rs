//! What a client and its node say to each other over the Unix socket. Not the socket, and not the descriptors that
//! travel beside a reply. Invariant: every answer is a `Result<ClientReply, StoreError>` with the question's number.

use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::receipt::{Carried, Path};
use crate::tier::{ClientId, Epoch, Extent, Generation, NodeId, ObjectId, SegmentId, SlotId, Tier, TierHint};
use crate::wire::list::at_most;
use crate::wire::{KEYS_PER_MESSAGE_MAX, LocatedMany, Range};

/// What a put does when its key exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IfExists {
    /// The object that is there stays, and the put succeeds: the bytes of an immutable object under one key are
    /// one value.
    #[default]
    Keep,
    /// The put fails with `AlreadyExists`. Asks the directory first, which costs a round trip between nodes.
    Error,
}

/// The most nodes that one object can be put on.
pub const REPLICAS_MAX: u8 = 16;

/// What the producer knows about an object's future.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutHints {
    /// Never evict it.
    pub pin: bool,
    /// It may be evicted when room is needed, even if no other node holds it. Without this hint only copies of what
    /// another node holds are evicted: what was put stays until it is deleted.
    pub cache: bool,
    /// Drop it this many milliseconds after it was sealed.
    pub ttl_ms: Option<u64>,
    /// Move the bytes to memory that the producer cannot write, at seal.
    pub seal_copy: bool,
    /// On how many nodes it is to be, from 1 (this one) to [`REPLICAS_MAX`].
    pub replicas: u8,
    /// Where it is to be on this node; none: where its bytes are written.
    pub tier: Option<TierHint>,
}

impl Default for PutHints {
    fn default() -> Self {
        Self { pin: false, cache: false, ttl_ms: None, seal_copy: false, replicas: 1, tier: None }
    }
}

impl PutHints {
    /// Checks that the hints can be met together.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] with the values.
    pub fn check(&self, key: &Key) -> Result<(), StoreError> {
        let replicas = self.replicas;
        if !(1..=REPLICAS_MAX).contains(&replicas) {
            let why = format!("put {key:?}: {replicas}, from 1 to {REPLICAS_MAX} are accepted");
            return Err(StoreError::invalid("replicas", why));
        }
        if self.cache && replicas > 1 {
            let why =
                format!("put {key:?}: {replicas} for a cache: what may be evicted is kept on no other node");
            return Err(StoreError::invalid("replicas", why));
        }
        Ok(())
    }
}

/// From a client to its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// First message. Answered by `Welcome` with the descriptors of the index and of the client's own page.
    Hello {
        /// The oldest protocol version the client speaks.
        version_min: u16,
        /// The newest.
        version_max: u16,
    },
    /// Stores a small object: its bytes are the payload. Answered by `Sealed`.
    Put {
        /// Its name.
        key: Key,
        /// What the bytes mean, with their checksum.
        meta: ObjectMeta,
        /// Its future.
        hints: PutHints,
        /// What if the key exists.
        if_exists: IfExists,
    },
    /// Asks for memory to write an object into. Answered by `Reserved` or, if the key exists and is kept, `Sealed`.
    Reserve {
        /// Its name.
        key: Key,
        /// What the bytes will mean; the checksum comes with `Seal`.
        meta: ObjectMeta,
        /// Its future.
        hints: PutHints,
        /// What if the key exists.
        if_exists: IfExists,
        /// The tier of the memory that the client wants to write it into. Elsewhere than `hints.tier`, it is moved at
        /// seal.
        writes: Tier,
    },
    /// The client has mapped a granted segment writable; the node may close it to other writers. Answered by `Done`.
    Mapped {
        /// Which.
        segment: SegmentId,
    },
    /// Writes the payload into a reservation whose memory the client does not map. Answered by `Done`.
    Write {
        /// Which reservation.
        reservation: Generation,
        /// Where in it, in bytes.
        offset: u64,
    },
    /// The reserved bytes are complete. Answered by `Sealed`.
    Seal {
        /// Which reservation.
        reservation: Generation,
        /// Over the bytes written.
        checksum: Checksum,
    },
    /// Gives a reservation up. Answered by `Done`.
    Abort {
        /// Which.
        reservation: Generation,
    },
    /// Asks for an object that the index does not show. Answered by `Located`.
    Get {
        /// Which.
        key: Key,
        /// The part of it; all of it if none.
        range: Option<Range>,
        /// How long to try, in milliseconds.
        timeout_ms: u64,
        /// Keep a copy that came from another node, for later readers here.
        keep: bool,
        /// Objects up to this many bytes may come inside the peer's answer; none: as the node thinks best.
        threshold_bytes: Option<u64>,
        /// Where the bytes are wanted on this node; none: where they are, or come to.
        tier: Option<TierHint>,
    },
    /// Asks for the descriptor of a segment, read-only. Answered by `Segment`.
    Segment {
        /// Which.
        segment: SegmentId,
    },
    /// A granted segment that the client no longer maps. Answered by `Done`.
    Return {
        /// Which.
        segment: SegmentId,
    },
    /// Answered by `Exists` when an object of this key exists anywhere, or `TimedOut`.
    Wait {
        /// Which.
        key: Key,
        /// How long, in milliseconds; 0 asks once.
        timeout_ms: u64,
    },
    /// Answered by `Stat`.
    Stat {
        /// Which.
        key: Key,
        /// How long to try, in milliseconds.
        timeout_ms: u64,
    },
    /// Answered by `Listed`.
    List {
        /// Keys that start with this; may be empty.
        prefix: String,
        /// Continue after this key.
        after: Option<Key>,
        /// The most keys wanted.
        limit: u32,
    },
    /// Deletes an object on every node. Answered by `Deleted`.
    Delete {
        /// Which.
        key: Key,
    },
    /// Sets or clears the `pin` hint of an object on this node. Answered by `Done`.
    Pin {
        /// Which.
        key: Key,
        /// Whether it is never evicted from now on.
        pin: bool,
    },
    /// Drops this node's copy of an object that has another holder, or any copy with `force`. Answered by `Done`.
    Evict {
        /// Which.
        key: Key,
        /// Even the last copy.
        force: bool,
    },
    /// Answered by `Status`.
    Status,
    /// Asks for memory to publish objects in without asking. Answered by `Ahead`.
    Ahead {
        /// Whether the client lacks its publication ring.
        ring: bool,
    },
    /// There are records in the client's publication ring. Not answered if its request is 0; else by `Done`.
    Drain,
    /// Asks for many objects. Answered by `LocatedMany` once each of them is there or cannot be had, in as many
    /// answers as it takes packets.
    GetMany {
        /// Which: 1 to [`KEYS_PER_MESSAGE_MAX`].
        #[serde(deserialize_with = "at_most::<_, _, KEYS_PER_MESSAGE_MAX>")]
        keys: Vec<Key>,
        /// As of `Get`.
        timeout_ms: u64,
        /// As of `Get`.
        keep: bool,
        /// As of `Get`.
        threshold_bytes: Option<u64>,
        /// As of `Get`.
        tier: Option<TierHint>,
    },
}

impl ClientMessage {
    /// The operation's name in errors and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Put { .. } => "put",
            Self::Reserve { .. } => "reserve",
            Self::Mapped { .. } => "mapped",
            Self::Write { .. } => "write",
            Self::Seal { .. } => "seal",
            Self::Abort { .. } => "abort",
            Self::Get { .. } => "get",
            Self::Segment { .. } => "segment",
            Self::Return { .. } => "return",
            Self::Wait { .. } => "wait",
            Self::Stat { .. } => "stat",
            Self::List { .. } => "list",
            Self::Delete { .. } => "delete",
            Self::Pin { .. } => "pin",
            Self::Evict { .. } => "evict",
            Self::Status => "status",
            Self::Ahead { .. } => "ahead",
            Self::Drain => "drain",
            Self::GetMany { .. } => "get many",
        }
    }
}

/// Where an object is on this node, already pinned for the client that asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Located {
    /// Which object of the key.
    pub object: ObjectId,
    /// What the bytes mean; of the whole object.
    pub meta: ObjectMeta,
    /// The bytes asked for.
    pub extent: Extent,
    /// The tier of the extent's segment.
    pub tier: Tier,
    /// The extent's generation.
    pub generation: Generation,
    /// The place in the client's page where the node has pinned the generation. The client clears it when done.
    pub pin: u32,
    /// How the bytes came here.
    pub path: Path,
    /// The tier of this node that they were copied from, for this get; none if they are where they have been or came to.
    pub copied_from: Option<Tier>,
    /// More about that, if they came from a peer for this get.
    pub carried: Option<Box<Carried>>,
}

/// One object in a list or a stat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its name.
    pub key: Key,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Names of the nodes that hold it, where known.
    pub holders: Vec<String>,
}

/// GPU tiers of one node, at most.
pub const GPUS_MAX: usize = 64;

/// A GPU tier, for those who number devices in another way than the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuTier {
    /// The N of its tier, `gpu:N`.
    pub ordinal: u16,
    /// The device's own name: `GPU-` and a UUID in hexadecimal.
    pub uuid: String,
}

/// A tier's books.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierStatus {
    /// Which.
    pub tier: Tier,
    /// All its bytes.
    pub capacity_bytes: u64,
    /// Bytes in objects and reservations.
    pub used_bytes: u64,
    /// Bytes granted to clients ahead, in which nothing was put yet.
    pub ahead_bytes: u64,
    /// Bytes in segments that belong to one client.
    pub granted_bytes: u64,
    /// Segments.
    pub segments: u32,
    /// One minus the largest free piece over all free bytes, in percent.
    pub fragmentation_percent: u32,
    /// What pages the memory is on, in words.
    pub pages: String,
}

/// A peer as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Which node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Whether there is a link to it now.
    pub linked: bool,
    /// How long an answer from it takes, in nanoseconds, lately; none if it was not measured.
    pub round_trip_ns: Option<u64>,
    /// Bytes that it has room for, as it last said; none if it did not.
    pub room_bytes: Option<u64>,
    /// Which fabric carries that link.
    pub fabric: String,
    /// Objects up to this many bytes come inside the answer.
    pub threshold_bytes: u64,
    /// Why the threshold is what it is.
    pub threshold_why: String,
    /// Longer objects are read where they were found before, without a question.
    pub known_from_bytes: u64,
    /// Why it is that many.
    pub known_from_why: String,
}

/// Counters since the node started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Objects sealed here by clients.
    pub puts: u64,
    /// Of these, those that were put without asking.
    pub ahead: u64,
    /// Gets that a client answered itself from the index.
    pub hits: u64,
    /// Gets that asked the node.
    pub gets: u64,
    /// Gets answered by DATA from a peer.
    pub eager: u64,
    /// Gets answered by Read from a peer.
    pub read: u64,
    /// Gets that failed.
    pub failed: u64,
    /// Objects evicted.
    pub evicted: u64,
    /// DATA sent to peers.
    pub served_eager: u64,
    /// GRANT sent to peers.
    pub served_grants: u64,
    /// Frames or sessions refused because of what they sent.
    pub refused: u64,
    /// Of the gets answered by Read: those of a place that was known, with no question to anybody.
    pub known: u64,
    /// Places that were tried so and had been given up by then: the object was asked for after all.
    pub outdated: u64,
    /// Objects of which this node was made to hold a replica.
    pub replicas: u64,
    /// Times that a peer was dialled over TCP because RDMA did not reach it.
    pub fallbacks: u64,
    /// Objects that were moved to a GPU because that had read them again.
    pub promoted: u64,
    /// Objects that were moved from a GPU to host memory because that had too little room.
    pub demoted: u64,
}

/// A node's view of itself and its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// This node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Where its fabric listens.
    pub address: String,
    /// Whether it keeps the directory.
    pub keeps_directory: bool,
    /// The name of the node that keeps it, if there is one and it can be reached.
    pub directory: Option<String>,
    /// Objects that are on fewer nodes than they are to be; elsewhere than where the directory is kept, as that node
    /// last said.
    pub under_replicated: u64,
    /// The first few of them, in order of keys; only where the directory is kept.
    pub under_replicated_keys: Vec<Key>,
    /// Objects in its index.
    pub objects: u64,
    /// Objects withdrawn but still read by someone.
    pub draining: u64,
    /// Reservations not yet sealed.
    pub reservations: u64,
    /// Leases out to peers.
    pub leases: u64,
    /// Connected clients.
    pub clients: u32,
    /// Its tiers.
    pub tiers: Vec<TierStatus>,
    /// Its peers.
    pub peers: Vec<PeerStatus>,
    /// Its counters.
    pub counters: NodeStatus,
}

/// From a node to its client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientReply {
    /// To `Hello`, with two descriptors: the index (read-only) and the client's page (writable).
    Welcome {
        /// The version both will speak.
        version: u16,
        /// The session.
        client: ClientId,
        /// The node's name.
        node: String,
        /// Slots that the index has room for, which fixes its layout.
        objects_max: u32,
        /// Puts up to this many bytes go inside `Put`.
        inline_put_max: u32,
        /// The node's GPU tiers.
        #[serde(deserialize_with = "at_most::<_, _, GPUS_MAX>")]
        gpus: Vec<GpuTier>,
    },
    /// To `Reserve`.
    Reserved {
        /// Names the reservation.
        reservation: Generation,
        /// Where to write.
        extent: Extent,
        /// The tier of that: host memory, if there was no room in the one that was asked for and that was allowed.
        tier: Tier,
        /// Bytes of the extent's segment if the client may map it writable; with its descriptor the first time,
        /// after which the client must answer `Mapped` before it seals. `None`: use `Write`.
        map: Option<u64>,
    },
    /// To `Put` and `Seal`: the object can be read by everyone.
    Sealed {
        /// Which object has the key now.
        object: ObjectId,
        /// Whether the object that was there was kept.
        kept: bool,
        /// Where it is in the index of this node, if it is here.
        slot: Option<SlotId>,
        /// The tier that it is in on this node.
        tier: Tier,
        /// How the bytes came to their place.
        path: Path,
        /// Bytes of it that passed through a buffer that is neither source nor target.
        staged_bytes: u64,
        /// On how many nodes it is for good, as far as this one knows.
        replicas: u32,
    },
    /// Nothing to say.
    Done,
    /// To `Get`.
    Located(Located),
    /// To `Segment`, with one descriptor.
    Segment {
        /// Bytes of it.
        len_bytes: u64,
        /// Its tier.
        tier: Tier,
        /// Segments that this client has asked for before and that are no more: while it maps them, their memory is
        /// not free.
        retired: Vec<SegmentId>,
    },
    /// To `Wait`.
    Exists,
    /// To `Stat`.
    Stat {
        /// Which object has the key.
        object: ObjectId,
        /// What its bytes mean.
        meta: ObjectMeta,
        /// The tier here, if it is here.
        tier: Option<Tier>,
        /// The `pin` hint here.
        pinned: bool,
        /// Names of the nodes that hold it, where known.
        holders: Vec<String>,
    },
    /// To `List`.
    Listed {
        /// In order of keys.
        objects: Vec<Listed>,
        /// Whether there are more.
        more: bool,
    },
    /// To `Delete`.
    Deleted {
        /// Whether there was one.
        existed: bool,
    },
    /// To `Status`.
    Status(Box<Status>),
    /// To `Ahead`: with the descriptor of the publication ring if it was asked for, then that of the segment until the
    /// client has answered `Mapped`, as with `Reserved`.
    Ahead {
        /// The chunk's number among those of this client.
        chunk: u64,
        /// Where it is.
        extent: Extent,
        /// How many objects may be put in it.
        objects: u32,
        /// Bytes of its segment.
        segment_len: u64,
        /// Whether the ring's descriptor comes along.
        ring: bool,
    },
    /// To `GetMany`.
    LocatedMany(LocatedMany),
}
