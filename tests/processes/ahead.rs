//! Puts that ask nobody, with real processes: found by whoever asks after they returned, whatever becomes of those who
//! put. Not the ring itself (`host-mem/src/ring/`). Invariant: a put counts as returned only once its process has said so.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, ObjectMeta, Path as By, PutOptions, Store};
use hetmem_core::wire::{ClientMessage, ClientReply};
use hetmem_tests::content::{bytes_of, key, next};
use hetmem_tests::daemon::{Daemon, PATIENCE, Serve, eventually};
use hetmem_tests::packets::{RawClient, packet};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Bytes of a producer's objects.
const LEN: usize = 1000;

struct Producer {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Producer {
    fn start(socket: &Path, mode: &str, prefix: &str, count: usize) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hetmem-test-producer"))
            .arg(socket)
            .args([mode, prefix, &count.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process can be started");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("the producer goes on")
    }

    fn go(&mut self) {
        let stdin = self.stdin.as_mut().expect("it waits");
        stdin.write_all(b"go\n").expect("it reads");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process number"))
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn check(store: &Store, name: &str) {
    let options = GetOptions { verify: true, ..GetOptions::default() };
    match store.get_with(&key(name), &options) {
        Ok(object) => assert!(*object == *bytes_of(name, LEN, 0), "{name} has other bytes"),
        Err(error) => panic!("{name} was put: {error}"),
    }
}

/// Puts until a put asks nobody.
fn warm(store: &Store, prefix: &str) -> usize {
    let mut number = 0;
    eventually("puts ask nobody", || {
        let name = format!("{prefix}/warm-{number}");
        number += 1;
        let outcome =
            store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0)).map_err(|error| error.to_string())?;
        if outcome.receipt.path == By::Ahead { Ok(()) } else { Err(format!("{:?}", outcome.receipt)) }
    });
    number
}

#[test]
fn whoever_is_told_of_a_put_finds_it_on_every_node() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "told").start();
    let mut other = Serve::new(folder.path(), "far").join(&node.address).start();
    let (here, there) = (node.connect(), other.connect());
    other.settles(&there, "linked", |status| status.peers.iter().any(|peer| peer.linked));
    let mut producer = Producer::start(&node.socket, "tell", "p", 1_500);
    assert_eq!(producer.line(), "ready");
    producer.go();
    for number in 0..1_500 {
        let line = producer.line();
        let name = line.strip_prefix("put ").unwrap_or_else(|| panic!("it says {line:?}")).to_owned();
        // Told by another process, over a pipe: the node that it was put on, then one that has never heard of it.
        check(if number % 3 == 0 { &there } else { &here }, &name);
    }
    assert_eq!(producer.line(), "done");
    let counters = here.status().expect("it answers").counters;
    assert!(counters.ahead > 1_000, "most of them asked nobody: {counters:?}");
    node.assert_sound();
    other.assert_sound();
}

#[test]
fn of_32_producers_nothing_is_lost_and_nothing_is_there_twice() {
    const PRODUCERS: usize = 32;
    const EACH: usize = 200;
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "many").host("256MiB").start();
    let monitor = node.connect();
    let start = |number| Producer::start(&node.socket, "quiet", &format!("p{number}"), EACH);
    let mut producers: Vec<Producer> = (0..PRODUCERS).map(start).collect();
    for producer in &mut producers {
        assert_eq!(producer.line(), "ready");
    }
    producers.iter_mut().for_each(Producer::go);
    for producer in &producers {
        assert_eq!(producer.line(), "done");
    }
    for number in 0..PRODUCERS {
        (0..EACH).for_each(|at| check(&monitor, &format!("p{number}/{at}")));
    }
    (0..EACH / 10).for_each(|at| check(&monitor, &format!("shared/{at}")));
    let listed: Vec<_> = monitor.list("").map(|listed| listed.expect("a list").key).collect();
    assert_eq!(listed.len(), PRODUCERS * EACH + EACH / 10);
    let status = monitor.status().expect("it answers");
    let count = listed.len() as u64;
    assert_eq!(status.counters.puts, count, "none was sealed twice: {:?}", status.counters);
    assert!(status.counters.ahead > count / 2, "{:?}", status.counters);
    drop(producers);
    node.settles(&monitor, "nothing of them is left", |status| {
        (status.clients, status.reservations, status.tiers[0].ahead_bytes) == (1, 0, 0)
    });
    for key in &listed {
        assert!(monitor.delete(key).expect("deleted"));
    }
    node.settles(&monitor, "empty", |status| (status.objects, status.tiers[0].used_bytes) == (0, 0));
    node.assert_sound();
}

#[test]
fn threads_of_one_client_put_side_by_side() {
    const THREADS: usize = 32;
    const EACH: usize = 300;
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "threads").start();
    let (store, reader) = (node.connect(), node.connect());
    warm(&store, "w");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, reader) = (&store, &reader);
            scope.spawn(move || {
                for number in 0..EACH {
                    let name = format!("t{thread}/{number}");
                    store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0)).expect("room");
                    if number % 7 == 0 {
                        check(reader, &name);
                    }
                }
            });
        }
    });
    for thread in 0..THREADS {
        (0..EACH).for_each(|number| check(&reader, &format!("t{thread}/{number}")));
    }
    node.assert_sound();
}

/// Lets a stopped child run for so many instructions; false if it stopped by itself before.
fn steps(pid: Pid, count: usize) -> (usize, bool) {
    for done in 0..count {
        nix::sys::ptrace::step(pid, None).expect("it is stopped");
        match waitpid(pid, None).expect("a child") {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            WaitStatus::Stopped(_, Signal::SIGSTOP) => return (done, false),
            other => panic!("a child that was to step: {other:?}"),
        }
    }
    (count, true)
}

/// A producer that has stopped just before a put that will ask nobody; and how many objects it has put.
fn stopped(node: &Daemon, prefix: &str) -> (Producer, usize) {
    let producer = Producer::start(&node.socket, "step", prefix, 0);
    let line = producer.line();
    let count = line.strip_prefix("ready ").and_then(|count| count.parse().ok());
    let count = count.unwrap_or_else(|| panic!("it says {line:?}"));
    match waitpid(producer.pid(), None).expect("a child") {
        WaitStatus::Stopped(_, Signal::SIGSTOP) => (producer, count),
        other => panic!("a child that was to stop: {other:?}"),
    }
}

#[test]
fn a_producer_that_is_killed_at_any_instruction_leaves_its_whole_object_or_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "killed").start();
    let monitor = node.connect();
    let (whole, _) = stopped(&node, "whole");
    let (length, in_time) = steps(whole.pid(), 10_000_000);
    assert!(!in_time && length > 100, "a put takes {length} instructions");
    drop(whole);
    let (mut state, mut found, mut missing) = (11, 0, 0);
    const KILLS: usize = 60;
    for kill in 0..KILLS {
        // Evenly over the whole put, with a share of chance.
        let at = (length * kill + usize::try_from(next(&mut state) % length as u64).expect("small")) / KILLS;
        let prefix = format!("k{kill}");
        let (mut producer, before) = stopped(&node, &prefix);
        steps(producer.pid(), at);
        producer.child.kill().expect("it is there");
        let _ = waitpid(producer.pid(), None);
        node.settles(&monitor, "nothing is left of it", |status| {
            let tier = &status.tiers[0];
            (status.clients, status.reservations, status.draining, tier.ahead_bytes) == (1, 0, 0, 0)
        });
        (0..before).for_each(|number| check(&monitor, &format!("{prefix}/{number}")));
        let victim = format!("{prefix}/victim");
        match monitor.get(&key(&victim)) {
            Ok(object) => {
                assert!(*object == *bytes_of(&victim, LEN, 0), "killed after {at} instructions");
                found += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                missing += 1;
            }
        }
        for listed in monitor.list(&format!("{prefix}/")) {
            assert!(monitor.delete(&listed.expect("a list").key).expect("deleted"));
        }
    }
    println!("{length} instructions; of {KILLS} killed producers {found} had put their object");
    assert!(found > 0 && missing > 0, "{found} found, {missing} missing");
    node.assert_sound();
}

#[test]
fn a_node_that_does_not_drain_holds_up_puts_when_its_ring_is_full_and_loses_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "slow").start();
    let store = node.connect();
    let warmed = warm(&store, "w");
    node.signal(rustix::process::Signal::STOP);
    let options = PutOptions { timeout: Duration::from_millis(100), ..PutOptions::default() };
    let meta = ObjectMeta::bytes(LEN as u64).expect("a length");
    let mut put = Vec::new();
    let refused = loop {
        let name = format!("p{}", put.len());
        match store.put_with(&key(&name), meta, &bytes_of(&name, LEN, 0), &options) {
            Ok(outcome) => {
                assert_eq!(outcome.receipt.path, By::Ahead, "nobody answers");
                put.push(name);
            }
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::TimedOut, "{refused}");
    assert!(put.len() > 100, "{} puts asked nobody", put.len());
    node.signal(rustix::process::Signal::CONT);
    let other = node.connect();
    put.iter().for_each(|name| check(&other, name));
    (0..warmed).for_each(|number| check(&other, &format!("w/warm-{number}")));
    node.assert_sound();
}

#[test]
fn a_dead_node_takes_no_puts() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "dead").start();
    let store = node.connect();
    warm(&store, "w");
    node.kill();
    for number in 0..5 {
        let name = format!("late/{number}");
        let error = store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0)).expect_err("it is dead");
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    }
}

#[test]
fn memory_that_is_not_used_goes_back_and_comes_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "idle").start();
    let (store, monitor) = (node.connect(), node.connect());
    let count = warm(&store, "w");
    assert!(monitor.status().expect("it answers").tiers[0].ahead_bytes > 0);
    node.settles(&monitor, "it is given back", |status| status.tiers[0].ahead_bytes == 0);
    (0..count).for_each(|number| check(&monitor, &format!("w/warm-{number}")));
    let again = warm(&store, "again");
    (0..again).for_each(|number| check(&monitor, &format!("again/warm-{number}")));
    node.assert_sound();
}

#[test]
fn memory_goes_back_when_room_is_short() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "short").host("32MiB").start();
    let (store, other) = (node.connect(), node.connect());
    let count = warm(&store, "w");
    let mut stored = Vec::new();
    let full = loop {
        let name = format!("o{}", stored.len());
        match other.put_bytes(&key(&name), &bytes_of(&name, 60_000, 0)) {
            Ok(_) => stored.push(name),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::NoSpace, "{full}");
    let tier = &other.status().expect("it answers").tiers[0];
    assert_eq!(tier.ahead_bytes, 0, "what was granted ahead was used for it: {tier:?}");
    // Now each put asks, and is told the truth; what was stored stays.
    let name = "one more";
    if let Err(error) = store.put_bytes(&key(name), &bytes_of(name, 60_000, 0)) {
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    }
    (0..count).for_each(|number| check(&other, &format!("w/warm-{number}")));
    for name in &stored {
        let object = other.get(&key(name)).expect("it was put");
        assert!(*object == *bytes_of(name, 60_000, 0), "{name} has other bytes");
    }
    node.assert_sound();
}

/// A client by hand that was granted memory ahead: its ring as a file, which it may write as it likes.
fn granted(node: &Daemon) -> (RawClient, std::fs::File) {
    let (client, _index, _page) = RawClient::greet(&node.socket);
    client.send(&packet(2, &ClientMessage::Ahead { ring: true })).expect("the node reads");
    let (_, reply, descriptors) = client.receive().expect("an answer");
    let Ok(ClientReply::Ahead { extent, .. }) = reply else { panic!("{reply:?}") };
    let mut descriptors = descriptors.into_iter();
    let (ring, _segment) = (descriptors.next().expect("the ring"), descriptors.next().expect("the segment"));
    client.send(&packet(3, &ClientMessage::Mapped { segment: extent.segment })).expect("the node reads");
    assert_eq!(client.receive().expect("an answer").1, Ok(ClientReply::Done));
    (client, ring.into())
}

/// The claim word's place in the ring, and the first record's (docs/shared-memory.md).
const CLAIM_AT: u64 = 64;
const RECORDS_AT: u64 = 4096;
const RECORD_LEN: u64 = 256;

#[test]
fn whatever_a_client_writes_into_its_ring_costs_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "hostile").start();
    let store = node.connect();
    let warmed = warm(&store, "w");
    let word = |file: &std::fs::File, at: u64, word: u64| {
        file.write_all_at(&word.to_le_bytes(), at).expect("it may write its ring");
    };
    let mut state = 5;
    for round in 0..60 {
        let (client, ring) = granted(&node);
        let mut claim = [0; 8];
        ring.read_exact_at(&mut claim, CLAIM_AT).expect("a ring");
        let open = u64::from_le_bytes(claim);
        match round % 4 {
            // Records that were never written, up to and beyond the number of places.
            0 => {
                let count = 1 + next(&mut state) % 4_000;
                for place in 0..count.min(2_048) {
                    let at = RECORDS_AT + place * RECORD_LEN;
                    word(&ring, at, place + 1);
                    for field in 1..8 {
                        word(&ring, at + 8 * field, next(&mut state) >> (next(&mut state) % 64));
                    }
                }
                word(&ring, CLAIM_AT, open + count);
            }
            // A claim word of noise.
            1 => word(&ring, CLAIM_AT, next(&mut state)),
            // A whole file of noise.
            2 => {
                for at in (0..RECORDS_AT + 64 * RECORD_LEN).step_by(8) {
                    word(&ring, at, next(&mut state));
                }
            }
            // Claims of which nothing ever comes.
            _ => word(&ring, CLAIM_AT, open + 1 + next(&mut state) % 2_048),
        }
        // The node goes on for everyone else, and finds out when it looks.
        check(&store, "w/warm-0");
        let name = format!("between/{round}");
        store.put_bytes(&key(&name), &bytes_of(&name, LEN, 0)).expect("room");
        assert!(!store.exists(&key("never")).expect("the node answers"));
        check(&store, &name);
        drop((client, ring));
    }
    node.settles(&store, "nothing of them is left", |status| (status.clients, status.reservations) == (1, 0));
    (0..warmed).for_each(|number| check(&store, &format!("w/warm-{number}")));
    let status = store.status().expect("it answers");
    assert!(status.counters.refused > 10, "sessions that lied were closed: {:?}", status.counters);
    node.assert_sound();
}
