//! The command line and GPU tiers, without a GPU: where there is none, and on the stand-in driver. Not the tiers themselves
//! (`tests/gpu.rs` at the root), nor speed. Invariant: no test here touches a real GPU.

#![allow(clippy::print_stdout)]

mod node;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use hetmem_client::{Checksum, Key, ObjectMeta, PutOptions, Reserved, Store, Tier};
use serde_json::Value;

use node::{Node, hetmem_in, safetensors_file, text};

type Environment = Vec<(&'static str, PathBuf)>;

/// An environment in which a real driver shows no device.
fn without_gpu() -> Environment {
    vec![("CUDA_VISIBLE_DEVICES", PathBuf::new())]
}

/// An environment in which libcuda is the stand-in; none where that cannot be built, which is said.
fn with_stand_in() -> Option<Environment> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOLDER.get_or_init(build_stand_in) {
        Ok(folder) => Some(vec![("LD_LIBRARY_PATH", folder.clone())]),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// Builds the stand-in beside this program, and makes a folder in which it has both names that are looked for.
fn build_stand_in() -> Result<PathBuf, String> {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = temporary.parent().ok_or("there is no target folder")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "-p", "hetmem-standin-cuda", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .map_err(|error| format!("the stand-in libcuda is not built: no cargo ({error})"))?;
    if !built.status.success() {
        return Err(format!("the stand-in libcuda is not built: {}", text(&built.stderr)));
    }
    let folder = temporary.join("stand-in-libcuda");
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    for name in ["libcuda.so", "libcuda.so.1"] {
        // Another process may be making it, to the same effect.
        let _ = symlink(target.join("debug/libhetmem_standin_cuda.so"), folder.join(name));
    }
    match folder.join("libcuda.so.1").exists() {
        true => Ok(folder),
        false => Err(format!("the stand-in libcuda is not in {}", folder.display())),
    }
}

fn with_gpus(environment: &Environment) -> Node {
    Node::start_in(environment, &["--host", "64MiB", "--gpu", "64MiB"])
}

/// The one receipt of a command.
fn receipt(done: &Value) -> (&str, &str, &str, u64, u64) {
    let [receipt] = done["receipts"].as_array().map(Vec::as_slice).unwrap_or_default() else {
        panic!("one receipt in {done}");
    };
    let place = |end: &str| receipt[end]["tier"].as_str().unwrap_or("caller");
    let number = |field: &str| receipt[field].as_u64().expect("a number");
    let path = receipt["path"].as_str().expect("a path");
    (path, place("from"), place("to"), number("bytes"), number("staged_bytes"))
}

#[test]
fn a_node_without_gpus_says_so() {
    let node = Node::start_in(&without_gpu(), &["--host", "64MiB", "--gpu", "off"]);
    let file = node.file("a.bin", &[7; 100_000]);
    let out = node.path("out.bin");
    let out = out.to_str().expect("UTF-8");
    for wrong in ["gpu", "cuda:0", "gpu:-1", "disk"] {
        let done = node.run(&["put", &file, "--tier", wrong]);
        assert_eq!(done.status.code(), Some(2));
        let said = text(&done.stderr);
        assert!(said.contains(wrong) && said.contains("neither host nor gpu:N"), "{said}");
    }
    let alone = node.run(&["get", "a.bin", "-o", out, "--or-host"]);
    assert_eq!(alone.status.code(), Some(2), "or-host says nothing without a tier");
    let said = node.refused(&["put", &file, "--tier", "gpu:0"], 4);
    assert!(said.contains("gpu:0") && said.contains("gpu = off"), "{said}");
    node.refused(&["stat", "a.bin"], 3);

    let put = node.json(&["put", &file, "--tier", "gpu:0", "--or-host", "--receipt"]);
    assert_eq!(receipt(&put), ("in place", "caller", "host", 100_000, 0));
    let said = node.refused(&["get", "a.bin", "-o", out, "--tier", "gpu:3"], 4);
    assert!(said.contains("gpu:3") && !Path::new(out).exists(), "{said}");
    for tier in [&["--tier", "host"][..], &["--tier", "gpu:0", "--or-host"]] {
        let got = node.json(&[&["get", "a.bin", "-o", out, "--receipt"], tier].concat());
        assert_eq!((receipt(&got).0, receipt(&got).2), ("local", "host"), "{got}");
        assert_eq!((&got["copied_back_bytes"], fs::read(out).expect("written").len()), (&0.into(), 100_000));
    }
}

#[test]
fn a_benchmark_of_gpus_needs_one() {
    let nowhere = Path::new("/nonexistent/node.sock");
    let done = hetmem_in(&without_gpu(), nowhere, &["bench", "gpu"]);
    assert_eq!(done.status.code(), Some(4));
    let said = text(&done.stderr);
    assert!(said.starts_with("hetmem: GPU is not available: "), "{said}");
    assert_eq!(hetmem_in(&without_gpu(), nowhere, &["bench", "gpu", "f.json"]).status.code(), Some(2));
}

#[test]
fn doctor_gives_a_reason_for_every_gpu_that_is_not_there() {
    let done = hetmem_in(&without_gpu(), Path::new("/nonexistent/node.sock"), &["doctor", "--json"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let checks: Value = serde_json::from_slice(&done.stdout).expect("JSON and nothing else");
    let check = |name: &str| {
        let mut all = checks.as_array().expect("rows").iter();
        all.find(|check| check["capability"] == name)
            .unwrap_or_else(|| panic!("no {name} in {checks}"))
            .clone()
    };
    let driver = check("GPU driver");
    assert_eq!(driver["available"], false);
    for name in ["GPU driver", "GPU kernel module", "GPU peer memory module", "NVML"] {
        let check = check(name);
        assert!(check["available"] == true || check["remedy"].is_string(), "{check}");
    }
}

#[test]
fn files_go_to_a_gpu_and_come_back() {
    let Some(environment) = with_stand_in() else { return };
    let node = with_gpus(&environment);
    // More than one piece, and not a whole number of them.
    let bytes: Vec<u8> = (0..=250).cycle().take((35 << 20) + 17).collect();
    let len = bytes.len() as u64;
    let large = node.file("large.bin", &bytes);
    let put = node.json(&["put", &large, "--tier", "gpu:0", "--receipt"]);
    assert_eq!(receipt(&put), ("copied", "caller", "gpu:0", len, len));
    assert_eq!(node.json(&["stat", "large.bin"])["tier"], "gpu:0");

    let out = node.path("out.bin");
    let out = out.to_str().expect("UTF-8");
    let there = node.json(&["get", "large.bin", "-o", out, "--tier", "gpu:0", "--receipt"]);
    assert_eq!(receipt(&there), ("local", "gpu:0", "gpu:0", 0, 0));
    assert_eq!(there["copied_back_bytes"], len);
    assert!(fs::read(out).expect("written") == bytes);
    let by_host = node.json(&["get", "large.bin", "-o", out, "--receipt"]);
    assert_eq!(receipt(&by_host), ("local copy", "gpu:0", "host", len, 0));
    assert_eq!(by_host["copied_back_bytes"], 0);
    assert!(fs::read(out).expect("written") == bytes);
    let other = node.run(&["get", "large.bin", "-o", "-", "--tier", "gpu:1", "--receipt"]);
    assert!(other.status.success() && other.stdout == bytes, "{}", text(&other.stderr));
    assert!(text(&other.stderr).contains("(gpu:0) to"), "{}", text(&other.stderr));

    let table = text(&node.run(&["ls", "--long"]).stdout);
    assert!(table.contains("tier here") && table.contains("gpu:0"), "{table}");
    let status = text(&node.run(&["status"]).stdout);
    let line = status.lines().find(|line| line.starts_with("gpu:0")).expect("a line for it").to_owned();
    assert!(line.contains("35.0 MiB") && line.contains("64.0 MiB") && line.contains("GPU memory"), "{line}");
}

#[test]
fn a_model_goes_to_a_gpu_and_comes_back() {
    let Some(environment) = with_stand_in() else { return };
    let node = with_gpus(&environment);
    let model = node.file("model.safetensors", &safetensors_file());
    node.json(&["put", &model, "--tier", "gpu:1"]);
    assert_eq!(node.json(&["stat", "model/b"])["tier"], "gpu:1");
    let untaken = text(&node.run(&["status"]).stdout);
    assert!(untaken.lines().any(|line| line.starts_with("gpu:0") && line.contains("none of it taken yet")));
    let out = node.path("back.safetensors");
    let got = node.json(&["get", "model", "-o", out.to_str().expect("UTF-8"), "--tier", "gpu:1"]);
    assert_eq!((&got["objects"], &got["copied_back_bytes"]), (&2.into(), &22.into()));
    assert_eq!(fs::read(out).expect("written"), safetensors_file());
    let out = node.path("a.npy");
    node.json(&["get", "model/a.weight", "-o", out.to_str().expect("UTF-8"), "--tier", "gpu:0"]);
    let npy = fs::read(out).expect("written");
    assert!(npy.starts_with(b"\x93NUMPY") && npy.ends_with(&(1..=16).collect::<Vec<u8>>()));
}

/// Puts bytes in a tier under a checksum of other bytes.
fn put_damaged(store: &Store, name: &str, tier: Tier) {
    let options = PutOptions { tier: Some(tier.into()), ..PutOptions::default() };
    let meta = ObjectMeta::bytes(100_000).expect("a length");
    let reserved = store.reserve(&Key::new(name).expect("a key"), meta, &options).expect("room");
    let Reserved::Open(mut reservation) = reserved else { panic!("{reserved:?}") };
    reservation.bytes_mut().fill(9);
    reservation.seal_with_checksum(Checksum::Xxh3Blocks(1)).expect("sealed");
}

#[test]
fn damaged_bytes_are_found_in_either_tier_before_anybody_has_them() {
    let Some(environment) = with_stand_in() else { return };
    let node = with_gpus(&environment);
    let store = Store::connect(Some(&node.path("node.sock"))).expect("the node");
    put_damaged(&store, "on-gpu", Tier::Gpu(0));
    put_damaged(&store, "on-host", Tier::Host);
    let out = node.path("out.bin");
    let out = out.to_str().expect("UTF-8");
    for (key, tier) in [("on-gpu", "gpu:0"), ("on-gpu", "host"), ("on-host", "host"), ("on-host", "gpu:1")] {
        let said = node.refused(&["get", key, "-o", out, "--tier", tier], 5);
        assert!(said.contains("0000000000000001") && !Path::new(out).exists(), "{key} in {tier}: {said}");
        let standard = node.run(&["get", key, "-o", "-", "--tier", tier]);
        assert_eq!((standard.status.code(), standard.stdout.len()), (Some(5), 0), "{key} in {tier}");
        node.json(&["get", key, "-o", out, "--tier", tier, "--no-verify"]);
        assert!(fs::read(out).expect("written") == [9; 100_000]);
        fs::remove_file(out).expect("written");
    }
    node.refused(&["get", "on-host", "-o", out, "--tier", "gpu:7", "--or-host"], 5);
}

#[test]
fn a_tier_that_is_not_there_or_full_is_named() {
    let Some(environment) = with_stand_in() else { return };
    let node = with_gpus(&environment);
    let small = node.file("small.bin", &[1; 200_000]);
    let said = node.refused(&["put", &small, "--tier", "gpu:7"], 4);
    assert!(said.contains("gpu:7") && said.contains("gpu:0, gpu:1"), "{said}");
    let large = node.file("large.bin", &vec![1; 40 << 20]);
    node.json(&["put", &large, "--tier", "gpu:0"]);
    let said = node.refused(&["put", &large, "--key", "second", "--tier", "gpu:0"], 1);
    assert!(said.contains("gpu:0"), "{said}");
    // A process that does not see the GPU is told so, and gets the object in host memory.
    let (socket, out) = (node.path("node.sock"), node.path("out.bin"));
    let out = out.to_str().expect("UTF-8");
    let blind = hetmem_in(&without_gpu(), &socket, &["get", "large.bin", "-o", out, "--tier", "gpu:0"]);
    assert_eq!(blind.status.code(), Some(4), "{}", text(&blind.stderr));
    for allowed in [&[][..], &["--tier", "gpu:0", "--or-host"]] {
        let line = [&["get", "large.bin", "-o", out][..], allowed].concat();
        let by_host = hetmem_in(&without_gpu(), &socket, &line);
        assert!(by_host.status.success(), "{}", text(&by_host.stderr));
        assert_eq!(fs::read(out).expect("written").len(), 40 << 20);
        fs::remove_file(out).expect("written");
    }
}

#[test]
fn doctor_tells_of_each_gpu_and_creates_no_context() {
    let Some(mut environment) = with_stand_in() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("calls");
    environment.push(("HETMEM_STANDIN_LOG", log.clone()));
    let done = hetmem_in(&environment, Path::new("/nonexistent/node.sock"), &["doctor", "--json"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let checks: Value = serde_json::from_slice(&done.stdout).expect("JSON and nothing else");
    let checks = checks.as_array().expect("rows");
    for ordinal in 0..2 {
        for what in [
            "",
            " as a tier",
            " reached by NICs",
            " attributes",
            " order of NICs' writes",
            " BAR1",
            " PCIe link",
            " NUMA node",
            " NVLink",
            " whole (no MIG)",
            " peers",
            " distance to NICs",
        ] {
            let name = format!("gpu:{ordinal}{what}");
            let check = checks.iter().find(|check| check["capability"] == name.as_str());
            let check = check.unwrap_or_else(|| panic!("no {name} in {checks:?}"));
            assert!(!check["why"].as_str().unwrap_or_default().is_empty(), "{check}");
            assert!(check["available"] == true || check["remedy"].is_string(), "{check}");
        }
    }
    let calls = fs::read_to_string(log).expect("what the driver was called for");
    assert!(calls.contains("cuInit") && !calls.contains("cuDevicePrimaryCtxRetain"), "{calls}");
}

#[test]
fn figures_of_a_stand_in_are_marked_and_not_kept() {
    let Some(environment) = with_stand_in() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("gpu.json");
    let file_text = file.to_str().expect("UTF-8");
    let nowhere = Path::new("/nonexistent/node.sock");
    let refused = hetmem_in(&environment, nowhere, &["bench", "gpu", "--json", file_text]);
    assert_eq!(refused.status.code(), Some(4));
    assert!(text(&refused.stderr).contains("stand-in: figures mean nothing"), "{}", text(&refused.stderr));
    let line = ["bench", "gpu", "--json", file_text, "--stand-in", "--up-to", "1MiB"];
    let done = hetmem_in(&environment, nowhere, &line);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let table = text(&done.stdout);
    let rows: Vec<&str> = table.lines().skip(1).take_while(|line| !line.is_empty()).collect();
    assert!(rows.iter().all(|row| row.starts_with("gpu (stand-in: means nothing)")), "{table}");
    for op in ["host to GPU", "GPU to host", "get and release, another process", "register host memory"] {
        assert!(rows.iter().any(|row| row.contains(op)), "no {op} in {table}");
    }
    assert!(!file.exists());
    let done = hetmem_in(&environment, nowhere, &["bench", "gpu", "--json", "--stand-in", "--up-to", "4KiB"]);
    let told: Value = serde_json::from_slice(&done.stdout).expect("JSON and nothing else");
    assert_eq!((&told["stand_in"], &told["probe"]["devices"][0]["ordinal"]), (&true.into(), &0.into()));
}
