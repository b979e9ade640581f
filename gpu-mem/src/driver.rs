//! The CUDA driver, asked without trusting that it is there. unsafe: calls C functions of a library found at run
//! time. Not a general binding: only what the probe asks. Invariant: no function is called before its symbol was
//! found, and no result of C becomes a Rust enum (a driver newer than the bindings returns codes they lack).
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fmt::Write as _;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::system::System;
use crate::{
    DRIVER_VERSION_MIN, DriverInfo, GpuAttributes, GpuDevice, Unavailable, sysfs_pci_id, write_cuda_version,
};

/// Codes of `CUresult`; the value is the driver's ABI.
const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const STUB_LIBRARY: c_int = 34;
const NO_DEVICE: c_int = 100;
const INSUFFICIENT_DRIVER: c_int = 35;
const OPERATING_SYSTEM: c_int = 304;
const SYSTEM_NOT_READY: c_int = 802;
const SYSTEM_DRIVER_MISMATCH: c_int = 803;
const COMPAT_NOT_SUPPORTED_ON_DEVICE: c_int = 804;

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
    /// Absent from nothing in use, but a reason must not depend on it.
    error_text: Option<ErrorTextFn>,
}

/// A call that did not succeed.
struct Failed {
    call: &'static str,
    code: c_int,
    text: String,
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
        match driver.describe(ordinal) {
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

/// Looks up one symbol. `None` if the library has no such function.
///
/// # Safety
/// A libcuda is present, and `F` is the C prototype of `name`, a NUL-terminated name.
unsafe fn symbol<F: Copy>(name: &CStr) -> Option<F> {
    // SAFETY: the caller vouches for the library's presence (cudarc panics otherwise) and for the type. The
    // library stays loaded for the life of the process, so a function pointer copied out of it stays good.
    unsafe { sys::culib().get::<F>(name.to_bytes_with_nul()) }.ok().map(|symbol| *symbol)
}

impl Driver {
    fn load() -> Result<Self, Unavailable> {
        // SAFETY: opens libcuda by its name, which runs its initialisers; whoever installs a library of that name
        // on the loader's path vouches for it.
        if !unsafe { sys::is_culib_present() } {
            return Err(System::look().missing_libcuda());
        }
        macro_rules! need {
            ($name:literal) => {
                // SAFETY: the library is present, and each field's type is the prototype of cuda.h for this name.
                unsafe { symbol($name) }.ok_or_else(|| Unavailable {
                    what: "GPU".into(),
                    why: format!("the libcuda found has no function {}", $name.to_string_lossy()),
                    remedy: "install a complete NVIDIA driver (570 or newer); a libcuda.so of another origin may \
                             be first on LD_LIBRARY_PATH"
                        .into(),
                })?
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

    fn describe(&self, ordinal: u16) -> Result<GpuDevice, Failed> {
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
        })
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
        let mut text: *const c_char = std::ptr::null();
        if let Some(error_text) = self.error_text {
            // SAFETY: `text` is a writable pointer; for a code that it does not know the call leaves or makes it null.
            let _ = unsafe { error_text(code, &raw mut text) };
        }
        let text = if text.is_null() {
            String::new()
        } else {
            // SAFETY: the driver returns a NUL-terminated string of its own, valid for the life of the library.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Failed { call, code, text }
    }
}

impl Failed {
    fn reason(&self) -> String {
        let mut reason = format!("{} returned {}", self.call, self.code);
        if !self.text.is_empty() {
            let _ = write!(reason, ", \"{}\"", self.text);
        }
        reason
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
