//! A driver call that did not succeed, and what it means for the store. Not the call itself (`table`). Invariant: a
//! result is a plain number, so that a driver newer than the bindings cannot confuse it; every message names the
//! call, the number and the driver's own words.

use std::fmt::Write as _;

use hetmem_core::{StoreError, Tier};

use crate::Unavailable;

/// Codes of `CUresult`; the value is the driver's ABI.
pub(crate) const SUCCESS: i32 = 0;
pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
const DEINITIALIZED: i32 = 4;
pub(crate) const STUB_LIBRARY: i32 = 34;
pub(crate) const INSUFFICIENT_DRIVER: i32 = 35;
const DEVICE_UNAVAILABLE: i32 = 46;
pub(crate) const NO_DEVICE: i32 = 100;
const INVALID_CONTEXT: i32 = 201;
pub(crate) const OPERATING_SYSTEM: i32 = 304;
pub(crate) const NOT_READY: i32 = 600;
const HOST_MEMORY_ALREADY_REGISTERED: i32 = 712;
const NOT_PERMITTED: i32 = 800;
pub(crate) const NOT_SUPPORTED: i32 = 801;
pub(crate) const SYSTEM_NOT_READY: i32 = 802;
pub(crate) const SYSTEM_DRIVER_MISMATCH: i32 = 803;
pub(crate) const COMPAT_NOT_SUPPORTED_ON_DEVICE: i32 = 804;

/// After one of these nothing runs in the context any more, no copy either, and every later call answers the same.
const STICKY: &[i32] = &[
    DEINITIALIZED,
    DEVICE_UNAVAILABLE,
    INVALID_CONTEXT,
    // ECC error, NVLink error.
    214,
    220,
    // Illegal address, launch timeout, context destroyed, assertion, and five faults of kernels.
    700,
    702,
    709,
    710,
    714,
    715,
    716,
    717,
    718,
    719,
];

/// A call that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) call: &'static str,
    pub(crate) code: i32,
    pub(crate) text: String,
}

impl Failed {
    /// `cuInit returned 34, "the words of the driver"`.
    pub(crate) fn reason(&self) -> String {
        let mut reason = format!("{} returned {}", self.call, self.code);
        if !self.text.is_empty() {
            // Writing to a String does not fail.
            let _ = write!(reason, ", \"{}\"", self.text);
        }
        reason
    }

    /// Whether the context is dead: nothing that was under way goes on.
    pub(crate) fn is_sticky(&self) -> bool {
        STICKY.contains(&self.code)
    }

    /// The store's error for an operation that failed this way.
    pub(crate) fn error(&self, operation: &str) -> StoreError {
        let reason = self.reason();
        match self.code {
            NOT_SUPPORTED | NOT_PERMITTED => StoreError::unavailable(operation.to_owned(), reason),
            _ if self.is_sticky() => StoreError::os(
                operation.to_owned(),
                format!(
                    "{reason} (the GPU's context is lost: look into the kernel log, restart this process)"
                ),
            ),
            _ => StoreError::os(operation.to_owned(), reason),
        }
    }

    /// The same, where the driver's lack of memory means that the tier is full.
    pub(crate) fn error_in_tier(
        &self,
        operation: &str,
        ordinal: u16,
        requested: u64,
        free: u64,
    ) -> StoreError {
        match self.code {
            OUT_OF_MEMORY => StoreError::NoSpace {
                operation: operation.to_owned().into(),
                tier: Tier::Gpu(ordinal),
                requested,
                free,
            },
            _ => self.error(operation),
        }
    }

    /// Why host memory could not be registered or had, with what to do.
    pub(crate) fn error_of_host_memory(&self, operation: &str, len_bytes: u64) -> StoreError {
        let reason = format!("{len_bytes} bytes: {}", self.reason());
        let remedy = match self.code {
            OUT_OF_MEMORY | OPERATING_SYSTEM => {
                "raise the limit on locked memory (`ulimit -l`) and the memory limit of the container; unregistered \
                 memory is copied too, more slowly"
            }
            HOST_MEMORY_ALREADY_REGISTERED => {
                "these bytes are registered already, by this process: drop that one first"
            }
            INVALID_VALUE | NOT_SUPPORTED | NOT_PERMITTED => {
                "the driver registers no memory of this kind; unregistered memory is copied too, more slowly"
            }
            _ => return self.error(operation),
        };
        StoreError::os(operation.to_owned(), format!("{reason} ({remedy})"))
    }

    /// An ability that is missing because this call failed.
    pub(crate) fn absence(&self, what: &'static str, remedy: &'static str) -> Unavailable {
        Unavailable { what: what.into(), why: self.reason(), remedy: remedy.into() }
    }
}

#[cfg(test)]
mod tests {
    use hetmem_core::ErrorKind;

    use super::*;

    fn failed(code: i32) -> Failed {
        Failed { call: "cuMemCreate", code, text: "words".to_owned() }
    }

    #[test]
    fn each_kind_of_failure_has_its_kind_of_error() {
        let table = [
            (OUT_OF_MEMORY, ErrorKind::NoSpace),
            (NOT_SUPPORTED, ErrorKind::Unavailable),
            (700, ErrorKind::Os),
            (INVALID_VALUE, ErrorKind::Os),
            // A code that no bindings know.
            (4711, ErrorKind::Os),
        ];
        for (code, kind) in table {
            assert_eq!(failed(code).error_in_tier("create segment", 3, 4, 2).kind(), kind, "{code}");
        }
        let full = failed(OUT_OF_MEMORY).error_in_tier("create segment", 3, 4, 2);
        let StoreError::NoSpace { tier, requested, free, .. } = full else { panic!("{full}") };
        assert_eq!((tier, requested, free), (Tier::Gpu(3), 4, 2));
    }

    #[test]
    fn only_a_lost_context_is_said_to_be_lost() {
        assert!(failed(700).error("copy").to_string().contains("restart this process"));
        assert!(!failed(INVALID_VALUE).is_sticky() && !failed(NOT_READY).is_sticky());
    }

    #[test]
    fn refused_registration_has_a_remedy() {
        for code in [OUT_OF_MEMORY, HOST_MEMORY_ALREADY_REGISTERED, NOT_SUPPORTED, INVALID_VALUE] {
            let text = failed(code).error_of_host_memory("register", 7).to_string();
            assert!(text.contains("7 bytes") && text.contains(" ("), "{text}");
        }
    }
}
