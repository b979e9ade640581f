//! Segments and what clients can do to them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use hetmem_core::{ErrorKind, SegmentId, checksum};
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};
use rustix::io::Errno;

use crate::mapping::{Access, Mapping};
use crate::{PageKind, PagePolicy, ReadMapping, Reserve, Segment, SegmentOwner, WriteMapping, memfd, os};

const LEN: u64 = 4 << 20;

fn segment(owner: SegmentOwner) -> Segment {
    Segment::create(SegmentId(1), LEN, owner, PagePolicy::Auto).expect("memory is left")
}

fn again(segment: &Segment) -> OwnedFd {
    segment.descriptor().try_clone_to_owned().expect("a descriptor is left")
}

/// The descriptor opened anew, as a process that holds it can.
fn reopened(segment: &Segment) -> Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd as _;
    let path = format!("/proc/self/fd/{}", segment.descriptor().as_raw_fd());
    rustix::fs::open(path, rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
}

#[test]
fn bytes_go_in_and_out_within_bounds() {
    let segment = segment(SegmentOwner::Node);
    let other =
        Segment::create(SegmentId(2), 100, SegmentOwner::Node, PagePolicy::Off).expect("memory is left");
    let bytes: Vec<u8> = (0..100).collect();
    segment.write(LEN - 100, &bytes).expect("inside");
    assert_eq!(segment.read(LEN - 100, 100).expect("inside"), bytes);
    assert_eq!(segment.write_with_checksum(8, &bytes).expect("inside"), checksum::of(&bytes));
    assert_eq!(segment.checksum(8, 100).expect("inside"), checksum::of(&bytes));
    other.copy_from(0, &segment, 8, 100).expect("inside");
    segment.copy_from(1000, &segment, 8, 100).expect("apart");
    let mut back = [0; 100];
    other.read_into(0, &mut back).expect("inside");
    assert_eq!(back[..], segment.read(1000, 100).expect("inside")[..]);
    assert_eq!(other.load_u64(8).expect("inside"), u64::from_ne_bytes([8, 9, 10, 11, 12, 13, 14, 15]));
    assert_eq!((segment.id(), segment.len_bytes(), other.pages()), (SegmentId(1), LEN, PageKind::Small));
    let errors = [
        segment.write(LEN - 99, &bytes).expect_err("outside"),
        segment.write(u64::MAX, &bytes).expect_err("outside"),
        segment.read(LEN, 1).expect_err("outside"),
        segment.read(u64::MAX - 1, 2).expect_err("outside"),
        segment.copy_from(0, &other, 1, 100).expect_err("outside"),
        segment.copy_from(0, &segment, 99, 100).expect_err("overlaps"),
        segment.load_u64(LEN).expect_err("outside"),
        segment.load_u64(4).expect_err("unaligned"),
        Segment::create(SegmentId(1), 0, SegmentOwner::Node, PagePolicy::Auto).expect_err("empty"),
    ];
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::Invalid), "{errors:?}");
    assert_eq!(segment.read(LEN, 0).expect("nothing of it"), []);
}

#[test]
fn nobody_but_the_node_writes_its_segments() {
    let segment = segment(SegmentOwner::Node);
    let error = WriteMapping::map(again(&segment), LEN).expect_err("closed to writers");
    assert_eq!(error.kind(), ErrorKind::Os, "{error}");
    closed(&segment);
    let view = ReadMapping::map(again(&segment), LEN).expect("readable");
    segment.write(10, b"tensor").expect("the node's own mapping stays writable");
    assert_eq!(view.bytes(10, 6), Some(&b"tensor"[..]));
    assert_eq!((view.bytes(LEN, 1), view.bytes(u64::MAX, 2)), (None, None));
    assert_eq!(view.bytes(LEN, 0), Some(&[][..]));
}

fn closed(segment: &Segment) {
    for file in [again(segment)].into_iter().chain(reopened(segment)) {
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&file, LEN * 2), Err(Errno::PERM));
        assert!(rustix::io::pwrite(&file, b"x", 0).is_err());
        assert!(fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096).is_err());
        assert!(Mapping::new(file.as_fd(), LEN, Access::Write).is_err());
        assert_eq!(fcntl_add_seals(&file, SealFlags::WRITE), Err(Errno::PERM));
    }
}

#[test]
fn a_granted_segment_is_written_by_one_client_and_read_by_all() {
    let segment = segment(SegmentOwner::Client);
    let view = Arc::new(WriteMapping::map(again(&segment), LEN).expect("granted"));
    segment.close_to_writers().expect("sealed");
    segment.close_to_writers().expect("sealed already");
    closed(&segment);
    assert_eq!(WriteMapping::map(again(&segment), LEN).expect_err("too late").kind(), ErrorKind::Os);

    view.fill(0, b"first").expect("inside");
    let large: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    assert_eq!(view.fill_with_checksum(4096, &large).expect("inside"), checksum::of(&large));
    let reader = ReadMapping::map(again(&segment), LEN).expect("readable");
    assert_eq!((reader.bytes(0, 5), reader.bytes(4096, 1 << 20)), (Some(&b"first"[..]), Some(&large[..])));
    assert_eq!(view.fill(LEN - 1, b"xx").expect_err("outside").kind(), ErrorKind::Invalid);
    assert_eq!(segment.read(0, 5).expect("inside"), b"first");
}

#[test]
fn extents_are_exclusive_and_outlive_the_view() {
    let segment = segment(SegmentOwner::Client);
    let view = Arc::new(WriteMapping::map(again(&segment), LEN).expect("granted"));
    let mut extent = view.extent_mut(64, 100).expect("free");
    for (offset, len) in [(64, 100), (0, 65), (163, 1), (100, 1)] {
        assert_eq!(view.extent_mut(offset, len).expect_err("taken").kind(), ErrorKind::Busy);
    }
    assert_eq!(view.fill(163, b"xx").expect_err("taken").kind(), ErrorKind::Busy);
    view.fill(0, &[1; 64]).expect("beside it");
    view.fill(164, &[1; 64]).expect("beside it");
    assert_eq!(view.extent_mut(LEN, 1).expect_err("outside").kind(), ErrorKind::Invalid);
    assert_eq!((extent.offset(), extent.len()), (64, 100));
    extent.fill(2);
    assert_eq!(extent.fill_with_checksum(90, &[3; 10]).expect("inside"), checksum::of(&[3; 10]));
    assert_eq!(extent.fill_with_checksum(91, &[3; 10]).expect_err("outside").kind(), ErrorKind::Invalid);
    assert_eq!(extent.fill_with_checksum(u64::MAX, &[3]).expect_err("outside").kind(), ErrorKind::Invalid);
    std::thread::spawn(move || {
        drop(view);
        extent[0] = 9;
    })
    .join()
    .expect("the mapping is there");
    let expected = [&[1; 64][..], &[9], &[2; 89], &[3; 10], &[1; 64]].concat();
    assert_eq!(segment.read(0, 228).expect("inside"), expected);
}

#[test]
fn threads_fill_disjoint_extents_at_a_time() {
    let segment = segment(SegmentOwner::Client);
    let view = WriteMapping::map(again(&segment), LEN).expect("granted");
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let view = &view;
            scope.spawn(move || {
                for block in (u64::from(thread)..LEN / 4096).step_by(8) {
                    view.fill(block * 4096, &[thread; 4096]).expect("nobody else's");
                }
            });
        }
    });
    let bytes = segment.read(0, LEN).expect("inside");
    assert!(
        bytes
            .chunks(4096)
            .zip((0..8).cycle())
            .all(|(block, thread)| block.iter().all(|byte| *byte == thread))
    );
}

#[test]
fn views_refuse_files_that_could_fault() {
    let unsealed = || memfd::create("segment", 8192, None).expect("a file");
    let error = ReadMapping::map(unsealed(), 8192).expect_err("could be truncated");
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    for seals in [SealFlags::SHRINK, SealFlags::GROW] {
        let fd = unsealed();
        memfd::seal(&fd, seals).expect("sealed");
        assert_eq!(WriteMapping::map(fd, 8192).expect_err("half sealed").kind(), ErrorKind::Protocol);
    }
    let sealed = || {
        let fd = unsealed();
        memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW).expect("sealed");
        fd
    };
    let error = ReadMapping::map(sealed(), 8193).expect_err("shorter than announced");
    assert!(error.to_string().contains("8193") && error.to_string().contains("8192"), "{error}");
    assert!(ReadMapping::map(sealed(), 0).is_err());
    assert!(ReadMapping::map(sealed(), u64::MAX).is_err());
    assert!(ReadMapping::map(sealed(), 8192).is_ok());
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    assert_eq!(ReadMapping::map(reader, 1).expect_err("a pipe").kind(), ErrorKind::Protocol);
}

#[test]
fn memory_that_is_wanted_at_once_is_populated_too() {
    let segment =
        Segment::create(SegmentId(3), LEN, SegmentOwner::Node, PagePolicy::AtOnce).expect("memory is left");
    let held = rustix::fs::fstat(segment.descriptor()).expect("a file").st_blocks * 512;
    assert_eq!(u64::try_from(held), Ok(LEN), "every page is there");
}

#[test]
fn a_segment_is_populated_and_on_the_pages_it_says() {
    for pages in [PagePolicy::Off, PagePolicy::Auto] {
        let segment =
            Segment::create(SegmentId(1), 8 << 20, SegmentOwner::Node, pages).expect("memory is left");
        let stat = rustix::fs::fstat(segment.descriptor()).expect("a file");
        assert!(stat.st_blocks * 512 >= 8 << 20, "all pages exist: {} blocks", stat.st_blocks);
        if pages == PagePolicy::Off {
            assert_eq!(segment.pages(), PageKind::Small);
        }
        let required = Segment::create(SegmentId(2), 8 << 20, SegmentOwner::Node, PagePolicy::Require);
        match (crate::pages_report().best, required) {
            (PageKind::Small, Err(error)) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
            (_, Ok(segment)) => assert_ne!(segment.pages(), PageKind::Small),
            // Free memory may be in pieces by now; the error then says what to do.
            (_, Err(error)) => assert!(error.to_string().contains("doctor"), "{error}"),
        }
    }
}

#[test]
fn a_reserve_gives_and_takes_memory() {
    let mut reserve = Reserve::new(8 << 20, PagePolicy::Off).expect("memory is left");
    assert_eq!(reserve.len_bytes(), 8 << 20);
    assert_eq!(reserve.held_bytes(), 8 << 20);
    reserve.take(LEN).expect("there");
    assert_eq!((reserve.len_bytes(), reserve.held_bytes()), (LEN, LEN));
    let segment = segment(SegmentOwner::Node);
    let error = reserve.take(LEN + 1).expect_err("more than there is");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("4194304"), "{error}");
    drop(segment);
    reserve.put_back(LEN).expect("memory is left");
    assert_eq!((reserve.len_bytes(), reserve.held_bytes()), (8 << 20, 8 << 20));
    reserve.take(8 << 20).expect("there");
    assert_eq!((reserve.len_bytes(), reserve.held_bytes()), (0, 0));
    assert_eq!(Reserve::new(0, PagePolicy::Auto).expect("nothing").len_bytes(), 0);
}

#[test]
fn more_memory_than_there_is_is_an_error_with_a_remedy() {
    for len_bytes in [1 << 46, u64::MAX] {
        let errors = [
            Segment::create(SegmentId(1), len_bytes, SegmentOwner::Node, PagePolicy::Auto)
                .expect_err("too much"),
            Reserve::new(len_bytes, PagePolicy::Auto).expect_err("too much"),
        ];
        for error in errors {
            assert!(matches!(error.kind(), ErrorKind::Os | ErrorKind::Invalid), "{error}");
        }
    }
    let error = Reserve::new(1 << 46, PagePolicy::Auto).expect_err("too much");
    assert!(error.to_string().contains("serve with less"), "{error}");
    let error = os::error("create shared memory", Errno::MFILE).to_string();
    assert!(error.contains("RLIMIT_NOFILE is ") && error.contains("ulimit -n"), "{error}");
}

#[test]
fn files_are_mapped_and_what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("weights.bin");
    std::fs::write(&path, b"weights").expect("written");
    assert_eq!(&crate::MappedFile::open(&path).expect("a file")[..], b"weights");
    std::fs::write(&path, b"").expect("written");
    assert_eq!(&crate::MappedFile::open(&path).expect("an empty file")[..], b"");
    for wrong in [folder.path().to_owned(), folder.path().join("missing")] {
        let error = crate::MappedFile::open(&wrong).expect_err("no file");
        assert!(error.to_string().contains(&wrong.display().to_string()), "{error}");
    }
}

#[test]
fn a_released_view_lets_go_of_the_memory_and_reads_zeros() {
    let segment = segment(SegmentOwner::Node);
    segment.write(0, &[7; 64]).expect("inside");
    let view = ReadMapping::map(again(&segment), LEN).expect("mapped");
    assert_eq!(view.bytes(0, 64), Some(&[7; 64][..]));
    view.release().expect("released");
    assert_eq!(view.bytes(0, 64), Some(&[0; 64][..]));
    assert_eq!(segment.read(0, 64).expect("inside"), [7; 64], "the node's memory is as it was");
}

/// Ray #14182: a store mapped more shared memory than there was, with pages to come when they were touched, and whoever
/// touched one too many got SIGBUS, long after the object had been promised. Here every page of a segment is there when
/// `create` returns, whatever kind it is, though nobody has written to it, nobody can take pages away again, and more
/// than there is is an error of `create`.
#[test]
fn plasma_14182_every_page_of_a_segment_is_there_before_it_is_handed_out() {
    for owner in [SegmentOwner::Node, SegmentOwner::Client] {
        for pages in [PagePolicy::Off, PagePolicy::Auto, PagePolicy::AtOnce] {
            let segment = Segment::create(SegmentId(1), LEN, owner, pages).expect("memory is left");
            let held =
                || rustix::fs::fstat(segment.descriptor()).expect("a file").st_blocks.unsigned_abs() * 512;
            assert!(held() >= LEN, "{owner:?}, {pages:?}: {} of {LEN} bytes", held());
            if owner == SegmentOwner::Client {
                segment.close_to_writers().expect("the seals are left");
            }
            closed(&segment);
            assert!(held() >= LEN, "{owner:?}, {pages:?}: {} bytes after all that", held());
        }
    }
    let error = Segment::create(SegmentId(1), 1 << 50, SegmentOwner::Node, PagePolicy::Off);
    assert_eq!(error.expect_err("a petabyte").kind(), ErrorKind::Os);
    assert_eq!(Reserve::new(1 << 50, PagePolicy::Off).expect_err("a petabyte").kind(), ErrorKind::Os);
}
