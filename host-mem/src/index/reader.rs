//! A client's side of the index: find, and pin in place. Not the pin words (`page`). Invariants: it writes nothing to
//! the index and waits for nobody; what it returns belonged together at one moment, and what it returns pinned stays.

use std::os::fd::{AsFd, OwnedFd};

use hetmem_core::{Key, SlotId, StoreError};

use crate::alive::is_alive;
use crate::index::layout::{ALIVE, Geometry, MAGIC, SLOT_WORDS, VERSION};
use crate::index::record::Record;
use crate::index::slot::{self, Taken};
use crate::index::table::{Probe, Table};
use crate::index::{Found, Pinned};
use crate::mapping::{Access, Mapping};
use crate::memfd;
use crate::page::ClientPage;
use crate::sync::{AtomicU64, Ordering};

/// Looks at a slot or chain that keeps changing, before giving way to the writer.
const SPINS: u32 = 64;
/// Looks in all. A writer that was killed halfway leaves its slot odd for good; the node's answer to a question is
/// then what tells.
const ATTEMPTS: u32 = 4096;

/// A client's view of the index.
#[derive(Debug)]
pub struct IndexReader {
    geometry: Geometry,
    mapping: Mapping,
    /// [`ATTEMPTS`], except in tests.
    pub(super) attempts: u32,
}

impl IndexReader {
    /// Maps the descriptor that came with `Welcome`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Protocol`] if it is no index of this layout, or shorter than its header says;
    /// [`hetmem_core::ErrorKind::Os`] if it cannot be mapped.
    pub fn map(fd: OwnedFd) -> Result<Self, StoreError> {
        const HEADER_LEN: u64 = 4096;
        memfd::check_sealed(fd.as_fd(), "index", HEADER_LEN)?;
        let header = Mapping::new(fd.as_fd(), HEADER_LEN, Access::Read)?;
        let header: [u64; 10] = std::array::from_fn(|word| header.words()[word].load(Ordering::Relaxed));
        if header[..2] != [MAGIC, VERSION] {
            return Err(StoreError::protocol(format!(
                "index starts with {:x?}, this build uses {:x?}",
                &header[..2],
                [MAGIC, VERSION]
            )));
        }
        let geometry = u32::try_from(header[2]).ok().and_then(|objects| Geometry::new(objects).ok());
        let Some(geometry) = geometry.filter(|geometry| geometry.header() == header) else {
            return Err(StoreError::protocol(format!("index header is {header:x?}, which no layout gives")));
        };
        let len_bytes = geometry.end as u64 * 8;
        memfd::check_sealed(fd.as_fd(), "index", len_bytes)?;
        let mapping = Mapping::new(fd.as_fd(), len_bytes, Access::Read)?;
        drop(fd);
        Ok(Self { geometry, mapping, attempts: ATTEMPTS })
    }

    /// Whether the node runs: false as soon as it has stopped or was killed. True for longer only where the kernel
    /// gives no word of that.
    #[must_use]
    #[inline]
    pub fn node_is_alive(&self) -> bool {
        is_alive(self.mapping.words()[ALIVE].load(Ordering::Relaxed))
    }

    /// Slots.
    #[must_use]
    pub fn objects_max(&self) -> u32 {
        self.geometry.objects_max
    }

    /// Finds a key and pins its extent, without a word to anybody. `fingerprint` is `key.fingerprint()`.
    ///
    /// `None` means that the key was not in the index at some moment during the call, or (only while its entry is
    /// being changed all the time) that this could not be made out: the node knows.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Busy`] when all of the client's pin words are in use;
    /// [`hetmem_core::ErrorKind::Corrupt`] when the entry makes no sense.
    #[inline]
    pub fn get(&self, key: &Key, fingerprint: u64, page: &ClientPage) -> Result<Option<Pinned>, StoreError> {
        let (pins, place) = page.pins();
        let memory = self.mapping.words();
        let mut record = Record::default();
        let probe = |number: u32| {
            let Some(words) = self.slot(memory, number) else {
                return Probe::Differs;
            };
            let read = |words: &[_]| record.read(memory, &self.geometry, number, words, key, fingerprint);
            match slot::take(words, pins, place.start, read) {
                Taken::Pinned(position) => Probe::Found(Some((number, position))),
                Taken::NoPins => Probe::Found(None),
                Taken::Differs => Probe::Differs,
                Taken::Unsteady => Probe::Unsteady,
            }
        };
        let Some(taken) = self.search(memory, fingerprint, probe) else {
            return Ok(None);
        };
        let Some((number, position)) = taken else {
            return Err(no_pins(pins.words.len()));
        };
        let pin = page.claimed(place, position);
        match record.decode(key) {
            Ok(entry) => {
                let slot = SlotId(number);
                page.touch_in(place, slot);
                Ok(Some(Pinned { slot, entry, pin }))
            }
            Err(error) => {
                page.unpin(pin);
                Err(error)
            }
        }
    }

    /// Finds a key without pinning it: what is returned may be old as soon as it is returned.
    ///
    /// `None` as in [`IndexReader::get`].
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] when the entry makes no sense.
    pub fn find(&self, key: &Key, fingerprint: u64) -> Result<Option<Found>, StoreError> {
        let memory = self.mapping.words();
        let mut record = Record::default();
        let probe = |number: u32| {
            let Some(words) = self.slot(memory, number) else {
                return Probe::Differs;
            };
            let read = |words: &[_]| record.read(memory, &self.geometry, number, words, key, fingerprint);
            match slot::look(words, read) {
                Some(true) => Probe::Found(number),
                Some(false) => Probe::Differs,
                None => Probe::Unsteady,
            }
        };
        let Some(number) = self.search(memory, fingerprint, probe) else {
            return Ok(None);
        };
        Ok(Some(Found { slot: SlotId(number), entry: record.decode(key)? }))
    }

    #[inline]
    fn slot<'memory>(&self, memory: &'memory [AtomicU64], number: u32) -> Option<&'memory [AtomicU64]> {
        memory.get(self.geometry.slot_at(number)?..)?.get(..SLOT_WORDS)
    }

    #[inline]
    fn search<T>(
        &self,
        memory: &[AtomicU64],
        fingerprint: u64,
        mut probe: impl FnMut(u32) -> Probe<T>,
    ) -> Option<T> {
        let table = Table { geometry: &self.geometry, words: memory };
        for attempt in 0..self.attempts {
            match table.search(fingerprint, &mut probe) {
                Probe::Found(found) => return Some(found),
                Probe::Differs => return None,
                Probe::Unsteady if attempt < SPINS => std::hint::spin_loop(),
                Probe::Unsteady => std::thread::yield_now(),
            }
        }
        None
    }
}

#[cold]
fn no_pins(pins: usize) -> StoreError {
    StoreError::busy("get", format!("all {pins} pins of this client are in use: drop objects"))
}
