//! Tensor files: .safetensors and .npy, read from memory and written to a stream. Not the store, and not the
//! command line. Invariant: any bytes give a value or an error that names the file and what is wrong, never a panic,
//! and no length that a file states is believed before it was compared with the file's own.

#![forbid(unsafe_code)]

pub mod npy;
pub mod safetensors;

use std::path::Path;

/// What a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Many tensors with names.
    Safetensors,
    /// One tensor without a name.
    Npy,
    /// Anything else: bytes.
    Bytes,
}

impl Format {
    /// By the file's extension, in any case.
    pub fn of(path: &Path) -> Self {
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("safetensors") => Self::Safetensors,
            Some(extension) if extension.eq_ignore_ascii_case("npy") => Self::Npy,
            _ => Self::Bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_decide() {
        for (path, format) in [
            ("a/model.safetensors", Format::Safetensors),
            ("model.SafeTensors", Format::Safetensors),
            ("x.npy", Format::Npy),
            ("x.npz", Format::Bytes),
            ("npy", Format::Bytes),
        ] {
            assert_eq!(Format::of(Path::new(path)), format, "{path}");
        }
    }
}
