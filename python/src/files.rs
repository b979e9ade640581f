//! Files of tensors into the store and out of it. Not the formats (`hetmem_formats`). Invariant: a file is checked as a whole
//! before its first tensor is put, and appears under its name only when it is complete.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use hetmem_client::{GetOptions, Key, ObjectMeta, Store, StoreError};
use hetmem_formats::safetensors::{self, METADATA, Metadata, SafeTensors};
use hetmem_host_mem::MappedFile;

use crate::arguments::{self, Putting};

/// Objects that are asked for at once, and held while they are written.
const BATCH_MAX: usize = 64;

/// Puts every tensor of a .safetensors file under `prefix/`. Returns the keys, in the order of the file.
pub(crate) fn load(
    store: &Store,
    path: &Path,
    prefix: &str,
    putting: &Putting,
) -> Result<Vec<String>, StoreError> {
    let subject = path.display().to_string();
    let file = MappedFile::open(path)?;
    let read = SafeTensors::parse(&subject, &file)?;
    let key = |name: &str| Key::new(&format!("{prefix}/{name}"));
    let keys = read.tensors.iter().map(|tensor| key(&tensor.name)).collect::<Result<Vec<_>, _>>()?;
    let options =
        hetmem_client::PutOptions { tier: arguments::hint(putting.device, store)?, ..putting.options };
    for (key, tensor) in keys.iter().zip(&read.tensors) {
        store.put_with(key, tensor.meta, read.bytes_of(tensor), &options)?;
    }
    if let Some(metadata) = &read.metadata {
        let text = serde_json::to_vec(metadata);
        let text = text.map_err(|error| StoreError::corrupt(&subject, error.to_string()))?;
        store.put_with(&key(METADATA)?, ObjectMeta::bytes(text.len() as u64)?, &text, &options)?;
    }
    Ok(keys.iter().map(String::from).collect())
}

/// Writes every object under `prefix/` to a .safetensors file, each compared with its checksum. Returns their names.
pub(crate) fn save(
    store: &Store,
    path: &Path,
    prefix: &str,
    options: &GetOptions,
) -> Result<Vec<String>, StoreError> {
    let under = format!("{prefix}/");
    let (mut parts, mut metadata) = (Vec::new(), None);
    for listed in store.list(&under) {
        let key = listed?.key;
        let name = key.as_str().strip_prefix(&under).unwrap_or(key.as_str());
        if name == METADATA {
            metadata = Some(metadata_of(store, &key, options)?);
        } else {
            parts.push((name.to_owned(), store.stat(&key)?.meta));
        }
    }
    if parts.is_empty() {
        return Err(StoreError::not_found("save", &under));
    }
    safetensors::file_order(&mut parts);
    let unfinished = Unfinished::beside(path)?;
    let mut out = BufWriter::new(&unfinished.file);
    let failed = |error| StoreError::os(format!("writing {}", path.display()), error);
    safetensors::write_header(&mut out, &parts, metadata.as_ref())?;
    for batch in parts.chunks(BATCH_MAX) {
        let keys = batch.iter().map(|(name, _)| Key::new(&format!("{under}{name}")));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        for ((_, meta), (key, object)) in
            batch.iter().zip(keys.iter().zip(store.get_many_with(&keys, options)))
        {
            let object = object?;
            if object.meta() != meta {
                return Err(StoreError::stale("save", key, "another object has the key by now: save again"));
            }
            out.write_all(&object).map_err(failed)?;
        }
    }
    out.flush().map_err(failed)?;
    drop(out);
    unfinished.finish(path)?;
    Ok(parts.into_iter().map(|(name, _)| name).collect())
}

fn metadata_of(store: &Store, key: &Key, options: &GetOptions) -> Result<Metadata, StoreError> {
    let object = store.get_with(key, options)?;
    serde_json::from_slice(&object)
        .map_err(|error| StoreError::corrupt(key, format!("no map of texts: {error}")))
}

/// A file that is not complete. Dropped, it goes.
struct Unfinished {
    file: File,
    path: PathBuf,
}

impl Unfinished {
    fn beside(path: &Path) -> Result<Self, StoreError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.unfinished", std::process::id()));
        let path = path.with_file_name(name);
        let failed = |error| StoreError::os(format!("creating {}", path.display()), error);
        Ok(Self { file: File::create(&path).map_err(failed)?, path: path.clone() })
    }

    fn finish(self, path: &Path) -> Result<(), StoreError> {
        fs::rename(&self.path, path)
            .map_err(|error| StoreError::os(format!("naming {}", path.display()), error))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone already where it was finished.
        let _ = fs::remove_file(&self.path);
    }
}
