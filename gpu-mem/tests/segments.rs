//! Segments: made, exported to another process and to NICs, imported, torn down, and what is left when the driver refuses
//! a step. Not copies (`copies.rs`). Invariant: each test runs on a real driver too where it is not about the stand-in's
//! switches.

#![allow(clippy::print_stdout)]

mod stand_in;

use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::Arc;

use hetmem_core::{ErrorKind, StoreError, Tier};
use hetmem_gpu_mem::{AccessRights, Gpus, Memory, Span};
use rustix::fs::SeekFrom;
use stand_in::{
    MIB, bytes_of, fill, hooks, is_child, library_folder, on_device, on_each_stand_in, on_gpu, on_stand_in,
    pattern, pinned, run_again, segment,
};

const SHARED_BYTES: u64 = 4 * MIB;
const LEN: usize = 70_001;

#[test]
fn opening_makes_no_context_and_a_device_only_its_own() {
    on_stand_in("opening_makes_no_context_and_a_device_only_its_own", &[], || {
        let gpus = Gpus::open().expect("the stand-in");
        assert_eq!(hooks::calls("cuDevicePrimaryCtxRetain"), Some(0));
        let one = gpus.device(1).expect("gpu:1");
        let clone = gpus.device(1).expect("gpu:1");
        assert_eq!(hooks::calls("cuDevicePrimaryCtxRetain"), Some(1));
        assert_eq!((one.ordinal(), hooks::live()), (1, Some(1)));
        let memory = one.create_segment(1).expect("a segment");
        drop((one, clone));
        assert_eq!(hooks::calls("cuDevicePrimaryCtxRelease_v2"), Some(0), "the segment holds the context");
        drop(memory);
        assert_eq!(hooks::calls("cuDevicePrimaryCtxRelease_v2"), Some(1));
        hooks::assert_nothing_left("the last of the device");
        assert!(gpus.device(1).is_ok(), "and it can be had again");
    });
}

#[test]
fn a_device_that_is_not_there_is_named() {
    on_gpu("a_device_that_is_not_there_is_named", |gpus| {
        let absent = gpus.device(999).expect_err("no such device");
        assert!(
            absent.kind() == ErrorKind::Unavailable && absent.to_string().contains("gpu:999"),
            "{absent}"
        );
    });
}

#[test]
fn a_segment_is_whole_granules_of_its_device() {
    on_gpu("a_segment_is_whole_granules_of_its_device", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let granularity = device.granularity_bytes().expect("a granularity");
        let before = device.memory().expect("an answer");
        assert!(before.free_bytes <= before.total_bytes);
        let memory = segment(&device, granularity + 1);
        assert_eq!(memory.len_bytes(), 2 * granularity);
        assert_eq!(memory.address() % 512, 0);
        let stream = device.stream().expect("a stream");
        let last = on_device(&memory, memory.len_bytes() - 3, 3);
        fill(&stream, &last, &[1, 2, 3]);
        assert_eq!(bytes_of(&stream, &last), [1, 2, 3]);
        assert_eq!(device.create_segment(0).expect_err("nothing").kind(), ErrorKind::Invalid);
        let auto = device.capacity_auto_bytes().expect("an answer");
        assert!(auto % granularity == 0 && auto < before.free_bytes, "{auto}");
    });
}

#[test]
fn auto_leaves_the_reserve() {
    on_stand_in("auto_leaves_the_reserve", &[("MEMORY", "1073741824")], || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        assert_eq!(device.capacity_auto_bytes().expect("an answer"), 512 * MIB);
        let _taken = segment(&device, 100 * MIB);
        assert_eq!(device.capacity_auto_bytes().expect("an answer"), 412 * MIB);
    });
}

#[test]
fn a_full_device_is_a_full_tier() {
    on_gpu("a_full_device_is_a_full_tier", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let granularity = device.granularity_bytes().expect("a granularity");
        let memory = device.memory().expect("an answer");
        let wanted = (memory.total_bytes + granularity).next_multiple_of(granularity);
        match device.create_segment(wanted).expect_err("more than there is") {
            StoreError::NoSpace { tier, requested, free, .. } => {
                assert_eq!((tier, requested), (Tier::Gpu(0), wanted));
                assert!(free > 0 && free <= memory.total_bytes);
            }
            error => panic!("{error}"),
        }
        assert!(device.create_segment(granularity).is_ok(), "and less of it can still be had");
        drop(device);
        hooks::assert_nothing_left("the refusal");
    });
}

#[test]
fn two_processes_share_a_segment() {
    on_gpu("two_processes_share_a_segment", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, SHARED_BYTES));
        assert_eq!(memory.len_bytes(), SHARED_BYTES);
        fill(&stream, &on_device(&memory, 11, LEN), &pattern(LEN, 1));
        let descriptor = memory.descriptor().try_clone_to_owned().expect("a descriptor");
        run_again("the_other_process", library_folder(), &[], Stdio::from(descriptor));
        assert_eq!(bytes_of(&stream, &on_device(&memory, MIB, LEN)), pattern(LEN, 2));
        drop((stream, memory, device));
        hooks::assert_nothing_left("sharing");
    });
}

/// Reads what the first process has written, and writes what it will read.
#[test]
fn the_other_process() {
    if !is_child("the_other_process") {
        println!("skipped: it is the second process of two_processes_share_a_segment");
        return;
    }
    let gpus = Gpus::open().expect("a driver");
    let device = gpus.device(0).expect("gpu:0");
    let stdin = std::io::stdin();
    let stream = device.stream().expect("a stream");
    let reader =
        device.import_segment(stdin.as_fd(), SHARED_BYTES, AccessRights::ReadOnly).expect("imported");
    let reader = Arc::new(reader);
    assert_eq!((reader.len_bytes(), reader.device().ordinal()), (SHARED_BYTES, 0));
    let of = |memory, offset| Span::new(memory, offset, LEN as u64).expect("inside");
    assert_eq!(bytes_of(&stream, &of(Memory::Imported(Arc::clone(&reader)), 11)), pattern(LEN, 1));
    let source = pinned(&device, &pattern(LEN, 2));
    let source = Span::new(Memory::Host(source), 0, LEN as u64).expect("inside");
    if reader.rights() == AccessRights::ReadOnly {
        let refused = stream.copy(&source, &of(Memory::Imported(reader), MIB));
        assert_eq!(refused.expect_err("read-only").kind(), ErrorKind::Denied);
    }
    let writer =
        device.import_segment(stdin.as_fd(), SHARED_BYTES, AccessRights::ReadWrite).expect("imported");
    let writer = Arc::new(writer);
    assert_eq!(writer.rights(), AccessRights::ReadWrite);
    stream.copy(&source, &of(Memory::Imported(Arc::clone(&writer)), MIB)).expect("accepted");
    stream.synchronize().expect("copied");
    drop((source, writer, stream, device));
    hooks::assert_nothing_left("the second process");
}

/// A driver without read-only mappings is asked once per device; readers then have all rights, and it shows.
#[test]
fn refused_read_only_rights_show() {
    on_stand_in("refused_read_only_rights_show", &[("WITHOUT", "read-only")], || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let import = || {
            let before = hooks::calls("cuMemSetAccess").expect("the stand-in counts");
            let wanted = AccessRights::ReadOnly;
            let imported = device.import_segment(memory.descriptor(), memory.len_bytes(), wanted);
            assert_eq!(imported.expect("imported").rights(), AccessRights::ReadWrite);
            hooks::calls("cuMemSetAccess").expect("the stand-in counts") - before
        };
        assert_eq!((import(), import()), (2, 1));
    });
}

#[test]
fn what_is_no_segment_is_not_imported() {
    on_gpu("what_is_no_segment_is_not_imported", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let file = std::fs::File::open("/dev/null").expect("a descriptor of something else");
        let refused = device.import_segment(&file, SHARED_BYTES, AccessRights::ReadWrite);
        let refused = refused.expect_err("no segment");
        assert!(refused.to_string().contains("cuMemImportFromShareableHandle"), "{refused}");
        let (fd, len) = (memory.descriptor(), memory.len_bytes());
        for wrong in [0, 2 * len, len + 1] {
            let refused = device.import_segment(fd, wrong, AccessRights::ReadWrite);
            assert!(refused.is_err(), "{wrong} bytes of a segment of {len}");
        }
        assert!(device.import_segment(fd, len, AccessRights::ReadWrite).is_ok());
        drop((memory, device));
        hooks::assert_nothing_left("the refusals");
    });
}

#[test]
fn a_dma_buf_is_exported_once_or_has_a_reason() {
    on_gpu("a_dma_buf_is_exported_once_or_has_a_reason", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 2 * MIB);
        match memory.dma_buf() {
            Ok((fd, offset)) => {
                assert_eq!(offset, 0);
                assert!(rustix::fs::seek(fd, SeekFrom::End(0)).expect("its length") >= memory.len_bytes());
                let flags = rustix::io::fcntl_getfd(fd).expect("its flags");
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
                let again = memory.dma_buf().expect("exported");
                assert_eq!(std::os::fd::AsRawFd::as_raw_fd(&fd), std::os::fd::AsRawFd::as_raw_fd(&again.0));
            }
            Err(absent) => {
                println!("no dma-buf here: {absent}");
                assert!(stand_in::is_real() && !absent.remedy.is_empty());
            }
        }
    });
}

#[test]
fn without_dma_buf_there_is_a_reason() {
    let name = "without_dma_buf_there_is_a_reason";
    let sets: [&[(&str, &str)]; 3] = [
        &[("WITHOUT", "dma-buf")],
        &[("WITHOUT", "rdma-vmm")],
        &[("FAIL", "cuMemGetHandleForAddressRange=NOT_SUPPORTED")],
    ];
    on_each_stand_in(name, &sets, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 2 * MIB);
        let absent = memory.dma_buf().expect_err("none").clone();
        assert!(absent.remedy.contains("nvidia-peermem"), "{absent}");
        assert_eq!(memory.dma_buf().expect_err("none"), &absent);
        assert_eq!(memory.is_rdma_capable(), device.info().attributes.gpudirect_rdma_with_virtual_memory);
    });
}

#[test]
fn devices_that_cannot_have_segments_say_so() {
    let name = "devices_that_cannot_have_segments_say_so";
    on_each_stand_in(name, &[&[("WITHOUT", "vmm")], &[("WITHOUT", "posix-fd")]], || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let absent = device.create_segment(MIB).expect_err("no segments");
        assert_eq!(absent.kind(), ErrorKind::Unavailable);
        assert!(absent.to_string().contains("gpu:0"), "{absent}");
    });
}

/// Whichever call on the way to a segment fails, nothing is left behind.
#[test]
fn a_segment_that_cannot_be_made_leaves_nothing() {
    let sets: [&[(&str, &str)]; 8] = [
        &[("FAIL", "cuMemGetAllocationGranularity=999")],
        &[("FAIL", "cuMemCreate=999")],
        &[("FAIL", "cuMemCreate=OUT_OF_MEMORY")],
        &[("FAIL", "cuMemAddressReserve=OUT_OF_MEMORY")],
        &[("FAIL", "cuMemMap=999")],
        &[("FAIL", "cuMemSetAccess=999")],
        &[("FAIL", "cuMemExportToShareableHandle=999")],
        &[("FAIL", "cuCtxPushCurrent_v2=201@2")],
    ];
    on_each_stand_in("a_segment_that_cannot_be_made_leaves_nothing", &sets, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let before = hooks::live();
        let error = device.create_segment(4 * MIB).expect_err("a call fails");
        assert!(error.to_string().contains("GPU segment"), "{error}");
        assert_eq!(hooks::live(), before, "left after {error}");
        assert_eq!(device.memory().expect("an answer").free_bytes, 1 << 30);
        drop(device);
        hooks::assert_nothing_left("the failure");
    });
}

/// The same for an import. The first of each call is the segment's own.
#[test]
fn an_import_that_fails_leaves_nothing() {
    let sets: [&[(&str, &str)]; 4] = [
        &[("FAIL", "cuMemImportFromShareableHandle=999")],
        &[("FAIL", "cuMemAddressReserve=999@2")],
        &[("FAIL", "cuMemMap=INVALID_VALUE@2")],
        &[("FAIL", "cuMemSetAccess=999@2")],
    ];
    on_each_stand_in("an_import_that_fails_leaves_nothing", &sets, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let before = hooks::live();
        let import =
            || device.import_segment(memory.descriptor(), memory.len_bytes(), AccessRights::ReadOnly);
        let error = import().expect_err("a call fails");
        assert_eq!(hooks::live(), before, "left after {error}");
        drop((memory, device));
        hooks::assert_nothing_left("the failure");
    });
}

/// Peers that the driver refuses cost their direct access, not the segment.
#[test]
fn a_refused_peer_costs_its_access_only() {
    on_stand_in("a_refused_peer_costs_its_access_only", &[("FAIL", "cuMemSetAccess=217@1")], || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        assert_eq!(device.info().peers, [1]);
        assert!(segment(&device, MIB).peers().is_empty());
        assert_eq!(segment(&device, MIB).peers(), [1]);
    });
}

#[test]
fn a_device_without_a_context_is_unavailable() {
    on_stand_in(
        "a_device_without_a_context_is_unavailable",
        &[("FAIL", "cuDevicePrimaryCtxRetain=46@1")],
        || {
            let gpus = Gpus::open().expect("the stand-in");
            let absent = gpus.device(0).expect_err("no context");
            assert_eq!(absent.kind(), ErrorKind::Unavailable);
            assert!(absent.to_string().contains("cuDevicePrimaryCtxRetain returned 46"), "{absent}");
            assert!(gpus.device(0).is_ok());
        },
    );
}

#[test]
fn teardown_goes_step_by_step() {
    on_gpu("teardown_goes_step_by_step", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 2 * MIB);
        let span = on_device(&memory, 0, 8);
        let registered = memory.register().expect("in service");
        let weak = Arc::downgrade(&memory);
        let stopped = memory.stop_grants();
        let late = weak.upgrade().expect("it lives");
        let refused = Span::new(Memory::Device(Arc::clone(&late)), 0, 8);
        assert_eq!(refused.expect_err("no new spans").kind(), ErrorKind::Stale);
        assert_eq!(late.register().expect_err("nor registrations").kind(), ErrorKind::Stale);
        drop(late);
        let stopped = stopped.drained().expect_err("a span lives");
        drop(span);
        let drained = stopped.drained().expect("only the registration lives");
        let drained = drained.deregistered().expect_err("a registration lives");
        assert_eq!(registered.segment().len_bytes(), 2 * MIB);
        drop(registered);
        let deregistered = drained.deregistered().expect("nobody holds it");
        assert_eq!(deregistered.len_bytes(), 2 * MIB);
        drop((deregistered, device));
        hooks::assert_nothing_left("teardown");
    });
}

/// What a NIC writes into the dma-buf is seen by copies once it was flushed.
#[test]
fn a_flush_makes_a_nics_writes_visible() {
    on_stand_in("a_flush_makes_a_nics_writes_visible", &[("STALE", "1")], || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let place = on_device(&memory, 4096, 4);
        let (fd, _) = memory.dma_buf().expect("exported");
        fill(&stream, &place, &[1; 4]);
        assert_eq!(rustix::io::pwrite(fd, &[2; 4], 4096).expect("the NIC writes"), 4);
        assert_eq!(bytes_of(&stream, &place), [1; 4], "not flushed yet");
        device.flush_writes().expect("flushed");
        assert_eq!(bytes_of(&stream, &place), [2; 4]);
    });
}

#[test]
fn a_flush_that_fails_has_a_reason() {
    let switches = [("FAIL", "cuFlushGPUDirectRDMAWrites=NOT_SUPPORTED")];
    on_stand_in("a_flush_that_fails_has_a_reason", &switches, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let absent = device.flush_writes().expect_err("refused");
        assert!(absent.kind() == ErrorKind::Unavailable && absent.to_string().contains("801"), "{absent}");
    });
}
