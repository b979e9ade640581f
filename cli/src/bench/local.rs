//! `hetmem bench local`. Not remote gets. Invariant: the node is a process of its own; only the rows on the number of
//! objects use a node in this process, to fill it in seconds.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_client::{IfExists, Key, ObjectMeta, Path, PutOptions, Store, StoreError};
use hetmem_core::SegmentId;
use hetmem_host_mem::{PagePolicy, Segment, SegmentOwner, WriteMapping};
use hetmem_node::{Config, Node};

use super::Size;
use super::baseline::{Readers, UnixEcho};
use super::rows::{Pair, Row, Target, timed};
use crate::demo::nodes::{Folder, Process};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Gets in one sample: one alone is shorter than reading the clock.
const BATCH: u32 = 1000;
const ROUND_TRIP: &str = "Unix-socket round trip";

pub(super) fn run(size: Size) -> Result<Vec<Row>, StoreError> {
    let folder = Folder::create()?;
    let socket = folder.path().join("node.sock");
    let flags = [
        ("socket", socket.display().to_string()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("host", "3GiB".to_owned()),
    ];
    let node = Process::start("bench", &flags)?;
    let store = Store::connect(Some(&node.socket))?;
    let mut echo = UnixEcho::start(folder.path())?;
    let mut rows = Vec::new();
    for len in [KIB, 64 * MIB, GIB] {
        rows.push(get(size, &store, &mut echo, len)?);
    }
    rows.push(small_put(size, &store, &mut echo, Asks::Nobody)?);
    rows.push(small_put(size, &store, &mut echo, Asks::Node)?);
    rows.push(steady_puts(size, &store, &mut echo)?);
    for checksum in [true, false] {
        rows.push(large_put(size, &store, checksum)?);
    }
    rows.push(two_readers(size, &store, &node.socket)?);
    drop((store, node));
    rows.push(many_objects(size, &folder, Pick::Same)?);
    rows.push(many_objects(size, &folder, Pick::All)?);
    Ok(rows)
}

fn key(name: &str) -> Result<Key, StoreError> {
    Key::new(name)
}

/// One get with its release, in microseconds.
fn get_sample(store: &Store, keys: &[Key], at: &mut usize) -> Result<f64, StoreError> {
    let started = Instant::now();
    for _ in 0..BATCH {
        *at = (*at + 1) % keys.len();
        drop(black_box(store.get(&keys[*at])?));
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(BATCH))
}

fn get(size: Size, store: &Store, echo: &mut UnixEcho, len: u64) -> Result<Row, StoreError> {
    let name = key(&format!("bench/get/{len}"))?;
    let mut reservation = match store.reserve(&name, ObjectMeta::bytes(len)?, &PutOptions::default())? {
        hetmem_client::Reserved::Open(reservation) => reservation,
        hetmem_client::Reserved::Kept(_) => {
            return Err(StoreError::AlreadyExists { key: name.to_string() });
        }
    };
    reservation.bytes_mut().fill(0x5a);
    reservation.seal()?;
    let pair = Pair {
        workload: "local",
        op: "get and release",
        size_bytes: len,
        moves: false,
        ceiling_name: ROUND_TRIP,
        target: Target::AtMost(0.01),
        rounds: size.rounds(),
        samples: 100,
    };
    let (keys, mut at) = ([name.clone()], 0);
    let row = pair.measure(
        &mut || {
            let (us, done) = timed(|| echo.round_trip());
            done.map(|()| us)
        },
        &mut || get_sample(store, &keys, &mut at),
    )?;
    store.delete(&name)?;
    Ok(row)
}

/// What a put of 1 KiB does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// It writes into memory granted ahead, and publishes there.
    Nobody,
    /// It takes a round trip, as one does that has to be the only one of its key.
    Node,
}

/// Puts that fit into what was granted: the time of one, while the node has time to take them in between rounds.
fn small_put(size: Size, store: &Store, echo: &mut UnixEcho, asks: Asks) -> Result<Row, StoreError> {
    let (bytes, meta) = (vec![3_u8; 1024], ObjectMeta::bytes(KIB)?);
    let if_exists = if asks == Asks::Node { IfExists::Error } else { IfExists::Keep };
    let options = PutOptions { if_exists, ..PutOptions::default() };
    let mut names: Vec<Key> = Vec::new();
    let mut ahead = 0;
    let pair = Pair {
        workload: "local",
        op: if asks == Asks::Nobody { "put, granted ahead" } else { "put, if_exists = error" },
        size_bytes: KIB,
        moves: true,
        ceiling_name: ROUND_TRIP,
        target: Target::AtMost(if asks == Asks::Nobody { 0.05 } else { 1.5 }),
        rounds: size.rounds(),
        samples: 500,
    };
    let row = pair.measure(
        &mut || {
            let (us, done) = timed(|| echo.round_trip());
            done.map(|()| us)
        },
        &mut || {
            let name = key(&format!("bench/put/{}", names.len()))?;
            let (us, put) = timed(|| store.put_with(&name, meta, &bytes, &options));
            names.push(name);
            ahead += usize::from(put?.receipt.path == Path::Ahead);
            Ok(us)
        },
    )?;
    for name in &names {
        store.delete(name)?;
    }
    // The first few show the node that this client puts small objects.
    if asks == Asks::Nobody && ahead * 20 < names.len() * 19 {
        let why = format!("of {} puts only {ahead} asked nobody", names.len());
        return Err(StoreError::unavailable("memory granted ahead", why));
    }
    Ok(row)
}

/// Puts without a pause, many more than are granted at a time: the node takes them in meanwhile, and this is its rate.
fn steady_puts(size: Size, store: &Store, echo: &mut UnixEcho) -> Result<Row, StoreError> {
    const COUNT: usize = 20_000;
    let bytes = vec![3_u8; 1024];
    let names: Vec<Key> =
        (0..COUNT).map(|at| key(&format!("bench/steady/{at}"))).collect::<Result<_, _>>()?;
    let pair = Pair {
        workload: "local",
        op: "put, 20,000 without a pause, each",
        size_bytes: KIB,
        moves: true,
        ceiling_name: ROUND_TRIP,
        target: Target::AtMost(1.0),
        rounds: size.rounds(),
        samples: 1,
    };
    pair.measure(
        &mut || {
            let (us, done) = timed(|| (0..500).try_for_each(|_| echo.round_trip()));
            done.map(|()| us / 500.0)
        },
        &mut || {
            let (us, put) =
                timed(|| names.iter().try_for_each(|name| store.put_bytes(name, &bytes).map(drop)));
            put?;
            names.iter().try_for_each(|name| store.delete(name).map(drop))?;
            Ok(us / COUNT as f64)
        },
    )
}

/// A put of 64 MiB from the caller's buffer, beside a memcpy of the same buffer into shared memory. All memory was
/// touched before: the store's by the puts of the first round, the memcpy's by making it.
fn large_put(size: Size, store: &Store, checksum: bool) -> Result<Row, StoreError> {
    let len = 64 * MIB;
    let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let target = Segment::create(SegmentId(1), len, SegmentOwner::Client, PagePolicy::Auto)?;
    let descriptor =
        target.descriptor().try_clone_to_owned().map_err(|error| StoreError::os("bench", error))?;
    let mapping = Arc::new(WriteMapping::map(descriptor, len)?);
    let mut warm = mapping.extent_mut(0, len)?;
    let pair = Pair {
        workload: "local",
        op: if checksum { "put" } else { "put without checksum" },
        size_bytes: len,
        moves: true,
        ceiling_name: "one-thread memcpy into warm shared memory",
        target: Target::AtLeast(0.9),
        rounds: size.rounds(),
        samples: 5,
    };
    let name = key("bench/put/large")?;
    let options = PutOptions { checksum, ..PutOptions::default() };
    let meta = ObjectMeta::bytes(len)?;
    let row = pair.measure(
        &mut || {
            let (us, ()) = timed(|| warm.copy_from_slice(black_box(&bytes)));
            black_box(&warm[0]);
            Ok(us)
        },
        &mut || {
            let (us, put) = timed(|| store.put_with(&name, meta, black_box(&bytes), &options));
            put?;
            store.delete(&name)?;
            Ok(us)
        },
    )?;
    Ok(row)
}

/// Two readers of different keys beside one. The figure is the time of one get at the common rate.
fn two_readers(size: Size, store: &Store, socket: &std::path::Path) -> Result<Row, StoreError> {
    let names = ["bench/reader/0", "bench/reader/1"];
    for name in names {
        store.put_bytes(&key(name)?, &[1; 1024])?;
    }
    let time = Duration::from_millis(200);
    let pair = Pair {
        workload: "local",
        op: "get and release, two clients",
        size_bytes: KIB,
        moves: false,
        ceiling_name: "one client",
        target: Target::AtLeast(1.8),
        rounds: size.rounds(),
        samples: 1,
    };
    pair.measure(&mut || Ok(1e6 / Readers::start(socket, &names[..1], time)?.run()?), &mut || {
        Ok(1e6 / Readers::start(socket, &names, time)?.run()?)
    })
}

/// Which keys are read.
#[derive(Clone, Copy)]
enum Pick {
    /// The same thousand.
    Same,
    /// All of them, in an order that no cache foresees.
    All,
}

const FEW: usize = 1_000;
const MANY: usize = 1_000_000;

fn filled(folder: &Folder, name: &str, count: usize) -> Result<(Node, Store, Vec<Key>), StoreError> {
    let socket = folder.path().join(name).display().to_string();
    let settings = [("socket", socket.as_str()), ("listen", "127.0.0.1:0"), ("host", "512MiB")];
    let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let node = Node::start(Config::load(None, settings)?)?;
    let store = Store::over(node.session()?)?;
    let mut keys = Vec::with_capacity(count);
    for at in 0..count {
        let name = key(&format!("bench/many/{at:07}"))?;
        store.put_bytes(&name, &(at as u64).to_le_bytes())?;
        keys.push(name);
    }
    Ok((node, store, keys))
}

fn many_objects(size: Size, folder: &Folder, pick: Pick) -> Result<Row, StoreError> {
    let (few_node, few, few_keys) = filled(folder, "few.sock", FEW)?;
    let (many_node, many, mut many_keys) = filled(folder, "many.sock", MANY)?;
    let op = match pick {
        Pick::Same => {
            many_keys = many_keys.into_iter().step_by(MANY / FEW).collect();
            "get and release, 1,000 keys of 1,000,000"
        }
        Pick::All => {
            // A multiplicative step that is prime to the count visits every key once, far from the last.
            many_keys = (0..MANY).map(|at| many_keys[at * 611_953 % MANY].clone()).collect();
            "get and release, all of 1,000,000 keys"
        }
    };
    let pair = Pair {
        workload: "local",
        op,
        size_bytes: 8,
        moves: false,
        ceiling_name: "the same with 1,000 objects",
        target: Target::AtMost(1.5),
        rounds: size.rounds(),
        samples: 100,
    };
    let (mut at, mut beside) = (0, 0);
    let row = pair.measure(&mut || get_sample(&few, &few_keys, &mut beside), &mut || {
        get_sample(&many, &many_keys, &mut at)
    });
    drop((few, many, few_node, many_node));
    row
}
