//! `hetmem put`: a file into the store. Not the formats. Invariant: a .safetensors file is checked as a whole
//! before its first tensor is put.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hetmem_client::{IfExists, Key, ObjectMeta, PutOptions, PutOutcome, REPLICAS_MAX, Store, StoreError};
use hetmem_host_mem::MappedFile;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::commands::{connect, key_under, metadata_key};
use crate::failure::Failure;
use crate::output::{Output, bytes};
use crate::receipts::{self, Receipts};
use crate::tiers;
use hetmem_formats::safetensors::SafeTensors;
use hetmem_formats::{Format, npy};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file to put
    file: PathBuf,
    /// The object's key [default: the file's name]; not for .safetensors files
    #[arg(long, conflicts_with = "prefix")]
    key: Option<String>,
    /// Put under PREFIX/ [default for .safetensors files: the file's name without its extension]
    #[arg(long)]
    prefix: Option<String>,
    /// Never evict these objects
    #[arg(long)]
    pin: bool,
    /// Let these objects be evicted when room is needed, even if no other node holds them
    #[arg(long, conflicts_with = "pin")]
    cache: bool,
    /// Drop the objects this many milliseconds after they were put
    #[arg(long, value_name = "MS")]
    ttl_ms: Option<u64>,
    /// On how many nodes the objects are to be, this one included
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(REPLICAS_MAX)), conflicts_with = "cache")]
    replicas: u8,
    /// Fail if a key exists, instead of keeping what is there
    #[arg(long)]
    error_if_exists: bool,
    /// Store no checksums
    #[arg(long)]
    no_checksum: bool,
    /// Move the bytes to memory that no client can write
    #[arg(long)]
    seal_copy: bool,
    #[command(flatten)]
    place: tiers::Args,
    #[command(flatten)]
    copies: receipts::Args,
}

/// An object of the file: its bytes are the file's own, or made of them.
type NewObject<'a> = (Key, ObjectMeta, Cow<'a, [u8]>);

/// What has been put.
#[derive(Debug, Default)]
struct Done {
    objects: u64,
    kept: u64,
    len_bytes: u64,
    /// The fewest nodes that one of them is on.
    replicas: Option<u32>,
}

pub(crate) fn run(args: &Args, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let file = MappedFile::open(&args.file)?;
    let name = args.file.display().to_string();
    let objects = objects_of(args, &name, &file)?;
    let store = connect(socket)?;
    let started = Instant::now();
    let total = objects.iter().map(|(_, _, bytes)| bytes.len() as u64).sum();
    let bar = progress(total, out);
    let mut done = Done::default();
    let mut receipts = Receipts::new(args.copies);
    for (key, meta, bytes) in &objects {
        bar.set_message(key.as_str().to_owned());
        let outcome = put_one(&store, key, *meta, bytes, &args.options(), &mut done)?;
        receipts.add(key, || outcome.receipt);
        bar.inc(bytes.len() as u64);
    }
    bar.finish_and_clear();
    report(&name, &done, args.replicas, started.elapsed(), &receipts, out)
}

impl Args {
    fn options(&self) -> PutOptions {
        PutOptions {
            if_exists: if self.error_if_exists { IfExists::Error } else { IfExists::Keep },
            pin: self.pin,
            cache: self.cache,
            ttl: self.ttl_ms.map(Duration::from_millis),
            replicas: self.replicas,
            seal_copy: self.seal_copy,
            tier: self.place.hint(),
            checksum: !self.no_checksum,
            zero_copy: self.copies.zero_copy(),
            ..PutOptions::default()
        }
    }
}

/// The objects that a file becomes, in the order in which they are put.
fn objects_of<'a>(args: &Args, subject: &str, file: &'a [u8]) -> Result<Vec<NewObject<'a>>, Failure> {
    match Format::of(&args.file) {
        Format::Safetensors => {
            if args.key.is_some() {
                let why = "a .safetensors file holds many tensors: name a --prefix instead of a --key";
                return Err(Failure::Usage(why.to_owned()));
            }
            let prefix = match &args.prefix {
                Some(prefix) => prefix.clone(),
                None => text_of(args.file.file_stem())?,
            };
            let read = SafeTensors::parse(subject, file)?;
            let mut objects = Vec::with_capacity(read.tensors.len() + 1);
            for tensor in &read.tensors {
                let key = key_under(&prefix, &tensor.name)?;
                objects.push((key, tensor.meta, read.bytes_of(tensor).into()));
            }
            if let Some(metadata) = &read.metadata {
                let text = serde_json::to_vec(metadata)
                    .map_err(|error| StoreError::corrupt(subject, error.to_string()))?;
                let meta = ObjectMeta::bytes(text.len() as u64)?;
                objects.push((metadata_key(&prefix)?, meta, text.into()));
            }
            Ok(objects)
        }
        Format::Npy => {
            let array = npy::parse(subject, file)?;
            Ok(vec![(args.single_key()?, array.meta, array.bytes.into())])
        }
        Format::Bytes => {
            let meta = ObjectMeta::bytes(file.len() as u64)?;
            Ok(vec![(args.single_key()?, meta, file.into())])
        }
    }
}

impl Args {
    fn single_key(&self) -> Result<Key, Failure> {
        if let Some(key) = &self.key {
            return Ok(Key::new(key)?);
        }
        let name = text_of(self.file.file_name())?;
        Ok(key_under(self.prefix.as_deref().unwrap_or_default(), &name)?)
    }
}

fn text_of(name: Option<&std::ffi::OsStr>) -> Result<String, Failure> {
    let text = name.and_then(|name| name.to_str());
    let usage =
        || Failure::Usage("the file's name is no key (not UTF-8): name a --key or --prefix".to_owned());
    text.map(str::to_owned).ok_or_else(usage)
}

fn put_one(
    store: &Store,
    key: &Key,
    meta: ObjectMeta,
    bytes: &[u8],
    options: &PutOptions,
    done: &mut Done,
) -> Result<PutOutcome, StoreError> {
    let outcome = store.put_with(key, meta, bytes, options)?;
    done.objects += 1;
    done.len_bytes += bytes.len() as u64;
    done.kept += u64::from(outcome.kept);
    done.replicas = Some(done.replicas.map_or(outcome.replicas, |least| least.min(outcome.replicas)));
    Ok(outcome)
}

/// A bar on standard error; indicatif hides it where that is no terminal.
fn progress(total: u64, out: Output) -> ProgressBar {
    let target = match out.json {
        true => ProgressDrawTarget::hidden(),
        false => ProgressDrawTarget::stderr(),
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let style =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {wide_msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn report(
    file: &str,
    done: &Done,
    wanted: u8,
    took: Duration,
    receipts: &Receipts,
    out: Output,
) -> Result<(), Failure> {
    let seconds = took.as_secs_f64();
    let least = done.replicas.unwrap_or(u32::from(wanted));
    out.print(
        || {
            receipts.in_json(json!({
                "file": file, "objects": done.objects, "bytes": done.len_bytes, "kept": done.kept,
                "seconds": seconds, "replicas_wanted": wanted, "replicas": least,
            }))
        },
        |text| {
            let speed = done.len_bytes as f64 / seconds.max(1e-9) / f64::from(1 << 30);
            let len = bytes(done.len_bytes);
            writeln!(text, "{} objects, {len} in {seconds:.3} s ({speed:.2} GiB/s)", done.objects)?;
            if done.kept > 0 {
                writeln!(
                    text,
                    "{} of them were there already and have been kept (rm them first, or choose another key)",
                    done.kept
                )?;
            }
            if wanted > 1 {
                writeln!(text, "each of them is on {least} nodes at least, {wanted} are wanted")?;
            }
            if least < u32::from(wanted) {
                writeln!(text, "the rest is made when there is a node with room for it (see hetmem status)")?;
            }
            receipts.write(text)
        },
    )?;
    Ok(())
}
