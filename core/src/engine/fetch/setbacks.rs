//! What becomes of gets from other nodes that do not succeed at once: obstacles, other holders, deadlines, failures. Not
//! who is asked first (`fetch`). Invariant: what a fetch held when it ended is given up with it.

use super::{Bytes, DIAL_MS, Fetch, FetchFor, FetchId, FetchWaiter, Stage, Want};
use crate::engine::Engine;
use crate::engine::action::Action;
use crate::engine::timer::Timer;
use crate::error::{ErrorKind, StoreError};
use crate::tier::{ClientId, LinkId, NodeId};
use crate::wire::{Holder, PeerMessage};

/// How soon a fetch that met a passing obstacle tries again, in milliseconds; twice as late after each further one,
/// and up to a quarter more, which differs from fetch to fetch.
const RETRY_MS: u64 = 20;
/// The longest such pause but for that share.
const RETRY_MS_MAX: u64 = 320;

/// Whether it may be otherwise soon, or elsewhere.
fn is_passing(why: &StoreError) -> bool {
    use ErrorKind::{Busy, Os, PeerLost, Stale, TimedOut, Unavailable};
    matches!(why.kind(), PeerLost | Busy | Stale | TimedOut | Unavailable | Os)
}

impl Engine {
    /// Nobody has it. If somebody had it and was lost on the way, that is the answer.
    pub(super) fn fetch_not_found(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        // Where that node is still there, the object was taken from it meanwhile.
        let is_gone = fetch.failed_by.is_none_or(|node| !self.peers.contains_key(&node));
        let lost = fetch
            .obstacle
            .as_ref()
            .filter(|why| why.kind() == ErrorKind::PeerLost && is_gone && fetch.want != Want::Existence);
        let why = lost.cloned().unwrap_or_else(|| StoreError::not_found("get", &fetch.key));
        // Who came after the question may have put the object in between: that takes a question of its own.
        let questions = fetch.questions;
        let (answered, newer): (Vec<_>, Vec<_>) =
            std::mem::take(&mut fetch.waiters).into_iter().partition(|waiter| waiter.came_after < questions);
        if newer.is_empty() {
            fetch.waiters = answered;
            return self.fetch_failed(id, &why);
        }
        fetch.waiters = newer;
        fetch.obstacle = None;
        self.answer_all(answered, &why);
        self.fetch_restart(id);
    }

    pub(in crate::engine) fn answer_all(&mut self, waiters: Vec<FetchWaiter>, why: &StoreError) {
        for waiter in waiters {
            self.answer_waiter(&waiter.who, why.clone());
        }
    }

    /// Tells one who waited that it has come to nothing.
    fn answer_waiter(&mut self, who: &FetchFor, why: StoreError) {
        match who {
            FetchFor::Client(caller) => {
                self.counters.failed += 1;
                self.answer_caller(*caller, Err(why));
            }
            FetchFor::Replica(asked) => self.replica_answer(asked, Err(why)),
        }
    }

    /// Takes a fetch out of the books, with the timers of those who wait for it.
    pub(in crate::engine) fn take_fetch(&mut self, id: FetchId) -> Option<Box<Fetch>> {
        let fetch = self.fetches.remove(id)?;
        for waiter in fetch.waiters.iter().filter(|waiter| !waiter.who.is_one_of_many()) {
            self.timers.unset(waiter.deadline, Timer::Fetch(id));
        }
        Some(fetch)
    }

    /// The fetch cannot succeed.
    pub(in crate::engine) fn fetch_failed(&mut self, id: FetchId, why: &StoreError) {
        let Some(fetch) = self.take_fetch(id) else {
            return;
        };
        self.leave_stage(fetch.stage);
        if fetch.want == Want::Existence && why.kind() == ErrorKind::NotFound {
            for waiter in fetch.waiters {
                if let FetchFor::Client(caller) = waiter.who {
                    let error = StoreError::timed_out("wait", &fetch.key, 0);
                    self.answer_caller(caller, Err(error));
                }
            }
            return;
        }
        self.answer_all(fetch.waiters, why);
    }

    /// Something passing is in the way: tries again until the deadline, and remembers why it could not.
    pub(in crate::engine) fn fetch_obstacle(&mut self, id: FetchId, why: StoreError) {
        let alone = self.directory.is_some() && self.peers.is_empty() && !self.is_settling();
        if !is_passing(&why) || (alone && why.kind() != ErrorKind::Stale) {
            return self.fetch_failed(id, &why);
        }
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        self.hints.forget_key(&fetch.key);
        fetch.obstacle = Some(why);
        fetch.asked_directory = false;
        if self.directory.is_some() || self.directory_link.is_some() {
            // Who has it then, the directory knows better.
            fetch.holders.clear();
        }
        fetch.stage = Stage::Waiting;
        let pause = (RETRY_MS << fetch.obstacles.min(8)).min(RETRY_MS_MAX);
        fetch.obstacles = fetch.obstacles.saturating_add(1);
        self.timers.set(self.now.after_ms(pause + id.0 % (pause / 4)), Timer::Retry(id));
    }

    /// A node did not give it; others may.
    pub(in crate::engine) fn fetch_tried(&mut self, id: FetchId, link: LinkId) {
        let directory = self.directory_node();
        if let Some(node) = self.links.get(&link).and_then(|link| link.node)
            && let Some(fetch) = self.fetches.get_mut(id)
        {
            // It may still know who else has it.
            fetch.asked_directory &= Some(node) != directory || fetch.tried.contains(&node);
            fetch.tried.push(node);
            fetch.failed_by = Some(node);
        }
    }

    /// A node did not give it. Another one is asked at once, as long as one is known or may become known.
    pub(in crate::engine) fn fetch_moves_on(&mut self, id: FetchId, why: StoreError) {
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        if !is_passing(&why) {
            return self.fetch_failed(id, &why);
        }
        fetch.obstacle = Some(why);
        fetch.stage = Stage::Waiting;
        self.fetch_start(id);
    }

    /// Asks again from the start, now.
    pub(in crate::engine) fn fetch_restart(&mut self, id: FetchId) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.stage = Stage::Waiting;
            fetch.tried.clear();
            fetch.asked_directory = false;
            self.fetch_start(id);
        }
    }

    pub(in crate::engine) fn fetch_retry(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get(id) else {
            return;
        };
        match &fetch.stage {
            Stage::Waiting => self.fetch_start(id),
            // The timer may be one of an earlier wait.
            Stage::Dialling { holder, until } if *until <= self.now => {
                let why = format!("no connection to it came up within {DIAL_MS} ms");
                self.fetch_gets_no_link(id, holder.clone(), &why);
            }
            _ => {}
        }
    }

    /// A link to a node is there: fetches that waited go on.
    pub(in crate::engine) fn fetches_waiting_start(&mut self) {
        let waits = |stage: &Stage| matches!(stage, Stage::Waiting | Stage::Dialling { .. });
        for id in self.fetches.numbers(|fetch| waits(&fetch.stage)) {
            self.fetch_start(id);
        }
    }

    /// A node could not be reached: fetches that waited for it look elsewhere.
    pub(in crate::engine) fn fetches_undialled(&mut self, address: &str, why: &StoreError) {
        let waits =
            |stage: &Stage| matches!(stage, Stage::Dialling { holder, .. } if holder.address == address);
        for id in self.fetches.numbers(|fetch| waits(&fetch.stage)) {
            if let Some(Stage::Dialling { holder, .. }) = self.fetches.get(id).map(|fetch| &fetch.stage) {
                self.fetch_gets_no_link(id, holder.clone(), &why.to_string());
            }
        }
    }

    /// A holder does not take the connection; another may have the object too.
    fn fetch_gets_no_link(&mut self, id: FetchId, holder: Holder, why: &str) {
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.tried.push(holder.node);
            fetch.failed_by = Some(holder.node);
            fetch.stage = Stage::Waiting;
            fetch.obstacle = Some(StoreError::PeerLost {
                operation: "get".into(),
                subject: fetch.key.to_string(),
                peer: holder.address,
                why: why.to_owned().into(),
            });
            self.fetch_start(id);
        }
    }

    /// The link over which a fetch was under way has gone.
    pub(in crate::engine) fn fetches_lost(
        &mut self,
        link: LinkId,
        node: Option<NodeId>,
        address: &str,
        why: &StoreError,
    ) {
        let of_link = |stage: &Stage| match stage {
            Stage::Asked { link: of, .. } => *of == link,
            // A read or a landing ends by its own completion, which says when no more bytes land.
            _ => false,
        };
        for id in self.fetches.numbers(|fetch| of_link(&fetch.stage)) {
            let Some(fetch) = self.fetches.get_mut(id) else {
                continue;
            };
            fetch.tried.extend(node);
            fetch.failed_by = node;
            let why = StoreError::PeerLost {
                operation: "get".into(),
                subject: fetch.key.to_string(),
                peer: address.to_owned(),
                why: why.to_string().into(),
            };
            self.fetch_moves_on(id, why);
        }
    }

    /// A request for many keys of this client is late.
    pub(in crate::engine) fn fetch_deadlines(&mut self, client: ClientId) {
        let now = self.now;
        let late = |waiter: &FetchWaiter| waiter.is_of(client) && waiter.deadline <= now;
        for id in self.fetches.numbers(|fetch| fetch.waiters.iter().any(late)) {
            self.fetch_deadline(id);
        }
    }

    pub(in crate::engine) fn fetch_deadline(&mut self, id: FetchId) {
        let now = self.now;
        let Some(fetch) = self.fetches.get_mut(id) else {
            return;
        };
        let (late, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut fetch.waiters).into_iter().partition(|waiter| waiter.deadline <= now);
        fetch.waiters = waiting;
        let (key, want) = (fetch.key.clone(), fetch.want);
        // Why it could not be had says more than that time has passed.
        let obstacle = fetch
            .obstacle
            .clone()
            .filter(|why| matches!(why.kind(), ErrorKind::PeerLost | ErrorKind::Unavailable));
        for waiter in late {
            let operation = if want == Want::Existence { "wait" } else { "get" };
            let error =
                obstacle.clone().unwrap_or_else(|| StoreError::timed_out(operation, &key, waiter.timeout_ms));
            self.answer_waiter(&waiter.who, error);
        }
        self.drop_fetch_without_waiters(id);
    }

    pub(in crate::engine) fn forget_fetch_waiters_of(&mut self, client: ClientId) {
        let waits = |waiter: &FetchWaiter| waiter.is_of(client);
        for id in self.fetches.numbers(|fetch| fetch.waiters.iter().any(waits)) {
            if let Some(fetch) = self.fetches.get_mut(id) {
                fetch.waiters.retain(|waiter| !waits(waiter));
            }
            self.drop_fetch_without_waiters(id);
        }
    }

    fn drop_fetch_without_waiters(&mut self, id: FetchId) {
        if self.fetches.get(id).is_some_and(|fetch| fetch.waiters.is_empty())
            && let Some(fetch) = self.take_fetch(id)
        {
            self.leave_stage(fetch.stage);
        }
    }

    /// Gives up what a fetch held. An extent into which bytes may still land stays until they cannot any more.
    fn leave_stage(&mut self, stage: Stage) {
        match stage {
            Stage::Waiting | Stage::Dialling { .. } | Stage::AskingAll | Stage::Landing { .. } => {}
            Stage::Asked { request, .. } => {
                // A grant that still comes is released at once.
                self.abandon(request);
            }
            Stage::NeedsRoom { link, source } => {
                if let Bytes::Granted { granted, .. } = source.bytes {
                    self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
                }
            }
            Stage::Reading { link, transfer, granted, .. } => {
                self.out.push(Action::CancelRead { transfer });
                self.tell_peer(link, PeerMessage::Release { lease: granted.lease });
            }
            Stage::ReadingKnown { transfer, .. } => self.out.push(Action::CancelRead { transfer }),
            Stage::CheckingWord { transfer, generation, .. } => self.give_up_word(transfer, generation),
        }
    }
}
