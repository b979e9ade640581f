//! Where a node's socket is when nobody says. Not the socket. Invariant: clients and nodes of one user agree.

use std::path::PathBuf;

/// The socket of this user's node: `$HETMEM_SOCKET`, else `$XDG_RUNTIME_DIR/hetmem.sock`, else
/// `/tmp/hetmem-UID.sock`.
#[must_use]
pub fn default_socket() -> PathBuf {
    let named = std::env::var_os("HETMEM_SOCKET").filter(|path| !path.is_empty());
    if let Some(path) = named {
        return PathBuf::from(path);
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("hetmem.sock"),
        None => PathBuf::from(format!("/tmp/hetmem-{}.sock", rustix::process::getuid().as_raw())),
    }
}
