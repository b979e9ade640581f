//! What is at which device address: reservations, and the mappings in them or of allocations. Not what copies do with it.
//! Invariant: a mapping's memory stays accessible while somebody holds its `Alive`, and none is held of a dead mapping.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crate::abi::{ACCESS_NONE, ACCESS_READ, ACCESS_READ_WRITE, DevicePtr, Handle, LOCATION_DEVICE, Location};
use crate::code::{Code, Outcome};
use crate::device::Device;
use crate::driver::Driver;
use crate::handles::Kind;
use crate::physical::{Physical, Traits, whole_pages};
use crate::raw::Pages;

/// 2 MiB, of handles, of reservations and of what is mapped.
pub(crate) const GRANULARITY: usize = 2 << 20;

#[derive(Debug, Default)]
pub(crate) struct Space {
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    /// By address, like the mappings.
    reservations: BTreeMap<usize, Arc<Pages>>,
    mappings: BTreeMap<usize, Arc<Mapping>>,
    handles: BTreeMap<u64, Held>,
    latest_handle: u64,
}

/// A handle of virtual memory management.
#[derive(Debug)]
struct Held {
    physical: Arc<Physical>,
    references: u64,
}

/// Memory at an address.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) address: usize,
    /// As asked for: copies past it fail, also inside the last page.
    pub(crate) len: usize,
    pub(crate) physical: Arc<Physical>,
    /// The number of the handle; none for memory of `cuMemAlloc`.
    handle: Option<u64>,
    /// Unique in this process.
    pub(crate) id: u64,
    pub(crate) sync_memops: AtomicBool,
    pages: Arc<Pages>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    is_alive: bool,
    /// By device.
    rights: Vec<i32>,
}

/// Held while a mapping's memory is used.
#[derive(Debug)]
pub(crate) struct Alive<'a>(RwLockReadGuard<'a, State>);

/// A part of a mapping.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl Alive<'_> {
    pub(crate) fn rights(&self, device: usize) -> i32 {
        self.0.rights.get(device).copied().unwrap_or(ACCESS_NONE)
    }
}

impl Mapping {
    fn new(at: (usize, usize), handle: Option<u64>, physical: Arc<Physical>, pages: Arc<Pages>) -> Arc<Self> {
        static ID: AtomicU64 = AtomicU64::new(1);
        let state = RwLock::new(State { is_alive: true, rights: Vec::new() });
        let (id, sync_memops) = (ID.fetch_add(1, Ordering::Relaxed), AtomicBool::new(false));
        Arc::new(Self { address: at.0, len: at.1, physical, handle, id, sync_memops, pages, state })
    }

    pub(crate) fn is_allocation(&self) -> bool {
        self.handle.is_none()
    }

    fn end(&self) -> usize {
        self.address + self.len
    }

    fn offset(&self) -> usize {
        self.address - self.pages.address()
    }

    /// Keeps the memory accessible.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` if it is gone.
    pub(crate) fn alive(&self) -> Outcome<Alive<'_>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.is_alive { Ok(Alive(state)) } else { Err(Code::ILLEGAL_ADDRESS) }
    }

    pub(crate) fn rights(&self, device: usize) -> i32 {
        self.alive().map_or(ACCESS_NONE, |alive| alive.rights(device))
    }

    /// Waits for copies that are running, and lets none begin.
    pub(crate) fn end_life(&self) -> Outcome {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.is_alive = false;
        if self.is_allocation() { Ok(()) } else { self.pages.vacate(self.offset(), self.len) }
    }

    fn grant(&self, devices: usize, device: usize, rights: i32) -> Outcome {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.rights.resize(devices, ACCESS_NONE);
        if let Some(own) = state.rights.get_mut(device) {
            *own = rights;
        }
        let any = |right: i32| state.rights.iter().any(|&rights| rights & right == right);
        self.pages.protect(self.offset(), self.len, any(ACCESS_READ), any(ACCESS_READ_WRITE))
    }
}

impl Space {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `cuMemAlloc` does.
    ///
    /// # Errors
    /// `INVALID_VALUE` for 0 bytes, `OUT_OF_MEMORY`.
    pub(crate) fn allocate(&self, driver: &Driver, device: &Device, len: usize) -> Outcome<DevicePtr> {
        if len == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let traits = Traits {
            device: device.ordinal,
            size: whole_pages(len)?,
            handle_types: 0,
            nic: driver.config.has("rdma"),
            stale: driver.config.stale,
        };
        let physical = Physical::create(driver, device, traits)?;
        let pages = Arc::new(physical.pages()?);
        let mapping = Mapping::new((pages.address(), len), None, physical, pages);
        let mut state = mapping.state.write().unwrap_or_else(PoisonError::into_inner);
        // Copies between devices work without peer access: the real driver stages them.
        state.rights = vec![ACCESS_READ_WRITE; driver.devices.len()];
        drop(state);
        let pointer = DevicePtr::of_address(mapping.address);
        self.books().mappings.insert(mapping.address, mapping);
        Ok(pointer)
    }

    /// Takes an allocation out of the books, so that nothing new reaches it. Its owner ends its life.
    ///
    /// # Errors
    /// `INVALID_VALUE` if no allocation begins there.
    pub(crate) fn take_allocation(&self, pointer: DevicePtr) -> Outcome<Arc<Mapping>> {
        let address = pointer.address().ok_or(Code::INVALID_VALUE)?;
        let mut books = self.books();
        let is_allocation = books.mappings.get(&address).is_some_and(|mapping| mapping.is_allocation());
        let taken = if is_allocation { books.mappings.remove(&address) } else { None };
        taken.ok_or(Code::INVALID_VALUE)
    }

    /// Frees what `cuMemAlloc` gave from this device.
    pub(crate) fn free_all_of(&self, device: usize) {
        self.books().mappings.retain(|_, mapping| {
            let goes = mapping.is_allocation() && mapping.physical.traits.device == device;
            if goes {
                // An allocation's life ends without asking the system for anything.
                let _ = mapping.end_life();
            }
            !goes
        });
    }

    /// # Errors
    /// `INVALID_VALUE` for a size or alignment that is not of the granularity, `OUT_OF_MEMORY`.
    pub(crate) fn reserve(&self, len: usize, alignment: usize) -> Outcome<DevicePtr> {
        let alignment = alignment.max(GRANULARITY);
        if len == 0 || !len.is_multiple_of(GRANULARITY) || !alignment.is_power_of_two() {
            return Err(Code::INVALID_VALUE);
        }
        let pages = Arc::new(Pages::reserve(len, alignment)?);
        let pointer = DevicePtr::of_address(pages.address());
        self.books().reservations.insert(pages.address(), pages);
        Ok(pointer)
    }

    /// # Errors
    /// `INVALID_VALUE` for what is not one whole reservation with nothing mapped in it.
    pub(crate) fn unreserve(&self, pointer: DevicePtr, len: usize) -> Outcome {
        let address = pointer.address().ok_or(Code::INVALID_VALUE)?;
        let mut books = self.books();
        let is_whole = books.reservations.get(&address).is_some_and(|pages| pages.len() == len);
        let is_used = is_whole && books.mappings.range(address..address + len).next().is_some();
        if !is_whole || is_used {
            return Err(Code::INVALID_VALUE);
        }
        books.reservations.remove(&address);
        Ok(())
    }

    /// A handle for new or imported memory, with one reference.
    pub(crate) fn hold(&self, physical: Arc<Physical>) -> Handle {
        let mut books = self.books();
        books.latest_handle += 1;
        let number = books.latest_handle;
        books.handles.insert(number, Held { physical, references: 1 });
        handle_of(number)
    }

    /// # Errors
    /// `INVALID_VALUE` for what is no handle.
    pub(crate) fn held(&self, handle: Handle) -> Outcome<Arc<Physical>> {
        let number = number_of(handle)?;
        self.books().handles.get(&number).map(|held| Arc::clone(&held.physical)).ok_or(Code::INVALID_VALUE)
    }

    /// Gives one reference back.
    ///
    /// # Errors
    /// `INVALID_VALUE` for what is no handle.
    pub(crate) fn release(&self, handle: Handle) -> Outcome {
        let number = number_of(handle)?;
        let mut books = self.books();
        let held = books.handles.get_mut(&number).ok_or(Code::INVALID_VALUE)?;
        held.references -= 1;
        if held.references == 0 {
            books.handles.remove(&number);
        }
        Ok(())
    }

    /// The handle of what is mapped at an address, with one reference more.
    ///
    /// # Errors
    /// `INVALID_VALUE` if no handle is mapped there.
    pub(crate) fn retain(&self, pointer: DevicePtr) -> Outcome<Handle> {
        let mapping = self.mapping_at(pointer).ok_or(Code::INVALID_VALUE)?;
        let number = mapping.handle.ok_or(Code::INVALID_VALUE)?;
        let mut books = self.books();
        let unheld = || Held { physical: Arc::clone(&mapping.physical), references: 0 };
        books.handles.entry(number).or_insert_with(unheld).references += 1;
        Ok(handle_of(number))
    }

    /// Maps the beginning of a handle's memory into reserved addresses.
    ///
    /// # Errors
    /// `INVALID_VALUE` for addresses that are not reserved or not free, or more than the handle has.
    pub(crate) fn map(&self, pointer: DevicePtr, len: usize, handle: Handle) -> Outcome {
        let address = aligned(pointer, len)?;
        let number = number_of(handle)?;
        let mut books = self.books();
        let physical = Arc::clone(&books.handles.get(&number).ok_or(Code::INVALID_VALUE)?.physical);
        let (_, pages) = books.reservations.range(..=address).next_back().ok_or(Code::INVALID_VALUE)?;
        let pages = Arc::clone(pages);
        let is_inside = address + len <= pages.address() + pages.len();
        let is_used = books.mappings.range(address..address + len).next().is_some()
            || books.around(address).is_some_and(|mapping| mapping.end() > address);
        if !is_inside || is_used || len > physical.traits.size {
            return Err(Code::INVALID_VALUE);
        }
        physical.place(&pages, address - pages.address(), len)?;
        let mapping = Mapping::new((address, len), Some(number), physical, pages);
        books.mappings.insert(address, mapping);
        Ok(())
    }

    /// Unmaps whole mappings. Copies that are running are waited for; those that come later find nothing there.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a range that is not made of whole mappings.
    pub(crate) fn unmap(&self, pointer: DevicePtr, len: usize) -> Outcome {
        let mut books = self.books();
        let mappings = books.whole(pointer, len)?;
        for mapping in mappings {
            mapping.end_life()?;
            books.mappings.remove(&mapping.address);
        }
        Ok(())
    }

    /// Sets what a device may do with whole mappings.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a range that is not made of whole mappings, or rights that are none.
    pub(crate) fn grant(
        &self,
        driver: &Driver,
        (pointer, len): (DevicePtr, usize),
        location: Location,
        rights: i32,
    ) -> Outcome {
        if location.kind != LOCATION_DEVICE
            || ![ACCESS_NONE, ACCESS_READ, ACCESS_READ_WRITE].contains(&rights)
        {
            return Err(Code::INVALID_VALUE);
        }
        let device = driver.device(location.id)?.ordinal;
        if rights == ACCESS_READ {
            driver.need("read-only")?;
        }
        let mappings = self.books().whole(pointer, len)?;
        for mapping in &mappings {
            if mapping.physical.traits.device != device && rights != ACCESS_NONE {
                driver.need("peer").map_err(|_| Code::PEER_ACCESS_UNSUPPORTED)?;
            }
        }
        mappings.iter().try_for_each(|mapping| mapping.grant(driver.devices.len(), device, rights))
    }

    /// What is mapped at an address; none if nothing is.
    pub(crate) fn mapping_at(&self, pointer: DevicePtr) -> Option<Arc<Mapping>> {
        let address = pointer.address()?;
        let books = self.books();
        books.around(address).filter(|mapping| address < mapping.end()).cloned()
    }

    /// The pieces of mappings that a range is made of.
    ///
    /// # Errors
    /// `INVALID_VALUE` if some of it is not mapped, or it leaves an allocation.
    pub(crate) fn locate(&self, pointer: DevicePtr, len: usize) -> Outcome<Vec<Piece>> {
        let mut address = pointer.address().ok_or(Code::INVALID_VALUE)?;
        let end = address.checked_add(len).ok_or(Code::INVALID_VALUE)?;
        let books = self.books();
        let mut pieces: Vec<Piece> = Vec::new();
        while address < end {
            let mapping = books.around(address).filter(|mapping| address < mapping.end());
            let mapping = Arc::clone(mapping.ok_or(Code::INVALID_VALUE)?);
            // Two allocations that happen to lie side by side are two; two mappings of handles make one range.
            let is_alone = mapping.is_allocation() && (!pieces.is_empty() || end > mapping.end());
            if is_alone {
                return Err(Code::INVALID_VALUE);
            }
            let next = end.min(mapping.end());
            pieces.push(Piece { mapping, address, len: next - address });
            address = next;
        }
        Ok(pieces)
    }

    pub(crate) fn count(&self) -> usize {
        let books = self.books();
        books.reservations.len() + books.mappings.len() + books.handles.len()
    }
}

impl Books {
    /// The last mapping that begins at or before an address.
    fn around(&self, address: usize) -> Option<&Arc<Mapping>> {
        self.mappings.range(..=address).next_back().map(|(_, mapping)| mapping)
    }

    /// The mappings of handles that exactly make up a range.
    fn whole(&self, pointer: DevicePtr, len: usize) -> Outcome<Vec<Arc<Mapping>>> {
        let address = aligned(pointer, len)?;
        let mut end = address;
        let range = (Bound::Included(address), Bound::Excluded(address + len));
        let mut found = Vec::new();
        for (start, mapping) in self.mappings.range(range) {
            if *start != end || mapping.is_allocation() {
                return Err(Code::INVALID_VALUE);
            }
            end = mapping.end();
            found.push(Arc::clone(mapping));
        }
        if end == address + len { Ok(found) } else { Err(Code::INVALID_VALUE) }
    }
}

fn aligned(pointer: DevicePtr, len: usize) -> Outcome<usize> {
    let address = pointer.address().ok_or(Code::INVALID_VALUE)?;
    let is_aligned = address.is_multiple_of(GRANULARITY) && len.is_multiple_of(GRANULARITY);
    let fits = address.checked_add(len).is_some_and(|end| end < DevicePtr::TAG);
    if is_aligned && fits && len > 0 { Ok(address) } else { Err(Code::INVALID_VALUE) }
}

fn handle_of(number: u64) -> Handle {
    // Addresses have 64 bits, see `abi`.
    Kind::Memory.handle(usize::try_from(number).unwrap_or(0))
}

fn number_of(handle: Handle) -> Outcome<u64> {
    Kind::Memory.number(handle).map(|number| number as u64).ok_or(Code::INVALID_VALUE)
}
