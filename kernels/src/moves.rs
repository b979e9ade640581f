//! Many copies in one launch: the list that `cuda/gather.cu` takes, and its twin. Not the choice between this and the
//! driver's own copies. Invariant: no move of a list writes what another reads or writes; whoever makes it sees to that.

use crate::launch::{Fault, Launch, Memory, list_of, read_entry};

/// The kernel's entry.
pub const GATHER: &str = "hetmem_gather";
/// Threads of a block; a block takes one move.
pub const THREADS: u32 = 256;
/// Bytes of a move at most, so that long copies and short ones keep all of a device busy to the end: 16 bytes for each of
/// 16 turns of a block's threads.
pub const MOVE_LEN_MAX: u64 = 64 << 10;

/// Bytes of a move in the list.
pub const ENTRY_LEN: usize = 24;

/// One copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Address of the first byte read.
    pub source: u64,
    /// Address of the first byte written.
    pub target: u64,
    /// How many bytes.
    pub len_bytes: u64,
}

/// The moves cut to [`MOVE_LEN_MAX`], in order, without those of no bytes.
pub fn cut(moves: impl IntoIterator<Item = Move>) -> impl Iterator<Item = Move> {
    moves.into_iter().flat_map(|Move { source, target, len_bytes }| {
        (0..len_bytes.div_ceil(MOVE_LEN_MAX)).map(move |part| {
            let start = part * MOVE_LEN_MAX;
            Move {
                source: source.wrapping_add(start),
                target: target.wrapping_add(start),
                len_bytes: MOVE_LEN_MAX.min(len_bytes - start),
            }
        })
    })
}

/// The list as the kernel reads it, at a multiple of 8: source, target and length of each as little-endian words.
pub fn list(moves: impl IntoIterator<Item = Move>) -> Vec<u8> {
    list_of(moves.into_iter().map(|one| [one.source, one.target, one.len_bytes]))
}

/// What the kernel does: parameters are the list's address and how many moves there are.
pub(crate) fn twin(memory: &mut dyn Memory, launch: &Launch<'_>) -> Result<(), Fault> {
    let [list, count] = launch.of(THREADS)?;
    let mut held = Vec::new();
    for block in launch.first_blocks(count) {
        let [source, target, len_bytes] = read_entry(memory, list, block)?;
        let mut done = 0;
        while done < len_bytes {
            // As much as a block of threads has under way, so that a long move needs little memory here.
            let len_bytes = MOVE_LEN_MAX.min(len_bytes - done);
            held.resize(usize::try_from(len_bytes).unwrap_or_default(), 0);
            memory.read(source.wrapping_add(done), &mut held)?;
            memory.write(target.wrapping_add(done), &held)?;
            done += len_bytes;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_moves_are_cut_and_empty_ones_left_out() {
        let one = |source, target, len_bytes| Move { source, target, len_bytes };
        let cut: Vec<Move> =
            cut([one(10, 1 << 30, 3 * MOVE_LEN_MAX + 1), one(5, 7, 0), one(1, 2, 3)]).collect();
        assert_eq!(
            cut,
            [
                one(10, 1 << 30, MOVE_LEN_MAX),
                one(10 + MOVE_LEN_MAX, (1 << 30) + MOVE_LEN_MAX, MOVE_LEN_MAX),
                one(10 + 2 * MOVE_LEN_MAX, (1 << 30) + 2 * MOVE_LEN_MAX, MOVE_LEN_MAX),
                one(10 + 3 * MOVE_LEN_MAX, (1 << 30) + 3 * MOVE_LEN_MAX, 1),
                one(1, 2, 3),
            ]
        );
        let list = list([one(1, 2, 3)]);
        assert_eq!((list.len(), list[0], list[8], list[16]), (24, 1, 2, 3));
    }
}
