//! `hetmem.Store`: the store as Python sees it. Not the client (`hetmem_client`), whose calls these are. Invariant: no call
//! holds the GIL while it waits, copies or asks.

use std::path::PathBuf;

use hetmem_client::{
    GetOptions, Key, Object, Placed, PutOptions, PutOutcome, Reserved, Store, StoreError, TierHint, ZeroCopy,
};
use hetmem_core::ObjectMeta;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use crate::arguments::{self, Device, Getting, Putting, seconds};
use crate::connection::Connection;
use crate::dtype;
use crate::errors::{invalid, to_python};
use crate::files;
use crate::gpu;
use crate::receipt::{PyReceipt, PyStat};
use crate::signals::without_gil;
use crate::source::Source;
use crate::tensor::PyTensor;
use crate::writer::PyWriter;

/// Arrays that are not row-major are gathered here before a put up to this many bytes, beyond it where they will stay.
const GATHERED_LEN_MAX: usize = 64 << 10;

/// A connection to a node. All threads may use it at once; a forked or spawned child connects by itself.
#[pyclass(name = "Store", module = "hetmem", frozen, weakref)]
#[derive(Debug)]
pub(crate) struct PyStore {
    connection: Connection,
}

impl PyStore {
    fn store(&self, py: Python<'_>) -> PyResult<Store> {
        self.connection.store().map_err(|error| to_python(py, &error))
    }

    fn get_options(&self, py: Python<'_>, getting: Getting, word: &str) -> PyResult<GetOptions> {
        getting.options(word, self.connection.timeout()).map_err(|error| to_python(py, &error))
    }
}

/// Connects to the node that listens at `socket`, a path; without one where the command line looks: $HETMEM_SOCKET,
/// $XDG_RUNTIME_DIR/hetmem.sock, /tmp/hetmem-UID.sock. `timeout` is how long a call may wait for its node, in seconds.
///
/// Raises hetmem.Unavailable (a ConnectionError) if no node listens there, hetmem.Protocol if it speaks another version.
#[pyfunction]
#[pyo3(signature = (socket=None, *, timeout=30.0))]
pub(crate) fn connect(py: Python<'_>, socket: Option<PathBuf>, timeout: f64) -> PyResult<PyStore> {
    let open = || Connection::open(socket, seconds("timeout", timeout)?);
    without_gil(py, open).map(|connection| PyStore { connection })
}

/// Starts a node in this process; see hetmem.local.
#[pyfunction]
pub(crate) fn embed(py: Python<'_>, keys: Vec<(String, String)>, timeout: f64) -> PyResult<PyStore> {
    let start = || {
        let config = hetmem_node::Config::load(None, keys)?;
        Connection::embed(config, seconds("timeout", timeout)?)
    };
    without_gil(py, start).map(|connection| PyStore { connection })
}

#[pymethods]
impl PyStore {
    /// Stores an array under `key` and returns how: a Receipt. Whoever asks after this returns finds it.
    ///
    /// `tensor` is anything with DLPack or the buffer protocol: a numpy, torch, jax or cupy array, bytes, a memoryview;
    /// row-major or not. Its element type and shape are kept. Objects never change: with if_exists="keep" (the default)
    /// an object that is there under this key stays and receipt.kept says so where it is known, with "error" the put
    /// raises hetmem.AlreadyExists.
    ///
    /// device: where it is to be, "cpu" or "cuda:N" (default: where `tensor` is). pin: never evict it. cache: it may be
    /// evicted even if no other node has it. ttl: drop it after so many seconds. replicas: on how many nodes it is to
    /// be (1). checksum: store one (True). seal_copy: move it to memory that this process cannot write (False).
    /// zero_copy: "required" raises hetmem.Unavailable rather than let bytes pass through a buffer. timeout: seconds.
    ///
    /// Raises hetmem.NoSpace (a MemoryError), hetmem.Invalid (a ValueError), hetmem.TimedOut (a TimeoutError).
    #[pyo3(signature = (key, tensor, **keywords))]
    fn put(
        &self,
        py: Python<'_>,
        key: &str,
        tensor: &Bound<'_, PyAny>,
        keywords: Option<Putting>,
    ) -> PyResult<PyReceipt> {
        let key = arguments::key(py, key)?;
        let putting = keywords.unwrap_or_else(|| self.putting());
        let source = Source::of(tensor)?;
        let store = self.store(py)?;
        without_gil(py, || put(&store, &key, &source, &putting))
            .map(|(outcome, staged)| PyReceipt::of_put(outcome, staged))
    }

    /// Stores many arrays: a dict, or pairs of key and array. Returns a list of receipts, in order. Raises the first
    /// error; what was put before it stays. Keywords as of put().
    #[pyo3(signature = (tensors, **keywords))]
    fn put_many(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        keywords: Option<Putting>,
    ) -> PyResult<Vec<PyReceipt>> {
        let putting = keywords.unwrap_or_else(|| self.putting());
        let pairs = match tensors.cast::<PyDict>() {
            Ok(dict) => dict.items().into_any(),
            Err(_) => tensors.clone(),
        };
        let store = self.store(py)?;
        let mut sources = Vec::new();
        for pair in pairs.try_iter()? {
            let (name, tensor): (String, Bound<'_, PyAny>) = pair?.extract()?;
            sources.push((arguments::key(py, &name)?, Source::of(&tensor)?));
        }
        let outcomes = without_gil(py, || {
            sources
                .iter()
                .map(|(key, source)| put(&store, key, source, &putting))
                .collect::<Result<Vec<_>, _>>()
        })?;
        Ok(outcomes.into_iter().map(|(outcome, staged)| PyReceipt::of_put(outcome, staged)).collect())
    }

    /// Opens an object to be written in place, of so many elements: a context manager that seals it when the block ends,
    /// and gives it up if the block raises. `dtype` is a name such as "float32", or numpy's or torch's own.
    /// Keywords as of put(). See hetmem.Writer.
    #[pyo3(signature = (key, shape, dtype, **keywords))]
    fn create(
        &self,
        py: Python<'_>,
        key: &str,
        shape: &Bound<'_, PyAny>,
        dtype: &Bound<'_, PyAny>,
        keywords: Option<Putting>,
    ) -> PyResult<PyWriter> {
        let key = arguments::key(py, key)?;
        let dims = match shape.extract::<u64>() {
            Ok(length) => vec![length],
            Err(_) => shape.extract::<Vec<u64>>()?,
        };
        let element = named_dtype(dtype)?;
        let putting = keywords.unwrap_or_else(|| self.putting());
        let store = self.store(py)?;
        let meta = ObjectMeta::tensor(element, &dims).map_err(|error| to_python(py, &error))?;
        let options = without_gil(py, || {
            Ok(PutOptions { tier: arguments::hint(putting.device, &store)?, ..putting.options })
        })?;
        PyWriter::open(py, store, key, meta, options)
    }

    /// An array of the store, without a copy where it is on this node: a hetmem.Tensor.
    ///
    /// device: "cpu" (the default) or "cuda:N"; it is brought there. zero_copy: "required" raises hetmem.Unavailable
    /// rather than let bytes pass through a buffer that is neither source nor target. timeout: how long another node
    /// may take, in seconds. copy: return a copy in this process's memory. verify: compare with its checksum first.
    /// keep: let this node keep what came from another one for later readers. dtype: convert an array of float32, bfloat16
    /// or float16 to another of these, on the device where it is, rounded to the nearest, into memory of this process.
    ///
    /// Raises hetmem.NotFound (a KeyError), hetmem.TimedOut (a TimeoutError), hetmem.PeerLost (a ConnectionError),
    /// hetmem.Corrupt.
    #[pyo3(signature = (key, device=None, *, dtype=None, zero_copy="preferred", timeout=None, copy=false, verify=false, keep=true))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "Python's keywords")]
    fn get(
        &self,
        py: Python<'_>,
        key: &str,
        device: Option<&Bound<'_, PyAny>>,
        dtype: Option<&Bound<'_, PyAny>>,
        zero_copy: &str,
        timeout: Option<f64>,
        copy: bool,
        verify: bool,
        keep: bool,
    ) -> PyResult<PyTensor> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        let device = Device::parse(device)?;
        let options = self.get_options(py, Getting { timeout, verify, keep }, zero_copy)?;
        if let Some(dtype) = dtype {
            let dtype = named_dtype(dtype)?;
            let get = || store.get_as(&key, TierHint::from(device.tier(&store)?), dtype, &options);
            return Ok(PyTensor::of_converted(without_gil(py, get)?));
        }
        if device == Device::Host
            && !verify
            && let Some(object) = store.get_here(&key).map_err(|error| to_python(py, &error))?
        {
            let tensor = PyTensor::of(object);
            return if copy { tensor.copied(py) } else { Ok(tensor) };
        }
        let tensor = if device == Device::Host {
            PyTensor::of(without_gil(py, || store.get_with(&key, &options))?)
        } else {
            let placed =
                without_gil(py, || store.get_in(&key, TierHint::from(device.tier(&store)?), &options));
            match placed? {
                Placed::Host(object) => PyTensor::of(object),
                Placed::Gpu(object) => PyTensor::of_gpu(object),
            }
        };
        if copy { tensor.copied(py) } else { Ok(tensor) }
    }

    /// An array of the store if it is in host memory of this node, else None. Asks nobody, and never waits.
    fn get_here(&self, py: Python<'_>, key: &str) -> PyResult<Option<PyTensor>> {
        let key = arguments::key(py, key)?;
        let found = self.store(py)?.get_here(&key).map_err(|error| to_python(py, &error))?;
        Ok(found.map(PyTensor::of))
    }

    /// Many arrays at once: a list of hetmem.Tensor in the order of `keys`, for which another node is asked in a few
    /// messages. errors="raise" raises the first error; "return" puts each error in its place of the list.
    #[pyo3(signature = (keys, device=None, *, zero_copy="preferred", timeout=None, verify=false, keep=true, errors="raise"))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "Python's keywords")]
    fn get_many<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'py, PyAny>,
        device: Option<&Bound<'_, PyAny>>,
        zero_copy: &str,
        timeout: Option<f64>,
        verify: bool,
        keep: bool,
        errors: &str,
    ) -> PyResult<Bound<'py, PyList>> {
        if !matches!(errors, "raise" | "return") {
            let why = format!("{errors:?}: \"raise\" or \"return\" is accepted");
            return Err(invalid(py, "errors", why));
        }
        let mut names = Vec::with_capacity(keys.len().unwrap_or(0));
        for name in keys.try_iter()? {
            names.push(arguments::key(py, name?.cast::<PyString>()?.to_str()?)?);
        }
        let options = self.get_options(py, Getting { timeout, verify, keep }, zero_copy)?;
        let (store, device) = (self.store(py)?, Device::parse(device)?);
        let found: Vec<Result<PyTensor, StoreError>> = without_gil(py, || {
            if device == Device::Host {
                let objects = store.get_many_with(&names, &options);
                return Ok(objects.into_iter().map(|object| object.map(PyTensor::of)).collect());
            }
            let tier = TierHint::from(device.tier(&store)?);
            let each = |key| match store.get_in(key, tier, &options)? {
                Placed::Host(object) => Ok(PyTensor::of(object)),
                Placed::Gpu(object) => Ok(PyTensor::of_gpu(object)),
            };
            Ok(names.iter().map(each).collect())
        })?;
        let list = PyList::empty(py);
        for result in found {
            match result {
                Ok(tensor) => list.append(Bound::new(py, tensor)?)?,
                Err(error) if errors == "raise" => return Err(to_python(py, &error)),
                Err(error) => list.append(to_python(py, &error))?,
            }
        }
        Ok(list)
    }

    /// Rows `start` to `stop` (exclusive; None: to the end) along the first axis. Of an object on another node only these
    /// are fetched.
    #[pyo3(signature = (key, start, stop=None, *, zero_copy="preferred", timeout=None, keep=true))]
    #[allow(clippy::too_many_arguments, reason = "Python's keywords")]
    fn get_range(
        &self,
        py: Python<'_>,
        key: &str,
        start: u64,
        stop: Option<u64>,
        zero_copy: &str,
        timeout: Option<f64>,
        keep: bool,
    ) -> PyResult<PyTensor> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        let options = self.get_options(py, Getting { timeout, verify: false, keep }, zero_copy)?;
        without_gil(py, || get_rows(&store, &key, start, stop, &options)).map(PyTensor::of)
    }

    /// Copies an array of the store into `out`, a writable array of the same element type and shape in host memory.
    /// Returns how the get went: a Receipt.
    #[pyo3(signature = (key, out, *, zero_copy="preferred", timeout=None, verify=false, keep=true))]
    #[allow(clippy::too_many_arguments, reason = "Python's keywords")]
    fn get_into(
        &self,
        py: Python<'_>,
        key: &str,
        out: &Bound<'_, PyAny>,
        zero_copy: &str,
        timeout: Option<f64>,
        verify: bool,
        keep: bool,
    ) -> PyResult<PyReceipt> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        let options = self.get_options(py, Getting { timeout, verify, keep }, zero_copy)?;
        let target = Source::of(out)?;
        let receipt = without_gil(py, || {
            let object = store.get_with(&key, &options)?;
            let meta = object.meta();
            if (meta.dtype, meta.shape.dims()) != (target.dtype, &target.shape[..]) {
                let why = format!(
                    "get {key:?}: it is {} of {:?}, the object {} of {:?}",
                    target.dtype,
                    target.shape,
                    meta.dtype,
                    meta.shape.dims()
                );
                return Err(StoreError::invalid("out", why));
            }
            target.copy_from(&object)?;
            Ok(object.receipt())
        });
        receipt.map(PyReceipt::of)
    }

    /// Stores every array of a dict under `prefix/name`. Keywords as of put(). To publish a whole state dict at once, under
    /// a version, see hetmem.Generation.
    #[pyo3(signature = (prefix, state_dict, **keywords))]
    fn put_state_dict(
        &self,
        py: Python<'_>,
        prefix: &str,
        state_dict: &Bound<'_, PyAny>,
        keywords: Option<Putting>,
    ) -> PyResult<Vec<PyReceipt>> {
        let named = PyList::empty(py);
        for pair in state_dict.call_method0("items")?.try_iter()? {
            let (name, tensor): (String, Bound<'_, PyAny>) = pair?.extract()?;
            named.append((format!("{prefix}/{name}"), tensor))?;
        }
        self.put_many(py, named.as_any(), keywords)
    }

    /// Every array under `prefix/`, by its name after it: a dict of hetmem.Tensor.
    ///
    /// Raises hetmem.NotFound if there is none.
    #[pyo3(signature = (prefix, device=None, *, zero_copy="preferred", timeout=None))]
    fn get_state_dict<'py>(
        &self,
        py: Python<'py>,
        prefix: &str,
        device: Option<&Bound<'_, PyAny>>,
        zero_copy: &str,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let prefix = format!("{prefix}/");
        let keys = self.list(py, &prefix)?;
        if keys.is_empty() {
            return Err(to_python(py, &StoreError::not_found("get_state_dict", &prefix)));
        }
        let list = PyList::new(py, &keys)?;
        let tensors = self.get_many(py, list.as_any(), device, zero_copy, timeout, false, true, "raise")?;
        let dict = PyDict::new(py);
        for (key, tensor) in keys.iter().zip(tensors) {
            dict.set_item(key.strip_prefix(&prefix).unwrap_or(key), tensor)?;
        }
        Ok(dict)
    }

    #[pyo3(signature = (path, prefix, **keywords))]
    fn _load_safetensors(
        &self,
        py: Python<'_>,
        path: PathBuf,
        prefix: &str,
        keywords: Option<Putting>,
    ) -> PyResult<Vec<String>> {
        let store = self.store(py)?;
        let putting = keywords.unwrap_or_else(|| self.putting());
        without_gil(py, || files::load(&store, &path, prefix, &putting))
    }

    fn _save_safetensors(
        &self,
        py: Python<'_>,
        path: PathBuf,
        prefix: &str,
        timeout: Option<f64>,
        verify: bool,
    ) -> PyResult<Vec<String>> {
        let store = self.store(py)?;
        let options = self.get_options(py, Getting { timeout, verify, keep: true }, "preferred")?;
        without_gil(py, || files::save(&store, &path, prefix, &options))
    }

    /// Waits until an object of this key exists, at most `timeout` seconds. Raises hetmem.TimedOut.
    #[pyo3(signature = (key, timeout=30.0))]
    fn wait(&self, py: Python<'_>, key: &str, timeout: f64) -> PyResult<()> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.wait(&key, seconds("timeout", timeout)?))
    }

    /// Whether an object of this key exists anywhere, now.
    fn exists(&self, py: Python<'_>, key: &str) -> PyResult<bool> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.exists(&key))
    }

    fn __contains__(&self, py: Python<'_>, key: &str) -> PyResult<bool> {
        self.exists(py, key)
    }

    /// What is known about an object without its bytes: a hetmem.Stat. Raises hetmem.NotFound.
    fn stat(&self, py: Python<'_>, key: &str) -> PyResult<PyStat> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.stat(&key)).map(PyStat::of)
    }

    /// The keys that start with `prefix`, in order, from the whole cluster.
    #[pyo3(signature = (prefix=""))]
    fn list(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<String>> {
        let store = self.store(py)?;
        without_gil(py, || {
            store.list(prefix).map(|listed| listed.map(|listed| String::from(&listed.key))).collect()
        })
    }

    /// Deletes an object on every node; returns whether there was one. Readers keep what they hold.
    fn delete(&self, py: Python<'_>, key: &str) -> PyResult<bool> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.delete(&key))
    }

    /// Keeps this node from ever evicting an object; with pinned=False lets it again. Raises hetmem.NotFound if it is not
    /// on this node.
    #[pyo3(signature = (key, pinned=true))]
    fn pin(&self, py: Python<'_>, key: &str, pinned: bool) -> PyResult<()> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.pin(&key, pinned))
    }

    /// Drops this node's copy of an object that another node holds too; with force=True any copy. Raises hetmem.Denied
    /// for the last copy.
    #[pyo3(signature = (key, force=false))]
    fn evict(&self, py: Python<'_>, key: &str, force: bool) -> PyResult<()> {
        let key = arguments::key(py, key)?;
        let store = self.store(py)?;
        without_gil(py, || store.evict(&key, force))
    }

    /// The node's view of itself and its cluster, as `hetmem status --json` shows it.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let store = self.store(py)?;
        let text = without_gil(py, || {
            let status = store.status()?;
            serde_json::to_string(&status).map_err(|error| StoreError::protocol(format!("status: {error}")))
        })?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// The name of the node.
    #[getter]
    fn node(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.store(py)?.node().to_owned())
    }

    /// The path of the node's socket.
    #[getter]
    fn socket(&self) -> String {
        self.connection.socket().display().to_string()
    }

    /// Where other nodes reach the node, "HOST:PORT", if it runs in this process; else None.
    #[getter]
    fn address(&self) -> Option<String> {
        self.connection.address()
    }

    /// Ends the session, and the node if it runs in this process. Tensors that were got stay valid.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.connection.close());
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    /// A child that is spawned connects to the same socket.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String, f64))> {
        let connect = py.import("hetmem._core")?.getattr("_reconnect")?;
        Ok((connect, (self.socket(), self.connection.timeout().as_secs_f64())))
    }

    fn __repr__(&self) -> String {
        format!("hetmem.Store({:?})", self.socket())
    }
}

impl PyStore {
    fn putting(&self) -> Putting {
        let options = PutOptions { timeout: self.connection.timeout(), ..PutOptions::default() };
        Putting { options, device: None }
    }
}

/// What a pickled store becomes.
#[pyfunction(name = "_reconnect")]
pub(crate) fn reconnect(py: Python<'_>, socket: PathBuf, timeout: f64) -> PyResult<PyStore> {
    connect(py, Some(socket), timeout)
}

/// The element type that a user names: a word, or an object with a name, as numpy's and torch's types are.
fn named_dtype(dtype: &Bound<'_, PyAny>) -> PyResult<hetmem_client::DType> {
    let py = dtype.py();
    let name = match (dtype.extract::<String>(), dtype.getattr_opt("name")?, dtype.getattr_opt("__name__")?) {
        (Ok(word), ..) => word,
        (_, Some(name), _) | (_, None, Some(name)) => name.extract()?,
        (_, None, None) => dtype.str()?.to_string(),
    };
    dtype::parse(&name).map_err(|error| to_python(py, &error))
}

/// Puts an array, wherever it is; and how many of its bytes went through a buffer here.
fn put(
    store: &Store,
    key: &Key,
    source: &Source,
    putting: &Putting,
) -> Result<(PutOutcome, usize), StoreError> {
    let meta = source.meta()?;
    if !source.is_on_host() {
        return gpu::put(store, key, source, putting).map(|outcome| (outcome, 0));
    }
    let options = PutOptions { tier: arguments::hint(putting.device, store)?, ..putting.options };
    if let Some(bytes) = source.bytes() {
        return store.put_with(key, meta, bytes, &options).map(|outcome| (outcome, 0));
    }
    if source.len() <= GATHERED_LEN_MAX && options.zero_copy == ZeroCopy::Preferred {
        let mut gathered = vec![0; source.len()];
        source.copy_to(&mut gathered);
        return store.put_with(key, meta, &gathered, &options).map(|outcome| (outcome, gathered.len()));
    }
    match store.reserve(key, meta, &options)? {
        Reserved::Kept(outcome) => Ok((outcome, 0)),
        Reserved::Open(mut reservation) => {
            source.copy_to(reservation.bytes_mut());
            let staged = if reservation.in_place() { 0 } else { source.len() };
            reservation.seal().map(|outcome| (outcome, staged))
        }
    }
}

/// Rows of an object: in place if it is here, else no more than they are fetched.
fn get_rows(
    store: &Store,
    key: &Key,
    start: u64,
    stop: Option<u64>,
    options: &GetOptions,
) -> Result<Object, StoreError> {
    if let Some(object) = store.get_here(key)? {
        let range = arguments::rows(key, object.meta(), start, stop)?;
        return object.slice(range.start, range.len_bytes);
    }
    let stat = store.stat(key)?;
    let range = arguments::rows(key, &stat.meta, start, stop)?;
    let part = store.get_with(key, &GetOptions { range: Some(range), ..*options })?;
    if part.id() == stat.object || part.meta().shape == stat.meta.shape {
        return Ok(part);
    }
    Err(StoreError::stale("get", key, "another object has the key by now: ask again"))
}
