//! What the demo measured: one sample per call, summed up by step, size class and path. Not a benchmark: `hetmem
//! bench` compares with bare loops. Invariant: percentiles are of samples that were taken, never interpolated.

use std::collections::BTreeMap;
use std::io::{self, Write};

use hetmem_client::Path;
use serde_json::{Value, json};

use crate::output::{Align, Table, bytes, nanos};

/// The largest length of each size class; the last class has none.
const CLASSES: [(u64, &str); 4] =
    [(4 << 10, "<= 4 KiB"), (64 << 10, "<= 64 KiB"), (1 << 20, "<= 1 MiB"), (16 << 20, "<= 16 MiB")];
const LARGEST: &str = "larger";
/// The class of calls about all tensors.
const ALL: usize = CLASSES.len() + 1;

/// What the demo does, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// The source's bytes into node A.
    Put,
    /// From node A, through node B.
    Fetch,
    /// On node A, in place.
    GetA,
    /// On node B, which has its own copy by now.
    GetB,
    /// From node A, through node B, all tensors in one call.
    FetchAll,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Put => "put on A",
            Self::Fetch => "fetch on B",
            Self::GetA => "get on A",
            Self::GetB => "get on B again",
            Self::FetchAll => "get_many on B",
        }
    }
}

/// One row: what, the class's number, and how.
type Group = (Step, usize, &'static str);

/// All samples, by row.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    groups: BTreeMap<Group, Series>,
}

/// One row's samples.
#[derive(Debug, Default)]
struct Series {
    len_bytes: u64,
    nanos: Vec<u64>,
}

impl Samples {
    /// Adds one call: how many bytes it was about, how they came (none for a put), how long it took.
    pub(crate) fn add(&mut self, step: Step, len_bytes: u64, path: Option<Path>, nanos: u64) {
        let class = CLASSES.iter().position(|(most, _)| len_bytes <= *most).unwrap_or(CLASSES.len());
        let how = match path {
            None => "copy",
            Some(Path::Local) => "local",
            Some(Path::Eager) => "eager",
            Some(Path::Read) => "read",
            Some(Path::Push) => "push",
            Some(_) => "put",
        };
        let group = self.groups.entry((step, class, how)).or_default();
        group.len_bytes += len_bytes;
        group.nanos.push(nanos);
    }

    /// Adds one call about all tensors.
    pub(crate) fn add_all(&mut self, step: Step, len_bytes: u64, nanos: u64) {
        let group = self.groups.entry((step, ALL, "batch")).or_default();
        group.len_bytes += len_bytes;
        group.nanos.push(nanos);
    }

    /// Calls of a step that went this way.
    pub(crate) fn count(&self, step: Step, path: Path) -> usize {
        let name = path.to_string();
        let of = self.groups.iter().filter(|((at, _, how), _)| *at == step && *how == name);
        of.map(|(_, group)| group.nanos.len()).sum()
    }

    fn rows(&self) -> Vec<Row> {
        self.groups.iter().map(|(group, samples)| Row::new(*group, samples)).collect()
    }

    pub(crate) fn to_json(&self) -> Value {
        self.rows().iter().map(Row::to_json).collect()
    }

    pub(crate) fn write(&self, text: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new(&[
            ("step", Align::Left),
            ("size", Align::Left),
            ("path", Align::Left),
            ("count", Align::Right),
            ("bytes", Align::Right),
            ("p50", Align::Right),
            ("p99", Align::Right),
            ("GiB/s", Align::Right),
        ]);
        for row in self.rows() {
            table.row([
                row.step.to_owned(),
                row.class.to_owned(),
                row.path.to_owned(),
                row.count.to_string(),
                bytes(row.len_bytes),
                nanos(row.p50),
                nanos(row.p99),
                row.gib_per_s.map_or("in place".to_owned(), |speed| format!("{speed:.2}")),
            ]);
        }
        table.write(text)
    }
}

/// One row of the table.
struct Row {
    step: &'static str,
    class: &'static str,
    path: &'static str,
    count: usize,
    len_bytes: u64,
    p50: u64,
    p99: u64,
    /// None where no byte moved: a get in place takes the same time for any length.
    gib_per_s: Option<f64>,
}

impl Row {
    fn new((step, class, path): Group, samples: &Series) -> Self {
        let mut nanos = samples.nanos.clone();
        nanos.sort_unstable();
        let total: u64 = nanos.iter().sum();
        let speed = samples.len_bytes as f64 / (total.max(1) as f64 / 1e9) / f64::from(1 << 30);
        Self {
            step: step.name(),
            class: match class {
                ALL => "all at once",
                class => CLASSES.get(class).map_or(LARGEST, |(_, name)| name),
            },
            path,
            count: nanos.len(),
            len_bytes: samples.len_bytes,
            p50: percentile(&nanos, 50),
            p99: percentile(&nanos, 99),
            gib_per_s: (path != "local").then_some(speed),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "step": self.step, "size_class": self.class, "path": self.path, "count": self.count,
            "bytes": self.len_bytes, "p50_us": self.p50 as f64 / 1e3, "p99_us": self.p99 as f64 / 1e3,
            "gib_per_s": self.gib_per_s,
        })
    }
}

/// The smallest sample that is not below this percentage of all samples; they are sorted.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<u64> = (1..=200).collect();
        assert_eq!((percentile(&samples, 50), percentile(&samples, 99)), (100, 198));
        assert_eq!((percentile(&[7], 50), percentile(&[7], 99), percentile(&[], 50)), (7, 7, 0));
    }

    #[test]
    fn calls_are_grouped_by_step_class_and_path() {
        let mut samples = Samples::default();
        samples.add(Step::Fetch, 4096, Some(Path::Eager), 1_000);
        samples.add(Step::Fetch, 1, Some(Path::Eager), 3_000);
        samples.add(Step::Fetch, 4097, Some(Path::Read), 1_000);
        samples.add(Step::GetA, 17 << 20, Some(Path::Local), 100);
        samples.add(Step::Put, 1 << 30, None, 1_000_000_000);
        samples.add_all(Step::FetchAll, 1 << 20, 1_000_000);
        assert_eq!(samples.count(Step::Fetch, Path::Eager), 2);
        let rows = samples.to_json();
        let rows = rows.as_array().expect("rows");
        let row = |step: &str, class: &str| {
            let found = rows.iter().find(|row| row["step"] == step && row["size_class"] == class);
            found.expect("a row").clone()
        };
        assert_eq!(rows.len(), 5);
        assert_eq!(row("get_many on B", "all at once")["path"], "batch");
        assert_eq!(row("fetch on B", "<= 4 KiB")["bytes"], 4097);
        assert_eq!(row("fetch on B", "<= 64 KiB")["path"], "read");
        assert_eq!(row("get on A", "larger")["gib_per_s"], Value::Null);
        assert_eq!(row("put on A", "larger")["gib_per_s"], 1.0);
    }
}
