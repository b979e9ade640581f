//! Many extents into one buffer, and back: the batch of small objects that becomes one send, one copy, one tensor.
//! Not a way around an object's life cycle: the caller holds what the extents name. Invariant: every extent is
//! checked before the first byte moves, so an error has changed nothing.

use hetmem_core::{Extent, SegmentId, StoreError};

/// Copies `extents`, in their order and without gaps, into `target`. The same bytes may be asked for twice.
/// Returns how many bytes of `target` were written.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Invalid`] if an extent is not inside a segment of `segments`, or if `target` is
/// shorter than all of them together.
pub fn gather(
    segments: &[(SegmentId, &[u8])],
    extents: &[Extent],
    target: &mut [u8],
) -> Result<usize, StoreError> {
    let mut parts = Vec::with_capacity(extents.len());
    for extent in extents {
        let segment = segments.iter().find(|(id, _)| *id == extent.segment);
        let range = range_in("gather", extent, segment.map(|(_, bytes)| bytes.len()))?;
        parts.extend(segment.map(|(_, bytes)| &bytes[range]));
    }
    check_total("gather", parts.iter().map(|part| part.len()), target.len())?;
    let mut filled = 0;
    for part in parts {
        target[filled..filled + part.len()].copy_from_slice(part);
        filled += part.len();
    }
    Ok(filled)
}

/// Copies the start of `source` into `extents`, in their order and without gaps: the inverse of [`gather`].
/// Returns how many bytes of `source` were read.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Invalid`] if an extent is not inside a segment of `segments`, if two extents share a
/// byte (on a GPU the last write would be anybody's), or if `source` is shorter than all of them together.
pub fn scatter(
    source: &[u8],
    segments: &mut [(SegmentId, &mut [u8])],
    extents: &[Extent],
) -> Result<usize, StoreError> {
    let mut parts = Vec::with_capacity(extents.len());
    for extent in extents {
        let position = segments.iter().position(|(id, _)| *id == extent.segment);
        let range = range_in("scatter", extent, position.map(|at| segments[at].1.len()))?;
        parts.extend(position.map(|at| (at, range)));
    }
    check_total("scatter", parts.iter().map(|(_, range)| range.len()), source.len())?;
    check_disjoint(extents)?;
    let mut taken = 0;
    for (position, range) in parts {
        let len = range.len();
        segments[position].1[range].copy_from_slice(&source[taken..taken + len]);
        taken += len;
    }
    Ok(taken)
}

/// An extent as a range of its segment, which has `segment_len` bytes if it is there.
fn range_in(
    operation: &'static str,
    extent: &Extent,
    segment_len: Option<usize>,
) -> Result<std::ops::Range<usize>, StoreError> {
    let Some(segment_len) = segment_len else {
        return Err(StoreError::invalid(
            "extent",
            format!("{operation}: segment {} is not among those given", extent.segment),
        ));
    };
    // Fields of an extent are public: one that was not built by `Extent::new` may reach outside or overflow.
    let inside = Extent::new(extent.segment, extent.offset, extent.len_bytes, segment_len as u64)?;
    let as_index = |value: u64| usize::try_from(value).map_err(|_| too_far(operation, value));
    let start = as_index(inside.offset)?;
    Ok(start..start + as_index(inside.len_bytes)?)
}

fn too_far(operation: &'static str, value: u64) -> StoreError {
    StoreError::invalid("extent", format!("{operation}: {value} is beyond this machine's address space"))
}

fn check_total(
    operation: &'static str,
    mut lengths: impl Iterator<Item = usize>,
    room: usize,
) -> Result<(), StoreError> {
    match lengths.try_fold(0_usize, usize::checked_add) {
        Some(total) if total <= room => Ok(()),
        total => Err(StoreError::invalid(
            "buffer",
            format!(
                "{operation}: the extents have {} bytes together, the buffer has {room}",
                total.map_or_else(|| "too many".to_owned(), |total| total.to_string())
            ),
        )),
    }
}

fn check_disjoint(extents: &[Extent]) -> Result<(), StoreError> {
    let mut sorted: Vec<&Extent> = extents.iter().filter(|extent| extent.len_bytes > 0).collect();
    sorted.sort_unstable_by_key(|extent| (extent.segment, extent.offset));
    for pair in sorted.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        if first.segment == second.segment && first.offset + first.len_bytes > second.offset {
            return Err(StoreError::invalid(
                "extents",
                format!(
                    "scatter: {} bytes at {} and {} bytes at {} of segment {} overlap",
                    first.len_bytes, first.offset, second.len_bytes, second.offset, first.segment
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hetmem_core::ErrorKind;

    use super::*;

    const A: SegmentId = SegmentId(1);
    const B: SegmentId = SegmentId(7);

    fn extent(segment: SegmentId, offset: u64, len_bytes: u64) -> Extent {
        Extent { segment, offset, len_bytes }
    }

    #[test]
    fn gather_keeps_the_order_and_scatter_puts_it_back() {
        let (a, b): (Vec<u8>, Vec<u8>) = ((0..100).collect(), (100..200).collect());
        let extents = [extent(B, 90, 10), extent(A, 0, 3), extent(B, 5, 0), extent(A, 97, 3)];
        let mut batch = [0xff; 20];
        let filled = gather(&[(A, &a), (B, &b)], &extents, &mut batch).expect("inside");
        assert_eq!(filled, 16);
        let expected: Vec<u8> = (190..200).chain(0..3).chain(97..100).chain([0xff; 4]).collect();
        assert_eq!(batch.as_slice(), expected);

        let (mut a2, mut b2) = (vec![0_u8; 100], vec![0_u8; 100]);
        let taken = scatter(&batch, &mut [(A, &mut a2), (B, &mut b2)], &extents).expect("inside");
        assert_eq!(taken, 16);
        for at in 0..100 {
            let in_a = !(3..97).contains(&at);
            assert_eq!(a2[at], if in_a { a[at] } else { 0 }, "byte {at} of A");
            assert_eq!(b2[at], if at >= 90 { b[at] } else { 0 }, "byte {at} of B");
        }
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let bytes = [1_u8; 16];
        let bad = [
            vec![extent(A, 0, 4), extent(A, 13, 4)],
            vec![extent(A, 0, 4), extent(A, u64::MAX, 2)],
            vec![extent(A, 0, 4), extent(B, 0, 1)],
            vec![extent(A, 0, 8), extent(A, 8, 8), extent(A, 0, 1)],
        ];
        for extents in bad {
            let mut target = [0_u8; 16];
            let error = gather(&[(A, &bytes)], &extents, &mut target).expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert_eq!(target, [0; 16], "{extents:?}");
            let error = scatter(&bytes, &mut [(A, &mut target)], &extents).expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert_eq!(target, [0; 16], "{extents:?}");
        }
    }

    #[test]
    fn scatter_refuses_overlaps_and_gather_does_not() {
        let bytes: Vec<u8> = (0..16).collect();
        let extents = [extent(A, 4, 4), extent(A, 0, 5)];
        let mut target = [0_u8; 9];
        assert_eq!(gather(&[(A, &bytes)], &extents, &mut target), Ok(9));
        assert_eq!(target, [4, 5, 6, 7, 0, 1, 2, 3, 4]);
        let mut segment = [0_u8; 16];
        let error = scatter(&bytes, &mut [(A, &mut segment)], &extents).expect_err("overlap");
        assert!(error.to_string().contains("overlap"), "{error}");
        assert_eq!(segment, [0; 16]);
    }

    #[test]
    fn no_extents_move_no_bytes() {
        assert_eq!(gather(&[], &[], &mut []), Ok(0));
        assert_eq!(scatter(&[], &mut [], &[]), Ok(0));
    }
}
