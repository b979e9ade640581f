//! Links, and what waits to go out on them: frames with their payloads, descriptions of memory, reads. Not what happens to
//! connections (`state`). Invariant: parts of one frame are posted one after the other, nothing between them.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use hetmem_core::wire::{FrameHeader, HEADER_LEN};
use hetmem_core::{LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};

use super::abi;
use super::adapters::{Adapter, BUFFER_LEN, PARTS_LENT, PARTS_MAX};
use super::ends::{End, Of, What};
use super::push::{Push, Wanted};
use super::wire::{Described, LinkToken, Owner, RemoteChunk, is_description};
use crate::fabric::{ReadStats, SendToken};
use crate::payload::Gather;
use crate::region::Piece;

/// The most frames that wait on one link, and their bytes.
const FRAMES_MAX: usize = 1024;
const BYTES_MAX: usize = 4 << 20;
/// The most reads in progress on one link.
pub(super) const READS_MAX: usize = 16_384;
/// How often a read is begun anew when its connection ends under it though the link is up.
const TRIES_MAX: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// There is no connection yet.
    Dialing,
    /// There is; the peer has not described its memory yet.
    Greeting,
    Up,
}

pub(super) struct Link {
    pub(super) id: LinkId,
    /// For people, and where data connections go.
    pub(super) address: String,
    pub(super) peer: SocketAddr,
    pub(super) inbound: bool,
    pub(super) stage: Stage,
    pub(super) since: Instant,
    /// The control connection, by its token.
    pub(super) control: u64,
    /// This end's data connection, if there is one.
    pub(super) reading: Option<u64>,
    /// How many of them in a row were never made.
    refusals: u8,
    /// When something was last read over it.
    pub(super) read_at: Instant,
    /// The peer's.
    pub(super) serving: Vec<u64>,
    /// What the peer shows to open one here, and this end there.
    pub(super) mine: LinkToken,
    pub(super) theirs: Option<LinkToken>,
    /// Whose the other end is, as it says.
    pub(super) owner: Owner,
    out: VecDeque<Outgoing>,
    out_bytes: usize,
    /// On iWARP: parts that have gone out, for which the peer has not said that their buffers are lent again.
    gone: u32,
    /// The same of the peer's, and how often it is to be said.
    lent: u32,
    lent_to_say: u32,
    /// Bytes of the frame that is coming in which are still to come.
    coming: u64,
    pub(super) remote: HashMap<RemoteKey, Described>,
    /// The peer has described all of its memory, perhaps before this end hears that there is a connection.
    pub(super) all_described: bool,
    /// Not, or not wholly, posted.
    pub(super) waiting: VecDeque<Read>,
    /// All of it posted, or asked to be written.
    pub(super) under_way: HashMap<TransferId, Read>,
    /// Those of them that are to be written, by the number that the owner knows.
    asked: HashMap<u32, TransferId>,
    next_push: u32,
    /// What the peer has asked to be written, by the connection that it asked on.
    pub(super) pushes: HashMap<u64, VecDeque<Push>>,
}

/// A frame with its payload, or a description.
struct Outgoing {
    head: Vec<u8>,
    head_done: usize,
    payload: Option<Gather>,
    payload_left: usize,
    /// Who is told when the payload is free again.
    token: Option<SendToken>,
}

/// A read in progress.
pub(super) struct Read {
    pub(super) transfer: TransferId,
    pub(super) segment: Option<SegmentId>,
    local: Option<Piece>,
    stretches: Vec<RemoteChunk>,
    word: Option<RemoteChunk>,
    /// The owner is to write it.
    push: Option<Wanted>,
    /// What was asked for: stretches, bytes of the next one, bytes in all.
    at: (usize, u64, u64),
    word_asked: bool,
    tries: u8,
    guilt: Guilt,
    pub(super) error: Option<StoreError>,
    pub(super) stats: ReadStats,
}

/// Whether a read ended the connection that it was posted to. Where the adapter names who did, nobody is suspected. iWARP
/// ends the whole connection for one read that the peer refuses, and all come back flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guilt {
    None,
    /// It was one of several: it is tried again alone.
    Suspected,
    /// It was alone: it did, if the peer is still there for another connection.
    Found,
}

impl Link {
    pub(super) fn new(id: LinkId, address: String, peer: SocketAddr, control: u64, mine: LinkToken) -> Self {
        Self {
            id,
            address,
            peer,
            inbound: false,
            stage: Stage::Dialing,
            since: Instant::now(),
            control,
            reading: None,
            refusals: 0,
            read_at: Instant::now(),
            serving: Vec::new(),
            mine,
            theirs: None,
            owner: Owner::default(),
            out: VecDeque::new(),
            out_bytes: 0,
            gone: 0,
            lent: 0,
            lent_to_say: 0,
            coming: 0,
            remote: HashMap::new(),
            all_described: false,
            waiting: VecDeque::new(),
            under_way: HashMap::new(),
            asked: HashMap::new(),
            next_push: 0,
            pushes: HashMap::new(),
        }
    }

    /// Whether a message that has come is of a frame; otherwise it describes memory.
    ///
    /// # Errors
    /// `Protocol` if it is neither, or longer than what is left of the frame.
    pub(super) fn is_of_frame(&mut self, bytes: &[u8]) -> Result<bool, StoreError> {
        if self.coming == 0 {
            if is_description(bytes) {
                return Ok(false);
            }
            let head = bytes.first_chunk::<HEADER_LEN>();
            let short = || StoreError::protocol("a frame that begins with less than its header");
            let header = FrameHeader::parse(head.ok_or_else(short)?)?;
            let body_len = HEADER_LEN as u64 + u64::from(header.body_len);
            self.coming = header.payload_len.saturating_add(body_len);
        }
        let len = bytes.len() as u64;
        let long = || StoreError::protocol(format!("{len} bytes where {} are left of a frame", self.coming));
        self.coming = self.coming.checked_sub(len).ok_or_else(long)?;
        Ok(true)
    }

    /// Whether a message may be the first byte of a connection: no frame and no description is so short.
    pub(super) fn is_first_byte(&self, len: usize) -> bool {
        len == 1 && self.coming == 0
    }

    /// What is said of something that the end of this link has ended.
    pub(super) fn lost(&self, operation: &'static str, why: &StoreError) -> StoreError {
        let why = match why {
            StoreError::PeerLost { why, .. } => why.clone(),
            other => other.to_string().into(),
        };
        StoreError::PeerLost {
            operation: operation.into(),
            subject: format!("link {}", self.id),
            peer: self.address.clone(),
            why,
        }
    }

    /// Queues a frame.
    ///
    /// # Errors
    /// `Busy` if too much waits.
    pub(super) fn queue(
        &mut self,
        head: Vec<u8>,
        payload: Option<Gather>,
        token: SendToken,
    ) -> Result<(), StoreError> {
        if self.out.len() >= FRAMES_MAX || self.out_bytes + head.len() > BYTES_MAX {
            return Err(StoreError::busy(
                "send",
                format!("{} frames wait on link {}", self.out.len(), self.id),
            ));
        }
        self.queue_always(head, payload, token);
        Ok(())
    }

    /// The same for what is bounded otherwise.
    pub(super) fn queue_always(&mut self, head: Vec<u8>, payload: Option<Gather>, token: SendToken) {
        let payload_left = payload.as_ref().map_or(0, Gather::len);
        let token = payload.is_some().then_some(token);
        self.out_bytes += head.len();
        self.out.push_back(Outgoing { head, head_done: 0, payload, payload_left, token });
    }

    /// Posts what waits, as far as there is room.
    ///
    /// # Errors
    /// Why the link has to end: the adapter refuses, or a payload was deregistered after its frame was promised.
    pub(super) fn post_frames(&mut self, end: &mut End, adapter: &mut Adapter) -> Result<(), StoreError> {
        while self.lent_to_say > 0 && end.room() > 0 {
            // An empty message, which nothing else is: it may come between the parts of a frame.
            end.add(What::Send { pieces: &[] }, Of::Part { slot: None, last_of: None }, false);
            self.lent_to_say -= 1;
        }
        while end.room() > 0
            && !(adapter.is_iwarp() && self.gone >= PARTS_MAX)
            && let Some(next) = self.out.front_mut()
        {
            if !next.add_part(end, adapter)? {
                break;
            }
            self.gone = self.gone.saturating_add(1);
            if next.head_done == next.head.len() && next.payload_left == 0 {
                self.out_bytes -= next.head.len();
                self.out.pop_front();
            }
        }
        end.flush()
    }

    /// On iWARP: a buffer that a part of the peer's came into is lent again, of which the peer hears now and then.
    pub(super) fn part_lent(&mut self) {
        self.lent += 1;
        if self.lent == PARTS_LENT {
            (self.lent, self.lent_to_say) = (0, self.lent_to_say.saturating_add(1));
        }
    }

    /// The peer says that of its own.
    pub(super) fn peer_lent(&mut self) {
        self.gone = self.gone.saturating_sub(PARTS_LENT);
    }

    /// Who waits for payloads that were not wholly posted.
    pub(super) fn take_out(&mut self) -> Vec<SendToken> {
        self.out_bytes = 0;
        self.out.drain(..).filter_map(|outgoing| outgoing.token).collect()
    }

    /// Queues a read.
    ///
    /// # Errors
    /// `Busy` at the limit.
    pub(super) fn begin_read(&mut self, read: Read) -> Result<(), StoreError> {
        if self.waiting.len() + self.under_way.len() >= READS_MAX {
            return Err(StoreError::busy("read", format!("{READS_MAX} reads are in progress on this link")));
        }
        self.waiting.push_back(read);
        Ok(())
    }

    /// Posts reads that wait, as far as there is room; one that is suspected has the connection to itself.
    ///
    /// # Errors
    /// Why the data connection has to end.
    pub(super) fn post_reads(
        &mut self,
        end: &mut End,
        adapter: &mut Adapter,
        slice_bytes: u64,
    ) -> Result<(), StoreError> {
        self.read_at = Instant::now();
        while end.room() > 0
            && let Some(read) = self.waiting.front_mut()
        {
            // If one that is suspected is under way, it is the only one.
            let other = self.under_way.values().next();
            if other.is_some_and(|other| read.guilt != Guilt::None || other.guilt != Guilt::None) {
                break;
            }
            if !read.add_next(end, adapter, slice_bytes)? {
                break;
            }
            if read.is_asked()
                && let Some(read) = self.waiting.pop_front()
            {
                if let Some(push) = &read.push {
                    self.asked.insert(push.number(), read.transfer);
                }
                self.under_way.insert(read.transfer, read);
            }
        }
        end.flush()
    }

    /// What a read is to name a push by.
    pub(super) fn push_number(&mut self) -> u32 {
        self.next_push = self.next_push.wrapping_add(1);
        self.next_push
    }

    /// What was asked to be written is there, or the owner refuses: the read, if it is over. One that wants its word too
    /// goes on to read that.
    pub(super) fn pushed(&mut self, number: u32, written: bool) -> Option<Read> {
        let transfer = self.asked.remove(&number)?;
        let mut read = self.under_way.remove(&transfer)?;
        if let Some(push) = &mut read.push {
            push.close();
            push.is_done = true;
        }
        (read.stats.pushed, read.stats.slices) = (true, 1);
        if written && read.error.is_none() && read.word.is_some() {
            read.stats.round_trips += 1;
            self.waiting.push_front(read);
            return None;
        }
        Some(read)
    }

    /// It was never made. After so many tries in a row, what waits for it is over.
    pub(super) fn reading_refused(&mut self) -> Vec<Read> {
        self.refusals += 1;
        if self.refusals < TRIES_MAX {
            return Vec::new();
        }
        self.refusals = 0;
        self.waiting.drain(..).collect()
    }

    /// The data connection has ended under the reads that are posted, and nothing says for which of them. Nobody is found
    /// guilty if it may have ended before there was any work.
    pub(super) fn suspect(&mut self, may_find: bool) {
        let touched = self.waiting.front_mut().filter(|read| !read.is_untouched());
        let mut posted: Vec<&mut Read> = self.under_way.values_mut().chain(touched).collect();
        let alone = posted.len() == 1 && may_find;
        for read in &mut posted {
            read.guilt = if alone { Guilt::Found } else { Guilt::Suspected };
        }
    }

    /// There is another data connection, so the peer has not gone: reads that were alone on the last one ended it, and are
    /// over.
    pub(super) fn reading_made(&mut self) -> Vec<Read> {
        self.refusals = 0;
        let (guilty, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|read| read.guilt == Guilt::Found);
        self.waiting = waiting;
        Vec::from(guilty as VecDeque<Read>)
    }

    /// The data connection has ended under the reads that are posted: which are over with it. Others are begun anew.
    pub(super) fn reads_lost(&mut self, guilty: Option<TransferId>, why: &StoreError) -> Vec<Read> {
        self.asked.clear();
        let mut all: Vec<Read> = std::mem::take(&mut self.under_way).into_values().collect();
        // In the order in which they were begun.
        all.sort_unstable_by_key(|read| read.transfer);
        let mut over = Vec::new();
        for mut read in all {
            // Where one of them is known to be why, the others have not failed.
            read.tries += u8::from(guilty.is_none());
            if guilty == Some(read.transfer) || read.tries > TRIES_MAX {
                read.error.get_or_insert_with(|| why.clone());
            }
            if read.error.is_some() {
                over.push(read);
            } else {
                read.begin_anew();
                self.waiting.push_back(read);
            }
        }
        if let Some(front) = self.waiting.front_mut() {
            front.begin_anew();
        }
        for read in &mut self.waiting {
            if guilty == Some(read.transfer) {
                read.error.get_or_insert_with(|| why.clone());
            }
            read.begin_anew();
        }
        let (failed, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|it| it.error.is_some());
        self.waiting = waiting;
        // Whoever is suspected comes first: the others wait for that to be over.
        self.waiting.make_contiguous().sort_by_key(|read| read.guilt == Guilt::None);
        over.extend::<VecDeque<Read>>(failed);
        over
    }
}

impl Outgoing {
    /// Adds one part to what the end posts; false if there is no buffer for it now.
    fn add_part(&mut self, end: &mut End, adapter: &mut Adapter) -> Result<bool, StoreError> {
        let Some(made) = end.made else { return Ok(false) };
        if self.payload.is_none() && self.head.len() <= made.inline_bytes_max as usize {
            self.head_done = self.head.len();
            // Nobody waits for it to come back: it holds no buffer.
            end.add(What::Inline { bytes: &self.head }, Of::Part { slot: None, last_of: None }, false);
            return Ok(true);
        }
        let mut pieces = std::mem::take(&mut adapter.pieces);
        pieces.clear();
        let (mut room, mut slot) = (BUFFER_LEN, None);
        let head_len = (self.head.len() - self.head_done).min(BUFFER_LEN);
        if head_len > 0 {
            let Some(taken) = adapter.frames.take() else {
                adapter.pieces = pieces;
                return Ok(false);
            };
            adapter.frames.write(taken, 0, &self.head[self.head_done..self.head_done + head_len]);
            pieces.push(adapter.frames.piece(taken, 0, head_len));
            (room, slot) = (room - head_len, Some(taken));
            self.head_done += head_len;
        }
        let whole_head = self.head_done == self.head.len();
        if let Some(payload) = self.payload.as_mut().filter(|_| whole_head)
            && let Err(why) = gather(payload, &mut room, &mut pieces, made.pieces_max as usize, adapter)
        {
            if let Some(slot) = slot {
                adapter.frames.give_back(slot);
            }
            return Err(why);
        }
        let bytes: usize = pieces.iter().map(|piece| piece.len_bytes as usize).sum();
        self.payload_left -= bytes - head_len;
        let last = whole_head && self.payload_left == 0;
        let of = Of::Part { slot, last_of: self.token.filter(|_| last) };
        end.add(What::Send { pieces: &pieces }, of, last);
        adapter.pieces = pieces;
        Ok(true)
    }
}

/// The next pieces of a payload, as many as go into one send.
fn gather(
    payload: &mut Gather,
    room: &mut usize,
    pieces: &mut Vec<abi::Piece>,
    pieces_max: usize,
    adapter: &Adapter,
) -> Result<(), StoreError> {
    while *room > 0 && pieces.len() + 1 < pieces_max {
        let Some(part) = payload.next(*room) else { return Ok(()) };
        let (segment, base, offset) = part.place();
        let mut done = 0;
        while done < part.len() {
            let (at, left) = (offset + done as u64, (part.len() - done) as u64);
            let piece = adapter.stretch(segment, base, at, left).ok_or_else(|| {
                StoreError::stale("send", "payload", format!("segment {segment} was deregistered"))
            })?;
            done += piece.len_bytes as usize;
            *room -= piece.len_bytes as usize;
            // At the end of a chunk there is one piece more, for which there is room.
            pieces.push(piece);
        }
    }
    Ok(())
}

impl Read {
    pub(super) fn new(
        transfer: TransferId,
        local: Option<Piece>,
        stretches: Vec<RemoteChunk>,
        word: Option<RemoteChunk>,
        push: Option<Wanted>,
    ) -> Self {
        let bytes = local.as_ref().map_or(0, Piece::len) as u64;
        Self {
            transfer,
            segment: local.as_ref().map(Piece::segment),
            local,
            stretches,
            word,
            push,
            at: (0, 0, 0),
            word_asked: false,
            tries: 0,
            guilt: Guilt::None,
            error: None,
            stats: ReadStats { bytes, round_trips: 1, ..ReadStats::default() },
        }
    }

    fn bytes_asked(&self) -> bool {
        self.at.0 >= self.stretches.len()
    }

    /// Whether all of it is posted; of a push, whether it is asked for: its word is read afterwards.
    fn is_asked(&self) -> bool {
        let pushing = self.push.as_ref().is_some_and(|push| !push.is_done);
        self.bytes_asked() && (pushing || self.word.is_none() || self.word_asked)
    }

    /// Nothing of it is posted.
    pub(super) fn is_untouched(&self) -> bool {
        self.at == (0, 0, 0) && !self.word_asked
    }

    fn begin_anew(&mut self) {
        if !self.is_untouched() {
            self.at = (0, 0, 0);
            self.word_asked = false;
            if let Some(push) = &mut self.push {
                push.close();
                push.is_done = false;
            }
            self.stats.reissued += self.stats.slices;
            self.stats.slices = 0;
        }
    }

    /// Adds the next slice to what the end posts, or the word behind the last; false if there is no room for a word now.
    fn add_next(
        &mut self,
        end: &mut End,
        adapter: &mut Adapter,
        slice_bytes: u64,
    ) -> Result<bool, StoreError> {
        let transfer = self.transfer;
        if !self.bytes_asked()
            && let (Some(push), Some(local)) = (&mut self.push, &self.local)
        {
            let (segment, _, offset) = local.place();
            let asked = push.ask((segment, offset), end, adapter);
            if let Err(why) = &asked {
                self.error.get_or_insert(why.clone());
            }
            if asked == Ok(true) {
                self.at = (self.stretches.len(), 0, self.stats.bytes);
            }
            return asked;
        }
        let (piece, remote, of) = if let Some(stretch) = self.stretches.get(self.at.0).copied() {
            let (_, done, landed) = self.at;
            let Some(local) = &self.local else { return Err(StoreError::protocol("a read into nothing")) };
            let (segment, base, offset) = local.place();
            let most = (stretch.len_bytes - done).min(slice_bytes);
            let Some(piece) = adapter.stretch(segment, base, offset + landed, most) else {
                let why = StoreError::stale("read", "target", format!("segment {segment} was deregistered"));
                self.error.get_or_insert(why.clone());
                return Err(why);
            };
            let len = u64::from(piece.len_bytes);
            self.at = if done + len == stretch.len_bytes {
                (self.at.0 + 1, 0, landed + len)
            } else {
                (self.at.0, done + len, landed + len)
            };
            self.stats.slices += 1;
            let last = self.bytes_asked() && self.word.is_none();
            let remote = RemoteChunk { address: stretch.address + done, ..stretch };
            (piece, remote, Of::Slice { transfer, last })
        } else {
            let (Some(word), Some(slot)) = (self.word, adapter.words.take()) else { return Ok(false) };
            self.word_asked = true;
            (adapter.words.piece(slot, 0, 8), word, Of::Word { transfer, slot })
        };
        end.add(What::Read { into: piece, address: remote.address, key: remote.key }, of, self.is_asked());
        Ok(true)
    }
}

/// What a key of the peer's means here, for a read of this extent, and whether the owner wants to write that rather than
/// have it read.
pub(super) fn stretches_of(
    link: &Link,
    extent: RemoteExtent,
) -> Result<(Vec<RemoteChunk>, bool), StoreError> {
    match link.remote.get(&extent.key) {
        Some(described) => {
            let by_push = matches!(described, Described::Readable { by_push: true, .. });
            Ok((super::wire::stretches(described, extent)?, by_push))
        }
        None => Err(StoreError::stale(
            "read",
            format!("remote key {:016x}", extent.key.0),
            "the owner has no region of this key: it was deregistered, or is of another incarnation",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link with these reads under way, and one that waits behind them.
    fn link(under_way: &[u64]) -> Link {
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut link = Link::new(LinkId(1), "peer".to_owned(), nowhere, 1, LinkToken(1));
        let read = |number| Read::new(TransferId(number), None, Vec::new(), None, None);
        link.under_way = under_way.iter().map(|number| (TransferId(*number), read(*number))).collect();
        link.waiting.push_back(read(9));
        link
    }

    /// Its data connection ends, and the peer takes another one: who is guilty, and who goes on in which order.
    fn after_the_end(mut link: Link, may_find: bool) -> (Vec<u64>, Vec<u64>) {
        link.suspect(may_find);
        let over = link.reads_lost(None, &StoreError::unavailable("its connection", "flushed"));
        assert!(over.is_empty(), "nobody fails before the peer is known to be there");
        let guilty = link.reading_made().iter().map(|read| read.transfer.0).collect();
        (guilty, link.waiting.iter().map(|read| read.transfer.0).collect())
    }

    #[test]
    fn who_was_alone_when_the_connection_ended_is_guilty() {
        assert_eq!(after_the_end(link(&[4]), true), (vec![4], vec![9]));
    }

    #[test]
    fn of_several_none_is_and_they_come_before_those_that_waited() {
        assert_eq!(after_the_end(link(&[5, 4]), true), (vec![], vec![4, 5, 9]));
    }

    #[test]
    fn who_may_never_have_been_posted_is_not() {
        assert_eq!(after_the_end(link(&[4]), false), (vec![], vec![4, 9]));
    }

    #[test]
    fn as_often_as_another_is_guilty_a_read_is_begun_anew() {
        let why = StoreError::stale("transfer", "its memory", "the owner has withdrawn the memory");
        let mut link = link(&[]);
        for number in 10..20 {
            link.under_way = link.waiting.drain(..).map(|read| (read.transfer, read)).collect();
            let transfer = TransferId(number);
            link.under_way.insert(transfer, Read::new(transfer, None, Vec::new(), None, None));
            let over = link.reads_lost(Some(transfer), &why);
            assert_eq!(over.iter().map(|read| read.transfer).collect::<Vec<_>>(), [transfer]);
            assert_eq!(link.waiting.iter().map(|read| read.transfer.0).collect::<Vec<_>>(), [9]);
        }
    }

    #[test]
    fn a_connection_that_is_refused_again_and_again_is_given_up_with_all_that_waits_for_it() {
        let mut link = link(&[]);
        let refused: Vec<usize> = (0..TRIES_MAX).map(|_| link.reading_refused().len()).collect();
        assert_eq!(refused, [0, 0, 1]);
        assert!(link.waiting.is_empty());
    }

    #[test]
    fn messages_are_counted_as_they_are_lent_again() {
        let (mut sender, mut receiver) = (link(&[]), link(&[]));
        sender.gone = PARTS_MAX;
        for _ in 0..PARTS_MAX {
            receiver.part_lent();
        }
        for _ in 0..receiver.lent_to_say {
            sender.peer_lent();
        }
        assert_eq!((sender.gone, receiver.lent), (0, 0));
        sender.peer_lent();
        assert_eq!(sender.gone, 0, "a peer that says too much harms itself");
    }
}
