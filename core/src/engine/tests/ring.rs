//! Publication rings of tests: a model of what `hetmem-host-mem` does in shared memory. Invariant: as there, records
//! are drained in the order of their positions, and one that is missing holds up no other.

use std::collections::BTreeMap;

use super::world::World;
use crate::engine::{Input, PutAhead, RingState};
use crate::tier::ClientId;

#[derive(Debug, Default)]
pub(super) struct Ring {
    state: RingState,
    next: Option<u64>,
    /// Complete records by position, `None` for those of which nothing came.
    complete: BTreeMap<u64, Option<PutAhead>>,
    /// Positions from `tail` on that were drained.
    drained: Vec<u64>,
}

impl Ring {
    pub(super) fn grant(&mut self, chunk: u64) -> RingState {
        if self.state.open {
            assert_eq!(self.next.replace(chunk), None, "two chunks wait to be used");
        } else {
            self.state.chunk = chunk;
            self.state.open = true;
        }
        self.state
    }

    pub(super) fn close(&mut self) -> RingState {
        self.state.open = false;
        self.next = None;
        self.state
    }

    /// Goes on with the next chunk.
    pub(super) fn switch(&mut self) {
        assert!(self.state.open);
        self.state.chunk = self.next.take().expect("a chunk");
    }

    /// Begins a put: its position, and the chunk that it may use.
    pub(super) fn claim(&mut self) -> Option<(u64, u64)> {
        if !self.state.open {
            return None;
        }
        self.state.head += 1;
        Some((self.state.head - 1, self.state.chunk))
    }

    pub(super) fn complete(&mut self, position: u64, put: Option<PutAhead>) {
        assert!(position < self.state.head && self.complete.insert(position, put).is_none());
    }

    fn drain(&mut self) -> Vec<PutAhead> {
        let complete = std::mem::take(&mut self.complete);
        self.drained.extend(complete.keys());
        while let Some(at) = self.drained.iter().position(|position| *position == self.state.tail) {
            self.drained.swap_remove(at);
            self.state.tail += 1;
        }
        complete.into_values().flatten().collect()
    }
}

impl World {
    pub(super) fn ring(&mut self, node: usize, client: ClientId) -> &mut Ring {
        self.nodes[node].rings.get_mut(&client).expect("a ring")
    }

    /// As the driver does before it hands in what could ask for an object.
    pub(super) fn drain_rings(&mut self, node: usize) {
        let clients: Vec<ClientId> = self.nodes[node].rings.keys().copied().collect();
        for client in clients {
            self.drain_ring(node, client);
        }
    }

    pub(super) fn drain_ring(&mut self, node: usize, client: ClientId) {
        let Some(ring) = self.nodes[node].rings.get_mut(&client) else { return };
        if ring.state.head == ring.state.tail {
            return;
        }
        let puts = ring.drain();
        let ring = ring.state;
        self.hand_in(node, Input::PutsAhead { client, puts, ring });
    }
}
