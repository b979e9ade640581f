//! CPU twins of the kernels that move and check bytes on a GPU: [`checksum`], [`gather`], [`scatter`].
//!
//! Not the fast path on a CPU, and no GPU code yet: the `.cu` files and their PTX come beside these modules later.
//! A twin has the kernel's shape (what one thread computes, what one block joins), so that the two can be read side
//! by side. Invariant: a twin and its kernel agree bit for bit, and so do the twin and the core.

#![forbid(unsafe_code)]

pub mod checksum;
mod extents;

pub use extents::{gather, scatter};
