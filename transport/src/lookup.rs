//! Looking host names up without making anyone wait: the system's resolver blocks, for as long as it likes. Not what is done
//! with the address. Invariant: so many threads at most look names up at a time, and each look ends in one call.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hetmem_core::StoreError;

/// The most host names that are looked up at a time.
const LOOKUPS_MAX: usize = 8;

/// Those of one fabric.
#[derive(Debug, Default)]
pub(crate) struct Lookups {
    running: Arc<AtomicUsize>,
}

impl Lookups {
    /// Tells `then` the address of a host and port: at once if it is a number, else from a thread of its own.
    ///
    /// # Errors
    /// `Invalid` without a port, `Busy` if too many names are being looked up, `Os` if there is no thread for it; then
    /// nothing is told.
    pub(crate) fn start(
        &self,
        address: &str,
        wants_ipv4: bool,
        then: impl FnOnce(Result<SocketAddr, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        if let Ok(address) = address.parse::<SocketAddr>() {
            then(Ok(address));
            return Ok(());
        }
        let running = Arc::clone(&self.running);
        if running.fetch_add(1, Ordering::Relaxed) >= LOOKUPS_MAX {
            running.fetch_sub(1, Ordering::Relaxed);
            return Err(StoreError::busy("connect", format!("{LOOKUPS_MAX} host names are being looked up")));
        }
        let address = address.to_owned();
        let started = std::thread::Builder::new().name("fabric-lookup".to_owned()).spawn(move || {
            then(resolve(&address, wants_ipv4));
            running.fetch_sub(1, Ordering::Relaxed);
        });
        match started {
            Ok(_) => Ok(()),
            Err(error) => {
                self.running.fetch_sub(1, Ordering::Relaxed);
                Err(StoreError::os("start a thread to look a host name up", error))
            }
        }
    }
}

/// Whether an address has a host and a port.
///
/// # Errors
/// `Invalid` with what is wrong.
pub(crate) fn check(address: &str) -> Result<(), StoreError> {
    let Some((_, port)) = address.rsplit_once(':') else {
        return Err(StoreError::invalid("address", format!("{address:?} has no port; write host:port")));
    };
    match port.parse::<u16>() {
        Ok(_) => Ok(()),
        Err(_) => Err(StoreError::invalid("address", format!("{address:?}: {port:?} is no port"))),
    }
}

/// The address of a host and port; where the host has several, one of the wanted family if there is one. May block.
///
/// # Errors
/// `Invalid` with what the resolver says.
pub(crate) fn resolve(address: &str, wants_ipv4: bool) -> Result<SocketAddr, StoreError> {
    let wrong = |why: String| StoreError::invalid("address", format!("{address:?}: {why}; write host:port"));
    let found = address.to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    let found: Vec<SocketAddr> = found.collect();
    let wanted = found.iter().find(|found| found.is_ipv4() == wants_ipv4).or(found.first());
    wanted.copied().ok_or_else(|| wrong("the host has no address".to_owned()))
}
