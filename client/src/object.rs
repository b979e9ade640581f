//! An object in place. Not a copy. Invariant: while an `Object` lives its pin holds its extent, and its segment is
//! mapped by the store that it shares.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use hetmem_core::receipt::Path;
use hetmem_core::wire::Range;
use hetmem_core::{Extent, Generation, Key, ObjectId, ObjectMeta, StoreError};

use crate::store::Shared;

/// The bytes of an object, or of a part of it, where they are. Dropping it lets go of them: one store to memory.
#[must_use = "an object holds its memory until it is dropped"]
pub struct Object {
    shared: Arc<Shared>,
    key: Key,
    located: Located,
}

/// Where a pinned object is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub(crate) object: ObjectId,
    /// Of the whole object.
    pub(crate) meta: ObjectMeta,
    /// The bytes wanted.
    pub(crate) extent: Extent,
    pub(crate) generation: Generation,
    pub(crate) pin: u32,
    pub(crate) path: Path,
}

impl Object {
    /// Takes over a pin; from here on dropping the object gives it back. The caller makes sure that the segment is
    /// mapped before the object is handed out.
    pub(crate) fn new(shared: Arc<Shared>, key: Key, located: Located) -> Self {
        Self { shared, key, located }
    }

    pub(crate) fn extent(&self) -> &Extent {
        &self.located.extent
    }

    /// Keeps only a part of the bytes.
    pub(crate) fn narrow(&mut self, range: Option<Range>) -> Result<(), StoreError> {
        if let Some(range) = range {
            range.check(&self.key, self.located.meta.len_bytes)?;
            self.located.extent = self.located.extent.slice(range.start, range.len_bytes)?;
        }
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// What the bytes of the whole object mean.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        &self.located.meta
    }

    /// Which object of the key it is.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.located.object
    }

    /// The number of this use of its memory.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.located.generation
    }

    /// How the bytes came here for this get.
    #[must_use]
    pub fn path(&self) -> Path {
        self.located.path
    }

    /// Whether these are all bytes of the object.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.located.extent.len_bytes == self.located.meta.len_bytes
    }

    /// Compares the bytes with the checksum that their producer stored. `Ok(false)` where there is nothing to
    /// compare: the producer stored none, or this is a part.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] naming both values if they differ.
    pub fn verify(&self) -> Result<bool, StoreError> {
        if !self.is_whole() {
            return Ok(false);
        }
        self.located.meta.checksum.verify(self.key.as_str(), self)
    }
}

impl Deref for Object {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.shared
            .segments
            .bytes(&self.located.extent)
            .unwrap_or_default()
    }
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        self.shared.page.unpin(self.located.pin);
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("key", &self.key)
            .field("located", &self.located)
            .finish_non_exhaustive()
    }
}
