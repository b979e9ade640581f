//! What callers may choose, and what they learn. Not defaults of the node. Invariant: `Default` is what most want.

use std::path::PathBuf;
use std::time::Duration;

use hetmem_core::receipt::Receipt;
use hetmem_core::wire::{IfExists, PutHints, Range};
use hetmem_core::{ObjectId, ObjectMeta, Tier, TierHint};

/// How long an operation may take unless its caller says otherwise.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// How to reach a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The node's socket; [`crate::default_socket`] if none.
    pub socket: Option<PathBuf>,
    /// How long an operation may take that has no timeout of its own (30 s).
    pub timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { socket: None, timeout: TIMEOUT }
    }
}

/// How to get an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetOptions {
    /// How long a get from another node may take (30 s).
    pub timeout: Duration,
    /// Keep a copy that came from another node, for later readers here (true).
    pub keep: bool,
    /// The part of the object wanted; all of it if none.
    pub range: Option<Range>,
    /// Compare the bytes with their checksum before they are handed out (false). A part has no checksum of its own.
    pub verify: bool,
    /// Objects up to this many bytes may come inside a peer's answer; 0 reads always, `u64::MAX` never; none: as the
    /// node has measured (none).
    pub threshold_bytes: Option<u64>,
    /// Whether bytes may pass through a buffer that is neither source nor target (they may).
    pub zero_copy: ZeroCopy,
}

/// What a call does where bytes would have to pass through a buffer that is neither source nor target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// It lets them.
    #[default]
    Preferred,
    /// It fails with [`hetmem_core::ErrorKind::Unavailable`] and the reason.
    Required,
}

impl GetOptions {
    /// The threshold that a question names.
    pub(crate) fn threshold(&self) -> Option<u64> {
        match self.zero_copy {
            // What comes inside an answer may share a buffer with it; what is read lands where it belongs.
            ZeroCopy::Required => Some(0),
            ZeroCopy::Preferred => self.threshold_bytes,
        }
    }
}

impl Default for GetOptions {
    fn default() -> Self {
        Self {
            timeout: TIMEOUT,
            keep: true,
            range: None,
            verify: false,
            threshold_bytes: None,
            zero_copy: ZeroCopy::Preferred,
        }
    }
}

/// How to put an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutOptions {
    /// What if the key exists (keep what is there).
    pub if_exists: IfExists,
    /// Never evict it (false).
    pub pin: bool,
    /// Let it be evicted when room is needed, even if no other node holds it (false: what was put stays).
    pub cache: bool,
    /// Drop it this long after it was sealed (never).
    pub ttl: Option<Duration>,
    /// Move the bytes at seal to memory that this process cannot write (false).
    pub seal_copy: bool,
    /// Where it is to be on this node (where it is written). Bytes of host memory are moved to a GPU at seal, which
    /// counts as staging.
    pub tier: Option<TierHint>,
    /// On how many nodes it is to be, this one included, from 1 to [`crate::REPLICAS_MAX`] (1). The put
    /// returns when they hold it, or after ten seconds with as many as could be reached, which the outcome tells; the
    /// rest is made later. Not for a cache.
    pub replicas: u8,
    /// Store a checksum of the bytes (true). Without one nobody can verify them.
    pub checksum: bool,
    /// Whether bytes may pass through a buffer that is neither source nor target (they may, and short ones do).
    pub zero_copy: ZeroCopy,
    /// How long each step may take (30 s).
    pub timeout: Duration,
}

impl Default for PutOptions {
    fn default() -> Self {
        Self {
            if_exists: IfExists::Keep,
            pin: false,
            cache: false,
            ttl: None,
            seal_copy: false,
            tier: None,
            replicas: 1,
            checksum: true,
            zero_copy: ZeroCopy::Preferred,
            timeout: TIMEOUT,
        }
    }
}

impl PutOptions {
    pub(crate) fn hints(&self) -> PutHints {
        let millis = |ttl: Duration| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        PutHints {
            pin: self.pin,
            cache: self.cache,
            ttl_ms: self.ttl.map(millis),
            seal_copy: self.seal_copy,
            replicas: self.replicas,
            tier: self.tier,
        }
    }
}

/// What a put has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutOutcome {
    /// Which object has the key now; none if the node was not asked.
    pub object: Option<ObjectId>,
    /// Whether an object was there and has been kept. False where the node was not asked: then it is not known.
    pub kept: bool,
    /// On how many nodes it is for good, as far as is known: fewer than were asked for if not so many could be reached.
    pub replicas: u32,
    /// How the bytes came to their place.
    pub receipt: Receipt,
}

/// What is known about an object without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Which object has the key.
    pub object: ObjectId,
    /// What its bytes mean.
    pub meta: ObjectMeta,
    /// Its tier on this node, if it is here.
    pub tier: Option<Tier>,
    /// Whether this node never evicts it.
    pub pinned: bool,
    /// Names of the nodes that hold it, where known.
    pub holders: Vec<String>,
}
