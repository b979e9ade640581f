//! By which way NICs may come by a GPU's memory: dma-buf, else by address, else not. A pure function of what the probe
//! found. Not a proof: whether bytes arrive is tried with bytes. Invariant: where there is no way there is a reason with a
//! remedy.

use serde::Serialize;

use crate::{GpuDevice, GpuProbe, KernelModule, Unavailable};

/// How a NIC registers GPU memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NicAccess {
    /// By a dma-buf descriptor of the segment.
    DmaBuf,
    /// By the segment's address, through this loaded kernel module.
    PeerMemory(String),
}

impl GpuProbe {
    /// The way in which NICs are given the memory of the device with this ordinal.
    ///
    /// # Errors
    /// Why there is none; bytes then go through pinned host memory.
    pub fn nic_access(&self, ordinal: u16) -> Result<NicAccess, Unavailable> {
        let what = format!("NIC access to gpu:{ordinal}");
        let absent = |why: &str, remedy: &'static str| Unavailable {
            what: what.clone().into(),
            why: why.to_owned(),
            remedy: remedy.into(),
        };
        let Some(device) = self.devices.iter().find(|device| device.ordinal == ordinal) else {
            return Err(absent("there is no such device", "see `nvidia-smi` and CUDA_VISIBLE_DEVICES"));
        };
        if !device.attributes.gpudirect_rdma_with_virtual_memory {
            return Err(absent(
                "the device has no GPUDirect RDMA for virtual memory",
                "a data-center or workstation GPU has it; without it bytes go through pinned host memory",
            ));
        }
        if device.attributes.dma_buf {
            return Ok(NicAccess::DmaBuf);
        }
        if self.is_instance(device) {
            return Err(absent(
                "the driver exports no dma-buf, and nvidia-peermem does not work on a GPU that is cut into instances",
                "install the open NVIDIA kernel module, which exports dma-buf, or turn MIG off (`nvidia-smi -mig 0`)",
            ));
        }
        match &self.system.peer_memory {
            Ok(module) => Ok(NicAccess::PeerMemory(module.clone())),
            Err(_) => Err(absent(
                "the driver exports no dma-buf, and no module nvidia_peermem is loaded",
                match self.system.kernel_module {
                    Some(KernelModule::Open) => {
                        "dma-buf needs Linux 5.12 or newer; else `modprobe nvidia-peermem`, with the RDMA drivers of \
                         NVIDIA"
                    }
                    _ => {
                        "install the open NVIDIA kernel module, which exports dma-buf, or `modprobe nvidia-peermem`, \
                         with the RDMA drivers of NVIDIA"
                    }
                },
            )),
        }
    }

    fn is_instance(&self, device: &GpuDevice) -> bool {
        let Ok(nvml) = &self.nvml else {
            return false;
        };
        // An instance has a UUID of its own; its device is known by its place on the bus.
        nvml.devices.iter().any(|known| {
            known.mig == Some(true)
                && (known.uuid == device.uuid || known.pci_id.as_ref() == Some(&device.pci_id))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DriverInfo, GpuAttributes, NvmlDevice, NvmlInfo, SystemInfo};

    fn machine(dma_buf: bool, rdma: bool, peer_memory: bool, mig: bool) -> GpuProbe {
        let absent =
            Unavailable { what: "peer memory".into(), why: "not loaded".to_owned(), remedy: "".into() };
        let pci_id = "0000:3b:00.0".to_owned();
        GpuProbe {
            driver: Ok(DriverInfo { cuda_version: 13_000 }),
            devices: vec![GpuDevice {
                ordinal: 0,
                name: "GPU".to_owned(),
                uuid: "MIG-1".to_owned(),
                compute_capability: (9, 0),
                memory_bytes: 1 << 30,
                pci_id: pci_id.clone(),
                attributes: GpuAttributes {
                    dma_buf,
                    gpudirect_rdma_with_virtual_memory: rdma,
                    ..GpuAttributes::default()
                },
                peers: Vec::new(),
            }],
            unusable: Vec::new(),
            nvml: Ok(NvmlInfo {
                driver_version: String::new(),
                library_version: String::new(),
                devices: vec![NvmlDevice {
                    uuid: "GPU-1".to_owned(),
                    pci_id: Some(pci_id),
                    bar1_bytes: None,
                    bar1_used_bytes: None,
                    pcie_generation: None,
                    pcie_lanes: None,
                    nvlinks: None,
                    mig: Some(mig),
                    numa_node: None,
                }],
            }),
            system: SystemInfo {
                kernel_module: Some(KernelModule::Closed),
                peer_memory: if peer_memory { Ok("nvidia_peermem".to_owned()) } else { Err(absent) },
            },
        }
    }

    #[test]
    fn the_first_way_that_is_there_is_taken() {
        let peer = || Ok(NicAccess::PeerMemory("nvidia_peermem".to_owned()));
        let table = [
            ((true, true, true, false), Ok(NicAccess::DmaBuf)),
            ((true, true, false, true), Ok(NicAccess::DmaBuf)),
            ((false, true, true, false), peer()),
            ((false, true, false, false), Err("no module nvidia_peermem")),
            ((false, true, true, true), Err("cut into instances")),
            ((true, false, true, false), Err("no GPUDirect RDMA")),
        ];
        for ((dma_buf, rdma, peer_memory, mig), expected) in table {
            match (machine(dma_buf, rdma, peer_memory, mig).nic_access(0), expected) {
                (Ok(access), Ok(expected)) => assert_eq!(access, expected),
                (Err(absent), Err(part)) => {
                    assert!(absent.why.contains(part) && !absent.remedy.is_empty(), "{absent}");
                }
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
        }
        assert!(machine(true, true, true, false).nic_access(7).is_err());
    }
}
