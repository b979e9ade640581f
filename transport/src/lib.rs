//! The Fabric seam of hetmem and its implementations: `tcp` over sockets, `sim` in memory and virtual time.
//!
//! Not the engine: which bytes move, when, and what to do when that fails is decided above. Invariant: both
//! implementations pass one conformance suite.

mod arriving;
#[cfg(any(test, feature = "conformance"))]
#[doc(hidden)]
pub mod conformance;
mod fabric;
mod lookup;
mod memory;
mod payload;
mod region;
mod seats;
mod sim;
mod staged;
mod tcp;
mod turn;
mod verbs;
mod waiting;

pub use fabric::{
    Access, Fabric, FabricEvent, FabricKind, FabricSink, Landing, LandingPart, LandingStats, LandingToken,
    ReadStats, SendToken, Sent,
};
pub use memory::{Copying, DeviceMemory, HeapRegion, RegionMemory, Ring, Staging, StagingWay};
pub use sim::{SimFabric, SimFaults, SimNet};
pub use tcp::{TcpConfig, TcpFabric};
pub use verbs::{
    Direction, MemoryKind, Outcome, Proof, Scratch, VerbsConfig, VerbsFabric, abi as verbs_abi,
    verbs_devices, verbs_proofs,
};
