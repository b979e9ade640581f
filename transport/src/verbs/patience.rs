//! How long a thread looks for what comes next before it sleeps: as long as that has lately taken, within limits. Not the
//! looking. Invariant: what does not come within the longest look never makes one longer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest look is so many times the shortest.
const MOST: u32 = 20;
/// Of a look that was longer than it had to be, what was too much shrinks by one part in so many.
const SHRINK: u64 = 8;

/// Shared by all threads of one fabric; what they note at the same time may be lost, which costs a little time.
pub(super) struct Patience {
    least_ns: u64,
    most_ns: u64,
    look_ns: AtomicU64,
    /// When something was last found, in nanoseconds since the start.
    found_ns: AtomicU64,
    start: Instant,
}

impl Patience {
    pub(super) fn new(least: Duration) -> Self {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let least_ns = ns(least);
        Self {
            least_ns,
            most_ns: ns(least.saturating_mul(MOST)),
            look_ns: AtomicU64::new(least_ns),
            found_ns: AtomicU64::new(0),
            start: Instant::now(),
        }
    }

    /// How long to look.
    pub(super) fn look(&self) -> Duration {
        Duration::from_nanos(self.look_ns.load(Ordering::Relaxed))
    }

    /// Something was found.
    pub(super) fn found(&self) {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let before = self.found_ns.swap(now, Ordering::Relaxed);
        self.found_after(now.saturating_sub(before));
    }

    fn found_after(&self, gap_ns: u64) {
        if gap_ns > self.most_ns {
            return;
        }
        let (look, wanted) = (self.look_ns.load(Ordering::Relaxed), gap_ns.saturating_mul(2));
        let look = if wanted > look { wanted } else { look - (look - wanted) / SHRINK };
        self.look_ns.store(look.clamp(self.least_ns, self.most_ns), Ordering::Relaxed);
    }

    /// Nothing was, for as long as `look` says.
    pub(super) fn in_vain(&self) {
        let look = self.look_ns.load(Ordering::Relaxed) / 2;
        self.look_ns.store(look.max(self.least_ns), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Duration = Duration::from_micros(50);

    #[test]
    fn it_grows_with_what_comes_in_time_and_not_with_what_does_not() {
        let patience = Patience::new(LEAST);
        assert_eq!(patience.look(), LEAST);
        patience.found_after(300_000);
        assert_eq!(patience.look(), Duration::from_micros(600));
        patience.found_after(900_000);
        assert_eq!(patience.look(), LEAST * MOST, "the most");
        let patience = Patience::new(LEAST);
        for gap_ns in [1_000_001, 5_000_000, u64::MAX] {
            patience.found_after(gap_ns);
            assert_eq!(patience.look(), LEAST);
        }
    }

    #[test]
    fn it_shrinks_when_things_come_sooner_or_not_at_all_and_not_below_the_least() {
        let patience = Patience::new(LEAST);
        patience.found_after(400_000);
        patience.found_after(100_000);
        assert_eq!(patience.look(), Duration::from_micros(800 - 600 / 8));
        for _ in 0..100 {
            patience.found_after(1_000);
        }
        assert_eq!(patience.look(), LEAST);
        patience.found_after(400_000);
        patience.in_vain();
        assert_eq!(patience.look(), Duration::from_micros(400));
        for _ in 0..10 {
            patience.in_vain();
        }
        assert_eq!(patience.look(), LEAST);
    }
}
