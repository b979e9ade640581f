//! What `hetmem doctor` says of GPUs: the driver, the kernel's modules, and for each device what it can do for the store.
//! Not the asking (`hetmem_gpu_mem::probe`). Invariant: no context is created, and what is unknown is said to be unknown.

use std::path::Path;

use hetmem_gpu_mem::flush::{Consumer, FlushDecision, FlushFacts, decide};

use hetmem_gpu_mem::{
    GpuDevice, GpuProbe, KERNELS_DRIVER_VERSION_MIN, KernelModule, NicAccess, NvmlDevice, Unavailable,
    topology,
};

use super::Check;
use crate::output::bytes;

/// Everything about GPUs, of the machine whose file system is at `root`.
pub(super) fn checks(probe: &GpuProbe, root: &Path) -> Vec<Check> {
    let mut checks =
        vec![driver(probe), kernels(probe), kernel_module(probe), peer_memory(probe), nvml(probe)];
    for device in &probe.devices {
        let known = nvml_of(probe, device);
        checks.extend([
            identity(device),
            tier(device),
            nic_access(probe, device),
            attributes(device),
            write_order(device),
            bar1(device, known),
            pcie_link(device, known),
            numa_node(device, known, root),
            nvlinks(device, known),
            instances(device, known),
            peers(device, probe.devices.len()),
            nics(device, root),
        ]);
    }
    checks.extend(probe.unusable.iter().map(|why| absent(&why.what, why)));
    checks
}

fn absent(name: &str, absent: &Unavailable) -> Check {
    Check::new(name, false, absent.why.clone(), absent.remedy.clone())
}

/// What NVML says of a device; an instance of one (MIG) is found by the place on the bus.
fn nvml_of<'a>(probe: &'a GpuProbe, device: &GpuDevice) -> Option<&'a NvmlDevice> {
    let devices = &probe.nvml.as_ref().ok()?.devices;
    let by_uuid = devices.iter().find(|known| known.uuid == device.uuid);
    by_uuid.or_else(|| devices.iter().find(|known| known.pci_id.as_ref() == Some(&device.pci_id)))
}

fn of(device: &GpuDevice, what: &str) -> String {
    format!("gpu:{} {what}", device.ordinal)
}

/// A fact that only NVML has.
fn unknown(name: &str) -> Check {
    let remedy = "see NVML above; the store works without knowing it";
    Check::new(name, false, "NVML does not tell", remedy)
}

fn driver(probe: &GpuProbe) -> Check {
    let name = "GPU driver";
    match &probe.driver {
        Ok(driver) => Check::new(name, true, format!("{driver}, {} devices", probe.devices.len()), ""),
        Err(why) => absent(name, why),
    }
}

/// Whether the driver takes the store's own kernels. Said from its version: to try takes a context.
fn kernels(probe: &GpuProbe) -> Check {
    let name = "GPU kernels of the store";
    match &probe.driver {
        Ok(driver) if driver.cuda_version >= KERNELS_DRIVER_VERSION_MIN => {
            let why =
                "its PTX is of CUDA 13.0: batches of small copies, checksums and conversions on the GPU";
            Check::new(name, true, why, "")
        }
        Ok(driver) => Check::new(
            name,
            false,
            format!("their PTX is of CUDA 13.0, the driver's is of {driver}"),
            "update the driver to 580 or newer; until then the driver copies one by one, and the processor compares and \
             converts",
        ),
        Err(why) => absent(name, why),
    }
}

fn kernel_module(probe: &GpuProbe) -> Check {
    let name = "GPU kernel module";
    match probe.system.kernel_module {
        Some(KernelModule::Open) => Check::new(name, true, "the open one, which exports dma-buf", ""),
        Some(KernelModule::Closed) => Check::new(
            name,
            true,
            "the closed one, which exports no dma-buf: NICs reach GPU memory only by nvidia-peermem",
            "for dma-buf, install the open flavour of the same driver version",
        ),
        None => Check::new(
            name,
            false,
            "none of NVIDIA is loaded (/proc/driver/nvidia/version is not there)",
            "nothing to do on a machine without an NVIDIA GPU; else install the driver, 570 or newer",
        ),
    }
}

fn peer_memory(probe: &GpuProbe) -> Check {
    let name = "GPU peer memory module";
    match &probe.system.peer_memory {
        Ok(module) => Check::new(name, true, format!("{module} is loaded"), ""),
        Err(why) => absent(name, why),
    }
}

fn nvml(probe: &GpuProbe) -> Check {
    match &probe.nvml {
        Ok(nvml) => {
            let why = format!("driver {}, library {}", nvml.driver_version, nvml.library_version);
            Check::new("NVML", true, why, "")
        }
        Err(why) => absent("NVML", why),
    }
}

fn identity(device: &GpuDevice) -> Check {
    let (major, minor) = device.compute_capability;
    let why = format!(
        "{}, compute {major}.{minor}, {}, {}, at {}",
        device.name,
        bytes(device.memory_bytes),
        device.uuid,
        device.pci_id
    );
    Check::new(&format!("gpu:{}", device.ordinal), true, why, "")
}

/// Whether objects can be there.
fn tier(device: &GpuDevice) -> Check {
    let name = of(device, "as a tier");
    let attributes = &device.attributes;
    match (attributes.virtual_memory, attributes.posix_descriptor_export) {
        (true, true) => {
            let why = "virtual memory management, shared with other processes by descriptors";
            Check::new(&name, true, why, "")
        }
        (true, false) => Check::new(
            &name,
            false,
            "the driver exports no memory as POSIX descriptors, so other processes cannot have it",
            "use a driver that is not a vGPU's; until then objects are in host memory",
        ),
        (false, _) => Check::new(
            &name,
            false,
            "the device has no virtual memory management",
            "a virtual device may lack it: use the whole GPU; until then objects are in host memory",
        ),
    }
}

fn nic_access(probe: &GpuProbe, device: &GpuDevice) -> Check {
    let name = of(device, "reached by NICs");
    match probe.nic_access(device.ordinal) {
        Ok(NicAccess::DmaBuf) => Check::new(&name, true, "by dma-buf", ""),
        Ok(NicAccess::PeerMemory(module)) => {
            Check::new(&name, true, format!("by address, through {module}"), "")
        }
        Err(why) => absent(&name, &why),
    }
}

/// The bare attributes, for whoever looks into a refusal.
fn attributes(device: &GpuDevice) -> Check {
    let attributes = &device.attributes;
    let told = [
        ("GPUDirect RDMA", attributes.gpudirect_rdma),
        ("GPUDirect RDMA with virtual memory", attributes.gpudirect_rdma_with_virtual_memory),
        ("dma-buf", attributes.dma_buf),
        ("read-only registration of host memory", attributes.read_only_host_register),
    ];
    let told: Vec<String> =
        told.iter().map(|(what, has)| format!("{what}: {}", crate::output::yes(*has))).collect();
    let all = told.iter().all(|said| said.ends_with("yes"));
    let remedy = match all {
        true => "",
        false => "a newer driver, or a data-center GPU, may have what is lacking; each has a way around it",
    };
    Check::new(&of(device, "attributes"), all, told.join(", "), remedy)
}

/// Whether what a NIC has written is seen by the GPU, in the words of the function that decides it.
fn write_order(device: &GpuDevice) -> Check {
    let attributes = &device.attributes;
    let order = match attributes.writes_ordering {
        0 => "no order".to_owned(),
        100 => "in order for this GPU".to_owned(),
        200 => "in order for every GPU".to_owned(),
        other => format!("an order of unknown kind {other}"),
    };
    let flush = match attributes.flush_writes_options & 3 {
        0 => "no flush",
        1 => "a flush by the processor",
        2 => "a flush in streams only",
        _ => "a flush by the processor or in streams",
    };
    let facts = FlushFacts {
        writes_ordering: attributes.writes_ordering,
        flush_writes_options: attributes.flush_writes_options,
        compute_capability: device.compute_capability,
        // No driver that is asked here tells.
        c2c: None,
        data_direct: false,
        nics: 1,
        consumer: Consumer::WorkSubmittedLater,
    };
    let decision = decide(facts);
    let (has, what, remedy) = match decision {
        FlushDecision::None(_) => (true, "nothing needs to be done", ""),
        FlushDecision::Flush(_) => (true, "the driver's flush is to be called", ""),
        FlushDecision::ReadBack(_) => {
            (false, "the NIC has to read back", "update the driver; bytes go through host memory otherwise")
        }
    };
    let why = format!(
        "{order} (ordering {}), {flush} (options {}): before a GPU reads what a NIC wrote, {what}, for {} (today no NIC \
         writes there)",
        attributes.writes_ordering,
        attributes.flush_writes_options,
        decision.why()
    );
    Check::new(&of(device, "order of NICs' writes"), has, why, remedy)
}

fn bar1(device: &GpuDevice, known: Option<&NvmlDevice>) -> Check {
    let name = of(device, "BAR1");
    let Some(total) = known.and_then(|known| known.bar1_bytes) else {
        return unknown(&name);
    };
    let used = known.and_then(|known| known.bar1_used_bytes).map_or_else(|| "?".to_owned(), bytes);
    let why = format!("{used} of {} used", bytes(total));
    if total < device.memory_bytes {
        let why =
            format!("{why}: less than the device's memory, of which gpu = auto takes no more than fits");
        let remedy = "where the firmware offers it, turn on a resizable BAR (above 4G decoding)";
        return Check::new(&name, true, why, remedy);
    }
    Check::new(&name, true, why, "")
}

fn pcie_link(device: &GpuDevice, known: Option<&NvmlDevice>) -> Check {
    let name = of(device, "PCIe link");
    match known.and_then(|known| Some((known.pcie_generation?, known.pcie_lanes?))) {
        Some((generation, lanes)) => {
            let why = format!(
                "generation {generation}, {lanes} lanes now (an idle device may use less than it can)"
            );
            Check::new(&name, true, why, "")
        }
        None => unknown(&name),
    }
}

fn numa_node(device: &GpuDevice, known: Option<&NvmlDevice>, root: &Path) -> Check {
    let name = of(device, "NUMA node");
    let place = topology::pci_place(root, &device.pci_id).and_then(|place| place.numa_node);
    match known.and_then(|known| known.numa_node).or(place) {
        Some(node) => Check::new(&name, true, node.to_string(), ""),
        None => {
            let remedy =
                "none on a machine of one node; else see what the firmware tells the kernel of nodes";
            Check::new(&name, false, "neither NVML nor the kernel tells", remedy)
        }
    }
}

fn nvlinks(device: &GpuDevice, known: Option<&NvmlDevice>) -> Check {
    let name = of(device, "NVLink");
    let none = "none where there is no link: copies between GPUs go over PCIe";
    match known.map(|known| known.nvlinks) {
        Some(Some(0)) => {
            Check::new(&name, false, "it has links, and none is up", "see `nvidia-smi nvlink -s`")
        }
        Some(Some(up)) => Check::new(&name, true, format!("{up} links are up"), ""),
        Some(None) => Check::new(&name, false, "the device has no link, or NVML does not tell", none),
        None => unknown(&name),
    }
}

fn instances(device: &GpuDevice, known: Option<&NvmlDevice>) -> Check {
    let name = of(device, "whole (no MIG)");
    match known.map(|known| known.mig) {
        Some(Some(true)) => Check::new(
            &name,
            false,
            "the device is cut into instances, which nvidia-peermem does not give to NICs",
            "`nvidia-smi -mig 0`, or use dma-buf",
        ),
        Some(Some(false)) => Check::new(&name, true, "MIG is off", ""),
        Some(None) => Check::new(&name, true, "the device knows no instances", ""),
        None => unknown(&name),
    }
}

fn peers(device: &GpuDevice, devices: usize) -> Check {
    let name = of(device, "peers");
    let list: Vec<String> = device.peers.iter().map(|peer| format!("gpu:{peer}")).collect();
    match (list.is_empty(), devices) {
        (false, _) => {
            Check::new(&name, true, format!("reads and writes memory of {} directly", list.join(", ")), "")
        }
        (true, 0 | 1) => {
            Check::new(&name, false, "it is the only GPU that this process sees", "nothing to do")
        }
        (true, _) => Check::new(
            &name,
            false,
            "it reaches no other GPU's memory directly: the driver copies through host memory",
            "see `nvidia-smi topo -p2p rw`; an IOMMU or PCIe access control (ACS) may forbid it",
        ),
    }
}

fn nics(device: &GpuDevice, root: &Path) -> Check {
    let name = of(device, "distance to NICs");
    let found = topology::nic_distances(root, &device.pci_id);
    if !found.is_empty() {
        let list: Vec<String> = found.iter().map(|(nic, distance)| format!("{nic} {distance}")).collect();
        let words = "nearest first; PIX one switch, PXB several, PHB one host bridge, NODE one NUMA node, SYS farther";
        return Check::new(&name, true, format!("{} ({words})", list.join(", ")), "");
    }
    let why = match (topology::pci_place(root, &device.pci_id), topology::nics(root).len()) {
        (_, 0) => "there is no RDMA device".to_owned(),
        (None, _) => format!("{} is not on this machine's PCI bus", device.pci_id),
        (Some(_), nics) => format!("none of {nics} RDMA devices is on the PCI bus"),
    };
    Check::new(
        &name,
        false,
        why,
        "none without an RDMA adapter: other nodes are reached over TCP, through host memory",
    )
}

#[cfg(test)]
mod tests {
    use hetmem_gpu_mem::{DriverInfo, GpuAttributes, NvmlInfo, SystemInfo};

    use super::*;

    fn missing(what: &'static str) -> Unavailable {
        Unavailable { what: what.into(), why: "not installed".to_owned(), remedy: "install it".into() }
    }

    fn device(attributes: GpuAttributes, peers: Vec<u16>) -> GpuDevice {
        GpuDevice {
            ordinal: 0,
            name: "GPU".to_owned(),
            uuid: "GPU-1".to_owned(),
            compute_capability: (9, 0),
            memory_bytes: 80 << 30,
            pci_id: "0000:3b:00.0".to_owned(),
            attributes,
            peers,
        }
    }

    fn machine(device: GpuDevice, nvml: Result<NvmlDevice, Unavailable>) -> GpuProbe {
        let nvml = nvml.map(|device| NvmlInfo {
            driver_version: "580.95.05".to_owned(),
            library_version: "13.580".to_owned(),
            devices: vec![device],
        });
        GpuProbe {
            driver: Ok(DriverInfo { cuda_version: 13_000 }),
            devices: vec![device],
            unusable: Vec::new(),
            nvml,
            system: SystemInfo {
                kernel_module: Some(KernelModule::Open),
                peer_memory: Ok("nvidia_peermem".to_owned()),
            },
        }
    }

    fn check<'a>(checks: &'a [Check], name: &str) -> &'a Check {
        let found = checks.iter().find(|check| check.capability == name);
        found.unwrap_or_else(|| panic!("no {name} in {checks:?}"))
    }

    const NOWHERE: &str = "/nonexistent";

    #[test]
    fn a_whole_gpu_is_told_with_its_figures() {
        let attributes = GpuAttributes {
            virtual_memory: true,
            posix_descriptor_export: true,
            gpudirect_rdma: true,
            gpudirect_rdma_with_virtual_memory: true,
            dma_buf: true,
            read_only_host_register: true,
            flush_writes_options: 1,
            writes_ordering: 200,
        };
        let nvml = NvmlDevice {
            uuid: "GPU-1".to_owned(),
            pci_id: None,
            bar1_bytes: Some(128 << 30),
            bar1_used_bytes: Some(6 << 20),
            pcie_generation: Some(5),
            pcie_lanes: Some(16),
            nvlinks: Some(18),
            mig: Some(false),
            numa_node: Some(1),
        };
        let checks = checks(&machine(device(attributes, vec![1, 2]), Ok(nvml)), Path::new(NOWHERE));
        for (name, part) in [
            ("GPU kernels of the store", "CUDA 13.0"),
            ("GPU kernel module", "open"),
            ("GPU peer memory module", "nvidia_peermem"),
            ("gpu:0", "compute 9.0, 80.0 GiB, GPU-1, at 0000:3b:00.0"),
            ("gpu:0 as a tier", "virtual memory"),
            ("gpu:0 reached by NICs", "dma-buf"),
            ("gpu:0 attributes", "dma-buf: yes"),
            (
                "gpu:0 order of NICs' writes",
                "the driver's flush is to be called, for whether there is a chip-to-chip",
            ),
            ("gpu:0 BAR1", "6.0 MiB of 128 GiB used"),
            ("gpu:0 PCIe link", "generation 5, 16 lanes"),
            ("gpu:0 NUMA node", "1"),
            ("gpu:0 NVLink", "18"),
            ("gpu:0 whole (no MIG)", "off"),
            ("gpu:0 peers", "gpu:1, gpu:2"),
        ] {
            let check = check(&checks, name);
            assert!(check.has && check.why.contains(part), "{check:?}");
        }
        let nics = check(&checks, "gpu:0 distance to NICs");
        assert!(!nics.has && nics.why.contains("no RDMA device"), "{nics:?}");
    }

    #[test]
    fn whatever_is_lacking_has_why_and_remedy() {
        let cut = NvmlDevice {
            uuid: "GPU-2".to_owned(),
            pci_id: Some("0000:3b:00.0".to_owned()),
            bar1_bytes: Some(256 << 20),
            bar1_used_bytes: None,
            pcie_generation: None,
            pcie_lanes: None,
            nvlinks: None,
            mig: Some(true),
            numa_node: None,
        };
        let mut old = machine(device(GpuAttributes::default(), Vec::new()), Ok(cut));
        old.driver = Ok(DriverInfo { cuda_version: 12_080 });
        old.system = SystemInfo { kernel_module: None, peer_memory: Err(missing("peer memory")) };
        let without_nvml = machine(device(GpuAttributes::default(), Vec::new()), Err(missing("NVML")));
        let mut nothing = without_nvml.clone();
        nothing.driver = Err(missing("GPU"));
        nothing.devices.clear();
        nothing.unusable.push(missing("gpu:1"));
        for (probe, lacking) in [(old, 13), (without_nvml, 12), (nothing, 4)] {
            let checks = checks(&probe, Path::new(NOWHERE));
            let without: Vec<_> = checks.iter().filter(|check| !check.has).collect();
            assert_eq!(without.len(), lacking, "{without:?}");
            for check in without {
                assert!(!check.why.is_empty() && !check.remedy.is_empty(), "{check:?}");
            }
        }
    }

    #[test]
    fn a_small_bar1_says_what_it_limits() {
        let nvml = NvmlDevice {
            uuid: "GPU-1".to_owned(),
            pci_id: None,
            bar1_bytes: Some(256 << 20),
            bar1_used_bytes: Some(0),
            pcie_generation: None,
            pcie_lanes: None,
            nvlinks: Some(0),
            mig: None,
            numa_node: None,
        };
        let checks =
            checks(&machine(device(GpuAttributes::default(), Vec::new()), Ok(nvml)), Path::new(NOWHERE));
        let bar1 = check(&checks, "gpu:0 BAR1");
        assert!(bar1.why.contains("less than the device's memory") && !bar1.remedy.is_empty(), "{bar1:?}");
        assert!(check(&checks, "gpu:0 NVLink").why.contains("none is up"));
    }
}
