//! Publication rings of all clients: when they are drained, and what is done about one that makes no sense. Not what
//! becomes of the objects (`hetmem_core::engine`). Invariant: an object whose put has returned is with the engine
//! before the engine answers anybody who asked after that.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hetmem_core::engine::{AHEAD_OBJECTS_MAX, Input, RingState};
use hetmem_core::{ClientId, StoreError};
use hetmem_host_mem::NodeRing;

// A chunk that is good for more objects than there are places would have its client wait for nothing.
const _: () = assert!(NodeRing::places() >= AHEAD_OBJECTS_MAX);

/// By client; only of those that were granted memory ahead.
#[derive(Debug, Default)]
pub(crate) struct Rings(BTreeMap<ClientId, NodeRing>);

/// What a ring held.
pub(crate) struct Drained {
    pub(crate) input: Input,
    /// Why its client is to be closed.
    pub(crate) broken: Option<StoreError>,
}

impl Rings {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn has_news(&self) -> bool {
        self.0.values().any(NodeRing::has_news)
    }

    /// Takes what is complete out of every ring.
    pub(crate) fn drain(&mut self) -> Vec<Drained> {
        let news = self.0.iter_mut().filter(|(_, ring)| ring.has_news());
        let drained: Vec<Drained> = news.map(|(&client, ring)| drain(client, ring)).collect();
        for Drained { input, .. } in drained.iter().filter(|drained| drained.broken.is_some()) {
            if let Input::PutsAhead { client, .. } = input {
                self.0.remove(client);
            }
        }
        drained
    }

    /// The same for a client whose session is over; whoever completes a record of it from now on sees that.
    pub(crate) fn drain_last(&mut self, client: ClientId) -> Option<Input> {
        let mut ring = self.0.remove(&client)?;
        ring.retire();
        Some(drain(client, &mut ring).input)
    }

    /// Lets a client publish in a chunk; makes its ring if it has none.
    pub(crate) fn grant(&mut self, client: ClientId, chunk: u64) -> Result<RingState, StoreError> {
        match self.0.get_mut(&client) {
            Some(ring) => ring.grant(chunk),
            None => {
                let mut ring = NodeRing::create()?;
                let state = ring.grant(chunk)?;
                self.0.insert(client, ring);
                Ok(state)
            }
        }
    }

    /// Lets a client begin nothing more. One whose ring is gone, or makes no sense, has nothing that is kept for it.
    pub(crate) fn recall(&mut self, client: ClientId) -> RingState {
        self.0.get_mut(&client).and_then(|ring| ring.close().ok()).unwrap_or_default()
    }

    pub(crate) fn descriptor(&self, client: ClientId) -> Option<Arc<OwnedFd>> {
        self.0.get(&client).map(NodeRing::descriptor)
    }

    /// Asks every client to say at once when it has put something. What it has put before is to be looked for now.
    pub(crate) fn set_bells(&self) {
        self.0.values().for_each(NodeRing::set_bell);
    }
}

fn drain(client: ClientId, ring: &mut NodeRing) -> Drained {
    let mut puts = Vec::new();
    let (ring, broken) = match ring.drain(&mut puts) {
        Ok(state) => (state, None),
        Err(why) => (RingState { open: true, ..RingState::default() }, Some(why)),
    };
    Drained { input: Input::PutsAhead { client, puts, ring }, broken }
}
