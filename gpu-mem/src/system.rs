//! What the operating system knows about NVIDIA hardware, to say why a driver call failed. Not a second way to find
//! GPUs. Invariant: only reads small files and opens device nodes read-write without using them; never fails.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

use crate::Unavailable;

const NVIDIA_VENDOR: &str = "0x10de";
/// PCI classes of display and 3D controllers begin like this.
const DISPLAY_CLASS: &str = "0x03";

/// Names of the module that lets NICs reach GPU memory by address; the second is its name before driver 470.
const PEER_MEMORY_MODULES: [&str; 2] = ["nvidia_peermem", "nv_peer_mem"];

/// Which of the two NVIDIA kernel modules is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum KernelModule {
    /// The open one, which exports dma-buf.
    Open,
    /// The closed one, which does not.
    Closed,
}

/// What the operating system says of NVIDIA drivers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SystemInfo {
    /// The flavour of the loaded kernel module; none if none is loaded.
    pub kernel_module: Option<KernelModule>,
    /// The loaded module by which NICs reach GPU memory by address, or why there is none.
    pub peer_memory: Result<String, Unavailable>,
}

impl SystemInfo {
    pub(crate) fn look() -> Self {
        Self::look_under(Path::new("/"))
    }

    fn look_under(root: &Path) -> Self {
        let version = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
        let kernel_module = version.map(|text| match text.contains("Open Kernel Module") {
            true => KernelModule::Open,
            false => KernelModule::Closed,
        });
        let loaded = PEER_MEMORY_MODULES.iter().find(|name| root.join("sys/module").join(name).is_dir());
        let remedy = match kernel_module {
            Some(KernelModule::Open) => {
                "not needed where dma-buf works; else `modprobe nvidia-peermem`, with the RDMA drivers of NVIDIA"
            }
            Some(KernelModule::Closed) => {
                "`modprobe nvidia-peermem`, with the RDMA drivers of NVIDIA; or install the open kernel module, which \
                 exports dma-buf"
            }
            None => "nothing to do on a machine without an NVIDIA GPU",
        };
        let peer_memory = loaded.map(|name| (*name).to_owned()).ok_or_else(|| Unavailable {
            what: "peer memory".into(),
            why: "no module nvidia_peermem or nv_peer_mem is loaded".to_owned(),
            remedy: remedy.into(),
        });
        Self { kernel_module, peer_memory }
    }
}

/// Facts from /sys, /proc and /dev.
#[derive(Clone, Debug, Default)]
pub(crate) struct System {
    /// NVIDIA display or compute devices on the PCI bus.
    pci_devices: usize,
    /// The kernel driver is loaded.
    kernel_driver: bool,
    /// A device node that exists and may not be opened.
    forbidden_node: Option<&'static str>,
}

impl System {
    pub(crate) fn look() -> Self {
        Self::look_under(Path::new("/"))
    }

    fn look_under(root: &Path) -> Self {
        let is =
            |path: &Path, start: &str| fs::read_to_string(path).is_ok_and(|text| text.starts_with(start));
        let pci_devices = fs::read_dir(root.join("sys/bus/pci/devices"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|device| {
                let path = device.path();
                is(&path.join("vendor"), NVIDIA_VENDOR) && is(&path.join("class"), DISPLAY_CLASS)
            })
            .count();
        let forbidden_node = ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm"].into_iter().find(|node| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(root.join(node.trim_start_matches('/')))
                .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        });
        Self { pci_devices, kernel_driver: root.join("proc/driver/nvidia/version").exists(), forbidden_node }
    }

    /// No libcuda on the loader's path.
    pub(crate) fn missing_libcuda(&self) -> Unavailable {
        let (why, remedy) = match (self.kernel_driver, self.pci_devices) {
            (true, _) => (
                "libcuda.so.1 is not on the library path, though the NVIDIA kernel driver is loaded",
                "in a container: start it with the NVIDIA container toolkit and NVIDIA_DRIVER_CAPABILITIES \
                 containing `compute`; else install the driver's libcuda package",
            ),
            (false, 0) => (
                "libcuda.so.1 is not installed, and no NVIDIA device is on the PCI bus",
                "nothing to do on a machine without an NVIDIA GPU: objects stay in host memory",
            ),
            (false, _) => (
                "an NVIDIA device is on the PCI bus, but neither its kernel driver nor libcuda.so.1 is installed",
                "install the NVIDIA driver, 570 or newer",
            ),
        };
        gpu(why.to_owned(), remedy)
    }

    /// libcuda is here and finds no device; `reason` is the call and its result.
    pub(crate) fn no_device(&self, reason: &str) -> Unavailable {
        if let Some(node) = self.forbidden_node {
            return forbidden(node, reason);
        }
        let (why, remedy) = match (self.pci_devices, self.kernel_driver) {
            (0, false) => (
                "libcuda is installed, but no NVIDIA device is on the PCI bus",
                "nothing to do on a machine without an NVIDIA GPU: objects stay in host memory",
            ),
            (_, false) => (
                "an NVIDIA device is on the PCI bus, but the NVIDIA kernel driver is not loaded",
                "load it (`modprobe nvidia nvidia_uvm`) and look at the kernel log if that fails",
            ),
            (_, true) => (
                "the NVIDIA kernel driver is loaded, but shows this process no device",
                "see what CUDA_VISIBLE_DEVICES says, and in a container which devices it was given",
            ),
        };
        gpu(format!("{why} ({reason})"), remedy)
    }

    /// The driver reports an operating-system error; `reason` is the call and its result.
    pub(crate) fn refused_by_system(&self, reason: &str) -> Unavailable {
        match self.forbidden_node {
            Some(node) => forbidden(node, reason),
            None => gpu(
                format!("the operating system refused the NVIDIA driver a call ({reason})"),
                "look at limits on locked memory and descriptors, the container's seccomp profile and the kernel log",
            ),
        }
    }
}

fn forbidden(node: &str, reason: &str) -> Unavailable {
    gpu(
        format!("this user may not open {node} ({reason})"),
        "add the user to the group that owns the device node, or pass the device into the container",
    )
}

fn gpu(why: String, remedy: &'static str) -> Unavailable {
    Unavailable { what: "GPU".into(), why, remedy: remedy.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(pci_devices: usize, kernel_driver: bool, forbidden_node: Option<&'static str>) -> System {
        System { pci_devices, kernel_driver, forbidden_node }
    }

    #[test]
    fn a_missing_library_is_explained_by_what_else_is_there() {
        let nothing = system(0, false, None).missing_libcuda();
        assert!(nothing.why.contains("no NVIDIA device"), "{nothing}");
        assert!(nothing.remedy.contains("nothing to do"), "{nothing}");
        let bare = system(2, false, None).missing_libcuda();
        assert!(bare.remedy.contains("install the NVIDIA driver"), "{bare}");
        let container = system(2, true, None).missing_libcuda();
        assert!(container.remedy.contains("container"), "{container}");
    }

    #[test]
    fn a_missing_device_is_explained_by_permission_first() {
        let reason = "cuInit returned 100";
        let denied = system(1, true, Some("/dev/nvidiactl")).no_device(reason);
        assert!(denied.why.contains("may not open /dev/nvidiactl (cuInit returned 100)"), "{denied}");
        assert!(system(0, false, None).no_device(reason).why.contains("PCI bus"));
        assert!(system(1, false, None).no_device(reason).remedy.contains("modprobe"));
        let hidden = system(1, true, None).no_device(reason);
        assert!(hidden.remedy.contains("CUDA_VISIBLE_DEVICES"), "{hidden}");
    }

    #[test]
    fn only_nvidia_display_devices_count() {
        let root = std::env::temp_dir().join(format!("hetmem-system-{}", std::process::id()));
        let cards = [
            ("0000:00:02.0", "0x8086\n", "0x030000\n"),
            ("0000:3b:00.0", "0x10de\n", "0x030200\n"),
            ("0000:3b:00.1", "0x10de\n", "0x040300\n"),
        ];
        for (address, vendor, class) in cards {
            let device = root.join("sys/bus/pci/devices").join(address);
            fs::create_dir_all(&device).expect("temporary folder");
            fs::write(device.join("vendor"), vendor).expect("temporary file");
            fs::write(device.join("class"), class).expect("temporary file");
        }
        let found = System::look_under(&root);
        fs::remove_dir_all(&root).expect("made above");
        assert_eq!(found.pci_devices, 1);
        assert!(!found.kernel_driver);
        assert_eq!(System::look_under(&root).pci_devices, 0, "a missing folder is no device");
    }

    #[test]
    fn modules_are_told_apart() {
        let root = std::env::temp_dir().join(format!("hetmem-modules-{}", std::process::id()));
        let version = root.join("proc/driver/nvidia/version");
        fs::create_dir_all(version.parent().expect("a folder")).expect("temporary folder");
        let look = |text: &str| {
            fs::write(&version, text).expect("temporary file");
            SystemInfo::look_under(&root)
        };
        let closed = look("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15\n");
        assert_eq!(closed.kernel_module, Some(KernelModule::Closed));
        assert!(closed.peer_memory.expect_err("none is loaded").remedy.contains("open kernel module"));
        fs::create_dir_all(root.join("sys/module/nvidia_peermem")).expect("temporary folder");
        let open = look("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05\n");
        assert_eq!(open.kernel_module, Some(KernelModule::Open));
        assert_eq!(open.peer_memory.as_deref(), Ok("nvidia_peermem"));
        fs::remove_dir_all(&root).expect("made above");
        let nothing = SystemInfo::look_under(&root);
        assert_eq!(nothing.kernel_module, None);
        assert!(nothing.peer_memory.expect_err("none").remedy.contains("nothing to do"));
    }
}
