//! Streams: a worker thread each, with a queue. Not what the work is (`run`). Invariant: work of a stream is done in the
//! order of its submission, and a position is reached when all work before it is done and dropped.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::code::{Code, Outcome};
use crate::device::Device;
use crate::driver::Driver;
use crate::run::{self, Work};

/// Every worker's stack: it calls the program's host functions, and nothing deep of its own.
const STACK_BYTES: usize = 256 << 10;

pub(crate) struct Stream {
    device: &'static Device,
    blocking: bool,
    lane: Arc<Lane>,
}

/// What a stream and its worker share.
struct Lane {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    submitted: u64,
    done: u64,
    /// No work comes any more.
    closed: bool,
}

/// A place in the order of a stream: the end of what was submitted at one moment.
#[derive(Clone)]
pub(crate) struct Position {
    lane: Arc<Lane>,
    count: u64,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("device", &self.device.ordinal).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Position").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Lane {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut Queue) -> bool) -> MutexGuard<'_, Queue> {
        self.changed.wait_while(self.queue(), condition).unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker: does all work, also what is left when the stream is closed.
    fn work(&self, device: &'static Device) {
        loop {
            let work = {
                let mut queue = self.wait_while(|queue| queue.work.is_empty() && !queue.closed);
                queue.work.pop_front()
            };
            let Some(work) = work else { return };
            let outcome = catch_unwind(AssertUnwindSafe(|| run::carry_out(work, device)));
            if let Err(code) = outcome.unwrap_or(Err(Code::UNKNOWN)) {
                device.fail(code);
            }
            self.queue().done += 1;
            self.changed.notify_all();
        }
    }
}

impl Stream {
    /// # Errors
    /// `OUT_OF_MEMORY` if there is no thread for it.
    pub(crate) fn start(device: &'static Device, blocking: bool) -> Outcome<Self> {
        let lane = Arc::new(Lane { queue: Mutex::default(), changed: Condvar::new() });
        let worker = Arc::clone(&lane);
        let builder = thread::Builder::new().name("standin-stream".to_owned()).stack_size(STACK_BYTES);
        builder.spawn(move || worker.work(device)).map_err(|_| Code::OUT_OF_MEMORY)?;
        Ok(Self { device, blocking, lane })
    }

    pub(crate) fn device(&self) -> &'static Device {
        self.device
    }

    /// Whether it orders itself with the legacy default stream.
    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking
    }

    /// Hands work to the worker, behind all that the legacy default stream's rules say it has to wait for.
    ///
    /// # Errors
    /// The error that the context is in.
    pub(crate) fn submit(self: &Arc<Self>, driver: &Driver, work: Work) -> Outcome {
        self.device.check()?;
        let null = self.device.null_position();
        let is_null = null.as_ref().is_some_and(|null| Arc::ptr_eq(&null.lane, &self.lane));
        let waited: Vec<Position> = match null {
            _ if is_null => self.device.positions(driver, false),
            Some(null) if self.blocking => vec![null],
            _ => Vec::new(),
        };
        let mut queue = self.lane.queue();
        let waits = waited.into_iter().filter(|position| !position.is_of(&self.lane)).map(Work::After);
        for work in waits.chain([work]) {
            queue.work.push_back(work);
            queue.submitted += 1;
        }
        drop(queue);
        self.lane.changed.notify_all();
        Ok(())
    }

    pub(crate) fn position(&self) -> Position {
        Position { lane: Arc::clone(&self.lane), count: self.lane.queue().submitted }
    }

    /// Waits for all that was submitted.
    ///
    /// # Errors
    /// The error that the context is in then.
    pub(crate) fn synchronize(&self) -> Outcome {
        self.position().wait();
        self.device.check()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.lane.queue().closed = true;
        self.lane.changed.notify_all();
    }
}

impl Position {
    fn is_of(&self, lane: &Arc<Lane>) -> bool {
        Arc::ptr_eq(&self.lane, lane)
    }

    pub(crate) fn is_reached(&self) -> bool {
        self.lane.queue().done >= self.count
    }

    pub(crate) fn wait(&self) {
        drop(self.lane.wait_while(|queue| queue.done < self.count));
    }
}
