//! Making and releasing memory, and long copies, on a thread of their own: they take milliseconds and would hold up
//! everyone else. Not the books (`hetmem_core`). Invariant: jobs are done in the order in which they came.

use std::collections::HashMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hetmem_core::engine::{FabricId, Input, StartUp};
use hetmem_core::{ClientId, Extent, Generation, RemoteKey, SegmentId, StoreError, Tier};
use hetmem_gpu_mem::HostRegistration;
use hetmem_host_mem::{Alive, IndexMemory, PagePolicy, Reserve, Segment, SegmentOwner};
use hetmem_transport::{Access, RegionMemory};

use crate::driver::Driver;
use crate::memory::{CopiedSegment, GpuRegion, SegmentRegion};
use crate::staging::GpuStaging;
use crate::tiers::TierSegment;

pub(crate) enum Job {
    Create { segment: SegmentId, tier: Tier, len_bytes: u64, owner: Option<ClientId> },
    Retire { segment: SegmentId, len_bytes: u64, memory: Option<TierSegment> },
    Copy { generation: Generation, from: (Arc<Segment>, Extent), to: (Arc<Segment>, Extent) },
    Stop,
}

/// How long copies of a retired segment, which have ended, may take to let go of it.
const LET_GO_MAX: Duration = Duration::from_secs(5);

/// The end of a GPU segment, in the order that its types allow: no new copy or registration, copies over, no adapter
/// reaches it, unmapped. Clients that import it were told, or will be with the next segment that they ask for.
fn retire_from_gpu(id: SegmentId, memory: Arc<hetmem_gpu_mem::Segment>, deregister: impl FnOnce()) {
    let until = Instant::now() + LET_GO_MAX;
    let wait = || {
        std::thread::sleep(Duration::from_millis(1));
        Instant::now() < until
    };
    let mut stopped = memory.stop_grants();
    let drained = loop {
        match stopped.drained() {
            Ok(drained) => break drained,
            Err(again) if wait() => stopped = again,
            Err(_) => {
                // Whoever holds it frees it. Adapters are told now all the same.
                tracing::warn!(segment = %id, "a copy still holds a retired GPU segment");
                return deregister();
            }
        }
    };
    deregister();
    let mut drained = drained;
    loop {
        match drained.deregistered() {
            Ok(_unmapped) => return,
            Err(again) if wait() => drained = again,
            Err(_) => return tracing::warn!(segment = %id, "a fabric still holds a retired GPU segment"),
        }
    }
}

/// Memory that is not in segments yet.
pub(crate) struct Maker {
    pub(crate) reserve: Reserve,
    pub(crate) pages: PagePolicy,
    /// Host segments that GPUs copy from and to at the speed of the link.
    pub(crate) registered: HashMap<SegmentId, HostRegistration>,
}

impl Maker {
    /// Also the thread by which clients see that the node lives.
    pub(crate) fn run(mut self, jobs: &Receiver<Job>, driver: &Weak<Driver>, index: Arc<IndexMemory>) {
        let _alive = Alive::begin(index);
        for job in jobs {
            let Some(driver) = driver.upgrade() else { return };
            match job {
                Job::Create { segment, tier, len_bytes, owner } => {
                    let made = match tier {
                        Tier::Host => self.create(&driver, segment, len_bytes, owner),
                        Tier::Gpu(ordinal) => self.create_on_gpu(&driver, segment, ordinal, len_bytes),
                    };
                    driver.feed(match made {
                        Ok(keys) => Input::SegmentReady { segment, keys },
                        Err(why) => Input::SegmentFailed { segment, why },
                    });
                }
                Job::Retire { segment, len_bytes, memory } => {
                    let deregister = || {
                        if let Some(fabrics) = driver.fabrics.get() {
                            fabrics.deregister(segment);
                        }
                    };
                    if let Some(TierSegment::Gpu(memory)) = memory {
                        retire_from_gpu(segment, memory, deregister);
                        continue;
                    }
                    deregister();
                    self.registered.remove(&segment);
                    drop(memory);
                    if let Err(error) = self.reserve.put_back(len_bytes) {
                        tracing::warn!(%segment, len_bytes, %error, "released memory could not be reserved again");
                    }
                }
                Job::Copy { generation, from, to } => {
                    let result = to.0.copy_from(to.1.offset, &from.0, from.1.offset, from.1.len_bytes);
                    driver.feed(Input::CopyDone { generation, result });
                }
                Job::Stop => return,
            }
        }
    }

    fn create(
        &mut self,
        driver: &Driver,
        id: SegmentId,
        len_bytes: u64,
        owner: Option<ClientId>,
    ) -> Result<Vec<(FabricId, RemoteKey)>, StoreError> {
        self.reserve.take(len_bytes)?;
        let kind = if owner.is_some() { SegmentOwner::Client } else { SegmentOwner::Node };
        // Once the node serves, somebody waits for this memory.
        let serving = matches!(driver.core.lock().engine.start_up(), StartUp::Ready);
        let pages = if serving && self.pages == PagePolicy::Auto { PagePolicy::AtOnce } else { self.pages };
        let segment = match Segment::create(id, len_bytes, kind, pages) {
            Ok(segment) => Arc::new(segment),
            Err(error) => {
                if let Err(lost) = self.reserve.put_back(len_bytes) {
                    tracing::warn!(%id, len_bytes, error = %lost, "released memory could not be reserved again");
                }
                return Err(error);
            }
        };
        let region: Arc<dyn RegionMemory> = Arc::new(SegmentRegion(Arc::clone(&segment)));
        let keys = match driver.fabrics.get() {
            Some(fabrics) => fabrics.register(id, &region, Access::RemoteRead)?,
            None => Vec::new(),
        };
        if driver.tiers.in_use() {
            self.register_with_gpus(driver, id, &segment);
        }
        driver.core.lock().segments.insert(id, TierSegment::Host(segment));
        Ok(keys)
    }

    /// Memory of a GPU. Adapters that cannot reach it are no reason to do without: their links are given copies.
    fn create_on_gpu(
        &mut self,
        driver: &Driver,
        id: SegmentId,
        ordinal: u16,
        len_bytes: u64,
    ) -> Result<Vec<(FabricId, RemoteKey)>, StoreError> {
        let first = !driver.tiers.in_use();
        let segment = Arc::new(driver.tiers.device(ordinal)?.create_segment(len_bytes)?);
        // Clients import it by the length that the engine knows.
        if segment.len_bytes() != len_bytes {
            let why = format!("its driver makes {} bytes of {len_bytes}", segment.len_bytes());
            return Err(StoreError::unavailable(format!("gpu:{ordinal} as a tier"), why));
        }
        let staging = Some(GpuStaging::new(&segment, driver.tiers.rings(ordinal)?));
        let region: Arc<dyn RegionMemory> = Arc::new(GpuRegion { registered: segment.register()?, staging });
        let keys = match driver.fabrics.get() {
            Some(fabrics) => fabrics.register_device(id, ordinal, &region, Access::RemoteRead),
            None => Vec::new(),
        };
        let hosts: Vec<(SegmentId, Arc<Segment>)> = {
            let mut core = driver.core.lock();
            core.segments.insert(id, TierSegment::Gpu(segment));
            let hosts = core.segments.iter().filter(|_| first);
            hosts.filter_map(|(id, segment)| Some((*id, Arc::clone(segment.host()?)))).collect()
        };
        for (id, segment) in hosts {
            self.register_with_gpus(driver, id, &segment);
        }
        Ok(keys)
    }

    fn register_with_gpus(&mut self, driver: &Driver, id: SegmentId, segment: &Arc<Segment>) {
        let memory = Arc::new(CopiedSegment(Arc::clone(segment)));
        let registered = driver.tiers.gpus().and_then(|gpus| gpus.register_host(memory, false));
        match registered {
            Ok(registered) => {
                self.registered.insert(id, registered);
            }
            // Copies go through the driver's own buffers then.
            Err(error) => tracing::warn!(segment = %id, %error, "copies to and from GPUs are slow here"),
        }
    }
}
