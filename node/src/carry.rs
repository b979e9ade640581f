//! What is carried out after the engine's lock is released: answers to clients, and the log. Not the fabric
//! (`outbox`). Invariant: a client that cannot be answered is closed; nobody waits for it.

use hetmem_core::StoreError;
use hetmem_core::engine::Event;
use hetmem_core::wire::LocatedMany;

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
            Later::Note(event) => note(&event),
        }
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
