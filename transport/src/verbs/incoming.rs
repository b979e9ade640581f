//! What one link receives: buffers of the adapter are put together to frames, and payloads copied to where the sink says.
//! Not when buffers are lent again. Invariant: a frame is handed over only when it is whole and its header was within
//! every limit; every byte of a payload is staged once, for it comes into a buffer before anyone knows where it belongs.

use hetmem_core::wire::{FrameHeader, HEADER_LEN};
use hetmem_core::{LinkId, StoreError};

use crate::arriving::Arriving;
use crate::fabric::{FabricEvent, FabricSink, LandingToken, check_kind};
use crate::region::Regions;

#[derive(Default)]
pub(super) struct Inbox {
    /// Of a frame that is not whole.
    frame: Vec<u8>,
    payload: Option<Arriving>,
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
            check_kind(&header)?;
            let landing = sink.message(link, header, &self.frame[HEADER_LEN..len]);
            self.frame.clear();
            self.payload = Some(Arriving::of(header.payload_len, landing, regions));
        }
        let Some(payload) = &mut self.payload else { return Ok(()) };
        if bytes.len() as u64 > payload.left() {
            let why = format!("{} bytes where {} are left of a payload", bytes.len(), payload.left());
            return Err(StoreError::protocol(why));
        }
        payload.stage(bytes);
        if payload.left() == 0
            && let Some((token, result)) = self.payload.take().and_then(Arriving::end)
        {
            sink.event(FabricEvent::Landed { link, token, result });
        }
        Ok(())
    }

    /// The landing that will not be complete, when the link has ended.
    pub(super) fn abandon(&mut self) -> Option<LandingToken> {
        self.payload.take()?.abandon()
    }
}
