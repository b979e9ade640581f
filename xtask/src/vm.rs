//! The step that runs the verbs fabric over real libibverbs in a virtual machine with software RDMA (tests/vm). Not the
//! machine itself. Invariant: a machine that cannot be started is a skip with its reason, one that dies is started once
//! more, and nothing else is tried twice.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, run_tests_to_exit};
use crate::tally::Report;
use crate::workspace::Workspace;

/// The crate that needs the headers of rdma-core: only this step, which installs them, builds it.
pub(crate) const PLUGIN: &str = "hetmem-verbs";
const PLUGIN_NEEDS: &str =
    "the plugin needs libibverbs-dev, librdmacm-dev and a libclang below 16: docs/rdma.md";
/// The guest's address on its first device.
const ADDRESS: &str = "10.77.0.1";
/// Of the guest, in MiB.
const MEMORY: &str = "3072";
/// Of the whole suite, in seconds.
const LIMIT: &str = "420";
/// `tests/vm/run` says by it that the guest, and not the command, failed.
const GUEST_FAILED: i32 = 125;

/// Test programs that run there: their packages and names, none of a library's own.
const PROGRAMS: &[(&str, Option<&str>)] =
    &[("hetmem-transport", None), ("hetmem-transport", Some("verbs")), ("hetmem-tests", Some("rdma"))];

/// The conformance suite and the process tests over soft RoCE.
pub(crate) fn verbs(workspace: &Workspace) -> Report {
    if let Err(why) = run(&mut Command::new(workspace.root.join("tests/vm/install"))) {
        return Report::skipped(format!("the virtual machine's packages are not there: {why}"));
    }
    match built(workspace) {
        Ok(programs) => in_guest(workspace, &programs),
        Err(why) => Report::failed(why),
    }
}

/// Builds the plugin, the tool and the test programs, without a warning.
fn built(workspace: &Workspace) -> Result<Vec<PathBuf>, String> {
    let mut lint = workspace.cargo(["clippy", "--package", PLUGIN]);
    run(lint.args(["--", "-D", "warnings"])).map_err(|why| format!("{why} ({PLUGIN_NEEDS})"))?;
    for (package, name) in PROGRAMS.iter().filter_map(|(package, name)| Some((package, (*name)?))) {
        let mut lint = workspace.cargo(["clippy", "--package", package, "--test", name]);
        run(lint.args(["--", "-D", "warnings"]))?;
    }
    // As the tests are built, so that nothing is compiled twice.
    let tools = ["build", "--profile", "test", "--package", PLUGIN, "--package", "hetmem-cli"];
    run(&mut workspace.cargo(tools)).map_err(|why| format!("{why} ({PLUGIN_NEEDS})"))?;
    PROGRAMS.iter().map(|(package, name)| workspace.test_program(package, *name)).collect()
}

fn in_guest(workspace: &Workspace, programs: &[PathBuf]) -> Report {
    let mut command = Command::new(workspace.root.join("tests/vm/run"));
    command.args(["-m", MEMORY, "-t", LIMIT]);
    command.arg("-r").arg(&workspace.root).arg("-r").arg(&workspace.target);
    let debug = |name: &str| workspace.target.join("debug").join(name);
    for (name, value) in [
        ("HETMEM_VERBS_ADDRESS", PathBuf::from(ADDRESS)),
        ("HETMEM_VERBS_PLUGIN", debug("libhetmem_verbs.so")),
        ("HETMEM_TEST_BINARY", debug("hetmem")),
    ] {
        command.args(["-e", name]).env(name, value);
    }
    command.arg("--").arg(workspace.root.join("tests/vm/suite")).args(programs.iter().map(Path::new));
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
