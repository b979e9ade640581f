//! Who waits inside `progress`, and how it learns that its own completion was handled by another thread.
//!
//! The first caller is the leader: it waits on the shared epoll, on top of the fabric's threads, so the kernel wakes
//! it first (the latest waiter of an epoll is woken first). Other callers are followers and sleep on a condition
//! variable. Whoever has called the sink announces it: followers are notified, and a leader that sleeps gets its
//! bell rung. A fabric's thread that came later than the leader may be woken by that bell instead; it rings again
//! and stays out of the epoll until the leader has woken, so a bell goes astray at most once per such thread.
//!
//! Invariant: an announcement that began after a waiter registered makes it look at its condition again.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::sys::Bell;

pub(super) struct Seats {
    /// Callers of `progress` that are asleep or about to be; read without the lock by `announce`.
    waiting: AtomicU32,
    state: Mutex<State>,
    followers: Condvar,
    astray: Condvar,
    bell: Bell,
}

#[derive(Default)]
struct State {
    announced: u64,
    leader: bool,
    /// The leader is in, or on its way into, the epoll.
    leader_asleep: bool,
    /// The bell has been rung and the leader has not woken since.
    rung: bool,
    followers: u32,
    astray: u32,
}

/// How a caller of `progress` waits this time.
pub(super) enum Seat {
    Leader,
    Follower,
}

impl Seats {
    pub(super) fn new(bell: Bell) -> Self {
        Self {
            waiting: AtomicU32::new(0),
            state: Mutex::default(),
            followers: Condvar::new(),
            astray: Condvar::new(),
            bell,
        }
    }

    /// Registers the caller as a waiter and says how many announcements there were; it then looks at its condition,
    /// and either calls `leave` or sleeps.
    pub(super) fn register(&self) -> (Seat, u64) {
        let mut state = self.state.lock();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let seat = if state.leader {
            Seat::Follower
        } else {
            state.leader = true;
            Seat::Leader
        };
        (seat, state.announced)
    }

    /// The leader's wait: `sleep` waits on the epoll, unless something was announced since `seen`.
    pub(super) fn lead<T>(&self, seen: u64, sleep: impl FnOnce(bool) -> T) -> T {
        let news = {
            let mut state = self.state.lock();
            state.leader_asleep = state.announced == seen;
            !state.leader_asleep
        };
        let result = sleep(news);
        let mut state = self.state.lock();
        state.leader_asleep = false;
        state.rung = false;
        if state.astray > 0 {
            self.astray.notify_all();
        }
        result
    }

    /// A follower's wait, until something is announced or the leader leaves.
    pub(super) fn follow(&self, seen: u64, timeout: Duration) {
        let mut state = self.state.lock();
        if state.announced == seen && state.leader {
            state.followers += 1;
            self.followers.wait_for(&mut state, timeout);
            state.followers -= 1;
        }
    }

    /// Gives the seat up: before handling what the wait brought, or (`exiting`) before returning.
    pub(super) fn leave(&self, seat: &Seat, exiting: bool) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        let mut state = self.state.lock();
        let led = matches!(seat, Seat::Leader);
        if led {
            state.leader = false;
        }
        // Someone must take the epoll over; a follower that stays does so itself.
        if (led || exiting) && !state.leader && state.followers > 0 {
            self.followers.notify_one();
        }
    }

    /// Makes all waiters look at their conditions.
    pub(super) fn announce(&self) {
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

    /// For a thread of the fabric that got the leader's bell: rings again and waits until the leader has it.
    pub(super) fn pass_on(&self) {
        let mut state = self.state.lock();
        if !state.rung {
            return;
        }
        self.bell.ring();
        state.astray += 1;
        while state.rung {
            self.astray.wait(&mut state);
        }
        state.astray -= 1;
    }
}
