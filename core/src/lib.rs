//! The words and decisions of hetmem: objects, tiers, allocation, placement, eviction, wire messages and the engine.
//!
//! Not a place for effects: nothing here does I/O, reads a clock, logs, or is async. Time and events come in as
//! arguments, actions go out as values. What a peer, a client or a file sends is checked and never panics.

#![forbid(unsafe_code)]

pub mod alloc;
pub mod checksum;
pub mod engine;
mod error;
pub mod evict;
mod key;
mod meta;
pub mod placement;
pub mod receipt;
mod tier;
pub mod wire;

pub use checksum::Checksum;
pub use error::{ErrorKind, StoreError};
pub use key::{KEY_LEN_MAX, Key, fingerprint};
pub use meta::{DIMS_MAX, DType, OBJECT_LEN_MAX, ObjectMeta, Shape};
pub use tier::{
    ClientId, Epoch, Extent, Generation, LandingId, LeaseId, LinkId, NodeId, ObjectId, RemoteExtent,
    RemoteKey, SegmentId, SlotId, Tier, TierHint, TransferId,
};
