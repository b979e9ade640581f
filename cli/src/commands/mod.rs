//! One file per command, or per few that belong together. Not their output's form (`output`).
//! Invariant: a command connects once.

pub(crate) mod doctor;
pub(crate) mod get;
pub(crate) mod keys;
pub(crate) mod put;
pub(crate) mod serve;
pub(crate) mod status;

use std::path::Path;

use hetmem_client::{Key, Store, StoreError};

use hetmem_formats::safetensors::METADATA;

/// The key of a file's tensor under a prefix; with an empty prefix it is the tensor's own name.
pub(crate) fn key_under(prefix: &str, name: &str) -> Result<Key, StoreError> {
    match prefix.trim_end_matches('/') {
        "" => Key::new(name),
        prefix => Key::new(&format!("{prefix}/{name}")),
    }
}

/// What all keys of a file under a prefix start with.
pub(crate) fn all_under(prefix: &str) -> String {
    match prefix.trim_end_matches('/') {
        "" => String::new(),
        prefix => format!("{prefix}/"),
    }
}

/// The key of a .safetensors file's `__metadata__`, kept as JSON text beside its tensors. No tensor of such a file
/// can have that name.
pub(crate) fn metadata_key(prefix: &str) -> Result<Key, StoreError> {
    key_under(prefix, METADATA)
}

pub(crate) fn connect(socket: Option<&Path>) -> Result<Store, StoreError> {
    Store::connect(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_prefixes_agree() {
        for (prefix, key) in [("gpt2", "gpt2/h.0.w"), ("a/b/", "a/b/h.0.w"), ("", "h.0.w"), ("/", "h.0.w")] {
            let made = key_under(prefix, "h.0.w").expect("a key");
            assert_eq!(made.as_str(), key);
            assert_eq!(made.as_str().strip_prefix(&all_under(prefix)), Some("h.0.w"));
        }
        assert!(key_under("", "").is_err());
    }
}
