//! Pushes as they are asked for, carried out and told of. Not their work (`push`). Invariant: what a peer asks for is
//! checked as a read of it would be, and a read is over only when its target is closed to the owner.

use hetmem_core::{LinkId, StoreError};

use super::super::links::READS_MAX;
use super::super::push::Push;
use super::super::wire::{PushAsk, PushSaid};
use super::State;
use crate::fabric::Access;

impl State {
    /// A message has come on a data connection.
    ///
    /// # Errors
    /// Why the connection ends: it is none that belongs there, or too many are asked for.
    pub(super) fn push_said(
        &mut self,
        (id, token): (LinkId, u64),
        serving: bool,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        match (PushSaid::parse(bytes)?, serving) {
            (PushSaid::Ask(ask), true) => self.push_asked(id, token, ask),
            (PushSaid::Refused { number }, false) => {
                self.push_over(id, number, false);
                Ok(())
            }
            (PushSaid::Ask(_), false) | (PushSaid::Refused { .. }, true) => {
                Err(StoreError::protocol("a push that was asked for at the wrong end"))
            }
        }
    }

    /// The peer asks for bytes to be written into its memory.
    fn push_asked(&mut self, id: LinkId, token: u64, ask: PushAsk) -> Result<(), StoreError> {
        let PushAsk { number, from, .. } = ask;
        let found = self.segments.iter().find(|(_, segment)| segment.key == from.key);
        let push = match found {
            Some((&segment, of))
                if of.access == Access::RemoteRead
                    && from.len_bytes > 0
                    && from
                        .offset
                        .checked_add(from.len_bytes)
                        .is_some_and(|end| end <= of.memory.len_bytes()) =>
            {
                Push::Write { ask, segment, base: of.memory.base() as u64, done: 0 }
            }
            _ => Push::Refuse { number },
        };
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let pushes = link.pushes.entry(token).or_default();
        if pushes.len() >= READS_MAX {
            return Err(StoreError::protocol(format!("more than {READS_MAX} pushes are asked for at once")));
        }
        pushes.push_back(push);
        self.post(id);
        Ok(())
    }

    /// What was to be written is there, or will not be. The target is closed before anybody is told.
    pub(super) fn push_over(&mut self, id: LinkId, number: u32, written: bool) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let Some(read) = link.pushed(number, written) else { return self.post(id) };
        let result = match (read.error.clone(), written) {
            (Some(why), _) => Err(why),
            (None, true) => Ok(read.stats),
            (None, false) => {
                let subject = format!("transfer {}", read.transfer);
                Err(StoreError::stale("read", subject, "the owner has withdrawn the memory"))
            }
        };
        self.read_over(read, result);
    }

    /// Posts what the peer of a link has asked to be written. Returns the connection that has to end, if one has.
    pub(super) fn post_pushes(&mut self, id: LinkId) -> Option<(u64, StoreError)> {
        let link = self.links.get_mut(&id).filter(|link| !link.pushes.is_empty())?;
        let mut failed = None;
        for (token, pushes) in &mut link.pushes {
            let Some(end) = self.ends.get_mut(token) else { continue };
            let Some(adapter) = end.adapter.and_then(|number| self.adapters.get_mut(&number)) else {
                continue;
            };
            while end.room() > 0
                && let Some(push) = pushes.front_mut()
            {
                match push.add_next(end, adapter, self.slice_bytes) {
                    (_, true) => drop(pushes.pop_front()),
                    (true, false) => {}
                    (false, false) => break,
                }
            }
            if let Err(why) = end.flush() {
                failed.get_or_insert((*token, why));
            }
        }
        link.pushes.retain(|_, pushes| !pushes.is_empty());
        failed
    }
}
