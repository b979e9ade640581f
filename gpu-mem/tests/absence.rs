//! No driver, and drivers that lack functions: `Gpus::open` gives a reason, and what is optional is an ability that is
//! absent. Not the probe's reasons (`probe.rs`). Invariant: each library is loaded in a process of its own.

#![allow(clippy::print_stdout)]

mod stand_in;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use hetmem_core::ErrorKind;
use hetmem_gpu_mem::Gpus;
use stand_in::{
    MIB, bytes_of, is_child, library_folder, link_library, on_device, on_host, pattern, pinned, segment,
};

/// A folder with a stand-in that lacks this function: its name is another in the library's table of names.
fn library_without(function: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("without-{function}"));
    std::fs::create_dir_all(&folder).expect("temporary folder");
    let mut library = std::fs::read(library_folder().join("libcuda.so")).expect("the stand-in");
    let name: Vec<u8> = std::iter::once(0).chain(function.bytes()).chain([0]).collect();
    let places: Vec<_> =
        library.windows(name.len()).enumerate().filter(|(_, part)| *part == name).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "the stand-in has no {function}");
    for at in places {
        library[at + 1] = b'x';
    }
    let file = folder.join("library.so");
    // Under a name of its own first: an older one may be loaded by somebody.
    let fresh = folder.join(format!("library.so.{}", std::process::id()));
    std::fs::write(&fresh, library).expect("temporary file");
    std::fs::rename(&fresh, &file).expect("temporary file");
    link_library(&file, &folder);
    folder
}

/// Runs the test's body on such a library.
fn without(name: &str, function: &str, body: impl FnOnce()) {
    if stand_in::is_real() {
        println!("skipped: {name} takes functions away from the stand-in");
    } else if is_child(name) {
        body();
    } else {
        run(name, &library_without(function));
    }
}

fn run(name: &str, folder: &Path) {
    stand_in::run_again(name, folder, &[], Stdio::null());
}

#[test]
fn without_a_driver_there_is_a_reason() {
    let name = "without_a_driver_there_is_a_reason";
    if stand_in::is_real() {
        println!("skipped: {name} is about a machine without a driver");
        return;
    }
    if !is_child(name) {
        return run(name, Path::new(env!("CARGO_TARGET_TMPDIR")));
    }
    match Gpus::open() {
        Err(absent) => {
            assert!(absent.why.contains("libcuda"), "{absent}");
            assert!(!absent.remedy.is_empty(), "{absent}");
        }
        // This machine has a driver on the loader's ordinary path.
        Ok(gpus) => assert!(!gpus.probe().devices.is_empty()),
    }
}

#[test]
fn a_required_function_that_is_missing_is_named() {
    without("a_required_function_that_is_missing_is_named", "cuMemCreate", || {
        let absent = Gpus::open().expect_err("it is required");
        assert!(absent.why.contains("no function cuMemCreate"), "{absent}");
        assert!(hetmem_gpu_mem::probe().driver.is_ok(), "the probe does not need it");
    });
}

#[test]
fn without_batch_copies_each_goes_by_itself() {
    without("without_batch_copies_each_goes_by_itself", "cuMemcpyBatchAsync", || {
        let gpus = Gpus::open().expect("the stand-in");
        let absent = gpus.batch_copies().expect_err("it is missing");
        assert!(absent.why.contains("cuMemcpyBatchAsync"), "{absent}");
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, MIB));
        let bytes = pattern(2000, 1);
        let source = pinned(&device, &bytes);
        let pairs = [0, 1000].map(|at| (on_host(&source, at, 1000), on_device(&memory, at, 1000)));
        stream.copy_many(&pairs).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, 2000)), bytes);
    });
}

#[test]
fn without_range_handles_there_is_no_dma_buf() {
    without("without_range_handles_there_is_no_dma_buf", "cuMemGetHandleForAddressRange", || {
        let gpus = Gpus::open().expect("the stand-in");
        let memory = segment(&gpus.device(0).expect("gpu:0"), MIB);
        let absent = memory.dma_buf().expect_err("it is missing");
        assert!(absent.why.contains("cuMemGetHandleForAddressRange"), "{absent}");
    });
}

#[test]
fn without_flushes_there_is_a_reason() {
    without("without_flushes_there_is_a_reason", "cuFlushGPUDirectRDMAWrites", || {
        let gpus = Gpus::open().expect("the stand-in");
        let absent = gpus.device(0).expect("gpu:0").flush_writes().expect_err("it is missing");
        assert_eq!(absent.kind(), ErrorKind::Unavailable);
        assert!(absent.to_string().contains("no such function"), "{absent}");
    });
}
