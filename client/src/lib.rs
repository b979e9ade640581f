//! The Rust client of hetmem: objects of this node in place from shared memory, everything else by asking the node.
//! Not a transport between nodes and not a copy of the store: bytes are borrowed from segments that the node owns.
//! Invariant: an [`Object`]'s bytes stay where they are, unchanged, until it is dropped.
//!
//! ```no_run
//! use hetmem_client::{Key, ObjectMeta, DType, Store};
//!
//! # fn main() -> Result<(), hetmem_client::StoreError> {
//! let store = Store::connect(None)?;
//! let key = Key::new("layer.0.weight")?;
//! store.put(&key, ObjectMeta::tensor(DType::U8, &[2, 3])?, &[1, 2, 3, 4, 5, 6])?;
//! let object = store.get(&key)?;
//! assert_eq!(&object[..2], [1, 2]);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod ahead;
mod checked;
mod converted;
mod gpu;
mod late;
mod list;
mod many;
mod object;
mod options;
mod private;
mod reservation;
mod segments;
mod session;
mod shared;
mod store;

pub use converted::Converted;
pub use gpu::{GpuObject, GpuReservation, GpuReserved, Placed};
pub use hetmem_core::receipt::{Path, Place, Receipt};
pub use hetmem_core::wire::{IfExists, Listed, REPLICAS_MAX, Range, Status};
pub use hetmem_core::{
    Checksum, DType, ErrorKind, Key, ObjectId, ObjectMeta, Shape, StoreError, Tier, TierHint,
};
pub use hetmem_host_mem::socket::default_path as default_socket;
pub use list::Listing;
pub use object::Object;
pub use options::{ConnectOptions, GetOptions, PutOptions, PutOutcome, Stat, ZeroCopy};
pub use private::PrivateBytes;
pub use reservation::{Reservation, Reserved};
pub use session::UnixSession;
pub use store::Store;
