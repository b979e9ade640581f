//! The C functions about the driver and its devices. Not contexts. Invariant: attributes say what the switches left.

use std::ffi::{c_char, c_int, c_uint};

use crate::abi::{DRIVER_VERSION, FLUSH_OPTION_HOST, ORDERING_ALL_DEVICES, ORDERING_NONE, ORDERING_OWNER};
use crate::code::Code;
use crate::config::Config;
use crate::device;
use crate::driver;
use crate::pointers::{Out, OutText};

/// The PCI domain of all devices here, which no real one is in.
const PCI_DOMAIN: c_int = 0x7E57;
/// `CU_DEVICE_ATTRIBUTE_MAX` of the newest driver that is known; numbers above are no attributes.
const ATTRIBUTE_MAX: c_int = 150;

export! {
    fn cuInit(flags: c_uint) {
        if flags == 0 { driver::init() } else { Err(Code::INVALID_VALUE) }
    }

    fn cuDriverGetVersion(version: Out<c_int>) {
        version.put(DRIVER_VERSION)
    }

    fn cuGetErrorString(code: c_int, text: Out<*const c_char>) {
        let found = Code(code).text();
        text.put(found.map_or(std::ptr::null(), std::ffi::CStr::as_ptr))?;
        found.map(drop).ok_or(Code::INVALID_VALUE)
    }

    fn cuGetErrorName(code: c_int, text: Out<*const c_char>) {
        let found = Code(code).name();
        text.put(found.map_or(std::ptr::null(), std::ffi::CStr::as_ptr))?;
        found.map(drop).ok_or(Code::INVALID_VALUE)
    }
}

export! {
    fn cuDeviceGetCount(count: Out<c_int>) |driver| {
        count.put(c_int::try_from(driver.devices.len()).unwrap_or(c_int::MAX))
    }

    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) |driver| {
        device.put(driver.device(ordinal)?.number())
    }

    fn cuDeviceGetName(name: OutText, len: c_int, device: c_int) |driver| {
        let text = format!("hetmem stand-in GPU {}", driver.device(device)?.ordinal);
        name.put(&text, usize::try_from(len).unwrap_or(0))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: c_int) |driver| {
        let mut bytes = *b"hetmem stand-in\0";
        if let Some(last) = bytes.last_mut() {
            *last = u8::try_from(driver.device(device)?.ordinal).unwrap_or(u8::MAX);
        }
        uuid.put(bytes)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) |driver| {
        bytes.put(driver.device(device)?.memory_bytes)
    }

    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) |driver| {
        let number = driver.device(device)?.number();
        value.put(attribute_of(driver.config, attribute, number).ok_or(Code::INVALID_VALUE)?)
    }

    fn cuDeviceGetPCIBusId(text: OutText, len: c_int, device: c_int) |driver| {
        let bus = pci_bus(driver.device(device)?.number());
        text.put(&format!("{PCI_DOMAIN:04X}:{bus:02X}:00.0"), usize::try_from(len).unwrap_or(0))
    }

    fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) |driver| {
        let is_other = driver.device(device)?.ordinal != driver.device(peer)?.ordinal;
        can.put(c_int::from(is_other && driver.config.has("peer")))
    }

    fn cuDeviceGetP2PAttribute(value: Out<c_int>, attribute: c_int, source: c_int, target: c_int) |driver| {
        if driver.device(source)?.ordinal == driver.device(target)?.ordinal {
            return Err(Code::INVALID_DEVICE);
        }
        // Performance rank, access, native atomics, access of arrays.
        match attribute {
            1 | 3 => value.put(0),
            2 | 4 => value.put(c_int::from(driver.config.has("peer"))),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuFlushGPUDirectRDMAWrites(target: c_int, scope: c_int) |driver| {
        device::current(driver)?;
        if target != 0 || ![ORDERING_OWNER, ORDERING_ALL_DEVICES].contains(&scope) {
            return Err(Code::INVALID_VALUE);
        }
        driver.need("rdma")?;
        driver.unflushed.flush()
    }
}

fn pci_bus(number: c_int) -> c_int {
    number + 1
}

/// The value of a `CUdevice_attribute`; 0 for those that say nothing to this library's users, none for no attribute.
fn attribute_of(config: &Config, attribute: c_int, device: c_int) -> Option<c_int> {
    let has = |part: &str| c_int::from(config.has(part));
    Some(match attribute {
        // Threads of a block in all and along x, y, z; blocks of a grid along x, y, z.
        1..=3 => 1024,
        4 => 64,
        5 => c_int::MAX,
        6 | 7 => 65_535,
        // Shared memory of a block, constant memory, warp, registers of a block, clock in kHz.
        8 => 49_152,
        9 => 65_536,
        10 => 32,
        12 => 65_536,
        13 => 1_000_000,
        // Multiprocessors; mapped host memory; PCI bus and device; engines; unified addressing; PCI domain.
        16 => 4,
        19 | 41 => 1,
        33 => pci_bus(device),
        34 => 0,
        39 => 2048,
        40 => 2,
        50 => PCI_DOMAIN,
        // Compute capability, stream priorities, shared memory of a multiprocessor and opted into.
        75 => 9,
        76 => 0,
        78 => 1,
        81 | 97 => 233_472,
        // A registered range has device pointers of its own (91 is 0). Flush, registration, read-only registration.
        98 => has("rdma"),
        99 | 113 => 1,
        102 => has("vmm"),
        103 => c_int::from(config.has("vmm") && config.has("posix-fd")),
        106 => 32,
        110 => c_int::from(config.has("rdma") && config.has("rdma-vmm") && config.has("vmm")),
        115 => 1,
        116 => has("rdma"),
        117 => {
            if config.has("rdma") {
                FLUSH_OPTION_HOST
            } else {
                0
            }
        }
        118 if config.stale || !config.has("rdma") => ORDERING_NONE,
        118 => ORDERING_OWNER,
        124 => has("dma-buf"),
        _ => return (1..ATTRIBUTE_MAX).contains(&attribute).then_some(0),
    })
}
