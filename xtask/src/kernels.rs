//! `cargo xtask kernels`: the checked-in PTX, made anew or compared with what the compiler makes. Not the tests that need no
//! compiler (kernels/tests/sources.rs). Invariant: the compiler is of one version, which is installed from PyPI under the
//! target folder, and runs in the folder of the sources, so that no path gets into its output.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, succeeds};
use crate::tally::Report;
use crate::workspace::Workspace;

/// CUDA 13.0: its PTX is loaded by drivers from 580 on. Of the newest version only the newest drivers would. All parts are
/// named, because pip would take the newest of those that are not.
const PACKAGES: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
];
const RELEASE: &str = "V13.0.88";
/// The oldest device that the PTX is for, and those whose assembler has to take it.
const ARCHITECTURE: &str = "compute_80";
const DEVICES: &[&str] = &["sm_80", "sm_90", "sm_100"];
/// What every source includes.
const SHARED: &str = "device.cuh";

/// Why there is nothing to report: no compiler, or something is wrong with the kernels.
enum Stopped {
    NoCompiler(String),
    Failed(String),
}

/// The compiler with its parts.
struct Toolkit {
    interpreter: PathBuf,
    binaries: PathBuf,
}

/// The step of `cargo xtask test`.
pub(crate) fn step(workspace: &Workspace) -> Report {
    match go(workspace, true) {
        Ok(()) => Report::passed(),
        Err(Stopped::NoCompiler(why)) => Report::skipped(why),
        Err(Stopped::Failed(why)) => Report::failed(why),
    }
}

/// Makes the PTX anew, or with `check` compares it. Returns whether all is well.
pub(crate) fn kernels(workspace: &Workspace, check: bool) -> Result<bool, String> {
    match go(workspace, check) {
        Ok(()) => Ok(true),
        Err(Stopped::NoCompiler(why) | Stopped::Failed(why)) => Err(why),
    }
}

fn go(workspace: &Workspace, check: bool) -> Result<(), Stopped> {
    let toolkit = Toolkit::install(&workspace.target).map_err(Stopped::NoCompiler)?;
    let folder = workspace.root.join("kernels");
    let scratch = workspace.target.join("xtask-kernels");
    fs::create_dir_all(&scratch).map_err(|error| failed("make", &scratch, &error))?;
    let mut stale = Vec::new();
    for name in sources(&folder.join("cuda"))? {
        let made = scratch.join(format!("{name}.ptx"));
        let text = toolkit.compile(&folder.join("cuda"), &name, &made).map_err(Stopped::Failed)?;
        fs::write(&made, &text).map_err(|error| failed("write", &made, &error))?;
        for device in DEVICES {
            toolkit.assemble(&made, device, &scratch.join("cubin")).map_err(Stopped::Failed)?;
        }
        let kept = folder.join("ptx").join(format!("{name}.ptx"));
        if !check {
            fs::write(&kept, &text).map_err(|error| failed("write", &kept, &error))?;
        } else if fs::read(&kept).ok().as_deref() != Some(text.as_bytes()) {
            stale.push(format!("kernels/ptx/{name}.ptx"));
        }
    }
    if stale.is_empty() {
        return Ok(());
    }
    Err(Stopped::Failed(format!(
        "{} is not what the compiler makes of its source: run `cargo xtask kernels`",
        stale.join(" and ")
    )))
}

fn failed(verb: &str, path: &Path, error: &std::io::Error) -> Stopped {
    Stopped::Failed(format!("{verb} {}: {error}", path.display()))
}

/// The names of the sources, in order.
fn sources(folder: &Path) -> Result<Vec<String>, Stopped> {
    let entries = fs::read_dir(folder).map_err(|error| failed("list", folder, &error))?;
    let files = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> =
        files.filter_map(|file| file.strip_suffix(".cu").map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

impl Toolkit {
    /// Finds the compiler, or installs it. `Err` says why there is none.
    fn install(target: &Path) -> Result<Self, String> {
        let folder = target.join("xtask-cuda");
        let interpreter = folder.join("bin/python3");
        if let Some(found) = Self::find(&folder, &interpreter) {
            return Ok(found);
        }
        for (program, package) in [("python3", "python3"), ("g++", "g++, whose preprocessor nvcc uses")] {
            if !succeeds(Command::new(program).arg("--version")) {
                return Err(format!("{program} is not installed (on Debian: apt install {package})"));
            }
        }
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder)).map_err(|why| {
            format!("no virtual environment can be made (on Debian: apt install python3-venv): {why}")
        })?;
        let mut pip = Command::new(&interpreter);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        run(pip.args(PACKAGES)).map_err(|why| format!("pip cannot install nvcc (no network?): {why}"))?;
        Self::find(&folder, &interpreter)
            .ok_or_else(|| format!("pip has installed an nvcc, but it is not {RELEASE} or does not run"))
    }

    fn find(folder: &Path, interpreter: &Path) -> Option<Self> {
        // One folder of Python's version lies between.
        let versions = fs::read_dir(folder.join("lib")).ok()?;
        let binaries = versions
            .filter_map(|entry| Some(entry.ok()?.path().join("site-packages/nvidia/cu13/bin")))
            .find(|binaries| binaries.join("nvcc").exists())?;
        let version = Command::new(binaries.join("nvcc")).arg("--version").output().ok()?;
        let is_release = String::from_utf8_lossy(&version.stdout).contains(RELEASE);
        let has_parts = binaries.join("../nvvm/bin/cicc").exists() && binaries.join("ptxas").exists();
        (is_release && has_parts).then(|| Self { interpreter: interpreter.to_path_buf(), binaries })
    }

    /// The PTX of a source, with the hash of what it was made of in its first line.
    fn compile(&self, folder: &Path, name: &str, made: &Path) -> Result<String, String> {
        let source = format!("{name}.cu");
        let mut nvcc = Command::new(self.binaries.join("nvcc"));
        nvcc.args(["-ptx", "-arch", ARCHITECTURE, "-Werror", "all-warnings", "-o"]).arg(made).arg(&source);
        run(nvcc.current_dir(folder))?;
        let text = fs::read_to_string(made).map_err(|error| format!("{}: {error}", made.display()))?;
        let hash = self.hash(folder, &source)?;
        Ok(format!("// cuda/{SHARED} and cuda/{source}, sha256 {hash}\n{text}"))
    }

    /// Of the shared file and the source, one after the other.
    fn hash(&self, folder: &Path, source: &str) -> Result<String, String> {
        const PROGRAM: &str = "import hashlib, sys; \
            print(hashlib.sha256(b''.join(open(name, 'rb').read() for name in sys.argv[1:])).hexdigest())";
        let mut python = Command::new(&self.interpreter);
        python.args(["-c", PROGRAM, SHARED, source]).current_dir(folder);
        let output = python.output().map_err(|error| format!("hash {source}: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(format!("hash {source}: {}", String::from_utf8_lossy(&output.stderr))),
        }
    }

    fn assemble(&self, ptx: &Path, device: &str, cubin: &Path) -> Result<(), String> {
        let mut ptxas = Command::new(self.binaries.join("ptxas"));
        run(ptxas.arg(format!("-arch={device}")).arg(ptx).arg("-o").arg(cubin))
    }
}
