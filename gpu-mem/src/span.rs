//! A piece of memory to copy from or to, wherever it is. Not the copy (`stream`). Invariant: a span lies inside its
//! memory, which it holds.

use std::fmt;
use std::sync::Arc;

use hetmem_core::StoreError;

use crate::host::HostMemory;
use crate::imported::Imported;
use crate::pinned::Hold;
use crate::segment::Segment;
use crate::{AccessRights, Gpus};

/// Memory that copies read or write.
#[derive(Clone)]
pub enum Memory {
    /// A segment of this process.
    Device(Arc<Segment>),
    /// A segment of another process, mapped here.
    Imported(Arc<Imported>),
    /// Host memory.
    Host(Arc<dyn HostMemory>),
}

impl Memory {
    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Device(segment) => segment.len_bytes(),
            Self::Imported(imported) => imported.len_bytes(),
            Self::Host(host) => host.len_bytes(),
        }
    }

    /// The device whose memory it is; none: it is the host's.
    #[must_use]
    pub fn device(&self) -> Option<&crate::Device> {
        match self {
            Self::Device(segment) => Some(segment.device()),
            Self::Imported(imported) => Some(imported.device()),
            Self::Host(_) => None,
        }
    }

    /// What tells it from all other memory that lives.
    pub(crate) fn identity(&self) -> *const () {
        match self {
            Self::Device(segment) => Arc::as_ptr(segment).cast(),
            Self::Imported(imported) => Arc::as_ptr(imported).cast(),
            Self::Host(host) => Arc::as_ptr(host).cast(),
        }
    }

    /// Whether copies may write it.
    fn is_writable(&self) -> bool {
        match self {
            Self::Device(_) => true,
            Self::Imported(imported) => imported.rights() == AccessRights::ReadWrite,
            Self::Host(host) => host.is_writable(),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(segment) => write!(f, "gpu:{} segment", segment.device().ordinal()),
            Self::Imported(imported) => write!(f, "gpu:{} import", imported.device().ordinal()),
            Self::Host(_) => f.write_str("host memory"),
        }
    }
}

/// `len_bytes` bytes at `offset` of some memory.
#[derive(Clone, Debug)]
pub struct Span {
    memory: Memory,
    offset: u64,
    len_bytes: u64,
}

/// Where a span's first byte is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// An address of the device.
    Device(u64),
    /// An address of this process.
    Host(*mut u8),
}

impl Span {
    /// A piece of memory.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if any byte of it lies outside; [`hetmem_core::ErrorKind::Stale`] if the
    /// segment is being torn down.
    pub fn new(memory: Memory, offset: u64, len_bytes: u64) -> Result<Self, StoreError> {
        if let Memory::Device(segment) = &memory {
            segment.check_granting("copy")?;
        }
        match offset.checked_add(len_bytes) {
            Some(end) if end <= memory.len_bytes() => Ok(Self { memory, offset, len_bytes }),
            _ => Err(StoreError::invalid(
                "span",
                format!(
                    "{len_bytes} bytes at {offset} are not inside a {memory:?} of {} bytes",
                    memory.len_bytes()
                ),
            )),
        }
    }

    /// The memory that it is a piece of.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Bytes from the memory's start.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether it is memory of a device, or host memory that is pinned for devices in this process. Copies of other
    /// host memory are staged by the driver.
    #[must_use]
    pub fn is_pinned(&self, gpus: &Gpus) -> bool {
        self.memory.device().is_some() || self.pin(gpus).is_some()
    }

    /// What keeps its host memory pinned, if it is.
    pub(crate) fn pin(&self, gpus: &Gpus) -> Option<Hold> {
        match self.place() {
            Place::Host(base) => gpus.pinned().find(base.addr(), usize::try_from(self.len_bytes).ok()?),
            Place::Device(_) => None,
        }
    }

    /// Refuses a target that may only be read.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        if self.memory.is_writable() {
            return Ok(());
        }
        Err(StoreError::denied(
            "copy",
            format!("the target, {:?}, is mapped here for reading only", self.memory),
        ))
    }

    pub(crate) fn place(&self) -> Place {
        match &self.memory {
            Memory::Device(segment) => Place::Device(segment.address().saturating_add(self.offset)),
            Memory::Imported(imported) => Place::Device(imported.address().saturating_add(self.offset)),
            // The offset is inside the memory, so it is a usize.
            Memory::Host(host) => {
                Place::Host(host.base().wrapping_add(usize::try_from(self.offset).unwrap_or(usize::MAX)))
            }
        }
    }

    /// Whether the device with this ordinal reads and writes it by itself.
    pub(crate) fn is_within_reach(&self, ordinal: u16) -> bool {
        match &self.memory {
            Memory::Device(segment) => {
                segment.device().ordinal() == ordinal || segment.peers().contains(&ordinal)
            }
            Memory::Imported(imported) => imported.device().ordinal() == ordinal,
            Memory::Host(_) => true,
        }
    }
}
