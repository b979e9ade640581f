//! The kernels that move, check and convert bytes on a GPU: their PTX ([`ptx`]), what they are launched with, and a CPU
//! twin of each ([`launch`]).
//!
//! Not the launching (`hetmem-gpu-mem`), and not the fast path on a CPU. The sources are `cuda/*.cu`; their PTX is
//! checked in beside them and made anew by `cargo xtask kernels`. A twin has its kernel's shape (what one block of
//! threads takes, what one thread computes), so that the two can be read side by side. Invariant: a twin and its kernel
//! agree bit for bit, and so do the twin and the core.

#![forbid(unsafe_code)]

pub mod cast;
pub mod checksum;
mod extents;
pub mod launch;
pub mod moves;
pub mod ptx;
pub mod sum;

pub use extents::{gather, scatter};
