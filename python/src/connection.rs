//! The connection of a process to its node, made again in a forked child. Not the operations (`store`). Invariant: a child
//! never speaks on its parent's socket, touches its pins or waits for a lock that a thread of the parent's held.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use hetmem_client::{ConnectOptions, Store, StoreError};
use hetmem_node::{Config, Node};
use parking_lot::{Mutex, RwLock};

use crate::fork::{OfProcess, Unshared, generation};
use crate::signals;

/// One process's session, and those of the children that this value went to.
#[derive(Debug)]
struct Incarnation {
    generation: u64,
    /// None once it was closed. Locked by the process that made it alone.
    session: OfProcess<RwLock<Option<Session>>>,
    next: OnceLock<Box<Self>>,
}

#[derive(Debug)]
struct Session {
    // First, so that the table of sockets never names a descriptor that was closed.
    _unshared: Option<Unshared>,
    store: Store,
}

/// A node that this process is connected to.
#[derive(Debug)]
pub(crate) struct Connection {
    options: ConnectOptions,
    first: Incarnation,
    /// The node, if it runs inside this process.
    node: Option<OfProcess<Mutex<Option<Node>>>>,
}

impl Connection {
    /// Connects to the node that listens at `socket`, or where the command line would look.
    pub(crate) fn open(socket: Option<PathBuf>, timeout: Duration) -> Result<Self, StoreError> {
        let socket = socket.unwrap_or_else(hetmem_client::default_socket);
        let options = ConnectOptions { socket: Some(socket), timeout };
        let first = Incarnation::connect(&options)?;
        Ok(Self { options, first, node: None })
    }

    /// Starts a node in this process and connects to it.
    pub(crate) fn embed(config: Config, timeout: Duration) -> Result<Self, StoreError> {
        crate::fork::watch();
        let node = Node::start(config)?;
        let options = ConnectOptions { socket: Some(node.socket().to_path_buf()), timeout };
        let first = Incarnation::connect(&options)?;
        Ok(Self { options, first, node: Some(OfProcess::new(Mutex::new(Some(node)))) })
    }

    /// The store of this process.
    pub(crate) fn store(&self) -> Result<Store, StoreError> {
        let now = generation();
        let mut incarnation = &self.first;
        while incarnation.generation != now {
            incarnation = match incarnation.next.get() {
                Some(next) => next,
                None => {
                    let next = Box::new(Incarnation::connect(&self.options)?);
                    // Where two threads connect, one of the connections is dropped.
                    let _ = incarnation.next.set(next);
                    continue;
                }
            };
        }
        let session = incarnation.session.read();
        session
            .as_ref()
            .map(|session| session.store.clone())
            .ok_or_else(|| StoreError::unavailable("the store", "it was closed: connect again"))
    }

    /// Ends the session of this process, and its node if that runs inside it.
    pub(crate) fn close(&self) {
        let now = generation();
        let mut next = Some(&self.first);
        while let Some(incarnation) = next {
            if incarnation.generation == now {
                incarnation.session.write().take();
            }
            next = incarnation.next.get().map(|next| &**next);
        }
        if let Some(node) = self.node.as_ref().filter(|node| node.is_here()) {
            let node = node.lock().take();
            drop(node);
        }
    }

    /// Where peers reach the node, if it runs inside this process.
    pub(crate) fn address(&self) -> Option<String> {
        let node = self.node.as_ref().filter(|node| node.is_here())?;
        node.lock().as_ref().map(|node| node.address().to_owned())
    }

    pub(crate) fn socket(&self) -> &Path {
        self.options.socket.as_deref().unwrap_or(Path::new(""))
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.options.timeout
    }
}

impl Incarnation {
    fn connect(options: &ConnectOptions) -> Result<Self, StoreError> {
        crate::fork::watch();
        let generation = generation();
        let store = Store::connect_with(options)?;
        store.interrupt_when(signals::is_over);
        let _unshared = store.socket().map(Unshared::new);
        let session = OfProcess::new(RwLock::new(Some(Session { _unshared, store })));
        Ok(Self { generation, session, next: OnceLock::new() })
    }
}
