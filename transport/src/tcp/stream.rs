//! A data stream on the asking side: requests go out, answers come back in their order, and their bytes are received
//! straight into the local extents. Which slice is asked for when is in `reads`. Invariant: bytes land only within a
//! turn, and a lost stream's slices are given back within a turn too, so nothing lands for them afterwards.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::ErrorKind;
use hetmem_core::StoreError;
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::answers::{Answers, Received};
use super::link::Link;
use super::reads::{Answered, Next};
use super::shared::{Conn, Shared, Task};
use super::sys::Socket;
use super::wire::{FabricMessage, Request, StreamToken};
use crate::turn::Turn;

/// Bytes received before other connections get their turn.
const RECEIVE_BUDGET: usize = 8 << 20;

pub(super) struct ReadStream {
    pub(super) link: Arc<Link>,
    socket: Socket,
    turn: Turn,
    writable: AtomicBool,
    lost: Mutex<Lost>,
    out: Mutex<Out>,
    answers: Mutex<Answers>,
}

/// Whether the stream is to be given up.
#[derive(Default)]
enum Lost {
    #[default]
    No,
    /// Why, and whether the stream itself failed (it was not cut for a cancelled read).
    Yes(StoreError, bool),
    Done,
}

/// Requests that the socket has not taken.
#[derive(Default)]
struct Out {
    connected: bool,
    bytes: Vec<u8>,
}

impl ReadStream {
    /// Opens one more data stream of a link.
    ///
    /// # Errors
    /// `Os` if the system refuses.
    pub(super) fn open(
        shared: &Shared,
        link: &Arc<Link>,
        address: SocketAddr,
        token: StreamToken,
    ) -> Result<Arc<Self>, StoreError> {
        let id = shared.next_id();
        let socket = Socket::connecting(address, id)?;
        socket.buffers(0, shared.config.receive_buffer_bytes);
        let hello = FabricMessage::Stream { token }.frame()?;
        let stream = Arc::new(Self {
            link: Arc::clone(link),
            socket,
            turn: Turn::default(),
            writable: AtomicBool::new(false),
            lost: Mutex::default(),
            out: Mutex::new(Out { connected: false, bytes: hello.into_bytes() }),
            answers: Mutex::default(),
        });
        shared.insert(id, Conn::Read(Arc::clone(&stream)));
        shared.set_deadline(id, shared.config.handshake_timeout);
        let watched = shared.seats.events().add(&stream.socket, id, EventFlags::OUT | EventFlags::ONESHOT);
        if let Err(error) = watched {
            shared.remove(&stream.socket);
            return Err(error);
        }
        Ok(stream)
    }

    pub(super) fn note_writable(&self) {
        self.writable.store(true, Ordering::Release);
    }

    /// Adds a request; `flush` sends it. Called with `reads` locked, so requests and books have one order.
    pub(super) fn ask(&self, request: Request) {
        self.out.lock().bytes.extend_from_slice(&request.to_bytes());
    }

    /// Sends what the socket takes.
    pub(super) fn flush(self: &Arc<Self>, shared: &Shared) {
        let failed = {
            let mut out = self.out.lock();
            if !out.connected {
                return;
            }
            match self.write(&mut out) {
                Ok(()) if out.bytes.is_empty() => return,
                Ok(()) => {
                    self.watch(shared, &out);
                    return;
                }
                Err(error) => error,
            }
        };
        let why = StoreError::os("send a read request", failed);
        self.lose(shared, &self.link.lost_because("read", &why));
    }

    fn write(&self, out: &mut Out) -> Result<(), Errno> {
        while !out.bytes.is_empty() {
            match self.socket.send(&out.bytes) {
                Ok(count) => drop(out.bytes.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One event, then silence until asked again: while a thread receives, what arrives meanwhile wakes no other.
    fn watch(&self, shared: &Shared, out: &Out) {
        let mut flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ONESHOT;
        if !out.connected || !out.bytes.is_empty() {
            flags |= EventFlags::OUT;
        }
        shared.seats.events().modify(&self.socket, self.socket.id, flags);
    }

    /// Gives the stream up because it failed. Calls nobody: its slices go back in the next turn.
    pub(super) fn lose(self: &Arc<Self>, shared: &Shared, why: &StoreError) {
        self.give_up(shared, why, true);
    }

    /// Gives the stream up because it carries a read that was cancelled.
    pub(super) fn cut(self: &Arc<Self>, shared: &Shared, why: &StoreError) {
        self.give_up(shared, why, false);
    }

    fn is_lost(&self) -> bool {
        !matches!(*self.lost.lock(), Lost::No)
    }

    fn give_up(self: &Arc<Self>, shared: &Shared, why: &StoreError, guilty: bool) {
        {
            let mut lost = self.lost.lock();
            if !matches!(*lost, Lost::No) {
                return;
            }
            *lost = Lost::Yes(why.clone(), guilty);
        }
        self.socket.shut_down();
        shared.later(Task::Work(Conn::Read(Arc::clone(self))));
    }

    pub(super) fn shut_down(&self) {
        self.socket.shut_down();
    }

    pub(super) fn run(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.turn.run(|| {
            if !self.is_lost()
                && let Err(why) = self.advance(shared)
            {
                let why = if why.kind() == ErrorKind::Protocol {
                    shared.refuse(&self.link.address(), &why);
                    why
                } else {
                    self.link.lost_because("read", &why)
                };
                self.lose(shared, &why);
            }
            let lost = {
                let mut lost = self.lost.lock();
                match &*lost {
                    Lost::Yes(..) => Some(std::mem::replace(&mut *lost, Lost::Done)),
                    Lost::No | Lost::Done => None,
                }
            };
            if let Some(Lost::Yes(why, guilty)) = lost {
                self.give_back(shared, &why, guilty);
            }
        });
    }

    fn give_back(self: &Arc<Self>, shared: &Arc<Shared>, why: &StoreError, guilty: bool) {
        shared.remove(&self.socket);
        self.answers.lock().end();
        let mut next = Next::default();
        self.link.reads.lock().lost(self, why, guilty, &mut next);
        self.link.report_finished(shared, next.finished);
        self.link.push_reads(shared);
    }

    fn advance(self: &Arc<Self>, shared: &Arc<Shared>) -> Result<(), StoreError> {
        {
            let mut out = self.out.lock();
            if !out.connected {
                if !self.writable.load(Ordering::Acquire) {
                    return Ok(());
                }
                let address = self.link.address();
                self.socket
                    .connected()
                    .map_err(|error| StoreError::os(format!("open a data stream to {address}"), error))?;
                self.socket.prepare();
                out.connected = true;
                shared.clear_deadline(self.socket.id);
            }
            self.write(&mut out).map_err(|error| StoreError::os("send a read request", error))?;
        }
        self.receive(shared)?;
        if !self.is_lost() {
            self.watch(shared, &self.out.lock());
        }
        Ok(())
    }

    fn receive(self: &Arc<Self>, shared: &Arc<Shared>) -> Result<(), StoreError> {
        let mut answers = self.answers.lock();
        let mut budget = RECEIVE_BUDGET;
        while budget > 0 && !self.is_lost() {
            let expected = self.link.reads.lock().expected(self);
            let (count, may_have_more) = match answers.receive(&self.socket, &expected)? {
                Received::Bytes(count, may_have_more) => (count, may_have_more),
                Received::Nothing => return Ok(()),
                Received::End => {
                    return Err(StoreError::unavailable("its data stream", "the peer closed it"));
                }
            };
            budget = budget.saturating_sub(count);
            let mut expected = expected;
            while let Some(answered) = answers.next(&expected)? {
                self.answered(shared, answered);
                expected = self.link.reads.lock().expected(self);
            }
            if !may_have_more {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answered(self: &Arc<Self>, shared: &Arc<Shared>, answered: Answered) {
        let mut next = Next::default();
        self.link.reads.lock().answered(self, answered, shared.config.slice_bytes, &mut next);
        for stream in &next.flush {
            stream.flush(shared);
        }
        if !next.finished.is_empty() {
            self.link.report_finished(shared, next.finished);
        }
    }
}
