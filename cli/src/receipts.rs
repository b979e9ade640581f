//! Receipts as `--receipt` shows them: one per object, as text or JSON. Not what they say (`hetmem_core::receipt`).
//! Invariant: nothing is kept of receipts that nobody asked for.

use std::io::{self, Write};

use clap::ValueEnum;
use hetmem_client::{Key, Receipt, ZeroCopy};
use serde_json::{Value, json};

/// What is wanted of copies, and whether to tell about them.
#[derive(Clone, Copy, Debug, clap::Args)]
// The commands that flatten this have an argument group of the type's name already.
#[group(id = "receipts")]
pub(crate) struct Args {
    /// Say for each object how its bytes were moved
    #[arg(long)]
    pub(crate) receipt: bool,
    /// Whether bytes may pass through a buffer that is neither source nor target; required fails rather than let them
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Wanted::Preferred)]
    zero_copy: Wanted,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wanted {
    Preferred,
    Required,
}

impl Args {
    pub(crate) fn zero_copy(self) -> ZeroCopy {
        match self.zero_copy {
            Wanted::Preferred => ZeroCopy::Preferred,
            Wanted::Required => ZeroCopy::Required,
        }
    }
}

/// Receipts of one command.
#[derive(Debug)]
pub(crate) struct Receipts {
    wanted: bool,
    all: Vec<(Key, Receipt)>,
}

impl Receipts {
    pub(crate) fn new(args: Args) -> Self {
        Self { wanted: args.receipt, all: Vec::new() }
    }

    pub(crate) fn add(&mut self, key: &Key, receipt: impl FnOnce() -> Receipt) {
        if self.wanted {
            self.all.push((key.clone(), receipt()));
        }
    }

    /// Adds them to a command's result, if they were asked for.
    pub(crate) fn in_json(&self, mut result: Value) -> Value {
        if self.wanted {
            result["receipts"] = self.all.iter().map(|(key, receipt)| json_of(key, receipt)).collect();
        }
        result
    }

    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for (key, receipt) in &self.all {
            let Receipt { path, bytes, staged_bytes, round_trips, .. } = receipt;
            write!(out, "{key}: {path}, {bytes} bytes from {} to {}", receipt.from, receipt.to)?;
            if let Some(fabric) = &receipt.fabric {
                write!(out, " over {fabric}, {round_trips} round trips")?;
            }
            write!(out, ", {staged_bytes} bytes staged")?;
            if let Some(threshold) = receipt.threshold_bytes {
                write!(out, ", threshold {threshold}")?;
            }
            match receipt.elapsed {
                Some(elapsed) => writeln!(out, ", {:.1} us", elapsed.as_secs_f64() * 1e6)?,
                None => writeln!(out)?,
            }
        }
        Ok(())
    }
}

fn json_of(key: &Key, receipt: &Receipt) -> Value {
    let place = |place: &hetmem_client::Place| json!({ "node": &*place.node, "tier": place.tier.map(|tier| tier.to_string()) });
    json!({
        "key": key.as_str(),
        "path": receipt.path.to_string(),
        "fabric": receipt.fabric.as_deref(),
        "from": place(&receipt.from),
        "to": place(&receipt.to),
        "bytes": receipt.bytes,
        "staged_bytes": receipt.staged_bytes,
        "round_trips": receipt.round_trips,
        "threshold_bytes": receipt.threshold_bytes,
        "elapsed_us": receipt.elapsed.map(|elapsed| elapsed.as_secs_f64() * 1e6),
    })
}
