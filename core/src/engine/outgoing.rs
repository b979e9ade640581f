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

#[derive(Debug)]
struct Noted {
    request: u64,
    message: PeerMessage,
    payload: Option<(Extent, Generation)>,
}

/// What is to be said at the end of the pass, by link.
#[derive(Debug, Default)]
pub(super) struct Outgoing(BTreeMap<LinkId, Vec<Noted>>);

/// A frame that is being filled.
#[derive(Debug, Default)]
struct Frame {
    messages: Vec<Batched>,
    body_len: usize,
    payload_len: u64,
    extents: Vec<Extent>,
    /// Whose bytes they are, one for each message that has any.
    generations: Vec<Generation>,
}

impl Frame {
    fn has_room(&self, body_len: usize, payload: Option<Extent>, gather_max: usize) -> bool {
        let fits = |extent: Extent| {
            let joins = self.extents.last().is_some_and(|last| last.is_followed_by(extent));
            (joins || self.extents.len() < gather_max)
                && self.payload_len + extent.len_bytes <= BATCH_PAYLOAD_LEN_MAX
        };
        self.messages.is_empty()
            || (self.messages.len() < BATCH_MESSAGES_MAX
                && self.body_len + body_len <= BATCH_BODY_LEN_MAX
                && payload.is_none_or(fits))
    }

    fn add(&mut self, body_len: usize, Noted { request, message, payload }: Noted) {
        let payload_len = payload.map_or(0, |(extent, _)| extent.len_bytes);
        self.messages.push(Batched { request, payload_len, message });
        self.body_len += body_len;
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
        self.outgoing.0.entry(link).or_default().push(Noted { request, message, payload });
    }

    /// Announces an object, together with what was announced just before it.
    pub(super) fn note_announced(&mut self, link: LinkId, announced: Announced) {
        if let Some(Noted { request, message: PeerMessage::Announce { objects, exclusive: false }, .. }) =
            self.outgoing.0.get_mut(&link).and_then(|noted| noted.last_mut())
            && objects.len() < KEYS_PER_MESSAGE_MAX
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
        if let Some(Noted { message: PeerMessage::Withdraw { objects }, .. }) =
            self.outgoing.0.get_mut(&link).and_then(|noted| noted.last_mut())
            && objects.len() < KEYS_PER_MESSAGE_MAX
        {
            return objects.push(announced);
        }
        self.tell_peer(link, PeerMessage::Withdraw { objects: vec![announced] });
    }

    /// Sends all that was noted.
    pub(super) fn send_noted(&mut self) {
        for (link, noted) in std::mem::take(&mut self.outgoing.0) {
            self.send_frames(link, noted);
        }
    }

    /// Closes a link, after what was said over it in this pass.
    pub(super) fn hang_up(&mut self, link: LinkId) {
        if let Some(noted) = self.outgoing.0.remove(&link) {
            self.send_frames(link, noted);
        }
        self.out.push(Action::Disconnect { link });
    }

    fn send_frames(&mut self, link: LinkId, noted: Vec<Noted>) {
        let fabric = self.links.get(&link).map(|link| link.fabric);
        let gather_max = self.config.gather_max.iter().find(|(id, _)| Some(*id) == fabric);
        let gather_max = gather_max.map_or(1, |(_, most)| *most);
        let is_one = noted.len() == 1;
        let mut frame = Frame::default();
        for noted in noted {
            let alone = matches!(noted.message, PeerMessage::Hello { .. });
            let len = if is_one { 0 } else { body_len(&noted.message).unwrap_or(BATCH_BODY_LEN_MAX) };
            let len = len + ENVELOPE_LEN;
            if alone || !frame.has_room(len, noted.payload.map(|(extent, _)| extent), gather_max) {
                self.send_frame(link, std::mem::take(&mut frame));
            }
            frame.add(len, noted);
            if alone {
                self.send_frame(link, std::mem::take(&mut frame));
            }
        }
        self.send_frame(link, frame);
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
