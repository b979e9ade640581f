//! Figures of this crate beside what bounds them, alternating in one run: copies beside `copy_nonoverlapping`, a get
//! beside its parts, population with and without huge pages. Not a test: nothing is asserted about time.
//!
//! Holds unsafe code: the bare copies that it measures against.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use hetmem_core::{
    Epoch, Extent, Generation, Key, NodeId, ObjectId, ObjectMeta, SegmentId, SlotId, StoreError, Tier,
    checksum,
};
use hetmem_host_mem::{
    ClientPage, IndexEntry, IndexReader, IndexWriter, NodePage, PagePolicy, Segment, SegmentOwner, copy,
    pages_report,
};

fn main() -> Result<(), StoreError> {
    let wanted = std::env::args().nth(1);
    for (name, part) in
        [("copies", copies as fn() -> Result<(), StoreError>), ("gets", gets), ("population", population)]
    {
        if wanted.as_deref().is_none_or(|wanted| wanted == name) {
            part()?;
        }
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn gib_per_s(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / f64::from(1 << 30)
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn copies() -> Result<(), StoreError> {
    println!(
        "copies into a warm segment, GiB/s (p50): plain memcpy | copy | copy + checksum | checksum alone"
    );
    for pages in [PagePolicy::Off, PagePolicy::Auto] {
        let segment = Segment::create(SegmentId(1), 64 << 20, SegmentOwner::Node, pages)?;
        for len in [64 << 20, 16 << 20, 8 << 20, 4 << 20, 1 << 20, 64 << 10] {
            let src: Vec<u8> = (0..len).map(|at: usize| at as u8).collect();
            let rounds = ((256 << 20) / len).clamp(9, 301);
            let mut times = [const { Vec::new() }; 4];
            for _ in 0..rounds {
                times[0].push(time(|| {
                    // The baseline: one thread, the C library's memcpy.
                    #[allow(unsafe_code)]
                    // SAFETY: the segment has 64 MiB and is no part of the vector.
                    unsafe {
                        std::ptr::copy_nonoverlapping(src.as_ptr(), segment.base(), len);
                    }
                }));
                times[1].push(time(|| segment.write(0, black_box(&src)).unwrap()));
                times[2].push(time(|| {
                    black_box(segment.write_with_checksum(0, black_box(&src)).unwrap());
                }));
                times[3].push(time(|| {
                    black_box(checksum::of(black_box(&src)));
                }));
            }
            let [plain, copied, fused, sum] = times.map(median);
            println!(
                "{:>24} {:>6} KiB: {:6.2} | {:6.2} ({:.2}) | {:6.2} ({:.2}) | {:6.2}",
                segment.pages().to_string(),
                len >> 10,
                gib_per_s(len, plain),
                gib_per_s(len, copied),
                plain.as_secs_f64() / copied.as_secs_f64(),
                gib_per_s(len, fused),
                plain.as_secs_f64() / fused.as_secs_f64(),
                gib_per_s(len, sum),
            );
        }
    }
    black_box(copy::copy_with_checksum(&mut [0], &[1]));
    Ok(())
}

fn entry(number: u64) -> IndexEntry {
    let meta = ObjectMeta::bytes(4096).unwrap();
    let extent = Extent { segment: SegmentId(1), offset: number * 4096, len_bytes: 4096 };
    let object = ObjectId { origin: NodeId(1), epoch: Epoch(1), number };
    IndexEntry { object, meta, generation: Generation(number + 1), extent, tier: Tier::Host }
}

fn gets() -> Result<(), StoreError> {
    for objects in [1_000_u32, 100_000, 1_000_000] {
        let mut writer = IndexWriter::create(4 << 20)?;
        let keys: Vec<Key> = (0..objects)
            .map(|number| Key::new(&format!("model/layers.{number}.attn.weight")))
            .collect::<Result<_, _>>()?;
        let filled = time(|| {
            for (number, key) in (0..).zip(&keys) {
                writer.publish(SlotId(number), key, &entry(u64::from(number))).unwrap();
            }
        });
        let node = NodePage::create()?;
        let page = ClientPage::map(node.descriptor().try_clone_to_owned().unwrap())?;
        let reader = IndexReader::map(writer.descriptor().as_fd().try_clone_to_owned().unwrap())?;
        // Keys in an order that no prefetcher guesses.
        let mut order: Vec<usize> = (0..objects as usize).collect();
        let mut state = 1_u64;
        for at in (1..order.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(at, (state >> 33) as usize % (at + 1));
        }
        let hot: Vec<Key> = order.iter().take(64).map(|at| keys[*at].clone()).collect();
        let ordered: Vec<Key> = order.iter().map(|at| Key::new(keys[*at].as_str()).unwrap()).collect();
        let get = |key: &Key| {
            let pinned = reader.get(key, key.fingerprint(), &page).unwrap().unwrap();
            page.unpin(black_box(&pinned).pin);
        };
        let each = |keys: &[Key], rounds: usize| {
            let runs = (0..9).map(|_| time(|| (0..rounds).for_each(|_| keys.iter().for_each(get)))).collect();
            median(runs).as_secs_f64() * 1e9 / (rounds * keys.len()) as f64
        };
        let one = each(&hot[..1], 20_000);
        let few = each(&hot, 500);
        let all = each(&ordered, (200_000 / ordered.len()).max(1));
        let hash = time(|| {
            (0..1000).for_each(|_| {
                hot.iter().for_each(|key| {
                    black_box(black_box(key).fingerprint());
                });
            });
        });
        println!(
            "get + unpin of {objects:>7} objects: one key {one:5.1} ns, 64 keys {few:5.1} ns, all at random {all:5.1} ns \
             (of it fingerprint {:.1} ns); publish {:.0} ns",
            hash.as_secs_f64() * 1e9 / 64_000.0,
            filled.as_secs_f64() * 1e9 / f64::from(objects),
        );
        let scan = time(|| {
            let mut pinned = std::collections::HashSet::new();
            (0..1000).for_each(|_| node.pinned(&mut pinned));
        });
        println!("    scan of one client's pins {:.2} us, hits {}", scan.as_secs_f64() * 1e3, node.hits());
    }
    Ok(())
}

fn population() -> Result<(), StoreError> {
    println!("{:#?}", pages_report());
    let len = 512 << 20;
    for _ in 0..3 {
        for pages in [PagePolicy::Off, PagePolicy::Auto] {
            let start = Instant::now();
            let segment = Segment::create(SegmentId(1), len as u64, SegmentOwner::Node, pages)?;
            let time = start.elapsed();
            println!("populate 512 MiB on {}: {:.2} GiB/s", segment.pages(), gib_per_s(len, time));
        }
    }
    Ok(())
}
