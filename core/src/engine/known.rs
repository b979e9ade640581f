//! The directory's two sides: what this node tells it, and what it answers where it is kept here. Not its books
//! (`directory`). Invariant: "no such object" is said only after everyone who is linked was asked.

use super::Engine;
use super::awaiting::Listing;
use super::cluster::{Ask, AskFor, Pending};
use super::directory::Verdict;
use super::keeper::Keeper;
use super::timer::Time;
use super::timer::Timer;
use super::waiting::{Waiter, WaitingKey};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, LinkId, NodeId};
use crate::wire::{Announced, ClientReply, Holder, KEYS_PER_MESSAGE_MAX, Listed, PeerMessage};

/// How long everyone may take to say whether they hold a key, in milliseconds.
const ASK_MS: u64 = 5_000;
/// Bytes of a list's entries, and a bound on one entry beside its key (a holder's name among them).
const LIST_BYTES_MAX: usize = 48 * 1024;
const LIST_ENTRY_LEN: usize = 80;
/// Holders that one answer names.
const LOCATED_MAX: usize = 16;
/// Keys that may be watched at once: a bound on what peers can make this node remember.
const WATCHED_MAX: usize = 1 << 20;

/// LOCATED: of many holders some, and different ones to different askers.
fn located(asker: NodeId, mut holders: Vec<Holder>) -> PeerMessage {
    if holders.len() > LOCATED_MAX {
        let first = usize::try_from(asker.0 % holders.len() as u64).unwrap_or(0);
        holders.rotate_left(first);
        holders.truncate(LOCATED_MAX);
    }
    PeerMessage::Located { holders }
}

impl Engine {
    /// Tells the directory that an object is here.
    pub(super) fn announce(&mut self, announced: Announced) {
        let (own, now) = (self.config.member.node, self.now);
        if let Some(directory) = &mut self.directory {
            if directory.announce(own, &announced, false, now) == Verdict::Refused {
                self.drop_local(&announced.key, Some(announced.object));
            }
        } else if let Some(link) = self.directory_link {
            self.note_announced(link, announced);
        }
    }

    fn announce_objects(&mut self, link: LinkId, objects: Vec<Announced>) {
        let message = PeerMessage::Announce { objects: objects.clone(), exclusive: false };
        self.ask_peer(link, message, Pending::Announced { objects });
    }

    pub(super) fn announce_all(&mut self, link: LinkId) {
        let sealed = self.objects.iter_sealed();
        let all: Vec<Announced> = sealed.map(|(_, object)| object.announced(self.now)).collect();
        for objects in all.chunks(KEYS_PER_MESSAGE_MAX) {
            self.announce_objects(link, objects.to_vec());
        }
    }

    /// Tells a directory that was not linked, or has started again, for which keys someone waits here.
    pub(super) fn watch_all(&mut self, link: LinkId) {
        let here = |waiting: &WaitingKey| matches!(waiting.who, Waiter::Client { .. });
        let keys: Vec<Key> = self
            .waiting_keys
            .iter()
            .filter(|(_, waiting)| waiting.iter().any(here))
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            self.tell_peer(link, PeerMessage::Watch { key });
        }
    }

    pub(super) fn withdraw_from_directory(&mut self, announced: Announced) {
        let own = self.config.member.node;
        if let Some(directory) = &mut self.directory {
            directory.withdraw(own, &announced.key, announced.object);
        } else if let Some(link) = self.directory_link {
            self.note_withdrawn(link, announced);
        }
    }

    pub(super) fn announced_by(
        &mut self,
        link: LinkId,
        node: NodeId,
        request: u64,
        objects: &[Announced],
        exclusive: bool,
    ) {
        let joined = self.links.get(&link).is_some_and(|link| link.joined);
        // Until everyone has announced, it is not known here which keys are taken.
        let settling = exclusive && self.is_settling();
        let now = self.now;
        let Some(directory) = self.directory.as_mut().filter(|_| joined && !settling) else {
            let error = if settling {
                self.no_directory("announce")
            } else {
                StoreError::unavailable("the directory", "this node does not keep it, or was not joined")
            };
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        };
        let mut refused = Vec::new();
        let mut kept = Vec::new();
        for announced in objects {
            match directory.announce(node, announced, exclusive, now) {
                Verdict::Kept => kept.push(announced.key.clone()),
                Verdict::Refused => refused.push(announced.key.clone()),
            }
        }
        self.answer_peer(link, request, PeerMessage::Announced { refused });
        // What is only about to be sealed is announced once more when it is.
        for key in kept.into_iter().filter(|_| !exclusive) {
            self.key_exists(&key);
        }
    }

    /// A GET for what is not here: this node may know who has it.
    pub(super) fn redirect(&mut self, link: LinkId, asker: NodeId, request: u64, key: Key) {
        if self.directory.is_none() {
            let error = StoreError::not_found("get", &key);
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        }
        let holders = self.live_holders(&key, asker);
        if holders.is_empty() {
            return self.ask_everyone(key, AskFor::Get { link, request, asker });
        }
        self.answer_peer(link, request, located(asker, holders));
    }

    /// A GET for what is here and is going to be granted: the asker is told who else has it, for it cannot ask any more
    /// if this node is lost while it reads.
    pub(super) fn tell_others(&mut self, link: LinkId, asker: NodeId, key: &Key, inline_max: u64) {
        let own = self.config.member.node;
        let granted = self.objects.sealed(key).is_some_and(|(_, object)| object.meta.len_bytes > inline_max);
        if self.directory.is_none() || !granted {
            return;
        }
        let mut holders = self.live_holders(key, asker);
        holders.retain(|holder| holder.node != own);
        holders.truncate(LOCATED_MAX);
        if !holders.is_empty() {
            self.tell_peer(link, PeerMessage::Exists { key: key.clone(), holders });
        }
    }

    /// Nodes that hold a key and live, but not `except`.
    pub(super) fn live_holders(&self, key: &Key, except: NodeId) -> Vec<Holder> {
        let Some(directory) = &self.directory else {
            return Vec::new();
        };
        let holders = directory.holders(key).filter(|(node, _)| *node != except);
        let holder = |(node, _)| {
            let own = &self.config.member;
            let member = if node == own.node { own } else { &self.peers.get(&node)?.member };
            Some(Holder { node, address: member.address.clone() })
        };
        holders.filter_map(holder).collect()
    }

    pub(super) fn known_elsewhere(&self, key: &Key) -> bool {
        !self.live_holders(key, self.config.member.node).is_empty()
    }

    /// Asks every linked peer whether it holds a key that the directory does not know: an announcement may still be
    /// under way, and "no such object" must be true when it is said.
    pub(super) fn ask_everyone(&mut self, key: Key, why: AskFor) {
        let asker = self.asker_of(&why);
        let links: Vec<LinkId> =
            self.peers.iter().filter(|(node, _)| **node != asker).filter_map(|(_, peer)| peer.link).collect();
        let operation = self.next_operation;
        self.next_operation += 1;
        let deadline = self.now.after_ms(ASK_MS);
        let ask = Ask { key: key.clone(), why, left: links.len(), found: Vec::new(), deadline };
        self.asks.insert(operation, ask);
        if links.is_empty() {
            return self.ask_over(operation);
        }
        self.timers.set(deadline, Timer::Operation(operation));
        for link in links {
            self.ask_peer(link, PeerMessage::Ask { key: key.clone() }, Pending::Ask { operation });
        }
    }

    /// A node says whether it holds what everyone was asked for. That is not for the books: what it holds it announces,
    /// and that it has let go of it may have been heard already, over another link than this answer's.
    pub(super) fn asked(&mut self, operation: u64, node: Option<NodeId>, object: Option<Announced>) {
        let Some(ask) = self.asks.get_mut(&operation) else {
            return;
        };
        ask.left = ask.left.saturating_sub(1);
        ask.found.extend(node.filter(|_| object.is_some()));
        if let AskFor::Delete(delete) = ask.why {
            self.delete_found(delete, object.map(|announced| announced.object));
        }
        let Some(ask) = self.asks.get(&operation) else {
            return;
        };
        // A delete is about every object of the key, a get about any.
        let found = !matches!(ask.why, AskFor::Delete(_)) && !self.holders_asked(ask).is_empty();
        if ask.left == 0 || found {
            self.ask_over(operation);
        }
    }

    /// Who has what everyone was asked for.
    fn holders_asked(&self, ask: &Ask) -> Vec<Holder> {
        let mut holders = self.live_holders(&ask.key, self.asker_of(&ask.why));
        for node in &ask.found {
            if let Some(peer) = self.peers.get(node)
                && holders.iter().all(|holder| holder.node != *node)
            {
                holders.push(Holder { node: *node, address: peer.member.address.clone() });
            }
        }
        holders
    }

    fn asker_of(&self, why: &AskFor) -> NodeId {
        match why {
            AskFor::Get { asker, .. } => *asker,
            AskFor::Fetch(_) | AskFor::Delete(_) => self.config.member.node,
        }
    }

    pub(super) fn ask_over(&mut self, operation: u64) {
        let Some(ask) = self.asks.remove(&operation) else {
            return;
        };
        self.timers.unset(ask.deadline, Timer::Operation(operation));
        let holders = self.holders_asked(&ask);
        let unsure = if !holders.is_empty() {
            None
        } else if ask.left > 0 {
            Some(StoreError::timed_out("get", &ask.key, ASK_MS))
        } else {
            self.is_settling().then(|| self.no_directory(&format!("get {:?}", ask.key)))
        };
        match ask.why {
            AskFor::Fetch(fetch) => match unsure {
                Some(why) => self.fetch_obstacle(fetch, why),
                None => self.fetch_asked_all(fetch, holders),
            },
            AskFor::Get { link, request, .. } if holders.is_empty() => {
                let error = unsure.unwrap_or_else(|| StoreError::not_found("get", &ask.key));
                self.answer_peer(link, request, PeerMessage::Failed { error });
            }
            AskFor::Get { link, request, asker } => {
                self.answer_peer(link, request, located(asker, holders));
            }
            AskFor::Delete(operation) => self.delete_from_holders(operation),
        }
    }

    pub(super) fn watch(&mut self, node: NodeId, key: Key) {
        if self.directory.is_none() {
            return;
        }
        if self.objects.sealed(&key).is_some() || self.known_elsewhere(&key) {
            return self.tell_exists(node, &key);
        }
        if self.waiting_keys.len() >= WATCHED_MAX {
            return;
        }
        let waiting = self.waiting_keys.entry(key).or_default();
        let who = Waiter::Peer { node };
        if !waiting.iter().any(|w| w.who == who) {
            // Until the key exists or the peer goes: a peer that links again asks again.
            waiting.push(WaitingKey { who, deadline: Time(u64::MAX), timeout_ms: 0 });
        }
    }

    pub(super) fn tell_exists(&mut self, node: NodeId, key: &Key) {
        // Who asks may hold it by now too: nothing is excepted.
        let mut holders = self.live_holders(key, NodeId::default());
        holders.truncate(KEYS_PER_MESSAGE_MAX);
        if let Some(link) = self.link_to(node)
            && !holders.is_empty()
        {
            self.tell_peer(link, PeerMessage::Exists { key: key.clone(), holders });
        }
    }

    /// What the directory knows, or, where this node does not keep it, what is here.
    pub(super) fn list_known(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: u32,
    ) -> (Vec<(Announced, Vec<NodeId>)>, bool) {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX).clamp(1, KEYS_PER_MESSAGE_MAX);
        let mut listed: Vec<_> = match &self.directory {
            Some(directory) => directory.list(prefix, after).take(limit + 1).collect(),
            None => {
                let own = self.config.member.node;
                let here = self.objects.list(prefix, after).map(|o| (o.announced(self.now), vec![own]));
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

    /// LIST: only the directory knows what there is.
    pub(super) fn list_for_peer(
        &mut self,
        link: LinkId,
        request: u64,
        prefix: &str,
        after: Option<&Key>,
        limit: u32,
    ) {
        if self.keeper() != Keeper::Here {
            let error = self.no_directory("list");
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        }
        let (listed, more) = self.list_known(prefix, after, limit);
        let objects = listed.into_iter().map(|(announced, _)| announced).collect();
        self.answer_peer(link, request, PeerMessage::Listed { objects, more });
    }

    pub(super) fn list(
        &mut self,
        client: ClientId,
        request: u64,
        prefix: String,
        after: Option<Key>,
        limit: u32,
    ) {
        let deadline = self.now.after_ms(self.config.await_ms());
        self.ask_list(Listing { client, request, prefix, after, limit, deadline });
    }

    pub(super) fn ask_list(&mut self, listing: Listing) {
        match self.keeper() {
            Keeper::At(link) => {
                let Listing { prefix, after, limit, .. } = listing.clone();
                let message = PeerMessage::List { prefix, after, limit };
                self.ask_peer(link, message, Pending::List(Box::new(listing)));
            }
            Keeper::Awaited if self.now < listing.deadline => self.await_list(listing),
            Keeper::Awaited => {
                let error = self.no_directory(&format!("list {:?}", listing.prefix));
                self.reply(listing.client, listing.request, Err(error));
            }
            Keeper::Here | Keeper::Unreachable => {
                let reply = self.listed(&listing.prefix, listing.after.as_ref(), listing.limit);
                self.reply(listing.client, listing.request, Ok(reply));
            }
        }
    }

    fn listed(&self, prefix: &str, after: Option<&Key>, limit: u32) -> ClientReply {
        let (listed, more) = self.list_known(prefix, after, limit);
        let objects = listed
            .into_iter()
            .map(|(announced, nodes)| Listed {
                key: announced.key,
                len_bytes: announced.len_bytes,
                holders: nodes.into_iter().map(|node| self.name_of(node)).collect(),
            })
            .collect();
        ClientReply::Listed { objects, more }
    }

    pub(super) fn name_of(&self, node: NodeId) -> String {
        if node == self.config.member.node {
            return self.config.member.name.clone();
        }
        self.peers.get(&node).map_or_else(|| format!("node {node}"), |peer| peer.member.name.clone())
    }

    /// Names of the nodes that hold an object that is here.
    pub(super) fn holder_names(&self, key: &Key) -> Vec<String> {
        match &self.directory {
            Some(directory) => directory.holders(key).map(|(node, _)| self.name_of(node)).collect(),
            None => vec![self.config.member.name.clone()],
        }
    }

    /// The name of the node at the other end of a link.
    pub(super) fn holder_names_from(&self, link: LinkId) -> Vec<String> {
        let node = self.links.get(&link).and_then(|link| link.node);
        node.map(|node| self.name_of(node)).into_iter().collect()
    }
}
