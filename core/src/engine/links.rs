//! Links and peers: who is there, and through which connection. Not what is said over them (`cluster`). Invariant: a
//! peer's messages are believed only on links that its latest incarnation has opened.

use super::Engine;
use super::action::{Action, Event};
use super::cluster::Pending;
use super::input::{FabricId, FabricUse};
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::tier::{Epoch, LinkId, NodeId};
use crate::wire::{
    KEYS_PER_MESSAGE_MAX, Member, PROTOCOL_MAX, PROTOCOL_MIN, PeerMessage, Present, negotiate,
};

/// Heartbeats that may be missed before a peer is held to be dead.
pub(super) const MISSED_MAX: u64 = 5;
/// The longest pause between two attempts to reach the directory, in milliseconds.
const RECONNECT_MS_MAX: u64 = 2_000;

#[derive(Debug)]
pub(super) struct Link {
    pub(super) fabric: FabricId,
    pub(super) address: String,
    pub(super) inbound: bool,
    /// Who is at the other end, once it has said so.
    pub(super) node: Option<NodeId>,
    /// Whether the peer announces to this node's directory through it.
    pub(super) joined: bool,
    pub(super) heard: Time,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) member: Member,
    pub(super) link: Option<LinkId>,
    /// Whether it says that it keeps the directory.
    pub(super) keeps: bool,
    /// Bytes that it has room for, as it last said.
    pub(super) room_bytes: Option<u64>,
    /// How long an answer from it takes, in nanoseconds, lately.
    pub(super) round_trip_ns: Option<u64>,
    /// The room that others were last told of.
    told_bytes: u64,
}

impl Peer {
    pub(super) const fn new(member: Member, room_bytes: Option<u64>) -> Self {
        Self { member, link: None, keeps: false, room_bytes, round_trip_ns: None, told_bytes: 0 }
    }
}

impl Engine {
    /// The fabric that carries a link.
    pub(super) fn fabric_of(&self, link: LinkId) -> Option<&FabricUse> {
        self.config.fabric(self.links.get(&link)?.fabric)
    }

    pub(super) fn link_to(&self, node: NodeId) -> Option<LinkId> {
        self.peers.get(&node)?.link
    }

    /// Whether a node, in this incarnation, is known to live. Of nodes that are not linked only where another one, which
    /// keeps the directory, has told of them.
    pub(super) fn is_alive(&self, node: NodeId, epoch: Epoch) -> bool {
        let told = self.directory_link.is_some();
        self.peers.get(&node).is_some_and(|peer| peer.member.epoch == epoch && (told || peer.link.is_some()))
    }

    /// The node that keeps the directory, if that is another one and there is a link to it.
    pub(super) fn directory_node(&self) -> Option<NodeId> {
        self.links.get(&self.directory_link?)?.node
    }

    pub(super) fn dial(&mut self, address: &str) {
        let dialled = self.links.values().any(|link| !link.inbound && link.address == address);
        if !dialled && !self.dialling.contains(address) && self.may_dial(address) {
            self.dialling.insert(address.to_owned());
            self.out.push(Action::Connect { address: address.to_owned() });
        }
    }

    pub(super) fn link_up(&mut self, link: LinkId, fabric: FabricId, address: String, inbound: bool) {
        if !inbound {
            self.dialling.remove(&address);
            self.dialled_up(&address);
        }
        let state = Link { fabric, address, inbound, node: None, joined: false, heard: self.now };
        self.links.insert(link, state);
        let hello = PeerMessage::Hello {
            member: self.config.member.clone(),
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            keeps: self.directory.is_some(),
        };
        self.tell_peer(link, hello);
    }

    pub(super) fn connect_failed(&mut self, address: &str, why: &StoreError) {
        self.dialling.remove(address);
        self.dialled_down(address);
        self.listed_lost(address, why);
        self.fetches_undialled(address, why);
        self.replications_undialled(address);
        self.peers.retain(|_, peer| peer.link.is_some() || peer.member.address != address);
    }

    /// Dials nodes of the list again after a pause.
    pub(super) fn set_reconnect(&mut self) {
        let pause = (50 << self.reconnect_attempts.min(6)).min(RECONNECT_MS_MAX);
        self.reconnect_attempts = self.reconnect_attempts.saturating_add(1);
        // A share of the pause that differs from node to node keeps a cluster from dialling in step.
        let spread = self.config.member.node.0 % (pause / 2).max(1);
        self.timers.set(self.now.after_ms(pause + spread), Timer::Reconnect);
    }

    pub(super) fn link_down(&mut self, link: LinkId, why: &StoreError) {
        let Some(state) = self.links.remove(&link) else {
            return;
        };
        if !state.inbound {
            self.dialled_down(&state.address);
        }
        // From here on nothing new is asked over it, so what was asked is answered below, once.
        if self.directory_link == Some(link) {
            self.directory_link = None;
        }
        let peer = state.node.and_then(|node| self.peers.get(&node)).filter(|_| state.inbound);
        let listens_at = peer.map(|peer| peer.member.address.clone());
        self.leases_lost(link);
        self.locations.forget_link(link);
        if let Some(node) = state.node {
            self.peer_unlinked(node, link, why);
        }
        self.fetches_lost(link, state.node, &state.address, why);
        for request in self.pending.numbers(|(of, _)| *of == link) {
            if let Some((_, pending)) = self.pending.remove(request) {
                self.question_lost(pending, &state.address, why);
            }
        }
        self.listed_lost(&listens_at.unwrap_or(state.address), why);
    }

    /// One of a peer's links has gone; if it was the last, so has the peer.
    fn peer_unlinked(&mut self, node: NodeId, link: LinkId, why: &StoreError) {
        let other = self.links.iter().find(|(_, other)| other.node == Some(node)).map(|(&id, _)| id);
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

    fn is_another(&self, peer: &Peer, member: &Member) -> bool {
        peer.member.address != member.address && peer.link.is_some_and(|link| self.links.contains_key(&link))
    }

    fn peer_lost(&mut self, node: NodeId, why: &StoreError) {
        let Some(peer) = self.peers.remove(&node) else {
            return;
        };
        self.hints.forget_node(node);
        self.paths.forget_node(node);
        self.forget_watches_of(node);
        let (name, why) = (peer.member.name, why.to_string());
        self.out.push(Action::Note(Event::PeerDown { node, name, why }));
        self.member_lost(node);
    }

    pub(super) fn peer_refused(&mut self, link: LinkId, why: &StoreError) {
        self.counters.refused += 1;
        self.out.push(Action::Note(Event::PeerRefused { link, why: why.to_string() }));
        self.hang_up(link);
    }

    pub(super) fn heartbeat(&mut self) {
        let (now, silence_ms) = (self.now, self.config.missed_ms());
        let room_bytes = self.room_bytes();
        let under_replicated = if self.directory.is_some() { self.repair.count() } else { 0 };
        let links: Vec<(LinkId, bool)> =
            self.links.iter().map(|(&id, link)| (id, now.ms_since(link.heard) > silence_ms)).collect();
        for (link, silent) in links {
            if silent {
                self.hang_up(link);
            } else {
                let message = PeerMessage::Heartbeat { room_bytes, under_replicated };
                self.ask_peer(link, message, Pending::Heartbeat { at: now });
            }
        }
        self.timers.set(now.after_ms(self.config.heartbeat_ms), Timer::Heartbeat);
        self.gpu_grew = true;
        self.retire_idle();
        if self.directory.is_some() && self.room_has_changed() {
            self.tell_members();
        }
        self.consider_keeping();
        self.ask_again();
    }

    /// HEARTBEAT.
    pub(super) fn heard_heartbeat(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        (room_bytes, under_replicated): (u64, u64),
    ) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.room_bytes = Some(room_bytes);
        }
        if self.directory_node() == Some(node) {
            self.under_replicated = under_replicated;
        }
        if request != 0 {
            self.answer_peer(link, request, PeerMessage::Alive);
        }
    }

    /// Whether some node's room is not any more what others were told, by more than an eighth.
    fn room_has_changed(&self) -> bool {
        self.peers.values().any(|peer| {
            let (told, now) = (peer.told_bytes, peer.room_bytes.unwrap_or(peer.told_bytes));
            told.abs_diff(now) > told / 8
        })
    }

    pub(super) fn hello(
        &mut self,
        link: LinkId,
        member: Member,
        version_min: u16,
        version_max: u16,
        keeps: bool,
    ) {
        let own = &self.config.member;
        if (member.node, member.epoch) == (own.node, own.epoch) {
            return self.met_itself(link);
        }
        let refusal = if let Err(error) = negotiate(version_min, version_max) {
            Some(error)
        } else if member.node == self.config.member.node {
            let why =
                format!("a node named {:?} is already in this cluster: give each its own name", member.name);
            Some(StoreError::denied("join", why))
        } else {
            match self.peers.get(&member.node) {
                Some(peer) if peer.member.epoch > member.epoch => {
                    let why = format!("a later incarnation of {:?} is known", member.name);
                    Some(StoreError::stale("join", member.node, why))
                }
                // The same name at the same address is a restart; elsewhere, while the link still lives, another node.
                Some(peer) if peer.member.epoch < member.epoch && self.is_another(peer, &member) => {
                    let (name, address) = (&member.name, &peer.member.address);
                    let why = format!(
                        "a node named {name:?} is in this cluster at {address}: give each its own name"
                    );
                    Some(StoreError::denied("join", why))
                }
                _ => None,
            }
        };
        if let Some(error) = refusal {
            self.tell_peer(link, PeerMessage::Failed { error: error.clone() });
            return self.peer_refused(link, &error);
        }
        self.welcome(link, member, keeps);
    }

    fn welcome(&mut self, link: LinkId, member: Member, keeps: bool) {
        let node = member.node;
        if self.peers.get(&node).is_some_and(|peer| peer.member.epoch < member.epoch) {
            let why = StoreError::stale("link", &member.name, "the node has started again");
            self.disown_links(node, |_, _| true);
            self.peer_lost(node, &why);
        }
        let Some(state) = self.links.get_mut(&link) else {
            return;
        };
        state.node = Some(node);
        let peer = self.peers.entry(node).or_insert_with(|| Peer::new(member.clone(), None));
        peer.member = member;
        peer.keeps = keeps;
        self.relink(node, link);
        self.listed_reached(link);
        self.fetches_waiting_start();
        self.replications_linked(node);
    }

    /// A peer is reached through this link from now on, unless there is another one.
    pub(super) fn relink(&mut self, node: NodeId, link: LinkId) {
        let links = &self.links;
        let linked = |link: LinkId| links.get(&link).is_some_and(|link| link.node == Some(node));
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| !peer.link.is_some_and(linked)) else {
            return;
        };
        peer.link = Some(link);
        let (name, address) = (peer.member.name.clone(), peer.member.address.clone());
        self.out.push(Action::Note(Event::PeerUp { node, name, address }));
    }

    /// Closes other links of a node, and believes nothing that still comes through them.
    pub(super) fn disown_links(&mut self, node: NodeId, which: impl Fn(LinkId, &Link) -> bool) {
        let disowned = |(&id, link): (&LinkId, &mut Link)| {
            let disowned = link.node == Some(node) && which(id, link);
            disowned.then(|| {
                link.node = None;
                link.joined = false;
                id
            })
        };
        let links: Vec<LinkId> = self.links.iter_mut().filter_map(disowned).collect();
        for link in links {
            self.hang_up(link);
        }
    }

    /// Tells every peer who is there.
    pub(super) fn tell_members(&mut self) {
        let members = self.members_now();
        for peer in self.peers.values_mut() {
            peer.told_bytes = peer.room_bytes.unwrap_or_default();
        }
        let links: Vec<LinkId> = self.peers.values().filter_map(|peer| peer.link).collect();
        for link in links {
            self.tell_peer(link, PeerMessage::Members { members: members.clone() });
        }
    }

    /// Who is there, and how much room each has.
    pub(super) fn members_now(&self) -> Vec<Present> {
        let own = Present { member: self.config.member.clone(), room_bytes: self.room_bytes() };
        let present = |peer: &Peer| {
            let room_bytes = peer.room_bytes.unwrap_or_default();
            Present { member: peer.member.clone(), room_bytes }
        };
        let others = self.peers.values().map(present);
        std::iter::once(own).chain(others).take(KEYS_PER_MESSAGE_MAX).collect()
    }

    /// MEMBERS.
    pub(super) fn members(&mut self, from: NodeId, members: &[Present]) {
        if self.directory_node() != Some(from) {
            return self.members_before(members);
        }
        let own = self.config.member.node;
        self.peers.retain(|node, peer| peer.link.is_some() || members.iter().any(|m| m.member.node == *node));
        for Present { member, room_bytes } in members.iter().filter(|present| present.member.node != own) {
            let room_bytes = Some(*room_bytes);
            let peer = self.peers.entry(member.node);
            let peer = peer.or_insert_with(|| Peer::new(member.clone(), room_bytes));
            if peer.link.is_some() {
                continue;
            }
            peer.room_bytes = room_bytes;
            if peer.member.epoch < member.epoch {
                peer.member = member.clone();
            }
        }
    }
}
