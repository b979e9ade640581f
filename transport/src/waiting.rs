//! What threads of a fabric wait on: an epoll, bells (eventfd) that wake them, and a timer. Not who waits (`seats`).
//! Invariant: every descriptor is close-on-exec.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hetmem_core::StoreError;
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Wakes a thread that waits. In an epoll, edge-triggered and never read, every ring is one event.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, StoreError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| StoreError::os("eventfd", error))?;
        Ok(Self(fd))
    }

    pub(crate) fn ring(&self) {
        // The counter would have to reach 2^64 for this to fail.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes back that it was rung.
    pub(crate) fn hush(&self) {
        // Fails only if it was not rung.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Fires once at a deadline. Registered edge-triggered and never read: setting it again re-arms it.
pub(crate) struct Timer(OwnedFd);

impl Timer {
    pub(crate) fn new() -> Result<Self, StoreError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|error| StoreError::os("timerfd_create", error))?;
        Ok(Self(fd))
    }

    pub(crate) fn set(&self, after: Duration) {
        // A value of zero would disarm the timer.
        let value = timespec(after.max(Duration::from_micros(1)));
        let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: interval, it_value: value };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec) {
            tracing::error!(%error, "the timer of handshakes could not be set");
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// One epoll instance, shared by all threads.
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    pub(crate) fn new() -> Result<Self, StoreError> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| StoreError::os("epoll_create", error))?;
        Ok(Self(fd))
    }

    pub(crate) fn add(&self, source: impl AsFd, id: u64, flags: epoll::EventFlags) -> Result<(), StoreError> {
        epoll::add(&self.0, source, epoll::EventData::new_u64(id), flags).map_err(|error| {
            StoreError::os("epoll_ctl", format!("{error}: raise fs.epoll.max_user_watches or RLIMIT_NOFILE"))
        })
    }

    /// Sets what to wait for, and looks at once: what is ready already becomes an event for some thread.
    pub(crate) fn modify(&self, source: impl AsFd, id: u64, flags: epoll::EventFlags) {
        if let Err(error) = epoll::modify(&self.0, source, epoll::EventData::new_u64(id), flags) {
            tracing::error!(%error, "a connection could not be watched");
        }
    }

    pub(crate) fn remove(&self, source: impl AsFd) {
        // Only fails if it was never added or is removed already, both of which are what is wanted.
        let _ = epoll::delete(&self.0, source);
    }

    /// The next event, if one comes in time.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Option<(u64, epoll::EventFlags)> {
        // One at a time: what else is ready wakes another thread, rather than wait behind this one.
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
        let timeout = timeout.map(timespec);
        match epoll::wait(&self.0, &mut events[..], timeout.as_ref()) {
            Ok(1..) => Some((events[0].data.u64(), events[0].flags)),
            Ok(0) | Err(Errno::INTR) => None,
            Err(error) => {
                tracing::error!(%error, "epoll_wait");
                None
            }
        }
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until one of two descriptors can be read, or the time is over.
pub(crate) fn wait_for_either(one: BorrowedFd<'_>, other: BorrowedFd<'_>, timeout: Duration) {
    let mut descriptors = [one, other].map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
    match poll(&mut descriptors, Some(&timespec(timeout))) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => tracing::error!(%error, "poll"),
    }
}
