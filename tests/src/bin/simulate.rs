//! Runs seeds of the simulated cluster: `simulate (--seeds N | --hours N) [--from S] [--verbose]`. Not the simulation itself
//! (`hetmem_tests::sim`). Invariant: exit code 0 means that every seed was run and nothing was found.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hetmem_tests::sim::{self, Outcome, Tally};

/// After this many failing seeds no more are looked for, unless told otherwise.
const FAILURES_MAX: usize = 10;
/// How often a run that takes long says how far it is.
const REPORT_EVERY: Duration = Duration::from_secs(300);

struct Arguments {
    from: u64,
    seeds: u64,
    until: Option<Instant>,
    failures: usize,
    threads: usize,
    verbose: bool,
}

const USAGE: &str =
    "usage: simulate [--seeds N | --hours N] [--from S] [--threads T] [--failures F] [--verbose]

  --seeds N    how many seeds to run (default 2000)
  --hours N    run seeds for this long
  --failures F stop at so many failing seeds (default 10)
  --from S     the first of them (default 0)
  --threads T  how many at a time (default: one per core)
  --verbose    print every input and action of every engine; one seed at a time";

fn parse() -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut arguments =
        Arguments { from: 0, seeds: 2_000, until: None, failures: FAILURES_MAX, threads, verbose: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64, String> {
            let value = words.next().ok_or_else(|| format!("{word} needs a number"))?;
            value.parse().map_err(|_| format!("{word} {value}: not a number"))
        };
        match word.as_str() {
            "--seeds" => arguments.seeds = number()?,
            "--hours" => {
                let hours = Duration::from_secs(number()?.saturating_mul(3600));
                arguments.until = Instant::now().checked_add(hours);
                arguments.seeds = u64::MAX;
            }
            "--failures" => arguments.failures = usize::try_from(number()?).unwrap_or(1).max(1),
            "--from" => arguments.from = number()?,
            "--threads" => arguments.threads = usize::try_from(number()?).unwrap_or(1).max(1),
            "--verbose" => arguments.verbose = true,
            other => return Err(format!("{other}: unknown argument")),
        }
    }
    if arguments.verbose {
        arguments.threads = 1;
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> (Tally, Vec<Outcome>, u64) {
    let next = AtomicU64::new(0);
    // What happened, what failed, how many seeds were run, and which report of that comes next.
    let found = Mutex::new((Tally::default(), Vec::new(), 0_u64, 1_u32));
    let reported = Instant::now();
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= arguments.seeds || arguments.until.is_some_and(|until| until <= Instant::now()) {
                return;
            }
            let outcome = sim::run(arguments.from + number, arguments.verbose);
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            found.0.add(&outcome.tally);
            found.2 += 1;
            if let Some(why) = &outcome.failure {
                // A run that takes hours does not keep it to itself until its end.
                let _ = writeln!(std::io::stderr(), "seed {}: {why}", outcome.seed);
                found.1.push(outcome);
            }
            if found.1.len() >= arguments.failures {
                return;
            }
            if reported.elapsed() > REPORT_EVERY.saturating_mul(found.3) {
                found.3 += 1;
                let _ = writeln!(std::io::stderr(), "{} seeds, {} failed so far", found.2, found.1.len());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(work);
        }
    });
    let (tally, failures, seeds, _) = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    (tally, failures, seeds)
}

fn main() -> ExitCode {
    let mut out = std::io::stdout();
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "simulate: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let started = Instant::now();
    let (tally, mut failures, seeds) = run(&arguments);
    failures.sort_by_key(|outcome| outcome.seed);
    for Outcome { seed, failure, .. } in &failures {
        let why = failure.as_deref().unwrap_or_default();
        let _ = writeln!(out, "seed {seed} FAILED {why}");
        let _ = writeln!(
            out,
            "  replay: cargo run --release -p hetmem-tests --bin simulate -- --seeds 1 --from {seed} --verbose"
        );
    }
    let _ = writeln!(
        out,
        "{seeds} seeds, {} failed, {tally}, {:.1} s",
        failures.len(),
        started.elapsed().as_secs_f64()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
