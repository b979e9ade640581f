//! Who holds which object, in memory. Not the truth about it: the nodes are, and announce again when asked.
//! Invariant: a key is in the books exactly as long as it has a holder.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use super::timer::Time;
use crate::key::Key;
use crate::tier::{NodeId, ObjectId};
use crate::wire::{Announced, Role};

/// Deletions that are remembered, so that a copy that was under way meanwhile does not bring an object back.
const DELETED_MAX: usize = 65_536;

/// What becomes of an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in the books.
    Kept,
    /// The announcer is to drop its object.
    Refused,
}

/// What one node has said about its object of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) object: ObjectId,
    pub(super) len_bytes: u64,
    pub(super) role: Role,
    /// On how many nodes it is to be for good; 0 if the node does not know.
    pub(super) replicas: u8,
    /// When its time to live is over.
    pub(super) expires: Option<Time>,
    /// It may be sealed, but is not yet: its key is taken, and nobody is told of it.
    reserved: bool,
    /// The node was told who holds the object for good, and that has not changed since.
    pub(super) told: bool,
}

impl Held {
    fn of(announced: &Announced, exclusive: bool, now: Time) -> Self {
        Self {
            object: announced.object,
            len_bytes: announced.len_bytes,
            role: announced.role,
            replicas: announced.replicas,
            expires: announced.ttl_ms.map(|ttl_ms| now.after_ms(ttl_ms)),
            reserved: exclusive,
            told: false,
        }
    }

    fn announced(&self, key: &Key) -> Announced {
        Announced {
            key: key.clone(),
            object: self.object,
            len_bytes: self.len_bytes,
            role: self.role,
            replicas: self.replicas,
            ttl_ms: None,
        }
    }
}

/// Objects that were deleted, the latest of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Deleted {
    objects: BTreeSet<ObjectId>,
    order: VecDeque<ObjectId>,
}

impl Deleted {
    pub(super) fn insert(&mut self, object: ObjectId) {
        if self.objects.insert(object) {
            self.order.push_back(object);
        }
        if self.order.len() > DELETED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.objects.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, object: ObjectId) -> bool {
        self.objects.contains(&object)
    }

    /// At most so many of them, the latest, in their order.
    pub(super) fn latest(&self, most: usize) -> Vec<ObjectId> {
        self.order.iter().skip(self.order.len().saturating_sub(most)).copied().collect()
    }
}

/// The directory of a cluster, kept by one node.
#[derive(Debug, Default)]
pub struct Directory {
    keys: BTreeMap<Key, BTreeMap<NodeId, Held>>,
    by_node: BTreeMap<NodeId, BTreeSet<Key>>,
    deleted: Deleted,
    /// Keys of objects that are to be on several nodes, whose holders have changed since someone last looked.
    changed: BTreeSet<Key>,
}

impl Directory {
    /// An empty one that knows what was deleted before it began.
    pub(super) fn after(deleted: Deleted) -> Self {
        Self { deleted, ..Self::default() }
    }

    /// Notes that `node` holds an object or, if `exclusive`, is about to: then its key is kept for it until it is
    /// announced again or withdrawn.
    ///
    /// Refused are objects that were deleted, other objects under a known key if `exclusive`, and copies of an
    /// object that is no longer the one of its key. Two nodes that each put the key stay both: the bytes of an
    /// immutable object under one key are one value.
    pub fn announce(&mut self, node: NodeId, announced: &Announced, exclusive: bool, now: Time) -> Verdict {
        if self.deleted.contains(announced.object) {
            return Verdict::Refused;
        }
        if let Some(holders) = self.keys.get(&announced.key) {
            let other =
                holders.iter().any(|(&holder, held)| holder != node && held.object != announced.object);
            let same = holders.values().any(|held| held.object == announced.object);
            let is_copy = announced.object.origin != node && announced.role == Role::Copy;
            if other && !same && (exclusive || is_copy) {
                return Verdict::Refused;
            }
        }
        let held = Held::of(announced, exclusive, now);
        let holders = self.keys.entry(announced.key.clone()).or_default();
        let before = holders.insert(node, held);
        if let Some(now) = holders.get_mut(&node) {
            // What it was told does not change because it says the same once more.
            now.told = before.is_some_and(|before| before.told && before.object == now.object)
                && !now.role.is_lasting();
        }
        self.by_node.entry(node).or_default().insert(announced.key.clone());
        let lasted = before.is_some_and(|before| before.role.is_lasting());
        self.look_again(&announced.key, before, lasted || held.role.is_lasting());
        Verdict::Kept
    }

    /// Notes that `node` no longer holds an object; another object of the same key stays.
    pub fn withdraw(&mut self, node: NodeId, key: &Key, object: ObjectId) {
        if self.keys.get(key).and_then(|holders| holders.get(&node)).is_none_or(|held| held.object != object)
        {
            return;
        }
        self.forget(node, key);
        if let Some(keys) = self.by_node.get_mut(&node) {
            keys.remove(key);
        }
    }

    /// Forgets what `node` held.
    pub fn node_lost(&mut self, node: NodeId) {
        for key in self.by_node.remove(&node).unwrap_or_default() {
            self.forget(node, &key);
        }
    }

    fn forget(&mut self, node: NodeId, key: &Key) {
        let Some(holders) = self.keys.get_mut(key) else {
            return;
        };
        let before = holders.remove(&node);
        if holders.is_empty() {
            self.keys.remove(key);
        }
        self.look_again(key, before, before.is_some_and(|held| held.role.is_lasting()));
    }

    /// The holders of a key have changed; `lasting` if those may have that hold it for good.
    fn look_again(&mut self, key: &Key, before: Option<Held>, lasting: bool) {
        let mut several = before.is_some_and(|before| before.replicas > 1);
        if let Some(holders) = self.keys.get_mut(key) {
            several |= holders.values().any(|held| held.replicas > 1);
            for held in holders.values_mut().filter(|_| several && lasting) {
                held.told = false;
            }
        }
        if several {
            self.changed.insert(key.clone());
        }
    }

    /// Keys of objects that are to be on several nodes, whose holders have changed since the last call.
    pub(super) fn take_changed(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.changed)
    }

    /// What every holder of a key has said about its object.
    pub(super) fn held(&self, key: &Key) -> impl Iterator<Item = (NodeId, Held)> + '_ {
        let held = self.keys.get(key).into_iter().flatten();
        held.filter(|(_, held)| !held.reserved).map(|(&node, held)| (node, *held))
    }

    /// A holder may take its object for a mere copy from now on.
    pub(super) fn tell(&mut self, node: NodeId, key: &Key) {
        if let Some(held) = self.keys.get_mut(key).and_then(|holders| holders.get_mut(&node)) {
            held.told = true;
            held.role = Role::Copy;
        }
    }

    /// Who holds an object of this key, and which.
    pub fn holders(&self, key: &Key) -> impl Iterator<Item = (NodeId, ObjectId)> + '_ {
        self.held(key).map(|(node, held)| (node, held.object))
    }

    /// Remembers that an object was deleted.
    pub fn deleted(&mut self, object: ObjectId) {
        self.deleted.insert(object);
    }

    /// Who holds this very object, of whatever key.
    pub(super) fn holders_of(&self, objects: &BTreeSet<ObjectId>) -> Vec<(NodeId, Key, ObjectId)> {
        let of_key = |(key, holders): (&Key, &BTreeMap<NodeId, Held>)| {
            let held = holders.iter().filter(|(_, held)| objects.contains(&held.object));
            held.map(|(&node, held)| (node, key.clone(), held.object)).collect::<Vec<_>>()
        };
        self.keys.iter().flat_map(of_key).collect()
    }

    /// Keys that start with `prefix`, in order, after `after`, with one of their objects and all their holders.
    pub fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> impl Iterator<Item = (Announced, Vec<NodeId>)> + 'a {
        let start = match after {
            Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix),
        };
        self.keys
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(move |(key, _)| key.as_str().starts_with(prefix))
            .filter_map(|(key, holders)| {
                let mut held = holders.iter().filter(|(_, held)| !held.reserved).peekable();
                let (_, first) = *held.peek()?;
                let announced = first.announced(key);
                Some((announced, held.map(|(node, _)| *node).collect()))
            })
    }

    /// How many keys are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether no key is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::Epoch;

    const NOW: Time = Time(0);

    fn announced(key: &str, origin: u64, number: u64) -> Announced {
        let object = ObjectId { origin: NodeId(origin), epoch: Epoch(1), number };
        Announced {
            key: Key::new(key).expect("a key"),
            object,
            len_bytes: 1,
            role: Role::Original,
            replicas: 1,
            ttl_ms: None,
        }
    }

    #[test]
    fn a_lost_node_takes_only_its_own_entries() {
        let mut directory = Directory::default();
        let (one, two) = (announced("a", 1, 1), announced("b", 2, 1));
        assert_eq!(directory.announce(NodeId(1), &one, false, NOW), Verdict::Kept);
        assert_eq!(directory.announce(NodeId(2), &one, false, NOW), Verdict::Kept);
        assert_eq!(directory.announce(NodeId(2), &two, false, NOW), Verdict::Kept);
        directory.node_lost(NodeId(2));
        assert_eq!(directory.holders(&one.key).collect::<Vec<_>>(), [(NodeId(1), one.object)]);
        assert_eq!(directory.holders(&two.key).count(), 0);
        assert_eq!(directory.len(), 1);
        directory.withdraw(NodeId(1), &one.key, one.object);
        assert!(directory.is_empty());
    }

    #[test]
    fn deleted_and_outdated_objects_do_not_come_back() {
        let mut directory = Directory::default();
        let old = announced("k", 1, 1);
        directory.deleted(old.object);
        assert_eq!(directory.announce(NodeId(2), &old, false, NOW), Verdict::Refused);
        let new = announced("k", 1, 2);
        assert_eq!(directory.announce(NodeId(1), &new, false, NOW), Verdict::Kept);
        let older_copy = Announced { role: Role::Copy, ..announced("k", 1, 0) };
        assert_eq!(
            directory.announce(NodeId(2), &older_copy, false, NOW),
            Verdict::Refused,
            "a copy of another object"
        );
        let own = announced("k", 2, 5);
        assert_eq!(directory.announce(NodeId(2), &own, true, NOW), Verdict::Refused, "exclusive");
        assert_eq!(directory.announce(NodeId(2), &own, false, NOW), Verdict::Kept, "put on both nodes");
    }

    #[test]
    fn a_key_that_is_kept_for_a_put_is_not_shown() {
        let mut directory = Directory::default();
        let put = announced("k", 1, 1);
        assert_eq!(directory.announce(NodeId(1), &put, true, NOW), Verdict::Kept);
        assert_eq!(directory.announce(NodeId(2), &announced("k", 2, 1), true, NOW), Verdict::Refused);
        assert_eq!(directory.holders(&put.key).count(), 0);
        assert_eq!(directory.list("", None).count(), 0);
        assert_eq!(directory.announce(NodeId(1), &put, false, NOW), Verdict::Kept);
        assert_eq!(directory.holders(&put.key).count(), 1);
        assert_eq!(directory.list("", None).count(), 1);
    }

    #[test]
    fn lists_by_prefix_in_order_in_pages() {
        let mut directory = Directory::default();
        for key in ["b/2", "a", "b/1", "b/3", "c"] {
            directory.announce(NodeId(1), &announced(key, 1, 1), false, NOW);
        }
        let page = |after: Option<&str>| {
            let after = after.map(|key| Key::new(key).expect("a key"));
            let keys: Vec<String> =
                directory.list("b/", after.as_ref()).take(2).map(|(a, _)| a.key.to_string()).collect();
            keys
        };
        assert_eq!(page(None), ["b/1", "b/2"]);
        assert_eq!(page(Some("b/2")), ["b/3"]);
        assert_eq!(page(Some("a")), ["b/1", "b/2"]);
    }
}
