//! `hetmem bench verbs`: gets over RDMA verbs beside what perftest's programs do on the same device, and beside each other
//! and TCP on the same machine. Not a statement about hardware where the device is software. Invariant: in every round each
//! of those that are compared has one block, in another order than in the round before, and each get moves its bytes.

use hetmem_client::{GetOptions, Key, Path, Store, StoreError};

use super::perftest::Perftest;
use super::remote::Pairing;
use super::rows::{Row, Target, percentile, rate, spread, timed};
use super::{Carrier, Place, Size, skipped};

const SMALL: usize = 1 << 10;
const LARGE: usize = 4 << 20;
/// So many objects are got by one call, beside a program that posts many reads at a time.
const TOGETHER: usize = 6;
/// Gets before anything counts.
const WARM_UP: usize = 20;

/// What one block of a round came to, in microseconds.
struct Block {
    p50_us: f64,
    mean_us: f64,
    all_us: Vec<f64>,
}

impl Block {
    fn of(all_us: Vec<f64>) -> Self {
        let count = u32::try_from(all_us.len()).unwrap_or(u32::MAX);
        Self {
            p50_us: percentile(&all_us, 50),
            mean_us: all_us.iter().sum::<f64>() / f64::from(count),
            all_us,
        }
    }

    /// Of a program that says so much and no more.
    fn said(p50_us: f64, mean_us: f64) -> Self {
        Self { p50_us, mean_us, all_us: vec![p50_us] }
    }
}

/// Who takes part in the rounds.
struct Runner<'a> {
    name: String,
    run: Box<dyn FnMut() -> Result<Block, StoreError> + 'a>,
    blocks: Vec<Block>,
}

/// How bytes come: inside the answer, by a Read of where they are known to lie, by a grant and a Read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Send,
    Read,
    FirstRead,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Send => "Send",
            Self::Read => "Read of a known place",
            Self::FirstRead => "first get, by Read",
        }
    }

    const fn path(self) -> Path {
        match self {
            Self::Send => Path::Eager,
            Self::Read | Self::FirstRead => Path::Read,
        }
    }

    fn options(self) -> GetOptions {
        let threshold = if self == Self::Send { u64::MAX } else { 0 };
        GetOptions { keep: false, threshold_bytes: Some(threshold), ..GetOptions::default() }
    }
}

pub(super) fn run(size: Size, place: &Place) -> Result<Vec<Row>, StoreError> {
    let verbs = Pairing::start(&place.over(Carrier::Verbs))?;
    let tcp = Pairing::start(&place.over(Carrier::Tcp))?;
    let perftest = Perftest::find(&place.listen);
    if let Err(why) = &perftest {
        skipped("beside perftest", why);
    }
    let perftest = perftest.ok();
    let mut rows = small(size, &verbs, &tcp, perftest.as_ref())?;
    if place.up_to(LARGE) == LARGE {
        match large(size, &verbs, &tcp, perftest.as_ref()) {
            Ok(more) => rows.extend(more),
            Err(why) => skipped("4 MiB", &why.to_string()),
        }
    }
    Ok(rows)
}

fn fetch(store: &Store, key: &Key, len: usize, way: Way) -> Result<(), StoreError> {
    let object = store.get_with(key, &way.options())?;
    if object.len() != len || object.path() != way.path() {
        let why =
            format!("{} bytes came by {}, {len} were wanted by {}", object.len(), object.path(), way.name());
        return Err(StoreError::corrupt(key, why));
    }
    std::hint::black_box(&object[len - 1]);
    Ok(())
}

/// Somebody who gets objects of one length one after the other.
fn getter<'a>(
    name: &str,
    pairing: &'a Pairing,
    (len, samples, way): (usize, usize, Way),
) -> Result<Runner<'a>, StoreError> {
    let key = pairing.put(len)?;
    for _ in 0..if len == SMALL { WARM_UP } else { 2 } {
        fetch(&pairing.inside, &key, len, way)?;
    }
    let mut next = 0;
    let run = move || {
        let fresh = (way == Way::FirstRead).then(|| next..next + samples);
        next += samples;
        let mut all = Vec::with_capacity(samples);
        for number in fresh.unwrap_or(0..samples) {
            let fresh = match way {
                Way::FirstRead => Some(pairing.put_as(&format!("bench/first/{len}/{number}"), len)?),
                Way::Send | Way::Read => None,
            };
            let (us, done) = timed(|| fetch(&pairing.inside, fresh.as_ref().unwrap_or(&key), len, way));
            done?;
            all.push(us);
            if let Some(key) = fresh {
                pairing.delete(&key)?;
            }
        }
        Ok(Block::of(all))
    };
    Ok(Runner { name: format!("{name}, {}", way.name()), run: Box::new(run), blocks: Vec::new() })
}

/// Somebody who gets several objects by one call; times are of one object.
fn getter_of_many(pairing: &Pairing, len: usize, samples: usize) -> Result<Runner<'_>, StoreError> {
    let put = |number| pairing.put_as(&format!("bench/together/{number}"), len);
    let keys: Vec<Key> = (0..TOGETHER).map(put).collect::<Result<_, _>>()?;
    let options = Way::Read.options();
    let all_of_them = move || -> Result<(), StoreError> {
        pairing.inside.get_many_with(&keys, &options).into_iter().try_for_each(|object| object.map(drop))
    };
    all_of_them()?;
    let run = move || {
        let one = || {
            let (us, done) = timed(&all_of_them);
            done.map(|()| us / TOGETHER as f64)
        };
        Ok(Block::of((0..samples).map(|_| one()).collect::<Result<_, _>>()?))
    };
    let name = format!("verbs, get_many of {TOGETHER}, Read of known places");
    Ok(Runner { name, run: Box::new(run), blocks: Vec::new() })
}

/// Lets all take turns. Who comes first changes from round to round; the first round warms up and does not count.
fn rounds(size: Size, runners: &mut [Runner<'_>]) -> Result<(), StoreError> {
    for round in 0..=size.rounds() {
        for turn in 0..runners.len() {
            let at = if round % 2 == 0 { turn } else { runners.len() - 1 - turn };
            let at = (at + round / 2) % runners.len();
            let block = (runners[at].run)()?;
            if round > 0 {
                runners[at].blocks.push(block);
            }
        }
    }
    Ok(())
}

/// Which figure of a block is compared.
#[derive(Clone, Copy)]
enum Figure {
    P50,
    Mean,
}

impl Figure {
    const fn of(self, block: &Block) -> f64 {
        match self {
            Self::P50 => block.p50_us,
            Self::Mean => block.mean_us,
        }
    }
}

/// One beside another.
fn row(len: usize, ours: &Runner<'_>, other: &Runner<'_>, figure: Figure, target: Option<Target>) -> Row {
    let ratio = |(ours, other): (&Block, &Block)| match target {
        Some(Target::AtLeast(_)) => figure.of(other) / figure.of(ours),
        Some(Target::AtMost(_)) | None => figure.of(ours) / figure.of(other),
    };
    let ratios: Vec<f64> = ours.blocks.iter().zip(&other.blocks).map(ratio).collect();
    let all: Vec<f64> = ours.blocks.iter().flat_map(|block| block.all_us.iter().copied()).collect();
    let middle =
        |blocks: &[Block]| percentile(&blocks.iter().map(|it| figure.of(it)).collect::<Vec<_>>(), 50);
    let p50_us = middle(&ours.blocks);
    let which = match figure {
        Figure::P50 => "p50",
        Figure::Mean => "mean",
    };
    Row {
        workload: "verbs",
        op: format!("{} ({which})", ours.name),
        size_bytes: len as u64,
        p50_us,
        p99_us: percentile(&all, 99),
        gib_per_s: Some(rate(len as u64, p50_us)),
        ceiling_name: other.name.clone(),
        ceiling_p50_us: middle(&other.blocks),
        ratio_to_ceiling: percentile(&ratios, 50),
        ratio_spread: spread(&ratios),
        target: target.map_or_else(String::new, |target| target.to_string()),
    }
}

fn small(
    size: Size,
    verbs: &Pairing,
    tcp: &Pairing,
    perftest: Option<&Perftest>,
) -> Result<Vec<Row>, StoreError> {
    const SAMPLES: usize = 100;
    let mut all = vec![
        getter("verbs", verbs, (SMALL, SAMPLES, Way::Send))?,
        getter("verbs", verbs, (SMALL, SAMPLES, Way::Read))?,
        getter("verbs", verbs, (SMALL, SAMPLES / 4, Way::FirstRead))?,
        getter("TCP", tcp, (SMALL, SAMPLES, Way::Send))?,
    ];
    if let Some(perftest) = perftest {
        let run = || {
            let latency = perftest.send_latency(SMALL, SAMPLES * 3)?;
            Ok(Block::said(2.0 * latency.typical_us, 2.0 * latency.mean_us))
        };
        all.push(Runner { name: "two ib_send_lat".to_owned(), run: Box::new(run), blocks: Vec::new() });
    }
    rounds(size, &mut all)?;
    let target = Some(Target::AtMost(1.5));
    let mut rows = Vec::new();
    for figure in [Figure::P50, Figure::Mean] {
        if let [send, read, first, _, lat] = &all[..] {
            rows.push(row(SMALL, send, lat, figure, target));
            rows.push(row(SMALL, read, lat, figure, target));
            rows.push(row(SMALL, first, lat, figure, None));
        }
        rows.push(row(SMALL, &all[0], &all[1], figure, Some(Target::AtMost(1.0))));
        rows.push(row(SMALL, &all[0], &all[2], figure, Some(Target::AtMost(1.0))));
        rows.push(row(SMALL, &all[0], &all[3], figure, Some(Target::AtMost(1.0))));
    }
    Ok(rows)
}

fn large(
    size: Size,
    verbs: &Pairing,
    tcp: &Pairing,
    perftest: Option<&Perftest>,
) -> Result<Vec<Row>, StoreError> {
    const SAMPLES: usize = 12;
    let mut all = vec![
        getter("verbs", verbs, (LARGE, SAMPLES, Way::Read))?,
        getter_of_many(verbs, LARGE, SAMPLES / 4)?,
        getter("verbs", verbs, (LARGE, SAMPLES / 2, Way::Send))?,
        getter("verbs", verbs, (LARGE, SAMPLES / 2, Way::FirstRead))?,
        getter("TCP", tcp, (LARGE, SAMPLES / 2, Way::Send))?,
        getter("TCP", tcp, (LARGE, SAMPLES / 2, Way::Read))?,
    ];
    if let Some(perftest) = perftest {
        for (name, depth) in [("ib_read_bw", None), ("ib_read_bw, one at a time", Some(1))] {
            let run = move || perftest.read_us(LARGE, 20, depth).map(|us| Block::said(us, us));
            all.push(Runner { name: name.to_owned(), run: Box::new(run), blocks: Vec::new() });
        }
    }
    rounds(size, &mut all)?;
    let target = Some(Target::AtLeast(0.9));
    let mut rows = Vec::new();
    if let [read, many, _, first, _, _, bandwidth, one_at_a_time] = &all[..] {
        rows.push(row(LARGE, read, bandwidth, Figure::Mean, target));
        rows.push(row(LARGE, many, bandwidth, Figure::Mean, target));
        rows.push(row(LARGE, first, bandwidth, Figure::Mean, None));
        rows.push(row(LARGE, read, one_at_a_time, Figure::Mean, target));
    }
    for other in [2, 4, 5] {
        rows.push(row(LARGE, &all[0], &all[other], Figure::Mean, Some(Target::AtMost(1.0))));
    }
    Ok(rows)
}
