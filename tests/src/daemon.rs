//! Nodes as processes of their own: started, watched, stopped and killed. Not what is tested on them. Invariant: no
//! node outlives its `Daemon`, nor the test process: a node stops when its standard input closes.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hetmem_client::{Status, Store};

/// How long anything is waited for before a test fails: for a hang, not for speed.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The `hetmem` to test; built when the variable is not there.
const BINARY_VARIABLE: &str = "HETMEM_TEST_BINARY";

/// The path of the `hetmem` program, built once per test process, into the folder that the tests were built into.
///
/// # Panics
/// If it cannot be built.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| std::env::var_os(BINARY_VARIABLE).map_or_else(build, PathBuf::from))
}

/// A program that cargo has built for the tests: the one of that name beside the `hetmem` that the environment names, if
/// there is one, else the one at `built`. Tests that run on another machine have all their programs in one folder.
#[must_use]
pub fn program(built: &str) -> PathBuf {
    let built = Path::new(built);
    let beside = std::env::var_os(BINARY_VARIABLE).and_then(|hetmem| {
        let found = Path::new(&hetmem).with_file_name(built.file_name()?);
        found.is_file().then_some(found)
    });
    beside.unwrap_or_else(|| built.to_owned())
}

fn build() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    // target/PROFILE/deps/this
    let folder = own.ancestors().nth(2).expect("a folder of the profile");
    let (target, profile) =
        (folder.parent().expect("the target folder"), folder.file_name().expect("a profile"));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // The same profile as the tests', so that nothing is compiled twice. What it is called and what its folder is
    // called differ.
    let profile = if profile == "debug" { OsStr::new("test") } else { profile };
    command
        .args(["build", "--quiet", "--package", "hetmem-cli", "--bin", "hetmem", "--profile"])
        .arg(profile)
        .arg("--target-dir")
        .arg(target)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let output = command.output().expect("cargo runs");
    assert!(
        output.status.success(),
        "hetmem could not be built:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    folder.join("hetmem")
}

/// Waits until something is so, and says how long that took.
///
/// # Panics
/// If it is not so after [`PATIENCE`]; `look` answers with what is in the way.
pub fn eventually(what: &str, mut look: impl FnMut() -> Result<(), String>) -> Duration {
    let started = Instant::now();
    loop {
        match look() {
            Ok(()) => return started.elapsed(),
            Err(why) => assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A TCP port of 127.0.0.1 that nobody listens at, outside the range from which the system takes free ones, so that
/// it is still free when a node that is killed starts again.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    for _ in 0..1000 {
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let spread = std::process::id().wrapping_mul(61).wrapping_add(number) % 20_000;
        let port = u16::try_from(10_000 + spread).unwrap_or(10_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between 10000 and 30000");
}

/// How a node is to be started.
#[derive(Clone, Debug)]
pub struct Serve {
    name: String,
    socket: PathBuf,
    flags: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    descriptors_max: Option<u64>,
    wrapper: Vec<String>,
}

impl Serve {
    /// A node of this name, with its socket in `folder`, 64 MiB and a free port.
    #[must_use]
    pub fn new(folder: &Path, name: &str) -> Self {
        let serve = Self {
            name: name.to_owned(),
            socket: folder.join(format!("{name}.sock")),
            flags: Vec::new(),
            environment: Vec::new(),
            descriptors_max: None,
            wrapper: Vec::new(),
        };
        serve
            .flag("host", "64MiB")
            .flag("listen", "127.0.0.1:0")
            .flag("heartbeat-ms", "200")
            .flag("max-objects", "65536")
            .flag("huge-pages", "off")
    }

    /// Sets a configuration key.
    #[must_use]
    pub fn flag(mut self, key: &str, value: &str) -> Self {
        self.flags.retain(|(known, _)| known != key);
        self.flags.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where peers connect.
    #[must_use]
    pub fn listen(self, port: u16) -> Self {
        self.flag("listen", &format!("127.0.0.1:{port}"))
    }

    /// The node that keeps the directory.
    #[must_use]
    pub fn join(self, address: &str) -> Self {
        self.flag("join", address)
    }

    /// Memory for objects.
    #[must_use]
    pub fn host(self, size: &str) -> Self {
        self.flag("host", size)
    }

    /// Another path for the socket.
    #[must_use]
    pub fn socket(mut self, socket: &Path) -> Self {
        self.socket = socket.to_owned();
        self
    }

    /// The most descriptors (`RLIMIT_NOFILE`, soft and hard).
    #[must_use]
    pub fn descriptors_max(mut self, limit: u64) -> Self {
        self.descriptors_max = Some(limit);
        self
    }

    /// A program that is to start it: the words before its own.
    #[must_use]
    pub fn under(mut self, wrapper: impl IntoIterator<Item = String>) -> Self {
        self.wrapper = wrapper.into_iter().collect();
        self
    }

    fn command(&self) -> Command {
        let mut words = self.wrapper.iter().map(OsStr::new).chain([binary().as_os_str()]);
        let mut command = match self.descriptors_max {
            None => Command::new(words.next().expect("the program is the last of them")),
            Some(limit) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("ulimit -n {limit} && exec \"$0\" \"$@\""));
                shell
            }
        };
        command.args(words);
        command.args(["serve", "--stop-with-stdin", "--name", &self.name]);
        command.arg("--socket").arg(&self.socket);
        for (key, value) in &self.flags {
            command.arg(format!("--{key}={value}"));
        }
        command
            .env("HETMEM_LOG", "info")
            .env("RUST_BACKTRACE", "1")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// If it does not get ready; with what it said.
    #[must_use]
    pub fn start(&self) -> Daemon {
        match self.try_start() {
            Ok(daemon) => daemon,
            Err(end) => panic!("node {} did not start ({}):\n{}", self.name, end.status, end.said),
        }
    }

    /// The same for a node that may refuse to.
    ///
    /// # Errors
    /// How it ended, and what it said.
    ///
    /// # Panics
    /// If it neither gets ready nor ends.
    pub fn try_start(&self) -> Result<Daemon, End> {
        let mut child = self.command().spawn().expect("a process can be started");
        let stdin = child.stdin.take();
        let said = Said::listen(child.stderr.take().expect("a pipe"));
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = stdout.read_line(&mut line);
            let _ = sender.send(line);
            // Until its end, so that the node never waits for a reader.
            let _ = std::io::copy(&mut stdout, &mut std::io::sink());
        });
        let mut daemon = Daemon {
            child,
            stdin,
            said,
            socket: self.socket.clone(),
            address: String::new(),
            name: self.name.clone(),
        };
        let line = ready.recv_timeout(PATIENCE).expect("the node gets ready or ends");
        let Ok(ready) = serde_json::from_str::<serde_json::Value>(&line) else {
            let status = daemon.wait();
            return Err(End { status, said: daemon.said() });
        };
        daemon.address = ready["address"].as_str().expect("an address").to_owned();
        Ok(daemon)
    }
}

/// How a node that did not start has ended.
#[derive(Debug)]
pub struct End {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard error.
    pub said: String,
}

/// What a process writes to its standard error.
#[derive(Clone, Debug)]
struct Said(Arc<Mutex<(String, bool)>>);

impl Said {
    fn listen(mut pipe: std::process::ChildStderr) -> Self {
        let said = Self(Arc::default());
        let into = said.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = pipe.read(&mut buffer)
                && count > 0
            {
                let text = String::from_utf8_lossy(&buffer[..count]);
                into.0.lock().unwrap_or_else(PoisonError::into_inner).0.push_str(&text);
            }
            into.0.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        });
        said
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn is_complete(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

/// A running node. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Closing it stops the node.
    stdin: Option<ChildStdin>,
    said: Said,
    /// Where its clients connect.
    pub socket: PathBuf,
    /// Where its peers connect.
    pub address: String,
    /// Its name.
    pub name: String,
}

impl Daemon {
    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new session with it.
    ///
    /// # Panics
    /// If it does not answer.
    #[must_use]
    pub fn connect(&self) -> Store {
        match Store::connect(Some(&self.socket)) {
            Ok(store) => store,
            Err(error) => panic!("node {}: {error}\n{}", self.name, self.said()),
        }
    }

    /// What it has written to standard error.
    #[must_use]
    pub fn said(&self) -> String {
        self.said.text()
    }

    /// Waits until it has written this to standard error.
    ///
    /// # Panics
    /// If it does not.
    pub fn says(&self, words: &str) {
        eventually(&format!("node {} says {words:?}", self.name), || {
            let said = self.said();
            if said.contains(words) { Ok(()) } else { Err(said) }
        });
    }

    /// Kills it at once (SIGKILL).
    pub fn kill(&mut self) {
        // Fails only if it has gone already.
        let _ = self.child.kill();
        let _ = self.wait();
    }

    /// Sends it a signal. After STOP all its threads stand still: the kernel stops them one by one, and the last may
    /// answer somebody when the signal has long been sent.
    ///
    /// # Panics
    /// If it is gone, or does not stop.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a process number"), signal).expect("the node is there");
        if signal == rustix::process::Signal::STOP {
            eventually(&format!("node {} stands still", self.name), || self.stands_still());
        }
    }

    fn stands_still(&self) -> Result<(), String> {
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a process of this user")
        {
            let stat = std::fs::read_to_string(thread.expect("a thread").path().join("stat"));
            // A thread that has ended meanwhile does nothing any more. The state stands behind the name, in brackets.
            let stat = stat.unwrap_or_default();
            if stat.rsplit_once(')').is_some_and(|(_, fields)| !fields.starts_with(" T")) {
                return Err(stat);
            }
        }
        Ok(())
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually(&format!("node {} ends", self.name), || {
            status = self.child.try_wait().expect("a child");
            if status.is_some() && self.said.is_complete() { Ok(()) } else { Err(self.said()) }
        });
        status.expect("it has ended")
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Checks that nothing went wrong inside it: no panic, no error in its log.
    ///
    /// # Panics
    /// If something did.
    pub fn assert_sound(&mut self) {
        let said = self.said();
        assert!(self.is_running(), "node {} has ended:\n{said}", self.name);
        let wrong = said.lines().find(|line| line.contains("panicked") || line.contains("ERROR"));
        assert_eq!(wrong, None, "node {} said:\n{said}", self.name);
    }

    /// Waits until its status is as `expected` says, which answers with what is not so.
    ///
    /// # Panics
    /// If it does not get there.
    pub fn settles(&self, store: &Store, what: &str, expected: impl Fn(&Status) -> bool) -> Duration {
        eventually(&format!("node {}: {what}", self.name), || {
            let status = store.status().map_err(|error| error.to_string())?;
            if expected(&status) { Ok(()) } else { Err(format!("{status:?}")) }
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("--- node {} said:\n{}---\n", self.name, self.said()).as_bytes(),
            );
        }
    }
}

/// Descriptors that a process has open.
///
/// # Panics
/// If there is no such process.
#[must_use]
pub fn descriptors_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of this user").count()
}

/// Memory of its own that a process uses, in bytes: without what it shares, such as segments.
///
/// # Panics
/// If there is no such process.
#[must_use]
pub fn own_memory_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process of this user");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.expect("a line of the process's own memory") * 1024
}
