//! What kernels do, done by the processor where a device cannot: checksums and conversions of bytes that are copied to it in
//! pieces. Not the kernels (`launches`). Invariant: results are those of the kernels, and one piece is copied at a time.

use std::sync::Arc;

use hetmem_core::checksum::{self, BLOCK_LEN, Root};
use hetmem_core::{ErrorKind, StoreError};
use hetmem_kernels::cast::{Cast, convert};

use crate::host::{HostMemory, PinnedBuffer};
use crate::span::{Memory, Span};
use crate::stream::Stream;

/// Bytes of a piece: long enough for the speed of the link, whole blocks of the checksum, and whole elements.
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

    /// Converts the elements of one span into another, when all that was queued before it has been done: on the device,
    /// and where it cannot, by the processor from pieces that are copied to it and back. Blocks until then.
    ///
    /// # Errors
    /// As [`Stream::cast`], but for a driver that does not take the kernel; as [`Stream::copy`] where bytes are copied.
    pub fn convert(&self, from: &Span, to: &Span, cast: Cast) -> Result<(), StoreError> {
        match self.cast(from, to, cast) {
            Ok(()) => self.record()?.synchronize(),
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Os) => {
                self.convert_by_host(from, to, cast)
            }
            Err(error) => Err(error),
        }
    }

    fn convert_by_host(&self, from: &Span, to: &Span, cast: Cast) -> Result<(), StoreError> {
        let piece_len = from.len_bytes().min(PIECE_LEN);
        let source = Bounce::new(self, piece_len)?;
        let target = Bounce::new(self, cast.target_len(piece_len)?)?;
        let mut converted = vec![0; usize::try_from(cast.target_len(piece_len)?).unwrap_or_default()];
        let mut written = 0;
        source.read_all(self, from, piece_len, &mut |bytes| {
            let len_bytes = cast.target_len(bytes.len() as u64)?;
            let part = usize::try_from(len_bytes).ok().and_then(|len| converted.get_mut(..len));
            let part = part.unwrap_or_default();
            convert(cast, bytes, part)?;
            target.write(self, part, &piece_of(to, written, len_bytes)?)?;
            written += len_bytes;
            Ok(())
        })
    }

    fn checksum_by_host(&self, span: &Span) -> Result<u64, StoreError> {
        let len_bytes = span.len_bytes();
        let mut root = Root::new(len_bytes);
        if len_bytes > 0 {
            let piece_len = len_bytes.min(PIECE_LEN);
            Bounce::new(self, piece_len)?.read_all(self, span, piece_len, &mut |bytes| {
                bytes.chunks(BLOCK_LEN).for_each(|block| root.add(checksum::block(block)));
                Ok(())
            })?;
        }
        Ok(root.finish())
    }
}

fn piece_of(span: &Span, start: u64, len_bytes: u64) -> Result<Span, StoreError> {
    Span::new(span.memory().clone(), span.offset().saturating_add(start), len_bytes)
}

/// Pinned memory for one piece after the other.
struct Bounce(Arc<PinnedBuffer>);

impl Bounce {
    fn new(stream: &Stream, len_bytes: u64) -> Result<Self, StoreError> {
        PinnedBuffer::new(stream.device(), len_bytes).map(|buffer| Self(Arc::new(buffer)))
    }

    fn span(&self, len_bytes: u64) -> Result<Span, StoreError> {
        Span::new(Memory::Host(Arc::clone(&self.0) as Arc<dyn HostMemory>), 0, len_bytes)
    }

    /// Hands out all bytes of a span of the device, in pieces.
    fn read_all(
        &self,
        stream: &Stream,
        span: &Span,
        piece_len: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut piece = vec![0; usize::try_from(piece_len).unwrap_or_default()];
        let mut start = 0;
        while start < span.len_bytes() {
            let len_bytes = piece_len.min(span.len_bytes() - start);
            stream.copy(&piece_of(span, start, len_bytes)?, &self.span(len_bytes)?)?;
            stream.record()?.synchronize()?;
            let bytes = usize::try_from(len_bytes).ok().and_then(|len| piece.get_mut(..len));
            let bytes = bytes.unwrap_or_default();
            self.0.read(0, bytes)?;
            take(bytes)?;
            start += len_bytes;
        }
        Ok(())
    }

    /// Copies bytes to the device, and waits.
    fn write(&self, stream: &Stream, bytes: &[u8], to: &Span) -> Result<(), StoreError> {
        self.0.write(0, bytes)?;
        stream.copy(&self.span(bytes.len() as u64)?, to)?;
        stream.record()?.synchronize()
    }
}
