//! Sessions of clients over the Unix socket: one thread, one epoll, all sockets. Not what clients ask
//! (`hetmem_core::engine`). Invariant: a client that breaks the framing, or does not take its answers, loses its
//! session and nothing else happens.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hetmem_core::engine::Input;
use hetmem_core::wire::{ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, decode, encode};
use hetmem_core::{ClientId, StoreError};
use hetmem_host_mem::NodePage;
use hetmem_host_mem::socket::{self, Accepted, Listener, PACKET_LEN_MAX};
use parking_lot::Mutex;
use rustix::event::{Timespec, epoll};

use crate::driver::{Descriptors, Driver};
use crate::inprocess::Slots;

/// Answers that may wait for a client that does not read, before it is closed.
const UNREAD_MAX: usize = 4096;
/// Sessions at once: a bound on what can be made to hold memory by connecting.
const CLIENTS_MAX: usize = 4096;
/// How long the thread looks for the next request before it sleeps, giving way to whoever wants the core. Two cores of
/// one machine wake each other in 20 to 40 us; a request is handled in 3.
const SPIN: Duration = Duration::from_micros(50);

struct Packet {
    bytes: Vec<u8>,
    descriptors: Descriptors,
}

struct Remote {
    socket: OwnedFd,
    /// What the socket did not take yet.
    unread: Mutex<VecDeque<Packet>>,
    closing: AtomicBool,
}

enum Channel {
    Unix(Arc<Remote>),
    Inside(Arc<Slots>),
}

/// Everyone who is connected.
#[derive(Default)]
pub(crate) struct Clients {
    channels: Mutex<HashMap<ClientId, Channel>>,
    next: AtomicU32,
}

impl Clients {
    fn next_id(&self) -> ClientId {
        ClientId(self.next.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Adds a session inside this process.
    pub(crate) fn join_inside(&self, driver: &Driver, slots: Arc<Slots>) -> Result<ClientId, StoreError> {
        let client = self.next_id();
        self.join(driver, client, Channel::Inside(slots), true)?;
        Ok(client)
    }

    fn join(&self, driver: &Driver, client: ClientId, channel: Channel, trusted: bool) -> Result<(), StoreError> {
        let page = Arc::new(NodePage::create()?);
        driver.core.lock().pages.insert(client, page);
        self.channels.lock().insert(client, channel);
        driver.feed(Input::ClientJoined { client, trusted });
        Ok(())
    }

    /// Ends a session: its pins, reservations and waits are gone.
    pub(crate) fn leave(&self, driver: &Driver, client: ClientId) {
        if self.channels.lock().remove(&client).is_some() {
            driver.core.lock().forget_page(client);
            driver.feed(Input::ClientLeft { client });
        }
    }

    /// Makes a session end soon: its thread sees the socket closed.
    pub(crate) fn close(&self, client: ClientId) {
        if let Some(Channel::Unix(remote)) = self.channels.lock().get(&client) {
            remote.close();
        }
    }

    pub(crate) fn reply(
        &self,
        driver: &Driver,
        client: ClientId,
        request: u64,
        reply: Result<ClientReply, StoreError>,
        descriptors: &Descriptors,
    ) {
        let remote = match self.channels.lock().get(&client) {
            Some(Channel::Unix(remote)) => Arc::clone(remote),
            Some(Channel::Inside(slots)) => {
                let slots = Arc::clone(slots);
                return slots.deliver(driver, request, reply, descriptors);
            }
            None => return,
        };
        let frame = match encode(FrameKind::Reply, request, &reply, 0) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "an answer cannot be encoded");
                return remote.close();
            }
        };
        remote.send(frame.into_bytes(), descriptors);
    }
}

impl Descriptors {
    fn with<R>(&self, f: impl FnOnce(&[BorrowedFd<'_>]) -> R) -> R {
        match self {
            Self::None => f(&[]),
            Self::Session(index, page) => f(&[index.descriptor(), page.descriptor()]),
            Self::Segment(segment) => f(&[segment.descriptor()]),
        }
    }

    fn keep(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Session(index, page) => Self::Session(Arc::clone(index), Arc::clone(page)),
            Self::Segment(segment) => Self::Segment(Arc::clone(segment)),
        }
    }
}

impl Remote {
    fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // The thread that owns the socket wakes up and ends the session.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    fn send(&self, bytes: Vec<u8>, descriptors: &Descriptors) {
        let mut unread = self.unread.lock();
        if unread.is_empty() {
            match descriptors.with(|fds| socket::send(&self.socket, &[IoSlice::new(&bytes)], fds)) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return self.close(),
            }
        }
        if unread.len() >= UNREAD_MAX {
            return self.close();
        }
        unread.push_back(Packet { bytes, descriptors: descriptors.keep() });
    }

    /// Sends what waits; true if something still does.
    fn flush(&self) -> bool {
        let mut unread = self.unread.lock();
        while let Some(packet) = unread.front() {
            let sent =
                packet.descriptors.with(|fds| socket::send(&self.socket, &[IoSlice::new(&packet.bytes)], fds));
            match sent {
                Ok(()) => {
                    unread.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => {
                    self.close();
                    return false;
                }
            }
        }
        false
    }
}

/// What an epoll event is about; packed into its 64 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Stop,
    Client(ClientId),
    Process(ClientId),
}

impl Source {
    const fn pack(self) -> epoll::EventData {
        let (kind, id) = match self {
            Self::Listener => (0, 0),
            Self::Stop => (1, 0),
            Self::Client(client) => (2, client.0),
            Self::Process(client) => (3, client.0),
        };
        epoll::EventData::new_u64((kind << 32) | id as u64)
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low half is the number that was packed")]
    fn unpack(data: epoll::EventData) -> Self {
        let (kind, id) = (data.u64() >> 32, ClientId(data.u64() as u32));
        match kind {
            0 => Self::Listener,
            1 => Self::Stop,
            2 => Self::Client(id),
            _ => Self::Process(id),
        }
    }
}

/// The thread that serves the Unix socket.
pub(crate) struct Reactor {
    driver: Arc<Driver>,
    listener: Listener,
    epoll: OwnedFd,
    remotes: HashMap<ClientId, Arc<Remote>>,
    processes: HashMap<ClientId, OwnedFd>,
    buffer: Vec<u8>,
}

impl Reactor {
    pub(crate) fn new(driver: Arc<Driver>, listener: Listener, stop: BorrowedFd<'_>) -> Result<Self, StoreError> {
        let os = |error: io::Error| StoreError::os("serving the Unix socket", error);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| os(error.into()))?;
        socket::set_nonblocking(&listener, true).map_err(os)?;
        let watch = |fd: BorrowedFd<'_>, source: Source| {
            epoll::add(&epoll, fd, source.pack(), epoll::EventFlags::IN).map_err(|error| os(error.into()))
        };
        watch(listener.as_fd(), Source::Listener)?;
        watch(stop, Source::Stop)?;
        Ok(Self {
            driver,
            listener,
            epoll,
            remotes: HashMap::new(),
            processes: HashMap::new(),
            buffer: vec![0; PACKET_LEN_MAX],
        })
    }

    pub(crate) fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let mut busy = Instant::now();
        loop {
            events.clear();
            // Waking a core that sleeps costs more than most requests, and the next one often follows at once.
            let spin = busy.elapsed() < SPIN;
            let timeout = spin.then(Timespec::default);
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(0) => {
                    rustix::thread::sched_yield();
                    continue;
                }
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "the Unix socket is not served any more");
                    return;
                }
            }
            for event in &events {
                match Source::unpack(event.data) {
                    Source::Stop => return,
                    Source::Listener => self.accept(),
                    Source::Client(client) => self.client_event(client, event.flags),
                    Source::Process(client) => self.process_gone(client),
                }
            }
            busy = Instant::now();
        }
    }

    fn accept(&mut self) {
        loop {
            match socket::accept(&self.listener) {
                Ok(accepted) => {
                    if let Err(error) = self.join(accepted) {
                        self.driver.refuse();
                        tracing::warn!(%error, "a client was not let in");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors: the connection stays in the backlog and is taken when some are free.
                    tracing::warn!(%error, "a client could not be accepted");
                    return;
                }
            }
        }
    }

    fn join(&mut self, accepted: Accepted) -> Result<(), StoreError> {
        let own = rustix::process::getuid().as_raw();
        if accepted.uid != own && accepted.uid != 0 {
            let why = format!("user {} connected, this node serves user {own} (and root)", accepted.uid);
            return Err(StoreError::denied("connect", why));
        }
        if self.remotes.len() >= CLIENTS_MAX {
            return Err(StoreError::busy("connect", format!("{CLIENTS_MAX} clients are connected")));
        }
        let client = self.driver.clients.next_id();
        socket::set_nonblocking(&accepted.socket, true)
            .map_err(|error| StoreError::os("serving a client", error))?;
        let remote = Arc::new(Remote {
            socket: accepted.socket,
            unread: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        self.driver.clients.join(&self.driver, client, Channel::Unix(Arc::clone(&remote)), false)?;
        let flags = epoll::EventFlags::IN;
        let watched = epoll::add(&self.epoll, &remote.socket, Source::Client(client).pack(), flags);
        self.remotes.insert(client, remote);
        self.watch_process(client, accepted.pid);
        if let Err(error) = watched {
            self.leave(client);
            return Err(StoreError::os("serving a client", error));
        }
        Ok(())
    }

    /// Remembers when the client's process ends: until then it may write to what was granted to it.
    fn watch_process(&mut self, client: ClientId, pid: u32) {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let opened =
            pid.map(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()));
        // Without one (an old kernel, another pid namespace) its segments are kept apart for good.
        if let Some(Ok(process)) = opened {
            let source = Source::Process(client).pack();
            if epoll::add(&self.epoll, &process, source, epoll::EventFlags::IN).is_ok() {
                self.processes.insert(client, process);
            }
        }
    }

    fn process_gone(&mut self, client: ClientId) {
        if self.processes.remove(&client).is_some() {
            self.leave(client);
            self.driver.feed(Input::ClientProcessGone { client });
        }
    }

    fn leave(&mut self, client: ClientId) {
        if let Some(remote) = self.remotes.remove(&client) {
            let _ = epoll::delete(&self.epoll, &remote.socket);
            self.driver.clients.leave(&self.driver, client);
        }
    }

    fn client_event(&mut self, client: ClientId, flags: epoll::EventFlags) {
        let Some(remote) = self.remotes.get(&client).map(Arc::clone) else { return };
        if flags.contains(epoll::EventFlags::OUT) {
            remote.flush();
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            match self.receive(client, &remote) {
                Ok(true) => {}
                Ok(false) => return self.leave(client),
                Err(why) => {
                    self.driver.refuse();
                    tracing::warn!(%client, error = %why, "a client is closed");
                    return self.leave(client);
                }
            }
        }
        if remote.closing.load(Ordering::Acquire) {
            return self.leave(client);
        }
        // Answers are written by whichever thread has them; this one only watches for room if one did not fit.
        let waiting = !remote.unread.lock().is_empty();
        let had = flags.contains(epoll::EventFlags::OUT);
        if waiting || had {
            let mut wanted = epoll::EventFlags::IN;
            wanted.set(epoll::EventFlags::OUT, waiting);
            let _ = epoll::modify(&self.epoll, &remote.socket, Source::Client(client).pack(), wanted);
        }
    }

    /// Takes one packet; false if the session has ended.
    fn receive(&mut self, client: ClientId, remote: &Remote) -> Result<bool, StoreError> {
        let mut descriptors = Vec::new();
        let len = match socket::recv(&remote.socket, &mut self.buffer, &mut descriptors) {
            Ok(0) => return Ok(false),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(StoreError::protocol(format!("a packet could not be received: {error}"))),
        };
        let (request, message, payload) = parse(&self.buffer[..len])?;
        self.driver.feed(Input::ClientRequest { client, request, message, payload });
        Ok(true)
    }
}

fn parse(packet: &[u8]) -> Result<(u64, ClientMessage, Bytes), StoreError> {
    let short = || StoreError::protocol(format!("a packet of {} bytes ends before its frame", packet.len()));
    let (header, rest) = packet.split_first_chunk::<HEADER_LEN>().ok_or_else(short)?;
    let header = FrameHeader::parse(header)?;
    if header.kind != FrameKind::Client {
        return Err(StoreError::protocol(format!("a {:?} frame came from a client", header.kind)));
    }
    let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
    let (body, payload) = rest.split_at_checked(body_len).ok_or_else(short)?;
    if payload.len() as u64 != header.payload_len {
        return Err(StoreError::protocol(format!(
            "a packet has {} bytes of payload, its header says {}",
            payload.len(),
            header.payload_len
        )));
    }
    Ok((header.request, decode(body)?, Bytes::copy_from_slice(payload)))
}
