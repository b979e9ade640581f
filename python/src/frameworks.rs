//! Arrays of numpy, torch and jax over a tensor's memory. Not how the memory is kept (`tensor`). Invariant: a framework is
//! imported when it is first asked for, and not before.

use hetmem_client::DType;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

use crate::tensor::PyTensor;

/// A read-only array; its base is the tensor.
pub(crate) fn numpy<'py>(
    tensor: &Bound<'py, PyTensor>,
    dims: &[isize],
    dtype: DType,
) -> PyResult<Bound<'py, PyAny>> {
    array_over(tensor.as_any(), dims, dtype)
}

/// An array over an object with a plain buffer, writable if that is.
pub(crate) fn array_over<'py>(
    owner: &Bound<'py, PyAny>,
    dims: &[isize],
    dtype: DType,
) -> PyResult<Bound<'py, PyAny>> {
    static NDARRAY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = owner.py();
    let class = NDARRAY.get_or_try_init(py, || {
        py.import("numpy").and_then(|numpy| numpy.getattr("ndarray")).map(Bound::unbind)
    })?;
    class.bind(py).call1((PyTuple::new(py, dims)?, numpy_dtype(py, dtype)?, owner))
}

/// numpy's element type, with ml_dtypes where numpy has no name for it.
pub(crate) fn numpy_dtype(py: Python<'_>, dtype: DType) -> PyResult<Bound<'_, PyAny>> {
    static KNOWN: [PyOnceLock<Py<PyAny>>; 32] = [const { PyOnceLock::new() }; 32];
    let make = || -> PyResult<Py<PyAny>> {
        let numpy = py.import("numpy")?;
        if let Some(format) = crate::dtype::to_format(dtype)
            && format.to_bytes().len() == 1
        {
            return Ok(numpy.call_method1("dtype", (format.to_string_lossy(),))?.unbind());
        }
        if matches!(dtype, DType::C64 | DType::C128) {
            return Ok(numpy.call_method1("dtype", (dtype.name(),))?.unbind());
        }
        let types = py.import("ml_dtypes").map_err(|error| {
            let why =
                format!("numpy has no {dtype}: pip install ml_dtypes, or use torch() or jax() ({error})");
            PyImportError::new_err(why)
        })?;
        Ok(numpy.call_method1("dtype", (types.getattr(dtype.name())?,))?.unbind())
    };
    match KNOWN.get(usize::from(dtype.code())) {
        Some(place) => Ok(place.get_or_try_init(py, make)?.bind(py).clone()),
        None => make().map(|dtype| dtype.into_bound(py)),
    }
}

/// A tensor of private memory, or of GPU memory in place.
pub(crate) fn torch<'py>(tensor: &Bound<'py, PyTensor>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    let torch = py.import("torch")?;
    let dtype = tensor.get().element_type();
    // Types that torch's DLPack may not know go over as bytes, and get their name there.
    let by_bits = dtype.bits() == 8 && !matches!(dtype, DType::Bool | DType::U8 | DType::I8);
    let exported = if by_bits { DType::U8 } else { dtype };
    // Private memory is really writable, so the flag that torch would ignore is not set either.
    let capsule = tensor.get().private_capsule(py, exported, (false, false), false)?;
    let view = torch.getattr("utils")?.getattr("dlpack")?.call_method1("from_dlpack", (capsule,))?;
    if by_bits { view.call_method1("view", (torch.getattr(dtype.name())?,)) } else { Ok(view) }
}

/// An array of private memory; of types that jax's DLPack lacks, by way of numpy.
pub(crate) fn jax<'py>(tensor: &Bound<'py, PyTensor>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    let numpy = py.import("jax.numpy")?;
    let by_bits = tensor.get().element_type().bits() == 8
        && crate::dtype::to_format(tensor.get().element_type()).is_none();
    if by_bits {
        let array = tensor.call_method0("numpy")?;
        return numpy.call_method1("asarray", (array,));
    }
    numpy.call_method1("from_dlpack", (tensor,))
}
