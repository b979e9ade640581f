//! Programs that the steps run. Not a shell. Invariant: what is run is printed before it runs.

use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use crate::tally::{Report, Tally, TestOutput};

/// Runs a program to its end with its output on this terminal. `Err` says why it did not succeed.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    println!("$ {}", words(command));
    let status = command.status().map_err(|error| format!("{}: {error}", words(command)))?;
    ended(command, status)
}

/// Whether a program can be started and succeeds, without a word on the terminal.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Runs `cargo test ... -- --show-output` and counts its tests. At least one must have run.
pub(crate) fn run_tests(command: &mut Command) -> Report {
    run_tests_to_exit(command).0
}

/// The same, and with which code the program exited, if it did.
pub(crate) fn run_tests_to_exit(command: &mut Command) -> (Report, Option<i32>) {
    let mut output = TestOutput::default();
    let exited = for_each_line(command, |line| {
        if output.line(line) {
            println!("{line}");
        }
    });
    let code = exited.as_ref().ok().and_then(ExitStatus::code);
    (counted(output.tally(), exited.and_then(|status| ended(command, status))), code)
}

/// Runs a program whose last line is its own count, which is taken over instead of printed.
pub(crate) fn run_counting(command: &mut Command) -> Report {
    let mut tally = Tally::default();
    let exited = for_each_line(command, |line| match Tally::parse(line) {
        Some(count) => tally += count,
        None => println!("{line}"),
    });
    counted(tally, exited.and_then(|status| ended(command, status)))
}

/// Runs a program to its end, takes its standard output line by line, and returns its exit code; none after a signal.
pub(crate) fn run_to_exit(command: &mut Command, take: impl FnMut(&str)) -> Result<Option<i32>, String> {
    for_each_line(command, take).map(|status| status.code())
}

/// A report of tests; something is wrong too if a program failed without a failed test, or if there were no tests.
fn counted(tally: Tally, succeeded: Result<(), String>) -> Report {
    let mut report = Report { tally, note: tally.to_string() };
    match succeeded {
        Err(why) if tally.failed == 0 => {
            report.tally.failed = 1;
            report.note = format!("{why}; of the tests that ran, {tally}");
        }
        Ok(()) if tally == Tally::default() => return Report::failed("no test was found"),
        _ => {}
    }
    report
}

/// Runs a program to its end and takes its standard output line by line.
fn for_each_line(command: &mut Command, mut take: impl FnMut(&str)) -> Result<ExitStatus, String> {
    println!("$ {}", words(command));
    command.stdout(Stdio::piped());
    let spawned = command.spawn();
    let failed = |error: io::Error| format!("`{}`: {error}", words(command));
    let mut child = spawned.map_err(failed)?;
    let lines = child.stdout.take().map(BufReader::new);
    // Programs may write bytes that are not UTF-8; a line of them is still a line.
    for line in lines.into_iter().flat_map(|lines| lines.split(b'\n')) {
        take(&String::from_utf8_lossy(&line.map_err(failed)?));
    }
    child.wait().map_err(failed)
}

fn ended(command: &Command, status: ExitStatus) -> Result<(), String> {
    if status.success() { Ok(()) } else { Err(format!("`{}` ended with {status}", words(command))) }
}

fn words(command: &Command) -> String {
    let mut text = String::new();
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default().to_string_lossy();
        text.push_str(&format!("{}={value:?} ", name.to_string_lossy()));
    }
    let program = Path::new(command.get_program());
    // Cargo hands down its own full path; a reader wants a line that can be typed.
    let name = program.file_name().filter(|name| *name == "cargo");
    text.push_str(&name.unwrap_or(program.as_os_str()).to_string_lossy());
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
