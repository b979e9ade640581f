//! What all parts of one TCP fabric share: the epoll and who waits on it, the tables of connections, links and
//! transfers, the work left for later, the deadlines of handshakes. Not what a connection does with its bytes.
//!
//! Lock order: a connection's turn, then a link's `reads`, then a stream's `out`; the tables here are innermost and
//! held for a look-up only. The sink is called with nothing held but the turn of the connection that has news.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hetmem_core::wire::FrameHeader;
use hetmem_core::{LinkId, StoreError, TransferId};
use parking_lot::{Mutex, RwLock};
use rustix::event::epoll::EventFlags;

use super::TcpConfig;
use super::inbound::Inbound;
use super::link::Link;
use super::serve::ServeStream;
use super::stream::ReadStream;
use super::sys;
use super::wire::StreamToken;
use crate::fabric::{FabricEvent, FabricSink, Landing};
use crate::region::Regions;
use crate::seats::{Seat, Seats};
use crate::waiting::{Bell, Epoll, Timer};

/// Names of the descriptors that are no connections.
const LISTENER: u64 = 0;
const TASK_BELL: u64 = 1;
const TIMER: u64 = 2;
const SERVING_BELL: u64 = 3;
const FIRST_CONNECTION: u64 = 16;

/// How soon accepting is tried again after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One connection, by what it is for.
#[derive(Clone)]
pub(super) enum Conn {
    /// Accepted, and has not introduced itself.
    Inbound(Arc<Inbound>),
    /// A control stream.
    Link(Arc<Link>),
    /// A data stream on which this end reads.
    Read(Arc<ReadStream>),
    /// A data stream on which the other end reads.
    Serve(Arc<ServeStream>),
}

impl Conn {
    pub(super) fn work(&self, shared: &Arc<Shared>) {
        match self {
            Self::Inbound(inbound) => inbound.run(shared),
            Self::Link(link) => link.run(shared),
            Self::Read(stream) => stream.run(shared),
            Self::Serve(stream) => stream.run(shared),
        }
    }

    /// Remembers what an event says besides that there is work.
    fn note(&self, flags: EventFlags) {
        let ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        match self {
            Self::Inbound(inbound) if ended => inbound.note_end(),
            Self::Link(link) if ended => link.note_end(),
            _ => {}
        }
        if let Self::Link(link) = self
            && flags.contains(EventFlags::OUT)
        {
            link.note_writable();
        }
        if let Self::Read(stream) = self
            && (ended || flags.contains(EventFlags::OUT))
        {
            stream.note_writable();
        }
    }
}

/// Work for whichever thread comes to it: what must not be done by the thread that found it necessary, because
/// it may hold the caller's locks.
pub(super) enum Task {
    /// Look at a connection.
    Work(Conn),
    /// Tell the sink.
    Report(FabricEvent),
    /// Tell the sink that a read of a link is over, and look whether the link waited for that.
    Finish(Arc<Link>, super::reads::Finished),
}

pub(super) struct Shared {
    pub(super) config: TcpConfig,
    pub(super) sink: Arc<dyn FabricSink>,
    pub(super) regions: Regions,
    /// The listener, connections that have not introduced themselves, and data streams that the other end reads on:
    /// watched by threads that never call the sink.
    pub(super) serving: Epoll,
    serving_bell: Bell,
    pub(super) seats: Seats,
    pub(super) listen_port: u16,
    pub(super) links: RwLock<HashMap<LinkId, Arc<Link>>>,
    pub(super) transfers: Mutex<HashMap<TransferId, Arc<Link>>>,
    /// Links by the token that this end gave to the peer.
    pub(super) tokens: Mutex<HashMap<StreamToken, Arc<Link>>>,
    conns: RwLock<HashMap<u64, Conn>>,
    tasks: Mutex<VecDeque<Task>>,
    tasks_len: AtomicUsize,
    task_bell: Bell,
    timer: Timer,
    deadlines: Mutex<HashMap<u64, Instant>>,
    listener: Mutex<Option<Arc<OwnedFd>>>,
    next_id: AtomicU64,
    inbound_count: AtomicUsize,
    refused: AtomicU64,
    stopping: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        config: TcpConfig,
        sink: Arc<dyn FabricSink>,
        listener: OwnedFd,
        listen_port: u16,
    ) -> Result<Self, StoreError> {
        // Reads over one stream give a second thread nothing to do.
        let (seats, task_bell, timer) = (Seats::new(config.streams > 1)?, Bell::new()?, Timer::new()?);
        let (serving, serving_bell) = (Epoll::new()?, Bell::new()?);
        serving.add(&listener, LISTENER, EventFlags::IN | EventFlags::ET)?;
        serving.add(&serving_bell, SERVING_BELL, EventFlags::IN | EventFlags::ET)?;
        seats.events().add(&task_bell, TASK_BELL, EventFlags::IN | EventFlags::ET)?;
        seats.events().add(&timer, TIMER, EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            config,
            sink,
            regions: Regions::default(),
            serving,
            serving_bell,
            seats,
            listen_port,
            links: RwLock::default(),
            transfers: Mutex::default(),
            tokens: Mutex::default(),
            conns: RwLock::default(),
            tasks: Mutex::default(),
            tasks_len: AtomicUsize::new(0),
            task_bell,
            timer,
            deadlines: Mutex::default(),
            listener: Mutex::new(Some(Arc::new(listener))),
            next_id: AtomicU64::new(FIRST_CONNECTION),
            inbound_count: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        })
    }

    /// The life of one of the threads that hear from peers and tell the sink.
    pub(super) fn serve(self: &Arc<Self>) {
        while !self.stopping() {
            self.run_tasks();
            if let Some((id, flags)) = self.seats.wait(None) {
                self.handle(id, flags);
            }
        }
        // Every bell wakes one thread: the next one is told here.
        self.task_bell.ring();
    }

    /// The life of one of the threads that serve peers' reads. Nothing here calls the sink: however long the engine
    /// takes over a message, and however many threads wait for it, reads are answered.
    pub(super) fn serve_reads(self: &Arc<Self>) {
        while !self.stopping() {
            match self.serving.wait(None) {
                Some((LISTENER, _)) => self.accept(),
                Some((SERVING_BELL, _)) | None => {}
                Some((id, flags)) => {
                    let conn = self.conns.read().get(&id).cloned();
                    match conn {
                        // It has become one between the event and the look.
                        Some(conn @ (Conn::Link(_) | Conn::Read(_))) => {
                            conn.note(flags);
                            self.later(Task::Work(conn));
                        }
                        Some(conn) => {
                            conn.note(flags);
                            conn.work(self);
                        }
                        None => {}
                    }
                }
            }
        }
        // Every bell wakes one thread: the next one is told here.
        self.serving_bell.ring();
    }

    pub(super) fn progress(self: &Arc<Self>, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let done = self.drive(timeout, until);
        self.seats.leave();
        if self.stopping() {
            // This caller may have got the bell that was rung for a thread of the fabric.
            self.task_bell.ring();
        }
        done
    }

    /// Handles events until the condition is met or the time is over.
    fn drive(self: &Arc<Self>, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            self.run_tasks();
            if until() {
                return true;
            }
            let (seat, seen) = self.seats.register();
            let done = until();
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => timeout,
            };
            if done || left.is_zero() || self.stopping() {
                self.seats.stand_up(&seat);
                return done;
            }
            match seat {
                Seat::Leader => {
                    let event = self.seats.lead(seen, self.config.busy_poll, left, |last| {
                        // What comes is an event whether anybody looks or not.
                        if last { None } else { self.seats.event() }
                    });
                    self.seats.stand_up(&seat);
                    if let Some((id, flags)) = event {
                        self.handle(id, flags);
                    }
                }
                Seat::Follower => {
                    self.seats.follow(seen, left);
                    self.seats.stand_up(&seat);
                }
            }
        }
    }

    fn handle(self: &Arc<Self>, id: u64, flags: EventFlags) {
        match id {
            TASK_BELL => {}
            TIMER => self.expire(),
            id => {
                let conn = self.conns.read().get(&id).cloned();
                if let Some(conn) = conn {
                    conn.note(flags);
                    conn.work(self);
                }
            }
        }
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Stops accepting and makes the threads end.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(listener) = self.listener.lock().take() {
            self.serving.remove(&listener);
        }
        self.task_bell.ring();
        self.serving_bell.ring();
        self.seats.announce();
    }

    /// Forgets everything that refers to something else here, so that all of it can be freed.
    pub(super) fn clear(&self) {
        let links = std::mem::take(&mut *self.links.write());
        for link in links.into_values() {
            link.forget(self);
        }
        self.tokens.lock().clear();
        self.transfers.lock().clear();
        self.tasks.lock().clear();
    }

    // Reports.

    pub(super) fn report(&self, event: FabricEvent) {
        if self.stopping() {
            return;
        }
        self.sink.event(event);
        self.seats.announce();
    }

    pub(super) fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
        if self.stopping() {
            return Landing::Discard;
        }
        let landing = self.sink.message(link, header, body);
        self.seats.announce();
        landing
    }

    /// Counts a connection that is closed for what it said, or did not say in time, or because there are too many.
    pub(super) fn refuse(&self, peer: &dyn std::fmt::Display, why: &StoreError) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%peer, %why, "connection refused");
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    // Tasks.

    pub(super) fn later(&self, task: Task) {
        self.tasks.lock().push_back(task);
        self.tasks_len.fetch_add(1, Ordering::Release);
        self.task_bell.ring();
    }

    pub(super) fn run_tasks(self: &Arc<Self>) {
        while self.tasks_len.load(Ordering::Acquire) > 0 {
            let Some(task) = self.tasks.lock().pop_front() else {
                return;
            };
            self.tasks_len.fetch_sub(1, Ordering::Release);
            match task {
                Task::Work(conn) => conn.work(self),
                Task::Report(event) => self.report(event),
                Task::Finish(link, finished) => link.report_finished(self, vec![finished]),
            }
        }
    }

    // Connections.

    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn insert(&self, id: u64, conn: Conn) {
        self.conns.write().insert(id, conn);
    }

    pub(super) fn remove(&self, socket: &sys::Socket) {
        self.conns.write().remove(&socket.id);
        self.deadlines.lock().remove(&socket.id);
        self.seats.events().remove(socket);
        self.serving.remove(socket);
    }

    /// Everything that is connected, to be shut down.
    pub(super) fn take_conns(&self) -> Vec<Conn> {
        std::mem::take(&mut *self.conns.write()).into_values().collect()
    }

    /// # Errors
    /// `Busy` at the limit of links.
    pub(super) fn check_link_room(&self) -> Result<(), StoreError> {
        let limit = self.config.links_max;
        if self.links.read().len() < limit {
            return Ok(());
        }
        Err(StoreError::busy("connect", format!("this node has {limit} links, its limit")))
    }

    pub(super) fn inbound_is_over(&self) {
        self.inbound_count.fetch_sub(1, Ordering::Relaxed);
    }

    fn accept(self: &Arc<Self>) {
        loop {
            let Some(listener) = self.listener.lock().clone() else {
                return;
            };
            let fd = match sys::accept(&listener) {
                Ok(Some(fd)) => fd,
                Ok(None) => return,
                Err(
                    error @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM),
                ) => {
                    tracing::warn!(%error, "cannot accept: raise RLIMIT_NOFILE (ulimit -n); trying again soon");
                    self.set_deadline(LISTENER, ACCEPT_PAUSE);
                    return;
                }
                // The connection was gone before it was taken.
                Err(_) => continue,
            };
            let id = self.next_id();
            let inbound = Arc::new(Inbound::new(fd, id));
            if self.inbound_count.fetch_add(1, Ordering::Relaxed) >= self.config.handshakes_max {
                self.inbound_is_over();
                let limit = self.config.handshakes_max;
                let why = StoreError::busy("accept", format!("{limit} connections are in their handshake"));
                self.refuse(&inbound.peer(), &why);
                continue;
            }
            self.insert(id, Conn::Inbound(Arc::clone(&inbound)));
            self.set_deadline(id, self.config.handshake_timeout);
            inbound.watch(self);
        }
    }

    // Deadlines of handshakes.

    pub(super) fn set_deadline(&self, id: u64, after: Duration) {
        let mut deadlines = self.deadlines.lock();
        let first = deadlines.is_empty();
        deadlines.insert(id, Instant::now() + after);
        // Later deadlines are set when the first has passed; a shorter one must not wait for that.
        if first || after < self.config.handshake_timeout {
            self.timer.set(after);
        }
    }

    pub(super) fn clear_deadline(&self, id: u64) {
        self.deadlines.lock().remove(&id);
    }

    fn expire(self: &Arc<Self>) {
        let now = Instant::now();
        let expired: Vec<u64> = {
            let mut deadlines = self.deadlines.lock();
            let expired: Vec<u64> =
                deadlines.iter().filter(|(_, deadline)| **deadline <= now).map(|(id, _)| *id).collect();
            deadlines.retain(|_, deadline| *deadline > now);
            if let Some(next) = deadlines.values().min() {
                self.timer.set(next.saturating_duration_since(now));
            }
            expired
        };
        for id in expired {
            if id == LISTENER {
                self.accept();
                continue;
            }
            let conn = self.conns.read().get(&id).cloned();
            let timeout_ms = u64::try_from(self.config.handshake_timeout.as_millis()).unwrap_or(u64::MAX);
            match conn {
                Some(Conn::Inbound(inbound)) => inbound.expire(self, timeout_ms),
                Some(Conn::Link(link)) => {
                    let why = StoreError::timed_out("connect", link.address(), timeout_ms);
                    link.fail(self, why);
                }
                Some(Conn::Read(stream)) => {
                    let why =
                        StoreError::timed_out("open a data stream to", stream.link.address(), timeout_ms);
                    stream.lose(self, &why);
                }
                Some(Conn::Serve(_)) | None => {}
            }
        }
    }
}
