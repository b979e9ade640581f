//! How a call really moved its bytes. Not a plan: a path is written down after the bytes have moved.
//! Invariant: none.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How an object's bytes came to the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Path {
    /// They were on this node already.
    Local,
    /// Inside a peer's answer.
    Eager,
    /// By one-sided Read after a grant.
    Read,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Eager => "eager",
            Self::Read => "read",
        })
    }
}
