//! Unix sockets of packets (SEQPACKET) that carry descriptors. Not the messages in them. Invariants: a packet arrives
//! whole or is an error; descriptors that arrive are owned by exactly one value and closed on every error.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use hetmem_core::StoreError;
use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, fcntl_getfl, fcntl_setfl, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::os;

/// The longest body in a packet; longer lists go in several answers.
pub const BODY_LEN_MAX: usize = 64 * 1024;
/// The longest payload in a packet.
pub const PAYLOAD_LEN_MAX: usize = 64 * 1024;
/// The longest packet in bytes: a header, a body, a payload.
pub const PACKET_LEN_MAX: usize = hetmem_core::wire::HEADER_LEN + BODY_LEN_MAX + PAYLOAD_LEN_MAX;
/// The most descriptors beside a packet.
pub const DESCRIPTORS_MAX: usize = 4;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where a node listens unless it is told otherwise: `$HETMEM_SOCKET`, else `$XDG_RUNTIME_DIR/hetmem.sock`, else
/// `/tmp/hetmem-UID.sock`. A client without instructions looks there too.
#[must_use]
pub fn default_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HETMEM_SOCKET")
        .or_else(|| Some(variable("XDG_RUNTIME_DIR")?.join("hetmem.sock")))
        .unwrap_or_else(|| {
            let user = rustix::process::getuid().as_raw();
            PathBuf::from(format!("/tmp/hetmem-{user}.sock"))
        })
}

/// A socket that listens. Dropping it removes its path.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Held for as long as this node answers at the path; the kernel lets go of it however the process ends.
    _lock: OwnedFd,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The lock file stays: removing it would let two nodes lock two files of one name.
        let _ = fs::remove_file(&self.path);
    }
}

/// A connection, and who is at its other end.
#[derive(Debug)]
pub struct Accepted {
    /// The connection; it blocks, whether the listener does or not.
    pub socket: OwnedFd,
    /// The process that connected.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
}

/// Listens at `path`: for this user only (mode 0600), in a directory that is made (mode 0700) if it is missing. A path that a
/// dead node left is taken over. The socket blocks until [`set_nonblocking`].
///
/// # Errors
/// [`hetmem_core::ErrorKind::Denied`] where a live node answers, or where something else than a socket is;
/// [`hetmem_core::ErrorKind::Invalid`] for a path over 107 bytes; [`hetmem_core::ErrorKind::Os`] for the rest.
pub fn listen(path: &Path) -> Result<Listener, StoreError> {
    let failed = |error: io::Error| StoreError::os("listen", format!("{}: {error}", path.display()));
    let address = address(path)?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    let lock = lock(path)?;
    make_way(path, &address)?;
    let socket = socket("listen")?;
    // The mode of the socket before it is bound is the mode of its path from the first moment on.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(errno.into()))?;
    rustix::net::bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
    let listener = Listener { socket, path: path.to_owned(), _lock: lock };
    rustix::net::listen(&listener.socket, BACKLOG).map_err(|errno| failed(errno.into()))?;
    Ok(listener)
}

fn answered(path: &Path) -> StoreError {
    StoreError::denied(
        "listen",
        format!("a node answers at {} (stop it, or use another socket path)", path.display()),
    )
}

/// The lock beside the socket: of two nodes that start at once, one gets it.
fn lock(path: &Path) -> Result<OwnedFd, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let failed = |errno| StoreError::os("listen", format!("lock {}: {errno}", Path::new(&name).display()));
    let file = rustix::fs::open(&*name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(answered(path)),
        Err(errno) => Err(failed(errno)),
    }
}

/// Removes a socket that nobody answers at. The caller holds the lock.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), StoreError> {
    let failed = |error: io::Error| StoreError::os("listen", format!("{}: {error}", path.display()));
    let there = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    if !there.file_type().is_socket() {
        return Err(StoreError::denied(
            "listen",
            format!("{} exists and is no socket (use another path)", path.display()),
        ));
    }
    let probe = socket("listen")?;
    // A node that is too busy to accept is alive.
    set_nonblocking(&probe, true).map_err(failed)?;
    match rustix::net::connect(&probe, address) {
        // Another kind of socket answers with PROTOTYPE.
        Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Err(answered(path)),
        Err(Errno::CONNREFUSED | Errno::NOENT) => fs::remove_file(path).or_else(|error| {
            if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(failed(error)) }
        }),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn address(path: &Path) -> Result<SocketAddrUnix, StoreError> {
    SocketAddrUnix::new(path).map_err(|errno| {
        StoreError::invalid("socket path", format!("{}: {errno} (at most 107 bytes)", path.display()))
    })
}

fn socket(operation: &'static str) -> Result<OwnedFd, StoreError> {
    let failed = |errno| os::error(operation, errno);
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    size(&socket).map_err(failed)?;
    Ok(socket)
}

/// Room for two of the longest packets on their way. The kernel caps it at net.core.wmem_max and doubles it.
fn size(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_socket_send_buffer_size(socket, 2 * PACKET_LEN_MAX)
}

/// Makes sends, receives and accepts return `WouldBlock` instead of waiting, or wait again.
///
/// # Errors
/// The system's.
pub fn set_nonblocking(socket: impl AsFd, nonblocking: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(&socket)?;
    flags.set(OFlags::NONBLOCK, nonblocking);
    Ok(fcntl_setfl(&socket, flags)?)
}

/// The next connection.
///
/// # Errors
/// The system's, `WouldBlock` included.
pub fn accept(listener: impl AsFd) -> io::Result<Accepted> {
    let socket = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?;
    size(&socket)?;
    let peer = sockopt::socket_peercred(&socket)?;
    Ok(Accepted { socket, pid: peer.pid.as_raw_nonzero().get().unsigned_abs(), uid: peer.uid.as_raw() })
}

/// Connects to a node. The socket blocks until [`set_nonblocking`].
///
/// # Errors
/// [`hetmem_core::ErrorKind::Unavailable`] when nobody answers at `path`, with the remedy;
/// [`hetmem_core::ErrorKind::Denied`] when this user may not; [`hetmem_core::ErrorKind::Os`] for the rest.
pub fn connect(path: &Path) -> Result<OwnedFd, StoreError> {
    let address = address(path)?;
    let socket = socket("connect")?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok(socket),
        Err(errno @ (Errno::NOENT | Errno::CONNREFUSED)) => Err(StoreError::unavailable(
            format!("node at {}", path.display()),
            format!("{errno} (start one with `hetmem serve`, or name its socket)"),
        )),
        Err(errno @ (Errno::ACCESS | Errno::PERM)) => Err(StoreError::denied(
            "connect",
            format!("{}: {errno} (a node serves the user who runs it)", path.display()),
        )),
        Err(errno) => Err(StoreError::os("connect", format!("{}: {errno}", path.display()))),
    }
}

/// Two ends of one connection, in one process.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Os`] when there are no descriptors left.
pub fn pair() -> Result<(OwnedFd, OwnedFd), StoreError> {
    let failed = |errno| os::error("make socket pair", errno);
    let ends =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    size(&ends.0).and_then(|()| size(&ends.1)).map_err(failed)?;
    Ok(ends)
}

/// Sends one packet (not an empty one: that would read as the end of the connection).
///
/// # Errors
/// The system's, `WouldBlock` and `BrokenPipe` included; `InvalidInput` for an empty packet or one over the limits.
pub fn send(socket: impl AsFd, parts: &[IoSlice<'_>], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len == 0 || len > PACKET_LEN_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a packet has 1 to {PACKET_LEN_MAX} bytes and up to {DESCRIPTORS_MAX} descriptors, this one has \
                 {len} and {}",
                descriptors.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptors do not fit"));
    }
    let sent = retry(|| rustix::net::sendmsg(&socket, parts, &mut control, SendFlags::NOSIGNAL))?;
    if sent == len {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::WriteZero, format!("{sent} of {len} bytes of a packet were sent")))
}

/// Receives one packet and returns its length in bytes, 0 when the other end has closed. Descriptors are appended to
/// `descriptors`, closed on exec.
///
/// # Errors
/// The system's, `WouldBlock` included; `InvalidData` for a packet that is longer than `buffer` or has more than
/// [`DESCRIPTORS_MAX`] descriptors: it is gone, and its descriptors are closed.
pub fn recv(socket: impl AsFd, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let room = buffer.len();
    let mut parts = [IoSliceMut::new(buffer)];
    let got = retry(|| rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut received = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            received.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a packet has more than {room} bytes or {DESCRIPTORS_MAX} descriptors"),
        ));
    }
    descriptors.append(&mut received);
    Ok(got.bytes)
}

/// A signal that arrives meanwhile is no error.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
