//! The checked-in PTX belongs to the sources beside it: their hash, the names in both, the version. Not what it does, and
//! not whether it is what the compiler makes: `cargo xtask kernels --check`. Invariant: a source that was changed
//! without its PTX fails here, on every machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hetmem_kernels::launch::TWINS;
use hetmem_kernels::ptx::MODULES;
use sha2::{Digest as _, Sha256};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

fn source(file: &str) -> String {
    std::fs::read_to_string(folder().join(file)).expect("a source")
}

/// What follows `word` and precedes a parenthesis, for each place where `word` stands.
fn names_after<'a>(text: &'a str, word: &str) -> BTreeSet<&'a str> {
    let places = text.split(word).skip(1);
    places.filter_map(|rest| rest.split_once('(')?.0.trim().rsplit([' ', '\t']).next()).collect()
}

#[test]
fn every_ptx_names_the_hash_of_its_source() {
    for module in MODULES {
        let hash = Sha256::digest(source("device.cuh") + &source(&format!("{}.cu", module.name)));
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let first = module.text.lines().next().expect("a line");
        let expected = format!("// cuda/device.cuh and cuda/{}.cu, sha256 {hash}", module.name);
        assert_eq!(first, expected, "the source has changed: run `cargo xtask kernels`");
    }
}

#[test]
fn kernels_have_one_name_in_source_ptx_and_twins() {
    let mut all = BTreeSet::new();
    for module in MODULES {
        let source = source(&format!("{}.cu", module.name));
        let listed: BTreeSet<&str> = module.entries.iter().copied().collect();
        assert_eq!(names_after(module.text, ".visible .entry"), listed, "{}.ptx", module.name);
        let mut written = names_after(&source, "__global__ void __launch_bounds__(THREADS)");
        written.extend(names_after(&source, "__launch_bounds__(THREADS, 8)"));
        written
            .extend(source.lines().filter_map(|line| Some(line.strip_prefix("CAST(")?.split_once(',')?.0)));
        written.remove("name");
        assert_eq!(written, listed, "{}.cu", module.name);
        all.extend(listed);
    }
    let twins: BTreeSet<&str> = TWINS.iter().map(|(name, _)| *name).collect();
    assert_eq!(all, twins);
    let entries: usize = MODULES.iter().map(|module| module.entries.len()).sum();
    assert_eq!((entries, TWINS.len()), (all.len(), all.len()), "no name twice");
}

#[test]
fn ptx_is_of_cuda_13_0_for_compute_capability_8_0_and_names_no_folder() {
    for module in MODULES {
        let has = |line: &str| module.text.lines().any(|found| found == line);
        assert!(has(".version 9.0") && has(".target sm_80") && has(".address_size 64"), "{}", module.name);
        assert!(module.text.is_ascii() && !module.text.contains('\0') && !module.text.contains(".file"));
    }
    let files = std::fs::read_dir(folder()).expect("sources");
    let names = files.map(|entry| entry.expect("a file").file_name().to_string_lossy().into_owned());
    let sources = names.filter(|name| name.ends_with(".cu")).count();
    assert_eq!(sources, MODULES.len(), "a source without a module");
}
