//! `hetmem bench sweep`: gets of every length with the eager threshold forced to always Send, to always Read, and as the
//! node has measured it. Not a comparison with anything else. Invariant: in every round each of the three has one block
//! of gets, all orders of the three come equally often, and each get moves its bytes.

use std::hint::black_box;
use std::io::Write as _;

use hetmem_client::{GetOptions, Key, Path, Store, StoreError};

use super::Size;
use super::processors::Halves;
use super::remote::Pairing;
use super::rows::{Row, percentile, rate, timed};

const LEN_MIN_LOG: u32 = 8;
const LEN_MAX_LOG: u32 = 26;
/// Gets with the threshold as measured before anything counts: a node that has fetched nothing has measured nothing.
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
            Self::Send => "get, always Send",
            Self::Read => "get, always Read",
            Self::Automatic => "get, automatic",
        }
    }
}

pub(super) fn run(size: Size) -> Result<Vec<Row>, StoreError> {
    let halves = Halves::of_all()?;
    let pairing = Pairing::start_on(halves.as_ref())?;
    let where_they_are = match &halves {
        Some(halves) => {
            format!("the owner on processors {}, the reader on {}", halves.name(0), halves.name(1))
        }
        None => "both nodes on the one processor that there is".to_owned(),
    };
    let _ = writeln!(std::io::stderr(), "{where_they_are}");
    let lens: Vec<usize> = (LEN_MIN_LOG..=LEN_MAX_LOG).map(|log| 1 << log).collect();
    let keys: Vec<Key> = lens.iter().map(|len| pairing.put(*len)).collect::<Result<_, _>>()?;
    let store = &pairing.inside;
    for turn in 0..WARM_UP {
        // Lengths on both sides of any threshold.
        let at = turn % 14;
        fetch(store, &keys[at], lens[at], Way::Automatic)?;
    }
    let mut rows = Vec::new();
    for (key, len) in keys.iter().zip(&lens) {
        rows.extend(sweep_len(size, store, key, *len)?);
    }
    let status = store.status()?;
    for peer in &status.peers {
        let _ = writeln!(
            std::io::stderr(),
            "threshold towards {}: {} bytes ({})",
            peer.name,
            peer.threshold_bytes,
            peer.threshold_why
        );
    }
    Ok(rows)
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
fn block(store: &Store, key: &Key, len: usize, way: Way, samples: usize) -> Result<Vec<f64>, StoreError> {
    let expected = match way {
        Way::Send => Some(Path::Eager),
        Way::Read => Some(Path::Read),
        Way::Automatic => None,
    };
    let one = |_| {
        let (us, path) = timed(|| fetch(store, key, len, way));
        let path = path?;
        match expected {
            Some(expected) if expected != path => {
                Err(StoreError::unavailable("the forced way", format!("{}: {path}", way.name())))
            }
            _ => Ok(us),
        }
    };
    (0..samples).map(one).collect()
}

/// The three ways for one length.
fn sweep_len(size: Size, store: &Store, key: &Key, len: usize) -> Result<Vec<Row>, StoreError> {
    let mut all: [Vec<f64>; 3] = Default::default();
    let mut rounds: Vec<[f64; 3]> = Vec::new();
    let once = timed(|| fetch(store, key, len, Way::Read)).0.max(1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped right after")]
    let samples = ((BLOCK_US / once) as usize).clamp(SAMPLES_MIN, SAMPLES_MAX);
    // One round more, to warm up.
    for round in 0..=size.rounds().next_multiple_of(ORDERS.len()) {
        let mut times: [Vec<f64>; 3] = Default::default();
        for at in ORDERS[round % ORDERS.len()] {
            times[at] = block(store, key, len, WAYS[at], samples)?;
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
    let ratio = |at: usize| {
        let ratios: Vec<f64> = rounds.iter().map(|round| round[at] / round[better]).collect();
        percentile(&ratios, 50)
    };
    let row = |at: usize| Row {
        workload: "sweep",
        op: WAYS[at].name().to_owned(),
        size_bytes: len as u64,
        p50_us: medians[at],
        p99_us: percentile(&all[at], 99),
        gib_per_s: Some(rate(len as u64, medians[at])),
        ceiling_name: "the better of Send and Read".to_owned(),
        ceiling_p50_us: medians[better],
        ratio_to_ceiling: ratio(at),
        target: if WAYS[at] == Way::Automatic { format!("time at most {LIMIT}") } else { String::new() },
    };
    Ok((0..WAYS.len()).map(row).collect())
}
