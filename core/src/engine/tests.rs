//! The engine, driven by hand: one to three of them, wired to each other, with plain vectors for memory. Not the
//! simulation (`tests/`), which looks for what nobody thought of. Invariant: time moves only when a test moves it.
#![allow(clippy::needless_range_loop, reason = "a node's number names it in several lists")]

mod ahead;
mod batches;
mod deletes;
mod local;
mod locations;
mod placement;
mod public_defects;
mod remote;
mod replicas;
mod requests;
mod ring;
mod room;
mod succession;
mod tiers;
mod topology;
mod world;
