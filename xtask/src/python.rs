//! A Python of our own for the interchange tests: a virtual environment in the target folder. Not the user's Python,
//! which is never changed. Invariant: what is returned can import every package that was asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, succeeds};

/// The interpreter of an environment with these packages, made if it is not there. `Err` says why it cannot be.
pub(crate) fn with_packages(target: &Path, packages: &[&str]) -> Result<PathBuf, String> {
    let folder = target.join("xtask-python");
    let interpreter = folder.join("bin/python3");
    let imports = format!("import {}", packages.join(", "));
    let complete = || succeeds(Command::new(&interpreter).args(["-c", &imports]));
    if complete() {
        return Ok(interpreter);
    }
    if !succeeds(Command::new("python3").arg("--version")) {
        return Err("python3 is not installed".to_owned());
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder)).map_err(|why| {
        format!("no virtual environment can be made (on Debian: apt install python3-venv): {why}")
    })?;
    let mut pip = Command::new(&interpreter);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    run(pip.args(packages))
        .map_err(|why| format!("pip cannot install {} (no network?): {why}", packages.join(" and ")))?;
    if complete() {
        Ok(interpreter)
    } else {
        Err(format!("pip installed {}, but Python cannot import it", packages.join(" and ")))
    }
}
