//! Samples, rounds and rows. Not what is measured. Invariant: a row's percentiles are of samples, not of means.

use std::time::Instant;

use hetmem_client::StoreError;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Align, Output, Table, bytes};

/// One line of a benchmark's result.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) workload: &'static str,
    pub(super) op: String,
    pub(super) size_bytes: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// None where no bytes move.
    pub(super) gib_per_s: Option<f64>,
    pub(super) ceiling_name: String,
    pub(super) ceiling_p50_us: f64,
    /// Of times (lower is better) or of rates (higher is better), as `target` says.
    pub(super) ratio_to_ceiling: f64,
    /// The least and the greatest of the rounds' ratios.
    pub(super) ratio_spread: [f64; 2],
    pub(super) target: String,
}

/// How a ratio is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// Time over the ceiling's time.
    AtMost(f64),
    /// The ceiling's time over time, that is rate over the ceiling's rate.
    AtLeast(f64),
}

/// What is measured beside what.
pub(super) struct Pair<'a> {
    pub(super) workload: &'static str,
    pub(super) op: &'a str,
    pub(super) size_bytes: u64,
    /// Whether bytes move, so that a rate means something.
    pub(super) moves: bool,
    pub(super) ceiling_name: &'a str,
    pub(super) target: Target,
    pub(super) rounds: usize,
    /// Samples in a round.
    pub(super) samples: usize,
}

pub(super) type Sample<'a> = &'a mut dyn FnMut() -> Result<f64, StoreError>;

/// Measures one call, in microseconds.
pub(super) fn timed<R>(call: impl FnOnce() -> R) -> (f64, R) {
    let started = Instant::now();
    let result = call();
    (started.elapsed().as_secs_f64() * 1e6, result)
}

impl Pair<'_> {
    /// Lets ceiling and store take turns. Each sample is a time in microseconds.
    pub(super) fn measure(&self, ceiling: Sample<'_>, ours: Sample<'_>) -> Result<Row, StoreError> {
        let (mut all, mut all_ceiling, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        // The first round warms both up and does not count.
        for round in 0..=self.rounds {
            let collect = |sample: Sample<'_>| -> Result<Vec<f64>, StoreError> {
                (0..self.samples).map(|_| sample()).collect()
            };
            // Who comes first changes from round to round.
            let (theirs, mine) = if round % 2 == 0 {
                let theirs = collect(ceiling)?;
                (theirs, collect(ours)?)
            } else {
                let mine = collect(ours)?;
                (collect(ceiling)?, mine)
            };
            if round == 0 {
                continue;
            }
            let ratio = percentile(&mine, 50) / percentile(&theirs, 50);
            ratios.push(match self.target {
                Target::AtMost(_) => ratio,
                Target::AtLeast(_) => 1.0 / ratio,
            });
            all.extend(mine);
            all_ceiling.extend(theirs);
        }
        let p50_us = percentile(&all, 50);
        Ok(Row {
            workload: self.workload,
            op: self.op.to_owned(),
            size_bytes: self.size_bytes,
            p50_us,
            p99_us: percentile(&all, 99),
            gib_per_s: self.moves.then(|| rate(self.size_bytes, p50_us)),
            ceiling_name: self.ceiling_name.to_owned(),
            ceiling_p50_us: percentile(&all_ceiling, 50),
            ratio_to_ceiling: percentile(&ratios, 50),
            ratio_spread: spread(&ratios),
            target: self.target.to_string(),
        })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "time at most {limit}"),
            Self::AtLeast(limit) => write!(f, "rate at least {limit}"),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
pub(super) fn rate(size_bytes: u64, us: f64) -> f64 {
    size_bytes as f64 / (us * 1e-6) / (1_u64 << 30) as f64
}

pub(super) fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len().saturating_sub(1) * percent).div_ceil(100);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

pub(super) fn spread(ratios: &[f64]) -> [f64; 2] {
    [percentile(ratios, 0), percentile(ratios, 100)]
}

pub(super) fn print(rows: &[Row], out: Output) -> Result<(), Failure> {
    let mut table = Table::new(&[
        ("workload", Align::Left),
        ("op", Align::Left),
        ("size", Align::Right),
        ("p50 us", Align::Right),
        ("p99 us", Align::Right),
        ("GiB/s", Align::Right),
        ("beside", Align::Left),
        ("its p50 us", Align::Right),
        ("ratio", Align::Right),
        ("min..max", Align::Right),
        ("target", Align::Left),
    ]);
    for row in rows {
        table.row([
            row.workload.to_owned(),
            row.op.clone(),
            bytes(row.size_bytes),
            format!("{:.3}", row.p50_us),
            format!("{:.3}", row.p99_us),
            row.gib_per_s.map_or_else(String::new, |rate| format!("{rate:.2}")),
            row.ceiling_name.clone(),
            format!("{:.3}", row.ceiling_p50_us),
            format!("{:.4}", row.ratio_to_ceiling),
            format!("{:.3}..{:.3}", row.ratio_spread[0], row.ratio_spread[1]),
            row.target.clone(),
        ]);
    }
    out.print(|| serde_json::json!(rows), |text| table.write(text))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_read_as_their_target_says() {
        let pair = |target| Pair {
            workload: "test",
            op: "op",
            size_bytes: 1 << 30,
            moves: true,
            ceiling_name: "ceiling",
            target,
            rounds: 3,
            samples: 2,
        };
        let (mut ceiling, mut ours) = (|| Ok(10.0), || Ok(20.0));
        let row = pair(Target::AtMost(1.5)).measure(&mut ceiling, &mut ours).expect("measured");
        assert!((row.ratio_to_ceiling - 2.0).abs() < 1e-9);
        let row = pair(Target::AtLeast(0.9)).measure(&mut ceiling, &mut ours).expect("measured");
        assert!((row.ratio_to_ceiling - 0.5).abs() < 1e-9);
        assert!((row.gib_per_s.expect("a rate") - 5e4).abs() < 1.0);
    }

    #[test]
    fn percentiles_are_samples() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert!((percentile(&samples, 0) - 1.0).abs() < 1e-9);
        assert!((percentile(&samples, 100) - 4.0).abs() < 1e-9);
        assert!(percentile(&[], 50).is_nan());
    }
}
