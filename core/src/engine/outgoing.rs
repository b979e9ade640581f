//! What one pass of the engine says to its peers: noted while the pass goes on, sent at its end, all that goes to one
//! link in one frame if it has room. Not what is said, and not the sending. Invariant: messages to one link leave in
//! the order in which they were noted; an object whose bytes a noted message brings along counts as being sent from
//! that moment on.

use std::collections::BTreeMap;

use super::Engine;
use super::action::{Action, Payload};
use super::cluster::Pending;
use crate::tier::{Extent, Generation, LinkId};
use crate::wire::{
    Announced, BATCH_BODY_LEN_MAX, BATCH_MESSAGES_MAX, BATCH_PAYLOAD_LEN_MAX, Batch, Batched,
    KEYS_PER_MESSAGE_MAX, PeerMessage, body_len,
};

/// Bytes of a batch's body beside its messages and those of each beside itself, at most.
const ENVELOPE_LEN: usize = 20;
/// Bytes of one object in a list, beside its key, at most.
const ANNOUNCED_LEN_MAX: usize = 64;

/// What is to be said at the end of the pass: frames by link, the last of each open for more.
#[derive(Debug, Default)]
pub(super) struct Outgoing(BTreeMap<LinkId, Vec<Frame>>);

/// A frame that is being filled.
#[derive(Debug, Default)]
struct Frame {
    messages: Vec<Batched>,
    /// Bytes of the body, of the first so many messages: one that stays alone is never measured.
    body_len: usize,
    measured: usize,
    payload_len: u64,
    extents: Vec<Extent>,
    /// Whose bytes they are, one for each message that has any.
    generations: Vec<Generation>,
}

fn len_of(message: &PeerMessage) -> usize {
    ENVELOPE_LEN + message.len_max().or_else(|| body_len(message)).unwrap_or(BATCH_BODY_LEN_MAX)
}

impl Frame {
    /// Whether another message fits behind those that are there; its payload is one extent.
    fn has_room(&mut self, message: &PeerMessage, payload: Option<Extent>, gather_max: usize) -> bool {
        let alone = |message: &PeerMessage| matches!(message, PeerMessage::Hello { .. });
        if alone(message)
            || self.messages.len() >= BATCH_MESSAGES_MAX
            || self.messages.first().is_some_and(|first| alone(&first.message))
        {
            return false;
        }
        let fits = |extent: Extent| {
            let joins = self.extents.last().is_some_and(|last| last.is_followed_by(extent));
            (joins || self.extents.len() < gather_max)
                && self.payload_len + extent.len_bytes <= BATCH_PAYLOAD_LEN_MAX
        };
        if !payload.is_none_or(fits) {
            return false;
        }
        let unmeasured = self.messages.get(self.measured..).unwrap_or_default();
        self.body_len += unmeasured.iter().map(|batched| len_of(&batched.message)).sum::<usize>();
        self.measured = self.messages.len();
        let len = len_of(message);
        let fits = self.body_len + len <= BATCH_BODY_LEN_MAX;
        if fits {
            self.body_len += len;
            self.measured += 1;
        }
        fits
    }

    fn add(&mut self, request: u64, message: PeerMessage, payload: Option<(Extent, Generation)>) {
        let payload_len = payload.map_or(0, |(extent, _)| extent.len_bytes);
        if self.messages.len() == self.messages.capacity() {
            // One is the rule, and where there are more there are often many.
            self.messages.reserve(7 * self.messages.len() + 1);
        }
        self.messages.push(Batched { request, payload_len, message });
        self.payload_len += payload_len;
        if let Some((extent, generation)) = payload {
            self.generations.push(generation);
            match self.extents.last_mut() {
                Some(last) if last.is_followed_by(extent) => last.len_bytes += extent.len_bytes,
                _ => self.extents.push(extent),
            }
        }
    }
}

const fn announcing(message: &mut PeerMessage) -> Option<&mut Vec<Announced>> {
    match message {
        PeerMessage::Announce { objects, exclusive: false } => Some(objects),
        _ => None,
    }
}

const fn withdrawing(message: &mut PeerMessage) -> Option<&mut Vec<Announced>> {
    match message {
        PeerMessage::Withdraw { objects } => Some(objects),
        _ => None,
    }
}

impl Outgoing {
    /// The list of objects at the end of what was noted for a link, and its request, if one more fits into it.
    fn open_list(
        &mut self,
        link: LinkId,
        announced: &Announced,
        list: fn(&mut PeerMessage) -> Option<&mut Vec<Announced>>,
    ) -> Option<(u64, &mut Vec<Announced>)> {
        let frame = self.0.get_mut(&link)?.last_mut()?;
        let len = ANNOUNCED_LEN_MAX + announced.key.as_str().len();
        let is_alone = frame.messages.len() == 1;
        if !is_alone && frame.body_len + len > BATCH_BODY_LEN_MAX {
            return None;
        }
        let is_measured = frame.measured == frame.messages.len();
        let Batched { request, message, .. } = frame.messages.last_mut()?;
        let objects = list(message).filter(|objects| objects.len() < KEYS_PER_MESSAGE_MAX)?;
        frame.body_len += if is_measured { len } else { 0 };
        Some((*request, objects))
    }
}

impl Engine {
    /// Says something to a peer at the end of this pass. The caller knows that there is such a link.
    pub(super) fn note(
        &mut self,
        link: LinkId,
        request: u64,
        message: PeerMessage,
        payload: Option<(Extent, Generation)>,
    ) {
        if let Some((_, generation)) = payload
            && let Some(object) = self.objects.get_mut(generation)
        {
            object.sends += 1;
        }
        let gather_max = self.fabric_of(link).map_or(1, |fabric| fabric.gather_max);
        let extent = payload.map(|(extent, _)| extent);
        let frames = self.outgoing.0.entry(link).or_default();
        if !frames.last_mut().is_some_and(|frame| frame.has_room(&message, extent, gather_max)) {
            frames.push(Frame::default());
        }
        if let Some(frame) = frames.last_mut() {
            frame.add(request, message, payload);
        }
    }

    /// Announces an object, together with what was announced just before it.
    pub(super) fn note_announced(&mut self, link: LinkId, announced: Announced) {
        if let Some((request, objects)) = self.outgoing.open_list(link, &announced, announcing)
            && let Some((_, Pending::Announced { objects: pending })) = self.pending.get_mut(request)
        {
            pending.push(announced.clone());
            objects.push(announced);
            return;
        }
        let objects = vec![announced];
        let message = PeerMessage::Announce { objects: objects.clone(), exclusive: false };
        self.ask_peer(link, message, Pending::Announced { objects });
    }

    /// Withdraws an object, together with what was withdrawn just before it.
    pub(super) fn note_withdrawn(&mut self, link: LinkId, announced: Announced) {
        match self.outgoing.open_list(link, &announced, withdrawing) {
            Some((_, objects)) => objects.push(announced),
            None => self.tell_peer(link, PeerMessage::Withdraw { objects: vec![announced] }),
        }
    }

    /// Sends all that was noted.
    pub(super) fn send_noted(&mut self) {
        for (link, frames) in std::mem::take(&mut self.outgoing.0) {
            frames.into_iter().for_each(|frame| self.send_frame(link, frame));
        }
    }

    /// Closes a link, after what was said over it in this pass.
    pub(super) fn hang_up(&mut self, link: LinkId) {
        let frames = self.outgoing.0.remove(&link).unwrap_or_default();
        frames.into_iter().for_each(|frame| self.send_frame(link, frame));
        self.out.push(Action::Disconnect { link });
    }

    fn send_frame(&mut self, link: LinkId, frame: Frame) {
        let Frame { mut messages, extents, generations, .. } = frame;
        let payload = (!extents.is_empty()).then(|| {
            let send = self.next_send;
            self.next_send += 1;
            self.sends.insert(send, generations);
            Payload { send, extents }
        });
        match messages.len() {
            0 => {}
            1 => {
                let Some(Batched { request, message, .. }) = messages.pop() else { return };
                self.out.push(Action::Send { link, request, message, payload });
            }
            _ => self.out.push(Action::SendBatch { link, batch: Batch(messages), payload }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Key;
    use crate::tier::{Epoch, NodeId, ObjectId};
    use crate::wire::{Role, body_len};

    #[test]
    fn what_an_object_in_a_list_needs_at_most_is_known() {
        let object = ObjectId { origin: NodeId(u64::MAX), epoch: Epoch(u64::MAX), number: u64::MAX };
        let key = Key::new(&"k".repeat(crate::KEY_LEN_MAX)).expect("a key");
        let (role, len_bytes, ttl_ms) = (Role::Copy, u64::MAX, Some(u64::MAX));
        let announced = Announced { key, object, len_bytes, role, replicas: u8::MAX, ttl_ms };
        let list = |count| {
            body_len(&PeerMessage::Withdraw { objects: vec![announced.clone(); count] }).expect("a body")
        };
        assert!(list(2) - list(1) <= ANNOUNCED_LEN_MAX + crate::KEY_LEN_MAX);
    }
}
