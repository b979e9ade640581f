//! What iWARP wants done otherwise: it ends a whole connection for one read that is refused, or for a message that finds no
//! buffer; whoever connects sends first; and soft iWARP connects while the caller waits. Not anything of InfiniBand or
//! RoCE. Invariant: on those nothing here does anything, and on iWARP no call that may take long is made under the lock.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use hetmem_core::{LinkId, StoreError};

use super::super::adapters::Adapter;
use super::super::ends::{Of, Role, Stage as EndStage, What};
use super::super::plugin::{Connection, Greeting};
use super::State;
use crate::waiting::Bell;

/// After what time a first byte that was not answered is sent again.
const AGAIN: Duration = Duration::from_millis(500);

/// A connection that was made, or not, and comes back.
type Back = (u64, Connection, Result<(), StoreError>);

/// Connections that threads of their own are making.
pub(in crate::verbs) struct Aside {
    away: usize,
    back: (Sender<Back>, Receiver<Back>),
    bell: Option<Arc<Bell>>,
}

impl Aside {
    pub(super) fn new() -> Self {
        Self { away: 0, back: channel(), bell: None }
    }

    /// Who is to look when one is back.
    pub(in crate::verbs) fn rings(&mut self, bell: Arc<Bell>) {
        self.bell = Some(bell);
    }

    pub(super) fn any(&self) -> bool {
        self.away > 0
    }

    /// Connects in another thread, which has the connection for so long.
    pub(super) fn connect(
        &mut self,
        token: u64,
        mut connection: Connection,
        private: Vec<u8>,
        reads: (u8, u8),
    ) -> Result<(), StoreError> {
        let (back, bell) = (self.back.0.clone(), self.bell.clone());
        let call = move || {
            let result = connection.connect(Greeting::new(&private, reads));
            // Nobody takes it when the fabric is gone: then it is closed here.
            if back.send((token, connection, result)).is_ok()
                && let Some(bell) = bell
            {
                bell.ring();
            }
        };
        let thread = std::thread::Builder::new().name("verbs-connect".to_owned()).spawn(call);
        thread.map_err(|error| StoreError::os("start a thread that connects", error))?;
        self.away += 1;
        Ok(())
    }
}

impl State {
    /// Takes connections that are back from being made.
    pub(super) fn back_from_aside(&mut self) {
        while let Ok((token, connection, result)) = self.aside.back.1.try_recv() {
            self.aside.away -= 1;
            // One that was given up meanwhile is closed.
            let Some(end) = self.ends.get_mut(&token) else { continue };
            end.connection = Some(connection);
            let (Role::Control(link) | Role::Reading(link) | Role::Serving(link)) = end.role;
            match result {
                // What waited for it, if the peer's answer was heard of first.
                Ok(()) => {
                    self.say_first(token);
                    self.post(link);
                }
                Err(why) => self.end_over(token, None, &why),
            }
        }
    }

    /// Whoever connects sends first: iWARP wants it so, and soft iWARP fails a connection whose other end is quicker. It may
    /// also let what comes lie while it is accepting, until more comes. So a first byte goes there, again now and then,
    /// another comes back, and only then work follows.
    pub(super) fn say_first(&mut self, token: u64) {
        let Some(end) = self.ends.get_mut(&token) else { return };
        let asked = match end.role {
            Role::Control(link) => self.links.get(&link).is_some_and(|link| !link.inbound),
            Role::Reading(_) => true,
            Role::Serving(_) => false,
        };
        let ready = end.stage == EndStage::Up && end.connection.is_some() && asked != end.heard;
        let adapter = end.adapter.and_then(|number| self.adapters.get_mut(&number));
        let Some(adapter) = adapter.filter(|adapter| ready && adapter.is_iwarp()) else { return };
        // It is said again if there is no buffer for it now.
        end.said = Some(Instant::now());
        let Some(slot) = adapter.frames.take() else { return };
        adapter.frames.write(slot, 0, &[0]);
        let piece = adapter.frames.piece(slot, 0, 1);
        end.add(What::Send { pieces: &[piece] }, Of::Part { slot: Some(slot), last_of: None }, true);
        if let Err(why) = end.flush() {
            self.end_over(token, None, &why);
        }
    }

    /// Ends that have said so and were not answered.
    pub(super) fn unheard(&self) -> impl Iterator<Item = (u64, Instant)> + '_ {
        let unheard = self.ends.iter().filter(|(_, end)| !end.heard);
        unheard.filter_map(|(token, end)| Some((*token, end.said?)))
    }

    pub(super) fn say_first_again(&mut self) {
        let late: Vec<u64> =
            self.unheard().filter(|(_, said)| said.elapsed() > AGAIN).map(|(token, _)| token).collect();
        for token in late {
            self.say_first(token);
        }
    }

    /// Something has come over a connection.
    pub(super) fn heard(&mut self, token: Option<u64>) {
        if let Some((token, end)) = token.and_then(|token| Some((token, self.ends.get_mut(&token)?)))
            && !end.heard
        {
            end.heard = true;
            let (Role::Control(link) | Role::Reading(link) | Role::Serving(link)) = end.role;
            self.say_first(token);
            self.post(link);
        }
    }

    /// Whether a message of a link is none of its frames' and descriptions: a first byte, or an empty one.
    pub(super) fn is_not_of_a_frame(&mut self, number: usize, id: LinkId, len: usize) -> bool {
        if !self.adapters.get(&number).is_some_and(Adapter::is_iwarp) {
            return false;
        }
        let Some(link) = self.links.get_mut(&id) else { return false };
        if len == 0 {
            link.peer_lent();
            self.post(id);
            return true;
        }
        link.is_first_byte(len)
    }

    /// A connection ends, which this end has not decided: one of its reads may be why.
    pub(super) fn suspect(&mut self, token: u64, may_find: bool) {
        let Some(end) = self.ends.get(&token) else { return };
        let adapter = end.adapter.and_then(|number| self.adapters.get(&number));
        let silent = adapter.is_some_and(Adapter::is_iwarp);
        if let (Role::Reading(link), EndStage::Up, true) = (end.role, end.stage, silent)
            && let Some(link) = self.links.get_mut(&link)
        {
            link.suspect(may_find);
        }
    }

    /// The peer has taken another connection: reads that were alone on the last one fail.
    pub(super) fn fail_guilty(&mut self, id: LinkId) {
        let guilty = self.links.get_mut(&id).map(super::Link::reading_made).unwrap_or_default();
        for read in guilty {
            let why = "its connection ended, and the peer is there: the owner has withdrawn the memory";
            self.read_over(read, Err(StoreError::stale("transfer", "its memory", why)));
        }
    }

    /// A receive buffer that a message of a link came into goes back to its adapter, which the peer has to hear of.
    pub(in crate::verbs) fn part_lent(&mut self, id: LinkId, number: usize, slot: u32) {
        self.lend_again(number, slot);
        if self.adapters.get(&number).is_some_and(Adapter::is_iwarp)
            && let Some(link) = self.links.get_mut(&id)
        {
            link.part_lent();
            self.post(id);
        }
    }
}
