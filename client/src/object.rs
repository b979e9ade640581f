//! An object in place. Not a copy. Invariant: while an `Object` lives its pin holds its extent, and its segment is
//! mapped by the store that it shares.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use hetmem_core::receipt::{Carried, Path, Place, Receipt};
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
    /// Two hundred bytes: to allocate them costs less than to copy them at every hand-over.
    held: Box<Held>,
}

struct Held {
    shared: Arc<Shared>,
    /// What the index says, but that the extent may be a part of the object's.
    entry: IndexEntry,
    pin: u32,
    path: Path,
    /// The tier of this node that it was copied from for this get, if it was.
    copied_from: Option<Tier>,
    /// If it came from a peer for this get.
    carried: Option<Box<Carried>>,
    /// How long the get took, if the node was asked.
    elapsed: Option<Duration>,
}

impl Object {
    /// Takes over a pin of the index; from here on dropping the object gives it back. The segment must be mapped
    /// before the object is handed out.
    #[inline]
    pub(crate) fn local(shared: &Arc<Shared>, pinned: &Pinned) -> Self {
        // Memory first, then what goes there: made on the stack and copied, it would cost half as much as all else.
        let held = Box::new_uninit();
        let shared = Arc::clone(shared);
        Self {
            held: Box::write(
                held,
                Held {
                    shared,
                    entry: pinned.entry,
                    pin: pinned.pin,
                    path: Path::Local,
                    copied_from: None,
                    carried: None,
                    elapsed: None,
                },
            ),
        }
    }

    /// The same with a pin that the node has made.
    pub(crate) fn located(shared: &Arc<Shared>, located: Located, elapsed: Duration) -> Self {
        let held = Held {
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
            copied_from: located.copied_from,
            carried: located.carried,
            elapsed: Some(elapsed),
        };
        Self { held: Box::new(held) }
    }

    pub(crate) fn extent(&self) -> &Extent {
        &self.held.entry.extent
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.held.shared
    }

    /// Keeps only `len_bytes` bytes from `start` of what there is.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any of them lies outside.
    pub fn slice(mut self, start: u64, len_bytes: u64) -> Result<Self, StoreError> {
        self.held.entry.extent = self.held.entry.extent.slice(start, len_bytes)?;
        Ok(self)
    }

    /// Where it is on this node.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.held.entry.tier
    }

    /// Keeps only a part of the bytes.
    pub(crate) fn narrow(&mut self, key: &Key, range: Option<Range>) -> Result<(), StoreError> {
        if let Some(range) = range {
            range.check(key, self.held.entry.meta.len_bytes)?;
            self.held.entry.extent = self.held.entry.extent.slice(range.start, range.len_bytes)?;
        }
        Ok(())
    }

    /// What the bytes of the whole object mean.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        &self.held.entry.meta
    }

    /// Which object of the key it is.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.held.entry.object
    }

    /// The number of this use of its memory.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.held.entry.generation
    }

    /// How the bytes came here for this get.
    #[must_use]
    pub fn path(&self) -> Path {
        self.held.path
    }

    /// How this get really moved the bytes.
    #[must_use]
    pub fn receipt(&self) -> Receipt {
        let Held { shared, entry, path, copied_from, carried, elapsed, .. } = &*self.held;
        let len_bytes = entry.extent.len_bytes;
        let receipt = Receipt {
            path: *path,
            fabric: None,
            from: shared.place(Some(copied_from.unwrap_or(entry.tier))),
            to: shared.place(Some(entry.tier)),
            bytes: if copied_from.is_some() { len_bytes } else { 0 },
            staged_bytes: 0,
            round_trips: 0,
            threshold_bytes: None,
            elapsed: *elapsed,
        };
        match carried {
            None => receipt,
            Some(carried) => Receipt {
                fabric: Some(Arc::clone(&carried.fabric)),
                from: Place { node: Arc::clone(&carried.from), tier: Some(carried.from_tier) },
                bytes: carried.moved.bytes,
                // What landed in one tier and was copied to another passed through the first.
                staged_bytes: if copied_from.is_some() { len_bytes } else { carried.moved.staged_bytes },
                round_trips: carried.round_trips,
                threshold_bytes: Some(carried.threshold_bytes),
                ..receipt
            },
        }
    }

    /// Whether these are all bytes of the object.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.held.entry.extent.len_bytes == self.held.entry.meta.len_bytes
    }

    /// Compares the bytes with the checksum that their producer stored. `Ok(false)` where there is nothing to
    /// compare: the producer stored none, or this is a part.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] naming both values if they differ.
    pub fn verify(&self) -> Result<bool, StoreError> {
        let ObjectId { origin, epoch, number } = self.held.entry.object;
        self.verify_as(format_args!("object {number} of node {origin}, incarnation {epoch}"))
    }

    /// The same; an error names `subject`.
    pub(crate) fn verify_as(&self, subject: impl fmt::Display) -> Result<bool, StoreError> {
        if !self.is_whole() {
            return Ok(false);
        }
        match self.held.entry.meta.checksum.verify("", self) {
            Err(StoreError::Corrupt { why, .. }) => Err(StoreError::corrupt(subject, why)),
            verified => verified,
        }
    }
}

impl Deref for Object {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.held.shared.segments.bytes(&self.held.entry.extent).unwrap_or_default()
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
        self.held.shared.page.unpin(self.held.pin);
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("entry", &self.held.entry)
            .field("path", &self.held.path)
            .finish_non_exhaustive()
    }
}
