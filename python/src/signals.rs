//! Calls that wait: without the GIL, and over when a signal's handler raises. Not the waiting itself
//! (`hetmem_client`). Invariant: an exception that a signal's handler raised during a wait is what the call raises.

use std::cell::RefCell;

use hetmem_client::StoreError;
use pyo3::prelude::*;

use crate::errors::to_python;

thread_local! {
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Whether a waiting call is to end: the hook of `Store::interrupt_when`. Only the main thread runs Python's handlers.
pub(crate) fn is_over() -> bool {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return false;
    }
    // One interruption ends a call that asks many questions.
    if RAISED.with_borrow(Option::is_some) {
        return true;
    }
    Python::attach(|py| match py.check_signals() {
        Ok(()) => false,
        Err(raised) => {
            RAISED.set(Some(raised));
            true
        }
    })
}

/// Runs what may wait or copy, without the GIL.
pub(crate) fn without_gil<T: Send>(
    py: Python<'_>,
    call: impl FnOnce() -> Result<T, StoreError> + Send,
) -> PyResult<T> {
    let result = py.detach(call);
    if let Some(raised) = RAISED.take() {
        return Err(raised);
    }
    result.map_err(|error| to_python(py, &error))
}
