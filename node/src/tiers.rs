//! The memory of the node's segments, of whichever tier, and the GPUs that some of it is on. Not the books of it
//! (`hetmem_core`), and not who makes it (`segments`). Invariant: no CUDA context is created before the first segment
//! of a GPU tier is made, and then only on that GPU.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use hetmem_core::engine::GpuUse;
use hetmem_core::{Extent, StoreError};
use hetmem_gpu_mem::{Copier, Device, GpuDevice, Gpus, Memory, Span, Unavailable, capacity};
use hetmem_host_mem::Segment;
use hetmem_transport::Scratch;

use crate::config::GpuSize;
use crate::memory::CopiedSegment;
use crate::scratch::GpuScratch;
use crate::staging::Rings;

/// What GPU segments are made in multiples of, in bytes, as far as is known before a context is there to ask.
const GRANULE_BYTES: u64 = 2 << 20;

/// One segment.
#[derive(Clone)]
pub(crate) enum TierSegment {
    Host(Arc<Segment>),
    Gpu(Arc<hetmem_gpu_mem::Segment>),
}

impl TierSegment {
    /// What another process maps or imports it by.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Host(segment) => segment.descriptor(),
            Self::Gpu(segment) => segment.descriptor(),
        }
    }

    pub(crate) fn host(&self) -> Option<&Arc<Segment>> {
        match self {
            Self::Host(segment) => Some(segment),
            Self::Gpu(_) => None,
        }
    }

    /// A part of it, for a copy that a GPU makes.
    pub(crate) fn span(&self, extent: Extent) -> Result<Span, StoreError> {
        let memory = match self {
            Self::Host(segment) => Memory::Host(Arc::new(CopiedSegment(Arc::clone(segment)))),
            Self::Gpu(segment) => Memory::Device(Arc::clone(segment)),
        };
        Span::new(memory, extent.offset, extent.len_bytes)
    }
}

/// The GPUs of a node.
pub(crate) struct Tiers {
    gpus: Result<Gpus, Unavailable>,
    uses: Vec<GpuUse>,
    why_none: String,
    copier: Mutex<Option<Arc<Copier>>>,
    /// Those of which memory was made: kept, since a context takes long to make.
    devices: Mutex<BTreeMap<u16, Used>>,
}

/// A GPU that is used.
struct Used {
    device: Device,
    rings: Arc<Rings>,
}

impl Tiers {
    /// Looks for GPUs, and decides how much of each the store may use. Creates no context.
    ///
    /// # Errors
    /// Why there is no such GPU, if the configuration names one or gives it a size; with `auto`, absence is no error.
    pub(crate) fn look(size: &GpuSize, quota: impl Fn(u64) -> u64) -> Result<Self, StoreError> {
        if *size == GpuSize::Off {
            return Ok(Self::none("gpu = off in its configuration".to_owned()));
        }
        let gpus = match Gpus::open() {
            Ok(gpus) => gpus,
            Err(absent) if *size == GpuSize::Auto => {
                tracing::info!(why = %absent, "no GPU tier");
                return Ok(Self { gpus: Err(absent.clone()), ..Self::none(absent.to_string()) });
            }
            Err(absent) => return Err(absent.into()),
        };
        let mut uses = Vec::new();
        for (ordinal, uuid, capacity_bytes) in capacities(&gpus, size)? {
            tracing::info!(gpu = ordinal, capacity_bytes, "a GPU tier, of which nothing is taken yet");
            let client_quota_bytes = quota(capacity_bytes);
            let granule_bytes = GRANULE_BYTES;
            uses.push(GpuUse { ordinal, uuid, capacity_bytes, client_quota_bytes, granule_bytes });
        }
        let copier = Mutex::new(Some(Arc::new(Copier::new(gpus.clone()))));
        let why_none = "none of its GPUs can hold a tier (see `hetmem doctor`)".to_owned();
        Ok(Self { gpus: Ok(gpus), uses, why_none, copier, devices: Mutex::default() })
    }

    fn none(why_none: String) -> Self {
        let gpus =
            Err(Unavailable { what: "GPU".into(), why: why_none.clone(), remedy: "set gpu = auto".into() });
        Self { gpus, uses: Vec::new(), why_none, copier: Mutex::default(), devices: Mutex::default() }
    }

    /// What the engine is to know.
    pub(crate) fn uses(&self) -> Vec<GpuUse> {
        self.uses.clone()
    }

    /// Why there is no other GPU tier.
    pub(crate) fn why_none(&self) -> &str {
        &self.why_none
    }

    pub(crate) fn gpus(&self) -> Result<&Gpus, StoreError> {
        self.gpus.as_ref().map_err(|absent| absent.clone().into())
    }

    pub(crate) fn copier(&self) -> Option<Arc<Copier>> {
        self.copier.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the copies that are under way, and begins no other.
    pub(crate) fn stop(&self) {
        let copier = self.copier.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(copier);
    }

    /// A GPU whose memory is used from now on.
    pub(crate) fn device(&self, ordinal: u16) -> Result<Device, StoreError> {
        self.used(ordinal, |used| used.device.clone())
    }

    /// The host memory by which its bytes come and go over TCP.
    pub(crate) fn rings(&self, ordinal: u16) -> Result<Arc<Rings>, StoreError> {
        self.used(ordinal, |used| Arc::clone(&used.rings))
    }

    fn used<T>(&self, ordinal: u16, of: impl FnOnce(&Used) -> T) -> Result<T, StoreError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = devices.get(&ordinal) {
            return Ok(of(used));
        }
        let device = self.gpus()?.device(ordinal)?;
        let used = Used { rings: Rings::new(device.clone()), device };
        Ok(of(devices.entry(ordinal).or_insert(used)))
    }

    /// Memory of each GPU that adapters may reach, to try them with.
    pub(crate) fn scratches(&self) -> Vec<Arc<dyn Scratch>> {
        let mut scratches: Vec<Arc<dyn Scratch>> = Vec::new();
        for gpu in
            self.described().filter(|device| device.attributes.gpudirect_rdma).map(|device| device.ordinal)
        {
            match self.device(gpu).and_then(|device| GpuScratch::new(&device)) {
                Ok(scratch) => scratches.push(Arc::new(scratch)),
                Err(error) => tracing::warn!(gpu, %error, "RDMA devices are not tried with its memory"),
            }
        }
        scratches
    }

    /// The GPUs that are tiers, as the driver describes them.
    pub(crate) fn described(&self) -> impl Iterator<Item = &GpuDevice> {
        let all = self.gpus.iter().flat_map(|gpus| &gpus.probe().devices);
        all.filter(|device| self.uses.iter().any(|used| used.ordinal == device.ordinal))
    }

    /// Whether memory of any GPU was made.
    pub(crate) fn in_use(&self) -> bool {
        !self.devices.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// The GPUs that become tiers, by ordinal, with their UUIDs and how many bytes of each.
fn capacities(gpus: &Gpus, size: &GpuSize) -> Result<Vec<(u16, Arc<str>, u64)>, StoreError> {
    let probe = gpus.probe();
    let mut found = Vec::new();
    for device in &probe.devices {
        let attributes = &device.attributes;
        if !attributes.virtual_memory || !attributes.posix_descriptor_export {
            tracing::warn!(gpu = device.ordinal, name = device.name, "no tier: it cannot share its memory");
            continue;
        }
        let nvml = probe.nvml.as_ref().ok();
        let nvml = nvml.and_then(|nvml| nvml.devices.iter().find(|other| other.uuid == device.uuid));
        let bar1 = nvml.filter(|_| attributes.gpudirect_rdma).and_then(|nvml| {
            let used_bytes = nvml.bar1_used_bytes.unwrap_or(0);
            Some(capacity::Bar1 { total_bytes: nvml.bar1_bytes?, used_bytes })
        });
        // What is free is asked, by allocating, when memory is needed: to ask now would take a context, and it changes.
        let auto = capacity::auto_bytes(capacity::CapacityFacts {
            free_bytes: device.memory_bytes,
            total_bytes: device.memory_bytes,
            bar1,
            granularity_bytes: GRANULE_BYTES,
        });
        let bytes = size.of(device.ordinal, device.memory_bytes, auto);
        if bytes > device.memory_bytes {
            let why =
                format!("gpu:{} has {} bytes, {bytes} are configured", device.ordinal, device.memory_bytes);
            return Err(StoreError::invalid("gpu", why));
        }
        if bytes >= GRANULE_BYTES {
            found.push((device.ordinal, device.uuid.as_str().into(), bytes));
        }
    }
    if let Some(ordinal) = size.named().find(|named| !found.iter().any(|(ordinal, ..)| ordinal == named)) {
        let why = match probe.unusable.iter().find(|absent| absent.what == format!("gpu:{ordinal}")) {
            Some(absent) => absent.to_string(),
            None => format!(
                "there is no such GPU, or it cannot share its memory; {} are here",
                probe.devices.len()
            ),
        };
        return Err(StoreError::unavailable(format!("gpu:{ordinal}"), why));
    }
    Ok(found)
}
