//! `hetmem bench sweep`: gets of every length with the eager threshold forced to always Send, to always Read, and as the
//! node has measured it. Not a comparison with anything else. Invariant: the three take turns, get by get, in every
//! round, and each get moves its bytes.

use std::hint::black_box;
use std::io::Write as _;

use hetmem_client::{GetOptions, Key, Path, Store, StoreError};

use super::Size;
use super::remote::Pairing;
use super::rows::{Row, percentile, rate, timed};

const LEN_MIN_LOG: u32 = 8;
const LEN_MAX_LOG: u32 = 26;
/// Gets with the threshold as measured before anything counts: a node that has fetched nothing has measured nothing.
const WARM_UP: usize = 600;
/// A round of one way takes about this long, in microseconds.
const ROUND_US: f64 = 40_000.0;
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
    let pairing = Pairing::start()?;
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

/// The three ways for one length.
fn sweep_len(size: Size, store: &Store, key: &Key, len: usize) -> Result<Vec<Row>, StoreError> {
    let mut all: [Vec<f64>; 3] = Default::default();
    let mut ratios: [Vec<f64>; 3] = Default::default();
    let once = timed(|| fetch(store, key, len, Way::Read)).0.max(1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped right after")]
    let samples = ((ROUND_US / once) as usize).clamp(SAMPLES_MIN, SAMPLES_MAX);
    for round in 0..=size.rounds() {
        let mut times: [Vec<f64>; 3] = Default::default();
        for sample in 0..samples {
            // Who comes first changes from get to get: nobody always follows the same one.
            for turn in 0..WAYS.len() {
                let at = (sample + turn) % WAYS.len();
                let (us, path) = timed(|| fetch(store, key, len, WAYS[at]));
                let expected = match WAYS[at] {
                    Way::Send => Some(Path::Eager),
                    Way::Read => Some(Path::Read),
                    Way::Automatic => None,
                };
                let path = path?;
                if expected.is_some_and(|expected| expected != path) {
                    let why = format!("{}: {path}", WAYS[at].name());
                    return Err(StoreError::unavailable("the forced way", why));
                }
                times[at].push(us);
            }
        }
        // The first round warms up.
        if round == 0 {
            continue;
        }
        let medians = [0, 1, 2].map(|at| percentile(&times[at], 50));
        let better = medians[0].min(medians[1]);
        for at in 0..WAYS.len() {
            ratios[at].push(medians[at] / better);
            all[at].append(&mut times[at]);
        }
    }
    let medians = [0, 1, 2].map(|at| percentile(&all[at], 50));
    let row = |at: usize| Row {
        workload: "sweep",
        op: WAYS[at].name().to_owned(),
        size_bytes: len as u64,
        p50_us: medians[at],
        p99_us: percentile(&all[at], 99),
        gib_per_s: Some(rate(len as u64, medians[at])),
        ceiling_name: "the better of Send and Read".to_owned(),
        ceiling_p50_us: medians[0].min(medians[1]),
        ratio_to_ceiling: percentile(&ratios[at], 50),
        target: if WAYS[at] == Way::Automatic { format!("time at most {LIMIT}") } else { String::new() },
    };
    Ok((0..WAYS.len()).map(row).collect())
}
