//! Tests in processes of their own, with the switches that they are about. Not what they do there. Invariant: a test passes
//! only if its child ran the body to its end and exited with success.

use std::env;
use std::process::{Command, Stdio};

use crate::library;

const CHILD: &str = "HETMEM_STANDIN_CHILD";
/// Which part of a test with several processes a child is.
const ROLE: &str = "HETMEM_STANDIN_ROLE";

/// Runs `body` in a child process with these environment variables: this test program again, with this test alone. `body`
/// has to be a closure in the test itself, whose name it tells.
pub(crate) fn isolated<F: FnOnce()>(switches: &[(&str, &str)], body: F) {
    if env::var_os(CHILD).is_some() {
        body();
        return;
    }
    let output = again(std::any::type_name::<F>(), None, switches).output().expect("this program starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{}\n{out}\n{err}", output.status);
}

/// The same test once more, in another role, from inside a body.
pub(crate) fn again(name_of_body: &str, role: Option<&str>, switches: &[(&str, &str)]) -> Command {
    // standin::module::test::{{closure}}
    let name = name_of_body.trim_end_matches("::{{closure}}");
    let name = name.split_once("::").map_or(name, |(_, name)| name);
    let mut command = Command::new(env::current_exe().expect("this program has a path"));
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
    command.env(CHILD, name).env(library::VARIABLE, library::path());
    command.envs(role.map(|role| (ROLE, role))).envs(switches.iter().copied());
    command
}

/// The role of this process; none in a test's first child.
pub(crate) fn role() -> Option<String> {
    env::var(ROLE).ok()
}
