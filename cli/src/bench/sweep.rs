//! `hetmem bench sweep`: gets of every length with the eager threshold forced to always Send, to always Read, and as the
//! node has measured it: first gets of objects that the reader knows nothing of, where a Read needs a grant, and gets of
//! an object whose place is known. Not a comparison with anything else. Invariant: in every round each of the three has
//! one block of gets, all orders of the three come equally often, and each get moves its bytes.

use std::hint::black_box;
use std::io::Write as _;

use hetmem_client::{GetOptions, Key, Path, Store, StoreError};

use super::processors::Halves;
use super::remote::Pairing;
use super::rows::{Row, percentile, rate, spread, timed};
use super::{Place, Size};

const LEN_MIN_LOG: u32 = 8;
const LEN_MAX_LOG: u32 = 26;
/// Objects that are got before anything counts: a node that has fetched nothing has measured nothing.
const WARM_UP: usize = 600;
/// A block of one way's gets takes about this long, in microseconds.
const BLOCK_US: f64 = 15_000.0;
const SAMPLES_MIN: usize = 4;
const SAMPLES_MAX: usize = 400;
/// What the automatic way may cost beside the better one.
const LIMIT: f64 = 1.05;

/// How the threshold is chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Send,
    Read,
    Automatic,
}

const WAYS: [Way; 3] = [Way::Send, Way::Read, Way::Automatic];
/// All orders of the three: nobody always follows the same one.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];

impl Way {
    const fn threshold_bytes(self) -> Option<u64> {
        match self {
            Self::Send => Some(u64::MAX),
            Self::Read => Some(0),
            Self::Automatic => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Send => "always Send",
            Self::Read => "always Read",
            Self::Automatic => "automatic",
        }
    }
}

/// What a block gets: always the same object, or objects that nobody got before.
enum Objects<'pairing> {
    Known(Key),
    Fresh { pairing: &'pairing Pairing, next: u64 },
}

impl Objects<'_> {
    const fn name(&self) -> &'static str {
        match self {
            Self::Known(_) => "get",
            Self::Fresh { .. } => "first get",
        }
    }

    /// One key for each get of a block.
    fn keys(&mut self, len: usize, samples: usize) -> Result<Vec<Key>, StoreError> {
        match self {
            Self::Known(key) => Ok(vec![key.clone(); samples]),
            Self::Fresh { pairing, next } => {
                let first = *next;
                *next += samples as u64;
                (first..*next).map(|number| pairing.put_as(&format!("bench/first/{number}"), len)).collect()
            }
        }
    }

    /// After a block: what nobody will get again makes room.
    fn done_with(&self, keys: &[Key]) -> Result<(), StoreError> {
        match self {
            Self::Known(_) => Ok(()),
            Self::Fresh { pairing, .. } => keys.iter().try_for_each(|key| pairing.delete(key)),
        }
    }
}

pub(super) fn run(size: Size, place: &Place) -> Result<Vec<Row>, StoreError> {
    let halves = Halves::of_all()?;
    let pairing = Pairing::start_on(place, halves.as_ref())?;
    let where_they_are = match &halves {
        Some(halves) => {
            format!("the owner on processors {}, the reader on {}", halves.name(0), halves.name(1))
        }
        None => "both nodes on the one processor that there is".to_owned(),
    };
    let _ = writeln!(std::io::stderr(), "{where_they_are}");
    let store = &pairing.inside;
    let mut fresh = Objects::Fresh { pairing: &pairing, next: 0 };
    warm_up(store, &mut fresh)?;
    let mut rows = Vec::new();
    for len in (LEN_MIN_LOG..=LEN_MAX_LOG).map(|log| 1 << log).filter(|len| place.up_to(*len) == *len) {
        rows.extend(sweep_len(size, store, &mut fresh, len)?);
        let key = pairing.put(len)?;
        rows.extend(sweep_len(size, store, &mut Objects::Known(key.clone()), len)?);
        pairing.delete(&key)?;
    }
    let status = store.status()?;
    for peer in &status.peers {
        let _ = writeln!(
            std::io::stderr(),
            "threshold towards {}: {} bytes ({}); a known place is read from {} bytes on ({})",
            peer.name,
            peer.threshold_bytes,
            peer.threshold_why,
            peer.known_from_bytes,
            peer.known_from_why
        );
    }
    Ok(rows)
}

/// Gets of lengths on both sides of any threshold, each twice: by a grant or inside the answer, and of a known place.
fn warm_up(store: &Store, fresh: &mut Objects<'_>) -> Result<(), StoreError> {
    for turn in 0..WARM_UP {
        let len = 1 << (LEN_MIN_LOG as usize + turn % 14);
        let keys = fresh.keys(len, 1)?;
        for key in keys.iter().chain(&keys) {
            fetch(store, key, len, Way::Automatic)?;
        }
        fresh.done_with(&keys)?;
    }
    Ok(())
}

fn fetch(store: &Store, key: &Key, len: usize, way: Way) -> Result<Path, StoreError> {
    let options = GetOptions { keep: false, threshold_bytes: way.threshold_bytes(), ..GetOptions::default() };
    let object = store.get_with(key, &options)?;
    if object.len() != len {
        return Err(StoreError::corrupt(key, format!("{} bytes came, {len} were put", object.len())));
    }
    black_box(&object[len - 1]);
    Ok(object.path())
}

/// Gets one way, one after the other; how long each took, in microseconds.
fn block(store: &Store, keys: &[Key], len: usize, way: Way) -> Result<Vec<f64>, StoreError> {
    let expected = match way {
        Way::Send => Some(Path::Eager),
        Way::Read => Some(Path::Read),
        Way::Automatic => None,
    };
    let one = |key| {
        let (us, path) = timed(|| fetch(store, key, len, way));
        let path = path?;
        match expected {
            Some(expected) if expected != path => {
                Err(StoreError::unavailable("the forced way", format!("{}: by {path}", way.name())))
            }
            _ => Ok(us),
        }
    };
    keys.iter().map(one).collect()
}

/// The three ways for one length.
fn sweep_len(
    size: Size,
    store: &Store,
    objects: &mut Objects<'_>,
    len: usize,
) -> Result<Vec<Row>, StoreError> {
    let mut all: [Vec<f64>; 3] = Default::default();
    let mut rounds: Vec<[f64; 3]> = Vec::new();
    let one = objects.keys(len, 1)?;
    let once = percentile(&block(store, &one, len, Way::Read)?, 50).max(1.0);
    objects.done_with(&one)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped right after")]
    let samples = ((BLOCK_US / once) as usize).clamp(SAMPLES_MIN, SAMPLES_MAX);
    // One round more, to warm up.
    for round in 0..=size.rounds().next_multiple_of(ORDERS.len()) {
        let mut times: [Vec<f64>; 3] = Default::default();
        for at in ORDERS[round % ORDERS.len()] {
            let keys = objects.keys(len, samples)?;
            times[at] = block(store, &keys, len, WAYS[at])?;
            objects.done_with(&keys)?;
        }
        if round == 0 {
            continue;
        }
        rounds.push([0, 1, 2].map(|at| percentile(&times[at], 50)));
        for at in 0..WAYS.len() {
            all[at].append(&mut times[at]);
        }
    }
    let medians = [0, 1, 2].map(|at| percentile(&all[at], 50));
    // Better in all rounds together: the better one of each round would be the luckier one.
    let better = usize::from(medians[1] < medians[0]);
    let ratios = |at: usize| -> Vec<f64> { rounds.iter().map(|round| round[at] / round[better]).collect() };
    let row = |at: usize| Row {
        workload: "sweep",
        op: format!("{}, {}", objects.name(), WAYS[at].name()),
        size_bytes: len as u64,
        p50_us: medians[at],
        p99_us: percentile(&all[at], 99),
        gib_per_s: Some(rate(len as u64, medians[at])),
        ceiling_name: "the better of Send and Read".to_owned(),
        ceiling_p50_us: medians[better],
        ratio_to_ceiling: percentile(&ratios(at), 50),
        ratio_spread: spread(&ratios(at)),
        target: if WAYS[at] == Way::Automatic { format!("time at most {LIMIT}") } else { String::new() },
    };
    Ok((0..WAYS.len()).map(row).collect())
}
