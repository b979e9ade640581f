//! What one link receives: buffers of the adapter are put together to frames, and payloads copied to where the sink says.
//! Not when buffers are lent again. Invariant: a frame is handed over only when it is whole and its header was within
//! every limit; every byte of a payload is staged once, for it comes into a buffer before anyone knows where it belongs.

use hetmem_core::wire::{FrameHeader, HEADER_LEN};
use hetmem_core::{LinkId, StoreError};

use crate::fabric::{FabricEvent, FabricSink, Landing, LandingStats, LandingToken};
use crate::payload::Scatter;
use crate::region::Regions;

#[derive(Default)]
pub(super) struct Inbox {
    /// Of a frame that is not whole.
    frame: Vec<u8>,
    payload: Option<Payload>,
}

/// A payload that is being received.
struct Payload {
    target: Option<(Scatter, LandingToken)>,
    /// Why it is dropped rather than landed, to be told at its end.
    failed: Option<(LandingToken, StoreError)>,
    left: u64,
    staged: u64,
}

impl Inbox {
    /// A part of a frame has come; tells the sink of what is whole by now.
    ///
    /// # Errors
    /// `Protocol` if this is no frame.
    pub(super) fn received(
        &mut self,
        link: LinkId,
        mut bytes: &[u8],
        regions: &Regions,
        sink: &dyn FabricSink,
    ) -> Result<(), StoreError> {
        if self.payload.is_none() {
            self.frame.extend_from_slice(bytes);
            let Some(head) = self.frame.first_chunk::<HEADER_LEN>() else {
                return Err(StoreError::protocol("a frame that begins with less than its header"));
            };
            let header = FrameHeader::parse(head)?;
            let len = HEADER_LEN + header.body_len as usize;
            if self.frame.len() < len {
                return Ok(());
            }
            let rest = self.frame.len() - len;
            bytes = &bytes[bytes.len() - rest..];
            let landing = sink.message(link, header, &self.frame[HEADER_LEN..len]);
            self.frame.clear();
            self.payload = Some(Payload::of(header.payload_len, landing, regions));
        }
        let Some(payload) = &mut self.payload else { return Ok(()) };
        payload.copy(bytes)?;
        if payload.left == 0
            && let Some((token, result)) = self.payload.take().and_then(Payload::end)
        {
            sink.event(FabricEvent::Landed { link, token, result });
        }
        Ok(())
    }

    /// The landing that will not be complete, when the link has ended.
    pub(super) fn abandon(&mut self) -> Option<LandingToken> {
        let payload = self.payload.take()?;
        payload.target.map(|(_, token)| token).or(payload.failed.map(|(token, _)| token))
    }
}

impl Payload {
    fn of(len_bytes: u64, landing: Landing, regions: &Regions) -> Self {
        let mut payload = Self { target: None, failed: None, left: len_bytes, staged: 0 };
        if let Landing::Into { parts, token } = landing {
            match Scatter::of(regions, &parts, len_bytes) {
                Ok(scatter) => payload.target = Some((scatter, token)),
                Err(why) => payload.failed = Some((token, why)),
            }
        }
        payload
    }

    fn copy(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() as u64 > self.left {
            let why = format!("{} bytes where {} are left of a payload", bytes.len(), self.left);
            return Err(StoreError::protocol(why));
        }
        self.left -= bytes.len() as u64;
        if let Some((scatter, token)) = &mut self.target {
            if scatter.copy_in(bytes) {
                self.staged += bytes.len() as u64;
            } else {
                let why = StoreError::stale("receive", "payload", "its target segment was deregistered");
                self.failed = Some((*token, why));
                self.target = None;
            }
        }
        Ok(())
    }

    fn end(self) -> Option<(LandingToken, Result<LandingStats, StoreError>)> {
        match (self.target, self.failed) {
            (_, Some((token, why))) => Some((token, Err(why))),
            (Some((scatter, token)), None) => {
                let bytes = scatter.landing_len() as u64;
                Some((token, Ok(LandingStats { bytes, staged_bytes: self.staged })))
            }
            (None, None) => None,
        }
    }
}
