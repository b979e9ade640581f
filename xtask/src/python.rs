//! Pythons of our own, in virtual environments in the target folder, and what is run in them: the wheel's tests and
//! examples. Not the user's Python, which is never changed. Invariant: what is returned can import every package that was
//! asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, run_counting, succeeds};
use crate::steps::release_binary;
use crate::tally::{Report, Tally};
use crate::workspace::Workspace;

/// Packages of the wheel's tests and examples, by the names that Python imports them under.
const TEST_PACKAGES: [&str; 8] =
    ["maturin", "numpy", "ml_dtypes", "jax", "pytest", "hypothesis", "sklearn", "safetensors"];

/// Where a package has another name at the index than in Python.
const INDEX_NAMES: [(&str, &str); 1] = [("sklearn", "scikit-learn")];

/// What the wheel must not load when it is imported, in an environment that has nothing else.
const BARE_IMPORT: &str = "
import hetmem, sys, time
store = hetmem.local(host='16MiB', gpu='off', max_objects=1024)
store.put('x', b'bytes')
assert bytes(store.get('x')) == b'bytes'
store.close()
assert not {'numpy', 'torch', 'jax'} & set(sys.modules)
";

/// The interpreter of an environment in `folder` with these packages, made if it is not there. `Err` says why it cannot
/// be.
pub(crate) fn with_packages(folder: &Path, packages: &[&str]) -> Result<PathBuf, String> {
    let interpreter = folder.join("bin/python3");
    let imports = format!("import {}", packages.join(", "));
    let complete = || succeeds(Command::new(&interpreter).args(["-c", &imports]));
    if complete() {
        return Ok(interpreter);
    }
    if !succeeds(Command::new(&interpreter).args(["-m", "pip", "--version"])) {
        environment(folder)?;
    }
    let mut pip = Command::new(&interpreter);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    let names = packages.iter().map(|package| {
        INDEX_NAMES.iter().find(|(import, _)| import == package).map_or(*package, |(_, name)| *name)
    });
    run(pip.args(names))
        .map_err(|why| format!("pip cannot install {} (no network?): {why}", packages.join(" and ")))?;
    if complete() {
        Ok(interpreter)
    } else {
        Err(format!("pip installed {}, but Python cannot import it", packages.join(" and ")))
    }
}

/// Makes a virtual environment, empty.
fn environment(folder: &Path) -> Result<(), String> {
    if !succeeds(Command::new("python3").arg("--version")) {
        return Err("python3 is not installed".to_owned());
    }
    let make = || run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder));
    make()
        // Debian has the module in a package of its own, which root may add.
        .or_else(|why| install_venv().map_err(|_| why).and_then(|()| make()))
        .map_err(|why| {
            format!("no virtual environment can be made (on Debian: apt install python3-venv): {why}")
        })
}

fn install_venv() -> Result<(), String> {
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.args(["-qq", "-o", "DPkg::Lock::Timeout=300"]).env("DEBIAN_FRONTEND", "noninteractive");
        run(apt.args(arguments))
    };
    apt(&["update"])?;
    apt(&["-y", "install", "--no-install-recommends", "python3-venv"])
}

/// Builds the wheel, tries it where there is nothing else, and runs its tests and examples.
pub(crate) fn step(workspace: &Workspace) -> Report {
    let mut packages = TEST_PACKAGES.to_vec();
    let mut name = "xtask-wheel";
    if workspace.with_torch {
        packages.push("torch");
        name = "xtask-wheel-torch";
    }
    let interpreter = match with_packages(&workspace.target.join(name), &packages) {
        Ok(interpreter) => interpreter,
        Err(why) => return Report::skipped(why),
    };
    match wheel(workspace, &interpreter).and_then(|wheel| bare(workspace, &wheel).map(|()| wheel)) {
        Ok(wheel) => tests(workspace, &interpreter, &wheel),
        Err(why) => Report::failed(why),
    }
}

/// Builds the wheel as it is released. Returns its path.
fn wheel(workspace: &Workspace, interpreter: &Path) -> Result<PathBuf, String> {
    // The command-line tool goes into the wheel as a program: maturin takes what lies in this folder.
    let scripts = workspace.root.join("python/hetmem.data/scripts");
    let binary = release_binary(workspace)?;
    std::fs::create_dir_all(&scripts)
        .and_then(|()| std::fs::copy(binary, scripts.join("hetmem")))
        .map_err(|error| format!("{}: {error}", scripts.display()))?;
    // Six times smaller without the lines of its sources; where there is no strip it works as well.
    let _ = succeeds(Command::new("strip").arg(scripts.join("hetmem")));
    let folder = workspace.target.join("wheels");
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let mut build = Command::new(interpreter);
    build.args(["-m", "maturin", "build", "--release", "--quiet", "--manifest-path"]);
    build.arg(workspace.root.join("python/Cargo.toml")).arg("--out").arg(&folder);
    run(build.arg("--interpreter").arg(interpreter).current_dir(&workspace.root))?;
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let wheel =
        entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "whl"));
    wheel.ok_or_else(|| format!("maturin left no wheel in {}", folder.display()))
}

/// Installs the wheel where there is nothing else, and uses it.
fn bare(workspace: &Workspace, wheel: &Path) -> Result<(), String> {
    let folder = workspace.target.join("xtask-wheel-bare");
    environment(&folder)?;
    let interpreter = folder.join("bin/python3");
    install(&interpreter, wheel)?;
    run(Command::new(&interpreter).args(["-I", "-c", BARE_IMPORT]).current_dir(&workspace.target))?;
    run(Command::new(interpreter.with_file_name("hetmem")).arg("--version"))
}

fn install(interpreter: &Path, wheel: &Path) -> Result<(), String> {
    let mut pip = Command::new(interpreter);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--force-reinstall",
        "--no-deps",
    ]);
    run(pip.arg(wheel))
}

fn tests(workspace: &Workspace, interpreter: &Path, wheel: &Path) -> Report {
    let mut stand_in = workspace.cargo(["build", "--package", "hetmem-standin-cuda"]);
    if let Err(why) = run(&mut stand_in).and_then(|()| install(interpreter, wheel)) {
        return Report::failed(why);
    }
    let folder = workspace.root.join("python");
    // By its own path, so that the folder of the sources, which has no native part, is not on Python's.
    let mut pytest = Command::new(interpreter.with_file_name("pytest"));
    pytest.arg("-q").arg(folder.join("tests")).current_dir(&folder);
    if std::env::var_os("HETMEM_TEST_CUDA").is_none() {
        pytest.env("HETMEM_TEST_CUDA", workspace.target.join("debug/libhetmem_standin_cuda.so"));
    }
    let mut report = run_counting(&mut pytest);
    for example in examples(&folder) {
        let tally = match run(Command::new(interpreter).arg(&example).current_dir(&workspace.target)) {
            Ok(()) => Tally { passed: 1, ..Tally::default() },
            Err(why) => {
                report.note = why;
                Tally { failed: 1, ..Tally::default() }
            }
        };
        report.tally += tally;
    }
    if report.tally.failed == 0 {
        report.note = report.tally.to_string();
    }
    report
}

fn examples(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder.join("examples")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "py"))
        .collect();
    found.sort();
    found
}
