//! What a call that failed is reported as. Not what follows from it.
//!
//! Holds unsafe code: writes what the host has made room for.
#![allow(unsafe_code)]

use hetmem_transport::verbs_abi::Failure;

/// The errno of the call that has just failed; never 0.
pub(crate) fn last_errno() -> i32 {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(errno) if errno != 0 => errno,
        _ => rustix::io::Errno::IO.raw_os_error(),
    }
}

/// Names the call; returns its errno.
pub(crate) fn failed(call: &str, errno: i32, out: *mut Failure) -> i32 {
    let mut name = [0; 32];
    let len = call.len().min(name.len() - 1);
    name[..len].copy_from_slice(&call.as_bytes()[..len]);
    // SAFETY: the host gives room for a `Failure` with each call that may fail, or null.
    if let Some(out) = unsafe { out.as_mut() } {
        out.call = name;
    }
    if errno == 0 { rustix::io::Errno::IO.raw_os_error() } else { errno }
}

/// What calls that return an errno, or -1 and set it, have returned.
pub(crate) fn check(call: &str, result: i32, out: *mut Failure) -> Result<(), i32> {
    match result {
        0 => Ok(()),
        ..0 => Err(failed(call, last_errno(), out)),
        errno => Err(failed(call, errno, out)),
    }
}
