//! Memory for twins: one range of addresses. Not a test. Invariant: what lies outside is a fault.

#![allow(dead_code)]

use hetmem_kernels::launch::{Fault, Launch, Memory, twin};

/// The first address: where `cuda/on_cpu.h` has its memory.
pub(crate) const BASE: u64 = 1 << 44;

/// Bytes from [`BASE`] on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arena(pub(crate) Vec<u8>);

impl Arena {
    /// Random bytes.
    pub(crate) fn random(len: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        Self((0..len).map(|_| random.next().to_le_bytes()[2]).collect())
    }

    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Runs a kernel's twin.
    pub(crate) fn run(
        &mut self,
        name: &str,
        blocks: u32,
        threads: u32,
        parameters: &[u64],
    ) -> Result<(), Fault> {
        twin(name).expect("a kernel of this name")(self, &Launch { blocks, threads, parameters })
    }

    fn range(&self, address: u64, len: usize) -> Result<std::ops::Range<usize>, Fault> {
        let start = address.checked_sub(BASE).and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        range
            .filter(|range| range.end <= self.0.len())
            .ok_or(Fault::Address { address, len_bytes: len as u64 })
    }
}

impl Memory for Arena {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        bytes.copy_from_slice(&self.0[self.range(address, bytes.len())?]);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let range = self.range(address, bytes.len())?;
        self.0[range].copy_from_slice(bytes);
        Ok(())
    }
}

/// Numbers without a short period (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
