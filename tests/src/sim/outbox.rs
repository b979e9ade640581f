//! What a simulated node does with its fabric: events in, sends and reads out, in the engine's order, and again what
//! met back-pressure. Not memory (`node`). Invariant: a message that meets back-pressure holds up only its own link.

use std::collections::VecDeque;
use std::sync::Arc;

use hetmem_core::engine::{Action, Input, ReadEnd};
use hetmem_core::receipt::Moved;
use hetmem_core::wire::{FrameKind, PeerMessage, encode};
use hetmem_core::{ErrorKind, Extent, LinkId, StoreError};
use hetmem_transport::{Fabric, FabricEvent, SendToken, Sent};

use super::node::FABRIC;
use super::plan::MS;
use super::world::{Due, World};

pub(super) struct Message {
    request: u64,
    message: PeerMessage,
    payload: Option<(Extent, u64)>,
}

impl World {
    /// What the fabric reports, as the node's peers module hands it on.
    pub(super) fn fabric_event(&mut self, at: usize, event: FabricEvent) {
        let node = &mut self.nodes[at];
        let input = match event {
            FabricEvent::LinkUp { link, address, inbound } => {
                node.dialling.remove(&link);
                Input::LinkUp { link, fabric: FABRIC, address, inbound }
            }
            FabricEvent::LinkDown { link, why } => match node.dialling.remove(&link) {
                Some(address) => Input::ConnectFailed { address, why },
                None => {
                    for message in node.deferred.remove(&link).into_iter().flatten() {
                        self.payload_over(at, &message);
                    }
                    Input::LinkDown { link, why }
                }
            },
            FabricEvent::ReadDone { transfer, result } => Input::ReadDone {
                transfer,
                result: result.map(|stats| ReadEnd {
                    moved: Moved { bytes: stats.bytes, staged_bytes: stats.staged_bytes },
                    word: stats.word,
                    round_trips: stats.round_trips,
                }),
            },
            FabricEvent::SendDone { token, .. } => Input::SendDone { send: token.0 },
            FabricEvent::Landed { token, result, .. } => {
                let result = result.map(|s| Moved { bytes: s.bytes, staged_bytes: s.staged_bytes });
                Input::Landed { request: token.0, result }
            }
        };
        if let Some(again) = repeated(&input)
            && self.rng.percent(self.plan.repeats)
        {
            self.tally.repeats += 1;
            let epoch = self.nodes[at].epoch;
            let delay = self.rng.between(0, 20 * MS);
            self.later(delay, Due::Again { at, epoch, input: again });
        }
        self.feed(at, input);
    }

    fn payload_over(&mut self, at: usize, message: &Message) {
        if let Some((_, send)) = message.payload {
            self.feed(at, Input::SendDone { send });
        }
    }

    pub(super) fn empty_outbox(&mut self, at: usize) {
        if std::mem::replace(&mut self.nodes[at].emptying, true) {
            return;
        }
        while let Some(action) = self.nodes[at].outbox.pop_front() {
            self.on_fabric(at, action);
        }
        self.nodes[at].emptying = false;
    }

    fn on_fabric(&mut self, at: usize, action: Action) {
        let fabric = Arc::clone(&self.nodes[at].fabric);
        match action {
            Action::Send { link, request, message, payload } => {
                let message = Message { request, message, payload };
                if let Some(waiting) = self.nodes[at].deferred.get_mut(&link) {
                    waiting.push_back(message);
                    return;
                }
                if let Some(message) = self.try_send(at, link, message) {
                    self.nodes[at].deferred.entry(link).or_default().push_back(message);
                    let epoch = self.nodes[at].epoch;
                    self.later(MS / 5, Due::Deferred { at, epoch, link });
                }
            }
            Action::Read { link, transfer, bytes, word } => {
                let begun = match (bytes, word) {
                    (bytes, Some(word)) => fabric.read_checked(link, transfer, bytes, word),
                    (Some((remote, local)), None) => fabric.read(link, transfer, remote, local),
                    (None, None) => Err(StoreError::invalid("read", "of nothing")),
                };
                if let Err(why) = begun {
                    self.feed(at, Input::ReadDone { transfer, result: Err(why) });
                }
            }
            Action::CancelRead { transfer } => fabric.cancel(transfer),
            Action::Disconnect { link } => fabric.disconnect(link),
            Action::Connect { address } => match fabric.connect(&address) {
                Ok(link) => {
                    self.nodes[at].dialling.insert(link, address);
                }
                Err(why) => {
                    self.feed(at, Input::ConnectFailed { address, why });
                }
            },
            other => self.fail(format!("node {at}: {other:?} is not for the fabric")),
        }
    }

    /// Returns the message if the link is busy.
    fn try_send(&mut self, at: usize, link: LinkId, message: Message) -> Option<Message> {
        let payload_len = message.payload.map_or(0, |(extent, _)| extent.len_bytes);
        let frame = match encode(FrameKind::Peer, message.request, &message.message, payload_len) {
            Ok(frame) => frame,
            Err(error) => {
                self.fail(format!("node {at}: {:?} cannot be encoded: {error}", message.message));
                return None;
            }
        };
        let fabric = Arc::clone(&self.nodes[at].fabric);
        let (extent, send) = message.payload.unzip();
        match fabric.send(link, frame, extent, SendToken(send.unwrap_or_default())) {
            Ok(Sent::Done) => self.payload_over(at, &message),
            Ok(Sent::Pending) => {}
            Err(error) if error.kind() == ErrorKind::Busy => return Some(message),
            Err(error) => {
                self.payload_over(at, &message);
                if error.kind() != ErrorKind::PeerLost {
                    self.fail(format!("node {at}: a message was not taken: {error}"));
                }
            }
        }
        None
    }

    /// Tries again what met back-pressure.
    pub(super) fn retry_deferred(&mut self, at: usize, link: LinkId) {
        loop {
            let waiting = self.nodes[at].deferred.get_mut(&link);
            let Some(message) = waiting.and_then(VecDeque::pop_front) else { break };
            if let Some(message) = self.try_send(at, link, message) {
                let Some(waiting) = self.nodes[at].deferred.get_mut(&link) else {
                    return self.payload_over(at, &message);
                };
                waiting.push_front(message);
                let epoch = self.nodes[at].epoch;
                return self.later(MS / 5, Due::Deferred { at, epoch, link });
            }
        }
        self.nodes[at].deferred.remove(&link);
    }
}

/// A completion once more, as a fabric that lost count would report it.
fn repeated(input: &Input) -> Option<Input> {
    match input {
        Input::ReadDone { transfer, result } => {
            Some(Input::ReadDone { transfer: *transfer, result: result.clone() })
        }
        Input::Landed { request, result } => {
            Some(Input::Landed { request: *request, result: result.clone() })
        }
        Input::SendDone { send } => Some(Input::SendDone { send: *send }),
        _ => None,
    }
}
