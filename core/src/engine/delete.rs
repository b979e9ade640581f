//! Deleting an object on every node. Not eviction, which only drops one node's copy. Invariant: the answer comes
//! after every holder that lives has dropped the object.

use super::Engine;
use super::cluster::{AskFor, Pending};
use super::timer::Timer;
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, LinkId, ObjectId};
use crate::wire::{ClientReply, PeerMessage};

/// How long holders may take, in milliseconds; one that does not answer is as good as lost.
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
    asker: Asker,
    existed: bool,
    left: usize,
}

impl Engine {
    pub(super) fn delete_request(&mut self, client: ClientId, request: u64, key: Key) {
        self.delete_everywhere(key, Some((client, request)));
    }

    pub(super) fn delete_everywhere(&mut self, key: Key, client: Option<(ClientId, u64)>) {
        let asker = match client {
            Some((client, request)) => Asker::Client { client, request },
            None => Asker::Nobody,
        };
        if self.directory.is_some() {
            return self.delete_as_directory(key, asker);
        }
        let operation = self.begin_delete(key.clone(), asker);
        match self.directory_link {
            Some(link) => {
                // The directory tells every holder, this node included, before it answers.
                self.ask_peer(link, PeerMessage::Delete { key }, Pending::Delete { operation });
            }
            None => {
                let why = format!(
                    "delete {key:?}: there is no link to the node that keeps it; it is being dialled"
                );
                self.delete_lost(operation, StoreError::unavailable("the directory", why));
            }
        }
    }

    pub(super) fn delete_for_peer(&mut self, link: LinkId, request: u64, key: Key) {
        if self.directory.is_none() {
            let error = StoreError::unavailable("the directory", "this node does not keep it");
            return self.answer_peer(link, request, PeerMessage::Failed { error });
        }
        self.delete_as_directory(key, Asker::Peer { link, request });
    }

    fn begin_delete(&mut self, key: Key, asker: Asker) -> u64 {
        let operation = self.next_operation;
        self.next_operation += 1;
        self.deletes.insert(
            operation,
            Delete {
                key,
                asker,
                existed: false,
                left: 1,
            },
        );
        self.timers
            .set(self.now.after_ms(DELETE_MS), Timer::Operation(operation));
        operation
    }

    fn delete_as_directory(&mut self, key: Key, asker: Asker) {
        let own = self.config.member.node;
        let known = self
            .directory
            .as_ref()
            .is_some_and(|directory| directory.holders(&key).next().is_some());
        let operation = self.begin_delete(key.clone(), asker);
        if known || self.peers.values().all(|peer| peer.link.is_none()) {
            return self.delete_from_holders(operation);
        }
        debug_assert!(
            self.directory
                .as_ref()
                .is_none_or(|d| d.holders(&key).all(|(node, _)| node != own))
        );
        self.ask_everyone(key, AskFor::Delete(operation));
    }

    /// Everything that the directory knows under the key goes, wherever it is.
    pub(super) fn delete_from_holders(&mut self, operation: u64) {
        let Some(key) = self.deletes.get(&operation).map(|delete| delete.key.clone()) else {
            return;
        };
        let own = self.config.member.node;
        let Some(directory) = &mut self.directory else {
            return;
        };
        let holders: Vec<_> = directory.holders(&key).collect();
        for (node, object) in &holders {
            directory.deleted(*object);
            directory.withdraw(*node, &key, *object);
        }
        let mut left = 0;
        let existed = self.drop_local(&key, None) || !holders.is_empty();
        for (node, object) in holders.into_iter().filter(|(node, _)| *node != own) {
            if let Some(link) = self.link_to(node) {
                left += 1;
                let message = PeerMessage::Drop {
                    key: key.clone(),
                    object,
                };
                self.ask_peer(link, message, Pending::Drop { operation });
            }
        }
        if let Some(delete) = self.deletes.get_mut(&operation) {
            delete.existed = existed;
            delete.left = left;
        }
        if left == 0 {
            self.finish_delete(operation);
        }
    }

    /// Drops this node's object of a key; only that one object if one is named.
    pub(super) fn drop_local(&mut self, key: &Key, object: Option<ObjectId>) -> bool {
        let Some((generation, there)) = self.objects.sealed(key) else {
            return false;
        };
        if object.is_some_and(|object| object != there.id) {
            return false;
        }
        self.withdraw(generation);
        true
    }

    /// A holder, or the directory, has done its part.
    pub(super) fn dropped(&mut self, operation: u64, existed: bool) {
        let Some(delete) = self.deletes.get_mut(&operation) else {
            return;
        };
        delete.existed |= existed;
        delete.left = delete.left.saturating_sub(1);
        if delete.left == 0 {
            self.finish_delete(operation);
        }
    }

    fn finish_delete(&mut self, operation: u64) {
        let Some(delete) = self.deletes.remove(&operation) else {
            return;
        };
        let existed = delete.existed;
        match delete.asker {
            Asker::Client { client, request } => {
                self.reply(client, request, Ok(ClientReply::Deleted { existed }))
            }
            Asker::Peer { link, request } => {
                self.answer_peer(link, request, PeerMessage::Dropped { existed });
            }
            Asker::Nobody => {}
        }
    }

    /// The directory could not be asked, or went away before it answered.
    pub(super) fn delete_lost(&mut self, operation: u64, why: StoreError) {
        let Some(delete) = self.deletes.remove(&operation) else {
            return;
        };
        match delete.asker {
            Asker::Client { client, request } => self.reply(client, request, Err(why)),
            Asker::Peer { link, request } => {
                self.answer_peer(link, request, PeerMessage::Failed { error: why });
            }
            // What is here goes; other copies go by their own nodes' restart or eviction.
            Asker::Nobody => {
                self.drop_local(&delete.key, None);
            }
        }
    }

    pub(super) fn delete_deadline(&mut self, operation: u64) {
        let Some(delete) = self.deletes.get(&operation) else {
            return;
        };
        if self.directory.is_some() {
            return self.finish_delete(operation);
        }
        let error = StoreError::timed_out("delete", &delete.key, DELETE_MS);
        self.delete_lost(operation, error);
    }
}
