//! From the fabric to the engine: messages, completions, losses. Not their meaning. Invariant: what does not decode
//! is reported as refused and never reaches the engine as a message.

use std::sync::{Arc, OnceLock, Weak};

use hetmem_core::engine::{FabricId, Input, ReadEnd};
use hetmem_core::receipt::Moved;
use hetmem_core::wire::{Batch, FrameHeader, FrameKind, PeerMessage, decode};
use hetmem_core::{LandingId, LinkId, StoreError};
use hetmem_transport::{FabricEvent, FabricSink, Landing, LandingToken, ReadStats};

use crate::driver::Driver;
use crate::inprocess::in_sink;
use crate::outbox::connect_error;

/// The only fabric of this release.
pub(crate) const TCP: FabricId = FabricId(0);

/// Receives before the driver exists: the fabric's address is part of what the driver is made of.
#[derive(Default)]
pub(crate) struct Sink {
    driver: OnceLock<Weak<Driver>>,
}

impl Sink {
    pub(crate) fn connect_to(&self, driver: &Arc<Driver>) {
        let _ = self.driver.set(Arc::downgrade(driver));
    }

    /// There will be no driver: threads that wait for it go on.
    pub(crate) fn close(&self) {
        let _ = self.driver.set(Weak::new());
    }

    /// Waits for the driver; none once the node has stopped.
    fn driver(&self) -> Option<Arc<Driver>> {
        self.driver.wait().upgrade()
    }
}

impl FabricSink for Sink {
    fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
        let Some(driver) = self.driver() else { return Landing::Discard };
        let _in_sink = in_sink();
        let FrameHeader { kind, request, payload_len, .. } = header;
        let input = match kind {
            FrameKind::Peer => decode(body).map(|message: PeerMessage| Input::PeerMessage {
                link,
                request,
                message,
                payload_len,
            }),
            FrameKind::Batch => {
                decode(body).map(|batch: Batch| Input::PeerBatch { link, batch, payload_len })
            }
            kind => Err(StoreError::protocol(format!("a {kind:?} frame came from a peer"))),
        };
        match driver.feed_landing(input.unwrap_or_else(|why| Input::Refused { link, why })) {
            Some((landing, places)) => Landing::scattered(LandingToken(landing.0), payload_len, places),
            None => Landing::Discard,
        }
    }

    fn event(&self, event: FabricEvent) {
        let Some(driver) = self.driver() else { return };
        let _in_sink = in_sink();
        let input = match event {
            FabricEvent::LinkUp { link, address, inbound } => {
                driver.outbox.is_up(link);
                Input::LinkUp { link, fabric: TCP, address, inbound }
            }
            FabricEvent::LinkDown { link, why } => match driver.outbox.never_up(link) {
                Some(address) => {
                    let why = connect_error(&address, &why);
                    Input::ConnectFailed { address, why }
                }
                None => {
                    driver.forget_deferred(link);
                    Input::LinkDown { link, why }
                }
            },
            FabricEvent::ReadDone { transfer, result } => {
                Input::ReadDone { transfer, result: result.map(end_of_read) }
            }
            FabricEvent::SendDone { token, .. } => Input::SendDone { send: token.0 },
            FabricEvent::Landed { token, result, .. } => {
                let result = result.map(|s| Moved { bytes: s.bytes, staged_bytes: s.staged_bytes });
                Input::Landed { landing: LandingId(token.0), result }
            }
        };
        driver.feed(input);
    }
}

fn end_of_read(stats: ReadStats) -> ReadEnd {
    let ReadStats { bytes, staged_bytes, word, round_trips, .. } = stats;
    ReadEnd { moved: Moved { bytes, staged_bytes }, word, round_trips }
}
