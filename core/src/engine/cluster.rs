//! Links, peers, the questions between them, and the directory's two sides. Not the bytes. Invariant: a question is
//! answered once, by an answer, a loss of its link, or a deadline; answers to unknown questions change nothing.

use super::Engine;
use super::action::{Action, Event};
use super::directory::Verdict;
use super::fetch::FetchId;
use super::input::FabricId;
use super::local::{Waiter, WaitingKey};
use super::timer::{Time, Timer};
use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, Epoch, Generation, LinkId, NodeId};
use crate::wire::{
    Announced, ClientReply, Holder, KEYS_PER_MESSAGE_MAX, Listed, Member, PROTOCOL_MAX, PROTOCOL_MIN,
    PeerMessage, negotiate,
};

/// Heartbeats that may be missed before a peer is held to be dead.
const MISSED_MAX: u64 = 5;
/// How long an operation between nodes may take, in milliseconds.
const OPERATION_MS: u64 = 5_000;
/// The longest pause between two attempts to reach the directory, in milliseconds.
const RECONNECT_MS_MAX: u64 = 2_000;
/// Bytes of a list's entries, and a bound on one entry beside its key (a holder's name among them).
const LIST_BYTES_MAX: usize = 48 * 1024;
const LIST_ENTRY_LEN: usize = 80;
/// How long a peer's watch on a key is remembered, in milliseconds.
const WATCH_MS: u64 = 600_000;

#[derive(Debug)]
pub(super) struct Link {
    pub(super) fabric: FabricId,
    pub(super) address: String,
    pub(super) inbound: bool,
    /// Who is at the other end, once it has said so.
    pub(super) node: Option<NodeId>,
    heard: Time,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) member: Member,
    pub(super) link: Option<LinkId>,
}

/// A question to a peer.
#[derive(Debug)]
pub(super) enum Pending {
    Get {
        fetch: FetchId,
    },
    /// Nobody wants the answer any more; a grant in it is given back.
    Abandoned,
    Exclusive {
        client: ClientId,
        request: u64,
        generation: Generation,
        checksum: Checksum,
    },
    Announced,
    Ask {
        operation: u64,
    },
    List {
        client: ClientId,
        request: u64,
    },
    Delete {
        operation: u64,
    },
    Drop {
        operation: u64,
    },
}

/// Why every node is asked for a key.
#[derive(Debug)]
pub(super) enum AskFor {
    Fetch(FetchId),
    Get {
        link: LinkId,
        request: u64,
        asker: Option<NodeId>,
    },
    Delete(u64),
}

#[derive(Debug)]
pub(super) struct Ask {
    key: Key,
    why: AskFor,
    left: usize,
}

impl Engine {
    pub(super) fn ask_peer(&mut self, link: LinkId, message: PeerMessage, pending: Pending) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        self.pending.insert(request, (link, pending));
        self.out.push(Action::Send {
            link,
            request,
            message,
            payload: None,
        });
        request
    }

    pub(super) fn tell_peer(&mut self, link: LinkId, message: PeerMessage) {
        self.answer_peer(link, 0, message);
    }

    pub(super) fn answer_peer(&mut self, link: LinkId, request: u64, message: PeerMessage) {
        if self.links.contains_key(&link) {
            self.out.push(Action::Send {
                link,
                request,
                message,
                payload: None,
            });
        }
    }

    /// The answer to this question does not matter any more.
    pub(super) fn abandon(&mut self, request: u64) {
        if let Some((_, pending)) = self.pending.get_mut(&request) {
            *pending = Pending::Abandoned;
        }
    }

    pub(super) fn link_to(&self, node: NodeId) -> Option<LinkId> {
        self.peers.get(&node)?.link
    }

    /// Whether a node, in this incarnation, is known to live.
    pub(super) fn is_alive(&self, node: NodeId, epoch: Epoch) -> bool {
        self.peers
            .get(&node)
            .is_some_and(|peer| peer.member.epoch == epoch)
    }

    pub(super) fn dial(&mut self, address: &str) {
        let dialled = self
            .links
            .values()
            .any(|link| !link.inbound && link.address == address);
        if !dialled && self.dialling.insert(address.to_owned()) {
            self.out.push(Action::Connect {
                address: address.to_owned(),
            });
        }
    }

    pub(super) fn link_up(&mut self, link: LinkId, fabric: FabricId, address: String, inbound: bool) {
        self.dialling.remove(&address);
        let join = !inbound && self.config.join.as_deref() == Some(address.as_str());
        self.links.insert(
            link,
            Link {
                fabric,
                address,
                inbound,
                node: None,
                heard: self.now,
            },
        );
        let hello = PeerMessage::Hello {
            member: self.config.member.clone(),
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            join,
        };
        self.tell_peer(link, hello);
    }

    pub(super) fn connect_failed(&mut self, address: &str, why: &StoreError) {
        self.dialling.remove(address);
        if self.config.join.as_deref() == Some(address) {
            self.directory_lost(why);
        } else {
            self.peers
                .retain(|_, peer| peer.link.is_some() || peer.member.address != address);
        }
    }

    fn directory_lost(&mut self, why: &StoreError) {
        if self.reconnect_attempts == 0 {
            self.out
                .push(Action::Note(Event::DirectoryLost { why: why.to_string() }));
        }
        let pause = (50 << self.reconnect_attempts.min(6)).min(RECONNECT_MS_MAX);
        self.reconnect_attempts = self.reconnect_attempts.saturating_add(1);
        // A share of the pause that differs from node to node keeps a cluster from dialling in step.
        let spread = self.config.member.node.0 % (pause / 2).max(1);
        self.timers
            .set(self.now.after_ms(pause + spread), Timer::Reconnect);
    }

    pub(super) fn reconnect(&mut self) {
        if self.directory_link.is_none()
            && let Some(address) = self.config.join.clone()
        {
            self.dial(&address);
        }
    }

    pub(super) fn link_down(&mut self, link: LinkId, why: &StoreError) {
        let Some(state) = self.links.get(&link) else {
            return;
        };
        let (node, address) = (state.node, state.address.clone());
        self.fetches_lost(link, &address, why);
        let lost: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, (of, _))| *of == link)
            .map(|(&request, _)| request)
            .collect();
        for request in lost {
            if let Some((_, pending)) = self.pending.remove(&request) {
                self.question_lost(pending, &address, why);
            }
        }
        self.leases_lost(link);
        self.links.remove(&link);
        if self.directory_link == Some(link) {
            self.directory_link = None;
            self.directory_lost(why);
        }
        let Some(node) = node else { return };
        let other = self
            .links
            .iter()
            .find(|(_, other)| other.node == Some(node))
            .map(|(&id, _)| id);
        let Some(peer) = self.peers.get_mut(&node) else {
            return;
        };
        if peer.link != Some(link) {
            return;
        }
        peer.link = other;
        if other.is_none() {
            self.peer_lost(node, why);
        }
    }

    fn peer_lost(&mut self, node: NodeId, why: &StoreError) {
        let Some(peer) = self.peers.remove(&node) else {
            return;
        };
        self.hints.forget_node(node);
        let (name, why) = (peer.member.name, why.to_string());
        self.out.push(Action::Note(Event::PeerDown { node, name, why }));
        if let Some(directory) = &mut self.directory {
            directory.node_lost(node);
            self.tell_members();
        }
    }

    fn question_lost(&mut self, pending: Pending, peer: &str, why: &StoreError) {
        let lost = |operation: &'static str| StoreError::PeerLost {
            operation: operation.into(),
            subject: String::new(),
            peer: peer.to_owned(),
            why: why.to_string().into(),
        };
        match pending {
            // `fetches_lost` has seen to gets.
            Pending::Get { .. } | Pending::Abandoned | Pending::Announced => {}
            Pending::Exclusive {
                client,
                request,
                generation,
                ..
            } => {
                self.free_object(generation);
                self.reply(client, request, Err(lost("put")));
            }
            Pending::Ask { operation } => self.asked(operation, None, None),
            Pending::List { client, request } => self.reply(client, request, Err(lost("list"))),
            Pending::Delete { operation } => self.delete_lost(operation, lost("delete")),
            Pending::Drop { operation } => self.dropped(operation, false),
        }
    }

    pub(super) fn peer_refused(&mut self, link: LinkId, why: &StoreError) {
        self.counters.refused += 1;
        self.out.push(Action::Note(Event::PeerRefused {
            link,
            why: why.to_string(),
        }));
        self.out.push(Action::Disconnect { link });
    }

    pub(super) fn heartbeat(&mut self) {
        let (now, silence_ms) = (self.now, self.config.heartbeat_ms * MISSED_MAX);
        let links: Vec<(LinkId, bool)> = self
            .links
            .iter()
            .map(|(&id, link)| (id, now.ms_since(link.heard) > silence_ms))
            .collect();
        for (link, silent) in links {
            if silent {
                self.out.push(Action::Disconnect { link });
            } else {
                self.tell_peer(link, PeerMessage::Heartbeat { answer: false });
            }
        }
        self.timers
            .set(now.after_ms(self.config.heartbeat_ms), Timer::Heartbeat);
    }

    pub(super) fn peer_message(
        &mut self,
        link: LinkId,
        request: u64,
        message: PeerMessage,
        payload_len: u64,
    ) {
        let Some(state) = self.links.get_mut(&link) else {
            return;
        };
        state.heard = self.now;
        let known = state.node;
        if let Err(why) = message.check() {
            return self.peer_refused(link, &why);
        }
        if payload_len != 0 && !matches!(message, PeerMessage::Data { .. }) {
            let why = format!("{} has a payload of {payload_len} bytes", message.name());
            return self.peer_refused(link, &StoreError::protocol(why));
        }
        match (known, message) {
            (
                _,
                PeerMessage::Hello {
                    member,
                    version_min,
                    version_max,
                    join,
                },
            ) => {
                self.hello(link, member, version_min, version_max, join);
            }
            (_, PeerMessage::Failed { error }) if request == 0 => self.peer_refused(link, &error),
            (None, message) => {
                let why = format!("{} came before HELLO", message.name());
                self.peer_refused(link, &StoreError::protocol(why));
            }
            (Some(node), message) => self.peer_says(link, node, request, message, payload_len),
        }
    }

    fn hello(&mut self, link: LinkId, member: Member, version_min: u16, version_max: u16, join: bool) {
        let refusal = if let Err(error) = negotiate(version_min, version_max) {
            Some(error)
        } else if member.node == self.config.member.node {
            let why = format!(
                "a node named {:?} is already in this cluster: give each its own name",
                member.name
            );
            Some(StoreError::denied("join", why))
        } else if join && self.directory.is_none() {
            let why = "this node does not keep the directory: join the node that does".to_owned();
            Some(StoreError::denied("join", why))
        } else {
            match self.peers.get(&member.node) {
                Some(peer) if peer.member.epoch > member.epoch => {
                    let why = format!("a later incarnation of {:?} is known", member.name);
                    Some(StoreError::stale("join", member.node, why))
                }
                _ => None,
            }
        };
        if let Some(error) = refusal {
            self.tell_peer(link, PeerMessage::Failed { error: error.clone() });
            return self.peer_refused(link, &error);
        }
        self.welcome(link, member, join);
    }

    fn welcome(&mut self, link: LinkId, member: Member, join: bool) {
        let node = member.node;
        if self
            .peers
            .get(&node)
            .is_some_and(|peer| peer.member.epoch < member.epoch)
        {
            let why = StoreError::stale("link", &member.name, "the node has started again");
            self.peer_lost(node, &why);
        }
        let Some(state) = self.links.get_mut(&link) else {
            return;
        };
        state.node = Some(node);
        let is_directory = !state.inbound && self.config.join.as_deref() == Some(state.address.as_str());
        let (name, address) = (member.name.clone(), member.address.clone());
        let links = &self.links;
        let peer = self.peers.entry(node).or_insert_with(|| Peer {
            member: member.clone(),
            link: None,
        });
        let fresh = peer.link.is_none_or(|old| !links.contains_key(&old));
        peer.member = member;
        if fresh {
            peer.link = Some(link);
            self.out.push(Action::Note(Event::PeerUp { node, name, address }));
        }
        if is_directory {
            self.directory_link = Some(link);
            self.reconnect_attempts = 0;
            self.out.push(Action::Note(Event::DirectoryFound));
            self.announce_all(link);
        }
        if join {
            self.tell_members();
        }
        self.fetches_waiting_start();
    }

    /// Tells every peer who is there.
    fn tell_members(&mut self) {
        let mut members: Vec<Member> = self.peers.values().map(|peer| peer.member.clone()).collect();
        members.push(self.config.member.clone());
        members.truncate(KEYS_PER_MESSAGE_MAX);
        let links: Vec<LinkId> = self.peers.values().filter_map(|peer| peer.link).collect();
        for link in links {
            self.tell_peer(
                link,
                PeerMessage::Members {
                    members: members.clone(),
                },
            );
        }
    }

    fn members(&mut self, link: LinkId, members: &[Member]) {
        if self.directory_link != Some(link) {
            return;
        }
        let own = self.config.member.node;
        self.peers
            .retain(|node, peer| peer.link.is_some() || members.iter().any(|m| m.node == *node));
        for member in members.iter().filter(|member| member.node != own) {
            let peer = self.peers.entry(member.node);
            peer.or_insert_with(|| Peer {
                member: member.clone(),
                link: None,
            });
        }
    }

    fn peer_says(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        message: PeerMessage,
        payload_len: u64,
    ) {
        match message {
            PeerMessage::Hello { .. } | PeerMessage::Heartbeat { .. } => {}
            PeerMessage::Members { members } => self.members(link, &members),
            PeerMessage::Get {
                key,
                range,
                inline_max,
            } => {
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
                let object = self.objects.sealed(&key).map(|(_, object)| object.announced());
                self.answer_peer(link, request, PeerMessage::Asked { object });
            }
            PeerMessage::Watch { key } => self.watch(node, key),
            PeerMessage::Exists { key, .. } => self.key_exists(&key),
            PeerMessage::Delete { key } => self.delete_for_peer(link, request, key),
            PeerMessage::Drop { key, object } => {
                let existed = self.drop_local(&key, Some(object));
                self.answer_peer(link, request, PeerMessage::Dropped { existed });
            }
            PeerMessage::List { prefix, after, limit } => {
                let (listed, more) = self.list_known(&prefix, after.as_ref(), limit);
                let objects = listed.into_iter().map(|(announced, _)| announced).collect();
                self.answer_peer(link, request, PeerMessage::Listed { objects, more });
            }
            answer => self.peer_answers(link, node, request, answer, payload_len),
        }
    }

    fn peer_answers(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        answer: PeerMessage,
        payload_len: u64,
    ) {
        if self.pending.get(&request).is_none_or(|(of, _)| *of != link) {
            return;
        }
        let Some((_, pending)) = self.pending.remove(&request) else {
            return;
        };
        match (pending, answer) {
            (Pending::Get { fetch }, PeerMessage::Data { object, meta }) => {
                self.fetch_data(link, request, fetch, object, meta, payload_len);
            }
            (
                Pending::Get { fetch },
                PeerMessage::Grant {
                    object,
                    meta,
                    granted,
                },
            ) => {
                self.fetch_grant(link, fetch, object, meta, granted);
            }
            (Pending::Abandoned, PeerMessage::Grant { granted, .. }) => {
                self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
            }
            (Pending::Abandoned | Pending::Announced, PeerMessage::Failed { .. }) => {}
            (Pending::Abandoned, _) => {}
            (Pending::Get { fetch }, PeerMessage::Located { holders }) => self.fetch_located(fetch, &holders),
            (Pending::Get { fetch }, PeerMessage::Failed { error }) => {
                self.fetch_refused(link, fetch, &error)
            }
            (
                Pending::Exclusive {
                    client,
                    request,
                    generation,
                    checksum,
                },
                PeerMessage::Announced { refused },
            ) => {
                self.exclusive_answer(client, request, generation, checksum, refused);
            }
            (Pending::Announced, PeerMessage::Announced { refused }) => {
                for key in refused {
                    self.drop_local(&key, None);
                }
            }
            (Pending::Ask { operation }, PeerMessage::Asked { object }) => {
                self.asked(operation, Some(node), object);
            }
            (Pending::List { client, request }, PeerMessage::Listed { objects, more }) => {
                let listed = |a: Announced| Listed {
                    key: a.key,
                    len_bytes: a.len_bytes,
                    holders: Vec::new(),
                };
                let objects = objects.into_iter().map(listed).collect();
                self.reply(client, request, Ok(ClientReply::Listed { objects, more }));
            }
            (Pending::Delete { operation }, PeerMessage::Dropped { existed }) => {
                self.dropped(operation, existed);
            }
            (Pending::Drop { operation }, PeerMessage::Dropped { existed }) => {
                self.dropped(operation, existed)
            }
            (pending, answer) => {
                let why = StoreError::protocol(format!("{} answers another question", answer.name()));
                self.question_lost(pending, "the peer", &why);
                self.peer_refused(link, &why);
            }
        }
    }

    fn exclusive_answer(
        &mut self,
        client: ClientId,
        request: u64,
        generation: Generation,
        checksum: Checksum,
        refused: Vec<Key>,
    ) {
        match refused.into_iter().next() {
            None => self.seal_now(client, request, generation, checksum),
            Some(key) => {
                self.free_object(generation);
                self.reply(
                    client,
                    request,
                    Err(StoreError::AlreadyExists { key: key.to_string() }),
                );
            }
        }
    }

    /// Tells the directory that an object is here.
    pub(super) fn announce(&mut self, announced: Announced) {
        let own = self.config.member.node;
        if let Some(directory) = &mut self.directory {
            directory.announce(own, &announced, false);
        } else if let Some(link) = self.directory_link {
            let objects = vec![announced];
            self.ask_peer(
                link,
                PeerMessage::Announce {
                    objects,
                    exclusive: false,
                },
                Pending::Announced,
            );
        }
    }

    fn announce_all(&mut self, link: LinkId) {
        let all: Vec<Announced> = self
            .objects
            .iter_sealed()
            .map(|(_, object)| object.announced())
            .collect();
        for objects in all.chunks(KEYS_PER_MESSAGE_MAX) {
            let objects = objects.to_vec();
            self.ask_peer(
                link,
                PeerMessage::Announce {
                    objects,
                    exclusive: false,
                },
                Pending::Announced,
            );
        }
    }

    pub(super) fn withdraw_from_directory(&mut self, announced: Announced) {
        let own = self.config.member.node;
        if let Some(directory) = &mut self.directory {
            directory.withdraw(own, &announced.key, announced.object);
        } else if let Some(link) = self.directory_link {
            self.tell_peer(
                link,
                PeerMessage::Withdraw {
                    objects: vec![announced],
                },
            );
        }
    }

    fn announced_by(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        objects: &[Announced],
        exclusive: bool,
    ) {
        let Some(directory) = &mut self.directory else {
            let error = StoreError::unavailable("the directory", "this node does not keep it");
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        };
        let mut refused = Vec::new();
        let mut kept = Vec::new();
        for announced in objects {
            match directory.announce(node, announced, exclusive) {
                Verdict::Kept => kept.push(announced.key.clone()),
                Verdict::Refused => refused.push(announced.key.clone()),
            }
        }
        self.answer_peer(link, request, PeerMessage::Announced { refused });
        for key in kept {
            self.key_exists(&key);
        }
    }

    /// A GET for what is not here: this node may know who has it.
    fn redirect(&mut self, link: LinkId, asker: NodeId, request: u64, key: Key) {
        if self.directory.is_none() {
            let error = StoreError::not_found("get", &key);
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        }
        let holders = self.live_holders(&key, asker);
        if holders.is_empty() {
            return self.ask_everyone(
                key,
                AskFor::Get {
                    link,
                    request,
                    asker: Some(asker),
                },
            );
        }
        self.answer_peer(link, request, PeerMessage::Located { holders });
    }

    /// Nodes that hold a key and live, but not `except` and not this one.
    pub(super) fn live_holders(&self, key: &Key, except: NodeId) -> Vec<Holder> {
        let Some(directory) = &self.directory else {
            return Vec::new();
        };
        let holders = directory.holders(key).filter(|(node, _)| *node != except);
        let holder = |(node, _)| {
            let peer = self.peers.get(&node)?;
            Some(Holder {
                node,
                address: peer.member.address.clone(),
            })
        };
        holders.filter_map(holder).collect()
    }

    pub(super) fn known_elsewhere(&self, key: &Key) -> bool {
        !self.live_holders(key, self.config.member.node).is_empty()
    }

    /// Asks every linked peer whether it holds a key that the directory does not know: an announcement may still be
    /// under way, and "no such object" must be true when it is said.
    pub(super) fn ask_everyone(&mut self, key: Key, why: AskFor) {
        let asker = match &why {
            AskFor::Get { asker, .. } => *asker,
            _ => None,
        };
        let links: Vec<LinkId> = self
            .peers
            .iter()
            .filter(|(node, _)| Some(**node) != asker)
            .filter_map(|(_, peer)| peer.link)
            .collect();
        let operation = self.next_operation;
        self.next_operation += 1;
        self.asks.insert(
            operation,
            Ask {
                key: key.clone(),
                why,
                left: links.len(),
            },
        );
        if links.is_empty() {
            return self.ask_over(operation);
        }
        self.timers
            .set(self.now.after_ms(OPERATION_MS), Timer::Operation(operation));
        for link in links {
            self.ask_peer(
                link,
                PeerMessage::Ask { key: key.clone() },
                Pending::Ask { operation },
            );
        }
    }

    fn asked(&mut self, operation: u64, node: Option<NodeId>, object: Option<Announced>) {
        if let (Some(node), Some(announced), Some(directory)) = (node, object, &mut self.directory) {
            directory.announce(node, &announced, false);
        }
        let Some(ask) = self.asks.get_mut(&operation) else {
            return;
        };
        ask.left = ask.left.saturating_sub(1);
        let found = ask.key.clone();
        let all_in = ask.left == 0;
        if all_in || self.known_elsewhere(&found) {
            self.ask_over(operation);
        }
    }

    fn ask_over(&mut self, operation: u64) {
        let Some(ask) = self.asks.remove(&operation) else {
            return;
        };
        let except = match &ask.why {
            AskFor::Get {
                asker: Some(asker), ..
            } => *asker,
            _ => self.config.member.node,
        };
        let holders = self.live_holders(&ask.key, except);
        match ask.why {
            AskFor::Fetch(fetch) if holders.is_empty() => {
                self.fetch_failed(fetch, &StoreError::not_found("get", &ask.key));
            }
            AskFor::Fetch(fetch) => self.fetch_from(fetch, &holders),
            AskFor::Get { link, request, .. } if holders.is_empty() => {
                let error = StoreError::not_found("get", &ask.key);
                self.answer_peer(link, request, PeerMessage::Failed { error });
            }
            AskFor::Get { link, request, .. } => {
                self.answer_peer(link, request, PeerMessage::Located { holders });
            }
            AskFor::Delete(operation) => self.delete_from_holders(operation),
        }
    }

    pub(super) fn operation_deadline(&mut self, operation: u64) {
        if self.asks.contains_key(&operation) {
            self.ask_over(operation);
        }
        self.delete_deadline(operation);
    }

    fn watch(&mut self, node: NodeId, key: Key) {
        if self.objects.sealed(&key).is_some() || self.known_elsewhere(&key) {
            return self.tell_exists(node, &key);
        }
        let deadline = self.now.after_ms(WATCH_MS);
        let waiting = self.waiting_keys.entry(key).or_default();
        let who = Waiter::Peer { node };
        if !waiting.iter().any(|w| w.who == who) {
            waiting.push(WaitingKey {
                who,
                deadline,
                timeout_ms: WATCH_MS,
            });
            self.timers.set(deadline, Timer::Wait);
        }
    }

    pub(super) fn tell_exists(&mut self, node: NodeId, key: &Key) {
        let own = self.config.member.node;
        let mut holders = self.live_holders(key, own);
        if self.objects.sealed(key).is_some() {
            holders.push(Holder {
                node: own,
                address: self.config.member.address.clone(),
            });
        }
        if let Some(link) = self.link_to(node)
            && !holders.is_empty()
        {
            self.tell_peer(
                link,
                PeerMessage::Exists {
                    key: key.clone(),
                    holders,
                },
            );
        }
    }

    /// What the directory knows, or, where this node does not keep it, what is here.
    fn list_known(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: u32,
    ) -> (Vec<(Announced, Vec<NodeId>)>, bool) {
        let limit = usize::try_from(limit)
            .unwrap_or(usize::MAX)
            .clamp(1, KEYS_PER_MESSAGE_MAX);
        let mut listed: Vec<_> = match &self.directory {
            Some(directory) => directory.list(prefix, after).take(limit + 1).collect(),
            None => {
                let own = self.config.member.node;
                let here = self
                    .objects
                    .list(prefix, after)
                    .map(|o| (o.announced(), vec![own]));
                here.take(limit + 1).collect()
            }
        };
        // A list of long keys is cut so that it fits into one packet of a local socket, with room for its envelope.
        let mut bytes = 0;
        let fitting = listed.iter().take_while(|(announced, holders)| {
            bytes += announced.key.as_str().len() + LIST_ENTRY_LEN * (1 + holders.len());
            bytes <= LIST_BYTES_MAX
        });
        let limit = fitting.count().clamp(1, limit);
        let more = listed.len() > limit;
        listed.truncate(limit);
        (listed, more)
    }

    pub(super) fn list(
        &mut self,
        client: ClientId,
        request: u64,
        prefix: &str,
        after: Option<&Key>,
        limit: u32,
    ) -> Result<Option<ClientReply>, StoreError> {
        if self.directory.is_none()
            && let Some(link) = self.directory_link
        {
            let message = PeerMessage::List {
                prefix: prefix.to_owned(),
                after: after.cloned(),
                limit,
            };
            self.ask_peer(link, message, Pending::List { client, request });
            return Ok(None);
        }
        let (listed, more) = self.list_known(prefix, after, limit);
        let objects = listed
            .into_iter()
            .map(|(announced, nodes)| Listed {
                key: announced.key,
                len_bytes: announced.len_bytes,
                holders: nodes.into_iter().map(|node| self.name_of(node)).collect(),
            })
            .collect();
        Ok(Some(ClientReply::Listed { objects, more }))
    }

    fn name_of(&self, node: NodeId) -> String {
        if node == self.config.member.node {
            return self.config.member.name.clone();
        }
        self.peers
            .get(&node)
            .map_or_else(|| format!("node {node}"), |peer| peer.member.name.clone())
    }

    /// Names of the nodes that hold an object that is here.
    pub(super) fn holder_names(&self, key: &Key) -> Vec<String> {
        match &self.directory {
            Some(directory) => directory
                .holders(key)
                .map(|(node, _)| self.name_of(node))
                .collect(),
            None => vec![self.config.member.name.clone()],
        }
    }

    /// The name of the node at the other end of a link.
    pub(super) fn holder_names_from(&self, link: LinkId) -> Vec<String> {
        let node = self.links.get(&link).and_then(|link| link.node);
        node.map(|node| self.name_of(node)).into_iter().collect()
    }
}
