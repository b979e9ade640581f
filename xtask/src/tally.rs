//! Counts of what passed, failed and was skipped, and how they are read from the output of `cargo test`. Not a test
//! runner. Invariant: a test that printed `skipped: reason` counts as skipped, not as passed.

use std::fmt;
use std::ops::AddAssign;

/// How many tests, or steps that are no tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Tally {
    /// Reads `N passed, N failed` with or without `, N skipped`, alone on its line.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut tally = Self::default();
        let mut parts = line.trim().split(", ");
        tally.passed = parts.next()?.strip_suffix(" passed")?.parse().ok()?;
        tally.failed = parts.next()?.strip_suffix(" failed")?.parse().ok()?;
        if let Some(skipped) = parts.next() {
            tally.skipped = skipped.strip_suffix(" skipped")?.parse().ok()?;
        }
        parts.next().is_none().then_some(tally)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) tally: Tally,
    /// Why it failed or was skipped, or what it counted.
    pub(crate) note: String,
}

impl Report {
    /// One step that is no test and succeeded.
    pub(crate) fn passed() -> Self {
        let passed = Tally { passed: 1, ..Tally::default() };
        Self { tally: passed, note: String::new() }
    }

    pub(crate) fn failed(why: impl Into<String>) -> Self {
        let failed = Tally { failed: 1, ..Tally::default() };
        Self { tally: failed, note: why.into() }
    }

    pub(crate) fn skipped(why: impl fmt::Display) -> Self {
        let skipped = Tally { skipped: 1, ..Tally::default() };
        Self { tally: skipped, note: format!("skipped: {why}") }
    }

    /// The same, where a skip is not accepted.
    pub(crate) fn with_skips_failed(mut self) -> Self {
        self.tally.failed += self.tally.skipped;
        self.tally.skipped = 0;
        self.note.push_str(" (required by HETMEM_REQUIRE)");
        self
    }

    /// One word for the step as a whole.
    pub(crate) fn word(&self) -> &'static str {
        match self.tally {
            Tally { failed: 1.., .. } => "FAILED",
            Tally { passed: 0, skipped: 1.., .. } => "skipped",
            _ => "ok",
        }
    }
}

/// Reads the output of test programs that were run with `--show-output`, line by line.
#[derive(Debug, Default)]
pub(crate) struct TestOutput {
    tally: Tally,
    /// Tests of the running program that said that they were skipped.
    said_skipped: usize,
    /// Inside the outputs of tests that passed.
    in_successes: bool,
    /// This test's output has been counted already.
    counted: bool,
}

impl TestOutput {
    /// Takes in one line; says whether a person wants to see it.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
            return true;
        }
        match line {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ if line.starts_with("---- ") => self.counted = false,
            _ if self.in_successes && line.starts_with("skipped: ") => {
                if !self.counted {
                    self.said_skipped += 1;
                }
                self.counted = true;
                return true;
            }
            _ => {}
        }
        !self.in_successes
    }

    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// `ok. 7 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.02s`
    fn result(&mut self, result: &str) {
        let count = |word: &str| {
            let part = result.split([';', '.']).find_map(|part| part.trim().strip_suffix(word));
            part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
        };
        let passed: usize = count(" passed");
        let said_skipped = self.said_skipped.min(passed);
        self.tally += Tally {
            passed: passed - said_skipped,
            failed: count(" failed"),
            skipped: count(" ignored") + said_skipped,
        };
        self.said_skipped = 0;
        self.in_successes = false;
        self.counted = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: usize, failed: usize, skipped: usize) -> Tally {
        Tally { passed, failed, skipped }
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let mut output = TestOutput::default();
        let text = "\
running 3 tests
test a ... ok
test b ... FAILED

test result: FAILED. 2 passed; 1 failed; 4 ignored; 0 measured; 9 filtered out; finished in 0.05s
test result: ok. 10 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s
test result: of another kind
";
        for line in text.lines() {
            assert!(output.line(line), "{line}");
        }
        assert_eq!(output.tally(), tally(12, 1, 4));
        assert_eq!(output.tally().to_string(), "12 passed, 1 failed, 4 skipped");
    }

    #[test]
    fn a_count_is_read_back() {
        for count in [tally(0, 0, 0), tally(12, 3, 4)] {
            assert_eq!(Tally::parse(&count.to_string()), Some(count));
        }
        assert_eq!(Tally::parse("2 passed, 1 failed"), Some(tally(2, 1, 0)));
        for other in [
            "",
            "2 passed",
            "x passed, 1 failed",
            "1 passed, 1 failed, 1 skipped, 1 lost",
            "loom: 1 passed, 0 failed",
        ] {
            assert_eq!(Tally::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_test_that_says_skipped_is_one_skip() {
        let mut output = TestOutput::default();
        let text = "\
successes:

---- gpu stdout ----
skipped: no GPU
skipped: still no GPU

---- other stdout ----
chatter

successes:
    gpu
    other
failures:

---- bad stdout ----
skipped: not counted, this one failed

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.05s
";
        let shown: Vec<&str> = text.lines().filter(|line| output.line(line)).collect();
        assert_eq!(output.tally(), tally(1, 1, 1));
        assert!(!shown.contains(&"chatter"));
        assert!(shown.contains(&"skipped: no GPU"));
        assert!(shown.contains(&"---- bad stdout ----"));
    }

    #[test]
    fn words_and_required_skips() {
        assert_eq!(Report::passed().word(), "ok");
        assert_eq!(Report::failed("x").word(), "FAILED");
        let skipped = Report::skipped("no pip");
        assert_eq!((skipped.word(), skipped.note.as_str()), ("skipped", "skipped: no pip"));
        let required = skipped.with_skips_failed();
        assert_eq!((required.word(), required.tally), ("FAILED", tally(0, 1, 0)));
    }
}
