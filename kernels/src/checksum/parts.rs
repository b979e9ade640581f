//! Many objects' block values in one launch: the list that `cuda/checksum.cu` takes, its twin, and the roots that the host
//! makes. Not the value of a block (`super`). Invariant: the values of an object lie in a row, in the order of its
//! blocks, and those of the objects in the order of the objects.

use hetmem_core::checksum::{BLOCK_LEN, Root};

use crate::launch::{Fault, Launch, Memory, list_of, read_entry};

/// Threads of a block: four warps, each of which takes 16 KiB at a time.
pub const THREADS: u32 = 128;
/// Bytes of a part: one turn of a block's warps.
pub const PART_LEN: u64 = 4 * BLOCK_BYTES;

const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// Bytes whose block values are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Address of the first byte.
    pub address: u64,
    /// How many bytes.
    pub len_bytes: u64,
    /// Where in the list of values that of the first block belongs.
    pub first: u64,
}

/// How many values an object of this length has.
#[must_use]
pub fn values_of(len_bytes: u64) -> u64 {
    len_bytes.div_ceil(BLOCK_BYTES)
}

/// Objects by address and length, cut into parts.
pub fn cut(objects: impl IntoIterator<Item = (u64, u64)>) -> impl Iterator<Item = Part> {
    let mut before = 0;
    objects.into_iter().flat_map(move |(address, len_bytes)| {
        let first = before;
        before += values_of(len_bytes);
        (0..len_bytes.div_ceil(PART_LEN)).map(move |part| {
            let start = part * PART_LEN;
            Part {
                address: address.wrapping_add(start),
                len_bytes: PART_LEN.min(len_bytes - start),
                first: first + start / BLOCK_BYTES,
            }
        })
    })
}

/// The list as the kernel reads it, at a multiple of 8: address, length and first value of each as words.
pub fn list(parts: impl IntoIterator<Item = Part>) -> Vec<u8> {
    list_of(parts.into_iter().map(|part| [part.address, part.len_bytes, part.first]))
}

/// The checksums of objects of these lengths, of which `values` are the values of all blocks.
pub fn roots(
    lengths: impl IntoIterator<Item = u64>,
    values: impl IntoIterator<Item = u64>,
) -> impl Iterator<Item = u64> {
    let mut values = values.into_iter();
    lengths.into_iter().map(move |len_bytes| {
        let mut root = Root::new(len_bytes);
        (0..values_of(len_bytes)).zip(values.by_ref()).for_each(|(_, value)| root.add(value));
        root.finish()
    })
}

/// What the kernel does: parameters are the list's address, how many parts there are, and where values belong.
pub(crate) fn twin(memory: &mut dyn Memory, launch: &Launch<'_>) -> Result<(), Fault> {
    let [list, count, values] = launch.of(THREADS)?;
    let mut bytes = Vec::with_capacity(BLOCK_LEN);
    for part in launch.first_blocks(count) {
        let [address, len_bytes, first] = read_entry(memory, list, part)?;
        for block in 0..values_of(len_bytes) {
            let start = block * BLOCK_BYTES;
            bytes.resize(usize::try_from(BLOCK_BYTES.min(len_bytes - start)).unwrap_or_default(), 0);
            memory.read(address.wrapping_add(start), &mut bytes)?;
            let place = values.wrapping_add((first + block).wrapping_mul(8));
            memory.write(place, &super::block(&bytes).to_le_bytes())?;
        }
    }
    Ok(())
}
