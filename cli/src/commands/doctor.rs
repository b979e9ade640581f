//! `hetmem doctor`: for each capability whether this machine has it, why, and what to do. Not a repair.
//! Invariant: every check tries the real thing, and every "no" has a remedy or says that there is none.

mod gpus;

use std::path::Path;

use hetmem_client::{Store, default_socket};
use hetmem_core::SegmentId;
use hetmem_host_mem::{PageKind, PagePolicy, Segment, SegmentOwner, pages_report};
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::{Output, bytes};

/// Descriptors that a node with its clients and peers can need.
const FILES_WANTED: u64 = 4096;
/// Memory below which a node has no room for anything.
const MEMORY_WANTED: u64 = 256 << 20;

/// One capability.
#[derive(Debug)]
struct Check {
    capability: String,
    has: bool,
    why: String,
    /// What to do; empty where nothing is to be done.
    remedy: String,
    /// Nothing works without it.
    required: bool,
}

impl Check {
    fn new(capability: &str, has: bool, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            capability: capability.to_owned(),
            has,
            why: why.into(),
            remedy: remedy.into(),
            required: false,
        }
    }

    fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

pub(crate) fn run(socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let mut checks = vec![shared_memory(), memory(), huge_pages(), open_files(), locked_memory()];
    checks.extend(gpus::checks(&hetmem_gpu_mem::probe(), Path::new("/")));
    checks.push(rdma());
    checks.extend(rdma_proofs());
    checks.push(node(socket));
    let row = |check: &Check| {
        json!({
            "capability": check.capability, "available": check.has, "why": check.why,
            "remedy": (!check.remedy.is_empty()).then_some(&check.remedy), "required": check.required,
        })
    };
    out.print(
        || checks.iter().map(row).collect::<Value>(),
        |text| {
            let width = checks.iter().map(|check| check.capability.chars().count()).max().unwrap_or(0);
            for check in &checks {
                let mark = if check.has { "yes" } else { "no " };
                writeln!(text, "{mark}  {:<width$}  {}", check.capability, check.why)?;
                if !check.remedy.is_empty() {
                    writeln!(text, "     {:<width$}  remedy: {}", "", check.remedy)?;
                }
            }
            Ok(())
        },
    )?;
    let missing = checks.iter().find(|check| check.required && !check.has);
    match missing {
        Some(check) => Err(Failure::Store(hetmem_client::StoreError::unavailable(
            check.capability.clone(),
            format!("{}; nothing works without it", check.why),
        ))),
        None => Ok(()),
    }
}

fn shared_memory() -> Check {
    let name = "shared memory";
    match Segment::create(SegmentId(0), 2 << 20, SegmentOwner::Client, PagePolicy::Off) {
        Ok(segment) => match segment.close_to_writers() {
            Ok(()) => Check::new(name, true, "memfd with SHRINK, GROW and FUTURE_WRITE seals works", ""),
            Err(error) => {
                Check::new(name, false, error.to_string(), "Linux 5.1 or newer has the FUTURE_WRITE seal")
            }
        },
        Err(error) => {
            Check::new(name, false, error.to_string(), "a sandbox may forbid memfd_create: allow it")
        }
    }
    .required()
}

fn memory() -> Check {
    let name = "memory";
    let Some(available) = mem_available() else {
        return Check::new(name, false, "/proc/meminfo does not say MemAvailable", "mount /proc");
    };
    let why = format!("{} can be had without swapping", bytes(available));
    if available < MEMORY_WANTED {
        return Check::new(name, false, why, "free memory, or serve with a smaller --host");
    }
    Check::new(name, true, why, "")
}

fn mem_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn huge_pages() -> Check {
    let report = pages_report();
    let has = report.best != PageKind::Small;
    Check::new("huge pages", has, report.why, report.remedy.unwrap_or_default())
}

fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).current;
    let why = match limit {
        Some(limit) => format!("{limit} files may be open at once (RLIMIT_NOFILE)"),
        None => "any number of files may be open at once".to_owned(),
    };
    let enough = limit.is_none_or(|limit| limit >= FILES_WANTED);
    let remedy = if enough { String::new() } else { format!("ulimit -n {FILES_WANTED}, for many segments") };
    Check::new("open files", enough, why, remedy)
}

fn locked_memory() -> Check {
    let name = "locked memory";
    match getrlimit(Resource::Memlock).current {
        None => Check::new(name, true, "any amount may be locked (RLIMIT_MEMLOCK)", ""),
        Some(limit) => Check::new(
            name,
            false,
            format!(
                "{} may be locked (RLIMIT_MEMLOCK); TCP needs none, RDMA all memory of the node",
                bytes(limit)
            ),
            "ulimit -l unlimited, for RDMA",
        ),
    }
}

fn rdma() -> Check {
    let name = "RDMA verbs";
    match hetmem_transport::verbs_devices(None) {
        Ok(devices) if devices.is_empty() => {
            let remedy = "none without an RDMA device: nodes speak TCP, which needs nothing";
            Check::new(name, false, "libibverbs and the plugin are there, and no RDMA device is", remedy)
        }
        Ok(devices) => Check::new(name, true, format!("devices: {}", devices.join(", ")), ""),
        Err(why) => {
            let remedy = "rdma-core (libibverbs1, librdmacm1), and libhetmem_verbs.so beside the program; without \
                          them nodes speak TCP";
            Check::new(name, false, why.to_string(), remedy)
        }
    }
}

/// What each RDMA device has done with real bytes, just now.
fn rdma_proofs() -> Vec<Check> {
    // That there are none is said by `rdma`.
    let devices = hetmem_transport::verbs_proofs(None).unwrap_or_default();
    let remedy = "look into the kernel's log, and at `ibv_devinfo -v`; without them nodes speak TCP";
    let check = |(name, proofs): (String, Vec<hetmem_transport::Proof>)| {
        let said: Vec<String> = proofs.iter().map(ToString::to_string).collect();
        let whole = proofs.iter().all(hetmem_transport::Proof::is_whole);
        Check::new(&format!("RDMA device {name}"), whole, said.join("; "), remedy)
    };
    devices.into_iter().map(check).collect()
}

fn node(socket: Option<&Path>) -> Check {
    let name = "node";
    let path = socket.map_or_else(default_socket, Path::to_path_buf);
    let path = path.display();
    match Store::connect(socket) {
        Ok(store) => Check::new(name, true, format!("{} answers at {path}", store.node()), ""),
        Err(error) => Check::new(name, false, error.to_string(), "start one: hetmem serve"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_no_without_hardware_has_why_and_remedy() {
        for check in [rdma(), node(Some(Path::new("/nonexistent/hetmem.sock")))] {
            assert!(!check.has, "{check:?}");
            assert!(!check.why.is_empty() && !check.remedy.is_empty(), "{check:?}");
        }
    }

    #[test]
    fn limits_of_this_process_are_read() {
        assert!(mem_available().is_some_and(|bytes| bytes > 0));
        assert!(!open_files().why.is_empty() && !locked_memory().why.is_empty());
    }
}
