//! Repair: the node that keeps the directory sees to it that objects are on as many nodes as they are to be, and lets
//! what is too much go. Not the books (`directory`), and not how a node gets a replica (`replicas`). Invariant: an
//! object is taken for surplus only while at least as many others as are wanted hold it for good, and what is under way
//! at a time is bounded, however much there is to repair.

use std::collections::{BTreeMap, BTreeSet};

use super::Engine;
use super::action::{Action, Event};
use super::cluster::Pending;
use super::directory::Held;
use super::replicas::ReplicaFor;
use super::timer::{Time, Timer};
use crate::key::Key;
use crate::tier::{Epoch, NodeId, ObjectId};
use crate::wire::{Announced, Holder, PeerMessage, REPLICAS_MAX, Role};

/// Replicas that are being made at a time.
const UNDER_WAY_MAX: usize = 16;
/// Keys whose surplus is looked at in one go.
const SURPLUS_AT_ONCE: usize = 64;
/// The longest pause before an object that nobody could take is tried again, in milliseconds, unless the first one is
/// longer. Each is twice the one before.
const PAUSE_MS_MAX: u64 = 5_000;
/// Keys that a status names.
const KEYS_NAMED: usize = 8;

/// An object that is on fewer nodes than it is to be.
#[derive(Debug, Default)]
struct Lacking {
    /// When it is looked at again.
    at: Time,
    failures: u32,
    /// Nodes that were asked to hold it and have not answered.
    asked: BTreeSet<NodeId>,
    /// Nodes that could not, since it was last tried with all of them.
    refused: BTreeSet<NodeId>,
}

/// What there is to do.
#[derive(Debug, Default)]
pub(super) struct Repair {
    lacking: BTreeMap<Key, Lacking>,
    due: BTreeSet<(Time, Key)>,
    /// What was asked of whom.
    under_way: BTreeSet<(Key, NodeId)>,
    /// Keys of which there may be too much, and since when.
    surplus: BTreeMap<Key, Time>,
    /// Whether it was said that there is something to repair.
    said: bool,
}

impl Repair {
    pub(super) fn count(&self) -> u64 {
        self.lacking.len() as u64
    }

    pub(super) fn first_keys(&self) -> Vec<Key> {
        self.lacking.keys().take(KEYS_NAMED).cloned().collect()
    }

    fn schedule(&mut self, key: &Key, at: Time) {
        if let Some(lacking) = self.lacking.get_mut(key) {
            self.due.remove(&(lacking.at, key.clone()));
            lacking.at = at;
            self.due.insert((at, key.clone()));
        }
    }

    fn healed(&mut self, key: &Key) {
        if let Some(lacking) = self.lacking.remove(key) {
            self.due.remove(&(lacking.at, key.clone()));
        }
    }
}

/// What an object lacks.
#[derive(Debug, PartialEq, Eq)]
struct Lack {
    object: ObjectId,
    len_bytes: u64,
    wanted: u8,
    missing: usize,
    expires: Option<Time>,
    /// Who has its bytes, those first that hold it for good.
    holders: Vec<NodeId>,
}

/// On how many nodes an object is to be.
fn wanted(held: &[(NodeId, Held)], object: ObjectId) -> u8 {
    held.iter().filter(|(_, held)| held.object == object).map(|(_, held)| held.replicas).max().unwrap_or(0)
}

/// Which object of a key is on fewer nodes than it is to be. Two objects of one key are one value, so another one counts
/// too, unless it may end on its own.
fn lack(held: &[(NodeId, Held)]) -> Option<Lack> {
    let objects: BTreeSet<ObjectId> = held.iter().map(|(_, held)| held.object).collect();
    let lack_of = |object: ObjectId| {
        let counts =
            |held: &Held| held.role.is_lasting() && (held.object == object || held.expires.is_none());
        let there = held.iter().filter(|(_, held)| counts(held)).count();
        let wanted = wanted(held, object);
        let missing = usize::from(wanted).checked_sub(there).filter(|missing| wanted > 1 && *missing > 0)?;
        let mut of_it: Vec<&(NodeId, Held)> = held.iter().filter(|(_, held)| held.object == object).collect();
        of_it.sort_by_key(|(node, held)| (held.role, *node));
        Some(Lack {
            object,
            len_bytes: of_it.first()?.1.len_bytes,
            wanted,
            missing,
            expires: of_it.iter().filter_map(|(_, held)| held.expires).min(),
            holders: of_it.iter().map(|(node, _)| *node).collect(),
        })
    };
    objects.into_iter().filter_map(lack_of).max_by_key(|lack| lack.missing)
}

/// Of one object: who holds it for good, and who is to learn that.
#[derive(Debug, PartialEq, Eq)]
struct Surplus {
    object: ObjectId,
    lasting: Vec<NodeId>,
    to: Vec<NodeId>,
}

/// What may become, or already is, a mere copy. `rank` orders replicas: those with the lowest go first.
fn surplus(held: &[(NodeId, Held)], rank: impl Fn(NodeId) -> u64) -> Vec<Surplus> {
    let objects: BTreeSet<ObjectId> = held.iter().map(|(_, held)| held.object).collect();
    let surplus_of = |object: ObjectId| {
        let of_it = || held.iter().filter(move |(_, held)| held.object == object);
        let wanted = usize::from(wanted(held, object));
        let mut lasting: Vec<(Role, NodeId)> = of_it()
            .filter(|(_, held)| held.role.is_lasting())
            .map(|(node, held)| (held.role, *node))
            .collect();
        if wanted < 2 || lasting.len() < wanted {
            return None;
        }
        // Originals first, which stay in any case.
        lasting.sort_by_key(|(role, node)| (*role, std::cmp::Reverse(rank(*node)), *node));
        let originals = lasting.iter().filter(|(role, _)| *role == Role::Original).count();
        let gone = lasting.split_off(wanted.max(originals));
        // A copy goes by what its node knows of the origin; where that is not one of them, it has to be told.
        let origin_stays = lasting.contains(&(Role::Original, object.origin));
        let untold = of_it().filter(|(_, held)| !held.role.is_lasting() && !held.told && !origin_stays);
        let to: Vec<NodeId> =
            gone.iter().map(|(_, node)| *node).chain(untold.map(|(node, _)| *node)).collect();
        let lasting: Vec<NodeId> = lasting.iter().map(|(_, node)| *node).collect();
        (!to.is_empty()).then_some(Surplus { object, lasting, to })
    };
    objects.into_iter().filter_map(surplus_of).collect()
}

impl Engine {
    fn held(&self, key: &Key) -> Vec<(NodeId, Held)> {
        self.directory.iter().flat_map(|directory| directory.held(key)).collect()
    }

    /// How long a node may be away before what it held is made anew, in milliseconds: it may come back with it.
    const fn repair_after_ms(&self) -> u64 {
        self.config.missed_ms()
    }

    /// Holders have changed: notes what there is to do about it.
    pub(super) fn look_at_changed_keys(&mut self) {
        let Some(directory) = &mut self.directory else {
            return;
        };
        let changed = directory.take_changed();
        if changed.is_empty() {
            return;
        }
        let at = self.now.after_ms(self.repair_after_ms());
        for key in changed {
            let held = self.held(&key);
            if lack(&held).is_none() {
                self.repair.healed(&key);
            } else if !self.repair.lacking.contains_key(&key) {
                self.repair.lacking.insert(key.clone(), Lacking::default());
                self.repair.schedule(&key, at);
            }
            if !surplus(&held, |node| node.0).is_empty() {
                self.repair.surplus.entry(key).or_insert(at);
            }
        }
        self.set_repair_timer();
        if self.repair.lacking.is_empty() && std::mem::take(&mut self.repair.said) {
            self.out.push(Action::Note(Event::Healed));
        }
    }

    fn set_repair_timer(&mut self) {
        // What is due while as much is under way as may be is looked at when an answer comes.
        let lacking = self.repair.due.first().filter(|_| self.repair.under_way.len() < UNDER_WAY_MAX);
        let at = lacking.map(|(at, _)| *at).into_iter().chain(self.repair.surplus.values().copied()).min();
        if let Some(at) = at {
            // Not at once: what is due is looked at in parts, with other things in between.
            self.timers.set(at.max(self.now.after_ms(1)), Timer::Repair);
        }
    }

    /// A node has joined, which may have room for what nobody had room for.
    pub(super) fn repair_with_newcomer(&mut self) {
        let at = self.now.after_ms(self.repair_after_ms());
        let late = |(key, lacking): (&Key, &Lacking)| (lacking.at > at).then(|| key.clone());
        let keys: Vec<Key> = self.repair.lacking.iter().filter_map(late).collect();
        for key in keys {
            self.repair.schedule(&key, at);
        }
        self.set_repair_timer();
    }

    pub(super) fn repair_due(&mut self) {
        let now = self.now;
        while self.repair.under_way.len() < UNDER_WAY_MAX
            && let Some((_, key)) = self.repair.due.first().filter(|(at, _)| *at <= now).cloned()
        {
            self.repair_key(&key);
        }
        let due = self.repair.surplus.iter().filter(|(_, at)| **at <= now).map(|(key, _)| key.clone());
        for key in due.take(SURPLUS_AT_ONCE).collect::<Vec<_>>() {
            self.repair.surplus.remove(&key);
            self.tell_surplus(&key);
        }
        self.set_repair_timer();
    }

    /// Asks nodes to hold an object that too few hold. In any case it is looked at again later.
    fn repair_key(&mut self, key: &Key) {
        let held = self.held(key);
        let Some(lack) = lack(&held) else {
            return self.repair.healed(key);
        };
        let targets = self.repair_targets(key, &held, &lack);
        let Some(lacking) = self.repair.lacking.get_mut(key) else {
            return;
        };
        if targets.is_empty() && lacking.asked.is_empty() {
            lacking.failures = lacking.failures.saturating_add(1);
            lacking.refused.clear();
        }
        let failures = lacking.failures.min(8);
        let first = self.repair_after_ms();
        let pause = first.saturating_mul(1 << failures).min(PAUSE_MS_MAX.max(first));
        // A refusal comes sooner, and then it is looked at once.
        let again = self.now.after_ms(pause);
        self.repair.schedule(key, again);
        if !std::mem::replace(&mut self.repair.said, true) {
            let objects = self.repair.count();
            self.out.push(Action::Note(Event::UnderReplicated { objects }));
        }
        let own = self.config.member.node;
        for node in targets {
            let holders = self.holders_for(node, &lack);
            let object = Announced {
                key: key.clone(),
                object: lack.object,
                len_bytes: lack.len_bytes,
                role: Role::Replica,
                replicas: lack.wanted,
                ttl_ms: lack.expires.map(|at| at.ms_since(self.now)),
            };
            let link = self.link_to(node);
            if node != own && link.is_none() {
                continue;
            }
            if let Some(lacking) = self.repair.lacking.get_mut(key) {
                lacking.asked.insert(node);
            }
            self.repair.under_way.insert((key.clone(), node));
            match link.filter(|_| node != own) {
                Some(link) => {
                    let pending = Pending::Repair { key: key.clone(), node };
                    self.ask_peer(link, PeerMessage::Replicate { object, holders }, pending);
                }
                None => self.take_replica(ReplicaFor::Directory, object, holders),
            }
        }
    }

    /// Whom to ask: nodes of this cluster that hold no object of the key for good; those first that have the bytes.
    fn repair_targets(&self, key: &Key, held: &[(NodeId, Held)], lack: &Lack) -> Vec<NodeId> {
        let Some(lacking) = self.repair.lacking.get(key) else {
            return Vec::new();
        };
        let has = |node: NodeId, wanted: fn(&Held) -> bool| {
            held.iter().any(|(holder, held)| *holder == node && wanted(held))
        };
        let nodes = self.keeping.joined().chain([self.config.member.node]).filter(|node| {
            let lasts = has(*node, |held| held.role.is_lasting());
            !lasts && !lacking.asked.contains(node) && !lacking.refused.contains(node)
        });
        let mut nodes = self.roomiest(key, lack.len_bytes, nodes);
        nodes.sort_by_key(|node| !lack.holders.contains(node));
        nodes.truncate(lack.missing.saturating_sub(lacking.asked.len()));
        nodes
    }

    fn holders_for(&self, node: NodeId, lack: &Lack) -> Vec<Holder> {
        let own = &self.config.member;
        let address = |holder: NodeId| {
            if holder == own.node {
                return Some(own.address.clone());
            }
            Some(self.peers.get(&holder)?.member.address.clone())
        };
        // One that has a copy itself may be asked too: it is the one with the bytes, if it still has them.
        let others = lack.holders.iter().filter(|holder| **holder != node || lack.holders.len() == 1);
        let holder = |node: &NodeId| Some(Holder { node: *node, address: address(*node)? });
        others.filter_map(holder).take(usize::from(REPLICAS_MAX)).collect()
    }

    /// A node holds an object now that it was asked to hold, or will not.
    pub(super) fn repair_answered(&mut self, key: &Key, node: NodeId, held: bool) {
        self.repair.under_way.remove(&(key.clone(), node));
        let now = self.now;
        if let Some(lacking) = self.repair.lacking.get_mut(key) {
            lacking.asked.remove(&node);
            if held {
                lacking.failures = 0;
            } else {
                lacking.refused.insert(node);
                self.repair.schedule(key, now);
            }
        }
        // Its announcement says that the object is healed.
        self.set_repair_timer();
    }

    /// Lets replicas beyond those that are wanted become mere copies, and tells holders of copies who holds for good.
    fn tell_surplus(&mut self, key: &Key) {
        let rank = |node: NodeId| crate::fingerprint(&(node.0 ^ key.fingerprint()).to_le_bytes());
        for Surplus { object, lasting, to } in surplus(&self.held(key), rank) {
            let lasting: Vec<(NodeId, Epoch)> =
                lasting.into_iter().filter_map(|node| Some((node, self.epoch_of(node)?))).collect();
            if lasting.is_empty() {
                continue;
            }
            for node in to {
                if let Some(directory) = &mut self.directory {
                    directory.tell(node, key);
                }
                let mut lasting = lasting.clone();
                lasting.truncate(usize::from(REPLICAS_MAX));
                if node == self.config.member.node {
                    self.surplus(key, object, lasting);
                } else if let Some(link) = self.link_to(node) {
                    let key = key.clone();
                    self.tell_peer(link, PeerMessage::Surplus { key, object, lasting });
                }
            }
        }
    }

    fn epoch_of(&self, node: NodeId) -> Option<Epoch> {
        let own = &self.config.member;
        if node == own.node { Some(own.epoch) } else { Some(self.peers.get(&node)?.member.epoch) }
    }
}
