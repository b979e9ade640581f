//! An accepted connection until it has said what it is. Not a link yet: it may store a kilobyte and stay for the
//! length of the handshake's deadline, whatever it sends. Invariant: it becomes one other connection, or closes.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::StoreError;
use hetmem_core::wire::{HEADER_LEN, negotiate};
use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;

use super::link::{Link, Opening};
use super::serve::ServeStream;
use super::shared::{Conn, Shared, Task};
use super::sys::{Got, Socket};
use super::wire::{FabricMessage, HANDSHAKE_BODY_MAX, StreamToken};
use crate::turn::Turn;

pub(super) struct Inbound {
    socket: Arc<Socket>,
    turn: Turn,
    ended: AtomicBool,
    /// Why it must not stay, if so.
    doomed: Mutex<Option<StoreError>>,
    state: Mutex<State>,
}

enum State {
    Waiting(Vec<u8>),
    Became(Conn),
    Closed,
}

impl Inbound {
    pub(super) fn new(fd: OwnedFd, id: u64) -> Self {
        Self {
            socket: Arc::new(Socket::of_accepted(fd, id)),
            turn: Turn::default(),
            ended: AtomicBool::new(false),
            doomed: Mutex::new(None),
            state: Mutex::new(State::Waiting(Vec::new())),
        }
    }

    /// Begins to receive.
    pub(super) fn watch(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.socket.prepare();
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if let Err(why) = shared.serving.add(&self.socket, self.socket.id, flags) {
            *self.doomed.lock() = Some(why);
            self.run(shared);
        }
    }

    pub(super) fn peer(&self) -> String {
        self.socket.peer().map_or_else(|| "(gone)".to_owned(), |address| address.to_string())
    }

    pub(super) fn note_end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(super) fn shut_down(&self) {
        self.socket.shut_down();
    }

    pub(super) fn run(&self, shared: &Arc<Shared>) {
        let mut became = None;
        self.turn.run(|| {
            let mut state = self.state.lock();
            let doomed = self.doomed.lock().take();
            if matches!(*state, State::Waiting(_))
                && let Err(why) = doomed.map_or_else(|| self.receive(shared, &mut state), Err)
            {
                self.close(shared, &mut state, &why);
            }
            if let State::Became(conn) = &*state {
                became = Some(conn.clone());
            }
        });
        // An event that was meant for the successor may have come here.
        if let Some(conn) = became {
            if let Conn::Link(link) = &conn {
                if self.ended.load(Ordering::Acquire) {
                    link.note_end();
                }
                // This thread serves reads; a link's work may call the sink.
                return shared.later(Task::Work(conn));
            }
            conn.work(shared);
        }
    }

    pub(super) fn expire(&self, shared: &Arc<Shared>, timeout_ms: u64) {
        *self.doomed.lock() = Some(StoreError::timed_out("handshake with", self.peer(), timeout_ms));
        self.run(shared);
    }

    fn receive(&self, shared: &Arc<Shared>, state: &mut State) -> Result<(), StoreError> {
        let State::Waiting(bytes) = state else {
            return Ok(());
        };
        loop {
            let room = HEADER_LEN + HANDSHAKE_BODY_MAX as usize - bytes.len();
            let mut buffer = [0; HEADER_LEN + HANDSHAKE_BODY_MAX as usize];
            match self.socket.receive(&mut buffer[..room]) {
                Ok(Got::Bytes(count)) => bytes.extend_from_slice(&buffer[..count]),
                Ok(Got::Nothing) => return Ok(()),
                Ok(Got::End) => return Err(StoreError::protocol("the connection ended in its handshake")),
                Err(error) => return Err(StoreError::os("receive a handshake", error)),
            }
            if let Some((message, len)) = FabricMessage::parse(bytes)? {
                let rest = bytes.split_off(len);
                *state = State::Became(self.become_what(shared, &message, &rest)?);
                return Ok(());
            }
        }
    }

    fn become_what(
        &self,
        shared: &Arc<Shared>,
        message: &FabricMessage,
        rest: &[u8],
    ) -> Result<Conn, StoreError> {
        let conn = match *message {
            FabricMessage::Open { version_min, version_max, listen_port, token } => {
                let opened = negotiate(version_min, version_max).and_then(|version| {
                    let opened = Opening { version, listen_port, token };
                    Link::accepted(shared, &self.socket, opened, rest)
                });
                match opened {
                    Ok(link) => Conn::Link(link),
                    Err(error) => {
                        self.answer_refused(&error);
                        return Err(error);
                    }
                }
            }
            FabricMessage::Stream { token } => Conn::Serve(self.stream(shared, token, rest)?),
            FabricMessage::Opened { .. } | FabricMessage::Refused { .. } => {
                return Err(StoreError::protocol("a connection begins with an answer"));
            }
        };
        shared.clear_deadline(self.socket.id);
        shared.insert(self.socket.id, conn.clone());
        shared.inbound_is_over();
        if let Conn::Link(link) = &conn {
            // From here on it is for the threads that may call the sink.
            shared.serving.remove(&self.socket);
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if let Err(why) = shared.seats.events().add(&self.socket, self.socket.id, flags) {
                link.fail(shared, why);
            }
        }
        Ok(conn)
    }

    fn stream(
        &self,
        shared: &Arc<Shared>,
        token: StreamToken,
        rest: &[u8],
    ) -> Result<Arc<ServeStream>, StoreError> {
        let link = shared.tokens.lock().get(&token).map(Arc::clone);
        let Some(link) = link else {
            return Err(StoreError::denied("open a data stream", "its token is of no link of this node"));
        };
        let stream = Arc::new(ServeStream::new(Arc::clone(&self.socket), Arc::clone(&link), rest));
        link.add_serving(shared, &stream)?;
        Ok(stream)
    }

    /// Says why, as far as the socket takes it at once.
    fn answer_refused(&self, error: &StoreError) {
        if let Ok(frame) = (FabricMessage::Refused { error: error.clone() }).frame() {
            let _ = self.socket.send(frame.as_bytes());
        }
    }

    fn close(&self, shared: &Arc<Shared>, state: &mut State, why: &StoreError) {
        if !matches!(state, State::Waiting(_)) {
            return;
        }
        *state = State::Closed;
        shared.remove(&self.socket);
        shared.inbound_is_over();
        shared.refuse(&self.peer(), why);
        self.socket.shut_down();
    }
}
