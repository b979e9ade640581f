//! How a command fails: what is said, and the process's exit code. Not where errors come from.
//! Invariant: the codes agree with `EXIT_CODES`, which `hetmem --help` prints.

use std::fmt;
use std::io;

use hetmem_client::{ErrorKind, StoreError};
use serde_json::json;

/// What `hetmem --help` says of exit codes.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; the message says why and what to do
  2  wrong usage
  3  no such object
  4  no node answers (or what is asked for is not available here)
  5  bytes are not what their checksum, their source or their format says
  6  no answer in time";

/// Why a command did not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The store, a file or the system refused.
    Store(StoreError),
    /// Arguments that do not go together.
    Usage(String),
    /// A comparison found differences; the report has been printed.
    Differs(String),
    /// The reader of standard output has gone, which is no error (`hetmem ls | head`).
    OutputClosed,
}

impl Failure {
    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::OutputClosed => 0,
            Self::Usage(_) => 2,
            Self::Differs(_) => 5,
            Self::Store(error) => match error.kind() {
                ErrorKind::NotFound => 3,
                ErrorKind::Unavailable | ErrorKind::PeerLost => 4,
                ErrorKind::Corrupt => 5,
                ErrorKind::TimedOut => 6,
                _ => 1,
            },
        }
    }

    /// As one line of JSON.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let kind = match self {
            Self::Store(error) => error.kind().name(),
            Self::Usage(_) => "Usage",
            Self::Differs(_) => "Differs",
            Self::OutputClosed => "OutputClosed",
        };
        json!({"error": {"kind": kind, "message": self.to_string(), "exit_code": self.exit_code()}})
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => write!(f, "{error}"),
            Self::Usage(why) | Self::Differs(why) => f.write_str(why),
            Self::OutputClosed => f.write_str("standard output was closed"),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Only standard output fails this way: errors of files are made with their path.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Store(StoreError::os("write to standard output", error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented() {
        for (failure, code) in [
            (Failure::Store(StoreError::invalid("x", "y")), 1),
            (Failure::Usage(String::new()), 2),
            (Failure::Store(StoreError::not_found("get", "k")), 3),
            (Failure::Store(StoreError::unavailable("node", "gone")), 4),
            (Failure::Store(StoreError::corrupt("k", "differs")), 5),
            (Failure::Differs(String::new()), 5),
            (Failure::Store(StoreError::timed_out("get", "k", 1)), 6),
        ] {
            assert_eq!(failure.exit_code(), code, "{failure:?}");
            assert!(EXIT_CODES.contains(&format!("\n  {code}  ")), "{code} is not documented");
        }
    }
}
