//! The threads of one verbs fabric, and the one that works at a time: takes what adapters have done, and tells the sink.
//! Not what it means (`state`). Invariant: the sink is called by the thread that has the turn, with no lock held that any
//! call of the fabric takes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hetmem_core::LinkId;
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;

use super::incoming::Inbox;
use super::plugin::Context;
use super::state::{Effect, State};
use crate::fabric::{FabricEvent, FabricSink};
use crate::region::Regions;
use crate::seats::{Seat, Seats};
use crate::turn::Turn;
use crate::waiting::Bell;

/// Names of descriptors.
const TASK_BELL: u64 = 1;
const CONNECTIONS: u64 = 3;
const FIRST_ADAPTER: u64 = 16;

/// How often links that are being made, and a listener that is away, are looked at.
const LOOK: Duration = Duration::from_secs(1);

pub(super) struct Shared {
    pub(super) sink: Arc<dyn FabricSink>,
    pub(super) regions: Regions,
    pub(super) state: Mutex<State>,
    pub(super) seats: Seats,
    pub(super) busy_poll: Duration,
    /// Only the thread that has the turn looks into them.
    inboxes: Mutex<HashMap<LinkId, Inbox>>,
    turn: Turn,
    task_bell: Arc<Bell>,
    stopping: AtomicBool,
    _context: Arc<Context>,
}

impl Shared {
    pub(super) fn new(
        sink: Arc<dyn FabricSink>,
        context: Arc<Context>,
        mut state: State,
        busy_poll: Duration,
    ) -> Result<Self, hetmem_core::StoreError> {
        // One thread has the turn: a second has nothing to do while a caller works.
        let (seats, task_bell) = (Seats::new(false)?, Arc::new(Bell::new()?));
        state.aside.rings(Arc::clone(&task_bell));
        seats.events().add(&*task_bell, TASK_BELL, EventFlags::IN | EventFlags::ET)?;
        seats.events().add(context.descriptor(), CONNECTIONS, EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            sink,
            regions: Regions::with_devices(),
            state: Mutex::new(state),
            seats,
            busy_poll,
            inboxes: Mutex::default(),
            turn: Turn::default(),
            task_bell,
            stopping: AtomicBool::new(false),
            _context: context,
        })
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Somebody is to look: there are effects that this thread must not carry out itself.
    pub(super) fn ring(&self) {
        self.task_bell.ring();
    }

    /// The life of a thread of the fabric.
    pub(super) fn serve(&self) {
        while !self.stopping() {
            self.work();
            let until = {
                let mut state = self.state.lock();
                state.expire();
                state.listen_again();
                state.is_waiting().then_some(LOOK)
            };
            self.seats.wait(until);
        }
        // Every bell wakes one thread: the next one is told here.
        self.task_bell.ring();
    }

    /// See `Fabric::progress`.
    pub(super) fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let done = self.drive(timeout, until);
        self.seats.leave();
        if self.stopping() {
            // This caller may have got the bell that was rung for a thread of the fabric.
            self.task_bell.ring();
        }
        done
    }

    fn drive(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            self.work();
            if until() {
                return true;
            }
            let (seat, seen) = self.seats.register();
            let done = until();
            let left =
                deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
            if done || left.is_zero() || self.stopping() {
                self.seats.stand_up(&seat);
                return done;
            }
            match seat {
                Seat::Leader => {
                    let look = || {
                        self.work();
                        (until() || self.stopping()).then_some(())
                    };
                    if self.seats.lead(seen, self.busy_poll, left, look).is_none() {
                        // Whatever there is was looked at, or will be before this thread sleeps again.
                        while self.seats.event().is_some() {}
                    }
                    self.seats.stand_up(&seat);
                }
                Seat::Follower => {
                    self.seats.follow(seen, left);
                    self.seats.stand_up(&seat);
                }
            }
        }
    }

    /// Takes what there is, and tells the sink, until there is nothing. One thread at a time.
    pub(super) fn work(&self) {
        self.turn.run(|| {
            while !self.stopping() {
                let effects = {
                    let mut state = self.state.lock();
                    let mut any = match state.connection_events() {
                        Ok(any) => any,
                        Err(error) => {
                            tracing::error!(%error, "connections are not heard of any more");
                            false
                        }
                    };
                    any |= state.completions();
                    if !any && state.effects.is_empty() {
                        state.arm();
                        // What came before they were armed rings no bell.
                        any |= state.completions();
                    }
                    self.watch(&mut state);
                    let effects = std::mem::take(&mut state.effects);
                    if effects.is_empty() && !any {
                        return;
                    }
                    effects
                };
                let told = !effects.is_empty();
                for effect in effects {
                    self.carry_out(effect);
                }
                if told {
                    self.seats.announce();
                }
            }
        });
    }

    fn watch(&self, state: &mut State) {
        for number in std::mem::take(&mut state.unwatched) {
            if let Some(adapter) = state.adapters.get(&number) {
                let name = FIRST_ADAPTER + number as u64;
                if let Err(error) =
                    self.seats.events().add(adapter.queue.descriptor(), name, EventFlags::IN | EventFlags::ET)
                {
                    tracing::error!(%error, "an RDMA device cannot be watched");
                }
            }
        }
    }

    fn carry_out(&self, effect: Effect) {
        match effect {
            Effect::Report(event) => self.sink.event(event),
            Effect::Received { link, adapter, slots, slot, len } => {
                let result = {
                    let mut inboxes = self.inboxes.lock();
                    let inbox = inboxes.entry(link).or_default();
                    let bytes = slots.bytes(slot, len).unwrap_or_default();
                    inbox.received(link, bytes, &self.regions, &*self.sink)
                };
                let mut state = self.state.lock();
                state.part_lent(link, adapter, slot);
                if let Err(why) = result {
                    state.refused += 1;
                    tracing::warn!(%link, %why, "a link was closed for what came");
                    state.disconnect(link, &why);
                }
            }
            Effect::Ended { link, why, was_up } => {
                let promised = self.inboxes.lock().remove(&link).and_then(|mut inbox| inbox.abandon());
                if let Some(token) = promised.filter(|_| was_up) {
                    self.sink.event(FabricEvent::Landed { link, token, result: Err(why.clone()) });
                }
                self.sink.event(FabricEvent::LinkDown { link, why });
            }
        }
    }

    /// Closes everything; threads end.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.task_bell.ring();
        self.seats.announce();
    }

    /// Once no thread works any more.
    pub(super) fn clear(&self) {
        self.turn.run(|| self.state.lock().close());
        self.regions.close_all();
    }
}
