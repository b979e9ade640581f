//! Buffers of one length in memory that is registered with an adapter: what receives land in, and what frames and words are
//! sent from and read into. Not which of them are in use at the adapter. Invariant: a slot is lent to one user at a time.
//!
//! Holds unsafe code: looking at a slot's bytes in place.
#![allow(unsafe_code)]

use std::sync::Arc;

use hetmem_core::StoreError;

use super::abi;
use super::plugin::{Device, Registered};
use crate::memory::{HeapRegion, RegionMemory};

pub(super) struct Slots {
    memory: Arc<HeapRegion>,
    registered: Registered,
    slot_len: usize,
    free: Vec<u32>,
}

impl Slots {
    /// All of them free.
    pub(super) fn open(device: &Arc<Device>, count: u32, slot_len: usize) -> Result<Self, StoreError> {
        let memory = Arc::new(HeapRegion::new(slot_len * count as usize));
        let len_bytes = memory.len_bytes();
        let shared = Arc::clone(&memory) as Arc<dyn RegionMemory>;
        // The target of a read is open to remote writes where the transport wants it so (iWARP).
        let mut access = abi::ACCESS_LOCAL_WRITE;
        if device.limits()?.transport == abi::TRANSPORT_IWARP {
            access |= abi::ACCESS_REMOTE_WRITE;
        }
        let registered = device.register(&shared, (0, len_bytes), access)?;
        Ok(Self { memory, registered, slot_len, free: (0..count).rev().collect() })
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, slot: u32) {
        debug_assert!(!self.free.contains(&slot));
        self.free.push(slot);
    }

    /// `len` bytes of a slot from `start` on, for the adapter.
    pub(super) fn piece(&self, slot: u32, start: usize, len: usize) -> abi::Piece {
        debug_assert!(start + len <= self.slot_len);
        abi::Piece {
            address: self.memory.base() as u64 + (slot as usize * self.slot_len + start) as u64,
            len_bytes: u32::try_from(len).unwrap_or(0),
            key: self.registered.keys().local,
        }
    }

    pub(super) fn write(&self, slot: u32, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= self.slot_len);
        self.memory.write(slot as usize * self.slot_len + start, bytes);
    }

    /// The first bytes of a slot.
    ///
    /// # Safety
    /// The adapter has done its work with the slot, and gets no more before the bytes were looked at.
    pub(super) unsafe fn bytes(&self, slot: u32, len: usize) -> &[u8] {
        let len = len.min(self.slot_len);
        assert!((slot as usize + 1) * self.slot_len <= usize::try_from(self.memory.len_bytes()).unwrap_or(0));
        // SAFETY: inside of the memory, which lives as long as `self`; nobody writes it, as the caller says.
        unsafe { std::slice::from_raw_parts(self.memory.base().add(slot as usize * self.slot_len), len) }
    }
}
