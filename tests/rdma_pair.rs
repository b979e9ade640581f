//! Two machines: virtual ones with software RDMA (tests/vm), a node in each, and between them a wire that this program
//! carries packet by packet and can cut without either machine's link going down. Not the fabric on one machine
//! (`rdma`), nor speed. Runs on the host, where `HETMEM_VERBS_PLUGIN` names the plugin. Invariant: a machine does not
//! outlive its `Machine`.
#![allow(clippy::print_stdout, reason = "what nodes said of what was done to them belongs into the log")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use hetmem_tests::content::bytes_of;
use hetmem_tests::daemon::{binary, eventually};
use rustix::process::{Pid, Signal, kill_process};

const OWNER: &str = "10.78.0.1";
const READER: &str = "10.78.0.2";
const PORT: u16 = 7800;
const SMALL: usize = 1_000;
const LARGE: usize = 3 << 20;
/// `tests/vm/run` says by it that the guest, and not the command, failed.
const GUEST_FAILED: i32 = 125;
/// Longer than any packet, which QEMU writes with its length before it.
const PACKET_MAX: usize = 128 << 10;

/// What a command in a machine has come to.
struct Done {
    status: i32,
    out: String,
    err: String,
}

/// The machine has ended by itself.
struct Dead(Option<i32>);

/// A virtual machine, and the folder through which it is told what to do.
struct Machine {
    child: Child,
    folder: PathBuf,
    commands: u32,
}

impl Machine {
    /// Starts it; it is not ready yet.
    fn boot(folder: &Path, driver: &str, address: &str) -> Self {
        let folder = folder.join(address);
        std::fs::create_dir_all(&folder).expect("a folder");
        let setup = folder.join("setup");
        let up = format!(
            "ip addr add {address}/24 dev eth0 && ip link set eth0 mtu 9000 up && \
             rdma link add {driver}0 type {driver} netdev eth0"
        );
        std::fs::write(&setup, up).expect("a file");
        let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm");
        let wire = wire_of(&folder);
        let last = address.rsplit('.').next().expect("a number");
        let card = format!("virtio-net-pci,netdev=wire,host_mtu=9000,mac=52:54:00:00:00:0{last}");
        let netdev = format!("stream,id=wire,server=on,addr.type=unix,addr.path={}", wire.display());
        let child = Command::new(vm.join("run"))
            .args(["-c", "1", "-m", "1024", "-n", "0", "-t", "300", "-d", driver])
            .args(["-q", "-netdev", "-q", &netdev, "-q", "-device", "-q", &card])
            .arg("-s")
            .arg(&setup)
            .arg("-w")
            .arg(&folder)
            .arg("-r")
            .arg(&vm)
            .arg("-r")
            .arg(binary().parent().expect("a folder"))
            .args(["-e", "HETMEM_LOG", "--"])
            .env("HETMEM_LOG", "info")
            .arg(vm.join("agent"))
            .arg(&folder)
            .spawn()
            .expect("tests/vm/run starts");
        Self { child, folder, commands: 0 }
    }

    /// Runs a shell script in it, to its end.
    fn run(&mut self, script: &str) -> Result<Done, Dead> {
        self.commands += 1;
        let at = |suffix: &str| self.folder.join(format!("{}{suffix}", self.commands));
        std::fs::write(at(".new"), script).expect("a file");
        std::fs::rename(at(".new"), at("")).expect("a file");
        let said = |suffix| std::fs::read_to_string(at(suffix)).unwrap_or_default();
        let mut ended = Err(Dead(None));
        eventually(&format!("the machine runs {script:?}"), || {
            if let Ok(status) = said(".status").trim().parse() {
                ended = Ok(Done { status, out: said(".out"), err: said(".err") });
                return Ok(());
            }
            match self.child.try_wait().expect("a child") {
                Some(status) => {
                    ended = Err(Dead(status.code()));
                    Ok(())
                }
                None => Err("no answer".to_owned()),
            }
        });
        ended
    }

    /// The same for what has to succeed.
    fn must(&mut self, script: &str) -> String {
        match self.run(script) {
            Ok(done) if done.status == 0 => done.out,
            Ok(Done { status, out, err }) => panic!("{script}: {status}\n{out}\n{err}\n{}", self.log()),
            Err(Dead(code)) => panic!("{script}: the machine has ended ({code:?})"),
        }
    }

    /// What its node has said.
    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    fn serve(&mut self, plugin: &str, flags: &str) {
        let (node, log) = (binary().display().to_string(), self.folder.join("log").display().to_string());
        self.must(&format!(
            "HETMEM_VERBS_PLUGIN={plugin} {node} serve --socket /run/node.sock --fabric verbs --host 32MiB \
             --max-objects 4096 --huge-pages off --heartbeat-ms 500 {flags} > /dev/null 2> {log} & \
             for try in $(seq 150); do \
             {node} --socket /run/node.sock status > /dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1"
        ));
    }

    fn put(&mut self, name: &str, len: usize) {
        let file = self.folder.join(name);
        std::fs::write(&file, bytes_of(name, len, 0)).expect("a file");
        let node = binary().display();
        self.must(&format!("{node} --socket /run/node.sock put --key {name} {}", file.display()));
    }

    fn get(&mut self, name: &str, timeout_ms: u32) -> Done {
        let (node, file) = (binary().display(), self.folder.join(name));
        let script = format!(
            "{node} --json --socket /run/node.sock get --receipt --timeout-ms {timeout_ms} --output {} {name}",
            file.display()
        );
        match self.run(&script) {
            Ok(done) => done,
            Err(Dead(code)) => panic!("{script}: the machine has ended ({code:?})"),
        }
    }

    /// Gets an object: every byte has to be right, and come over RDMA in this way.
    fn has(&mut self, name: &str, len: usize, path: &str) -> Result<(), String> {
        let done = self.get(name, 20_000);
        if done.status != 0 {
            return Err(done.err);
        }
        let bytes = std::fs::read(self.folder.join(name)).expect("what was got");
        assert!(bytes == bytes_of(name, len, 0), "{name} has other bytes");
        for wanted in [("fabric", "verbs"), ("path", path)] {
            let said = done.out.replace(' ', "");
            assert!(said.contains(&format!("\"{}\":\"{}\"", wanted.0, wanted.1)), "{wanted:?}: {said}");
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- {} said:\n{}---", self.folder.display(), self.log());
        }
        // Its script ends QEMU then, which a kill would not.
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = kill_process(pid.expect("a process number"), Signal::TERM);
        let _ = self.child.wait();
    }
}

fn wire_of(folder: &Path) -> PathBuf {
    folder.join("wire")
}

/// As many bytes as there may be.
const OPEN: i64 = i64::MAX;

/// What connects two machines. Each direction carries so many bytes more; then packets vanish, and nobody is told.
struct Wire {
    left: [Arc<AtomicI64>; 2],
}

impl Wire {
    fn between(machines: [&Machine; 2]) -> Self {
        let ends = machines.map(|machine| {
            let mut end = None;
            eventually("the machine's network card is there", || {
                end = Some(UnixStream::connect(wire_of(&machine.folder)).map_err(|why| why.to_string())?);
                Ok(())
            });
            end.expect("it is there")
        });
        let left = [(0, 1), (1, 0)].map(|(from, to)| {
            let left = Arc::new(AtomicI64::new(OPEN));
            let (from, to) = (ends[from].try_clone(), ends[to].try_clone());
            let (from, to) = (from.expect("a descriptor"), to.expect("a descriptor"));
            let of_it = Arc::clone(&left);
            std::thread::spawn(move || carry(from, to, &of_it));
            left
        });
        Self { left }
    }

    fn carries(&self, bytes: [i64; 2]) {
        for (left, bytes) in self.left.iter().zip(bytes) {
            left.store(bytes, Ordering::Release);
        }
    }
}

/// Until one of the machines has gone.
fn carry(mut from: UnixStream, mut to: UnixStream, left: &AtomicI64) {
    let mut packet = vec![0; PACKET_MAX];
    loop {
        let mut len = [0; 4];
        if from.read_exact(&mut len).is_err() {
            return;
        }
        let Some(bytes) = packet.get_mut(..4 + u32::from_be_bytes(len) as usize) else { return };
        bytes[..4].copy_from_slice(&len);
        if from.read_exact(&mut bytes[4..]).is_err() {
            return;
        }
        let before = left.fetch_sub(i64::from(u32::from_be_bytes(len)), Ordering::AcqRel);
        if before > 0 && to.write_all(bytes).is_err() {
            return;
        }
    }
}

/// Two machines with a wire between them; none where there cannot be any, which is said.
fn machines(folder: &Path, driver: &str) -> Option<(Machine, Machine, Wire)> {
    for _ in 0..2 {
        let mut pair = [OWNER, READER].map(|address| Machine::boot(folder, driver, address));
        let wire = Wire::between([&pair[0], &pair[1]]);
        match pair.each_mut().map(|machine| machine.run("true")) {
            [Ok(_), Ok(_)] => {
                let [owner, reader] = pair;
                return Some((owner, reader, wire));
            }
            ended => {
                for dead in ended.into_iter().filter_map(Result::err) {
                    assert_eq!(dead.0, Some(GUEST_FAILED), "how the machine ended");
                }
                println!("a virtual machine did not live");
            }
        }
        drop(pair);
    }
    println!("skipped: the virtual machines cannot be started here");
    None
}

/// Gets end, and say that the peer is not there.
fn fails(reader: &mut Machine, what: &str, name: &str) {
    let done = reader.get(name, 8_000);
    println!("{what}: {} {}", done.status, done.err.trim());
    // Not: wrong usage, other bytes.
    assert!([1, 3, 4, 6].contains(&done.status), "{what}: {} {}", done.status, done.err);
    assert!(!done.err.trim().is_empty(), "{what}: it says why");
}

/// The first so many of the ways in which a wire can be cut.
fn nodes_live_through_partitions(driver: &str, count: usize) {
    let Ok(plugin) = std::env::var("HETMEM_VERBS_PLUGIN") else {
        println!("skipped: HETMEM_VERBS_PLUGIN names no plugin to run in virtual machines");
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let Some((mut owner, mut reader, wire)) = machines(folder.path(), driver) else { return };
    owner.serve(&plugin, &format!("--name owner --listen {OWNER}:{PORT}"));
    reader.serve(&plugin, &format!("--name reader --listen {READER}:{PORT} --join {OWNER}:{PORT}"));
    owner.put("small", SMALL);
    // A node may keep what it got, so each is wanted once.
    for name in ["large", "first", "second", "third"] {
        owner.put(name, LARGE);
    }
    let found = |reader: &mut Machine, name, len, path| {
        eventually(&format!("{name} is found"), || reader.has(name, len, path));
    };
    found(&mut reader, "small", SMALL, "eager");
    found(&mut reader, "large", LARGE, "read");
    let partitions = [
        ("nothing goes through", [0, 0], "first"),
        (
            "in the middle of a read, nothing comes from the owner any more",
            [LARGE as i64 / 3, OPEN],
            "second",
        ),
        ("nothing comes to the owner", [OPEN, 0], "third"),
    ];
    for (what, bytes, name) in partitions.into_iter().take(count) {
        wire.carries(bytes);
        fails(&mut reader, what, name);
        // While it looks for the peer it still answers.
        let status = format!("{} --socket /run/node.sock status > /dev/null", binary().display());
        reader.must(&format!("for time in 1 2 3 4 5; do {status} || exit 1; sleep 0.5; done"));
        wire.carries([OPEN, OPEN]);
        found(&mut reader, name, LARGE, "read");
    }
    for machine in [&mut owner, &mut reader] {
        let wrong = machine.log();
        assert!(!wrong.contains("panicked"), "{wrong}");
    }
}

#[test]
fn two_machines_live_through_partitions_over_soft_roce() {
    nodes_live_through_partitions("rxe", 3);
}

#[test]
fn two_machines_live_through_partitions_over_soft_iwarp() {
    if std::env::var_os("HETMEM_VM_MODULES").is_none() {
        println!("skipped: HETMEM_VM_MODULES names no siw.ko");
        return;
    }
    // Each takes long, and a wire of one way is TCP's to notice.
    nodes_live_through_partitions("siw", 2);
}
