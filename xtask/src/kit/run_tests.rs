//! The kit's run.sh and its awk programs, on programs and logs made for it. Not on a GPU or its stand-in. Invariant: each
//! test has a kit of its own, whose test programs are shell scripts that print what libtest prints.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::folder::Folder;
use super::{OWN_FILES, trial};
use crate::tally::Tally;

/// A hetmem that knows `doctor` only.
const HETMEM: &str = "#!/bin/sh\n[ \"$1\" = doctor ] && echo 'yes  memory' && exit 0\nexit 2\n";

/// A kit with these test programs.
struct Kit {
    folder: Folder,
    around: tempfile::TempDir,
}

/// What came of a run.
struct Outcome {
    code: Option<i32>,
    last: String,
    json: String,
    results: Value,
}

impl Kit {
    fn new(hetmem: &str) -> Self {
        let around = tempfile::tempdir().expect("a folder");
        let folder = Folder::fresh(around.path().join("a kit")).expect("made");
        for (name, text, executable) in OWN_FILES {
            folder.write(name, text, *executable).expect("written");
        }
        folder.write("bin/hetmem", hetmem, true).expect("written");
        folder.write("manifest.txt", "kit of \"tests\"\n", false).expect("written");
        Self { folder, around }
    }

    /// Adds a test program that lists these tests, prints this and exits with this.
    fn program(self, name: &str, tests: &[&str], output: &str, code: &str) -> Self {
        let list: String = tests.iter().map(|test| format!("{test}: test\n")).collect();
        let text = format!(
            "#!/bin/sh\nif [ \"$1\" = --list ]; then cat <<'END'\n{list}\nEND\nexit 0; fi\ncat <<'END'\n{output}\nEND\n{code}\n"
        );
        self.folder.write(&format!("bin/tests/{name}"), &text, true).expect("written");
        self
    }

    fn run(&self, variables: &[(&str, &str)]) -> Outcome {
        let out = self.around.path().join("out");
        let mut command = self.command(&out);
        let output = command.envs(variables.iter().copied()).output().expect("sh runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let json = fs::read_to_string(out.join("results.json"))
            .unwrap_or_else(|error| panic!("{error}: {said}{}", String::from_utf8_lossy(&output.stderr)));
        let results = serde_json::from_str(&json).expect("JSON");
        let last = said.lines().last().expect("a line").to_owned();
        Outcome { code: output.status.code(), last, json, results }
    }

    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new("sh");
        command.arg(self.folder.root.join("run.sh")).arg(out);
        command.env_remove("HETMEM_KIT_STANDIN").env_remove("HETMEM_KIT_TIMEOUT");
        command
    }
}

impl Outcome {
    /// Result and reason of a test.
    fn of(&self, program: &str, name: &str) -> (&str, &str) {
        let mut tests = self.results["tests"].as_array().expect("tests").iter();
        let test = tests.find(|test| test["program"] == program && test["name"] == name);
        let test = test.unwrap_or_else(|| panic!("no {program} {name} in {}", self.json));
        (test["result"].as_str().expect("text"), test["reason"].as_str().expect("text"))
    }

    /// The counts of the last line, which are those of the JSON.
    fn tally(&self) -> Tally {
        let tally = Tally::parse(&self.last).expect("the last line is the count");
        assert_eq!(trial::counted(&self.json), Ok(tally), "{}", self.json);
        tally
    }
}

const MIXED: &str = "
running 8 tests
test a::good ... ok
test skips ... ok
test noisy ... a driver writes here
ok
test glued ... a driver writes here, ok
test ignored_one ... ignored, no disk
test panics - should panic ... ok
test bad ... FAILED
test worse ... FAILED

successes:

---- a::good stdout ----
skipping nothing

---- skips stdout ----
some talk
skipped: no \"NVLink\" \\ here
skipped: not this one

---- noisy stdout ----
test worse ... ok
successes:

---- worse stdout ----

successes:
    a::good
    skips

failures:

---- bad stdout ----
skipped: half of it

thread 'bad' (17) panicked at tests/x.rs:1:2:
assertion `left == right` failed: bytes
  left: 1
 right: 2
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace

---- worse stdout ----
Error: \"caf\u{e9}\tau lait\"

failures:
    bad
    worse

test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
const MIXED_TESTS: &[&str] = &["a::good", "skips", "noisy", "glued", "ignored_one", "panics", "bad", "worse"];

#[test]
fn results_and_reasons_are_read_from_a_log() {
    let outcome = Kit::new(HETMEM).program("mixed", MIXED_TESTS, MIXED, "exit 101").run(&[]);
    for name in ["a::good", "noisy", "glued", "panics"] {
        assert_eq!(outcome.of("mixed", name), ("passed", ""), "{name}");
    }
    assert_eq!(outcome.of("mixed", "skips"), ("skipped", "no \"NVLink\" \\ here"));
    assert_eq!(outcome.of("mixed", "ignored_one"), ("skipped", "ignored: no disk"));
    let reason = "assertion `left == right` failed: bytes, left: 1, right: 2";
    assert_eq!(outcome.of("mixed", "bad"), ("failed", reason));
    assert_eq!(outcome.of("mixed", "worse"), ("failed", "Error: \"caf?? au lait\""));
    assert_eq!(outcome.of("hetmem", "doctor"), ("passed", ""));
    assert_eq!(outcome.of("hetmem", "bench gpu").0, "skipped");
    assert_eq!(outcome.tally(), Tally { passed: 5, failed: 2, skipped: 3 });
    assert_eq!(outcome.code, Some(1));
    assert_eq!(outcome.results["driver"], "real");
    assert_eq!(outcome.results["kit"], "kit of \"tests\"");
}

#[test]
fn tests_after_a_crash_or_a_limit_have_failed() {
    let output = "\nrunning 3 tests\ntest one ... ok\ntest two ...";
    let tests = &["one", "two", "three"];
    let kit = Kit::new(HETMEM).program("crash", tests, output, "kill -SEGV $$").program(
        "hang",
        tests,
        output,
        "exec sleep 60",
    );
    let outcome = kit.run(&[("HETMEM_KIT_TIMEOUT", "1")]);
    assert_eq!(outcome.of("crash", "one").0, "passed");
    assert_eq!(outcome.of("crash", "two"), ("failed", "the program was killed by signal 11 in this test"));
    assert_eq!(outcome.of("crash", "three"), ("failed", "did not run: the program was killed by signal 11"));
    let (result, reason) = outcome.of("hang", "two");
    assert!(result == "failed" && reason.starts_with("the program was stopped"), "{reason}");
    assert!(reason.contains("after 1 s") && reason.ends_with("in this test"), "{reason}");
    assert_eq!(outcome.tally(), Tally { passed: 3, failed: 4, skipped: 1 });
    assert_eq!(outcome.code, Some(1));
}

#[test]
fn no_program_vanishes() {
    let ok = "test one ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
    let wrong =
        "test one ... ok\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out";
    let kit = Kit::new(HETMEM)
        .program("after", &["one"], ok, "exit 3")
        .program("cut", &["one"], "test one ... ok", "exit 4")
        .program("wrong", &["one"], wrong, "exit 0")
        .program("empty", &[], "running 0 tests", "exit 0");
    let broken = "#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.99' not found\" >&2\nexit 1\n";
    kit.folder.write("bin/tests/broken", broken, true).expect("written");
    let outcome = kit.run(&[]);
    assert_eq!(
        outcome.of("after", "(end)"),
        ("failed", "no test failed, and the program ended with status 3")
    );
    assert_eq!(outcome.of("cut", "(end)").0, "failed");
    assert_eq!(outcome.of("wrong", "(count)").0, "failed");
    assert!(outcome.of("broken", "(start)").1.contains("GLIBC_2.99"));
    assert_eq!(outcome.tally(), Tally { passed: 4, failed: 4, skipped: 1 });
}

#[test]
fn without_tests_or_with_old_results_nothing_passes_for_a_run() {
    let kit = Kit::new(HETMEM);
    let outcome = kit.run(&[]);
    assert_eq!(outcome.of("kit", "(tests)").0, "failed");
    assert_eq!(outcome.code, Some(1));
    let again = kit.command(&kit.around.path().join("out")).output().expect("sh runs");
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("results already"));
}

#[test]
fn a_bench_that_writes_figures_passes_and_one_that_fails_says_why() {
    let hetmem =
        |bench: &str| format!("#!/bin/sh\ncase $* in doctor) echo yes ;; *--help) ;; *) {bench} ;; esac\n");
    let good = Kit::new(&hetmem("echo '{}' >\"$4\"")).run(&[]);
    assert_eq!(good.of("hetmem", "bench gpu"), ("passed", ""));
    let bad = Kit::new(&hetmem("echo no GPU >&2; exit 5")).run(&[]);
    assert_eq!(bad.of("hetmem", "bench gpu"), ("failed", "status 5: no GPU"));
    let silent = Kit::new(&hetmem(":")).run(&[]);
    assert_eq!(silent.of("hetmem", "bench gpu"), ("failed", "it succeeded and wrote no gpu.json"));
}

#[test]
fn the_stand_in_is_named_and_no_figure_is_taken_on_it() {
    let output =
        "test one ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
    // In the loader's way without anybody having asked for it.
    let hetmem = "#!/bin/sh\ncase $* in doctor) echo 'yes  gpu:0  hetmem stand-in GPU 0' ;; *) : ;; esac\n";
    let found = Kit::new(hetmem).program("p", &["one"], output, "exit 0");
    let asked = Kit::new(HETMEM).program("p", &["one"], output, "exit 0");
    let missing = asked.command(&asked.around.path().join("out")).env("HETMEM_KIT_STANDIN", "1").output();
    assert_eq!(missing.expect("sh runs").status.code(), Some(2), "there is no stand-in to run on");
    asked.folder.write("standin/libcuda.so.1", "", false).expect("written");
    for (kit, variables) in [(&found, &[][..]), (&asked, &[("HETMEM_KIT_STANDIN", "1")])] {
        let outcome = kit.run(variables);
        let label = outcome.results["driver"].as_str().expect("text");
        assert!(label.contains("NOT HARDWARE"), "{label}");
        assert_eq!(outcome.of("hetmem", "bench gpu").0, "skipped");
        assert_eq!((outcome.code, outcome.tally()), (Some(0), Tally { passed: 2, failed: 0, skipped: 1 }));
        for path in super::files_under(&kit.around.path().join("out")).expect("a folder") {
            let text = fs::read_to_string(&path).expect("text");
            assert!(text.contains(label), "{}: {text}", path.display());
        }
    }
}
