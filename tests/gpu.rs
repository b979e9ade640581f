//! Nodes and clients as processes of their own with GPU tiers, on a real driver (`HETMEM_TEST_CUDA=real`) or on the
//! stand-in; and what they do where there is no driver. Not GPU memory by itself (gpu-mem's tests), nor speed.

#[path = "../gpu-mem/tests/stand_in/mod.rs"]
mod stand_in;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hetmem_client::{
    Checksum, ErrorKind, GetOptions, GpuReserved, ObjectMeta, Path as By, Placed, PutOptions, PutOutcome,
    Range, Store, StoreError, Tier, TierHint, ZeroCopy,
};
use hetmem_gpu_mem::{AccessRights, Gpus, Stream};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve, program};
use stand_in::{on_gpu, on_stand_in};

const GPU: Tier = Tier::Gpu(0);
const SMALL: usize = 1_000;
const LARGE: usize = 3 << 20;
const MIB: u64 = 1 << 20;

fn node(folder: &Path, name: &str) -> Serve {
    Serve::new(folder, name).flag("gpu", "64MiB")
}

fn on(tier: Tier) -> PutOptions {
    PutOptions { tier: Some(tier.into()), ..PutOptions::default() }
}

fn put_on(store: &Store, name: &str, len: usize, tier: Tier) -> PutOutcome {
    let meta = ObjectMeta::bytes(len as u64).expect("a length");
    store.put_with(&key(name), meta, &bytes_of(name, len, 0), &on(tier)).expect("room")
}

/// Puts from the memory of gpu:0 in this process.
fn put_from_gpu(gpus: &Gpus, store: &Store, name: &str, len: usize) -> PutOutcome {
    let meta = ObjectMeta::bytes(len as u64).expect("a length");
    let reserved = store.reserve_gpu(&key(name), meta, 0, &PutOptions::default()).expect("room");
    let GpuReserved::Open(reservation) = reserved else { panic!("{reserved:?}") };
    let stream = reservation.device().stream().expect("a stream");
    let tensor = stand_in::segment(&gpus.device(0).expect("a device"), len as u64);
    let tensor = stand_in::on_device(&tensor, 0, len);
    stand_in::fill(&stream, &tensor, &bytes_of(name, len, 0));
    stream.copy(&tensor, &reservation.span().expect("inside")).expect("accepted");
    reservation.seal_after(&stream, Checksum::None).expect("sealed")
}

fn get_on(store: &Store, name: &str, tier: Tier) -> Result<Placed, StoreError> {
    store.get_in(&key(name), tier, &GetOptions::default())
}

/// The bytes of an object on a GPU.
fn on_device(placed: Result<Placed, StoreError>) -> (hetmem_client::GpuObject, Vec<u8>) {
    let Placed::Gpu(object) = placed.expect("the object") else { panic!("it is in host memory") };
    let stream: Stream = object.device().stream().expect("a stream");
    let bytes = stand_in::bytes_of(&stream, &object.span().expect("inside"));
    (object, bytes)
}

struct Client {
    process: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Client {
    fn start(node: &Daemon, mode: &str, name: &str) -> Self {
        let mut process = Command::new(program(env!("CARGO_BIN_EXE_hetmem-test-gpu-client")))
            .arg(&node.socket)
            .args([mode, name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the client starts");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        Self { process, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("a line").expect("text")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A process that has seen nothing of a GPU reads what another put there, in place and through host memory.
#[test]
fn objects_on_a_gpu_are_read_in_place_by_other_processes() {
    on_gpu("objects_on_a_gpu_are_read_in_place_by_other_processes", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "shared").start();
        let store = node.connect();
        let outcome = put_from_gpu(gpus, &store, "device", LARGE);
        assert_eq!((outcome.receipt.path, outcome.receipt.staged_bytes), (By::InPlace, 0));
        assert_eq!(outcome.receipt.to.tier, Some(GPU));
        let outcome = put_on(&store, "host", LARGE, GPU);
        assert_eq!((outcome.receipt.path, outcome.receipt.staged_bytes), (By::Copied, LARGE as u64));
        assert_eq!(outcome.receipt.to.tier, Some(GPU));
        put_on(&store, "small", SMALL, GPU);
        for name in ["device", "host", "small"] {
            assert_eq!(store.stat(&key(name)).expect("it is here").tier, Some(GPU));
            for (mode, path) in [("get", By::Local), ("host", By::LocalCopy)] {
                let mut client = Client::start(&node, mode, name);
                assert_eq!(
                    (client.line().as_str(), client.line()),
                    ("same", path.to_string()),
                    "{mode} {name}"
                );
            }
        }
        let (object, bytes) = on_device(get_on(&store, "small", GPU));
        assert_eq!((bytes, object.path()), (bytes_of("small", SMALL, 0), By::Local));
        assert_eq!(
            object.rights(),
            AccessRights::ReadOnly,
            "the stand-in has read-only mappings; a driver may not"
        );
        drop(object);
        node.settles(&store, "nothing is held", |status| status.draining == 0 && status.reservations == 0);
        node.assert_sound();
    });
}

#[test]
fn gets_name_the_tier_that_they_want_and_receipts_say_what_was_copied() {
    on_gpu("gets_name_the_tier_that_they_want_and_receipts_say_what_was_copied", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "tiers").start();
        let store = node.connect();
        store.put_bytes(&key("k"), &bytes_of("k", LARGE, 0)).expect("room");
        let tiers: Vec<Tier> = gpus.probe().devices.iter().map(|device| Tier::Gpu(device.ordinal)).collect();
        for tier in &tiers {
            let (object, bytes) = on_device(get_on(&store, "k", *tier));
            let receipt = object.receipt();
            assert_eq!((receipt.path, receipt.bytes, receipt.staged_bytes), (By::LocalCopy, LARGE as u64, 0));
            assert_eq!((receipt.from.tier, receipt.to.tier), (Some(Tier::Host), Some(*tier)));
            assert!(bytes == bytes_of("k", LARGE, 0), "the bytes of k in {tier}");
        }
        put_on(&store, "g", LARGE, GPU);
        let range = Range { start: 12_345, len_bytes: 54_321 };
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        let expected = &bytes_of("g", LARGE, 0)[12_345..12_345 + 54_321];
        for tier in &tiers {
            let (object, bytes) = on_device(store.get_in(&key("g"), *tier, &options));
            assert!(bytes == expected, "a part of g in {tier}");
            assert_eq!(object.receipt().path, if *tier == GPU { By::Local } else { By::LocalCopy });
        }
        assert!(*store.get_range(&key("g"), 12_345, 54_321).expect("a part") == *expected);
        // A checksum is compared where it can be, and never just left out.
        let verify = GetOptions { verify: true, ..GetOptions::default() };
        let Ok(Placed::Host(_)) = store.get_in(&key("g"), Tier::Host, &verify) else {
            panic!("its checksum agrees")
        };
        for name in ["g", "k"] {
            let (object, _) = on_device(store.get_in(&key(name), GPU, &verify));
            assert_eq!(object.verify(), Ok(true), "{name}");
        }
        // Many at once, of both tiers.
        let names: Vec<String> = (0..50).map(|number| format!("many-{number}")).collect();
        for (at, name) in names.iter().enumerate() {
            put_on(&store, name, SMALL + at, if at % 2 == 0 { GPU } else { Tier::Host });
        }
        let keys: Vec<_> = names.iter().map(|name| key(name)).collect();
        for (at, object) in store.get_many(&keys).into_iter().enumerate() {
            assert!(*object.expect("it was put") == *bytes_of(&names[at], SMALL + at, 0), "{}", names[at]);
        }
        drop(store);
        let store = node.connect();
        node.settles(&store, "copies go with their readers", |status| status.draining == 0);
        node.assert_sound();
    });
}

#[test]
fn a_full_gpu_says_so_and_host_memory_stands_in_only_where_that_is_allowed() {
    on_gpu("a_full_gpu_says_so_and_host_memory_stands_in_only_where_that_is_allowed", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "full").flag("gpu", "16MiB").host("128MiB").start();
        let store = node.connect();
        put_from_gpu(gpus, &store, "first", 9 << 20);
        store.pin(&key("first"), true).expect("it is to stay");
        let meta = ObjectMeta::bytes(9 << 20).expect("a length");
        let bytes = bytes_of("second", 9 << 20, 0);
        let error = store.put_with(&key("second"), meta, &bytes, &on(GPU)).expect_err("it is full");
        let StoreError::NoSpace { tier: GPU, requested, free, .. } = error else { panic!("{error}") };
        assert!(requested == 9 * MIB && free < 9 * MIB, "{requested} of {free}");
        assert!(error.to_string().contains("gpu:0"), "{error}");
        let either =
            PutOptions { tier: Some(TierHint { tier: GPU, or_host: true }), ..PutOptions::default() };
        let outcome = store.put_with(&key("second"), meta, &bytes, &either).expect("host memory");
        assert_eq!(outcome.receipt.to.tier, Some(Tier::Host), "the receipt says so");
        let reserved = store.reserve_gpu(&key("third"), meta, 0, &either).expect("host memory");
        let GpuReserved::Host(reservation) = reserved else { panic!("{reserved:?}") };
        assert_eq!(reservation.fill(&bytes).expect("sealed").receipt.to.tier, Some(Tier::Host));
        let error = get_on(&store, "second", GPU).expect_err("no room for a copy");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let placed =
            store.get_in(&key("second"), TierHint { tier: GPU, or_host: true }, &GetOptions::default());
        let Ok(Placed::Host(object)) = placed else { panic!("{placed:?}") };
        assert!(*object == *bytes);
        // Nothing that was stored was lost to it.
        assert!(*store.get(&key("first")).expect("it is there") == *bytes_of("first", 9 << 20, 0));
        let strict = PutOptions { zero_copy: ZeroCopy::Required, ..on(GPU) };
        let error = store.put_with(&key("strict"), meta, &bytes, &strict).expect_err("it would be staged");
        assert!(error.to_string().contains("gpu:0"), "{error}");
        // Once it may go, it makes room.
        store.pin(&key("first"), false).expect("it may go");
        let outcome = store.put_with(&key("fourth"), meta, &bytes, &on(GPU)).expect("room");
        assert_eq!(outcome.receipt.to.tier, Some(GPU));
        assert_eq!(store.stat(&key("first")).expect("it is here").tier, Some(Tier::Host));
        assert!(*store.get(&key("first")).expect("it is there") == *bytes_of("first", 9 << 20, 0));
        node.assert_sound();
    });
}

#[test]
fn a_client_that_is_killed_leaves_nothing_on_the_gpu() {
    on_gpu("a_client_that_is_killed_leaves_nothing_on_the_gpu", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "killed").start();
        let store = node.connect();
        put_from_gpu(gpus, &store, "k", LARGE);
        for _ in 0..3 {
            let mut client = Client::start(&node, "hold", "k");
            assert_eq!(client.line(), "holding");
            node.settles(&store, "it reserves", |status| status.reservations == 1);
            client.process.kill().expect("killed");
            client.process.wait().expect("ended");
            node.settles(&store, "its reservation is gone", |status| {
                status.reservations == 0 && status.clients == 1
            });
        }
        let used = |store: &Store| store.status().expect("it answers").tiers[1].used_bytes;
        assert_eq!(used(&store), LARGE as u64);
        // What it has held is free: the object goes as soon as it is deleted.
        assert!(store.delete(&key("k")).expect("deleted"));
        node.settles(&store, "nothing is left", |status| {
            status.tiers[1].used_bytes == 0 && status.draining == 0
        });
        node.assert_sound();
    });
}

/// Between nodes: every pair of tiers, and receipts that name both and count what was staged.
#[test]
fn objects_come_from_and_to_the_gpus_of_other_nodes() {
    on_gpu("objects_come_from_and_to_the_gpus_of_other_nodes", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut home = node(folder.path(), "home").start();
        let mut away = node(folder.path(), "away").join(&home.address).start();
        let (here, there) = (home.connect(), away.connect());
        away.settles(&there, "the link", |status| status.peers.iter().any(|peer| peer.linked));
        for (len, path) in [(SMALL, By::Eager), (LARGE, By::Read)] {
            for from in [Tier::Host, GPU] {
                for to in [Tier::Host, GPU] {
                    let name = format!("{len} from {from} to {to}");
                    if from == GPU {
                        put_from_gpu(gpus, &here, &name, len);
                    } else {
                        put_on(&here, &name, len, Tier::Host);
                    }
                    let (bytes, receipt) = match get_on(&there, &name, to).expect("it comes") {
                        Placed::Host(object) => (object.to_vec(), object.receipt()),
                        Placed::Gpu(object) => {
                            let receipt = object.receipt();
                            (on_device(Ok(Placed::Gpu(object))).1, receipt)
                        }
                    };
                    assert!(bytes == bytes_of(&name, len, 0), "the bytes of {name}");
                    assert_eq!(receipt.path, path, "{name}");
                    assert_eq!((receipt.from.tier, receipt.to.tier), (Some(from), Some(to)), "{name}");
                    // Over TCP what is on a GPU passes through host memory, in parts if it is large.
                    let staged = if from == GPU || to == GPU { len as u64 } else { receipt.staged_bytes };
                    assert_eq!(receipt.staged_bytes, staged, "{name}");
                }
            }
        }
        // Two of the four large ones were read straight into the GPU, and two out of one: none of these is, or was, an
        // object in host memory there.
        let large = LARGE as u64;
        for (store, gpu_bytes) in [(&there, 2 * large), (&here, 2 * large)] {
            let tiers = store.status().expect("it answers").tiers;
            assert!(tiers[0].used_bytes < 3 * large && tiers[1].used_bytes >= gpu_bytes, "{tiers:?}");
        }
        home.kill();
        let soon = GetOptions { timeout: Duration::from_secs(2), ..GetOptions::default() };
        let error = there.get_in(&key("never put"), GPU, &soon).expect_err("its node is gone");
        let clear = [ErrorKind::NotFound, ErrorKind::PeerLost, ErrorKind::Unavailable, ErrorKind::TimedOut];
        assert!(clear.contains(&error.kind()), "{error}");
        away.assert_sound();
    });
}

/// One of them is given the descriptor of the segment, and the others wait for it.
#[test]
fn threads_that_are_granted_one_segment_all_write_in_it() {
    on_gpu("threads_that_are_granted_one_segment_all_write_in_it", |gpus| {
        const THREADS: usize = 8;
        let folder = tempfile::tempdir().expect("a folder");
        for round in 0..6 {
            // A node of its own: what was granted to this process goes to no other client of it.
            let mut node = node(folder.path(), &format!("threads-{round}")).start();
            let store = node.connect();
            let ready = std::sync::Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    let (store, ready) = (&store, &ready);
                    scope.spawn(move || {
                        ready.wait();
                        put_from_gpu(gpus, store, &format!("{round}-{thread}"), SMALL);
                    });
                }
            });
            for thread in 0..THREADS {
                let name = format!("{round}-{thread}");
                assert!(*store.get(&key(&name)).expect("it was put") == *bytes_of(&name, SMALL, 0), "{name}");
            }
            node.assert_sound();
        }
    });
}

/// Promotion and demotion under readers of two other processes, which compare every byte. For as many seconds as
/// `HETMEM_TEST_MOVES_S` says, a few if it says nothing.
#[test]
fn objects_move_between_tiers_under_the_readers_of_two_processes() {
    on_gpu("objects_move_between_tiers_under_the_readers_of_two_processes", |_| {
        const COUNT: usize = 60;
        const LEN: usize = 100_000;
        let seconds = std::env::var("HETMEM_TEST_MOVES_S").map_or(4, |text| text.parse().expect("seconds"));
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "moves").flag("gpu", "8MiB").host("128MiB").start();
        let store = node.connect();
        for number in 0..COUNT {
            put_on(&store, &format!("k-{number}"), LEN, if number % 2 == 0 { GPU } else { Tier::Host });
        }
        let mut readers = [0, 1].map(|_| Client::start(&node, "compare", "k"));
        let until = std::time::Instant::now() + Duration::from_secs(seconds);
        let mut round = 0;
        while std::time::Instant::now() < until {
            // They fill the GPU, and then there is room again.
            let names: Vec<String> = (0..40).map(|number| format!("fills-{round}-{number}")).collect();
            names.iter().for_each(|name| drop(put_on(&store, name, LEN, GPU)));
            std::thread::sleep(Duration::from_millis(100));
            names.iter().for_each(|name| assert!(store.delete(&key(name)).expect("deleted")));
            std::thread::sleep(Duration::from_millis(100));
            round += 1;
        }
        for reader in &mut readers {
            drop(reader.process.stdin.take());
            let said = reader.line();
            let count: usize = said.parse().unwrap_or_else(|_| panic!("{said}"));
            assert!(count > COUNT, "{count} gets");
            assert!(reader.process.wait().expect("ended").success());
        }
        let counters = store.status().expect("it answers").counters;
        println!("{round} rounds, {} promoted, {} demoted", counters.promoted, counters.demoted);
        assert!(counters.promoted > 0 && counters.demoted > 0, "{counters:?}");
        for number in 0..COUNT {
            let name = format!("k-{number}");
            assert!(*store.get(&key(&name)).expect("it was put") == *bytes_of(&name, LEN, 0), "{name}");
        }
        node.settles(&store, "nothing is held", |status| status.draining == 0 && status.reservations == 0);
        node.assert_sound();
    });
}

/// Who uses no GPU object pays for none: no context in the client, and none in the node before the first of them.
#[test]
fn contexts_are_made_only_where_gpu_memory_is_used() {
    let log = tempfile::NamedTempFile::new().expect("a file");
    let path = log.path().display().to_string();
    on_stand_in("contexts_are_made_only_where_gpu_memory_is_used", &[("LOG", &path)], || {
        let path = std::env::var("HETMEM_STANDIN_LOG").expect("set above");
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "frugal").start();
        let store = node.connect();
        let retained = |pid: u32| {
            let log = std::fs::read_to_string(&path).expect("the log");
            log.lines().filter(|line| line.starts_with(&format!("{pid} cuDevicePrimaryCtxRetain"))).count()
        };
        store.put_bytes(&key("host"), &bytes_of("host", LARGE, 0)).expect("room");
        assert!(*store.get(&key("host")).expect("it is here") == *bytes_of("host", LARGE, 0));
        assert_eq!((retained(node.pid()), retained(std::process::id())), (0, 0), "no GPU object was used");
        // The node copies for a client that has no use for a GPU of its own.
        put_on(&store, "gpu", LARGE, Tier::Gpu(1));
        assert!(*store.get(&key("gpu")).expect("it is here") == *bytes_of("gpu", LARGE, 0));
        assert_eq!((retained(node.pid()), retained(std::process::id())), (1, 0));
        let (object, _) = on_device(get_on(&store, "gpu", Tier::Gpu(1)));
        assert_eq!(object.device().ordinal(), 1, "the right device, and no other");
        assert_eq!(retained(std::process::id()), 1);
        let log = std::fs::read_to_string(&path).expect("the log");
        let imports = log.lines().filter(|line| line.contains("cuMemImportFromShareableHandle")).count();
        drop(object);
        drop(on_device(get_on(&store, "gpu", Tier::Gpu(1))));
        let log = std::fs::read_to_string(&path).expect("the log");
        let again = log.lines().filter(|line| line.contains("cuMemImportFromShareableHandle")).count();
        assert_eq!((imports, again), (1, 1), "a segment is imported once");
        node.assert_sound();
    });
}

/// What the driver refuses is an error that names the call, and costs nothing that was stored.
#[test]
fn a_driver_that_refuses_costs_nothing_that_was_stored() {
    for fail in [
        "cuMemCreate=2",
        "cuMemExportToShareableHandle=999",
        "cuMemSetAccess=1",
        "cuDevicePrimaryCtxRetain=2",
    ] {
        on_stand_in("a_driver_that_refuses_costs_nothing_that_was_stored", &[("FAIL", fail)], || {
            let folder = tempfile::tempdir().expect("a folder");
            let mut node = node(folder.path(), "refused").start();
            let store = node.connect();
            store.put_bytes(&key("host"), &bytes_of("host", LARGE, 0)).expect("room");
            let meta = ObjectMeta::bytes(LARGE as u64).expect("a length");
            let error =
                store.put_with(&key("k"), meta, &bytes_of("k", LARGE, 0), &on(GPU)).expect_err("no memory");
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            node.says("a segment could not be made");
            assert!(*store.get(&key("host")).expect("it is here") == *bytes_of("host", LARGE, 0));
            node.settles(&store, "nothing is left", |status| {
                status.reservations == 0 && status.draining == 0
            });
            node.assert_sound();
        });
    }
}

/// Without a driver a node serves host memory, says why it has no GPU tier, and refuses what needs one.
#[test]
fn without_a_driver_a_node_serves_host_memory_and_says_why() {
    if Gpus::open().is_ok() {
        println!("skipped: this machine has a CUDA driver");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "bare").start();
    node.says("no GPU tier");
    let store = node.connect();
    assert_eq!(store.status().expect("it answers").tiers.len(), 1);
    let meta = ObjectMeta::bytes(SMALL as u64).expect("a length");
    let bytes = bytes_of("k", SMALL, 0);
    let error = store.put_with(&key("k"), meta, &bytes, &on(GPU)).expect_err("no GPU");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("gpu:0") && error.to_string().contains("libcuda"), "{error}");
    let either = PutOptions { tier: Some(TierHint { tier: GPU, or_host: true }), ..PutOptions::default() };
    assert_eq!(
        store.put_with(&key("k"), meta, &bytes, &either).expect("host memory").receipt.to.tier,
        Some(Tier::Host)
    );
    let error = get_on(&store, "k", GPU).expect_err("no GPU");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let error = store.reserve_gpu(&key("r"), meta, 0, &PutOptions::default()).expect_err("no GPU");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    node.assert_sound();
    let end =
        Serve::new(folder.path(), "strict").flag("gpu", "1GiB").try_start().expect_err("it has to be there");
    assert!(end.said.contains("libcuda"), "{}", end.said);
    let mut off = Serve::new(folder.path(), "off").flag("gpu", "off").start();
    let error = off.connect().put_with(&key("k"), meta, &bytes, &on(GPU)).expect_err("no GPU");
    assert!(error.to_string().contains("gpu = off"), "{error}");
    off.assert_sound();
}
