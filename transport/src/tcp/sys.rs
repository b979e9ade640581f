//! The system calls of the TCP fabric that do not touch regions: those on sockets. Not the decisions. Invariant: every descriptor is close-on-exec and every socket nonblocking.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hetmem_core::StoreError;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, ipproto, sockopt};

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 512;

/// A nonblocking TCP socket and its name in the epoll.
pub(super) struct Socket {
    fd: OwnedFd,
    pub(super) id: u64,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What receiving brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    Bytes(usize),
    Nothing,
    End,
}

impl Got {
    /// What the count of a receive call into a buffer that is not empty means.
    pub(super) fn of(received: Result<usize, Errno>) -> Result<Self, Errno> {
        match received {
            Ok(0) => Ok(Self::End),
            Ok(count) => Ok(Self::Bytes(count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Self::Nothing),
            Err(error) => Err(error),
        }
    }
}

impl Socket {
    pub(super) fn of_accepted(fd: OwnedFd, id: u64) -> Self {
        Self { fd, id }
    }

    /// Begins to connect.
    pub(super) fn connecting(address: SocketAddr, id: u64) -> Result<Self, StoreError> {
        let fd = stream_socket(address).map_err(|error| StoreError::os("socket", error))?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Self { fd, id }),
            Err(error) => Err(StoreError::os(format!("connect to {address}"), error)),
        }
    }

    /// Sets what every connected socket has. One that refuses is slower, not wrong.
    pub(super) fn prepare(&self) {
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

    pub(super) fn buffers(&self, send_bytes: usize, receive_bytes: usize) {
        // The system may grant less; slower, not wrong. Zero leaves the size to the system.
        if send_bytes > 0 {
            let _ = sockopt::set_socket_send_buffer_size(&self.fd, send_bytes);
        }
        if receive_bytes > 0 {
            let _ = sockopt::set_socket_recv_buffer_size(&self.fd, receive_bytes);
        }
    }

    /// How connecting went, once the socket is writable.
    pub(super) fn connected(&self) -> Result<(), Errno> {
        sockopt::socket_error(&self.fd)?
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        rustix::net::getpeername(&self.fd).ok()??.try_into().ok()
    }

    /// Ends both directions: pending calls return, the peer sees an end, and an event wakes some thread. The
    /// descriptor itself is closed with the last owner of `self`, so its number cannot be reused under anyone.
    pub(super) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<Got, Errno> {
        Got::of(self.receive_into(buffer))
    }

    /// Says how many bytes came, 0 at the end.
    pub(super) fn receive_into(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::net::send(&self.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }
}

fn stream_socket(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))
}

/// The listening socket and the address that it got.
pub(super) fn listen(address: SocketAddr) -> Result<(OwnedFd, SocketAddr), StoreError> {
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
pub(super) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Random bytes that no peer can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    let mut done = 0;
    while done < N {
        let count = rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())
            .map_err(|error| StoreError::os("getrandom", error))?;
        done += count;
    }
    Ok(bytes)
}
