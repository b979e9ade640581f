//! Simulated links and the frames on them. Not the clock (`net`). Invariant: frames to one end arrive in the order
//! of their sends, and the next is delivered only when the payload of the one before is complete.

use std::collections::VecDeque;

use hetmem_core::wire::Frame;
use hetmem_core::{Extent, LinkId, StoreError};

use super::net::{Event, Net};
use crate::fabric::{FabricEvent, LandingPart, LandingStats, LandingToken, SendToken, Sent};
use crate::payload::{Gather, Scatter};

/// The most frames under way to one end.
const FRAMES_MAX: usize = 64;

/// One side of a link.
pub(super) struct End {
    pub(super) node: usize,
    /// The other side, once it exists and until it is gone.
    pub(super) peer: Option<LinkId>,
    pub(super) peer_node: Option<usize>,
    /// What its owner calls the other side.
    address: String,
    up: bool,
    /// Whether it has ever been up.
    connected: bool,
    pub(super) delay_ns: u64,
    /// Frames on their way to this end.
    coming: VecDeque<Message>,
    /// Whether the head of `coming` has a `Deliver` in the queue, or is being received.
    busy: bool,
    landing: Option<PayloadLanding>,
    /// Sends of this end whose payload is not all taken, or whose sender has not heard of it.
    sending: Vec<Sending>,
}

struct Message {
    number: u64,
    frame: Frame,
    payload: Vec<u8>,
    whole: bool,
    arrives_at: u64,
}

struct Sending {
    number: u64,
    token: SendToken,
    gather: Gather,
    taken: usize,
    /// Whether the extent went away under it.
    failed: bool,
}

struct PayloadLanding {
    number: u64,
    token: LandingToken,
    target: Option<Scatter>,
    bytes: Vec<u8>,
    done: usize,
    error: Option<StoreError>,
}

/// A frame that the sink is to hear of.
pub(super) struct Delivery {
    pub(super) node: usize,
    pub(super) end: LinkId,
    pub(super) number: u64,
    pub(super) frame: Frame,
    payload: Vec<u8>,
}

impl Net {
    fn lost(&self, operation: &'static str, link: LinkId, why: &str) -> StoreError {
        StoreError::PeerLost {
            operation: operation.into(),
            subject: format!("link {link}"),
            peer: self.ends.get(&link).map_or_else(|| "(unknown)".to_owned(), |end| end.address.clone()),
            why: why.to_owned().into(),
        }
    }

    /// The end, if it is this node's and up.
    pub(super) fn own_end(
        &mut self,
        operation: &'static str,
        node: usize,
        link: LinkId,
    ) -> Result<&mut End, StoreError> {
        let error = self.lost(operation, link, "the link is down, or never was");
        let alive = self.is_alive(node);
        self.ends.get_mut(&link).filter(|end| alive && end.node == node && end.up).ok_or(error)
    }

    pub(super) fn connect(&mut self, node: usize, address: &str) -> Result<LinkId, StoreError> {
        if address.is_empty() || !self.is_alive(node) {
            return Err(StoreError::invalid("address", format!("{address:?} cannot be connected to")));
        }
        let link = LinkId(self.number());
        let (low, high) = self.faults.delay_ns;
        let delay_ns = self.rng.between(low, high);
        let end = End::new(node, address.to_owned(), delay_ns);
        self.ends.insert(link, end);
        let delay = delay_ns + self.jitter();
        self.after(delay, Event::Arrive { from: link, target: address.to_owned() });
        let timeout = self.faults.connect_timeout_ns;
        self.after(timeout, Event::GiveUp { end: link });
        Ok(link)
    }

    pub(super) fn arrive(&mut self, from: LinkId, target: &str) {
        let Some(end) = self.ends.get(&from) else {
            return;
        };
        let (node, delay_ns) = (end.node, end.delay_ns);
        let Some(peer_node) = self.live_node(target) else {
            let why = self.lost("connect", from, "nobody of this name");
            self.after(delay_ns, Event::Down { end: from, why });
            return;
        };
        let peer = LinkId(self.number());
        let mut accepted = End::new(peer_node, self.nodes[node].name.clone(), delay_ns);
        accepted.peer = Some(from);
        accepted.peer_node = Some(node);
        accepted.up = true;
        accepted.connected = true;
        let address = accepted.address.clone();
        self.ends.insert(peer, accepted);
        if let Some(end) = self.ends.get_mut(&from) {
            end.peer = Some(peer);
            end.peer_node = Some(peer_node);
        }
        self.reports.push_back((peer_node, FabricEvent::LinkUp { link: peer, address, inbound: true }));
        let delay = delay_ns + self.jitter();
        self.after(delay, Event::Up { end: from });
    }

    pub(super) fn up(&mut self, id: LinkId) {
        let Some(end) = self.ends.get_mut(&id) else {
            return;
        };
        end.up = true;
        end.connected = true;
        let event = FabricEvent::LinkUp { link: id, address: end.address.clone(), inbound: false };
        let node = end.node;
        self.reports.push_back((node, event));
        self.pump(id);
    }

    pub(super) fn disconnect(&mut self, node: usize, link: LinkId) {
        if self.ends.get(&link).is_some_and(|end| end.node == node) {
            let why = self.lost("disconnect", link, "this node disconnected");
            self.break_link(link, why, 0);
        }
    }

    /// An end goes down after a time, and the other when it notices.
    fn break_link(&mut self, link: LinkId, why: StoreError, after_ns: u64) {
        let Some(end) = self.ends.get_mut(&link) else {
            return;
        };
        end.up = false;
        end.peer_node = None;
        let peer = end.peer.take();
        self.after(after_ns, Event::Down { end: link, why });
        self.drop_peer(peer, "the peer disconnected");
    }

    pub(super) fn cut(&mut self, one: &str, other: &str) {
        let (Some(one), Some(other)) = (self.live_node(one), self.live_node(other)) else {
            return;
        };
        let between = |end: &End| end.node == one && end.peer_node == Some(other);
        let links: Vec<LinkId> =
            self.ends.iter().filter(|(_, end)| between(end)).map(|(id, _)| *id).collect();
        for link in links {
            let why = self.lost("receive", link, "the connection was reset");
            let detection = self.detection();
            self.break_link(link, why, detection);
        }
    }

    /// The peer of an end that no longer exists will notice.
    pub(super) fn peer_is_gone(&mut self, end: &End, why: &str) {
        self.drop_peer(end.peer, why);
    }

    fn drop_peer(&mut self, peer: Option<LinkId>, why: &str) {
        let Some(peer) = peer else {
            return;
        };
        let why = self.lost("receive", peer, why);
        let detection = self.detection();
        if let Some(end) = self.ends.get_mut(&peer) {
            end.peer = None;
            self.after(detection, Event::Down { end: peer, why });
        }
    }

    pub(super) fn give_up(&mut self, id: LinkId) {
        let Some(end) = self.ends.get(&id) else {
            return;
        };
        if !end.connected {
            let timeout_ms = self.faults.connect_timeout_ns / 1_000_000;
            let why = StoreError::timed_out("connect", &end.address, timeout_ms);
            self.down(id, &why);
        }
    }

    /// An end notices that its link is gone, and so does everything on it.
    pub(super) fn down(&mut self, id: LinkId, why: &StoreError) {
        let Some(end) = self.ends.remove(&id) else {
            return;
        };
        self.drop_peer(end.peer, "the peer gave up");
        let (node, lost) = (end.node, why.clone());
        self.fail_reads_of(id, &lost);
        for sending in end.sending {
            let event = FabricEvent::SendDone { token: sending.token, result: Err(lost.clone()) };
            self.reports.push_back((node, event));
        }
        if let Some(landing) = end.landing {
            let event = FabricEvent::Landed { link: id, token: landing.token, result: Err(lost.clone()) };
            self.reports.push_back((node, event));
        }
        self.reports.push_back((node, FabricEvent::LinkDown { link: id, why: lost }));
    }

    // Frames.

    pub(super) fn send(
        &mut self,
        node: usize,
        link: LinkId,
        frame: Frame,
        payload: &[Extent],
        token: SendToken,
    ) -> Result<Sent, StoreError> {
        crate::fabric::check_payload(&frame, payload, self.faults.gather_max.max(1))?;
        let gather = Gather::of(&self.nodes[node].regions, payload)?;
        let (delay_ns, peer) = {
            let end = self.own_end("send", node, link)?;
            (end.delay_ns, end.peer)
        };
        let (busy, immediate) = (self.faults.busy_chance, self.faults.immediate_chance);
        let full =
            peer.and_then(|peer| self.ends.get(&peer)).is_some_and(|peer| peer.coming.len() >= FRAMES_MAX);
        if full || self.rng.chance(busy) {
            return Err(StoreError::busy(
                "send",
                format!("the queue of link {link} holds {FRAMES_MAX} frames"),
            ));
        }
        let number = self.number();
        let arrives_at = self.now + delay_ns + self.jitter();
        let mut message = Message { number, frame, payload: Vec::new(), whole: true, arrives_at };
        let mut sent = Sent::Done;
        if let Some(mut gather) = gather {
            if self.rng.chance(immediate) {
                message.payload = gather.copy_out(gather.len()).unwrap_or_default();
            } else {
                message.whole = false;
                sent = Sent::Pending;
                self.begin_capture(link, number, token, gather);
            }
        }
        // A peer that is gone hears nothing; this end will notice.
        if let Some(peer) = peer {
            if let Some(end) = self.ends.get_mut(&peer) {
                end.coming.push_back(message);
            }
            self.pump(peer);
        }
        Ok(sent)
    }

    fn begin_capture(&mut self, link: LinkId, number: u64, token: SendToken, gather: Gather) {
        let mut at = self.now;
        for upto in self.tear(gather.len()) {
            at += self.jitter();
            self.at(at, Event::Capture { end: link, number, upto });
        }
        if let Some(end) = self.ends.get_mut(&link) {
            end.sending.push(Sending { number, token, gather, taken: 0, failed: false });
        }
    }

    pub(super) fn capture(&mut self, id: LinkId, number: u64, upto: usize) {
        let Some(end) = self.ends.get_mut(&id) else {
            return;
        };
        let peer = end.peer;
        let Some(sending) = end.sending.iter_mut().find(|sending| sending.number == number) else {
            return;
        };
        let bytes = sending.gather.copy_out(upto - sending.taken);
        sending.failed |= bytes.is_none();
        sending.taken = upto;
        let (whole, failed) = (upto == sending.gather.len(), sending.failed);
        let message = peer
            .and_then(|peer| self.ends.get_mut(&peer))
            .and_then(|peer| peer.coming.iter_mut().find(|message| message.number == number));
        if let Some(message) = message {
            message.payload.extend(bytes.unwrap_or_default());
            message.whole = whole;
        }
        if !whole {
            return;
        }
        let late = self.lateness();
        self.after(late, Event::Free { end: id, number });
        if failed {
            // As over a socket: the payload was announced and cannot follow, so the link cannot go on.
            let why = self.lost("send", id, "a payload's segment was deregistered under it");
            self.break_link(id, why, 0);
        } else if let Some(peer) = peer {
            self.pump(peer);
        }
    }

    pub(super) fn free(&mut self, id: LinkId, number: u64) {
        let Some(end) = self.ends.get_mut(&id) else {
            return;
        };
        let Some(at) = end.sending.iter().position(|sending| sending.number == number) else {
            return;
        };
        let sending = end.sending.swap_remove(at);
        let result = if sending.failed {
            Err(StoreError::stale("send", "payload", "its segment was deregistered"))
        } else {
            Ok(())
        };
        let node = end.node;
        self.reports.push_back((node, FabricEvent::SendDone { token: sending.token, result }));
    }

    /// Lets the next frame to an end come, if nothing is in its way.
    fn pump(&mut self, id: LinkId) {
        let Some(end) = self.ends.get_mut(&id) else {
            return;
        };
        if end.busy || !end.up {
            return;
        }
        if let Some(message) = end.coming.front()
            && message.whole
        {
            end.busy = true;
            let at = message.arrives_at.max(self.now);
            self.at(at, Event::Deliver { end: id });
        }
    }

    pub(super) fn take_delivery(&mut self, id: LinkId) -> Option<Delivery> {
        let end = self.ends.get_mut(&id)?;
        if !end.up {
            return None;
        }
        let message = end.coming.pop_front()?;
        let node = end.node;
        Some(Delivery {
            node,
            end: id,
            number: message.number,
            frame: message.frame,
            payload: message.payload,
        })
    }

    pub(super) fn discard(&mut self, id: LinkId, _number: u64) {
        if let Some(end) = self.ends.get_mut(&id) {
            end.busy = false;
        }
        self.pump(id);
    }

    pub(super) fn begin_landing(&mut self, delivery: &Delivery, parts: &[LandingPart], token: LandingToken) {
        if !self.ends.contains_key(&delivery.end) {
            return;
        }
        let (bytes, number) = (delivery.payload.clone(), delivery.number);
        let target = Scatter::of(&self.nodes[delivery.node].regions, parts, bytes.len() as u64);
        let (target, error) = match target {
            Ok(scatter) => (Some(scatter), None),
            Err(error) => (None, Some(error)),
        };
        let mut at = self.now;
        for upto in self.tear(bytes.len()) {
            at += self.jitter();
            self.at(at, Event::Land { end: delivery.end, number, upto });
        }
        let late = self.lateness();
        self.at(at + late, Event::Landed { end: delivery.end, number });
        if let Some(end) = self.ends.get_mut(&delivery.end) {
            end.landing = Some(PayloadLanding { number, token, target, bytes, done: 0, error });
        }
    }

    pub(super) fn land_part(&mut self, id: LinkId, number: u64, upto: usize) {
        let landing = self.ends.get_mut(&id).and_then(|end| end.landing.as_mut());
        let Some(landing) = landing.filter(|landing| landing.number == number) else {
            return;
        };
        if let Some(scatter) = &mut landing.target
            && !scatter.copy_in(&landing.bytes[landing.done..upto])
        {
            let why = "its target segment was deregistered";
            landing.error.get_or_insert(StoreError::stale("receive", "payload", why));
        }
        landing.done = upto;
    }

    pub(super) fn landed(&mut self, id: LinkId, number: u64) {
        let Some(end) = self.ends.get_mut(&id) else {
            return;
        };
        let Some(landing) = end.landing.take_if(|landing| landing.number == number) else {
            return;
        };
        let bytes = landing.target.as_ref().map_or(0, Scatter::landing_len) as u64;
        let result = landing.error.map_or(Ok(LandingStats { bytes, staged_bytes: 0 }), Err);
        end.busy = false;
        let node = end.node;
        self.reports.push_back((node, FabricEvent::Landed { link: id, token: landing.token, result }));
        self.pump(id);
    }
}

impl End {
    fn new(node: usize, address: String, delay_ns: u64) -> Self {
        Self {
            node,
            peer: None,
            peer_node: None,
            address,
            up: false,
            connected: false,
            delay_ns,
            coming: VecDeque::new(),
            busy: false,
            landing: None,
            sending: Vec::new(),
        }
    }
}
