//! The operating system's refusals in words, with the remedy where one is known. Not a place for errors of this
//! crate's own. Invariant: the message names the operation, the system's own text and what to do.

use hetmem_core::StoreError;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// The error of a system call that `operation` needed.
pub(crate) fn error(operation: &'static str, errno: Errno) -> StoreError {
    match errno {
        Errno::MFILE => {
            let limit = getrlimit(Resource::Nofile);
            StoreError::os(
                operation,
                format!(
                    "{errno}: RLIMIT_NOFILE is {} (raise it with `ulimit -n` or LimitNOFILE=, or use larger segments)",
                    limit.current.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
                ),
            )
        }
        Errno::NFILE => StoreError::os(operation, format!("{errno}: raise the sysctl fs.file-max")),
        Errno::NOMEM | Errno::NOSPC | Errno::FAULT => StoreError::os(
            operation,
            format!("{errno}: the system has no memory left for it (serve with less, or free some)"),
        ),
        _ => StoreError::os(operation, errno),
    }
}
