//! What kernels do, done by the processor where a device cannot: the checksum of bytes that are copied back in pieces. Not the
//! kernels (`launches`). Invariant: the value is that of the kernel, and what is copied is one piece at a time.

use std::sync::Arc;

use hetmem_core::checksum::{self, BLOCK_LEN, Root};
use hetmem_core::{ErrorKind, StoreError};

use crate::host::{HostMemory, PinnedBuffer};
use crate::span::{Memory, Span};
use crate::stream::Stream;

/// Bytes of a piece: long enough for the speed of the link, and whole blocks of the checksum.
const PIECE_LEN: u64 = 4 << 20;
const _: () = assert!(PIECE_LEN.is_multiple_of(BLOCK_LEN as u64));

impl Stream {
    /// The checksum of one span, when all that was queued before it has been done: computed on the device, and where it
    /// cannot, by the processor from pieces that are copied to it. Blocks until then.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] for what the device met with; as [`Stream::copy`] where the bytes are copied.
    pub fn checksum(&self, span: &Span) -> Result<u64, StoreError> {
        match self.checksums(std::slice::from_ref(span)) {
            Ok(found) => found.wait()?.first().copied().ok_or_else(|| {
                StoreError::protocol("a checksum of one object was computed for none of them")
            }),
            // A device that is lost refuses the copies as well, and says so.
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Os) => {
                self.checksum_by_host(span)
            }
            Err(error) => Err(error),
        }
    }

    fn checksum_by_host(&self, span: &Span) -> Result<u64, StoreError> {
        let len_bytes = span.len_bytes();
        let mut root = Root::new(len_bytes);
        if len_bytes == 0 {
            return Ok(root.finish());
        }
        let piece_len = len_bytes.min(PIECE_LEN);
        let buffer = Arc::new(PinnedBuffer::new(self.device(), piece_len)?);
        let mut piece = vec![0; usize::try_from(piece_len).unwrap_or_default()];
        let mut start = 0;
        while start < len_bytes {
            let part_len = piece_len.min(len_bytes - start);
            let memory = Memory::Host(Arc::clone(&buffer) as Arc<dyn HostMemory>);
            let from = Span::new(span.memory().clone(), span.offset().saturating_add(start), part_len)?;
            self.copy(&from, &Span::new(memory, 0, part_len)?)?;
            self.record()?.synchronize()?;
            let bytes = piece.get_mut(..usize::try_from(part_len).unwrap_or_default()).unwrap_or_default();
            buffer.read(0, bytes)?;
            bytes.chunks(BLOCK_LEN).for_each(|block| root.add(checksum::block(block)));
            start += part_len;
        }
        Ok(root.finish())
    }
}
