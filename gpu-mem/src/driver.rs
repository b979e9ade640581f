//! The CUDA driver, asked without trusting that it is there. unsafe: calls C functions of a library found at run
//! time. Not a general binding: only what the probe asks. Invariant: no function is called before its symbol was
//! found, and no result of C becomes a Rust enum (a driver newer than the bindings returns codes they lack).
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_uint};
use std::fmt::Write as _;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use crate::failure::{
    COMPAT_NOT_SUPPORTED_ON_DEVICE, Failed, INSUFFICIENT_DRIVER, INVALID_VALUE, NO_DEVICE, OPERATING_SYSTEM,
    STUB_LIBRARY, SUCCESS, SYSTEM_DRIVER_MISMATCH, SYSTEM_NOT_READY,
};
use crate::system::System;
use crate::table::{error_text, is_library_present, missing_function, symbol};
use crate::{
    DRIVER_VERSION_MIN, DriverInfo, GpuAttributes, GpuDevice, Unavailable, sysfs_pci_id, write_cuda_version,
};

const NAME_LEN: usize = 256;
const PCI_ID_LEN: usize = 32;

/// The C prototypes, with `CUresult` and `CUdevice` as the plain integers that they are.
type InitFn = unsafe extern "C" fn(flags: c_uint) -> c_int;
type IntFn = unsafe extern "C" fn(value: *mut c_int) -> c_int;
type DeviceGetFn = unsafe extern "C" fn(device: *mut c_int, ordinal: c_int) -> c_int;
type TextFn = unsafe extern "C" fn(text: *mut c_char, len: c_int, device: c_int) -> c_int;
type PciIdFn = TextFn;
type UuidFn = unsafe extern "C" fn(uuid: *mut [u8; 16], device: c_int) -> c_int;
type MemoryFn = unsafe extern "C" fn(bytes: *mut usize, device: c_int) -> c_int;
type PeerFn = unsafe extern "C" fn(can: *mut c_int, device: c_int, peer: c_int) -> c_int;
type AttributeFn = unsafe extern "C" fn(value: *mut c_int, attribute: c_int, device: c_int) -> c_int;
type ErrorTextFn = unsafe extern "C" fn(code: c_int, text: *mut *const c_char) -> c_int;

/// What the driver answered.
pub(crate) struct Found {
    pub(crate) info: DriverInfo,
    pub(crate) devices: Vec<GpuDevice>,
    pub(crate) unusable: Vec<Unavailable>,
}

/// The functions that the probe needs, all present in the library.
struct Driver {
    init: InitFn,
    version: IntFn,
    device_count: IntFn,
    device: DeviceGetFn,
    name: TextFn,
    uuid: UuidFn,
    memory: MemoryFn,
    attribute: AttributeFn,
    pci_id: PciIdFn,
    /// Absent from nothing in use, but a reason must not depend on these two.
    can_access_peer: Option<PeerFn>,
    error_text: Option<ErrorTextFn>,
}

/// Asks libcuda, if there is one.
pub(crate) fn probe() -> Result<Found, Unavailable> {
    let driver = Driver::load()?;
    driver.start()?;
    let info = driver.info()?;
    let count = driver.int("cuDeviceGetCount", driver.device_count).map_err(|failed| absent(&failed))?;
    let count = u16::try_from(count).unwrap_or(0);
    if count == 0 {
        return Err(absent(&driver.failed("cuDeviceGetCount", NO_DEVICE)));
    }
    let (mut devices, mut unusable) = (Vec::new(), Vec::new());
    for ordinal in 0..count {
        match driver.describe(ordinal, count) {
            Ok(device) => devices.push(device),
            Err(failed) => unusable.push(Unavailable {
                what: format!("gpu:{ordinal}").into(),
                why: failed.reason(),
                remedy: "look at `nvidia-smi` and the kernel log for this device, then restart the node"
                    .into(),
            }),
        }
    }
    Ok(Found { info, devices, unusable })
}

impl Driver {
    fn load() -> Result<Self, Unavailable> {
        if !is_library_present() {
            return Err(System::look().missing_libcuda());
        }
        macro_rules! need {
            ($name:literal) => {
                // SAFETY: the library is present, and each field's type is the prototype of cuda.h for this name.
                unsafe { symbol($name) }.ok_or_else(|| missing_function(&$name.to_string_lossy()))?
            };
        }
        Ok(Self {
            init: need!(c"cuInit"),
            version: need!(c"cuDriverGetVersion"),
            device_count: need!(c"cuDeviceGetCount"),
            device: need!(c"cuDeviceGet"),
            name: need!(c"cuDeviceGetName"),
            uuid: need!(c"cuDeviceGetUuid_v2"),
            memory: need!(c"cuDeviceTotalMem_v2"),
            attribute: need!(c"cuDeviceGetAttribute"),
            pci_id: need!(c"cuDeviceGetPCIBusId"),
            // SAFETY: as above.
            can_access_peer: unsafe { symbol(c"cuDeviceCanAccessPeer") },
            // SAFETY: as above.
            error_text: unsafe { symbol(c"cuGetErrorString") },
        })
    }

    fn start(&self) -> Result<(), Unavailable> {
        // SAFETY: cuInit takes flags, of which only 0 exists, and can be called from any thread and repeatedly.
        let code = unsafe { (self.init)(0) };
        self.check("cuInit", code).map_err(|failed| absent(&failed))
    }

    fn info(&self) -> Result<DriverInfo, Unavailable> {
        let version = self.int("cuDriverGetVersion", self.version).map_err(|failed| absent(&failed))?;
        let cuda_version = u32::try_from(version).unwrap_or(0);
        if cuda_version < DRIVER_VERSION_MIN {
            let mut why = "the NVIDIA driver supports CUDA ".to_owned();
            // Writing to a String does not fail.
            let _ = write_cuda_version(&mut why, cuda_version);
            why.push_str(", CUDA ");
            let _ = write_cuda_version(&mut why, DRIVER_VERSION_MIN);
            why.push_str(" is needed");
            return Err(Unavailable {
                what: "GPU".into(),
                why,
                remedy: "update the NVIDIA driver to 570 or newer".into(),
            });
        }
        Ok(DriverInfo { cuda_version })
    }

    fn describe(&self, ordinal: u16, count: u16) -> Result<GpuDevice, Failed> {
        let mut device: c_int = 0;
        // SAFETY: `device` is a writable int for the length of the call.
        let code = unsafe { (self.device)(&raw mut device, c_int::from(ordinal)) };
        self.check("cuDeviceGet", code)?;
        let mut uuid = [0_u8; 16];
        // SAFETY: a CUuuid is 16 bytes without alignment; `device` came from cuDeviceGet.
        let code = unsafe { (self.uuid)(&raw mut uuid, device) };
        self.check("cuDeviceGetUuid_v2", code)?;
        let mut memory: usize = 0;
        // SAFETY: `memory` is a writable size_t; `device` came from cuDeviceGet.
        let code = unsafe { (self.memory)(&raw mut memory, device) };
        self.check("cuDeviceTotalMem_v2", code)?;
        Ok(GpuDevice {
            ordinal,
            name: self.text::<NAME_LEN>("cuDeviceGetName", self.name, device)?,
            uuid: format_uuid(uuid),
            compute_capability: (
                self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)?,
                self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)?,
            ),
            memory_bytes: memory as u64,
            pci_id: sysfs_pci_id(&self.text::<PCI_ID_LEN>("cuDeviceGetPCIBusId", self.pci_id, device)?),
            attributes: self.attributes(device)?,
            peers: (0..count).filter(|peer| *peer != ordinal && self.can_access(device, *peer)).collect(),
        })
    }

    /// Whether `device` can read and write the memory of the device with this ordinal.
    fn can_access(&self, device: c_int, ordinal: u16) -> bool {
        let (mut peer, mut can): (c_int, c_int) = (0, 0);
        // SAFETY: `peer` is a writable int for the length of the call.
        let code = unsafe { (self.device)(&raw mut peer, c_int::from(ordinal)) };
        let Some(can_access_peer) = self.can_access_peer.filter(|_| code == SUCCESS) else {
            return false;
        };
        // SAFETY: `can` is a writable int; both devices came from cuDeviceGet.
        let code = unsafe { can_access_peer(&raw mut can, device, peer) };
        code == SUCCESS && can != 0
    }

    fn attributes(&self, device: c_int) -> Result<GpuAttributes, Failed> {
        use Attribute as A;
        let has = |attribute| Ok(self.attribute(attribute, device)? != 0);
        Ok(GpuAttributes {
            virtual_memory: has(A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)?,
            posix_descriptor_export: has(A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)?,
            gpudirect_rdma: has(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED)?,
            gpudirect_rdma_with_virtual_memory: has(
                A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
            )?,
            dma_buf: has(A::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)?,
            read_only_host_register: has(A::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED)?,
            flush_writes_options: self
                .attribute(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, device)?,
            writes_ordering: self
                .attribute(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING, device)?,
        })
    }

    /// An attribute's value; 0 where the driver does not know the attribute.
    fn attribute(&self, attribute: Attribute, device: c_int) -> Result<u32, Failed> {
        let mut value: c_int = 0;
        // SAFETY: `value` is a writable int; the attribute is a number of cuda.h; `device` came from cuDeviceGet.
        let code = unsafe { (self.attribute)(&raw mut value, attribute as c_int, device) };
        if code == INVALID_VALUE {
            return Ok(0);
        }
        self.check("cuDeviceGetAttribute", code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    fn int(&self, call: &'static str, function: IntFn) -> Result<c_int, Failed> {
        let mut value: c_int = 0;
        // SAFETY: `value` is a writable int for the length of the call, all that an `IntFn` asks for.
        let code = unsafe { function(&raw mut value) };
        self.check(call, code)?;
        Ok(value)
    }

    fn text<const LEN: usize>(
        &self,
        call: &'static str,
        function: TextFn,
        device: c_int,
    ) -> Result<String, Failed> {
        let mut text = [0_u8; LEN];
        let len = c_int::try_from(LEN - 1).unwrap_or(0);
        // SAFETY: `text` has more than `len` writable bytes; `device` came from cuDeviceGet.
        let code = unsafe { function(text.as_mut_ptr().cast(), len, device) };
        self.check(call, code)?;
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(LEN);
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Failed> {
        if code == SUCCESS { Ok(()) } else { Err(self.failed(call, code)) }
    }

    fn failed(&self, call: &'static str, code: c_int) -> Failed {
        Failed { call, code, text: error_text(self.error_text, code) }
    }
}

/// Why a driver that failed this call cannot be used, with the remedy.
fn absent(failed: &Failed) -> Unavailable {
    let meaning_and_remedy = match failed.code {
        STUB_LIBRARY => Some((
            "the libcuda found is the toolkit's stub for linking, not a driver",
            "remove the toolkit's stubs folder from LD_LIBRARY_PATH, or put the driver's folder before it",
        )),
        NO_DEVICE => return System::look().no_device(&failed.reason()),
        INSUFFICIENT_DRIVER => Some((
            "libcuda is newer than the kernel driver",
            "update the NVIDIA driver, or remove the CUDA compatibility package",
        )),
        OPERATING_SYSTEM => return System::look().refused_by_system(&failed.reason()),
        SYSTEM_NOT_READY => Some((
            "the NVLink fabric of this machine is not ready",
            "start nvidia-fabricmanager of the driver's version",
        )),
        SYSTEM_DRIVER_MISMATCH => Some((
            "libcuda and the loaded kernel driver are of different versions",
            "reload the nvidia kernel modules or reboot after the driver update",
        )),
        COMPAT_NOT_SUPPORTED_ON_DEVICE => Some((
            "the CUDA compatibility package does not support this GPU",
            "remove the CUDA compatibility package from the library path",
        )),
        _ => None,
    };
    let (why, remedy) = match meaning_and_remedy {
        Some((meaning, remedy)) => (format!("{meaning} ({})", failed.reason()), remedy),
        None => (failed.reason(), "see whether `nvidia-smi` works, and what the kernel log says"),
    };
    Unavailable { what: "GPU".into(), why, remedy: remedy.into() }
}

fn format_uuid(uuid: [u8; 16]) -> String {
    let mut text = "GPU".to_owned();
    for (at, byte) in uuid.into_iter().enumerate() {
        if matches!(at, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_read_as_nvml_writes_them() {
        let uuid = std::array::from_fn(|at| u8::try_from(at * 17).expect("below 256"));
        assert_eq!(format_uuid(uuid), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }

    /// Every code that has words of its own still names the call and the code, and has a remedy.
    #[test]
    fn every_failure_has_a_reason_and_a_remedy() {
        let known = [
            STUB_LIBRARY,
            NO_DEVICE,
            INSUFFICIENT_DRIVER,
            OPERATING_SYSTEM,
            SYSTEM_NOT_READY,
            SYSTEM_DRIVER_MISMATCH,
            COMPAT_NOT_SUPPORTED_ON_DEVICE,
            12_345,
        ];
        for code in known {
            let absent = absent(&Failed { call: "cuInit", code, text: "words".to_owned() });
            let call = format!("cuInit returned {code}, \"words\"");
            assert!(absent.why.contains(&call), "{absent}");
            assert!(!absent.remedy.is_empty(), "{absent}");
        }
    }
}
