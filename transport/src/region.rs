//! Registered regions: which segment is where, who may read it, and the system calls that move its bytes. Not the
//! policy of when to move them. Invariant: a region's memory is touched only between `enter` and the drop of its
//! `Entered`, and `Region::close` returns only when no `Entered` of that region is left; so the memory may
//! go away right after. Nobody calls the sink or takes a lock between the two.
//!
//! Holds unsafe code: reads and writes of registered memory within checked bounds.
#![allow(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hetmem_core::{Extent, RemoteExtent, RemoteKey, SegmentId, StoreError};
use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use crate::fabric::Access;
use crate::memory::{Copying, RegionMemory, Ring, StagingWay};
use crate::payload::Target;

/// Set in `Region::users` once the region is deregistered.
const CLOSED: usize = 1 << (usize::BITS - 1);
/// Bytes of a word that is read by one atomic load.
const WORD_LEN: usize = 8;
/// Parts of one system call; the kernel's own limit (`UIO_MAXIOV`).
pub(crate) const PARTS_MAX: usize = 1024;

/// The regions of one fabric.
#[derive(Default)]
pub(crate) struct Regions {
    tables: RwLock<Tables>,
    /// Whether the fabric's adapters move memory of devices. Processors never do.
    with_devices: bool,
}

#[derive(Default)]
struct Tables {
    by_segment: HashMap<SegmentId, Arc<Region>>,
    by_key: HashMap<RemoteKey, Arc<Region>>,
    /// Every key that there ever was: a peer that still has one must never reach another region by it.
    used_keys: HashSet<RemoteKey>,
}

/// One registered segment.
pub(crate) struct Region {
    segment: SegmentId,
    key: RemoteKey,
    access: Access,
    base: *mut u8,
    len_bytes: usize,
    /// It is a device's: no processor touches it.
    of_device: bool,
    users: AtomicUsize,
    /// Copies that the device makes of it, those that have ended among them until the next one begins.
    copies: Mutex<Vec<Arc<dyn Copying>>>,
    /// Kept only so that it stays mapped; given back by `close`.
    memory: Mutex<Option<Arc<dyn RegionMemory>>>,
}

// SAFETY: `base` is dereferenced only through `Entered`, while `memory` keeps it mapped (see the module's
// invariant), and only by raw copies and system calls, which may race like any access to shared memory.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Regions {
    /// Of a fabric whose adapters may come by memory of devices.
    pub(crate) fn with_devices() -> Self {
        Self { with_devices: true, ..Self::default() }
    }

    /// Registers a segment under `key`.
    ///
    /// # Errors
    /// `Invalid` if the segment is registered, the key is or was in use, or the length is no length of memory;
    /// `Unavailable` for memory of a device on a fabric that cannot move that.
    pub(crate) fn register(
        &self,
        segment: SegmentId,
        key: RemoteKey,
        memory: Arc<dyn RegionMemory>,
        access: Access,
    ) -> Result<(), StoreError> {
        let Ok(len_bytes) = usize::try_from(memory.len_bytes()) else {
            return Err(StoreError::invalid(
                "region",
                format!("segment {segment} has {} bytes, more than fit in memory", memory.len_bytes()),
            ));
        };
        let device = memory.device();
        if !self.with_devices && device.is_some_and(|device| device.staging.is_none()) {
            let why = "it is a device's, and nothing copies it to where this fabric could move it from";
            return Err(StoreError::unavailable(format!("segment {segment}"), why));
        }
        let of_device = device.is_some();
        let region = Arc::new(Region::new((segment, key), access, (memory, len_bytes), of_device));
        let mut tables = self.tables.write();
        if tables.by_segment.contains_key(&segment) || !tables.used_keys.insert(key) {
            return Err(StoreError::invalid(
                "region",
                format!(
                    "segment {segment} is registered already, or key {key} was used before: deregister first"
                ),
            ));
        }
        tables.by_segment.insert(segment, Arc::clone(&region));
        tables.by_key.insert(key, region);
        Ok(())
    }

    /// Forgets a segment: no new use begins. The caller ends those that go on and then closes the region.
    pub(crate) fn remove(&self, segment: SegmentId) -> Option<Arc<Region>> {
        let mut tables = self.tables.write();
        let region = tables.by_segment.remove(&segment)?;
        tables.by_key.remove(&region.key);
        Some(region)
    }

    /// Forgets all segments.
    pub(crate) fn close_all(&self) {
        let tables = std::mem::take(&mut *self.tables.write());
        for region in tables.by_segment.into_values() {
            region.close();
        }
    }

    /// An own extent.
    ///
    /// # Errors
    /// `Invalid` if its segment is not registered or it is not inside.
    pub(crate) fn local(&self, operation: &'static str, extent: Extent) -> Result<Piece, StoreError> {
        self.tables.read().local(operation, extent)
    }

    /// Own extents, in their order.
    ///
    /// # Errors
    /// As `local`, for the first that is wrong.
    pub(crate) fn locals(
        &self,
        operation: &'static str,
        extents: impl Iterator<Item = Extent>,
    ) -> Result<Vec<Piece>, StoreError> {
        let tables = self.tables.read();
        extents.map(|extent| tables.local(operation, extent)).collect()
    }

    /// Own extents that go out as a payload, in their order.
    ///
    /// # Errors
    /// As `local`; `Unavailable` for memory of a device where that passes through host memory: of many small pieces that
    /// would be a copy each, and whoever has them all copies them better.
    pub(crate) fn sources(&self, extents: impl Iterator<Item = Extent>) -> Result<Vec<Piece>, StoreError> {
        let pieces = self.locals("send", extents)?;
        match pieces.iter().find(|piece| piece.region.of_device && !self.with_devices) {
            Some(piece) => {
                let why = "it is a device's, and a processor sends payloads";
                Err(StoreError::unavailable(format!("segment {}", piece.region.segment), why))
            }
            None => Ok(pieces),
        }
    }

    /// Own extents that a processor writes what comes to, in their order.
    ///
    /// # Errors
    /// As `local`; `Unavailable` for memory of a device.
    pub(crate) fn targets(&self, extents: impl Iterator<Item = Extent>) -> Result<Vec<Piece>, StoreError> {
        let pieces = self.locals("receive", extents)?;
        match pieces.iter().find(|piece| piece.region.of_device) {
            Some(piece) => {
                let why = "it is a device's: what comes unasked is put in place by a processor";
                Err(StoreError::unavailable(format!("segment {}", piece.region.segment), why))
            }
            None => Ok(pieces),
        }
    }

    /// What a peer asks to read. Nothing in `extent` is believed.
    ///
    /// # Errors
    /// `Stale` for an unknown key, `Denied` for a region that peers may not read, `Invalid` for a place outside.
    pub(crate) fn remote(&self, extent: RemoteExtent) -> Result<Piece, StoreError> {
        let region = self.tables.read().by_key.get(&extent.key).map(Arc::clone);
        let Some(region) = region else {
            return Err(StoreError::stale(
                "read",
                format!("remote key {:016x}", extent.key.0),
                "the owner has no region of this key: it was deregistered, or is of another incarnation",
            ));
        };
        if region.access != Access::RemoteRead {
            return Err(StoreError::denied(
                "read",
                format!(
                    "segment {} (key {:016x}) is registered for its own node only",
                    region.segment, extent.key.0
                ),
            ));
        }
        region.piece(extent.offset, extent.len_bytes).ok_or_else(|| {
            StoreError::invalid(
                "remote extent",
                format!(
                    "read: {} bytes at {} are not inside segment {} of {} bytes (key {:016x})",
                    extent.len_bytes, extent.offset, region.segment, region.len_bytes, extent.key.0
                ),
            )
        })
    }
}

impl Tables {
    fn local(&self, operation: &'static str, extent: Extent) -> Result<Piece, StoreError> {
        let Some(region) = self.by_segment.get(&extent.segment) else {
            return Err(StoreError::invalid(
                "extent",
                format!("{operation}: segment {} is not registered with this fabric", extent.segment),
            ));
        };
        region.piece(extent.offset, extent.len_bytes).ok_or_else(|| {
            StoreError::invalid(
                "extent",
                format!(
                    "{operation}: {} bytes at {} are not inside segment {} of {} bytes",
                    extent.len_bytes, extent.offset, extent.segment, region.len_bytes
                ),
            )
        })
    }
}

impl Region {
    fn new(
        (segment, key): (SegmentId, RemoteKey),
        access: Access,
        (memory, len_bytes): (Arc<dyn RegionMemory>, usize),
        of_device: bool,
    ) -> Self {
        Self {
            segment,
            key,
            access,
            base: memory.base(),
            len_bytes,
            of_device,
            users: AtomicUsize::new(0),
            copies: Mutex::default(),
            memory: Mutex::new(Some(memory)),
        }
    }

    fn piece(self: &Arc<Self>, offset: u64, len_bytes: u64) -> Option<Piece> {
        let end = offset.checked_add(len_bytes)?;
        if end > self.len_bytes as u64 {
            return None;
        }
        Some(Piece {
            region: Arc::clone(self),
            offset: usize::try_from(offset).ok()?,
            len_bytes: usize::try_from(len_bytes).ok()?,
        })
    }

    /// Keeps the memory in place until the returned value is dropped; none once the region is closed, nor if it is a
    /// device's.
    fn enter(&self) -> Option<Entered<'_>> {
        self.hold().filter(|_| !self.of_device)
    }

    /// The same, for memory of which kind so ever: not for a processor to touch it.
    fn hold(&self) -> Option<Entered<'_>> {
        let held = Entered(self);
        (self.users.fetch_add(1, Ordering::Acquire) & CLOSED == 0).then_some(held)
    }

    /// Waits until nobody touches the memory and gives it back; whoever comes later finds the region closed.
    pub(crate) fn close(&self) {
        self.users.fetch_or(CLOSED, Ordering::AcqRel);
        // System calls on these bytes never block, so the wait is short.
        while self.users.load(Ordering::Acquire) & !CLOSED != 0 {
            std::thread::yield_now();
        }
        for copy in std::mem::take(&mut *self.copies.lock()) {
            // What it came to is said to whoever began it.
            let _ = copy.wait();
        }
        self.memory.lock().take();
    }
}

/// The right to touch a region's memory.
struct Entered<'a>(&'a Region);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Release);
    }
}

/// Why bytes of a region could not be moved.
#[derive(Debug)]
pub(crate) enum Unmoved {
    /// The region was deregistered.
    Closed,
    /// The system refused; `Errno::AGAIN` means not now.
    Os(Errno),
    /// The device whose memory it is did not copy it.
    Device(StoreError),
}

/// A part of a region, checked to lie inside it.
#[derive(Clone)]
pub(crate) struct Piece {
    region: Arc<Region>,
    offset: usize,
    len_bytes: usize,
}

impl Piece {
    pub(crate) fn len(&self) -> usize {
        self.len_bytes
    }

    pub(crate) fn segment(&self) -> SegmentId {
        self.region.segment
    }

    /// All of a piece of host memory that is no segment.
    pub(crate) fn of_ring(memory: Arc<dyn RegionMemory>) -> Self {
        let len_bytes = usize::try_from(memory.len_bytes()).unwrap_or_default();
        let region = Region::new((SegmentId(0), RemoteKey(0)), Access::Local, (memory, len_bytes), false);
        Self { region: Arc::new(region), offset: 0, len_bytes }
    }

    /// Whether no processor touches it.
    pub(crate) fn is_of_device(&self) -> bool {
        self.region.of_device
    }

    /// A ring for bytes of this piece, which is a device's.
    ///
    /// # Errors
    /// `Closed`; `Device` if there can be none.
    pub(crate) fn ring(&self, len_bytes: usize) -> Result<Box<dyn Ring>, Unmoved> {
        let memory = self.region.memory.lock().clone().ok_or(Unmoved::Closed)?;
        let nobody = || StoreError::unavailable("staging", "nothing copies this memory");
        let staging = memory.device().and_then(|device| device.staging).ok_or_else(nobody);
        staging.and_then(|staging| staging.ring(len_bytes)).map_err(Unmoved::Device)
    }

    /// Begins a copy between the start of this piece, which is a device's, and a place in a ring that was made for it.
    ///
    /// # Errors
    /// `Closed`; `Device` for what the device says.
    pub(crate) fn begin_copy(
        &self,
        way: StagingWay,
        (ring, at): (&mut dyn Ring, usize),
    ) -> Result<Arc<dyn Copying>, Unmoved> {
        // Whoever closes the region sees this copy among those of the region, or comes before it.
        let _held = self.region.hold().ok_or(Unmoved::Closed)?;
        let copy = ring.begin(way, at, self.offset as u64, self.len_bytes).map_err(Unmoved::Device)?;
        let mut copies = self.region.copies.lock();
        copies.retain(|copy| !copy.is_over());
        copies.push(Arc::clone(&copy));
        Ok(copy)
    }

    /// Where the piece is: its segment, the address of that, and its place in it.
    pub(crate) fn place(&self) -> (SegmentId, u64, u64) {
        (self.region.segment, self.region.base as u64, self.offset as u64)
    }

    /// The part from `start`, at most `len_bytes` long.
    pub(crate) fn part(&self, start: usize, len_bytes: usize) -> Self {
        let start = start.min(self.len_bytes);
        Self {
            region: Arc::clone(&self.region),
            offset: self.offset + start,
            len_bytes: len_bytes.min(self.len_bytes - start),
        }
    }

    /// The bytes from `done` on, to be read by a system call.
    fn bytes_to_send<'a>(&self, entered: &'a Entered<'_>, done: usize) -> &'a [u8] {
        debug_assert!(std::ptr::eq(entered.0, &raw const *self.region));
        let done = done.min(self.len_bytes);
        // SAFETY: `piece` checked that the range is inside the region; `entered` keeps it mapped beyond the call.
        // The slice is only handed to the kernel, which copies whatever bytes are there at that moment.
        unsafe { std::slice::from_raw_parts(entered.0.base.add(self.offset + done), self.len_bytes - done) }
    }

    /// The bytes from `done` on, to be written by a system call.
    #[allow(clippy::mut_from_ref, reason = "the memory is not this value's; see the safety comment")]
    fn room_to_receive<'a>(&self, entered: &'a Entered<'_>, done: usize) -> &'a mut [u8] {
        debug_assert!(std::ptr::eq(entered.0, &raw const *self.region));
        let done = done.min(self.len_bytes);
        // SAFETY: as in `bytes_to_send`; nothing else in this process holds a reference to these bytes
        // (`RegionMemory`'s promise, and extents that are filled at one time do not overlap), and the slice does not
        // outlive the call that it is handed to.
        unsafe {
            std::slice::from_raw_parts_mut(entered.0.base.add(self.offset + done), self.len_bytes - done)
        }
    }

    /// Writes `head`, then the piece from `done` on, to a socket; says how many bytes it took. If `more` follows, the last
    /// of them may wait for that.
    pub(crate) fn send(
        &self,
        socket: BorrowedFd<'_>,
        head: &[u8],
        done: usize,
        more: bool,
    ) -> Result<usize, Unmoved> {
        let entered = self.region.enter().ok_or(Unmoved::Closed)?;
        send_parts(socket, &[IoSlice::new(head), IoSlice::new(self.bytes_to_send(&entered, done))], more)
    }

    /// Receives into `head`, then into the piece from `done` on, and what comes after its end into `rest`; says how many
    /// bytes came.
    pub(crate) fn receive(
        &self,
        socket: BorrowedFd<'_>,
        head: &mut [u8],
        done: usize,
        rest: &mut [u8],
    ) -> Result<usize, Unmoved> {
        let entered = self.region.enter().ok_or(Unmoved::Closed)?;
        let bytes = self.room_to_receive(&entered, done);
        if head.is_empty() && rest.is_empty() {
            let (count, _) = rustix::net::recv(socket, bytes, RecvFlags::DONTWAIT).map_err(Unmoved::Os)?;
            return Ok(count);
        }
        let mut parts = [IoSliceMut::new(head), IoSliceMut::new(bytes), IoSliceMut::new(rest)];
        rustix::io::readv(socket, &mut parts).map_err(Unmoved::Os)
    }

    /// Copies bytes to the piece from `done` on; says whether the region was still there.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn copy_in(&self, done: usize, bytes: &[u8]) -> bool {
        assert!(done.checked_add(bytes.len()).is_some_and(|end| end <= self.len_bytes));
        let Some(entered) = self.region.enter() else {
            return false;
        };
        // SAFETY: just checked to be inside the piece, and `entered` keeps it mapped; `bytes` is memory of this
        // process that no region's promise allows to overlap.
        unsafe {
            let target = entered.0.base.add(self.offset + done);
            if bytes.len() == WORD_LEN && target.cast::<AtomicU64>().is_aligned() {
                let mut word = [0; WORD_LEN];
                word.copy_from_slice(bytes);
                (*target.cast::<AtomicU64>()).store(u64::from_ne_bytes(word), Ordering::Release);
            } else {
                bytes.as_ptr().copy_to_nonoverlapping(target, bytes.len());
            }
        }
        true
    }

    /// Copies bytes of the piece from `done` on; none if the region is gone.
    ///
    /// # Panics
    /// If they are not all inside.
    pub(crate) fn copy_out(&self, done: usize, len_bytes: usize) -> Option<Vec<u8>> {
        assert!(done.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes));
        let entered = self.region.enter()?;
        let mut bytes = vec![0; len_bytes];
        // SAFETY: just checked to be inside the piece, and `entered` keeps it mapped.
        unsafe {
            let source = entered.0.base.add(self.offset + done);
            source.copy_to_nonoverlapping(bytes.as_mut_ptr(), len_bytes);
        }
        Some(bytes)
    }

    /// Whether `word` serves this piece: 8 bytes at an address divisible by 8, of host memory.
    pub(crate) fn is_word(&self) -> bool {
        let at = self.region.base as usize + self.offset;
        self.len_bytes == WORD_LEN && at.is_multiple_of(WORD_LEN) && !self.region.of_device
    }

    /// The piece's 8 bytes by one atomic load, as they lie in memory; none if the region is gone.
    ///
    /// # Panics
    /// If it is no word.
    pub(crate) fn word(&self) -> Option<[u8; WORD_LEN]> {
        assert!(self.is_word());
        let entered = self.region.enter()?;
        // SAFETY: inside the region (`piece`), aligned (`is_word`), mapped while `entered` lives.
        let value = unsafe { (*entered.0.base.add(self.offset).cast::<AtomicU64>()).load(Ordering::Acquire) };
        Some(value.to_ne_bytes())
    }
}

fn send_parts(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>], more: bool) -> Result<usize, Unmoved> {
    let mut control = SendAncillaryBuffer::default();
    let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    flags.set(SendFlags::MORE, more);
    rustix::net::sendmsg(socket, parts, &mut control, flags).map_err(Unmoved::Os)
}

/// Enters the regions of all pieces, of neighbours once. Which of the results a piece has is found again by going
/// along both.
fn enter_all<'a>(pieces: impl Iterator<Item = &'a Piece>) -> Result<Vec<Entered<'a>>, Unmoved> {
    let mut entered: Vec<Entered<'a>> = Vec::new();
    for piece in pieces {
        if entered.last().is_none_or(|last| !std::ptr::eq(last.0, &raw const *piece.region)) {
            entered.push(piece.region.enter().ok_or(Unmoved::Closed)?);
        }
    }
    Ok(entered)
}

/// Goes along what `enter_all` has returned.
struct Along<'e, 'a>(&'e [Entered<'a>]);

impl<'e, 'a> Along<'e, 'a> {
    fn of(&mut self, piece: &Piece) -> &'e Entered<'a> {
        while !std::ptr::eq(self.0[0].0, &raw const *piece.region) {
            self.0 = &self.0[1..];
        }
        &self.0[0]
    }
}

/// Writes `head`, then the pieces, the first from `done` on, as many as one call takes; says how many bytes went. If
/// `more` follows, the last of them may wait for that.
pub(crate) fn send_pieces(
    socket: BorrowedFd<'_>,
    head: &[u8],
    pieces: &[Piece],
    done: usize,
    more: bool,
) -> Result<usize, Unmoved> {
    let pieces = &pieces[..pieces.len().min(PARTS_MAX - 1)];
    let entered = enter_all(pieces.iter())?;
    let mut along = Along(&entered);
    let mut parts = Vec::with_capacity(pieces.len() + 1);
    parts.push(IoSlice::new(head));
    for (number, piece) in pieces.iter().enumerate() {
        let done = if number == 0 { done } else { 0 };
        parts.push(IoSlice::new(piece.bytes_to_send(along.of(piece), done)));
    }
    send_parts(socket, &parts, more)
}

/// Receives into the targets, the first from `done` on, and what comes after the last into `rest`; what is skipped
/// goes to `discard`, in as many bytes as that has. Takes as many targets as one call does. Says how many bytes came,
/// and how many could have.
pub(crate) fn receive_targets(
    socket: BorrowedFd<'_>,
    targets: &[Target],
    done: usize,
    mut discard: &mut [u8],
    rest: &mut [u8],
) -> Result<(usize, usize), Unmoved> {
    let some = &targets[..targets.len().min(PARTS_MAX - 1)];
    let entered = enter_all(some.iter().filter_map(Target::piece))?;
    let mut along = Along(&entered);
    let mut parts = Vec::with_capacity(some.len() + 1);
    let (mut room, mut complete) = (0, some.len() == targets.len());
    for (number, target) in some.iter().enumerate() {
        let done = if number == 0 { done } else { 0 };
        let (part, left) = match target {
            Target::Piece(piece) => (piece.room_to_receive(along.of(piece), done), piece.len() - done),
            Target::Skip(len) => {
                let (part, others) = discard.split_at_mut((len - done).min(discard.len()));
                discard = others;
                (part, len - done)
            }
        };
        let is_short = part.len() < left;
        room += part.len();
        parts.push(IoSliceMut::new(part));
        if is_short {
            complete = false;
            break;
        }
    }
    if complete {
        room += rest.len();
        parts.push(IoSliceMut::new(rest));
    }
    rustix::io::readv(socket, &mut parts).map(|count| (count, room)).map_err(Unmoved::Os)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HeapRegion;

    fn regions(access: Access) -> (Regions, Arc<HeapRegion>) {
        let regions = Regions::default();
        let memory = Arc::new(HeapRegion::new(4096));
        regions.register(SegmentId(1), RemoteKey(7), Arc::clone(&memory) as _, access).expect("register");
        (regions, memory)
    }

    #[test]
    fn nothing_outside_is_reached() {
        let (regions, _memory) = regions(Access::RemoteRead);
        for (offset, len_bytes) in [(0, 4097), (4096, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let remote = RemoteExtent { key: RemoteKey(7), offset, len_bytes };
            let error = regions.remote(remote).err().expect("outside");
            assert!(error.to_string().contains("4096 bytes"), "{error}");
            let local = Extent { segment: SegmentId(1), offset, len_bytes };
            assert!(regions.local("send", local).is_err());
        }
        assert!(regions.remote(RemoteExtent { key: RemoteKey(7), offset: 4096, len_bytes: 0 }).is_ok());
    }

    #[test]
    fn a_key_never_names_a_second_region() {
        let (regions, _memory) = regions(Access::RemoteRead);
        regions.remove(SegmentId(1)).expect("registered").close();
        let memory = Arc::new(HeapRegion::new(4096));
        for segment in [SegmentId(1), SegmentId(2)] {
            let again = regions.register(segment, RemoteKey(7), Arc::clone(&memory) as _, Access::RemoteRead);
            assert!(again.is_err(), "a peer may still have the key");
        }
        assert!(regions.register(SegmentId(1), RemoteKey(8), memory, Access::RemoteRead).is_ok());
    }

    #[test]
    fn a_closed_region_is_not_touched() {
        let (regions, memory) = regions(Access::RemoteRead);
        let extent = RemoteExtent { key: RemoteKey(7), offset: 8, len_bytes: 8 };
        let piece = regions.remote(extent).expect("inside");
        memory.write(8, &7_u64.to_ne_bytes());
        assert_eq!(piece.word(), Some(7_u64.to_ne_bytes()));
        regions.remove(SegmentId(1)).expect("registered").close();
        assert_eq!(Arc::strong_count(&memory), 1, "the fabric keeps nothing of it");
        assert_eq!(piece.word(), None);
        assert!(!piece.copy_in(0, &[1]));
        assert_eq!(piece.copy_out(0, 8), None);
        assert!(regions.remove(SegmentId(1)).is_none());
    }

    #[test]
    fn closing_waits_for_whoever_is_inside() {
        let (regions, _memory) = regions(Access::Local);
        let region = Arc::clone(&regions.tables.read().by_segment[&SegmentId(1)]);
        let entered = region.enter().expect("open");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| regions.remove(SegmentId(1)).expect("registered").close());
            while region.users.load(Ordering::Acquire) & CLOSED == 0 {
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished());
            assert!(region.memory.lock().is_some(), "still mapped for the one inside");
            drop(entered);
            waiting.join().expect("thread");
        });
    }
}
