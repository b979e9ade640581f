//! The simulated network's clock, its queue of things to happen, and its nodes. Links and frames are in `links`,
//! reads in `reads`. Invariant: the sink is called by `Shared::step` alone, with the network unlocked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hetmem_core::wire::FrameHeader;
use hetmem_core::{LinkId, RemoteKey, StoreError};
use parking_lot::Mutex;

use super::SimFaults;
use super::links::{Delivery, End};
use super::reads::Read;
use super::rng::Rng;
use crate::fabric::{FabricEvent, FabricSink, Landing};
use crate::region::Regions;

pub(super) struct Shared {
    pub(super) net: Mutex<Net>,
}

/// Everything there is. Maps are ordered, so that a seed's history does not hang on a hash.
pub(super) struct Net {
    pub(super) faults: SimFaults,
    pub(super) rng: Rng,
    pub(super) now: u64,
    order: u64,
    queue: BTreeMap<(u64, u64), Event>,
    /// What partitions hold back, in the order in which it would have happened.
    held: Vec<Event>,
    partitions: BTreeSet<(String, String)>,
    pub(super) nodes: Vec<Node>,
    pub(super) ends: BTreeMap<LinkId, End>,
    pub(super) reads: BTreeMap<u64, Read>,
    pub(super) next_number: u64,
    /// For sinks, as soon as the network is unlocked.
    pub(super) reports: VecDeque<(usize, FabricEvent)>,
}

pub(super) struct Node {
    pub(super) name: String,
    /// None once the node is dead.
    sink: Option<Arc<dyn FabricSink>>,
    pub(super) regions: Arc<Regions>,
}

/// Something that will happen.
pub(super) enum Event {
    /// A connection attempt reaches the other node.
    Arrive { from: LinkId, target: String },
    /// The connecting end hears that it is connected.
    Up { end: LinkId },
    /// An end has waited long enough to be connected.
    GiveUp { end: LinkId },
    /// An end notices that its link is gone.
    Down { end: LinkId, why: StoreError },
    /// A part of a payload is taken out of the sender's extent.
    Capture { end: LinkId, number: u64, upto: usize },
    /// The sender hears that its payload's extent is free.
    Free { end: LinkId, number: u64 },
    /// The frame at the head of what goes to this end arrives.
    Deliver { end: LinkId },
    /// A part of a payload lands.
    Land { end: LinkId, number: u64, upto: usize },
    /// The receiver hears that a payload is complete.
    Landed { end: LinkId, number: u64 },
    /// A read's request reaches the owner.
    Serve { read: u64 },
    /// A part of a read is taken out of the owner's memory.
    Fetch { read: u64, from: usize, upto: usize },
    /// It lands in the reader's.
    Put { read: u64, from: usize, bytes: Vec<u8> },
    /// The word of a read is taken out of the owner's memory, after all bytes.
    FetchWord { read: u64 },
    /// The reader hears that the read is over.
    Done { read: u64, result: Result<(), StoreError> },
}

pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn pair(one: &str, other: &str) -> (String, String) {
    (one.min(other).to_owned(), one.max(other).to_owned())
}

impl Shared {
    pub(super) fn new(seed: u64, faults: SimFaults) -> Self {
        let net = Net {
            faults,
            rng: Rng::new(seed),
            now: 0,
            order: 0,
            queue: BTreeMap::new(),
            held: Vec::new(),
            partitions: BTreeSet::new(),
            nodes: Vec::new(),
            ends: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_number: 0,
            reports: VecDeque::new(),
        };
        Self { net: Mutex::new(net) }
    }

    pub(super) fn add_node(&self, name: &str, sink: Arc<dyn FabricSink>) -> Result<usize, StoreError> {
        let mut net = self.net.lock();
        if net.live_node(name).is_some() {
            let why = format!("a live node of the simulated network is called {name:?}");
            return Err(StoreError::invalid("name", why));
        }
        net.nodes.push(Node { name: name.to_owned(), sink: Some(sink), regions: Arc::default() });
        Ok(net.nodes.len() - 1)
    }

    pub(super) fn step(&self) -> bool {
        let delivery = {
            let mut net = self.net.lock();
            let Some(((at, _), event)) = net.queue.pop_first() else {
                return false;
            };
            net.now = net.now.max(at);
            net.happen(event)
        };
        if let Some(delivery) = delivery {
            self.deliver(&delivery);
        }
        loop {
            let (sink, event) = {
                let mut net = self.net.lock();
                let Some((node, event)) = net.reports.pop_front() else {
                    return true;
                };
                (net.sink(node), event)
            };
            if let Some(sink) = sink {
                sink.event(event);
            }
        }
    }

    fn deliver(&self, delivery: &Delivery) {
        let Some(sink) = self.net.lock().sink(delivery.node) else {
            return;
        };
        let Some((head, body)) = delivery.frame.as_bytes().split_first_chunk() else {
            return;
        };
        // `send` parsed the same header before it took the frame.
        let Ok(header) = FrameHeader::parse(head) else {
            return;
        };
        let landing = sink.message(delivery.end, header, body);
        self.net.lock().land(delivery, landing);
    }
}

impl Net {
    pub(super) fn sink(&self, node: usize) -> Option<Arc<dyn FabricSink>> {
        self.nodes.get(node)?.sink.clone()
    }

    pub(super) fn is_alive(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.sink.is_some())
    }

    pub(super) fn live_node(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.sink.is_some() && node.name == name)
    }

    pub(super) fn regions_of(&mut self, node: usize) -> (RemoteKey, Arc<Regions>) {
        (RemoteKey(self.rng.next()), Arc::clone(&self.nodes[node].regions))
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub(super) fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    pub(super) fn after(&mut self, delay_ns: u64, event: Event) {
        self.at(self.now.saturating_add(delay_ns), event);
    }

    pub(super) fn at(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.queue.insert((at, self.order), event);
    }

    pub(super) fn jitter(&mut self) -> u64 {
        let most = self.faults.jitter_ns;
        self.rng.between(0, most)
    }

    /// How much later than necessary a completion comes: mostly not at all.
    pub(super) fn lateness(&mut self) -> u64 {
        let (chance, most) = (self.faults.late_chance, self.faults.late_ns);
        if self.rng.chance(chance) { self.rng.between(0, most) } else { 0 }
    }

    pub(super) fn detection(&mut self) -> u64 {
        let (low, high) = self.faults.detect_ns;
        self.rng.between(low, high)
    }

    /// Cuts `len` bytes at random places: the ends of the pieces, rising, the last being `len`.
    pub(super) fn tear(&mut self, len: usize) -> Vec<usize> {
        let most = self.faults.pieces_max.max(1);
        let count = self.rng.between(1, most);
        let mut ends: BTreeSet<usize> = (1..count).map(|_| self.rng.index(len)).collect();
        ends.remove(&0);
        ends.insert(len);
        ends.into_iter().collect()
    }

    /// A node does and hears nothing more; `node` names it where another of this name may live by now.
    pub(super) fn end_node(&mut self, name: &str, node: Option<usize>) {
        let Some(node) = node.or_else(|| self.live_node(name)) else {
            return;
        };
        if self.nodes[node].sink.take().is_none() {
            return;
        }
        self.nodes[node].regions.close_all();
        let ends: Vec<LinkId> =
            self.ends.iter().filter(|(_, end)| end.node == node).map(|(id, _)| *id).collect();
        for id in ends {
            if let Some(end) = self.ends.remove(&id) {
                self.peer_is_gone(&end, "the node died");
            }
        }
        self.reads.retain(|_, read| read.node != node);
    }

    // Partitions.

    pub(super) fn partition(&mut self, one: &str, other: &str) {
        self.partitions.insert(pair(one, other));
    }

    pub(super) fn heal(&mut self, one: &str, other: &str) {
        self.partitions.remove(&pair(one, other));
        for event in std::mem::take(&mut self.held) {
            // Those that another partition still holds back are held again when their time comes.
            self.after(0, event);
        }
    }

    /// Whether a partition lies between the two nodes between which an event travels, if it does.
    fn is_held_back(&self, event: &Event) -> bool {
        let name = |node: usize| self.nodes[node].name.as_str();
        let between = |link: &LinkId| {
            let end = self.ends.get(link)?;
            Some(pair(name(end.node), name(end.peer_node?)))
        };
        let pair = match event {
            Event::Arrive { from, target } => self.ends.get(from).map(|end| pair(name(end.node), target)),
            Event::Up { end } | Event::Deliver { end } => between(end),
            Event::Serve { read } | Event::Put { read, .. } | Event::FetchWord { read } => {
                self.reads.get(read).and_then(|read| between(&read.end))
            }
            _ => None,
        };
        pair.is_some_and(|pair| self.partitions.contains(&pair))
    }

    fn happen(&mut self, event: Event) -> Option<Delivery> {
        if self.is_held_back(&event) {
            self.held.push(event);
            return None;
        }
        match event {
            Event::Arrive { from, target } => self.arrive(from, &target),
            Event::Up { end } => self.up(end),
            Event::GiveUp { end } => self.give_up(end),
            Event::Down { end, why } => self.down(end, &why),
            Event::Capture { end, number, upto } => self.capture(end, number, upto),
            Event::Free { end, number } => self.free(end, number),
            Event::Deliver { end } => return self.take_delivery(end),
            Event::Land { end, number, upto } => self.land_part(end, number, upto),
            Event::Landed { end, number } => self.landed(end, number),
            Event::Serve { read } => self.serve(read),
            Event::Fetch { read, from, upto } => self.fetch(read, from, upto),
            Event::Put { read, from, bytes } => self.put(read, from, &bytes),
            Event::FetchWord { read } => self.fetch_word(read),
            Event::Done { read, result } => self.done(read, result),
        }
        None
    }

    fn land(&mut self, delivery: &Delivery, landing: Landing) {
        match landing {
            Landing::Discard => self.discard(delivery.end, delivery.number),
            Landing::Into { parts, token } => self.begin_landing(delivery, &parts, token),
        }
    }
}
