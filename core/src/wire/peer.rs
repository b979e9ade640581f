//! What engines say to each other. Not how it travels. Invariant: every list has a limit that `check` enforces.

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::tier::{Epoch, Generation, LeaseId, NodeId, ObjectId, RemoteExtent, Tier};
use crate::wire::REPLICAS_MAX;

/// Bytes of a number in a body at most.
const NUMBER_LEN_MAX: usize = 10;
/// The most keys that one message carries.
pub const KEYS_PER_MESSAGE_MAX: usize = 1024;
/// The longest name of a node, and the longest address, in bytes.
pub const NODE_TEXT_LEN_MAX: usize = 255;

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

/// What a node's bytes of an object are to the object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// It was put there, and stays.
    Original,
    /// They were fetched so that one more node has them, and stay.
    Replica,
    /// They may go when room is needed: fetched by a reader, or put as a cache.
    #[default]
    Copy,
}

impl Role {
    /// Whether only a delete, a time to live or force takes them from their node.
    #[must_use]
    pub const fn is_lasting(self) -> bool {
        !matches!(self, Self::Copy)
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
    /// What the announcing node's bytes are.
    pub role: Role,
    /// How many nodes are to hold it for good, at most [`REPLICAS_MAX`]; 0 if the announcing node does not know.
    pub replicas: u8,
    /// How much of its time to live is left, in milliseconds; none if it has no end.
    pub ttl_ms: Option<u64>,
}

impl Announced {
    fn check(&self) -> Result<(), StoreError> {
        if self.replicas <= REPLICAS_MAX {
            return Ok(());
        }
        Err(StoreError::protocol(format!(
            "{:?} is to be on {} nodes, at most {REPLICAS_MAX} are accepted",
            self.key, self.replicas
        )))
    }
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

impl Member {
    fn check(&self) -> Result<(), StoreError> {
        check_text("a node's name", &self.name)?;
        check_text("a node's address", &self.address)
    }
}

fn check_holders(holders: &[Holder]) -> Result<usize, StoreError> {
    if holders.is_empty() {
        return Err(StoreError::protocol("a list of holders is empty"));
    }
    holders.iter().try_for_each(|holder| check_text("a holder's address", &holder.address))?;
    Ok(holders.len())
}

fn check_text(what: &str, text: &str) -> Result<(), StoreError> {
    if text.len() <= NODE_TEXT_LEN_MAX {
        return Ok(());
    }
    let len = text.len();
    Err(StoreError::protocol(format!("{what} of {len} bytes, at most {NODE_TEXT_LEN_MAX} are accepted")))
}

/// A node of the cluster that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Present {
    /// Which.
    pub member: Member,
    /// Bytes that it has room for, as it last said.
    pub room_bytes: u64,
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

/// What an owner says of the bytes that it gives, for receipts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The tier that its object is in.
    pub tier: Tier,
    /// Whether it copied the bytes to host memory for this answer, because the link cannot reach that tier.
    pub staged: bool,
}

impl Origin {
    /// An object of host memory.
    pub const HOST: Self = Self { tier: Tier::Host, staged: false };
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
        /// Whether it keeps the directory.
        keeps: bool,
    },
    /// The directory's nodes, sent by the one that keeps it whenever they change.
    Members {
        /// All live nodes.
        members: Vec<Present>,
    },
    /// "I am alive", both ways on every link. Answered by `Alive`, which also tells how far away the other is.
    Heartbeat {
        /// Bytes that the sender has room for: free, or held by what may go.
        room_bytes: u64,
        /// From the node that keeps the directory: how many objects are on fewer nodes than they are to be.
        under_replicated: u64,
    },

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
        /// Where they come from.
        origin: Origin,
    },
    /// Permission to read the object (rendezvous).
    Grant {
        /// Which object of the asked key.
        object: ObjectId,
        /// What the bytes mean; of the whole object, whatever range was asked.
        meta: ObjectMeta,
        /// Where its bytes come from.
        origin: Origin,
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
    /// From the directory: an object of a key that is watched, or granted by the directory's node, exists.
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

    /// The answer to `Heartbeat`.
    Alive,
    /// To everyone who is linked: the sender keeps the directory from now on, or no longer.
    Keeps {
        /// Which.
        keeps: bool,
    },
    /// To the directory: the sender is in its cluster and announces what it holds from now on, beginning with all.
    Join {
        /// Whether it may keep the directory later, and so is told of deletions.
        heir: bool,
    },
    /// To the directory: the sender announces to another one from now on.
    Leave,
    /// Between nodes that may keep the directory: these objects were deleted.
    Deletions {
        /// At most [`KEYS_PER_MESSAGE_MAX`].
        objects: Vec<ObjectId>,
    },
    /// Hold this object for good. Answered by `Replicated` when it does.
    Replicate {
        /// Which, and on how many nodes it is to be. The role is what it is to have at the asked node.
        object: Announced,
        /// Who has it; never empty, at most [`REPLICAS_MAX`].
        holders: Vec<Holder>,
    },
    /// The answer.
    Replicated,
    /// From the directory: others hold this object for good, as many as are to. What the asked node holds of it may go
    /// when room is needed, while they live.
    Surplus {
        /// Which.
        key: Key,
        /// The object meant.
        object: ObjectId,
        /// The others; never empty, at most [`REPLICAS_MAX`].
        lasting: Vec<(NodeId, Epoch)>,
    },
    /// To the directory, whose node could not give an object itself: who else has it? Answered as `Get` where the
    /// asked node does not hold it.
    Locate {
        /// Which.
        key: Key,
    },
}

impl PeerMessage {
    /// Checks what decoding alone does not: list lengths and metadata.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Protocol`] or the metadata's own error.
    pub fn check(&self) -> Result<(), StoreError> {
        let (count, most) = match self {
            Self::Data { meta, .. } | Self::Grant { meta, .. } => {
                meta.check()?;
                (0, 0)
            }
            Self::Hello { member, .. } => {
                member.check()?;
                (0, 0)
            }
            Self::Announce { objects, .. } | Self::Withdraw { objects } | Self::Listed { objects, .. } => {
                objects.iter().try_for_each(Announced::check)?;
                (objects.len(), KEYS_PER_MESSAGE_MAX)
            }
            Self::Asked { object: Some(object) } => {
                object.check()?;
                (0, 0)
            }
            Self::Announced { refused } => (refused.len(), KEYS_PER_MESSAGE_MAX),
            Self::Deletions { objects } => (objects.len(), KEYS_PER_MESSAGE_MAX),
            Self::Members { members } => {
                members.iter().try_for_each(|present| present.member.check())?;
                (members.len(), KEYS_PER_MESSAGE_MAX)
            }
            Self::Located { holders } | Self::Exists { holders, .. } => {
                (check_holders(holders)?, KEYS_PER_MESSAGE_MAX)
            }
            Self::Replicate { object, holders } => {
                object.check()?;
                (check_holders(holders)?, REPLICAS_MAX.into())
            }
            Self::Surplus { lasting, .. } => {
                if lasting.is_empty() {
                    return Err(StoreError::protocol("a list of holders is empty"));
                }
                (lasting.len(), REPLICAS_MAX.into())
            }
            _ => (0, 0),
        };
        if count > most {
            return Err(StoreError::protocol(format!(
                "a list of {count} entries in {}, at most {most} are accepted",
                self.name()
            )));
        }
        Ok(())
    }

    /// Bytes that it takes in a body at most, where that is known without encoding it: of the messages that come by the
    /// thousand.
    #[must_use]
    pub fn len_max(&self) -> Option<usize> {
        // The variant, an object's three numbers, of metadata type, number of dimensions, length and checksum, and of the
        // origin a tier with its number and a truth value.
        const VARIANT: usize = 1;
        const ORIGIN: usize = 1 + 3 + 1;
        const OBJECT: usize = 3 * NUMBER_LEN_MAX;
        const META: usize = 2 + NUMBER_LEN_MAX + 1 + NUMBER_LEN_MAX;
        match self {
            // A length before the key, whether there is a range, and three numbers.
            Self::Get { key, .. } => Some(VARIANT + 2 + key.as_str().len() + 1 + 3 * NUMBER_LEN_MAX),
            Self::Data { meta, .. } => {
                Some(VARIANT + OBJECT + META + ORIGIN + meta.shape.dims().len() * NUMBER_LEN_MAX)
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
            Self::Heartbeat { .. } => "HEARTBEAT",
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
            Self::Alive => "ALIVE",
            Self::Keeps { .. } => "KEEPS",
            Self::Join { .. } => "JOIN",
            Self::Leave => "LEAVE",
            Self::Deletions { .. } => "DELETIONS",
            Self::Replicate { .. } => "REPLICATE",
            Self::Replicated => "REPLICATED",
            Self::Surplus { .. } => "SURPLUS",
            Self::Locate { .. } => "LOCATE",
        }
    }
}
