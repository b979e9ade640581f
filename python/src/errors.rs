//! Errors of the store as Python's exceptions. Not their classes, which are Python (`hetmem/errors.py`). Invariant: the
//! class is named as the kind is, and the message is the error's own.

use hetmem_client::{ErrorKind, StoreError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// The exception of an error.
#[cold]
pub(crate) fn to_python(py: Python<'_>, error: &StoreError) -> PyErr {
    match class(py, error.kind()) {
        Ok(class) => PyErr::from_type(class, (error.to_string(),)),
        Err(error) => error,
    }
}

fn class(py: Python<'_>, kind: ErrorKind) -> PyResult<Bound<'_, PyType>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = MODULE.get_or_try_init(py, || py.import("hetmem.errors").map(Bound::unbind))?;
    Ok(module.bind(py).getattr(kind.name())?.cast_into::<PyType>()?)
}

/// An argument outside what a call accepts.
#[cold]
pub(crate) fn invalid(py: Python<'_>, what: &'static str, why: String) -> PyErr {
    to_python(py, &StoreError::invalid(what, why))
}

/// The names of all kinds, in the order of the wire codes.
#[pyfunction]
pub(crate) fn error_kinds() -> Vec<&'static str> {
    ErrorKind::ALL.iter().map(|kind| kind.name()).collect()
}
