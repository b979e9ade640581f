//! Ordinary files, mapped for reading. Not shared memory. Invariant: the mapping is as long as the file was when it
//! was opened.
//!
//! Holds unsafe code: the mapping of a file that others may change.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use hetmem_core::StoreError;
use memmap2::{Advice, Mmap};

/// An ordinary file, mapped read-only, for the command line's `put`.
///
/// A file that another process truncates meanwhile ends this process with SIGBUS, as with every program that maps
/// files; a command that puts one file can live with that, a node would not, and does not use this.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped.
    mapping: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] naming the path and the system's error.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed =
            |error: std::io::Error| StoreError::os("open file", format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(StoreError::os("open file", format!("{}: not an ordinary file", path.display())));
        }
        if metadata.len() == 0 {
            return Ok(Self { mapping: None });
        }
        // SAFETY: the mapping is private to this process and read-only; that the file is not truncated meanwhile is
        // the documented condition of this type.
        let mapping = unsafe { Mmap::map(&file) }.map_err(failed)?;
        // Read from front to back; that the kernel cannot use the advice is no error.
        let _ = mapping.advise(Advice::Sequential);
        Ok(Self { mapping: Some(mapping) })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.mapping.as_deref().unwrap_or_default()
    }
}
