//! `hetmem get`: objects into a file. Not the formats. Invariant: the file appears under its name only when it is
//! complete, and no byte in it differs from its checksum.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hetmem_client::{ErrorKind, GetOptions, Key, ObjectMeta, Placed, Store, StoreError, TierHint};
use serde_json::json;

use crate::commands::{all_under, connect, metadata_key};
use crate::copy_back::{CopyBack, Sink};
use crate::failure::Failure;
use crate::output::{Output, bytes};
use crate::receipts::{self, Receipts};
use crate::tiers;
use hetmem_formats::safetensors::{self, METADATA, Metadata};
use hetmem_formats::{Format, npy};

/// Objects that are asked for at once, and their bytes: that much memory of the node is held while a file is written. An
/// object that is longer goes alone.
const BATCH_MAX: usize = 1024;
const BATCH_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The object's key; for a .safetensors file also a prefix, which gives all tensors under PREFIX/
    key: String,
    /// The file to write: .safetensors, .npy, anything else for the bytes; - is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// How long to try, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    timeout_ms: u64,
    /// Do not compare the bytes with their checksums
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    place: tiers::Args,
    #[command(flatten)]
    copies: receipts::Args,
}

/// What has been written.
#[derive(Debug, Default)]
struct Done {
    objects: u64,
    len_bytes: u64,
}

/// How objects are asked for.
struct Asking {
    store: Store,
    options: GetOptions,
    /// The tier in which they are wanted; none: host memory, which the node copies them to if they are elsewhere.
    wanted: Option<TierHint>,
}

/// How their bytes are handed on, and what is to be told of it.
struct Handing {
    back: CopyBack,
    receipts: Receipts,
}

pub(crate) fn run(args: &Args, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let options = GetOptions {
        timeout: Duration::from_millis(args.timeout_ms),
        verify: !args.no_verify,
        zero_copy: args.copies.zero_copy(),
        ..GetOptions::default()
    };
    let asking = Asking { store: connect(socket)?, options, wanted: args.place.hint() };
    let mut handing = Handing { back: CopyBack::default(), receipts: Receipts::new(args.copies) };
    if args.output.as_os_str() == "-" {
        return to_standard_output(&asking, &mut handing, &Key::new(&args.key)?);
    }
    let started = Instant::now();
    let mut file = NewFile::create(&args.output)?;
    let done = match Format::of(&args.output) {
        Format::Safetensors => tensors(&asking, &mut handing, &args.key, &mut file)?,
        format => {
            let key = Key::new(&args.key)?;
            let object = asking.one(&key)?;
            if format == Format::Npy {
                npy::write_header(&mut file.out, meta_of(&object))?;
            }
            let len_bytes = handing.hand_out(&key, &object, &mut |bytes| file.write(bytes))?;
            Done { objects: 1, len_bytes }
        }
    };
    file.finish()?;
    report(args, &done, started.elapsed(), &handing, out)
}

fn meta_of(placed: &Placed) -> &ObjectMeta {
    match placed {
        Placed::Host(object) => object.meta(),
        Placed::Gpu(object) => object.meta(),
    }
}

impl Asking {
    fn one(&self, key: &Key) -> Result<Placed, StoreError> {
        match self.wanted {
            None => self.store.get_with(key, &self.options).map(Placed::Host),
            Some(hint) => self.store.get_in(key, hint, &self.options),
        }
    }

    /// Several, in order. Without a tier they are asked for at once; in a tier one after the other, each held only while
    /// it is written.
    fn many<'a>(&'a self, keys: &'a [Key]) -> Box<dyn Iterator<Item = Result<Placed, StoreError>> + 'a> {
        match self.wanted {
            None => {
                let objects = self.store.get_many_with(keys, &self.options);
                Box::new(objects.into_iter().map(|object| object.map(Placed::Host)))
            }
            Some(_) => Box::new(keys.iter().map(|key| self.one(key))),
        }
    }
}

impl Handing {
    /// Notes how an object came, and hands its bytes on; how many there were.
    fn hand_out(&mut self, key: &Key, placed: &Placed, sink: Sink<'_>) -> Result<u64, StoreError> {
        match placed {
            Placed::Host(object) => {
                self.receipts.add(key, || object.receipt());
                sink(object)?;
                Ok(object.len() as u64)
            }
            Placed::Gpu(object) => {
                self.receipts.add(key, || object.receipt());
                self.back.hand_out(object, sink)?;
                Ok(object.len_bytes())
            }
        }
    }
}

fn to_standard_output(asking: &Asking, handing: &mut Handing, key: &Key) -> Result<(), Failure> {
    let object = asking.one(key)?;
    let mut stdout = io::stdout().lock();
    let mut written = Ok(());
    handing.hand_out(key, &object, &mut |bytes| {
        if written.is_ok() {
            written = stdout.write_all(bytes);
        }
        Ok(())
    })?;
    handing.receipts.write(&mut io::stderr().lock())?;
    Ok(written.and_then(|()| stdout.flush())?)
}

/// All tensors under a prefix; if there are none, the one object of that key.
fn tensors(asking: &Asking, handing: &mut Handing, key: &str, file: &mut NewFile) -> Result<Done, Failure> {
    let store = &asking.store;
    let under = all_under(key);
    let mut keys =
        store.list(&under).map(|listed| Ok(listed?.key)).collect::<Result<Vec<_>, StoreError>>()?;
    let metadata = match keys.iter().position(|found| found.as_str() == format!("{under}{METADATA}")) {
        Some(at) => {
            keys.remove(at);
            Some(metadata_of(store, key, &asking.options)?)
        }
        None => None,
    };
    let mut parts = Vec::new();
    if keys.is_empty() && metadata.is_none() {
        let key = Key::new(key)?;
        let name = key.as_str().rsplit('/').next().unwrap_or_default().to_owned();
        parts.push((name, stat_of(store, &key, &under)?));
        keys.push(key);
    } else {
        for key in &keys {
            let name = key.as_str().strip_prefix(&under).unwrap_or(key.as_str());
            parts.push((name.to_owned(), store.stat(key)?.meta));
        }
    }
    let names = parts.iter().map(|(name, _)| name.clone()).zip(keys);
    let keys: HashMap<String, Key> = names.collect();
    safetensors::file_order(&mut parts);
    safetensors::write_header(&mut file.out, &parts, metadata.as_ref())?;
    write_all(asking, handing, &parts, &keys, file)
}

/// The bytes of tensors whose header is written, in its order.
fn write_all(
    asking: &Asking,
    handing: &mut Handing,
    parts: &[(String, ObjectMeta)],
    keys: &HashMap<String, Key>,
    file: &mut NewFile,
) -> Result<Done, Failure> {
    let mut done = Done::default();
    let mut rest = parts;
    let mut alone = false;
    while !rest.is_empty() {
        let batch = &rest[..if alone { 1 } else { batch_len(rest) }];
        let wanted: Vec<Key> = batch.iter().filter_map(|(name, _)| keys.get(name).cloned()).collect();
        alone = false;
        for (((_, meta), key), object) in batch.iter().zip(&wanted).zip(asking.many(&wanted)) {
            let object = match object {
                // The others of its batch may have its room: it is asked for again once they are let go.
                Err(error) if error.kind() == ErrorKind::NoSpace && batch.len() > 1 => {
                    alone = true;
                    break;
                }
                object => object?,
            };
            check_unchanged(key, meta_of(&object), meta)?;
            done.len_bytes += handing.hand_out(key, &object, &mut |bytes| file.write(bytes))?;
            done.objects += 1;
            rest = &rest[1..];
        }
    }
    Ok(done)
}

/// How many of the parts are asked for next.
fn batch_len(parts: &[(String, ObjectMeta)]) -> usize {
    let mut len_bytes = 0_u64;
    let fitting = parts.iter().take(BATCH_MAX).take_while(|(_, meta)| {
        len_bytes = len_bytes.saturating_add(meta.len_bytes);
        len_bytes <= BATCH_BYTES_MAX
    });
    fitting.count().max(1)
}

fn stat_of(store: &Store, key: &Key, under: &str) -> Result<ObjectMeta, StoreError> {
    match store.stat(key) {
        Ok(stat) => Ok(stat.meta),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(StoreError::not_found("get", format!("{key} or {under}*")))
        }
        Err(error) => Err(error),
    }
}

/// The header was written from what `stat` said; an object that was replaced since does not belong under it.
fn check_unchanged(key: &Key, found: &ObjectMeta, meta: &ObjectMeta) -> Result<(), StoreError> {
    if found == meta {
        return Ok(());
    }
    Err(StoreError::stale("get", key, "another object took this key meanwhile: get it again"))
}

fn metadata_of(store: &Store, prefix: &str, options: &GetOptions) -> Result<Metadata, StoreError> {
    let key = metadata_key(prefix)?;
    let object = store.get_with(&key, options)?;
    serde_json::from_slice(&object).map_err(|error| {
        let why =
            format!("it should be a JSON map of text to text: {error} (rm it to get the tensors without it)");
        StoreError::corrupt(&key, why)
    })
}

/// A file that takes its name when it is complete, and else leaves nothing.
struct NewFile {
    out: BufWriter<File>,
    path: PathBuf,
    partial: PathBuf,
    complete: bool,
}

impl NewFile {
    fn create(path: &Path) -> Result<Self, StoreError> {
        let Some(name) = path.file_name() else {
            return Err(StoreError::invalid("output", format!("{} is no file name", path.display())));
        };
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let partial = path.with_file_name(name);
        let file = File::create_new(&partial).map_err(|error| file_error("create", &partial, &error))?;
        Ok(Self {
            out: BufWriter::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            partial,
            complete: false,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.out.write_all(bytes).map_err(|error| file_error("write", &self.path, &error))
    }

    fn finish(mut self) -> Result<(), StoreError> {
        let flushed = self.out.flush().and_then(|()| fs::rename(&self.partial, &self.path));
        self.complete = flushed.is_ok();
        flushed.map_err(|error| file_error("write", &self.path, &error))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.complete {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn file_error(verb: &str, path: &Path, error: &io::Error) -> StoreError {
    StoreError::os(format!("{verb} {}", path.display()), error)
}

fn report(args: &Args, done: &Done, took: Duration, handing: &Handing, out: Output) -> Result<(), Failure> {
    let seconds = took.as_secs_f64();
    let Handing { receipts, back, .. } = handing;
    out.print(
        || {
            receipts.in_json(json!({
                "file": args.output, "objects": done.objects, "bytes": done.len_bytes, "seconds": seconds,
                "verified": !args.no_verify, "copied_back_bytes": back.len_bytes,
            }))
        },
        |text| {
            let len = bytes(done.len_bytes);
            let file = args.output.display();
            writeln!(text, "{}: {} objects, {len} in {seconds:.3} s", file, done.objects)?;
            if back.len_bytes > 0 {
                writeln!(text, "{} of them copied back from GPU memory for the file", bytes(back.len_bytes))?;
            }
            receipts.write(text)
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_little_memory_and_long_objects_go_alone() {
        let parts = |lens: &[u64]| -> Vec<(String, ObjectMeta)> {
            lens.iter().map(|len| (String::new(), ObjectMeta::bytes(*len).expect("a length"))).collect()
        };
        assert_eq!(batch_len(&parts(&[4096; 3000])), BATCH_MAX);
        assert_eq!(batch_len(&parts(&[100 << 20; 5])), 2);
        assert_eq!(batch_len(&parts(&[1 << 40, 1])), 1);
        assert_eq!(batch_len(&parts(&[1, 1 << 40])), 1);
    }

    #[test]
    fn a_file_appears_complete_or_not_at_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out.bin");
        let mut file = NewFile::create(&path).expect("created");
        file.write(b"half").expect("written");
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        let mut file = NewFile::create(&path).expect("created");
        file.write(b"whole").expect("written");
        assert!(!path.exists());
        file.finish().expect("finished");
        assert_eq!(fs::read(&path).expect("there"), b"whole");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}
