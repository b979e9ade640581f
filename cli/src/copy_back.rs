//! Objects of GPU memory on their way to a file: copied to pinned host memory in pieces. Not how they came to the GPU, nor their
//! checksums (`hetmem_client`). Invariant: while one piece is handed out, the next is being copied, into the other buffer.

use std::sync::Arc;

use hetmem_client::{GpuObject, StoreError};
use hetmem_gpu_mem::{Device, Event, HostMemory, Memory, PinnedBuffer, Span, Stream};

/// Bytes of a piece: long enough for the speed of the link.
const PIECE_LEN: u64 = 16 << 20;

/// Takes bytes, in order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), StoreError>;

/// Copies back, of one GPU at a time. Nothing of a GPU is touched before the first object.
#[derive(Debug, Default)]
pub(crate) struct CopyBack {
    lane: Option<Lane>,
    /// How many bytes it has copied.
    pub(crate) len_bytes: u64,
}

/// What copies of one GPU go through.
#[derive(Debug)]
struct Lane {
    stream: Stream,
    buffers: [Arc<PinnedBuffer>; 2],
    piece: Vec<u8>,
}

/// A piece that is being copied.
struct UnderWay {
    event: Event,
    buffer: Arc<PinnedBuffer>,
    len: usize,
}

impl CopyBack {
    /// Hands out all bytes of an object.
    ///
    /// # Errors
    /// What the device refused; what `sink` returns.
    pub(crate) fn hand_out(&mut self, object: &GpuObject, sink: Sink<'_>) -> Result<(), StoreError> {
        let len_bytes = object.len_bytes();
        if len_bytes > 0 {
            let lane = self.lane(object.device(), len_bytes.min(PIECE_LEN))?;
            lane.pieces(&object.span()?, sink)?;
        }
        self.len_bytes += len_bytes;
        Ok(())
    }

    /// The lane of this device, for pieces of this length at least.
    fn lane(&mut self, device: &Device, piece_len: u64) -> Result<&mut Lane, StoreError> {
        let fits = |lane: &Lane| {
            lane.stream.device().ordinal() == device.ordinal() && lane.piece.len() as u64 >= piece_len
        };
        let lane = match self.lane.take().filter(fits) {
            Some(lane) => lane,
            None => Lane::new(device, piece_len)?,
        };
        Ok(self.lane.insert(lane))
    }
}

impl Lane {
    fn new(device: &Device, piece_len: u64) -> Result<Self, StoreError> {
        let buffer = || PinnedBuffer::new(device, piece_len).map(Arc::new);
        let piece = vec![0; usize::try_from(piece_len).unwrap_or_default()];
        Ok(Self { stream: device.stream()?, buffers: [buffer()?, buffer()?], piece })
    }

    fn pieces(&mut self, span: &Span, sink: Sink<'_>) -> Result<(), StoreError> {
        let piece_len = self.piece.len() as u64;
        let buffers = self.buffers.clone();
        let mut under_way: Option<UnderWay> = None;
        let mut start = 0;
        for buffer in buffers.iter().cycle() {
            let len_bytes = piece_len.min(span.len_bytes().saturating_sub(start));
            let next = match len_bytes {
                0 => None,
                _ => Some(self.begin(span, start, len_bytes, buffer)?),
            };
            start += len_bytes;
            let is_last = next.is_none();
            if let Some(done) = std::mem::replace(&mut under_way, next) {
                self.finish(&done, sink)?;
            }
            if is_last {
                break;
            }
        }
        Ok(())
    }

    fn begin(
        &self,
        span: &Span,
        start: u64,
        len_bytes: u64,
        buffer: &Arc<PinnedBuffer>,
    ) -> Result<UnderWay, StoreError> {
        let memory = Memory::Host(Arc::clone(buffer) as Arc<dyn HostMemory>);
        let from = Span::new(span.memory().clone(), span.offset().saturating_add(start), len_bytes)?;
        self.stream.copy(&from, &Span::new(memory, 0, len_bytes)?)?;
        let len = usize::try_from(len_bytes).unwrap_or_default();
        Ok(UnderWay { event: self.stream.record()?, buffer: Arc::clone(buffer), len })
    }

    fn finish(&mut self, done: &UnderWay, sink: Sink<'_>) -> Result<(), StoreError> {
        done.event.synchronize()?;
        let piece = self.piece.get_mut(..done.len).unwrap_or_default();
        done.buffer.read(0, piece)?;
        sink(piece)
    }
}
