//! The daemon as a library: it drives the engine over real sockets, fabrics and memory.
//!
//! Not a place for decisions (`hetmem_core::engine`): it carries actions out, in order, and hands in what happened.
//! Invariant: whatever a client or a peer sends, the node answers, closes that one connection, or goes on.

mod carry;
mod clients;
mod config;
mod driver;
mod fabrics;
mod inprocess;
mod memory;
mod node;
mod outbox;
mod peers;
mod reactor;
mod rings;
mod scratch;
mod segments;
mod staging;
mod tiers;
mod visibility;

pub use config::{ClientShare, Config, FabricChoice, GpuSize, KEYS, OneGpu, parse_bytes};
#[doc(hidden)]
pub use memory::copied_memory;
pub use node::{EngineHeld, Node};
