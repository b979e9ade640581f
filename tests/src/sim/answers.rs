//! What a node's answer to a client says and proves: whether it was asked for, whether it may fail like this now, and
//! whether it can be true. Not what clients then do (`client`). Invariant: every answer passes here once, when it is
//! given.

use hetmem_core::wire::{ClientReply, TierStatus};
use hetmem_core::{ClientId, ErrorKind, SegmentId, StoreError};

use super::client::{Asked, Kind};
use super::guards::Hold;
use super::history::Outcome;
use super::plan::Weather;
use super::world::{Due, GRACE_NS, World};

impl World {
    pub(super) fn ended(&mut self, attempt: usize, outcome: Outcome) {
        if let Err(why) = self.history.end_put(attempt, outcome) {
            self.fail(why);
        }
    }

    /// A node answers a client: checks that it was asked, that it was not answered before, and that the answer can
    /// be true.
    pub(super) fn replied(
        &mut self,
        at: usize,
        id: ClientId,
        request: u64,
        reply: Result<ClientReply, StoreError>,
        descriptor: Option<SegmentId>,
    ) {
        let there = self.nodes[at].pages.contains_key(&id);
        let Some(client) = self.clients.get_mut(&id).filter(|_| there) else {
            return self.fail(format!("node {at} answers client {id}, which has left: {reply:?}"));
        };
        let asked = client.asked.as_mut().filter(|asked| asked.request == request && !asked.answered);
        let Some(asked) = asked else {
            return self.fail(format!("node {at} answers request {request} of client {id} again: {reply:?}"));
        };
        asked.answered = true;
        let asked = asked.clone();
        if let Err(error) = &reply
            && let Err(why) = self.may_fail(&asked, error)
        {
            return self.fail(format!("node {at}, client {id}: {why}: {error}"));
        }
        if let Err(why) = self.proves(at, id, &asked, &reply, descriptor) {
            return self.fail(format!("node {at}, client {id}: {why}"));
        }
        let now = self.now();
        let delay = self.rng.between(5_000, 100_000);
        if let Some(client) = self.clients.get_mut(&id) {
            client.downward_at = client.downward_at.max(now + delay);
            let when = client.downward_at;
            self.at(when, Due::ToClient { client: id, request, reply: reply.ok() });
        }
    }

    /// Whether a request may fail like this, now.
    fn may_fail(&self, asked: &Asked, error: &StoreError) -> Result<(), String> {
        use ErrorKind::{
            AlreadyExists, Busy, Denied, Invalid, NoSpace, NotFound, Os, PeerLost, TimedOut, TooLarge,
            Unavailable,
        };
        let now = self.now();
        let exclusive = |attempt: usize| self.history.attempts[attempt].exclusive;
        let (apart, stalls) = (self.plan.breaks_links(), self.plan.weather == Weather::Stalls);
        let allowed = match (asked.kind, error.kind()) {
            (Kind::Put { .. } | Kind::Reserve { .. } | Kind::Seal { .. }, NoSpace | TooLarge) => true,
            (
                Kind::Put { attempt } | Kind::Reserve { attempt } | Kind::Seal { attempt, .. },
                AlreadyExists,
            ) => exclusive(attempt),
            (Kind::Put { attempt } | Kind::Seal { attempt, .. }, PeerLost | Unavailable) => {
                apart && exclusive(attempt)
            }
            (Kind::Seal { .. }, Os) => self.plan.copy_failures > 0,
            (Kind::Put { .. }, Os) => self.plan.copy_failures > 0 && self.plan.gpus > 0,
            (Kind::Get { .. }, NotFound | NoSpace | Busy | TimedOut) => true,
            // A copy from one tier to another, here or at the owner.
            (Kind::Get { .. }, Os) => self.plan.copy_failures > 0 && self.plan.gpus > 0,
            (Kind::Get { range: Some(_), .. }, Invalid) => true,
            (Kind::Stat { .. }, NotFound | TimedOut) | (Kind::Wait { .. }, TimedOut) => true,
            (Kind::Get { .. } | Kind::Stat { .. } | Kind::Wait { .. }, PeerLost | Unavailable) => {
                apart || stalls
            }
            (Kind::List { .. }, PeerLost | Unavailable) => apart,
            (Kind::Delete { .. }, PeerLost | Unavailable | TimedOut) => apart,
            (Kind::Pin | Kind::Evict { .. }, NotFound) => true,
            (Kind::Ahead, Busy | NoSpace) => true,
            (Kind::Ahead, Os) => self.plan.segment_failures > 0,
            // An empty segment may have been taken back before the client gave it.
            (Kind::Evict { force: false } | Kind::Return, Denied) => true,
            _ => false,
        };
        let taken = (error.kind() == AlreadyExists).then_some(asked.kind).and_then(|kind| match kind {
            Kind::Put { attempt } | Kind::Reserve { attempt } | Kind::Seal { attempt, .. } => Some(attempt),
            _ => None,
        });
        if taken.is_some_and(|attempt| !self.history.may_be_taken(attempt)) {
            return Err(format!("nothing can have the key of {:?}", asked.kind));
        }
        if !allowed {
            return Err(format!("{:?} may not fail like this", asked.kind));
        }
        let (key, began, patient) = match asked.kind {
            Kind::Get { key, began, timeout_ms, .. } => (key, began, timeout_ms >= 3_000 && !stalls),
            Kind::Stat { key } => (key, asked.began, !stalls),
            Kind::Wait { key, timeout_ms } => {
                (key, asked.began, !stalls && (timeout_ms == 0 || timeout_ms >= 300))
            }
            _ => return Ok(()),
        };
        let claims_absence = match error.kind() {
            NotFound => true,
            PeerLost => !stalls,
            TimedOut | Unavailable => patient,
            _ => false,
        };
        if claims_absence
            && self.is_calm(began, now)
            && let Some(attempt) = self.history.must_exist(key, began)
        {
            return Err(format!("key {key} was not found, and {attempt:?} is there"));
        }
        Ok(())
    }

    /// Checks what an answer says, and writes down what it proves.
    fn proves(
        &mut self,
        at: usize,
        id: ClientId,
        asked: &Asked,
        reply: &Result<ClientReply, StoreError>,
        descriptor: Option<SegmentId>,
    ) -> Result<(), String> {
        let now = self.now();
        match (asked.kind, reply) {
            (Kind::Put { attempt } | Kind::Seal { attempt, .. }, result) => {
                if let Kind::Seal { reservation, .. } = asked.kind {
                    let own = Hold::Reserved(id, reservation);
                    self.nodes[at].guards.remove_where(|hold| hold == own);
                }
                return self.put_over(attempt, result, now);
            }
            (Kind::Reserve { .. }, Ok(ClientReply::Reserved { reservation, extent, map, .. })) => {
                self.hold(at, *extent, Hold::Reserved(id, *reservation));
                if map.is_none() && descriptor.is_some() {
                    return Err("a descriptor came without a mapping".to_owned());
                }
            }
            (Kind::Reserve { attempt }, Ok(ClientReply::Sealed { kept: true, .. }) | Err(_)) => {
                self.history.end_put(attempt, Outcome::Never(now))?;
            }
            (Kind::Delete { deletion }, Ok(ClientReply::Deleted { .. })) => {
                let certain = self.is_calm(asked.began, now);
                let for_good = self.is_for_good(self.history.delete_began(deletion));
                self.history.end_delete(deletion, now, certain, for_good);
            }
            // It may still happen.
            (Kind::Delete { .. }, Err(_)) => {}
            (Kind::Get { range, .. }, Ok(ClientReply::Located(located))) => {
                let wanted = range.map_or(located.meta.len_bytes, |range| range.len_bytes);
                if located.extent.len_bytes != wanted {
                    return Err(format!("{wanted} bytes were asked: {located:?}"));
                }
            }
            (Kind::GetMany { keys, timeout_ms, began }, Ok(ClientReply::LocatedMany(many))) => {
                let numbers = keys.numbers();
                if many.items.len() != numbers.len() || many.left != 0 {
                    return Err(format!("{} keys were asked: {many:?}", numbers.len()));
                }
                for (&key, item) in numbers.iter().zip(&many.items) {
                    let single = Asked { kind: Kind::Get { key, range: None, timeout_ms, began }, ..*asked };
                    match item {
                        Ok(item) if item.located.extent.len_bytes != item.located.meta.len_bytes => {
                            return Err(format!("all bytes were asked: {item:?}"));
                        }
                        Ok(_) => {}
                        Err(error) => {
                            self.may_fail(&single, error).map_err(|why| format!("{why}: {error}"))?;
                        }
                    }
                }
            }
            (Kind::Stat { key }, Ok(ClientReply::Stat { meta, .. })) => {
                self.history.saw_len(key, meta.len_bytes)?;
            }
            (Kind::Wait { key, .. }, Ok(ClientReply::Exists)) if !self.history.may_exist(key) => {
                return Err(format!("key {key} is said to exist and was never put"));
            }
            (Kind::List { .. }, Ok(ClientReply::Listed { objects, more })) => {
                let sorted = objects.is_sorted_by(|a, b| a.key < b.key);
                let known = objects.iter().all(|object| self.history.may_exist(self.key_number(&object.key)));
                if !sorted || !known || (*more && objects.is_empty()) {
                    return Err(format!("a list is out of order or has unknown keys: {objects:?}"));
                }
            }
            (Kind::Status, Ok(ClientReply::Status(status))) => {
                let full = |tier: &&TierStatus| tier.used_bytes > tier.capacity_bytes;
                if let Some(tier) = status.tiers.iter().find(full) {
                    return Err(format!("more is used than there is: {tier:?}"));
                }
            }
            (Kind::Hello, Ok(ClientReply::Welcome { .. }))
            | (
                Kind::Mapped | Kind::Write | Kind::Abort | Kind::Pin | Kind::Evict { .. } | Kind::Return,
                Ok(ClientReply::Done),
            )
            | (Kind::Segment, Ok(ClientReply::Segment { .. }))
            | (Kind::Ahead, Ok(ClientReply::Ahead { .. }))
            | (Kind::Wait { .. }, Ok(ClientReply::Exists))
            | (_, Err(_)) => {}
            (kind, Ok(reply)) => return Err(format!("{kind:?} was answered by {reply:?}")),
        }
        Ok(())
    }

    fn put_over(
        &mut self,
        attempt: usize,
        result: &Result<ClientReply, StoreError>,
        now: u64,
    ) -> Result<(), String> {
        match result {
            Ok(ClientReply::Sealed { kept: false, object, replicas, .. }) => {
                self.tally.sealed += 1;
                self.history.end_put(attempt, Outcome::Sealed(now))?;
                self.history.became(attempt, *object, *replicas);
                self.check_told(attempt)?;
                let put = &self.history.attempts[attempt];
                let settled = put.invoked.saturating_sub(GRACE_NS);
                if put.exclusive && self.is_calm(settled, now) {
                    self.history.exclusive_won(attempt, settled)?;
                }
                Ok(())
            }
            Ok(ClientReply::Sealed { kept: true, .. }) | Err(_) => {
                self.history.end_put(attempt, Outcome::Never(now))
            }
            Ok(reply) => Err(format!("a put was answered by {reply:?}")),
        }
    }
}
