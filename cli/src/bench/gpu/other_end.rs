//! The other processes of these measurements: a reader of objects in GPU memory, an importer of segments. Not what is made of
//! their figures. Invariant: they time themselves, and end with the process that started them.

use std::collections::VecDeque;
use std::io::{BufRead as _, IoSlice};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args as ClapArgs, Subcommand};
use hetmem_client::{GetOptions, Key, Placed, Store, StoreError, Tier};
use hetmem_gpu_mem::{AccessRights, Gpus, Segment};
use hetmem_host_mem::socket;

use crate::bench::baseline;
use crate::bench::rows::timed;
use crate::failure::Failure;

#[derive(Debug, ClapArgs)]
pub(crate) struct PeerArgs {
    #[command(subcommand)]
    which: Peer,
}

#[derive(Debug, Subcommand)]
enum Peer {
    /// Gets one object on a GPU as often as each line says, and prints what each get took in nanoseconds
    Get { socket: PathBuf, key: String, ordinal: u16 },
    /// Imports each segment that it is sent, and answers what that took in nanoseconds
    Import { path: PathBuf, ordinal: u16 },
}

/// Runs as the other end, until this end goes.
pub(in crate::bench) fn peer(args: &PeerArgs) -> Result<(), Failure> {
    match &args.which {
        Peer::Get { socket, key, ordinal } => get_peer(socket, key, *ordinal)?,
        Peer::Import { path, ordinal } => import_peer(path, *ordinal)?,
    }
    Ok(())
}

fn get_peer(socket: &Path, key: &str, ordinal: u16) -> Result<(), StoreError> {
    let store = Store::connect(Some(socket))?;
    let (key, tier, options) = (Key::new(key)?, Tier::Gpu(ordinal), GetOptions::default());
    let get = || match store.get_in(&key, tier, &options)? {
        Placed::Gpu(object) => Ok(object),
        Placed::Host(_) => Err(StoreError::unavailable("an object in GPU memory", "it is in host memory")),
    };
    drop(get()?);
    baseline::ready("ready");
    let mut samples = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let count = line.ok().and_then(|line| line.trim().parse::<usize>().ok()).unwrap_or(0);
        samples.clear();
        for _ in 0..count {
            let started = Instant::now();
            drop(std::hint::black_box(get()?));
            samples.push(started.elapsed().as_nanos().to_string());
        }
        baseline::ready(&samples.join(" "));
    }
    Ok(())
}

/// A reader in a process of its own.
pub(super) struct Reader {
    process: baseline::Process,
    /// What it has told and nobody has asked for yet, in microseconds.
    told: VecDeque<f64>,
}

impl Reader {
    pub(super) fn start(socket: &Path, key: &str, ordinal: u16) -> Result<Self, StoreError> {
        let (socket, ordinal) = (socket.display().to_string(), ordinal.to_string());
        let (process, _) = baseline::Process::start(&["gpu", "get", &socket, key, &ordinal])?;
        Ok(Self { process, told: VecDeque::new() })
    }

    /// One get, of those of a round, which are made one after the other.
    pub(super) fn sample(&mut self, round: usize) -> Result<f64, StoreError> {
        if self.told.is_empty() {
            let line = self.process.ask(&round.to_string())?;
            let samples = line.split(' ').map(|nanos| nanos.parse::<f64>().map(|nanos| nanos / 1e3));
            self.told = samples
                .collect::<Result<_, _>>()
                .map_err(|error| StoreError::corrupt("a reader's samples", error.to_string()))?;
        }
        let missing = || StoreError::protocol("the reader has made no get");
        self.told.pop_front().ok_or_else(missing)
    }
}

fn import_peer(path: &Path, ordinal: u16) -> Result<(), StoreError> {
    let os = |error| StoreError::os("bench peer", error);
    let device = Gpus::open()?.device(ordinal)?;
    let listener = socket::listen(path)?;
    baseline::ready("ready");
    let accepted = socket::accept(&listener).map_err(os)?;
    let mut len = [0; 8];
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    loop {
        if socket::recv(&accepted.socket, &mut len, &mut descriptors).map_err(os)? == 0 {
            return Ok(());
        }
        let descriptor =
            descriptors.pop().ok_or_else(|| StoreError::protocol("a segment came without a descriptor"))?;
        let len_bytes = u64::from_le_bytes(len);
        let (us, imported) = timed(|| device.import_segment(&descriptor, len_bytes, AccessRights::ReadOnly));
        drop(imported?);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a time of less than centuries"
        )]
        let nanos = (us * 1e3) as u64;
        socket::send(&accepted.socket, &[IoSlice::new(&nanos.to_le_bytes())], &[]).map_err(os)?;
    }
}

/// An importer in a process of its own.
pub(super) struct Importer {
    socket: OwnedFd,
    _process: baseline::Process,
}

impl Importer {
    pub(super) fn start(folder: &Path, ordinal: u16) -> Result<Self, StoreError> {
        let path = folder.join("import.sock");
        let (text, ordinal) = (path.display().to_string(), ordinal.to_string());
        let (process, _) = baseline::Process::start(&["gpu", "import", &text, &ordinal])?;
        Ok(Self { socket: socket::connect(&path)?, _process: process })
    }

    /// How long it takes the other process to import this segment, in microseconds.
    pub(super) fn import(&mut self, segment: &Segment) -> Result<f64, StoreError> {
        let os = |error| StoreError::os("have a segment imported", error);
        let len = segment.len_bytes().to_le_bytes();
        socket::send(&self.socket, &[IoSlice::new(&len)], &[segment.descriptor()]).map_err(os)?;
        let mut nanos = [0; 8];
        match socket::recv(&self.socket, &mut nanos, &mut Vec::new()).map_err(os)? {
            8 => Ok(u64::from_le_bytes(nanos) as f64 / 1e3),
            _ => Err(StoreError::unavailable("the importer of segments", "it has stopped (see above)")),
        }
    }
}
