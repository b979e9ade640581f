//! One thread at a time works on a connection, and nobody waits for it: who comes second leaves a note, and the
//! first looks again. Not a lock. Invariant: work begins at least once after every call of `run` began.

use std::sync::atomic::{AtomicU32, Ordering};

/// The right to work on one connection.
#[derive(Debug, Default)]
pub(crate) struct Turn(AtomicU32);

impl Turn {
    /// Works now, or leaves it to the thread that is at it. What was written before this call is seen by the work
    /// that follows it.
    pub(crate) fn run(&self, mut work: impl FnMut()) {
        if self.0.fetch_add(1, Ordering::AcqRel) != 0 {
            return;
        }
        let mut seen = 1;
        loop {
            work();
            match self.0.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn no_note_is_lost_and_no_two_work_at_once() {
        let (turn, inside) = (Turn::default(), AtomicBool::new(false));
        let (asked, seen) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        asked.fetch_add(1, Ordering::Relaxed);
                        turn.run(|| {
                            assert!(!inside.swap(true, Ordering::Relaxed));
                            seen.store(asked.load(Ordering::Relaxed), Ordering::Relaxed);
                            inside.store(false, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(seen.load(Ordering::Relaxed), 8000);
    }
}
