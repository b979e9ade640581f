//! What one verbs fabric knows: adapters, connections, links, and what is to be told of them. Not threads (`shared`), and
//! not the bytes that come (`incoming`). Invariant: everything here is changed under one lock, nothing waits under it, and
//! the sink is never called under it: what it is to hear is put into `effects`.

mod devices;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::{LinkId, RemoteKey, SegmentId, StoreError, TransferId};

use super::abi;
use super::adapters::{Adapter, Segment, receive_slot};
use super::completion::{Class, class_of, explain};
use super::ends::{End, Of, Role, Stage as EndStage};
use super::links::{Link, Read, Stage};
use super::plugin::{Connection, Context, Greeting};
use super::slots::Slots;
use super::wire::{Described, Hello, LinkToken, describe, described};
use crate::fabric::{FabricEvent, FabricKind, SendToken};

/// How long looking for the way to a peer may take, in milliseconds.
const RESOLVE_MS: u32 = 2_000;
/// The most reads that one connection may have under way, whatever the adapter could.
const READS_MAX: u32 = 16;
/// Data connections that a peer may have open on one link.
const SERVING_MAX: usize = 4;
/// How long connecting and greeting may take together.
const GREETING_TIME: Duration = Duration::from_secs(10);
/// Completions taken at a time.
const COMPLETIONS: usize = 32;

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
    pub(super) effects: VecDeque<Effect>,
    pub(super) refused: u64,
    pub(super) slice_bytes: u64,
    pub(super) links_max: usize,
    pub(super) connections_max: usize,
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
}

impl State {
    pub(super) fn new(context: Arc<Context>, listener: Connection, at: SocketAddr) -> Self {
        Self {
            segments: BTreeMap::new(),
            links: BTreeMap::new(),
            transfers: HashMap::new(),
            effects: VecDeque::new(),
            refused: 0,
            slice_bytes: 1 << 20,
            links_max: 1024,
            connections_max: usize::MAX,
            at,
            ends: BTreeMap::new(),
            by_pair: HashMap::new(),
            tokens: HashMap::new(),
            adapters: BTreeMap::new(),
            listener: Some(listener),
            context,
            next: 1,
            unwatched: Vec::new(),
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn link_number(&mut self) -> LinkId {
        LinkId(FabricKind::VERBS_LINKS + self.number())
    }

    pub(super) fn report(&mut self, event: FabricEvent) {
        self.effects.push_back(Effect::Report(event));
    }

    // Connections.

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
        self.listener.is_none() || self.links.values().any(|link| link.stage != Stage::Up)
    }

    /// Gives up links that took too long to be made.
    pub(super) fn expire(&mut self) {
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
                let why = format!("it refuses the connection (reason {})", event.status);
                self.end_over(event.token, None, &StoreError::unavailable("the peer", why));
            }
            abi::EVENT_DISCONNECTED => {
                // What came before it ended is heard.
                self.completions();
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
            let hello = match role {
                Role::Control(_) => Hello::Control { port: self.at.port(), token: link.mine },
                Role::Reading(_) | Role::Serving(_) => Hello::Data {
                    token: link.theirs.ok_or_else(|| StoreError::unavailable("its link", "it is not up"))?,
                },
            };
            end.stage = EndStage::Connecting;
            end.connection.connect(Greeting::new(&hello.to_bytes(), reads))
        });
        self.keep(token, end);
        result
    }

    /// Makes an end's queue pair; says how many reads it may have under way, and how many it answers.
    fn pair(&mut self, end: &mut End) -> Result<(u8, u8), StoreError> {
        let number = self.adapter_of(&end.connection)?;
        let Some(adapter) = self.adapters.get(&number) else {
            return Err(StoreError::unavailable("its device", "it is gone"));
        };
        end.pair(number, adapter)?;
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
    fn requested(&mut self, event: &abi::ConnectionEvent, hello: Option<Hello>) {
        let token = self.number();
        let mut connection = self.context.requested(event.connection, token);
        let refuse = |state: &mut Self, connection: &mut Connection, why: &str| {
            state.refused += 1;
            tracing::warn!(peer = %connection.peer(), why, "a connection was refused");
            connection.reject();
        };
        let (role, welcome, link) = match hello {
            Some(Hello::Control { port, token: theirs }) if self.links.len() < self.links_max => {
                let id = self.link_number();
                let peer = SocketAddr::new(connection.peer().ip(), port);
                let Ok(mine) = crate::tcp::random_number() else {
                    return refuse(self, &mut connection, "no random numbers");
                };
                let mine = LinkToken(mine);
                let mut link = Link::new(id, peer.to_string(), peer, token, mine);
                (link.inbound, link.theirs) = (true, Some(theirs));
                (Role::Control(id), Hello::Welcome { token: mine }, Some(link))
            }
            Some(Hello::Data { token: mine }) => {
                let id = self.tokens.get(&mine).copied();
                let link = id.and_then(|id| self.links.get_mut(&id));
                let Some(link) = link.filter(|link| link.serving.len() < SERVING_MAX) else {
                    return refuse(self, &mut connection, "a data connection of no link, or one too many");
                };
                link.serving.push(token);
                (Role::Serving(link.id), Hello::Data { token: mine }, None)
            }
            Some(Hello::Control { .. }) => return refuse(self, &mut connection, "too many links"),
            Some(Hello::Welcome { .. }) | None => {
                return refuse(self, &mut connection, "it does not say what for");
            }
        };
        let mut end = End::new(connection, role, EndStage::Connecting);
        let accepted = self.pair(&mut end).and_then(|(reads_out, reads_in)| {
            // No more than the peer answers or asks for.
            let reads = (reads_out.min(event.reads_out), reads_in.min(event.reads_in));
            end.connection.accept(Greeting::new(&welcome.to_bytes(), reads))
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
                end.connection.reject();
            }
        }
    }

    fn established(&mut self, token: u64, hello: Option<Hello>) {
        let Some(end) = self.ends.get_mut(&token) else { return };
        end.stage = EndStage::Up;
        let role = end.role;
        let (Role::Control(id) | Role::Reading(id) | Role::Serving(id)) = role;
        if matches!(role, Role::Control(_)) {
            let Some(link) = self.links.get_mut(&id) else { return };
            if !link.inbound {
                let Some(Hello::Welcome { token: theirs }) = hello else {
                    let why = StoreError::protocol("the peer does not greet as a node does");
                    return self.end_over(token, None, &why);
                };
                link.theirs = Some(theirs);
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
        self.post(id);
    }

    /// A link is up when there is a connection and the peer has described its memory, whichever is heard of first.
    fn up_if_greeted(&mut self, id: LinkId) {
        let greeted = |link: &&mut Link| link.stage == Stage::Greeting && link.all_described;
        let Some(link) = self.links.get_mut(&id).filter(greeted) else { return };
        link.stage = Stage::Up;
        let (address, inbound) = (link.address.clone(), link.inbound);
        self.report(FabricEvent::LinkUp { link: id, address, inbound });
    }

    // Work.

    /// Posts what waits on a link.
    pub(super) fn post(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let control = link.control;
        let mut failed = None;
        if let Some(end) = self.ends.get_mut(&control)
            && let Some(adapter) = end.adapter.and_then(|number| self.adapters.get_mut(&number))
            && let Err(why) = link.post_frames(end, adapter)
        {
            failed = Some((control, why));
        }
        if let Some(token) = link.reading
            && let Some(end) = self.ends.get_mut(&token)
            && let Some(adapter) = end.adapter.and_then(|number| self.adapters.get_mut(&number))
            && !link.waiting.is_empty()
            && let Err(why) = link.post_reads(end, adapter, self.slice_bytes)
        {
            failed.get_or_insert((token, why));
        }
        let wants_data = link.reading.is_none() && !link.waiting.is_empty() && link.stage == Stage::Up;
        if let Some((token, why)) = failed {
            self.end_over(token, None, &why);
        }
        if wants_data {
            self.open_reading(id);
        }
    }

    pub(super) fn post_all(&mut self) {
        let all: Vec<LinkId> = self.links.keys().copied().collect();
        for link in all {
            self.post(link);
        }
    }

    fn open_reading(&mut self, id: LinkId) {
        self.make_room();
        let token = self.number();
        let Some(link) = self.links.get_mut(&id) else { return };
        match self.context.resolve(link.peer, RESOLVE_MS, token) {
            Ok(connection) => {
                link.reading = Some(token);
                self.ends.insert(token, End::new(connection, Role::Reading(id), EndStage::Resolving));
            }
            Err(why) => {
                let lost = link.lost("read", &why);
                let over: Vec<Read> = link.waiting.drain(..).collect();
                for read in over {
                    self.read_over(read, Err(lost.clone()));
                }
            }
        }
    }

    /// Takes completions of all adapters; says whether there were any.
    pub(super) fn completions(&mut self) -> bool {
        let (mut any, mut next) = (false, 0);
        while let Some(number) = self.adapters.range(next..).next().map(|(&number, _)| number) {
            next = number + 1;
            loop {
                let mut done = [abi::Completion::default(); COMPLETIONS];
                let Some(adapter) = self.adapters.get_mut(&number) else { break };
                let count = match adapter.queue.poll(&mut done) {
                    Ok(count) => count,
                    Err(why) => {
                        self.lose_adapter(number, &why);
                        break;
                    }
                };
                any |= count > 0;
                // The first of them may have been what it was armed for.
                adapter.armed &= count == 0;
                for completion in &done[..count] {
                    self.completion(number, completion);
                }
                if count < COMPLETIONS {
                    break;
                }
            }
        }
        any
    }

    /// Arms the queues of all adapters that are not: whatever completes from now on wakes a thread. Says whether there were
    /// any: what came before that has to be looked for once more.
    pub(super) fn arm(&mut self) -> bool {
        let (mut any, mut broken) = (false, Vec::new());
        for (&number, adapter) in self.adapters.iter_mut().filter(|(_, adapter)| !adapter.armed) {
            (any, adapter.armed) = (true, true);
            if let Err(why) = adapter.queue.arm() {
                broken.push((number, why));
            }
        }
        for (number, why) in broken {
            self.lose_adapter(number, &why);
        }
        any
    }

    fn completion(&mut self, number: usize, done: &abi::Completion) {
        let token = self.by_pair.get(&(number, done.queue_pair)).copied();
        if let Some(slot) = receive_slot(done.id) {
            return self.received(number, slot, token, done);
        }
        let Some((token, end)) = token.and_then(|token| Some((token, self.ends.get_mut(&token)?))) else {
            return;
        };
        let (Role::Control(id) | Role::Reading(id) | Role::Serving(id)) = end.role;
        // All before it have succeeded.
        let mut failed = None;
        for left in (0..end.back_by(done.id)).rev() {
            let Some(of) = self.ends.get_mut(&token).and_then(End::came_back) else { break };
            if left == 0 && done.status != 0 {
                failed = Some(of);
            } else {
                self.came_back(number, of, &Ok(()));
            }
        }
        if done.status != 0 {
            match class_of(done) {
                Class::Here => tracing::error!(why = %explain(done), "RDMA has failed here"),
                Class::Peer => self.refused += 1,
                Class::Work | Class::Reconnect => {}
            }
            let (why, guilty) = (explain(done), failed.as_ref().and_then(guilty_of(done)));
            if let Some(of) = failed {
                self.came_back(number, of, &Err(why.clone()));
            }
            return self.end_over(token, guilty, &why);
        }
        self.post(id);
    }

    fn received(&mut self, number: usize, slot: u32, token: Option<u64>, done: &abi::Completion) {
        let end = token.and_then(|token| Some((token, self.ends.get(&token)?)));
        let Some(adapter) = self.adapters.get(&number) else { return };
        let slots = Arc::clone(&adapter.receives);
        let control = end.and_then(|(token, end)| match end.role {
            Role::Control(link) if done.status == 0 => Some((token, link)),
            _ => None,
        });
        slots.came_back(slot);
        let len = done.len_bytes as usize;
        let Some((token, link)) = control else {
            self.lend_again(number, slot);
            if done.status != 0
                && let Some(token) = token
            {
                self.end_over(token, None, &explain(done));
            }
            return;
        };
        let bytes = slots.bytes(slot, len).unwrap_or_default();
        let Some(of_frame) = self.links.get_mut(&link).map(|link| link.is_of_frame(bytes)) else {
            return self.lend_again(number, slot);
        };
        let described = match of_frame {
            Ok(true) => {
                return self.effects.push_back(Effect::Received { link, adapter: number, slots, slot, len });
            }
            Ok(false) => described(bytes),
            Err(why) => Err(why),
        };
        self.lend_again(number, slot);
        match (described, self.links.get_mut(&link)) {
            (Ok((key, Described::Gone)), Some(link)) => drop(link.remote.remove(&key)),
            (Ok((_, Described::All)), Some(found)) => {
                found.all_described = true;
                self.up_if_greeted(link);
            }
            (Ok((key, described)), Some(link)) => drop(link.remote.insert(key, described)),
            (Err(why), _) => {
                self.refused += 1;
                self.end_over(token, None, &why);
            }
            (Ok(_), None) => {}
        }
    }

    /// A receive buffer goes back to its adapter.
    pub(super) fn lend_again(&mut self, number: usize, slot: u32) {
        let Some(adapter) = self.adapters.get(&number) else { return };
        if let Err(why) = adapter.post_receive(slot) {
            self.lose_adapter(number, &why);
        }
    }

    /// A piece of work is back: what it was for.
    fn came_back(&mut self, number: usize, of: Of, result: &Result<(), StoreError>) {
        match of {
            Of::Part { slot, last_of } => {
                if let (Some(slot), Some(adapter)) = (slot, self.adapters.get_mut(&number)) {
                    adapter.frames.give_back(slot);
                }
                if let Some(token) = last_of {
                    self.report(FabricEvent::SendDone { token, result: result.clone() });
                }
            }
            Of::Slice { transfer, last } => {
                if last && result.is_ok() {
                    self.read_done(transfer, None);
                }
            }
            Of::Word { transfer, slot } => {
                let Some(adapter) = self.adapters.get_mut(&number) else { return };
                adapter.words.came_back(slot);
                let word = adapter.words.bytes(slot, 8).and_then(|bytes| bytes.first_chunk::<8>().copied());
                adapter.words.give_back(slot);
                if result.is_ok() {
                    self.read_done(transfer, word.map(u64::from_le_bytes));
                }
            }
        }
    }

    fn read_done(&mut self, transfer: TransferId, word: Option<u64>) {
        let link = self.transfers.get(&transfer).and_then(|link| self.links.get_mut(link));
        let Some(mut read) = link.and_then(|link| link.under_way.remove(&transfer)) else { return };
        read.stats.word = word;
        let result = match read.error.take() {
            Some(why) => Err(why),
            None => Ok(read.stats),
        };
        self.read_over(read, result);
    }

    fn read_over(&mut self, read: Read, result: Result<crate::fabric::ReadStats, StoreError>) {
        let transfer = read.transfer;
        self.transfers.remove(&transfer);
        self.report(FabricEvent::ReadDone { transfer, result });
    }

    /// Gives a read up. If some of it is posted, its connection ends, so that nothing of it lands any more; others go on
    /// over another.
    pub(super) fn give_up(&mut self, transfer: TransferId, why: &StoreError) {
        let Some(link) = self.transfers.get(&transfer).and_then(|link| self.links.get_mut(link)) else {
            return;
        };
        if let Some(at) =
            link.waiting.iter().position(|read| read.transfer == transfer && read.is_untouched())
            && let Some(read) = link.waiting.remove(at)
        {
            return self.read_over(read, Err(why.clone()));
        }
        let posted = link.waiting.iter_mut().chain(link.under_way.values_mut());
        for read in posted.filter(|read| read.transfer == transfer) {
            read.error.get_or_insert_with(|| why.clone());
        }
        if let Some(token) = link.reading {
            self.end_over(
                token,
                None,
                &StoreError::unavailable("its data connection", "a read was given up"),
            );
        }
    }

    // Ends.

    /// A connection is over, or was never made; nothing touches memory for it any more.
    pub(super) fn end_over(&mut self, token: u64, guilty: Option<TransferId>, why: &StoreError) {
        let Some(mut end) = self.ends.remove(&token) else { return };
        if let (Some(adapter), Some(made)) = (end.adapter, end.made) {
            self.by_pair.remove(&(adapter, made.number));
        }
        let (role, number, left) = (end.role, end.adapter.unwrap_or_default(), end.take_all());
        tracing::debug!(?role, stage = ?end.stage, left = left.len(), %why, "a connection is over");
        end.connection.disconnect();
        // The adapter is done with its work when this returns.
        drop(end);
        let (Role::Control(id) | Role::Reading(id) | Role::Serving(id)) = role;
        let lost = self.links.get(&id).map_or_else(|| why.clone(), |link| link.lost("send", why));
        for of in left {
            self.came_back(number, of, &Err(lost.clone()));
        }
        match role {
            Role::Control(id) => self.link_over(id, why),
            Role::Serving(id) => {
                if let Some(link) = self.links.get_mut(&id) {
                    link.serving.retain(|serving| *serving != token);
                }
            }
            Role::Reading(id) => {
                let Some(link) = self.links.get_mut(&id) else { return };
                link.reading = None;
                let why = if guilty.is_some() { why.clone() } else { link.lost("read", why) };
                let over = link.reads_lost(guilty, &why);
                for mut read in over {
                    let result = Err(read.error.take().unwrap_or_else(|| why.clone()));
                    self.read_over(read, result);
                }
                self.post(id);
            }
        }
    }

    /// A link is over: all that was under way on it ends, then the link.
    fn link_over(&mut self, id: LinkId, why: &StoreError) {
        let Some(mut link) = self.links.remove(&id) else { return };
        self.tokens.remove(&link.mine);
        for token in link.reading.take().into_iter().chain(std::mem::take(&mut link.serving)) {
            self.end_over(token, None, why);
        }
        let lost = link.lost("send", why);
        for token in link.take_out() {
            self.report(FabricEvent::SendDone { token, result: Err(lost.clone()) });
        }
        let lost = link.lost("read", why);
        let reads: Vec<Read> =
            link.waiting.drain(..).chain(link.under_way.drain().map(|(_, read)| read)).collect();
        for mut read in reads {
            let result = Err(read.error.take().unwrap_or_else(|| lost.clone()));
            self.read_over(read, result);
        }
        let operation = if link.stage == Stage::Up { "receive" } else { "connect" };
        let (why, was_up) = (link.lost(operation, why), link.stage == Stage::Up);
        self.effects.push_back(Effect::Ended { link: id, why, was_up });
    }

    /// This end disconnects a link.
    pub(super) fn disconnect(&mut self, id: LinkId, why: &StoreError) {
        match self.links.get(&id).map(|link| link.control) {
            Some(control) if self.ends.contains_key(&control) => self.end_over(control, None, why),
            Some(_) => self.link_over(id, why),
            None => {}
        }
    }

    /// Closes everything; nobody is told.
    pub(super) fn close(&mut self) {
        for (_, end) in std::mem::take(&mut self.ends) {
            end.connection.disconnect();
        }
        self.by_pair.clear();
        self.links.clear();
        self.tokens.clear();
        self.transfers.clear();
        self.effects.clear();
        self.listener = None;
        self.adapters.clear();
        self.segments.clear();
    }
}

/// Whose fault it is, if only one read's.
fn guilty_of(done: &abi::Completion) -> impl Fn(&Of) -> Option<TransferId> + use<> {
    let own = class_of(done) == Class::Work;
    move |of| match of {
        Of::Slice { transfer, .. } | Of::Word { transfer, .. } if own => Some(*transfer),
        _ => None,
    }
}
