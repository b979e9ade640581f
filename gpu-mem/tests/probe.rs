//! The probe against this machine, and against stand-in libraries that are absent, broken, old or odd. Not a test of
//! a real GPU. Invariant: each library is loaded in a process of its own, because libcuda is never unloaded.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Barrier;

use hetmem_gpu_mem::probe;

/// The last word before a child's answer on its standard output.
const ANSWER: &str = "answer:";

/// Whatever this machine has, the probe answers and its parts agree. Also the child's side of the tests below.
#[test]
fn the_probe_answers() {
    let found = probe();
    if let Err(absent) = &found.driver {
        assert!(found.devices.is_empty(), "devices without a driver: {:?}", found.devices);
        assert!(!absent.why.is_empty() && !absent.remedy.is_empty(), "{absent:?}");
    } else {
        assert!(!found.devices.is_empty() || !found.unusable.is_empty());
    }
    if let Err(absent) = &found.nvml {
        assert!(!absent.why.is_empty() && !absent.remedy.is_empty(), "{absent:?}");
    }
    println!("{ANSWER} {found:?}");
}

#[test]
fn many_threads_get_one_answer() {
    let start = Barrier::new(8);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    probe()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a probe does not panic")).collect()
    });
    for answer in &answers {
        assert_eq!(answer.driver, answers[0].driver);
        assert_eq!(answer.devices, answers[0].devices);
    }
}

/// Builds a libcuda in a folder of its own. `None` without its source or a C compiler.
fn fake_libcuda(name: &str, defines: &[&str]) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_libcuda.c");
    if !source.exists() {
        println!("skipped: the source of the stand-in libcuda is not on this machine");
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("temporary folder");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"])
        // cudarc looks for this name first, so that a real driver elsewhere does not win.
        .arg(folder.join("libcuda.so"))
        .args(defines.iter().map(|define| format!("-D{define}")))
        .arg(source)
        .output();
    match built {
        Ok(output) => {
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "cc: {complaint}");
            Some(folder)
        }
        Err(error) => {
            println!("skipped: no C compiler to build a stand-in libcuda with ({error})");
            None
        }
    }
}

/// Runs [`the_probe_answers`] in a process that finds this libcuda.
fn probe_in_child(library_folder: &Path) -> String {
    let Output { status, stdout, stderr } = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "the_probe_answers", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", library_folder)
        .output()
        .expect("this test runs again");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{status}\n{stdout}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let answer = stdout.lines().find_map(|line| line.split_once(ANSWER));
    answer.expect("the child prints its answer").1.to_owned()
}

/// The child's answer must contain every one of these.
fn expect(name: &str, defines: &[&str], parts: &[&str]) {
    let Some(folder) = fake_libcuda(name, defines) else {
        return;
    };
    let answer = probe_in_child(&folder);
    for part in parts {
        assert!(answer.contains(part), "{name}: no {part:?} in {answer}");
    }
}

#[test]
fn a_stub_library_is_named() {
    let parts = ["driver: Err", "stub", "cuInit returned 34", "LD_LIBRARY_PATH"];
    expect("stub", &["INIT=34"], &parts);
}

#[test]
fn no_device_is_named() {
    let parts = ["driver: Err", "cuInit returned 100", "no CUDA-capable device is detected"];
    expect("no-device", &["INIT=100"], &parts);
    expect("zero-devices", &["COUNT=0"], &["driver: Err", "cuDeviceGetCount returned 100"]);
}

#[test]
fn a_missing_symbol_is_named() {
    expect("only-init", &["ONLY_INIT"], &["driver: Err", "no function cuDriverGetVersion"]);
}

#[test]
fn a_code_newer_than_the_bindings_is_a_number() {
    expect("new-code", &["INIT=4711"], &["driver: Err", "cuInit returned 4711"]);
}

#[test]
fn an_old_driver_is_named_with_both_versions() {
    let parts = ["driver: Err", "supports CUDA 11.4, CUDA 12.8 is needed", "570"];
    expect("old", &["VERSION=11040"], &parts);
}

#[test]
fn devices_describe_themselves_and_a_bad_one_spoils_nothing() {
    let parts = [
        "driver: Ok(DriverInfo { cuda_version: 12080 })",
        "ordinal: 0",
        "uuid: \"GPU-a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0\"",
        "compute_capability: (9, 0)",
        "memory_bytes: 85899345920",
        "pci_id: \"0000:3b:00.0\"",
        "virtual_memory: true",
        "dma_buf: false",
        "flush_writes_options: 3",
        "what: \"gpu:1\"",
        "cuDeviceTotalMem_v2 returned 9999",
    ];
    expect("two-devices", &[], &parts);
}
