//! Gets of an object as numbers of another format. Not a view: the bytes are new, and the caller's alone. Invariant: what is
//! handed out is converted whole, from bytes that were held in place meanwhile.

use std::sync::Arc;

use hetmem_core::{Checksum, DType, Key, ObjectMeta, StoreError, TierHint};
use hetmem_gpu_mem::{Cast, Memory, Segment, Span, convert};

use crate::gpu::{GpuObject, Placed};
use crate::object::Object;
use crate::options::GetOptions;
use crate::store::Store;

/// Numbers that were converted, in memory of their own.
#[derive(Debug)]
pub enum Converted {
    /// In this process's memory.
    Host {
        /// What the bytes mean now.
        meta: ObjectMeta,
        /// Little-endian, as all bytes of the store.
        bytes: Vec<u8>,
    },
    /// In GPU memory of this process, from its beginning on.
    Gpu {
        /// What the bytes mean now.
        meta: ObjectMeta,
        /// The memory, which is longer: [`ObjectMeta::len_bytes`] says how much of it counts.
        memory: Arc<Segment>,
    },
}

impl Converted {
    /// What the bytes mean now. They have no checksum.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Host { meta, .. } | Self::Gpu { meta, .. } => meta,
        }
    }

    /// Where they are on a GPU: the address on the device, and the device as this process numbers it.
    #[must_use]
    pub fn on_gpu(&self) -> Option<(u64, u16)> {
        match self {
            Self::Host { .. } => None,
            Self::Gpu { memory, .. } => Some((memory.address(), memory.device().ordinal())),
        }
    }

    /// The bytes, to copy from, where they are on a GPU.
    ///
    /// # Errors
    /// Those of [`Span::new`].
    pub fn span(&self) -> Option<Result<Span, StoreError>> {
        match self {
            Self::Host { .. } => None,
            Self::Gpu { meta, memory } => {
                Some(Span::new(Memory::Device(Arc::clone(memory)), 0, meta.len_bytes))
            }
        }
    }
}

impl Store {
    /// An object of float32, bfloat16 or float16 as another of these, in new memory of this process: converted on the
    /// device where the object is on a GPU (a driver that does not take the kernel has the processor do it, by way of host
    /// memory), else by the processor. Rounded to the nearest, ties to even; NaN stays NaN.
    /// With the element type that it has, it is copied.
    ///
    /// `hint` is where the object is wanted before it is converted, and so where the result is; see [`Store::get_in`].
    ///
    /// # Errors
    /// As [`Store::get_in`]; [`hetmem_core::ErrorKind::Invalid`] for a pair of types that is not converted or a range of
    /// bytes; [`hetmem_core::ErrorKind::NoSpace`] if the device has no memory for the result.
    pub fn get_as(
        &self,
        key: &Key,
        hint: impl Into<TierHint>,
        dtype: DType,
        options: &GetOptions,
    ) -> Result<Converted, StoreError> {
        if options.range.is_some() {
            let why = format!(
                "get {key:?}: a part is bytes, not numbers: get it all, or convert the part yourself"
            );
            return Err(StoreError::invalid("range", why));
        }
        match self.get_in(key, hint, options)? {
            Placed::Host(object) => in_host(&object, dtype),
            Placed::Gpu(object) => self.on_device(&object, dtype),
        }
    }

    fn on_device(&self, object: &GpuObject, dtype: DType) -> Result<Converted, StoreError> {
        let cast = cast_of(object.meta(), dtype)?;
        let meta = meta_as(object.meta(), dtype)?;
        let memory = Arc::new(object.device().create_segment(meta.len_bytes.max(1))?);
        let stream = self.shared.gpu.streams.of(object.device())?;
        let (from, to) = (object.span()?, Span::new(Memory::Device(Arc::clone(&memory)), 0, meta.len_bytes)?);
        // Both end before the object is let go of.
        match cast {
            Some(cast) => stream.convert(&from, &to, cast)?,
            None => stream.copy(&from, &to).and_then(|()| stream.record()?.synchronize())?,
        }
        Ok(Converted::Gpu { meta, memory })
    }
}

fn in_host(object: &Object, dtype: DType) -> Result<Converted, StoreError> {
    let cast = cast_of(object.meta(), dtype)?;
    let meta = meta_as(object.meta(), dtype)?;
    let Some(cast) = cast else {
        return Ok(Converted::Host { meta, bytes: object.to_vec() });
    };
    let len = usize::try_from(meta.len_bytes).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|error| StoreError::os(format!("convert to {dtype}: a buffer of {len} bytes"), error))?;
    bytes.resize(len, 0);
    convert(cast, object, &mut bytes)?;
    Ok(Converted::Host { meta, bytes })
}

/// The conversion, if one is needed.
fn cast_of(meta: &ObjectMeta, dtype: DType) -> Result<Option<Cast>, StoreError> {
    if meta.dtype == dtype { Ok(None) } else { Cast::new(meta.dtype, dtype).map(Some) }
}

fn meta_as(meta: &ObjectMeta, dtype: DType) -> Result<ObjectMeta, StoreError> {
    Ok(ObjectMeta::tensor(dtype, meta.shape.dims())?.with_checksum(Checksum::None))
}
