//! Small puts that ask nobody: memory that the node has granted ahead, and when more of it is asked for. Not the ring
//! in which they are published (`hetmem-host-mem`). Invariants: no put waits here for another thread, or for
//! another process: where there is no memory at once, the put takes its round trip; and a put that returns from here is with the node
//! before the node answers anybody who asks afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use hetmem_core::receipt::{Path, Receipt};
use hetmem_core::wire::{ClientMessage, ClientReply, IfExists};
use hetmem_core::{Key, ObjectMeta, StoreError, Tier};
use hetmem_host_mem::{AheadChunk, Answer, ProducerRing, Refused};
use parking_lot::{Mutex, RwLock};

use crate::options::{PutOptions, PutOutcome};
use crate::shared::{Link, Shared, unexpected};

/// A client that puts fewer small objects than this gets no memory ahead.
const ROUND_TRIPS_MIN: u32 = 4;
/// After a refusal, as many puts take their round trip before memory is asked for again.
const PAUSE: u32 = 256;

/// What a client holds of its node's memory, to publish objects in.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    open: RwLock<Option<Open>>,
    next: Mutex<Next>,
    /// Whether the chunk after the open one was asked for.
    asked: AtomicBool,
    /// Small puts that took a round trip.
    round_trips: AtomicU32,
}

/// What is claimed from.
#[derive(Debug)]
struct Open {
    ring: Arc<ProducerRing>,
    chunk: AheadChunk,
}

/// What comes after it.
#[derive(Debug, Default)]
struct Next {
    ring: Option<Arc<ProducerRing>>,
    /// The question that is out.
    request: Option<u64>,
    ready: Option<AheadChunk>,
    /// Calls until it is asked again.
    pause: u32,
}

impl Shared {
    /// Puts an object without asking, if that can be done at once; none if it has to be asked for.
    pub(crate) fn put_ahead(
        &self,
        key: &Key,
        meta: &ObjectMeta,
        bytes: &[u8],
        options: &PutOptions,
    ) -> Result<Option<PutOutcome>, StoreError> {
        let suits = options.if_exists == IfExists::Keep
            && !options.seal_copy
            && options.tier.is_none_or(|hint| hint.tier == Tier::Host)
            && options.replicas == 1
            && meta.len_bytes <= self.inline_put_max
            && ProducerRing::fits(key, meta)
            // One that has died takes nothing in any more: the round trip says so.
            && self.index.node_is_alive();
        if !suits {
            return Ok(None);
        }
        let refused = match self.publish(key, meta, bytes, options)? {
            Ok(outcome) => return Ok(Some(outcome)),
            Err(refused) => refused,
        };
        if !self.go_on(refused) {
            return Ok(None);
        }
        self.publish(key, meta, bytes, options).map(Result::ok)
    }

    /// Claims, writes and publishes in the open chunk; else says which one that was and why it does not do.
    #[inline]
    fn publish(
        &self,
        key: &Key,
        meta: &ObjectMeta,
        bytes: &[u8],
        options: &PutOptions,
    ) -> Result<Result<PutOutcome, (u64, Refused)>, StoreError> {
        let open = self.ahead.open.read();
        let Some(Open { ring, chunk }) = &*open else {
            return Ok(Err((0, Refused::Closed)));
        };
        if meta.len_bytes > chunk.len_bytes() / 4 {
            return Ok(Err((chunk.number(), Refused::Full)));
        }
        let mut claim = match ring.claim(chunk, meta.len_bytes) {
            Ok(claim) => claim,
            Err(refused) => return Ok(Err((chunk.number(), refused))),
        };
        let checksum = claim.fill(bytes, options.checksum)?;
        let asks = claim.is_past_middle() && !self.ahead.asked.load(Ordering::Relaxed);
        let signals = claim.publish(key, &meta.with_checksum(checksum), &options.hints());
        if signals.gone {
            return Err(StoreError::PeerLost {
                operation: "put".into(),
                subject: key.to_string(),
                peer: format!("node {}", self.node),
                why: "the session ended while the object was put: whether it was is unknown".into(),
            });
        }
        if signals.bell {
            self.drain();
        }
        if asks && !self.ahead.asked.swap(true, Ordering::Relaxed) {
            self.ask_for_next();
        }
        // The clock is not looked at: that would take as long as much of the rest.
        let receipt = Receipt {
            path: Path::Ahead,
            fabric: None,
            from: self.place(None),
            to: self.place(Some(Tier::Host)),
            bytes: meta.len_bytes,
            staged_bytes: 0,
            round_trips: 0,
            threshold_bytes: None,
            elapsed: None,
        };
        Ok(Ok(PutOutcome { object: None, kept: false, replicas: 1, receipt }))
    }

    /// Tells the node, which wants to know, that there is something in the ring.
    #[cold]
    fn drain(&self) {
        match &self.session {
            Link::Unix(session) => session.tell_unanswered(&ClientMessage::Drain),
            Link::Other(session) => {
                let _ = session.call(&ClientMessage::Drain, &[], self.timeout);
            }
        }
    }

    /// The chunk is half used.
    #[cold]
    fn ask_for_next(&self) {
        // Whoever holds the lock is at it.
        if let Some(mut next) = self.ahead.next.try_lock()
            && next.ready.is_none()
        {
            self.ask(&mut next);
        }
    }

    /// Asks for a chunk, unless that is under way or was refused lately.
    fn ask(&self, next: &mut Next) {
        if next.pause > 0 {
            next.pause -= 1;
            return;
        }
        if next.request.is_some() {
            return;
        }
        let message = ClientMessage::Ahead { ring: next.ring.is_none() };
        match &self.session {
            // What cannot be asked is noticed by the put, which then takes its round trip.
            Link::Unix(session) => next.request = session.begin(&message, self.timeout).ok(),
            Link::Other(session) => {
                let answer = session.call(&message, &[], self.timeout);
                self.ahead_granted(next, answer);
            }
        }
    }

    /// Goes on after the chunk of this number did not do. True if there is another one now.
    #[cold]
    fn go_on(&self, (number, refused): (u64, Refused)) -> bool {
        if refused == Refused::Full
            || (number == 0 && self.ahead.round_trips.fetch_add(1, Ordering::Relaxed) < ROUND_TRIPS_MIN)
        {
            return false;
        }
        let Some(mut next) = self.ahead.next.try_lock() else { return false };
        if next.ready.is_none() {
            if let (Some(request), Link::Unix(session)) = (next.request, &self.session)
                && let Some(answer) = session.finish(request)
            {
                next.request = None;
                self.ahead_granted(&mut next, answer);
            } else {
                self.ask(&mut next);
            }
        }
        // A writer would wait for whoever is in the middle of a put.
        let Some(mut open) = self.ahead.open.try_write() else { return false };
        if open.as_ref().map_or(0, |open| open.chunk.number()) != number {
            // Another thread has gone on meanwhile.
            return open.is_some();
        }
        if refused == Refused::Closed {
            // The node has taken it back: this client is to show again that it puts small objects.
            self.ahead.round_trips.store(0, Ordering::Relaxed);
        }
        let before = open.take_if(|_| next.ready.is_some() || refused == Refused::Closed);
        let (Some(mut chunk), Some(ring)) = (next.ready.take(), &next.ring) else { return false };
        self.ahead.asked.store(false, Ordering::Relaxed);
        if ring.begin(&mut chunk, before.as_ref().map(|open| &open.chunk)) {
            *open = Some(Open { ring: Arc::clone(ring), chunk });
        }
        open.is_some()
    }

    /// The node has answered.
    fn ahead_granted(&self, next: &mut Next, answer: Result<Answer, StoreError>) {
        match answer.and_then(|answer| self.chunk_of(next, answer)) {
            Ok(chunk) => next.ready = Some(chunk),
            // There is no room, or the node is gone, which the round trip will say.
            Err(_) => {
                next.pause = PAUSE;
                self.ahead.asked.store(false, Ordering::Relaxed);
            }
        }
    }

    fn chunk_of(&self, next: &mut Next, answer: Answer) -> Result<AheadChunk, StoreError> {
        let message = ClientMessage::Ahead { ring: next.ring.is_none() };
        let ClientReply::Ahead { chunk, extent, objects, segment_len, ring } = answer.reply else {
            return Err(unexpected(&message, &answer.reply));
        };
        let mut descriptors = answer.descriptors.into_iter();
        if ring {
            let Some(fd) = descriptors.next() else {
                return Err(StoreError::protocol("the publication ring came without its descriptor"));
            };
            next.ring = Some(Arc::new(ProducerRing::map(fd)?));
        }
        if let Some(fd) = descriptors.next() {
            self.grants.add(extent.segment, fd, segment_len);
        }
        let memory = self.granted_segment(extent.segment, Instant::now() + self.timeout)?;
        AheadChunk::new(chunk, extent, objects, memory)
    }
}
