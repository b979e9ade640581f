//! How a call really moved its bytes. Not a plan: a path is written down after the bytes have moved, and bytes that
//! passed through a third buffer are counted by whoever copied them. Invariant: none.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::tier::Tier;

/// How an object's bytes came to where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Path {
    /// Get: they were on this node already.
    Local,
    /// Get: inside a peer's answer.
    Eager,
    /// Get: by one-sided Read, after a grant or where they were found before.
    Read,
    /// Put: inside the message to the node, which copied them to their place.
    Inline,
    /// Put: written by the producer where they stay.
    InPlace,
    /// Put: written by the producer where they stay, in memory granted ahead, without a word to the node.
    Ahead,
    /// Put: sent to the node in parts, which it copied to their place.
    Written,
    /// Put: written by the producer into its own memory, or into another tier, and moved from there at seal.
    Copied,
    /// Put: not moved at all; an object of the key was there and has been kept.
    Kept,
    /// Get: written by the peer's adapter into its place, after a grant or where they were found before: there, reading
    /// out of the peer's memory does not work, or is slow.
    Push,
    /// Get: copied from another tier of this node, because they were wanted in this one.
    LocalCopy,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Eager => "eager",
            Self::Read => "read",
            Self::Inline => "inline",
            Self::InPlace => "in place",
            Self::Ahead => "ahead",
            Self::Written => "written",
            Self::Copied => "copied",
            Self::Kept => "kept",
            Self::Push => "push",
            Self::LocalCopy => "local copy",
        })
    }
}

/// Bytes that came to their target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// How many.
    pub bytes: u64,
    /// Of these, how many passed through a buffer that is neither source nor target.
    pub staged_bytes: u64,
}

/// What a node knows about how the bytes of a get came to it from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// The fabric's name.
    pub fabric: Arc<str>,
    /// The peer's name.
    pub from: Arc<str>,
    /// The peer's tier.
    pub from_tier: Tier,
    /// Bytes that were moved.
    pub moved: Moved,
    /// Questions and reads between nodes, one after the other, until the bytes were there. Of several gets that waited
    /// for the same bytes each has all of them.
    pub round_trips: u32,
    /// Objects up to this many bytes would have come inside the answer.
    pub threshold_bytes: u64,
}

/// One end of a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node's name.
    pub node: Arc<str>,
    /// Its tier; none for memory of the calling process.
    pub tier: Option<Tier>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tier {
            Some(tier) => write!(f, "{} ({tier})", self.node),
            None => write!(f, "{} (caller)", self.node),
        }
    }
}

/// How one get or put really moved its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// By which way.
    pub path: Path,
    /// Over which fabric; none within one node.
    pub fabric: Option<Arc<str>>,
    /// Where the bytes came from.
    pub from: Place,
    /// Where they are now. A get hands them out there, without another copy.
    pub to: Place,
    /// How many bytes were moved; 0 where they stayed in place.
    pub bytes: u64,
    /// Of these, how many passed through a buffer that is neither source nor target.
    pub staged_bytes: u64,
    /// Questions and reads between nodes that followed one another.
    pub round_trips: u32,
    /// Objects up to this many bytes would have come inside a peer's answer; none if no peer was asked.
    pub threshold_bytes: Option<u64>,
    /// How long the call took; of a call for many objects, until the node's answer about this one. None for a get of an
    /// object that was here: to look at the clock would take a third of the time that it takes.
    pub elapsed: Option<Duration>,
}
