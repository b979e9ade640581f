//! Runs a test on a CUDA driver: a real one where `HETMEM_TEST_CUDA=real` says so, else the stand-in, in a process of its
//! own. Not a test. Invariant: a test body runs only where the driver is the one that was asked for, and a test that
//! cannot run there prints `skipped: why`.

#![allow(dead_code, clippy::print_stdout)]

pub(crate) mod hooks;
pub(crate) mod memory;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use hetmem_gpu_mem::{Device, Gpus, HostMemory, Memory, PinnedBuffer, Segment, Span, Stream};

/// The name of the test whose body this process runs.
const CHILD: &str = "HETMEM_TEST_CHILD";
const SWITCHES: [&str; 6] = ["DEVICES", "MEMORY", "WITHOUT", "LOG", "FAIL", "STALE"];
pub(crate) const MIB: u64 = 1 << 20;

/// Whether tests run on the GPUs of this machine.
pub(crate) fn is_real() -> bool {
    std::env::var("HETMEM_TEST_CUDA").is_ok_and(|value| value == "real")
}

/// The stand-in under the driver's names, in a folder of its own. No folder where tests run on a real driver: there may be
/// no cargo on that machine, and nobody looks into it.
pub(crate) fn library_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if is_real() {
        return Path::new("");
    }
    FOLDER.get_or_init(|| {
        let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = temporary.parent().expect("the target folder");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "-p", "hetmem-standin-cuda", "--target-dir"])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        let complaint = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "the stand-in does not build: {complaint}");
        let library = target.join("debug/libhetmem_standin_cuda.so");
        link_library(&library, &temporary.join("standin-cuda"));
        temporary.join("standin-cuda")
    })
}

/// Makes a folder in which a library has both names that cudarc looks for.
pub(crate) fn link_library(library: &Path, folder: &Path) {
    std::fs::create_dir_all(folder).expect("temporary folder");
    for name in ["libcuda.so", "libcuda.so.1"] {
        // Another test may be making it at the same time, to the same effect.
        let _ = std::os::unix::fs::symlink(library, folder.join(name));
        assert!(folder.join(name).exists(), "{name} in {}", folder.display());
    }
}

/// Runs `body` on a real driver, or on the stand-in in a process of its own.
pub(crate) fn on_gpu(name: &str, body: impl FnOnce(&Gpus)) {
    if !is_real() {
        return on_stand_in(name, &[], || body(&Gpus::open().expect("the stand-in")));
    }
    match Gpus::open() {
        Ok(gpus) => body(&gpus),
        Err(absent) => {
            let required = std::env::var("HETMEM_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|part| part == "gpu"), "{absent}");
            println!("skipped: {absent}");
        }
    }
}

/// Runs `body` on the stand-in with these switches (`FAIL` for `HETMEM_STANDIN_FAIL`), in a process of its own.
pub(crate) fn on_stand_in(name: &str, switches: &[(&str, &str)], body: impl FnOnce()) {
    if is_real() {
        println!("skipped: {name} is about the stand-in's switches");
        return;
    }
    if is_child(name) {
        return body();
    }
    run_again(name, library_folder(), switches, Stdio::null());
}

/// The same once for each set of switches.
pub(crate) fn on_each_stand_in(name: &str, sets: &[&[(&str, &str)]], body: impl FnOnce()) {
    match sets.split_last() {
        Some((last, others)) if !is_real() && !is_child(name) => {
            others.iter().for_each(|switches| run_again(name, library_folder(), switches, Stdio::null()));
            run_again(name, library_folder(), last, Stdio::null());
        }
        _ => on_stand_in(name, &[], body),
    }
}

/// Runs the test of this name, in this executable, in a process that finds this library.
pub(crate) fn run_again(name: &str, library_folder: &Path, switches: &[(&str, &str)], stdin: Stdio) {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    for switch in SWITCHES {
        command.env_remove(format!("HETMEM_STANDIN_{switch}"));
    }
    for (switch, value) in switches {
        command.env(format!("HETMEM_STANDIN_{switch}"), value);
    }
    command
        .args(["--exact", name, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(CHILD, name)
        .stdin(stdin);
    if !is_real() {
        command.env("LD_LIBRARY_PATH", library_folder);
    }
    let output = command.output().expect("this test runs again");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {switches:?}: {}\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("1 passed"), "{name} is no test here: {stdout}");
}

/// Whether this process is to run the body of a test in which it is the second process.
pub(crate) fn is_child(name: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|child| child == name)
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at.wrapping_mul(31) ^ (at >> 8)).to_le_bytes()[0].wrapping_add(seed);
    (0..len).map(byte).collect()
}

pub(crate) fn segment(device: &Device, len_bytes: u64) -> Arc<Segment> {
    Arc::new(device.create_segment(len_bytes).expect("a segment"))
}

/// Pinned memory that holds these bytes.
pub(crate) fn pinned(device: &Device, bytes: &[u8]) -> Arc<PinnedBuffer> {
    let buffer = PinnedBuffer::new(device, bytes.len() as u64).expect("pinned memory");
    buffer.write(0, bytes).expect("they fit");
    Arc::new(buffer)
}

pub(crate) fn on_device(segment: &Arc<Segment>, offset: u64, len: usize) -> Span {
    Span::new(Memory::Device(Arc::clone(segment)), offset, len as u64).expect("inside")
}

pub(crate) fn on_host(memory: &Arc<impl HostMemory + 'static>, offset: u64, len: usize) -> Span {
    let memory: Arc<dyn HostMemory> = Arc::clone(memory) as _;
    Span::new(Memory::Host(memory), offset, len as u64).expect("inside")
}

/// Puts bytes into a span of device memory, and waits.
pub(crate) fn fill(stream: &Stream, to: &Span, bytes: &[u8]) {
    let source = pinned(stream.device(), bytes);
    stream.copy(&on_host(&source, 0, bytes.len()), to).expect("accepted");
    stream.synchronize().expect("copied");
}

/// The bytes of a span of device memory.
pub(crate) fn bytes_of(stream: &Stream, from: &Span) -> Vec<u8> {
    let len = usize::try_from(from.len_bytes()).expect("a small test");
    let target = pinned(stream.device(), &vec![0xee; len]);
    stream.copy(from, &on_host(&target, 0, len)).expect("accepted");
    stream.synchronize().expect("copied");
    let mut bytes = vec![0; len];
    target.read(0, &mut bytes).expect("inside");
    bytes
}
