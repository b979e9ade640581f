//! A node of a test's own, and the commands that speak to it. Not a test. Invariant: no node outlives its test.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const HETMEM: &str = env!("CARGO_BIN_EXE_hetmem");

/// A node that stops with its test, even with one that fails.
pub(crate) struct Node {
    child: Child,
    folder: tempfile::TempDir,
    /// Where its peers connect.
    pub(crate) address: String,
    /// What its commands find in their environment, as it did.
    environment: Vec<(&'static str, PathBuf)>,
}

impl Node {
    pub(crate) fn start() -> Self {
        Self::start_with(&["--host", "64MiB"])
    }

    pub(crate) fn start_with(flags: &[&str]) -> Self {
        Self::start_in(&[], flags)
    }

    pub(crate) fn start_in(environment: &[(&'static str, PathBuf)], flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = Command::new(HETMEM)
            .args(["serve", "--listen", "127.0.0.1:0", "--stop-with-stdin", "--socket"])
            .arg(folder.path().join("node.sock"))
            .args(flags)
            .env("HETMEM_LOG", "error")
            .envs(environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let ready: Value = serde_json::from_str(&line).expect("one line of JSON");
        assert_eq!(ready["ready"], true, "{line}");
        let address = ready["address"].as_str().expect("an address").to_owned();
        assert!(address.starts_with("127.0.0.1:"));
        Self { child, folder, address, environment: environment.to_vec() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        hetmem_in(&self.environment, &self.path("node.sock"), args)
    }

    /// Runs a command that must succeed; its JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat());
        assert_eq!(done.status.code(), Some(0), "{args:?}: {}", text(&done.stderr));
        serde_json::from_slice(&done.stdout).expect("JSON and nothing else")
    }

    /// Runs a command that must fail so; what it says.
    pub(crate) fn refused(&self, args: &[&str], code: i32) -> String {
        let done = self.run(args);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.starts_with("hetmem: "), "{said}");
        said
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

pub(crate) fn hetmem(socket: &Path, args: &[&str]) -> Output {
    hetmem_in(&[], socket, args)
}

pub(crate) fn hetmem_in(environment: &[(&'static str, PathBuf)], socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(HETMEM);
    command.arg("--socket").arg(socket).args(args).envs(environment.iter().cloned());
    command.output().expect("this program")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Two tensors and metadata, as the official writer would write them.
pub(crate) fn safetensors_file() -> Vec<u8> {
    let header = br#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}} "#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend(1..=22_u8);
    bytes
}
