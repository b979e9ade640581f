//! Who waits for the events of a fabric: its own threads (the crew), or callers inside `progress`, and how a caller
//! learns that its own completion was handled by another thread. Not what is done with an event.
//!
//! While a caller waits, events are left to it: it has nothing else to do, and handing what came from one thread to
//! another takes longer than most answers. The first caller is the leader and looks at the epoll itself; other callers are
//! followers and sleep on a condition variable. The crew waits on an epoll of its own, whose only member is the epoll of
//! the events; that membership is suspended from when a leader sits down until it leaves for good, or, if the crew is to
//! help, until it handles an event. A member of the crew that was woken takes one event and lets the next one be woken
//! before it handles that. Whoever has called the sink announces it: followers are notified, and a leader that sleeps gets
//! its bell rung.
//!
//! Invariant: an announcement that began after a waiter registered makes it look at its condition again; and unless a
//! caller is inside `progress`, an event wakes one of the crew.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use hetmem_core::StoreError;
use parking_lot::{Condvar, Mutex};
use rustix::event::epoll::EventFlags;

use crate::waiting::{Bell, Epoll, wait_for_either};

/// The only name in the crew's epoll.
const EVENTS: u64 = 0;
/// What suspends a membership.
const NOTHING: EventFlags = EventFlags::empty();

pub(crate) struct Seats {
    events: Epoll,
    /// Has `events` as its member: once it has woken a thread, it wakes none until it is told to.
    crew: Epoll,
    /// Whether the crew handles further events while a caller handles one.
    crew_helps: bool,
    /// Callers of `progress` that are asleep or about to be; read without the lock by `announce`.
    waiting: AtomicU32,
    state: Mutex<State>,
    followers: Condvar,
    bell: Bell,
}

#[derive(Default)]
struct State {
    announced: u64,
    leader: bool,
    /// Events wake none of the crew.
    suspended: bool,
    /// The leader is asleep, or about to be.
    leader_asleep: bool,
    /// The bell has been rung and the leader has not woken since.
    rung: bool,
    followers: u32,
}

/// How a caller of `progress` waits this time.
pub(crate) enum Seat {
    Leader,
    Follower,
}

impl Seats {
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] at the limit of descriptors.
    pub(crate) fn new(crew_helps: bool) -> Result<Self, StoreError> {
        let (events, crew) = (Epoll::new()?, Epoll::new()?);
        crew.add(&events, EVENTS, EventFlags::IN | EventFlags::ONESHOT)?;
        Ok(Self {
            events,
            crew,
            crew_helps,
            waiting: AtomicU32::new(0),
            state: Mutex::default(),
            followers: Condvar::new(),
            bell: Bell::new()?,
        })
    }

    /// Where what brings events is added, edge-triggered or for one event at a time.
    pub(crate) fn events(&self) -> &Epoll {
        &self.events
    }

    /// One of the crew waits for an event that no caller of `progress` takes. None: somebody else took it.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Option<(u64, EventFlags)> {
        self.crew.wait(timeout)?;
        let event = self.event();
        let state = self.state.lock();
        if !state.suspended {
            self.rouse_crew();
        }
        drop(state);
        event
    }

    /// From now on an event wakes one of the crew; one that is there already does so now.
    fn rouse_crew(&self) {
        self.crew.modify(&self.events, EVENTS, EventFlags::IN | EventFlags::ONESHOT);
    }

    /// Registers the caller as a waiter and says how many announcements there were; it then looks at its condition,
    /// and either calls `leave` or sleeps.
    pub(crate) fn register(&self) -> (Seat, u64) {
        let mut state = self.state.lock();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let seat = if state.leader {
            Seat::Follower
        } else {
            state.leader = true;
            if !state.suspended {
                state.suspended = true;
                self.crew.modify(&self.events, EVENTS, NOTHING);
            }
            Seat::Leader
        };
        (seat, state.announced)
    }

    /// An event, if there is one.
    pub(crate) fn event(&self) -> Option<(u64, EventFlags)> {
        self.events.wait(Some(Duration::ZERO))
    }

    /// The leader's wait, unless something was announced since `seen`: it looks for what it waits for, up to `busy`
    /// without going to sleep, then sleeps until there is an event and looks again. Waking a thread, and the processor
    /// that it slept on, takes longer than most answers; whoever else could run on this processor while it looks runs
    /// first. `look` is told when it is the last time before the sleep: then what is found later has to be an event.
    pub(crate) fn lead<T>(
        &self,
        seen: u64,
        busy: Duration,
        timeout: Duration,
        mut look: impl FnMut(bool) -> Option<T>,
    ) -> Option<T> {
        let found = look(false);
        if found.is_some() {
            return found;
        }
        let until = Instant::now() + busy.min(timeout);
        while Instant::now() < until {
            std::thread::yield_now();
            let found = look(false);
            if found.is_some() || self.state.lock().announced != seen {
                return found;
            }
        }
        let found = look(true);
        if found.is_some() {
            return found;
        }
        {
            let mut state = self.state.lock();
            if state.announced != seen {
                return None;
            }
            state.leader_asleep = true;
        }
        wait_for_either(self.events.as_fd(), self.bell.as_fd(), timeout);
        let rung = {
            let mut state = self.state.lock();
            state.leader_asleep = false;
            std::mem::take(&mut state.rung)
        };
        if rung {
            self.bell.hush();
        }
        look(false)
    }

    /// A follower's wait, until something is announced or the leader leaves.
    pub(crate) fn follow(&self, seen: u64, timeout: Duration) {
        let mut state = self.state.lock();
        if state.announced == seen && state.leader {
            state.followers += 1;
            self.followers.wait_for(&mut state, timeout);
            state.followers -= 1;
        }
    }

    /// Gives the seat up, to handle what the wait brought or to leave.
    pub(crate) fn stand_up(&self, seat: &Seat) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        let mut state = self.state.lock();
        if matches!(seat, Seat::Leader) {
            state.leader = false;
            self.hand_over(&mut state, self.crew_helps);
        }
    }

    /// The caller leaves `progress`, and has stood up.
    pub(crate) fn leave(&self) {
        self.hand_over(&mut self.state.lock(), true);
    }

    /// If nobody leads, someone must take the lead over: a follower, and if there is none, the crew.
    fn hand_over(&self, state: &mut State, to_crew: bool) {
        if state.leader {
            return;
        }
        if state.followers > 0 {
            self.followers.notify_one();
        }
        if to_crew && state.suspended {
            state.suspended = false;
            self.rouse_crew();
        }
    }

    /// Makes all waiters look at their conditions.
    pub(crate) fn announce(&self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut state = self.state.lock();
        state.announced += 1;
        if state.followers > 0 {
            self.followers.notify_all();
        }
        if state.leader_asleep && !state.rung {
            state.rung = true;
            self.bell.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    use super::*;

    const EVENTS_TOTAL: u64 = 20_000;
    const LATE: Duration = Duration::from_secs(10);

    /// A caller of `progress` that comes and goes, all the time.
    fn call(seats: &Seats, stopping: &AtomicBool, handle: &impl Fn(), busy: Duration) {
        while !stopping.load(Ordering::SeqCst) {
            let (seat, seen) = seats.register();
            let event = match seat {
                Seat::Leader => seats.lead(seen, busy, Duration::from_micros(300), |_| seats.event()),
                Seat::Follower => {
                    seats.follow(seen, Duration::from_micros(300));
                    None
                }
            };
            seats.stand_up(&seat);
            match event {
                Some(_) => handle(),
                None => seats.leave(),
            }
        }
        seats.leave();
    }

    #[test]
    fn every_event_is_handled_though_leaders_come_and_go() -> Result<(), StoreError> {
        every_event_is_handled(&Seats::new(true)?)?;
        every_event_is_handled(&Seats::new(false)?)
    }

    fn every_event_is_handled(seats: &Seats) -> Result<(), StoreError> {
        let source = Bell::new()?;
        seats.events().add(&source, 7, EventFlags::IN | EventFlags::ET)?;
        let (handled, lost, stopping) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let handle = || {
            handled.fetch_add(1, Ordering::SeqCst);
            seats.announce();
        };
        std::thread::scope(|scope| {
            for busy in [Duration::ZERO, Duration::from_micros(20), Duration::from_micros(20)] {
                let (stopping, handle) = (&stopping, &handle);
                let source = &source;
                scope.spawn(move || {
                    call(seats, stopping, handle, busy);
                    // It may have got what was rung for the crew.
                    source.ring();
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stopping.load(Ordering::SeqCst) {
                        if seats.wait(None).is_some() {
                            handle();
                        }
                    }
                    source.ring();
                });
            }
            for number in 1..=EVENTS_TOTAL {
                source.ring();
                let rung = Instant::now();
                while handled.load(Ordering::SeqCst) < number && rung.elapsed() < LATE {
                    std::thread::yield_now();
                }
                if handled.load(Ordering::SeqCst) < number {
                    lost.store(number, Ordering::SeqCst);
                    break;
                }
            }
            stopping.store(true, Ordering::SeqCst);
            source.ring();
            seats.announce();
        });
        assert_eq!(lost.load(Ordering::SeqCst), 0, "an event that nobody handled");
        Ok(())
    }

    #[test]
    fn a_leader_that_sleeps_hears_what_is_announced() -> Result<(), StoreError> {
        let seats = Seats::new(false)?;
        let (seat, seen) = seats.register();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !seats.state.lock().leader_asleep {
                    std::thread::yield_now();
                }
                seats.announce();
            });
            let begun = Instant::now();
            assert_eq!(seats.lead(seen, Duration::ZERO, LATE, |_| seats.event()), None);
            assert!(begun.elapsed() < LATE);
        });
        seats.stand_up(&seat);
        // The bell that was heard does not ring again.
        let (seat, seen) = seats.register();
        let begun = Instant::now();
        assert_eq!(seats.lead(seen, Duration::ZERO, Duration::from_millis(20), |_| seats.event()), None);
        assert!(begun.elapsed() >= Duration::from_millis(20));
        seats.stand_up(&seat);
        Ok(())
    }
}
