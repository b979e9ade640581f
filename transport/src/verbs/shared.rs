//! The threads of one verbs fabric, and what they and callers do: take what adapters have done, and tell the sink. Not what it
//! means (`state`). There are as many lanes as threads: each has a completion queue with its channel on every adapter, and
//! a share of the links. Invariant: the sink is called about a link by the thread that has the turn of its lane, with no
//! lock held that any call of the fabric takes; and unless a caller is inside `progress`, the adapters are armed.
//!
//! A look at what adapters have done costs no system call, so that is what a thread does that has just been at it or that
//! waits without sleeping. Arming them does, and so does asking for events of connections: the one is left to the last look
//! before a sleep or a leave, the other to when the epoll says that there are some.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hetmem_core::LinkId;
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;

use super::incoming::Inbox;
use super::patience::Patience;
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

/// What is to be done besides looking at what adapters have done.
const ARM: u8 = 1;
const HEAR: u8 = 2;
const NOTHING: u8 = 0;

pub(super) struct Shared {
    pub(super) sink: Arc<dyn FabricSink>,
    pub(super) regions: Regions,
    pub(super) state: Mutex<State>,
    pub(super) seats: Seats,
    patience: Patience,
    lanes: Vec<Lane>,
    /// When what is due by time was last looked after.
    looked_after: Mutex<Instant>,
    task_bell: Arc<Bell>,
    stopping: AtomicBool,
    _context: Arc<Context>,
}

/// Some of the links: one completion queue of each adapter, with its channel, and what was taken from there. One thread at a
/// time is at it, so that what happens to a link is told in order.
#[derive(Default)]
struct Lane {
    turn: Turn,
    /// Of those above, for whoever has the turn.
    wanted: AtomicU8,
    /// Held by whoever has the turn.
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// What was taken is carried out from here; kept, so that nothing is allocated for it.
    taken: VecDeque<Effect>,
    inboxes: HashMap<LinkId, Inbox>,
}

/// What is to be done for an event: adapters are looked at anyway.
fn wanted_by((name, _): (u64, EventFlags)) -> u8 {
    if name < FIRST_ADAPTER { HEAR } else { NOTHING }
}

impl Shared {
    pub(super) fn new(
        sink: Arc<dyn FabricSink>,
        context: Arc<Context>,
        mut state: State,
        busy_poll: Duration,
    ) -> Result<Self, hetmem_core::StoreError> {
        let lanes: Vec<Lane> = state.effects.iter().map(|_| Lane::default()).collect();
        // A caller looks at all lanes itself: to wake a thread for one of them would take longer than most of what there is.
        let (seats, task_bell) = (Seats::new(false)?, Arc::new(Bell::new()?));
        state.aside.rings(Arc::clone(&task_bell));
        seats.events().add(&*task_bell, TASK_BELL, EventFlags::IN | EventFlags::ET)?;
        seats.events().add(context.descriptor(), CONNECTIONS, EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            sink,
            regions: Regions::with_devices(),
            state: Mutex::new(state),
            seats,
            patience: Patience::new(busy_poll),
            lanes,
            looked_after: Mutex::new(Instant::now()),
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
        let mut why = HEAR;
        while !self.stopping() {
            self.work(why);
            self.linger();
            let until = self.look_after_time().then_some(LOOK);
            why = self.seats.wait(until).map_or(HEAR, wanted_by);
        }
        // Every bell wakes one thread: the next one is told here.
        self.task_bell.ring();
    }

    /// Does what is due by now. Says whether something will be.
    fn look_after_time(&self) -> bool {
        *self.looked_after.lock() = Instant::now();
        let mut state = self.state.lock();
        state.expire();
        state.listen_again();
        state.is_waiting()
    }

    /// Looks on for a while after something was done, as callers do: what follows mostly follows soon, and waking a thread
    /// takes longer. Adapters are armed afterwards.
    fn linger(&self) {
        let mut until = Instant::now() + self.patience.look();
        while !self.stopping() && Instant::now() < until {
            std::thread::yield_now();
            if self.work(NOTHING) {
                until = Instant::now() + self.patience.look();
            }
        }
        self.patience.in_vain();
        self.work(ARM);
    }

    /// See `Fabric::progress`.
    pub(super) fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let done = self.drive(timeout, until);
        // What completes from here on has to wake somebody, and what this caller took was perhaps all that would have.
        self.work(ARM);
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
            self.work(NOTHING);
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
                    // The fabric's own threads may sleep for as long as somebody leads.
                    let due = self.looked_after.lock().elapsed() >= LOOK;
                    if due && self.look_after_time() {
                        self.work(HEAR);
                    }
                    let look = |last| {
                        self.work(if last { ARM } else { NOTHING });
                        (until() || self.stopping()).then_some(())
                    };
                    if self.seats.lead(seen, self.patience.look(), left.min(LOOK), look).is_none() {
                        // What adapters have done was looked at, or will be before this thread sleeps again.
                        let mut why = NOTHING;
                        while let Some(event) = self.seats.event() {
                            why |= wanted_by(event);
                        }
                        if why != NOTHING {
                            self.work(why);
                        }
                    }
                    self.seats.stand_up(&seat);
                }
                Seat::Follower => {
                    // The leader may be asleep already, and this caller has perhaps taken what would have woken it.
                    self.work(ARM);
                    self.seats.follow(seen, left);
                    self.seats.stand_up(&seat);
                }
            }
        }
    }

    /// Takes what adapters have done, and tells the sink, until there is nothing; does what else is wanted. Says whether this
    /// thread found any.
    pub(super) fn work(&self, mut wanted: u8) -> bool {
        let mut any = false;
        loop {
            let mut found = false;
            for (number, lane) in self.lanes.iter().enumerate() {
                // Of connections one lane hears for all.
                let wanted = if number == 0 { wanted } else { wanted & !HEAR };
                found |= self.work_on(lane, number, wanted);
            }
            if !found {
                return any;
            }
            self.patience.found();
            // What was found in one lane may have ended links of another.
            (any, wanted) = (true, NOTHING);
        }
    }

    /// The same for one lane: one thread at a time.
    fn work_on(&self, lane: &Lane, number: usize, wanted: u8) -> bool {
        let mut any = false;
        lane.wanted.fetch_or(wanted, Ordering::AcqRel);
        lane.turn.run(|| {
            let mut wanted = NOTHING;
            let mut held = lane.held.lock();
            let Held { taken, inboxes } = &mut *held;
            while !self.stopping() {
                wanted |= lane.wanted.swap(NOTHING, Ordering::AcqRel);
                if !self.take(number, &mut wanted, taken) {
                    return;
                }
                any = true;
                let told = !taken.is_empty();
                while let Some(effect) = taken.pop_front().filter(|_| !self.stopping()) {
                    self.carry_out(inboxes, effect);
                }
                if told {
                    self.seats.announce();
                }
            }
        });
        any
    }

    /// Takes what there is; false if there is nothing, and all that was wanted is done.
    fn take(&self, lane: usize, wanted: &mut u8, taken: &mut VecDeque<Effect>) -> bool {
        let mut state = self.state.lock();
        let mut any = state.completions(lane);
        if *wanted & HEAR != 0 {
            *wanted &= !HEAR;
            match state.connection_events() {
                Ok(more) => any |= more,
                Err(error) => tracing::error!(%error, "connections are not heard of any more"),
            }
        }
        if *wanted & ARM != 0 && !any && state.effects[lane].is_empty() && state.arm(lane) {
            // What came before they were armed wakes nobody.
            any |= state.completions(lane);
        }
        self.watch(&mut state);
        std::mem::swap(&mut state.effects[lane], taken);
        any || !taken.is_empty()
    }

    fn watch(&self, state: &mut State) {
        for number in std::mem::take(&mut state.unwatched) {
            let name = FIRST_ADAPTER + number as u64;
            for watched in state.adapters.get(&number).iter().flat_map(|adapter| &adapter.queues) {
                let descriptor = watched.queue.descriptor();
                if let Err(error) = self.seats.events().add(descriptor, name, EventFlags::IN | EventFlags::ET)
                {
                    tracing::error!(%error, "an RDMA device cannot be watched");
                }
            }
        }
    }

    fn carry_out(&self, inboxes: &mut HashMap<LinkId, Inbox>, effect: Effect) {
        match effect {
            Effect::Report(event) => self.sink.event(event),
            Effect::Received { link, adapter, slots, slot, len } => {
                let inbox = inboxes.entry(link).or_default();
                let bytes = slots.bytes(slot, len).unwrap_or_default();
                let result = inbox.received(link, bytes, &self.regions, &*self.sink);
                let mut state = self.state.lock();
                state.part_lent(link, adapter, slot);
                if let Err(why) = result {
                    state.refused += 1;
                    tracing::warn!(%link, %why, "a link was closed for what came");
                    state.disconnect(link, &why);
                }
            }
            Effect::Ended { link, why, was_up } => {
                let promised = inboxes.remove(&link).and_then(|mut inbox| inbox.abandon());
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

    /// Once it was stopped: waits until nobody works any more, unless it is called by who works, and closes everything.
    pub(super) fn clear(&self, inside: bool) {
        for lane in self.lanes.iter().filter(|_| !inside) {
            *lane.held.lock() = Held::default();
        }
        self.state.lock().close();
        self.regions.close_all();
    }
}
