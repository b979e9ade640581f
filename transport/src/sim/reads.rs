//! Simulated one-sided reads. Not frames (`links`). Invariant: pieces of a read are taken and land at times of their
//! own, in any order, between the request and its end; after the event that ends it, none lands.

use hetmem_core::{Extent, LinkId, RemoteExtent, SegmentId, StoreError, TransferId};

use super::links::End;
use super::net::{Event, Net};
use crate::fabric::{FabricEvent, ReadStats};
use crate::region::Piece;

/// A read in progress.
pub(super) struct Read {
    pub(super) node: usize,
    pub(super) end: LinkId,
    transfer: TransferId,
    remote: RemoteExtent,
    local: Piece,
    /// What the owner reads from, once it has checked the request.
    source: Option<Piece>,
    /// Bytes that have not landed.
    left: usize,
    pieces: u32,
    /// Whether its end is in the queue.
    ending: bool,
}

impl Net {
    pub(super) fn read(
        &mut self,
        node: usize,
        link: LinkId,
        transfer: TransferId,
        remote: RemoteExtent,
        local: Extent,
    ) -> Result<(), StoreError> {
        if remote.len_bytes != local.len_bytes {
            let why = format!("{} remote bytes into {} local bytes", remote.len_bytes, local.len_bytes);
            return Err(StoreError::invalid("read", why));
        }
        let local = self.nodes[node].regions.local("read", local)?;
        let delay_ns = self.own_end("read", node, link)?.delay_ns;
        if self.find(node, transfer).is_some() {
            return Err(StoreError::invalid("read", format!("transfer {transfer} is in progress")));
        }
        let left = local.len();
        let read =
            Read { node, end: link, transfer, remote, local, source: None, left, pieces: 0, ending: false };
        let number = self.number();
        self.reads.insert(number, read);
        let delay = delay_ns + self.jitter();
        self.after(delay, Event::Serve { read: number });
        Ok(())
    }

    fn find(&self, node: usize, transfer: TransferId) -> Option<u64> {
        let mine = |read: &Read| read.node == node && read.transfer == transfer;
        self.reads.iter().find(|(_, read)| mine(read)).map(|(number, _)| *number)
    }

    pub(super) fn cancel(&mut self, node: usize, transfer: TransferId) {
        if let Some(number) = self.find(node, transfer) {
            let error = StoreError::stale("read", format!("transfer {transfer}"), "it was cancelled");
            let after = self.jitter();
            self.end_read(number, after, Err(error));
        }
    }

    pub(super) fn fail_reads_into(&mut self, node: usize, segment: SegmentId) {
        let into = |read: &Read| read.node == node && read.local.segment() == segment;
        let numbers: Vec<u64> =
            self.reads.iter().filter(|(_, read)| into(read)).map(|(number, _)| *number).collect();
        for number in numbers {
            let why = format!("local segment {segment} was deregistered");
            let subject = format!("transfer {}", self.reads[&number].transfer);
            let after = self.jitter();
            self.end_read(number, after, Err(StoreError::stale("read", subject, why)));
        }
    }

    /// The link of these reads is gone: they are over now.
    pub(super) fn fail_reads_of(&mut self, end: LinkId, why: &StoreError) {
        let numbers: Vec<u64> =
            self.reads.iter().filter(|(_, read)| read.end == end).map(|(number, _)| *number).collect();
        for number in numbers {
            if let Some(read) = self.reads.remove(&number) {
                let result = Err(StoreError::PeerLost {
                    operation: "read".into(),
                    subject: format!("transfer {}", read.transfer),
                    peer: format!("link {end}"),
                    why: why.to_string().into(),
                });
                self.reports
                    .push_back((read.node, FabricEvent::ReadDone { transfer: read.transfer, result }));
            }
        }
    }

    /// The first end counts.
    fn end_read(&mut self, number: u64, after_ns: u64, result: Result<(), StoreError>) {
        if let Some(read) = self.reads.get_mut(&number)
            && !read.ending
        {
            read.ending = true;
            self.after(after_ns, Event::Done { read: number, result });
        }
    }

    pub(super) fn serve(&mut self, number: u64) {
        let Some(read) = self.reads.get(&number) else {
            return;
        };
        let (remote, len) = (read.remote, read.local.len());
        // A peer that is gone does not answer; the end of the link will end the read.
        let Some(end) = self.ends.get(&read.end) else {
            return;
        };
        let (delay_ns, peer) = (end.delay_ns, self.owner_of(end));
        let Some(peer) = peer else {
            return;
        };
        let source = match self.nodes[peer].regions.remote(remote) {
            Ok(piece) => piece,
            Err(error) => {
                let after = delay_ns + self.jitter();
                self.end_read(number, after, Err(error));
                return;
            }
        };
        let ends = if source.is_word() { vec![len] } else { self.tear(len) };
        let mut from = 0;
        for upto in ends.iter().copied() {
            let after = self.jitter();
            self.after(after, Event::Fetch { read: number, from, upto });
            from = upto;
        }
        if let Some(read) = self.reads.get_mut(&number) {
            read.source = Some(source);
            read.pieces = u32::try_from(ends.len()).unwrap_or(u32::MAX);
        }
    }

    pub(super) fn fetch(&mut self, number: u64, from: usize, upto: usize) {
        let Some(read) = self.reads.get(&number) else {
            return;
        };
        let Some(source) = &read.source else {
            return;
        };
        if self.ends.get(&read.end).and_then(|end| self.owner_of(end)).is_none() {
            return;
        }
        let bytes =
            if source.is_word() { source.word().map(Vec::from) } else { source.copy_out(from, upto - from) };
        let delay_ns = self.ends.get(&read.end).map_or(0, |end| end.delay_ns);
        let delay = delay_ns + self.jitter();
        match bytes {
            Some(bytes) => self.after(delay, Event::Put { read: number, from, bytes }),
            None => {
                let why = "the owner deregistered the segment while it was read";
                let subject = format!("remote key {:016x}", self.reads[&number].remote.key.0);
                self.end_read(number, delay, Err(StoreError::stale("read", subject, why)));
            }
        }
    }

    /// The node that serves reads through this end: none once its own end is down, since from then on it takes the
    /// peer's leases to have ended.
    fn owner_of(&self, end: &End) -> Option<usize> {
        let other = self.ends.get(&end.peer?)?;
        Some(other.node).filter(|node| self.is_alive(*node))
    }

    pub(super) fn put(&mut self, number: u64, from: usize, bytes: &[u8]) {
        let Some(read) = self.reads.get_mut(&number) else {
            return;
        };
        if !read.local.copy_in(from, bytes) {
            return;
        }
        read.left -= bytes.len();
        if read.left == 0 {
            let late = self.lateness();
            self.end_read(number, late, Ok(()));
        }
    }

    pub(super) fn done(&mut self, number: u64, result: Result<(), StoreError>) {
        if let Some(read) = self.reads.remove(&number) {
            let stats = ReadStats {
                bytes: read.local.len() as u64,
                staged_bytes: 0,
                slices: read.pieces,
                reissued: 0,
            };
            let event = FabricEvent::ReadDone { transfer: read.transfer, result: result.map(|()| stats) };
            self.reports.push_back((read.node, event));
        }
    }
}
