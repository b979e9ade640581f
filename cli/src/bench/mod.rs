//! `hetmem bench`: the store beside the bare thing that bounds it, measured in turns in one run. Not a test: nothing
//! here has a limit. Invariant: every row names its ceiling, and its ratio is the median of the rounds' ratios.

mod baseline;
mod calls;
mod gpu;
mod local;
mod perftest;
mod processors;
mod remote;
mod rows;
mod sweep;
mod verbs;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};

use crate::failure::Failure;
use crate::output::Output;

/// What to measure.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Which,
}

#[derive(Debug, Subcommand)]
enum Which {
    /// One node on this machine: gets and puts beside a Unix-socket round trip and a memcpy
    Local(Size),
    /// Two nodes: gets beside a bare TCP loop, and iperf3 where it is installed
    Remote(Remote),
    /// Gets of 256 B to 64 MiB from a node on other processors: always Send, always Read, and as measured
    Sweep(Remote),
    /// Two nodes over RDMA verbs: gets beside `ib_read_bw` and `ib_send_lat` where perftest is installed, and beside TCP
    Verbs(Remote),
    /// System calls and processor time of a get, by perf
    Calls(Remote),
    /// Objects in GPU memory: copies beside pinned memory, gets by another process, what mapping and registering cost
    Gpu(gpu::Args),
    /// The other end of a measurement
    #[command(hide = true)]
    Peer(baseline::PeerArgs),
}

/// How much of it.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct Size {
    /// More rounds, for figures to keep
    #[arg(long)]
    full: bool,
}

/// How much of it, and between which nodes.
#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct Remote {
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    place: Place,
}

/// Where the nodes are, and what they have.
#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct Place {
    /// What carries bytes between the nodes
    #[arg(long, value_enum, default_value_t = Carrier::Tcp)]
    fabric: Carrier,
    /// Where the nodes listen; RDMA needs an address of a network that an RDMA device is on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    listen: String,
    /// Each node's memory [default: 512MiB for the owner, 2GiB for the reader]
    #[arg(long, value_name = "BYTES", value_parser = crate::demo::size)]
    host: Option<u64>,
    /// No object is longer than this
    #[arg(long, value_name = "BYTES", value_parser = crate::demo::size)]
    up_to: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Carrier {
    /// TCP
    Tcp,
    /// RDMA verbs
    Verbs,
}

impl Carrier {
    const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        }
    }
}

impl Place {
    /// This length, or the greatest that there may be.
    fn up_to(&self, len: usize) -> usize {
        self.up_to.map_or(len, |most| len.min(usize::try_from(most).unwrap_or(usize::MAX)))
    }

    /// The same place with another fabric.
    fn over(&self, fabric: Carrier) -> Self {
        Self { fabric, ..self.clone() }
    }
}

/// Says what was not measured, and why.
fn skipped(what: &str, why: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "skipped: {what}: {why}");
}

impl Size {
    /// Rounds in which ceiling and store take turns.
    fn rounds(self) -> usize {
        if self.full { 21 } else { 7 }
    }
}

pub(crate) fn run(args: &Args, out: Output) -> Result<(), Failure> {
    match &args.which {
        Which::Local(size) => rows::print(&local::run(*size)?, out),
        Which::Remote(args) => rows::print(&remote::run(args.size, &args.place)?, out),
        Which::Sweep(args) => rows::print(&sweep::run(args.size, &args.place)?, out),
        Which::Verbs(args) => rows::print(&verbs::run(args.size, &args.place)?, out),
        Which::Calls(args) => calls::print(&calls::run(args.size, &args.place)?, out),
        Which::Gpu(args) => gpu::run(args, out),
        Which::Peer(args) => baseline::peer(args),
    }
}
