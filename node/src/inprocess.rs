//! Sessions inside the node's own process: the calling thread runs the engine, sends, and waits for its own answer
//! on the fabric, so a get from a peer costs no hand-off between threads. Not for other processes (`clients`).
//! Invariant: a call that returned has no answer left under way.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hetmem_core::engine::Input;
use hetmem_core::wire::{ClientMessage, ClientReply, PlacedItem};
use hetmem_core::{ClientId, StoreError};
use hetmem_host_mem::{Answer, Session};
use hetmem_transport::FabricKind;
use parking_lot::Mutex;

use crate::driver::{Descriptors, Driver};

thread_local! {
    static IN_SINK: Cell<Option<FabricKind>> = const { Cell::new(None) };
}

/// Marks that this thread is inside the sink of a fabric: who works on that fabric looks again after the sink returns,
/// and needs no wake.
pub(crate) struct InSink(Option<FabricKind>);

pub(crate) fn in_sink(of: FabricKind) -> InSink {
    InSink(IN_SINK.replace(Some(of)))
}

impl Drop for InSink {
    fn drop(&mut self) {
        IN_SINK.set(self.0);
    }
}

#[derive(Default)]
struct Slot {
    done: AtomicBool,
    answer: Mutex<Option<Result<Answer, StoreError>>>,
}

/// Where answers to in-process calls go.
#[derive(Default)]
pub(crate) struct Slots(Mutex<HashMap<u64, Arc<Slot>>>);

impl Slots {
    pub(crate) fn deliver(
        &self,
        driver: &Driver,
        client: ClientId,
        request: u64,
        reply: Result<ClientReply, StoreError>,
        descriptors: &Descriptors,
    ) {
        {
            // Held until the answer is in its slot: who finds that its slot was taken finds the answer there.
            let mut slots = self.0.lock();
            let Some(slot) = slots.remove(&request) else {
                drop(slots);
                return driver.undo(client, reply);
            };
            let answer = reply.and_then(|reply| Ok(Answer { reply, descriptors: duplicates(descriptors)? }));
            *slot.answer.lock() = Some(answer);
            slot.done.store(true, Ordering::Release);
        }
        if let Some(fabrics) = driver.fabrics.get() {
            fabrics.wake(IN_SINK.get());
        }
    }
}

impl Driver {
    /// Takes back what an answer handed over that nobody waits for any more.
    fn undo(&self, client: ClientId, reply: Result<ClientReply, StoreError>) {
        let page = || self.core.lock().pages.get(&client).cloned();
        match reply {
            Ok(ClientReply::Located(located)) => {
                if let Some(page) = page() {
                    page.unpin_for_client(located.pin, located.generation);
                }
            }
            Ok(ClientReply::LocatedMany(many)) => {
                if let Some(page) = page() {
                    for PlacedItem { located, .. } in many.items.into_iter().flatten() {
                        page.unpin_for_client(located.pin, located.generation);
                    }
                }
            }
            Ok(ClientReply::Reserved { reservation, .. }) => {
                let message = ClientMessage::Abort { reservation };
                self.feed(Input::ClientRequest { client, request: 0, message, payload: Bytes::new() });
            }
            _ => {}
        }
    }
}

fn duplicates(descriptors: &Descriptors) -> Result<Vec<OwnedFd>, StoreError> {
    let duplicate = |fd: &std::os::fd::BorrowedFd<'_>| {
        fd.try_clone_to_owned().map_err(|error| {
            StoreError::os("duplicating a descriptor", format!("{error} (RLIMIT_NOFILE may be too low)"))
        })
    };
    descriptors.with(|fds| fds.iter().map(duplicate).collect())
}

pub(crate) struct InProcess {
    driver: Arc<Driver>,
    client: ClientId,
    slots: Arc<Slots>,
    next_request: AtomicU64,
}

impl fmt::Debug for InProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InProcess").field("client", &self.client).finish_non_exhaustive()
    }
}

impl InProcess {
    pub(crate) fn open(driver: &Arc<Driver>) -> Result<Self, StoreError> {
        let slots = Arc::new(Slots::default());
        let client = driver.clients.join_inside(driver, Arc::clone(&slots))?;
        Ok(Self { driver: Arc::clone(driver), client, slots, next_request: AtomicU64::new(1) })
    }
}

/// How long the engine's own deadline may be late before a caller gives up on it.
const GRACE: Duration = Duration::from_secs(2);

/// A question that is out.
struct Asked {
    request: u64,
    slot: Arc<Slot>,
}

impl InProcess {
    fn ask(&self, message: &ClientMessage, payload: &[u8]) -> Asked {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let slot = Arc::new(Slot::default());
        self.slots.0.lock().insert(request, Arc::clone(&slot));
        let payload = Bytes::copy_from_slice(payload);
        self.driver.feed(Input::ClientRequest {
            client: self.client,
            request,
            message: message.clone(),
            payload,
        });
        Asked { request, slot }
    }

    /// Works until all of these are answered, or the time is over.
    fn wait(&self, asked: &[Asked], timeout: Duration) {
        // Answers come in any order; those from `left` on were not seen yet.
        let left = Cell::new(0);
        let done = || {
            while let Some(next) = asked.get(left.get())
                && next.slot.done.load(Ordering::Acquire)
            {
                left.set(left.get() + 1);
            }
            left.get() == asked.len()
        };
        if !done()
            && let Some(fabrics) = self.driver.fabrics.get()
        {
            fabrics.progress(timeout.saturating_add(GRACE), &done);
        }
    }

    fn take(&self, asked: &Asked, message: &ClientMessage, timeout: Duration) -> Result<Answer, StoreError> {
        if !asked.slot.done.load(Ordering::Acquire) {
            // From here on an answer that comes after all is undone.
            self.slots.0.lock().remove(&asked.request);
        }
        if let Some(answer) = asked.slot.answer.lock().take() {
            return answer;
        }
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        Err(StoreError::timed_out(message.name(), "the node", timeout_ms))
    }
}

impl Session for InProcess {
    fn call(&self, message: &ClientMessage, payload: &[u8], timeout: Duration) -> Result<Answer, StoreError> {
        let asked = [self.ask(message, payload)];
        self.wait(&asked, timeout);
        self.take(&asked[0], message, timeout)
    }

    fn call_many(&self, messages: &[ClientMessage], timeout: Duration) -> Vec<Result<Answer, StoreError>> {
        let asked: Vec<Asked> = messages.iter().map(|message| self.ask(message, &[])).collect();
        self.wait(&asked, timeout);
        asked.iter().zip(messages).map(|(asked, message)| self.take(asked, message, timeout)).collect()
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.driver.clients.leave(&self.driver, self.client);
    }
}
