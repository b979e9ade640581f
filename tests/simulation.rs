//! The simulated cluster (`hetmem_tests::sim`) on a few hundred seeds. Not the long run, which is `simulate --seeds N`.
//! Invariant: the seeds are always the same ones, so that a failure here is one for everybody.
#![allow(clippy::print_stdout, reason = "what a run covered belongs into its log")]

use hetmem_tests::sim::{self, Tally};

fn run(from: u64, seeds: u64) -> Tally {
    let mut tally = Tally::default();
    for seed in from..from + seeds {
        let outcome = sim::run(seed, false);
        if let Some(why) = outcome.failure {
            panic!("seed {seed}: {why}\nreplay: simulate --seeds 1 --from {seed} --verbose");
        }
        tally.add(&outcome.tally);
    }
    println!("{seeds} seeds, {tally}");
    tally
}

#[test]
fn nothing_is_found_in_the_first_seeds() {
    run(0, 100);
}

#[test]
fn nothing_is_found_in_the_next_seeds() {
    run(100, 100);
}

/// A simulation that reaches nothing finds nothing.
#[test]
fn the_seeds_reach_what_they_are_for() {
    let tally = run(200, 150);
    let reached = [
        ("faults", tally.faults),
        ("gets in place", tally.hits),
        ("gets that raced a withdrawal", tally.misses),
        ("eager gets", tally.eager),
        ("gets by read", tally.rendezvous),
        ("reads that came too late", tally.late_reads),
        ("gets at known places", tally.known),
        ("known places that were given up", tally.outdated),
        ("evictions", tally.evicted),
        ("frames of several messages", tally.batches),
        ("objects handed over with others", tally.handed),
        ("objects sealed", tally.sealed),
        ("keys found everywhere", tally.durable),
        ("objects on several nodes", tally.replicated),
        ("objects that outlived their node", tally.outlived),
        ("replicas", tally.replicas),
        ("directories that changed hands", tally.successions),
        ("deletes while a node was away", tally.deleted_for_good),
    ];
    for (what, count) in reached {
        assert!(count > 0, "no {what} in 150 seeds: {tally}");
    }
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in 0..20 {
        let (first, second) = (sim::run(seed, false), sim::run(seed, false));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first.tally, second.tally, "seed {seed}");
        assert_eq!(first.failure, second.failure, "seed {seed}");
    }
    assert_ne!(sim::run(1, false).trace, sim::run(2, false).trace);
}
