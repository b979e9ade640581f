//! The books of one link's reads on the asking side: which bytes are still to be asked for, which slices are under
//! way on which data stream, which transfers that completes. Not the sockets (`stream`). Invariant: every accepted
//! transfer is finished exactly once, and only when none of its slices is under way on any stream; a stream that
//! carries a slice of a cancelled transfer is lost first, so nothing can land afterwards. Slices of other transfers
//! on that stream are asked for again on another.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use hetmem_core::{RemoteExtent, SegmentId, StoreError, TransferId};

use super::stream::ReadStream;
use super::wire::{Request, StreamToken};
use crate::fabric::ReadStats;
use crate::region::Piece;

/// Slices under way on one stream, so that the owner never waits for a request while large reads last. A read of no more
/// slices than that keeps to one stream, where its word follows its bytes; a longer one is spread over all.
const WINDOW: usize = 4;
/// Reads up to this length go out at once on the emptiest stream, past those that wait, unless it has `QUEUE_MAX`.
const SMALL_LEN: usize = 64 << 10;
/// The most requests under way on one stream.
const QUEUE_MAX: usize = 64;
/// The most reads in progress on one link: as many as there may be objects in the hands of one client.
const TRANSFERS_MAX: usize = 16_384;
/// Bytes of a word.
pub(super) const WORD_LEN: usize = 8;
/// How often a slice is asked for before the read fails, when its streams end under it though the link is up.
const TRIES_MAX: u8 = 3;

/// How a request was answered.
pub(super) enum Answered {
    /// Its bytes have landed, so many of them by way of a buffer.
    Bytes {
        staged_bytes: u64,
    },
    Word(u64),
    /// Why the owner refused.
    Refused(StoreError),
}

/// What comes next on a stream.
#[derive(Default)]
pub(super) struct Expected {
    /// Whose answer, if anything is asked for.
    pub(super) slice: Option<Slice>,
    /// Whether the answer after that is a word.
    pub(super) word_follows: bool,
}

/// A read that is over.
pub(super) struct Finished {
    pub(super) transfer: TransferId,
    pub(super) result: Result<ReadStats, StoreError>,
}

/// A part of a read that is asked for in one request.
#[derive(Clone)]
pub(super) struct Slice {
    pub(super) transfer: TransferId,
    pub(super) remote: RemoteExtent,
    /// Where it lands; none for the word of a checked read.
    pub(super) local: Option<Piece>,
    pub(super) number: u32,
    tries: u8,
}

struct Transfer {
    segment: Option<SegmentId>,
    /// Slices under way on streams.
    under_way: usize,
    /// Bytes that are neither under way nor there.
    unasked: usize,
    word: Word,
    error: Option<StoreError>,
    stats: ReadStats,
}

/// The word that is to be read after all bytes.
#[derive(Clone, Copy)]
enum Word {
    /// There is none, or it is there.
    Done,
    /// To be asked for: behind the last slice if all that are under way are on its stream, whose owner answers in order;
    /// else when all slices are there.
    Unasked(RemoteExtent),
    Asked,
}

impl Transfer {
    /// The word, if its time has come: nothing is left to be asked for, nor under way but what it would follow.
    fn take_due_word(&mut self, under_way: usize) -> Option<RemoteExtent> {
        match self.word {
            Word::Unasked(word)
                if self.unasked == 0 && self.under_way == under_way && self.error.is_none() =>
            {
                self.word = Word::Asked;
                Some(word)
            }
            _ => None,
        }
    }
}

struct Book {
    stream: Arc<ReadStream>,
    /// In the order of their requests, which is the order of the answers.
    under_way: VecDeque<Slice>,
    under_way_bytes: usize,
}

#[derive(Default)]
pub(super) struct Reads {
    state: State,
    peer: Option<(SocketAddr, StreamToken)>,
    transfers: HashMap<TransferId, Transfer>,
    /// What is still to be asked for; large reads are cut as streams come free. Slices of reads that were given up stay
    /// until they come up, or until there are more of them than of others.
    waiting: VecDeque<Slice>,
    books: Vec<Book>,
    next_number: u32,
    /// Finished, and the sink does not know yet.
    unreported: usize,
}

#[derive(Default)]
enum State {
    #[default]
    New,
    Open,
    Closed(StoreError),
    /// Closed, and the link's end has been reported.
    Over,
}

/// What the caller does after the lock is released.
#[derive(Default)]
pub(super) struct Next {
    /// Streams that have new requests to send.
    pub(super) flush: Vec<Arc<ReadStream>>,
    pub(super) finished: Vec<Finished>,
}

impl Reads {
    pub(super) fn peer_is(&mut self, address: SocketAddr, token: StreamToken) {
        self.peer = Some((address, token));
    }

    pub(super) fn peer_token_is(&mut self, token: StreamToken) {
        if let Some((_, known)) = &mut self.peer {
            *known = token;
        }
    }

    pub(super) fn open(&mut self) {
        if matches!(self.state, State::New) {
            self.state = State::Open;
        }
    }

    /// Where data streams are opened to, and what they show; none if the link is not up.
    pub(super) fn peer(&self) -> Option<(SocketAddr, StreamToken)> {
        self.peer.filter(|_| matches!(self.state, State::Open))
    }

    /// How many streams are wanted beyond those that there are, `streams` being the most: one for every window of bytes
    /// that wait, beside those that have no room.
    pub(super) fn streams_wanted(&self, slice_bytes: usize, streams: usize) -> usize {
        if self.books.len() >= streams || self.waiting.is_empty() {
            return 0;
        }
        let bytes = self.waiting.iter().fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
        let window = self.waiting.front().map_or(WINDOW, Slice::window);
        let full = self.books.iter().filter(|book| book.under_way.len() >= window).count();
        let useful = full.saturating_add(bytes.div_ceil(slice_bytes.saturating_mul(WINDOW)));
        useful.clamp(1, streams).saturating_sub(self.books.len())
    }

    pub(super) fn add_stream(&mut self, stream: Arc<ReadStream>) {
        self.books.push(Book { stream, under_way: VecDeque::new(), under_way_bytes: 0 });
    }

    /// Begins a read.
    ///
    /// # Errors
    /// The reason why the link is closed; `Busy` at the limit.
    pub(super) fn begin(
        &mut self,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Piece)>,
        word: Option<RemoteExtent>,
    ) -> Result<(), StoreError> {
        match &self.state {
            State::Open => {}
            State::Closed(why) => return Err(why.clone()),
            State::New | State::Over => return Err(StoreError::unavailable("link", "it is not up")),
        }
        if self.transfers.len() >= TRANSFERS_MAX {
            return Err(StoreError::busy(
                "read",
                format!("{TRANSFERS_MAX} reads are in progress on this link"),
            ));
        }
        let len = bytes.as_ref().map_or(0, |(_, local)| local.len());
        let begun = Transfer {
            segment: bytes.as_ref().map(|(_, local)| local.segment()),
            under_way: 0,
            unasked: len,
            word: word.map_or(Word::Done, Word::Unasked),
            error: None,
            stats: ReadStats { bytes: len as u64, ..ReadStats::default() },
        };
        self.transfers.insert(transfer, begun);
        if self.waiting.len() > 2 * self.transfers.len() {
            let transfers = &self.transfers;
            self.waiting.retain(|slice| is_wanted(transfers, slice));
        }
        match bytes {
            Some((remote, local)) => {
                let slice = Slice { transfer, remote, local: Some(local), number: 0, tries: 0 };
                if slice.is_small() {
                    self.waiting.push_front(slice);
                } else {
                    self.waiting.push_back(slice);
                }
            }
            None => self.queue_due_word(transfer, 0),
        }
        Ok(())
    }

    /// Asks for the word of a read whose bytes are all there.
    fn queue_due_word(&mut self, transfer: TransferId, tries: u8) {
        let due = self.transfers.get_mut(&transfer).and_then(|it| it.take_due_word(0));
        if let Some(remote) = due {
            self.waiting.push_front(Slice { transfer, remote, local: None, number: 0, tries });
        }
    }

    /// Gives waiting bytes to streams that have room for them.
    pub(super) fn assign(&mut self, slice_bytes: usize, next: &mut Next) {
        while let Some(front) = self.waiting.front() {
            if !is_wanted(&self.transfers, front) {
                self.waiting.pop_front();
                continue;
            }
            let Some(at) = self.stream_for(front, slice_bytes) else {
                return;
            };
            let Some(mut slice) = self.waiting.pop_front() else {
                return;
            };
            let book = &mut self.books[at];
            if slice.len() > slice_bytes {
                let (first, rest) = slice.cut(slice_bytes);
                self.waiting.push_front(rest);
                slice = first;
            }
            let number = slice.transfer;
            let mut behind = None;
            if let Some(transfer) = self.transfers.get_mut(&number) {
                transfer.under_way += 1;
                match slice.local {
                    Some(_) => {
                        transfer.unasked -= slice.len();
                        transfer.stats.slices += 1;
                        transfer.stats.round_trips = 1;
                        let with_it = book.under_way.iter().filter(|slice| slice.transfer == number).count();
                        behind = transfer.take_due_word(with_it + 1);
                    }
                    None => transfer.stats.round_trips += 1,
                }
                transfer.under_way += usize::from(behind.is_some());
            }
            book.ask(slice, &mut self.next_number);
            if let Some(remote) = behind {
                let word = Slice { transfer: number, remote, local: None, number: 0, tries: 0 };
                book.ask(word, &mut self.next_number);
            }
            if !next.flush.iter().any(|stream| Arc::ptr_eq(stream, &book.stream)) {
                next.flush.push(Arc::clone(&book.stream));
            }
        }
    }

    /// The stream that the next part of a read goes to, if one has room: the one that carries the read already, unless it
    /// is to be spread; else the one that has the fewest bytes to bring.
    fn stream_for(&self, slice: &Slice, slice_bytes: usize) -> Option<usize> {
        let window = slice.window();
        let whole = self.transfers.get(&slice.transfer)?.stats.bytes;
        let spread = whole > slice_bytes.saturating_mul(WINDOW) as u64;
        let away = |book: &Book| !spread && book.under_way.iter().all(|it| it.transfer != slice.transfer);
        let room = self.books.iter().enumerate().filter(|(_, book)| book.under_way.len() < window);
        room.min_by_key(|(_, book)| (away(book), book.under_way_bytes)).map(|(at, _)| at)
    }

    /// What comes next on a stream.
    pub(super) fn expected(&self, stream: &Arc<ReadStream>) -> Expected {
        let Some(book) = self.books.iter().find(|book| Arc::ptr_eq(&book.stream, stream)) else {
            return Expected::default();
        };
        let word_follows = book.under_way.get(1).is_some_and(|slice| slice.local.is_none());
        Expected { slice: book.under_way.front().cloned(), word_follows }
    }

    /// The answer to a stream's oldest request is complete.
    pub(super) fn answered(
        &mut self,
        stream: &Arc<ReadStream>,
        answered: Answered,
        slice_bytes: usize,
        next: &mut Next,
    ) {
        let book = self.books.iter_mut().find(|book| Arc::ptr_eq(&book.stream, stream));
        let Some((book, slice)) = book.and_then(|book| {
            let slice = book.under_way.pop_front()?;
            Some((book, slice))
        }) else {
            return;
        };
        book.under_way_bytes -= slice.len();
        if let Some(transfer) = self.transfers.get_mut(&slice.transfer) {
            transfer.under_way -= 1;
            match answered {
                Answered::Bytes { staged_bytes } => transfer.stats.staged_bytes += staged_bytes,
                Answered::Word(word) => {
                    transfer.word = Word::Done;
                    transfer.stats.word = Some(word);
                }
                Answered::Refused(_) => {}
            }
        }
        if let Answered::Refused(error) = answered {
            self.give_up(slice.transfer, error);
        }
        self.queue_due_word(slice.transfer, 0);
        self.finish_if_over(slice.transfer, next);
        self.assign(slice_bytes, next);
    }

    /// A stream has ended, and nothing is received on it any more: its slices go back, or fail their reads.
    pub(super) fn lost(&mut self, stream: &Arc<ReadStream>, why: &StoreError, guilty: bool, next: &mut Next) {
        let Some(at) = self.books.iter().position(|book| Arc::ptr_eq(&book.stream, stream)) else {
            return;
        };
        let closed = match &self.state {
            State::Closed(error) => Some(error.clone()),
            _ => None,
        };
        let mut words = Vec::new();
        for mut slice in self.books.swap_remove(at).under_way.into_iter().rev() {
            let Some(transfer) = self.transfers.get_mut(&slice.transfer) else {
                continue;
            };
            transfer.under_way -= 1;
            slice.tries += u8::from(guilty);
            let number = slice.transfer;
            if transfer.error.is_some() || closed.is_some() || slice.tries >= TRIES_MAX {
                self.give_up(number, closed.clone().unwrap_or_else(|| why.clone()));
                self.finish_if_over(number, next);
            } else if slice.local.is_some() {
                transfer.unasked += slice.len();
                transfer.stats.reissued += 1;
                self.waiting.push_front(slice);
            } else {
                transfer.word = Word::Unasked(slice.remote);
                words.push((number, slice.tries));
            }
        }
        // Bytes that went back are asked for before their word is.
        for (number, tries) in words {
            self.queue_due_word(number, tries);
        }
    }

    /// Gives a read up; returns the streams that must be lost before it is over.
    pub(super) fn cancel(
        &mut self,
        transfer: TransferId,
        error: StoreError,
        next: &mut Next,
    ) -> Vec<Arc<ReadStream>> {
        self.give_up(transfer, error);
        self.finish_if_over(transfer, next);
        let carries = |book: &&Book| book.under_way.iter().any(|slice| slice.transfer == transfer);
        self.books.iter().filter(carries).map(|book| Arc::clone(&book.stream)).collect()
    }

    /// No stream can be opened: without any, what waits fails.
    pub(super) fn no_stream(&mut self, why: &StoreError, next: &mut Next) {
        if !self.books.is_empty() {
            return;
        }
        let all: Vec<TransferId> = self.waiting.iter().map(|slice| slice.transfer).collect();
        for transfer in all {
            self.give_up(transfer, why.clone());
            self.finish_if_over(transfer, next);
        }
    }

    /// The reads into a segment.
    pub(super) fn of_segment(&self, segment: SegmentId) -> Vec<TransferId> {
        let of_it = self.transfers.iter().filter(|(_, transfer)| transfer.segment == Some(segment));
        of_it.map(|(number, _)| *number).collect()
    }

    /// The link has ended: returns the reads that are over at once, and the streams to be lost.
    pub(super) fn close(&mut self, why: &StoreError) -> (Vec<Finished>, Vec<Arc<ReadStream>>) {
        self.state = State::Closed(why.clone());
        self.waiting.clear();
        let mut next = Next::default();
        let all: Vec<TransferId> = self.transfers.keys().copied().collect();
        for transfer in all {
            self.give_up(transfer, why.clone());
            self.finish_if_over(transfer, &mut next);
        }
        (next.finished, self.books.iter().map(|book| Arc::clone(&book.stream)).collect())
    }

    /// The sink knows of one more finished read.
    pub(super) fn reported(&mut self) {
        // Zero only when the fabric has been stopped meanwhile.
        self.unreported = self.unreported.saturating_sub(1);
    }

    /// Whether the end of the link can be reported now; true once.
    pub(super) fn is_last_word(&mut self) -> bool {
        let over =
            matches!(self.state, State::Closed(_)) && self.transfers.is_empty() && self.unreported == 0;
        if over {
            self.state = State::Over;
        }
        over
    }

    /// The first reason counts. Nothing more is asked for.
    fn give_up(&mut self, number: TransferId, error: StoreError) {
        let Some(transfer) = self.transfers.get_mut(&number) else {
            return;
        };
        transfer.error.get_or_insert(error);
        transfer.unasked = 0;
        transfer.word = Word::Done;
    }

    fn finish_if_over(&mut self, number: TransferId, next: &mut Next) {
        let is_over = |it: &Transfer| it.under_way == 0 && it.unasked == 0 && matches!(it.word, Word::Done);
        let over = self.transfers.get(&number).is_some_and(is_over);
        if !over {
            return;
        }
        if let Some(transfer) = self.transfers.remove(&number) {
            self.unreported += 1;
            let result = match transfer.error {
                Some(error) => Err(error),
                None => Ok(transfer.stats),
            };
            next.finished.push(Finished { transfer: number, result });
        }
    }
}

impl Book {
    fn ask(&mut self, mut slice: Slice, next_number: &mut u32) {
        *next_number = next_number.wrapping_add(1);
        slice.number = *next_number;
        self.stream.ask(Request { number: slice.number, extent: slice.remote });
        self.under_way_bytes += slice.len();
        self.under_way.push_back(slice);
    }
}

/// Whether a slice that waits is still to be asked for.
fn is_wanted(transfers: &HashMap<TransferId, Transfer>, slice: &Slice) -> bool {
    transfers.get(&slice.transfer).is_some_and(|transfer| transfer.error.is_none())
}

impl Slice {
    pub(super) fn len(&self) -> usize {
        self.local.as_ref().map_or(WORD_LEN, Piece::len)
    }

    fn is_small(&self) -> bool {
        self.len() <= SMALL_LEN
    }

    /// How many slices a stream may have under way for it to take this one.
    fn window(&self) -> usize {
        if self.is_small() { QUEUE_MAX } else { WINDOW }
    }

    /// Of bytes; a word is shorter than any slice.
    fn cut(self, len: usize) -> (Self, Self) {
        let rest_len = self.len() - len;
        let mut first = self.clone();
        let mut rest = self;
        first.local = rest.local.as_ref().map(|local| local.part(0, len));
        first.remote.len_bytes = len as u64;
        rest.local = rest.local.as_ref().map(|local| local.part(len, rest_len));
        rest.remote.offset += len as u64;
        rest.remote.len_bytes = rest_len as u64;
        (first, rest)
    }
}
