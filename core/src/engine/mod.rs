//! The engine: what a node decides, as a state machine without I/O.
//!
//! Not a daemon: it owns no memory, socket, clock or thread. Inputs and the time come in, actions go out, and the
//! caller must carry them out in order before it hands in the next input. Invariant: an extent is given to a new
//! object only after the old one was withdrawn, its generation raised, and no pin, lease, send or read names it.

mod action;
mod ahead;
mod arrival;
mod awaiting;
mod choice;
mod cluster;
mod crossing;
mod delete;
mod directory;
mod eviction;
mod fetch;
mod fetches;
mod hints;
mod input;
mod keeper;
mod known;
mod lifecycle;
mod links;
mod local;
mod locations;
mod moves;
mod numbers;
mod objects;
mod outgoing;
mod owner;
mod paths;
mod puts;
mod redial;
mod repair;
mod replicas;
mod room;
mod space;
mod status;
mod timer;
mod waiting;

pub use action::{Action, Attachment, Event, Payload, PublishedObject};
pub use ahead::AHEAD_OBJECTS_MAX;
pub use directory::{Directory, Verdict};
pub use input::{
    EngineConfig, FabricId, FabricUse, GpuUse, Input, Pinned, PutAhead, ReadEnd, RingState, THRESHOLD_DEFAULT,
};
pub use lifecycle::State;
pub use paths::{THRESHOLD_MAX, THRESHOLD_MIN};
pub use room::StartUp;
pub use timer::Time;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::tier::{ClientId, Generation, LandingId, LeaseId, LinkId, NodeId, SegmentId, TransferId};
use crate::wire::NodeStatus;
use arrival::Part;
use crossing::Crossings;
use directory::Deleted;
use eviction::Eviction;
use fetch::FetchId;
use fetches::Fetches;
use hints::Hints;
use keeper::Keeping;
use links::{Link, Peer};
use local::Client;
use locations::Locations;
use moves::Moves;
use numbers::Numbered;
use objects::Objects;
use outgoing::Outgoing;
use owner::Lease;
use paths::Paths;
use redial::Redial;
use repair::Repair;
use replicas::Replication;
use room::{Scans, SpaceRequest};
use space::Space;
use timer::{Timer, Timers};
use waiting::WaitingKey;

/// The largest put that travels inside its message, in bytes.
pub const INLINE_PUT_MAX: u32 = 64 * 1024;

/// One node's decisions. See the module's documentation.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    now: Time,
    out: Vec<Action>,
    timers: Timers,
    counters: NodeStatus,

    objects: Objects,
    /// Objects that may go when room is needed, in the order in which they would.
    eviction: Eviction,
    space: Space,
    /// Requests that wait for room, oldest first.
    waiting_space: VecDeque<SpaceRequest>,
    /// Whether those are to be looked at once more before this pass ends.
    space_freed: bool,
    /// For whom nothing was found in this pass that might go.
    nothing_evictable: Option<(crate::Tier, space::Owner)>,
    /// Segments that a start-up still waits for.
    first_segments: BTreeSet<SegmentId>,
    first_failure: Option<crate::StoreError>,
    /// Whether an object was withdrawn since the last look at the pins.
    scan_wanted: bool,
    scans: Scans,

    clients: BTreeMap<ClientId, Client>,
    /// Seals that wait for their bytes to be copied: who asked, and where the copy goes.
    pending_copies: BTreeMap<Generation, (ClientId, u64)>,
    copy_targets: BTreeMap<Generation, crate::Extent>,
    crossings: Crossings,
    moves: Moves,
    /// Whether a GPU has come to hold more, or may move more, than when watermarks were last looked at.
    gpu_grew: bool,
    waiting_keys: BTreeMap<crate::Key, Vec<WaitingKey>>,

    leases: BTreeMap<LeaseId, Lease>,
    next_lease: u64,
    /// Sends that still read from extents: of which objects, by the number that their completion will carry.
    sends: BTreeMap<u64, Vec<Generation>>,
    next_send: u64,
    outgoing: Outgoing,

    links: BTreeMap<LinkId, Link>,
    peers: BTreeMap<NodeId, Peer>,
    dialling: BTreeSet<String>,
    redial: Redial,
    directory_link: Option<LinkId>,
    reconnect_attempts: u32,
    directory: Option<Directory>,
    keeping: Keeping,
    repair: Repair,
    /// Objects that are on too few nodes, as the node that keeps the directory last said.
    under_replicated: u64,
    /// Objects that this node was told to drop: a copy that was under way meanwhile does not bring one back.
    deleted: Deleted,

    fetches: Fetches,
    /// Reads under way: the object that is filled, and for which fetch.
    transfers: BTreeMap<TransferId, (Generation, FetchId)>,
    /// Payloads under way, and which parts of them land.
    landing: BTreeMap<LandingId, Vec<Part>>,
    next_landing: u64,
    next_transfer: u64,
    /// The payload whose parts may still be given places: that of the frame that is being handled.
    payload_at_hand: Option<LandingId>,
    hints: Hints,
    paths: Paths,
    locations: Locations,

    /// Questions to peers that wait for an answer, by request number.
    pending: Numbered<u64, (LinkId, cluster::Pending)>,
    next_request: u64,
    deletes: BTreeMap<u64, delete::Delete>,
    asks: BTreeMap<u64, cluster::Ask>,
    replications: BTreeMap<u64, Replication>,
    next_operation: u64,
}

impl Engine {
    /// An engine that has done nothing yet. Feed [`Input::Start`] first.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        let directory = config.join.is_empty().then(Directory::default);
        Self {
            now: Time::default(),
            out: Vec::new(),
            timers: Timers::default(),
            counters: NodeStatus::default(),
            objects: Objects::new(config.objects_max),
            eviction: Eviction::default(),
            space: Space::new(config.capacity_bytes, config.client_quota_bytes, &config.gpus),
            waiting_space: VecDeque::new(),
            space_freed: false,
            nothing_evictable: None,
            first_segments: BTreeSet::new(),
            first_failure: None,
            scan_wanted: false,
            scans: Scans::default(),
            clients: BTreeMap::new(),
            pending_copies: BTreeMap::new(),
            copy_targets: BTreeMap::new(),
            crossings: Crossings::default(),
            moves: Moves::default(),
            gpu_grew: false,
            waiting_keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            next_lease: 1,
            sends: BTreeMap::new(),
            next_send: 1,
            outgoing: Outgoing::default(),
            links: BTreeMap::new(),
            peers: BTreeMap::new(),
            dialling: BTreeSet::new(),
            redial: Redial::default(),
            directory_link: None,
            reconnect_attempts: 0,
            directory,
            keeping: Keeping::new(&config.join, &config.member.address),
            repair: Repair::default(),
            under_replicated: 0,
            deleted: Deleted::default(),
            fetches: Fetches::default(),
            transfers: BTreeMap::new(),
            landing: BTreeMap::new(),
            next_landing: 1,
            next_transfer: 1,
            payload_at_hand: None,
            hints: Hints::default(),
            paths: Paths::default(),
            locations: Locations::default(),
            pending: Numbered::default(),
            next_request: 1,
            deletes: BTreeMap::new(),
            asks: BTreeMap::new(),
            replications: BTreeMap::new(),
            next_operation: 1,
            config,
        }
    }

    /// Takes one input at a time `now` (never earlier than the last) and returns what is to be done, in order.
    pub fn handle(&mut self, now: Time, input: Input) -> Vec<Action> {
        self.now = self.now.max(now);
        if !matches!(input, Input::PinScan { .. }) {
            self.payload_at_hand = None;
        }
        self.nothing_evictable = None;
        match input {
            Input::Start => self.start(),
            Input::Tick => {}
            Input::ClientJoined { client, trusted } => self.client_joined(client, trusted),
            Input::ClientRequest { client, request, message, payload } => {
                self.client_request(client, request, message, payload);
            }
            Input::PutsAhead { client, puts, ring } => self.puts_ahead(client, puts, ring),
            Input::AheadChanged { client, ring } => self.ahead_changed(client, ring),
            Input::ClientLeft { client } => self.client_left(client),
            Input::ClientProcessGone { client } => self.adopt_segments_of(client),
            Input::LinkUp { link, fabric, address, inbound } => self.link_up(link, fabric, address, inbound),
            Input::LinkDown { link, why } => self.link_down(link, &why),
            Input::ConnectFailed { address, why } => self.connect_failed(&address, &why),
            Input::PeerMessage { link, request, message, payload_len } => {
                self.peer_message(link, request, message, payload_len);
            }
            Input::PeerBatch { link, batch, payload_len } => self.peer_batch(link, batch, payload_len),
            Input::Refused { link, why } => self.peer_refused(link, &why),
            Input::Landed { landing, result } => self.landed(landing, result),
            Input::ReadDone { transfer, result } => self.read_done(transfer, result),
            Input::SendDone { send } => self.send_done(send),
            Input::PinScan { pinned, touched } => self.pin_scan(&pinned, &touched),
            Input::SegmentReady { segment, keys } => self.segment_ready(segment, keys),
            Input::SegmentFailed { segment, why } => self.segment_failed(segment, &why),
            Input::CopyDone { generation, result } if self.crossings.is_copying(generation) => {
                self.crossed(generation, result);
            }
            Input::CopyDone { generation, result } if self.moves.is_copying(generation) => {
                self.moved(generation, &result);
            }
            Input::CopyDone { generation, result } => self.copy_done(generation, result),
        }
        self.run_timers();
        if std::mem::take(&mut self.space_freed) {
            self.retry_space();
        }
        if std::mem::take(&mut self.gpu_grew) {
            self.keep_watermarks();
        }
        self.look_at_changed_keys();
        self.send_noted();
        if self.scan_wanted {
            self.scan_wanted = false;
            self.out.push(Action::ScanPins);
        }
        std::mem::take(&mut self.out)
    }

    /// When [`Input::Tick`] is due at the latest, if nothing else comes in.
    #[must_use]
    pub fn next_timer(&self) -> Option<Time> {
        self.timers.next()
    }

    fn start(&mut self) {
        for (segment, len_bytes) in self.space.first_segments() {
            self.first_segments.insert(segment);
            let tier = self.space.tier(segment);
            self.out.push(Action::CreateSegment { segment, tier, len_bytes, owner: None });
        }
        self.timers.set(self.now.after_ms(self.config.heartbeat_ms), Timer::Heartbeat);
        self.dial_list();
        self.consider_keeping();
    }

    fn run_timers(&mut self) {
        while let Some(timer) = self.timers.due(self.now) {
            match timer {
                Timer::Heartbeat => self.heartbeat(),
                Timer::Reconnect => self.dial_list(),
                Timer::Redial => self.redial_due(),
                Timer::Keep => {
                    self.consider_keeping();
                    self.ask_again();
                }
                Timer::Repair => self.repair_due(),
                Timer::Lease(lease) => self.lease_over(lease),
                Timer::Ttl(generation) => self.ttl_over(generation),
                Timer::Fetch(fetch) => self.fetch_deadline(fetch),
                Timer::Many(client, _) => self.fetch_deadlines(client),
                Timer::Retry(fetch) => self.fetch_retry(fetch),
                Timer::Wait => self.wait_deadlines(),
                Timer::Space => self.space_deadlines(),
                Timer::Drain => self.drain_again(),
                Timer::Ahead(client) => self.ahead_idle(client),
                Timer::Operation(operation) => self.operation_deadline(operation),
            }
        }
    }
}

#[cfg(test)]
mod tests;
