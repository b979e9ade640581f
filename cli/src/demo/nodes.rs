//! The demo's nodes: processes of this same binary on loopback. Not their work. Invariant: no node outlives its
//! `Process`, on any way out: dropping it stops the node, and a killed demo closes the node's standard input, at
//! which it stops itself.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use hetmem_client::StoreError;

/// How long a node may take to be ready: it touches all its memory first.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a node may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A folder for sockets that goes with this value.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn create() -> Result<Self, StoreError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hetmem-demo-{}-{number}", std::process::id()));
        std::fs::create_dir(&path)
            .map_err(|error| StoreError::os(format!("create the folder {}", path.display()), error))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running node.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Closing it tells the node to stop.
    stdin: Option<ChildStdin>,
    /// Set once the node is told to stop: what it and its peer then say of each other is no news.
    quiet: Arc<AtomicBool>,
    /// Where its clients connect.
    pub(crate) socket: PathBuf,
    /// Where its peers connect.
    pub(crate) address: String,
}

/// What `serve` says when it is ready.
#[derive(serde::Deserialize)]
struct Ready {
    socket: PathBuf,
    address: String,
}

impl Process {
    /// Starts `hetmem serve` and waits until it is ready. `flags` are configuration keys and values.
    pub(crate) fn start(name: &str, flags: &[(&str, String)]) -> Result<Self, StoreError> {
        Self::start_among(name, flags, &Arc::default())
    }

    /// The same for nodes that know each other, which share `quiet`.
    pub(crate) fn start_among(
        name: &str,
        flags: &[(&str, String)],
        quiet: &Arc<AtomicBool>,
    ) -> Result<Self, StoreError> {
        let own = std::env::current_exe().map_err(|error| StoreError::os("find this program", error))?;
        let mut command = Command::new(own);
        command.args(["serve", "--stop-with-stdin", "--name", name]);
        for (key, value) in flags {
            command.arg(format!("--{}={value}", key.replace('_', "-")));
        }
        if std::env::var_os("HETMEM_LOG").is_none() {
            command.env("HETMEM_LOG", "warn");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|error| StoreError::os(format!("start node {name}"), error))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // From here on every way out stops the node.
        let mut process =
            Self { child, stdin, quiet: Arc::clone(quiet), socket: PathBuf::new(), address: String::new() };
        let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
            return Err(StoreError::os(format!("start node {name}"), "its output cannot be read"));
        };
        let words = forward(name, stderr, Arc::clone(quiet));
        let ready = first_line(stdout)
            .and_then(|line| serde_json::from_str::<Ready>(&line).map_err(|error| error.to_string()));
        match ready {
            Ok(ready) => {
                process.socket = ready.socket;
                process.address = ready.address;
                Ok(process)
            }
            Err(why) => {
                process.stop();
                let said = words.recv_timeout(STOP_TIMEOUT).unwrap_or_default();
                let why = format!("node {name} did not get ready ({why}): {}", said.trim());
                Err(StoreError::unavailable("the demo", why))
            }
        }
    }

    /// The system's number of it.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn stop(&mut self) {
        self.quiet.store(true, Ordering::Relaxed);
        drop(self.stdin.take());
        let until = Instant::now() + STOP_TIMEOUT;
        // The standard library waits without a deadline only, so this asks in turns.
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
        // Both fail only when the node has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The first line, or why there is none in time.
fn first_line(stdout: std::process::ChildStdout) -> Result<String, String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = String::new();
        let read = reader.read_line(&mut line).map(|_| line);
        // Nobody listens any more after the timeout.
        let _ = sender.send(read);
        // Until its end, so that the node never waits for a reader.
        let _ = std::io::copy(&mut reader, &mut std::io::sink());
    });
    match receiver.recv_timeout(READY_TIMEOUT) {
        Ok(Ok(line)) if line.is_empty() => Err("it stopped".to_owned()),
        Ok(Ok(line)) => Ok(line),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("nothing heard within {} s", READY_TIMEOUT.as_secs())),
    }
}

/// Passes a node's words on to standard error, each line with its name, and hands all of them out at the end.
fn forward(
    name: &str,
    mut stderr: std::process::ChildStderr,
    quiet: Arc<AtomicBool>,
) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    let name = name.to_owned();
    std::thread::spawn(move || {
        let mut said = String::new();
        let mut buffer = [0; 4096];
        while let Ok(read) = stderr.read(&mut buffer)
            && read > 0
        {
            let text = String::from_utf8_lossy(&buffer[..read]);
            let heard = if quiet.load(Ordering::Relaxed) { "" } else { &*text };
            for line in heard.lines() {
                let _ = std::io::Write::write_all(
                    &mut std::io::stderr().lock(),
                    format!("[{name}] {line}\n").as_bytes(),
                );
            }
            // What does not fit is on standard error all the same.
            if said.len() < 64 * 1024 {
                said.push_str(&text);
            }
        }
        let _ = sender.send(said);
    });
    receiver
}
