//! `hetmem._core`: what is native of the Python package. Not its modules for frameworks, which are Python (`hetmem/`).
//! Invariant: importing it loads no library and starts no thread; nothing here panics on what Python gives.

mod arguments;
mod connection;
mod dlpack;
mod dtype;
mod errors;
mod files;
mod fork;
mod frameworks;
mod gpu;
mod memory;
mod receipt;
mod signals;
mod source;
mod store;
mod tensor;
mod writer;

use pyo3::prelude::*;

/// The native part of the package hetmem.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<store::PyStore>()?;
    module.add_class::<tensor::PyTensor>()?;
    module.add_class::<writer::PyWriter>()?;
    module.add_class::<receipt::PyReceipt>()?;
    module.add_class::<receipt::PyStat>()?;
    module.add_function(wrap_pyfunction!(store::connect, module)?)?;
    module.add_function(wrap_pyfunction!(store::embed, module)?)?;
    module.add_function(wrap_pyfunction!(store::reconnect, module)?)?;
    module.add_function(wrap_pyfunction!(errors::error_kinds, module)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
