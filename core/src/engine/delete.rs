//! Deleting an object on every node. Not eviction, which only drops one node's copy. Invariant: the answer comes
//! after every linked node has dropped the object, and will not take it in any more.

use std::collections::BTreeSet;

use super::Engine;
use super::cluster::{AskFor, Pending};
use super::keeper::Keeper;
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, LinkId, NodeId, ObjectId};
use crate::wire::{ClientReply, PeerMessage};

/// How long everyone may take to drop an object, in milliseconds; then it is unknown whether it is gone.
const DELETE_MS: u64 = 5_000;

#[derive(Debug)]
enum Asker {
    Client {
        client: ClientId,
        request: u64,
    },
    Peer {
        link: LinkId,
        request: u64,
    },
    /// The object's time to live is over.
    Nobody,
}

#[derive(Debug)]
pub(super) struct Delete {
    key: Key,
    /// Only this object; none: every object of the key.
    only: Option<ObjectId>,
    asker: Asker,
    existed: bool,
    /// What was known when it began, and what nodes said that they hold: by now, another delete or an eviction may
    /// have taken some of it out of the directory.
    found: BTreeSet<ObjectId>,
    left: usize,
    begun: Time,
    deadline: Time,
    /// It waits for a directory.
    waits: bool,
}

impl Engine {
    pub(super) fn delete_request(&mut self, client: ClientId, request: u64, key: Key) {
        self.delete(key, None, Asker::Client { client, request });
    }

    /// An object's time to live is over: it goes, and no other object that has its key by now.
    pub(super) fn delete_expired(&mut self, key: Key, object: ObjectId) {
        self.delete(key, Some(object), Asker::Nobody);
    }

    /// DELETE: only the node that keeps the directory can see to it.
    pub(super) fn delete_for_peer(&mut self, link: LinkId, request: u64, key: Key) {
        if self.keeper() != Keeper::Here {
            let error = self.no_directory(&format!("delete {key:?}"));
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        }
        self.delete(key, None, Asker::Peer { link, request });
    }

    /// DROP: from the directory, drop yours; to it, see to it that everyone does.
    pub(super) fn drop_for_peer(&mut self, link: LinkId, request: u64, key: Key, object: ObjectId) {
        if self.directory.is_some() && self.links.get(&link).is_some_and(|link| link.joined) {
            return self.delete(key, Some(object), Asker::Peer { link, request });
        }
        let existed = self.drop_local(&key, Some(object));
        if self.directory.is_some() {
            // From another node that keeps one: what is known here of the object goes too.
            self.deletions(&[object]);
        }
        self.deleted.insert(object);
        self.answer_peer(link, request, PeerMessage::Dropped { existed });
    }

    fn delete(&mut self, key: Key, only: Option<ObjectId>, asker: Asker) {
        let operation = self.next_operation;
        self.next_operation += 1;
        let (begun, found) = (self.now, BTreeSet::new());
        let delete =
            Delete { key, only, asker, existed: false, found, left: 1, begun, deadline: begun, waits: false };
        self.deletes.insert(operation, delete);
        self.delete_begins(operation);
    }

    fn set_delete_deadline(&mut self, operation: u64, at: Time) {
        if let Some(delete) = self.deletes.get_mut(&operation) {
            self.timers.unset(delete.deadline, Timer::Operation(operation));
            delete.deadline = at;
            self.timers.set(at, Timer::Operation(operation));
        }
    }

    /// Asks the directory, or everyone where it is kept here.
    fn delete_begins(&mut self, operation: u64) {
        self.set_delete_deadline(operation, self.now.after_ms(DELETE_MS));
        let Some(delete) = self.deletes.get(&operation) else {
            return;
        };
        let (key, only) = (delete.key.clone(), delete.only);
        match (self.keeper(), only) {
            (Keeper::Here, Some(_)) => self.delete_from_holders(operation),
            (Keeper::Here, None) => {
                // What is evicted while nodes are asked may have left a copy on its way to one that was asked before.
                let held = self.directory.iter().flat_map(|directory| directory.holders(&key));
                let found: BTreeSet<ObjectId> = held.map(|(_, object)| object).collect();
                if let Some(delete) = self.deletes.get_mut(&operation) {
                    delete.found.extend(found);
                }
                // What was put is found although its announcement may still be under way.
                self.ask_everyone(key, AskFor::Delete(operation));
            }
            (Keeper::At(link), only) => {
                // The directory tells everyone, this node included, before it answers.
                let message = match only {
                    Some(object) => PeerMessage::Drop { key, object },
                    None => PeerMessage::Delete { key },
                };
                self.ask_peer(link, message, Pending::Delete { operation });
            }
            (Keeper::Awaited | Keeper::Unreachable, _) => {
                let why = self.no_directory(&format!("delete {key:?}"));
                self.delete_lost(operation, why);
            }
        }
    }

    /// There is a directory again.
    pub(super) fn deletes_again(&mut self) {
        let waiting = |(operation, delete): (&u64, &mut Delete)| {
            std::mem::take(&mut delete.waits).then_some(*operation)
        };
        let again: Vec<u64> = self.deletes.iter_mut().filter_map(waiting).collect();
        for operation in again {
            self.delete_begins(operation);
        }
    }

    /// A client has left: what it wanted deleted and nobody was asked to yet stays.
    pub(super) fn forget_deletes_of(&mut self, gone: ClientId) {
        let of_it = |delete: &Delete| {
            delete.waits && matches!(delete.asker, Asker::Client { client, .. } if client == gone)
        };
        for (operation, delete) in self.deletes.extract_if(.., |_, delete| of_it(delete)) {
            self.timers.unset(delete.deadline, Timer::Operation(operation));
        }
    }

    /// This node hands the directory over before it has asked everyone.
    pub(super) fn delete_unasked(&mut self, operation: u64, why: StoreError) {
        self.delete_lost(operation, why);
    }

    /// A node was asked, and holds this object.
    pub(super) fn delete_found(&mut self, operation: u64, object: Option<ObjectId>) {
        if let Some(delete) = self.deletes.get_mut(&operation) {
            delete.found.extend(object);
        }
    }

    /// Everything that the directory knows under the key goes, wherever it is. Everyone is told, not only holders:
    /// a copy may be on its way to a node that does not hold it yet.
    pub(super) fn delete_from_holders(&mut self, operation: u64) {
        let Some(delete) = self.deletes.get(&operation) else {
            return;
        };
        let (key, only) = (delete.key.clone(), delete.only);
        let Some(directory) = &mut self.directory else {
            return;
        };
        let holders: Vec<(NodeId, ObjectId)> =
            directory.holders(&key).filter(|(_, object)| only.is_none_or(|only| only == *object)).collect();
        let mut objects: BTreeSet<ObjectId> = holders.iter().map(|(_, object)| *object).collect();
        objects.extend(only);
        objects.extend(&delete.found);
        for object in &objects {
            directory.deleted(*object);
            self.deleted.insert(*object);
        }
        for (node, object) in &holders {
            directory.withdraw(*node, &key, *object);
        }
        let links: Vec<LinkId> = self.peers.values().filter_map(|peer| peer.link).collect();
        for &object in &objects {
            self.drop_local(&key, Some(object));
            for &link in &links {
                let key = key.clone();
                self.ask_peer(link, PeerMessage::Drop { key, object }, Pending::Drop { operation });
            }
        }
        let left = links.len() * objects.len();
        if let Some(delete) = self.deletes.get_mut(&operation) {
            delete.existed = !holders.is_empty() || !delete.found.is_empty();
            delete.left = left;
        }
        if left == 0 {
            self.finish_delete(operation, Ok(()));
        }
    }

    /// Drops this node's object of a key; only that one object if one is named.
    pub(super) fn drop_local(&mut self, key: &Key, object: Option<ObjectId>) -> bool {
        self.locations.forget_object(key, object);
        let Some((generation, there)) = self.objects.sealed(key) else {
            return false;
        };
        if object.is_some_and(|object| object != there.id) {
            return false;
        }
        self.withdraw(generation);
        true
    }

    /// A node, or the directory, has done its part.
    pub(super) fn dropped(&mut self, operation: u64, existed: bool) {
        let Some(delete) = self.deletes.get_mut(&operation) else {
            return;
        };
        delete.existed |= existed;
        delete.left = delete.left.saturating_sub(1);
        if delete.left == 0 {
            self.finish_delete(operation, Ok(()));
        }
    }

    fn finish_delete(&mut self, operation: u64, result: Result<(), StoreError>) {
        let Some(delete) = self.deletes.remove(&operation) else {
            return;
        };
        self.timers.unset(delete.deadline, Timer::Operation(operation));
        let existed = delete.existed;
        match (delete.asker, result) {
            (Asker::Client { client, request }, result) => {
                self.reply(client, request, result.map(|()| ClientReply::Deleted { existed }));
            }
            (Asker::Peer { link, request }, Ok(())) => {
                self.answer_peer(link, request, PeerMessage::Dropped { existed });
            }
            (Asker::Peer { link, request }, Err(error)) => {
                self.answer_peer(link, request, PeerMessage::Failed { error });
            }
            (Asker::Nobody, Ok(())) => {}
            (Asker::Nobody, Err(_)) => {
                // What is here goes; other copies go by eviction, or when their nodes start again.
                self.drop_local(&delete.key, delete.only);
            }
        }
    }

    /// The directory could not be asked, or went away before it answered. The next one is asked again; a peer does so
    /// itself, and what has lived its time goes here at once.
    pub(super) fn delete_lost(&mut self, operation: u64, why: StoreError) {
        let again = self.may_ask_again(&why);
        let Some(delete) = self.deletes.get_mut(&operation) else {
            return;
        };
        let until = delete.begun.after_ms(self.config.await_ms());
        if again && self.now < until && !matches!(delete.asker, Asker::Peer { .. }) {
            delete.waits = true;
            if let (Asker::Nobody, key, only) = (&delete.asker, delete.key.clone(), delete.only) {
                self.drop_local(&key, only);
            }
            return self.set_delete_deadline(operation, until);
        }
        self.finish_delete(operation, Err(why));
    }

    pub(super) fn delete_deadline(&mut self, operation: u64) {
        if let Some(delete) = self.deletes.get(&operation).filter(|delete| delete.deadline <= self.now) {
            let error = if delete.waits {
                self.no_directory(&format!("delete {:?}", delete.key))
            } else {
                StoreError::timed_out("delete", &delete.key, DELETE_MS)
            };
            self.finish_delete(operation, Err(error));
        }
    }
}
