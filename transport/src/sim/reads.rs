//! Simulated one-sided reads. Not frames (`links`). Invariant: pieces of a read are taken and land at times of their
//! own, in any order, between the request and its end; after the event that ends it, none lands.

use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};

use super::links::End;
use super::net::{Event, Net};
use crate::fabric::{FabricEvent, ReadStats, check_lengths};
use crate::region::Piece;

/// A read in progress.
pub(super) struct Read {
    pub(super) node: usize,
    pub(super) end: LinkId,
    transfer: TransferId,
    remote: RemoteExtent,
    /// None if only a word is read.
    local: Option<Piece>,
    /// What the owner reads from, once it has checked the request.
    source: Option<Piece>,
    word: Option<RemoteExtent>,
    word_read: Option<u64>,
    /// Bytes that were not taken out of the owner's memory.
    unfetched: usize,
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
        bytes: Option<(RemoteExtent, Extent)>,
        word: Option<RemoteExtent>,
    ) -> Result<(), StoreError> {
        let nowhere = RemoteExtent { key: RemoteKey(0), offset: 0, len_bytes: 0 };
        let (remote, local) = match bytes {
            Some((remote, local)) => {
                check_lengths(remote, local)?;
                (remote, Some(self.nodes[node].regions.local("read", local)?))
            }
            None => (nowhere, None),
        };
        let delay_ns = self.own_end("read", node, link)?.delay_ns;
        if self.find(node, transfer).is_some() {
            return Err(StoreError::invalid("read", format!("transfer {transfer} is in progress")));
        }
        let read = Read {
            node,
            end: link,
            transfer,
            remote,
            unfetched: local.as_ref().map_or(0, Piece::len),
            left: local.as_ref().map_or(0, Piece::len),
            local,
            source: None,
            word,
            word_read: None,
            pieces: 0,
            ending: false,
        };
        let number = self.number();
        let wordless = read.word.is_none() || read.local.is_some();
        self.reads.insert(number, read);
        let delay = delay_ns + self.jitter();
        let first = if wordless { Event::Serve { read: number } } else { Event::FetchWord { read: number } };
        self.after(delay, first);
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
        let into = |read: &Read| {
            read.node == node && read.local.as_ref().is_some_and(|local| local.segment() == segment)
        };
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
        let (remote, len) = (read.remote, read.local.as_ref().map_or(0, Piece::len));
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
            Some(bytes) => {
                self.after(delay, Event::Put { read: number, from, bytes });
                self.fetched(number, upto - from);
            }
            None => {
                let why = "the owner deregistered the segment while it was read";
                let subject = format!("remote key {:016x}", self.reads[&number].remote.key.0);
                self.end_read(number, delay, Err(StoreError::stale("read", subject, why)));
            }
        }
    }

    /// The word is read as early as it may be: right after the last of the other bytes, wherever these are by then.
    fn fetched(&mut self, number: u64, len: usize) {
        let Some(read) = self.reads.get_mut(&number) else {
            return;
        };
        read.unfetched -= len;
        if read.unfetched == 0 && read.word.is_some() {
            let after = self.jitter();
            self.after(after, Event::FetchWord { read: number });
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
        if !read.local.as_ref().is_some_and(|local| local.copy_in(from, bytes)) {
            return;
        }
        read.left -= bytes.len();
        if read.left == 0 && (read.word.is_none() || read.word_read.is_some()) {
            let late = self.lateness();
            self.end_read(number, late, Ok(()));
        }
    }

    pub(super) fn fetch_word(&mut self, number: u64) {
        let Some((end, word)) = self.reads.get(&number).and_then(|read| Some((read.end, read.word?))) else {
            return;
        };
        let Some((delay_ns, peer)) =
            self.ends.get(&end).and_then(|end| Some((end.delay_ns, self.owner_of(end)?)))
        else {
            return;
        };
        let after = delay_ns + self.jitter() + self.lateness();
        let piece = self.nodes[peer].regions.remote(word);
        let loaded = piece.and_then(|piece| {
            let bytes = if piece.is_word() { piece.word() } else { None };
            bytes.ok_or_else(|| StoreError::stale("read", "a word", "it is none, or its region is gone"))
        });
        let Some(read) = self.reads.get_mut(&number) else {
            return;
        };
        match loaded {
            Ok(bytes) => {
                read.word_read = Some(u64::from_le_bytes(bytes));
                if read.left == 0 {
                    self.end_read(number, after, Ok(()));
                }
            }
            Err(why) => self.end_read(number, after, Err(why)),
        }
    }

    pub(super) fn done(&mut self, number: u64, result: Result<(), StoreError>) {
        if let Some(read) = self.reads.remove(&number) {
            let stats = ReadStats {
                bytes: read.local.as_ref().map_or(0, Piece::len) as u64,
                staged_bytes: 0,
                slices: read.pieces,
                reissued: 0,
                word: read.word_read,
                round_trips: 1 + u32::from(read.word_read.is_some() && read.local.is_some()),
                pushed: false,
            };
            let event = FabricEvent::ReadDone { transfer: read.transfer, result: result.map(|()| stats) };
            self.reports.push_back((read.node, event));
        }
    }
}
