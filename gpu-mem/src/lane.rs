//! The copies of one device: what waits, what is under way, and the thread that issues and reports them. Not which
//! device copies what (`copier`). Invariant: a job is in exactly one of these places until its `done` was called, and
//! the thread ends only when none is left and nobody can add one.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use hetmem_core::StoreError;

use crate::Device;
use crate::copier::{Copied, Job, Pending};
use crate::gpus::lock;
use crate::stream::{Event, Issued, Stream};

/// Looks at events this often without sleeping: most small copies end within.
const EAGER_LOOKS: u32 = 64;
/// The pause between looks after that, doubled from the shorter to the longer one.
const PAUSE_MIN: Duration = Duration::from_micros(20);
const PAUSE_MAX: Duration = Duration::from_micros(500);

/// Jobs on their way to the thread.
#[derive(Default)]
pub(crate) struct Lane {
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<Job>,
    closing: bool,
}

/// What the thread does until it looks into the inbox again.
enum Wait {
    /// Nothing is under way: until there is a job.
    ForJobs,
    /// No longer than this.
    AtMost(Duration),
    Not,
}

impl Lane {
    /// Jobs for the thread, which it takes together.
    pub(crate) fn push(&self, jobs: Vec<Job>) {
        lock(&self.inbox).jobs.extend(jobs);
        self.wake.notify_one();
    }

    /// No job comes after this.
    pub(crate) fn close(&self) {
        lock(&self.inbox).closing = true;
        self.wake.notify_one();
    }

    /// All that wait, and whether none comes any more.
    fn take(&self, wait: &Wait) -> (Vec<Job>, bool) {
        let mut inbox = lock(&self.inbox);
        match wait {
            Wait::Not => {}
            Wait::ForJobs => {
                while inbox.jobs.is_empty() && !inbox.closing {
                    inbox = self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
                }
            }
            Wait::AtMost(pause) if inbox.jobs.is_empty() => {
                inbox = self.wake.wait_timeout(inbox, *pause).unwrap_or_else(PoisonError::into_inner).0;
            }
            Wait::AtMost(_) => {}
        }
        (std::mem::take(&mut inbox.jobs), inbox.closing)
    }
}

/// Which engine of the device copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// Host to device.
    In,
    /// Device to host.
    Out,
    /// Device to device.
    Across,
}

impl Direction {
    const ALL: [Self; 3] = [Self::In, Self::Out, Self::Across];

    fn of(job: &Job) -> Self {
        match (job.from.memory().device(), job.to.memory().device()) {
            (None, _) => Self::In,
            (_, None) => Self::Out,
            _ => Self::Across,
        }
    }
}

/// Copies that were issued together, and the event after them.
struct Batch {
    event: Event,
    jobs: Vec<(Pending, Copied)>,
}

/// One direction's stream, made at its first copy, and what is under way on it.
struct Way {
    direction: Direction,
    stream: Option<Stream>,
    under_way: VecDeque<Batch>,
}

/// The lane's thread.
pub(crate) fn run(lane: &Lane, device: &Device) {
    let mut ways =
        Direction::ALL.map(|direction| Way { direction, stream: None, under_way: VecDeque::new() });
    let mut lost: Option<StoreError> = None;
    let mut looks = 0_u32;
    loop {
        let idle = ways.iter().all(|way| way.under_way.is_empty());
        let (jobs, closing) = lane.take(&wait(idle, looks));
        if jobs.is_empty() && idle && closing {
            return;
        }
        if !jobs.is_empty() {
            looks = 0;
            match &lost {
                None => issue(&mut ways, device, jobs),
                Some(error) => jobs.into_iter().for_each(|job| job.done.finish(Err(error.clone()))),
            }
        }
        match report(&mut ways) {
            Ok(true) => looks = 0,
            Ok(false) => looks = looks.saturating_add(1),
            Err(error) => {
                // Nothing ends on a device that answers no question about it.
                for batch in ways.iter_mut().flat_map(|way| way.under_way.drain(..)) {
                    batch.jobs.into_iter().for_each(|(done, _)| done.finish(Err(error.clone())));
                }
                lost = Some(error);
            }
        }
    }
}

fn wait(idle: bool, looks: u32) -> Wait {
    if idle {
        return Wait::ForJobs;
    }
    match looks.checked_sub(EAGER_LOOKS) {
        None => {
            std::thread::yield_now();
            Wait::Not
        }
        Some(looks) => Wait::AtMost((PAUSE_MIN * (1 << looks.min(8))).min(PAUSE_MAX)),
    }
}

/// Issues all, by direction, with an event after each direction's.
fn issue(ways: &mut [Way], device: &Device, jobs: Vec<Job>) {
    let mut jobs = jobs;
    for way in ways {
        let (these, others): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|job| Direction::of(job) == way.direction);
        jobs = others;
        if !these.is_empty() {
            way.issue(device, these);
        }
    }
}

/// Reports what has ended; whether anything has. An error says that the device is lost, or that its state is unknown.
fn report(ways: &mut [Way]) -> Result<bool, StoreError> {
    let mut any = false;
    for way in ways {
        while let Some(batch) = way.under_way.front() {
            if !batch.event.is_done()? {
                break;
            }
            for (done, copied) in way.under_way.pop_front().into_iter().flat_map(|batch| batch.jobs) {
                done.finish(Ok(copied));
            }
            any = true;
        }
    }
    Ok(any)
}

impl Way {
    fn issue(&mut self, device: &Device, jobs: Vec<Job>) {
        let stream = match self.stream.take().map_or_else(|| device.stream(), Ok) {
            Ok(stream) => stream,
            Err(error) => return jobs.into_iter().for_each(|job| job.done.finish(Err(error.clone()))),
        };
        let (pairs, dones): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| ((job.from, job.to), job.done)).unzip();
        let mut accepted = Vec::with_capacity(dones.len());
        match stream.issue(&pairs) {
            Issued::All => {
                accepted
                    .extend(dones.into_iter().map(|done| (done, Copied { staged_bytes: 0, pinned: true })));
            }
            Issued::Each(issued) => {
                for (done, issued) in dones.into_iter().zip(issued) {
                    match issued {
                        Ok(pinned) => accepted.push((done, Copied { staged_bytes: 0, pinned })),
                        Err(error) => done.finish(Err(error)),
                    }
                }
            }
        }
        drop(pairs);
        if accepted.is_empty() {
            self.stream = Some(stream);
            return;
        }
        match stream.record() {
            Ok(event) => self.under_way.push_back(Batch { event, jobs: accepted }),
            // Without an event the stream itself says when they have ended.
            Err(_) => {
                let ended = stream.synchronize();
                for (done, copied) in accepted {
                    done.finish(ended.clone().map(|()| copied));
                }
            }
        }
        self.stream = Some(stream);
    }
}
