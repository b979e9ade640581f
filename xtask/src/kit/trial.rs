//! A kit run where it was made, on the stand-in driver, and its output compared with what run.sh promises. Not a run on
//! hardware: no figure comes of it. Invariant: nothing of a Rust installation is in the way of the programs that run.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::process::run_to_exit;
use crate::tally::Tally;

/// What every output says of the stand-in.
const LABEL: &str = "STAND-IN DRIVER, NOT HARDWARE";
/// Where a system without Rust has its programs.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the kit into `out`, which is made anew. Returns whether nothing failed; `Err` if its output is not what it is to be.
pub(crate) fn run_on_stand_in(kit: &Path, out: &Path) -> Result<bool, String> {
    if out.exists() {
        fs::remove_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
    }
    let mut command = Command::new("sh");
    command.arg(kit.join("run.sh")).arg(out);
    command.env("HETMEM_KIT_STANDIN", "1").env("PATH", SYSTEM_PATH).env_remove("CARGO");
    let mut last = String::new();
    let code = run_to_exit(&mut command, |line| {
        println!("{line}");
        line.clone_into(&mut last);
    })?;
    let tally =
        Tally::parse(&last).ok_or_else(|| format!("run.sh ends with {last:?}, not with its count"))?;
    let expected = if tally.failed == 0 { 0 } else { 1 };
    if code != Some(expected) {
        return Err(format!("run.sh says {tally} and exited with {code:?}, not with {expected}"));
    }
    let text = read(&out.join("results.json"))?;
    if counted(&text)? != tally {
        return Err(format!("results.json and the last line, {tally}, disagree"));
    }
    unlabelled(out)?;
    if tally.passed == 0 {
        return Err("not one test passed on the stand-in driver".to_owned());
    }
    Ok(tally.failed == 0)
}

/// What a `results.json` counts, if its own numbers agree and each test that did not pass says why.
pub(crate) fn counted(text: &str) -> Result<Tally, String> {
    let results: Value = serde_json::from_str(text).map_err(|error| format!("results.json: {error}"))?;
    let mut tally = Tally::default();
    for test in results["tests"].as_array().ok_or("results.json has no tests")? {
        match test["result"].as_str() {
            Some("passed") => tally.passed += 1,
            Some("failed") => tally.failed += 1,
            Some("skipped") => tally.skipped += 1,
            other => return Err(format!("results.json: {} is {other:?}", test["name"])),
        }
        if test["result"] != "passed" && test["reason"].as_str().is_none_or(str::is_empty) {
            return Err(format!("results.json: {} gives no reason", test["name"]));
        }
    }
    for (name, count) in [("passed", tally.passed), ("failed", tally.failed), ("skipped", tally.skipped)] {
        if results[name] != count {
            return Err(format!("results.json says {} {name} and lists {count}", results[name]));
        }
    }
    Ok(tally)
}

/// Fails if a file does not say that its driver is the stand-in, or if there are figures.
fn unlabelled(out: &Path) -> Result<(), String> {
    for path in super::files_under(out)? {
        if !read(&path)?.contains(LABEL) {
            return Err(format!("{}: does not say {LABEL:?}", path.display()));
        }
    }
    if out.join("gpu.json").exists() {
        return Err("figures were taken on the stand-in driver".to_owned());
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_disagree_with_themselves_are_refused() {
        let json = |passed: u32, reason: &str| {
            format!(
                r#"{{"passed": {passed}, "failed": 1, "skipped": 0, "tests": [
                {{"name": "a", "result": "passed", "reason": ""}},
                {{"name": "b", "result": "failed", "reason": "{reason}"}}]}}"#
            )
        };
        assert_eq!(counted(&json(1, "why")), Ok(Tally { passed: 1, failed: 1, skipped: 0 }));
        assert!(counted(&json(2, "why")).expect_err("a wrong count").contains("lists 1"));
        assert!(counted(&json(1, "")).expect_err("no reason").contains("\"b\""));
        assert!(counted("{}").is_err() && counted("").is_err());
    }

    #[test]
    fn a_file_that_does_not_name_the_stand_in_is_found() {
        let out = tempfile::tempdir().expect("a folder");
        fs::write(out.path().join("a"), format!("{LABEL}: x\n")).expect("written");
        assert_eq!(unlabelled(out.path()), Ok(()));
        fs::write(out.path().join("b"), "silent").expect("written");
        assert!(unlabelled(out.path()).expect_err("b is silent").contains("/b:"));
    }
}
