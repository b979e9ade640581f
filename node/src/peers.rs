//! From the fabric to the engine: messages, completions, losses. Not their meaning. Invariant: what does not decode
//! is reported as refused and never reaches the engine as a message.

use std::sync::{Arc, OnceLock, Weak};

use hetmem_core::engine::{Input, ReadEnd};
use hetmem_core::receipt::Moved;
use hetmem_core::wire::{Batch, FrameHeader, FrameKind, PeerMessage, decode};
use hetmem_core::{LandingId, LinkId, StoreError};
use hetmem_transport::{FabricEvent, FabricKind, FabricSink, Landing, LandingToken, ReadStats};

use crate::driver::Driver;
use crate::fabrics::id_of;
use crate::inprocess::in_sink;
use crate::outbox::connect_error;

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

    /// What one fabric tells.
    pub(crate) fn of(self: &Arc<Self>, kind: FabricKind) -> Arc<dyn FabricSink> {
        Arc::new(SinkOf { sink: Arc::clone(self), kind })
    }
}

struct SinkOf {
    sink: Arc<Sink>,
    kind: FabricKind,
}

impl FabricSink for SinkOf {
    fn message(&self, link: LinkId, header: FrameHeader, body: &[u8]) -> Landing {
        let Some(driver) = self.sink.driver() else { return Landing::Discard };
        let _in_sink = in_sink(self.kind);
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
        let Some(driver) = self.sink.driver() else { return };
        let _in_sink = in_sink(self.kind);
        let input = match event {
            FabricEvent::LinkUp { link, address, inbound } => {
                // The engine knows what it dialled by its own name.
                let address = driver.outbox.no_longer_dialled(link).unwrap_or(address);
                Input::LinkUp { link, fabric: id_of(link), address, inbound }
            }
            FabricEvent::LinkDown { link, why } => match driver.outbox.no_longer_dialled(link) {
                Some(address) if driver.dial_otherwise(link, &address, &why) => return,
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
                let flush = |gpu| driver.tiers.device(gpu).and_then(|device| device.flush_writes());
                let result = driver.visibility.end(transfer, result, flush);
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
    let ReadStats { bytes, staged_bytes, word, round_trips, pushed, .. } = stats;
    ReadEnd { moved: Moved { bytes, staged_bytes }, word, round_trips, pushed }
}
