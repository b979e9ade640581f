//! Waiting for objects to exist, for this node's clients and for peers. Not the directory itself. Invariant: whoever
//! waits is told once: by the object, or by the deadline.

use super::Engine;
use super::fetch::{Scope, Want};
use super::local::Caller;
use super::timer::{Time, Timer};
use crate::error::StoreError;
use crate::key::Key;
use crate::tier::{ClientId, NodeId};
use crate::wire::{ClientReply, PeerMessage};

/// How long it is tried to find out whether an object exists now, in milliseconds.
const EXISTS_MS: u64 = 5_000;

/// Someone who waits for an object to exist.
#[derive(Debug)]
pub(super) struct WaitingKey {
    pub(super) who: Waiter,
    pub(super) deadline: Time,
    pub(super) timeout_ms: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Client { client: ClientId, request: u64 },
    Peer { node: NodeId },
}

impl Engine {
    pub(super) fn forget_waits_of(&mut self, client: ClientId) {
        self.forget_waiters(|who| matches!(who, Waiter::Client { client: of, .. } if *of == client));
    }

    pub(super) fn forget_watches_of(&mut self, node: NodeId) {
        self.forget_waiters(|who| matches!(who, Waiter::Peer { node: of } if *of == node));
    }

    /// Peers ask the next directory.
    pub(super) fn forget_watches(&mut self) {
        self.forget_waiters(|who| matches!(who, Waiter::Peer { .. }));
    }

    fn forget_waiters(&mut self, gone: impl Fn(&Waiter) -> bool) {
        for waiting in self.waiting_keys.values_mut() {
            waiting.retain(|waiting| !gone(&waiting.who));
        }
        self.waiting_keys.retain(|_, waiting| !waiting.is_empty());
    }

    pub(super) fn wait(&mut self, client: ClientId, request: u64, key: Key, timeout_ms: u64) {
        if self.objects.sealed(&key).is_some() {
            return self.reply(client, request, Ok(ClientReply::Exists));
        }
        if timeout_ms == 0 {
            let scope = Scope { range: None, want: Want::Existence, threshold_bytes: None };
            let timeout_ms = if self.keeping.has_successors() { self.config.await_ms() } else { EXISTS_MS };
            return self.fetch(Caller::of(client, request), key, scope, timeout_ms);
        }
        if self.known_elsewhere(&key) {
            return self.reply(client, request, Ok(ClientReply::Exists));
        }
        if let Some(link) = self.directory_link {
            self.tell_peer(link, PeerMessage::Watch { key: key.clone() });
        }
        let deadline = self.now.after_ms(timeout_ms);
        self.timers.set(deadline, Timer::Wait);
        let who = Waiter::Client { client, request };
        self.waiting_keys.entry(key).or_default().push(WaitingKey { who, deadline, timeout_ms });
    }

    /// Answers everyone who waits for this key.
    pub(super) fn key_exists(&mut self, key: &Key) {
        let Some(waiting) = self.waiting_keys.remove(key) else {
            return;
        };
        for waiting in waiting {
            match waiting.who {
                Waiter::Client { client, request } => self.reply(client, request, Ok(ClientReply::Exists)),
                Waiter::Peer { node } => self.tell_exists(node, key),
            }
        }
    }

    pub(super) fn wait_deadlines(&mut self) {
        let now = self.now;
        let mut late = Vec::new();
        for (key, waiting) in &mut self.waiting_keys {
            waiting.retain(|w| {
                if w.deadline > now {
                    return true;
                }
                if let Waiter::Client { client, request } = w.who {
                    late.push((client, request, StoreError::timed_out("wait", key, w.timeout_ms)));
                }
                false
            });
        }
        self.waiting_keys.retain(|_, waiting| !waiting.is_empty());
        for (client, request, error) in late {
            self.reply(client, request, Err(error));
        }
    }
}
