//! A data stream on the owner's side: requests come in, and the bytes of registered regions go out, by plain writes
//! from the mapping: over loopback, sendfile from the memfd brought 1.7 GiB/s where writes brought 2.8, and a region
//! need not be a file. Nothing in a request is believed: key, access and bounds are checked, and a bad one is answered
//! with the reason. Nothing here calls the sink. Invariant: answers have the order of the requests, and a stream on which one cannot be completed
//! is closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::{ErrorKind, RemoteExtent, StoreError};
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;

use super::link::Link;
use super::outbox::{Outbox, Outgoing, Wrote};
use super::shared::{Conn, Shared, Task};
use super::sys::{Got, Socket};
use super::wire::{ANSWER_LEN, Answer, REQUEST_LEN, Request, error_bytes};
use crate::fabric::SendToken;
use crate::payload::Gather;
use crate::turn::Turn;

/// The most answers that wait on one stream; further requests stay in the socket until some have gone out.
const ANSWERS_MAX: usize = 64;
/// Bytes of requests received at once.
const RECEIVE_LEN: usize = 32 * REQUEST_LEN;

pub(super) struct ServeStream {
    socket: Arc<Socket>,
    link: Arc<Link>,
    turn: Turn,
    closed: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// Received, and not a whole request yet.
    received: Vec<u8>,
    outbox: Outbox,
    prepared: bool,
    gone: bool,
}

impl ServeStream {
    pub(super) fn new(socket: Arc<Socket>, link: Arc<Link>, received: &[u8]) -> Self {
        let state =
            State { received: received.to_vec(), outbox: Outbox::default(), prepared: false, gone: false };
        Self { socket, link, turn: Turn::default(), closed: AtomicBool::new(false), state: Mutex::new(state) }
    }

    /// Gives the stream up. Calls nobody.
    pub(super) fn close(self: &Arc<Self>, shared: &Shared) {
        self.closed.store(true, Ordering::Release);
        self.socket.shut_down();
        shared.later(Task::Work(Conn::Serve(Arc::clone(self))));
    }

    pub(super) fn shut_down(&self) {
        self.socket.shut_down();
    }

    pub(super) fn run(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.turn.run(|| {
            let mut state = self.state.lock();
            if state.gone {
                return;
            }
            if !self.closed.load(Ordering::Acquire) {
                match self.advance(shared, &mut state) {
                    Ok(()) => return,
                    Err(why) if why.kind() == ErrorKind::Protocol => {
                        shared.refuse(&self.link.address(), &why);
                    }
                    Err(why) => {
                        tracing::debug!(peer = self.link.address(), %why, "data stream closed");
                    }
                }
            }
            state.gone = true;
            state.outbox = Outbox::default();
            shared.remove(&self.socket);
            self.socket.shut_down();
            self.link.remove_serving(self);
        });
    }

    fn advance(&self, shared: &Shared, state: &mut State) -> Result<(), StoreError> {
        if !state.prepared {
            state.prepared = true;
            self.socket.buffers(shared.config.send_buffer_bytes, 0);
        }
        let mut starved = false;
        loop {
            self.answer(shared, state)?;
            let mut settled = Vec::new();
            let wrote = state.outbox.write(&self.socket, &mut settled)?;
            if let Some((_, Err(error))) = settled.into_iter().find(|(_, result)| result.is_err()) {
                return Err(error);
            }
            let full = state.outbox.len() >= ANSWERS_MAX;
            if wrote == Wrote::Enough || starved || full {
                self.watch(shared, state);
                return Ok(());
            }
            let mut buffer = [0; RECEIVE_LEN];
            match self.socket.receive(&mut buffer).map_err(|error| StoreError::os("receive", error))? {
                Got::Bytes(count) => {
                    starved = count < RECEIVE_LEN;
                    state.received.extend_from_slice(&buffer[..count]);
                }
                Got::Nothing => starved = true,
                Got::End => return Err(StoreError::unavailable("its data stream", "the peer closed it")),
            }
        }
    }

    fn watch(&self, shared: &Shared, state: &State) {
        let mut flags = EventFlags::RDHUP | EventFlags::ONESHOT;
        if !state.outbox.is_empty() {
            flags |= EventFlags::OUT;
        }
        if state.outbox.len() < ANSWERS_MAX {
            flags |= EventFlags::IN;
        }
        shared.serving.modify(&self.socket, self.socket.id, flags);
    }

    /// Turns received requests into answers, as many as may wait.
    fn answer(&self, shared: &Shared, state: &mut State) -> Result<(), StoreError> {
        let mut used = 0;
        while state.outbox.len() < ANSWERS_MAX
            && let Some(bytes) = state.received[used..].first_chunk::<REQUEST_LEN>()
        {
            used += REQUEST_LEN;
            let request = Request::parse(*bytes)?;
            let outgoing = answer_to(shared, request).unwrap_or_else(|error| {
                tracing::debug!(peer = self.link.address(), %error, "read refused");
                refusal(request, &error)
            });
            state.outbox.push(outgoing);
        }
        state.received.drain(..used);
        Ok(())
    }
}

fn answer_to(shared: &Shared, request: Request) -> Result<Outgoing, StoreError> {
    let RemoteExtent { len_bytes, .. } = request.extent;
    let piece = shared.regions.remote(request.extent)?;
    let head = Answer { error: None, number: request.number, len_bytes }.to_bytes().to_vec();
    let (payload, word) =
        if piece.is_word() { (None, Some(piece)) } else { (Some(Gather::one(piece)), None) };
    Ok(Outgoing { head, payload, word, token: SendToken(0), sent: 0 })
}

fn refusal(request: Request, error: &StoreError) -> Outgoing {
    let text = error_bytes(error);
    let answer = Answer { error: Some(error.kind()), number: request.number, len_bytes: text.len() as u64 };
    let mut head = Vec::with_capacity(ANSWER_LEN + text.len());
    head.extend_from_slice(&answer.to_bytes());
    head.extend_from_slice(&text);
    Outgoing { head, payload: None, word: None, token: SendToken(0), sent: 0 }
}
