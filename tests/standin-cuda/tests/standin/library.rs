//! Where the built library is. Not its use. Invariant: built once per test process by the same cargo, in the tests' profile
//! and target folder, so that it is never older than its sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Tells children where the library is, so that only their parent builds it.
pub(crate) const VARIABLE: &str = "HETMEM_STANDIN_LIBRARY";

/// The path of the library.
pub(crate) fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| std::env::var_os(VARIABLE).map_or_else(build, PathBuf::from))
}

fn build() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    // target/PROFILE/deps/this
    let folder = own.ancestors().nth(2).expect("a folder of the profile");
    let (target, profile) =
        (folder.parent().expect("a target folder"), folder.file_name().expect("a profile"));
    let profile = if profile == "debug" { "test".as_ref() } else { profile };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", "hetmem-standin-cuda", "--profile"]).arg(profile);
    command.arg("--target-dir").arg(target).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder.join("libhetmem_standin_cuda.so")
}
