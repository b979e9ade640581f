//! What adapters write into GPU memory, and when GPUs see it (docs/gpu-visibility.md). Not the decision
//! (`hetmem_gpu_mem::flush`). Invariant: the engine hears that such a read has succeeded only after the flush that its GPU
//! needs, and memory of a GPU for which there is none is never given to an adapter to write.

use std::collections::{BTreeMap, HashMap};

use hetmem_core::{StoreError, TransferId};
use hetmem_gpu_mem::GpuDevice;
use hetmem_gpu_mem::flush::{Consumer, FlushDecision, FlushFacts, decide};
use hetmem_transport::ReadStats;
use parking_lot::Mutex;

#[derive(Default)]
pub(crate) struct Visibility {
    /// GPUs that adapters write to, and whether each is flushed.
    flushes: BTreeMap<u16, bool>,
    /// Reads by adapters into GPU memory that are under way.
    reads: Mutex<HashMap<TransferId, u16>>,
}

impl Visibility {
    /// Of the GPUs into which so many adapters were seen to put bytes. Says of each that cannot be used so why.
    pub(crate) fn of<'a>(devices: impl Iterator<Item = &'a GpuDevice>, nics: u32) -> Self {
        let mut flushes = BTreeMap::new();
        for device in devices {
            let decision = decide(FlushFacts {
                writes_ordering: device.attributes.writes_ordering,
                flush_writes_options: device.attributes.flush_writes_options,
                compute_capability: device.compute_capability,
                // NVML has it by a call that its bindings lack.
                c2c: None,
                // Nothing here registers memory for that.
                data_direct: false,
                nics,
                consumer: Consumer::WorkSubmittedLater,
            });
            let gpu = device.ordinal;
            match decision {
                FlushDecision::None(_) => drop(flushes.insert(gpu, false)),
                FlushDecision::Flush(_) => drop(flushes.insert(gpu, true)),
                FlushDecision::ReadBack(why) => {
                    tracing::warn!(gpu, why, "what adapters bring for it passes through host memory");
                }
            }
        }
        Self { flushes, reads: Mutex::default() }
    }

    /// The GPUs that adapters may be told to write to.
    pub(crate) fn gpus(&self) -> impl Iterator<Item = u16> + '_ {
        self.flushes.keys().copied()
    }

    /// An adapter is told to write to this GPU.
    pub(crate) fn begin(&self, transfer: TransferId, gpu: u16) {
        if self.flushes.get(&gpu).is_some_and(|flushed| *flushed) {
            self.reads.lock().insert(transfer, gpu);
        }
    }

    /// A read did not begin.
    pub(crate) fn forget(&self, transfer: TransferId) {
        self.reads.lock().remove(&transfer);
    }

    /// A read is over: GPUs see what it has brought when this returns, or it has failed.
    pub(crate) fn end(
        &self,
        transfer: TransferId,
        result: Result<ReadStats, StoreError>,
        flush: impl FnOnce(u16) -> Result<(), StoreError>,
    ) -> Result<ReadStats, StoreError> {
        let gpu = self.reads.lock().remove(&transfer);
        match (result, gpu) {
            (Ok(stats), Some(gpu)) => flush(gpu).map(|()| stats),
            (result, _) => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use hetmem_gpu_mem::GpuAttributes;

    use super::*;

    fn gpu(ordinal: u16, writes_ordering: u32, flush_writes_options: u32) -> GpuDevice {
        GpuDevice {
            ordinal,
            name: "GPU".to_owned(),
            uuid: format!("GPU-{ordinal}"),
            compute_capability: (9, 0),
            memory_bytes: 1 << 30,
            pci_id: String::new(),
            attributes: GpuAttributes { writes_ordering, flush_writes_options, ..GpuAttributes::default() },
            peers: Vec::new(),
        }
    }

    #[test]
    fn a_success_is_told_after_the_flush_and_only_if_that_went_well() {
        let gpus = [gpu(0, 0, 1), gpu(2, 0, 0)];
        let visibility = Visibility::of(gpus.iter(), 1);
        assert_eq!(
            visibility.gpus().collect::<Vec<_>>(),
            [0],
            "the other one has no flush that can be called"
        );
        let (stats, lost) = (ReadStats::default(), StoreError::os("read", "the link is lost"));
        let mut flushed = Vec::new();
        let mut end = |transfer, result: Result<ReadStats, StoreError>, flush: Result<(), StoreError>| {
            visibility.end(TransferId(transfer), result, |gpu| {
                flushed.push((transfer, gpu));
                flush
            })
        };
        for transfer in [1, 2, 3] {
            visibility.begin(TransferId(transfer), 0);
        }
        assert_eq!(end(1, Ok(stats), Ok(())), Ok(stats));
        assert_eq!(end(2, Err(lost.clone()), Ok(())), Err(lost.clone()));
        assert_eq!(end(3, Ok(stats), Err(lost.clone())), Err(lost));
        // Into host memory, and once more than there are reads.
        assert_eq!(end(4, Ok(stats), Ok(())), Ok(stats));
        assert_eq!(end(1, Ok(stats), Ok(())), Ok(stats));
        assert_eq!(flushed, [(1, 0), (3, 0)]);
        assert!(visibility.reads.lock().is_empty());
    }
}
