//! Links and peers: who is there, and through which connection. Not what is said over them (`cluster`). Invariant: a
//! peer's messages are believed only on links that its latest incarnation has opened.

use super::Engine;
use super::action::{Action, Event};
use super::input::FabricId;
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::tier::{Epoch, LinkId, NodeId};
use crate::wire::{KEYS_PER_MESSAGE_MAX, Member, PROTOCOL_MAX, PROTOCOL_MIN, PeerMessage, negotiate};

/// Heartbeats that may be missed before a peer is held to be dead.
const MISSED_MAX: u64 = 5;
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
    join: bool,
    pub(super) heard: Time,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) member: Member,
    pub(super) link: Option<LinkId>,
}

impl Engine {
    pub(super) fn link_to(&self, node: NodeId) -> Option<LinkId> {
        self.peers.get(&node)?.link
    }

    /// Whether a node, in this incarnation, is known to live. Without the directory, only of linked ones.
    pub(super) fn is_alive(&self, node: NodeId, epoch: Epoch) -> bool {
        let told = self.directory.is_some() || self.directory_link.is_some();
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
        let join = !inbound && self.config.join.as_deref() == Some(address.as_str());
        self.links.insert(link, Link { fabric, address, inbound, node: None, join: false, heard: self.now });
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
        self.dialled_down(address);
        if self.config.join.as_deref() == Some(address) {
            self.directory_lost(why);
            return;
        }
        self.fetches_undialled(address, why);
        self.peers.retain(|_, peer| peer.link.is_some() || peer.member.address != address);
    }

    fn directory_lost(&mut self, why: &StoreError) {
        if self.reconnect_attempts == 0 {
            self.out.push(Action::Note(Event::DirectoryLost { why: why.to_string() }));
        }
        let pause = (50 << self.reconnect_attempts.min(6)).min(RECONNECT_MS_MAX);
        self.reconnect_attempts = self.reconnect_attempts.saturating_add(1);
        // A share of the pause that differs from node to node keeps a cluster from dialling in step.
        let spread = self.config.member.node.0 % (pause / 2).max(1);
        self.timers.set(self.now.after_ms(pause + spread), Timer::Reconnect);
    }

    pub(super) fn reconnect(&mut self) {
        if self.directory_link.is_none()
            && let Some(address) = self.config.join.clone()
        {
            self.dial(&address);
        }
    }

    pub(super) fn link_down(&mut self, link: LinkId, why: &StoreError) {
        let Some(state) = self.links.remove(&link) else {
            return;
        };
        if !state.inbound {
            self.dialled_down(&state.address);
        }
        // From here on nothing new is asked over it, so what was asked is answered below, once.
        let was_directory = self.directory_link == Some(link);
        if was_directory {
            self.directory_link = None;
        }
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
        let was_to_be = !state.inbound && self.config.join.as_deref() == Some(state.address.as_str());
        if was_directory || (was_to_be && self.directory_link.is_none()) {
            self.directory_lost(why);
        }
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
        if let Some(directory) = &mut self.directory {
            directory.node_lost(node);
            self.tell_members();
        }
    }

    pub(super) fn peer_refused(&mut self, link: LinkId, why: &StoreError) {
        self.counters.refused += 1;
        self.out.push(Action::Note(Event::PeerRefused { link, why: why.to_string() }));
        self.hang_up(link);
    }

    pub(super) fn heartbeat(&mut self) {
        let (now, silence_ms) = (self.now, self.config.heartbeat_ms * MISSED_MAX);
        let links: Vec<(LinkId, bool)> =
            self.links.iter().map(|(&id, link)| (id, now.ms_since(link.heard) > silence_ms)).collect();
        for (link, silent) in links {
            if silent {
                self.hang_up(link);
            } else {
                self.tell_peer(link, PeerMessage::Heartbeat);
            }
        }
        self.timers.set(now.after_ms(self.config.heartbeat_ms), Timer::Heartbeat);
    }

    pub(super) fn hello(
        &mut self,
        link: LinkId,
        member: Member,
        version_min: u16,
        version_max: u16,
        join: bool,
    ) {
        let refusal = if let Err(error) = negotiate(version_min, version_max) {
            Some(error)
        } else if member.node == self.config.member.node {
            let why =
                format!("a node named {:?} is already in this cluster: give each its own name", member.name);
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
        self.welcome(link, member, join);
    }

    fn welcome(&mut self, link: LinkId, member: Member, join: bool) {
        let node = member.node;
        if self.peers.get(&node).is_some_and(|peer| peer.member.epoch < member.epoch) {
            let why = StoreError::stale("link", &member.name, "the node has started again");
            self.disown_links(node, |_| true);
            self.peer_lost(node, &why);
        }
        if join {
            // It announces everything again. What came through an older link must not be mixed with that.
            self.disown_links(node, |link| link.join);
            if let Some(directory) = &mut self.directory {
                directory.node_lost(node);
            }
        }
        let Some(state) = self.links.get_mut(&link) else {
            return;
        };
        state.node = Some(node);
        state.join = join;
        let is_directory = !state.inbound && self.config.join.as_deref() == Some(state.address.as_str());
        let (name, address) = (member.name.clone(), member.address.clone());
        let links = &self.links;
        let peer = self.peers.entry(node).or_insert_with(|| Peer { member: member.clone(), link: None });
        let linked = |link: LinkId| links.get(&link).is_some_and(|link| link.node == Some(node));
        let fresh = !peer.link.is_some_and(linked);
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
            self.watch_all(link);
        }
        if join {
            self.tell_members();
        }
        self.fetches_waiting_start();
    }

    /// Closes other links of a node, and believes nothing that still comes through them.
    fn disown_links(&mut self, node: NodeId, which: impl Fn(&Link) -> bool) {
        let disowned = |(&id, link): (&LinkId, &mut Link)| {
            let disowned = link.node == Some(node) && which(link);
            disowned.then(|| {
                link.node = None;
                id
            })
        };
        let links: Vec<LinkId> = self.links.iter_mut().filter_map(disowned).collect();
        for link in links {
            self.hang_up(link);
        }
    }

    /// Tells every peer who is there.
    fn tell_members(&mut self) {
        let mut members: Vec<Member> = self.peers.values().map(|peer| peer.member.clone()).collect();
        members.push(self.config.member.clone());
        members.truncate(KEYS_PER_MESSAGE_MAX);
        let links: Vec<LinkId> = self.peers.values().filter_map(|peer| peer.link).collect();
        for link in links {
            self.tell_peer(link, PeerMessage::Members { members: members.clone() });
        }
    }

    pub(super) fn members(&mut self, from: NodeId, members: &[Member]) {
        if self.directory_node() != Some(from) {
            return;
        }
        let own = self.config.member.node;
        self.peers.retain(|node, peer| peer.link.is_some() || members.iter().any(|m| m.node == *node));
        for member in members.iter().filter(|member| member.node != own) {
            let peer =
                self.peers.entry(member.node).or_insert_with(|| Peer { member: member.clone(), link: None });
            if peer.link.is_none() && peer.member.epoch < member.epoch {
                peer.member = member.clone();
            }
        }
    }
}
