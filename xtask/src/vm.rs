//! The step that runs the verbs fabric over real libibverbs in virtual machines with software RDMA (tests/vm): the suite
//! over soft RoCE and over soft iWARP, then two machines with a node each. Not the machines themselves. Invariant: a
//! machine that cannot be started is a skip with its reason, one that dies is started once more, and nothing else is tried
//! twice.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::process::{run, run_tests, run_tests_to_exit};
use crate::tally::{Report, Tally};
use crate::workspace::Workspace;

/// The crate that needs the headers of rdma-core: only this step, which installs them, builds it.
pub(crate) const PLUGIN: &str = "hetmem-verbs";
const PLUGIN_NEEDS: &str =
    "the plugin needs libibverbs-dev, librdmacm-dev and a libclang below 16: docs/rdma.md";
/// The guest's address on its first device.
const ADDRESS: &str = "10.77.0.1";
/// On its second.
const ADDRESS_2: &str = "10.77.1.1";
/// Of the guest, in MiB.
const MEMORY: &str = "3072";
/// Of the whole suite over one driver, in seconds.
const LIMIT: &str = "420";
/// `tests/vm/run` says by it that the guest, and not the command, failed.
const GUEST_FAILED: i32 = 125;

/// A test program that runs there.
struct Program {
    package: &'static str,
    /// None: a library's own tests.
    name: Option<&'static str>,
    /// Which of its tests: all whose names begin like one of these; all, if there are none. First over soft RoCE, then over
    /// soft iWARP, where tests that are about TCP or about no RDMA at all are not run again.
    chosen: [&'static [&'static str]; 2],
}

const PROGRAMS: &[Program] = &[
    Program { package: "hetmem-transport", name: None, chosen: [&["verbs::"], &["verbs::"]] },
    Program { package: "hetmem-transport", name: Some("verbs"), chosen: [&[], &[]] },
    Program {
        package: "hetmem-tests",
        name: Some("rdma"),
        chosen: [&[], &["objects_", "what_an_owner_", "a_node_", "a_peer_that_", "a_link_", "a_device_"]],
    },
];

/// The one that starts its machines itself.
const PAIR: (&str, &str) = ("hetmem-tests", "rdma_pair");

/// The conformance suite and the process tests over both software devices, and two machines.
pub(crate) fn verbs(workspace: &Workspace) -> Report {
    if let Err(why) = run(&mut Command::new(workspace.root.join("tests/vm/install"))) {
        return Report::skipped(format!("the virtual machine's packages are not there: {why}"));
    }
    let (programs, pair) = match built(workspace) {
        Ok(built) => built,
        Err(why) => return Report::failed(why),
    };
    let roce = in_guest(workspace, &chosen(&programs, 0), "rxe", None);
    let module = soft_iwarp(workspace);
    let iwarp = match &module {
        Ok(module) => in_guest(workspace, &chosen(&programs, 1), "siw", Some(module)),
        Err(why) => Report::skipped(why),
    };
    let two = two_machines(workspace, &pair, module.ok().as_deref());
    together([("RoCE", roce), ("iWARP", iwarp), ("two machines", two)])
}

/// What `tests/vm/suite` is to run, in the order of `PROGRAMS`.
fn chosen(programs: &[PathBuf], which: usize) -> Vec<String> {
    let with = |(path, program): (&PathBuf, &Program)| {
        let words = program.chosen[which].iter().copied();
        std::iter::once(path.display().to_string().as_str()).chain(words).collect::<Vec<_>>().join("\n")
    };
    programs.iter().zip(PROGRAMS).map(with).collect()
}

/// One report of several, whose notes are told apart.
fn together<const N: usize>(parts: [(&str, Report); N]) -> Report {
    let mut total = Report { tally: Tally::default(), note: String::new() };
    let notes = parts.map(|(name, part)| {
        total.tally += part.tally;
        format!("{name}: {}", part.note)
    });
    total.note = notes.join("; ");
    total
}

/// Builds the module that Debian's kernel lacks, once; its path.
fn soft_iwarp(workspace: &Workspace) -> Result<PathBuf, String> {
    let mut command = Command::new(workspace.root.join("tests/vm/siw"));
    let output =
        command.stderr(Stdio::inherit()).output().map_err(|error| format!("tests/vm/siw: {error}"))?;
    if !output.status.success() {
        return Err("soft iWARP cannot be built here; why is said above".to_owned());
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// Builds the plugin, the tool and the test programs, without a warning: those for a guest, and that of two.
fn built(workspace: &Workspace) -> Result<(Vec<PathBuf>, PathBuf), String> {
    let mut lint = workspace.cargo(["clippy", "--package", PLUGIN]);
    run(lint.args(["--", "-D", "warnings"])).map_err(|why| format!("{why} ({PLUGIN_NEEDS})"))?;
    let named = PROGRAMS.iter().filter_map(|program| Some((program.package, program.name?)));
    for (package, name) in named.chain([PAIR]) {
        let mut lint = workspace.cargo(["clippy", "--package", package, "--test", name]);
        run(lint.args(["--", "-D", "warnings"]))?;
    }
    // As the tests are built, so that nothing is compiled twice.
    let tools = ["build", "--profile", "test", "--package", PLUGIN, "--package", "hetmem-cli"];
    run(&mut workspace.cargo(tools)).map_err(|why| format!("{why} ({PLUGIN_NEEDS})"))?;
    // As the tests of GPU memory build it for themselves.
    run(&mut workspace.cargo(["build", "--package", "hetmem-standin-cuda"]))?;
    let program = |program: &Program| workspace.test_program(program.package, program.name);
    let programs = PROGRAMS.iter().map(program).collect::<Result<_, _>>()?;
    Ok((programs, workspace.test_program(PAIR.0, Some(PAIR.1))?))
}

fn in_guest(workspace: &Workspace, programs: &[String], driver: &str, module: Option<&Path>) -> Report {
    let mut command = Command::new(workspace.root.join("tests/vm/run"));
    command.args(["-d", driver, "-n", "2", "-m", MEMORY, "-t", LIMIT]);
    if let Some(module) = module {
        command.env("HETMEM_VM_MODULES", module);
    }
    command.arg("-r").arg(&workspace.root).arg("-r").arg(&workspace.target);
    command.args(["-e", "HETMEM_VERBS_ADDRESS"]).env("HETMEM_VERBS_ADDRESS", ADDRESS);
    command.args(["-e", "HETMEM_VERBS_ADDRESS_2"]).env("HETMEM_VERBS_ADDRESS_2", ADDRESS_2);
    for (name, value) in tools(workspace) {
        command.args(["-e", name]).env(name, value);
    }
    command.arg("--").arg(workspace.root.join("tests/vm/suite")).args(programs);
    let (mut report, mut exit) = run_tests_to_exit(&mut command);
    if exit == Some(GUEST_FAILED) {
        println!("the virtual machine did not live: once more");
        (report, exit) = run_tests_to_exit(&mut command);
    }
    if exit == Some(GUEST_FAILED) && report.tally.passed == 0 {
        return Report::skipped("the virtual machine cannot be started here; why is said above");
    }
    report
}

fn two_machines(workspace: &Workspace, program: &Path, module: Option<&Path>) -> Report {
    let mut command = Command::new(program);
    command.args(["--test-threads=1", "--show-output"]).envs(tools(workspace));
    match module {
        Some(module) => command.env("HETMEM_VM_MODULES", module),
        None => command.env_remove("HETMEM_VM_MODULES"),
    };
    run_tests(&mut command)
}

/// What test programs are told of what was built.
fn tools(workspace: &Workspace) -> [(&'static str, PathBuf); 3] {
    let debug = |name: &str| workspace.target.join("debug").join(name);
    [
        ("HETMEM_VERBS_PLUGIN", debug("libhetmem_verbs.so")),
        ("HETMEM_TEST_BINARY", debug("hetmem")),
        ("HETMEM_TEST_STANDIN_CUDA", debug("libhetmem_standin_cuda.so")),
    ]
}
