//! An object in place. Not a copy. Invariant: while an `Object` lives its pin holds its extent, and its segment is
//! mapped by the store that it shares.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use hetmem_core::receipt::Path;
use hetmem_core::wire::{Located, Range};
use hetmem_core::{Extent, Generation, Key, ObjectId, ObjectMeta, StoreError, Tier};
use hetmem_host_mem::{IndexEntry, Pinned};

use crate::shared::Shared;

/// The bytes of an object, or of a part of it, where they are. Dropping it lets go of them: one store to memory.
///
/// It does not keep its key, which whoever got it knows: to count the key's holders up and down would cost a fifth
/// of a get.
#[must_use = "an object holds its memory until it is dropped"]
pub struct Object {
    shared: Arc<Shared>,
    /// What the index says, but that the extent may be a part of the object's.
    entry: IndexEntry,
    pin: u32,
    path: Path,
}

impl Object {
    /// Takes over a pin of the index; from here on dropping the object gives it back. The segment must be mapped
    /// before the object is handed out.
    #[inline]
    pub(crate) fn local(shared: &Arc<Shared>, pinned: &Pinned) -> Self {
        Self {
            shared: Arc::clone(shared),
            entry: pinned.entry,
            pin: pinned.pin,
            path: Path::Local,
        }
    }

    /// The same with a pin that the node has made.
    pub(crate) fn located(shared: &Arc<Shared>, located: &Located) -> Self {
        Self {
            shared: Arc::clone(shared),
            entry: IndexEntry {
                object: located.object,
                meta: located.meta,
                generation: located.generation,
                extent: located.extent,
                tier: located.tier,
            },
            pin: located.pin,
            path: located.path,
        }
    }

    pub(crate) fn extent(&self) -> &Extent {
        &self.entry.extent
    }

    pub(crate) fn tier(&self) -> Tier {
        self.entry.tier
    }

    /// Keeps only a part of the bytes.
    pub(crate) fn narrow(&mut self, key: &Key, range: Option<Range>) -> Result<(), StoreError> {
        if let Some(range) = range {
            range.check(key, self.entry.meta.len_bytes)?;
            self.entry.extent = self.entry.extent.slice(range.start, range.len_bytes)?;
        }
        Ok(())
    }

    /// What the bytes of the whole object mean.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        &self.entry.meta
    }

    /// Which object of the key it is.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.entry.object
    }

    /// The number of this use of its memory.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.entry.generation
    }

    /// How the bytes came here for this get.
    #[must_use]
    pub fn path(&self) -> Path {
        self.path
    }

    /// Whether these are all bytes of the object.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.entry.extent.len_bytes == self.entry.meta.len_bytes
    }

    /// Compares the bytes with the checksum that their producer stored. `Ok(false)` where there is nothing to
    /// compare: the producer stored none, or this is a part.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] naming both values if they differ.
    pub fn verify(&self) -> Result<bool, StoreError> {
        let ObjectId { origin, epoch, number } = self.entry.object;
        self.verify_as(format_args!("object {number} of node {origin}, incarnation {epoch}"))
    }

    /// The same; an error names `subject`.
    pub(crate) fn verify_as(&self, subject: impl fmt::Display) -> Result<bool, StoreError> {
        if !self.is_whole() {
            return Ok(false);
        }
        match self.entry.meta.checksum.verify("", self) {
            Err(StoreError::Corrupt { why, .. }) => Err(StoreError::corrupt(subject, why)),
            verified => verified,
        }
    }
}

impl Deref for Object {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.shared.segments.bytes(&self.entry.extent).unwrap_or_default()
    }
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Object {
    #[inline]
    fn drop(&mut self) {
        self.shared.page.unpin(self.pin);
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("entry", &self.entry)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
