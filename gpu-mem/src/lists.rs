//! Pinned memory for what launches are given and what they answer: lists of moves and parts, values. Not the memory that
//! launches work on. Invariant: a buffer is either in the pool or lent, and what is lent comes back when the last that
//! holds it lets go, so nobody writes a list that a device still reads.

use std::sync::{Arc, Mutex};

use hetmem_core::StoreError;

use crate::device::Device;
use crate::gpus::lock;
use crate::host::{HostMemory, PinnedBuffer};
use crate::reach::{Access, Reacher};
use crate::span::{Memory, Span};

/// Buffers that are kept while nobody uses them, and bytes of the smallest: a list of 2,730 moves.
const KEPT_MAX: usize = 4;
const LEN_MIN: u64 = 64 << 10;

/// The pool of one stream. Pinning takes long, and waits for the device.
#[derive(Default)]
pub(crate) struct Lists {
    free: Mutex<Vec<Arc<PinnedBuffer>>>,
}

/// A buffer of the pool, with its address on the device.
pub(crate) struct Lent {
    pool: Arc<Lists>,
    buffer: Option<Arc<PinnedBuffer>>,
    address: u64,
}

impl Lists {
    /// A buffer of at least this many bytes, whatever is in it.
    pub(crate) fn lend(self: &Arc<Self>, device: &Device, len_bytes: u64) -> Result<Lent, StoreError> {
        let fits = |buffer: &Arc<PinnedBuffer>| buffer.len_bytes() >= len_bytes;
        let found = {
            let mut free = lock(&self.free);
            free.iter().position(fits).map(|at| free.swap_remove(at))
        };
        let buffer = match found {
            Some(buffer) => buffer,
            None => Arc::new(PinnedBuffer::new(device, len_bytes.next_power_of_two().max(LEN_MIN))?),
        };
        let memory: Arc<dyn HostMemory> = Arc::clone(&buffer) as _;
        let span = Span::new(Memory::Host(memory), 0, buffer.len_bytes())?;
        let address = Reacher::new(device).find(&span, Access::Write).ok_or_else(|| {
            StoreError::unavailable("GPU kernel", "the driver gives no address of pinned host memory")
        })?;
        Ok(Lent { pool: Arc::clone(self), buffer: Some(buffer), address })
    }

    /// A buffer that holds these bytes.
    pub(crate) fn lend_with(self: &Arc<Self>, device: &Device, bytes: &[u8]) -> Result<Lent, StoreError> {
        let lent = self.lend(device, bytes.len() as u64)?;
        if let Some(buffer) = &lent.buffer {
            buffer.write(0, bytes)?;
        }
        Ok(lent)
    }
}

impl Lent {
    /// The first byte's address on the device that it was lent for.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Copies the beginning out.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<(), StoreError> {
        match &self.buffer {
            Some(buffer) => buffer.read(0, bytes),
            None => Ok(()),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut free = lock(&self.pool.free);
        if free.len() < KEPT_MAX {
            free.extend(self.buffer.take());
        }
    }
}
