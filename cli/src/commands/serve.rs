//! `hetmem serve`: the one place of the command line that runs a node. Not the node (`hetmem_node`).
//! Invariant: standard output gets one line of JSON when the node is ready, everything else goes to standard error.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};

use hetmem_client::StoreError;
use hetmem_node::{Config, Node};
use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// Each flag is the configuration key of the same name; a flag wins over the file.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// The configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This node's name in the cluster; the same after a restart
    #[arg(long)]
    name: Option<String>,
    /// Where other nodes connect; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// The nodes that may keep the cluster's directory, in order, the same on every node: repeated, or with commas
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    join: Vec<String>,
    /// Memory for objects: bytes, 4GiB, 25%
    #[arg(long, value_name = "SIZE")]
    host: Option<String>,
    /// Objects that the index has room for
    #[arg(long, value_name = "COUNT")]
    max_objects: Option<String>,
    /// auto, off or require
    #[arg(long, value_name = "POLICY")]
    huge_pages: Option<String>,
    /// Objects up to this size come inside the answer: auto or a size
    #[arg(long, value_name = "SIZE")]
    threshold: Option<String>,
    /// How long a peer may take to read what was granted to it
    #[arg(long, value_name = "MS")]
    lease_ms: Option<String>,
    /// How often nodes say that they are alive
    #[arg(long, value_name = "MS")]
    heartbeat_ms: Option<String>,
    /// The most memory granted to one client: a size or a share
    #[arg(long, value_name = "SIZE")]
    client_quota: Option<String>,
    /// TCP streams for large reads, per peer; 0: chosen for this machine
    #[arg(long, value_name = "COUNT")]
    streams: Option<String>,
    /// auto, tcp, verbs, or verbs-push: the same, and this node's large objects are pushed, not read
    #[arg(long)]
    fabric: Option<String>,
    /// Memory of the GPU tiers, taken when objects come: auto, off, a size or a share of each, or N=SIZE,...
    #[arg(long, value_name = "SIZE")]
    gpu: Option<String>,
    /// Stop when standard input closes: the node then never outlives the process that started it
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

impl Args {
    /// The flags that were given, as configuration keys and values.
    fn overrides(&self, socket: Option<&Path>) -> Result<Vec<(String, String)>, StoreError> {
        let socket = match socket.map(Path::to_str) {
            Some(None) => return Err(StoreError::invalid("socket", "the path is not UTF-8")),
            Some(path) => path.map(str::to_owned),
            None => None,
        };
        let join = (!self.join.is_empty()).then(|| self.join.join(","));
        let given = [
            ("name", &self.name),
            ("socket", &socket),
            ("listen", &self.listen),
            ("join", &join),
            ("host", &self.host),
            ("max_objects", &self.max_objects),
            ("huge_pages", &self.huge_pages),
            ("threshold", &self.threshold),
            ("lease_ms", &self.lease_ms),
            ("heartbeat_ms", &self.heartbeat_ms),
            ("client_quota", &self.client_quota),
            ("streams", &self.streams),
            ("fabric", &self.fabric),
            ("gpu", &self.gpu),
        ];
        let given = given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)));
        Ok(given.collect())
    }
}

pub(crate) fn run(args: &Args, socket: Option<&Path>) -> Result<(), Failure> {
    let filter = EnvFilter::try_from_env("HETMEM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(io::stderr).init();
    let config = Config::load(args.config.as_deref(), args.overrides(socket)?)?;
    let node = Node::start(config)?;
    if node.is_exposed() {
        tracing::warn!(
            address = node.address(),
            "other machines can connect, and nobody is asked who they are: only serve so in a network you trust"
        );
    }
    if args.stop_with_stdin {
        stop_with_stdin()?;
    }
    tracing::info!(name = node.name(), address = node.address(), socket = %node.socket().display(), "ready");
    let ready = json!({
        "ready": true, "socket": node.socket(), "address": node.address(), "name": node.name(),
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{ready}")?;
    out.flush()?;
    drop(out);
    Ok(node.run_until_signal()?)
}

/// Ends this process in its orderly way once standard input is at its end, which also happens when the process at
/// its other end is killed.
fn stop_with_stdin() -> Result<(), StoreError> {
    let watch = || {
        let mut byte = [0];
        while matches!(io::stdin().lock().read(&mut byte), Ok(read) if read > 0) {}
        // This process exists and may signal itself; there is nobody to tell of a failure.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
    };
    let spawned = std::thread::Builder::new().name("stdin".to_owned()).spawn(watch);
    spawned.map(drop).map_err(|error| StoreError::os("start a thread", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_keys_of_the_same_name() {
        let args = Args { lease_ms: Some("7".to_owned()), ..Args::default() };
        let overrides = args.overrides(Some(Path::new("/s"))).expect("UTF-8");
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(overrides, [pair("socket", "/s"), pair("lease_ms", "7")]);
    }

    #[test]
    fn there_is_a_flag_for_every_key() {
        use clap::CommandFactory as _;
        let command = crate::Cli::command();
        let serve = command.find_subcommand("serve").expect("serve");
        let has = |key: &str| {
            let mut flags = serve.get_arguments().chain(command.get_arguments());
            flags.any(|flag| flag.get_id() == key)
        };
        for (key, _, _) in hetmem_node::KEYS {
            assert!(has(key), "no flag for {key}");
        }
    }
}
