//! The seam between a client and its node: one question, one answer. Not a transport: a Unix-socket session is
//! written in the client, an in-process one in the node. Invariant: `call` returns exactly one answer or an error,
//! and the answer's descriptors are owned by whoever receives it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use hetmem_core::StoreError;
use hetmem_core::wire::{ClientMessage, ClientReply};

/// A node's answer, and the descriptors that came beside it.
#[derive(Debug)]
pub struct Answer {
    /// What the node says.
    pub reply: ClientReply,
    /// In the order that the reply's documentation gives; empty for most replies.
    pub descriptors: Vec<OwnedFd>,
}

/// A client's connection to its node.
pub trait Session: Send + Sync {
    /// Asks and waits for the answer. `payload` travels behind the message (the bytes of `Put` and `Write`).
    ///
    /// # Errors
    /// What the node refused with; [`hetmem_core::ErrorKind::TimedOut`] after `timeout`;
    /// [`hetmem_core::ErrorKind::PeerLost`] when the node is gone.
    fn call(&self, message: &ClientMessage, payload: &[u8], timeout: Duration) -> Result<Answer, StoreError>;

    /// Asks many things, all of them before the first answer is waited for where the session can. One answer or error
    /// for each, in order.
    fn call_many(&self, messages: &[ClientMessage], timeout: Duration) -> Vec<Result<Answer, StoreError>> {
        messages.iter().map(|message| self.call(message, &[], timeout)).collect()
    }
}
