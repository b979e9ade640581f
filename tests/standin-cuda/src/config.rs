//! The switches: environment variables, read once, and what they do to every call. Not what a switched-off part answers
//! (each part asks). Invariant: a variable that cannot be read as what it is for fails `cuInit`, with a line on stderr.

use std::collections::HashSet;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::OnceLock;

use crate::code::Code;

const DEVICES_DEFAULT: usize = 2;
const DEVICES_MAX: usize = 64;
const MEMORY_DEFAULT: usize = 1 << 30;

/// What `HETMEM_STANDIN_WITHOUT` may name.
const PARTS: &[&str] = &["vmm", "posix-fd", "rdma", "rdma-vmm", "dma-buf", "read-only", "batch", "peer"];

pub(crate) struct Config {
    pub(crate) devices: usize,
    pub(crate) memory_bytes: usize,
    /// Whether what a NIC writes needs a flush to be seen.
    pub(crate) stale: bool,
    /// Whether device pointers are addresses that a NIC can be given.
    pub(crate) peer_memory: bool,
    without: HashSet<String>,
    fail: Vec<Failure>,
    log: Option<File>,
    /// The first variable that could not be read.
    complaint: Option<String>,
}

/// One item of `HETMEM_STANDIN_FAIL`.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    function: String,
    code: Code,
    /// Which call, from 1; every one if none.
    call: Option<u64>,
}

impl Config {
    pub(crate) fn has(&self, part: &str) -> bool {
        !self.without.contains(part)
    }

    /// What is wrong with the variables, if anything is.
    pub(crate) fn complaint(&self) -> Option<&str> {
        self.complaint.as_deref()
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let mut complaint: Option<String> = None;
        let mut complain = |name: &str, value: &str, wanted: &str| {
            complaint.get_or_insert_with(|| format!("{name}={value}: {wanted}"));
        };
        let number = |name: &str, fallback: usize| match get(name) {
            None => Ok(fallback),
            Some(value) => value.parse().map_err(|_| value),
        };
        let devices = number("HETMEM_STANDIN_DEVICES", DEVICES_DEFAULT).unwrap_or_else(|value| {
            complain("HETMEM_STANDIN_DEVICES", &value, "not a number");
            0
        });
        let memory_bytes = number("HETMEM_STANDIN_MEMORY", MEMORY_DEFAULT).unwrap_or_else(|value| {
            complain("HETMEM_STANDIN_MEMORY", &value, "not a number of bytes");
            0
        });
        if devices > DEVICES_MAX {
            complain("HETMEM_STANDIN_DEVICES", &devices.to_string(), "at most 64");
        }
        let without: HashSet<String> = items(get("HETMEM_STANDIN_WITHOUT")).collect();
        for part in without.iter().filter(|part| !PARTS.contains(&part.as_str())) {
            complain("HETMEM_STANDIN_WITHOUT", part, &format!("not one of {PARTS:?}"));
        }
        let mut fail = Vec::new();
        for item in items(get("HETMEM_STANDIN_FAIL")) {
            match Failure::parse(&item) {
                Some(failure) => fail.push(failure),
                None => complain("HETMEM_STANDIN_FAIL", &item, "not function=code or function=code@n"),
            }
        }
        let mut switch = |name: &str| match get(name).as_deref() {
            None | Some("" | "0") => false,
            Some("1") => true,
            Some(value) => {
                complain(name, value, "not 0 or 1");
                false
            }
        };
        let (stale, peer_memory) = (switch("HETMEM_STANDIN_STALE"), switch("HETMEM_STANDIN_PEER_MEMORY"));
        let log = get("HETMEM_STANDIN_LOG").filter(|path| !path.is_empty()).and_then(|path| {
            let file = OpenOptions::new().append(true).create(true).open(&path);
            file.map_err(|error| complain("HETMEM_STANDIN_LOG", &path, &error.to_string())).ok()
        });
        let devices = devices.min(DEVICES_MAX);
        Self { devices, memory_bytes, stale, peer_memory, without, fail, log, complaint }
    }
}

impl Failure {
    fn parse(item: &str) -> Option<Self> {
        let (function, rest) = item.split_once('=')?;
        let (code, call) = match rest.split_once('@') {
            None => (rest, None),
            Some((code, call)) => (code, Some(call.parse().ok()?)),
        };
        Some(Self { function: function.to_owned(), code: Code::parse(code)?, call })
    }
}

/// The items of a comma list.
fn items(list: Option<String>) -> impl Iterator<Item = String> {
    let list = list.unwrap_or_default();
    let items: Vec<String> =
        list.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect();
    items.into_iter()
}

/// The switches of this process.
pub(crate) fn get() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| Config::read(|name| env::var(name).ok()))
}

/// What the `count`-th call of a function is to fail with, if it is.
pub(crate) fn injected(function: &str, count: u64) -> Option<Code> {
    let mut failures = get().fail.iter();
    let failure = failures
        .find(|failure| failure.function == function && failure.call.is_none_or(|call| call == count));
    failure.map(|failure| failure.code)
}

/// Writes one line to the log, if there is one, in one `write`, so that lines of processes do not mix.
pub(crate) fn log(function: &str, arguments: &dyn Fn() -> String, code: Code) {
    let Some(mut file) = get().log.as_ref() else { return };
    let result = match code.name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => code.0.to_string(),
    };
    let line = format!("{} {function} {} {result}\n", std::process::id(), arguments());
    // A full disk must not change what the call gives.
    let _ = file.write(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Config {
        Config::read(|name| {
            let mut pairs = pairs.iter();
            pairs.find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_variables_there_are_two_devices_with_all_parts() {
        let config = read(&[]);
        assert_eq!((config.devices, config.memory_bytes, config.stale), (2, 1 << 30, false));
        assert!(PARTS.iter().all(|part| config.has(part)));
        assert_eq!(config.complaint(), None);
    }

    #[test]
    fn variables_are_read() {
        let config = read(&[
            ("HETMEM_STANDIN_DEVICES", "3"),
            ("HETMEM_STANDIN_WITHOUT", "vmm, batch"),
            ("HETMEM_STANDIN_FAIL", "cuMemCreate=2@4,cuInit=NO_DEVICE"),
            ("HETMEM_STANDIN_STALE", "1"),
        ]);
        assert_eq!((config.devices, config.stale, config.complaint()), (3, true, None));
        assert!(!config.has("vmm") && !config.has("batch") && config.has("peer"));
        let failure = |function: &str, code, call| Failure { function: function.to_owned(), code, call };
        assert_eq!(
            config.fail,
            [failure("cuMemCreate", Code::OUT_OF_MEMORY, Some(4)), failure("cuInit", Code::NO_DEVICE, None)]
        );
    }

    #[test]
    fn what_cannot_be_read_is_complained_about() {
        let wrong = [
            ("HETMEM_STANDIN_DEVICES", "two"),
            ("HETMEM_STANDIN_DEVICES", "65"),
            ("HETMEM_STANDIN_MEMORY", "1G"),
            ("HETMEM_STANDIN_WITHOUT", "vm"),
            ("HETMEM_STANDIN_FAIL", "cuInit"),
            ("HETMEM_STANDIN_FAIL", "cuInit=1@x"),
            ("HETMEM_STANDIN_STALE", "yes"),
        ];
        for (name, value) in wrong {
            let complaint = read(&[(name, value)]).complaint().map(str::to_owned);
            assert!(complaint.is_some_and(|text| text.starts_with(name)), "{name}={value}");
        }
    }
}
