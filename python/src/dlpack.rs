//! DLPack: tensors of others read through their capsule, and ours handed out in one. Not what the bytes mean, nor who
//! may write them (`tensor`). Invariant: what a capsule of ours points to lives until its deleter has run, which the
//! consumer calls, or the capsule's own destructor where there was none.
//!
//! Holds unsafe code: structures that C programs read and write, laid out as dlpack.h 1.1 says.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

/// `kDLCPU` and `kDLCUDA`.
pub(crate) const CPU: i32 = 1;
pub(crate) const CUDA: i32 = 2;
/// Pinned and managed memory of CUDA, which the processor reads as it does its own.
const CUDA_HOST: i32 = 3;
const CUDA_MANAGED: i32 = 13;

/// The legacy default stream of a device, as DLPack and the driver number it. A producer that is told of it orders what it
/// has queued before what is queued there next.
pub(crate) const LEGACY_STREAM: u64 = 1;

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const MAJOR: u32 = 1;
const MINOR: u32 = 1;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Device {
    kind: i32,
    ordinal: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[derive(Debug)]
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[derive(Debug)]
#[repr(C)]
struct Legacy {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

#[derive(Debug)]
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

/// A tensor of somebody else's, for as long as its capsule lives. Strides are in elements; none: row-major.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// Never consumed, so that its own destructor lets go of the tensor.
    _capsule: Py<PyCapsule>,
    pub(crate) data: *mut u8,
    pub(crate) device: (i32, i32),
    /// Type code, bits and lanes.
    pub(crate) dtype: (u8, u8, u16),
    pub(crate) shape: Vec<i64>,
    pub(crate) strides: Option<Vec<i64>>,
    pub(crate) read_only: bool,
}

impl Foreign {
    /// Reads an object with `__dlpack__`. None if it has no such method.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = object.py();
        let Some(export) = object.getattr_opt(pyo3::intern!(py, "__dlpack__"))? else { return Ok(None) };
        let device: (i32, i32) = object.call_method0(pyo3::intern!(py, "__dlpack_device__"))?.extract()?;
        let arguments = PyDict::new(py);
        if device.0 == CUDA {
            arguments.set_item("stream", LEGACY_STREAM)?;
        }
        let all = arguments.copy()?;
        all.set_item("max_version", (MAJOR, MINOR))?;
        let capsule = match export.call((), Some(&all)) {
            // Before DLPack 1.0 there was no such argument.
            Err(error) if error.is_instance_of::<PyTypeError>(py) => export.call((), Some(&arguments))?,
            capsule => capsule?,
        };
        let capsule = capsule.cast_into::<PyCapsule>()?;
        Self::read(&capsule).map(Some)
    }

    fn read(capsule: &Bound<'_, PyCapsule>) -> PyResult<Self> {
        let owner = capsule.clone().unbind();
        if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
            let pointer = pointer.cast::<Versioned>();
            // SAFETY: a capsule of this name holds a `DLManagedTensorVersioned`, whose first fields never change.
            if unsafe { (*pointer.as_ptr()).major } > MAJOR {
                return Err(PyBufferError::new_err("the tensor's DLPack is newer than 1.x"));
            }
            // SAFETY: as above, and it lives as long as the capsule, which `owner` holds.
            let (tensor, flags) = unsafe { (&(*pointer.as_ptr()).tensor, (*pointer.as_ptr()).flags) };
            return Self::describe(owner, tensor, flags & READ_ONLY != 0);
        }
        let pointer = capsule.pointer_checked(Some(LEGACY))?.cast::<Legacy>();
        // SAFETY: a capsule of this name holds a `DLManagedTensor`, which lives as long as it.
        let tensor = unsafe { &(*pointer.as_ptr()).tensor };
        Self::describe(owner, tensor, false)
    }

    fn describe(capsule: Py<PyCapsule>, tensor: &Tensor, read_only: bool) -> PyResult<Self> {
        let count = usize::try_from(tensor.ndim).unwrap_or(usize::MAX);
        if count > 64 || (count > 0 && tensor.shape.is_null()) {
            return Err(PyBufferError::new_err(format!("a DLPack tensor of {} dimensions", tensor.ndim)));
        }
        // SAFETY: dlpack.h promises `ndim` entries in each array that is there.
        let list = |at: *mut i64| unsafe { std::slice::from_raw_parts(at, count) }.to_vec();
        let some = count > 0;
        let start = usize::try_from(tensor.byte_offset).unwrap_or(0);
        let DataType { code, bits, lanes } = tensor.dtype;
        Ok(Self {
            _capsule: capsule,
            data: tensor.data.cast::<u8>().wrapping_add(start),
            device: (tensor.device.kind, tensor.device.ordinal),
            dtype: (code, bits, lanes),
            shape: if some { list(tensor.shape) } else { Vec::new() },
            strides: (some && !tensor.strides.is_null()).then(|| list(tensor.strides)),
            read_only,
        })
    }

    /// Whether a processor can read the memory.
    pub(crate) fn is_on_host(&self) -> bool {
        matches!(self.device.0, CPU | CUDA_HOST | CUDA_MANAGED)
    }
}

/// What a capsule of ours says.
#[derive(Debug)]
pub(crate) struct Exported<K> {
    pub(crate) address: *mut u8,
    pub(crate) device: (i32, i32),
    pub(crate) dtype: (u8, u8),
    pub(crate) shape: Vec<i64>,
    pub(crate) read_only: bool,
    pub(crate) copied: bool,
    /// Keeps the bytes at `address`.
    pub(crate) keep: K,
}

/// What lies behind a capsule: the structure, and what it points to.
struct Held<M, K> {
    managed: M,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _keep: K,
}

impl<K: Send + 'static> Exported<K> {
    /// A capsule of the newest kind that its consumer knows: with a version and flags, or without.
    pub(crate) fn into_capsule(self, py: Python<'_>, versioned: bool) -> PyResult<Bound<'_, PyCapsule>> {
        if versioned { self.versioned(py) } else { self.legacy(py) }
    }

    fn tensor(&self) -> Tensor {
        let (kind, ordinal) = self.device;
        let (code, bits) = self.dtype;
        Tensor {
            data: self.address.cast(),
            device: Device { kind, ordinal },
            ndim: i32::try_from(self.shape.len()).unwrap_or(0),
            dtype: DataType { code, bits, lanes: 1 },
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        }
    }

    fn strides(&self) -> Vec<i64> {
        let mut strides = vec![1; self.shape.len()];
        let mut step = 1;
        for (stride, dim) in strides.iter_mut().zip(&self.shape).rev() {
            *stride = step;
            step *= (*dim).max(1);
        }
        strides
    }

    fn versioned(self, py: Python<'_>) -> PyResult<Bound<'_, PyCapsule>> {
        let flags = if self.read_only { READ_ONLY } else { 0 } | if self.copied { IS_COPIED } else { 0 };
        let (tensor, strides) = (self.tensor(), self.strides());
        let managed = Versioned {
            major: MAJOR,
            minor: MINOR,
            context: std::ptr::null_mut(),
            deleter: Some(delete_versioned::<K>),
            flags,
            tensor,
        };
        let mut held = Box::new(Held { managed, shape: self.shape, strides, _keep: self.keep });
        (held.managed.tensor.shape, held.managed.tensor.strides) =
            (held.shape.as_mut_ptr(), held.strides.as_mut_ptr());
        let held = Box::into_raw(held);
        // SAFETY: `held` is live; the consumer hands its address back to the deleter, which takes the box again.
        let managed = unsafe {
            (*held).managed.context = held.cast();
            NonNull::from(&mut (*held).managed)
        };
        capsule(py, managed.cast(), VERSIONED, destroy_versioned)
    }

    fn legacy(self, py: Python<'_>) -> PyResult<Bound<'_, PyCapsule>> {
        let (tensor, strides) = (self.tensor(), self.strides());
        let managed = Legacy { tensor, context: std::ptr::null_mut(), deleter: Some(delete_legacy::<K>) };
        let mut held = Box::new(Held { managed, shape: self.shape, strides, _keep: self.keep });
        (held.managed.tensor.shape, held.managed.tensor.strides) =
            (held.shape.as_mut_ptr(), held.strides.as_mut_ptr());
        let held = Box::into_raw(held);
        // SAFETY: as in `versioned`.
        let managed = unsafe {
            (*held).managed.context = held.cast();
            NonNull::from(&mut (*held).managed)
        };
        capsule(py, managed.cast(), LEGACY, destroy_legacy)
    }
}

fn capsule<'py>(
    py: Python<'py>,
    managed: NonNull<c_void>,
    name: &'static CStr,
    destroy: unsafe extern "C" fn(*mut ffi::PyObject),
) -> PyResult<Bound<'py, PyCapsule>> {
    // SAFETY: the pointer is valid until its deleter has run, which the destructor sees to where no consumer has; the
    // name is a literal.
    unsafe { PyCapsule::new_with_pointer_and_destructor(py, managed, name, Some(destroy)) }
}

/// SAFETY of callers: `managed` is what `Exported::versioned` made, not deleted before.
unsafe extern "C" fn delete_versioned<K>(managed: *mut Versioned) {
    // SAFETY: the context is the box that holds `managed`, given back once.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Held<Versioned, K>>()) });
}

/// SAFETY of callers: as of `delete_versioned`, for `Exported::legacy`.
unsafe extern "C" fn delete_legacy<K>(managed: *mut Legacy) {
    // SAFETY: as in `delete_versioned`.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Held<Legacy, K>>()) });
}

/// Lets go of a tensor whose capsule nobody has consumed: a consumer renames it.
unsafe extern "C" fn destroy_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule that is going; its name is still ours if the tensor is.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast::<Versioned>();
            if let Some(delete) = (*managed).deleter {
                delete(managed);
            }
        }
    }
}

/// The same for the older kind.
unsafe extern "C" fn destroy_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `destroy_versioned`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr()).cast::<Legacy>();
            if let Some(delete) = (*managed).deleter {
                delete(managed);
            }
        }
    }
}
