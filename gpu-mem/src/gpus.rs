//! The GPUs of this machine, opened: what the probe found, the driver's table, and what all devices of a process have
//! together. Not one device (`device`). Invariant: opening creates no context, and the context of a device is made
//! only for calls that name that device.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hetmem_core::StoreError;

use crate::context::Context;
use crate::device::Device;
use crate::pinned::PinnedRanges;
use crate::table::Calls;
use crate::{GpuDevice, GpuProbe, Unavailable};

/// From how many short copies on a batch goes by a kernel: a launch costs a few microseconds, about what two or three
/// copies cost each by itself, and its list another one or two. Reasoned, not measured: `hetmem bench gpu` measures it.
const GATHER_FROM: usize = 8;

/// The GPUs of this machine. Clones are the same GPUs.
#[derive(Clone)]
pub struct Gpus {
    shared: Arc<Shared>,
}

struct Shared {
    calls: &'static Calls,
    probe: GpuProbe,
    contexts: Mutex<BTreeMap<u16, Weak<Context>>>,
    /// The devices whose driver has refused a read-only mapping, so that it is asked once.
    read_only_refused: Mutex<BTreeSet<u16>>,
    pinned: Arc<PinnedRanges>,
    /// How many short copies go by a kernel.
    gather_from: AtomicUsize,
}

/// The state behind these locks is whole between any two statements, so a thread that panicked left it whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpus {
    /// Probes, and looks the driver's functions up. No context is created.
    ///
    /// # Errors
    /// Why there is no usable GPU here, with what to do about it.
    pub fn open() -> Result<Self, Unavailable> {
        let probe = crate::probe();
        if let Err(absent) = &probe.driver {
            return Err(absent.clone());
        }
        let calls = Calls::get()?;
        if probe.devices.is_empty() {
            return Err(probe.unusable.into_iter().next().unwrap_or_else(|| Unavailable {
                what: "GPU".into(),
                why: "the driver describes no device".to_owned(),
                remedy: "see whether `nvidia-smi` works, and what the kernel log says".into(),
            }));
        }
        Ok(Self {
            shared: Arc::new(Shared {
                calls,
                probe,
                contexts: Mutex::default(),
                read_only_refused: Mutex::default(),
                pinned: Arc::default(),
                gather_from: AtomicUsize::new(GATHER_FROM),
            }),
        })
    }

    /// What was found when the GPUs were opened.
    #[must_use]
    pub fn probe(&self) -> &GpuProbe {
        &self.shared.probe
    }

    /// Whether many copies can go to the driver in one call (CUDA 12.8), or why not.
    ///
    /// # Errors
    /// The reason; copies then go one call each.
    pub fn batch_copies(&self) -> Result<(), Unavailable> {
        match self.shared.calls.copy_batch {
            Some(_) => Ok(()),
            None => Err(Unavailable {
                what: "batch copies".into(),
                why: "the libcuda found has no function cuMemcpyBatchAsync".to_owned(),
                remedy: "update the NVIDIA driver to 570 or newer; until then each copy is a call of its own"
                    .into(),
            }),
        }
    }

    /// From how many short copies on [`Stream::copy_many`](crate::Stream::copy_many) has a kernel make them all, in one
    /// launch; `usize::MAX` for never. For tests and benches: the default is meant to be right.
    pub fn set_gather_from(&self, copies: usize) {
        self.shared.gather_from.store(copies, Ordering::Relaxed);
    }

    /// The default again.
    pub fn restore_gather_from(&self) {
        self.set_gather_from(GATHER_FROM);
    }

    pub(crate) fn gather_from(&self) -> usize {
        self.shared.gather_from.load(Ordering::Relaxed)
    }

    /// The device with this ordinal. Its primary context is retained from the first call until the last of its
    /// devices, segments, streams and registrations is dropped.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] if there is no such device or it gives no context.
    pub fn device(&self, ordinal: u16) -> Result<Device, StoreError> {
        let info = self.info(ordinal)?.clone();
        Ok(Device::new(self.clone(), self.context(ordinal)?, info))
    }

    fn info(&self, ordinal: u16) -> Result<&GpuDevice, StoreError> {
        let probe = &self.shared.probe;
        if let Some(info) = probe.devices.iter().find(|device| device.ordinal == ordinal) {
            return Ok(info);
        }
        let name = format!("gpu:{ordinal}");
        match probe.unusable.iter().find(|absent| absent.what == name) {
            Some(absent) => Err(absent.clone().into()),
            None => Err(StoreError::unavailable(
                name,
                format!(
                    "the driver shows {} devices here (see `nvidia-smi` and CUDA_VISIBLE_DEVICES)",
                    probe.devices.len()
                ),
            )),
        }
    }

    fn context(&self, ordinal: u16) -> Result<Arc<Context>, StoreError> {
        let mut contexts = lock(&self.shared.contexts);
        if let Some(context) = contexts.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(context);
        }
        let context = Context::retain(self.shared.calls, ordinal).map_err(|failed| {
            StoreError::unavailable(
                format!("gpu:{ordinal}"),
                format!(
                    "{} (see who uses the device: `nvidia-smi`; its compute mode may forbid another process)",
                    failed.reason()
                ),
            )
        })?;
        let context = Arc::new(context);
        contexts.insert(ordinal, Arc::downgrade(&context));
        Ok(context)
    }

    /// A device that is in use already, else the first: for what needs a context and not a certain device.
    pub(crate) fn any_context(&self) -> Result<Arc<Context>, StoreError> {
        let open = lock(&self.shared.contexts).values().find_map(Weak::upgrade);
        match (open, self.shared.probe.devices.first()) {
            (Some(context), _) => Ok(context),
            (None, Some(first)) => self.context(first.ordinal),
            (None, None) => Err(StoreError::unavailable("GPU", "no device can be used")),
        }
    }

    pub(crate) fn pinned(&self) -> &Arc<PinnedRanges> {
        &self.shared.pinned
    }

    pub(crate) fn is_read_only_refused(&self, ordinal: u16) -> bool {
        lock(&self.shared.read_only_refused).contains(&ordinal)
    }

    pub(crate) fn refuse_read_only(&self, ordinal: u16) {
        lock(&self.shared.read_only_refused).insert(ordinal);
    }
}

impl fmt::Debug for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpus").field("devices", &self.shared.probe.devices.len()).finish_non_exhaustive()
    }
}
