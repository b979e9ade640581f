//! What engines say to each other. Not how it travels. Invariant: every list has a limit that `check` enforces.

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::tier::{Epoch, Generation, LeaseId, NodeId, ObjectId, RemoteExtent};

/// Bytes of a number in a body at most.
const NUMBER_LEN_MAX: usize = 10;
/// The most keys that one message carries.
pub const KEYS_PER_MESSAGE_MAX: usize = 1024;

/// A part of an object's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// How many bytes.
    pub len_bytes: u64,
}

impl Range {
    /// Checks that this range lies inside an object of `len_bytes` bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] with the values.
    pub fn check(self, key: &Key, len_bytes: u64) -> Result<(), StoreError> {
        match self.start.checked_add(self.len_bytes) {
            Some(end) if end <= len_bytes => Ok(()),
            _ => Err(StoreError::invalid(
                "range",
                format!(
                    "get {key:?}: {} bytes from {} are not inside {len_bytes} bytes",
                    self.len_bytes, self.start
                ),
            )),
        }
    }
}

/// One object in an announcement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// The object's key.
    pub key: Key,
    /// Which object of that key.
    pub object: ObjectId,
    /// Its length in bytes.
    pub len_bytes: u64,
}

/// A node that holds an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node.
    pub node: NodeId,
    /// Where its fabric listens.
    pub address: String,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The name users gave it.
    pub name: String,
    /// Where its fabric listens.
    pub address: String,
}

/// An owner's permission to read an extent for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// What may be read: the asked range of the object.
    pub extent: RemoteExtent,
    /// The extent's generation while this object is in it.
    pub generation: Generation,
    /// Where the generation can be read (8 bytes), to tell whether the extent was reused.
    pub generation_at: RemoteExtent,
    /// Named when the reader is done.
    pub lease: LeaseId,
    /// How long the owner keeps the extent in place for this reader, in milliseconds from its answer.
    pub lease_ms: u32,
}

/// A message between two engines. The frame's request number ties an answer to its question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// First message on a link, both ways.
    Hello {
        /// Who speaks.
        member: Member,
        /// The oldest protocol version it speaks.
        version_min: u16,
        /// The newest.
        version_max: u16,
        /// Whether it wants to be in the cluster of the node it calls; that node keeps the directory.
        join: bool,
    },
    /// The directory's nodes, sent by the one that keeps it whenever they change.
    Members {
        /// All live nodes.
        members: Vec<Member>,
    },
    /// "I am alive", both ways on every link, for when nothing else is said.
    Heartbeat,

    /// Asks for an object, or for who holds it.
    Get {
        /// Which.
        key: Key,
        /// The part of it; all of it if none.
        range: Option<Range>,
        /// The longest payload that may come back inside the answer.
        inline_max: u64,
    },
    /// The object itself, as the frame's payload (eager).
    Data {
        /// Which object of the asked key.
        object: ObjectId,
        /// What the bytes mean; of the whole object, whatever range was asked.
        meta: ObjectMeta,
    },
    /// Permission to read the object (rendezvous).
    Grant {
        /// Which object of the asked key.
        object: ObjectId,
        /// What the bytes mean; of the whole object, whatever range was asked.
        meta: ObjectMeta,
        /// What may be read, and until when. Boxed: else every message had its length.
        granted: Box<Granted>,
    },
    /// The asked node does not hold the object, these do.
    Located {
        /// Never empty.
        holders: Vec<Holder>,
    },
    /// The reader is done with an extent.
    Release {
        /// From the grant.
        lease: LeaseId,
    },
    /// The answer to a question that could not be met.
    Failed {
        /// Why.
        error: StoreError,
    },

    /// To the directory: the sender holds these objects.
    Announce {
        /// At most [`KEYS_PER_MESSAGE_MAX`].
        objects: Vec<Announced>,
        /// Refuse keys under which another object is known, rather than keep both.
        exclusive: bool,
    },
    /// The directory's answer: what of an announcement is not to be kept.
    Announced {
        /// Keys under which another object is known: drop the announced one.
        refused: Vec<Key>,
    },
    /// To the directory: the sender no longer holds these objects.
    Withdraw {
        /// At most [`KEYS_PER_MESSAGE_MAX`].
        objects: Vec<Announced>,
    },
    /// From the directory to a node: do you hold this key? (Announcements may still be under way.)
    Ask {
        /// Which.
        key: Key,
    },
    /// The answer.
    Asked {
        /// The object, if the node holds it.
        object: Option<Announced>,
    },
    /// To the directory: tell me when an object of this key exists.
    Watch {
        /// Which.
        key: Key,
    },
    /// From the directory: an object of a watched key exists.
    Exists {
        /// Which.
        key: Key,
        /// Who holds it; never empty.
        holders: Vec<Holder>,
    },
    /// To the directory: delete an object everywhere.
    Delete {
        /// Which.
        key: Key,
    },
    /// From the directory to a holder: delete yours.
    Drop {
        /// Which.
        key: Key,
        /// The object meant; another object of the same key stays.
        object: ObjectId,
    },
    /// The answer to `Drop` and to `Delete`.
    Dropped {
        /// Whether there was one.
        existed: bool,
    },
    /// To the directory: the keys that start with `prefix`, in order, after `after`.
    List {
        /// May be empty.
        prefix: String,
        /// Continue after this key.
        after: Option<Key>,
        /// The most keys wanted, at most [`KEYS_PER_MESSAGE_MAX`].
        limit: u32,
    },
    /// The answer.
    Listed {
        /// In order of keys.
        objects: Vec<Announced>,
        /// Whether there are more.
        more: bool,
    },
}

impl PeerMessage {
    /// Checks what decoding alone does not: list lengths and metadata.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Protocol`] or the metadata's own error.
    pub fn check(&self) -> Result<(), StoreError> {
        let count = match self {
            Self::Data { meta, .. } | Self::Grant { meta, .. } => {
                meta.check()?;
                0
            }
            Self::Announce { objects, .. } | Self::Withdraw { objects } | Self::Listed { objects, .. } => {
                objects.len()
            }
            Self::Announced { refused } => refused.len(),
            Self::Members { members } => members.len(),
            Self::Located { holders } | Self::Exists { holders, .. } => {
                if holders.is_empty() {
                    return Err(StoreError::protocol("a list of holders is empty"));
                }
                holders.len()
            }
            _ => 0,
        };
        if count > KEYS_PER_MESSAGE_MAX {
            return Err(StoreError::protocol(format!(
                "a list of {count} entries, at most {KEYS_PER_MESSAGE_MAX} are accepted"
            )));
        }
        Ok(())
    }

    /// Bytes that it takes in a body at most, where that is known without encoding it: of the messages that come by the
    /// thousand.
    #[must_use]
    pub fn len_max(&self) -> Option<usize> {
        // The variant, an object's three numbers, and of metadata type, number of dimensions, length and checksum.
        const VARIANT: usize = 1;
        const OBJECT: usize = 3 * NUMBER_LEN_MAX;
        const META: usize = 2 + NUMBER_LEN_MAX + 1 + NUMBER_LEN_MAX;
        match self {
            // A length before the key, whether there is a range, and three numbers.
            Self::Get { key, .. } => Some(VARIANT + 2 + key.as_str().len() + 1 + 3 * NUMBER_LEN_MAX),
            Self::Data { meta, .. } => {
                Some(VARIANT + OBJECT + META + meta.shape.dims().len() * NUMBER_LEN_MAX)
            }
            Self::Release { .. } => Some(VARIANT + NUMBER_LEN_MAX),
            _ => None,
        }
    }

    /// A short name for logs and errors.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "HELLO",
            Self::Members { .. } => "MEMBERS",
            Self::Heartbeat => "HEARTBEAT",
            Self::Get { .. } => "GET",
            Self::Data { .. } => "DATA",
            Self::Grant { .. } => "GRANT",
            Self::Located { .. } => "LOCATED",
            Self::Release { .. } => "RELEASE",
            Self::Failed { .. } => "FAILED",
            Self::Announce { .. } => "ANNOUNCE",
            Self::Announced { .. } => "ANNOUNCED",
            Self::Withdraw { .. } => "WITHDRAW",
            Self::Ask { .. } => "ASK",
            Self::Asked { .. } => "ASKED",
            Self::Watch { .. } => "WATCH",
            Self::Exists { .. } => "EXISTS",
            Self::Delete { .. } => "DELETE",
            Self::Drop { .. } => "DROP",
            Self::Dropped { .. } => "DROPPED",
            Self::List { .. } => "LIST",
            Self::Listed { .. } => "LISTED",
        }
    }
}
