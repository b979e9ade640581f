//! How much of a device the store takes when nobody says: a pure function. Not an allocation. Invariant: never more
//! than is free less the reserve, and a multiple of the granularity.

/// Left to others at least: frameworks that start later need a context each, and room for kernels.
const RESERVE_MIN_BYTES: u64 = 512 << 20;
/// Left of BAR1 at least: the driver maps memory of its own there.
const BAR1_RESERVE_MIN_BYTES: u64 = 32 << 20;
/// One part in this many is left, where that is more.
const RESERVE_PART: u64 = 10;

/// The part of a device's memory that can be mapped on the bus at a time, for NICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar1 {
    /// Its size in bytes.
    pub total_bytes: u64,
    /// What is mapped already, in bytes.
    pub used_bytes: u64,
}

/// What decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapacityFacts {
    /// Bytes free on the device now.
    pub free_bytes: u64,
    /// Bytes of the device.
    pub total_bytes: u64,
    /// BAR1, where NVML tells and NICs need it.
    pub bar1: Option<Bar1>,
    /// The unit of segments, in bytes.
    pub granularity_bytes: u64,
}

/// Bytes of segments; 0 where the reserve leaves nothing.
#[must_use]
pub fn auto_bytes(facts: CapacityFacts) -> u64 {
    let less_reserve = |bytes: u64, least: u64| bytes.saturating_sub((bytes / RESERVE_PART).max(least));
    let mut bytes = less_reserve(facts.free_bytes.min(facts.total_bytes), RESERVE_MIN_BYTES);
    // A BAR1 as large as the memory maps all of it.
    if let Some(bar1) = facts.bar1.filter(|bar1| bar1.total_bytes < facts.total_bytes) {
        let free = bar1.total_bytes.saturating_sub(bar1.used_bytes);
        bytes = bytes.min(less_reserve(free, BAR1_RESERVE_MIN_BYTES));
    }
    let granularity = facts.granularity_bytes.max(1);
    bytes / granularity * granularity
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn the_smaller_of_memory_and_bar1_less_a_reserve() {
        let bar1 = |total_bytes, used_bytes| Some(Bar1 { total_bytes, used_bytes });
        let table = [
            // A tenth of 80 GiB is more than 512 MiB.
            (80 * GIB, 80 * GIB, None, 72 * GIB),
            // The least reserve.
            (GIB, 2 * GIB, None, 512 * MIB),
            (512 * MIB, 2 * GIB, None, 0),
            (0, 2 * GIB, None, 0),
            // BAR1 maps everything.
            (80 * GIB, 80 * GIB, bar1(128 * GIB, 0), 72 * GIB),
            // A T4: 256 MiB of BAR1, some of it in use.
            (15 * GIB, 16 * GIB, bar1(256 * MIB, 6 * MIB), 218 * MIB),
            (15 * GIB, 16 * GIB, bar1(256 * MIB, 256 * MIB), 0),
            (15 * GIB, 16 * GIB, bar1(256 * MIB, 300 * MIB), 0),
            // Less free memory than BAR1.
            (GIB, 16 * GIB, bar1(8 * GIB, 0), 512 * MIB),
            // Nonsense from the driver stays in bounds.
            (u64::MAX, 2 * GIB, None, 2 * GIB - 512 * MIB),
        ];
        for (free_bytes, total_bytes, bar1, expected) in table {
            let facts = CapacityFacts { free_bytes, total_bytes, bar1, granularity_bytes: 2 * MIB };
            assert_eq!(auto_bytes(facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn it_is_a_multiple_of_the_granularity() {
        let facts = |granularity_bytes| CapacityFacts {
            free_bytes: GIB + 5,
            total_bytes: 2 * GIB,
            bar1: None,
            granularity_bytes,
        };
        assert_eq!(auto_bytes(facts(2 * MIB)), 512 * MIB);
        assert_eq!(auto_bytes(facts(0)), 512 * MIB + 5);
    }
}
