//! The questions between nodes, and who handles which message. Not the links (`links`) and not the bytes. Invariant:
//! a question is answered once, by an answer, a loss of its link, or a deadline; answers to unknown questions change
//! nothing.

use std::collections::BTreeSet;

use super::Engine;
use super::awaiting::{Exclusive, Listing};
use super::fetch::FetchId;
use super::timer::Time;
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{LandingId, LinkId, NodeId};
use crate::wire::{Announced, Batch, Batched, ClientReply, Listed, PeerMessage, Role};

/// A question to a peer.
#[derive(Debug)]
pub(super) enum Pending {
    Get {
        fetch: FetchId,
    },
    /// Nobody wants the answer any more; a grant in it is given back.
    Abandoned,
    Exclusive(Exclusive),
    Announced {
        objects: Vec<Announced>,
    },
    Ask {
        operation: u64,
    },
    List(Box<Listing>),
    Delete {
        operation: u64,
    },
    Drop {
        operation: u64,
    },
    /// A put wants the node to hold its object.
    Replicate {
        operation: u64,
        node: NodeId,
    },
    /// The directory wants the node to hold an object.
    Repair {
        key: Key,
        node: NodeId,
    },
    /// The way there and back is measured.
    Heartbeat {
        at: Time,
    },
}

/// The bytes that came with a message: a part of the payload of its frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    pub(super) landing: LandingId,
    /// Where in the payload they start.
    pub(super) start: u64,
    pub(super) len_bytes: u64,
}

/// Why every node is asked for a key.
#[derive(Debug)]
pub(super) enum AskFor {
    Fetch(FetchId),
    Get { link: LinkId, request: u64, asker: NodeId },
    Delete(u64),
}

#[derive(Debug)]
pub(super) struct Ask {
    pub(super) key: Key,
    pub(super) why: AskFor,
    pub(super) left: usize,
    /// Nodes that say they have it.
    pub(super) found: Vec<NodeId>,
    pub(super) deadline: Time,
}

impl Engine {
    pub(super) fn ask_peer(&mut self, link: LinkId, message: PeerMessage, pending: Pending) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        self.pending.insert(request, (link, pending));
        self.note(link, request, message, None);
        request
    }

    pub(super) fn tell_peer(&mut self, link: LinkId, message: PeerMessage) {
        self.answer_peer(link, 0, message);
    }

    pub(super) fn answer_peer(&mut self, link: LinkId, request: u64, message: PeerMessage) {
        if self.links.contains_key(&link) {
            self.note(link, request, message, None);
        }
    }

    /// The answer to this question does not matter any more.
    pub(super) fn abandon(&mut self, request: u64) {
        if let Some((_, pending)) = self.pending.get_mut(request) {
            *pending = Pending::Abandoned;
        }
    }

    pub(super) fn question_lost(&mut self, pending: Pending, peer: &str, why: &StoreError) {
        let lost = |operation: &'static str| StoreError::PeerLost {
            operation: operation.into(),
            subject: String::new(),
            peer: peer.to_owned(),
            why: why.to_string().into(),
        };
        match pending {
            // `fetches_lost` has seen to gets.
            Pending::Get { .. } => {}
            Pending::Exclusive(_) => self.question_failed(pending, &lost("put")),
            Pending::List(_) => self.question_failed(pending, &lost("list")),
            Pending::Delete { .. } => self.question_failed(pending, &lost("delete")),
            pending => self.question_failed(pending, why),
        }
    }

    /// A frame with one message.
    pub(super) fn peer_message(
        &mut self,
        link: LinkId,
        request: u64,
        message: PeerMessage,
        payload_len: u64,
    ) {
        let landing = self.new_landing(payload_len);
        let payload = Incoming { landing, start: 0, len_bytes: payload_len };
        if let Err(why) = self.hear(link, request, message, payload) {
            self.peer_refused(link, &why);
        }
    }

    /// A frame with several messages: each is heard as if it had come alone, until one is refused.
    pub(super) fn peer_batch(&mut self, link: LinkId, batch: Batch, payload_len: u64) {
        if let Err(why) = batch.check(payload_len) {
            return self.peer_refused(link, &why);
        }
        let landing = self.new_landing(payload_len);
        self.out.reserve(batch.0.len());
        let mut start = 0;
        for Batched { request, payload_len, message } in batch.0 {
            let payload = Incoming { landing, start, len_bytes: payload_len };
            start += payload_len;
            if let Err(why) = self.hear(link, request, message, payload) {
                return self.peer_refused(link, &why);
            }
        }
    }

    /// Takes a number for the payload of the frame that is being handled: its parts may be given places from now on.
    fn new_landing(&mut self, payload_len: u64) -> LandingId {
        let landing = LandingId(self.next_landing);
        if payload_len > 0 {
            self.next_landing += 1;
            self.payload_at_hand = Some(landing);
        }
        landing
    }

    /// Hears one message; an error says why its link cannot go on.
    fn hear(
        &mut self,
        link: LinkId,
        request: u64,
        message: PeerMessage,
        payload: Incoming,
    ) -> Result<(), StoreError> {
        let Some(state) = self.links.get_mut(&link) else {
            return Ok(());
        };
        state.heard = self.now;
        let known = state.node;
        message.check()?;
        if payload.len_bytes != 0 && !matches!(message, PeerMessage::Data { .. }) {
            let why = format!("{} has a payload of {} bytes", message.name(), payload.len_bytes);
            return Err(StoreError::protocol(why));
        }
        match (known, message) {
            (Some(node), PeerMessage::Hello { member, .. }) if member.node != node => {
                let why = format!("a second HELLO says {:?}, the first one named another node", member.name);
                Err(StoreError::protocol(why))
            }
            (_, PeerMessage::Hello { member, version_min, version_max, keeps }) => {
                self.hello(link, member, version_min, version_max, keeps);
                Ok(())
            }
            (_, PeerMessage::Failed { error }) if request == 0 => Err(error),
            (None, message) => Err(StoreError::protocol(format!("{} came before HELLO", message.name()))),
            (Some(node), message) => self.peer_says(link, node, request, message, payload),
        }
    }

    fn peer_says(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        message: PeerMessage,
        payload: Incoming,
    ) -> Result<(), StoreError> {
        match message {
            PeerMessage::Hello { .. } => {}
            PeerMessage::Heartbeat { room_bytes, under_replicated } => {
                self.heard_heartbeat(link, node, request, (room_bytes, under_replicated));
            }
            PeerMessage::Keeps { keeps } => self.peer_keeps(node, keeps),
            PeerMessage::Join { heir } => self.joined_by(link, node, heir),
            PeerMessage::Leave => self.left_by(link, node),
            PeerMessage::Deletions { objects } => self.deletions_from(link, node, &objects),
            PeerMessage::Replicate { object, holders } => {
                self.replicate_for_peer(link, request, object, holders);
            }
            PeerMessage::Surplus { key, object, lasting } if Some(node) == self.directory_node() => {
                self.surplus(&key, object, lasting);
            }
            PeerMessage::Surplus { .. } => {}
            PeerMessage::Members { members } => self.members(node, &members),
            PeerMessage::Locate { key } => self.redirect(link, node, request, key),
            PeerMessage::Get { key, range, inline_max } => {
                self.tell_others(link, node, &key, inline_max);
                if !self.serve_get(link, request, &key, range, inline_max) {
                    self.redirect(link, node, request, key);
                }
            }
            PeerMessage::Release { lease } => self.release(link, lease),
            PeerMessage::Announce { objects, exclusive } => {
                self.announced_by(link, node, request, &objects, exclusive);
            }
            PeerMessage::Withdraw { objects } => {
                if let Some(directory) = &mut self.directory {
                    for object in &objects {
                        directory.withdraw(node, &object.key, object.object);
                    }
                }
            }
            PeerMessage::Ask { key } => {
                let object = self.objects.sealed(&key).map(|(_, object)| object.announced(self.now));
                self.answer_peer(link, request, PeerMessage::Asked { object });
            }
            PeerMessage::Watch { key } => self.watch(node, key),
            PeerMessage::Exists { key, holders } if Some(node) == self.directory_node() => {
                for holder in holders {
                    self.hints.remember(&key, holder.node);
                }
                self.key_exists(&key);
            }
            PeerMessage::Exists { .. } => {}
            PeerMessage::Delete { key } => self.delete_for_peer(link, request, key),
            PeerMessage::Drop { key, object } => self.drop_for_peer(link, request, key, object),
            PeerMessage::List { prefix, after, limit } => {
                self.list_for_peer(link, request, &prefix, after.as_ref(), limit);
            }
            answer => return self.peer_answers(link, node, request, answer, payload),
        }
        Ok(())
    }

    fn peer_answers(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        answer: PeerMessage,
        payload: Incoming,
    ) -> Result<(), StoreError> {
        if self.pending.get(request).is_none_or(|(of, _)| *of != link) {
            return Ok(());
        }
        let Some((_, pending)) = self.pending.remove(request) else {
            return Ok(());
        };
        match (pending, answer) {
            (Pending::Get { fetch }, PeerMessage::Data { object, meta, origin }) => {
                self.fetch_data(link, request, fetch, (object, meta, origin), payload);
            }
            (Pending::Get { fetch }, PeerMessage::Grant { object, meta, origin, granted }) => {
                self.fetch_grant(link, request, fetch, (object, meta, origin), *granted);
            }
            (Pending::Abandoned, PeerMessage::Grant { granted, .. }) => {
                self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
            }
            (Pending::Announced { .. }, PeerMessage::Failed { .. }) | (Pending::Abandoned, _) => {}
            (Pending::Heartbeat { at }, PeerMessage::Alive) => self.measure_round_trip(link, at),
            (Pending::Get { fetch }, PeerMessage::Located { holders }) => {
                self.fetch_located(link, fetch, holders);
            }
            (Pending::Get { fetch }, PeerMessage::Failed { error }) => {
                self.fetch_refused(link, fetch, error);
            }
            (Pending::Exclusive(exclusive), PeerMessage::Announced { refused }) => {
                self.exclusive_answer(exclusive, refused);
            }
            (Pending::Replicate { operation, node }, PeerMessage::Replicated) => {
                self.replicated(operation, node, true);
            }
            (Pending::Repair { key, node }, PeerMessage::Replicated) => {
                self.repair_answered(&key, node, true);
            }
            (Pending::Announced { objects }, PeerMessage::Announced { refused }) => {
                let refused: BTreeSet<Key> = refused.into_iter().collect();
                for announced in objects.iter().filter(|object| refused.contains(&object.key)) {
                    self.announcement_refused(announced);
                }
            }
            (Pending::Ask { operation }, PeerMessage::Asked { object }) => {
                self.asked(operation, Some(node), object);
            }
            (Pending::List(listing), PeerMessage::Listed { objects, more }) => {
                let listed =
                    |a: Announced| Listed { key: a.key, len_bytes: a.len_bytes, holders: Vec::new() };
                let objects = objects.into_iter().map(listed).collect();
                self.reply(listing.client, listing.request, Ok(ClientReply::Listed { objects, more }));
            }
            (
                Pending::Delete { operation } | Pending::Drop { operation },
                PeerMessage::Dropped { existed },
            ) => {
                self.dropped(operation, existed);
            }
            (pending, PeerMessage::Failed { error }) => self.question_failed(pending, &error),
            (pending, answer) => {
                let why = StoreError::protocol(format!("{} answers another question", answer.name()));
                self.question_lost(pending, "the peer", &why);
                return Err(why);
            }
        }
        Ok(())
    }

    /// The directory does not want this node to have an object. If a mere copy was announced, and it has become a replica
    /// since, that was announced too, and the answer to that counts.
    fn announcement_refused(&mut self, announced: &Announced) {
        let there = self.objects.sealed(&announced.key).map(|(_, object)| (object.id, object.role));
        let stays = there.is_some_and(|(id, role)| id == announced.object && role != Role::Copy);
        if announced.role != Role::Copy || !stays {
            self.drop_local(&announced.key, Some(announced.object));
        }
    }

    /// FAILED in answer to anything but a GET, or no answer.
    fn question_failed(&mut self, pending: Pending, error: &StoreError) {
        match pending {
            Pending::Exclusive(exclusive) => {
                if !self.ask_exclusive_again(exclusive, error) {
                    self.free_object(exclusive.generation);
                    self.reply(exclusive.client, exclusive.request, Err(error.clone()));
                }
            }
            Pending::List(listing) if self.may_ask_again(error) && self.now < listing.deadline => {
                self.await_list(*listing);
            }
            Pending::List(listing) => self.reply(listing.client, listing.request, Err(error.clone())),
            Pending::Delete { operation } => self.delete_lost(operation, error.clone()),
            Pending::Drop { operation } => self.dropped(operation, false),
            Pending::Ask { operation } => self.asked(operation, None, None),
            Pending::Replicate { operation, node } => self.replicated(operation, node, false),
            Pending::Repair { key, node } => self.repair_answered(&key, node, false),
            Pending::Get { .. }
            | Pending::Abandoned
            | Pending::Announced { .. }
            | Pending::Heartbeat { .. } => {}
        }
    }

    pub(super) fn exclusive_answer(&mut self, exclusive: Exclusive, refused: Vec<Key>) {
        let Exclusive { client, request, generation, checksum, .. } = exclusive;
        match refused.into_iter().next() {
            None => {
                let announced = self.objects.get(generation).map(|object| object.announced(self.now));
                self.seal_now(client, request, generation, checksum);
                if let (Some(announced), None) = (announced, self.objects.get(generation)) {
                    // It was announced and could not be sealed after all.
                    self.withdraw_from_directory(announced);
                }
            }
            Some(key) => {
                self.free_object(generation);
                self.reply(client, request, Err(StoreError::AlreadyExists { key: key.to_string() }));
            }
        }
    }

    pub(super) fn operation_deadline(&mut self, operation: u64) {
        self.ask_over(operation);
        self.delete_deadline(operation);
        self.replication_deadline(operation);
    }
}
