//! Where the bytes of a tensor are, in this process. Not what they mean (`tensor`). Invariant: while a value of these
//! types lives its bytes stay where they are; only private and owned ones are ever written through.

use std::sync::Arc;

use hetmem_client::{Converted, GpuObject, Object, PrivateBytes, StoreError};

use crate::fork::OfProcess;

/// Objects up to this many bytes are copied where a private view is wanted: a mapping costs as much.
const COPIED_LEN_MAX: usize = 64 << 10;

/// What frameworks want the first byte to be a multiple of.
const ALIGNMENT: usize = 64;

/// An address that only the device follows.
fn on_device(address: u64) -> *mut u8 {
    std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0))
}

/// The bytes of a tensor.
#[derive(Debug)]
pub(crate) enum Memory {
    /// An object in place, which nobody writes.
    Shared(OfProcess<Arc<Object>>),
    /// A part of such an object, to be written by this process for itself.
    Private(OfProcess<PrivateBytes>),
    /// Memory of this process.
    Owned(Owned),
    /// An object in GPU memory.
    Gpu(OfProcess<GpuObject>),
    /// Memory of this process on a GPU, which holds what was converted.
    Converted(OfProcess<Converted>),
}

impl Memory {
    pub(crate) fn of(object: Object) -> Self {
        Self::Shared(OfProcess::new(Arc::new(object)))
    }

    /// The address of the first byte: in host memory, or on the device.
    pub(crate) fn address(&self) -> *mut u8 {
        match self {
            Self::Shared(object) => object.as_ptr().cast_mut(),
            Self::Private(bytes) => bytes.address(),
            Self::Owned(owned) => owned.bytes().as_ptr().cast_mut(),
            Self::Gpu(object) => on_device(object.address()),
            Self::Converted(converted) => on_device(converted.on_gpu().map_or(0, |(address, _)| address)),
        }
    }

    /// The GPU that it is on, as this process numbers them.
    pub(crate) fn gpu(&self) -> Option<u16> {
        match self {
            Self::Gpu(object) => Some(object.device().ordinal()),
            Self::Converted(converted) => converted.on_gpu().map(|(_, ordinal)| ordinal),
            Self::Shared(_) | Self::Private(_) | Self::Owned(_) => None,
        }
    }

    /// The bytes that this process can read in place without fear that they change; none of a GPU's.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Shared(object) => Some(object),
            Self::Owned(owned) => Some(owned.bytes()),
            Self::Private(_) | Self::Gpu(_) | Self::Converted(_) => None,
        }
    }

    /// Whether this process may use it: a forked child may not use what its parent got, since the parent's pin can
    /// go at any time.
    pub(crate) fn is_here(&self) -> bool {
        match self {
            Self::Shared(object) => object.is_here(),
            Self::Private(bytes) => bytes.is_here(),
            Self::Gpu(object) => object.is_here(),
            Self::Converted(converted) => converted.is_here(),
            Self::Owned(_) => true,
        }
    }

    /// Memory to be written by whoever gets it, which holds `len` bytes from `start` of this: a view that is copied page
    /// by page, or a copy.
    pub(crate) fn private(&self, start: usize, len: usize) -> Result<(Self, usize), StoreError> {
        if let Self::Shared(object) = self
            && len > COPIED_LEN_MAX
            && let Some(bytes) = PrivateBytes::of(object)?
        {
            return Ok((Self::Private(OfProcess::new(bytes)), start));
        }
        self.copy(start, len).map(|owned| (Self::Owned(owned), 0))
    }

    /// A copy of `len` bytes from `start`.
    pub(crate) fn copy(&self, start: usize, len: usize) -> Result<Owned, StoreError> {
        let bytes = self.bytes().and_then(|bytes| bytes.get(start..)?.get(..len));
        let bytes = bytes.ok_or_else(|| {
            StoreError::unavailable(
                "a copy in host memory",
                "the bytes are in GPU memory: get them on \"cpu\"",
            )
        })?;
        Owned::copy_of(bytes)
    }
}

/// Bytes of this process alone, aligned as frameworks want them.
#[derive(Debug)]
pub(crate) struct Owned {
    buffer: Vec<u8>,
    start: usize,
}

impl Owned {
    /// Bytes that nobody else has.
    pub(crate) fn of(buffer: Vec<u8>) -> Self {
        Self { buffer, start: 0 }
    }

    fn copy_of(bytes: &[u8]) -> Result<Self, StoreError> {
        let mut buffer: Vec<u8> = Vec::new();
        buffer
            .try_reserve_exact(bytes.len().saturating_add(ALIGNMENT))
            .map_err(|error| StoreError::os(format!("copy {} bytes out of the store", bytes.len()), error))?;
        let start = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        buffer.resize(start, 0);
        buffer.extend_from_slice(bytes);
        Ok(Self { buffer, start })
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }
}
