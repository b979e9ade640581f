//! The system calls of the TCP fabric that do not touch regions: sockets, epoll, bells (eventfd), the timer.
//! Not the decisions. Invariant: every descriptor is close-on-exec and every socket nonblocking.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hetmem_core::StoreError;
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 512;

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

/// A nonblocking TCP socket and its name in the epoll.
pub(crate) struct Socket {
    fd: OwnedFd,
    pub(crate) id: u64,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What receiving brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Bytes(usize),
    Nothing,
    End,
}

impl Got {
    /// What the count of a receive call into a buffer that is not empty means.
    pub(crate) fn of(received: Result<usize, Errno>) -> Result<Self, Errno> {
        match received {
            Ok(0) => Ok(Self::End),
            Ok(count) => Ok(Self::Bytes(count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Self::Nothing),
            Err(error) => Err(error),
        }
    }
}

impl Socket {
    pub(crate) fn of_accepted(fd: OwnedFd, id: u64) -> Self {
        Self { fd, id }
    }

    /// Begins to connect.
    pub(crate) fn connecting(address: SocketAddr, id: u64) -> Result<Self, StoreError> {
        let fd = stream_socket(address).map_err(|error| StoreError::os("socket", error))?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Self { fd, id }),
            Err(error) => Err(StoreError::os(format!("connect to {address}"), error)),
        }
    }

    /// Sets what every connected socket has. One that refuses is slower, not wrong.
    pub(crate) fn prepare(&self) {
        let _ = sockopt::set_tcp_nodelay(&self.fd, true);
        if self.stays_on_this_machine() {
            // There is no network to be careful with. Measured on 2 cores, 64 MiB over one stream: 5.3 GiB/s with
            // reno, 3.7 with bbr as the system's choice, whose pacing waits between packets.
            let _ = sockopt::set_tcp_congestion(&self.fd, "reno");
        }
    }

    fn stays_on_this_machine(&self) -> bool {
        let Some(peer) = self.peer() else {
            return false;
        };
        let own = rustix::net::getsockname(&self.fd).ok().and_then(|own| SocketAddr::try_from(own).ok());
        peer.ip().is_loopback() || own.is_some_and(|own| own.ip() == peer.ip())
    }

    pub(crate) fn buffers(&self, send_bytes: usize, receive_bytes: usize) {
        // The system may grant less; slower, not wrong. Zero leaves the size to the system.
        if send_bytes > 0 {
            let _ = sockopt::set_socket_send_buffer_size(&self.fd, send_bytes);
        }
        if receive_bytes > 0 {
            let _ = sockopt::set_socket_recv_buffer_size(&self.fd, receive_bytes);
        }
    }

    /// How connecting went, once the socket is writable.
    pub(crate) fn connected(&self) -> Result<(), Errno> {
        sockopt::socket_error(&self.fd)?
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        rustix::net::getpeername(&self.fd).ok()??.try_into().ok()
    }

    /// Ends both directions: pending calls return, the peer sees an end, and an event wakes some thread. The
    /// descriptor itself is closed with the last owner of `self`, so its number cannot be reused under anyone.
    pub(crate) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<Got, Errno> {
        Got::of(self.receive_into(buffer))
    }

    /// Says how many bytes came, 0 at the end.
    pub(crate) fn receive_into(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::net::send(&self.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }
}

fn stream_socket(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))
}

/// The listening socket and the address that it got.
pub(crate) fn listen(address: SocketAddr) -> Result<(OwnedFd, SocketAddr), StoreError> {
    let fail = |call: &str, error: Errno| {
        let remedy = match error {
            Errno::ADDRINUSE => {
                ": another process listens there; stop it or choose another port (0 picks a free one)"
            }
            Errno::ADDRNOTAVAIL => ": no interface of this machine has this address",
            Errno::ACCESS => ": ports below 1024 need privileges; choose another port",
            _ => "",
        };
        StoreError::os(format!("listen on {address}"), format!("{call}: {error}{remedy}"))
    };
    let fd = stream_socket(address).map_err(|error| fail("socket", error))?;
    // Allows a restarted node to take its port while old connections linger; a live listener still keeps it.
    sockopt::set_socket_reuseaddr(&fd, true).map_err(|error| fail("setsockopt", error))?;
    rustix::net::bind(&fd, &address).map_err(|error| fail("bind", error))?;
    rustix::net::listen(&fd, BACKLOG).map_err(|error| fail("listen", error))?;
    let real = rustix::net::getsockname(&fd).map_err(|error| fail("getsockname", error))?;
    let real = real.try_into().unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    Ok((fd, real))
}

/// The next connection, if there is one.
pub(crate) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Random bytes that no peer can guess.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    let mut done = 0;
    while done < N {
        let count = rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())
            .map_err(|error| StoreError::os("getrandom", error))?;
        done += count;
    }
    Ok(bytes)
}
