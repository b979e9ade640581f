//! The client's page.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hetmem_core::{Generation, SlotId, StoreError};

/// The node's view of a client's page.
#[derive(Debug)]
pub struct NodePage {
    fd: OwnedFd,
}

impl NodePage {
    /// A fresh page.
    ///
    /// # Errors
    /// `Os`.
    pub fn create() -> Result<Self, StoreError> {
        Err(StoreError::unavailable("page", "not built yet"))
    }
    /// To be passed to the client.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
    /// Adds every pinned generation; starts with a full fence, so what was withdrawn before the call and is not
    /// in `into` after it cannot be pinned any more.
    pub fn pinned(&self, into: &mut HashSet<Generation>) {
        let _ = into;
    }
    /// Pins on the client's behalf; `None` when the client has no pin word left.
    pub fn pin_for_client(&self, generation: Generation) -> Option<u32> {
        let _ = generation;
        None
    }
    /// Takes back a pin made by `pin_for_client` whose reply was never delivered.
    pub fn unpin_for_client(&self, pin: u32, generation: Generation) {
        let _ = (pin, generation);
    }
    /// Hands out and clears a sample of the slots that the client got lately. Numbers are the client's word only.
    pub fn drain_touches(&self, touched: impl FnMut(SlotId)) {
        let _ = touched;
    }
    /// Gets that the client answered itself from the index: the client's word only.
    pub fn hits(&self) -> u64 {
        0
    }
}

/// The client's view of its page.
#[derive(Debug)]
pub struct ClientPage {}

impl ClientPage {
    /// Maps the descriptor that came with `Welcome`.
    ///
    /// # Errors
    /// `Protocol` if it is no page of this layout.
    pub fn map(fd: OwnedFd) -> Result<Self, StoreError> {
        let _ = fd;
        Err(StoreError::unavailable("page", "not built yet"))
    }
    /// Claims a pin word; `None` when all are in use.
    pub fn pin(&self, generation: Generation) -> Option<u32> {
        let _ = generation;
        None
    }
    /// Gives a pin word back.
    pub fn unpin(&self, pin: u32) {
        let _ = pin;
    }
    /// Counts a hit and records the slot. `IndexReader::get` does it.
    pub fn touch(&self, slot: SlotId) {
        let _ = slot;
    }
}
