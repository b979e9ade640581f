//! Private copies of objects, made page by page as they are written. Not objects: what is written here nobody else sees.
//! Invariant: while a [`PrivateBytes`] lives its object is pinned, so the pages that were not written keep their bytes.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use hetmem_core::{SegmentId, StoreError, Tier};
use hetmem_host_mem::PrivateView;
use parking_lot::Mutex;

use crate::object::Object;

/// Descriptors of segments of which private views were made, so that the next view needs no question.
#[derive(Debug, Default)]
pub(crate) struct SegmentFiles(Mutex<HashMap<SegmentId, Arc<OwnedFd>>>);

impl SegmentFiles {
    /// Lets go of a segment that the node has retired.
    pub(crate) fn release(&self, segment: SegmentId) {
        self.0.lock().remove(&segment);
    }
}

/// The bytes of an object as writable memory of this process alone.
#[derive(Debug)]
pub struct PrivateBytes {
    view: PrivateView,
    _object: Arc<Object>,
}

impl PrivateBytes {
    /// A view of an object in host memory, for code that may write to what it is given. Costs the mapping, and a copy of
    /// each page that is written. None where there is nothing to map privately: an object without bytes, or one on
    /// reserved huge pages; then a copy does.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] for an object in GPU memory; [`hetmem_core::ErrorKind::PeerLost`] if the
    /// node is gone; [`hetmem_core::ErrorKind::Os`] if it cannot be mapped.
    pub fn of(object: &Arc<Object>) -> Result<Option<Self>, StoreError> {
        let (extent, shared) = (*object.extent(), object.shared());
        if let tier @ Tier::Gpu(_) = object.tier() {
            return Err(StoreError::unavailable(
                "a private view",
                format!("the object is in {tier}; get it in host memory"),
            ));
        }
        if extent.len_bytes == 0 {
            return Ok(None);
        }
        let known = shared.files.0.lock().get(&extent.segment).cloned();
        let fd = match known {
            Some(fd) => fd,
            None => {
                let (fd, _) = shared.ask_for_segment(extent.segment)?;
                Arc::clone(shared.files.0.lock().entry(extent.segment).or_insert(Arc::new(fd)))
            }
        };
        let view = PrivateView::map(fd.as_fd(), extent.offset, extent.len_bytes)?;
        Ok(view.map(|view| Self { view, _object: Arc::clone(object) }))
    }

    /// The first byte; valid for reads and writes of `len_bytes` while `self` lives.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.view.address()
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.view.len_bytes()
    }
}
