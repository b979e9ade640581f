//! Nodes as processes of their own over RDMA verbs, where there is a device: `HETMEM_VERBS_ADDRESS` names an address of
//! one, and `HETMEM_VERBS_PLUGIN` the plugin. What goes wrong between them, and what is used instead. Not the fabric by
//! itself (its conformance suite), nor speed.
#![allow(clippy::print_stdout, reason = "what nodes said of what was done to them belongs into the log")]

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use hetmem_client::{
    ErrorKind, GetOptions, ObjectMeta, Path as By, PutOptions, Receipt, Store, StoreError, Tier,
};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, Serve, binary, eventually};

const SMALL: usize = 1_000;
const LARGE: usize = 3 << 20;

/// The machine's RDMA, one test at a time: some of them take its network down.
struct Lab {
    address: String,
    plugin: String,
    device: Device,
    _alone: std::sync::MutexGuard<'static, ()>,
}

/// The device that the tests take away, by a driver that needs no hardware.
struct Device {
    name: String,
    driver: &'static str,
    network: String,
    /// Of all devices: what is sent to this machine finds another one.
    networks: Vec<String>,
}

impl Device {
    fn at(address: &str) -> Self {
        // 4: rd0    inet 10.77.0.1/24 scope global rd0 ...
        let output = Command::new("ip").args(["-o", "addr", "show", "to", address]).output().expect("ip");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let network = said.split_whitespace().nth(1).expect("its network").to_owned();
        // link rxe0/1 state ACTIVE physical_state LINK_UP netdev rd0
        let output = Command::new("rdma").args(["link", "show"]).output().expect("rdma");
        let links = String::from_utf8_lossy(&output.stdout).into_owned();
        let after = |line: &str, word: &str| {
            let mut words = line.split_whitespace().skip_while(|it| *it != word);
            words.nth(1).expect("as rdma writes it").to_owned()
        };
        let its = links.lines().find(|line| after(line, "netdev") == network).expect("a device");
        let name = after(its, "link").split('/').next().expect("its name").to_owned();
        let driver = if name.starts_with("siw") { "siw" } else { "rxe" };
        let networks = links.lines().map(|line| after(line, "netdev")).collect();
        Self { name, driver, network, networks }
    }

    fn remove(&self) {
        call("rdma", &format!("link del {}", self.name));
    }

    fn add(&self) {
        let Self { name, driver, network, .. } = self;
        call("rdma", &format!("link add {name} type {driver} netdev {network}"));
    }

    fn network(&self, up_or_down: &str) {
        // What iWARP sends to its own machine is TCP, which goes over `lo` whatever the address.
        let lo = ["lo".to_owned()];
        for network in if self.driver == "siw" { &lo[..] } else { &self.networks } {
            call("ip", &format!("link set {network} {up_or_down}"));
        }
    }
}

impl Lab {
    /// None where there is no device; says so.
    fn enter() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let (Ok(address), Ok(plugin)) =
            (std::env::var("HETMEM_VERBS_ADDRESS"), std::env::var("HETMEM_VERBS_PLUGIN"))
        else {
            println!("skipped: HETMEM_VERBS_ADDRESS names no address of an RDMA device");
            return None;
        };
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Some(Self { device: Device::at(&address), address, plugin, _alone: alone })
    }

    fn node(&self, folder: &Path, name: &str, fabric: &str) -> Serve {
        Serve::new(folder, name)
            .flag("listen", &format!("{}:0", self.address))
            .flag("fabric", fabric)
            .env("HETMEM_VERBS_PLUGIN", &self.plugin)
            .host("32MiB")
            .flag("max-objects", "4096")
    }
}

fn get(store: &Store, name: &str, len: usize, version: u64) -> Result<Receipt, StoreError> {
    let options =
        GetOptions { timeout: Duration::from_secs(20), keep: false, verify: true, ..GetOptions::default() };
    let object = store.get_with(&key(name), &options)?;
    assert!(*object == *bytes_of(name, len, version), "{name} has other bytes");
    Ok(object.receipt())
}

fn put(store: &Store, name: &str, len: usize, version: u64) {
    store.put_bytes(&key(name), &bytes_of(name, len, version)).expect("room");
}

fn by_and_over(receipt: &Receipt) -> (By, Option<&str>) {
    (receipt.path, receipt.fabric.as_deref())
}

/// A small and a large object come over this fabric.
fn both_come_over(owner: &Store, reader: &Store, names: [&str; 2], fabric: &str) {
    put(owner, names[0], SMALL, 0);
    put(owner, names[1], LARGE, 0);
    let small = get(reader, names[0], SMALL, 0).expect("the small one");
    assert_eq!(by_and_over(&small), (By::Eager, Some(fabric)));
    let large = get(reader, names[1], LARGE, 0).expect("the large one");
    assert_eq!(by_and_over(&large), (By::Read, Some(fabric)));
    assert_eq!(large.staged_bytes, 0, "straight into its place");
}

#[test]
fn objects_come_over_verbs_and_receipts_and_status_say_so() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for fabric in ["verbs", "auto"] {
        let owner = lab.node(folder.path(), "owner", fabric).start();
        let reader = lab.node(folder.path(), "reader", fabric).join(&owner.address).start();
        let (put_at, get_at) = (owner.connect(), reader.connect());
        both_come_over(&put_at, &get_at, ["small", "large"], "verbs");
        // Its place is known now.
        let again = get(&get_at, "large", LARGE, 0).expect("it is still there");
        assert_eq!((by_and_over(&again), again.staged_bytes), ((By::Read, Some("verbs")), 0));
        let status = get_at.status().expect("it answers");
        assert_eq!(status.peers.iter().map(|peer| peer.fabric.as_str()).collect::<Vec<_>>(), ["verbs"]);
    }
}

#[test]
fn what_an_owner_pushes_comes_over_verbs_and_receipts_say_so() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let pushing = lab.node(folder.path(), "owner", "verbs-push");
    if lab.device.driver == "siw" {
        let end = pushing.try_start().expect_err("iWARP has no pushes");
        assert!(end.said.contains("no Write with immediate"), "{}", end.said);
        return;
    }
    let owner = pushing.start();
    let reader = lab.node(folder.path(), "reader", "verbs").join(&owner.address).start();
    let (put_at, get_at) = (owner.connect(), reader.connect());
    for (node, len) in [(&put_at, SMALL), (&put_at, LARGE), (&get_at, LARGE + 1)] {
        put(node, &format!("{len}"), len, 0);
    }
    let small = get(&get_at, &format!("{SMALL}"), SMALL, 0).expect("the small one");
    assert_eq!(by_and_over(&small), (By::Eager, Some("verbs")));
    // The second time its place is known, and the owner's word is read after the push.
    for round_trips in [3, 2] {
        let large = get(&get_at, &format!("{LARGE}"), LARGE, 0).expect("the large one");
        println!("{large:?}");
        assert_eq!((by_and_over(&large), large.staged_bytes), ((By::Push, Some("verbs")), 0));
        assert!(large.round_trips <= round_trips, "{large:?}");
    }
    // The other way it is as always.
    let read = get(&put_at, &format!("{}", LARGE + 1), LARGE + 1, 0).expect("the other one");
    assert_eq!(by_and_over(&read), (By::Read, Some("verbs")));
}

/// GPUs of the stand-in driver, for processes that find it in this folder.
struct Gpus {
    folder: tempfile::TempDir,
}

impl Gpus {
    fn standing_in() -> Self {
        let library =
            std::env::var("HETMEM_TEST_STANDIN_CUDA").expect("whoever names a device names this too");
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["libcuda.so", "libcuda.so.1"] {
            std::os::unix::fs::symlink(&library, folder.path().join(name)).expect("a link");
        }
        Self { folder }
    }

    fn libraries(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn node(&self, lab: &Lab, name: &str, fabric: &str) -> Serve {
        let node = lab.node(self.folder.path(), name, fabric).flag("gpu", "16MiB");
        node.env("LD_LIBRARY_PATH", &self.libraries())
    }

    /// Gets an object in GPU memory, by a process that writes it to a file; what that says of how its bytes came.
    fn get_on_gpu(&self, node: &Daemon, name: &str, len: usize) -> String {
        let file = self.folder.path().join("bytes");
        let output = Command::new(binary())
            .args(["get", name, "--tier", "gpu:0", "--receipt", "--json", "--output"])
            .arg(&file)
            .arg("--socket")
            .arg(&node.socket)
            .env("LD_LIBRARY_PATH", self.libraries())
            .output()
            .expect("hetmem runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(
            std::fs::read(&file).expect("the file") == bytes_of(name, len, 0),
            "{name} by way of two GPUs"
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn put_on_gpu(store: &Store, name: &str, len: usize) {
    let options = PutOptions { tier: Some(Tier::Gpu(0).into()), ..PutOptions::default() };
    let meta = ObjectMeta::bytes(len as u64).expect("a length");
    store.put_with(&key(name), meta, &bytes_of(name, len, 0), &options).expect("room");
}

/// Software devices take no memory of another device: what is on a GPU passes through host memory, which is said once
/// for each segment, with the reason, and in receipts.
#[test]
fn gpu_memory_that_an_adapter_refuses_is_staged_in_host_memory() {
    let Some(lab) = Lab::enter() else { return };
    let gpus = Gpus::standing_in();
    let owner = gpus.node(&lab, "owner", "verbs").start();
    let reader = gpus.node(&lab, "reader", "verbs").join(&owner.address).start();
    for said in [&owner, &reader] {
        said.says("memory of device 0: reads and writes, out of it and into it, FAIL");
        said.says("it has to be staged through host memory");
    }
    let (put_at, get_at) = (owner.connect(), reader.connect());
    for (name, len, path) in [("small", SMALL, By::Eager), ("large", LARGE, By::Read)] {
        put_on_gpu(&put_at, name, len);
        let receipt = get(&get_at, name, len, 0).expect(name);
        assert_eq!(by_and_over(&receipt), (path, Some("verbs")));
        assert_eq!((receipt.from.tier, receipt.staged_bytes), (Some(Tier::Gpu(0)), len as u64));
        let receipts = gpus.get_on_gpu(&reader, name, len);
        assert!(receipts.contains(&format!("\"staged_bytes\": {len}")), "{receipts}");
    }
    owner.says("its bytes pass through host memory");
}

/// The same GPUs, with addresses that software devices register as host memory: what nvidia-peermem makes of those of a GPU.
/// Nothing is staged then, and the GPU is flushed before anybody hears of what was written there.
#[test]
fn gpu_memory_that_an_adapter_takes_is_read_and_written_by_it() {
    let Some(lab) = Lab::enter() else { return };
    for (fabric, path) in [("verbs", By::Read), ("verbs-push", By::Push)] {
        let gpus = Gpus::standing_in();
        let log = gpus.folder.path().join("calls");
        let node = |name: &str, fabric: &str| {
            gpus.node(&lab, name, fabric)
                .env("HETMEM_STANDIN_PEER_MEMORY", "1")
                .env("HETMEM_STANDIN_WITHOUT", "dma-buf")
                .env("HETMEM_STANDIN_LOG", &log.display().to_string())
        };
        let owner = node("owner", fabric).start();
        let reader = node("reader", "verbs").join(&owner.address).start();
        for said in [&owner, &reader] {
            said.says(
                "proof=memory of device 0: reads out of it work, reads into it work, writes out of it work",
            );
        }
        let (put_at, get_at) = (owner.connect(), reader.connect());
        let flushes = || {
            let log = std::fs::read_to_string(&log).expect("the log");
            let of_reader = format!("{} cuFlushGPUDirectRDMAWrites", reader.pid());
            log.lines().filter(|line| line.starts_with(&of_reader)).count()
        };
        put_on_gpu(&put_at, "large", LARGE);
        put_on_gpu(&put_at, "other", LARGE + 5);
        owner.says("memory of a device is registered");
        // Into host memory: nobody flushes for that.
        let before = flushes();
        let receipt = get(&get_at, "other", LARGE + 5, 0).expect("other");
        assert_eq!((by_and_over(&receipt), receipt.staged_bytes), ((path, Some("verbs")), 0));
        assert_eq!((receipt.from.tier, flushes()), (Some(Tier::Gpu(0)), before));
        let receipts = gpus.get_on_gpu(&reader, "large", LARGE);
        assert!(receipts.contains("\"staged_bytes\": 0"), "{receipts}");
        assert_eq!(flushes(), before + 1, "once, before the object was there");
        assert_eq!(get_at.stat(&key("large")).expect("it was kept").tier, Some(Tier::Gpu(0)));
    }
}

#[test]
fn the_demo_moves_a_state_dict() {
    let Some(lab) = Lab::enter() else { return };
    // It finds the plugin beside the program, and succeeds only if every byte has come.
    let output = Command::new(binary())
        .args(["demo", "--json", "--fabric", "verbs", "--size", "1MiB", "--listen", &lab.address])
        .output()
        .expect("hetmem runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_node_that_listens_everywhere_is_reached_and_doctor_names_the_device() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // Soft iWARP that listens everywhere binds itself to the device's network, and what a machine sends to itself comes by
    // another, `lo`.
    let everywhere = if lab.device.driver == "siw" { &lab.address } else { "0.0.0.0" };
    let listen = format!("{everywhere}:7801");
    let owner = lab.node(folder.path(), "owner", "verbs").flag("listen", &listen).start();
    let at = format!("{}:7801", lab.address);
    let reader = lab.node(folder.path(), "reader", "verbs").join(&at).start();
    both_come_over(&owner.connect(), &reader.connect(), ["small", "large"], "verbs");
    let output = Command::new(binary()).args(["doctor", "--json"]).output().expect("hetmem runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(&lab.device.name), "{said}");
    // It has tried the device with real bytes.
    assert!(said.contains("reads out of it work, reads into it work, writes out of it work"), "{said}");
}

#[test]
fn a_peer_without_verbs_is_reached_over_tcp_unless_that_is_refused() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let owner = lab.node(folder.path(), "owner", "tcp").start();
    let reader = lab.node(folder.path(), "reader", "auto").join(&owner.address).start();
    both_come_over(&owner.connect(), &reader.connect(), ["small", "large"], "tcp");
    reader.says("TCP is used");
    assert!(reader.connect().status().expect("it answers").counters.fallbacks > 0, "it is counted");
    let strict = lab.node(folder.path(), "strict", "verbs").join(&owner.address).start();
    let error = get(&strict.connect(), "small", SMALL, 0).expect_err("there is no way");
    let clear = [ErrorKind::PeerLost, ErrorKind::Unavailable, ErrorKind::TimedOut];
    assert!(clear.contains(&error.kind()), "{error}");
}

#[test]
fn without_the_plugin_a_node_says_so_and_speaks_tcp_unless_that_is_refused() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("nothing.so").display().to_string();
    let node = lab.node(folder.path(), "node", "auto").env("HETMEM_VERBS_PLUGIN", &nowhere).start();
    node.says("RDMA is not used");
    node.says(&nowhere);
    let strict = lab.node(folder.path(), "strict", "verbs").env("HETMEM_VERBS_PLUGIN", &nowhere);
    let end = strict.try_start().expect_err("there is nothing to serve with");
    assert!(end.said.contains(&nowhere), "{}", end.said);
}

#[test]
fn a_peer_that_is_killed_is_lost_and_found_again_when_it_is_back() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let reader = lab.node(folder.path(), "reader", "verbs").start();
    let serve = lab.node(folder.path(), "owner", "verbs").join(&reader.address);
    let get_at = reader.connect();
    for version in 0..2 {
        let mut owner = serve.start();
        let put_at = owner.connect();
        put(&put_at, "first", LARGE, version);
        put(&put_at, "later", LARGE, version);
        eventually("the object is found", || {
            get(&get_at, "first", LARGE, version).map(drop).map_err(|error| error.to_string())
        });
        let struck = std::thread::scope(|scope| {
            let gets = scope
                .spawn(|| (0..).find_map(|_| get(&get_at, "later", LARGE, version).err()).expect("an end"));
            std::thread::sleep(Duration::from_millis(300));
            owner.kill();
            gets.join().expect("the gets end")
        });
        let clear = [ErrorKind::PeerLost, ErrorKind::NotFound, ErrorKind::TimedOut, ErrorKind::Unavailable];
        assert!(clear.contains(&struck.kind()), "{struck}");
    }
    assert_eq!(get_at.status().expect("it answers").reservations, 0);
}

#[test]
fn too_little_memory_that_may_be_locked_is_named_and_tcp_is_used() {
    let Some(lab) = Lab::enter() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // Root may lock any amount, so the right to is taken away too.
    let poor = |name: &str, fabric: &str| {
        let wrapper = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit"];
        let wrapper = wrapper.iter().map(|word| (*word).to_owned());
        lab.node(folder.path(), name, fabric)
            .under(wrapper.chain(["--memlock=65536:65536".to_owned(), "--".to_owned()]))
    };
    let owner = lab.node(folder.path(), "owner", "auto").start();
    let reader = poor("reader", "auto").join(&owner.address).start();
    reader.says("RDMA is not used");
    reader.says("ulimit -l");
    both_come_over(&owner.connect(), &reader.connect(), ["small", "large"], "tcp");
    let end = poor("strict", "verbs").try_start().expect_err("nothing can be registered");
    assert!(end.said.contains("ulimit -l"), "{}", end.said);
}

fn call(program: &str, words: &str) {
    let output = Command::new(program).args(words.split(' ')).output().expect(program);
    assert!(output.status.success(), "{program} {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two nodes live through something that takes their RDMA away, and use it again when it is back.
fn survive(lab: &Lab, what: &str, strike: impl FnOnce(), mend: impl FnOnce()) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut owner = lab.node(folder.path(), "owner", "verbs").start();
    let mut reader = lab.node(folder.path(), "reader", "verbs").join(&owner.address).start();
    let (put_at, get_at) = (owner.connect(), reader.connect());
    both_come_over(&put_at, &get_at, ["small", "large"], "verbs");
    strike();
    let error = eventually_fails(&get_at);
    println!("{what}: {error}");
    // What is on a node goes on being read there.
    assert!(get(&put_at, "large", LARGE, 0).is_ok());
    mend();
    eventually(&format!("{what} no more"), || {
        get(&get_at, "large", LARGE, 0).map(drop).map_err(|error| error.to_string())
    });
    for node in [&mut owner, &mut reader] {
        assert!(node.is_running(), "{what}: {}", node.said());
    }
}

fn eventually_fails(store: &Store) -> StoreError {
    let mut found = None;
    eventually("gets fail", || match get(store, "large", LARGE, 0) {
        Ok(_) => Err("it was still got".to_owned()),
        Err(error) => {
            found = Some(error);
            Ok(())
        }
    });
    found.expect("it failed")
}

#[test]
fn a_link_that_is_down_for_a_while_is_used_again() {
    let Some(lab) = Lab::enter() else { return };
    survive(
        &lab,
        "the link is down",
        || lab.device.network("down"),
        || {
            lab.device.network("up");
            // Soft RoCE connects to nobody any more once it had to tell a peer something over a link that is down: the
            // kernel's own queue pair for that stays broken (Linux 6.12; rping alone shows it). A new device has a new one.
            if lab.device.driver == "rxe" {
                lab.device.remove();
                lab.device.add();
            }
        },
    );
}

#[test]
fn a_device_that_is_removed_costs_its_links_and_is_used_again() {
    let Some(lab) = Lab::enter() else { return };
    // Soft RoCE waits until nobody has its device open, so this ends only if the nodes let it go.
    survive(&lab, "the device is gone", || lab.device.remove(), || lab.device.add());
}
