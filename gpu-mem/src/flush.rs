//! Whether bytes that a NIC wrote into GPU memory must be flushed before a GPU reads them: a pure function. Not the
//! flush (`Device::flush_writes`). Invariant: doubt means a flush. The contract is in docs/gpu-visibility.md.

/// `CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER`: the GPU that owns the memory sees remote writes in order by itself.
const ORDERING_OWNER: u32 = 100;
/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST`: the processor can flush with a call.
const OPTION_HOST: u32 = 1;
/// From this compute capability on a GPU keeps the order of what one NIC writes over one path.
const ORDERED_SINCE_MAJOR: u32 = 9;

/// Who reads the bytes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Consumer {
    /// A processor, or a NIC, out of host memory; the GPU is not involved.
    HostReader,
    /// A copy or kernel that is submitted after the completion of the write was seen.
    WorkSubmittedLater,
    /// A kernel that runs already and learns of the bytes by looking at memory.
    RunningKernel,
}

/// What decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushFacts {
    /// `GpuAttributes::writes_ordering`.
    pub writes_ordering: u32,
    /// `GpuAttributes::flush_writes_options`.
    pub flush_writes_options: u32,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Whether the GPU also has a chip-to-chip link to the processor. None: nobody can tell, which is doubt.
    pub c2c: Option<bool>,
    /// Whether the NIC reaches the GPU by a path of its own beside the host bridge ("data direct").
    pub data_direct: bool,
    /// How many NICs wrote the bytes.
    pub nics: u32,
    /// Who reads them next.
    pub consumer: Consumer,
}

/// What to do before the consumer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushDecision {
    /// Nothing.
    None(&'static str),
    /// [`crate::Device::flush_writes`], once after all completions.
    Flush(&'static str),
    /// The driver's flush does not cover these writes: each NIC that wrote reads a byte of what it wrote back, on the
    /// queue pair that it wrote by. Where that cannot be done, the bytes go through host memory.
    ReadBack(&'static str),
}

impl FlushDecision {
    /// Why.
    #[must_use]
    pub fn why(self) -> &'static str {
        match self {
            Self::None(why) | Self::Flush(why) | Self::ReadBack(why) => why,
        }
    }
}

/// Decides.
#[must_use]
pub fn decide(facts: FlushFacts) -> FlushDecision {
    if facts.consumer == Consumer::HostReader {
        return FlushDecision::None("the GPU reads none of it");
    }
    // On a GPU with two paths the driver says that everything is in order, and its flush does nothing; order between
    // the paths is left to whoever uses them.
    if facts.data_direct {
        return FlushDecision::ReadBack("data-direct writes are not ordered with the driver's own path");
    }
    if facts.c2c == Some(true) {
        return FlushDecision::ReadBack(
            "the GPU has a chip-to-chip path beside PCIe, and the two are not ordered",
        );
    }
    let flush = |why| match facts.flush_writes_options & OPTION_HOST {
        0 => FlushDecision::ReadBack("a flush is needed, and the driver has none for the processor to call"),
        _ => FlushDecision::Flush(why),
    };
    if facts.consumer == Consumer::RunningKernel {
        return flush("no submission stands between the write and a kernel that runs already");
    }
    if facts.writes_ordering < ORDERING_OWNER {
        return flush("the GPU does not keep the order of remote writes");
    }
    if facts.compute_capability.0 < ORDERED_SINCE_MAJOR {
        return flush("GPUs before compute capability 9.0 are flushed whatever they say");
    }
    if facts.c2c.is_none() {
        return flush("whether there is a chip-to-chip path is not known");
    }
    if facts.nics != 1 {
        return flush("writes of several NICs are not ordered with each other");
    }
    FlushDecision::None("one NIC, one path, and the GPU keeps the order of remote writes")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An H100 with one NIC and a copy that is submitted after the completion.
    const ORDERED: FlushFacts = FlushFacts {
        writes_ordering: 200,
        flush_writes_options: 1,
        compute_capability: (9, 0),
        c2c: Some(false),
        data_direct: false,
        nics: 1,
        consumer: Consumer::WorkSubmittedLater,
    };

    fn kind(facts: FlushFacts) -> &'static str {
        match decide(facts) {
            FlushDecision::None(_) => "none",
            FlushDecision::Flush(_) => "flush",
            FlushDecision::ReadBack(_) => "read back",
        }
    }

    #[test]
    fn each_fact_alone_decides() {
        let table = [
            (ORDERED, "none"),
            (FlushFacts { writes_ordering: 100, ..ORDERED }, "none"),
            (FlushFacts { writes_ordering: 0, ..ORDERED }, "flush"),
            (FlushFacts { writes_ordering: 99, ..ORDERED }, "flush"),
            (FlushFacts { compute_capability: (8, 0), ..ORDERED }, "flush"),
            (FlushFacts { compute_capability: (10, 0), ..ORDERED }, "none"),
            (FlushFacts { c2c: None, ..ORDERED }, "flush"),
            (FlushFacts { c2c: Some(true), ..ORDERED }, "read back"),
            (FlushFacts { data_direct: true, ..ORDERED }, "read back"),
            (FlushFacts { nics: 2, ..ORDERED }, "flush"),
            // A caller that does not know which NICs wrote.
            (FlushFacts { nics: 0, ..ORDERED }, "flush"),
            (FlushFacts { consumer: Consumer::RunningKernel, ..ORDERED }, "flush"),
            (FlushFacts { flush_writes_options: 0, ..ORDERED }, "none"),
            // Flushing in a stream is not what this store does.
            (FlushFacts { flush_writes_options: 2, writes_ordering: 0, ..ORDERED }, "read back"),
        ];
        for (facts, expected) in table {
            assert_eq!(kind(facts), expected, "{facts:?}");
            assert!(!decide(facts).why().is_empty());
        }
    }

    #[test]
    fn a_host_reader_never_pays() {
        for (c2c, data_direct) in [(None, true), (Some(true), false), (Some(false), false)] {
            let facts = FlushFacts {
                consumer: Consumer::HostReader,
                writes_ordering: 0,
                c2c,
                data_direct,
                nics: 3,
                ..ORDERED
            };
            assert_eq!(kind(facts), "none");
        }
    }

    /// Of all combinations, only the one of which nothing is in doubt goes without.
    #[test]
    fn doubt_means_a_flush() {
        let mut without = Vec::new();
        for writes_ordering in [0, 100, 200, 7] {
            for compute_capability in [(7, 5), (8, 9), (9, 0), (12, 0)] {
                for c2c in [None, Some(true), Some(false)] {
                    for (data_direct, nics) in [(false, 0), (false, 1), (false, 4), (true, 1)] {
                        let facts = FlushFacts {
                            writes_ordering,
                            compute_capability,
                            c2c,
                            data_direct,
                            nics,
                            ..ORDERED
                        };
                        if kind(facts) == "none" {
                            without.push(facts);
                        }
                    }
                }
            }
        }
        assert_eq!(without.len(), 4, "{without:?}");
        for facts in without {
            assert!(facts.writes_ordering >= 100 && facts.compute_capability.0 >= 9);
            assert!(facts.c2c == Some(false) && !facts.data_direct && facts.nics == 1);
        }
    }
}
