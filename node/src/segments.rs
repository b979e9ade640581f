//! Making and releasing memory, and long copies, on a thread of their own: they take milliseconds and would hold up
//! everyone else. Not the books (`hetmem_core`). Invariant: jobs are done in the order in which they came.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};

use hetmem_core::engine::{Input, StartUp};
use hetmem_core::{ClientId, Extent, Generation, SegmentId, StoreError};
use hetmem_host_mem::{Alive, IndexMemory, PagePolicy, Reserve, Segment, SegmentOwner};
use hetmem_transport::{Access, RegionMemory};

use crate::driver::Driver;
use crate::memory::SegmentRegion;

pub(crate) enum Job {
    Create { segment: SegmentId, len_bytes: u64, owner: Option<ClientId> },
    Retire { segment: SegmentId, len_bytes: u64, memory: Option<Arc<Segment>> },
    Copy { generation: Generation, from: (Arc<Segment>, Extent), to: (Arc<Segment>, Extent) },
    Stop,
}

/// Memory that is not in segments yet.
pub(crate) struct Maker {
    pub(crate) reserve: Reserve,
    pub(crate) pages: PagePolicy,
}

impl Maker {
    /// Also the thread by which clients see that the node lives.
    pub(crate) fn run(mut self, jobs: &Receiver<Job>, driver: &Weak<Driver>, index: Arc<IndexMemory>) {
        let _alive = Alive::begin(index);
        for job in jobs {
            let Some(driver) = driver.upgrade() else { return };
            match job {
                Job::Create { segment, len_bytes, owner } => {
                    let input = match self.create(&driver, segment, len_bytes, owner) {
                        Ok(input) => input,
                        Err(why) => Input::SegmentFailed { segment, why },
                    };
                    driver.feed(input);
                }
                Job::Retire { segment, len_bytes, memory } => {
                    if let Some(fabrics) = driver.fabrics.get() {
                        fabrics.deregister(segment);
                    }
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
    ) -> Result<Input, StoreError> {
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
        driver.core.lock().segments.insert(id, segment);
        Ok(Input::SegmentReady { segment: id, keys })
    }
}
