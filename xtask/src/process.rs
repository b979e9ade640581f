//! Programs that the steps run. Not a shell. Invariant: what is run is printed before it runs.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::tally::{Report, TestOutput};

/// Runs a program to its end with its output on this terminal. `Err` says why it did not succeed.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    println!("$ {}", words(command));
    let status = command
        .status()
        .map_err(|error| format!("{}: {error}", words(command)))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`{}` ended with {status}", words(command)))
    }
}

/// Whether a program can be started and succeeds, without a word on the terminal.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Runs `cargo test ... -- --show-output` and counts its tests. At least one must have run.
pub(crate) fn run_tests(command: &mut Command) -> Report {
    println!("$ {}", words(command));
    let mut child = match command.stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return Report::failed(format!("{}: {error}", words(command))),
    };
    let mut output = TestOutput::default();
    let lines = child.stdout.take().map(BufReader::new);
    for line in lines
        .into_iter()
        .flat_map(|lines| lines.split(b'\n'))
        .map_while(Result::ok)
    {
        let line = String::from_utf8_lossy(&line);
        if output.line(&line) {
            println!("{line}");
        }
    }
    let succeeded = child.wait().is_ok_and(|status| status.success());
    let mut report = Report {
        tally: output.tally(),
        note: output.tally().to_string(),
    };
    let ran = report.tally.passed + report.tally.failed + report.tally.skipped;
    if !succeeded && report.tally.failed == 0 {
        report.tally.failed = 1;
        report
            .note
            .push_str("; a test program did not build or did not end well");
    } else if ran == 0 {
        report.tally.failed = 1;
        report.note.push_str("; no test was found");
    }
    report
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
