//! Device memory: memory files, one for each handle or allocation, that other processes may have as well. Not where it is
//! mapped (`space`). Invariant: the file's name says all that an importer has to know, and nobody can change it; the file
//! is sealed against any other length.
//!
//! Where NIC writes need a flush, the file is twice as long: what NICs see lies first, what devices see behind it.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{
    FlockOperation, MemfdFlags, OFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, fcntl_getfl,
    flock, fstat, ftruncate, memfd_create, seek,
};

use crate::abi::HANDLE_POSIX_FD;
use crate::code::{Code, Outcome};
use crate::device::{Charge, Device};
use crate::dma_buf;
use crate::driver::Driver;
use crate::raw::{PAGE, Pages, duplicate};

/// What memory was created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traits {
    pub(crate) device: usize,
    /// In bytes, a number of whole pages.
    pub(crate) size: usize,
    pub(crate) handle_types: i32,
    /// Whether NICs may have it.
    pub(crate) nic: bool,
    /// Whether NIC writes are seen by devices only after a flush.
    pub(crate) stale: bool,
}

#[derive(Debug)]
pub(crate) struct Physical {
    pub(crate) traits: Traits,
    file: OwnedFd,
    stale: Option<Stale>,
    /// What this process pays for it; nothing for memory that another one created.
    _charge: Option<Charge>,
}

/// The two sides of memory whose NIC writes need a flush.
#[derive(Debug)]
struct Stale {
    bus: Pages,
    inner: Pages,
    /// Held while one side is made equal to the other, against threads and against processes.
    order: Mutex<()>,
    lock: OwnedFd,
}

/// The memory of this process whose NIC writes need a flush.
#[derive(Debug, Default)]
pub(crate) struct Unflushed(Mutex<Vec<Weak<Physical>>>);

impl Traits {
    fn file_len(self) -> usize {
        if self.stale { 2 * self.size } else { self.size }
    }

    /// Where in the file the devices' bytes begin.
    fn inner_offset(self) -> usize {
        if self.stale { self.size } else { 0 }
    }

    fn name(self, number: u64) -> String {
        let Self { device, size, handle_types, nic, stale } = self;
        let (nic, stale, process) = (u8::from(nic), u8::from(stale), std::process::id());
        format!(
            "hetmem stand-in gpu={device} size={size} types={handle_types} nic={nic} stale={stale} \
             id={process}-{number}"
        )
    }

    /// From the target of a link in /proc/self/fd; none if that is no file of this library.
    fn of_link(link: &str) -> Option<Self> {
        let words = link.strip_prefix("/memfd:hetmem stand-in ")?;
        let word = |name: &str| {
            let mut words = words.split(' ');
            words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        Some(Self {
            device: word("gpu")?.parse().ok()?,
            size: word("size")?.parse().ok()?,
            handle_types: word("types")?.parse().ok()?,
            nic: word("nic")? == "1",
            stale: word("stale")? == "1",
        })
    }
}

impl Physical {
    /// Makes memory of a device.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the device has not so much left.
    pub(crate) fn create(driver: &Driver, device: &Device, traits: Traits) -> Outcome<Arc<Self>> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let charge = device.charge(traits.size)?;
        let name = traits.name(NUMBER.fetch_add(1, Ordering::Relaxed));
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(name, flags).map_err(Code::of_system)?;
        ftruncate(&file, traits.file_len() as u64).map_err(Code::of_system)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(Code::of_system)?;
        Self::of(driver, traits, file, Some(charge))
    }

    /// The memory that a descriptor of another process, or of this one, names.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the descriptor is not one that `export` gave.
    pub(crate) fn import(driver: &Driver, number: i32) -> Outcome<Arc<Self>> {
        let file = duplicate(number)?;
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let link = link.map_err(|_| Code::INVALID_VALUE)?;
        let traits = Traits::of_link(&link.to_string_lossy()).ok_or(Code::INVALID_VALUE)?;
        let sealed = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        let flags = fcntl_getfl(&file).map_err(Code::of_system)?;
        let len = fstat(&file).map_err(Code::of_system)?.st_size;
        let is_whole = usize::try_from(len) == Ok(traits.file_len()) && sealed.contains(SealFlags::SHRINK);
        // A descriptor for NICs is marked so; it is no handle.
        if !is_whole || traits.handle_types & HANDLE_POSIX_FD == 0 || flags.contains(OFlags::NONBLOCK) {
            return Err(Code::INVALID_VALUE);
        }
        if traits.device >= driver.devices.len() {
            return Err(Code::INVALID_DEVICE);
        }
        Self::of(driver, traits, file, None)
    }

    fn of(driver: &Driver, traits: Traits, file: OwnedFd, charge: Option<Charge>) -> Outcome<Arc<Self>> {
        let stale = if traits.stale {
            Some(Stale {
                bus: Pages::of_file(&file, 0, traits.size)?,
                inner: Pages::of_file(&file, traits.size, traits.size)?,
                order: Mutex::new(()),
                lock: dma_buf::reopen(file.as_fd(), OFlags::empty())?,
            })
        } else {
            None
        };
        let physical = Arc::new(Self { traits, file, stale, _charge: charge });
        if traits.stale {
            driver.unflushed.add(&physical);
        }
        Ok(physical)
    }

    /// A descriptor that another process can import.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the memory was not created for that.
    pub(crate) fn export(&self) -> Outcome<OwnedFd> {
        if self.traits.handle_types & HANDLE_POSIX_FD == 0 {
            return Err(Code::INVALID_VALUE);
        }
        self.file.try_clone().map_err(|_| Code::OPERATING_SYSTEM)
    }

    /// A descriptor of `len` bytes at `offset` for a NIC.
    ///
    /// # Errors
    /// See [`dma_buf::export`].
    pub(crate) fn export_to_nic(&self, offset: usize, len: usize) -> Outcome<OwnedFd> {
        dma_buf::export(&self.file, offset, len)
    }

    /// Puts it into reserved pages, not accessible yet.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn place(&self, pages: &Pages, at: usize, len: usize) -> Outcome {
        pages.place(at, len, &self.file, self.traits.inner_offset())
    }

    /// The whole of it in pages of its own, accessible.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn pages(&self) -> Outcome<Pages> {
        Pages::of_file(&self.file, self.traits.inner_offset(), self.traits.size)
    }

    /// Writes as a device: `write` changes `len` bytes at `offset` of what devices see; then NICs see them too.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn written(&self, offset: usize, len: usize, write: impl FnOnce()) -> Outcome {
        match &self.stale {
            None => {
                write();
                Ok(())
            }
            Some(stale) => stale.held(|| {
                write();
                stale.bus.copy_from(&stale.inner, offset, len)
            }),
        }
    }

    /// Lets devices see what NICs wrote.
    fn flush(&self) -> Outcome {
        let Some(stale) = &self.stale else { return Ok(()) };
        stale.held(|| {
            let mut at = 0;
            // Pages that were never written have no place in the file; there is nothing to look for in them.
            while let Ok(start) = seek(&self.file, SeekFrom::Data(at)) {
                let end = seek(&self.file, SeekFrom::Hole(start)).map_err(Code::of_system)?;
                let start_byte = usize::try_from(start).map_err(|_| Code::UNKNOWN)?;
                let end_byte = usize::try_from(end).map_err(|_| Code::UNKNOWN)?.min(self.traits.size);
                if start_byte >= end_byte {
                    break;
                }
                stale.inner.copy_changed_from(&stale.bus, start_byte, end_byte - start_byte)?;
                at = end;
            }
            Ok(())
        })
    }
}

impl Stale {
    fn held(&self, act: impl FnOnce() -> Outcome) -> Outcome {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        flock(&self.lock, FlockOperation::LockExclusive).map_err(Code::of_system)?;
        let outcome = act();
        flock(&self.lock, FlockOperation::Unlock).map_err(Code::of_system)?;
        outcome
    }
}

impl Unflushed {
    fn add(&self, physical: &Arc<Physical>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(physical));
    }

    /// Lets devices see what NICs wrote, in all memory that this process has.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn flush(&self) -> Outcome {
        let all: Vec<Weak<Physical>> = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.iter().filter_map(Weak::upgrade).try_for_each(|physical| physical.flush())
    }
}

/// The bytes that memory of this length takes.
pub(crate) fn whole_pages(len: usize) -> Outcome<usize> {
    len.checked_next_multiple_of(PAGE).ok_or(Code::OUT_OF_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_everything() {
        let traits = Traits { device: 1, size: 4 << 20, handle_types: 1, nic: true, stale: false };
        let link = format!("/memfd:{} (deleted)", traits.name(7));
        assert_eq!(Traits::of_link(&link), Some(traits));
        assert!(link.len() < 200);
    }

    #[test]
    fn other_files_are_none_of_ours() {
        for link in
            ["/memfd:hetmem segment (deleted)", "/dev/null", "/memfd:hetmem stand-in gpu=x", "pipe:[1]"]
        {
            assert_eq!(Traits::of_link(link), None, "{link}");
        }
    }
}
