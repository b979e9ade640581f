//! `hetmem demo`: the main job on one machine. Two nodes, one state dict, every byte compared. Not a benchmark.
//! Invariant: it succeeds only if every byte and every checksum of every tensor agree on both nodes.

pub(crate) mod nodes;
mod report;
mod state_dict;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_client::{Key, Object, ObjectMeta, Path as BytesPath, Store, StoreError};
use hetmem_host_mem::MappedFile;
use serde_json::json;

use crate::commands::key_under;
use crate::failure::Failure;
use crate::output::{Output, bytes};
use hetmem_formats::Format;
use hetmem_formats::safetensors::SafeTensors;
use nodes::{Folder, Process};
use report::{Samples, Step};
use state_dict::{Generated, Values};

/// Times that each tensor is got where it is: enough for a percentile, done in no time.
const LOCAL_ROUNDS: usize = 20;
/// Beyond the tensors themselves: allocation units, and segments granted to the demo's own client.
const HOST_SLACK: u64 = 256 << 20;
/// Differences that are named; the rest is counted.
const NAMED_MAX: usize = 10;
/// Objects that are held at a time.
const HELD_MAX: usize = 10_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A .safetensors file [default: a made-up state dict with GPT-2's names, shapes and types]
    #[arg(conflicts_with = "size")]
    file: Option<PathBuf>,
    /// About how many bytes to make up
    #[arg(long, value_name = "BYTES", value_parser = size)]
    size: Option<u64>,
    /// What carries bytes between the nodes
    #[arg(long, value_enum, default_value_t = Fabric::Auto)]
    fabric: Fabric,
    /// Where the nodes listen; RDMA needs an address of a network that an RDMA device is on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    listen: String,
}

pub(crate) fn size(text: &str) -> Result<u64, String> {
    hetmem_node::parse_bytes(text).ok_or_else(|| "bytes or a size such as 64MiB are accepted".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Fabric {
    /// The best that works
    Auto,
    /// TCP
    Tcp,
    /// RDMA verbs
    Verbs,
}

/// Where the tensors' bytes come from.
enum Source<'a> {
    Made(Vec<Generated>),
    File(SafeTensors<'a>),
}

/// One tensor of the source.
struct Tensor<'a> {
    key: Key,
    meta: ObjectMeta,
    content: Content<'a>,
}

enum Content<'a> {
    Made(Values),
    File(&'a [u8]),
}

impl Tensor<'_> {
    /// The bytes, made in `buffer` if they are nowhere yet.
    fn bytes<'b>(&'b self, buffer: &'b mut Vec<u8>) -> &'b [u8] {
        match self.content {
            Content::File(bytes) => bytes,
            Content::Made(values) => {
                buffer.resize(usize::try_from(self.meta.len_bytes).unwrap_or(usize::MAX), 0);
                values.fill(0, buffer);
                buffer
            }
        }
    }

    /// What is wrong with an object that should be this tensor.
    fn fault(&self, meta: &ObjectMeta, bytes: &[u8]) -> Option<String> {
        if bytes.len() as u64 != self.meta.len_bytes {
            return Some(format!("{} bytes where {} belong", bytes.len(), self.meta.len_bytes));
        }
        if (meta.dtype, meta.shape) != (self.meta.dtype, self.meta.shape) {
            return Some(format!(
                "{} {:?} where {} {:?} belong",
                meta.dtype, meta.shape, self.meta.dtype, self.meta.shape
            ));
        }
        let difference = match self.content {
            Content::Made(values) => values.first_difference(0, bytes),
            Content::File(source) if source == bytes => None,
            Content::File(source) => {
                let at = source.iter().zip(bytes).position(|(left, right)| left != right);
                at.map(|at| at as u64)
            }
        };
        if let Some(at) = difference {
            return Some(format!("byte {at} differs from the source"));
        }
        match meta.checksum.verify(self.key.as_str(), bytes) {
            Ok(true) => None,
            Ok(false) => Some("it has no checksum".to_owned()),
            Err(error) => Some(error.to_string()),
        }
    }
}

/// What the demo has found so far.
#[derive(Default)]
struct Findings {
    samples: Samples,
    compared: u64,
    faults: Vec<String>,
}

pub(crate) fn run(args: &Args, out: Output) -> Result<(), Failure> {
    let file = args.file.as_deref().map(MappedFile::open).transpose()?;
    let source = match (&args.file, &file) {
        (Some(path), Some(file)) => Source::File(read(path, file)?),
        _ => Source::Made(state_dict::gpt2(args.size)?),
    };
    let tensors = tensors(&source)?;
    let total: u64 = tensors.iter().map(|tensor| tensor.meta.len_bytes).sum();
    let folder = Folder::create()?;
    let fabric = match args.fabric {
        Fabric::Auto => "auto",
        Fabric::Tcp => "tcp",
        Fabric::Verbs => "verbs",
    };
    let flags = |name: &str, join: Option<&str>| {
        let mut flags = vec![
            ("socket", folder.path().join(format!("{name}.sock")).display().to_string()),
            ("listen", format!("{}:0", args.listen)),
            ("host", (total + total / 4 + HOST_SLACK).to_string()),
            ("fabric", fabric.to_owned()),
        ];
        flags.extend(join.map(|address| ("join", address.to_owned())));
        flags
    };
    let quiet = Arc::default();
    let a = Process::start_among("demo-a", &flags("a", None), &quiet)?;
    let b = Process::start_among("demo-b", &flags("b", Some(&a.address)), &quiet)?;
    let (on_a, on_b) = (Store::connect(Some(&a.socket))?, Store::connect(Some(&b.socket))?);
    // Connections need no path any more, and a demo that is killed from here on leaves nothing behind.
    drop(folder);
    let mut findings = Findings::default();
    put(&on_a, &tensors, &mut findings)?;
    fetch(&on_b, &tensors, &mut findings)?;
    get_in_place(&on_a, &tensors, Step::GetA, &mut findings)?;
    get_in_place(&on_b, &tensors, Step::GetB, &mut findings)?;
    fetch_all(&on_b, &tensors, &mut findings)?;
    // The nodes go before the verdict: whoever reads it finds nothing left behind.
    drop((on_a, on_b));
    drop((b, a));
    conclude(&tensors, total, findings, out)
}

fn read<'a>(path: &Path, file: &'a [u8]) -> Result<SafeTensors<'a>, Failure> {
    if Format::of(path) != Format::Safetensors {
        let why = format!("{} is no .safetensors file, which is what demo takes", path.display());
        return Err(Failure::Usage(why));
    }
    Ok(SafeTensors::parse(&path.display().to_string(), file)?)
}

fn tensors<'a>(source: &Source<'a>) -> Result<Vec<Tensor<'a>>, StoreError> {
    let tensor = |name: &str, meta, content| Ok(Tensor { key: key_under("demo", name)?, meta, content });
    match source {
        Source::Made(made) => {
            let all = made.iter();
            all.map(|one| tensor(&one.name, one.meta, Content::Made(Values::of(&one.name)))).collect()
        }
        Source::File(file) => {
            let all = file.tensors.iter();
            all.map(|one| tensor(&one.name, one.meta, Content::File(file.bytes_of(one)))).collect()
        }
    }
}

fn put(store: &Store, tensors: &[Tensor<'_>], findings: &mut Findings) -> Result<(), StoreError> {
    let mut buffer = Vec::new();
    for tensor in tensors {
        let bytes = tensor.bytes(&mut buffer);
        let started = Instant::now();
        let outcome = store.put(&tensor.key, tensor.meta, bytes)?;
        let took = nanos_since(started);
        if outcome.kept {
            findings.fault(&tensor.key, "put", "an object was there already");
        }
        findings.samples.add(Step::Put, tensor.meta.len_bytes, None, took);
    }
    Ok(())
}

/// Gets each tensor once from the other node; only the get is timed, the comparison is not.
fn fetch(store: &Store, tensors: &[Tensor<'_>], findings: &mut Findings) -> Result<(), StoreError> {
    for tensor in tensors {
        let started = Instant::now();
        let object = store.get(&tensor.key)?;
        let took = nanos_since(started);
        findings.samples.add(Step::Fetch, tensor.meta.len_bytes, Some(object.path()), took);
        if object.path() == BytesPath::Local {
            findings.fault(&tensor.key, "fetch on B", "it was on B before it was fetched");
        }
        findings.compare(tensor, &object, "fetch on B");
    }
    Ok(())
}

/// Gets each tensor where it is, several times; get and release are timed together.
fn get_in_place(
    store: &Store,
    tensors: &[Tensor<'_>],
    step: Step,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    for tensor in tensors {
        let object = store.get(&tensor.key)?;
        findings.compare(tensor, &object, if step == Step::GetA { "get on A" } else { "get on B" });
        drop(object);
        for _ in 0..LOCAL_ROUNDS {
            let started = Instant::now();
            let object = store.get(&tensor.key)?;
            let path = object.path();
            drop(object);
            findings.samples.add(step, tensor.meta.len_bytes, Some(path), nanos_since(started));
        }
    }
    Ok(())
}

/// Gets all tensors from the other node once more, in one call, after this node's copies have gone.
fn fetch_all(store: &Store, tensors: &[Tensor<'_>], findings: &mut Findings) -> Result<(), StoreError> {
    let mut total = Duration::ZERO;
    for tensor in tensors {
        store.evict(&tensor.key, false)?;
    }
    // A client holds a bounded number of objects at a time.
    for some in tensors.chunks(HELD_MAX) {
        let keys: Vec<Key> = some.iter().map(|tensor| tensor.key.clone()).collect();
        let started = Instant::now();
        let objects = store.get_many(&keys);
        total += started.elapsed();
        for (tensor, object) in some.iter().zip(objects) {
            let object = object?;
            if object.path() == BytesPath::Local {
                findings.fault(&tensor.key, "get_many on B", "it was on B before it was fetched");
            }
            findings.compare(tensor, &object, "get_many on B");
        }
    }
    let len_bytes = tensors.iter().map(|tensor| tensor.meta.len_bytes).sum();
    findings.samples.add_all(Step::FetchAll, len_bytes, u64::try_from(total.as_nanos()).unwrap_or(u64::MAX));
    Ok(())
}

impl Findings {
    fn compare(&mut self, tensor: &Tensor<'_>, object: &Object, step: &str) {
        self.compared += object.len() as u64;
        if let Some(fault) = tensor.fault(object.meta(), object) {
            self.fault(&tensor.key, step, &fault);
        }
    }

    fn fault(&mut self, key: &Key, step: &str, what: &str) {
        self.faults.push(format!("{step}: {key}: {what}"));
    }
}

fn nanos_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn conclude(tensors: &[Tensor<'_>], total: u64, findings: Findings, out: Output) -> Result<(), Failure> {
    let Findings { samples, compared, faults } = findings;
    let (eager, read) =
        (samples.count(Step::Fetch, BytesPath::Eager), samples.count(Step::Fetch, BytesPath::Read));
    out.print(
        || {
            json!({
                "rows": samples.to_json(), "ok": faults.is_empty(), "tensors": tensors.len(), "bytes": total,
                "compared_bytes": compared, "eager": eager, "read": read, "faults": faults,
            })
        },
        |text| {
            samples.write(text)?;
            writeln!(text)?;
            for fault in faults.iter().take(NAMED_MAX) {
                writeln!(text, "{fault}")?;
            }
            if faults.is_empty() {
                writeln!(
                    text,
                    "PASS: {} tensors, {} went from node A to node B ({eager} eager, {read} read); every byte and \
                     every checksum agree ({} compared)",
                    tensors.len(),
                    bytes(total),
                    bytes(compared)
                )
            } else {
                writeln!(text, "FAIL: {} of {} tensors have faults", faults.len(), tensors.len())
            }
        },
    )?;
    if faults.is_empty() {
        return Ok(());
    }
    Err(Failure::Differs(format!("demo: {} faults, the first: {}", faults.len(), faults[0])))
}

#[cfg(test)]
mod tests {
    use hetmem_client::{Checksum, DType};

    use super::*;

    #[test]
    fn every_fault_is_found() {
        let meta = ObjectMeta::tensor(DType::F32, &[4]).expect("a tensor");
        let made = Values::of("t");
        let mut bytes = vec![0; 16];
        made.fill(0, &mut bytes);
        let good = meta.with_checksum(Checksum::Xxh3Blocks(hetmem_core::checksum::of(&bytes)));
        let source = bytes.clone();
        for content in [Content::Made(made), Content::File(&source)] {
            let key = Key::new("demo/t").expect("a key");
            let tensor = Tensor { key, meta, content };
            assert_eq!(tensor.fault(&good, &bytes), None);
            let mut changed = bytes.clone();
            changed[9] ^= 1;
            let other_shape = ObjectMeta::tensor(DType::F32, &[2, 2]).expect("a tensor");
            for (meta, bytes, word) in [
                (&good, &changed[..], "byte 9"),
                (&good, &bytes[..15], "15 bytes"),
                (&other_shape, &bytes[..], "[2, 2]"),
                (&meta, &bytes[..], "no checksum"),
                (&meta.with_checksum(Checksum::Xxh3Blocks(1)), &bytes[..], "checksum"),
            ] {
                let fault = tensor.fault(meta, bytes).expect(word);
                assert!(fault.contains(word), "{fault} should say {word}");
            }
        }
    }
}
