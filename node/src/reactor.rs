//! What clients send: one thread, one epoll, all of the Unix sockets. Not what it means (`hetmem_core::engine`), and
//! not the answers (`clients`). Invariant: a client that breaks the framing, or says nothing at all, loses its session
//! and nothing else happens.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hetmem_core::engine::Input;
use hetmem_core::wire::{
    ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, MAGIC, decode, encode,
};
use hetmem_core::{ClientId, StoreError};
use hetmem_host_mem::socket::{self, Accepted, Listener, PACKET_LEN_MAX};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use crate::clients::{Channel, Remote};
use crate::driver::{Descriptors, Driver};

/// Sessions at once: a bound on what can be made to hold memory by connecting.
const CLIENTS_MAX: usize = 4096;
/// How long a client may be connected without having said a word.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How soon accepting is tried again after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the thread looks for the next request before it sleeps, giving way to whoever wants the core. Two cores of
/// one machine wake each other in 20 to 40 us; a request is handled in 3.
const SPIN: Duration = Duration::from_micros(50);

/// What an epoll event is about; packed into its 64 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Listener,
    Stop,
    Client(ClientId),
    /// By its number.
    Process(u32),
}

impl Source {
    pub(crate) const fn pack(self) -> epoll::EventData {
        let (kind, id) = match self {
            Self::Listener => (0, 0),
            Self::Stop => (1, 0),
            Self::Client(client) => (2, client.0),
            Self::Process(pid) => (3, pid),
        };
        epoll::EventData::new_u64((kind << 32) | id as u64)
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low half is the number that was packed")]
    fn unpack(data: epoll::EventData) -> Self {
        let (kind, id) = (data.u64() >> 32, data.u64() as u32);
        match kind {
            0 => Self::Listener,
            1 => Self::Stop,
            2 => Self::Client(ClientId(id)),
            _ => Self::Process(id),
        }
    }
}

/// A process that has or had sessions: until it ends it may write to what was granted to them.
struct Process {
    pidfd: OwnedFd,
    clients: Vec<ClientId>,
}

impl Process {
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

/// The thread that serves the Unix socket.
pub(crate) struct Reactor {
    driver: Arc<Driver>,
    listener: Listener,
    epoll: Arc<OwnedFd>,
    remotes: HashMap<ClientId, Arc<Remote>>,
    /// By their numbers.
    processes: HashMap<u32, Process>,
    /// Clients that have not said a word when they joined, oldest first.
    silent: VecDeque<(Instant, ClientId)>,
    /// Set while there are no descriptors left to accept with.
    accept_again: Option<Instant>,
    buffer: Vec<u8>,
}

impl Reactor {
    pub(crate) fn new(
        driver: Arc<Driver>,
        listener: Listener,
        stop: BorrowedFd<'_>,
    ) -> Result<Self, StoreError> {
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
            epoll: Arc::new(epoll),
            remotes: HashMap::new(),
            processes: HashMap::new(),
            silent: VecDeque::new(),
            accept_again: None,
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
            let timeout = if spin { Some(Timespec::default()) } else { self.time_left() };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(0) if spin => {
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
            if !events.is_empty() {
                busy = Instant::now();
            }
            for event in &events {
                match Source::unpack(event.data) {
                    Source::Stop => return,
                    Source::Listener => self.accept(),
                    Source::Client(client) => self.client_event(client, event.flags),
                    Source::Process(pid) => self.process_gone(pid),
                }
            }
            self.run_timers();
        }
    }

    /// Until the next of this thread's own deadlines.
    fn time_left(&self) -> Option<Timespec> {
        let silent = self.silent.front().map(|(joined, _)| *joined + SILENCE_MAX);
        let next = silent.into_iter().chain(self.accept_again).min()?;
        Timespec::try_from(next.saturating_duration_since(Instant::now())).ok()
    }

    fn run_timers(&mut self) {
        if self.silent.is_empty() && self.accept_again.is_none() {
            return;
        }
        let now = Instant::now();
        while let Some(&(joined, client)) = self.silent.front()
            && now.duration_since(joined) >= SILENCE_MAX
        {
            self.silent.pop_front();
            if self.remotes.get(&client).is_some_and(|remote| !remote.has_spoken()) {
                self.driver.refuse();
                tracing::warn!(%client, "a client that says nothing is closed");
                self.leave(client);
            }
        }
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            self.watch_listener(true);
            self.accept();
        }
    }

    fn watch_listener(&self, watch: bool) {
        let wanted = if watch { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        if let Err(error) = epoll::modify(&self.epoll, &self.listener, Source::Listener.pack(), wanted) {
            tracing::error!(%error, "new clients are not noticed");
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
                    if self.accept_again.is_none() {
                        tracing::warn!(%error, "a client waits: raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=)");
                    }
                    self.watch_listener(false);
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
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
        let remote = Arc::new(Remote::new(client, accepted.socket, Arc::clone(&self.epoll)));
        self.driver.clients.join(&self.driver, client, Channel::Unix(Arc::clone(&remote)), false)?;
        let flags = epoll::EventFlags::IN;
        let watched = epoll::add(&self.epoll, remote.socket(), Source::Client(client).pack(), flags);
        self.remotes.insert(client, remote);
        self.silent.push_back((Instant::now(), client));
        self.watch_process(client, accepted.pid);
        if let Err(error) = watched {
            self.leave(client);
            return Err(StoreError::os("serving a client", error));
        }
        Ok(())
    }

    /// Remembers when the client's process ends: until then it may write to what was granted to it.
    fn watch_process(&mut self, client: ClientId, pid: u32) {
        // Its number may have been another process's before.
        self.process_gone(pid);
        if let Some(process) = self.processes.get_mut(&pid) {
            return process.clients.push(client);
        }
        let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let opened =
            number.map(|number| rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()));
        // Without one (an old kernel, another pid namespace) its segments are kept apart for good.
        if let Some(Ok(pidfd)) = opened {
            let source = Source::Process(pid).pack();
            if epoll::add(&self.epoll, &pidfd, source, epoll::EventFlags::IN).is_ok() {
                self.processes.insert(pid, Process { pidfd, clients: vec![client] });
            }
        }
    }

    /// If the process of this number has ended, what its sessions had is free.
    fn process_gone(&mut self, pid: u32) {
        if !self.processes.get(&pid).is_some_and(Process::has_ended) {
            return;
        }
        let Some(process) = self.processes.remove(&pid) else { return };
        for client in process.clients {
            self.leave(client);
            self.driver.feed(Input::ClientProcessGone { client });
        }
    }

    fn leave(&mut self, client: ClientId) {
        if let Some(remote) = self.remotes.remove(&client) {
            let _ = epoll::delete(&self.epoll, remote.socket());
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
        if remote.is_closing() {
            self.leave(client);
        }
    }

    /// Takes one packet; false if the session has ended.
    fn receive(&mut self, client: ClientId, remote: &Remote) -> Result<bool, StoreError> {
        let mut descriptors = Vec::new();
        let len = match socket::recv(remote.socket(), &mut self.buffer, &mut descriptors) {
            Ok(0) => return Ok(false),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => {
                return Err(StoreError::protocol(format!("a packet could not be received: {error}")));
            }
        };
        remote.has_said_something();
        let packet = &self.buffer[..len];
        let (request, message, payload) = parse(packet).inspect_err(|why| last_words(remote, packet, why))?;
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

/// Tells a client of another version, or a broken one, why its session ends, if its packet names a question at all:
/// the magic and the place of the request's number are the same in every version.
fn last_words(remote: &Remote, packet: &[u8], why: &StoreError) {
    let magic = packet.starts_with(&MAGIC.to_le_bytes());
    let Some(request) = packet.get(8..16).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes)
    else {
        return;
    };
    let answer: Result<ClientReply, StoreError> = Err(why.clone());
    if magic && let Ok(frame) = encode(FrameKind::Reply, request, &answer, 0) {
        let _ = remote.send(frame.into_bytes(), &Descriptors::None);
    }
}
