//! What goes to the fabric, in the engine's order. Not the engine's lock: sends take time and may be many. Invariant:
//! actions are carried out one at a time, in the order in which the engine wanted them; a message that meets
//! back-pressure holds up only its own link.

use std::collections::{HashMap, VecDeque};

use hetmem_core::engine::{Action, Input, Payload};
use hetmem_core::wire::{Batch, Frame, FrameKind, PeerMessage, encode};
use hetmem_core::{ErrorKind, Extent, LinkId, RemoteExtent, StoreError, TransferId};
use hetmem_transport::{FabricKind, SendToken, Sent};
use parking_lot::Mutex;

use crate::driver::Driver;
use crate::fabrics::Fabrics;

/// Messages that may wait for one link before it is given up.
const DEFERRED_MAX: usize = 65_536;

/// What goes out in one frame.
struct Message {
    said: Said,
    payload: Option<Payload>,
}

enum Said {
    One { request: u64, message: PeerMessage },
    Many(Batch),
}

impl Message {
    fn frame(&self) -> Result<Frame, StoreError> {
        let payload_len = self.payload.as_ref().map_or(0, Payload::len_bytes);
        match &self.said {
            Said::One { request, message } => encode(FrameKind::Peer, *request, message, payload_len),
            Said::Many(batch) => encode(FrameKind::Batch, 0, batch, payload_len),
        }
    }
}

#[derive(Default)]
pub(crate) struct Outbox {
    queue: Mutex<VecDeque<Action>>,
    /// Held by the thread that empties the queue.
    emptying: Mutex<()>,
    deferred: Mutex<HashMap<LinkId, VecDeque<Message>>>,
    /// Links that were dialled and are not up yet, with what was dialled.
    dialling: Mutex<HashMap<LinkId, String>>,
}

impl Outbox {
    pub(crate) fn push(&self, action: Action) {
        self.queue.lock().push_back(action);
    }

    /// The address of a link that was dialled and was not up before: now it is, or will never be.
    pub(crate) fn no_longer_dialled(&self, link: LinkId) -> Option<String> {
        self.dialling.lock().remove(&link)
    }
}

impl Driver {
    /// Carries out what the engine wants of the fabric. If another thread is at it, that thread sees this too.
    pub(crate) fn drain_outbox(&self) {
        loop {
            {
                let Some(_emptying) = self.outbox.emptying.try_lock() else { return };
                loop {
                    let next = self.outbox.queue.lock().pop_front();
                    let Some(action) = next else { break };
                    self.on_fabric(action);
                }
            }
            // Whoever pushed between the last look and the release found the lock taken and left.
            if self.outbox.queue.lock().is_empty() {
                return;
            }
        }
    }

    fn on_fabric(&self, action: Action) {
        let Some(fabrics) = self.fabrics.get() else { return };
        match action {
            Action::Send { link, request, message, payload } => {
                let said = Said::One { request, message };
                self.send(fabrics, link, Message { said, payload });
            }
            Action::SendBatch { link, batch, payload } => {
                self.send(fabrics, link, Message { said: Said::Many(batch), payload });
            }
            Action::Read { link, transfer, bytes, word } => {
                if let Err(why) = read(fabrics, link, transfer, bytes, word) {
                    self.visibility.forget(transfer);
                    self.feed(Input::ReadDone { transfer, result: Err(why) });
                }
            }
            Action::CancelRead { transfer } => fabrics.cancel(transfer),
            Action::Disconnect { link } => disconnect(fabrics, link),
            Action::Connect { address } => {
                // Held across the call, so that the link's first event finds its address.
                let mut dialling = self.outbox.dialling.lock();
                match fabrics.connect(&address) {
                    Ok(link) => {
                        dialling.insert(link, address);
                    }
                    Err(why) => {
                        drop(dialling);
                        self.feed(Input::ConnectFailed { address, why });
                    }
                }
            }
            other => tracing::error!(?other, "this is not for the fabric"),
        }
    }

    fn send(&self, fabrics: &Fabrics, link: LinkId, message: Message) {
        let mut deferred = self.outbox.deferred.lock();
        if let Some(waiting) = deferred.get_mut(&link) {
            if waiting.len() < DEFERRED_MAX {
                waiting.push_back(message);
                return;
            }
            drop(deferred);
            tracing::warn!(%link, "a peer takes nothing any more: its link is closed");
            self.drop_message(message);
            disconnect(fabrics, link);
            return;
        }
        drop(deferred);
        if let Some(message) = self.try_send(fabrics, link, message) {
            self.outbox.deferred.lock().entry(link).or_default().push_back(message);
        }
    }

    /// Returns the message if the link is busy.
    fn try_send(&self, fabrics: &Fabrics, link: LinkId, message: Message) -> Option<Message> {
        let Some(fabric) = fabrics.of(link) else {
            self.drop_message(message);
            return None;
        };
        let frame = match message.frame() {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "a message cannot be encoded");
                self.drop_message(message);
                return None;
            }
        };
        let (extents, send) = message.payload.as_ref().map_or((&[][..], 0), |p| (&p.extents[..], p.send));
        match fabric.send(link, frame, extents, SendToken(send)) {
            Ok(Sent::Done) => self.drop_message(message),
            Ok(Sent::Pending) => {}
            Err(error) if error.kind() == ErrorKind::Busy => return Some(message),
            Err(error) => {
                self.drop_message(message);
                if error.kind() != ErrorKind::PeerLost {
                    tracing::error!(%link, %error, "a message was not taken: its link is closed");
                    fabric.disconnect(link);
                }
            }
        }
        None
    }

    /// The message's payload is not read any more.
    fn drop_message(&self, message: Message) {
        if let Some(Payload { send, .. }) = message.payload {
            self.feed(Input::SendDone { send });
        }
    }

    /// A link that was dialled did not come up; says whether the peer is dialled over another fabric.
    pub(crate) fn dial_otherwise(&self, link: LinkId, address: &str, why: &StoreError) -> bool {
        let Some(fabrics) = self.fabrics.get() else { return false };
        if FabricKind::of_link(link) != FabricKind::Verbs {
            return false;
        }
        // As above.
        let mut dialling = self.outbox.dialling.lock();
        match fabrics.connect_otherwise(address, why) {
            Ok(link) => {
                dialling.insert(link, address.to_owned());
                true
            }
            Err(_) => false,
        }
    }

    /// Tries again what met back-pressure.
    pub(crate) fn retry_deferred(&self) {
        let Some(fabrics) = self.fabrics.get() else { return };
        let links: Vec<LinkId> = self.outbox.deferred.lock().keys().copied().collect();
        for link in links {
            // Keeps newer messages of the link behind the older ones while these are under way.
            let _emptying = self.outbox.emptying.lock();
            loop {
                let next = self.outbox.deferred.lock().get_mut(&link).and_then(VecDeque::pop_front);
                let Some(message) = next else { break };
                if let Some(message) = self.try_send(fabrics, link, message) {
                    self.outbox.deferred.lock().entry(link).or_default().push_front(message);
                    break;
                }
            }
            let mut deferred = self.outbox.deferred.lock();
            if deferred.get(&link).is_some_and(VecDeque::is_empty) {
                deferred.remove(&link);
            }
        }
        self.drain_outbox();
    }

    /// A link has gone, and what waited for it too.
    pub(crate) fn forget_deferred(&self, link: LinkId) {
        let waiting = self.outbox.deferred.lock().remove(&link);
        for message in waiting.into_iter().flatten() {
            self.drop_message(message);
        }
    }
}

fn disconnect(fabrics: &Fabrics, link: LinkId) {
    if let Some(fabric) = fabrics.of(link) {
        fabric.disconnect(link);
    }
}

fn read(
    fabrics: &Fabrics,
    link: LinkId,
    transfer: TransferId,
    bytes: Option<(RemoteExtent, Extent)>,
    word: Option<RemoteExtent>,
) -> Result<(), StoreError> {
    let fabric =
        fabrics.of(link).ok_or_else(|| StoreError::unavailable("link", "its fabric is not there"))?;
    match (bytes, word) {
        (bytes, Some(word)) => fabric.read_checked(link, transfer, bytes, word),
        (Some((remote, local)), None) => fabric.read(link, transfer, remote, local),
        (None, None) => Err(StoreError::invalid("read", "of nothing")),
    }
}

/// Why a link that never came up did not.
pub(crate) fn connect_error(address: &str, why: &StoreError) -> StoreError {
    StoreError::PeerLost {
        operation: "connect".into(),
        subject: address.to_owned(),
        peer: address.to_owned(),
        why: why.to_string().into(),
    }
}
