//! Memory files and their seals. Not their mappings (`mapping`). Invariant: a file that `check_sealed` accepted keeps
//! its length for ever, so no access inside that length can fault.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hetmem_core::StoreError;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;

use crate::os;

/// Creates a memory file of `len_bytes` bytes, on reserved huge pages of the given size if one is given.
pub(crate) fn create(name: &str, len_bytes: u64, huge: Option<u64>) -> Result<OwnedFd, StoreError> {
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let base = match huge {
        None => base,
        Some(page_bytes) if page_bytes == 1 << 30 => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        Some(_) => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
    };
    // Kernels before 6.3 do not know the flag, and need it for nothing.
    let fd = match memfd_create(name, base | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(name, base),
        other => other,
    };
    let fd = fd.map_err(|errno| os::error("create shared memory", errno))?;
    ftruncate(&fd, len_bytes).map_err(|errno| os::error("size shared memory", errno))?;
    Ok(fd)
}

/// Adds seals.
pub(crate) fn seal(fd: impl AsFd, seals: SealFlags) -> Result<(), StoreError> {
    fcntl_add_seals(fd, seals).map_err(|errno| os::error("seal shared memory", errno))
}

/// Checks that a file has at least `len_bytes` bytes and can never have less.
pub(crate) fn check_sealed(fd: BorrowedFd<'_>, what: &str, len_bytes: u64) -> Result<(), StoreError> {
    let seals = fcntl_get_seals(fd).map_err(|errno| {
        StoreError::protocol(format!("{what}: the descriptor is no memory file: {errno}"))
    })?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(StoreError::protocol(format!(
            "{what}: the memory file is not sealed against truncation (seals {:#x})",
            seals.bits()
        )));
    }
    let found = len_of(fd)?;
    if len_bytes == 0 || found < len_bytes {
        return Err(StoreError::protocol(format!(
            "{what}: the memory file has {found} bytes, {len_bytes} were announced"
        )));
    }
    Ok(())
}

/// The length of a file in bytes.
pub(crate) fn len_of(fd: impl AsFd) -> Result<u64, StoreError> {
    let stat = fstat(fd).map_err(|errno| os::error("look at shared memory", errno))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Refuses what would end with the kernel killing a process: more memory than there is.
pub(crate) fn check_available(operation: &'static str, len_bytes: u64) -> Result<(), StoreError> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib_line(&text, "MemAvailable:"));
    let group = group_available();
    for (available, whose) in [(machine, "the machine"), (group, "this control group (memory.max)")] {
        if let Some(available) = available.filter(|available| *available < len_bytes) {
            return Err(StoreError::os(
                operation,
                format!(
                    "{len_bytes} bytes of memory asked for, {whose} has {available} left (serve with less, or free some)"
                ),
            ));
        }
    }
    Ok(())
}

/// The bytes on a line like `MemAvailable:    1234 kB`.
pub(crate) fn kib_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes left under the tightest limit of this process's control groups (version 2), if there is one.
fn group_available() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = std::path::Path::new("/sys/fs/cgroup");
    let number = |file: std::path::PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    root.join(path)
        .ancestors()
        .take_while(|group| group.starts_with(root))
        .filter_map(|group| {
            let limit = number(group.join("memory.max"))?;
            let used = number(group.join("memory.current"))?;
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            // Cached files make room when memory is short.
            let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
            let cached = cached.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0);
            Some(limit.saturating_sub(used.saturating_sub(cached)))
        })
        .min()
}

/// Whether nobody can map the file writable any more.
pub(crate) fn is_closed(fd: BorrowedFd<'_>) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::FUTURE_WRITE | SealFlags::SEAL))
}
