//! What all clones of a store share, and how it asks its node. Not the operations (`store`). Invariant: what the node
//! answers is checked before it is used.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::receipt::{Place, Receipt};
use hetmem_core::wire::{ClientMessage, ClientReply, Listed};
use hetmem_core::{Extent, Key, SegmentId, StoreError, Tier};
use hetmem_host_mem::{Answer, ClientPage, IndexReader, Session, WriteMapping};

use crate::ahead::Ahead;
use crate::gpu::GpuSegments;
use crate::options::PutOutcome;
use crate::private::SegmentFiles;
use crate::reservation::Written;
use crate::segments::{Grants, ReadMappings};
use crate::session::UnixSession;

/// What all clones of a store share.
pub(crate) struct Shared {
    pub(crate) page: ClientPage,
    pub(crate) segments: ReadMappings,
    pub(crate) grants: Grants,
    pub(crate) gpu: GpuSegments,
    pub(crate) files: SegmentFiles,
    pub(crate) ahead: Ahead,
    pub(crate) index: IndexReader,
    pub(crate) session: Link,
    pub(crate) inline_put_max: u64,
    pub(crate) timeout: Duration,
    pub(crate) node: Arc<str>,
}

/// How questions reach the node. A Unix session can have many out at once for one thread.
pub(crate) enum Link {
    Unix(Arc<UnixSession>),
    Other(Arc<dyn Session>),
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Shared {
    /// Memory of this node.
    pub(crate) fn place(&self, tier: Option<Tier>) -> Place {
        Place { node: Arc::clone(&self.node), tier }
    }

    /// What a put of `len_bytes` bytes that began at `started` has led to, if the reply says so.
    pub(crate) fn outcome(
        &self,
        reply: &ClientReply,
        len_bytes: u64,
        started: Instant,
    ) -> Option<PutOutcome> {
        let &ClientReply::Sealed { object, kept, tier, path, staged_bytes, replicas, .. } = reply else {
            return None;
        };
        let receipt = Receipt {
            path,
            fabric: None,
            from: self.place(None),
            to: self.place(Some(tier)),
            bytes: if kept { 0 } else { len_bytes },
            staged_bytes: if kept { 0 } else { staged_bytes },
            round_trips: 0,
            threshold_bytes: None,
            elapsed: Some(started.elapsed()),
        };
        Some(PutOutcome { object: Some(object), kept, replicas, receipt })
    }

    pub(crate) fn call(
        &self,
        message: &ClientMessage,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<Answer, StoreError> {
        self.session.as_session().call(message, payload, timeout)
    }

    /// Says something whose answer is of no interest.
    pub(crate) fn tell(&self, message: &ClientMessage) {
        match &self.session {
            Link::Unix(session) => session.tell(message),
            Link::Other(session) => {
                let _ = session.call(message, &[], self.timeout);
            }
        }
    }

    pub(crate) fn ask_done(&self, message: &ClientMessage) -> Result<(), StoreError> {
        match self.call(message, &[], self.timeout)?.reply {
            ClientReply::Done => Ok(()),
            reply => Err(unexpected(message, &reply)),
        }
    }

    pub(crate) fn list_page(
        &self,
        prefix: &str,
        after: Option<Key>,
        limit: u32,
    ) -> Result<(Vec<Listed>, bool), StoreError> {
        let message = ClientMessage::List { prefix: prefix.to_owned(), after, limit };
        match self.call(&message, &[], self.timeout)?.reply {
            ClientReply::Listed { objects, more } => Ok((objects, more)),
            reply => Err(unexpected(&message, &reply)),
        }
    }

    /// Whether an extent can be read in place already.
    #[inline]
    pub(crate) fn is_mapped(&self, extent: &Extent, tier: Tier) -> bool {
        tier == Tier::Host && self.segments.bytes(extent).is_some()
    }

    /// Makes sure that an extent can be read in place.
    #[cold]
    pub(crate) fn map(&self, extent: &Extent, tier: Tier) -> Result<(), StoreError> {
        if tier != Tier::Host {
            return Err(StoreError::unavailable(
                format!("an object in tier {tier}"),
                "this client maps host memory only",
            ));
        }
        if extent.len_bytes == 0 {
            return Ok(());
        }
        if self.segments.get(extent.segment).is_none() {
            self.fetch_segment(extent.segment)?;
        }
        match self.segments.bytes(extent) {
            Some(_) => Ok(()),
            None => Err(StoreError::protocol(format!(
                "{} bytes at {} are not inside segment {}",
                extent.len_bytes, extent.offset, extent.segment
            ))),
        }
    }

    fn fetch_segment(&self, segment: SegmentId) -> Result<(), StoreError> {
        let (fd, len_bytes) = self.ask_for_segment(segment)?;
        self.segments.add(segment, fd, len_bytes)
    }

    /// A segment's descriptor, to read it, and its length in bytes.
    pub(crate) fn ask_for_segment(&self, segment: SegmentId) -> Result<(OwnedFd, u64), StoreError> {
        let message = ClientMessage::Segment { segment };
        let answer = self.call(&message, &[], self.timeout)?;
        let ClientReply::Segment { len_bytes, retired, .. } = answer.reply else {
            return Err(unexpected(&message, &answer.reply));
        };
        self.forget_retired(retired)?;
        let Some(fd) = answer.descriptors.into_iter().next() else {
            return Err(StoreError::protocol(format!(
                "segment {segment} came without a descriptor (is the limit of open files reached?)"
            )));
        };
        Ok((fd, len_bytes))
    }

    /// Lets go of segments that the node has retired.
    fn forget_retired(&self, retired: Vec<SegmentId>) -> Result<(), StoreError> {
        for segment in retired {
            self.segments.release(segment)?;
            self.grants.release(segment);
            self.gpu.release(segment);
            self.files.release(segment);
        }
        Ok(())
    }

    /// The memory of a reservation in a granted segment. The node learns that the segment is mapped before
    /// anything in it can be sealed.
    pub(crate) fn granted(&self, extent: &Extent, timeout: Duration) -> Result<Written, StoreError> {
        let mapping = self.granted_segment(extent.segment, Instant::now() + timeout)?;
        mapping.extent_mut(extent.offset, extent.len_bytes).map(Written::Mapped)
    }

    /// A granted segment, which the node knows to be mapped.
    pub(crate) fn granted_segment(
        &self,
        segment: SegmentId,
        deadline: Instant,
    ) -> Result<Arc<WriteMapping>, StoreError> {
        let granted = self.grants.get(segment, deadline)?;
        if granted.tell {
            self.ask_done(&ClientMessage::Mapped { segment })?;
            self.grants.told(segment);
        }
        Ok(granted.mapping)
    }
}

impl Link {
    pub(crate) fn as_session(&self) -> &dyn Session {
        match self {
            Self::Unix(session) => &**session,
            Self::Other(session) => &**session,
        }
    }
}

/// The node answered something that does not belong to this question.
pub(crate) fn unexpected(message: &ClientMessage, reply: &ClientReply) -> StoreError {
    let reply = match reply {
        ClientReply::Welcome { .. } => "Welcome",
        ClientReply::Reserved { .. } => "Reserved",
        ClientReply::Sealed { .. } => "Sealed",
        ClientReply::Done => "Done",
        ClientReply::Located(_) => "Located",
        ClientReply::Segment { .. } => "Segment",
        ClientReply::Exists => "Exists",
        ClientReply::Stat { .. } => "Stat",
        ClientReply::Listed { .. } => "Listed",
        ClientReply::Deleted { .. } => "Deleted",
        ClientReply::Status(_) => "Status",
        ClientReply::Ahead { .. } => "Ahead",
        ClientReply::LocatedMany(_) => "LocatedMany",
    };
    StoreError::protocol(format!("the node answered {} with {reply}", message.name()))
}
