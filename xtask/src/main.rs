//! `cargo xtask test`: everything that CI runs; `cargo xtask simulate` and `cargo xtask mutants`: parts of it at length;
//! `cargo xtask kernels`: the PTX; `cargo xtask gpu-kit`: what runs on other machines. Not a build system: cargo builds,
//! this says what to run and counts. Invariant: the last line of `test` is its count, and the exit status agrees with it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod kernels;
mod kit;
mod mutants;
mod process;
mod python;
mod steps;
mod tally;
mod vm;
mod workspace;

use std::process::ExitCode;
use std::time::Instant;

use steps::{STEPS, Step};
use tally::Tally;
use workspace::Workspace;

const USAGE: &str = "\
usage: cargo xtask test [--with-torch] [--only STEP[,STEP...]] [--list]
       cargo xtask simulate (--seeds N | --hours N) [--from S]
       cargo xtask mutants [WORDS]
       cargo xtask kernels [--check]
       cargo xtask gpu-kit [--check]

test      runs every step in order, to the end, and closes with `N passed, N failed, N skipped`.
          --with-torch lets the step python install torch, 2 GB to download, and run its tests with it.
          HETMEM_REQUIRE=STEP[,STEP...] makes a skip of these steps a failure.
simulate  runs the simulation on seeds S, S+1, ... (S is 0 if not given), N of them or for N hours.
mutants   plants known bugs, one at a time, in a copy of the workspace, and lets the simulation find them;
          with WORDS only those whose description contains them.
kernels   makes kernels/ptx/ from kernels/cuda/ with the nvcc of CUDA 13.0, which it installs from PyPI under target/;
          with --check it changes nothing, and fails if a byte differs or an assembler refuses the PTX.
gpu-kit   makes target/gpu-kit, a folder that runs the GPU tests and benches on a machine without Rust;
          with --check the stand-in driver is in it, and it is run here on that.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let given = arguments.len();
    arguments.retain(|argument| *argument != "--with-torch");
    let with_torch = arguments.len() < given;
    let find = || Workspace::find().map(|workspace| workspace.with_torch(with_torch));
    let result = match arguments.as_slice() {
        ["test", "--list"] => {
            for step in STEPS {
                println!("{:12} {}", step.name, step.what);
            }
            Ok(true)
        }
        ["test"] => find().map(|workspace| test(&workspace, STEPS)),
        ["test", "--only", names] => {
            select(names).and_then(|chosen| find().map(|workspace| test(&workspace, &chosen)))
        }
        ["simulate", options @ ..] => seeds(options)
            .and_then(|(run, from)| Workspace::find().and_then(|w| steps::simulate(&w, &run, from))),
        ["mutants"] => Workspace::find().and_then(|w| planted(&w, None)),
        ["kernels"] => Workspace::find().and_then(|w| kernels::kernels(&w, false)),
        ["kernels", "--check"] => Workspace::find().and_then(|w| kernels::kernels(&w, true)),
        ["gpu-kit"] => Workspace::find().and_then(|w| kit::gpu_kit(&w, false)),
        ["gpu-kit", "--check"] => Workspace::find().and_then(|w| kit::gpu_kit(&w, true)),
        ["mutants", words] => Workspace::find().and_then(|w| planted(&w, Some(words))),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

/// The steps of a comma-separated list, in their own order.
fn select(names: &str) -> Result<Vec<Step>, String> {
    let wanted: Vec<&str> = names.split(',').collect();
    if let Some(unknown) = wanted.iter().find(|name| !STEPS.iter().any(|step| step.name == **name)) {
        let known: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
        return Err(format!("no step {unknown:?}; there are {}", known.join(", ")));
    }
    let chosen = STEPS.iter().filter(|step| wanted.contains(&step.name));
    Ok(chosen.copied().collect())
}

fn planted(workspace: &Workspace, only: Option<&str>) -> Result<bool, String> {
    let report = mutants::mutants(workspace, only)?;
    println!("{}", report.note);
    Ok(report.tally.failed == 0)
}

/// The options of `simulate`: how much to run, as the program itself takes it, and the first seed.
fn seeds(options: &[&str]) -> Result<([String; 2], u64), String> {
    let (mut run, mut from) = (None, 0);
    for pair in options.chunks(2) {
        let &[name, value] = pair else {
            return Err(USAGE.to_owned());
        };
        let number: u64 =
            value.parse().map_err(|error| format!("{name} {value:?}: {error}; a whole number is needed"))?;
        match name {
            "--seeds" | "--hours" => run = Some([name.to_owned(), number.to_string()]),
            "--from" => from = number,
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok((run.ok_or(USAGE)?, from))
}

/// Runs the steps and prints what came of each. Returns whether nothing failed.
fn test(workspace: &Workspace, steps: &[Step]) -> bool {
    let required = std::env::var("HETMEM_REQUIRE").unwrap_or_default();
    let mut total = Tally::default();
    let mut lines = Vec::new();
    for step in steps {
        println!("== {}: {}", step.name, step.what);
        let start = Instant::now();
        let mut report = (step.run)(workspace);
        if report.tally.skipped > 0 && required.split(',').any(|name| name == step.name) {
            report = report.with_skips_failed();
        }
        let line = format!(
            "{:12} {:7} {:7.1} s  {}",
            step.name,
            report.word(),
            start.elapsed().as_secs_f64(),
            report.note
        );
        println!("== {line}\n");
        lines.push(line);
        total += report.tally;
    }
    println!("{}\n\n{total}", lines.join("\n"));
    total.failed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_or_explained() {
        let run = |name: &str, count: &str| [name.to_owned(), count.to_owned()];
        assert_eq!(seeds(&["--seeds", "20"]), Ok((run("--seeds", "20"), 0)));
        assert_eq!(seeds(&["--from", "7", "--hours", "2"]), Ok((run("--hours", "2"), 7)));
        for wrong in [&["--seeds"][..], &["--from", "1"], &["--seed", "1"], &[]] {
            assert_eq!(seeds(wrong), Err(USAGE.to_owned()), "{wrong:?}");
        }
        let error = seeds(&["--seeds", "many"]).expect_err("not a number");
        assert!(error.contains("\"many\""), "{error}");
    }

    #[test]
    fn steps_are_chosen_by_name_and_kept_in_order() {
        let chosen = select("loom,fmt").expect("both exist");
        let names: Vec<&str> = chosen.iter().map(|step| step.name).collect();
        assert_eq!(names, ["fmt", "loom"]);
        let error = select("fmt,lomo").expect_err("a slip");
        assert!(error.contains("\"lomo\"") && error.contains("loom"), "{error}");
    }
}
