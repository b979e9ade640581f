//! A data stream on the asking side: requests go out, answers come back in their order, and their bytes are received
//! straight into the local extents. Which slice is asked for when is in `reads`. Invariant: bytes land only within a
//! turn, and a lost stream's slices are given back within a turn too, so nothing lands for them afterwards.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::ErrorKind;
use hetmem_core::StoreError;
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::link::Link;
use super::reads::{Answered, Next, Slice, WORD_LEN};
use super::shared::{Conn, Shared, Task};
use super::sys::{Got, Socket};
use super::turn::Turn;
use super::wire::{ANSWER_LEN, Answer, FabricMessage, Request, StreamToken, error_from};
use crate::region::{Piece, Unmoved};

/// Bytes received before other connections get their turn.
const RECEIVE_BUDGET: usize = 8 << 20;

pub(super) struct ReadStream {
    pub(super) link: Arc<Link>,
    socket: Socket,
    turn: Turn,
    writable: AtomicBool,
    lost: Mutex<Lost>,
    out: Mutex<Out>,
    inbox: Mutex<Inbox>,
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

/// What has been received of the answer under way.
#[derive(Default)]
struct Inbox {
    head: [u8; ANSWER_LEN],
    head_len: usize,
    answer: Option<Incoming>,
}

enum Incoming {
    Bytes { slice: Slice, local: Piece, done: usize },
    Word { bytes: [u8; WORD_LEN], done: usize },
    Refusal { kind: ErrorKind, text: Vec<u8>, len: usize },
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
            inbox: Mutex::default(),
        });
        shared.insert(id, Conn::Read(Arc::clone(&stream)));
        shared.set_deadline(id, shared.config.handshake_timeout);
        let watched = shared.epoll.add(&stream.socket, id, EventFlags::OUT | EventFlags::ONESHOT);
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
        shared.epoll.modify(&self.socket, self.socket.id, flags);
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
        let mut inbox = self.inbox.lock();
        let mut budget = RECEIVE_BUDGET;
        while budget > 0 && !self.is_lost() {
            let (got, wanted) = inbox.receive(&self.socket)?;
            let count = match got {
                Got::Bytes(count) => count,
                Got::Nothing => return Ok(()),
                Got::End => return Err(StoreError::unavailable("its data stream", "the peer closed it")),
            };
            budget = budget.saturating_sub(count);
            if let Some(answered) = inbox.complete() {
                self.answered(shared, answered);
            }
            if inbox.head_len == ANSWER_LEN && inbox.answer.is_none() {
                let slice = self.link.reads.lock().expected(self);
                inbox.begin(slice)?;
                // An answer without bytes is complete at once.
                if let Some(answered) = inbox.complete() {
                    self.answered(shared, answered);
                }
            } else if count < wanted {
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

impl Inbox {
    /// Receives once: the rest of the answer under way and the next answer's head, in one call. Returns what came
    /// and what there was room for.
    fn receive(&mut self, socket: &Socket) -> Result<(Got, usize), StoreError> {
        let failed = |error: Errno| StoreError::os("receive a read's bytes", error);
        match &mut self.answer {
            None => {
                let room = &mut self.head[self.head_len..];
                let wanted = room.len();
                let got = socket.receive(room).map_err(failed)?;
                if let Got::Bytes(count) = got {
                    self.head_len += count;
                }
                Ok((got, wanted))
            }
            Some(Incoming::Refusal { text, len, .. }) => {
                let mut buffer = vec![0; *len - text.len()];
                let got = socket.receive(&mut buffer).map_err(failed)?;
                if let Got::Bytes(count) = got {
                    text.extend_from_slice(&buffer[..count]);
                }
                Ok((got, buffer.len()))
            }
            Some(Incoming::Word { bytes, done }) => {
                let wanted = bytes.len() - *done;
                let got = socket.receive(&mut bytes[*done..]).map_err(failed)?;
                if let Got::Bytes(count) = got {
                    *done += count;
                }
                Ok((got, wanted))
            }
            Some(Incoming::Bytes { slice, local, done }) => {
                let left = local.len() - *done;
                let wanted = left + self.head.len();
                match local.receive(socket.as_fd(), *done, &mut self.head) {
                    Ok(count) => {
                        *done += count.min(left);
                        self.head_len = count.saturating_sub(left);
                        Ok((Got::of(Ok(count)).map_err(failed)?, wanted))
                    }
                    Err(Unmoved::Os(error)) => Ok((Got::of(Err(error)).map_err(failed)?, wanted)),
                    Err(Unmoved::Closed) => {
                        let subject = format!("transfer {}", slice.transfer);
                        Err(StoreError::stale("read", subject, "the local segment was deregistered"))
                    }
                }
            }
        }
    }

    /// A head is there: from now on its bytes are received.
    fn begin(&mut self, slice: Option<Slice>) -> Result<(), StoreError> {
        let Some(slice) = slice else {
            return Err(StoreError::protocol("an answer came on a data stream that asked for nothing"));
        };
        let answer = Answer::parse(self.head, slice.number, slice.remote.len_bytes)?;
        self.head_len = 0;
        self.answer = Some(match (answer.error, slice.local.clone()) {
            (None, Some(local)) => Incoming::Bytes { slice, local, done: 0 },
            (None, None) => Incoming::Word { bytes: [0; WORD_LEN], done: 0 },
            (Some(kind), _) => {
                let len = usize::try_from(answer.len_bytes).unwrap_or(0);
                Incoming::Refusal { kind, text: Vec::with_capacity(len), len }
            }
        });
        Ok(())
    }

    /// Takes the answer if it is complete.
    fn complete(&mut self) -> Option<Answered> {
        let answered = match self.answer.as_ref()? {
            Incoming::Bytes { local, done, .. } if *done == local.len() => Answered::Bytes,
            // As it lies in the owner's memory: the protocol fixes little-endian for what it means.
            Incoming::Word { bytes, done } if *done == WORD_LEN => Answered::Word(u64::from_le_bytes(*bytes)),
            Incoming::Refusal { kind, text, len } if text.len() == *len => {
                Answered::Refused(error_from(*kind, text))
            }
            Incoming::Bytes { .. } | Incoming::Word { .. } | Incoming::Refusal { .. } => return None,
        };
        self.answer = None;
        Some(answered)
    }
}
