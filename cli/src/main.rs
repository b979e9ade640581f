//! The command line. Not the store: each command is a few calls of `hetmem_client` or `hetmem_node`.
//! Invariant: standard output carries what was asked for, standard error everything else, and the exit code says
//! how it went (`failure`).

mod bench;
mod commands;
mod copy_back;
mod demo;
mod failure;
mod output;
mod receipts;
mod tiers;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{doctor, get, keys, put, serve, status};
use failure::{EXIT_CODES, Failure};
use output::Output;

/// A store for tensors in shared memory, on one node or on many.
#[derive(Debug, Parser)]
#[command(name = "hetmem", version, after_help = EXIT_CODES)]
struct Cli {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// The node's socket [default: $HETMEM_SOCKET, else $XDG_RUNTIME_DIR/hetmem.sock, else /tmp/hetmem-UID.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node until SIGTERM or SIGINT
    Serve(Box<serve::Args>),
    /// Put a file: a .safetensors file as one object per tensor, a .npy file as a tensor, any other as bytes
    Put(put::Args),
    /// Get an object, or all objects under a prefix, into a file
    Get(get::Args),
    /// List objects by prefix
    Ls(keys::LsArgs),
    /// Say what is known about an object
    Stat(keys::StatArgs),
    /// Delete objects on every node
    Rm(keys::KeysArgs),
    /// Never evict objects from this node
    Pin(keys::KeysArgs),
    /// Let objects be evicted again
    Unpin(keys::KeysArgs),
    /// Show the node, its tiers, its peers and its counters
    Status,
    /// Say for each capability whether this machine has it, why, and what to do
    Doctor,
    /// Move a state dict between two nodes on this machine and check every byte
    Demo(demo::Args),
    /// Measure the store beside the bare thing that bounds it
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let mut err = std::io::stderr().lock();
            // Without a standard error there is nobody left to tell.
            let _ = match (&failure, json) {
                (Failure::OutputClosed, _) => Ok(()),
                (failure, true) => writeln!(err, "{}", failure.to_json()),
                (failure, false) => writeln!(err, "hetmem: {failure}"),
            };
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let out = Output { json: cli.json };
    let socket = cli.socket.as_deref();
    match cli.command {
        Command::Serve(args) => serve::run(&args, socket),
        Command::Put(args) => put::run(&args, socket, out),
        Command::Get(args) => get::run(&args, socket, out),
        Command::Ls(args) => keys::ls(&args, socket, out),
        Command::Stat(args) => keys::stat(&args, socket, out),
        Command::Rm(args) => keys::rm(&args, socket, out),
        Command::Pin(args) => keys::pin(&args, true, socket, out),
        Command::Unpin(args) => keys::pin(&args, false, socket, out),
        Command::Status => status::run(socket, out),
        Command::Doctor => doctor::run(socket, out),
        Command::Demo(args) => demo::run(&args, out),
        Command::Bench(args) => bench::run(&args, out),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_and_socket_stand_anywhere() {
        for line in [
            &["hetmem", "--json", "--socket", "/s", "ls", "p"][..],
            &["hetmem", "ls", "p", "--json", "--socket", "/s"][..],
        ] {
            let cli = Cli::try_parse_from(line).expect("a valid line");
            assert!(cli.json && cli.socket.is_some());
        }
    }
}
