//! Where bytes are: tiers, segments and extents, and the numbers that name things. Not memory itself: this crate
//! never holds an address. Invariant: an `Extent` that was built by `Extent::new` does not overflow.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// A kind of memory, and which one of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    /// Host shared memory.
    Host,
    /// The memory of one GPU, by its ordinal on the node.
    Gpu(u16),
}

impl Tier {
    /// The number that stands for this tier in the shared index: 0 is host, `1 + ordinal` a GPU.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Host => 0,
            Self::Gpu(ordinal) => 1 + ordinal as u32,
        }
    }

    /// The tier of a number in the shared index.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Host),
            code => u16::try_from(code - 1).ok().map(Self::Gpu),
        }
    }
}

/// Where somebody wants bytes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TierHint {
    /// In this tier.
    pub tier: Tier,
    /// If there is no such tier, or no room in it, they may be in host memory instead: the receipt says so.
    pub or_host: bool,
}

impl From<Tier> for TierHint {
    /// There and nowhere else.
    fn from(tier: Tier) -> Self {
        Self { tier, or_host: false }
    }
}

impl std::str::FromStr for Tier {
    type Err = StoreError;

    /// `host`, or `gpu:N`.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let gpu = || text.strip_prefix("gpu:")?.parse().ok().map(Self::Gpu);
        match text {
            "host" => Ok(Self::Host),
            _ => gpu().ok_or_else(|| {
                StoreError::invalid("tier", format!("{text:?} is neither host nor gpu:N (gpu:0, gpu:1, ...)"))
            }),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Gpu(ordinal) => write!(f, "gpu:{ordinal}"),
        }
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// One allocation of a tier on one node. Numbers are not used twice by one incarnation of a node.
    SegmentId(u32)
);
number!(
    /// A daemon, across its restarts: XXH3-64 of its name.
    NodeId(u64)
);
number!(
    /// One incarnation of a daemon; later ones are greater.
    Epoch(u64)
);
number!(
    /// One use of an extent by one object. A node never uses a number twice within an epoch, so a generation
    /// names the object and the place together; 0 is never one.
    Generation(u64)
);
number!(
    /// A session of a client with its node.
    ClientId(u32)
);
number!(
    /// A place in the shared index.
    SlotId(u32)
);
number!(
    /// A remote reader's right to read an extent.
    LeaseId(u64)
);
number!(
    /// A connection of the fabric to one peer.
    LinkId(u64)
);
number!(
    /// One read in progress.
    TransferId(u64)
);
number!(
    /// The payload of one frame, on its way in.
    LandingId(u64)
);
number!(
    /// What names a registered segment to a peer.
    RemoteKey(u64)
);

/// What an object is, beyond its key: two objects with one key and different births are different objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectId {
    /// The node on which it was put.
    pub origin: NodeId,
    /// That node's incarnation.
    pub epoch: Epoch,
    /// Counts the objects put on that node in that incarnation.
    pub number: u64,
}

/// Where an object's bytes are: `len_bytes` bytes at `offset` of `segment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The segment.
    pub segment: SegmentId,
    /// Bytes from the segment's start.
    pub offset: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

impl Extent {
    /// An extent inside a segment of `segment_len` bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if any byte of it lies outside.
    pub fn new(
        segment: SegmentId,
        offset: u64,
        len_bytes: u64,
        segment_len: u64,
    ) -> Result<Self, StoreError> {
        match offset.checked_add(len_bytes) {
            Some(end) if end <= segment_len => Ok(Self { segment, offset, len_bytes }),
            _ => Err(StoreError::invalid(
                "extent",
                format!(
                    "{len_bytes} bytes at {offset} are not inside segment {segment} of {segment_len} bytes"
                ),
            )),
        }
    }

    /// Whether another one begins where this one ends.
    #[must_use]
    pub fn is_followed_by(self, other: Self) -> bool {
        self.segment == other.segment && self.offset.checked_add(self.len_bytes) == Some(other.offset)
    }

    /// The part of this extent from `start`, `len_bytes` long.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if any byte of it lies outside this extent.
    pub fn slice(self, start: u64, len_bytes: u64) -> Result<Self, StoreError> {
        match start.checked_add(len_bytes) {
            Some(end) if end <= self.len_bytes => {
                Ok(Self { segment: self.segment, offset: self.offset + start, len_bytes })
            }
            _ => Err(StoreError::invalid(
                "range",
                format!("{len_bytes} bytes from {start} are not inside {} bytes", self.len_bytes),
            )),
        }
    }
}

/// An extent of a peer's registered segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteExtent {
    /// Names the peer's registered segment.
    pub key: RemoteKey,
    /// Bytes from the segment's start.
    pub offset: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_do_not_reach_outside() {
        let segment = SegmentId(1);
        assert!(Extent::new(segment, 0, 10, 10).is_ok());
        assert!(Extent::new(segment, 1, 10, 10).is_err());
        assert!(Extent::new(segment, u64::MAX, 2, 10).is_err());
        let extent = Extent::new(segment, 4, 6, 10).expect("inside");
        assert_eq!(extent.slice(2, 4).expect("inside"), Extent { segment, offset: 6, len_bytes: 4 });
        assert!(extent.slice(3, 4).is_err());
        assert!(extent.slice(u64::MAX, 1).is_err());
    }

    #[test]
    fn neighbours_are_of_one_segment_and_without_a_gap() {
        let extent = |segment, offset, len_bytes| Extent { segment: SegmentId(segment), offset, len_bytes };
        let first = extent(1, 64, 36);
        assert!(first.is_followed_by(extent(1, 100, 7)));
        for other in [extent(2, 100, 7), extent(1, 101, 7), extent(1, 99, 7), first] {
            assert!(!first.is_followed_by(other), "{other:?}");
        }
        assert!(!extent(1, u64::MAX, 2).is_followed_by(extent(1, 1, 1)));
    }

    #[test]
    fn tiers_return_from_their_codes_and_names() {
        for tier in [Tier::Host, Tier::Gpu(0), Tier::Gpu(u16::MAX)] {
            assert_eq!(Tier::from_code(tier.code()), Some(tier));
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        for text in ["", "gpu", "gpu:", "gpu:-1", "gpu:65536", "cuda:0", "Host"] {
            assert!(text.parse::<Tier>().is_err(), "{text}");
        }
        assert_eq!(Tier::from_code(u32::MAX), None);
    }
}
