//! Arrays of others, to read or to write: whatever has DLPack or the buffer protocol, row-major or not. Not arrays of the
//! store (`tensor`). Invariant: the memory stays while the value lives, which holds what its owner gave for it.
//!
//! Holds unsafe code: memory of others, whose address, shape and strides are what its owner said.
#![allow(unsafe_code)]

use std::slice;

use hetmem_client::{DType, ObjectMeta, StoreError};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::dlpack::Foreign;
pub(crate) use crate::dlpack::LEGACY_STREAM;
use crate::dtype;
use crate::errors::invalid;

/// What keeps an array's memory.
#[derive(Debug)]
enum Owner {
    Buffer(#[expect(dead_code, reason = "held, not used")] PyUntypedBuffer),
    DlPack(#[expect(dead_code, reason = "held, not used")] Foreign),
}

/// An array of somebody else's.
#[derive(Debug)]
pub(crate) struct Source {
    _owner: Owner,
    data: *mut u8,
    pub(crate) device: (i32, i32),
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// In bytes; none where it is row-major without gaps.
    strides: Option<Vec<isize>>,
    read_only: bool,
    len: usize,
}

// SAFETY: the memory belongs to the process; what its owner does to it meanwhile it does to every reader. Owners are
// released with the GIL, which they take for it.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Sync for Source {}

impl Source {
    /// The memory of an object with DLPack or the buffer protocol.
    ///
    /// # Errors
    /// `TypeError` if it has neither; `hetmem.Invalid` for elements that the store does not keep.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if let Ok(buffer) = PyUntypedBuffer::get(object) {
            return Self::of_buffer(py, buffer, None);
        }
        if object.hasattr(pyo3::intern!(py, "__array_interface__"))? {
            if object.getattr("ndim")?.extract::<usize>()? == 0 {
                // A buffer without dimensions has no list of them, which PyO3 refuses.
                return Ok(Self { shape: Vec::new(), ..Self::of(&object.call_method1("reshape", (1,))?)? });
            }
            return Self::of_named(object);
        }
        let has_gradient =
            object.getattr_opt("requires_grad")?.is_some_and(|flag| flag.is_truthy().unwrap_or(false));
        let detached = if has_gradient { Some(object.call_method0("detach")?) } else { None };
        let object = detached.as_ref().unwrap_or(object);
        match Foreign::of(object) {
            Ok(Some(foreign)) => {
                let source = Self::of_dlpack(py, foreign)?;
                // Gathered where it is, by whoever knows its device.
                let gather = !source.is_on_host() && source.strides.is_some();
                match object.getattr_opt("contiguous")?.filter(|_| gather) {
                    Some(contiguous) => Self::of(&contiguous.call0()?),
                    None => Ok(source),
                }
            }
            Ok(None) => {
                let kind = object.get_type();
                Err(PyTypeError::new_err(format!(
                    "a {} has neither DLPack nor the buffer protocol: give an array, a tensor or bytes \
                     (numpy.asarray(x) makes one of a list or a number)",
                    kind.name()?
                )))
            }
            // Newer element types than the exporter has for DLPack, by their bits.
            Err(error) => Self::of_bits(object).map_err(|_| error),
        }
    }

    /// A numpy array of a type that the buffer protocol lacks: bfloat16 and the like, by name.
    fn of_named(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = array.py();
        let name: String = array.getattr("dtype")?.getattr("name")?.extract()?;
        let dtype = dtype::parse(&name).map_err(|error| crate::errors::to_python(py, &error))?;
        let bits = match dtype.bits() {
            8 => "u1",
            16 => "u2",
            _ => {
                let why = format!("numpy arrays of {name} are not taken; view them as bytes");
                return Err(invalid(py, "array", why));
            }
        };
        let buffer = PyUntypedBuffer::get(&array.call_method1("view", (bits,))?)?;
        Self::of_buffer(py, buffer, Some(dtype))
    }

    /// A torch tensor of a type that its DLPack lacks: float8, by name.
    fn of_bits(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let name = tensor.getattr("dtype")?.str()?.to_string();
        let dtype = dtype::parse(&name).map_err(|error| crate::errors::to_python(py, &error))?;
        if dtype.bits() != 8 {
            return Err(PyTypeError::new_err(name));
        }
        let bytes = tensor.call_method1("view", (py.import("torch")?.getattr("uint8")?,))?;
        let Some(foreign) = Foreign::of(&bytes)? else { return Err(PyTypeError::new_err(name)) };
        Ok(Self { dtype, ..Self::of_dlpack(py, foreign)? })
    }

    fn of_buffer(py: Python<'_>, buffer: PyUntypedBuffer, named: Option<DType>) -> PyResult<Self> {
        let format = buffer.format().to_string_lossy();
        let dtype = match named {
            Some(dtype) => dtype,
            None => {
                dtype::from_format(&format, buffer.item_size()).map_err(|why| invalid(py, "array", why))?
            }
        };
        if buffer.suboffsets().is_some_and(|offsets| offsets.iter().any(|offset| *offset >= 0)) {
            return Err(invalid(py, "array", "its rows are behind pointers: copy it first".to_owned()));
        }
        let strides = (!buffer.is_c_contiguous()).then(|| buffer.strides().to_vec());
        Ok(Self {
            data: buffer.buf_ptr().cast(),
            device: (crate::dlpack::CPU, 0),
            dtype,
            shape: buffer.shape().iter().map(|dim| *dim as u64).collect(),
            strides,
            read_only: buffer.readonly(),
            len: buffer.len_bytes(),
            _owner: Owner::Buffer(buffer),
        })
    }

    fn of_dlpack(py: Python<'_>, foreign: Foreign) -> PyResult<Self> {
        let (code, bits, lanes) = foreign.dtype;
        let wrong = |why: String| invalid(py, "tensor", why);
        let dtype = dtype::from_dlpack(code, bits, lanes).ok_or_else(|| {
            wrong(format!("DLPack type {code} of {bits} bits in {lanes} lanes is not kept"))
        })?;
        if dtype.bits() % 8 != 0 {
            return Err(wrong(format!("{dtype} shares bytes between elements: put the bytes")));
        }
        let item = usize::try_from(dtype.bits() / 8).unwrap_or(1);
        let dims: Option<Vec<u64>> = foreign.shape.iter().map(|dim| u64::try_from(*dim).ok()).collect();
        let shape = dims.ok_or_else(|| wrong(format!("a shape of {:?}", foreign.shape)))?;
        let len = shape.iter().try_fold(item, |len, dim| len.checked_mul(usize::try_from(*dim).ok()?));
        let len = len.ok_or_else(|| wrong(format!("a shape of {shape:?}")))?;
        if foreign.data.is_null() && len > 0 {
            return Err(wrong(format!("{len} bytes at no address")));
        }
        let of_bytes = |stride: &i64| isize::try_from(*stride).ok()?.checked_mul(item.cast_signed());
        let strides: Option<Vec<isize>> = match &foreign.strides {
            Some(strides) => strides.iter().map(of_bytes).collect(),
            None => None,
        };
        if foreign.strides.is_some() && strides.is_none() {
            return Err(wrong(format!("strides of {:?}", foreign.strides)));
        }
        let strides = strides.filter(|strides| !is_row_major(&shape, strides, item));
        Ok(Self {
            data: foreign.data,
            device: if foreign.is_on_host() { (crate::dlpack::CPU, 0) } else { foreign.device },
            dtype,
            shape,
            strides,
            read_only: foreign.read_only,
            len,
            _owner: Owner::DlPack(foreign),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_on_host(&self) -> bool {
        self.device.0 == crate::dlpack::CPU
    }

    /// What its bytes will mean in the store.
    pub(crate) fn meta(&self) -> Result<ObjectMeta, StoreError> {
        ObjectMeta::tensor(self.dtype, &self.shape)
    }

    /// Its address on its device, where it is row-major.
    pub(crate) fn device_address(&self) -> Option<u64> {
        self.strides.is_none().then(|| self.data.addr() as u64)
    }

    /// The bytes, where they are row-major in host memory.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        if self.strides.is_some() || !self.is_on_host() {
            return None;
        }
        if self.len == 0 || self.data.is_null() {
            return Some(&[]);
        }
        // SAFETY: the owner says that so many bytes are there, and keeps them while `self` lives.
        Some(unsafe { slice::from_raw_parts(self.data, self.len) })
    }

    /// Copies the elements to `target`, row-major; `target` is as long as they are.
    pub(crate) fn copy_to(&self, target: &mut [u8]) {
        if let Some(bytes) = self.bytes() {
            hetmem_host_mem::copy::copy(target, bytes);
            return;
        }
        let mut at = 0;
        self.each_run(&mut |run, len| {
            let Some(part) = target.get_mut(at..at + len) else { return };
            // SAFETY: a run lies inside what the owner says is there; `target` is memory of the store.
            unsafe { std::ptr::copy_nonoverlapping(run.cast_const(), part.as_mut_ptr(), len) };
            at += len;
        });
    }

    /// Copies `bytes`, row-major, to the elements.
    ///
    /// # Errors
    /// [`hetmem_client::ErrorKind::Invalid`] if it is read-only, or not on the host.
    pub(crate) fn copy_from(&self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.read_only || !self.is_on_host() {
            return Err(StoreError::invalid(
                "out",
                "it cannot be written: give a writable array in host memory",
            ));
        }
        if bytes.len() != self.len {
            return Err(StoreError::invalid("out", format!("{} bytes for {}", bytes.len(), self.len)));
        }
        if self.strides.is_none() && self.len > 0 {
            // SAFETY: the owner says that so many bytes are there, and that they may be written.
            let target = unsafe { slice::from_raw_parts_mut(self.data, self.len) };
            hetmem_host_mem::copy::copy(target, bytes);
            return Ok(());
        }
        let mut at = 0;
        self.each_run(&mut |run, len| {
            let Some(part) = bytes.get(at..at + len) else { return };
            // SAFETY: as above, for one run.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), run, len) };
            at += len;
        });
        Ok(())
    }

    /// Each piece of consecutive bytes, in row-major order.
    fn each_run(&self, take: &mut impl FnMut(*mut u8, usize)) {
        let Some(strides) = &self.strides else { return };
        if self.len == 0 {
            return;
        }
        // Inner dimensions that lie one after the other are one run.
        let mut run = usize::try_from(self.dtype.bits() / 8).unwrap_or(1);
        let mut outer = self.shape.len();
        while let (Some(dim), Some(stride)) =
            (self.shape.get(outer.wrapping_sub(1)), strides.get(outer.wrapping_sub(1)))
        {
            if *dim != 1 && *stride != run.cast_signed() {
                break;
            }
            run *= usize::try_from(*dim).unwrap_or(1);
            outer -= 1;
        }
        walk(self.data, self.shape.get(..outer).unwrap_or_default(), strides, run, take);
    }
}

fn walk(at: *mut u8, shape: &[u64], strides: &[isize], run: usize, take: &mut impl FnMut(*mut u8, usize)) {
    let (Some((dim, inner)), Some((stride, below))) = (shape.split_first(), strides.split_first()) else {
        take(at, run);
        return;
    };
    let mut at = at;
    for _ in 0..*dim {
        walk(at, inner, below, run, take);
        at = at.wrapping_offset(*stride);
    }
}

fn is_row_major(shape: &[u64], strides: &[isize], item: usize) -> bool {
    let mut step = item.cast_signed();
    for (dim, stride) in shape.iter().zip(strides).rev() {
        if *dim > 1 && *stride != step {
            return false;
        }
        step = step.saturating_mul(isize::try_from(*dim).unwrap_or(isize::MAX));
    }
    true
}
