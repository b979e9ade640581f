//! The bare things that bound the store: a Unix-socket round trip, a TCP loop, iperf3, readers in other processes.
//! Not the store. Invariant: the other end is a process of its own and ends with this one.

use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Args as ClapArgs, Subcommand};
use hetmem_client::{Key, Store, StoreError};
use hetmem_host_mem::socket;

use super::gpu;
use crate::failure::Failure;

/// Bytes of a question in the bare loops: what a GET of a short key takes.
const QUESTION_LEN: usize = 64;

#[derive(Debug, ClapArgs)]
pub(crate) struct PeerArgs {
    #[command(subcommand)]
    which: Peer,
}

#[derive(Debug, Subcommand)]
enum Peer {
    /// Sends every packet back
    Unix { path: PathBuf },
    /// Answers each question with as many bytes as it asks for
    Tcp { len_max: usize },
    /// Gets one object again and again, and prints how often
    Get { socket: PathBuf, key: String, millis: u64 },
    /// What measurements of GPUs need
    Gpu(gpu::PeerArgs),
}

/// Runs as the other end, until this end goes.
pub(super) fn peer(args: &PeerArgs) -> Result<(), Failure> {
    match &args.which {
        Peer::Unix { path } => unix_peer(path)?,
        Peer::Tcp { len_max } => tcp_peer(*len_max).map_err(|error| StoreError::os("bench peer", error))?,
        Peer::Get { socket, key, millis } => get_peer(socket, key, Duration::from_millis(*millis))?,
        Peer::Gpu(args) => gpu::peer(args)?,
    }
    Ok(())
}

pub(super) fn ready(word: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{word}");
    let _ = out.flush();
}

fn unix_peer(path: &Path) -> Result<(), StoreError> {
    let os = |error| StoreError::os("bench peer", error);
    let listener = socket::listen(path)?;
    ready("ready");
    let accepted = socket::accept(&listener).map_err(os)?;
    let mut buffer = vec![0; socket::PACKET_LEN_MAX];
    loop {
        let len = socket::recv(&accepted.socket, &mut buffer, &mut Vec::new()).map_err(os)?;
        if len == 0 {
            return Ok(());
        }
        socket::send(&accepted.socket, &[IoSlice::new(&buffer[..len])], &[]).map_err(os)?;
    }
}

fn tcp_peer(len_max: usize) -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    ready(&listener.local_addr()?.to_string());
    let memory = vec![1_u8; len_max];
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut question = [0; QUESTION_LEN];
    while stream.read_exact(&mut question).is_ok() {
        let mut len = [0; 8];
        len.copy_from_slice(&question[..8]);
        let len = usize::try_from(u64::from_le_bytes(len)).unwrap_or(0).min(len_max);
        stream.write_all(&memory[..len])?;
    }
    Ok(())
}

fn get_peer(socket: &Path, key: &str, time: Duration) -> Result<(), StoreError> {
    let store = Store::connect(Some(socket))?;
    let key = Key::new(key)?;
    drop(store.get(&key)?);
    ready("ready");
    // The start signal: one line, so that several readers begin together.
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    let started = Instant::now();
    let mut gets = 0_u64;
    while started.elapsed() < time {
        for _ in 0..1000 {
            drop(std::hint::black_box(store.get(&key)?));
        }
        gets += 1000;
    }
    ready(&format!("{}", gets as f64 / started.elapsed().as_secs_f64()));
    Ok(())
}

/// The other end, in its own process.
pub(super) struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts it; also its first line.
    pub(super) fn start(arguments: &[&str]) -> Result<(Self, String), StoreError> {
        let os = |error| StoreError::os("start the other end of a measurement", error);
        let own = std::env::current_exe().map_err(os)?;
        let mut child = Command::new(own)
            .args(["bench", "peer"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(os)?;
        let stdout = child.stdout.take().ok_or_else(|| os(std::io::ErrorKind::BrokenPipe.into()))?;
        let mut process = Self { child, stdout: BufReader::new(stdout) };
        let line = process.line()?;
        Ok((process, line))
    }

    /// Says a line to it, and hears one.
    pub(super) fn ask(&mut self, question: &str) -> Result<String, StoreError> {
        if let Some(stdin) = &mut self.child.stdin {
            writeln!(stdin, "{question}")
                .map_err(|error| StoreError::os("ask the other end of a measurement", error))?;
        }
        self.line()
    }

    fn line(&mut self) -> Result<String, StoreError> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(0) => Err(StoreError::unavailable("the other end of a measurement", "it has stopped")),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(StoreError::os("hear the other end of a measurement", error)),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A blocking Unix-socket round trip with another process.
pub(super) struct UnixEcho {
    socket: OwnedFd,
    buffer: Vec<u8>,
    _process: Process,
}

impl UnixEcho {
    pub(super) fn start(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("echo.sock");
        let text = path.display().to_string();
        let (process, _) = Process::start(&["unix", &text])?;
        Ok(Self {
            socket: socket::connect(&path)?,
            buffer: vec![0; socket::PACKET_LEN_MAX],
            _process: process,
        })
    }

    pub(super) fn round_trip(&mut self) -> Result<(), StoreError> {
        let os = |error| StoreError::os("a Unix-socket round trip", error);
        socket::send(&self.socket, &[IoSlice::new(&[7; QUESTION_LEN])], &[]).map_err(os)?;
        socket::recv(&self.socket, &mut self.buffer, &mut Vec::new()).map_err(os)?;
        Ok(())
    }
}

/// A bare TCP loop: a question, an answer of any length into warm memory, one stream, blocking.
pub(super) struct TcpLoop {
    stream: TcpStream,
    memory: Vec<u8>,
    _process: Process,
}

impl TcpLoop {
    pub(super) fn start(len_max: usize) -> Result<Self, StoreError> {
        let os = |error| StoreError::os("start a bare TCP loop", error);
        let (process, address) = Process::start(&["tcp", &len_max.to_string()])?;
        let stream = TcpStream::connect(address).map_err(os)?;
        stream.set_nodelay(true).map_err(os)?;
        Ok(Self { stream, memory: vec![1; len_max], _process: process })
    }

    pub(super) fn fetch(&mut self, len: usize) -> Result<(), StoreError> {
        let os = |error| StoreError::os("a bare TCP fetch", error);
        let mut question = [0; QUESTION_LEN];
        question[..8].copy_from_slice(&(len as u64).to_le_bytes());
        self.stream.write_all(&question).map_err(os)?;
        self.stream.read_exact(&mut self.memory[..len]).map_err(os)
    }
}

/// Readers in processes of their own.
pub(super) struct Readers(Vec<Process>);

impl Readers {
    pub(super) fn start(socket: &Path, keys: &[&str], time: Duration) -> Result<Self, StoreError> {
        let socket = socket.display().to_string();
        let millis = time.as_millis().to_string();
        let start = |key: &&str| Process::start(&["get", &socket, key, &millis]).map(|(process, _)| process);
        Ok(Self(keys.iter().map(start).collect::<Result<_, _>>()?))
    }

    /// Lets all begin, and adds up how many gets a second they made.
    pub(super) fn run(mut self) -> Result<f64, StoreError> {
        for process in &mut self.0 {
            if let Some(stdin) = &mut process.child.stdin {
                writeln!(stdin, "go").map_err(|error| StoreError::os("start a reader", error))?;
            }
        }
        let mut rate = 0.0;
        for process in &mut self.0 {
            let line = process.line()?;
            rate +=
                line.parse::<f64>().map_err(|error| StoreError::corrupt(line.clone(), error.to_string()))?;
        }
        Ok(rate)
    }
}

/// What iperf3 moves over one loopback stream in a second, in GiB/s; why not, if it cannot be asked.
pub(super) fn iperf3() -> Result<f64, String> {
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .map_err(|error| error.to_string())?
        .port();
    let port = port.to_string();
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-p", &port])
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("iperf3 is not installed ({error})"))?;
    let mut answer = Err("iperf3 gave no figure".to_owned());
    for _ in 0..50 {
        let ran = Command::new("iperf3").args(["-c", "127.0.0.1", "-p", &port, "-t", "1", "-J"]).output();
        let report = ran.ok().and_then(|o| serde_json::from_slice::<serde_json::Value>(&o.stdout).ok());
        if let Some(bits) = report.and_then(|r| r["end"]["sum_received"]["bits_per_second"].as_f64()) {
            answer = Ok(bits / 8.0 / (1_u64 << 30) as f64);
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = server.kill();
    let _ = server.wait();
    answer
}
