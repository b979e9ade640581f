//! Which nodes gave, or are said to hold, a key's object. Not where its bytes are (`locations`), and not the directory.
//! Invariant: hints may be wrong at any time; whoever follows one goes on without it.

use std::collections::{HashMap, VecDeque};

use crate::key::Key;
use crate::tier::NodeId;

/// Keys whose holders are remembered.
const HINTS_MAX: usize = 65_536;
/// Holders of one key that are remembered.
const NODES_MAX: usize = 4;

/// Holders by key, the latest first.
#[derive(Debug, Default)]
pub(super) struct Hints {
    nodes: HashMap<Key, Vec<NodeId>>,
    order: VecDeque<Key>,
}

impl Hints {
    /// Puts a holder before those that are remembered.
    pub(super) fn remember(&mut self, key: &Key, node: NodeId) {
        let nodes = self.nodes.entry(key.clone()).or_insert_with(|| {
            self.order.push_back(key.clone());
            Vec::new()
        });
        nodes.retain(|known| *known != node);
        nodes.insert(0, node);
        nodes.truncate(NODES_MAX);
        if self.order.len() > HINTS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.nodes.remove(&oldest);
        }
    }

    pub(super) fn get(&self, key: &Key) -> &[NodeId] {
        self.nodes.get(key).map_or(&[], Vec::as_slice)
    }

    /// A node did not have it, or could not give it.
    pub(super) fn forget(&mut self, key: &Key, node: NodeId) {
        // Its place in `order` stays until it comes up: forgetting is rare, and the list is bounded.
        if let Some(nodes) = self.nodes.get_mut(key) {
            nodes.retain(|known| *known != node);
            if nodes.is_empty() {
                self.nodes.remove(key);
            }
        }
    }

    pub(super) fn forget_key(&mut self, key: &Key) {
        self.nodes.remove(key);
    }

    pub(super) fn forget_node(&mut self, node: NodeId) {
        for nodes in self.nodes.values_mut() {
            nodes.retain(|known| *known != node);
        }
        self.nodes.retain(|_, nodes| !nodes.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_holders_of_the_latest_keys_are_remembered() {
        let mut hints = Hints::default();
        let key = |number: usize| Key::new(&format!("k{number}")).expect("a key");
        for node in [1, 2, 3, 1, 4, 5] {
            hints.remember(&key(0), NodeId(node));
        }
        assert_eq!(hints.get(&key(0)), [NodeId(5), NodeId(4), NodeId(1), NodeId(3)]);
        hints.forget(&key(0), NodeId(4));
        hints.forget_node(NodeId(1));
        assert_eq!(hints.get(&key(0)), [NodeId(5), NodeId(3)]);
        for number in 1..=HINTS_MAX {
            hints.remember(&key(number), NodeId(1));
        }
        assert!(hints.get(&key(0)).is_empty() && hints.nodes.len() == HINTS_MAX);
        hints.forget_node(NodeId(1));
        assert!(hints.nodes.is_empty());
    }
}
