//! Where the workspace is and what it has, from `cargo metadata`. Not a copy of its manifests.
//! Invariant: all paths are absolute, and cargo runs in the root.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The workspace that this program belongs to.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    /// Where cargo puts what it builds.
    pub(crate) target: PathBuf,
    /// Whether the Python tests are to have torch, which is 2 GB to download.
    pub(crate) with_torch: bool,
    metadata: Value,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self, String> {
        let mut command = Command::new(cargo_program());
        command.args(["metadata", "--format-version", "1", "--no-deps"]);
        command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")));
        let output = command.output().map_err(|error| format!("cargo metadata: {error}"))?;
        if !output.status.success() {
            return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
        }
        let metadata: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))?;
        let path = |field: &str| metadata[field].as_str().map(PathBuf::from);
        match (path("workspace_root"), path("target_directory")) {
            (Some(root), Some(target)) => Ok(Self { root, target, with_torch: false, metadata }),
            _ => Err("cargo metadata: no workspace_root or target_directory in its answer".to_owned()),
        }
    }

    /// The same, with torch for the Python tests or without.
    pub(crate) fn with_torch(self, with_torch: bool) -> Self {
        Self { with_torch, ..self }
    }

    /// Whether a package has a program of this name.
    pub(crate) fn has_program(&self, package: &str, name: &str) -> bool {
        self.has_target(package, "bin", name)
    }

    /// Whether a package has a target of this kind (`bin`, `test`, ...) and name.
    pub(crate) fn has_target(&self, package: &str, kind: &str, name: &str) -> bool {
        let items = |value: &'_ Value, field: &str| value[field].as_array().cloned().unwrap_or_default();
        items(&self.metadata, "packages")
            .iter()
            .filter(|found| found["name"] == package)
            .flat_map(|found| items(found, "targets"))
            .any(|target| target["name"] == name && items(&target, "kind").contains(&Value::from(kind)))
    }

    /// Builds a package's test program of this name, or that of its library. Returns its path.
    pub(crate) fn test_program(&self, package: &str, name: Option<&str>) -> Result<PathBuf, String> {
        let mut command = self.cargo(["test", "--no-run", "--message-format", "json", "--package", package]);
        match name {
            Some(name) => command.args(["--test", name]),
            None => command.arg("--lib"),
        };
        let library = package.replace('-', "_");
        let name = name.unwrap_or(&library);
        let output = command.stderr(std::process::Stdio::inherit()).output();
        let output = output.map_err(|error| format!("cargo test --no-run: {error}"))?;
        let executables = String::from_utf8_lossy(&output.stdout);
        let executable = executables.lines().rev().find_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            (message["target"]["name"] == name).then(|| message["executable"].as_str().map(PathBuf::from))?
        });
        executable.ok_or_else(|| format!("cargo built no test program {name} of {package}"))
    }

    /// The same cargo that runs this program, in the root.
    pub(crate) fn cargo<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = Command::new(cargo_program());
        command.args(arguments).current_dir(&self.root);
        command
    }
}

fn cargo_program() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
