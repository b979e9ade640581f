//! What can go wrong, in one type: `StoreError`. Not a place for context chains: the message already names the
//! operation, the subject and the values. Invariant: `ErrorKind::ALL`, the wire code and the variant agree.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tier::Tier;

/// What kind of error this is: the wire code and, in Python, the exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No object has this key.
    NotFound = 1,
    /// An object with this key exists and the call asked for a new one.
    AlreadyExists = 2,
    /// The tier has no room, after eviction did what it could.
    NoSpace = 3,
    /// The object can never fit, or a length is over its limit.
    TooLarge = 4,
    /// A bounded resource is in use; asking again later can succeed.
    Busy = 5,
    /// The deadline passed first.
    TimedOut = 6,
    /// Something that this call needs is not here.
    Unavailable = 7,
    /// The node at the other end went away.
    PeerLost = 8,
    /// What was named has been replaced or withdrawn meanwhile.
    Stale = 9,
    /// Bytes are not what their checksum or format says.
    Corrupt = 10,
    /// The other end does not speak this protocol, or this version of it.
    Protocol = 11,
    /// The caller may not do this.
    Denied = 12,
    /// The operating system refused.
    Os = 13,
    /// An argument is outside what the call accepts.
    Invalid = 14,
}

impl ErrorKind {
    /// Every kind, in the order of the wire codes.
    pub const ALL: [Self; 14] = [
        Self::NotFound,
        Self::AlreadyExists,
        Self::NoSpace,
        Self::TooLarge,
        Self::Busy,
        Self::TimedOut,
        Self::Unavailable,
        Self::PeerLost,
        Self::Stale,
        Self::Corrupt,
        Self::Protocol,
        Self::Denied,
        Self::Os,
        Self::Invalid,
    ];

    /// The number that stands for this kind on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// The kind of a wire code, if there is one.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code).checked_sub(1)?).copied()
    }

    /// The name that users see, and that Python's exception carries.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotFound => "NotFound",
            Self::AlreadyExists => "AlreadyExists",
            Self::NoSpace => "NoSpace",
            Self::TooLarge => "TooLarge",
            Self::Busy => "Busy",
            Self::TimedOut => "TimedOut",
            Self::Unavailable => "Unavailable",
            Self::PeerLost => "PeerLost",
            Self::Stale => "Stale",
            Self::Corrupt => "Corrupt",
            Self::Protocol => "Protocol",
            Self::Denied => "Denied",
            Self::Os => "Os",
            Self::Invalid => "Invalid",
        }
    }
}

type Text = Cow<'static, str>;

/// Why an operation did not happen. Every message names the operation, the subject and the values.
///
/// The type travels between processes and nodes as it is (postcard), so what a user reads is what the node that
/// refused has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// See [`ErrorKind::NotFound`].
    #[error("{operation} {subject:?}: no such object")]
    NotFound {
        /// What was asked for: get, delete, ...
        operation: Text,
        /// The key.
        subject: String,
    },
    /// See [`ErrorKind::AlreadyExists`].
    #[error(
        "put {key:?}: an object with this key exists (objects are immutable; delete it first or choose another key)"
    )]
    AlreadyExists {
        /// The key.
        key: String,
    },
    /// See [`ErrorKind::NoSpace`].
    #[error(
        "{operation}: no space in tier {tier}: {requested} bytes requested, {free} free after eviction (unpin or delete objects, or serve with more memory)"
    )]
    NoSpace {
        /// What was asked for.
        operation: Text,
        /// The tier that is full.
        tier: Tier,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free in the tier, not necessarily in one piece.
        free: u64,
    },
    /// See [`ErrorKind::TooLarge`].
    #[error("{operation}: {what} is {value}, the limit is {limit}")]
    TooLarge {
        /// What was asked for.
        operation: Text,
        /// What is too large.
        what: Text,
        /// Its size.
        value: u64,
        /// The largest that is accepted.
        limit: u64,
    },
    /// See [`ErrorKind::Busy`].
    #[error("{operation}: {what} (try again later)")]
    Busy {
        /// What was asked for.
        operation: Text,
        /// What is in use.
        what: Text,
    },
    /// See [`ErrorKind::TimedOut`].
    #[error("{operation} {subject:?}: no answer within {timeout_ms} ms")]
    TimedOut {
        /// What was asked for.
        operation: Text,
        /// The key or peer.
        subject: String,
        /// The deadline that passed, in milliseconds from the call.
        timeout_ms: u64,
    },
    /// See [`ErrorKind::Unavailable`].
    #[error("{what} is not available: {why}")]
    Unavailable {
        /// What is missing.
        what: Text,
        /// Why, and what to do.
        why: Text,
    },
    /// See [`ErrorKind::PeerLost`].
    #[error("{operation} {subject:?}: the peer {peer} went away: {why}")]
    PeerLost {
        /// What was asked for.
        operation: Text,
        /// The key.
        subject: String,
        /// The peer's name or address.
        peer: String,
        /// How it was noticed.
        why: Text,
    },
    /// See [`ErrorKind::Stale`].
    #[error("{operation} {subject:?}: {why}")]
    Stale {
        /// What was asked for.
        operation: Text,
        /// The key.
        subject: String,
        /// What changed meanwhile.
        why: Text,
    },
    /// See [`ErrorKind::Corrupt`].
    #[error("{subject}: {why}")]
    Corrupt {
        /// The key, file or frame.
        subject: String,
        /// What does not agree.
        why: Text,
    },
    /// See [`ErrorKind::Protocol`].
    #[error("protocol: {why}")]
    Protocol {
        /// What was received, and what would have been right.
        why: Text,
    },
    /// See [`ErrorKind::Denied`].
    #[error("{operation}: denied: {why}")]
    Denied {
        /// What was asked for.
        operation: Text,
        /// Why, and what to do.
        why: Text,
    },
    /// See [`ErrorKind::Os`].
    #[error("{operation}: {why}")]
    Os {
        /// The call or operation.
        operation: Text,
        /// The system's own words, and what to do.
        why: Text,
    },
    /// See [`ErrorKind::Invalid`].
    #[error("invalid {what}: {why}")]
    Invalid {
        /// Which argument.
        what: Text,
        /// What was given, and what is accepted.
        why: Text,
    },
}

impl StoreError {
    /// The kind of this error.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::NoSpace { .. } => ErrorKind::NoSpace,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::TimedOut { .. } => ErrorKind::TimedOut,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::PeerLost { .. } => ErrorKind::PeerLost,
            Self::Stale { .. } => ErrorKind::Stale,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Protocol { .. } => ErrorKind::Protocol,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::Os { .. } => ErrorKind::Os,
            Self::Invalid { .. } => ErrorKind::Invalid,
        }
    }

    /// An argument outside what the call accepts.
    pub fn invalid(what: impl Into<Text>, why: impl Into<Text>) -> Self {
        Self::Invalid { what: what.into(), why: why.into() }
    }

    /// No object has this key.
    pub fn not_found(operation: impl Into<Text>, subject: impl fmt::Display) -> Self {
        Self::NotFound { operation: operation.into(), subject: subject.to_string() }
    }

    /// The other end sent what this protocol does not allow.
    pub fn protocol(why: impl Into<Text>) -> Self {
        Self::Protocol { why: why.into() }
    }

    /// The operating system refused; `why` is its error, with the remedy where one is known.
    pub fn os(operation: impl Into<Text>, why: impl fmt::Display) -> Self {
        Self::Os { operation: operation.into(), why: Cow::Owned(why.to_string()) }
    }

    /// Something that this call needs is not here.
    pub fn unavailable(what: impl Into<Text>, why: impl Into<Text>) -> Self {
        Self::Unavailable { what: what.into(), why: why.into() }
    }

    /// The deadline passed first.
    pub fn timed_out(operation: impl Into<Text>, subject: impl fmt::Display, timeout_ms: u64) -> Self {
        Self::TimedOut { operation: operation.into(), subject: subject.to_string(), timeout_ms }
    }

    /// A bounded resource is in use.
    pub fn busy(operation: impl Into<Text>, what: impl Into<Text>) -> Self {
        Self::Busy { operation: operation.into(), what: what.into() }
    }

    /// A length over its limit.
    pub fn too_large(operation: impl Into<Text>, what: impl Into<Text>, value: u64, limit: u64) -> Self {
        Self::TooLarge { operation: operation.into(), what: what.into(), value, limit }
    }

    /// Bytes are not what their checksum or format says.
    pub fn corrupt(subject: impl fmt::Display, why: impl Into<Text>) -> Self {
        Self::Corrupt { subject: subject.to_string(), why: why.into() }
    }

    /// The caller may not do this.
    pub fn denied(operation: impl Into<Text>, why: impl Into<Text>) -> Self {
        Self::Denied { operation: operation.into(), why: why.into() }
    }

    /// What was named has been replaced or withdrawn meanwhile.
    pub fn stale(operation: impl Into<Text>, subject: impl fmt::Display, why: impl Into<Text>) -> Self {
        Self::Stale { operation: operation.into(), subject: subject.to_string(), why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_names_and_kinds_agree() {
        for (position, kind) in ErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(kind.code()), position + 1);
            assert_eq!(ErrorKind::from_code(kind.code()), Some(kind));
            assert_eq!(kind.name(), format!("{kind:?}"));
        }
        assert_eq!(ErrorKind::from_code(0), None);
        assert_eq!(ErrorKind::from_code(15), None);
    }
}
