//! What a stream launches: many copies in one, checksums of many objects, conversions. Not the driver's call (`kernels`),
//! nor which copies go this way (`stream`). Invariant: a launch was checked for lengths, rights, alignment and reach, and
//! the stream holds all memory of it until it is past it.
//!
//! unsafe: hands addresses to kernels, which read and write there after the call.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use hetmem_core::StoreError;
use hetmem_kernels::cast::{self, Cast};
use hetmem_kernels::checksum::parts;
use hetmem_kernels::moves::{self, Move};
use hetmem_kernels::sum;

use crate::context::Entered;
use crate::failure::Failed;
use crate::kernels::{self, Kernel, Ready};
use crate::lists::Lent;
use crate::pinned::Hold;
use crate::reach::{Access, Reacher};
use crate::span::Span;
use crate::stream::{Event, Held, Stream};
use crate::{Device, Unavailable};

/// Copies that are ready to go in one launch. Their ends are held by whoever issues it.
pub(crate) struct Gather {
    ready: Ready,
    list: Arc<Lent>,
    count: u32,
}

/// Checksums that a device is computing. Dropped, they are computed all the same.
pub struct Checksums {
    event: Event,
    values: Arc<Lent>,
    lengths: Vec<u64>,
}

/// Copies that are ready to go in one launch, with all that they need.
pub struct Gathering {
    stream: Stream,
    gather: Gather,
    copies: usize,
    /// The ends, and what pins them.
    held: Hold,
}

impl Gathering {
    /// Queues the copies.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] if the driver refuses. What earlier work met with can show here.
    pub fn launch(&self) -> Result<(), StoreError> {
        let held = Held::new(self.copies, Vec::new(), vec![Arc::clone(&self.held), self.gather.hold()]);
        // SAFETY: the stream holds ends, pins and list from before this on.
        self.stream
            .issue_held(held, |entered| unsafe { self.gather.launch(entered, self.stream.raw()) })
            .map_err(|failed| failed.error("gather"))
    }
}

impl Gather {
    /// Makes the list. The moves are within the reach of the stream's device.
    pub(crate) fn new(stream: &Stream, moves: impl Iterator<Item = Move>) -> Result<Self, StoreError> {
        let ready = stream.device().context().kernel(Kernel::Gather)?;
        let list = moves::list(moves::cut(moves));
        let moves = (list.len() / moves::ENTRY_LEN) as u64;
        let count = u32::try_from(moves).ok().filter(|count| *count <= GRID_MAX);
        let count = count.ok_or_else(|| too_many("moves", moves))?;
        let list = stream.lists().lend_with(stream.device(), &list)?;
        Ok(Self { ready, list: Arc::new(list), count })
    }

    /// What must be held beside the ends.
    pub(crate) fn hold(&self) -> Hold {
        Arc::clone(&self.list) as Hold
    }

    /// # Safety
    /// The caller holds both ends of every copy, what pins them, and the list, until the stream is past them or its
    /// context is lost; the stream is a living one of the entered context, for whose device the list was made.
    pub(crate) unsafe fn launch(
        &self,
        entered: &Entered<'_>,
        stream: crate::table::Opaque,
    ) -> Result<(), Failed> {
        if self.count == 0 {
            return Ok(());
        }
        let parameters = [self.list.address(), self.count.into(), 0];
        // SAFETY: the caller's promise.
        unsafe { kernels::launch(entered, stream, self.ready, self.count, parameters) }
    }
}

/// The most blocks of threads of a launch in one dimension.
const GRID_MAX: u32 = 0x7fff_ffff;

fn too_many(what: &str, count: u64) -> StoreError {
    StoreError::invalid("launch", format!("{count} {what} are more than a GPU takes at once ({GRID_MAX})"))
}

impl Device {
    /// Whether the device computes checksums ([`Stream::checksums`]). Loads what it needs for that.
    ///
    /// # Errors
    /// Why it does not.
    pub fn can_checksum(&self) -> Result<(), Unavailable> {
        self.context().kernel(Kernel::Checksum).map(drop)
    }

    /// Whether the device makes many copies in one launch ([`Stream::gather`]). Loads what it needs for that.
    ///
    /// # Errors
    /// Why it does not; the driver then copies.
    pub fn can_gather(&self) -> Result<(), Unavailable> {
        self.context().kernel(Kernel::Gather).map(drop)
    }
}

impl Stream {
    /// Copies by a kernel, all in one launch: what [`Stream::copy_many`] does with many short copies, for any of them. They
    /// are in no order among themselves: no one may read what another writes.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for spans of different lengths, or that this device does not reach by itself
    /// (pinned host memory, its own and its peers'); [`hetmem_core::ErrorKind::Denied`] for a target that may only be
    /// read; [`hetmem_core::ErrorKind::Unavailable`] if the driver does not take the kernel. Nothing was copied then.
    pub fn gather(&self, pairs: &[(Span, Span)]) -> Result<(), StoreError> {
        self.prepare_gather(pairs)?.launch()
    }

    /// The same in two steps: what is prepared can be launched more than once.
    ///
    /// # Errors
    /// As [`Stream::gather`].
    pub fn prepare_gather(&self, pairs: &[(Span, Span)]) -> Result<Gathering, StoreError> {
        let mut reacher = Reacher::new(self.device());
        let mut moves = Vec::with_capacity(pairs.len());
        for (from, to) in pairs {
            if from.len_bytes() != to.len_bytes() {
                let why = format!("{} bytes are copied to a span of {}", from.len_bytes(), to.len_bytes());
                return Err(StoreError::invalid("gather", why));
            }
            let source = self.reach(&mut reacher, from, Access::Read)?;
            let target = self.reach(&mut reacher, to, Access::Write)?;
            moves.push(Move { source, target, len_bytes: from.len_bytes() });
        }
        let gather = Gather::new(self, moves.into_iter())?;
        let held = Arc::new(reacher.held(pairs.len(), None));
        Ok(Gathering { stream: self.clone(), gather, copies: pairs.len(), held })
    }

    /// Has the checksums of these spans computed on the device, as objects: all in one launch.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] if the driver does not take the kernel,
    /// [`hetmem_core::ErrorKind::Invalid`] for memory that this device does not reach by itself,
    /// [`hetmem_core::ErrorKind::Os`] if the driver refuses. What earlier work met with can show here.
    pub fn checksums(&self, spans: &[Span]) -> Result<Checksums, StoreError> {
        let ready = self.device().context().kernel(Kernel::Checksum)?;
        let mut reacher = Reacher::new(self.device());
        let mut objects = Vec::with_capacity(spans.len());
        for span in spans {
            objects.push((self.reach(&mut reacher, span, Access::Read)?, span.len_bytes()));
        }
        let lengths: Vec<u64> = spans.iter().map(Span::len_bytes).collect();
        let parts: Vec<parts::Part> = parts::cut(objects).collect();
        let count = u32::try_from(parts.len()).ok().filter(|count| *count <= GRID_MAX);
        let count = count.ok_or_else(|| too_many("parts of objects", parts.len() as u64))?;
        let all_values: u64 = lengths.iter().map(|len| parts::values_of(*len)).sum();
        let values = Arc::new(self.lists().lend(self.device(), all_values.max(1) * 8)?);
        if count > 0 {
            let list = Arc::new(self.lists().lend_with(self.device(), &parts::list(parts))?);
            let parameters = [list.address(), count.into(), values.address()];
            let held = reacher.held(spans.len(), [list as Hold, Arc::clone(&values) as Hold]);
            self.issue_held(held, |entered| {
                // SAFETY: the stream holds spans, list and values from before this on.
                unsafe { kernels::launch(entered, self.raw(), ready, count, parameters) }
            })
            .map_err(|failed| failed.error("compute checksums"))?;
        }
        Ok(Checksums { event: self.record()?, values, lengths })
    }

    /// Converts the elements of one span into another.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for lengths that are not those of as many elements, for an address that is not
    /// a multiple of an element's size, or for memory that this device does not reach by itself;
    /// [`hetmem_core::ErrorKind::Denied`] for a target that may only be read;
    /// [`hetmem_core::ErrorKind::Unavailable`] if the driver does not take the kernel,
    /// [`hetmem_core::ErrorKind::Os`] if it refuses.
    pub fn cast(&self, from: &Span, to: &Span, cast: Cast) -> Result<(), StoreError> {
        let wanted = cast.target_len(from.len_bytes())?;
        if wanted != to.len_bytes() {
            let why = format!("the target has {} bytes, {wanted} are written", to.len_bytes());
            return Err(StoreError::invalid("cast", why));
        }
        let mut reacher = Reacher::new(self.device());
        let source = self.reach(&mut reacher, from, Access::Read)?;
        let target = self.reach(&mut reacher, to, Access::Write)?;
        for (what, address, element) in
            [("source", source, cast.source_element_len()), ("target", target, cast.target_element_len())]
        {
            if !address.is_multiple_of(element) {
                let why =
                    format!("the {what} is at {address:#x}, no multiple of its elements' {element} bytes");
                return Err(StoreError::invalid("cast", why));
            }
        }
        let count = from.len_bytes() / cast.source_element_len();
        if count == 0 {
            return Ok(());
        }
        let ready = self.device().context().kernel(Kernel::Cast(cast))?;
        let blocks = u32::try_from(cast::blocks(count)).ok().filter(|blocks| *blocks <= GRID_MAX);
        let blocks = blocks.ok_or_else(|| too_many("blocks of elements", cast::blocks(count)))?;
        let parameters = [source, target, count];
        let held = reacher.held(1, None);
        // SAFETY: the stream holds both spans from before this on.
        self.issue_held(held, |entered| unsafe {
            kernels::launch(entered, self.raw(), ready, blocks, parameters)
        })
        .map_err(|failed| failed.error("cast"))
    }

    /// Reads a span and does next to nothing with it: the yardstick for [`Stream::checksums`] in benches. Adds the 64-bit
    /// words to the 64 words of `sums`, and leaves out what does not fill a vector of 16 bytes.
    ///
    /// # Errors
    /// As [`Stream::cast`].
    pub fn sum(&self, from: &Span, sums: &Span) -> Result<(), StoreError> {
        let ready = self.device().context().kernel(Kernel::Sum)?;
        let mut reacher = Reacher::new(self.device());
        let source = self.reach(&mut reacher, from, Access::Read)?;
        let target = self.reach(&mut reacher, sums, Access::Write)?;
        if !source.is_multiple_of(sum::VECTOR_LEN) || sums.len_bytes() != 8 * sum::SUMS {
            return Err(StoreError::invalid("sum", "a multiple of 16 is summed up into 64 words"));
        }
        let vectors = from.len_bytes() / sum::VECTOR_LEN;
        let blocks = u32::try_from(vectors.div_ceil(sum::TILE)).ok().filter(|blocks| *blocks <= GRID_MAX);
        let blocks = blocks.ok_or_else(|| too_many("vectors", vectors))?;
        if blocks == 0 {
            return Ok(());
        }
        let parameters = [source, vectors, target];
        let held = reacher.held(1, None);
        // SAFETY: the stream holds both spans from before this on.
        self.issue_held(held, |entered| unsafe {
            kernels::launch(entered, self.raw(), ready, blocks, parameters)
        })
        .map_err(|failed| failed.error("sum"))
    }

    /// Where kernels find a span.
    fn reach(&self, reacher: &mut Reacher<'_>, span: &Span, access: Access) -> Result<u64, StoreError> {
        if access == Access::Write {
            span.check_writable()?;
        }
        reacher.find(span, access).ok_or_else(|| {
            StoreError::invalid(
                "span",
                format!(
                    "gpu:{} does not reach {:?} by itself (host memory must be pinned, and for writing not registered as \
                     read-only)",
                    self.device().ordinal(),
                    span.memory()
                ),
            )
        })
    }
}

impl Checksums {
    /// Whether they are there.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what the work before them met with.
    pub fn is_done(&self) -> Result<bool, StoreError> {
        self.event.is_done()
    }

    /// Waits for them: one for each span, in order.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] for what they, or the work before them, met with.
    pub fn wait(self) -> Result<Vec<u64>, StoreError> {
        self.event.synchronize()?;
        let count: u64 = self.lengths.iter().map(|len| parts::values_of(*len)).sum();
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or_default()];
        self.values.read(&mut bytes)?;
        let values = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        Ok(parts::roots(self.lengths, values).collect())
    }
}

impl fmt::Debug for Gathering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathering").field("copies", &self.copies).finish_non_exhaustive()
    }
}

impl fmt::Debug for Checksums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checksums").field("spans", &self.lengths.len()).finish_non_exhaustive()
    }
}
