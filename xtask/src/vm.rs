//! The step that runs the verbs fabric over real libibverbs in a virtual machine with software RDMA (tests/vm). Not the
//! machine itself. Invariant: a machine that cannot be started is a skip with its reason, one that dies is started once
//! more, and nothing else is tried twice.

use std::path::Path;
use std::process::Command;

use crate::process::{run, run_tests, run_tests_to_exit};
use crate::tally::Report;
use crate::workspace::Workspace;

/// The guest's address on its first device.
const ADDRESS: &str = "10.77.0.1";
/// Of the guest, in MiB.
const MEMORY: &str = "3072";
/// Of the whole suite, in seconds.
const LIMIT: &str = "420";
/// `tests/vm/run` says by it that the guest, and not the command, failed.
const GUEST_FAILED: i32 = 125;

/// The conformance suite over soft RoCE.
pub(crate) fn verbs(workspace: &Workspace) -> Report {
    if let Err(why) = run(&mut Command::new(workspace.root.join("tests/vm/install"))) {
        return Report::skipped(format!("the virtual machine's packages are not there: {why}"));
    }
    let built = run(&mut workspace.cargo(["build", "--package", "hetmem-verbs"]))
        .and_then(|()| workspace.test_program("hetmem-transport", "verbs"));
    match built {
        Ok(program) => in_guest(workspace, &program),
        Err(why) => Report::failed(why),
    }
}

fn in_guest(workspace: &Workspace, program: &Path) -> Report {
    let mut command = Command::new(workspace.root.join("tests/vm/run"));
    command.args([
        "-m",
        MEMORY,
        "-t",
        LIMIT,
        "-e",
        "HETMEM_VERBS_ADDRESS",
        "-e",
        "HETMEM_VERBS_PLUGIN",
        "--",
    ]);
    command.arg(program).args(["--test-threads=1", "--show-output"]);
    command.env("HETMEM_VERBS_ADDRESS", ADDRESS);
    command.env("HETMEM_VERBS_PLUGIN", workspace.target.join("debug/libhetmem_verbs.so"));
    match run_tests_to_exit(&mut command) {
        (_, Some(GUEST_FAILED)) => {
            println!("the virtual machine did not live: once more");
            run_tests(&mut command)
        }
        (report, _) => report,
    }
}
