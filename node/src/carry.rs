//! What is carried out after the engine's lock is released: answers to clients, and the log. Not the fabric
//! (`outbox`). Invariant: a client that cannot be answered is closed; nobody waits for it.

use std::sync::Weak;

use hetmem_core::engine::{Event, Input};
use hetmem_core::wire::LocatedMany;
use hetmem_core::{Generation, StoreError};
use hetmem_gpu_mem::{Copied, Done, Span};

use crate::driver::{Driver, Later};

impl Driver {
    pub(crate) fn carry_out(&self, later: Later) {
        match later {
            Later::Reply { client, request, reply, descriptors } => {
                self.clients.reply(self, client, request, reply, &descriptors);
            }
            Later::ReplyItems { client, request, items } => {
                let missing = || Err(StoreError::protocol("the node has no answer for this key"));
                let located = items.into_iter().map(|item| item.unwrap_or_else(missing));
                self.clients.reply_many(self, client, request, LocatedMany::of(located));
            }
            Later::Close { client, why } => {
                self.refuse();
                tracing::warn!(%client, error = %why, "a client is closed");
                self.clients.close(client);
            }
            Later::Copy { generation, from, to } => self.copy([(generation, from, to)]),
            Later::Note(event) => note(&event),
        }
    }

    /// Has GPUs copy, all that one pass wants at once. What they report comes from threads of their own.
    pub(crate) fn copy(&self, copies: impl IntoIterator<Item = (Generation, Span, Span)>) {
        let mut copies = copies.into_iter().peekable();
        if copies.peek().is_none() {
            return;
        }
        let Some(copier) = self.tiers.copier() else {
            for (generation, ..) in copies {
                let result = Err(StoreError::unavailable("a copy", "this node has no GPU"));
                self.feed(Input::CopyDone { generation, result });
            }
            return;
        };
        copier.submit_many(copies.map(|(generation, from, to)| {
            let driver = Weak::clone(&self.own);
            let done = move |result: Result<Copied, StoreError>| {
                if let Some(driver) = driver.upgrade() {
                    driver.feed(Input::CopyDone { generation, result: result.map(|_| ()) });
                }
            };
            (from, to, Box::new(done) as Done)
        }));
    }

    pub(crate) fn refuse(&self) {
        self.refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

fn note(event: &Event) {
    match event {
        Event::PeerUp { node, name, address } => tracing::info!(%node, name, address, "a peer is there"),
        Event::PeerDown { node, name, why } => tracing::warn!(%node, name, why, "a peer is gone"),
        Event::DirectoryLost { why } => {
            tracing::warn!(why, "the node that keeps the directory is gone; it is being dialled");
        }
        Event::DirectoryFound => tracing::info!("linked to the node that keeps the directory"),
        Event::DirectoryTaken => tracing::info!("this node keeps the directory from now on"),
        Event::DirectoryHandedOver { to } => tracing::info!(to, "the directory is handed over"),
        Event::UnderReplicated { objects } => {
            tracing::warn!(
                objects,
                "objects are on fewer nodes than they are to be: they are replicated again"
            );
        }
        Event::Healed => tracing::info!("every object is on as many nodes as it is to be"),
        Event::Evicted { objects, len_bytes } => tracing::debug!(objects, len_bytes, "evicted"),
        Event::ClientLeft { client, reservations } => tracing::debug!(%client, reservations, "a client left"),
        Event::PeerRefused { link, why } => tracing::warn!(%link, why, "a peer's link is refused"),
        Event::SegmentFailed { segment, why } => tracing::warn!(%segment, why, "a segment could not be made"),
        Event::SegmentGranted { segment, client, len_bytes } => {
            tracing::debug!(%segment, %client, len_bytes, "a segment is granted");
        }
        Event::SegmentRetired { segment, len_bytes } => {
            tracing::debug!(%segment, len_bytes, "a segment is retired");
        }
    }
}
