//! `hetmem bench remote`: gets from another node, over TCP on loopback unless told otherwise. Not what verbs are bounded
//! by (`verbs`). Invariant: the owner is a process of its own, and nothing that was fetched is kept: every get moves its
//! bytes.

use std::hint::black_box;

use hetmem_client::{DType, GetOptions, Key, Object, ObjectMeta, Path, Store, StoreError};
use hetmem_node::{Config, Node};

use super::baseline::{TcpLoop, iperf3};
use super::processors::Halves;
use super::rows::{Pair, Row, Target, timed};
use super::{Place, Size, skipped};
use crate::demo::nodes::{Folder, Process};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// What an answer has beside the object: header and metadata.
const ENVELOPE_LEN: usize = 96;
/// A state dict of many small tensors: so many, of so many bytes.
const TENSORS: usize = 10_000;
const TENSOR_LEN: usize = 4 * KIB;

/// Two nodes: one that owns what is fetched, a process of its own, and one in this process.
pub(super) struct Pairing {
    put: Store,
    /// A session inside the fetching node.
    pub(super) inside: Store,
    /// A session over its Unix socket.
    outside: Store,
    _node: Node,
    owner: Process,
    _folder: Folder,
}

impl Pairing {
    pub(super) fn start(place: &Place) -> Result<Self, StoreError> {
        Self::start_on(place, None)
    }

    /// The owner on one half of the processors, this thread and the node in this process on the other, if they are to be
    /// apart.
    pub(super) fn start_on(place: &Place, halves: Option<&Halves>) -> Result<Self, StoreError> {
        let keep_to = |half| halves.map_or(Ok(()), |halves| halves.keep_to(half));
        keep_to(0)?;
        let folder = Folder::create()?;
        let socket = |name: &str| folder.path().join(name).display().to_string();
        let flags = |name: &str, host: &str| {
            vec![
                ("socket", socket(name)),
                ("listen", format!("{}:0", place.listen)),
                ("host", place.host.map_or_else(|| host.to_owned(), |bytes| bytes.to_string())),
                ("fabric", place.fabric.name().to_owned()),
            ]
        };
        let owner = Process::start("bench-owner", &flags("owner.sock", "512MiB"))?;
        keep_to(1)?;
        let put = Store::connect(Some(&owner.socket))?;
        let mut here = flags("here.sock", "2GiB");
        here.extend([("name", "bench-here".to_owned()), ("join", owner.address.clone())]);
        let here = here.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let node = Node::start(Config::load(None, here)?)?;
        let inside = Store::over(node.session()?)?;
        let outside = Store::connect(Some(node.socket()))?;
        Ok(Self { put, inside, outside, _node: node, owner, _folder: folder })
    }

    /// The owner's process.
    pub(super) fn owner_process(&self) -> u32 {
        self.owner.id()
    }

    /// Puts an object of this length on the owner.
    pub(super) fn put(&self, len: usize) -> Result<Key, StoreError> {
        self.put_as(&format!("bench/remote/{len}"), len)
    }

    /// The same, under a name of its own.
    pub(super) fn put_as(&self, name: &str, len: usize) -> Result<Key, StoreError> {
        let key = Key::new(name)?;
        self.put.put_bytes(&key, &vec![9; len])?;
        Ok(key)
    }

    /// Deletes what was put.
    pub(super) fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.put.delete(key)?;
        Ok(())
    }
}

pub(super) fn run(size: Size, place: &Place) -> Result<Vec<Row>, StoreError> {
    let pairing = Pairing::start(place)?;
    let (inside, outside) = (&pairing.inside, &pairing.outside);
    let mut bare = TcpLoop::start(place.up_to(64 * MIB) + ENVELOPE_LEN)?;
    let mut rows = Vec::new();
    for (len, samples, target) in [
        (KIB, 500, Target::AtMost(1.3)),
        (32 * KIB, 200, Target::AtMost(1.5)),
        (MIB, 50, Target::AtLeast(0.95)),
        (64 * MIB, 3, Target::AtLeast(0.95)),
    ] {
        if len > place.up_to(len) {
            continue;
        }
        let key = pairing.put(len)?;
        rows.push(get(size, "get", inside, &key, &mut bare, (len, samples, target))?);
        rows.push(get(size, "get through a daemon", outside, &key, &mut bare, (len, samples, target))?);
    }
    if place.up_to(TENSORS * TENSOR_LEN) < TENSORS * TENSOR_LEN {
        skipped("get_many", "its tensors are more together than --up-to");
    } else {
        let state_dict = put_state_dict(&pairing.put)?;
        rows.push(get_all(size, "get_many", inside, &state_dict)?);
        rows.push(get_all(size, "get_many through a daemon", outside, &state_dict)?);
    }
    if place.up_to(64 * MIB) < 64 * MIB {
        skipped("get beside iperf3", "its gets of 64 MiB are beyond --up-to");
        return Ok(rows);
    }
    match iperf3() {
        Ok(rate) => rows.push(beside_iperf3(size, inside)?.into_row(rate)),
        Err(why) => skipped("get beside iperf3", &why),
    }
    Ok(rows)
}

fn fetch(store: &Store, key: &Key, len: usize) -> Result<Path, StoreError> {
    let options = GetOptions { keep: false, ..GetOptions::default() };
    let object = store.get_with(key, &options)?;
    if object.len() != len {
        return Err(StoreError::corrupt(key, format!("{} bytes came, {len} were put", object.len())));
    }
    black_box(&object[len - 1]);
    Ok(object.path())
}

fn get(
    size: Size,
    op: &str,
    store: &Store,
    key: &Key,
    bare: &mut TcpLoop,
    (len, samples, target): (usize, usize, Target),
) -> Result<Row, StoreError> {
    let path = fetch(store, key, len)?;
    let pair = Pair {
        workload: "remote",
        op: &format!("{op} ({path})"),
        size_bytes: len as u64,
        moves: true,
        ceiling_name: "bare TCP loop, one stream",
        target,
        rounds: size.rounds(),
        samples,
    };
    pair.measure(
        &mut || {
            let (us, done) = timed(|| bare.fetch(len + ENVELOPE_LEN));
            done.map(|()| us)
        },
        &mut || {
            let (us, done) = timed(|| fetch(store, key, len));
            done.map(|_| us)
        },
    )
}

fn put_state_dict(store: &Store) -> Result<Vec<Key>, StoreError> {
    let meta = ObjectMeta::tensor(DType::F32, &[TENSOR_LEN as u64 / 128, 32])?;
    let tensor = |number: usize| {
        let key = Key::new(&format!("bench/state/layers.{}.{}.weight", number / 10, number % 10))?;
        store.put(&key, meta, &[1; TENSOR_LEN])?;
        Ok(key)
    };
    (0..TENSORS).map(tensor).collect()
}

/// All tensors of a state dict by one call, beside one call for each. All come inside answers.
fn get_all(size: Size, op: &str, store: &Store, keys: &[Key]) -> Result<Row, StoreError> {
    let options = GetOptions { keep: false, threshold_bytes: Some(u64::MAX), ..GetOptions::default() };
    let came = |object: Result<Object, StoreError>| {
        let object = object?;
        black_box(&object[TENSOR_LEN - 1]);
        match object.path() {
            Path::Eager => Ok(()),
            path => Err(StoreError::corrupt("bench", format!("it came by {path}, not inside an answer"))),
        }
    };
    let pair = Pair {
        workload: "remote",
        op: &format!("{op}, {TENSORS} tensors of 4 KiB"),
        size_bytes: (TENSORS * TENSOR_LEN) as u64,
        moves: true,
        ceiling_name: "the same gets, one by one",
        target: Target::AtLeast(10.0),
        rounds: size.rounds(),
        samples: 1,
    };
    pair.measure(
        &mut || {
            // Each is let go before the next, which is the faster way.
            let (us, done) = timed(|| keys.iter().try_for_each(|key| came(store.get_with(key, &options))));
            done.map(|()| us)
        },
        &mut || {
            let (us, done) = timed(|| store.get_many_with(keys, &options).into_iter().try_for_each(came));
            done.map(|()| us)
        },
    )
}

/// Gets of 64 MiB for as long as iperf3 ran.
struct Rate {
    row: Row,
}

fn beside_iperf3(size: Size, store: &Store) -> Result<Rate, StoreError> {
    let len = 64 * MIB;
    let key = Key::new(&format!("bench/remote/{len}"))?;
    let mut own = || {
        let (us, done) = timed(|| fetch(store, &key, len));
        done.map(|_| us)
    };
    let pair = Pair {
        workload: "remote",
        op: "get (read)",
        size_bytes: len as u64,
        moves: true,
        ceiling_name: "iperf3, one stream, one second",
        target: Target::AtLeast(1.0),
        rounds: size.rounds(),
        samples: 3,
    };
    let mut same = || Ok(1.0);
    Ok(Rate { row: pair.measure(&mut same, &mut own)? })
}

impl Rate {
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    fn into_row(mut self, iperf_gib_per_s: f64) -> Row {
        self.row.ceiling_p50_us = self.row.size_bytes as f64 / (1_u64 << 30) as f64 / iperf_gib_per_s * 1e6;
        self.row.ratio_to_ceiling = self.row.ceiling_p50_us / self.row.p50_us;
        self.row.ratio_spread = self.row.ratio_spread.map(|ratio| ratio * self.row.ceiling_p50_us);
        self.row
    }
}
