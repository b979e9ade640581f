//! What is posted, and what comes back of it. Not what a read or a connection is over for (`endings`), nor what bytes mean.
//! Invariant: a buffer that came back is lent again once it was looked at, whatever was in it.

use std::sync::Arc;

use hetmem_core::{LinkId, StoreError, TransferId};

use super::super::abi;
use super::super::adapters::{Adapter, receive_slot};
use super::super::completion::{Class, class_of, explain};
use super::super::ends::{End, Of, Role, Stage as EndStage};
use super::super::links::{Read, Stage};
use super::super::wire::{Described, described};
use super::{Effect, RESOLVE_MS, State};
use crate::fabric::FabricEvent;

impl State {
    /// Posts what waits on a link.
    pub(in crate::verbs) fn post(&mut self, id: LinkId) {
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
        if let Some(over) = self.post_pushes(id) {
            failed.get_or_insert(over);
        }
        if let Some((token, why)) = failed {
            self.suspect(token, false);
            self.end_over(token, None, &why);
        }
        if wants_data {
            self.open_reading(id);
        }
    }

    pub(in crate::verbs) fn post_all(&mut self) {
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

    /// Takes the completions of a lane, of all adapters; says whether there were any.
    pub(in crate::verbs) fn completions(&mut self, lane: usize) -> bool {
        let (mut any, mut next) = (false, 0);
        let mut done = std::mem::take(&mut self.done);
        while let Some(number) = self.adapters.range(next..).next().map(|(&number, _)| number) {
            next = number + 1;
            loop {
                let adapter = self.adapters.get_mut(&number);
                let Some(watched) = adapter.and_then(|adapter| adapter.queues.get_mut(lane)) else { break };
                if let Err(why) = watched.queue.poll(&mut done) {
                    self.lose_adapter(number, &why);
                    break;
                }
                any |= !done.is_empty();
                // The first of them may have been what it was armed for.
                watched.armed &= done.is_empty();
                for completion in &done {
                    self.completion(number, completion);
                }
                if done.is_empty() || done.len() < done.capacity() {
                    break;
                }
            }
        }
        self.done = done;
        any
    }

    /// Arms the queues of a lane that are not: whatever completes from now on wakes a thread. Says whether there were
    /// any: what came before that has to be looked for once more.
    pub(in crate::verbs) fn arm(&mut self, lane: usize) -> bool {
        let (mut any, mut broken) = (false, Vec::new());
        for (&number, adapter) in &mut self.adapters {
            let Some(watched) = adapter.queues.get_mut(lane).filter(|watched| !watched.armed) else {
                continue;
            };
            (any, watched.armed) = (true, true);
            if let Err(why) = watched.queue.arm() {
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
                self.came_back((number, id), of, &Ok(()));
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
                self.came_back((number, id), of, &Err(why.clone()));
            }
            if guilty.is_none() {
                self.suspect(token, true);
            }
            return self.end_over(token, guilty, &why);
        }
        self.post(id);
    }

    fn received(&mut self, number: usize, slot: u32, token: Option<u64>, done: &abi::Completion) {
        if done.status == 0 {
            self.heard(token);
        }
        let end = token.and_then(|token| Some((token, self.ends.get(&token)?)));
        let Some(adapter) = self.adapters.get(&number) else { return };
        let slots = Arc::clone(&adapter.receives);
        let end = end.map(|(token, end)| (token, end.role));
        slots.came_back(slot);
        let len = done.len_bytes as usize;
        let bytes = slots.bytes(slot, len).unwrap_or_default();
        let (token, link) = match end {
            Some((token, Role::Control(link))) if (done.status, done.kind) == (0, abi::DONE_RECEIVED) => {
                (token, link)
            }
            _ => {
                let over = end.map(|(token, role)| {
                    (token, self.received_otherwise((number, token), role, bytes, done))
                });
                self.lend_again(number, slot);
                if let Some((token, Err(why))) = over {
                    self.end_over(token, None, &why);
                }
                return;
            }
        };
        if self.is_not_of_a_frame(number, link, len) {
            return self.lend_again(number, slot);
        }
        let Some(of_frame) = self.links.get_mut(&link).map(|link| link.is_of_frame(bytes)) else {
            return self.lend_again(number, slot);
        };
        let described = match of_frame {
            Ok(true) => {
                return self.tell(link, Effect::Received { link, adapter: number, slots, slot, len });
            }
            Ok(false) => described(bytes),
            Err(why) => Err(why),
        };
        self.part_lent(link, number, slot);
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

    /// A buffer has come back with something else than a message on a control connection.
    ///
    /// # Errors
    /// Why the connection ends.
    fn received_otherwise(
        &mut self,
        (number, token): (usize, u64),
        role: Role,
        bytes: &[u8],
        done: &abi::Completion,
    ) -> Result<(), StoreError> {
        if done.status != 0 {
            return Err(explain(done));
        }
        let iwarp = self.adapters.get(&number).is_some_and(Adapter::is_iwarp);
        let result = match (role, done.kind) {
            // The first byte: there are no pushes.
            (Role::Reading(_) | Role::Serving(_), abi::DONE_RECEIVED) if iwarp => Ok(()),
            (Role::Reading(link), abi::DONE_WRITTEN) => {
                self.push_over(link, done.immediate, true);
                Ok(())
            }
            (Role::Reading(link), abi::DONE_RECEIVED) => self.push_said((link, token), false, bytes),
            (Role::Serving(link), abi::DONE_RECEIVED) => self.push_said((link, token), true, bytes),
            _ => Err(StoreError::protocol("a write that nobody asked for")),
        };
        if result.is_err() {
            self.refused += 1;
        }
        result
    }

    /// A receive buffer goes back to its adapter.
    pub(in crate::verbs) fn lend_again(&mut self, number: usize, slot: u32) {
        let Some(adapter) = self.adapters.get(&number) else { return };
        if let Err(why) = adapter.post_receive(slot) {
            self.lose_adapter(number, &why);
        }
    }

    /// A piece of work is back: what it was for.
    pub(super) fn came_back(
        &mut self,
        (number, id): (usize, LinkId),
        of: Of,
        result: &Result<(), StoreError>,
    ) {
        match of {
            Of::Part { slot, last_of } => {
                if let (Some(slot), Some(adapter)) = (slot, self.adapters.get_mut(&number)) {
                    adapter.frames.give_back(slot);
                }
                if let Some(token) = last_of {
                    self.report(id, FabricEvent::SendDone { token, result: result.clone() });
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
}

/// Whose fault it is, if only one read's.
fn guilty_of(done: &abi::Completion) -> impl Fn(&Of) -> Option<TransferId> + use<> {
    let own = class_of(done) == Class::Work;
    move |of| match of {
        Of::Slice { transfer, .. } | Of::Word { transfer, .. } if own => Some(*transfer),
        _ => None,
    }
}
