//! A fabric in memory and in virtual time, driven by a seed: the test double of every other fabric. Not fast, and
//! not a model of any network's speed. Invariant: one seed and one order of calls give one history. What it is
//! allowed to do is what a real fabric may do at worst: delay, reorder between connections and between reads, tear
//! reads and payloads at byte granularity, complete late, refuse with `Busy`, lose peers; never reorder the frames
//! of one link, never touch an extent after the event that says so.

mod links;
mod net;
mod reads;
mod rng;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hetmem_core::wire::Frame;
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};

use self::net::{Shared, nanos};
use crate::fabric::{Access, Fabric, FabricKind, FabricSink, SendToken, Sent, check_word};
use crate::memory::RegionMemory;

/// What may go wrong, and how often. Chances are parts in a million.
#[derive(Clone, Debug)]
pub struct SimFaults {
    /// One-way delay of a link in nanoseconds, drawn once per link from this range.
    pub delay_ns: (u64, u64),
    /// Added to each delay, drawn from 0 to this.
    pub jitter_ns: u64,
    /// The most pieces that a read or a payload is torn into.
    pub pieces_max: u64,
    /// The chance that a completion comes late.
    pub late_chance: u32,
    /// By how much at most, in nanoseconds.
    pub late_ns: u64,
    /// The chance that a send is refused with `Busy`.
    pub busy_chance: u32,
    /// The chance that a send takes its payload over before it returns.
    pub immediate_chance: u32,
    /// The most extents that one send gathers.
    pub gather_max: usize,
    /// How long until a lost peer is noticed, in nanoseconds.
    pub detect_ns: (u64, u64),
    /// After how long connecting to a node that does not answer is given up, in nanoseconds.
    pub connect_timeout_ns: u64,
}

impl Default for SimFaults {
    /// Everything that can happen does, often.
    fn default() -> Self {
        Self {
            delay_ns: (5_000, 2_000_000),
            jitter_ns: 500_000,
            pieces_max: 8,
            late_chance: 100_000,
            late_ns: 20_000_000,
            busy_chance: 20_000,
            immediate_chance: 500_000,
            gather_max: 5,
            detect_ns: (1_000_000, 50_000_000),
            connect_timeout_ns: 5_000_000_000,
        }
    }
}

impl SimFaults {
    /// A network that only takes time.
    #[must_use]
    pub fn none() -> Self {
        Self {
            delay_ns: (10_000, 10_000),
            jitter_ns: 0,
            pieces_max: 1,
            late_chance: 0,
            late_ns: 0,
            busy_chance: 0,
            immediate_chance: 1_000_000,
            gather_max: 1024,
            detect_ns: (1_000_000, 1_000_000),
            connect_timeout_ns: 5_000_000_000,
        }
    }
}

/// The network between simulated nodes, and its clock. Clones are the same network.
#[derive(Clone)]
pub struct SimNet {
    shared: Arc<Shared>,
}

impl fmt::Debug for SimNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimNet").field("now_ns", &self.now()).finish_non_exhaustive()
    }
}

impl SimNet {
    /// A network without nodes, at time 0.
    #[must_use]
    pub fn new(seed: u64, faults: SimFaults) -> Self {
        Self { shared: Arc::new(Shared::new(seed, faults)) }
    }

    /// A node's fabric; its name is its address. A name may be used again once its node was killed or stopped.
    ///
    /// # Errors
    /// `Invalid` if a live node has this name.
    pub fn fabric(&self, name: &str, sink: Arc<dyn FabricSink>) -> Result<Arc<SimFabric>, StoreError> {
        let node = self.shared.add_node(name, sink)?;
        Ok(Arc::new(SimFabric { shared: Arc::clone(&self.shared), name: name.to_owned(), node }))
    }

    /// Lets the next thing happen, moving the clock to it and calling the sink of the node that it happens to.
    /// False if nothing is left to happen.
    #[allow(clippy::must_use_candidate, reason = "stepping is the point")]
    pub fn step(&self) -> bool {
        self.shared.step()
    }

    /// Nanoseconds since the network was made.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.shared.net.lock().now
    }

    /// When the next thing is due, in nanoseconds.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.shared.net.lock().next_at()
    }

    /// Moves the clock forward, at most to when the next thing is due; for ticks of the simulated nodes.
    pub fn advance_to(&self, now_ns: u64) {
        let mut net = self.shared.net.lock();
        let limit = net.next_at().unwrap_or(u64::MAX);
        net.now = net.now.max(now_ns.min(limit));
    }

    /// A node dies at once: it does and hears nothing more, and its peers notice after a while.
    pub fn kill(&self, name: &str) {
        self.shared.net.lock().end_node(name, None);
    }

    /// Two nodes no longer hear each other; what they send is held back, not lost.
    pub fn partition(&self, one: &str, other: &str) {
        self.shared.net.lock().partition(one, other);
    }

    /// Ends a partition: what was held back arrives.
    pub fn heal(&self, one: &str, other: &str) {
        self.shared.net.lock().heal(one, other);
    }

    /// Breaks all links between two nodes, as when a connection is reset; both notice after a while.
    pub fn cut(&self, one: &str, other: &str) {
        self.shared.net.lock().cut(one, other);
    }
}

/// One node's side of a [`SimNet`].
pub struct SimFabric {
    shared: Arc<Shared>,
    name: String,
    node: usize,
}

impl fmt::Debug for SimFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFabric").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Fabric for SimFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Sim
    }

    fn address(&self) -> String {
        self.name.clone()
    }

    fn register(
        &self,
        segment: SegmentId,
        memory: Arc<dyn RegionMemory>,
        access: Access,
    ) -> Result<RemoteKey, StoreError> {
        let (key, regions) = self.shared.net.lock().regions_of(self.node);
        regions.register(segment, key, memory, access)?;
        Ok(key)
    }

    fn deregister(&self, segment: SegmentId) {
        let mut net = self.shared.net.lock();
        let (_, regions) = net.regions_of(self.node);
        if let Some(region) = regions.remove(segment) {
            net.fail_reads_into(self.node, segment);
            region.close();
        }
    }

    fn connect(&self, address: &str) -> Result<LinkId, StoreError> {
        self.shared.net.lock().connect(self.node, address)
    }

    fn disconnect(&self, link: LinkId) {
        self.shared.net.lock().disconnect(self.node, link);
    }

    fn gather_max(&self) -> usize {
        self.shared.net.lock().faults.gather_max.max(1)
    }

    fn send(
        &self,
        link: LinkId,
        frame: Frame,
        payload: &[Extent],
        token: SendToken,
    ) -> Result<Sent, StoreError> {
        self.shared.net.lock().send(self.node, link, frame, payload, token)
    }

    fn read(
        &self,
        link: LinkId,
        transfer: TransferId,
        remote: RemoteExtent,
        local: Extent,
    ) -> Result<(), StoreError> {
        self.shared.net.lock().read(self.node, link, transfer, Some((remote, local)), None)
    }

    fn read_checked(
        &self,
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: RemoteExtent,
    ) -> Result<(), StoreError> {
        check_word(word)?;
        self.shared.net.lock().read(self.node, link, transfer, bytes, Some(word))
    }

    fn cancel(&self, transfer: TransferId) {
        self.shared.net.lock().cancel(self.node, transfer);
    }

    /// Steps the whole network, not only this node; `timeout` is virtual time.
    fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        let deadline = self.shared.net.lock().now.saturating_add(nanos(timeout));
        loop {
            if until() {
                return true;
            }
            {
                let mut net = self.shared.net.lock();
                if net.next_at().is_none_or(|at| at > deadline) {
                    net.now = net.now.max(deadline);
                    return false;
                }
            }
            self.shared.step();
        }
    }

    /// Nothing: nobody sleeps in virtual time.
    fn wake(&self) {}

    fn stop(&self) {
        self.shared.net.lock().end_node(&self.name, Some(self.node));
    }

    fn refused(&self) -> u64 {
        0
    }
}
