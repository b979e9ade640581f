//! The direction of dependency, read from `cargo metadata`: who may depend on whom, and which crate alone may touch a
//! driver, a mapping or a device. Not a check of code. Invariant: a crate that is not in `ALLOWED` fails the test,
//! so that a new one is placed on purpose.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Everything below the programs.
const LIBRARIES: &[&str] = &[
    "hetmem-core",
    "hetmem-host-mem",
    "hetmem-kernels",
    "hetmem-gpu-mem",
    "hetmem-transport",
    "hetmem-node",
    "hetmem-client",
    "hetmem-formats",
];

/// Every workspace crate, and the workspace crates that it may name, as a normal, build or dev dependency alike.
const ALLOWED: &[(&str, &[&str])] = &[
    ("hetmem-core", &[]),
    ("hetmem-host-mem", &["hetmem-core"]),
    ("hetmem-kernels", &["hetmem-core"]),
    ("hetmem-gpu-mem", &["hetmem-core", "hetmem-kernels"]),
    ("hetmem-transport", &["hetmem-core"]),
    ("hetmem-verbs", &["hetmem-transport"]),
    ("hetmem-node", &["hetmem-core", "hetmem-host-mem", "hetmem-gpu-mem", "hetmem-transport"]),
    ("hetmem-client", &["hetmem-core", "hetmem-host-mem", "hetmem-gpu-mem"]),
    ("hetmem-formats", &["hetmem-core"]),
    ("hetmem-cli", LIBRARIES),
    ("hetmem-python", LIBRARIES),
    ("hetmem-tests", LIBRARIES),
    // A test-only member: it runs kernels through their twins.
    ("hetmem-standin-cuda", &["hetmem-kernels"]),
    ("hetmem-benches", LIBRARIES),
    ("xtask", &[]),
];

/// Outside crates, and the one workspace crate that may name them.
const ONLY_UNDER: &[(&str, &str)] = &[
    ("cudarc", "hetmem-gpu-mem"),
    ("nvml-wrapper", "hetmem-gpu-mem"),
    ("nvml-wrapper-sys", "hetmem-gpu-mem"),
    ("memmap2", "hetmem-host-mem"),
    ("rdma-sys", "hetmem-verbs"),
];

/// What does I/O, reads a clock or logs, and so is not for the core.
const NOT_IN_CORE: &[&str] =
    &["tokio", "tracing", "log", "rustix", "libc", "mio", "socket2", "memmap2", "parking_lot"];

/// No feature decides what hardware is used.
const NOT_IN_FEATURES: &[&str] = &["cuda", "gpu", "nvml", "rdma", "verbs", "ibverbs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {complaint}");
    serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON")
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value[field].as_array().into_iter().flatten()
}

/// Everything in `metadata` that the tables above do not allow, one sentence each.
fn violations(metadata: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for package in items(metadata, "packages") {
        let name = text(package, "name");
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            found.push(format!("{name}: not in the table of tests/layering.rs: say what it may depend on"));
            continue;
        };
        for dependency in items(package, "dependencies") {
            let target = text(dependency, "name");
            let ships = dependency["kind"].as_str() != Some("dev");
            // A crate may name itself for its own tests, to switch a feature on.
            let itself = target == name && !ships;
            let inside = dependency["path"].is_string();
            if inside && !itself && !allowed.contains(&target) {
                found.push(format!("{name} depends on {target}: against the direction"));
            }
            if let Some((_, owner)) = ONLY_UNDER.iter().find(|(known, _)| *known == target)
                && *owner != name
            {
                found.push(format!("{name} depends on {target}: only {owner} may"));
            }
            if name == "hetmem-core" && ships && NOT_IN_CORE.contains(&target) {
                found.push(format!("{name} depends on {target}: the core has no I/O, no clock, no logging"));
            }
        }
        for feature in package["features"].as_object().into_iter().flatten() {
            if NOT_IN_FEATURES.iter().any(|word| feature.0.contains(word)) {
                found.push(format!("{name} has a feature {:?}: hardware is found at run time", feature.0));
            }
        }
    }
    found
}

/// The workspace's lints are taken over: a `[lints]` section with `workspace = true` and nothing else.
fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim);
    lines.any(|line| line == "[lints]") && lines.find(|line| !line.is_empty()) == Some("workspace = true")
}

#[test]
fn dependencies_point_downwards() {
    let found = violations(&metadata());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_crate_of_the_table_exists() {
    let metadata = metadata();
    let names: Vec<&str> = items(&metadata, "packages").map(|package| text(package, "name")).collect();
    for (name, _) in ALLOWED {
        assert!(names.contains(name), "{name} is in the table and not in the workspace");
    }
}

#[test]
fn every_crate_inherits_the_lints() {
    for package in items(&metadata(), "packages") {
        let path = text(package, "manifest_path");
        let manifest = std::fs::read_to_string(path).expect("cargo has read it");
        assert!(inherits_lints(&manifest), "{path}: no `[lints] workspace = true`");
    }
}

#[test]
fn the_core_forbids_unsafe() {
    let library = std::fs::read_to_string(root().join("core/src/lib.rs")).expect("the core's root");
    assert!(library.contains("#![forbid(unsafe_code)]"));
}

/// The check itself sees what it is for.
#[test]
fn wrong_dependencies_are_found() {
    let edge = |name: &str, target: &str, kind: Value, path: Value| {
        serde_json::json!({ "packages": [{
            "name": name,
            "features": {},
            "dependencies": [{ "name": target, "kind": kind, "path": path }],
        }]})
    };
    let (inside, outside) = (|| Value::from("somewhere"), || Value::Null);
    let wrong = [
        edge("hetmem-core", "hetmem-node", Value::Null, inside()),
        edge("hetmem-host-mem", "hetmem-transport", Value::Null, inside()),
        edge("hetmem-client", "hetmem-transport", "dev".into(), inside()),
        edge("hetmem-transport", "memmap2", Value::Null, outside()),
        edge("hetmem-node", "cudarc", "build".into(), outside()),
        edge("hetmem-core", "tokio", Value::Null, outside()),
        edge("hetmem-new", "serde", Value::Null, outside()),
        serde_json::json!({ "packages": [{ "name": "hetmem-cli", "features": { "with-cuda": [] } }]}),
    ];
    for metadata in wrong {
        assert_eq!(violations(&metadata).len(), 1, "{metadata}");
    }
    let right = edge("hetmem-node", "hetmem-transport", Value::Null, inside());
    assert_eq!(violations(&right), Vec::<String>::new());
    assert!(!inherits_lints("[lints]\n[lints.clippy]\n"));
    assert!(!inherits_lints("[package]\nname = \"x\"\n"));
}
