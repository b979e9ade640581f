//! Which page sizes this machine offers, and which ones memory really got. Not the asking for them (`mapping`,
//! `segment`). Invariant: a `PageKind` that is reported was read from the kernel's books, not assumed.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use hetmem_core::StoreError;

use crate::mapping::{HUGE_PAGE_LEN, Mapping};
use crate::memfd::kib_line;

/// Which pages to put memory on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PagePolicy {
    /// Huge pages where there are any, also where the kernel takes milliseconds for each.
    #[default]
    Auto,
    /// Huge pages where they come at once: for memory that somebody waits for. No policy of a configuration.
    AtOnce,
    /// Small pages.
    Off,
    /// Huge pages, or an error that says why not.
    Require,
}

impl PagePolicy {
    /// Every policy by its name in the configuration.
    pub const NAMES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("off", Self::Off), ("require", Self::Require)];
}

impl std::str::FromStr for PagePolicy {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, policy)| *policy).ok_or_else(|| {
            StoreError::invalid("page policy", format!("{name:?} is none of auto, off, require"))
        })
    }
}

/// Which pages memory is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Reserved huge pages (hugetlb) of this many bytes.
    Huge(u64),
    /// Transparent huge pages of 2 MiB, most of it.
    Transparent,
    /// Ordinary pages.
    Small,
}

impl fmt::Display for PageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Huge(len_bytes) => write!(f, "reserved huge pages of {} MiB", len_bytes >> 20),
            Self::Transparent => f.write_str("transparent huge pages"),
            Self::Small => f.write_str("small pages"),
        }
    }
}

/// The sizes of reserved huge pages that are tried, largest first.
const RESERVED_LENS: [u64; 2] = [1 << 30, 2 << 20];

fn reserved_pages(page_bytes: u64, file: &str) -> Option<u64> {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{file}", page_bytes >> 10);
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The largest reserved huge pages that `len_bytes` is a multiple of and of which enough are free.
pub(crate) fn reserved_for(len_bytes: u64) -> Option<u64> {
    RESERVED_LENS.into_iter().find(|page_bytes| {
        let free = reserved_pages(*page_bytes, "free_hugepages").unwrap_or(0);
        let promised = reserved_pages(*page_bytes, "resv_hugepages").unwrap_or(0);
        len_bytes > 0
            && len_bytes.is_multiple_of(*page_bytes)
            && free.saturating_sub(promised) >= len_bytes / page_bytes
    })
}

/// What the kernel says about a mapping in shared memory that is not on reserved huge pages.
pub(crate) fn kind_of(mapping: &Mapping) -> PageKind {
    if mapping.len() < HUGE_PAGE_LEN {
        return PageKind::Small;
    }
    let books = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let start = format!("{:x}-", mapping.base() as usize);
    let entry = books.find(&format!("\n{start}")).or_else(|| books.starts_with(&start).then_some(0));
    let huge = entry.and_then(|entry| kib_line(&books[entry..], "ShmemPmdMapped:")).unwrap_or(0);
    if huge >= mapping.len() as u64 / 2 { PageKind::Transparent } else { PageKind::Small }
}

/// What page kinds this machine offers, for `hetmem doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesReport {
    /// What [`PagePolicy::Auto`] gets now for a segment of 2 MiB, tried on a real one.
    pub best: PageKind,
    /// Reserved huge pages: page size in bytes, pages in all, pages free.
    pub reserved: Vec<(u64, u64, u64)>,
    /// The chosen word of `/sys/kernel/mm/transparent_hugepage/shmem_enabled`; empty if the kernel has none.
    pub shmem_enabled: String,
    /// Why `best` is what it is.
    pub why: String,
    /// What would make it better; `None` if nothing needs to be.
    pub remedy: Option<String>,
}

/// Looks at what this machine offers, by trying it on 2 MiB.
#[must_use]
pub fn pages_report() -> PagesReport {
    let reserved = RESERVED_LENS
        .into_iter()
        .filter_map(|len| {
            Some((len, reserved_pages(len, "nr_hugepages")?, reserved_pages(len, "free_hugepages")?))
        })
        .collect();
    let shmem_enabled = shmem_enabled();
    let best = probe();
    let (why, remedy) = words(best, &shmem_enabled);
    PagesReport { best, reserved, shmem_enabled, why, remedy }
}

fn shmem_enabled() -> String {
    let path = PathBuf::from("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let words = fs::read_to_string(path).unwrap_or_default();
    let chosen = words.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    chosen.unwrap_or_default().to_owned()
}

fn probe() -> PageKind {
    use crate::segment::{Segment, SegmentOwner};
    let id = hetmem_core::SegmentId(u32::MAX);
    let len_bytes = HUGE_PAGE_LEN as u64;
    Segment::create(id, len_bytes, SegmentOwner::Node, PagePolicy::Auto)
        .map_or(PageKind::Small, |segment| segment.pages())
}

fn words(best: PageKind, shmem_enabled: &str) -> (String, Option<String>) {
    match (best, shmem_enabled) {
        (PageKind::Huge(len_bytes), _) => {
            (format!("reserved huge pages of {} MiB are free", len_bytes >> 20), None)
        }
        (PageKind::Transparent, "never") => (
            "the kernel makes huge pages of shared memory on request (MADV_COLLAPSE), shmem_enabled is never"
                .to_owned(),
            None,
        ),
        (PageKind::Transparent, chosen) => (
            format!("the kernel gives shared memory transparent huge pages (shmem_enabled is {chosen})"),
            None,
        ),
        (PageKind::Small, "") => (
            "no reserved huge pages are free, and this kernel has no transparent huge pages".to_owned(),
            Some("reserve huge pages: sysctl vm.nr_hugepages=<host memory / 2 MiB>".to_owned()),
        ),
        (PageKind::Small, chosen) => (
            format!(
                "no reserved huge pages are free, and the kernel gave no transparent ones (shmem_enabled is {chosen}, \
                 which Linux before 6.1 or `deny` takes literally; or free memory is fragmented)"
            ),
            Some(
                "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or reserve huge pages: \
                 sysctl vm.nr_hugepages=<host memory / 2 MiB>"
                    .to_owned(),
            ),
        ),
    }
}
