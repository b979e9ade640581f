//! Gets from other nodes: who is asked, and what is done when an answer is none. Not the bytes (`arrival`), and not
//! the owner's side (`owner`). Invariant: a fetch is in one stage, and only the question, dialling or retry of that
//! stage moves it on.

mod setbacks;

use super::Engine;
use super::cluster::{AskFor, Pending};
use super::local::Caller;
use super::locations::Location;
use super::paths::Timed;
use super::replicas::ReplicaAsked;
use super::timer::{Time, Timer};
use crate::error::{ErrorKind, StoreError};
use crate::key::Key;
use crate::meta::ObjectMeta;
use crate::receipt::{Moved, Path};
use crate::tier::{ClientId, Generation, LandingId, LinkId, NodeId, ObjectId, RemoteExtent, TransferId};
use crate::wire::{Granted, Holder, Origin, PeerMessage, Range};

/// How long a fetch waits for a link to a holder before it looks for another, in milliseconds.
const DIAL_MS: u64 = 200;
/// Holders of one key that are tried one after the other.
const HOLDERS_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FetchId(pub(super) u64);

/// What a fetch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// The bytes; kept here for later readers or not.
    Object { keep: bool },
    /// Only the metadata.
    Stat,
    /// Only whether it exists.
    Existence,
}

/// Who waits for a fetch.
#[derive(Debug)]
pub(super) enum FetchFor {
    Client(Caller),
    Replica(Box<ReplicaAsked>),
}

impl FetchFor {
    /// Whether its deadline is that of a request for many keys, which has a timer of its own.
    fn is_one_of_many(&self) -> bool {
        matches!(self, Self::Client(caller) if caller.is_one_of_many())
    }
}

#[derive(Debug)]
pub(super) struct FetchWaiter {
    pub(super) who: FetchFor,
    deadline: Time,
    timeout_ms: u64,
    /// Questions that had been asked when it came: "no such object" is an answer to it only from a later one.
    came_after: u64,
}

impl FetchWaiter {
    fn is_of(&self, client: ClientId) -> bool {
        matches!(self.who, FetchFor::Client(caller) if caller.client == client)
    }
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Waits until it is tried again.
    Waiting,
    /// Waits for a link to this node, until then.
    Dialling { holder: Holder, until: Time },
    /// This node keeps the directory, does not know the key, and asks everyone.
    AskingAll,
    /// A GET is under way.
    Asked { link: LinkId, request: u64, at: Time },
    /// Bytes are known to be at a peer, and there is no room for them yet.
    NeedsRoom { link: LinkId, source: Source },
    /// The payload of the answer is landing.
    Landing { link: LinkId },
    /// A read is under way.
    Reading { link: LinkId, transfer: TransferId, granted: Granted, valid_until: Time },
    /// A read without a lease is under way, of a place that is remembered and of the owner's word after it.
    ReadingKnown { transfer: TransferId, location: Location },
    /// The bytes are here, in this generation, and their lease had run out by then; what they are is seen by the owner's
    /// word.
    CheckingWord { transfer: TransferId, location: Location, generation: Generation },
}

/// What a peer has answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    pub(super) object: ObjectId,
    pub(super) meta: ObjectMeta,
    pub(super) origin: Origin,
    pub(super) bytes: Bytes,
}

/// Where the bytes are that a peer has answered with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bytes {
    /// In the payload of this frame, from this byte on, while it is being handled; gone once it is not.
    InAnswer { landing: LandingId, start: u64 },
    /// At the peer, to be read until then.
    Granted { granted: Granted, valid_until: Time },
    /// At a peer that was not asked, where the object was found before.
    Known { location: Location, remote: RemoteExtent },
}

#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) key: Key,
    pub(super) range: Option<Range>,
    pub(super) want: Want,
    pub(super) waiters: Vec<FetchWaiter>,
    pub(super) stage: Stage,
    /// How many questions were asked for it.
    questions: u64,
    /// Nodes that are said to have it.
    holders: Vec<Holder>,
    /// Whether the directory was asked: it is asked again only after a pause.
    asked_directory: bool,
    /// Nodes that did not give it since it was last tried from the start.
    pub(super) tried: Vec<NodeId>,
    /// What was last in the way, and how often anything was.
    obstacle: Option<StoreError>,
    obstacles: u32,
    /// The node that its key's last object came from, where it was asked first.
    pub(super) hinted: Option<NodeId>,
    /// The node that did not give it at last, rather than not have it.
    failed_by: Option<NodeId>,
    /// The eager threshold that its caller forces, in bytes.
    pub(super) threshold_bytes: Option<u64>,
    /// The one that its last question named.
    pub(super) inline_max: u64,
    /// Questions and reads that followed one another.
    pub(super) round_trips: u32,
    /// What the last read or landing brought, and by which way.
    pub(super) moved: Moved,
    pub(super) came_by: Path,
    /// Where they came from at the peer.
    pub(super) origin: Origin,
    /// Its question, if that is being timed.
    pub(super) timed: Option<Timed>,
}

impl Fetch {
    /// How many replicas it is for.
    pub(super) fn replicas(&self) -> usize {
        self.waiters.iter().filter(|waiter| matches!(waiter.who, FetchFor::Replica(_))).count()
    }

    /// Whether it is for replicas alone: these are of one object, which the named holders have. Others may have another
    /// one of the key.
    fn is_of_named(&self) -> bool {
        self.replicas() == self.waiters.len()
    }
}

/// What of an object is wanted, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    pub(super) range: Option<Range>,
    pub(super) want: Want,
    /// The eager threshold, in bytes, if it is forced.
    pub(super) threshold_bytes: Option<u64>,
}

impl Engine {
    /// Starts a get from other nodes, or joins one that is under way.
    pub(super) fn fetch(&mut self, caller: Caller, key: Key, scope: Scope, timeout_ms: u64) {
        self.fetch_from_any(FetchFor::Client(caller), key, scope, timeout_ms, Vec::new());
    }

    /// The same, for whoever it is; `holders` are said to have it.
    pub(super) fn fetch_from_any(
        &mut self,
        who: FetchFor,
        key: Key,
        Scope { range, want, threshold_bytes }: Scope,
        timeout_ms: u64,
        holders: Vec<Holder>,
    ) {
        let deadline = self.now.after_ms(timeout_ms);
        let has_timer = who.is_one_of_many();
        let mut waiter = FetchWaiter { who, deadline, timeout_ms, came_after: 0 };
        // Once the owner's word may have been read, what it says may be older than who comes now.
        let same = |fetch: &Fetch| {
            let decided = matches!(fetch.stage, Stage::ReadingKnown { .. } | Stage::CheckingWord { .. });
            fetch.range == range && fetch.threshold_bytes == threshold_bytes && !decided
        };
        let joinable = matches!(want, Want::Object { keep: true });
        if joinable
            && let Some(id) = self.fetches.joinable(&key, same)
            && let Some(fetch) = self.fetches.get_mut(id)
        {
            waiter.came_after = fetch.questions;
            fetch.waiters.push(waiter);
            return self.set_deadline(id, has_timer, deadline);
        }
        let id = self.fetches.insert(Box::new(Fetch {
            key,
            range,
            want,
            waiters: vec![waiter],
            stage: Stage::Waiting,
            questions: 0,
            holders,
            asked_directory: false,
            tried: Vec::new(),
            obstacle: None,
            obstacles: 0,
            hinted: None,
            failed_by: None,
            threshold_bytes,
            inline_max: 0,
            round_trips: 0,
            moved: Moved::default(),
            came_by: Path::Eager,
            origin: Origin::HOST,
            timed: None,
        }));
        self.set_deadline(id, has_timer, deadline);
        self.fetch_start(id);
    }

    /// One of many keys has the deadline of its request, which has a timer already.
    fn set_deadline(&mut self, id: FetchId, has_timer: bool, deadline: Time) {
        if !has_timer {
            self.timers.set(deadline, Timer::Fetch(id));
        }
    }

    /// Asks the node that is most likely to have the object.
    pub(super) fn fetch_start(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get(id) else {
            return;
        };
        let key = fetch.key.clone();
        if self.objects.sealed(&key).is_some() {
            // It was put here, or came with another fetch, meanwhile.
            let Some(fetch) = self.take_fetch(id) else { return };
            for waiter in fetch.waiters {
                match waiter.who {
                    FetchFor::Client(caller) => {
                        self.found_here(caller, &key, fetch.range, fetch.want);
                    }
                    FetchFor::Replica(asked) => self.replica_found(&asked),
                }
            }
            return;
        }
        let named = self.fetches.get(id).is_some_and(Fetch::is_of_named);
        if (!named && self.fetch_known(id)) || self.fetch_next(id) {
            return;
        }
        if named {
            let why = self.fetch_stale(id, "none of the nodes that were named gave it");
            return self.fetch_failed(id, &why);
        }
        if self.fetches.get(id).is_some_and(|fetch| fetch.asked_directory) {
            return self.fetch_exhausted(id);
        }
        if self.directory.is_some() {
            let holders = self.live_holders(&key, self.config.member.node);
            if !holders.is_empty() {
                return self.fetch_from(id, holders);
            }
            self.set_stage(id, Stage::AskingAll);
            self.fetch_questioned(id);
            return self.ask_everyone(key, AskFor::Fetch(id));
        }
        match self.directory_link {
            Some(link) => self.fetch_ask_directory(id, link),
            None => {
                let why = self.no_directory(&format!("get {key:?}"));
                self.fetch_obstacle(id, why);
            }
        }
    }

    pub(super) fn set_stage(&mut self, id: FetchId, stage: Stage) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = stage;
        }
    }

    /// The directory has named all that it knows: asks one of them that was not tried.
    fn fetch_from(&mut self, id: FetchId, mut holders: Vec<Holder>) {
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        holders.truncate(HOLDERS_MAX);
        for holder in holders.iter().rev() {
            self.hints.remember(&fetch.key, holder.node);
        }
        fetch.holders = holders;
        fetch.asked_directory = true;
        if !self.fetch_next(id) {
            self.fetch_exhausted(id);
        }
    }

    /// Asks the nearest node that is said to have it and was not tried, rather one to which there is a link. False if
    /// no such node is known.
    fn fetch_next(&mut self, id: FetchId) -> bool {
        let Some(fetch) = self.fetches.get(id) else {
            return true;
        };
        let hinted = if fetch.is_of_named() { &[] } else { self.hints.get(&fetch.key) };
        let untried = |node: &NodeId| !fetch.tried.contains(node);
        let said = fetch.holders.iter().map(|holder| holder.node).chain(hinted.iter().copied());
        let linked = said.filter(|node| untried(node) && self.link_to(*node).is_some());
        if let Some(link) = self.nearest(&fetch.key, linked).and_then(|node| self.link_to(node)) {
            let hinted = hinted.first().copied();
            if let Some(fetch) = self.fetches.get_mut(id) {
                fetch.hinted = hinted;
            }
            self.fetch_ask(id, link);
            return true;
        }
        // Who gave it before is dialled where nobody can say who has it now.
        let lost = self.directory.is_none() && self.directory_link.is_none();
        let remembered = hinted.iter().filter(|_| lost).filter_map(|node| {
            let address = self.peers.get(node)?.member.address.clone();
            Some(Holder { node: *node, address })
        });
        let holders = fetch.holders.iter().cloned().chain(remembered);
        let fresh = holders.filter(|holder| untried(&holder.node));
        let Some(holder) = fresh.min_by_key(|holder| self.redial.is_paused(&holder.address, self.now)) else {
            return false;
        };
        // `welcome` goes on when the link is up.
        let until = self.now.after_ms(DIAL_MS);
        self.set_stage(id, Stage::Dialling { holder: holder.clone(), until });
        self.timers.set(until, Timer::Retry(id));
        self.dial(&holder.address);
        true
    }

    /// None of the nodes that are said to have it gave it.
    fn fetch_exhausted(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        fetch.tried.clear();
        // A node that was lost on the way stays the reason; else they have dropped it, and the directory is about to
        // hear of that.
        let lost = fetch.obstacle.take().filter(|why| why.kind() == ErrorKind::PeerLost);
        let why = lost.unwrap_or_else(|| {
            StoreError::stale("get", &fetch.key, "the nodes that are said to hold it do not have it")
        });
        self.fetch_obstacle(id, why);
    }

    fn fetch_ask(&mut self, id: FetchId, link: LinkId) {
        let Some(fetch) = self.fetches.get(id) else {
            return;
        };
        let (key, range, want, forced) = (fetch.key.clone(), fetch.range, fetch.want, fetch.threshold_bytes);
        let (range, inline_max) = match want {
            Want::Object { .. } => (range, self.inline_max_for(id, link, forced)),
            Want::Stat | Want::Existence => (Some(Range { start: 0, len_bytes: 0 }), 0),
        };
        let message = PeerMessage::Get { key, range, inline_max };
        let at = self.now;
        let request = self.ask_peer(link, message, Pending::Get { fetch: id });
        self.set_stage(id, Stage::Asked { link, request, at });
        self.fetch_questioned(id);
    }

    /// Asks the directory: for the object, or for others that have it if its own node could not give it.
    fn fetch_ask_directory(&mut self, id: FetchId, link: LinkId) {
        let node = self.directory_node();
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        fetch.asked_directory = true;
        if node.is_none_or(|node| !fetch.tried.contains(&node)) {
            return self.fetch_ask(id, link);
        }
        let message = PeerMessage::Locate { key: fetch.key.clone() };
        let at = self.now;
        let request = self.ask_peer(link, message, Pending::Get { fetch: id });
        self.set_stage(id, Stage::Asked { link, request, at });
        self.fetch_questioned(id);
    }

    fn fetch_questioned(&mut self, id: FetchId) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.questions += 1;
            fetch.round_trips += 1;
        }
    }

    /// A read took so many trips to the owner and back.
    pub(super) fn fetch_round_trips(&mut self, id: FetchId, count: u32) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.round_trips += count;
        }
    }

    /// Whether a fetch still waits for the answer to this very question, and when that was asked.
    pub(super) fn fetch_asked_at(&self, id: FetchId, request: u64) -> Option<Time> {
        match self.fetches.get(id)?.stage {
            Stage::Asked { request: of, at, .. } if of == request => Some(at),
            _ => None,
        }
    }

    /// Everyone was asked for the key of a fetch.
    pub(super) fn fetch_asked_all(&mut self, id: FetchId, holders: Vec<Holder>) {
        if !matches!(self.fetches.get(id), Some(fetch) if matches!(fetch.stage, Stage::AskingAll)) {
            return;
        }
        if holders.is_empty() {
            return self.fetch_not_found(id);
        }
        self.fetch_from(id, holders);
    }

    /// FAILED in answer to a GET.
    pub(super) fn fetch_refused(&mut self, link: LinkId, id: FetchId, why: StoreError) {
        let node = self.links.get(&link).and_then(|link| link.node);
        let from_directory = node.is_some() && node == self.directory_node();
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        fetch.stage = Stage::Waiting;
        match why.kind() {
            ErrorKind::NotFound if from_directory => self.fetch_not_found(id),
            ErrorKind::NotFound => {
                // A holder that was remembered or named has dropped it meanwhile.
                fetch.tried.extend(node);
                if let Some(node) = node {
                    fetch.holders.retain(|holder| holder.node != node);
                    self.hints.forget(&fetch.key, node);
                }
                self.fetch_start(id);
            }
            _ if from_directory => self.fetch_obstacle(id, why),
            _ => {
                self.fetch_tried(id, link);
                self.fetch_moves_on(id, why);
            }
        }
    }

    /// LOCATED in answer to a GET: who says so does not have it.
    pub(super) fn fetch_located(&mut self, link: LinkId, id: FetchId, holders: Vec<Holder>) {
        let node = self.links.get(&link).and_then(|link| link.node);
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::Waiting;
            fetch.tried.extend(node);
            self.fetch_from(id, holders);
        }
    }
}
