//! Checksums of objects in GPU memory, computed there. Not those of host memory (`object`, `reservation`). Invariant: bytes are
//! compared with the checksum that was stored, or it is said that there was nothing to compare.

use std::collections::BTreeMap;
use std::fmt;

use hetmem_core::{Checksum, ObjectId, StoreError};
use hetmem_gpu_mem::{Checksums, Device, Span, Stream};
use parking_lot::Mutex;

use crate::gpu::{GpuObject, GpuReservation};
use crate::options::PutOutcome;
use crate::shared::Shared;

/// The stream of each device on which checksums are computed: one takes long to make.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<BTreeMap<u16, Stream>>);

impl Streams {
    pub(crate) fn of(&self, device: &Device) -> Result<Stream, StoreError> {
        let mut streams = self.0.lock();
        if let Some(stream) = streams.get(&device.ordinal()) {
            return Ok(stream.clone());
        }
        let stream = device.stream()?;
        streams.insert(device.ordinal(), stream.clone());
        Ok(stream)
    }
}

impl Shared {
    fn checksum_on(&self, device: &Device, span: &Span) -> Result<u64, StoreError> {
        self.gpu.streams.of(device)?.checksum(span)
    }
}

impl GpuObject {
    /// Compares the bytes with the checksum that their producer stored, on the device: nothing is copied back, but by a
    /// driver that does not take the kernel. Blocks until the device has computed. `Ok(false)` where there is nothing to
    /// compare: the producer stored none, or this is a part.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] naming both values if they differ; what the device refused.
    pub fn verify(&self) -> Result<bool, StoreError> {
        let ObjectId { origin, epoch, number } = self.id();
        self.verify_as(format_args!("object {number} of node {origin}, incarnation {epoch}"))
    }

    /// The same; an error names `subject`.
    pub(crate) fn verify_as(&self, subject: impl fmt::Display) -> Result<bool, StoreError> {
        let Checksum::Xxh3Blocks(expected) = self.meta().checksum else {
            return Ok(false);
        };
        if self.len_bytes() != self.meta().len_bytes {
            return Ok(false);
        }
        let found = self.shared().checksum_on(self.device(), &self.span()?)?;
        if found == expected {
            return Ok(true);
        }
        Err(StoreError::corrupt(
            subject,
            format!(
                "checksum xxh3-blocks is {found:016x}, {expected:016x} was stored ({} bytes of {})",
                self.len_bytes(),
                self.tier()
            ),
        ))
    }
}

impl GpuReservation {
    /// Makes the object readable once all that was queued on `stream` before has ended: nobody sees a byte earlier.
    /// Blocks until then. The object has the checksum that is given; with [`Checksum::None`], one that the device
    /// computes, unless the options say no.
    ///
    /// # Errors
    /// What the device or the node refused with; the memory goes back.
    pub fn seal_after(self, stream: &Stream, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        let checksum = self.checksum_or(checksum, stream)?;
        stream.synchronize()?;
        self.seal_with(checksum)
    }

    /// The same for a caller that has waited itself until its last write to the memory has ended.
    ///
    /// # Errors
    /// What the device or the node refused with.
    pub fn seal(self, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        let checksum = match self.wants_checksum(checksum) {
            true => self.checksum_or(checksum, &self.shared().gpu.streams.of(self.device())?)?,
            false => checksum,
        };
        self.seal_with(checksum)
    }

    fn wants_checksum(&self, given: Checksum) -> bool {
        given == Checksum::None && self.options().checksum
    }

    /// What was given, or what the device computes behind the stream's work. A device that does not take the kernel
    /// computes none: to copy the bytes back for it would cost more than the put.
    fn checksum_or(&self, given: Checksum, stream: &Stream) -> Result<Checksum, StoreError> {
        if !self.wants_checksum(given) || stream.device().can_checksum().is_err() {
            return Ok(given);
        }
        let found = stream.checksums(&[self.span()?]).and_then(Checksums::wait);
        // What the stream met with before is said by whoever waits for it.
        let found = found.ok().and_then(|found| found.first().copied());
        Ok(found.map_or(Checksum::None, Checksum::Xxh3Blocks))
    }
}
