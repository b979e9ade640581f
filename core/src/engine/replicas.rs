//! Objects on several nodes: a put asks peers to fetch what it has sealed, and this node takes the replicas that it is
//! asked for. Not their repair (`repair`), which the directory sees to. Invariant: what is here as a replica leaves only
//! by a delete, by its time to live, or by force; a put that says that n nodes hold its object was told so by n - 1 of
//! them.

use std::collections::{BTreeMap, BTreeSet};

use super::Engine;
use super::cluster::Pending;
use super::fetch::{FetchFor, Scope, Want};
use super::objects::{Object, Objects};
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, Epoch, Generation, LinkId, NodeId, ObjectId, Tier};
use crate::wire::{Announced, ClientReply, Holder, PeerMessage, REPLICAS_MAX, Role};

/// How long a put waits for other nodes, in milliseconds. What is on its way then goes on.
const PUT_MS: u64 = 10_000;
/// How long a put waits for a link to a node before it asks another, in milliseconds.
const DIAL_MS: u64 = 500;
/// How long a node tries to fetch a replica, in milliseconds; and how many bytes give it one millisecond more.
const FETCH_MS: u64 = 30_000;
const FETCH_BYTES_PER_MS: u64 = 16 << 10;
/// Replicas that one node fetches at a time: a bound on what peers can make it do.
const FETCHES_MAX: usize = 64;

/// A put whose object is to be on other nodes too.
#[derive(Debug)]
pub(super) struct Replication {
    client: ClientId,
    request: u64,
    /// What the client is told, but for the number of nodes.
    sealed: ClientReply,
    key: Key,
    /// Which object: it may move to another place meanwhile.
    object: ObjectId,
    wanted: u8,
    /// Nodes that hold it, beside this one.
    held_by: BTreeSet<NodeId>,
    /// Nodes that were asked, or are being dialled for that until then.
    under_way: BTreeMap<NodeId, Option<Time>>,
    tried: BTreeSet<NodeId>,
    deadline: Time,
}

impl Replication {
    /// The object, if it is still that of its key.
    fn here<'a>(&self, objects: &'a Objects) -> Option<(Generation, &'a Object)> {
        objects.sealed(&self.key).filter(|(_, object)| object.id == self.object)
    }
}

/// Who wants a replica here.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReplicaFor {
    Peer {
        link: LinkId,
        request: u64,
    },
    /// The directory that is kept here.
    Directory,
}

/// A replica that this node is to hold.
#[derive(Clone, Debug)]
pub(super) struct ReplicaAsked {
    pub(super) by: ReplicaFor,
    pub(super) object: Announced,
    /// When the object's time to live is over.
    expires: Option<Time>,
}

impl Engine {
    // The put.

    /// Answers a put, once the object is on as many nodes as it is to be, or on those that could be reached in time.
    pub(super) fn answer_put(
        &mut self,
        client: ClientId,
        request: u64,
        key: &Key,
        replicas: u8,
        reply: Result<ClientReply, StoreError>,
    ) {
        let sealed = match reply {
            Ok(sealed @ ClientReply::Sealed { .. }) if replicas > 1 => sealed,
            reply => return self.reply(client, request, reply),
        };
        let Some((generation, there)) = self.objects.sealed(key) else {
            return self.reply(client, request, Ok(sealed));
        };
        // What is kept instead may have been put elsewhere: then its origin holds it already.
        let (object, origin) = (there.id, there.id.origin);
        if there.role == Role::Copy || there.hints.cache {
            let wanted = Announced { role: Role::Replica, replicas, ..there.announced(self.now) };
            self.become_replica(generation, &wanted, None);
        }
        let operation = self.next_operation;
        self.next_operation += 1;
        let deadline = self.now.after_ms(PUT_MS);
        let replication = Replication {
            client,
            request,
            sealed,
            key: key.clone(),
            object,
            wanted: replicas,
            held_by: BTreeSet::new(),
            under_way: BTreeMap::new(),
            tried: BTreeSet::new(),
            deadline,
        };
        self.replications.insert(operation, replication);
        self.timers.set(deadline, Timer::Operation(operation));
        if origin != self.config.member.node {
            self.replicate_at(operation, origin);
        }
        self.replicate_on(operation);
    }

    /// Asks as many nodes as are lacking; ends if that is none, or nobody is left to ask.
    fn replicate_on(&mut self, operation: u64) {
        loop {
            let Some(replication) = self.replications.get(&operation) else {
                return;
            };
            let expected = 1 + replication.held_by.len() + replication.under_way.len();
            if expected >= usize::from(replication.wanted) {
                break;
            }
            let Some(node) = self.replica_target(replication) else {
                break;
            };
            self.replicate_at(operation, node);
        }
        let is_over = |replication: &Replication| {
            let held = 1 + replication.held_by.len();
            held >= usize::from(replication.wanted) || replication.under_way.is_empty()
        };
        if self.replications.get(&operation).is_some_and(is_over) {
            self.replication_over(operation);
        }
    }

    /// The node that is asked next: one that is known to live and was not tried.
    fn replica_target(&self, replication: &Replication) -> Option<NodeId> {
        let (_, object) = replication.here(&self.objects)?;
        let told = self.directory.is_some() || self.directory_link.is_some();
        let there = self.peers.iter().filter(|(node, peer)| {
            let dialled = |address: &str| !self.redial.is_paused(address, self.now);
            let reachable = peer.link.is_some() || (told && dialled(&peer.member.address));
            reachable && !replication.tried.contains(node)
        });
        let nodes = there.map(|(node, _)| *node);
        self.roomiest(&replication.key, object.meta.len_bytes, nodes).into_iter().next()
    }

    fn replicate_at(&mut self, operation: u64, node: NodeId) {
        let link = self.link_to(node);
        let address = self.peers.get(&node).map(|peer| peer.member.address.clone());
        let Some(replication) = self.replications.get_mut(&operation) else {
            return;
        };
        replication.tried.insert(node);
        let Some((_, object)) = replication.here(&self.objects) else {
            return;
        };
        let Some(link) = link else {
            let Some(address) = address else { return };
            let until = self.now.after_ms(DIAL_MS);
            replication.under_way.insert(node, Some(until));
            self.timers.set(until, Timer::Operation(operation));
            return self.dial(&address);
        };
        replication.under_way.insert(node, None);
        let object =
            Announced { role: Role::Replica, replicas: replication.wanted, ..object.announced(self.now) };
        let own = &self.config.member;
        let holders = vec![Holder { node: own.node, address: own.address.clone() }];
        let message = PeerMessage::Replicate { object, holders };
        self.ask_peer(link, message, Pending::Replicate { operation, node });
    }

    /// A node holds the object now, or will not.
    pub(super) fn replicated(&mut self, operation: u64, node: NodeId, held: bool) {
        if let Some(replication) = self.replications.get_mut(&operation) {
            replication.under_way.remove(&node);
            if held {
                replication.held_by.insert(node);
            }
            self.replicate_on(operation);
        }
    }

    /// A link to a node is there.
    pub(super) fn replications_linked(&mut self, node: NodeId) {
        let waits = |replication: &Replication| matches!(replication.under_way.get(&node), Some(Some(_)));
        for operation in self.replications_where(waits) {
            self.replicate_at(operation, node);
        }
    }

    /// A node could not be reached.
    pub(super) fn replications_undialled(&mut self, address: &str) {
        let peers =
            self.peers.iter().filter(|(_, peer)| peer.link.is_none() && peer.member.address == address);
        let nodes: Vec<NodeId> = peers.map(|(node, _)| *node).collect();
        for node in nodes {
            let waits = |replication: &Replication| matches!(replication.under_way.get(&node), Some(Some(_)));
            for operation in self.replications_where(waits) {
                self.replicated(operation, node, false);
            }
        }
    }

    fn replications_where(&self, wanted: impl Fn(&Replication) -> bool) -> Vec<u64> {
        self.replications.iter().filter(|(_, replication)| wanted(replication)).map(|(&id, _)| id).collect()
    }

    /// The put has waited long enough, or its links to some nodes have.
    pub(super) fn replication_deadline(&mut self, operation: u64) {
        let now = self.now;
        let Some(replication) = self.replications.get_mut(&operation) else {
            return;
        };
        if replication.deadline <= now {
            return self.replication_over(operation);
        }
        let before = replication.under_way.len();
        replication.under_way.retain(|_, until| until.is_none_or(|until| until > now));
        if replication.under_way.len() < before {
            self.replicate_on(operation);
        }
    }

    /// From now on the directory sees to it that the object is on as many nodes as it is to be.
    fn replication_over(&mut self, operation: u64) {
        let Some(replication) = self.replications.remove(&operation) else {
            return;
        };
        self.timers.unset(replication.deadline, Timer::Operation(operation));
        let held = 1 + replication.held_by.len();
        let here = replication.here(&self.objects).map(|(generation, _)| generation);
        if let Some(object) = here.and_then(|generation| self.objects.get_mut(generation))
            && object.role.is_lasting()
        {
            object.replicas = object.replicas.max(replication.wanted);
            let announced = object.announced(self.now);
            self.announce(announced);
        }
        let mut sealed = replication.sealed;
        if let ClientReply::Sealed { replicas, .. } = &mut sealed {
            *replicas = u32::try_from(held).unwrap_or(u32::MAX);
        }
        self.reply(replication.client, replication.request, Ok(sealed));
    }

    // The replica.

    /// REPLICATE.
    pub(super) fn replicate_for_peer(
        &mut self,
        link: LinkId,
        request: u64,
        object: Announced,
        holders: Vec<Holder>,
    ) {
        self.take_replica(ReplicaFor::Peer { link, request }, object, holders);
    }

    /// Makes this node hold an object for good, and says so to who asked.
    pub(super) fn take_replica(&mut self, by: ReplicaFor, object: Announced, holders: Vec<Holder>) {
        let expires = object.ttl_ms.map(|ttl_ms| self.now.after_ms(ttl_ms));
        let asked = ReplicaAsked { by, object, expires };
        self.clear_the_way(&asked.object);
        if self.deleted.contains(asked.object.object) {
            self.tell_of_deletion(asked.object.object);
        }
        if let Some(result) = self.replica_here(&asked) {
            return self.replica_answer(&asked, result);
        }
        let own = self.config.member.node;
        let holders: Vec<Holder> = holders.into_iter().filter(|holder| holder.node != own).collect();
        let under_way = self.fetches.replicas();
        let (key, len_bytes) = (asked.object.key.clone(), asked.object.len_bytes);
        let capacity = self.space.capacity_bytes(Tier::Host);
        let refusal = if holders.is_empty() {
            Some(StoreError::not_found("replicate", &key))
        } else if len_bytes > capacity {
            let operation = format!("replicate {key:?}");
            Some(StoreError::too_large(operation, "object length in bytes", len_bytes, capacity))
        } else if self.room_bytes() < len_bytes {
            // Asked before the bytes are: whoever repairs asks often where nobody has room.
            let operation = format!("replicate {key:?}").into();
            Some(StoreError::NoSpace {
                operation,
                tier: Tier::Host,
                requested: len_bytes,
                free: self.room_bytes(),
            })
        } else if self.objects.is_full() && self.eviction.is_empty() {
            let limit = u64::from(self.config.objects_max);
            let what = "number of objects (max_objects)";
            Some(StoreError::too_large(format!("replicate {key:?}"), what, limit + 1, limit))
        } else if under_way >= FETCHES_MAX {
            Some(StoreError::busy("replicate", format!("{FETCHES_MAX} replicas are being fetched")))
        } else {
            None
        };
        if let Some(error) = refusal {
            return self.replica_answer(&asked, Err(error));
        }
        let timeout_ms = FETCH_MS + len_bytes / FETCH_BYTES_PER_MS;
        let scope = Scope { range: None, want: Want::Object { keep: true }, threshold_bytes: None };
        self.fetch_from_any(FetchFor::Replica(Box::new(asked)), key, scope, timeout_ms, holders);
    }

    /// Whether the replica is here, or cannot be; none if it has to be fetched.
    pub(super) fn replica_here(&mut self, asked: &ReplicaAsked) -> Option<Result<(), StoreError>> {
        let ReplicaAsked { object: Announced { key, object, .. }, expires, .. } = asked;
        if self.deleted.contains(*object) {
            return Some(Err(StoreError::stale("replicate", key, "the object was deleted")));
        }
        let (generation, there) = self.objects.sealed(key)?;
        if there.id == *object {
            self.become_replica(generation, &asked.object, *expires);
            return Some(Ok(()));
        }
        // An original or a replica is a value of the key itself, and who fetched a copy may be about to read it.
        Some(Err(StoreError::AlreadyExists { key: key.to_string() }))
    }

    /// A mere copy of another object under the key gives way.
    fn clear_the_way(&mut self, object: &Announced) {
        if let Some((generation, there)) = self.objects.sealed(&object.key)
            && there.id != object.object
            && there.role == Role::Copy
            && !self.deleted.contains(object.object)
            && self.may_evict(there)
        {
            self.withdraw(generation);
        }
    }

    /// An object of the key was put here, or came otherwise, while the replica was fetched.
    pub(super) fn replica_found(&mut self, asked: &ReplicaAsked) {
        if let Some(result) = self.replica_here(asked) {
            self.replica_answer(asked, result);
        }
    }

    /// What is here of an object stays from now on.
    pub(super) fn become_replica(
        &mut self,
        generation: Generation,
        wanted: &Announced,
        expires: Option<Time>,
    ) {
        let Some(object) = self.objects.get_mut(generation) else {
            return;
        };
        let before = (object.role, object.replicas, object.hints.cache);
        let tier = object.tier;
        if std::mem::take(&mut object.hints.cache) {
            self.eviction.remove(tier, generation);
        }
        if object.role == Role::Copy {
            object.role = Role::Replica;
            object.lasting = Vec::new();
            object.expires = expires;
            self.eviction.remove(tier, generation);
            self.counters.replicas += 1;
            if let Some(at) = expires {
                self.timers.set(at, Timer::Ttl(generation));
            }
        }
        if object.role == Role::Replica {
            object.replicas = object.replicas.max(wanted.replicas);
        }
        if before != (object.role, object.replicas, object.hints.cache) {
            let announced = object.announced(self.now);
            self.announce(announced);
        }
    }

    /// What was fetched is to be a replica, if anyone asked for one of this very object.
    pub(super) fn fetched_for_good(&mut self, generation: Generation, asked: &[ReplicaAsked]) {
        let Some(object) = self.objects.get_mut(generation) else {
            return;
        };
        for asked in asked.iter().filter(|asked| asked.object.object == object.id) {
            object.role = Role::Replica;
            object.replicas = object.replicas.max(asked.object.replicas);
            object.expires = object.expires.or(asked.expires);
        }
        if object.role == Role::Replica {
            self.counters.replicas += 1;
        }
    }

    /// A fetch has ended: says for each replica that it was for whether it is here.
    pub(super) fn replicas_fetched(&mut self, asked: &[ReplicaAsked], key: &Key, why: Option<&StoreError>) {
        for asked in asked {
            let here = self.objects.sealed(key).is_some_and(|(_, object)| object.id == asked.object.object);
            let result = if here {
                self.replica_here(asked).unwrap_or(Ok(()))
            } else {
                let gone = || {
                    StoreError::stale(
                        "replicate",
                        key,
                        "what was fetched is another object, or could not stay",
                    )
                };
                Err(why.cloned().unwrap_or_else(gone))
            };
            self.replica_answer(asked, result);
        }
    }

    /// Tells who asked what has come of it.
    pub(super) fn replica_answer(&mut self, asked: &ReplicaAsked, result: Result<(), StoreError>) {
        match (asked.by, result) {
            (ReplicaFor::Peer { link, request }, Ok(())) => {
                self.answer_peer(link, request, PeerMessage::Replicated);
            }
            (ReplicaFor::Peer { link, request }, Err(error)) => {
                self.answer_peer(link, request, PeerMessage::Failed { error });
            }
            (ReplicaFor::Directory, result) => {
                self.repair_answered(&asked.object.key, self.config.member.node, result.is_ok());
            }
        }
    }

    // Copies.

    /// Whether others hold an object for good of which this node has a mere copy.
    pub(super) fn is_elsewhere(&self, object: &Object) -> bool {
        let origin = [(object.id.origin, object.id.epoch)];
        let lasting = if object.lasting.is_empty() { &origin[..] } else { &object.lasting };
        object.role == Role::Copy && lasting.iter().all(|(node, epoch)| self.is_alive(*node, *epoch))
    }

    /// SURPLUS: the directory says that others hold an object for good, as many as are to.
    pub(super) fn surplus(&mut self, key: &Key, id: ObjectId, mut lasting: Vec<(NodeId, Epoch)>) {
        lasting.retain(|(node, _)| *node != self.config.member.node);
        lasting.truncate(usize::from(REPLICAS_MAX));
        let Some((generation, there)) = self.objects.sealed(key) else {
            return;
        };
        if there.id != id || there.role == Role::Original || lasting.is_empty() {
            return;
        }
        let Some(object) = self.objects.get_mut(generation) else {
            return;
        };
        object.lasting = lasting;
        if object.role == Role::Replica {
            object.role = Role::Copy;
            let (announced, tier, len_bytes) =
                (object.announced(self.now), object.tier, object.extent.len_bytes);
            self.eviction.insert(tier, generation, key.fingerprint(), len_bytes);
            self.announce(announced);
        }
    }
}
