//! The steps of `cargo xtask test`, in their order. Not how programs are run (`process`) or counted (`tally`).
//! Invariant: a step that cannot run here says why and what would let it; no step needs another to have run.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::Command;

use crate::kernels;
use crate::mutants;
use crate::process::{run, run_counting, run_tests, succeeds};
use crate::python;
use crate::tally::Report;
use crate::vm;
use crate::workspace::Workspace;

/// Seeds of the simulation in one test run.
pub(crate) const SIMULATION_SEEDS: u64 = 10_000;
/// The state dict that the end-to-end step moves, in bytes: 64 MiB.
const DEMO_SIZE: &str = "67108864";

/// One step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) run: fn(&Workspace) -> Report,
}

/// Cheap ones first; what is built by one is used by the next.
pub(crate) const STEPS: &[Step] = &[
    Step { name: "fmt", what: "every file is formatted", run: fmt },
    Step { name: "deny", what: "bans and licences of all dependencies (cargo-deny)", run: deny },
    Step { name: "clippy", what: "no warning in any target", run: clippy },
    Step { name: "docs", what: "no warning in the documentation", run: docs },
    Step {
        name: "test",
        what: "unit, property, conformance and process tests, documentation examples",
        run: test,
    },
    Step { name: "loom", what: "index and pins under every interleaving", run: loom },
    Step { name: "simulation", what: "many nodes in one thread, 10,000 seeds", run: simulation },
    Step { name: "mutants", what: "the simulation finds bugs that were planted for it", run: mutants },
    Step { name: "kernels", what: "the PTX is what the compiler makes of its source", run: kernels::step },
    Step { name: "demo", what: "two real nodes, a state dict of 64 MiB from one to the other", run: demo },
    Step {
        name: "verbs",
        what: "RDMA over real libibverbs, soft RoCE and iWARP in virtual machines",
        run: vm::verbs,
    },
    Step { name: "python", what: "the wheel, in a clean environment: tests and examples", run: python::step },
    Step { name: "safetensors", what: "round trips against the official Python package", run: safetensors },
];

/// Runs the simulation with this many seeds or for this long. Returns whether every seed passed; `Err` if there is
/// nothing to run.
pub(crate) fn simulate(workspace: &Workspace, length: &[String; 2], from: u64) -> Result<bool, String> {
    if !workspace.has_program("hetmem-tests", "simulate") {
        return Err("hetmem-tests has no program `simulate`".to_owned());
    }
    let mut command = workspace.cargo(["run", "--release", "--package", "hetmem-tests", "--bin", "simulate"]);
    command.args(["--", &length[0], &length[1], "--from", &from.to_string()]);
    Ok(run(&mut command).inspect_err(|why| eprintln!("{why}")).is_ok())
}

fn fmt(workspace: &Workspace) -> Report {
    with_component(workspace, "fmt", "rustfmt", || {
        let mut command = workspace.cargo(["fmt", "--all", "--check"]);
        if !std::io::stdout().is_terminal() {
            // rustfmt colours its differences even into a file.
            command.args(["--", "--color", "never"]);
        }
        report(run(&mut command))
    })
}

fn deny(workspace: &Workspace) -> Report {
    if !succeeds(&mut workspace.cargo(["deny", "--version"])) {
        return Report::skipped("cargo-deny is not installed (`cargo install --locked cargo-deny@0.20`)");
    }
    report(run(&mut workspace.cargo(["deny", "check", "bans", "licenses"])))
}

fn clippy(workspace: &Workspace) -> Report {
    with_component(workspace, "clippy", "clippy", || {
        let mut command =
            workspace.cargo(["clippy", "--workspace", "--exclude", vm::PLUGIN, "--all-targets"]);
        report(run(command.args(["--", "-D", "warnings"])))
    })
}

fn docs(workspace: &Workspace) -> Report {
    let mut command = workspace.cargo(["doc", "--workspace", "--exclude", vm::PLUGIN, "--no-deps"]);
    report(run(command.env("RUSTDOCFLAGS", "-D warnings")))
}

fn test(workspace: &Workspace) -> Report {
    let mut command = workspace.cargo(["test", "--workspace", "--exclude", vm::PLUGIN, "--no-fail-fast"]);
    run_tests(command.args(["--", "--show-output"]))
}

/// In a target folder of its own, because the flag reaches every dependency.
fn loom(workspace: &Workspace) -> Report {
    let mut command = workspace.cargo(["test", "--release", "--package", "hetmem-host-mem", "--lib"]);
    command.args(["loom", "--", "--show-output"]);
    command.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", workspace.target.join("loom"));
    run_tests(&mut command)
}

fn simulation(workspace: &Workspace) -> Report {
    match simulate(workspace, &["--seeds".to_owned(), SIMULATION_SEEDS.to_string()], 0) {
        Ok(true) => Report::passed(),
        Ok(false) => Report::failed("a seed failed; it is printed above with the command that replays it"),
        Err(why) => Report::skipped(why),
    }
}

fn mutants(workspace: &Workspace) -> Report {
    mutants::mutants(workspace, None).unwrap_or_else(Report::failed)
}

fn demo(workspace: &Workspace) -> Report {
    let demo = |binary| run(Command::new(binary).args(["demo", "--size", DEMO_SIZE]));
    report(release_binary(workspace).and_then(demo))
}

fn safetensors(workspace: &Workspace) -> Report {
    let script = workspace.root.join("tests/safetensors_interop.py");
    if !script.exists() {
        return Report::skipped("tests/safetensors_interop.py is not there");
    }
    let interpreter = match python::with_packages(
        &workspace.target.join("xtask-python"),
        &["safetensors", "numpy", "ml_dtypes"],
    ) {
        Ok(interpreter) => interpreter,
        Err(why) => return Report::skipped(why),
    };
    match release_binary(workspace) {
        Ok(binary) => run_counting(Command::new(interpreter).arg(script).arg(binary)),
        Err(why) => Report::failed(why),
    }
}

/// Builds the command-line tool as users run it. Returns its path.
pub(crate) fn release_binary(workspace: &Workspace) -> Result<PathBuf, String> {
    run(&mut workspace.cargo(["build", "--release", "--package", "hetmem-cli"]))?;
    Ok(workspace.target.join("release/hetmem"))
}

/// Runs `step` if cargo has this subcommand, after trying to add the toolchain's component for it.
fn with_component(
    workspace: &Workspace,
    subcommand: &str,
    component: &str,
    step: impl FnOnce() -> Report,
) -> Report {
    let mut present = succeeds(&mut workspace.cargo([subcommand, "--version"]));
    if !present {
        println!("the toolchain has no {component}: adding it with rustup");
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add", component]).current_dir(&workspace.root);
        present = run(&mut rustup).inspect_err(|why| println!("{why}")).is_ok();
    }
    if present {
        step()
    } else {
        Report::skipped(format!("no `cargo {subcommand}`, and rustup could not add {component}"))
    }
}

fn report(result: Result<(), String>) -> Report {
    match result {
        Ok(()) => Report::passed(),
        Err(why) => Report::failed(why),
    }
}
