//! The index against a naive model, against another thread, and against files that are not what they should be.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64 as Word, Ordering};

use hetmem_core::{
    Checksum, DType, Epoch, ErrorKind, Extent, Generation, KEY_LEN_MAX, Key, NodeId, ObjectId, ObjectMeta,
    SegmentId, SlotId, Tier,
};
use proptest::prelude::*;

use super::layout::{CELLS, Geometry, HEAD, SEQ, SLOT_WORDS};
use super::{IndexEntry, IndexReader, IndexWriter};
use crate::mapping::{Access, Mapping};
use crate::memfd;
use crate::page::{ClientPage, NodePage, PINS};
use rustix::fs::SealFlags;

fn again(fd: BorrowedFd<'_>) -> OwnedFd {
    fd.try_clone_to_owned().expect("a descriptor is left")
}

fn key(name: &str) -> Key {
    Key::new(name).expect("a valid key")
}

fn entry(generation: u64, shape: &[u64]) -> IndexEntry {
    let meta =
        ObjectMeta::tensor(DType::F32, shape).expect("fits").with_checksum(Checksum::Xxh3Blocks(!generation));
    IndexEntry {
        object: ObjectId { origin: NodeId(9), epoch: Epoch(8), number: generation },
        meta,
        generation: Generation(generation),
        extent: Extent { segment: SegmentId(3), offset: generation * 64, len_bytes: meta.len_bytes },
        tier: if generation.is_multiple_of(2) { Tier::Host } else { Tier::Gpu(1) },
    }
}

/// A node with one client.
struct Pair {
    writer: IndexWriter,
    reader: IndexReader,
    node: NodePage,
    page: ClientPage,
}

impl Pair {
    fn new(objects_max: u32) -> Self {
        let writer = IndexWriter::create(objects_max).expect("an index");
        let reader = IndexReader::map(again(writer.descriptor())).expect("the same index");
        let node = NodePage::create().expect("a page");
        let page = ClientPage::map(again(node.descriptor())).expect("the same page");
        Self { writer, reader, node, page }
    }

    /// What `find` says, after `get` said the same and its pin is released.
    fn look(&self, key: &Key) -> Option<(SlotId, IndexEntry)> {
        let found = self.reader.find(key, key.fingerprint()).expect("sensible");
        let got = self.reader.get(key, key.fingerprint(), &self.page).expect("sensible");
        assert_eq!(
            found.map(|found| (found.slot, found.entry)),
            got.as_ref().map(|got| (got.slot, got.entry))
        );
        if let Some(got) = &got {
            assert!(self.pinned().contains(&got.entry.generation));
            self.page.unpin(got.pin);
        }
        assert!(self.pinned().is_empty());
        got.map(|got| (got.slot, got.entry))
    }

    fn pinned(&self) -> HashSet<Generation> {
        let mut pinned = HashSet::new();
        self.node.pinned(&mut pinned);
        pinned
    }

    fn generation_word(&self, slot: SlotId) -> u64 {
        self.writer.memory().load_u64(self.writer.generation_offset(slot)).expect("inside")
    }
}

/// Keys that share a bucket of an index with this many.
fn colliding(count: usize, buckets: u64) -> Vec<Key> {
    (0..)
        .map(|number| key(&format!("colliding/{number}")))
        .filter(|key| key.fingerprint() % buckets == 0)
        .take(count)
        .collect()
}

#[test]
fn what_is_published_is_found_until_it_is_withdrawn() {
    let mut pair = Pair::new(100);
    let (first, second) = (key("first"), key("second"));
    assert_eq!(pair.look(&first), None);
    pair.writer.publish(SlotId(99), &first, &entry(1, &[2, 3])).expect("free");
    pair.writer.publish(SlotId(0), &second, &entry(2, &[])).expect("free");
    assert_eq!(pair.look(&first), Some((SlotId(99), entry(1, &[2, 3]))));
    assert_eq!(pair.look(&second), Some((SlotId(0), entry(2, &[]))));
    assert_eq!((pair.generation_word(SlotId(99)), pair.generation_word(SlotId(0))), (1, 2));

    pair.writer.publish(SlotId(99), &first, &entry(5, &[2, 3])).expect("moved");
    assert_eq!(pair.look(&first), Some((SlotId(99), entry(5, &[2, 3]))));
    assert_eq!((pair.generation_word(SlotId(99)), pair.writer.objects()), (5, 2));

    assert!(pair.writer.withdraw(SlotId(99)));
    assert!(!pair.writer.withdraw(SlotId(99)));
    assert_eq!(pair.look(&first), None);
    assert_eq!((pair.generation_word(SlotId(99)), pair.writer.objects()), (0, 1));
}

#[test]
fn keys_and_shapes_of_every_length_return() {
    let mut pair = Pair::new(600);
    let mut generation = 0;
    for dims in 0..=8 {
        let shape = vec![1; dims];
        for len in (1..=120).chain([KEY_LEN_MAX - 1, KEY_LEN_MAX]) {
            generation += 1;
            let slot = SlotId(u32::try_from(generation % 600).expect("small"));
            let name = key(&"abcdefghijk".repeat(len)[..len]);
            pair.writer.publish(slot, &name, &entry(generation, &shape)).expect("free");
            assert_eq!(
                pair.look(&name),
                Some((slot, entry(generation, &shape))),
                "{len} bytes, {dims} dimensions"
            );
            let mut longer = name.as_str().to_owned();
            longer.pop();
            longer.push('z');
            assert_eq!(pair.look(&key(&longer)), None);
            assert!(pair.writer.withdraw(slot));
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut pair = Pair::new(4);
    let name = key("k");
    let good = entry(1, &[4]);
    for (slot, wrong) in [
        (4, good),
        (0, IndexEntry { generation: Generation(0), ..good }),
        (0, IndexEntry { extent: Extent { len_bytes: 15, ..good.extent }, ..good }),
    ] {
        let error = pair.writer.publish(SlotId(slot), &name, &wrong).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    pair.writer.publish(SlotId(0), &name, &good).expect("free");
    let error = pair.writer.publish(SlotId(0), &key("other"), &entry(2, &[4])).expect_err("in use");
    assert!(error.to_string().contains("another key"), "{error}");
    assert!(!pair.writer.withdraw(SlotId(4)));
    assert_eq!(pair.look(&name), Some((SlotId(0), good)));
    for objects_max in [0, u32::MAX] {
        assert_eq!(IndexWriter::create(objects_max).expect_err("refused").kind(), ErrorKind::Invalid);
    }
}

#[test]
fn one_bucket_takes_every_key() {
    let objects_max = 64;
    let mut pair = Pair::new(objects_max);
    let keys = colliding(objects_max as usize, 16);
    for round in 0..3 {
        for (slot, name) in (0..).zip(&keys) {
            pair.writer.publish(SlotId(slot), name, &entry(u64::from(slot) + 1, &[1])).expect("room for all");
        }
        for (slot, name) in (0..).zip(&keys) {
            assert_eq!(pair.look(name).map(|(slot, _)| slot), Some(SlotId(slot)));
        }
        // From the front, from the back, and every third: holes everywhere in the chain.
        let order: Vec<u32> = match round {
            0 => (0..objects_max).collect(),
            1 => (0..objects_max).rev().collect(),
            _ => (0..3).flat_map(|start| (start..objects_max).step_by(3)).collect(),
        };
        let mut left: HashSet<u32> = order.iter().copied().collect();
        for slot in order {
            assert!(pair.writer.withdraw(SlotId(slot)));
            left.remove(&slot);
            for (slot, name) in (0..).zip(&keys) {
                assert_eq!(pair.look(name).is_some(), left.contains(&slot));
            }
        }
    }
    assert!(keys.len() > 8 * CELLS, "long chains were tested");
}

#[test]
fn an_index_of_four_million_takes_memory_only_as_used() {
    let mut writer = IndexWriter::create(4 << 20).expect("an index");
    let last = SlotId((4 << 20) - 1);
    writer.publish(SlotId(0), &key("first"), &entry(1, &[1])).expect("free");
    writer.publish(last, &key("last"), &entry(2, &[1])).expect("free");
    let used_bytes = rustix::fs::fstat(writer.descriptor()).expect("a file").st_blocks * 512;
    assert!(used_bytes < 1 << 20, "{used_bytes} bytes for two objects");
    assert!(writer.len_bytes() > 1 << 30);
    let (start, len) = writer.memory().generations();
    assert_eq!(writer.generation_offset(last), start + len - 8);
    assert!(writer.generation_offset(last).is_multiple_of(8));
}

/// docs/shared-memory.md shows the offsets of an index of the default size.
#[test]
fn the_documented_layout_is_the_layout() {
    let text = include_str!("../../../docs/shared-memory.md");
    let geometry = Geometry::new(4 << 20).expect("a size");
    let shown = |number: u64| {
        let digits = number.to_string();
        let groups =
            digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).expect("digits"));
        groups.collect::<Vec<_>>().join(",")
    };
    for number in geometry.header()[2..].iter().copied().chain([geometry.end as u64 * 8]) {
        assert!(text.contains(&format!("| {} |", shown(number))), "{} is missing", shown(number));
    }
}

#[test]
fn all_pins_in_use_is_busy_and_one_less_is_not() {
    let mut pair = Pair::new(4);
    let name = key("k");
    pair.writer.publish(SlotId(0), &name, &entry(1, &[4])).expect("free");
    let get = || pair.reader.get(&name, name.fingerprint(), &pair.page);
    let pinned: Vec<_> = (0..PINS).map(|_| get().expect("a pin is left").expect("present")).collect();
    assert_eq!(pinned.iter().map(|pinned| pinned.pin).collect::<HashSet<_>>().len(), PINS);
    let error = get().expect_err("none left");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert_eq!(pair.node.pin_for_client(Generation(1)), None);
    pair.page.unpin(pinned[77].pin);
    assert_eq!(get().expect("a pin is left").expect("present").pin, pinned[77].pin);
    assert_eq!(pair.pinned(), HashSet::from([Generation(1)]));
}

#[test]
fn a_spoiled_slot_is_corrupt_and_leaves_no_pin() {
    let mut pair = Pair::new(4);
    let name = key("k");
    pair.writer.publish(SlotId(0), &name, &entry(2, &[4])).expect("free");
    let memory = pair.writer.memory();
    let head = &memory.slot(0).expect("a slot")[HEAD];
    let good = head.load(Ordering::Relaxed);
    for (what, bad) in [
        ("dtype", good | 0xff << 16),
        ("checksum algorithm", good | 0xff << 32),
        ("shape", good & !(0xff << 24)),
    ] {
        head.store(bad, Ordering::Relaxed);
        // Without dimensions the key is looked for elsewhere, so it may also be absent.
        match pair.reader.get(&name, name.fingerprint(), &pair.page) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}"),
            Ok(got) => assert_eq!((what, got), ("shape", None)),
        }
        assert!(pair.pinned().is_empty(), "{what}");
    }
    head.store(good, Ordering::Relaxed);
    assert!(pair.look(&name).is_some());
}

#[test]
fn a_reader_gives_up_on_a_slot_whose_writer_died() {
    let mut pair = Pair::new(4);
    let name = key("k");
    pair.writer.publish(SlotId(0), &name, &entry(2, &[4])).expect("free");
    let memory = pair.writer.memory();
    memory.slot(0).expect("a slot")[SEQ].fetch_add(1, Ordering::Relaxed);
    assert_eq!(pair.look(&name), None, "the node knows better, or is dead");
}

/// Every word of an index, and of the table in particular, set to something else: errors or misses, no panic.
#[test]
fn an_index_full_of_garbage_does_no_harm() {
    let mut pair = Pair::new(8);
    let keys: Vec<Key> = (0..8).map(|number| key(&format!("key {number}"))).collect();
    let memory = pair.writer.memory();
    let good: Vec<u64> = {
        for (slot, name) in (0..).zip(&keys) {
            pair.writer.publish(SlotId(slot), name, &entry(2, &[4])).expect("free");
        }
        memory.words().iter().map(|word| word.load(Ordering::Relaxed)).collect()
    };
    let end = memory.geometry().slots + 8 * SLOT_WORDS;
    for at in 512..end {
        for bad in [u64::MAX, 1, 3 << 32, good[at] ^ 2, good[at] ^ 1 << 63] {
            memory.words()[at].store(bad, Ordering::Relaxed);
            for name in &keys {
                if let Ok(Some(got)) = pair.reader.get(name, name.fingerprint(), &pair.page) {
                    pair.page.unpin(got.pin);
                }
            }
            memory.words()[at].store(good[at], Ordering::Relaxed);
        }
        if good[at] == 0 && at % 8 == 0 && good[at..(at + 512).min(end)].iter().all(|word| *word == 0) {
            break;
        }
    }
    assert!(pair.pinned().is_empty());
    assert!(keys.iter().all(|name| pair.look(name).is_some()));
}

#[test]
fn files_that_are_no_index_are_refused() {
    let writer = IndexWriter::create(1000).expect("an index");
    let header: Vec<u64> =
        writer.memory().words()[..10].iter().map(|word| word.load(Ordering::Relaxed)).collect();
    let refused = |len_bytes: u64, header: &[u64], seals: SealFlags| {
        let fd = memfd::create("not-an-index", len_bytes, None).expect("a file");
        if len_bytes > 0 {
            let mapping = Mapping::new(fd.as_fd(), len_bytes, Access::Write).expect("a mapping");
            for (word, value) in mapping.words().iter().zip(header) {
                word.store(*value, Ordering::Relaxed);
            }
        }
        memfd::seal(&fd, seals).expect("sealed");
        let error = IndexReader::map(fd).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    };
    let seals = SealFlags::SHRINK | SealFlags::GROW;
    let len_bytes = writer.len_bytes();
    refused(len_bytes, &header, SealFlags::GROW);
    refused(len_bytes - 4096, &header, seals);
    refused(0, &[], seals);
    for word in 0..header.len() {
        for wrong in [0, 1, header[word] + 1, u64::MAX] {
            let mut header = header.clone();
            if std::mem::replace(&mut header[word], wrong) != wrong {
                refused(len_bytes, &header, seals);
            }
        }
    }
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    assert_eq!(IndexReader::map(reader).expect_err("a pipe").kind(), ErrorKind::Protocol);
}

#[test]
fn clients_cannot_write_the_index() {
    let writer = IndexWriter::create(1000).expect("an index");
    Mapping::new(writer.descriptor(), 4096, Access::Write).expect_err("sealed");
    assert!(rustix::io::pwrite(writer.descriptor(), &[1], 0).is_err());
    assert!(rustix::fs::ftruncate(writer.descriptor(), 0).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Publish(usize, u8),
    Withdraw(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..48_usize, any::<u8>()).prop_map(|(key, dims)| Step::Publish(key, dims % 9)),
        2 => (0..48_usize).prop_map(Step::Withdraw),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Half of the keys share a bucket, the others are spread; slots are handed out low ones first, as the engine does.
    #[test]
    fn the_index_is_a_map(steps in steps()) {
        let mut pair = Pair::new(48);
        let mut keys = colliding(24, 16);
        keys.extend((0..24).map(|number| key(&format!("{}/{number}", "long".repeat(number * 4)))));
        let mut model: HashMap<usize, (SlotId, IndexEntry)> = HashMap::new();
        let mut generation = 0;
        for step in steps {
            match step {
                Step::Publish(at, dims) => {
                    generation += 1;
                    let used: HashSet<u32> = model.values().map(|(slot, _)| slot.0).collect();
                    let free = (0..48).find(|slot| !used.contains(slot)).map(SlotId);
                    let Some(slot) = model.get(&at).map(|(slot, _)| *slot).or(free) else { continue };
                    let entry = entry(generation, &vec![2; usize::from(dims)]);
                    pair.writer.publish(slot, &keys[at], &entry).expect("free or the same key");
                    model.insert(at, (slot, entry));
                }
                Step::Withdraw(at) => {
                    if let Some((slot, _)) = model.remove(&at) {
                        prop_assert!(pair.writer.withdraw(slot));
                        prop_assert_eq!(pair.generation_word(slot), 0);
                    }
                }
            }
            prop_assert_eq!(pair.writer.objects() as usize, model.len());
        }
        for (at, name) in keys.iter().enumerate() {
            prop_assert_eq!(pair.look(name), model.get(&at).copied());
        }
    }
}

/// Three readers against a writer that moves, withdraws and reuses extents all the time. An extent holds its
/// generation; a reader that has it pinned must read that and nothing else. Keys that stay must never be missed.
#[test]
fn readers_see_the_truth_while_everything_changes() {
    const EXTENTS: usize = 64;
    const ROUNDS: u64 = 20_000;
    let mut writer = IndexWriter::create(32).expect("an index");
    // All in one bucket, so that every withdrawal moves entries of the keys that stay.
    let keys = Arc::new(colliding(24, 8));
    let extents: Arc<Vec<Word>> = Arc::new((0..EXTENTS).map(|_| Word::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let gets = Arc::new(Word::new(0));
    let place = |generation: u64, extent: usize| IndexEntry {
        extent: Extent { segment: SegmentId(0), offset: extent as u64, len_bytes: 4 },
        ..entry(generation, &[1])
    };
    let mut free: Vec<usize> = (0..EXTENTS).collect();
    let mut generation = 0;
    let mut publish = |writer: &mut IndexWriter, free: &mut Vec<usize>, slot: usize| {
        generation += 1;
        let extent = free.pop()?;
        extents[extent].store(generation, Ordering::Relaxed);
        let slot_id = SlotId(u32::try_from(slot).expect("small"));
        writer.publish(slot_id, &keys[slot], &place(generation, extent)).expect("free or the same key");
        Some((Generation(generation), extent))
    };
    let mut shown: Vec<Option<(Generation, usize)>> =
        (0..keys.len()).map(|slot| publish(&mut writer, &mut free, slot)).collect();

    let mut nodes = Vec::new();
    let readers: Vec<_> = (0..3_usize)
        .map(|number| {
            let node = NodePage::create().expect("a page");
            let page = ClientPage::map(again(node.descriptor())).expect("the same page");
            nodes.push(node);
            let mut reader = IndexReader::map(again(writer.descriptor())).expect("the same index");
            // A miss is then a miss, however long the writer is kept from its work.
            reader.attempts = u32::MAX;
            let (keys, extents, stop, gets) =
                (Arc::clone(&keys), Arc::clone(&extents), Arc::clone(&stop), Arc::clone(&gets));
            std::thread::spawn(move || {
                for at in (number..).step_by(5) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let name = &keys[at % keys.len()];
                    match reader.get(name, name.fingerprint(), &page).expect("sensible") {
                        Some(pinned) => {
                            let generation = pinned.entry.generation.0;
                            let extent = usize::try_from(pinned.entry.extent.offset).expect("small");
                            assert_eq!(
                                pinned.entry,
                                IndexEntry { extent: pinned.entry.extent, ..entry(generation, &[1]) }
                            );
                            assert_eq!(extents[extent].load(Ordering::Relaxed), generation);
                            page.unpin(pinned.pin);
                            gets.fetch_add(1, Ordering::Relaxed);
                        }
                        None => assert!(at % keys.len() >= 8, "key {} stays and was missed", at % keys.len()),
                    }
                }
            })
        })
        .collect();

    // Keys below 8 stay (they move between extents), the others come and go.
    let mut draining: Vec<(Generation, usize)> = Vec::new();
    for round in 0.. {
        if round >= ROUNDS && gets.load(Ordering::Relaxed) >= ROUNDS {
            break;
        }
        let slot = usize::try_from(round * 7 % 24).expect("small");
        let old = shown[slot].take();
        if slot >= 8 && old.is_some() {
            assert!(writer.withdraw(SlotId(u32::try_from(slot).expect("small"))));
            draining.extend(old);
        } else {
            match publish(&mut writer, &mut free, slot) {
                Some(new) => {
                    shown[slot] = Some(new);
                    draining.extend(old);
                }
                None => shown[slot] = old,
            }
        }
        let mut pinned = HashSet::new();
        nodes.iter().for_each(|node| node.pinned(&mut pinned));
        draining.retain(|(generation, extent)| {
            let held = pinned.contains(generation);
            if !held {
                // What a new object's bytes would be.
                extents[*extent].store(u64::MAX, Ordering::Relaxed);
                free.push(*extent);
            }
            held
        });
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().expect("a reader's checks hold");
    }
}
