//! Client processes under load (`processes/client.rs`) as their parent sees them. Not what they do. Invariant: an
//! object's name says what its bytes are.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::content::bytes_of;
use crate::daemon::eventually;

/// The longest object that a client puts, in bytes; shorter than every client's share of the store.
pub const LEN_MAX: usize = 400_000;
/// Objects that all clients read and none deletes. The parent puts them.
pub const SHARED: [&str; 5] =
    ["shared/1-1", "shared/2-1000", "shared/3-65536", "shared/4-300000", "shared/5-2000000"];

/// The name of an object of this length.
#[must_use]
pub fn name_of(prefix: &str, number: u64, len_bytes: usize) -> String {
    format!("{prefix}/{number}-{len_bytes}")
}

/// The bytes that belong to a name.
///
/// # Panics
/// If it is no name of [`name_of`].
#[must_use]
pub fn content_of(name: &str) -> Vec<u8> {
    let len = name.rsplit_once('-').and_then(|(_, len)| len.parse().ok());
    bytes_of(name, len.expect("a name that ends with a length"), 0)
}

/// A client process. Dropping it kills it.
#[derive(Debug)]
pub struct Load {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Mutex<(Vec<String>, bool)>>,
}

impl Load {
    /// Starts the client program.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(program: &Path, socket: &Path, prefix: &str, seed: u64, wild: bool) -> Self {
        Self::start_as(program, socket, prefix, seed, if wild { "wild" } else { "steady" })
    }

    /// Starts the client program in one of its modes.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_as(program: &Path, socket: &Path, prefix: &str, seed: u64, mode: &str) -> Self {
        let mut child = Command::new(program)
            .arg(socket)
            .args([prefix, &seed.to_string(), mode])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process can be started");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let lines: Arc<Mutex<(Vec<String>, bool)>> = Arc::default();
        let into = Arc::clone(&lines);
        std::thread::spawn(move || {
            // The last line of a killed process may be half a line; it has no newline then.
            for line in stdout.split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).into_owned();
                into.lock().unwrap_or_else(PoisonError::into_inner).0.push(line);
            }
            into.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines }
    }

    /// Lines that it has written.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits until it has written `count` lines more.
    pub fn goes_on(&self, count: usize) {
        let before = self.lines().len();
        eventually("the client goes on", || {
            let lines = self.lines();
            let last = lines.last().cloned().unwrap_or_default();
            if last.starts_with("failed") || lines.len() < before + count { Err(last) } else { Ok(()) }
        });
    }

    /// Kills it (SIGKILL), whatever it has said.
    pub fn cut_off(&mut self) {
        let _ = self.child.kill();
        self.wait();
    }

    /// Kills it (SIGKILL) and returns the names of the objects that must be there now.
    ///
    /// # Panics
    /// If something had gone wrong in it before.
    pub fn kill(&mut self) -> BTreeSet<String> {
        self.cut_off();
        let mut alive = BTreeSet::new();
        for line in self.lines() {
            match line.split_once(' ') {
                Some(("put", name)) => {
                    alive.insert(name.to_owned());
                }
                Some(("del", name)) => {
                    alive.remove(name);
                }
                _ => panic!("a client that was not to stop says {line:?}"),
            }
        }
        alive
    }

    /// Makes it stop on its own; returns how it ended and its last line.
    pub fn stop(&mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        let status = self.wait();
        (status, self.lines().pop().unwrap_or_default())
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the client ends", || {
            status = self.child.try_wait().expect("a child");
            let read = self.lines.lock().unwrap_or_else(PoisonError::into_inner).1;
            if status.is_some() && read { Ok(()) } else { Err("it runs".to_owned()) }
        });
        status.expect("it has ended")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
