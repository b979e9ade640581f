//! Requests that need the directory while there is none, or while it is asked. Not deletes, which wait in their own books
//! (`delete`), and not gets, which try again by themselves (`fetch`). Invariant: a request is asked of one directory at a
//! time, and its client is answered once: by a directory, or that there was none until its deadline.

use super::Engine;
use super::cluster::Pending;
use super::directory::Verdict;
use super::keeper::Keeper;
use super::timer::{Time, Timer};
use crate::checksum::Checksum;
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, Generation};
use crate::wire::PeerMessage;

/// A put that has to be the only one of its key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exclusive {
    pub(super) client: ClientId,
    pub(super) request: u64,
    pub(super) generation: Generation,
    pub(super) checksum: Checksum,
    /// Until when it waits for a directory.
    pub(super) deadline: Time,
}

/// A list that a client wants.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub(super) client: ClientId,
    pub(super) request: u64,
    pub(super) prefix: String,
    pub(super) after: Option<Key>,
    pub(super) limit: u32,
    /// Until when it waits for a directory.
    pub(super) deadline: Time,
}

/// A request that waits for a directory.
#[derive(Debug)]
pub(super) enum Awaiting {
    Exclusive(Exclusive),
    List(Listing),
}

impl Awaiting {
    const fn deadline(&self) -> Time {
        match self {
            Self::Exclusive(exclusive) => exclusive.deadline,
            Self::List(listing) => listing.deadline,
        }
    }
}

impl Engine {
    /// Asks the directory whether a put may be the only one of its key, now or when there is a directory.
    pub(super) fn ask_exclusive(&mut self, exclusive: Exclusive) {
        let Exclusive { client, request, generation, .. } = exclusive;
        let Some(object) = self.objects.get(generation) else {
            return;
        };
        let announced = object.announced(self.now);
        if self.objects.sealed(&announced.key).is_some() {
            // Taken here while it waited: its announcement must not take the place of that object's.
            return self.seal_now(client, request, generation, exclusive.checksum);
        }
        match self.keeper() {
            Keeper::Here => {
                let (own, now) = (self.config.member.node, self.now);
                let verdict = self.directory.as_mut().map(|it| it.announce(own, &announced, true, now));
                let refused = (verdict == Some(Verdict::Refused)).then_some(announced.key);
                self.exclusive_answer(exclusive, refused.into_iter().collect());
            }
            Keeper::At(link) => {
                let message = PeerMessage::Announce { objects: vec![announced], exclusive: true };
                self.ask_peer(link, message, Pending::Exclusive(exclusive));
            }
            Keeper::Awaited if self.now < exclusive.deadline => {
                self.await_directory(Awaiting::Exclusive(exclusive));
            }
            Keeper::Awaited | Keeper::Unreachable => {
                let what =
                    format!("put {:?}: if_exists = error has to ask the node that keeps it", announced.key);
                let error = self.no_directory(&what);
                self.free_object(generation);
                self.reply(client, request, Err(error));
            }
        }
    }

    /// The directory was lost, or is none any more, before it answered. False if the put does not wait for another.
    pub(super) fn ask_exclusive_again(&mut self, exclusive: Exclusive, why: &StoreError) -> bool {
        let waits = self.keeping.has_successors() && self.now < exclusive.deadline && is_passing(why);
        if waits {
            self.await_directory(Awaiting::Exclusive(exclusive));
        }
        waits
    }

    pub(super) fn await_list(&mut self, listing: Listing) {
        self.await_directory(Awaiting::List(listing));
    }

    fn await_directory(&mut self, awaiting: Awaiting) {
        self.timers.set(awaiting.deadline(), Timer::Keep);
        self.keeping.awaiting.push(awaiting);
    }

    /// A client has left: what it wanted and nobody was asked for yet does not happen.
    pub(super) fn forget_awaiting_of(&mut self, gone: ClientId) {
        let of_it = |awaiting: &Awaiting| match awaiting {
            Awaiting::Exclusive(exclusive) => exclusive.client == gone,
            Awaiting::List(listing) => listing.client == gone,
        };
        let (gone, waits): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.keeping.awaiting).into_iter().partition(of_it);
        self.keeping.awaiting = waits;
        for awaiting in gone {
            if let Awaiting::Exclusive(exclusive) = awaiting {
                self.free_object(exclusive.generation);
            }
        }
    }

    /// Whether a question of a client that failed like this is to be asked again of the next directory.
    pub(super) fn may_ask_again(&self, why: &StoreError) -> bool {
        self.keeping.has_successors() && is_passing(why)
    }

    /// Asks what waits for a directory, if there is one now; what has waited for too long is told so.
    pub(super) fn ask_again(&mut self) {
        let (now, keeper) = (self.now, self.keeper());
        let there = matches!(keeper, Keeper::Here | Keeper::At(_));
        let due = |awaiting: &Awaiting| there || awaiting.deadline() <= now;
        let (due, waits): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.keeping.awaiting).into_iter().partition(due);
        self.keeping.awaiting = waits;
        for awaiting in due {
            match awaiting {
                Awaiting::Exclusive(exclusive) => self.ask_exclusive(exclusive),
                Awaiting::List(listing) => self.ask_list(listing),
            }
        }
        if there {
            self.deletes_again();
        }
    }
}

fn is_passing(why: &StoreError) -> bool {
    use crate::error::ErrorKind::{PeerLost, Unavailable};
    matches!(why.kind(), PeerLost | Unavailable)
}
