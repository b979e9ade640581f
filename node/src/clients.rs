//! Sessions of clients and the answers that go to them. Not what clients ask (`hetmem_core::engine`), and not what they
//! send (`reactor`). Invariant: a client that does not take its answers loses its session, and nobody waits for it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use hetmem_core::engine::Input;
use hetmem_core::wire::{ClientReply, FrameKind, LocatedMany, encode};
use hetmem_core::{ClientId, StoreError};
use hetmem_host_mem::NodePage;
use hetmem_host_mem::socket;
use parking_lot::Mutex;
use rustix::event::epoll;

use crate::driver::{Descriptors, Driver};
use crate::inprocess::Slots;
use crate::reactor::Source;

/// Bytes of answers that may wait for a client that does not read, before it is closed. A client that asks for many
/// things at once has some kilobytes under way.
const UNREAD_BYTES_MAX: usize = 4 << 20;
/// What an answer costs beyond its bytes, for the count of them.
const ANSWER_COST: usize = 256;

struct Packet {
    bytes: Vec<u8>,
    descriptors: Descriptors,
}

impl Packet {
    fn cost(&self) -> usize {
        self.bytes.len() + ANSWER_COST
    }
}

/// What a socket did not take yet.
#[derive(Default)]
struct Unread {
    packets: VecDeque<Packet>,
    cost: usize,
}

/// A session with another process.
pub(crate) struct Remote {
    client: ClientId,
    socket: OwnedFd,
    /// Where the socket is watched.
    epoll: Arc<OwnedFd>,
    unread: Mutex<Unread>,
    /// Whether anything ever came from it.
    has_spoken: AtomicBool,
    closing: AtomicBool,
}

pub(crate) enum Channel {
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
    pub(crate) fn next_id(&self) -> ClientId {
        ClientId(self.next.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Adds a session inside this process.
    pub(crate) fn join_inside(&self, driver: &Driver, slots: Arc<Slots>) -> Result<ClientId, StoreError> {
        let client = self.next_id();
        self.join(driver, client, Channel::Inside(slots), true)?;
        Ok(client)
    }

    pub(crate) fn join(
        &self,
        driver: &Driver,
        client: ClientId,
        channel: Channel,
        trusted: bool,
    ) -> Result<(), StoreError> {
        let page = Arc::new(NodePage::create()?);
        driver.core.lock().pages.insert(client, page);
        self.channels.lock().insert(client, channel);
        driver.feed(Input::ClientJoined { client, trusted });
        Ok(())
    }

    /// Ends a session: its pins, reservations and waits are gone.
    pub(crate) fn leave(&self, driver: &Driver, client: ClientId) {
        if self.channels.lock().remove(&client).is_some() {
            driver.client_left(client);
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
                return slots.deliver(driver, client, request, reply, descriptors);
            }
            None => return,
        };
        remote.answer(driver, request, &reply, descriptors);
    }

    /// Answers with many objects, in as many packets as it takes.
    pub(crate) fn reply_many(&self, driver: &Driver, client: ClientId, request: u64, many: LocatedMany) {
        let remote = match self.channels.lock().get(&client) {
            Some(Channel::Unix(remote)) => Arc::clone(remote),
            Some(Channel::Inside(slots)) => {
                let slots = Arc::clone(slots);
                let reply = Ok(ClientReply::LocatedMany(many));
                return slots.deliver(driver, client, request, reply, &Descriptors::None);
            }
            None => return,
        };
        // The variants of result and reply take a byte each.
        for part in many.parts(socket::BODY_LEN_MAX - 2) {
            let reply = Ok(ClientReply::LocatedMany(part));
            if !remote.answer(driver, request, &reply, &Descriptors::None) {
                return;
            }
        }
    }
}

impl Descriptors {
    pub(crate) fn with<R>(&self, f: impl FnOnce(&[BorrowedFd<'_>]) -> R) -> R {
        match self {
            Self::None => f(&[]),
            Self::Session(index, page) => f(&[index.descriptor(), page.descriptor()]),
            Self::Segment(segment) => f(&[segment.descriptor()]),
            Self::Ahead(ring, segment) => {
                let ring = ring.as_deref().map(AsFd::as_fd);
                let segment = segment.as_ref().map(|segment| segment.descriptor());
                f(&Vec::from_iter(ring.into_iter().chain(segment)))
            }
        }
    }

    fn keep(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Session(index, page) => Self::Session(Arc::clone(index), Arc::clone(page)),
            Self::Segment(segment) => Self::Segment(segment.clone()),
            Self::Ahead(ring, segment) => Self::Ahead(ring.clone(), segment.clone()),
        }
    }
}

impl Remote {
    pub(crate) fn new(client: ClientId, socket: OwnedFd, epoll: Arc<OwnedFd>) -> Self {
        Self {
            client,
            socket,
            epoll,
            unread: Mutex::default(),
            has_spoken: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        }
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(crate) fn has_spoken(&self) -> bool {
        self.has_spoken.load(Ordering::Relaxed)
    }

    pub(crate) fn has_said_something(&self) {
        self.has_spoken.store(true, Ordering::Relaxed);
    }

    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // The thread that owns the socket wakes up and ends the session.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Sends an answer; false if the session cannot go on after that.
    fn answer(
        &self,
        driver: &Driver,
        request: u64,
        reply: &Result<ClientReply, StoreError>,
        descriptors: &Descriptors,
    ) -> bool {
        let frame = match encode(FrameKind::Reply, request, reply, 0) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "an answer cannot be encoded");
                self.close();
                return false;
            }
        };
        if let Err(why) = self.send(frame.into_bytes(), descriptors) {
            if !self.is_closing() {
                driver.refuse();
                tracing::warn!(client = %self.client, why, "a client is closed");
            }
            self.close();
            return false;
        }
        true
    }

    /// Sends, or keeps what the socket does not take; the error says why the session cannot go on.
    pub(crate) fn send(&self, bytes: Vec<u8>, descriptors: &Descriptors) -> Result<(), &'static str> {
        let mut unread = self.unread.lock();
        if unread.packets.is_empty() {
            match descriptors.with(|fds| socket::send(&self.socket, &[IoSlice::new(&bytes)], fds)) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It has gone, which its socket tells the thread that watches it.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(_) => return Err("its socket does not take an answer"),
            }
        }
        let packet = Packet { bytes, descriptors: descriptors.keep() };
        unread.cost += packet.cost();
        if unread.cost > UNREAD_BYTES_MAX {
            return Err("it does not read its answers");
        }
        unread.packets.push_back(packet);
        self.watch_for_room(&unread);
        Ok(())
    }

    /// Sends what waits.
    pub(crate) fn flush(&self) {
        let mut unread = self.unread.lock();
        while let Some(packet) = unread.packets.front() {
            let sent = packet
                .descriptors
                .with(|fds| socket::send(&self.socket, &[IoSlice::new(&packet.bytes)], fds));
            match sent {
                Ok(()) => {
                    unread.cost -= packet.cost();
                    unread.packets.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.close(),
            }
        }
        self.watch_for_room(&unread);
    }

    /// Answers are written by whichever thread has them; the one that watches the socket learns here whether to wait
    /// for room in it. Under the lock, so that the last one to look decides.
    fn watch_for_room(&self, unread: &Unread) {
        let mut wanted = epoll::EventFlags::IN;
        wanted.set(epoll::EventFlags::OUT, !unread.packets.is_empty());
        // Fails only when the session is over.
        let _ = epoll::modify(&self.epoll, &self.socket, Source::Client(self.client).pack(), wanted);
    }
}
