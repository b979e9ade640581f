//! `cargo xtask gpu-kit`: one folder with what the tests and benches need on a machine that has GPUs and no Rust. Not what
//! runs there (`xtask/kit/run.sh`). Invariant: a kit is whole and within its size, or the command fails; what is not there
//! yet is named in the manifest.

mod artifacts;
mod folder;
#[cfg(test)]
mod run_tests;
mod trial;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use artifacts::{Executable, executables};
use folder::{Folder, files_under};

use crate::process::run;
use crate::steps::release_binary;
use crate::workspace::Workspace;

/// Of the whole folder: 48 MiB, which passes where files are handed over by mail or through a web page.
const SIZE_MAX_BYTES: u64 = 48 << 20;
/// The glibc that a kit is promised to run with: 2.36.
const GLIBC_MINOR: u32 = 36;
/// Programs that the tests of hetmem-tests' target `gpu` start; they look for them beside `hetmem`.
const STARTED_BY_TESTS: &[&str] = &["hetmem-test-gpu-client"];
/// A driver that is none. Debug, as the tests build it.
const STAND_IN: (&str, &str) = ("hetmem-standin-cuda", "debug/libhetmem_standin_cuda.so");

/// The kit's own files, as they lie in it.
const OWN_FILES: &[(&str, &str, bool)] = &[
    ("run.sh", include_str!("../kit/run.sh"), true),
    ("README.txt", include_str!("../kit/README.txt"), false),
    ("awk/libtest.awk", include_str!("../kit/libtest.awk"), false),
    ("awk/report.awk", include_str!("../kit/report.awk"), false),
];

/// Makes the kit; with `check`, packs the stand-in driver too and runs the kit on it. Returns whether nothing failed.
pub(crate) fn gpu_kit(workspace: &Workspace, check: bool) -> Result<bool, String> {
    let folder = Folder::fresh(workspace.target.join("gpu-kit"))?;
    for (name, text, executable) in OWN_FILES {
        folder.write(name, text, *executable)?;
    }
    folder.copy_stripped(&release_binary(workspace)?, "bin/hetmem")?;
    let mut notes = add_tests(workspace, &folder)?;
    notes.extend(add_ptx(workspace, &folder)?);
    notes.extend(add_wheel(workspace, &folder)?);
    if check {
        run(&mut workspace.cargo(["build", "--package", STAND_IN.0]))?;
        for name in ["standin/libcuda.so", "standin/libcuda.so.1"] {
            folder.copy_stripped(&workspace.target.join(STAND_IN.1), name)?;
        }
    }
    notes.extend(glibc(&folder)?);
    folder.write("manifest.txt", &manifest(workspace, &folder, &notes)?, false)?;
    let size_bytes = folder.files()?.iter().map(|(_, size)| size).sum();
    for note in &notes {
        println!("{note}");
    }
    println!("{}: {}", folder.root.display(), within(size_bytes)?);
    if check {
        trial::run_on_stand_in(&folder.root, &workspace.target.join("gpu-kit-check"))
    } else {
        Ok(true)
    }
}

/// The folder's size in words, or why it is too much.
fn within(size_bytes: u64) -> Result<String, String> {
    let mib = |bytes: u64| format!("{}.{} MiB", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20);
    let (size, most) = (mib(size_bytes), mib(SIZE_MAX_BYTES));
    if size_bytes <= SIZE_MAX_BYTES {
        return Ok(format!("{size} of at most {most}"));
    }
    Err(format!(
        "the kit has {size}, at most {most}: is `strip` (binutils) there? manifest.txt lists its files"
    ))
}

/// The test programs, and what they start. Returns what the manifest is to say.
fn add_tests(workspace: &Workspace, folder: &Folder) -> Result<Vec<String>, String> {
    let mut notes = Vec::new();
    let built = build_tests(workspace, "hetmem-gpu-mem", &[])?;
    for program in built.iter().filter(|program| program.is_test) {
        folder.copy_stripped(&program.path, &place("hetmem-gpu-mem", program))?;
    }
    if !workspace.has_target("hetmem-tests", "test", "gpu") {
        notes.push(
            "hetmem-tests has no test target gpu: tests between processes are not in this kit".to_owned(),
        );
        return Ok(notes);
    }
    let built = build_tests(workspace, "hetmem-tests", &["--test", "gpu", "--test", "gpu_kernels"])?;
    for program in &built {
        if program.is_test {
            folder.copy_stripped(&program.path, &place("hetmem-tests", program))?;
        } else if STARTED_BY_TESTS.contains(&program.target.as_str()) {
            folder.copy_stripped(&program.path, &format!("bin/{}", program.target))?;
        }
    }
    for name in STARTED_BY_TESTS {
        if !built.iter().any(|program| program.target == *name) {
            return Err(format!("cargo built no {name}, which tests of hetmem-tests start"));
        }
    }
    Ok(notes)
}

/// Where a test program lies: under its package's and its target's name, a library's as `lib`.
fn place(package: &str, program: &Executable) -> String {
    let target = if program.kind == "lib" { "lib" } else { &program.target };
    format!("bin/tests/{package}-{target}")
}

fn build_tests(workspace: &Workspace, package: &str, targets: &[&str]) -> Result<Vec<Executable>, String> {
    // With errors as text on the terminal, not in the messages.
    let format = "--message-format=json-render-diagnostics";
    let mut command = workspace.cargo(["test", "--no-run", format, "--package", package]);
    let output = command.args(targets).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("cargo test --no-run: {error}"))?;
    if !output.status.success() {
        return Err(format!("the tests of {package} do not build; why is said above"));
    }
    let built = executables(&String::from_utf8_lossy(&output.stdout));
    if built.iter().any(|program| program.is_test) {
        Ok(built)
    } else {
        Err(format!("cargo built no test program of {package}"))
    }
}

fn add_ptx(workspace: &Workspace, folder: &Folder) -> Result<Option<String>, String> {
    let mut count = 0;
    for path in with_extension(&workspace.root.join("kernels"), "ptx")? {
        folder.copy(&path, &format!("ptx/{}", file_name(&path)))?;
        count += 1;
    }
    Ok((count == 0).then(|| "ptx: none yet".to_owned()))
}

/// The newest wheel: older ones are of other builds.
fn add_wheel(workspace: &Workspace, folder: &Folder) -> Result<Option<String>, String> {
    let wheels = with_extension(&workspace.target.join("wheels"), "whl")?;
    let changed = |path: &PathBuf| path.metadata().and_then(|known| known.modified()).ok();
    let Some(newest) = wheels.into_iter().max_by_key(changed) else {
        return Ok(Some("wheel: none in target/wheels".to_owned()));
    };
    folder.copy(&newest, &format!("wheel/{}", file_name(&newest)))?;
    Ok(None)
}

fn with_extension(root: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let mut found = files_under(root)?;
    found.retain(|path| path.extension().is_some_and(|known| known == extension));
    Ok(found)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What the programs need of the C library.
fn glibc(folder: &Folder) -> Result<Vec<String>, String> {
    let Some(minor) = folder.glibc_minor()? else {
        return Ok(vec!["glibc: no program names a version".to_owned()]);
    };
    let mut notes = vec![format!("glibc: 2.{minor} or later")];
    if minor > GLIBC_MINOR {
        notes.push(format!(
            "glibc: this is more than 2.{GLIBC_MINOR}: build on an older system to reach those"
        ));
    }
    Ok(notes)
}

/// First the line that results carry, then the notes, then the files.
fn manifest(workspace: &Workspace, folder: &Folder, notes: &[String]) -> Result<String, String> {
    let mut text = format!("hetmem GPU kit, {}, {}\n\n", commit(workspace), std::env::consts::ARCH);
    for note in notes {
        text.push_str(&format!("{note}\n"));
    }
    text.push('\n');
    for (name, size) in folder.files()? {
        text.push_str(&format!("{size:>10}  {name}\n"));
    }
    Ok(text)
}

/// The commit, marked if files differ from it.
fn commit(workspace: &Workspace) -> String {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty", "--abbrev=12"]).current_dir(&workspace.root);
    let described = git.stderr(Stdio::null()).output().ok().filter(|output| output.status.success());
    let described = described.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    described.map_or_else(|| "of no git checkout".to_owned(), |described| format!("commit {described}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kit_that_is_too_large_is_an_error() {
        assert_eq!(within(SIZE_MAX_BYTES), Ok("48.0 MiB of at most 48.0 MiB".to_owned()));
        assert_eq!(within((3 << 20) + (1 << 19)), Ok("3.5 MiB of at most 48.0 MiB".to_owned()));
        let error = within(SIZE_MAX_BYTES + 1).expect_err("one byte too many");
        assert!(error.contains("48.0 MiB") && error.contains("strip"), "{error}");
    }

    #[test]
    fn test_programs_have_names_without_hashes() {
        let program = |target: &str, kind: &str| Executable {
            target: target.to_owned(),
            kind: kind.to_owned(),
            is_test: true,
            path: PathBuf::from("deps/x-0123"),
        };
        assert_eq!(place("a-b", &program("a_b", "lib")), "bin/tests/a-b-lib");
        assert_eq!(place("a-b", &program("copies", "test")), "bin/tests/a-b-copies");
    }
}
