//! `hetmem bench`: the store beside the bare thing that bounds it, measured in turns in one run. Not a test: nothing
//! here has a limit. Invariant: every row names its ceiling, and its ratio is the median of the rounds' ratios.

mod baseline;
mod local;
mod processors;
mod remote;
mod rows;
mod sweep;

use clap::{Args as ClapArgs, Subcommand};

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
    /// Two nodes over TCP on loopback: gets beside a bare TCP loop, and iperf3 where it is installed
    Remote(Size),
    /// Gets of 256 B to 64 MiB from a node on other processors: always Send, always Read, and as measured
    Sweep(Size),
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

impl Size {
    /// Rounds in which ceiling and store take turns.
    fn rounds(self) -> usize {
        if self.full { 21 } else { 7 }
    }
}

pub(crate) fn run(args: &Args, out: Output) -> Result<(), Failure> {
    match &args.which {
        Which::Local(size) => rows::print(&local::run(*size)?, out),
        Which::Remote(size) => rows::print(&remote::run(*size)?, out),
        Which::Sweep(size) => rows::print(&sweep::run(*size)?, out),
        Which::Peer(args) => baseline::peer(args),
    }
}
