//! The sum of 64-bit words, wrapping: the twin of `cuda/sum.cu`. Of no use to the store: the kernel is the yardstick of
//! the benches for what only reads. Invariant: as the kernel, it adds to what is in the places for sums.

use crate::launch::{Fault, Launch, Memory, read_word};

/// The kernel's entry.
pub const SUM: &str = "hetmem_sum";
/// Threads of a block.
pub const THREADS: u32 = 256;
/// Vectors of 16 bytes that a block of threads takes.
pub const TILE: u64 = 4096;
/// Words that sums are added to; the sum of all is theirs.
pub const SUMS: u64 = 64;
/// Bytes of a vector.
pub const VECTOR_LEN: u64 = 16;

/// What the kernel does: parameters are the address of the words, how many pairs of them there are, and where the
/// [`SUMS`] sums are.
pub(crate) fn twin(memory: &mut dyn Memory, launch: &Launch<'_>) -> Result<(), Fault> {
    let [source, vectors, sums] = launch.of(THREADS)?;
    if !source.is_multiple_of(VECTOR_LEN) {
        return Err(Fault::Misaligned { address: source });
    }
    for block in launch.first_blocks(vectors.div_ceil(TILE)) {
        let start = block * TILE;
        let count = TILE.min(vectors - start);
        let mut bytes = vec![0; usize::try_from(count * VECTOR_LEN).unwrap_or_default()];
        memory.read(source.wrapping_add(start * VECTOR_LEN), &mut bytes)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let place = sums.wrapping_add(block % SUMS * 8);
        let sum = words.fold(read_word(memory, place)?, u64::wrapping_add);
        memory.write(place, &sum.to_le_bytes())?;
    }
    Ok(())
}
