//! The Fabric seam: registered regions, links, sends, one-sided reads, and what a fabric reports back.
//! Not a protocol: frames of the engine are opaque here. Invariant: the sink is called only from a fabric's own
//! threads or from inside `progress`, never from inside another call of `Fabric`, and with no lock held that any
//! other call of `Fabric` takes, so a sink may call back into the fabric (only not into `progress`).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hetmem_core::wire::{Frame, FrameHeader, FrameKind, HEADER_LEN};
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};

use crate::memory::RegionMemory;

/// Which fabric this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FabricKind {
    /// TCP sockets.
    Tcp,
    /// RDMA verbs.
    Verbs,
    /// In memory, in virtual time, from a seed.
    Sim,
}

impl FabricKind {
    /// Links of the verbs fabric are numbered from here on, those of TCP from 1: a node that has both tells by a link's
    /// number which fabric it is of.
    pub(crate) const VERBS_LINKS: u64 = 1 << 63;

    /// Which of a node's fabrics a link is of, if it has TCP and verbs.
    #[must_use]
    pub const fn of_link(link: LinkId) -> Self {
        if link.0 >= Self::VERBS_LINKS { Self::Verbs } else { Self::Tcp }
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Sim => "sim",
        })
    }
}

/// What peers may do with a region. Its own node may always send from it and read or receive into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Local,
    /// Read it, if they know its key.
    RemoteRead,
}

/// Chosen by the caller of [`Fabric::send`], repeated in [`FabricEvent::SendDone`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SendToken(pub u64);

/// Chosen by the sink in [`Landing::Into`], repeated in [`FabricEvent::Landed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LandingToken(pub u64);

/// How far a send got before the call returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// The payload's extents may be reused now (or there was no payload); no event follows.
    Done,
    /// The payload's extents are still being read; exactly one [`FabricEvent::SendDone`] follows.
    Pending,
}

/// Where a part of a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LandingPart {
    /// Into this extent of a registered segment, as many bytes as it has.
    Extent(Extent),
    /// Nowhere: so many bytes are received and dropped.
    Skip(u64),
}

/// Where the payload of a message goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Landing {
    /// Nowhere: the bytes are received and dropped. Also the answer for a message without payload.
    Discard,
    /// Into these parts, one after the other, which together are as long as the payload; exactly one
    /// [`FabricEvent::Landed`] follows, and until then their extents may be written.
    Into {
        /// The targets, in the payload's order. Their extents do not overlap.
        parts: Vec<LandingPart>,
        /// Repeated in the event.
        token: LandingToken,
    },
}

impl Landing {
    /// All of the payload into one extent.
    #[must_use]
    pub fn whole(extent: Extent, token: LandingToken) -> Self {
        Self::Into { parts: vec![LandingPart::Extent(extent)], token }
    }

    /// Parts of a payload of `payload_len` bytes into extents, each at its place (bytes from the payload's start);
    /// what lies between them is dropped. Neighbours whose extents are neighbours become one part.
    #[must_use]
    pub fn scattered(token: LandingToken, payload_len: u64, mut places: Vec<(u64, Extent)>) -> Self {
        if places.is_empty() {
            return Self::Discard;
        }
        places.sort_unstable_by_key(|(start, _)| *start);
        let (mut parts, mut end) = (Vec::new(), 0_u64);
        for (start, extent) in places {
            if start > end {
                parts.push(LandingPart::Skip(start - end));
            }
            end = start.saturating_add(extent.len_bytes);
            match parts.last_mut() {
                Some(LandingPart::Extent(last)) if last.is_followed_by(extent) => {
                    last.len_bytes += extent.len_bytes;
                }
                _ => parts.push(LandingPart::Extent(extent)),
            }
        }
        if payload_len > end {
            parts.push(LandingPart::Skip(payload_len - end));
        }
        Self::Into { parts, token }
    }
}

/// How a payload came into its extents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LandingStats {
    /// Bytes that landed; skipped ones do not count.
    pub bytes: u64,
    /// How many bytes at the payload's start, skipped ones included, passed through a buffer that is neither source
    /// nor target; all others came straight to their place.
    pub staged_bytes: u64,
}

/// How a read came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Bytes read.
    pub bytes: u64,
    /// Of these, how many passed through a buffer that is neither source nor target.
    pub staged_bytes: u64,
    /// In how many slices.
    pub slices: u32,
    /// How many slices were asked for again because a data stream ended under them.
    pub reissued: u32,
    /// The word of [`Fabric::read_checked`], as a number.
    pub word: Option<u64>,
    /// Trips to the owner and back that had to follow one another.
    pub round_trips: u32,
    /// Whether the owner's adapter has written the bytes into their place, rather than this end's read them.
    pub pushed: bool,
}

/// What happened. Events of one link come in this order: `LinkUp` (not if the connection failed), anything else,
/// `LinkDown` once and last.
#[derive(Clone, Debug, PartialEq)]
pub enum FabricEvent {
    /// A link can be used.
    LinkUp {
        /// Which.
        link: LinkId,
        /// Outbound: the address that was given to `connect`. Inbound: where the peer's own fabric listens.
        address: String,
        /// Whether the peer connected.
        inbound: bool,
    },
    /// A link is gone or never came up; all its reads, sends and landings have been reported before this.
    /// From here on this end serves the peer no read of the link either: leases that were given over it have ended.
    LinkDown {
        /// Which.
        link: LinkId,
        /// Why.
        why: StoreError,
    },
    /// A read is over. No byte lands in its local extent after this.
    ReadDone {
        /// Which.
        transfer: TransferId,
        /// On success every byte of the local extent has been written.
        result: Result<ReadStats, StoreError>,
    },
    /// A payload's extents may be reused. Success does not say that the peer has the bytes.
    SendDone {
        /// Which.
        token: SendToken,
        /// Whether the fabric took all bytes.
        result: Result<(), StoreError>,
    },
    /// The payload of a message is complete, or will never be. No byte lands in any of its extents after this.
    Landed {
        /// From which link.
        link: LinkId,
        /// Which.
        token: LandingToken,
        /// On success every byte of every extent has been written.
        result: Result<LandingStats, StoreError>,
    },
}

/// A way to move bytes between nodes.
///
/// The caller owns all deadlines except those of connecting and of the handshake: it calls `cancel` and
/// `disconnect` when one has passed.
pub trait Fabric: Send + Sync {
    /// Which fabric this is.
    fn kind(&self) -> FabricKind;

    /// Where peers connect to, with the real port if 0 was asked for.
    fn address(&self) -> String;

    /// Makes a segment known: from now on its extents can be sent, read into and landed in, and read by peers
    /// that know the returned key if `access` allows it.
    ///
    /// # Errors
    /// `Invalid` if the segment is registered already, `Os` if the system refuses.
    fn register(
        &self,
        segment: SegmentId,
        memory: Arc<dyn RegionMemory>,
        access: Access,
    ) -> Result<RemoteKey, StoreError>;

    /// Forgets a segment. When this returns, nothing touches its memory any more; what was using it fails
    /// (its events follow). An unknown segment is ignored.
    fn deregister(&self, segment: SegmentId);

    /// Begins to connect; never blocks. `LinkUp` or `LinkDown` follows.
    ///
    /// # Errors
    /// `Invalid` if the address is none; `Busy` at the limit of links.
    fn connect(&self, address: &str) -> Result<LinkId, StoreError>;

    /// Closes a link; its reads, sends and landings fail, then `LinkDown` follows. An unknown link is ignored.
    fn disconnect(&self, link: LinkId);

    /// How many extents one send may gather, at least 1.
    fn gather_max(&self) -> usize;

    /// Sends a frame and the payload that its header announces, gathered from extents of registered segments, in
    /// their order and without a copy where the fabric can. Frames of one link arrive in the order in which they
    /// were sent, or not at all.
    ///
    /// # Errors
    /// `Busy` is back-pressure: the link's queue is full and the frame was not taken. `Invalid` if the header's
    /// payload length is not that of the extents together, if there are more than `gather_max`, or if one is not
    /// inside a registered segment. `PeerLost` if the link is not up. After an error no event follows.
    fn send(
        &self,
        link: LinkId,
        frame: Frame,
        payload: &[Extent],
        token: SendToken,
    ) -> Result<Sent, StoreError>;

    /// Reads a peer's memory into a local extent of the same length. One `ReadDone` follows. A read of 8 bytes at
    /// an address divisible by 8 is served by one atomic load. No order holds between reads, nor between reads and
    /// sends.
    ///
    /// # Errors
    /// `Invalid` if the lengths differ, the extent is not inside a registered segment, or the transfer's number is
    /// in use; `Busy` at the limit of reads in progress; `PeerLost` if the link is not up. After an error no event
    /// follows.
    fn read(
        &self,
        link: LinkId,
        transfer: TransferId,
        remote: RemoteExtent,
        local: Extent,
    ) -> Result<(), StoreError>;

    /// The same, and then reads 8 bytes at an address divisible by 8, which come back in [`ReadStats::word`]: they are
    /// loaded at the owner, by one atomic load, after the last of the other bytes was read there. Without `bytes` only
    /// the word is read.
    ///
    /// # Errors
    /// As [`Fabric::read`]; `Invalid` if the word has not 8 bytes.
    fn read_checked(
        &self,
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: RemoteExtent,
    ) -> Result<(), StoreError>;

    /// Gives a read up. Its `ReadDone` follows as always (with success if it was complete already), and only then
    /// may the local extent be reused. An unknown transfer is ignored.
    fn cancel(&self, transfer: TransferId);

    /// Lets the calling thread do the fabric's work until `until()` holds or `timeout` has passed, so that a thread
    /// that waits for its own get needs no hand-off from a thread of the fabric. `until` is looked at before
    /// waiting, and again after every call to the sink by any thread, and after [`Fabric::wake`]. Returns what
    /// `until` said last. Not to be called from the sink.
    fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool;

    /// Makes every thread inside `progress` look at its condition again: for what became true outside of the
    /// sink's calls.
    fn wake(&self);

    /// Closes everything and waits for the fabric's threads. No call to the sink begins after this returns (none
    /// about what was still in progress either), and nothing touches registered memory. Calls of `progress` return.
    /// Not to be called from the sink. Dropping the fabric does the same.
    fn stop(&self);

    /// How many connections were refused: for garbage, another version, a handshake too slow, a limit.
    fn refused(&self) -> u64;
}

/// Who hears of messages and events; implemented by the node.
pub trait FabricSink: Send + Sync {
    /// A frame has arrived, its payload (if the header announces one) has not: says where that goes.
    fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing;

    /// Something happened.
    fn event(&self, event: FabricEvent);
}

/// Whether a frame is one that engines send to each other.
pub(crate) fn check_kind(header: &FrameHeader) -> Result<(), StoreError> {
    if matches!(header.kind, FrameKind::Peer | FrameKind::Batch) {
        return Ok(());
    }
    Err(StoreError::protocol(format!("a frame of kind {:?} came over a link", header.kind)))
}

/// Whether a frame's header announces just the payload that goes with it, and the payload may be gathered at once.
pub(crate) fn check_payload(frame: &Frame, payload: &[Extent], gather_max: usize) -> Result<(), StoreError> {
    let announced = frame
        .as_bytes()
        .first_chunk::<HEADER_LEN>()
        .ok_or_else(|| StoreError::invalid("frame", "it has no header"))
        .and_then(FrameHeader::parse)?
        .payload_len;
    let len_bytes = payload.iter().fold(0_u64, |sum, extent| sum.saturating_add(extent.len_bytes));
    if announced != len_bytes {
        let count = payload.len();
        return Err(StoreError::invalid(
            "frame",
            format!(
                "send: its header announces {announced} bytes of payload, its {count} extents have {len_bytes}"
            ),
        ));
    }
    if payload.len() > gather_max {
        let why = format!("send: {} extents, at most {gather_max} are gathered at once", payload.len());
        return Err(StoreError::invalid("payload", why));
    }
    Ok(())
}

/// The length of a word in bytes.
const WORD_LEN: u64 = 8;

pub(crate) fn check_lengths(remote: RemoteExtent, local: Extent) -> Result<(), StoreError> {
    if remote.len_bytes == local.len_bytes {
        return Ok(());
    }
    let why = format!("{} remote bytes into {} local bytes", remote.len_bytes, local.len_bytes);
    Err(StoreError::invalid("read", why))
}

pub(crate) fn check_word(word: RemoteExtent) -> Result<(), StoreError> {
    if word.len_bytes == WORD_LEN {
        return Ok(());
    }
    Err(StoreError::invalid("read", format!("a word of {} bytes, it has {WORD_LEN}", word.len_bytes)))
}

#[cfg(test)]
mod tests {
    use hetmem_core::SegmentId;

    use super::*;

    fn extent(segment: u32, offset: u64, len_bytes: u64) -> Extent {
        Extent { segment: SegmentId(segment), offset, len_bytes }
    }

    #[test]
    fn scattered_parts_are_in_order_with_the_gaps_between_them() {
        let token = LandingToken(3);
        assert_eq!(Landing::scattered(token, 100, Vec::new()), Landing::Discard);
        let places = vec![(60, extent(1, 500, 30)), (10, extent(1, 0, 20)), (30, extent(1, 20, 10))];
        let parts = vec![
            LandingPart::Skip(10),
            LandingPart::Extent(extent(1, 0, 30)),
            LandingPart::Skip(20),
            LandingPart::Extent(extent(1, 500, 30)),
            LandingPart::Skip(10),
        ];
        assert_eq!(Landing::scattered(token, 100, places), Landing::Into { parts, token });
        let apart = vec![(0, extent(1, 0, 10)), (10, extent(2, 10, 10)), (20, extent(2, 21, 10))];
        let Landing::Into { parts, .. } = Landing::scattered(token, 30, apart) else { panic!("parts") };
        assert_eq!(parts.len(), 3, "neighbours in the payload that are none in memory: {parts:?}");
    }
}
