//! What one verbs fabric knows: adapters, connections, links, and what is to be told of them; and here how connections are
//! made. Not threads (`shared`), and not the bytes that come (`incoming`). Invariant: everything here is changed under one
//! lock, nothing waits under it, and the sink is never called under it: what it is to hear is put into `effects`.

mod devices;
mod endings;
mod iwarp;
mod pushes;
mod work;

pub(super) use self::devices::prove_all;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::{LinkId, RemoteKey, SegmentId, StoreError, TransferId};

use self::iwarp::Aside;
use super::abi;
use super::adapters::{Adapter, Segment};
use super::ends::{End, Role, Stage as EndStage};
use super::links::{Link, Stage};
use super::plugin::{Connection, Context, Greeting};
use super::proof::{Proof, Scratch};
use super::slots::Slots;
use super::wire::{Described, Hello, LinkToken, Owner, Purpose, describe, is_greeting};
use crate::fabric::{FabricEvent, FabricKind, SendToken};

/// How long looking for the way to a peer may take, in milliseconds.
const RESOLVE_MS: u32 = 2_000;
/// The most reads that one connection may have under way, whatever the adapter could.
const READS_MAX: u32 = 16;
/// Data connections that a peer may have open on one link.
const SERVING_MAX: usize = 4;
/// Completions taken at a time.
const COMPLETIONS: usize = 32;
/// How long connecting and greeting may take together.
const GREETING_TIME: Duration = Duration::from_secs(10);

/// What the dispatching thread does once the lock is released, in this order.
pub(super) enum Effect {
    /// The sink hears of it.
    Report(FabricEvent),
    /// A buffer came for a link; it is lent again afterwards.
    Received { link: LinkId, adapter: usize, slots: Arc<Slots>, slot: u32, len: usize },
    /// A link is over: a landing that was promised is told, then the link's end.
    Ended { link: LinkId, why: StoreError, was_up: bool },
}

pub(super) struct State {
    pub(super) segments: BTreeMap<SegmentId, Segment>,
    pub(super) links: BTreeMap<LinkId, Link>,
    pub(super) transfers: HashMap<TransferId, LinkId>,
    /// By lane.
    pub(super) effects: Vec<VecDeque<Effect>>,
    pub(super) refused: u64,
    pub(super) slice_bytes: u64,
    pub(super) links_max: usize,
    pub(super) connections_max: usize,
    /// Whether peers are to ask for pushes, whatever was proven.
    pub(super) push: bool,
    /// What adapters are tried with when they are opened. Trying takes a while, so that is done only before there are peers.
    pub(super) scratches: Vec<Arc<dyn Scratch>>,
    /// What was found, by the names of devices.
    pub(super) proofs: BTreeMap<String, Vec<Proof>>,
    /// Whose it is.
    pub(super) owner: Owner,
    /// Where it listens.
    at: SocketAddr,
    ends: BTreeMap<u64, End>,
    by_pair: HashMap<(usize, u32), u64>,
    tokens: HashMap<LinkToken, LinkId>,
    pub(super) adapters: BTreeMap<usize, Adapter>,
    /// None while the device that it is bound to is away.
    listener: Option<Connection>,
    context: Arc<Context>,
    next: u64,
    /// Adapters that no thread watches yet.
    pub(super) unwatched: Vec<usize>,
    pub(super) aside: Aside,
    /// Completions that were just taken; kept, so that nothing is allocated or cleared for a look.
    done: Vec<abi::Completion>,
}

impl State {
    pub(super) fn new(context: Arc<Context>, listener: Connection, at: SocketAddr, lanes: usize) -> Self {
        Self {
            segments: BTreeMap::new(),
            links: BTreeMap::new(),
            transfers: HashMap::new(),
            effects: (0..lanes).map(|_| VecDeque::new()).collect(),
            refused: 0,
            slice_bytes: 1 << 20,
            links_max: 1024,
            connections_max: usize::MAX,
            push: false,
            scratches: Vec::new(),
            proofs: BTreeMap::new(),
            owner: Owner::default(),
            at,
            ends: BTreeMap::new(),
            by_pair: HashMap::new(),
            tokens: HashMap::new(),
            adapters: BTreeMap::new(),
            listener: Some(listener),
            context,
            next: 1,
            unwatched: Vec::new(),
            aside: Aside::new(),
            done: Vec::with_capacity(COMPLETIONS),
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn link_number(&mut self) -> LinkId {
        LinkId(FabricKind::VERBS_LINKS + self.number())
    }

    /// The lane of a link: what happens to its connections is seen and told there, one thing after the other.
    pub(super) fn lane_of(&self, link: LinkId) -> usize {
        usize::try_from(link.0 % self.effects.len() as u64).unwrap_or(0)
    }

    pub(super) fn has_effects(&self) -> bool {
        self.effects.iter().any(|effects| !effects.is_empty())
    }

    pub(super) fn tell(&mut self, link: LinkId, effect: Effect) {
        let lane = self.lane_of(link);
        self.effects[lane].push_back(effect);
    }

    pub(super) fn report(&mut self, link: LinkId, event: FabricEvent) {
        self.tell(link, Effect::Report(event));
    }

    /// A link that is to be dialled once its address is known.
    pub(super) fn new_link(&mut self, address: &str, mine: LinkToken) -> Result<LinkId, StoreError> {
        if self.links.len() >= self.links_max {
            return Err(StoreError::busy("connect", format!("there are {} links", self.links.len())));
        }
        let (id, token) = (self.link_number(), self.number());
        let nowhere = SocketAddr::from(([0; 4], 0));
        self.tokens.insert(mine, id);
        self.links.insert(id, Link::new(id, address.to_owned(), nowhere, token, mine));
        Ok(id)
    }

    /// Begins to connect.
    pub(super) fn dial(&mut self, id: LinkId, peer: SocketAddr) -> Result<(), StoreError> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        (link.peer, link.since) = (peer, Instant::now());
        let token = link.control;
        let connection = self.context.resolve(peer, RESOLVE_MS, token)?;
        self.ends.insert(token, End::new(connection, Role::Control(id), EndStage::Resolving));
        Ok(())
    }

    pub(super) fn connections(&self) -> usize {
        self.ends.len()
    }

    /// If there are as many connections as there may be, closes that for reads which was not used for longest.
    fn make_room(&mut self) {
        if self.ends.len() < self.connections_max {
            return;
        }
        let idle =
            |link: &&Link| link.reading.is_some() && link.waiting.is_empty() && link.under_way.is_empty();
        let oldest = self.links.values().filter(idle).min_by_key(|link| link.read_at);
        if let Some(token) = oldest.and_then(|link| link.reading) {
            self.end_over(token, None, &StoreError::unavailable("its connection", "others are wanted more"));
        }
    }

    /// Whether there is something to look after now and then: a link that is being made, or a listener that is not there.
    pub(super) fn is_waiting(&self) -> bool {
        self.listener.is_none()
            || self.aside.any()
            || self.unheard().next().is_some()
            || self.links.values().any(|link| link.stage != Stage::Up)
    }

    /// Gives up links that took too long to be made.
    pub(super) fn expire(&mut self) {
        self.say_first_again();
        let late = |link: &&Link| link.stage != Stage::Up && link.since.elapsed() > GREETING_TIME;
        let late: Vec<LinkId> = self.links.values().filter(late).map(|link| link.id).collect();
        for link in late {
            let why = format!("it took longer than {} s to be made", GREETING_TIME.as_secs());
            self.disconnect(link, &StoreError::unavailable("its connection", why));
        }
    }

    /// Takes all events of connections.
    ///
    /// # Errors
    /// If there will be no more.
    pub(super) fn connection_events(&mut self) -> Result<bool, StoreError> {
        let mut any = false;
        self.back_from_aside();
        while let Some(event) = self.context.event()? {
            any = true;
            self.connection_event(&event);
        }
        Ok(any)
    }

    fn connection_event(&mut self, event: &abi::ConnectionEvent) {
        let private = &event.private[..event.private_len as usize];
        match event.kind {
            abi::EVENT_REQUEST => self.requested(event, Hello::parse(private)),
            abi::EVENT_ROUTED => {
                if let Err(why) = self.routed(event.token) {
                    self.end_over(event.token, None, &why);
                }
            }
            abi::EVENT_ESTABLISHED => self.established(event.token, Hello::parse(private)),
            abi::EVENT_UNREACHABLE => {
                let why = std::io::Error::from_raw_os_error(event.status);
                self.end_over(
                    event.token,
                    None,
                    &StoreError::unavailable("the peer", format!("it is not reached: {why}")),
                );
            }
            abi::EVENT_REJECTED => {
                let why = match Hello::parse(private) {
                    Ok(_) => "it refuses the connection: its log says why".to_owned(),
                    Err(why) if is_greeting(private) => why.to_string(),
                    Err(_) => format!("it refuses the connection (reason {})", event.status),
                };
                self.end_over(event.token, None, &StoreError::unavailable("the peer", why));
            }
            abi::EVENT_DISCONNECTED => {
                // What came before it ended is heard.
                for lane in 0..self.effects.len() {
                    self.completions(lane);
                }
                self.suspect(event.token, true);
                self.end_over(
                    event.token,
                    None,
                    &StoreError::unavailable("its connection", "the peer closed it"),
                );
            }
            abi::EVENT_DEVICE_REMOVED => self.device_removed(event.device),
            _ => {}
        }
    }

    fn routed(&mut self, token: u64) -> Result<(), StoreError> {
        let Some(mut end) = self.ends.remove(&token) else { return Ok(()) };
        let role = end.role;
        let paired = self.pair(&mut end);
        let result = paired.and_then(|reads| {
            let link = match role {
                Role::Control(link) | Role::Reading(link) | Role::Serving(link) => self.links.get(&link),
            };
            let link = link.ok_or_else(|| StoreError::unavailable("its link", "it is over"))?;
            let what = match role {
                Role::Control(_) => Purpose::Control { port: self.at.port(), token: link.mine },
                Role::Reading(_) | Role::Serving(_) => Purpose::Data {
                    token: link.theirs.ok_or_else(|| StoreError::unavailable("its link", "it is not up"))?,
                },
            };
            end.stage = EndStage::Connecting;
            let hello = Hello { what, owner: self.owner };
            self.connect(token, &mut end, &hello.to_bytes(), reads)
        });
        self.keep(token, end);
        result
    }

    fn connect(
        &mut self,
        token: u64,
        end: &mut End,
        private: &[u8],
        reads: (u8, u8),
    ) -> Result<(), StoreError> {
        let adapter = end.adapter.and_then(|number| self.adapters.get(&number));
        if adapter.is_some_and(Adapter::is_iwarp)
            && let Some(connection) = end.connection.take()
        {
            return self.aside.connect(token, connection, private.to_vec(), reads);
        }
        end.connection()?.connect(Greeting::new(private, reads))
    }

    /// Makes an end's queue pair; says how many reads it may have under way, and how many it answers.
    fn pair(&mut self, end: &mut End) -> Result<(u8, u8), StoreError> {
        let number = self.adapter_of(end.connection()?)?;
        let Some(adapter) = self.adapters.get(&number) else {
            return Err(StoreError::unavailable("its device", "it is gone"));
        };
        let of_it = |other: &&End| other.adapter == Some(number) && matches!(other.role, Role::Control(_));
        if matches!(end.role, Role::Control(_))
            && self.ends.values().filter(of_it).count() >= adapter.links_max()
        {
            let why = format!("{} has receive buffers for no more links", adapter.name());
            return Err(StoreError::busy("connect", why));
        }
        let (Role::Control(link) | Role::Reading(link) | Role::Serving(link)) = end.role;
        end.pair(number, adapter, self.lane_of(link))?;
        end.heard = !adapter.is_iwarp();
        let few = |most: u32| u8::try_from(most.min(READS_MAX)).unwrap_or(1);
        Ok((few(adapter.limits.reads_out_max), few(adapter.limits.reads_in_max)))
    }

    fn keep(&mut self, token: u64, end: End) {
        if let (Some(adapter), Some(made)) = (end.adapter, end.made) {
            self.by_pair.insert((adapter, made.number), token);
        }
        self.ends.insert(token, end);
    }

    /// A peer connects.
    fn requested(&mut self, event: &abi::ConnectionEvent, hello: Result<Hello, StoreError>) {
        let token = self.number();
        let mut connection = self.context.requested(event.connection, token);
        let (role, welcome, link) = match hello.and_then(|hello| self.welcomed(token, &connection, hello)) {
            Ok(welcomed) => welcomed,
            Err(why) => {
                self.refused += 1;
                tracing::warn!(peer = %connection.peer(), %why, "a connection was refused");
                let refusal = Hello { what: Purpose::Refused, owner: self.owner };
                return connection.reject(&refusal.to_bytes());
            }
        };
        let welcome = Hello { what: welcome, owner: self.owner };
        let mut end = End::new(connection, role, EndStage::Connecting);
        let accepted = self.pair(&mut end).and_then(|(reads_out, reads_in)| {
            // No more than the peer answers or asks for.
            let reads = (reads_out.min(event.reads_out), reads_in.min(event.reads_in));
            end.connection()?.accept(Greeting::new(&welcome.to_bytes(), reads))
        });
        match accepted {
            Ok(()) => {
                if let Some(link) = link {
                    self.tokens.insert(link.mine, link.id);
                    self.links.insert(link.id, link);
                }
                self.keep(token, end);
            }
            Err(why) => {
                tracing::warn!(%why, "a connection could not be accepted");
                self.refused += 1;
                if let Ok(connection) = end.connection() {
                    connection.reject(&Hello { what: Purpose::Refused, owner: self.owner }.to_bytes());
                }
            }
        }
    }

    /// What a peer's connection is to this end, what it is answered, and the link that it begins.
    ///
    /// # Errors
    /// Why it is refused.
    fn welcomed(
        &mut self,
        token: u64,
        connection: &Connection,
        Hello { what, owner }: Hello,
    ) -> Result<(Role, Purpose, Option<Link>), StoreError> {
        match what {
            Purpose::Control { port, token: theirs } => {
                if self.links.len() >= self.links_max {
                    return Err(StoreError::busy("accept", format!("there are {} links", self.links.len())));
                }
                let id = self.link_number();
                let peer = SocketAddr::new(connection.peer().ip(), port);
                let mine = LinkToken(crate::tcp::random_number()?);
                let mut link = Link::new(id, peer.to_string(), peer, token, mine);
                (link.inbound, link.theirs, link.owner) = (true, Some(theirs), owner);
                Ok((Role::Control(id), Purpose::Welcome { token: mine }, Some(link)))
            }
            Purpose::Data { token: mine } => {
                let id = self.tokens.get(&mine).copied();
                let Some(link) = id.and_then(|id| self.links.get_mut(&id)) else {
                    return Err(StoreError::stale("accept", "a data connection", "it is of no link"));
                };
                if link.owner.is_another(owner) {
                    let why = format!("it is of {owner}, its link of {}", link.owner);
                    return Err(StoreError::denied("accept a data connection", why));
                }
                if link.serving.len() >= SERVING_MAX {
                    let why = format!("its link has {SERVING_MAX} already");
                    return Err(StoreError::busy("accept a data connection", why));
                }
                link.serving.push(token);
                Ok((Role::Serving(link.id), Purpose::Data { token: mine }, None))
            }
            Purpose::Welcome { .. } | Purpose::Refused => {
                Err(StoreError::protocol("it answers what it was not asked"))
            }
        }
    }

    fn established(&mut self, token: u64, hello: Result<Hello, StoreError>) {
        let Some(end) = self.ends.get_mut(&token) else { return };
        end.stage = EndStage::Up;
        let role = end.role;
        let (Role::Control(id) | Role::Reading(id) | Role::Serving(id)) = role;
        if matches!(role, Role::Control(_)) {
            let Some(link) = self.links.get_mut(&id) else { return };
            if !link.inbound {
                let theirs = hello.and_then(|Hello { what, owner }| match what {
                    Purpose::Welcome { token } => Ok((token, owner)),
                    _ => Err(StoreError::protocol("it greets as if it had been asked for something else")),
                });
                match theirs {
                    Ok((theirs, owner)) => (link.theirs, link.owner) = (Some(theirs), owner),
                    Err(why) => return self.end_over(token, None, &why),
                }
            }
            link.stage = Stage::Greeting;
            let segments: Vec<SegmentId> = self.segments.keys().copied().collect();
            for segment in segments {
                self.tell_of(id, segment);
            }
            if let Some(link) = self.links.get_mut(&id) {
                link.queue_always(describe(RemoteKey(0), &Described::All), None, SendToken(0));
            }
            self.up_if_greeted(id);
        }
        self.say_first(token);
        if matches!(role, Role::Reading(_)) {
            self.fail_guilty(id);
        }
        self.post(id);
    }

    /// A link is up when there is a connection and the peer has described its memory, whichever is heard of first.
    fn up_if_greeted(&mut self, id: LinkId) {
        let greeted = |link: &&mut Link| link.stage == Stage::Greeting && link.all_described;
        let Some(link) = self.links.get_mut(&id).filter(greeted) else { return };
        link.stage = Stage::Up;
        let (address, inbound) = (link.address.clone(), link.inbound);
        self.report(id, FabricEvent::LinkUp { link: id, address, inbound });
    }
}
