//! The node's configuration: one file, flags of the same names, defaults that work. Not environment variables read
//! where they are used. Invariant: a `Config` from `Config::load` has been checked as a whole.

use std::path::{Path, PathBuf};

use hetmem_core::StoreError;
use hetmem_core::wire::NODE_TEXT_LEN_MAX;
use hetmem_host_mem::PagePolicy;

/// Every key, with its default and meaning, in the order of the documentation.
pub const KEYS: [(&str, &str, &str); 14] = [
    ("name", "HOST:PORT", "the node's name in the cluster; the same after a restart"),
    (
        "socket",
        "$HETMEM_SOCKET, $XDG_RUNTIME_DIR/hetmem.sock or /tmp/hetmem-UID.sock",
        "the Unix socket for clients",
    ),
    ("listen", "127.0.0.1:7733", "where peers connect to; port 0 takes a free one"),
    ("join", "none", "the nodes that may keep the directory, in order; none: this one alone"),
    ("host", "25%", "memory of the host tier: bytes, KiB, MiB, GiB, or a share of the machine's"),
    (
        "gpu",
        "auto",
        "memory of the GPU tiers, taken when objects come: auto, off, bytes or a share of each, or N=SIZE,...",
    ),
    ("max_objects", "4194304", "the most objects in the index"),
    ("huge_pages", "auto", "auto, off, or require"),
    ("threshold", "auto", "objects up to this size come inside the answer: auto or bytes"),
    ("lease_ms", "10000", "how long a remote reader may take"),
    ("heartbeat_ms", "1000", "how often nodes say that they are alive; five missed ones are a death"),
    ("client_quota", "80%", "the most memory granted to one client: bytes or a share of the host tier"),
    ("streams", "0", "TCP streams for large reads, per peer; 0: chosen for this machine"),
    (
        "fabric",
        "auto",
        "auto, tcp, verbs, or verbs-push: the same, and this node's large objects are pushed, not read",
    ),
];

/// Which fabric a node may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricChoice {
    /// The best one there is.
    Auto,
    /// Only TCP.
    Tcp,
    /// Only RDMA verbs.
    Verbs,
    /// The same; this node writes its large objects to peers rather than have them read.
    VerbsPush,
}

/// How much of one GPU's memory the store may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OneGpu {
    /// What is there, less a reserve for others.
    Auto,
    /// Bytes, or a share of it.
    Size(String),
}

impl OneGpu {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        match text {
            "auto" => Some(Self::Auto),
            _ => bytes_or_share(text, u64::MAX).map(|_| Self::Size(text.to_owned())),
        }
    }

    fn bytes(&self, memory_bytes: u64, auto_bytes: u64) -> u64 {
        match self {
            Self::Auto => auto_bytes,
            Self::Size(text) => bytes_or_share(text, memory_bytes).unwrap_or(0),
        }
    }
}

/// How much of the GPUs' memory the store may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuSize {
    /// None.
    Off,
    /// Of every GPU that there is; none is no error.
    Auto,
    /// The same of every GPU, of which there is at least one.
    All(OneGpu),
    /// Of these GPUs, which are there.
    Each(Vec<(u16, OneGpu)>),
}

impl GpuSize {
    /// Bytes of a GPU, where `auto` would be `auto_bytes`.
    pub(crate) fn of(&self, ordinal: u16, memory_bytes: u64, auto_bytes: u64) -> u64 {
        match self {
            Self::Off => 0,
            Self::Auto => auto_bytes,
            Self::All(size) => size.bytes(memory_bytes, auto_bytes),
            Self::Each(list) => {
                let size = list.iter().find(|(of, _)| *of == ordinal);
                size.map_or(0, |(_, size)| size.bytes(memory_bytes, auto_bytes))
            }
        }
    }

    /// The GPUs that have to be there.
    pub(crate) fn named(&self) -> impl Iterator<Item = u16> + '_ {
        let list = if let Self::Each(list) = self { list.as_slice() } else { &[] };
        list.iter().map(|(ordinal, _)| *ordinal)
    }
}

/// What `client_quota` says, for a tier of any size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientShare(String);

impl ClientShare {
    /// Bytes that one client may be granted of a tier.
    pub(crate) fn of(&self, capacity_bytes: u64) -> u64 {
        bytes_or_share(&self.0, capacity_bytes).unwrap_or(capacity_bytes)
    }
}

/// A node's configuration. See [`KEYS`] for the meanings.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "KEYS documents every field")]
pub struct Config {
    pub name: Option<String>,
    pub socket: PathBuf,
    pub listen: String,
    pub join: Vec<String>,
    pub host_bytes: u64,
    pub max_objects: u32,
    pub huge_pages: PagePolicy,
    pub threshold_bytes: Option<u64>,
    pub lease_ms: u32,
    pub heartbeat_ms: u64,
    pub client_quota_bytes: u64,
    pub client_share: ClientShare,
    pub gpu: GpuSize,
    pub streams: Option<usize>,
    pub fabric: FabricChoice,
    pub verbs_plugin: Option<PathBuf>,
}

impl Config {
    /// The defaults, then the file, then the overrides, checked.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] naming the key, the value and what is accepted; for an unknown key the
    /// nearest known one. [`hetmem_core::ErrorKind::Os`] if the file cannot be read.
    pub fn load(path: Option<&Path>, overrides: Vec<(String, String)>) -> Result<Self, StoreError> {
        let mut values = Vec::new();
        if let Some(path) = path {
            let text = std::fs::read_to_string(path)
                .map_err(|error| StoreError::os(format!("reading {}", path.display()), error))?;
            values.extend(from_toml(path, &text)?);
        }
        values.extend(overrides);
        let mut raw = Raw::default();
        for (key, value) in values {
            raw.set(&key, value)?;
        }
        raw.resolve()
    }
}

/// Keys and values of a file, each value as the text that a flag would have.
fn from_toml(path: &Path, text: &str) -> Result<Vec<(String, String)>, StoreError> {
    let table: toml::Table = text
        .parse()
        .map_err(|error| StoreError::invalid("configuration", format!("{}: {error}", path.display())))?;
    let value_text = |key: &str, value: toml::Value| match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Array(values) if key == "join" && values.iter().all(toml::Value::is_str) => {
            let texts: Vec<&str> = values.iter().filter_map(toml::Value::as_str).collect();
            Ok(texts.join(","))
        }
        other => Err(StoreError::invalid(
            "configuration",
            format!(
                "{}: {key} is {}, a string or a whole number is accepted{}",
                path.display(),
                other.type_str(),
                if key == "join" { ", or an array of strings" } else { "" }
            ),
        )),
    };
    table.into_iter().map(|(key, value)| Ok((key.clone(), value_text(&key, value)?))).collect()
}

/// Values as written, before they are checked together.
#[derive(Default)]
struct Raw {
    values: std::collections::BTreeMap<&'static str, String>,
}

impl Raw {
    fn set(&mut self, key: &str, value: String) -> Result<(), StoreError> {
        let known = KEYS.iter().map(|(name, _, _)| *name).find(|name| *name == key);
        let Some(known) = known else {
            let nearest = KEYS.iter().min_by_key(|(name, _, _)| strsim::damerau_levenshtein(name, key));
            let nearest = nearest.map_or("", |(name, _, _)| name);
            return Err(StoreError::invalid(
                "configuration",
                format!("unknown key {key:?}: did you mean {nearest:?}?"),
            ));
        };
        self.values.insert(known, value);
        Ok(())
    }

    fn get(&self, key: &'static str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    fn number(&self, key: &'static str, default: u64, least: u64, most: u64) -> Result<u64, StoreError> {
        let Some(text) = self.get(key) else { return Ok(default) };
        match text.parse() {
            Ok(number) if (least..=most).contains(&number) => Ok(number),
            _ => Err(bad(key, text, &format!("a whole number from {least} to {most}"))),
        }
    }

    fn name(&self) -> Result<Option<String>, StoreError> {
        match self.get("name") {
            Some(name) if name.is_empty() || name.len() > NODE_TEXT_LEN_MAX => {
                Err(bad("name", name, &format!("1 to {NODE_TEXT_LEN_MAX} bytes")))
            }
            name => Ok(name.map(str::to_owned)),
        }
    }

    /// Addresses, each once.
    fn join(&self) -> Result<Vec<String>, StoreError> {
        let Some(text) = self.get("join").filter(|text| *text != "none") else {
            return Ok(Vec::new());
        };
        let list: Vec<String> = text.split(',').map(|address| address.trim().to_owned()).collect();
        let odd = |address: &String| {
            let twice = list.iter().filter(|other| *other == address).count() > 1;
            twice || !address.contains(':') || address.len() > NODE_TEXT_LEN_MAX
        };
        if list.len() > JOIN_MAX || list.iter().any(odd) {
            return Err(bad(
                "join",
                text,
                &format!("none, or 1 to {JOIN_MAX} different HOST:PORT with commas between"),
            ));
        }
        Ok(list)
    }

    fn gpu(&self) -> Result<GpuSize, StoreError> {
        const ACCEPTED: &str =
            "auto, off, a size such as 4GiB, a share such as 25%, or a list such as 0=4GiB,1=auto";
        let text = self.get("gpu").unwrap_or("auto");
        let each = |part: &str| {
            let (ordinal, size) = part.split_once('=')?;
            Some((ordinal.trim().parse().ok()?, OneGpu::parse(size)?))
        };
        let size = match text {
            "auto" => Some(GpuSize::Auto),
            "off" => Some(GpuSize::Off),
            list if list.contains('=') => list.split(',').map(each).collect::<Option<_>>().map(GpuSize::Each),
            size => OneGpu::parse(size).map(GpuSize::All),
        };
        size.ok_or_else(|| bad("gpu", text, ACCEPTED))
    }

    fn resolve(&self) -> Result<Config, StoreError> {
        let host = self.get("host").unwrap_or("25%");
        let host_bytes = bytes_or_share(host, memory_bytes()?).ok_or_else(|| bad("host", host, SIZES))?;
        if host_bytes < HOST_MIN {
            return Err(bad("host", host, &format!("at least {HOST_MIN} bytes")));
        }
        let quota = self.get("client_quota").unwrap_or("80%");
        let threshold_bytes = match self.get("threshold") {
            None | Some("auto") => None,
            Some(text) => Some(parse_bytes(text).ok_or_else(|| bad("threshold", text, "auto or a size"))?),
        };
        let pages = self.get("huge_pages").unwrap_or("auto");
        let u32_of = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let streams = usize::try_from(self.number("streams", 0, 0, 16)?).unwrap_or_default();
        Ok(Config {
            name: self.name()?,
            socket: self.get("socket").map_or_else(hetmem_host_mem::socket::default_path, PathBuf::from),
            listen: self.get("listen").unwrap_or("127.0.0.1:7733").to_owned(),
            join: self.join()?,
            host_bytes,
            max_objects: u32_of(self.number("max_objects", 4 << 20, 1024, 1 << 28)?),
            huge_pages: pages.parse().map_err(|_| bad("huge_pages", pages, "auto, off or require"))?,
            threshold_bytes,
            lease_ms: u32_of(self.number("lease_ms", 10_000, 10, 3_600_000)?),
            heartbeat_ms: self.number("heartbeat_ms", 1_000, 10, 60_000)?,
            client_quota_bytes: bytes_or_share(quota, host_bytes)
                .ok_or_else(|| bad("client_quota", quota, SIZES))?,
            streams: (streams > 0).then_some(streams),
            fabric: match self.get("fabric") {
                None | Some("auto") => FabricChoice::Auto,
                Some("tcp") => FabricChoice::Tcp,
                Some("verbs") => FabricChoice::Verbs,
                Some("verbs-push") => FabricChoice::VerbsPush,
                Some(text) => return Err(bad("fabric", text, "auto, tcp, verbs or verbs-push")),
            },
            client_share: ClientShare(quota.to_owned()),
            gpu: self.gpu()?,
            // For those who work on it: an installed one lies beside the program.
            verbs_plugin: std::env::var_os("HETMEM_VERBS_PLUGIN").map(PathBuf::from),
        })
    }
}

/// Nodes that may keep the directory.
const JOIN_MAX: usize = 16;
/// The smallest host tier that makes sense.
const HOST_MIN: u64 = 1 << 20;
const SIZES: &str = "bytes, a size such as 512MiB or 4GiB, or a share such as 25%";

fn bad(key: &str, value: &str, accepted: &str) -> StoreError {
    StoreError::invalid("configuration", format!("{key} = {value:?}: {accepted} is accepted"))
}

fn memory_bytes() -> Result<u64, StoreError> {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "the fields' types differ between platforms")]
    let (total, unit) = (u64::from(info.totalram), u64::from(info.mem_unit));
    Ok(total.saturating_mul(unit))
}

fn bytes_or_share(text: &str, whole: u64) -> Option<u64> {
    match text.strip_suffix('%') {
        Some(percent) => {
            let percent: u64 = percent.trim().parse().ok()?;
            (1..=100).contains(&percent).then(|| whole / 100 * percent)
        }
        None => parse_bytes(text),
    }
}

/// Bytes of a size as people write it: `4096`, `64KiB`, `512MB`, `4GiB`, `1TiB`; case and a space before the unit do
/// not matter. `None` for anything else.
#[must_use]
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let factor: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "kb" => 1_000,
        "m" | "mib" => 1 << 20,
        "mb" => 1_000_000,
        "g" | "gib" => 1 << 30,
        "gb" => 1_000_000_000,
        "t" | "tib" => 1 << 40,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(pairs: &[(&str, &str)]) -> Result<Config, StoreError> {
        Config::load(None, pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn defaults_work_and_there_are_few_keys() {
        let config = load(&[]).expect("the defaults");
        assert!(KEYS.len() < 15);
        assert!(config.host_bytes > HOST_MIN && config.join.is_empty());
        assert!(config.client_quota_bytes < config.host_bytes);
    }

    #[test]
    fn sizes_and_shares() {
        for (text, bytes) in
            [("4096", 4096), ("64KiB", 65_536), ("2 MiB", 2 << 20), ("1gb", 1_000_000_000), ("3T", 3 << 40)]
        {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for text in ["", "x", "4XB", "-1", "99999999999T", "1.5GiB"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
        let config = load(&[("host", "64MiB"), ("client_quota", "50%")]).expect("valid");
        assert_eq!((config.host_bytes, config.client_quota_bytes >> 20), (64 << 20, 31));
    }

    #[test]
    fn every_key_is_checked_and_unknown_ones_name_the_nearest() {
        let error = load(&[("thresold", "0")]).expect_err("unknown").to_string();
        assert!(error.contains("thresold") && error.contains("\"threshold\""), "{error}");
        for (key, value) in [
            ("host", "lots"),
            ("host", "10"),
            ("max_objects", "0"),
            ("huge_pages", "maybe"),
            ("threshold", "big"),
            ("lease_ms", "0"),
            ("heartbeat_ms", "x"),
            ("client_quota", "0%"),
            ("streams", "1000"),
            ("fabric", "pigeon"),
            ("gpu", "lots"),
            ("gpu", "0=4GiB,1"),
            ("gpu", "x=4GiB"),
            ("gpu", "0%"),
            ("join", "nowhere"),
            ("join", "a:1,,b:2"),
            ("join", "a:1,b:2,a:1"),
        ] {
            let error = load(&[(key, value)]).expect_err("refused").to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn a_list_of_nodes_is_written_in_one_of_three_ways() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("hetmem.toml");
        let of = |text: &str| {
            std::fs::write(&path, text).expect("written");
            Config::load(Some(&path), Vec::new()).map(|config| config.join)
        };
        assert_eq!(of("join = \"a:1\"").expect("valid"), ["a:1"]);
        assert_eq!(of("join = \"a:1, b:2\"").expect("valid"), ["a:1", "b:2"]);
        assert_eq!(of("join = [\"a:1\", \"b:2\", \"c:3\"]").expect("valid"), ["a:1", "b:2", "c:3"]);
        assert!(of("join = \"none\"").expect("valid").is_empty());
        assert!(of("join = [1]").is_err() && of("join = []").is_err() && of("listen = [\"a:1\"]").is_err());
    }

    #[test]
    fn files_and_overrides() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("hetmem.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:0\"\nlease_ms = 500\n").expect("written");
        let overrides = vec![("lease_ms".to_owned(), "700".to_owned())];
        let config = Config::load(Some(&path), overrides).expect("valid");
        assert_eq!((config.listen.as_str(), config.lease_ms), ("127.0.0.1:0", 700));
        std::fs::write(&path, "lease_ms = true\n").expect("written");
        let error = Config::load(Some(&path), Vec::new()).expect_err("refused").to_string();
        assert!(error.contains("lease_ms") && error.contains("boolean"), "{error}");
    }
}
