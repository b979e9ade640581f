//! How far a NIC is from a GPU, by their places on the PCI bus. Not a measurement, and not what to do about it.
//! Invariant: only reads links and small files of sysfs; what cannot be read is unknown, never a guess of near.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::Serialize;

/// How far two PCI devices are from each other; nearer ones are less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Distance {
    /// On the same PCIe switch.
    Pix,
    /// Under the same port of the processor, with more than one switch in between.
    Pxb,
    /// At the same host bridge: traffic passes the processor's root complex.
    Phb,
    /// At different host bridges of one NUMA node.
    Node,
    /// At different NUMA nodes, or nobody knows.
    Sys,
}

impl fmt::Display for Distance {
    /// As `nvidia-smi topo -m` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        })
    }
}

/// Where a PCI device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPlace {
    /// The host bridge and every bridge from there to the device, which is the last.
    pub path: Vec<String>,
    /// The nearest NUMA node; none where the system does not say.
    pub numa_node: Option<u32>,
}

/// An RDMA device and its place on the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// As verbs name it: `mlx5_0`.
    pub name: String,
    /// Its PCI address as in sysfs; none for one that is not on the bus (soft RoCE).
    pub pci_id: Option<String>,
}

/// How far two devices are from each other.
#[must_use]
pub fn distance(one: &PciPlace, other: &PciPlace) -> Distance {
    let shared = one.path.iter().zip(&other.path).take_while(|(one, other)| one == other).count();
    if shared == 0 {
        return match (one.numa_node, other.numa_node) {
            (Some(one), Some(other)) if one == other => Distance::Node,
            _ => Distance::Sys,
        };
    }
    if shared == 1 {
        return Distance::Phb;
    }
    // Below what they share: the switch's own port to each device, and the device. More of them are more switches.
    let below = one.path.len().max(other.path.len()) - shared;
    if below <= 2 { Distance::Pix } else { Distance::Pxb }
}

/// Where the PCI device with this address is, under a root of the file system (`/`). None if there is no such device.
#[must_use]
pub fn pci_place(root: &Path, pci_id: &str) -> Option<PciPlace> {
    let device = root.join("sys/bus/pci/devices").join(pci_id);
    let full = fs::canonicalize(&device).ok()?;
    let names = full.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    // The folder of the host bridge is `pci` with domain and bus; what is before it is the same for all.
    let path: Vec<_> = names.skip_while(|name| !is_host_bridge(name)).collect();
    let numa_node = fs::read_to_string(full.join("numa_node")).ok();
    let numa_node = numa_node.and_then(|text| text.trim().parse::<i64>().ok());
    (!path.is_empty())
        .then(|| PciPlace { path, numa_node: numa_node.and_then(|node| u32::try_from(node).ok()) })
}

fn is_host_bridge(name: &str) -> bool {
    name.strip_prefix("pci").is_some_and(|rest| rest.contains(':'))
}

/// The RDMA devices of this system, by name.
#[must_use]
pub fn nics(root: &Path) -> Vec<Nic> {
    let entries = fs::read_dir(root.join("sys/class/infiniband")).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .map(|entry| {
            let device = fs::canonicalize(entry.path().join("device")).ok();
            let id = device.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
            Nic {
                name: entry.file_name().to_string_lossy().into_owned(),
                pci_id: id.filter(|id| root.join("sys/bus/pci/devices").join(id).exists()),
            }
        })
        .collect();
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

/// How far each RDMA device of this system is from the GPU with this PCI address, nearest first. What is not on the
/// bus is left out.
#[must_use]
pub fn nic_distances(root: &Path, gpu_pci_id: &str) -> Vec<(String, Distance)> {
    let Some(gpu) = pci_place(root, gpu_pci_id) else {
        return Vec::new();
    };
    let nics = nics(root).into_iter();
    let mut found: Vec<_> = nics
        .filter_map(|nic| Some((nic.name, distance(&gpu, &pci_place(root, nic.pci_id.as_deref()?)?))))
        .collect();
    found.sort_by(|one, other| (one.1, &one.0).cmp(&(other.1, &other.0)));
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// A made-up sysfs, removed when dropped.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("hetmem-topology-{name}-{}", std::process::id()));
            for folder in ["sys/bus/pci/devices", "sys/class/infiniband"] {
                fs::create_dir_all(root.join(folder)).expect("temporary folder");
            }
            Self(root)
        }

        /// A PCI device at this path below `sys/devices`.
        fn device(&self, path: &str, numa_node: &str) -> &Self {
            let folder = self.0.join("sys/devices").join(path);
            fs::create_dir_all(&folder).expect("temporary folder");
            fs::write(folder.join("numa_node"), numa_node).expect("temporary file");
            let id = path.rsplit('/').next().expect("a name");
            symlink(&folder, self.0.join("sys/bus/pci/devices").join(id)).expect("temporary link");
            self
        }

        /// An RDMA device of a PCI device.
        fn nic(&self, name: &str, path: &str) -> &Self {
            let folder = self.0.join("sys/class/infiniband").join(name);
            fs::create_dir_all(&folder).expect("temporary folder");
            symlink(self.0.join("sys/devices").join(path), folder.join("device")).expect("temporary link");
            self
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const GPU: &str = "pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:04.0/0000:3d:00.0";

    #[test]
    fn every_distance_on_one_machine() {
        let tree = Tree::new("all");
        let nics = [
            // The same switch, another port of it.
            (
                "mlx5_0",
                "pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:08.0/0000:3e:00.0",
                "0\n",
                Distance::Pix,
            ),
            // Another switch below the same root port.
            (
                "mlx5_1",
                "pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:10.0/0000:3f:00.0/0000:40:00.0/0000:41:00.0",
                "0\n",
                Distance::Pxb,
            ),
            // Another root port of the same host bridge.
            ("mlx5_2", "pci0000:3a/0000:3a:02.0/0000:45:00.0", "0\n", Distance::Phb),
            // Another host bridge of the same node, and of the other.
            ("mlx5_3", "pci0000:5d/0000:5d:00.0/0000:5e:00.0", "0\n", Distance::Node),
            ("mlx5_4", "pci0000:d7/0000:d7:00.0/0000:d8:00.0", "1\n", Distance::Sys),
            // A system that knows no nodes.
            ("mlx5_5", "pci0000:e0/0000:e0:00.0/0000:e1:00.0", "-1\n", Distance::Sys),
        ];
        tree.device(GPU, "0\n");
        for (name, path, numa_node, _) in nics {
            tree.device(path, numa_node).nic(name, path);
        }
        let found = nic_distances(&tree.0, "0000:3d:00.0");
        let expected: Vec<_> =
            nics.iter().map(|(name, _, _, distance)| ((*name).to_owned(), *distance)).collect();
        assert_eq!(found, expected, "nearest first");
        let names: Vec<_> = found.iter().map(|(_, distance)| distance.to_string()).collect();
        assert_eq!(names, ["PIX", "PXB", "PHB", "NODE", "SYS", "SYS"]);
    }

    #[test]
    fn what_is_not_on_the_bus_is_left_out() {
        let tree = Tree::new("soft");
        tree.device(GPU, "0\n").nic("rxe_0", "virtual/net/eth0");
        fs::create_dir_all(tree.0.join("sys/devices/virtual/net/eth0")).expect("temporary folder");
        assert_eq!(super::nics(&tree.0), [Nic { name: "rxe_0".to_owned(), pci_id: None }]);
        assert_eq!(nic_distances(&tree.0, "0000:3d:00.0"), []);
        assert_eq!(nic_distances(&tree.0, "0000:99:00.0"), [], "no such GPU");
        assert_eq!(nic_distances(Path::new("/nonexistent"), "0000:3d:00.0"), []);
    }

    #[test]
    fn a_device_without_a_place_is_far() {
        let nowhere = PciPlace { path: Vec::new(), numa_node: None };
        assert_eq!(distance(&nowhere, &nowhere), Distance::Sys);
        let here =
            PciPlace { path: vec!["pci0000:00".to_owned(), "0000:00:02.0".to_owned()], numa_node: Some(0) };
        assert_eq!(distance(&here, &nowhere), Distance::Sys);
        assert_eq!(distance(&here, &here), Distance::Pix, "functions of one device");
    }
}
