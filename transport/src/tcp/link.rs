//! A control stream: connecting, the handshake, frames both ways, and the end of it all. Its reads are in
//! `reading`, their data streams in `stream` and `serve`. Invariant: of one link the sink hears LinkUp first and LinkDown last, both
//! at most once; whatever it was promised (SendDone, Landed, ReadDone) comes before LinkDown.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use hetmem_core::wire::{Frame, PROTOCOL_MAX, PROTOCOL_MIN, negotiate};
use hetmem_core::{LinkId, StoreError};
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;

use super::inbox::{Inbox, Item};
use super::outbox::{self, Failure, Outbox, Outgoing, Settled, Wrote};
use super::reads::Reads;
use super::serve::ServeStream;
use super::shared::{Conn, Shared, Task};
use super::sys::{Got, Socket, random};
use super::wire::{FabricMessage, StreamToken};
use crate::arriving::Arriving;
use crate::fabric::{FabricEvent, Landing, SendToken, Sent, check_kind};
use crate::payload::Gather;
use crate::turn::Turn;

/// Bytes received before other connections get their turn.
const RECEIVE_BUDGET: usize = 8 << 20;

/// `Link::state`: waiting for the socket to connect, or for its address.
const CONNECTING: u8 = 0;
/// Connected, waiting for the answer to our `Open`.
const OPENING: u8 = 1;
/// Both ends know each other, the sink does not know yet.
const OPENED: u8 = 2;
/// Frames go both ways.
const UP: u8 = 3;
/// Failed; to be torn down.
const DOWN: u8 = 4;
/// Torn down.
const GONE: u8 = 5;

/// What a peer that connects says of itself.
#[derive(Clone, Copy)]
pub(super) struct Opening {
    /// Chosen from those that it speaks.
    pub(super) version: u16,
    /// Where its own fabric listens, on the address that it connects from.
    pub(super) listen_port: u16,
    /// To be shown on data streams opened to it.
    pub(super) token: StreamToken,
}

pub(super) struct Link {
    pub(super) id: LinkId,
    inbound: bool,
    /// What `connect` was given, or where an inbound peer listens.
    address: String,
    /// Shown by the peer on the data streams that it opens.
    token: StreamToken,
    state: AtomicU8,
    turn: Turn,
    ended: AtomicBool,
    writable: AtomicBool,
    /// Whether `outbox` holds anything; kept so that a turn need not lock to know.
    queued: AtomicBool,
    /// Where an outbound link is to connect, once known, until it does.
    target: Mutex<Option<SocketAddr>>,
    socket: OnceLock<Arc<Socket>>,
    inbox: Mutex<Inbox>,
    outbox: Mutex<Outbox>,
    pub(super) reads: Mutex<Reads>,
    serving: Mutex<Vec<Arc<ServeStream>>>,
    why: Mutex<Option<StoreError>>,
}

impl Link {
    fn new(shared: &Shared, address: String, inbound: bool, received: &[u8]) -> Result<Self, StoreError> {
        Ok(Self {
            id: LinkId(shared.next_id()),
            inbound,
            address,
            token: StreamToken(random()?),
            state: AtomicU8::new(if inbound { OPENED } else { CONNECTING }),
            turn: Turn::default(),
            ended: AtomicBool::new(false),
            writable: AtomicBool::new(false),
            queued: AtomicBool::new(false),
            target: Mutex::new(None),
            socket: OnceLock::new(),
            inbox: Mutex::new(Inbox::new(received)),
            outbox: Mutex::default(),
            reads: Mutex::new(Reads::default()),
            serving: Mutex::default(),
            why: Mutex::new(None),
        })
    }

    /// The link of a peer that has introduced itself; the answer is under way when this returns.
    pub(super) fn accepted(
        shared: &Arc<Shared>,
        socket: &Arc<Socket>,
        opening: Opening,
        received: &[u8],
    ) -> Result<Arc<Self>, StoreError> {
        shared.check_link_room()?;
        let Some(peer) = socket.peer() else {
            return Err(StoreError::protocol("the peer left in its handshake"));
        };
        let listens = SocketAddr::new(peer.ip(), opening.listen_port);
        let link = Arc::new(Self::new(shared, listens.to_string(), true, received)?);
        let _ = link.socket.set(Arc::clone(socket));
        link.reads.lock().peer_is(listens, opening.token);
        shared.links.write().insert(link.id, Arc::clone(&link));
        shared.tokens.lock().insert(link.token, Arc::clone(&link));
        let opened = FabricMessage::Opened { version: opening.version, token: link.token };
        link.enqueue(opened.frame()?);
        Ok(link)
    }

    /// A link that begins to connect once its address is known.
    pub(super) fn outbound(shared: &Arc<Shared>, address: &str) -> Result<Arc<Self>, StoreError> {
        shared.check_link_room()?;
        let link = Arc::new(Self::new(shared, address.to_owned(), false, &[])?);
        shared.links.write().insert(link.id, Arc::clone(&link));
        shared.tokens.lock().insert(link.token, Arc::clone(&link));
        Ok(link)
    }

    /// The address of an outbound link is known, or is not. Calls nobody: connecting is left to the next turn.
    pub(super) fn resolved(self: &Arc<Self>, shared: &Shared, address: Result<SocketAddr, StoreError>) {
        match address {
            Ok(address) => {
                *self.target.lock() = Some(address);
                shared.later(Task::Work(Conn::Link(Arc::clone(self))));
            }
            Err(why) => self.fail(shared, why),
        }
    }

    /// Makes the socket and begins to connect, once the address is known.
    fn connect(self: &Arc<Self>, shared: &Arc<Shared>) -> Result<(), StoreError> {
        let Some(address) = self.target.lock().take() else {
            return Ok(());
        };
        let id = shared.next_id();
        let socket = Arc::new(Socket::connecting(address, id)?);
        if self.socket.set(Arc::clone(&socket)).is_err() {
            return Ok(());
        }
        // The token is not known before the peer has answered; nobody can read before that either.
        self.reads.lock().peer_is(address, StreamToken([0; 16]));
        shared.insert(id, Conn::Link(Arc::clone(self)));
        shared.set_deadline(id, shared.config.handshake_timeout);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        shared.seats.events().add(&socket, id, flags)
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn is_up(&self) -> bool {
        self.state.load(Ordering::Acquire) == UP
    }

    pub(super) fn note_end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(super) fn note_writable(&self) {
        self.writable.store(true, Ordering::Release);
    }

    // Sending.

    /// See `Fabric::send`.
    pub(super) fn send(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        frame: Frame,
        payload: Option<Gather>,
        token: SendToken,
    ) -> Result<Sent, StoreError> {
        let Some(socket) = self.socket.get() else {
            return Err(self.lost("send"));
        };
        let has_payload = payload.is_some();
        let mut outgoing = Outgoing { head: frame.into_bytes(), payload, word: None, token, sent: 0 };
        let mut outbox = self.outbox.lock();
        // Looked at under the lock: a tear-down drains the outbox under it, after the state has changed.
        if self.state.load(Ordering::Acquire) != UP && self.state.load(Ordering::Acquire) != OPENED {
            return Err(self.lost("send"));
        }
        if outbox.is_empty() {
            match outbox::write_one(socket, &mut outgoing, false) {
                Ok(true) => return Ok(Sent::Done),
                Ok(false) => {}
                Err(Failure::Skipped(error)) => return Err(error),
                Err(Failure::Broken(error)) => {
                    drop(outbox);
                    self.fail(shared, self.lost_because("send", &error));
                    return Err(self.lost("send"));
                }
            }
        } else if !outbox.has_room(outgoing.head.len()) {
            return Err(StoreError::busy(
                "send",
                format!(
                    "the queue to {} holds {} frames or {} bytes",
                    self.address,
                    outbox::FRAMES_MAX,
                    outbox::BYTES_MAX
                ),
            ));
        }
        outbox.push(outgoing);
        self.queued.store(true, Ordering::Release);
        Ok(if has_payload { Sent::Pending } else { Sent::Done })
    }

    fn enqueue(&self, frame: Frame) {
        self.outbox.lock().push(Outgoing {
            head: frame.into_bytes(),
            payload: None,
            word: None,
            token: SendToken(0),
            sent: 0,
        });
        self.queued.store(true, Ordering::Release);
    }

    // Failing.

    /// Ends the link; the first reason counts. Calls nobody: the tear-down is left to the next turn.
    pub(super) fn fail(self: &Arc<Self>, shared: &Shared, why: StoreError) {
        {
            let mut first = self.why.lock();
            if first.is_some() {
                return;
            }
            *first = Some(why);
        }
        self.state.store(DOWN, Ordering::Release);
        if let Some(socket) = self.socket.get() {
            socket.shut_down();
        }
        shared.later(Task::Work(Conn::Link(Arc::clone(self))));
    }

    pub(super) fn why(&self) -> StoreError {
        self.why.lock().clone().unwrap_or_else(|| StoreError::unavailable("link", "it is not up yet"))
    }

    /// The error of an operation on a link that is not up.
    pub(super) fn lost(&self, operation: &'static str) -> StoreError {
        let why = self.why();
        self.lost_because(operation, &why)
    }

    pub(super) fn lost_because(&self, operation: &'static str, why: &StoreError) -> StoreError {
        match why {
            StoreError::PeerLost { why, .. } => StoreError::PeerLost {
                operation: operation.into(),
                subject: format!("link {}", self.id),
                peer: self.address.clone(),
                why: why.clone(),
            },
            other => StoreError::PeerLost {
                operation: operation.into(),
                subject: format!("link {}", self.id),
                peer: self.address.clone(),
                why: other.to_string().into(),
            },
        }
    }

    // The turn.

    pub(super) fn run(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.turn.run(|| {
            if let Err(why) = self.advance(shared) {
                if why.kind() == hetmem_core::ErrorKind::Protocol {
                    shared.refuse(&self.address, &why);
                }
                self.fail(shared, why);
            }
            if self.state.load(Ordering::Acquire) == DOWN {
                self.state.store(GONE, Ordering::Release);
                self.tear_down(shared);
            }
        });
    }

    fn advance(self: &Arc<Self>, shared: &Arc<Shared>) -> Result<(), StoreError> {
        let state = self.state.load(Ordering::Acquire);
        if state >= DOWN {
            return Ok(());
        }
        let Some(socket) = self.socket.get() else {
            return self.connect(shared);
        };
        if state == CONNECTING {
            if !self.writable.load(Ordering::Acquire) && !self.ended.load(Ordering::Acquire) {
                return Ok(());
            }
            socket.connected().map_err(|error| StoreError::PeerLost {
                operation: "connect".into(),
                subject: format!("link {}", self.id),
                peer: self.address.clone(),
                why: format!("{error}: is a node listening there?").into(),
            })?;
            socket.prepare();
            self.enqueue(self.open(shared).frame()?);
            self.become_state(CONNECTING, OPENING);
        }
        if state == OPENED {
            self.come_up(shared);
        }
        self.flush(shared, socket)?;
        if self.state.load(Ordering::Acquire) < DOWN { self.receive(shared, socket) } else { Ok(()) }
    }

    fn become_state(&self, from: u8, to: u8) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn open(&self, shared: &Shared) -> FabricMessage {
        FabricMessage::Open {
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            listen_port: shared.listen_port,
            token: self.token,
        }
    }

    fn come_up(&self, shared: &Shared) {
        self.reads.lock().open();
        if self.become_state(OPENED, UP) {
            let (link, address, inbound) = (self.id, self.address.clone(), self.inbound);
            shared.report(FabricEvent::LinkUp { link, address, inbound });
        }
    }

    fn flush(self: &Arc<Self>, shared: &Arc<Shared>, socket: &Arc<Socket>) -> Result<(), StoreError> {
        if !self.queued.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut settled = Vec::new();
        let wrote = {
            let mut outbox = self.outbox.lock();
            let wrote = outbox.write(socket, &mut settled);
            self.queued.store(!outbox.is_empty(), Ordering::Release);
            wrote
        };
        report_settled(shared, settled);
        match wrote.map_err(|error| self.lost_because("send", &error))? {
            Wrote::All | Wrote::Blocked => {}
            Wrote::Enough => self.watch_again(shared, socket),
        }
        Ok(())
    }

    /// Queues this connection behind the others that are ready.
    fn watch_again(&self, shared: &Shared, socket: &Socket) {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        shared.seats.events().modify(socket, socket.id, flags);
    }

    fn receive(self: &Arc<Self>, shared: &Arc<Shared>, socket: &Arc<Socket>) -> Result<(), StoreError> {
        let mut inbox = self.inbox.lock();
        let mut budget = RECEIVE_BUDGET;
        loop {
            self.consume(shared, &mut inbox)?;
            if self.state.load(Ordering::Acquire) >= DOWN {
                return Ok(());
            }
            if budget == 0 {
                self.watch_again(shared, socket);
                return Ok(());
            }
            let (got, more) = inbox.receive(socket).map_err(|error| self.lost_because("receive", &error))?;
            match got {
                Got::Bytes(count) => budget = budget.saturating_sub(count),
                Got::Nothing => return Ok(()),
                Got::End => {
                    let end = StoreError::unavailable("its connection", "the peer closed it");
                    return Err(self.lost_because("receive", &end));
                }
            }
            if !more && !self.ended.load(Ordering::Acquire) {
                // Edge-triggered: what arrives from now on is an event of its own.
                return self.consume(shared, &mut inbox);
            }
        }
    }

    /// Uses all that was received.
    fn consume(self: &Arc<Self>, shared: &Arc<Shared>, inbox: &mut Inbox) -> Result<(), StoreError> {
        while self.state.load(Ordering::Acquire) == OPENING {
            let Some((message, len)) = FabricMessage::parse(inbox.waiting())? else {
                return Ok(());
            };
            inbox.skip(len);
            self.opened(shared, message)?;
        }
        loop {
            if self.state.load(Ordering::Acquire) != UP {
                return Ok(());
            }
            let (landing, header) = match inbox.next()? {
                Item::Hungry => return Ok(()),
                Item::Landed(token, result) => {
                    shared.report(FabricEvent::Landed { link: self.id, token, result });
                    continue;
                }
                Item::Frame(header, body) => {
                    check_kind(&header)?;
                    (shared.message(self.id, header, body), header)
                }
            };
            match landing {
                Landing::Discard if header.payload_len == 0 => {}
                landing => inbox.expect(Arriving::of(header.payload_len, landing, &shared.regions)),
            }
        }
    }

    fn opened(self: &Arc<Self>, shared: &Arc<Shared>, message: FabricMessage) -> Result<(), StoreError> {
        match message {
            FabricMessage::Opened { version, token } => {
                negotiate(version, version)?;
                if let Some(socket) = self.socket.get() {
                    shared.clear_deadline(socket.id);
                }
                self.reads.lock().peer_token_is(token);
                if self.become_state(OPENING, OPENED) {
                    self.come_up(shared);
                }
                Ok(())
            }
            FabricMessage::Refused { error } => Err(error),
            FabricMessage::Open { .. } | FabricMessage::Stream { .. } => {
                Err(StoreError::protocol("a peer answered a handshake with a question"))
            }
        }
    }

    // Data streams that the peer reads on.

    /// Makes a data stream part of this link.
    ///
    /// # Errors
    /// `PeerLost` if the link is not up, `Busy` if it has too many.
    pub(super) fn add_serving(&self, shared: &Shared, stream: &Arc<ServeStream>) -> Result<(), StoreError> {
        let mut serving = self.serving.lock();
        let state = self.state.load(Ordering::Acquire);
        if state != UP && state != OPENED {
            return Err(self.lost("open a data stream"));
        }
        let limit = shared.config.streams_per_peer_max;
        if serving.len() >= limit {
            return Err(StoreError::busy(
                "open a data stream",
                format!("{} has {limit} to this node", self.address),
            ));
        }
        serving.push(Arc::clone(stream));
        Ok(())
    }

    pub(super) fn remove_serving(&self, stream: &Arc<ServeStream>) {
        self.serving.lock().retain(|other| !Arc::ptr_eq(other, stream));
    }

    // The end.

    /// Closes without telling anyone, when the fabric stops.
    pub(super) fn forget(&self, shared: &Shared) {
        self.state.store(GONE, Ordering::Release);
        if let Some(socket) = self.socket.get() {
            shared.remove(socket);
            socket.shut_down();
        }
        self.serving.lock().clear();
        *self.reads.lock() = Reads::default();
    }

    fn tear_down(self: &Arc<Self>, shared: &Arc<Shared>) {
        if let Some(socket) = self.socket.get() {
            shared.remove(socket);
            socket.shut_down();
        }
        shared.links.write().remove(&self.id);
        shared.tokens.lock().remove(&self.token);
        let why = self.why();
        if let Some(token) = self.inbox.lock().abandon() {
            let result = Err(self.lost_because("receive", &why));
            shared.report(FabricEvent::Landed { link: self.id, token, result });
        }
        let settled = self.outbox.lock().drain(&self.lost_because("send", &why));
        report_settled(shared, settled);
        for stream in std::mem::take(&mut *self.serving.lock()) {
            stream.close(shared);
        }
        let (finished, streams) = self.reads.lock().close(&self.lost_because("read", &why));
        for stream in streams {
            stream.lose(shared, &why);
        }
        self.report_finished(shared, finished);
    }
}

fn report_settled(shared: &Shared, settled: Vec<Settled>) {
    for (token, result) in settled {
        shared.report(FabricEvent::SendDone { token, result });
    }
}
