//! How an adapter comes by memory of a device: by its dma-buf, or by its address, if a module in the kernel knows what that
//! means (nvidia-peermem). Not copies through host memory, which are whose the memory is. Invariant: ways are tried in this
//! order, and whoever gets none is told why of each.

use hetmem_core::StoreError;
use rustix::io::Errno;

use super::abi;
use super::plugin::Refusal;
use crate::memory::DeviceMemory;

/// A way to register memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Mapped in this process.
    Host,
    /// A dma-buf, and where in it the memory starts.
    DmaBuf { descriptor: i32, offset: u64 },
    /// An address that the kernel asks another driver about.
    Peer,
}

impl Way {
    pub(super) fn kind(self) -> u32 {
        match self {
            Self::Host => abi::MEMORY_HOST,
            Self::DmaBuf { .. } => abi::MEMORY_DMA_BUF,
            Self::Peer => abi::MEMORY_PEER,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Host => "host memory",
            Self::DmaBuf { .. } => "dma-buf",
            Self::Peer => "nvidia-peermem",
        }
    }

    /// What an errno of this way means, where that is known.
    fn hint(self, errno: i32) -> &'static str {
        match (self, Errno::from_raw_os_error(errno)) {
            (Self::DmaBuf { .. }, Errno::OPNOTSUPP | Errno::PROTONOSUPPORT) => {
                "; the adapter's driver takes no dma-buf"
            }
            (Self::DmaBuf { .. }, Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => {
                "; the kernel, libibverbs or the driver is too old for it, or the exporter does not let adapters in"
            }
            (Self::Peer, Errno::FAULT | Errno::INVAL | Errno::OPNOTSUPP) => {
                "; no module knows the address: load nvidia-peermem"
            }
            (_, Errno::NOMEM) => "; too much is registered, or the device has no window (BAR1) left",
            (_, Errno::PERM | Errno::ACCESS) => "; not permitted",
            _ => "",
        }
    }
}

/// Registers memory of a device by the first way that there is.
///
/// # Errors
/// `Unavailable` with why each of them is none.
pub(super) fn climb<T>(
    device: &DeviceMemory<'_>,
    mut register: impl FnMut(Way) -> Result<T, Refusal>,
) -> Result<(T, Way), StoreError> {
    use std::os::fd::AsRawFd as _;
    let mut why = String::new();
    let dma_buf =
        device.dma_buf.map(|(descriptor, offset)| Way::DmaBuf { descriptor: descriptor.as_raw_fd(), offset });
    if dma_buf.is_none() {
        why.push_str("dma-buf: its driver exports none");
    }
    for way in dma_buf.into_iter().chain([Way::Peer]) {
        match register(way) {
            Ok(registered) => return Ok((registered, way)),
            Err(refusal) => {
                let before = if why.is_empty() { "" } else { "; " };
                let (name, hint) = (way.name(), way.hint(refusal.errno));
                why.push_str(&format!("{before}{name}: {}{hint}", refusal.why));
            }
        }
    }
    why.push_str("; it has to be staged through host memory");
    Err(StoreError::unavailable("registration of device memory", why))
}
