//! The node's copying: copies are handed in from any thread, issued by a thread per device on a stream per direction,
//! and reported when they have ended. Not the lane of one device (`lane`). Invariant: `done` is called exactly once for
//! every copy, whatever becomes of the device, the thread or the copier.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use hetmem_core::StoreError;

use crate::gpus::lock;
use crate::lane::{self, Lane};
use crate::span::Span;
use crate::{Device, Gpus};

/// How a copy went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Bytes that passed through a buffer of the store that is neither source nor target: 0.
    pub staged_bytes: u64,
    /// Whether all memory of it was a device's or pinned. The driver stages what is not, in buffers of its own.
    pub pinned: bool,
}

/// What is called when a copy has ended, on a thread of the copier. It must not wait for another copy of it.
pub type Done = Box<dyn FnOnce(Result<Copied, StoreError>) + Send>;

/// Copies for a node. Dropped, it finishes what was submitted.
pub struct Copier {
    gpus: Gpus,
    lanes: Mutex<BTreeMap<u16, Running>>,
}

struct Running {
    lane: Arc<Lane>,
    thread: JoinHandle<()>,
}

/// One copy, from `submit` to `done`.
pub(crate) struct Job {
    pub(crate) from: Span,
    pub(crate) to: Span,
    pub(crate) done: Pending,
}

/// A call of `done` that is still to come. Dropped without one, it says that the copier gave up.
pub(crate) struct Pending(Option<Done>);

impl Pending {
    /// Calls `done`. One that panics takes nothing else with it.
    pub(crate) fn finish(mut self, result: Result<Copied, StoreError>) {
        self.call(result);
    }

    fn call(&mut self, result: Result<Copied, StoreError>) {
        if let Some(done) = self.0.take() {
            // The panic has been reported by its hook; the copies of others go on.
            let _ = catch_unwind(AssertUnwindSafe(|| done(result)));
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.call(Err(StoreError::os("copy", "the thread that copies for this GPU has ended")));
    }
}

impl Copier {
    /// A copier without threads yet; each device's starts with its first copy.
    #[must_use]
    pub fn new(gpus: Gpus) -> Self {
        Self { gpus, lanes: Mutex::default() }
    }

    /// The GPUs that it copies with.
    #[must_use]
    pub fn gpus(&self) -> &Gpus {
        &self.gpus
    }

    /// Copies `from` to `to` and calls `done`. Copies are in no order among themselves; one that needs another waits
    /// for its `done`. Completions of one direction of a device are reported in the order of submission.
    ///
    /// `done` is called before this returns only where no device can copy: both ends are host memory, or its thread
    /// cannot start. After an error the target's bytes are undefined.
    pub fn submit(&self, from: Span, to: Span, done: Done) {
        self.submit_many([(from, to, done)]);
    }

    /// The same for many, of which those of one device reach its thread all at once: short ones are then one launch.
    pub fn submit_many(&self, copies: impl IntoIterator<Item = (Span, Span, Done)>) {
        let mut by_device: BTreeMap<u16, (Device, Vec<Job>)> = BTreeMap::new();
        for (from, to, done) in copies {
            let done = Pending(Some(done));
            match to.memory().device().or_else(|| from.memory().device()).cloned() {
                Some(device) => {
                    let jobs = by_device.entry(device.ordinal()).or_insert_with(|| (device, Vec::new()));
                    jobs.1.push(Job { from, to, done });
                }
                None => {
                    let why = "both ends are host memory, which no GPU copies";
                    done.finish(Err(StoreError::invalid("copy", why)));
                }
            }
        }
        for (device, jobs) in by_device.into_values() {
            match self.lane(&device) {
                Ok(lane) => lane.push(jobs),
                Err(error) => jobs.into_iter().for_each(|job| job.done.finish(Err(error.clone()))),
            }
        }
    }

    fn lane(&self, device: &Device) -> Result<Arc<Lane>, StoreError> {
        let mut lanes = lock(&self.lanes);
        if let Some(running) = lanes.get(&device.ordinal()) {
            return Ok(Arc::clone(&running.lane));
        }
        let lane = Arc::new(Lane::default());
        let (theirs, device) = (Arc::clone(&lane), device.clone());
        let ordinal = device.ordinal();
        let thread = std::thread::Builder::new()
            .name(format!("hetmem-copy-{ordinal}"))
            .spawn(move || lane::run(&theirs, &device))
            .map_err(|error| StoreError::os(format!("start a thread for copies of gpu:{ordinal}"), error))?;
        lanes.insert(ordinal, Running { lane: Arc::clone(&lane), thread });
        Ok(lane)
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        for running in lanes.values() {
            running.lane.close();
        }
        for running in lanes.into_values() {
            // A `done` that drops the copier runs on one of these threads, which then ends by itself.
            if running.thread.thread().id() != std::thread::current().id() {
                // A thread that panicked has called every `done` while it unwound.
                let _ = running.thread.join();
            }
        }
    }
}

impl fmt::Debug for Copier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copier").field("devices", &lock(&self.lanes).len()).finish_non_exhaustive()
    }
}
