//! What ends: reads, connections, links, the fabric. Not why. Invariant: whoever waits for something that ends is told once,
//! and of a read only when no adapter touches its target any more.

use std::collections::VecDeque;

use hetmem_core::{LinkId, StoreError, TransferId};

use super::super::ends::{Role, Stage as EndStage};
use super::super::links::{Read, Stage};
use super::{Effect, State};
use crate::fabric::{FabricEvent, ReadStats};

impl State {
    pub(super) fn read_done(&mut self, transfer: TransferId, word: Option<u64>) {
        let link = self.transfers.get(&transfer).and_then(|link| self.links.get_mut(link));
        let Some(mut read) = link.and_then(|link| link.under_way.remove(&transfer)) else { return };
        read.stats.word = word;
        let result = match read.error.take() {
            Some(why) => Err(why),
            None => Ok(read.stats),
        };
        self.read_over(read, result);
    }

    pub(super) fn read_over(&mut self, read: Read, result: Result<ReadStats, StoreError>) {
        let transfer = read.transfer;
        if let Some(link) = self.transfers.remove(&transfer) {
            self.report(link, FabricEvent::ReadDone { transfer, result });
        }
    }

    /// Gives a read up. If some of it is posted, its connection ends, so that nothing of it lands any more; others go on
    /// over another.
    pub(in crate::verbs) fn give_up(&mut self, transfer: TransferId, why: &StoreError) {
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
            // The others have not failed, however often this happens to them.
            let why = StoreError::unavailable("its data connection", "a read was given up");
            self.end_over(token, Some(transfer), &why);
        }
    }

    /// A connection is over, or was never made; nothing touches memory for it any more.
    pub(in crate::verbs) fn end_over(&mut self, token: u64, guilty: Option<TransferId>, why: &StoreError) {
        let Some(mut end) = self.ends.remove(&token) else { return };
        if let (Some(adapter), Some(made)) = (end.adapter, end.made) {
            self.by_pair.remove(&(adapter, made.number));
        }
        let (role, number, left) = (end.role, end.adapter.unwrap_or_default(), end.take_all());
        let was_up = end.stage == EndStage::Up;
        tracing::debug!(?role, stage = ?end.stage, left = left.len(), %why, "a connection is over");
        end.disconnect();
        // The adapter is done with its work when this returns.
        drop(end);
        let (Role::Control(id) | Role::Reading(id) | Role::Serving(id)) = role;
        let lost = self.links.get(&id).map_or_else(|| why.clone(), |link| link.lost("send", why));
        for of in left {
            self.came_back((number, id), of, &Err(lost.clone()));
        }
        match role {
            Role::Control(id) => self.link_over(id, why),
            Role::Serving(id) => {
                if let Some(link) = self.links.get_mut(&id) {
                    link.serving.retain(|serving| *serving != token);
                    link.pushes.remove(&token);
                }
            }
            Role::Reading(id) => {
                let Some(link) = self.links.get_mut(&id) else { return };
                link.reading = None;
                let why = if guilty.is_some() { why.clone() } else { link.lost("read", why) };
                let mut over = link.reads_lost(guilty, &why);
                if !was_up {
                    over.extend(link.reading_refused());
                }
                for mut read in over {
                    let result = Err(read.error.take().unwrap_or_else(|| why.clone()));
                    self.read_over(read, result);
                }
                self.post(id);
            }
        }
    }

    /// A link is over: all that was under way on it ends, then the link.
    pub(super) fn link_over(&mut self, id: LinkId, why: &StoreError) {
        let Some(mut link) = self.links.remove(&id) else { return };
        self.tokens.remove(&link.mine);
        for token in link.reading.take().into_iter().chain(std::mem::take(&mut link.serving)) {
            self.end_over(token, None, why);
        }
        let lost = link.lost("send", why);
        for token in link.take_out() {
            self.report(id, FabricEvent::SendDone { token, result: Err(lost.clone()) });
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
        self.tell(id, Effect::Ended { link: id, why, was_up });
    }

    /// This end disconnects a link.
    pub(in crate::verbs) fn disconnect(&mut self, id: LinkId, why: &StoreError) {
        match self.links.get(&id).map(|link| link.control) {
            Some(control) if self.ends.contains_key(&control) => self.end_over(control, None, why),
            Some(_) => self.link_over(id, why),
            None => {}
        }
    }

    /// Closes everything; nobody is told.
    pub(in crate::verbs) fn close(&mut self) {
        for (_, end) in std::mem::take(&mut self.ends) {
            end.disconnect();
        }
        self.by_pair.clear();
        self.links.clear();
        self.tokens.clear();
        self.transfers.clear();
        self.effects.iter_mut().for_each(VecDeque::clear);
        self.listener = None;
        self.adapters.clear();
        self.segments.clear();
    }
}
