//! NVML, the management library: driver version, BAR1 size and NUMA node of each GPU. Not needed to use a GPU.
//! Invariant: a device that cannot tell its UUID is left out; everything else about it is optional.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::{NvmlDevice, NvmlInfo, Unavailable, sysfs_pci_id};

/// `NVML_NVLINK_MAX_LINKS` of the newest devices.
const NVLINKS_MAX: u32 = 18;
/// `NVML_DEVICE_MIG_ENABLE`.
const MIG_ENABLED: u32 = 1;

/// Asks NVML, if it is there. The library is closed again before this returns.
pub(crate) fn probe() -> Result<NvmlInfo, Unavailable> {
    let nvml = Nvml::init().map_err(|error| absent("nvmlInit", &error))?;
    let count = nvml.device_count().map_err(|error| absent("nvmlDeviceGetCount", &error))?;
    let devices = (0..count).filter_map(|index| describe(&nvml, index)).collect();
    Ok(NvmlInfo {
        driver_version: nvml
            .sys_driver_version()
            .map_err(|error| absent("nvmlSystemGetDriverVersion", &error))?,
        library_version: nvml
            .sys_nvml_version()
            .map_err(|error| absent("nvmlSystemGetNVMLVersion", &error))?,
        devices,
    })
}

fn describe(nvml: &Nvml, index: u32) -> Option<NvmlDevice> {
    let device = nvml.device_by_index(index).ok()?;
    let bar1 = device.bar1_memory_info().ok();
    let links = (0..NVLINKS_MAX).map_while(|link| device.link_wrapper_for(link).is_active().ok());
    let links: Vec<bool> = links.collect();
    Some(NvmlDevice {
        uuid: device.uuid().ok()?,
        pci_id: device.pci_info().ok().map(|info| sysfs_pci_id(&info.bus_id)),
        bar1_bytes: bar1.as_ref().map(|memory| memory.total),
        bar1_used_bytes: bar1.as_ref().map(|memory| memory.used),
        pcie_generation: device.current_pcie_link_gen().ok(),
        pcie_lanes: device.current_pcie_link_width().ok(),
        // A device without links refuses the first one.
        nvlinks: (!links.is_empty()).then(|| links.iter().map(|up| u32::from(*up)).sum()),
        mig: device.mig_mode().ok().map(|mode| mode.current == MIG_ENABLED),
        numa_node: device.numa_node_id().ok(),
    })
}

fn absent(call: &'static str, error: &NvmlError) -> Unavailable {
    let remedy = match error {
        NvmlError::LibloadingError(_) => {
            "nothing to do without an NVIDIA GPU; else install the driver's NVML library, or give the container \
             the `utility` driver capability"
        }
        NvmlError::DriverNotLoaded => "load the NVIDIA kernel driver (`modprobe nvidia`)",
        NvmlError::NoPermission => "give this user access to /dev/nvidiactl",
        NvmlError::LibRmVersionMismatch => {
            "reload the nvidia kernel modules or reboot after the driver update"
        }
        NvmlError::FailedToLoadSymbol(_) => "update the NVIDIA driver: its NVML lacks a function",
        _ => "see whether `nvidia-smi` works, and what the kernel log says",
    };
    let mut why = format!("{call}: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        // The outer message of a loading error often repeats the inner one.
        let cause_text = cause.to_string();
        if !why.contains(&cause_text) {
            why.push_str(": ");
            why.push_str(&cause_text);
        }
        source = cause.source();
    }
    Unavailable { what: "NVML".into(), why, remedy: remedy.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_names_the_call_and_a_remedy() {
        for error in [NvmlError::DriverNotLoaded, NvmlError::NoPermission, NvmlError::GpuLost] {
            let absent = absent("nvmlInit", &error);
            assert!(absent.why.starts_with("nvmlInit: "), "{absent}");
            assert!(!absent.remedy.is_empty(), "{absent}");
        }
    }
}
