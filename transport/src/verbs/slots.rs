//! Buffers of one length in memory that is registered with an adapter: what receives land in, and what frames and words are
//! sent from and read into. Not what is in them. Invariant: a slot is lent to one user at a time, and nobody looks at one
//! that the adapter has.
//!
//! Holds unsafe code: looking at a slot's bytes in place.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::StoreError;

use super::abi;
use super::ladder::Way;
use super::plugin::{Device, Registered};
use crate::memory::{HeapRegion, RegionMemory};

pub(super) struct Slots {
    memory: Arc<HeapRegion>,
    registered: Registered,
    slot_len: usize,
    free: Vec<u32>,
    /// Which of them the adapter may write or read now.
    lent: Box<[AtomicBool]>,
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
        let registered = device.register(&shared, (0, len_bytes), Way::Host, access)?;
        Ok(Self {
            memory,
            registered,
            slot_len,
            free: (0..count).rev().collect(),
            lent: (0..count).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.lent.len()
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, slot: u32) {
        debug_assert!(!self.free.contains(&slot));
        self.came_back(slot);
        self.free.push(slot);
    }

    /// `len` bytes of a slot from `start` on, for the adapter, which has the slot from here on.
    pub(super) fn piece(&self, slot: u32, start: usize, len: usize) -> abi::Piece {
        debug_assert!(start + len <= self.slot_len);
        self.lent[slot as usize].store(true, Ordering::Release);
        abi::Piece {
            address: self.memory.base() as u64 + (slot as usize * self.slot_len + start) as u64,
            len_bytes: u32::try_from(len).unwrap_or(0),
            key: self.registered.keys().local,
        }
    }

    /// The adapter has done its work with a slot, or will never do it.
    pub(super) fn came_back(&self, slot: u32) {
        if let Some(lent) = self.lent.get(slot as usize) {
            lent.store(false, Ordering::Release);
        }
    }

    pub(super) fn write(&self, slot: u32, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= self.slot_len);
        self.memory.write(slot as usize * self.slot_len + start, bytes);
    }

    /// The first bytes of a slot; none while the adapter has it.
    pub(super) fn bytes(&self, slot: u32, len: usize) -> Option<&[u8]> {
        let lent = self.lent.get(slot as usize)?;
        if lent.load(Ordering::Acquire) || len > self.slot_len {
            return None;
        }
        // SAFETY: inside of the memory, which lives as long as `self`. The adapter writes a slot only between `piece` and
        // `came_back`, which the state of the fabric, whose lock is held for both, calls for work that it posts and that
        // is over; who looks at a slot is the one that lends it again.
        Some(unsafe {
            std::slice::from_raw_parts(self.memory.base().add(slot as usize * self.slot_len), len)
        })
    }
}
