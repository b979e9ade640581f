//! What a simulated node does with its fabric: events in, sends and reads out, in the engine's order, and again what
//! met back-pressure. Not memory (`node`). Invariant: a message that meets back-pressure holds up only its own link.

use std::collections::VecDeque;
use std::sync::Arc;

use hetmem_core::engine::{Action, Input, Payload, ReadEnd};
use hetmem_core::receipt::Moved;
use hetmem_core::wire::{Batch, FrameKind, PeerMessage, encode};
use hetmem_core::{ErrorKind, LandingId, LinkId, StoreError};
use hetmem_transport::{Fabric, FabricEvent, SendToken, Sent};

use super::node::FABRIC;
use super::plan::MS;
use super::world::{Due, World};

pub(super) struct Message {
    said: Said,
    payload: Option<Payload>,
}

#[derive(Debug)]
enum Said {
    One { request: u64, message: PeerMessage },
    Many(Batch),
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
                    pushed: stats.pushed,
                }),
            },
            FabricEvent::SendDone { token, .. } => Input::SendDone { send: token.0 },
            FabricEvent::Landed { token, result, .. } => {
                let result = result.map(|s| Moved { bytes: s.bytes, staged_bytes: s.staged_bytes });
                Input::Landed { landing: LandingId(token.0), result }
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
        if let Some(Payload { send, .. }) = message.payload {
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
                self.send(at, link, Message { said: Said::One { request, message }, payload });
            }
            Action::SendBatch { link, batch, payload } => {
                self.tally.batches += 1;
                self.send(at, link, Message { said: Said::Many(batch), payload });
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

    fn send(&mut self, at: usize, link: LinkId, message: Message) {
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

    /// Returns the message if the link is busy.
    fn try_send(&mut self, at: usize, link: LinkId, message: Message) -> Option<Message> {
        let payload_len = message.payload.as_ref().map_or(0, Payload::len_bytes);
        let frame = match &message.said {
            Said::One { request, message } => encode(FrameKind::Peer, *request, message, payload_len),
            Said::Many(batch) => encode(FrameKind::Batch, 0, batch, payload_len),
        };
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                self.fail(format!("node {at}: {:?} cannot be encoded: {error}", message.said));
                return None;
            }
        };
        let fabric = Arc::clone(&self.nodes[at].fabric);
        let (extents, send) = message.payload.as_ref().map_or((&[][..], 0), |p| (&p.extents[..], p.send));
        match fabric.send(link, frame, extents, SendToken(send)) {
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
        Input::Landed { landing, result } => {
            Some(Input::Landed { landing: *landing, result: result.clone() })
        }
        Input::SendDone { send } => Some(Input::SendDone { send: *send }),
        _ => None,
    }
}
