//! What a link does about its reads: begins them, cancels them, opens data streams for them, tells the sink of their
//! end. The books are in `reads`. Invariant: nothing here calls the sink but `report_finished`, which is called within
//! a turn or from a task, never by a caller of the fabric.

use std::sync::Arc;

use hetmem_core::{RemoteExtent, StoreError, TransferId};

use super::link::Link;
use super::reads::{Finished, Next};
use super::shared::{Shared, Task};
use super::stream::ReadStream;
use crate::fabric::FabricEvent;
use crate::region::Piece;

impl Link {
    /// See `Fabric::read`.
    pub(super) fn read(
        self: &Arc<Self>,
        shared: &Shared,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Piece)>,
        word: Option<RemoteExtent>,
    ) -> Result<(), StoreError> {
        if !self.is_up() {
            return Err(self.lost("read"));
        }
        self.reads.lock().begin(transfer, bytes, word)?;
        self.push_reads(shared);
        Ok(())
    }

    /// See `Fabric::cancel`.
    pub(super) fn cancel(self: &Arc<Self>, shared: &Shared, transfer: TransferId, why: &StoreError) {
        let mut next = Next::default();
        let streams = self.reads.lock().cancel(transfer, why.clone(), &mut next);
        for stream in streams {
            stream.cut(shared, why);
        }
        self.go_on(shared, next);
    }

    /// Opens the data streams that are worth it and asks for as much as they may carry. Calls nobody.
    pub(super) fn push_reads(self: &Arc<Self>, shared: &Shared) {
        let (slice_bytes, streams) = (shared.config.slice_bytes, shared.config.streams);
        let mut next = Next::default();
        {
            let mut reads = self.reads.lock();
            if let Some((address, token)) = reads.peer() {
                for _ in 0..reads.streams_wanted(slice_bytes, streams) {
                    match ReadStream::open(shared, self, address, token) {
                        Ok(stream) => reads.add_stream(stream),
                        Err(why) => reads.no_stream(&why, &mut next),
                    }
                }
                reads.assign(slice_bytes, &mut next);
            }
        }
        self.go_on(shared, next);
    }

    fn go_on(self: &Arc<Self>, shared: &Shared, next: Next) {
        for stream in &next.flush {
            stream.flush(shared);
        }
        for finished in next.finished {
            shared.later(Task::Finish(Arc::clone(self), finished));
        }
    }

    /// Tells the sink about reads that are over, and about the end of the link if it waited for them.
    pub(super) fn report_finished(self: &Arc<Self>, shared: &Shared, finished: Vec<Finished>) {
        for finished in finished {
            shared.transfers.lock().remove(&finished.transfer);
            let (transfer, result) = (finished.transfer, finished.result);
            shared.report(FabricEvent::ReadDone { transfer, result });
            self.reads.lock().reported();
        }
        if self.reads.lock().is_last_word() {
            shared.report(FabricEvent::LinkDown { link: self.id, why: self.why() });
        }
    }
}
