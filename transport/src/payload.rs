//! Payloads under way: gathered from pieces of own regions, or scattered into them. Not the system calls (`region`), and
//! not frames. Invariant: both go forward only, so a byte leaves or lands once; and what a region that is gone would
//! have got lands nowhere.

use std::os::fd::BorrowedFd;

use hetmem_core::{Extent, StoreError};

use crate::fabric::LandingPart;
use crate::region::{Piece, Regions, Unmoved, receive_targets, send_pieces};
use crate::staged::Staged;

/// Bytes that are skipped in one call.
const DISCARD_LEN: usize = 64 << 10;

/// How far a walk along several lengths has got.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// The one that is not done.
    number: usize,
    /// Bytes of it that are.
    done: usize,
}

impl Cursor {
    /// Goes on by `count` bytes at most to the end; `len` says how long each is, none past the last. Calls `part` with
    /// each stretch: which one, from where in it, how many bytes.
    fn walk(
        &mut self,
        mut count: usize,
        len: impl Fn(usize) -> Option<usize>,
        mut part: impl FnMut(usize, usize, usize),
    ) {
        while let Some(len) = len(self.number) {
            let step = count.min(len - self.done);
            if step > 0 {
                part(self.number, self.done, step);
            }
            self.done += step;
            count -= step;
            if self.done < len {
                return;
            }
            *self = Self { number: self.number + 1, done: 0 };
        }
    }
}

/// A payload that goes out.
pub(crate) struct Gather {
    pieces: Vec<Piece>,
    len: usize,
    at: Cursor,
    /// The host memory through which it passes, if it is one piece of a device's memory and was begun.
    staged: Option<Staged>,
}

impl Gather {
    /// The payload of these extents; none if they have no bytes.
    ///
    /// # Errors
    /// `Invalid` if one of them is not inside a registered segment.
    pub(crate) fn of(regions: &Regions, extents: &[Extent]) -> Result<Option<Self>, StoreError> {
        let mut pieces = regions.sources(extents.iter().copied())?;
        pieces.retain(|piece| piece.len() > 0);
        let len = pieces.iter().map(Piece::len).sum();
        Ok((len > 0).then_some(Self { pieces, len, at: Cursor::default(), staged: None }))
    }

    /// The next stretch of one piece, as far as it goes but `most` bytes at most, which then counts as gone; none at the
    /// end.
    pub(crate) fn next(&mut self, most: usize) -> Option<Piece> {
        let piece = self.pieces.get(self.at.number)?;
        let part = piece.part(self.at.done, most);
        let pieces = &self.pieces;
        self.at.walk(part.len(), |number| pieces.get(number).map(Piece::len), |_, _, _| {});
        Some(part)
    }

    /// One piece.
    pub(crate) fn one(piece: Piece) -> Self {
        Self { len: piece.len(), pieces: vec![piece], at: Cursor::default(), staged: None }
    }

    /// Begins what is to be done before it can be sent, if it is of a device.
    ///
    /// # Errors
    /// See `Piece::ring`, `Piece::begin_copy`.
    pub(crate) fn prime(&mut self) -> Result<(), Unmoved> {
        match (&mut self.staged, self.pieces.first()) {
            (None, Some(piece)) if piece.is_of_device() => {
                let staged = self.staged.insert(Staged::new(piece.clone())?);
                staged.prime()
            }
            _ => Ok(()),
        }
    }

    fn send_staged(&mut self, socket: BorrowedFd<'_>, head: &[u8], more: bool) -> Result<usize, Unmoved> {
        self.prime()?;
        let staged = self.staged.as_mut().ok_or(Unmoved::Closed)?;
        let (chunk, is_last) = staged.ready()?;
        let count = chunk.send(socket, head, 0, more || !is_last)?;
        staged.sent(count.saturating_sub(head.len()));
        Ok(count)
    }

    /// Bytes of all of it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Writes `head`, then what has not gone out yet, as much as one call takes; says how many bytes went. If `more`
    /// follows, the last of them may wait for that.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, head: &[u8], more: bool) -> Result<usize, Unmoved> {
        let rest = self.pieces.get(self.at.number..).unwrap_or_default();
        let is_of_device = rest.first().is_some_and(Piece::is_of_device);
        let count = match rest {
            _ if is_of_device => self.send_staged(socket, head, more)?,
            [] => send_pieces(socket, head, &[], 0, more)?,
            [last] => last.send(socket, head, self.at.done, more)?,
            several => send_pieces(socket, head, several, self.at.done, more)?,
        };
        let pieces = &self.pieces;
        let sent = count.saturating_sub(head.len());
        self.at.walk(sent, |number| pieces.get(number).map(Piece::len), |_, _, _| {});
        Ok(count)
    }

    /// Copies the next `count` bytes; none if a region is gone.
    pub(crate) fn copy_out(&mut self, count: usize) -> Option<Vec<u8>> {
        let (mut bytes, mut whole) = (Vec::with_capacity(count), true);
        let pieces = &self.pieces;
        self.at.walk(
            count,
            |number| pieces.get(number).map(Piece::len),
            |number, from, len| {
                let part = pieces.get(number).and_then(|piece| piece.copy_out(from, len));
                whole &= part.is_some();
                bytes.extend(part.unwrap_or_default());
            },
        );
        whole.then_some(bytes)
    }
}

/// Where a part of a payload goes.
pub(crate) enum Target {
    Piece(Piece),
    Skip(usize),
}

impl Target {
    fn len(&self) -> usize {
        match self {
            Self::Piece(piece) => piece.len(),
            Self::Skip(len) => *len,
        }
    }

    pub(crate) fn piece(&self) -> Option<&Piece> {
        match self {
            Self::Piece(piece) => Some(piece),
            Self::Skip(_) => None,
        }
    }
}

/// A payload that comes in.
pub(crate) struct Scatter {
    targets: Vec<Target>,
    /// Bytes that have not come, and those that land.
    left: usize,
    landing_len: usize,
    at: Cursor,
    /// Where skipped bytes go.
    discard: Box<[u8]>,
}

impl Scatter {
    /// A payload of `len_bytes` bytes into these parts.
    ///
    /// # Errors
    /// `Invalid` if they are not as long together, or an extent is not inside a registered segment.
    pub(crate) fn of(regions: &Regions, parts: &[LandingPart], len_bytes: u64) -> Result<Self, StoreError> {
        let extent = |part: &LandingPart| match part {
            LandingPart::Extent(extent) => Some(*extent),
            LandingPart::Skip(_) => None,
        };
        let mut pieces = regions.targets(parts.iter().filter_map(extent))?.into_iter();
        let (mut len, mut landing_len, mut skipped_max) = (0_u64, 0, 0);
        let mut targets = Vec::with_capacity(parts.len());
        for part in parts {
            let target = match part {
                LandingPart::Extent(_) => Target::Piece(pieces.next().ok_or_else(mismatch)?),
                LandingPart::Skip(len) => Target::Skip(usize::try_from(*len).map_err(|_| mismatch())?),
            };
            len = len.checked_add(target.len() as u64).ok_or_else(mismatch)?;
            match &target {
                Target::Piece(piece) => landing_len += piece.len(),
                Target::Skip(len) => skipped_max = skipped_max.max(*len),
            }
            if target.len() > 0 {
                targets.push(target);
            }
        }
        if len != len_bytes {
            let why = format!("{len_bytes} bytes of payload into {len} bytes of {} parts", parts.len());
            return Err(StoreError::invalid("landing", why));
        }
        let len = usize::try_from(len).map_err(|_| mismatch())?;
        let discard = vec![0; skipped_max.min(DISCARD_LEN)].into_boxed_slice();
        Ok(Self { targets, left: len, landing_len, at: Cursor::default(), discard })
    }

    /// Bytes that land when it is complete.
    pub(crate) fn landing_len(&self) -> usize {
        self.landing_len
    }

    /// Receives what one call brings: into the parts, and what comes after them into `rest`. Says how many bytes of
    /// the payload came, how many of `rest`, and whether there was room for more.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        rest: &mut [u8],
    ) -> Result<(usize, usize, bool), Unmoved> {
        let left = self.left;
        let (count, room) = match self.targets.get(self.at.number..).unwrap_or_default() {
            [Target::Piece(last)] => {
                (last.receive(socket, &mut [], self.at.done, rest)?, last.len() - self.at.done + rest.len())
            }
            several => receive_targets(socket, several, self.at.done, &mut self.discard, rest)?,
        };
        let targets = &self.targets;
        self.at.walk(count, |number| targets.get(number).map(Target::len), |_, _, _| {});
        self.left -= count.min(left);
        Ok((count.min(left), count.saturating_sub(left), count < room))
    }

    /// Copies the next bytes to where they belong; says whether every region was still there.
    pub(crate) fn copy_in(&mut self, bytes: &[u8]) -> bool {
        let (mut whole, mut start) = (true, 0);
        let targets = &self.targets;
        self.at.walk(
            bytes.len(),
            |number| targets.get(number).map(Target::len),
            |number, from, len| {
                let part = &bytes[start..start + len];
                start += len;
                if let Some(piece) = targets.get(number).and_then(Target::piece) {
                    whole &= piece.copy_in(from, part);
                }
            },
        );
        self.left = self.left.saturating_sub(bytes.len());
        whole
    }
}

fn mismatch() -> StoreError {
    StoreError::invalid("landing", "its parts have more bytes than there is memory")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hetmem_core::{RemoteKey, SegmentId};

    use super::*;
    use crate::fabric::Access;
    use crate::memory::HeapRegion;

    fn extent(segment: u32, offset: u64, len_bytes: u64) -> Extent {
        Extent { segment: SegmentId(segment), offset, len_bytes }
    }

    fn regions() -> (Regions, [Arc<HeapRegion>; 2]) {
        let regions = Regions::default();
        let memory = [1, 2].map(|number: u32| {
            let memory = Arc::new(HeapRegion::new(4096));
            let key = RemoteKey(u64::from(number));
            let shared = Arc::clone(&memory) as _;
            regions.register(SegmentId(number), key, shared, Access::Local).expect("register");
            memory
        });
        (regions, memory)
    }

    #[test]
    fn bytes_go_out_and_come_in_by_any_steps() {
        for step in [1, 3, 7, 100] {
            let (regions, memory) = regions();
            let source: Vec<u8> = (0..40).collect();
            memory[0].write(100, &source[..15]);
            memory[1].write(7, &source[15..]);
            let extents = [extent(1, 100, 15), extent(1, 0, 0), extent(2, 7, 25)];
            let mut gather = Gather::of(&regions, &extents).expect("inside").expect("bytes");
            let parts = [
                LandingPart::Skip(4),
                LandingPart::Extent(extent(2, 1000, 10)),
                LandingPart::Extent(extent(1, 2000, 6)),
                LandingPart::Extent(extent(1, 0, 0)),
                LandingPart::Skip(20),
            ];
            let mut scatter = Scatter::of(&regions, &parts, 40).expect("as long");
            assert_eq!((gather.len(), scatter.left, scatter.landing_len()), (40, 40, 16));
            let mut done = 0;
            while done < 40 {
                let bytes = gather.copy_out(step.min(40 - done)).expect("registered");
                done += bytes.len();
                assert!(scatter.copy_in(&bytes));
                assert_eq!(scatter.left, 40 - done);
            }
            assert_eq!(memory[1].read(999, 12), [&[0], &source[4..14], &[0]].concat());
            assert_eq!(memory[0].read(1999, 8), [&[0], &source[14..20], &[0]].concat());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_what_has_gone_is_noticed() {
        let (regions, memory) = regions();
        assert!(Gather::of(&regions, &[extent(1, 0, 10), extent(2, 4090, 7)]).is_err());
        assert!(Gather::of(&regions, &[extent(1, 0, 0)]).expect("inside").is_none());
        let parts = [LandingPart::Extent(extent(1, 0, 8)), LandingPart::Extent(extent(2, 0, 8))];
        for len_bytes in [15, 17, 0] {
            let error = Scatter::of(&regions, &parts, len_bytes).err().expect("another length");
            assert!(error.to_string().contains("into 16 bytes"), "{error}");
        }
        let endless = [LandingPart::Skip(u64::MAX), LandingPart::Skip(17)];
        assert!(Scatter::of(&regions, &endless, 16).is_err());
        let mut scatter = Scatter::of(&regions, &parts, 16).expect("as long");
        regions.remove(SegmentId(2)).expect("registered").close();
        assert!(scatter.copy_in(&[1; 8]));
        assert!(!scatter.copy_in(&[2; 8]), "the second region is gone");
        assert_eq!(memory[0].read(0, 9), [1, 1, 1, 1, 1, 1, 1, 1, 0]);
        assert_eq!(memory[1].read(0, 8), [0; 8]);
    }
}
