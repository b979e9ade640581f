//! `hetmem bench gpu`: GPU tiers beside the driver's own copies, kernels beside the device's own memory, and what mapping and
//! registering cost. Not NICs. Invariant: no figure of a stand-in driver is written to a file, and each that is shown is marked.

mod copies;
mod costs;
mod gets;
mod kernels;
mod other_end;

use std::path::PathBuf;

use clap::Args as ClapArgs;
use hetmem_client::StoreError;
use hetmem_gpu_mem::{Device, Gpus};
use serde_json::{Value, json};

use super::Size;
use super::rows::{self, Row};
use crate::failure::Failure;
use crate::output::{Output, yes};

pub(super) use other_end::{PeerArgs, peer};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// What the name of a device contains that is none.
const STAND_IN: &str = "stand-in";
/// For rows that tell a cost and have nothing to reach.
const NO_TARGET: &str = "none: to be known";

#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Also write rows and attributes to this file, as JSON: `bench gpu --json FILE`
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    size: Size,
    /// Which GPU, by its ordinal here
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpu: u16,
    /// Nothing is longer than this, objects and segments alike; what memory has no room for is left out anyway
    #[arg(long, value_name = "BYTES", value_parser = crate::demo::size, default_value = "4GiB")]
    up_to: u64,
    /// Go on with a stand-in for the driver, to try this command: rows are marked, and no file is written
    #[arg(long)]
    stand_in: bool,
}

/// What all parts measure on.
struct Bench {
    gpus: Gpus,
    device: Device,
    size: Size,
    up_to: u64,
    /// The name of every row.
    workload: &'static str,
}

impl Bench {
    fn open(args: &Args) -> Result<Self, StoreError> {
        let gpus = Gpus::open()?;
        let is_stand_in = gpus.probe().devices.iter().any(|device| device.name.contains(STAND_IN));
        if is_stand_in && !args.stand_in {
            let why = "stand-in: figures mean nothing (--stand-in tries the command all the same)";
            return Err(StoreError::unavailable("a benchmark of GPUs", why));
        }
        let device = gpus.device(args.gpu)?;
        let workload = if is_stand_in { "gpu (stand-in: means nothing)" } else { "gpu" };
        Ok(Self { gpus, device, size: args.size, up_to: args.up_to, workload })
    }

    fn is_stand_in(&self) -> bool {
        self.workload != "gpu"
    }

    /// Of these lengths, those that are asked for and leave the device a tenth of its free memory, `copies` at a time.
    fn lens<const N: usize>(&self, lens: [u64; N], copies: u64) -> Result<Vec<u64>, StoreError> {
        let free = self.device.memory()?.free_bytes;
        let room = (free - free / 10) / copies.max(1);
        let (fit, left): (Vec<u64>, Vec<u64>) =
            lens.into_iter().filter(|len| *len <= self.up_to).partition(|len| *len <= room);
        for len in left {
            let why = format!("{copies} times as much is not free on gpu:{}", self.device.ordinal());
            super::skipped(&format!("{len} bytes"), &why);
        }
        Ok(fit)
    }
}

pub(super) fn run(args: &Args, out: Output) -> Result<(), Failure> {
    if args.file.is_some() && !out.json {
        return Err(Failure::Usage("a FILE is written as JSON: say --json FILE".to_owned()));
    }
    let bench = Bench::open(args)?;
    let mut rows = Vec::new();
    copies::measure(&bench, &mut rows)?;
    kernels::measure(&bench, &mut rows)?;
    gets::measure(&bench, &mut rows)?;
    costs::measure(&bench, &mut rows)?;
    let told = told(&bench, &rows);
    match &args.file {
        Some(file) if !bench.is_stand_in() => {
            let text = format!("{told:#}\n");
            std::fs::write(file, text)
                .map_err(|error| StoreError::os(format!("write {}", file.display()), error))?;
            rows::print(&rows, Output { json: false })?;
            attributes(&bench, Output { json: false })
        }
        Some(_) => {
            super::skipped("the file", "stand-in: figures mean nothing");
            rows::print(&rows, Output { json: false })?;
            attributes(&bench, Output { json: false })
        }
        None if out.json => Ok(out.print(|| told, |_| Ok(()))?),
        None => {
            rows::print(&rows, out)?;
            attributes(&bench, out)
        }
    }
}

/// Everything as JSON: the rows as other benchmarks have them, and what the devices say of themselves.
fn told(bench: &Bench, rows: &[Row]) -> Value {
    let probe = bench.gpus.probe();
    json!({
        "rows": rows,
        "gpu": bench.device.ordinal(),
        "stand_in": bench.is_stand_in(),
        "batch_copies": bench.gpus.batch_copies().is_ok(),
        "kernels": bench.device.can_gather().is_ok(),
        "granularity_bytes": bench.device.granularity_bytes().ok(),
        "probe": probe,
    })
}

/// What the measured device says of itself.
fn attributes(bench: &Bench, out: Output) -> Result<(), Failure> {
    let device = bench.device.info();
    let attributes = &device.attributes;
    out.print(
        || Value::Null,
        |text| {
            writeln!(text)?;
            let granularity =
                bench.device.granularity_bytes().map_or_else(|why| why.to_string(), |len| len.to_string());
            for (name, value) in [
                ("device", device.name.clone()),
                (
                    "compute capability",
                    format!("{}.{}", device.compute_capability.0, device.compute_capability.1),
                ),
                ("memory bytes", device.memory_bytes.to_string()),
                ("virtual memory", yes(attributes.virtual_memory).to_owned()),
                ("POSIX descriptor export", yes(attributes.posix_descriptor_export).to_owned()),
                ("GPUDirect RDMA", yes(attributes.gpudirect_rdma).to_owned()),
                (
                    "the same with virtual memory",
                    yes(attributes.gpudirect_rdma_with_virtual_memory).to_owned(),
                ),
                ("dma-buf", yes(attributes.dma_buf).to_owned()),
                ("read-only registration", yes(attributes.read_only_host_register).to_owned()),
                ("flush options", attributes.flush_writes_options.to_string()),
                ("writes ordering", attributes.writes_ordering.to_string()),
                ("batch copies", yes(bench.gpus.batch_copies().is_ok()).to_owned()),
                ("kernels", yes(bench.device.can_gather().is_ok()).to_owned()),
                ("granularity bytes", granularity),
                ("peers", format!("{:?}", device.peers)),
            ] {
                writeln!(text, "{name:<30} {value}")?;
            }
            Ok(())
        },
    )?;
    Ok(())
}
