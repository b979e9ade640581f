//! A launch as a twin sees it: memory by address, parameters as words, a number of blocks of threads. Not a driver.
//! Invariant: a twin touches memory only through [`Memory`], which checks every range, and does what exactly that many
//! blocks of threads do.

use std::fmt;

use crate::{cast, checksum, moves, sum};

/// Memory that a kernel is given addresses of.
pub trait Memory {
    /// Fills `bytes` from `address` on.
    ///
    /// # Errors
    /// [`Fault::Address`] if a byte of it is not there or may not be read.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault>;

    /// Writes `bytes` from `address` on.
    ///
    /// # Errors
    /// [`Fault::Address`] if a byte of it is not there or may not be written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault>;
}

/// What a device stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bytes that are not there, or that may not be touched so.
    Address {
        /// The first of them.
        address: u64,
        /// How many.
        len_bytes: u64,
    },
    /// An address that is no multiple of what is read or written there at once.
    Misaligned {
        /// The address.
        address: u64,
    },
    /// Blocks of another number of threads than the kernel was made for, or too few parameters.
    Shape,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, len_bytes } => write!(f, "{len_bytes} bytes at {address:#x}"),
            Self::Misaligned { address } => write!(f, "address {address:#x} is misaligned"),
            Self::Shape => {
                f.write_str("launched with other threads or parameters than the kernel was made for")
            }
        }
    }
}

impl std::error::Error for Fault {}

/// With what a kernel is started. The grid and its blocks have one dimension.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Blocks of threads.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// The parameters, in order.
    pub parameters: &'a [u64],
}

impl Launch<'_> {
    /// The parameters of a kernel that has `N` of them and is made for blocks of `threads` threads.
    pub(crate) fn of<const N: usize>(&self, threads: u32) -> Result<[u64; N], Fault> {
        match <[u64; N]>::try_from(self.parameters) {
            Ok(parameters) if self.threads == threads => Ok(parameters),
            _ => Err(Fault::Shape),
        }
    }

    /// The numbers of the blocks, of which those from `count` on have nothing to do.
    pub(crate) fn first_blocks(&self, count: u64) -> std::ops::Range<u64> {
        0..count.min(self.blocks.into())
    }
}

/// Does on the CPU what a kernel does on a device.
pub type Twin = fn(&mut dyn Memory, &Launch<'_>) -> Result<(), Fault>;

/// The twin of the kernel with this name, if there is such a kernel.
#[must_use]
pub fn twin(name: &str) -> Option<Twin> {
    TWINS.iter().find(|(known, _)| *known == name).map(|(_, twin)| *twin)
}

/// Every kernel by the name of its entry.
pub const TWINS: &[(&str, Twin)] = &[
    (moves::GATHER, moves::twin),
    (checksum::CHECKSUM, checksum::parts::twin),
    (sum::SUM, sum::twin),
    ("hetmem_cast_f32_bf16", cast::twin_f32_bf16),
    ("hetmem_cast_f32_f16", cast::twin_f32_f16),
    ("hetmem_cast_bf16_f32", cast::twin_bf16_f32),
    ("hetmem_cast_f16_f32", cast::twin_f16_f32),
    ("hetmem_cast_bf16_f16", cast::twin_bf16_f16),
    ("hetmem_cast_f16_bf16", cast::twin_f16_bf16),
];

/// A word of a list in memory.
pub(crate) fn read_word(memory: &dyn Memory, address: u64) -> Result<u64, Fault> {
    if !address.is_multiple_of(8) {
        return Err(Fault::Misaligned { address });
    }
    let mut word = [0; 8];
    memory.read(address, &mut word)?;
    Ok(u64::from_le_bytes(word))
}

/// Three words: an entry of the lists of `gather` and `checksum`.
pub(crate) fn read_entry(memory: &dyn Memory, list: u64, index: u64) -> Result<[u64; 3], Fault> {
    let address = list.wrapping_add(index.wrapping_mul(ENTRY_LEN));
    Ok([
        read_word(memory, address)?,
        read_word(memory, address.wrapping_add(8))?,
        read_word(memory, address.wrapping_add(16))?,
    ])
}

/// Bytes of such an entry.
pub(crate) const ENTRY_LEN: u64 = 24;

/// Entries as they lie in memory.
pub(crate) fn list_of(entries: impl Iterator<Item = [u64; 3]>) -> Vec<u8> {
    let mut list = Vec::with_capacity(entries.size_hint().0.saturating_mul(24));
    for word in entries.flatten() {
        list.extend_from_slice(&word.to_le_bytes());
    }
    list
}
