//! Who keeps the directory: this node's place in the list of those that may, whom it follows, when it takes the
//! directory over and when it hands it on. Not the books (`directory`), and not what is asked of them (`known`,
//! `delete`). Invariant: a node announces to one directory at a time; one that keeps the directory and reaches a node
//! before it in the list hands it over, with the memory of what was deleted.
//!
//! The first node of the list that can be reached keeps the directory. As each node decides by what it reaches itself,
//! two may keep one each while a network is apart: every node then follows the earlier one of those that it reaches, and
//! each of the two knows only of those that follow it. That they are no more than hints keeps bytes right meanwhile.

use std::collections::BTreeSet;

use super::Engine;
use super::action::{Action, Event};
use super::awaiting::Awaiting;
use super::cluster::{AskFor, Pending};
use super::directory::Directory;
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{LinkId, NodeId, ObjectId};
use crate::wire::{Announced, KEYS_PER_MESSAGE_MAX, PeerMessage, Present};

/// The least time that nodes have to announce what they hold after the directory has changed hands, in milliseconds:
/// longer than the longest pause between two attempts to reach a node.
const ANNOUNCE_MS_MIN: u64 = 3_000;

/// Where a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeper {
    /// This node keeps it.
    Here,
    /// At the other end of this link.
    At(LinkId),
    /// Nowhere yet; someone is about to keep it.
    Awaited,
    /// The one node that could keep it cannot be reached.
    Unreachable,
}

/// This node's part in keeping the directory.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// Addresses of the nodes that may keep it, in order. Empty: this one does, alone.
    list: Vec<String>,
    /// This node's own place among them.
    own: Option<usize>,
    /// Since when no node before this one can be reached.
    missed_since: Option<Time>,
    /// Places after this one of which it is not known yet whether a node there keeps the directory.
    unheard: BTreeSet<usize>,
    /// Nodes that announce to the directory that is kept here.
    joined: BTreeSet<NodeId>,
    /// Nodes that were there when the directory was taken over and have not announced yet; until when they may.
    awaited: BTreeSet<NodeId>,
    awaited_until: Option<Time>,
    /// Nodes that were lost, or heard of, while there was no directory; and the one that had kept it.
    lost: BTreeSet<NodeId>,
    last_keeper: Option<NodeId>,
    /// Requests that wait for a directory.
    pub(super) awaiting: Vec<Awaiting>,
    /// Whether it was said that there is no directory.
    said_lost: bool,
}

impl Keeping {
    pub(super) fn new(list: &[String], own_address: &str) -> Self {
        let own = list.iter().position(|address| address == own_address);
        let unheard = (0..list.len()).filter(|place| own.is_some_and(|own| own < *place)).collect();
        Self { list: list.to_vec(), own, unheard, ..Self::default() }
    }

    /// The place of an address in the list.
    pub(super) fn place(&self, address: &str) -> Option<usize> {
        self.list.iter().position(|listed| listed == address)
    }

    /// Whether another node may keep the directory when the one that does is lost.
    pub(super) const fn has_successors(&self) -> bool {
        self.list.len() > 1
    }

    pub(super) fn joined(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.joined.iter().copied()
    }
}

impl Engine {
    pub(super) fn keeper(&self) -> Keeper {
        match (&self.directory, self.directory_link) {
            (Some(_), _) if self.is_settling() => Keeper::Awaited,
            (Some(_), _) => Keeper::Here,
            (None, Some(link)) => Keeper::At(link),
            (None, None) if self.keeping.has_successors() => Keeper::Awaited,
            (None, None) => Keeper::Unreachable,
        }
    }

    /// Whether the directory that is kept here may still lack what nodes hold that were there before.
    pub(super) fn is_settling(&self) -> bool {
        self.keeping.awaited_until.is_some_and(|until| self.now < until)
    }

    /// Why what needs the directory cannot be done.
    pub(super) fn no_directory(&self, what: &str) -> StoreError {
        let why = if self.is_settling() {
            format!(
                "{what}: this node has only just taken it over, and not every node has announced what it holds"
            )
        } else if self.keeping.has_successors() {
            let list = self.keeping.list.join(", ");
            format!(
                "{what}: no node keeps it that can be reached; of {list} the first that can be reached will"
            )
        } else {
            format!("{what}: there is no link to the node that keeps it; it is being dialled")
        };
        StoreError::unavailable("the directory", why)
    }

    // Finding it.

    /// Dials the nodes of the list that this one wants to know of: all as long as it knows no directory, then those
    /// before the one that keeps it.
    pub(super) fn dial_list(&mut self) {
        for place in 0..self.keeping.list.len() {
            if self.wants_place(place) {
                let address = self.keeping.list[place].clone();
                self.dial(&address);
            }
        }
    }

    fn wants_place(&self, place: usize) -> bool {
        let until = match (&self.directory, self.directory_link) {
            (Some(_), _) => self.keeping.own.unwrap_or(0),
            (None, Some(link)) => self.list_place(link).unwrap_or(0),
            (None, None) => self.keeping.list.len(),
        };
        place < until && self.keeping.own != Some(place)
    }

    /// Whether a link to this address is wanted because of the list.
    pub(super) fn wants_listed(&self, address: &str) -> bool {
        self.keeping.place(address).is_some_and(|place| self.wants_place(place))
    }

    /// The place in the list of the node at the other end of a link.
    fn list_place(&self, link: LinkId) -> Option<usize> {
        let link = self.links.get(&link)?;
        let address = if link.inbound { &self.peers.get(&link.node?)?.member.address } else { &link.address };
        self.keeping.place(address)
    }

    /// Whether the node at the other end of a link, which has said who it is, comes before this place.
    fn is_before(&self, link: LinkId, place: usize) -> bool {
        let greeted = self.links.get(&link).is_some_and(|link| link.node.is_some());
        greeted && self.list_place(link).is_some_and(|other| other < place)
    }

    /// A node of the list cannot be reached, or not any more.
    pub(super) fn listed_lost(&mut self, address: &str, why: &StoreError) {
        let Some(place) = self.keeping.place(address) else {
            return;
        };
        self.keeping.unheard.remove(&place);
        self.directory_lost(why);
        self.set_reconnect();
        self.follow();
        self.consider_keeping();
    }

    /// A node of the list is there.
    pub(super) fn listed_reached(&mut self, link: LinkId) {
        let Some(place) = self.list_place(link) else {
            return;
        };
        self.keeping.unheard.remove(&place);
        if self.directory.is_some() && self.keeping.own.is_some_and(|own| place < own) {
            self.hand_over(link);
        }
        self.follow();
        self.consider_keeping();
        if self.directory.is_none() && self.keeping.list.len() == 1 {
            let peer = self.links.get(&link).and_then(|link| self.peers.get(&link.node?));
            // Nobody else will ever keep it.
            if let Some(peer) = peer.filter(|peer| !peer.keeps) {
                let (name, address) = (&peer.member.name, &peer.member.address);
                let why =
                    format!("{name:?} at {address} does not keep the directory: join the node that does");
                self.directory_lost(&StoreError::denied("join", why));
            }
        }
    }

    /// Says once that there is no directory.
    fn directory_lost(&mut self, why: &StoreError) {
        let lost = self.directory.is_none() && self.directory_link.is_none();
        if lost && !std::mem::replace(&mut self.keeping.said_lost, true) {
            self.out.push(Action::Note(Event::DirectoryLost { why: why.to_string() }));
        }
    }

    /// A link has led from this node to itself: that address of the list is its own.
    pub(super) fn met_itself(&mut self, link: LinkId) {
        if self.links.get(&link).is_none_or(|link| link.inbound) {
            // The other end of the same connection sees to it.
            return;
        }
        self.hang_up(link);
        if let Some(place) = self.list_place(link)
            && self.keeping.own.is_none()
        {
            let reached: BTreeSet<usize> =
                self.links.keys().filter_map(|link| self.list_place(*link)).collect();
            self.keeping.own = Some(place);
            self.keeping.unheard = (place + 1..self.keeping.list.len()).collect();
            self.keeping.unheard.retain(|place| !reached.contains(place));
            self.consider_keeping();
        }
    }

    /// KEEPS.
    pub(super) fn peer_keeps(&mut self, node: NodeId, keeps: bool) {
        let Some(peer) = self.peers.get_mut(&node) else {
            return;
        };
        peer.keeps = keeps;
        let name = peer.member.name.clone();
        if !keeps && self.directory_node() == Some(node) {
            self.directory_link = None;
            let why = format!("{name:?} keeps it no longer");
            self.directory_lost(&StoreError::unavailable("the directory", why));
        }
        self.follow();
        self.dial_list();
        self.consider_keeping();
    }

    /// Announces to the first node of the list that is reached and keeps the directory.
    pub(super) fn follow(&mut self) {
        if self.directory.is_some() {
            return;
        }
        let before = self.keeping.own.unwrap_or(usize::MAX);
        let keeps = |node: NodeId| self.peers.get(&node).is_some_and(|peer| peer.keeps);
        let reached = self.links.iter().filter(|(_, link)| link.node.is_some_and(keeps));
        let listed = reached.filter_map(|(&link, _)| Some((self.list_place(link)?, link)));
        let Some((place, link)) = listed.filter(|(place, _)| *place < before).min() else {
            return;
        };
        if let Some(current) = self.directory_link {
            if self.list_place(current).is_some_and(|current| current <= place) {
                return;
            }
            self.tell_peer(current, PeerMessage::Leave);
        }
        self.join(link);
    }

    fn join(&mut self, link: LinkId) {
        self.directory_link = Some(link);
        self.reconnect_attempts = 0;
        self.keeping.missed_since = None;
        self.keeping.said_lost = false;
        self.keeping.lost.clear();
        self.keeping.last_keeper = self.directory_node();
        self.out.push(Action::Note(Event::DirectoryFound));
        let heir = self.keeping.own.is_some();
        if heir {
            let members = self.members_now();
            self.tell_peer(link, PeerMessage::Members { members });
        }
        self.tell_peer(link, PeerMessage::Join { heir });
        // A directory that has started again knows of none. Of those that nodes of the list do not know, all nodes
        // together remember at least the latest.
        self.tell_deletions(link, if heir { usize::MAX } else { KEYS_PER_MESSAGE_MAX });
        self.announce_all(link);
        self.watch_all(link);
        self.directory_is_there();
    }

    /// What waited for a directory is asked now.
    fn directory_is_there(&mut self) {
        self.ask_again();
        self.fetches_waiting_start();
    }

    // Keeping it.

    /// Every now and then, and when something has changed: takes the directory over if it falls to this node.
    pub(super) fn consider_keeping(&mut self) {
        if let Some(until) = self.keeping.awaited_until
            && (self.now >= until || self.keeping.awaited.is_empty())
        {
            self.keeping.awaited_until = None;
            self.keeping.awaited.clear();
            self.directory_is_there();
        }
        let Some(own) = self.keeping.own.filter(|_| self.directory.is_none()) else {
            return;
        };
        if self.links.keys().any(|link| self.is_before(*link, own)) {
            self.keeping.missed_since = None;
            return;
        }
        let since = *self.keeping.missed_since.get_or_insert(self.now);
        let patience = self.config.missed_ms();
        // Who keeps it now hands it over as soon as it sees this node. Not waited for for ever: its list may be another.
        let kept = self.peers.values().any(|peer| peer.keeps && peer.link.is_some());
        let open = kept || !self.keeping.unheard.is_empty();
        let at = match (own, open) {
            (0, false) => since,
            (_, false) => since.after_ms(patience),
            (_, true) => since.after_ms(2 * patience),
        };
        if self.now < at {
            return self.timers.set(at, Timer::Keep);
        }
        self.take_over();
    }

    fn take_over(&mut self) {
        self.directory = Some(Directory::after(self.deleted.clone()));
        self.repair = super::repair::Repair::default();
        self.keeping.missed_since = None;
        self.keeping.said_lost = false;
        self.keeping.joined.clear();
        self.keeping.awaited = self.peers.keys().copied().collect();
        self.keeping.awaited.append(&mut self.keeping.lost);
        // From now on only those are taken to be alive that are linked.
        self.peers.retain(|_, peer| peer.link.is_some());
        let until = self.now.after_ms(self.config.missed_ms().max(ANNOUNCE_MS_MIN));
        self.keeping.awaited_until = Some(until);
        self.timers.set(until, Timer::Keep);
        self.out.push(Action::Note(Event::DirectoryTaken));
        self.directory_link = None;
        let here: Vec<Announced> =
            self.objects.iter_sealed().map(|(_, object)| object.announced(self.now)).collect();
        for announced in here {
            self.announce(announced);
        }
        self.tell_keeping(true);
        self.fetches_waiting_start();
        self.consider_keeping();
    }

    fn tell_keeping(&mut self, keeps: bool) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.tell_peer(link, PeerMessage::Keeps { keeps });
        }
    }

    /// A node that comes before this one is there: it keeps the directory from now on.
    fn hand_over(&mut self, link: LinkId) {
        let to = self.links.get(&link).and_then(|link| link.node).map(|node| self.name_of(node));
        self.out.push(Action::Note(Event::DirectoryHandedOver { to: to.unwrap_or_default() }));
        let members = self.members_now();
        self.tell_peer(link, PeerMessage::Members { members });
        self.tell_deletions(link, usize::MAX);
        self.directory = None;
        self.repair = super::repair::Repair::default();
        self.keeping.joined.clear();
        self.keeping.awaited.clear();
        self.keeping.awaited_until = None;
        for link in self.links.values_mut() {
            link.joined = false;
        }
        self.tell_keeping(false);
        self.forget_watches();
        for (operation, ask) in std::mem::take(&mut self.asks) {
            self.timers.unset(ask.deadline, Timer::Operation(operation));
            let why = self.no_directory(&format!("{:?}", ask.key));
            match ask.why {
                AskFor::Fetch(fetch) => self.fetch_obstacle(fetch, why),
                AskFor::Get { link, request, .. } => {
                    self.answer_peer(link, request, PeerMessage::Failed { error: why });
                }
                AskFor::Delete(delete) => self.delete_unasked(delete, why),
            }
        }
    }

    /// JOIN.
    pub(super) fn joined_by(&mut self, link: LinkId, node: NodeId, heir: bool) {
        let Some(directory) = &mut self.directory else {
            return self.tell_peer(link, PeerMessage::Keeps { keeps: false });
        };
        directory.node_lost(node);
        // It announces everything again. What came through an older link must not be mixed with that.
        self.disown_links(node, |id, other| other.joined && id != link);
        if let Some(state) = self.links.get_mut(&link) {
            state.joined = true;
        }
        self.relink(node, link);
        if heir {
            self.tell_deletions(link, usize::MAX);
        }
        self.keeping.joined.insert(node);
        self.tell_members();
        self.repair_with_newcomer();
        if self.keeping.awaited.remove(&node) {
            self.consider_keeping();
        }
    }

    /// LEAVE.
    pub(super) fn left_by(&mut self, link: LinkId, node: NodeId) {
        let Some(state) = self.links.get_mut(&link).filter(|link| link.joined) else {
            return;
        };
        state.joined = false;
        self.member_lost(node);
    }

    /// A node does not announce to this directory any more.
    pub(super) fn member_lost(&mut self, node: NodeId) {
        self.keeping.joined.remove(&node);
        let no_directory = self.directory.is_none() && self.directory_link.is_none();
        let kept_it = self.keeping.last_keeper == Some(node);
        if no_directory && !kept_it && self.keeping.lost.len() < KEYS_PER_MESSAGE_MAX {
            self.keeping.lost.insert(node);
        }
        if self.keeping.awaited.remove(&node) {
            self.consider_keeping();
        }
        if let Some(directory) = &mut self.directory {
            directory.node_lost(node);
            self.tell_members();
        }
    }

    /// MEMBERS from a node that kept the directory, or would keep it next: who was there before. Whether they still are
    /// is not known.
    pub(super) fn members_before(&mut self, members: &[Present]) {
        let waits = self.directory.is_none() || self.is_settling();
        if self.keeping.own.is_none() || !waits {
            return;
        }
        let own = self.config.member.node;
        let expected =
            if self.directory.is_some() { &mut self.keeping.awaited } else { &mut self.keeping.lost };
        for Present { member, .. } in members {
            let here = member.node == own || self.keeping.joined.contains(&member.node);
            if !here && expected.len() < KEYS_PER_MESSAGE_MAX {
                expected.insert(member.node);
            }
        }
    }

    // What was deleted.

    /// Tells of the latest of them.
    fn tell_deletions(&mut self, link: LinkId, most: usize) {
        for objects in self.deleted.latest(most).chunks(KEYS_PER_MESSAGE_MAX) {
            self.tell_peer(link, PeerMessage::Deletions { objects: objects.to_vec() });
        }
    }

    /// DELETIONS, from the directory, to it, or from one that is handed over.
    pub(super) fn deletions_from(&mut self, link: LinkId, node: NodeId, objects: &[ObjectId]) {
        let joined = self.links.get(&link).is_some_and(|link| link.joined);
        let keeps = self.peers.get(&node).is_some_and(|peer| peer.keeps);
        if joined || keeps || self.directory_link == Some(link) {
            self.deletions(objects);
        }
    }

    /// A directory does not know that an object was deleted, which this node does.
    pub(super) fn tell_of_deletion(&mut self, object: ObjectId) {
        if let Some(link) = self.directory_link {
            self.tell_peer(link, PeerMessage::Deletions { objects: vec![object] });
        }
    }

    /// What was deleted where this node did not hear of it does not come back here.
    pub(super) fn deletions(&mut self, objects: &[ObjectId]) {
        let news: BTreeSet<ObjectId> =
            objects.iter().copied().filter(|object| !self.deleted.contains(*object)).collect();
        if news.is_empty() {
            return;
        }
        let here = |(key, object): (&Key, &super::objects::Object)| {
            news.contains(&object.id).then(|| (key.clone(), object.id))
        };
        let here: Vec<(Key, ObjectId)> = self.objects.iter_sealed().filter_map(here).collect();
        let mut elsewhere = Vec::new();
        for object in &news {
            self.deleted.insert(*object);
        }
        if let Some(directory) = &mut self.directory {
            elsewhere = directory.holders_of(&news);
            for object in &news {
                directory.deleted(*object);
            }
            for (node, key, object) in &elsewhere {
                directory.withdraw(*node, key, *object);
            }
        }
        for (key, object) in here {
            self.drop_local(&key, Some(object));
        }
        for (node, key, object) in elsewhere {
            if let Some(link) = self.link_to(node) {
                self.ask_peer(link, PeerMessage::Drop { key, object }, Pending::Abandoned);
            }
        }
    }
}
