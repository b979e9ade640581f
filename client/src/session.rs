//! One Unix socket shared by all threads of a client: whoever waits first reads for the others. Not the meaning of
//! replies. Invariant: a question has at most one answer; an answer that nobody waits for any more goes to the
//! `late` hook; once the node is lost every waiting and every later caller learns it.
//!
//! A caller alone sends once, looks for its answer for a moment (`SPIN`), and receives once. The receive side is a
//! value (`Reader`): taking it from the desk is what makes a caller the leader, and it goes back when the leader has
//! its own answer.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hetmem_core::wire::{
    ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, KEYS_PER_MESSAGE_MAX, LocatedMany,
    decode, encode,
};
use hetmem_core::{Key, StoreError};
use hetmem_host_mem::{Answer, Session, socket};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendAncillaryBuffer, SendFlags};

/// How long a receive blocks before its caller looks at the clock again. Shorter waits poll first, so that a
/// timeout is exact and a wait without one costs a single system call.
const RECEIVE_TICK: Duration = Duration::from_secs(1);

/// How long a caller whom another one reads for sleeps before it asks whether it is to stop, if it is to ask.
const SLEEP_TICK: Duration = Duration::from_millis(100);

/// How long a caller looks for its answer before it sleeps, giving way to whoever wants the core. Two cores of one
/// machine wake each other in 20 to 40 us; most answers take 3.
const SPIN: Duration = Duration::from_micros(50);

/// The most questions of one `call_many` that are out at once. Each of many keys is answered in a few packets of 64 KiB,
/// and a node gives a client up that lets 4 MiB of answers wait.
const QUESTIONS_IN_FLIGHT: usize = 64;

/// What becomes of an answer whose asker has gone: it may hold a pin, a reservation or a granted segment.
pub(crate) type LateHook = Box<dyn Fn(Answer) + Send + Sync>;

/// A client's connection to the node on its machine.
pub struct UnixSession {
    socket: OwnedFd,
    /// The socket's path, for errors.
    peer: String,
    next_request: AtomicU64,
    desk: Mutex<Desk>,
    late: OnceLock<LateHook>,
    /// Whether whoever waits in this process is to stop; see [`UnixSession::interrupt_when`].
    is_over: OnceLock<fn() -> bool>,
}

/// Who waits, and who reads.
struct Desk {
    /// Here while nobody reads.
    reader: Option<Reader>,
    slots: HashMap<u64, Slot>,
    /// Why the node is gone.
    lost: Option<Text>,
}

type Text = Cow<'static, str>;

/// One question that is out.
struct Slot {
    answer: Option<Delivered>,
    /// What has come of an answer in several packets.
    parts: Option<LocatedMany>,
    owner: Arc<Condvar>,
    /// Whether the owner sleeps on its condvar: only such an owner can be told to read.
    owner_waits: bool,
}

enum Delivered {
    /// Boxed: most of it is the room for the longest reply.
    Answer(Box<Result<Answer, StoreError>>),
    Lost,
}

/// The receive side of the socket.
struct Reader {
    buffer: Box<[u8]>,
    descriptors: Vec<OwnedFd>,
}

type Received = (u64, Result<Answer, StoreError>);

/// A question that was sent. Dropping it unanswered makes the answer late.
pub(crate) struct Ticket<'a> {
    session: &'a UnixSession,
    message: &'a ClientMessage,
    request: u64,
}

impl fmt::Debug for UnixSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixSession").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl UnixSession {
    /// Connects to the node that listens at `path`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] when nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, StoreError> {
        let socket = socket::connect(path).map_err(|error| match error {
            StoreError::Unavailable { why, .. } => StoreError::unavailable(
                format!("the node at {}", path.display()),
                format!("{why} (is `hetmem serve` running? --socket or HETMEM_SOCKET names another path)"),
            ),
            error => error,
        })?;
        Self::over(socket, path.display().to_string())
    }

    /// Speaks over a connected SEQPACKET socket; `peer` names the other end in errors.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the socket takes no timeout.
    pub fn over(socket: OwnedFd, peer: String) -> Result<Self, StoreError> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&socket, Timeout::Recv, Some(RECEIVE_TICK))
            .map_err(|error| StoreError::os("set the receive timeout of the node's socket", error))?;
        let reader =
            Reader { buffer: vec![0; socket::PACKET_LEN_MAX].into_boxed_slice(), descriptors: Vec::new() };
        Ok(Self {
            socket,
            peer,
            next_request: AtomicU64::new(1),
            desk: Mutex::new(Desk { reader: Some(reader), slots: HashMap::new(), lost: None }),
            late: OnceLock::new(),
            is_over: OnceLock::new(),
        })
    }

    /// Says what to do with late answers; only the first call counts. Without it their descriptors are closed.
    pub(crate) fn on_late(&self, hook: LateHook) {
        let _ = self.late.set(hook);
    }

    /// Has waiting calls ask `is_over` after a signal, and between two ticks; only the first call counts.
    pub(crate) fn interrupt_when(&self, is_over: fn() -> bool) {
        let _ = self.is_over.set(is_over);
    }

    /// The socket.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether to stop waiting. Whoever asks holds no lock: the answer may need one of the caller's.
    fn is_over(&self) -> bool {
        self.is_over.get().is_some_and(|is_over| is_over())
    }

    /// Sends a question.
    pub(crate) fn submit<'a>(
        &'a self,
        message: &'a ClientMessage,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<Ticket<'a>, StoreError> {
        let request = self.take_place(message)?;
        // From here on the ticket's drop takes the slot back.
        let ticket = Ticket { session: self, message, request };
        self.transmit(request, message, payload, timeout)?;
        Ok(ticket)
    }

    /// Makes room for an answer, and returns the number of its question.
    fn take_place(&self, message: &ClientMessage) -> Result<u64, StoreError> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let slot = Slot { answer: None, parts: None, owner: Arc::default(), owner_waits: false };
        let mut desk = self.desk.lock();
        if let Some(why) = &desk.lost {
            return Err(self.lost_error(message, why));
        }
        desk.slots.insert(request, slot);
        Ok(request)
    }

    /// Sends a question whose answer [`UnixSession::finish`] takes. An answer that is never taken stays here.
    pub(crate) fn begin(&self, message: &ClientMessage, timeout: Duration) -> Result<u64, StoreError> {
        let request = self.take_place(message)?;
        self.transmit(request, message, &[], timeout).inspect_err(|_| {
            self.desk.lock().slots.remove(&request);
        })?;
        Ok(request)
    }

    /// The answer to a question that was begun, if it is there; reads what is in the socket unless somebody does.
    pub(crate) fn finish(&self, request: u64) -> Option<Result<Answer, StoreError>> {
        let mut desk = self.desk.lock();
        if desk.slots.get(&request).is_some_and(|slot| slot.answer.is_none())
            && let Some(mut reader) = desk.reader.take()
        {
            drop(desk);
            let received = match self.poll(PollFlags::IN, Instant::now()) {
                Ok(flags) if flags.is_empty() => Ok(None),
                _ => self.receive(&mut reader, Instant::now() + RECEIVE_TICK),
            };
            self.settle(self.desk.lock(), reader, received);
            desk = self.desk.lock();
            hand_over(&mut desk);
        }
        desk.slots.get(&request).filter(|slot| slot.answer.is_some())?;
        match desk.slots.remove(&request)?.answer? {
            Delivered::Answer(answer) => Some(*answer),
            Delivered::Lost => Some(Err(StoreError::protocol(desk.lost.clone().unwrap_or_default()))),
        }
    }

    /// Says something that has no answer.
    pub(crate) fn tell_unanswered(&self, message: &ClientMessage) {
        let _ = self.transmit(0, message, &[], RECEIVE_TICK);
    }

    /// Sends a question whose answer is of no interest.
    pub(crate) fn tell(&self, message: &ClientMessage) {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        // A message that cannot be sent leaves the node to find out when the session ends.
        let _ = self.transmit(request, message, &[], RECEIVE_TICK);
    }

    fn transmit(
        &self,
        request: u64,
        message: &ClientMessage,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<(), StoreError> {
        if payload.len() > socket::PAYLOAD_LEN_MAX {
            let (len, limit) = (payload.len() as u64, socket::PAYLOAD_LEN_MAX as u64);
            return Err(StoreError::too_large(message.name(), "payload of a packet in bytes", len, limit));
        }
        let frame = encode(FrameKind::Client, request, message, payload.len() as u64)?;
        let parts = [IoSlice::new(frame.as_bytes()), IoSlice::new(payload)];
        let parts = if payload.is_empty() { &parts[..1] } else { &parts[..] };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut deadline = None;
        loop {
            let nothing = &mut SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.socket, parts, nothing, flags) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + timeout);
                    if Instant::now() >= deadline {
                        return Err(timed_out(message, timeout));
                    }
                    self.make_room(deadline);
                }
                Err(errno) => {
                    let why = format!("a message could not be sent: {errno}");
                    return Err(self.lose(message, why.into()));
                }
            }
        }
    }

    /// Waits until the socket may take another packet. A node that waits for us to read would never get there, so
    /// answers are read meanwhile unless someone does already.
    fn make_room(&self, deadline: Instant) {
        let reader = self.desk.lock().reader.take();
        let events = match reader {
            Some(_) => PollFlags::OUT | PollFlags::IN,
            None => PollFlags::OUT,
        };
        let ready = self.poll(events, deadline.min(Instant::now() + RECEIVE_TICK));
        if let Some(reader) = reader {
            self.read_if(ready, reader);
        }
    }

    /// Reads the answers that are there, unless someone does already.
    fn take_in(&self) {
        loop {
            let Some(reader) = self.desk.lock().reader.take() else { return };
            if !self.read_if(self.poll(PollFlags::IN, Instant::now()), reader) {
                return;
            }
        }
    }

    /// Reads one packet if there is one, and gives the receive side to whom it belongs next. Whether it has read one.
    fn read_if(&self, ready: Result<PollFlags, rustix::io::Errno>, mut reader: Reader) -> bool {
        let received = match ready {
            Ok(flags) if flags.contains(PollFlags::IN) => {
                self.receive(&mut reader, Instant::now() + RECEIVE_TICK)
            }
            _ => Ok(None),
        };
        let has_read = matches!(received, Ok(Some(_)));
        let desk = self.desk.lock();
        self.settle(desk, reader, received);
        hand_over(&mut self.desk.lock());
        has_read
    }

    /// Reads one packet; `None` when the deadline passes first. An error says why the node is lost.
    fn receive(&self, reader: &mut Reader, deadline: Instant) -> Result<Option<Received>, Text> {
        self.spin();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if left < RECEIVE_TICK {
                match self.poll(PollFlags::IN, deadline) {
                    Ok(flags) if flags.is_empty() => return Ok(None),
                    Ok(_) => {}
                    Err(error) => return Err(format!("its socket cannot be polled: {error}").into()),
                }
            }
            reader.descriptors.clear();
            match socket::recv(&self.socket, &mut reader.buffer, &mut reader.descriptors) {
                Ok(0) => return Err("the connection was closed".into()),
                Ok(len) => return reader.decode(len).map(Some),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {
                        if self.is_over.get().is_some() {
                            return Ok(None);
                        }
                    }
                    io::ErrorKind::InvalidData => {
                        let remedy = "raise the limit of open files (ulimit -n) if descriptors were lost";
                        return Err(format!("a packet could not be received: {error} ({remedy})").into());
                    }
                    _ => return Err(format!("its socket cannot be read: {error}").into()),
                },
            }
        }
    }

    /// Waits a moment for an answer without sleeping.
    fn spin(&self) {
        let started = Instant::now();
        while started.elapsed() < SPIN
            && matches!(self.poll(PollFlags::IN, started), Ok(flags) if flags.is_empty())
        {
            rustix::thread::sched_yield();
        }
    }

    fn poll(&self, events: PollFlags, deadline: Instant) -> Result<PollFlags, rustix::io::Errno> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&self.socket, events)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) => return Ok(fds[0].revents()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Puts the receive side back, gives what was read to whom it belongs, and returns with the desk unlocked.
    fn settle(
        &self,
        mut desk: MutexGuard<'_, Desk>,
        reader: Reader,
        received: Result<Option<Received>, Text>,
    ) {
        desk.reader = Some(reader);
        let late = match received {
            Ok(None) => None,
            Ok(Some((request, answer))) => match desk.slots.get_mut(&request) {
                Some(slot) if slot.answer.is_none() => {
                    if let Some(whole) = slot.assemble(answer) {
                        slot.answer = Some(Delivered::Answer(Box::new(whole)));
                        slot.owner.notify_one();
                    }
                    None
                }
                _ => answer.ok(),
            },
            Err(why) => {
                desk.lose(why);
                None
            }
        };
        drop(desk);
        self.dispose(late);
    }

    /// Late answers are rare and may need more questions, so the desk must be unlocked here.
    fn dispose(&self, late: Option<Answer>) {
        if let (Some(answer), Some(hook)) = (late, self.late.get()) {
            hook(answer);
        }
    }

    fn lose(&self, message: &ClientMessage, why: Text) -> StoreError {
        let mut desk = self.desk.lock();
        desk.lose(why);
        let why = desk.lost.clone().unwrap_or_default();
        drop(desk);
        self.lost_error(message, &why)
    }

    fn lost_error(&self, message: &ClientMessage, why: &str) -> StoreError {
        StoreError::PeerLost {
            operation: message.name().into(),
            subject: subject(message).to_owned(),
            peer: format!("node at {}", self.peer),
            why: format!("{why} (is `hetmem serve` running? connect again)").into(),
        }
    }
}

impl Session for UnixSession {
    fn call(&self, message: &ClientMessage, payload: &[u8], timeout: Duration) -> Result<Answer, StoreError> {
        self.submit(message, payload, timeout)?.wait(timeout)
    }

    fn call_many(&self, messages: &[ClientMessage], timeout: Duration) -> Vec<Result<Answer, StoreError>> {
        let mut answers = Vec::with_capacity(messages.len());
        let mut out: VecDeque<Result<Ticket<'_>, StoreError>> = VecDeque::new();
        let mut rest = messages.iter();
        loop {
            while out.len() < QUESTIONS_IN_FLIGHT
                && let Some(message) = rest.next()
            {
                out.push_back(self.submit(message, &[], timeout));
                // A node does not wait for who lets answers pile up.
                self.take_in();
            }
            let Some(ticket) = out.pop_front() else {
                return answers;
            };
            answers.push(ticket.and_then(|ticket| ticket.wait(timeout)));
            if matches!(answers.last(), Some(Err(_))) && self.is_over() {
                let rest = messages.get(answers.len()..).unwrap_or_default();
                answers.extend(rest.iter().map(|message| Err(interrupted(message))));
                return answers;
            }
        }
    }
}

impl Slot {
    /// Takes one packet of the answer; the answer once it is whole.
    fn assemble(&mut self, answer: Result<Answer, StoreError>) -> Option<Result<Answer, StoreError>> {
        let (part, descriptors) = match answer {
            Ok(Answer { reply: ClientReply::LocatedMany(part), descriptors }) => (part, descriptors),
            whole => return Some(whole),
        };
        let mut many = self.parts.take().unwrap_or_default();
        many.append(part);
        if many.left > 0 {
            if many.items.len() < KEYS_PER_MESSAGE_MAX {
                self.parts = Some(many);
                return None;
            }
            // More than can have been asked for: what there is has to do.
            many.left = 0;
        }
        Some(Ok(Answer { reply: ClientReply::LocatedMany(many), descriptors }))
    }

    /// What the node has handed over, if its owner has gone.
    fn abandoned(self) -> Option<Answer> {
        match self.answer {
            Some(Delivered::Answer(answer)) => answer.ok(),
            Some(Delivered::Lost) | None => {
                let reply = ClientReply::LocatedMany(self.parts?);
                Some(Answer { reply, descriptors: Vec::new() })
            }
        }
    }
}

impl Desk {
    /// The first reason stays: later ones follow from it.
    fn lose(&mut self, why: Text) {
        self.lost.get_or_insert(why);
        for slot in self.slots.values_mut().filter(|slot| slot.answer.is_none()) {
            slot.answer = Some(Delivered::Lost);
            slot.owner.notify_one();
        }
    }
}

/// Tells one sleeper to read, if nobody does. Everyone who stops waiting calls this.
fn hand_over(desk: &mut Desk) {
    if desk.reader.is_none() {
        return;
    }
    if let Some(next) = desk.slots.values().find(|slot| slot.owner_waits && slot.answer.is_none()) {
        next.owner.notify_one();
    }
}

impl Ticket<'_> {
    /// Waits for the answer, and reads for everyone while nobody else does. On the way out the desk is unlocked
    /// before the ticket is dropped, which locks it again.
    pub(crate) fn wait(self, timeout: Duration) -> Result<Answer, StoreError> {
        let session = self.session;
        let deadline = Instant::now() + timeout;
        let mut desk = session.desk.lock();
        loop {
            let Some(slot) = desk.slots.get_mut(&self.request) else {
                return Err(StoreError::protocol("a question has lost its place"));
            };
            if let Some(answer) = slot.answer.take() {
                return match answer {
                    Delivered::Answer(answer) => *answer,
                    Delivered::Lost => {
                        let why = desk.lost.clone().unwrap_or_default();
                        Err(session.lost_error(self.message, &why))
                    }
                };
            }
            if Instant::now() >= deadline {
                return Err(timed_out(self.message, timeout));
            }
            if let Some(mut reader) = desk.reader.take() {
                drop(desk);
                let received = session.receive(&mut reader, deadline);
                let nothing = matches!(received, Ok(None));
                session.settle(session.desk.lock(), reader, received);
                if nothing && session.is_over() {
                    return Err(interrupted(self.message));
                }
                desk = session.desk.lock();
            } else if let Some(slot) = desk.slots.get_mut(&self.request) {
                slot.owner_waits = true;
                let owner = Arc::clone(&slot.owner);
                // A sleeper hears of no signal.
                let tick = session.is_over.get().map(|_| Instant::now() + SLEEP_TICK);
                let woken = !owner
                    .wait_until(&mut desk, tick.map_or(deadline, |tick| tick.min(deadline)))
                    .timed_out();
                if let Some(slot) = desk.slots.get_mut(&self.request) {
                    slot.owner_waits = false;
                }
                if tick.is_some() && !woken {
                    drop(desk);
                    if session.is_over() {
                        return Err(interrupted(self.message));
                    }
                    desk = session.desk.lock();
                }
            }
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut desk = self.session.desk.lock();
        let slot = desk.slots.remove(&self.request);
        hand_over(&mut desk);
        drop(desk);
        self.session.dispose(slot.and_then(Slot::abandoned));
    }
}

impl Reader {
    fn decode(&mut self, len: usize) -> Result<Received, Text> {
        let broken = |error: StoreError| Text::from(format!("it sent what is no answer: {error}"));
        let packet = self.buffer.get(..len).unwrap_or_default();
        let Some((header, rest)) = packet.split_first_chunk::<HEADER_LEN>() else {
            return Err(format!("it sent a packet of {len} bytes, a header alone has {HEADER_LEN}").into());
        };
        let header = FrameHeader::parse(header).map_err(broken)?;
        if header.kind != FrameKind::Reply {
            return Err(format!("it sent a {:?} frame where an answer belongs", header.kind).into());
        }
        if header.payload_len != 0 || rest.len() as u64 != u64::from(header.body_len) {
            let stated = u64::from(header.body_len).saturating_add(header.payload_len);
            return Err(format!("it sent {} bytes after a header that says {stated}", rest.len()).into());
        }
        let reply: Result<ClientReply, StoreError> = decode(rest).map_err(broken)?;
        let descriptors = std::mem::take(&mut self.descriptors);
        let answer = reply.map(|reply| Answer { reply, descriptors });
        Ok((header.request, answer))
    }
}

fn interrupted(message: &ClientMessage) -> StoreError {
    StoreError::busy(format!("{} {:?}", message.name(), subject(message)), "the wait was interrupted")
}

fn timed_out(message: &ClientMessage, timeout: Duration) -> StoreError {
    let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    StoreError::timed_out(message.name(), subject(message), millis)
}

/// What a message is about, for errors.
fn subject(message: &ClientMessage) -> &str {
    match message {
        ClientMessage::Put { key, .. }
        | ClientMessage::Reserve { key, .. }
        | ClientMessage::Get { key, .. }
        | ClientMessage::Wait { key, .. }
        | ClientMessage::Stat { key, .. }
        | ClientMessage::Delete { key }
        | ClientMessage::Pin { key, .. }
        | ClientMessage::Evict { key, .. } => Key::as_str(key),
        ClientMessage::GetMany { keys, .. } => keys.first().map_or("", Key::as_str),
        ClientMessage::List { prefix, .. } => prefix,
        _ => "",
    }
}
