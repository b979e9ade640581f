//! GPU memory: what GPUs this machine has, or why it has none ([`probe`], [`Gpus`]); segments of their memory that other
//! processes and NICs can have ([`Segment`], [`Imported`]); copies between all kinds of memory, checksums and conversions
//! ([`Stream`], [`Copier`]).
//!
//! Not what lies in the memory, and not a reason to fail: absence is a value with a cause and a remedy. Nothing here
//! panics on what a driver answers, prints, or creates a context of a device that nobody has named. Invariant: a
//! [`GpuProbe`] with an unavailable driver lists no devices, and memory is never unmapped under a copy.

mod by_host;
pub mod capacity;
mod context;
mod copier;
mod copies;
mod device;
mod driver;
mod failure;
pub mod flush;
mod foreign;
mod gpus;
mod host;
mod imported;
mod kernels;
mod lane;
mod launches;
mod lists;
mod nic_access;
mod nvml;
mod physical;
mod pinned;
mod reach;
mod segment;
mod span;
mod stream;
mod system;
mod table;
pub mod teardown;
pub mod topology;

use std::borrow::Cow;
use std::fmt;

use hetmem_core::StoreError;
use serde::Serialize;

pub use copier::{Copied, Copier, Done};
pub use device::{Device, MemoryInfo};
pub use gpus::Gpus;
pub use hetmem_kernels::cast::{Cast, convert};
pub use host::{HostMemory, HostRegistration, PinnedBuffer};
pub use imported::Imported;
pub use launches::{Checksums, Gathering};
pub use nic_access::NicAccess;
pub use physical::AccessRights;
pub use segment::{Registered, Segment};
pub use span::{Memory, Span};
pub use stream::{Event, Stream};
pub use system::{KernelModule, SystemInfo};

/// The oldest driver that this build works with, as `1000 * major + 10 * minor` of the CUDA version that it
/// supports: the version of the bindings.
pub const DRIVER_VERSION_MIN: u32 = 12_080;

/// The oldest driver that takes the store's kernels: their PTX is of CUDA 13.0. An older one copies, and leaves the rest to
/// the processor.
pub const KERNELS_DRIVER_VERSION_MIN: u32 = 13_000;

/// Something that is not here: what, why, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unavailable {
    /// What is missing: `GPU`, `NVML`, `gpu:1`.
    pub what: Cow<'static, str>,
    /// Why, in words that name the library, the call and its result.
    pub why: String,
    /// What a user can do; says so where there is nothing to do.
    pub remedy: Cow<'static, str>,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not available: {} ({})", self.what, self.why, self.remedy)
    }
}

impl std::error::Error for Unavailable {}

impl From<Unavailable> for StoreError {
    fn from(absent: Unavailable) -> Self {
        Self::unavailable(absent.what, format!("{} ({})", absent.why, absent.remedy))
    }
}

/// The CUDA driver that answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DriverInfo {
    /// The newest CUDA version that the driver supports, as `1000 * major + 10 * minor`.
    pub cuda_version: u32,
}

impl fmt::Display for DriverInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CUDA ")?;
        write_cuda_version(f, self.cuda_version)
    }
}

/// What a GPU can do for the store. `false` also where the driver is too old to know the attribute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuAttributes {
    /// Virtual memory management (`cuMemCreate` and its kin): GPU segments need it.
    pub virtual_memory: bool,
    /// Allocations can be exported to other processes as POSIX descriptors.
    pub posix_descriptor_export: bool,
    /// A NIC can reach this memory through the nvidia-peermem module, or by dma-buf.
    pub gpudirect_rdma: bool,
    /// The same for memory made by virtual memory management.
    pub gpudirect_rdma_with_virtual_memory: bool,
    /// Memory can be exported as a dma-buf descriptor.
    pub dma_buf: bool,
    /// Host memory that this process may only read can be registered for copies.
    pub read_only_host_register: bool,
    /// How remote writes can be flushed: bits of `CUflushGPUDirectRDMAWritesOptions` (1 host, 2 memory operations).
    pub flush_writes_options: u32,
    /// Who sees remote writes in order without a flush: `CUGPUDirectRDMAWritesOrdering` (0 nobody, 100 this GPU,
    /// 200 every GPU).
    pub writes_ordering: u32,
}

/// One GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuDevice {
    /// The driver's number of this GPU in this process, from 0; `CUDA_VISIBLE_DEVICES` changes it.
    pub ordinal: u16,
    /// The product name.
    pub name: String,
    /// `GPU-` and the UUID in hexadecimal, as NVML writes it.
    pub uuid: String,
    /// Compute capability: major, minor.
    pub compute_capability: (u32, u32),
    /// Memory of the device in bytes.
    pub memory_bytes: u64,
    /// `domain:bus:device.function`, in hexadecimal, lower case, as in sysfs.
    pub pci_id: String,
    /// What it can do for the store.
    pub attributes: GpuAttributes,
    /// The ordinals of the other devices whose memory this one can read and write directly.
    pub peers: Vec<u16>,
}

/// What NVML, the management library, says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NvmlInfo {
    /// The version of the kernel driver, such as `580.95.05`.
    pub driver_version: String,
    /// The version of the library itself.
    pub library_version: String,
    /// Its devices, in its own order: match them to [`GpuDevice`] by UUID.
    pub devices: Vec<NvmlDevice>,
}

/// One GPU as NVML describes it; `None` is what this device or library cannot tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NvmlDevice {
    /// `GPU-` and the UUID.
    pub uuid: String,
    /// `domain:bus:device.function`, in hexadecimal, lower case, as in sysfs.
    pub pci_id: Option<String>,
    /// Bytes of device memory that can be mapped on the bus (BAR1).
    pub bar1_bytes: Option<u64>,
    /// Bytes of BAR1 that are mapped.
    pub bar1_used_bytes: Option<u64>,
    /// Generation of the PCIe link, now; an idle one may be slower than it can be.
    pub pcie_generation: Option<u32>,
    /// Lanes of the PCIe link, now.
    pub pcie_lanes: Option<u32>,
    /// NVLinks that are up.
    pub nvlinks: Option<u32>,
    /// Whether the device is cut into instances (MIG), which NICs cannot reach by nvidia-peermem.
    pub mig: Option<bool>,
    /// The nearest NUMA node.
    pub numa_node: Option<u32>,
}

/// The answer of [`probe`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuProbe {
    /// The CUDA driver, or why it cannot be used.
    pub driver: Result<DriverInfo, Unavailable>,
    /// The devices that can be used, by ordinal.
    pub devices: Vec<GpuDevice>,
    /// The devices that the driver counts but that did not describe themselves.
    pub unusable: Vec<Unavailable>,
    /// NVML, or why it cannot be asked. The store works without it.
    pub nvml: Result<NvmlInfo, Unavailable>,
    /// What the operating system says of drivers.
    pub system: SystemInfo,
}

/// Looks for GPUs. Loads libcuda and NVML if they are there and keeps libcuda loaded; creates no context.
///
/// Can be called from any thread, at any time, more than once. It initialises the CUDA driver, which does not
/// survive `fork` without `exec`: fork first.
#[must_use]
pub fn probe() -> GpuProbe {
    let (driver, devices, unusable) = match driver::probe() {
        Ok(found) => (Ok(found.info), found.devices, found.unusable),
        Err(absent) => (Err(absent), Vec::new(), Vec::new()),
    };
    GpuProbe { driver, devices, unusable, nvml: nvml::probe(), system: SystemInfo::look() }
}

fn write_cuda_version(f: &mut impl fmt::Write, version: u32) -> fmt::Result {
    write!(f, "{}.{}", version / 1000, version % 1000 / 10)
}

/// A PCI address as sysfs writes it: lower case, four digits of domain (NVML writes eight, CUDA four).
fn sysfs_pci_id(id: &str) -> String {
    let id = id.to_ascii_lowercase();
    match id.split_once(':') {
        Some((domain, rest)) if domain.len() > 4 && domain.starts_with("0000") => {
            format!("{}:{rest}", &domain[domain.len() - 4..])
        }
        _ => id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_ids_are_written_as_sysfs_does() {
        assert_eq!(sysfs_pci_id("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(sysfs_pci_id("0000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(sysfs_pci_id("00010000:3B:00.0"), "00010000:3b:00.0");
        assert_eq!(sysfs_pci_id(""), "");
    }

    #[test]
    fn absence_is_one_sentence_and_a_store_error() {
        let absent = Unavailable {
            what: "GPU".into(),
            why: "libcuda.so.1 is not installed".to_owned(),
            remedy: "install the driver".into(),
        };
        let text = absent.to_string();
        assert_eq!(text, "GPU is not available: libcuda.so.1 is not installed (install the driver)");
        let error = StoreError::from(absent);
        assert_eq!(error.kind(), hetmem_core::ErrorKind::Unavailable);
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn versions_read_as_nvidia_writes_them() {
        let text = |cuda_version| DriverInfo { cuda_version }.to_string();
        assert_eq!(text(12_080), "CUDA 12.8");
        assert_eq!(text(13_000), "CUDA 13.0");
    }
}
