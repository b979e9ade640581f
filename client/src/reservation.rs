//! An object that is being written. Not readable by anyone yet. Invariant: a `Reservation` ends in exactly one of
//! seal and abort; dropping it aborts.

use std::sync::Arc;
use std::time::Instant;

use hetmem_core::wire::{ClientMessage, ClientReply};
use hetmem_core::{Checksum, Generation, Key, ObjectMeta, StoreError, checksum};
use hetmem_host_mem::{ExtentMut, socket};

use crate::options::{PutOptions, PutOutcome};
use crate::shared::{Shared, unexpected};

/// What a request for memory has led to.
#[derive(Debug)]
pub enum Reserved {
    /// Memory to write into.
    Open(Reservation),
    /// An object of this key is there and is kept.
    Kept(PutOutcome),
}

/// Memory for one object: write into [`Reservation::bytes_mut`], then [`Reservation::seal`]. Dropped unsealed, the
/// memory goes back.
#[derive(Debug)]
#[must_use = "a reservation that is dropped is given up"]
pub struct Reservation {
    shared: Arc<Shared>,
    key: Key,
    meta: ObjectMeta,
    options: PutOptions,
    number: Generation,
    place: Written,
    open: bool,
    started: Instant,
}

/// Where the bytes are written.
#[derive(Debug)]
pub(crate) enum Written {
    /// In the object's own memory.
    Mapped(ExtentMut),
    /// The node writes them for this client. The buffer is empty until someone asks for it.
    Sent(Vec<u8>),
}

impl Reservation {
    pub(crate) fn new(
        shared: Arc<Shared>,
        key: Key,
        meta: ObjectMeta,
        options: PutOptions,
        number: Generation,
        place: Written,
    ) -> Self {
        Self { shared, key, meta, options, number, place, open: true, started: Instant::now() }
    }

    pub(crate) fn write_into(&mut self, place: Written) {
        self.place = place;
    }

    /// Gets a buffer where the memory itself cannot be mapped.
    pub(crate) fn with_buffer(mut self) -> Result<Self, StoreError> {
        if let Written::Sent(buffer) = &mut self.place {
            let len = usize::try_from(self.meta.len_bytes).unwrap_or(usize::MAX);
            buffer.try_reserve_exact(len).map_err(|error| {
                StoreError::os(format!("reserve {:?}: a buffer of {len} bytes", self.key), error)
            })?;
            buffer.resize(len, 0);
        }
        Ok(self)
    }

    pub(crate) fn options(&self) -> &PutOptions {
        &self.options
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The object's name.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// What the bytes will mean.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    /// Whether the bytes are written where they will stay; else they are sent to the node at seal.
    #[must_use]
    pub fn in_place(&self) -> bool {
        matches!(self.place, Written::Mapped(_))
    }

    /// The object's bytes, to be written. What they are before is unspecified.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.place {
            Written::Mapped(extent) => extent,
            Written::Sent(buffer) => buffer,
        }
    }

    /// Makes the object readable, and immutable. Computes the checksum unless the options say no.
    ///
    /// # Errors
    /// What the node refused with, or [`hetmem_core::ErrorKind::PeerLost`].
    pub fn seal(mut self) -> Result<PutOutcome, StoreError> {
        let value = |bytes: &[u8]| Checksum::Xxh3Blocks(checksum::of(bytes));
        let checksum = match (&self.place, self.options.checksum) {
            (_, false) => Checksum::None,
            (Written::Mapped(extent), true) => value(extent),
            (Written::Sent(buffer), true) => value(buffer),
        };
        self.finish(checksum)
    }

    /// The same with a checksum that the producer computed while it wrote.
    ///
    /// # Errors
    /// As [`Reservation::seal`].
    pub fn seal_with_checksum(mut self, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        self.finish(checksum)
    }

    /// Copies all bytes in, computing the checksum on the way, and seals.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if `bytes` is not as long as the object; else as [`Reservation::seal`].
    pub fn fill(mut self, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
        check_len(&self.key, &self.meta, bytes)?;
        let checksum = match &mut self.place {
            Written::Mapped(extent) if self.options.checksum => {
                Checksum::Xxh3Blocks(extent.fill_with_checksum(0, bytes)?)
            }
            Written::Mapped(extent) => {
                hetmem_host_mem::copy::copy(extent, bytes);
                Checksum::None
            }
            Written::Sent(buffer) => {
                // Straight from the caller's bytes: the buffer would be one more copy.
                *buffer = Vec::new();
                self.send(bytes)?;
                match self.options.checksum {
                    true => Checksum::Xxh3Blocks(checksum::of(bytes)),
                    false => Checksum::None,
                }
            }
        };
        self.finish(checksum)
    }

    /// Gives the memory back. Dropping does the same.
    pub fn abort(self) {
        drop(self);
    }

    /// Seals what was written without this value's doing.
    pub(crate) fn seal_written(mut self, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        self.finish(checksum)
    }

    fn finish(&mut self, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        // The place goes before the seal: from then on nobody here may write.
        match std::mem::replace(&mut self.place, Written::Sent(Vec::new())) {
            Written::Mapped(extent) => drop(extent),
            Written::Sent(buffer) => self.send(&buffer)?,
        }
        let message = ClientMessage::Seal { reservation: self.number, checksum };
        let answer = self.shared.call(&message, &[], self.options.timeout)?;
        // The node has answered: there is nothing left to give up.
        self.open = false;
        let outcome = self.shared.outcome(&answer.reply, self.meta.len_bytes, self.started);
        outcome.ok_or_else(|| unexpected(&message, &answer.reply))
    }

    fn send(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut offset = 0;
        for part in bytes.chunks(socket::PAYLOAD_LEN_MAX) {
            let message = ClientMessage::Write { reservation: self.number, offset };
            match self.shared.call(&message, part, self.options.timeout)?.reply {
                ClientReply::Done => offset += part.len() as u64,
                reply => return Err(unexpected(&message, &reply)),
            }
        }
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.open {
            self.place = Written::Sent(Vec::new());
            self.shared.tell(&ClientMessage::Abort { reservation: self.number });
        }
    }
}

/// Refuses bytes that are not as many as the metadata says.
pub(crate) fn check_len(key: &Key, meta: &ObjectMeta, bytes: &[u8]) -> Result<(), StoreError> {
    if bytes.len() as u64 == meta.len_bytes {
        return Ok(());
    }
    Err(StoreError::invalid(
        "object",
        format!(
            "put {key:?}: shape {:?} of {} fills {} bytes, {} were given",
            meta.shape,
            meta.dtype,
            meta.len_bytes,
            bytes.len()
        ),
    ))
}
