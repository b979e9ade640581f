//! A whole cluster in one thread from one seed: real engines, a simulated network, simulated memory, clients, and
//! faults; and checks that know nothing of the engine's books. Not a model of speed. Invariant: a seed gives the same
//! history every time, so that a failing one can be replayed.
//!
//! What is checked (see `history`, `guards`, `world`): a get returns whole bytes of one object of its key, never of
//! one whose delete was acknowledged before it began or whose put failed; no byte that someone reads, sends, leases
//! or lands is written by anyone else; every request of a live client is answered once, in time; an object that was
//! put and never deleted is found from every node once links are whole; originals leave only by a delete; nothing is
//! held once nobody is there; an object that is said to be on several nodes is, outlives any one of them, and is made
//! anew where it was lost; one node keeps the directory in the end, and nothing comes back that it, or one that kept it
//! before, saw deleted.

mod answers;
mod client;
mod departures;
mod guards;
mod history;
mod losses;
mod memory;
mod node;
mod outbox;
mod pattern;
mod plan;
mod ring;
mod rng;
mod world;

use std::fmt;

/// What happened in one or more seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests of clients to their nodes.
    pub operations: u64,
    /// Links cut, partitions, deaths of nodes, memory that could not be made, copies that failed.
    pub faults: u64,
    /// Clients that died in the middle of something.
    pub deaths: u64,
    /// Inputs of engines.
    pub inputs: u64,
    /// Gets whose bytes were read and compared.
    pub reads: u64,
    /// Bytes compared.
    pub verified: u64,
    /// Gets that found their object in the index, without the node.
    pub hits: u64,
    /// Gets that saw an object leave the index between pinning it and looking again.
    pub misses: u64,
    /// Objects sealed by clients.
    pub sealed: u64,
    /// Puts begun without asking.
    pub ahead: u64,
    /// Gets answered by DATA, on nodes that lived to the end.
    pub eager: u64,
    /// Gets answered by GRANT and Read, on nodes that lived to the end.
    pub rendezvous: u64,
    /// Objects that were handed over with others, in one answer.
    pub handed: u64,
    /// Frames with several messages.
    pub batches: u64,
    /// Reads whose last byte came after their lease had run out.
    pub late_reads: u64,
    /// Completions that were reported twice.
    pub repeats: u64,
    /// Reads of places that were known from before, without a lease.
    pub known_reads: u64,
    /// Gets answered so, on nodes that lived to the end.
    pub known: u64,
    /// Such places that had been given up by then, on nodes that lived to the end.
    pub outdated: u64,
    /// Objects evicted.
    pub evicted: u64,
    /// Objects that have moved to another tier.
    pub moved: u64,
    /// Keys that every node had to find at the end.
    pub durable: u64,
    /// Objects whose clients were told that they are on several nodes.
    pub replicated: u64,
    /// Of them, those that have outlived the node that they were put on, counted at each death.
    pub outlived: u64,
    /// Objects of which a node was made to hold a replica, on nodes that lived to the end.
    pub replicas: u64,
    /// How often a directory was taken over or handed on.
    pub successions: u64,
    /// Deletes that were acknowledged while a node was away that had the object, and known to all that may keep the
    /// directory.
    pub deleted_for_good: u64,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.faults += other.faults;
        self.deaths += other.deaths;
        self.inputs += other.inputs;
        self.reads += other.reads;
        self.verified += other.verified;
        self.hits += other.hits;
        self.misses += other.misses;
        self.sealed += other.sealed;
        self.ahead += other.ahead;
        self.eager += other.eager;
        self.rendezvous += other.rendezvous;
        self.handed += other.handed;
        self.batches += other.batches;
        self.late_reads += other.late_reads;
        self.repeats += other.repeats;
        self.known_reads += other.known_reads;
        self.known += other.known;
        self.outdated += other.outdated;
        self.evicted += other.evicted;
        self.moved += other.moved;
        self.durable += other.durable;
        self.replicated += other.replicated;
        self.outlived += other.outlived;
        self.replicas += other.replicas;
        self.successions += other.successions;
        self.deleted_for_good += other.deleted_for_good;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations, {} faults, {} deaths of clients, {} engine inputs, {} gets compared ({} bytes; {} in place, {} raced a withdrawal), \
             {} objects handed over in batches, {} objects sealed ({} puts that asked nobody), {} fetched eagerly, {} frames of several messages, {} by read ({} too late; {} at a known place in {} reads, {} places given up), {} completions repeated, {} evicted, {} moved to another tier, {} keys found everywhere at the end, \
             {} objects on several nodes, {} outlived their node, {} replicas held, the directory changed hands {} times, {} deletes known for good",
            self.operations,
            self.faults,
            self.deaths,
            self.inputs,
            self.reads,
            self.verified,
            self.hits,
            self.misses,
            self.handed,
            self.sealed,
            self.ahead,
            self.eager,
            self.batches,
            self.rendezvous,
            self.late_reads,
            self.known,
            self.known_reads,
            self.outdated,
            self.repeats,
            self.evicted,
            self.moved,
            self.durable,
            self.replicated,
            self.outlived,
            self.replicas,
            self.successions,
            self.deleted_for_good
        )
    }
}

/// How a seed went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was found, if anything.
    pub failure: Option<String>,
    /// What happened.
    pub tally: Tally,
    /// A hash over every input and action, for comparing two runs of a seed.
    pub trace: u64,
}

/// Runs one seed. `verbose` prints every input and action of every engine.
#[must_use]
pub fn run(seed: u64, verbose: bool) -> Outcome {
    let world = world::World::start(seed, verbose);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world::run(&world)));
    let mut world = world.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let panicked = result.err().map(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        format!("a panic: {}", text.unwrap_or("without words"))
    });
    Outcome { seed, failure: world.failure.take().or(panicked), tally: world.tally, trace: world.trace }
}
