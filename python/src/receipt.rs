//! Receipts and what else is known about objects, as Python sees them. Not how they come about. Invariant: what they say
//! is what the client was told.

use hetmem_client::{PutOutcome, Receipt, Stat};
use pyo3::prelude::*;

/// How one get or put really moved its bytes.
#[pyclass(name = "Receipt", module = "hetmem", frozen, get_all)]
#[derive(Debug)]
pub(crate) struct PyReceipt {
    /// By which way: "local", "eager", "read", "push", "local copy" (gets); "ahead", "inline", "in place", "written",
    /// "copied", "kept" (puts).
    path: String,
    /// "tcp" or "verbs"; None within one node.
    fabric: Option<String>,
    /// Where the bytes came from: a node and its tier, or the caller.
    source: String,
    /// Where they are now.
    target: String,
    /// How many bytes were moved; 0 where they stayed in place.
    nbytes: u64,
    /// Of these, how many passed through a buffer that is neither source nor target.
    staged_bytes: u64,
    /// Questions and reads between nodes that followed one another.
    round_trips: u32,
    /// Objects up to this many bytes would have come inside a peer's answer; None if no peer was asked.
    threshold_bytes: Option<u64>,
    /// How long the call took, in seconds; None for a get of what was there, which does not look at the clock.
    elapsed: Option<f64>,
    /// Whether a put found an object of its key and kept it.
    kept: bool,
    /// On how many nodes a put's object is for good, as far as is known; 0 for a get.
    replicas: u32,
}

impl PyReceipt {
    pub(crate) fn of(receipt: Receipt) -> Self {
        Self {
            path: receipt.path.to_string(),
            fabric: receipt.fabric.map(|name| name.to_string()),
            source: receipt.from.to_string(),
            target: receipt.to.to_string(),
            nbytes: receipt.bytes,
            staged_bytes: receipt.staged_bytes,
            round_trips: receipt.round_trips,
            threshold_bytes: receipt.threshold_bytes,
            elapsed: receipt.elapsed.map(|time| time.as_secs_f64()),
            kept: false,
            replicas: 0,
        }
    }

    /// Of a put, of which `staged` bytes went through a buffer here.
    pub(crate) fn of_put(outcome: PutOutcome, staged: usize) -> Self {
        let (kept, replicas) = (outcome.kept, outcome.replicas);
        let mut receipt = Self { kept, replicas, ..Self::of(outcome.receipt) };
        if !kept {
            receipt.staged_bytes = receipt.staged_bytes.max(staged as u64);
        }
        receipt
    }
}

#[pymethods]
impl PyReceipt {
    fn __repr__(&self) -> String {
        let fabric = self.fabric.as_deref().map_or(String::new(), |fabric| format!(", fabric={fabric}"));
        format!(
            "hetmem.Receipt({}, {} to {}{fabric}, nbytes={}, staged_bytes={})",
            self.path, self.source, self.target, self.nbytes, self.staged_bytes
        )
    }
}

/// What is known about an object without its bytes.
#[pyclass(name = "Stat", module = "hetmem", frozen, get_all)]
#[derive(Debug)]
pub(crate) struct PyStat {
    /// The name of its element type.
    dtype: &'static str,
    /// The lengths of its dimensions, in elements.
    shape: Vec<u64>,
    /// Its length in bytes.
    nbytes: u64,
    /// Its tier on this node ("host", "gpu:0"), if it is here.
    tier: Option<String>,
    /// Whether this node never evicts it.
    pinned: bool,
    /// Names of the nodes that hold it, where known.
    holders: Vec<String>,
}

impl PyStat {
    pub(crate) fn of(stat: Stat) -> Self {
        Self {
            dtype: stat.meta.dtype.name(),
            shape: stat.meta.shape.dims().to_vec(),
            nbytes: stat.meta.len_bytes,
            tier: stat.tier.map(|tier| tier.to_string()),
            pinned: stat.pinned,
            holders: stat.holders,
        }
    }
}

#[pymethods]
impl PyStat {
    fn __repr__(&self) -> String {
        format!(
            "hetmem.Stat(dtype={}, shape={:?}, nbytes={}, holders={:?})",
            self.dtype, self.shape, self.nbytes, self.holders
        )
    }
}
