//! Unix sockets of packets that carry descriptors.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use hetmem_core::StoreError;

/// The longest packet in bytes: a header, 64 KiB of body, 64 KiB of payload.
pub const PACKET_LEN_MAX: usize = hetmem_core::wire::HEADER_LEN + BODY_LEN_MAX + PAYLOAD_LEN_MAX;
/// The longest body in a packet; longer lists go in several answers.
pub const BODY_LEN_MAX: usize = 64 * 1024;
/// The longest payload in a packet.
pub const PAYLOAD_LEN_MAX: usize = 64 * 1024;
/// The most descriptors beside a packet.
pub const DESCRIPTORS_MAX: usize = 4;

/// A socket that listens; dropping it removes the path.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A connection, and who is at its other end.
#[derive(Debug)]
pub struct Accepted {
    /// The connection; non-blocking if the listener is.
    pub socket: OwnedFd,
    /// The process that connected.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
}

/// Listens at `path` (blocking until `set_nonblocking`).
///
/// # Errors
/// `Denied`/`Os`.
pub fn listen(path: &Path) -> Result<Listener, StoreError> {
    let _ = path;
    Err(StoreError::unavailable("socket", "not built yet"))
}

/// Makes reads, writes and accepts return `WouldBlock`.
///
/// # Errors
/// The system's.
pub fn set_nonblocking(socket: impl AsFd, nonblocking: bool) -> io::Result<()> {
    let _ = (socket, nonblocking);
    Err(io::ErrorKind::Unsupported.into())
}

/// The next connection.
///
/// # Errors
/// The system's, `WouldBlock` included.
pub fn accept(listener: &Listener) -> io::Result<Accepted> {
    let _ = listener;
    Err(io::ErrorKind::Unsupported.into())
}

/// Connects to a node (blocking socket).
///
/// # Errors
/// `Unavailable` when nobody listens at `path`, with the remedy.
pub fn connect(path: &Path) -> Result<OwnedFd, StoreError> {
    let _ = path;
    Err(StoreError::unavailable("socket", "not built yet"))
}

/// Sends one packet.
///
/// # Errors
/// The system's, `WouldBlock` included; `InvalidInput` over the limits.
pub fn send(socket: impl AsFd, parts: &[IoSlice<'_>], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let _ = (socket, parts, descriptors);
    Err(io::ErrorKind::Unsupported.into())
}

/// Receives one packet: its length, 0 when the other end has closed. Descriptors are appended.
///
/// # Errors
/// The system's, `WouldBlock` included; `InvalidData` for a packet longer than `buffer` or with too many
/// descriptors (all of them are closed).
pub fn recv(socket: impl AsFd, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let _ = (socket, buffer, descriptors);
    Err(io::ErrorKind::Unsupported.into())
}
