//! Keys: the names of objects. Not the index's fingerprint of them (`Key::fingerprint` is only a hash).
//! Invariant: a `Key` holds 1 to 512 bytes of UTF-8 without a NUL byte.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::StoreError;

/// The longest key, in bytes of UTF-8.
pub const KEY_LEN_MAX: usize = 512;

/// The name of an object: 1 to [`KEY_LEN_MAX`] bytes of UTF-8 without a NUL byte. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

impl Key {
    /// Checks `name` and makes a key of it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for an empty name, one over [`KEY_LEN_MAX`] bytes, or one with a NUL byte.
    pub fn new(name: &str) -> Result<Self, StoreError> {
        if name.is_empty() {
            return Err(StoreError::invalid("key", "a key has at least 1 byte, this one is empty"));
        }
        if name.len() > KEY_LEN_MAX {
            return Err(StoreError::invalid(
                "key",
                format!("a key has at most {KEY_LEN_MAX} bytes, this one has {}", name.len()),
            ));
        }
        if name.as_bytes().contains(&0) {
            return Err(StoreError::invalid("key", format!("a key has no NUL byte, {name:?} has one")));
        }
        Ok(Self(name.into()))
    }

    /// The same from bytes that should be UTF-8.
    ///
    /// # Errors
    /// As [`Key::new`], and for bytes that are not UTF-8.
    pub fn from_bytes(name: &[u8]) -> Result<Self, StoreError> {
        if name.len() > KEY_LEN_MAX {
            return Err(StoreError::invalid(
                "key",
                format!("a key has at most {KEY_LEN_MAX} bytes, this one has {}", name.len()),
            ));
        }
        let name = std::str::from_utf8(name).map_err(|error| {
            StoreError::invalid("key", format!("a key is UTF-8, this one is not: {error}"))
        })?;
        Self::new(name)
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hash by which the shared index finds this key; see [`fingerprint`].
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        fingerprint(self.0.as_bytes())
    }
}

/// XXH3-64 (seed 0) of a key's bytes. Part of the shared-memory format (docs/shared-memory.md).
#[must_use]
pub fn fingerprint(key: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(key)
}

/// As text, without a copy on the way: messages carry thousands of keys.
impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "1 to {KEY_LEN_MAX} bytes of UTF-8")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Key, E> {
                Key::new(name).map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Name)
    }
}

impl TryFrom<String> for Key {
    type Error = StoreError;

    fn try_from(name: String) -> Result<Self, StoreError> {
        Self::new(&name)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0.as_ref().to_owned()
    }
}

impl std::str::FromStr for Key {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        Self::new(name)
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl From<&Key> for String {
    fn from(key: &Key) -> Self {
        key.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn accepts_what_users_write() {
        for name in ["a", "gpt2/transformer.h.0.attn.c_attn.weight", "schlüssel/β", &"k".repeat(KEY_LEN_MAX)]
        {
            assert_eq!(Key::new(name).expect("a valid key").as_str(), name);
        }
    }

    #[test]
    fn refuses_empty_long_nul_and_other_encodings() {
        for (bytes, word) in [
            (&b""[..], "empty"),
            (&[b'k'; KEY_LEN_MAX + 1][..], "513"),
            (&b"a\0b"[..], "NUL"),
            (&[0xff, 0xfe][..], "UTF-8"),
        ] {
            let error = Key::from_bytes(bytes).expect_err("an invalid key");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(word), "{error} should say {word}");
        }
    }
}
