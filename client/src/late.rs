//! What becomes of an answer whose asker timed out. Not the waiting. Invariant: nothing that the node holds for
//! this client (a pin, a reservation, a granted segment) is forgotten because a caller has gone.

use std::sync::Weak;

use hetmem_core::Tier;
use hetmem_core::wire::{ClientMessage, ClientReply};
use hetmem_host_mem::Answer;

use crate::session::LateHook;
use crate::shared::Shared;

/// The hook for a store's session. Weak: the session is part of the store.
pub(crate) fn hook(shared: Weak<Shared>) -> LateHook {
    Box::new(move |answer| {
        if let Some(shared) = shared.upgrade() {
            take_back(&shared, answer);
        }
    })
}

fn take_back(shared: &Shared, mut answer: Answer) {
    match answer.reply {
        ClientReply::Located(located) => shared.page.unpin(located.pin),
        ClientReply::LocatedMany(many) => {
            many.items.iter().flatten().for_each(|item| shared.page.unpin(item.located.pin));
        }
        ClientReply::Reserved { reservation, extent, tier, map } => {
            // The descriptor of a granted segment comes once: without it the segment could never be used.
            if let (Some(len_bytes), Some(fd)) = (map, answer.descriptors.pop()) {
                match tier {
                    Tier::Host => shared.grants.add(extent.segment, fd, len_bytes),
                    Tier::Gpu(_) => shared.gpu.add(extent.segment, tier, &fd, len_bytes),
                }
            }
            shared.tell(&ClientMessage::Abort { reservation });
        }
        // Whatever else came late holds nothing but descriptors, which close here.
        _ => {}
    }
}
