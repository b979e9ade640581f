//! Streams of a device: copies in order, and events between streams. Not the driver's copy calls (`copies`), nor
//! memory of strangers (`foreign`). Invariant: what a copy reads and writes is held until the stream was seen to be
//! past it.
//!
//! unsafe: calls the driver's functions for streams and events.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_uint;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use hetmem_core::StoreError;
use hetmem_kernels::moves::Move;

use crate::context::{Context, Entered};
use crate::copies::{self, Planned, SHORT_LEN_MAX};
use crate::device::Device;
use crate::failure::{Failed, NOT_READY, NOT_SUPPORTED, SUCCESS};
use crate::gpus::lock;
use crate::launches::Gather;
use crate::lists::Lists;
use crate::pinned::Hold;
use crate::reach::{Access, Reacher};
use crate::span::{Memory, Span};
use crate::table::Opaque;

/// `CU_STREAM_NON_BLOCKING`: does not wait for the null stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: waiting costs no processor, and nobody asks for times.
pub(crate) const EVENT_FLAGS: c_uint = 1 | 2;
/// `CU_EVENT_BLOCKING_SYNC`: for those who ask for times.
const EVENT_FLAGS_TIMED: c_uint = 1;

/// A stream. Clones are the same stream. Dropped, it waits for its copies.
#[derive(Clone)]
pub struct Stream {
    queue: Arc<Queue>,
}

pub(crate) struct Queue {
    device: Device,
    raw: Opaque,
    /// Locked while copies are issued, so that what is held and what the driver knows are in the same order.
    kept: Mutex<Kept>,
    /// What launches are given.
    lists: Arc<Lists>,
}

/// What copies hold, by the number of the call that issued them.
#[derive(Default)]
pub(crate) struct Kept {
    issued: u64,
    holds: VecDeque<(u64, Held)>,
}

/// Memory of what one call issues, each once where its spans lie in a row, and what keeps host memory pinned. Only ever
/// dropped.
pub(crate) struct Held {
    /// How many copies, or launches.
    count: usize,
    _memories: Vec<Memory>,
    _pins: Vec<Hold>,
}

impl Held {
    pub(crate) fn new(count: usize, memories: Vec<Memory>, pins: Vec<Hold>) -> Self {
        Self { count, _memories: memories, _pins: pins }
    }

    /// Holds the ends of copies, and what pins the host memory among them.
    fn pairs(pairs: &[(Span, Span)], pins: Vec<Hold>) -> Self {
        let mut memories = Vec::new();
        let mut latest = [std::ptr::null(); 2];
        for (from, to) in pairs {
            for (latest, span) in latest.iter_mut().zip([from, to]) {
                if *latest != span.memory().identity() {
                    *latest = span.memory().identity();
                    memories.push(span.memory().clone());
                }
            }
        }
        Self::new(pairs.len(), memories, pins)
    }
}

/// How copies were issued.
pub(crate) enum Issued {
    /// All were accepted, by way of a kernel, which only touches pinned memory.
    All,
    /// For each, whether it was accepted, and if so, whether all its memory is pinned.
    Each(Vec<Result<bool, StoreError>>),
}

/// Adds what pins memory; mostly it pins what the one before it is in, too.
pub(crate) fn add_pin(pins: &mut Vec<Hold>, pin: Hold) {
    if !pins.last().is_some_and(|last| std::ptr::addr_eq(Arc::as_ptr(last), Arc::as_ptr(&pin))) {
        pins.push(pin);
    }
}

/// A point in a stream's work. Dropped, nothing happens to the work.
pub struct Event {
    context: Arc<Context>,
    raw: Opaque,
    queue: Weak<Queue>,
    /// The last call whose copies are before this point.
    through: u64,
}

impl Kept {
    /// Holds what one call issues from now on.
    pub(crate) fn hold(&mut self, held: Held) {
        self.issued += 1;
        self.holds.push_back((self.issued, held));
    }
}

impl Stream {
    pub(crate) fn new(device: &Device) -> Result<Self, StoreError> {
        let create = || {
            let entered = device.context().enter()?;
            let mut raw: Opaque = 0;
            // SAFETY: a writable place; a context is current.
            let code = unsafe { (entered.calls().stream_create)(&raw mut raw, NON_BLOCKING) };
            entered.calls().check("cuStreamCreate", code)?;
            Ok(raw)
        };
        let raw = create().map_err(|failed: Failed| failed.error("create stream"))?;
        Ok(Self {
            queue: Arc::new(Queue {
                device: device.clone(),
                raw,
                kept: Mutex::default(),
                lists: Arc::default(),
            }),
        })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.queue.device
    }

    /// The driver's handle, good while `self` lives.
    pub(crate) fn raw(&self) -> Opaque {
        self.queue.raw
    }

    pub(crate) fn kept(&self) -> &Mutex<Kept> {
        &self.queue.kept
    }

    pub(crate) fn lists(&self) -> &Arc<Lists> {
        &self.queue.lists
    }

    /// Queues a copy: between host memory and this device or a peer of it, on the device, between devices. It holds
    /// both spans until the stream was seen to be past it. A copy of host memory that is not pinned may block.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for spans of different lengths or that no device copies between,
    /// [`hetmem_core::ErrorKind::Denied`] for a target that may only be read, [`hetmem_core::ErrorKind::Os`] if the
    /// driver refuses. What an earlier copy met with can show here.
    pub fn copy(&self, from: &Span, to: &Span) -> Result<(), StoreError> {
        self.copy_many(&[(from.clone(), to.clone())])
    }

    /// Queues many copies with as few calls as the driver allows: many short ones go by a kernel in one launch where the
    /// device reaches all their memory by itself, others in one call of the driver's. They are in no order among
    /// themselves: no one may read what another writes.
    ///
    /// # Errors
    /// As [`Stream::copy`], of the first that was refused; the others are queued all the same.
    pub fn copy_many(&self, pairs: &[(Span, Span)]) -> Result<(), StoreError> {
        match self.issue(pairs) {
            Issued::All => Ok(()),
            Issued::Each(issued) => issued.into_iter().try_for_each(|issued| issued.map(drop)),
        }
    }

    /// Queues copies.
    pub(crate) fn issue(&self, pairs: &[(Span, Span)]) -> Issued {
        let many = pairs.len() >= self.device().gpus().gather_from();
        if many && self.gather_all(pairs) {
            return Issued::All;
        }
        let mut plans: Vec<_> =
            pairs.iter().map(|(from, to)| Planned::new(self.device(), from, to)).collect();
        let gather = if many { self.gather_short(pairs, &mut plans) } else { None };
        let context = self.device().context();
        let mut pins: Vec<Hold> = gather.iter().map(Gather::hold).collect();
        plans.iter().flatten().filter_map(Planned::pin).for_each(|pin| add_pin(&mut pins, pin));
        let mut kept = lock(&self.queue.kept);
        if plans.iter().any(Result::is_ok) {
            kept.hold(Held::pairs(pairs, pins));
        }
        Issued::Each(match context.enter() {
            // SAFETY: the queue now holds both ends of every copy, and lets go of them only once the stream is past
            // them or its context is lost; the stream lives while `self` does.
            Ok(entered) => unsafe { copies::issue(&entered, self.raw(), plans, gather.as_ref()) },
            Err(failed) => plans.iter().map(|_| Err(failed.error("copy"))).collect(),
        })
    }

    /// Has a kernel make all of these copies, if all are short and within the device's reach: the common batch, without a
    /// plan for each. False if nothing was issued.
    fn gather_all(&self, pairs: &[(Span, Span)]) -> bool {
        let mut reacher = Reacher::new(self.device());
        let mut list = Vec::with_capacity(pairs.len());
        for (from, to) in pairs {
            let len_bytes = from.len_bytes();
            let is_plain = (1..=SHORT_LEN_MAX).contains(&len_bytes) && to.len_bytes() == len_bytes;
            let ends = is_plain
                .then(|| Some((reacher.find(from, Access::Read)?, reacher.find(to, Access::Write)?)))
                .flatten();
            let Some((source, target)) = ends else { return false };
            list.push(Move { source, target, len_bytes });
        }
        let Ok(gather) = Gather::new(self, list.into_iter()) else { return false };
        let held = reacher.held(pairs.len(), [gather.hold()]);
        // SAFETY: the queue holds both ends of every copy, what pins them, and the list from before this on.
        self.issue_held(held, |entered| unsafe { gather.launch(entered, self.raw()) }).is_ok()
    }

    /// The launch that makes the short copies among others, if they are enough and the device reaches their memory. Where
    /// a kernel cannot be had, the driver copies.
    fn gather_short(
        &self,
        pairs: &[(Span, Span)],
        plans: &mut [Result<Planned, StoreError>],
    ) -> Option<Gather> {
        let mut reacher = Reacher::new(self.device());
        let mut moves = Vec::new();
        for ((from, to), plan) in pairs.iter().zip(plans.iter_mut()) {
            moves.extend(plan.as_mut().ok().and_then(|plan| plan.short_move(&mut reacher, from, to)));
        }
        let enough = moves.len() >= self.device().gpus().gather_from();
        let gather = enough.then(|| Gather::new(self, moves.into_iter()).ok()).flatten();
        if gather.is_none() {
            plans.iter_mut().flatten().for_each(Planned::leave_to_driver);
        }
        gather
    }

    /// Holds memory, then issues what uses it.
    pub(crate) fn issue_held(
        &self,
        held: Held,
        issue: impl FnOnce(&Entered<'_>) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let mut kept = lock(&self.queue.kept);
        kept.hold(held);
        issue(&self.device().context().enter()?)
    }

    /// Marks this point in the stream's work.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver refuses.
    pub fn record(&self) -> Result<Event, StoreError> {
        self.try_record(EVENT_FLAGS).map_err(|failed| failed.error("record event"))
    }

    /// The same, so that the device notes when it gets there: for benches, see [`Event::us_since`].
    ///
    /// # Errors
    /// As [`Stream::record`].
    pub fn record_timed(&self) -> Result<Event, StoreError> {
        self.try_record(EVENT_FLAGS_TIMED).map_err(|failed| failed.error("record event"))
    }

    fn try_record(&self, flags: c_uint) -> Result<Event, Failed> {
        let context = Arc::clone(self.device().context());
        let kept = lock(&self.queue.kept);
        let entered = context.enter()?;
        let calls = entered.calls();
        let mut raw: Opaque = 0;
        // SAFETY: a writable place; a context is current.
        let code = unsafe { (calls.event_create)(&raw mut raw, flags) };
        calls.check("cuEventCreate", code)?;
        drop(entered);
        let event = Event { context, raw, queue: Arc::downgrade(&self.queue), through: kept.issued };
        let entered = event.context.enter()?;
        // SAFETY: both are of this context and live; the stream while `self` does, the event until it is dropped.
        let code = unsafe { (calls.event_record)(raw, self.raw()) };
        calls.check("cuEventRecord", code)?;
        drop(entered);
        Ok(event)
    }

    /// Makes the work that is queued from now on wait for an event, of this or another stream.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver refuses.
    pub fn wait(&self, event: &Event) -> Result<(), StoreError> {
        let wait = || {
            let entered = self.device().context().enter()?;
            // SAFETY: both live for the length of the call; the driver keeps what it still needs of the event.
            let code = unsafe { (entered.calls().stream_wait_event)(self.raw(), event.raw, 0) };
            entered.calls().check("cuStreamWaitEvent", code)
        };
        wait().map_err(|failed: Failed| failed.error("wait for event"))
    }

    /// Waits until everything queued so far has been done, and lets go of its memory.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what any of it met with.
    pub fn synchronize(&self) -> Result<(), StoreError> {
        self.queue.synchronize().map_err(|failed| failed.error("synchronize stream"))
    }

    /// Whether everything queued so far has been done; lets go of its memory if so.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what any of it met with.
    pub fn is_idle(&self) -> Result<bool, StoreError> {
        let query = || {
            let through = lock(&self.queue.kept).issued;
            let entered = self.device().context().enter()?;
            // SAFETY: the stream lives while `self` does.
            let code = unsafe { (entered.calls().stream_query)(self.raw()) };
            if code == NOT_READY {
                return Ok(false);
            }
            entered.calls().check("cuStreamQuery", code)?;
            drop(entered);
            self.queue.release(through);
            Ok(true)
        };
        query().map_err(|failed: Failed| failed.error("ask stream"))
    }

    /// How many copies and launches the stream still holds memory of.
    #[must_use]
    pub fn held(&self) -> usize {
        lock(&self.queue.kept).holds.iter().map(|(_, held)| held.count).sum()
    }
}

impl Queue {
    fn synchronize(&self) -> Result<(), Failed> {
        let through = lock(&self.kept).issued;
        let entered = self.device.context().enter()?;
        // SAFETY: the stream lives while `self` does.
        let code = unsafe { (entered.calls().stream_synchronize)(self.raw) };
        entered.calls().check("cuStreamSynchronize", code)?;
        drop(entered);
        self.release(through);
        Ok(())
    }

    /// Lets go of what calls up to this one hold. Outside the lock: dropping memory calls the driver.
    fn release(&self, through: u64) {
        let mut kept = lock(&self.kept);
        let past = kept.holds.partition_point(|(number, _)| *number <= through);
        let released: Vec<_> = kept.holds.drain(..past).collect();
        drop(kept);
        drop(released);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // A lost context runs nothing any more. After any other failure nobody knows, and memory that a device may
        // still write is never given back.
        if self.synchronize().is_err_and(|failed| !failed.is_sticky()) {
            let holds = std::mem::take(&mut lock(&self.kept).holds);
            Box::leak(Box::new(holds));
        }
        let Ok(entered) = self.device.context().enter() else {
            return;
        };
        // SAFETY: created by `Stream::new`, destroyed once; no stream of it is left.
        let _ = unsafe { (entered.calls().stream_destroy)(self.raw) };
    }
}

impl Event {
    /// Whether the stream is past this point; the stream lets go of the memory before it if so.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what the work before it met with.
    pub fn is_done(&self) -> Result<bool, StoreError> {
        self.try_is_done().map_err(|failed| failed.error("ask event"))
    }

    pub(crate) fn try_is_done(&self) -> Result<bool, Failed> {
        let entered = self.context.enter()?;
        // SAFETY: the event lives while `self` does.
        let code = unsafe { (entered.calls().event_query)(self.raw) };
        match code {
            SUCCESS => {
                drop(entered);
                self.release();
                Ok(true)
            }
            NOT_READY => Ok(false),
            _ => entered.calls().check("cuEventQuery", code).map(|()| false),
        }
    }

    /// Waits for this point; the stream lets go of the memory before it.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what the work before it met with.
    pub fn synchronize(&self) -> Result<(), StoreError> {
        let wait = || {
            let entered = self.context.enter()?;
            // SAFETY: the event lives while `self` does.
            let code = unsafe { (entered.calls().event_synchronize)(self.raw) };
            entered.calls().check("cuEventSynchronize", code)
        };
        wait().map_err(|failed: Failed| failed.error("wait for event"))?;
        self.release();
        Ok(())
    }

    /// How long after another point the device got to this one, in microseconds. Both are of
    /// [`Stream::record_timed`], and the device is past both.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if it is not, or cannot tell.
    pub fn us_since(&self, earlier: &Self) -> Result<f64, StoreError> {
        let ask = || {
            let entered = self.context.enter()?;
            let call = "cuEventElapsedTime_v2";
            let Some(elapsed) = entered.calls().event_elapsed else {
                return Err(Failed { call, code: NOT_SUPPORTED, text: "no such function".to_owned() });
            };
            let mut elapsed_ms = 0_f32;
            // SAFETY: a writable place; both events live for the length of the call.
            let code = unsafe { elapsed(&raw mut elapsed_ms, earlier.raw, self.raw) };
            entered.calls().check(call, code)?;
            Ok(f64::from(elapsed_ms) * 1e3)
        };
        ask().map_err(|failed: Failed| failed.error("ask how long a device took"))
    }

    fn release(&self) {
        if let Some(queue) = self.queue.upgrade() {
            queue.release(self.through);
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(entered) = self.context.enter() else {
            return;
        };
        // SAFETY: created by `Stream::record`, destroyed once; the driver keeps what streams still wait for.
        let _ = unsafe { (entered.calls().event_destroy)(self.raw) };
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("device", &self.device().ordinal())
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("through", &self.through).finish_non_exhaustive()
    }
}
