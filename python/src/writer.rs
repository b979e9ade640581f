//! `hetmem.Writer`: an object that is being written in place. Not a put of what exists (`store`). Invariant: nobody can
//! change an object after its seal: memory that a view can still reach is not sealed but copied, and is used for nothing
//! else until the last view has gone.
//!
//! Holds unsafe code: the buffer protocol's writable memory.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::Arc;

use hetmem_client::{
    Key, ObjectMeta, PutOptions, PutOutcome, Reservation, Reserved, Store, StoreError, ZeroCopy,
};
use parking_lot::Mutex;
use pyo3::exceptions::{PyBufferError, PyRuntimeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyMemoryView, PyTuple};

use crate::dlpack::{CPU, Exported};
use crate::errors::{invalid, to_python};
use crate::fork::OfProcess;
use crate::receipt::PyReceipt;
use crate::signals::without_gil;
use crate::{dtype, frameworks};

/// Memory that is being written, with its address.
#[derive(Debug)]
struct Open {
    /// None once it was sealed.
    reservation: Mutex<Option<Reservation>>,
    address: usize,
    len: usize,
}

/// What a view of a writer holds: whoever has this can write.
#[pyclass(name = "_WritableMemory", module = "hetmem._core", frozen)]
#[derive(Debug)]
pub(crate) struct PyWritableMemory {
    open: Arc<OfProcess<Open>>,
}

#[pymethods]
impl PyWritableMemory {
    /// # Safety
    /// Python calls it with a structure to be filled in.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let open = &slf.get().open;
        let (address, len) = (open.address, open.len.cast_signed());
        // SAFETY: `view` is Python's to fill in; the memory is reserved for this writer for as long as `open` lives,
        // which `obj` holds.
        let filled = unsafe {
            let pointer = std::ptr::with_exposed_provenance_mut(address);
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), pointer, len, 0, flags)
        };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// An object that is being written where it will stay: `with store.create(key, shape, dtype) as out: out.numpy()[:] = ...`.
///
/// Its views are writable. When the block ends the object is sealed: readable by everyone, and immutable. A view that is
/// still alive then keeps its memory to itself, and the store gets a copy: `del` views before, or let them go unnamed.
/// If the block raises, the object is given up.
#[pyclass(name = "Writer", module = "hetmem", frozen)]
#[derive(Debug)]
pub(crate) struct PyWriter {
    store: Store,
    key: Key,
    meta: ObjectMeta,
    options: PutOptions,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(Arc<OfProcess<Open>>),
    Over(Option<(PutOutcome, usize)>),
}

impl PyWriter {
    pub(crate) fn open(
        py: Python<'_>,
        store: Store,
        key: Key,
        meta: ObjectMeta,
        options: PutOptions,
    ) -> PyResult<Self> {
        let state = without_gil(py, || match store.reserve(&key, meta, &options)? {
            Reserved::Open(reservation) => Ok(State::Open(Open::over(reservation))),
            Reserved::Kept(_) => Err(StoreError::AlreadyExists { key: key.as_str().to_owned() }),
        })?;
        Ok(Self { store, key, meta, options, state: Mutex::new(state) })
    }

    fn memory(&self) -> PyResult<PyWritableMemory> {
        match &*self.state.lock() {
            State::Open(open) if open.is_here() => Ok(PyWritableMemory { open: Arc::clone(open) }),
            State::Open(_) => {
                Err(PyRuntimeError::new_err("the writer belongs to the parent of this process"))
            }
            State::Over(_) => Err(PyRuntimeError::new_err(format!("{:?} is sealed or given up", self.key))),
        }
    }

    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let open = match std::mem::replace(&mut *self.state.lock(), State::Over(None)) {
            State::Open(open) if open.is_here() => open,
            State::Open(_) => {
                let why = "the writer belongs to the parent of this forked process, which seals it";
                return Err(to_python(py, &StoreError::stale("seal", &self.key, why)));
            }
            over @ State::Over(_) => {
                *self.state.lock() = over;
                return Ok(());
            }
        };
        let outcome = match Arc::try_unwrap(open) {
            Ok(open) => without_gil(py, move || open.take()?.seal()).map(|outcome| (outcome, 0)),
            Err(viewed) => self.put_copy(py, &viewed),
        };
        *self.state.lock() = State::Over(Some(outcome?));
        Ok(())
    }

    /// Puts a copy of memory that somebody can still write.
    fn put_copy(&self, py: Python<'_>, viewed: &OfProcess<Open>) -> PyResult<(PutOutcome, usize)> {
        if self.options.zero_copy == ZeroCopy::Required {
            let why =
                format!("create {:?}: a view of it is still alive: del it before the block ends", self.key);
            return Err(to_python(py, &StoreError::unavailable("zero copy", why)));
        }
        without_gil(py, || {
            let mut place = viewed.reservation.lock();
            let reservation =
                place.as_mut().ok_or_else(|| StoreError::protocol("a writer has lost its memory"))?;
            let bytes = &*reservation.bytes_mut();
            let outcome = self.store.put_with(&self.key, self.meta, bytes, &self.options)?;
            Ok((outcome, bytes.len()))
        })
    }
}

impl Open {
    fn over(mut reservation: Reservation) -> Arc<OfProcess<Self>> {
        let bytes = reservation.bytes_mut();
        let (address, len) = (bytes.as_mut_ptr().expose_provenance(), bytes.len());
        Arc::new(OfProcess::new(Self { reservation: Mutex::new(Some(reservation)), address, len }))
    }

    fn take(&self) -> Result<Reservation, StoreError> {
        let reservation = self.reservation.lock().take();
        reservation.ok_or_else(|| StoreError::protocol("a writer has lost its memory"))
    }
}

#[pymethods]
impl PyWriter {
    /// The key of the object.
    #[getter]
    fn key(&self) -> &str {
        self.key.as_str()
    }

    /// The lengths of its dimensions, in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.meta.shape.dims())
    }

    /// The name of its element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.meta.dtype.name()
    }

    /// Its length in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.meta.len_bytes
    }

    /// How the put went, once the block has ended; None before, and if it was given up.
    #[getter]
    fn receipt(&self) -> Option<PyReceipt> {
        match &*self.state.lock() {
            State::Over(Some((outcome, staged))) => Some(PyReceipt::of_put(outcome.clone(), *staged)),
            _ => None,
        }
    }

    /// A writable numpy array of the object's memory.
    fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let memory = Bound::new(py, self.memory()?)?;
        let dims: Vec<isize> =
            self.meta.shape.dims().iter().map(|dim| isize::try_from(*dim).unwrap_or(isize::MAX)).collect();
        frameworks::array_over(memory.as_any(), &dims, self.meta.dtype)
    }

    /// A writable torch tensor of the object's memory.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("torch")?.call_method1("from_dlpack", (slf,))
    }

    /// Its bytes, writable.
    fn memoryview<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        PyMemoryView::from(Bound::new(py, self.memory()?)?.as_any())
    }

    #[pyo3(signature = (dtype=None, copy=None))]
    fn __array__<'py>(
        &self,
        py: Python<'py>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let array = self.numpy(py)?;
        match dtype {
            Some(dtype) => array.call_method1("astype", (dtype,)),
            None if copy == Some(true) => array.call_method0("copy"),
            None => Ok(array),
        }
    }

    /// DLPack's type and number of the device.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }

    /// A DLPack capsule of the object's memory, writable.
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
        if copy == Some(true) || dl_device.is_some_and(|device| device != (CPU, 0)) {
            return Err(PyBufferError::new_err("a writer's memory is handed out in place, on the cpu"));
        }
        let dtype = self.meta.dtype;
        let code = dtype::to_dlpack(dtype).filter(|_| dtype.bits().is_multiple_of(8));
        let code = code.ok_or_else(|| invalid(py, "view", format!("DLPack has no {dtype}")))?;
        let memory = self.memory()?;
        let exported = Exported {
            address: std::ptr::with_exposed_provenance_mut(memory.open.address),
            device: (CPU, 0),
            dtype: code,
            shape: self.meta.shape.dims().iter().map(|dim| (*dim).cast_signed()).collect(),
            read_only: false,
            copied: false,
            keep: Arc::clone(&memory.open),
        };
        exported.into_capsule(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Seals the object; gives it up if the block has raised.
    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        if kind.is_none() {
            return self.finish(py);
        }
        self.discard(py);
        Ok(())
    }

    /// Makes the object readable, and immutable: what the end of the block does.
    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        self.finish(py)
    }

    /// Gives the object up.
    fn discard(&self, py: Python<'_>) {
        let mut state = self.state.lock();
        if let State::Open(_) = &*state {
            let open = std::mem::replace(&mut *state, State::Over(None));
            drop(state);
            py.detach(|| drop(open));
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "hetmem.Writer({:?}, shape={:?}, dtype={})",
            self.key,
            self.meta.shape.dims(),
            self.meta.dtype
        )
    }
}
