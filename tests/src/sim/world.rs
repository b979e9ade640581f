//! The simulated world: one clock, one list of what is due, the nodes, the clients, the faults, and the checks that
//! need a view of all of it. Invariant: whatever happens is a function of the seed.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use hetmem_core::engine::{Action, Input};
use hetmem_core::wire::{ClientMessage, ClientReply, PeerMessage};
use hetmem_core::{ClientId, Extent, Generation, Key, LinkId, NodeId, SegmentId, Tier};
use hetmem_transport::SimNet;

use super::Tally;
use super::client::{Asked, Client, Tour};
use super::history::History;
use super::losses::Losses;
use super::node::{Clock, Node};
use super::plan::{MS, Plan, Weather};
use super::rng::{Rng, mix};

/// By then every node has joined.
pub(super) const JOINED_NS: u64 = 400 * MS;
/// After links are whole again, how long announcements may take to arrive, in nanoseconds.
pub(super) const GRACE_NS: u64 = 1_000 * MS;
/// The longest silence that is no loss: heartbeats come every 100 ms, and five may be missed.
const STALL_NS_MAX: u64 = 300 * MS;
const AUDIT_NS: u64 = 20 * MS;
/// How long a cluster without clients may take to come to rest once its leases have run out, in nanoseconds.
const SETTLE_NS: u64 = 1_500 * MS;
/// No seed takes longer than this, in nanoseconds.
const END_NS: u64 = 200_000 * MS;

/// Something that will happen.
pub(super) enum Due {
    ToNode {
        at: usize,
        epoch: u64,
        client: ClientId,
        request: u64,
        message: ClientMessage,
        payload: Bytes,
    },
    ToClient {
        client: ClientId,
        request: u64,
        reply: Option<ClientReply>,
    },
    Step {
        client: ClientId,
    },
    Scribble {
        client: ClientId,
    },
    Die {
        client: ClientId,
    },
    Left {
        at: usize,
        epoch: u64,
        client: ClientId,
    },
    Gone {
        at: usize,
        epoch: u64,
        client: ClientId,
    },
    Join {
        at: usize,
        epoch: u64,
    },
    Segment {
        at: usize,
        epoch: u64,
        segment: SegmentId,
        tier: Tier,
        len_bytes: u64,
    },
    CopyPart {
        at: usize,
        epoch: u64,
        generation: Generation,
        last: bool,
    },
    Deferred {
        at: usize,
        epoch: u64,
        link: LinkId,
    },
    /// A completion that was reported before.
    Again {
        at: usize,
        epoch: u64,
        input: Input,
    },
    Fault,
    Heal {
        one: usize,
        other: usize,
    },
    Restart {
        at: usize,
    },
    Audit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Clients work, faults come.
    Busy,
    /// No more faults; clients finish and leave.
    Ending,
    /// Everything that has to be there is looked at, from every node.
    Touring,
    /// Nobody is there; everything comes to rest.
    Settling {
        until: u64,
    },
    Over,
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) net: SimNet,
    pub(super) me: Weak<Mutex<World>>,
    queue: BTreeMap<(u64, u64), Due>,
    order: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) clients: BTreeMap<ClientId, Client>,
    pub(super) next_client: u32,
    keys: Vec<Key>,
    pub(super) history: History,
    pub(super) tally: Tally,
    pub(super) failure: Option<String>,
    phase: Phase,
    pub(super) partitions: Vec<(usize, usize)>,
    pub(super) losses: Losses,
    /// When nodes were, or may have been, apart.
    unrest: Vec<(u64, u64)>,
    pub(super) trace: u64,
    verbose: bool,
}

/// A hasher that gives the same on every machine and in every run.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix(self.0 ^ u64::from_le_bytes(word));
        }
    }
}

impl World {
    pub(super) fn start(seed: u64, verbose: bool) -> Arc<Mutex<Self>> {
        let plan = Plan::new(seed);
        let net = SimNet::new(seed, plan.network.clone());
        let keys = (0..plan.keys).map(|key| Key::new(&format!("k{key:02}")).expect("a key")).collect();
        let world = Arc::new_cyclic(|me| {
            Mutex::new(Self {
                history: History::new(plan.keys),
                plan,
                rng: Rng::new(seed),
                net,
                me: Weak::clone(me),
                queue: BTreeMap::new(),
                order: 0,
                nodes: Vec::new(),
                clients: BTreeMap::new(),
                next_client: 1,
                keys,
                tally: Tally::default(),
                failure: None,
                phase: Phase::Busy,
                partitions: Vec::new(),
                losses: Losses::default(),
                unrest: vec![(0, JOINED_NS)],
                trace: seed,
                verbose,
            })
        });
        world.lock().unwrap_or_else(std::sync::PoisonError::into_inner).begin();
        world
    }

    fn begin(&mut self) {
        if self.verbose {
            self.say(&format!("{:?}", self.plan));
        }
        for at in 0..self.plan.nodes {
            let clock = self.clock();
            let node = Node::start(self, at, 1, clock);
            self.nodes.push(node);
        }
        for at in 0..self.plan.nodes {
            self.feed(at, Input::Start);
            for _ in 0..self.plan.clients_per_node {
                self.at(JOINED_NS, Due::Join { at, epoch: 1 });
            }
        }
        self.later(AUDIT_NS, Due::Audit);
        if !matches!(self.plan.weather, Weather::Calm | Weather::Rough) {
            self.at(JOINED_NS + 50 * MS, Due::Fault);
        }
    }

    fn clock(&mut self) -> Clock {
        let most = self.plan.clock_ppm;
        let ppm =
            i64::try_from(self.rng.between(0, 2 * most)).unwrap_or(0) - i64::try_from(most).unwrap_or(0);
        Clock { ppm, offset: self.rng.between(0, 1_000_000 * MS) }
    }

    pub(super) fn now(&self) -> u64 {
        self.net.now()
    }

    pub(super) fn at(&mut self, at: u64, due: Due) {
        self.order += 1;
        self.queue.insert((at, self.order), due);
    }

    pub(super) fn later(&mut self, delay: u64, due: Due) {
        self.at(self.now() + delay, due);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.phase != Phase::Busy
    }

    pub(super) fn key(&self, number: usize) -> Key {
        self.keys[number].clone()
    }

    pub(super) fn key_number(&self, key: &Key) -> usize {
        key.as_str()[1..].parse().expect("a key of the simulation")
    }

    pub(super) fn fail(&mut self, why: String) {
        if self.failure.is_none() {
            let now = self.now();
            self.failure = Some(format!("at {now} ns: {why}"));
            self.phase = Phase::Over;
        }
    }

    fn say(&self, line: &str) {
        use std::io::Write;
        let now = self.now();
        let mut out = std::io::stdout().lock();
        // Whoever closed the output does not want to read it.
        let _ = writeln!(out, "{:>10}.{:03} us  {line}", now / 1_000, now % 1_000);
    }

    fn fold(&mut self, at: usize, what: impl Hash) {
        let mut hasher = Fold(self.trace);
        (self.now(), at).hash(&mut hasher);
        what.hash(&mut hasher);
        self.trace = hasher.finish();
    }

    pub(super) fn trace_input(&mut self, at: usize, input: &Input) {
        self.tally.inputs += 1;
        let detail = match input {
            Input::PeerMessage { request, message, .. } => (message.name(), *request),
            Input::PeerBatch { batch, .. } => ("BATCH", batch.0.len() as u64),
            Input::ClientRequest { request, message, .. } => (message.name(), *request),
            _ => ("", 0),
        };
        self.fold(at, (std::mem::discriminant(input), detail));
        let chatter = matches!(
            input,
            Input::Tick
                | Input::PeerMessage { message: PeerMessage::Heartbeat { .. } | PeerMessage::Alive, .. }
        );
        if self.verbose && !chatter {
            self.say(&format!("node {at} <- {input:?}"));
        }
    }

    pub(super) fn trace_action(&mut self, at: usize, action: &Action) {
        let extent: Option<Extent> = match action {
            Action::Fill { extent, .. } | Action::Land { extent, .. } => Some(*extent),
            Action::Read { bytes, .. } => bytes.map(|(_, local)| local),
            Action::Copy { to, .. } => Some(*to),
            Action::PinAndReply { located, .. } | Action::Item { located: Ok(located), .. } => {
                Some(located.extent)
            }
            _ => None,
        };
        self.fold(at, (std::mem::discriminant(action), extent));
        let chatter = matches!(
            action,
            Action::Send { message: PeerMessage::Heartbeat { .. } | PeerMessage::Alive, .. }
        );
        if self.verbose && !chatter {
            self.say(&format!("node {at} -> {action:?}"));
        }
    }

    // Unrest.

    /// Whether nothing kept the nodes apart in this time.
    pub(super) fn is_calm(&self, from: u64, to: u64) -> bool {
        self.unrest.iter().all(|(start, end)| *end < from || to < *start)
    }

    /// Something has happened after which nodes may be apart, until an audit finds them linked again.
    pub(super) fn disturbed(&mut self) {
        let now = self.now();
        match self.unrest.last_mut() {
            Some(last) if last.1 >= now => last.1 = u64::MAX,
            _ => self.unrest.push((now, u64::MAX)),
        }
    }

    /// Whether every live node has a link to the directory's node and the other way round.
    fn is_whole(&self) -> bool {
        self.partitions.is_empty() && self.is_whole_without(None)
    }

    /// The first node of those that may keep the directory that is alive.
    pub(super) fn heir(&self) -> Option<usize> {
        (0..self.plan.heirs).find(|&at| self.nodes[at].alive)
    }

    /// The same but for one node.
    pub(super) fn is_whole_without(&self, except: Option<usize>) -> bool {
        let Some(keeper) = self.heir() else { return false };
        let statuses: Vec<_> = self.nodes.iter().map(|node| node.engine.status()).collect();
        let linked = |at: usize, to: usize| {
            let epoch = self.nodes[to].epoch;
            let mut peers = statuses[at].peers.iter();
            epoch > 0 && peers.any(|peer| peer.node == NodeId(to as u64 + 1) && peer.linked)
        };
        let follows = |at: usize| {
            let name = statuses[at].directory.as_ref();
            statuses[at].keeps_directory == (at == keeper) && name == Some(&self.nodes[keeper].name)
        };
        let there = |at: &usize| self.nodes[*at].alive && Some(*at) != except;
        (0..self.nodes.len())
            .filter(there)
            .all(|at| follows(at) && (at == keeper || (linked(at, keeper) && linked(keeper, at))))
            // A node that died and was not noticed yet.
            && statuses[keeper].peers.iter().all(|peer| {
                self.nodes.iter().any(|node| node.alive && node.name == peer.name)
            })
    }

    fn audit(&mut self) {
        let now = self.now();
        let apart = self.unrest.last().is_some_and(|last| last.1 == u64::MAX);
        if apart
            && self.is_whole()
            && let Some(last) = self.unrest.last_mut()
        {
            last.1 = now + GRACE_NS;
        }
        let late = self.clients.values().find(|client| {
            let waits = |asked: &Asked| !asked.answered && asked.deadline < now;
            self.nodes[client.node].alive && client.alive && client.asked.as_ref().is_some_and(waits)
        });
        if let Some(client) = late {
            let (id, at, asked) = (client.id, client.node, client.asked.clone());
            self.fail(format!("node {at} did not answer client {id}: {asked:?}"));
        }
        self.go_on();
        self.later(AUDIT_NS, Due::Audit);
    }

    /// Goes to the next phase when its time has come.
    fn go_on(&mut self) {
        let now = self.now();
        match self.phase {
            Phase::Busy if now >= JOINED_NS + self.plan.busy_ns => self.end_faults(),
            Phase::Ending if self.clients.is_empty() && self.is_calm(now, now) => {
                self.phase = Phase::Touring;
                let expected = self.history.durable_keys(now);
                self.tally.durable += expected.len() as u64;
                for at in 0..self.nodes.len() {
                    if self.nodes[at].alive {
                        let tour = Tour {
                            keys: expected.clone(),
                            expected: expected.clone(),
                            lists: true,
                            ..Tour::default()
                        };
                        self.join(at, Some(tour));
                    }
                }
            }
            Phase::Touring if self.clients.is_empty() => {
                // Repair may be in a long pause.
                let repair = if self.plan.replicated > 0 { super::losses::HEAL_NS } else { 0 };
                let rest = u64::from(self.plan.lease_ms) * MS + SETTLE_NS;
                self.phase = Phase::Settling { until: now + rest.max(repair) };
            }
            Phase::Settling { until } if now >= until && self.repairs() => {
                self.phase = Phase::Settling { until: now + 50 * MS };
            }
            Phase::Settling { until } if now >= until => {
                self.phase = Phase::Over;
                self.check_rest();
            }
            _ => {}
        }
    }

    fn end_faults(&mut self) {
        self.phase = Phase::Ending;
        for (one, other) in std::mem::take(&mut self.partitions) {
            self.net.heal(&format!("n{one}"), &format!("n{other}"));
        }
        for at in 0..self.nodes.len() {
            let needed = at == 0 && (self.plan.heirs == 1 || self.heir().is_none());
            if !self.nodes[at].alive && (self.rng.percent(50) || needed) {
                self.restart(at);
            }
        }
    }

    /// Nobody uses anything any more, so nothing may be held.
    fn check_rest(&mut self) {
        self.check_replicas_at_rest();
        for at in 0..self.nodes.len() {
            if !self.nodes[at].alive {
                continue;
            }
            let status = self.nodes[at].engine.status();
            let counters = status.counters;
            self.tally.eager += counters.eager;
            self.tally.rendezvous += counters.read;
            self.tally.known += counters.known;
            self.tally.outdated += counters.outdated;
            let held = (status.draining, status.reservations, status.leases, status.clients);
            let granules = |extent: &Extent| extent.len_bytes.max(1).div_ceil(64) * 64;
            let sealed: u64 = self.nodes[at].index.values().map(|shown| granules(&shown.object.extent)).sum();
            let used: u64 = status.tiers.iter().map(|tier| tier.used_bytes).sum();
            let shown = self.nodes[at].index.len() as u64;
            if status.tiers[0].ahead_bytes != 0 {
                self.fail(format!(
                    "node {at} at rest: {} bytes are granted ahead",
                    status.tiers[0].ahead_bytes
                ));
            } else if !self.nodes[at].items.is_empty() {
                self.fail(format!("node {at}: items at rest: {:?}", self.nodes[at].items));
            } else if held != (0, 0, 0, 0) {
                self.fail(format!("node {at}: draining, reservations, leases, clients at rest: {held:?}"));
            } else if used != sealed || status.objects != shown {
                self.fail(format!(
                    "node {at} at rest: {used} bytes used by {} objects; the index shows {sealed} bytes of {shown}",
                    status.objects
                ));
            }
        }
    }

    // Faults.

    fn fault(&mut self) {
        if self.is_ending() {
            return;
        }
        if self.plan.weather == Weather::Losses {
            return self.loss();
        }
        self.tally.faults += 1;
        let kind = match self.plan.weather {
            Weather::Cuts => 0,
            Weather::Partitions => 1,
            Weather::Deaths => 2,
            Weather::Stalls => 3,
            _ => self.rng.between(0, 3),
        };
        let one = self.rng.index(self.nodes.len());
        let other = (one + 1 + self.rng.index(self.nodes.len() - 1)) % self.nodes.len();
        let names = (format!("n{one}"), format!("n{other}"));
        match kind {
            0 => {
                self.disturbed();
                self.net.cut(&names.0, &names.1);
            }
            1 => {
                self.disturbed();
                let everyone = self.rng.percent(30);
                for other in (0..self.nodes.len()).filter(|&at| at != one && (everyone || at == other)) {
                    let time = self.rng.between(10 * MS, 1_500 * MS);
                    self.part(one, other, time);
                }
            }
            3 => {
                let parted = |pair: &(usize, usize)| *pair == (one, other) || *pair == (other, one);
                if !self.partitions.iter().any(parted) {
                    let time = self.rng.between(MS, STALL_NS_MAX);
                    self.part(one, other, time);
                }
            }
            _ if one > 0 || self.plan.heirs > 1 || self.rng.percent(50) => {
                self.kill(one);
                let time = self.rng.between(MS, 900 * MS);
                if (one == 0 && self.plan.heirs == 1) || self.rng.percent(80) {
                    self.later(time, Due::Restart { at: one });
                }
            }
            _ => {}
        }
        let most = self.plan.fault_pause_ns;
        let pause = self.rng.between(10 * MS, most);
        self.later(pause, Due::Fault);
    }

    pub(super) fn part(&mut self, one: usize, other: usize, time: u64) {
        self.net.partition(&format!("n{one}"), &format!("n{other}"));
        self.partitions.push((one, other));
        self.later(time, Due::Heal { one, other });
    }

    pub(super) fn kill(&mut self, at: usize) {
        if !self.nodes[at].alive {
            return;
        }
        self.node_dies(at);
        self.disturbed();
        self.net.kill(&format!("n{at}"));
        let node = &mut self.nodes[at];
        node.alive = false;
        let epoch = node.epoch;
        let now = self.now();
        self.history.node_died(at, epoch, now);
        self.clients.retain(|_, client| client.node != at);
    }

    fn restart(&mut self, at: usize) {
        if self.nodes[at].alive {
            return;
        }
        self.disturbed();
        let (epoch, clock) = (self.nodes[at].epoch + 1, self.clock());
        self.nodes[at] = Node::start(self, at, epoch, clock);
        self.feed(at, Input::Start);
        if !self.is_ending() {
            for _ in 0..self.plan.clients_per_node {
                self.later(10 * MS, Due::Join { at, epoch });
            }
        }
    }

    // The clock.

    fn is_there(&self, at: usize, epoch: u64) -> bool {
        self.nodes[at].alive && self.nodes[at].epoch == epoch
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::ToNode { at, epoch, client, request, message, payload } => {
                if !self.is_there(at, epoch) || !self.nodes[at].pages.contains_key(&client) {
                    return;
                }
                if let ClientMessage::Evict { key, force: true } = &message {
                    let (key, now) = (self.key_number(key), self.now());
                    self.history.force_evict(key, now);
                }
                if let ClientMessage::Seal { reservation, .. } = &message {
                    self.written_for_several(at, client, *reservation);
                }
                self.feed(at, Input::ClientRequest { client, request, message, payload });
            }
            Due::ToClient { client, request, reply } => self.hears(client, request, reply),
            Due::Step { client } => self.step(client),
            Due::Scribble { client } => self.scribble(client),
            Due::Die { client } => self.die(client),
            Due::Left { at, epoch, client } if self.is_there(at, epoch) => self.session_over(at, client),
            Due::Gone { at, epoch, client } if self.is_there(at, epoch) => self.process_over(at, client),
            Due::Join { at, epoch } if self.is_there(at, epoch) && !self.is_ending() => self.join(at, None),
            Due::Segment { at, epoch, segment, tier, len_bytes } if self.is_there(at, epoch) => {
                self.segment_made(at, segment, tier, len_bytes);
            }
            Due::CopyPart { at, epoch, generation, last } if self.is_there(at, epoch) => {
                self.copy_part(at, generation, last);
            }
            Due::Deferred { at, epoch, link } if self.is_there(at, epoch) => self.retry_deferred(at, link),
            Due::Again { at, epoch, input } if self.is_there(at, epoch) => {
                self.feed(at, input);
            }
            Due::Fault => self.fault(),
            Due::Heal { one, other } => {
                if let Some(place) = self.partitions.iter().position(|pair| *pair == (one, other)) {
                    self.partitions.swap_remove(place);
                    if !self.partitions.contains(&(one, other)) && !self.partitions.contains(&(other, one)) {
                        self.net.heal(&format!("n{one}"), &format!("n{other}"));
                    }
                }
            }
            Due::Restart { at } => self.restart(at),
            Due::Audit => self.audit(),
            _ => {}
        }
    }

    /// When this world has something to do, beside the network.
    fn next_at(&self) -> Option<(u64, Option<usize>)> {
        let timers =
            self.nodes.iter().enumerate().filter_map(|(at, node)| Some((node.next_timer()?, Some(at))));
        let due = self.queue.first_key_value().map(|((at, _), _)| (*at, None));
        timers.chain(due).min_by_key(|(at, node)| (*at, node.is_none(), *node))
    }

    fn turn(&mut self, node: Option<usize>) {
        match node {
            Some(at) => {
                self.feed(at, Input::Tick);
            }
            None => {
                if let Some((_, due)) = self.queue.pop_first() {
                    self.happen(due);
                }
            }
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }
}

/// Lets everything happen, in the order of its time; what falls together, the network first.
pub(super) fn run(world: &Mutex<World>) {
    let lock = || world.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let net = lock().net.clone();
    loop {
        let mut held = lock();
        if held.is_over() {
            return;
        }
        if held.now() > END_NS {
            return held.fail("the cluster did not come to an end".to_owned());
        }
        let next = held.next_at();
        match (net.next_at(), next) {
            (Some(of_net), next) if next.is_none_or(|(at, _)| of_net <= at.max(held.now())) => {
                drop(held);
                net.step();
            }
            (_, Some((at, node))) => {
                net.advance_to(at);
                held.turn(node);
            }
            (_, None) => return,
        }
    }
}
