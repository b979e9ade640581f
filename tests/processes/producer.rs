//! A client as a process of its own that puts small objects, so that most of its puts ask nobody. Not the load of
//! `client.rs`. Invariant: what it says, it says after the put has returned.
//!
//! Arguments: the node's socket, a mode, a prefix for its keys, and how many. `tell` says `put KEY` after each put;
//! `quiet` says `done` after the last one; both begin when a line comes on standard input. `step` puts until a put asks
//! nobody, asks to be traced, stops, puts one object more and stops again.

use std::path::Path;
use std::process::ExitCode;

use hetmem_client::{Path as By, Store, StoreError};
use hetmem_tests::content::{bytes_of, key};
use nix::sys::signal::{Signal, raise};

/// Bytes of every object.
const LEN: usize = 1000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, mode, prefix, count] = &arguments[..] else {
        say("usage: SOCKET tell|quiet|step PREFIX COUNT");
        return ExitCode::from(2);
    };
    let result = Store::connect(Some(Path::new(socket))).and_then(|store| match mode.as_str() {
        "step" => step(&store, prefix),
        mode => run(&store, mode == "tell", prefix, count.parse().unwrap_or(0)),
    });
    match result {
        Ok(()) => {
            say("done");
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    // Whoever started this process reads until its end, or has gone.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

fn run(store: &Store, tell: bool, prefix: &str, count: usize) -> Result<(), StoreError> {
    say("ready");
    let _ = std::io::stdin().read_line(&mut String::new());
    for number in 0..count {
        let name = format!("{prefix}/{number}");
        store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0))?;
        if tell {
            say(&format!("put {name}"));
        }
        if number % 10 == 0 {
            // All producers put these too: one of them wins.
            let shared = format!("shared/{}", number / 10);
            store.put_bytes(&key(&shared), &bytes_of(&shared, LEN, 0))?;
        }
    }
    Ok(())
}

fn step(store: &Store, prefix: &str) -> Result<(), StoreError> {
    let name = format!("{prefix}/victim");
    let (victim, bytes) = (key(&name), bytes_of(&name, LEN, 0));
    let put = |number: usize| {
        let name = format!("{prefix}/{number}");
        store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0))
    };
    let mut number = 0;
    while put(number)?.receipt.path != By::Ahead {
        number += 1;
    }
    // Once more, so that what the first such put has to fault in is there.
    put(number + 1)?;
    say(&format!("ready {}", number + 2));
    let stopped = |_| StoreError::os("stop", "this process cannot stop itself");
    nix::sys::ptrace::traceme().map_err(|error| StoreError::os("be traced", error))?;
    raise(Signal::SIGSTOP).map_err(stopped)?;
    let outcome = store.put_bytes(&victim, &bytes);
    raise(Signal::SIGSTOP).map_err(stopped)?;
    match outcome?.receipt.path {
        By::Ahead => Ok(()),
        other => Err(StoreError::protocol(format!("the put went by {other}"))),
    }
}
