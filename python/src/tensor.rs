//! What a get returns: `hetmem.Tensor`, the bytes of an object and what they mean, as Python sees them. Not where they
//! are (`memory`), not DLPack's layout (`dlpack`). Invariant: nothing that is handed out here can change the store's
//! bytes: it is read-only where its consumer keeps to that, and private to this process where it may not.
//!
//! Holds unsafe code: the buffer protocol, whose structure Python's C side reads.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::Arc;

use hetmem_client::{Converted, DType, GpuObject, Object, ObjectMeta, Receipt, Shape, StoreError};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PySlice, PyTuple};

use crate::dlpack::{CPU, CUDA, Exported};
use crate::dtype;
use crate::errors::{invalid, to_python};
use crate::fork::OfProcess;
use crate::frameworks;
use crate::memory::{Memory, Owned};
use crate::receipt::PyReceipt;
use crate::signals::without_gil;

const DIMS_MAX: usize = hetmem_core::DIMS_MAX;

/// An array in the store, or a copy of one: its element type, shape and bytes.
///
/// The object stays where it is, unchanged, while this or any view of it lives; the last of them lets go of it. Views
/// cost no copy: `numpy()`, `memoryview(tensor)` and `numpy.asarray(tensor)` are read-only; `torch()`, `jax()` and DLPack
/// give private memory that is copied page by page as it is written, so that a write changes that view alone.
#[pyclass(name = "Tensor", module = "hetmem", frozen, weakref)]
#[derive(Debug)]
pub(crate) struct PyTensor {
    memory: Arc<Memory>,
    /// Of the first byte, from the memory's.
    start: usize,
    len: usize,
    dtype: DType,
    ndim: usize,
    /// Where the buffer protocol finds them: an object of Python's does not move.
    dims: [isize; DIMS_MAX],
    strides: [isize; DIMS_MAX],
    /// `len`, as a dimension.
    byte_count: isize,
}

/// The stride of bytes.
static ONE: isize = 1;

impl PyTensor {
    /// A whole object, or the rows of it that were asked for.
    pub(crate) fn of(object: Object) -> Self {
        let (dtype, shape) = meaning(object.meta(), object.len() as u64);
        let len = object.len();
        Self::new(Memory::of(object), 0, len, dtype, shape.dims())
    }

    /// The same in GPU memory.
    pub(crate) fn of_gpu(object: GpuObject) -> Self {
        let (dtype, shape) = meaning(object.meta(), object.len_bytes());
        let len = usize::try_from(object.len_bytes()).unwrap_or(0);
        Self::new(Memory::Gpu(OfProcess::new(object)), 0, len, dtype, shape.dims())
    }

    /// Numbers that were converted, in memory of their own.
    pub(crate) fn of_converted(converted: Converted) -> Self {
        let (dtype, shape) = (converted.meta().dtype, converted.meta().shape);
        let len = usize::try_from(converted.meta().len_bytes).unwrap_or(0);
        let memory = match converted {
            Converted::Host { bytes, .. } => Memory::Owned(Owned::of(bytes)),
            on_gpu @ Converted::Gpu { .. } => Memory::Converted(OfProcess::new(on_gpu)),
        };
        Self::new(memory, 0, len, dtype, shape.dims())
    }

    fn new(memory: Memory, start: usize, len: usize, dtype: DType, dims: &[u64]) -> Self {
        Self::over(
            Arc::new(memory),
            start,
            len,
            dtype,
            dims.iter().map(|dim| isize::try_from(*dim).unwrap_or(isize::MAX)),
        )
    }

    fn over(
        memory: Arc<Memory>,
        start: usize,
        len: usize,
        dtype: DType,
        shape: impl Iterator<Item = isize>,
    ) -> Self {
        let mut tensor = Self {
            memory,
            start,
            len,
            dtype,
            ndim: 0,
            dims: [0; DIMS_MAX],
            strides: [0; DIMS_MAX],
            byte_count: len.cast_signed(),
        };
        for (place, dim) in tensor.dims.iter_mut().zip(shape) {
            *place = dim;
            tensor.ndim += 1;
        }
        let mut step = tensor.item_len().cast_signed();
        for at in (0..tensor.ndim).rev() {
            if let (Some(stride), Some(dim)) = (tensor.strides.get_mut(at), tensor.dims.get(at)) {
                *stride = step;
                step = step.saturating_mul((*dim).max(1));
            }
        }
        tensor
    }

    fn item_len(&self) -> usize {
        usize::try_from(self.dtype.bits().div_ceil(8)).unwrap_or(1)
    }

    pub(crate) fn dims(&self) -> &[isize] {
        self.dims.get(..self.ndim).unwrap_or_default()
    }

    pub(crate) fn element_type(&self) -> DType {
        self.dtype
    }

    fn address(&self) -> *mut u8 {
        self.memory.address().wrapping_add(self.start)
    }

    fn check_here(&self, py: Python<'_>) -> PyResult<()> {
        if self.memory.is_here() {
            return Ok(());
        }
        let why = "it belongs to the parent of this forked process: get it again here";
        Err(to_python(py, &StoreError::stale("use a tensor", "of another process", why)))
    }

    fn check_whole_bytes(&self, py: Python<'_>) -> PyResult<()> {
        if self.dtype.bits().is_multiple_of(8) {
            return Ok(());
        }
        let why = format!("elements of {} share bytes: take bytes(tensor)", self.dtype);
        Err(invalid(py, "view", why))
    }

    /// The same elements in memory that its consumer may write.
    fn private(&self, py: Python<'_>) -> PyResult<(Arc<Memory>, usize)> {
        if matches!(*self.memory, Memory::Owned(_)) {
            return Ok((Arc::clone(&self.memory), self.start));
        }
        let (memory, start) = without_gil(py, || self.memory.private(self.start, self.len))?;
        Ok((Arc::new(memory), start))
    }

    /// A capsule of private memory, of elements of `dtype` which are as long as its own.
    pub(crate) fn private_capsule<'py>(
        &self,
        py: Python<'py>,
        dtype: DType,
        (versioned, read_only): (bool, bool),
        copy: bool,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        self.check_here(py)?;
        self.check_whole_bytes(py)?;
        let code = dtype::to_dlpack(dtype)
            .ok_or_else(|| PyBufferError::new_err(format!("DLPack has no element type {dtype}")))?;
        let (memory, start, device) = match self.memory.gpu() {
            Some(gpu) if !copy => (Arc::clone(&self.memory), self.start, (CUDA, i32::from(gpu))),
            Some(_) => return Err(PyBufferError::new_err("a GPU's bytes are not copied by this export")),
            None if copy => {
                let owned = without_gil(py, || self.memory.copy(self.start, self.len))?;
                (Arc::new(Memory::Owned(owned)), 0, (CPU, 0))
            }
            None => {
                let (memory, start) = self.private(py)?;
                (memory, start, (CPU, 0))
            }
        };
        let exported = Exported {
            address: memory.address().wrapping_add(start),
            device,
            dtype: code,
            shape: self.dims().iter().map(|dim| *dim as i64).collect(),
            read_only: read_only && !copy,
            copied: copy,
            keep: memory,
        };
        exported.into_capsule(py, versioned)
    }

    fn rows(&self, py: Python<'_>, first: isize, count: isize) -> PyResult<Self> {
        self.check_whole_bytes(py)?;
        let row = self.strides.first().copied().unwrap_or(0);
        let (first, len) = ((first * row).cast_unsigned(), (count * row).cast_unsigned());
        let rest = self.dims().get(1..).unwrap_or_default().to_vec();
        let shape = std::iter::once(count).chain(rest);
        Ok(Self::over(Arc::clone(&self.memory), self.start + first, len, self.dtype, shape))
    }

    /// The whole of a copy.
    pub(crate) fn copied(&self, py: Python<'_>) -> PyResult<Self> {
        self.check_here(py)?;
        let owned = without_gil(py, || self.memory.copy(self.start, self.len))?;
        let shape = self.dims().to_vec().into_iter();
        Ok(Self::over(Arc::new(Memory::Owned(owned)), 0, self.len, self.dtype, shape))
    }

    /// Its bytes in host memory.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        self.memory.bytes()?.get(self.start..)?.get(..self.len)
    }

    pub(crate) fn known_receipt(&self) -> Option<Receipt> {
        match &*self.memory {
            Memory::Shared(object) => Some(object.receipt()),
            Memory::Gpu(object) => Some(object.receipt()),
            _ => None,
        }
    }
}

/// What so many bytes of an object mean: the object as it is, or rows of it.
fn meaning(meta: &ObjectMeta, len_bytes: u64) -> (DType, Shape) {
    if meta.len_bytes == len_bytes {
        return (meta.dtype, meta.shape);
    }
    let mut dims = meta.shape.dims().to_vec();
    let row: u64 = dims.iter().skip(1).product::<u64>().saturating_mul(meta.dtype.bits() / 8);
    let rows = len_bytes.checked_div(row);
    match (dims.first_mut(), rows) {
        (Some(first), Some(rows)) if rows * row == len_bytes => *first = rows,
        _ => return (DType::U8, Shape::new(&[len_bytes]).unwrap_or_default()),
    }
    (meta.dtype, Shape::new(&dims).unwrap_or_default())
}

#[pymethods]
impl PyTensor {
    /// The lengths of its dimensions, in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.dims())
    }

    /// The name of its element type: "float32", "bfloat16", "uint8", ...
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// Where it is: "cpu", or "cuda:N" as this process numbers devices.
    #[getter]
    fn device(&self) -> String {
        self.memory.gpu().map_or("cpu".to_owned(), |gpu| format!("cuda:{gpu}"))
    }

    /// Its length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.len
    }

    /// How many dimensions it has.
    #[getter]
    fn ndim(&self) -> usize {
        self.ndim
    }

    /// How many elements it has.
    #[getter]
    fn size(&self) -> isize {
        self.dims().iter().product()
    }

    /// How the get moved the bytes; None for a copy.
    #[getter]
    fn receipt(&self) -> Option<PyReceipt> {
        self.known_receipt().map(PyReceipt::of)
    }

    /// A read-only numpy array of the same memory. Types that numpy lacks (bfloat16, float8) need the package ml_dtypes.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, tensor) = (slf.py(), slf.get());
        tensor.check_here(py)?;
        tensor.check_whole_bytes(py)?;
        if tensor.memory.bytes().is_none() {
            let why = format!("it is on {}: get it on \"cpu\"", tensor.device());
            return Err(invalid(py, "numpy view", why));
        }
        frameworks::numpy(slf, tensor.dims(), tensor.dtype)
    }

    /// A torch tensor. Of host memory it is a private view: writing to it changes that tensor alone.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        frameworks::torch(slf)
    }

    /// A jax array. Of host memory it shares a private view.
    fn jax<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        frameworks::jax(slf)
    }

    /// A copy in this process's memory, which the store does not hold.
    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        self.copied(py)
    }

    /// Compares the bytes with the checksum that their producer stored, on the GPU if they are there. False where there is none to compare with: the
    /// producer stored none, or this is a part or a copy.
    ///
    /// Raises hetmem.Corrupt, with both values, if they differ.
    fn verify(&self, py: Python<'_>) -> PyResult<bool> {
        self.check_here(py)?;
        match &*self.memory {
            Memory::Shared(object) if self.len == object.len() => without_gil(py, || object.verify()),
            Memory::Gpu(object) if self.len as u64 == object.len_bytes() => {
                without_gil(py, || object.verify())
            }
            _ => Ok(false),
        }
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.check_here(py)?;
        let bytes = self.bytes().ok_or_else(|| PyBufferError::new_err("the bytes are in GPU memory"))?;
        Ok(PyBytes::new(py, bytes))
    }

    fn __len__(&self) -> PyResult<usize> {
        let rows = self.dims().first().map(|rows| rows.cast_unsigned());
        rows.ok_or_else(|| PyTypeError::new_err("a tensor without dimensions has no len()"))
    }

    /// Rows: `tensor[2:5]` shares the memory, without a copy; `tensor[3]` is one row. Steps are 1.
    fn __getitem__(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Some(rows) = self.dims().first().copied() else {
            return Err(PyTypeError::new_err("a tensor without dimensions has no rows"));
        };
        if let Ok(slice) = index.cast::<PySlice>() {
            let part = slice.indices(rows)?;
            if part.step != 1 {
                return Err(PyIndexError::new_err("rows are taken with step 1: use numpy() for others"));
            }
            return self.rows(py, part.start, (part.stop - part.start).max(0));
        }
        let at: isize = index.extract()?;
        let from_start = if at < 0 { at + rows } else { at };
        if !(0..rows).contains(&from_start) {
            return Err(PyIndexError::new_err(format!("row {at} of {rows}")));
        }
        let row = self.rows(py, from_start, 1)?;
        let shape = row.dims().get(1..).unwrap_or_default().to_vec().into_iter();
        Ok(Self::over(Arc::clone(&row.memory), row.start, row.len, row.dtype, shape))
    }

    fn __repr__(&self) -> String {
        let dims: Vec<String> = self.dims().iter().map(isize::to_string).collect();
        let comma = if dims.len() == 1 { "," } else { "" };
        format!(
            "hetmem.Tensor(shape=({}{comma}), dtype={}, device={})",
            dims.join(", "),
            self.dtype,
            self.device()
        )
    }

    #[pyo3(signature = (dtype=None, copy=None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let array = Self::numpy(slf)?;
        if let Some(dtype) = dtype
            && !array.getattr("dtype")?.eq(&dtype)?
        {
            return array.call_method1("astype", (dtype,));
        }
        if copy == Some(true) { array.call_method0("copy") } else { Ok(array) }
    }

    /// DLPack's type and number of the device.
    fn __dlpack_device__(&self) -> (i32, i32) {
        self.memory.gpu().map_or((CPU, 0), |gpu| (CUDA, i32::from(gpu)))
    }

    /// A DLPack capsule: with a version and flags where `max_version` is 1.0 or more, else of the older kind. Of host
    /// memory it holds private memory, flagged read-only: whoever writes all the same changes nothing but that.
    ///
    /// `stream` is the consumer's stream. What a get returns was complete before it returned, so nothing waits.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        drop(stream);
        if dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            let why = format!("the tensor is on {}: get it on the device where it is wanted", self.device());
            return Err(PyBufferError::new_err(why));
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        self.private_capsule(py, self.dtype, (versioned, true), copy == Some(true))
    }

    /// Fills in what the buffer protocol asks for: read-only, row-major, this tensor's own memory.
    ///
    /// # Safety
    /// Python calls it with a structure to be filled in.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (py, tensor) = (slf.py(), slf.get());
        tensor.check_here(py)?;
        if tensor.memory.bytes().is_none() {
            return Err(PyBufferError::new_err("the bytes are in GPU memory, which has no buffer protocol"));
        }
        if flags & ffi::PyBUF_WRITABLE != 0 {
            return Err(PyBufferError::new_err(
                "an object of the store is read-only: copy() or torch() is not",
            ));
        }
        let wants = |flag| flags & flag == flag;
        let format = dtype::to_format(tensor.dtype);
        if wants(ffi::PyBUF_FORMAT) && format.is_none() {
            return Err(PyBufferError::new_err(format!(
                "the buffer protocol has no {}: numpy() has",
                tensor.dtype
            )));
        }
        // Elements that the protocol has no name for are bytes to whoever asks for no name.
        let (dims, strides, item_len) = match format {
            Some(_) => (tensor.dims(), tensor.strides.as_ptr(), tensor.item_len()),
            None => (std::slice::from_ref(&tensor.byte_count), &raw const ONE, 1),
        };
        let pointer =
            |wanted: bool, to: *const isize| if wanted { to.cast_mut() } else { std::ptr::null_mut() };
        let described = wants(ffi::PyBUF_ND);
        // SAFETY: `view` is Python's to fill in. What is pointed to is the tensor's own, which `obj` keeps alive and
        // in its place; nobody writes through the pointers, whose types are C's.
        unsafe {
            (*view).buf = tensor.address().cast();
            (*view).len = tensor.len.cast_signed();
            (*view).itemsize = item_len.cast_signed();
            (*view).readonly = 1;
            (*view).ndim = if described { c_int::try_from(dims.len()).unwrap_or(0) } else { 1 };
            (*view).format = match format {
                Some(format) if wants(ffi::PyBUF_FORMAT) => format.as_ptr().cast_mut(),
                _ => std::ptr::null_mut(),
            };
            (*view).shape = pointer(described, dims.as_ptr());
            (*view).strides = pointer(wants(ffi::PyBUF_STRIDES), strides);
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = std::ptr::null_mut();
            (*view).obj = slf.into_any().into_ptr();
        }
        Ok(())
    }
}
