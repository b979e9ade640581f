//! A running node: what it is made of, how it starts and how it stops. Not the work itself. Invariant: when `Node` is
//! dropped its threads have ended, its socket path is free, and its memory is released.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hetmem_core::engine::{Engine, EngineConfig, Input};
use hetmem_core::wire::Member;
use hetmem_core::{Epoch, NodeId, SegmentId, StoreError, fingerprint};
use hetmem_host_mem::{IndexWriter, Reserve, Session, socket};
use hetmem_transport::{Access, RegionMemory};
use rustix::event::{EventfdFlags, eventfd};

use crate::config::Config;
use crate::driver::{Core, Driver};
use crate::fabrics::{Fabrics, is_exposed};
use crate::inprocess::InProcess;
use crate::memory::GenerationsRegion;
use crate::peers::Sink;
use crate::reactor::Reactor;
use crate::segments::{Job, Maker};
use crate::tiers::Tiers;

/// The number under which the index is registered with fabrics; segments of objects count from 1.
const INDEX_SEGMENT: SegmentId = SegmentId(0);
/// Descriptors without which there is no use in starting: about 30 are a node's own, the rest is for a few clients.
const DESCRIPTORS_MIN: u64 = 64;
/// The longest time between two looks at the engine's timers.
const TICK_MAX: Duration = Duration::from_millis(20);
/// The shortest, so that a timer that is always due does not take a core.
const TICK_MIN: Duration = Duration::from_millis(1);

/// A running node. Dropping it stops it.
pub struct Node {
    driver: Arc<Driver>,
    fabrics: Arc<Fabrics>,
    socket: PathBuf,
    name: String,
    address: String,
    /// Written to when the reactor is to stop.
    stop: OwnedFd,
    jobs: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
    ticker: Option<(tokio::sync::oneshot::Sender<()>, JoinHandle<()>)>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Starts a node: reserves its memory, listens, and dials the node it is to join.
    ///
    /// # Errors
    /// Whatever keeps it from running, with the remedy: a socket path or port in use, too little memory, too few
    /// descriptors, a fabric that is not there.
    pub fn start(config: Config) -> Result<Self, StoreError> {
        raise_descriptor_limit()?;
        let listener = socket::listen(&config.socket)?;
        let sink = Arc::new(Sink::default());
        let tiers = Tiers::look(&config.gpu, |bytes| config.client_share.of(bytes))?;
        let fabrics = Arc::new(Fabrics::start(&config, &sink, &tiers)?);
        let address = advertised(&fabrics.address()?, &config.join);
        let name = config.name.clone().unwrap_or_else(|| default_name(&address));
        let started = Self::run(&config, tiers, listener, &fabrics, &sink, (&address, &name));
        let (driver, stop, jobs, threads) = match started {
            Ok(parts) => parts,
            Err(error) => {
                // Threads that wait for the driver must not wait for ever.
                sink.close();
                return Err(error);
            }
        };
        let mut node =
            Self { driver, fabrics, socket: config.socket, name, address, stop, jobs, threads, ticker: None };
        node.ticker = Some(start_ticker(&node.driver)?);
        Ok(node)
    }

    #[allow(clippy::type_complexity, reason = "the parts of one value, named where they are taken apart")]
    fn run(
        config: &Config,
        tiers: Tiers,
        listener: socket::Listener,
        fabrics: &Arc<Fabrics>,
        sink: &Sink,
        (address, name): (&str, &str),
    ) -> Result<(Arc<Driver>, OwnedFd, Sender<Job>, Vec<JoinHandle<()>>), StoreError> {
        let index = IndexWriter::create(config.max_objects)?;
        let words: Arc<dyn RegionMemory> = Arc::new(GenerationsRegion(index.memory()));
        let index_keys = fabrics.register(INDEX_SEGMENT, &words, Access::RemoteRead)?;
        let (region, _) = index.memory().generations();
        let first = index.generation_offset(hetmem_core::SlotId(0));
        let stride = index.generation_offset(hetmem_core::SlotId(1)) - first;
        let member = Member {
            node: NodeId(fingerprint(name.as_bytes())),
            epoch: epoch(),
            name: name.to_owned(),
            address: address.to_owned(),
        };
        fabrics.identify(&member);
        let visibility = fabrics.visibility(&tiers);
        let engine = Engine::new(EngineConfig {
            member,
            join: config.join.clone(),
            capacity_bytes: config.host_bytes,
            client_quota_bytes: config.client_quota_bytes,
            objects_max: config.max_objects,
            fabrics: fabrics.uses(&index_keys, &tiers, &visibility),
            generation_base: first - region,
            generation_stride: stride,
            threshold_bytes: config.threshold_bytes,
            lease_ms: config.lease_ms,
            heartbeat_ms: config.heartbeat_ms,
            gpus: tiers.uses(),
            why_no_gpu: tiers.why_none().into(),
        });
        tracing::info!(bytes = config.host_bytes, "reserving the memory of the host tier");
        let reserve = Reserve::new(config.host_bytes, config.huge_pages)?;
        let (jobs, received) = channel();
        let shown = index.memory();
        let driver = Driver::new(engine, index, jobs.clone(), (tiers, visibility));
        let _ = driver.fabrics.set(Arc::clone(fabrics));
        let os = |error: std::io::Error| StoreError::os("starting a thread", error);
        let maker = Maker { reserve, pages: config.huge_pages, registered: HashMap::new() };
        let weak: Weak<Driver> = Arc::downgrade(&driver);
        let mut threads = vec![
            std::thread::Builder::new()
                .name("hetmem-memory".to_owned())
                .spawn(move || maker.run(&received, &weak, shown))
                .map_err(os)?,
        ];
        driver.feed(Input::Start);
        wait_for_memory(&driver)?;
        sink.connect_to(&driver);
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| StoreError::os("eventfd", error))?;
        let reactor = Reactor::new(Arc::clone(&driver), listener, stop.as_fd())?;
        threads.push(
            std::thread::Builder::new()
                .name("hetmem-clients".to_owned())
                .spawn(move || reactor.run())
                .map_err(os)?,
        );
        Ok((driver, stop, jobs, threads))
    }

    /// Where peers connect to.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The node's name in the cluster.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The Unix socket for clients.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether peers from other machines can reach this node, which does not ask who they are.
    #[must_use]
    pub fn is_exposed(&self) -> bool {
        self.fabrics.address().is_ok_and(|address| is_exposed(&address))
    }

    /// Keeps the engine from doing anything until the guard is dropped: messages, requests and timers wait. What the
    /// fabric does by itself goes on.
    #[doc(hidden)]
    #[must_use = "the engine goes on once this is dropped"]
    pub fn hold_engine(&self) -> EngineHeld<'_> {
        EngineHeld(self.driver.core.lock())
    }

    /// A session inside this process: calls run on the caller's thread.
    ///
    /// # Errors
    /// `Os` if its page cannot be made.
    pub fn session(&self) -> Result<Arc<dyn Session>, StoreError> {
        Ok(Arc::new(InProcess::open(&self.driver)?))
    }

    /// Serves until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// `Os` if signals cannot be waited for.
    pub fn run_until_signal(self) -> Result<(), StoreError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| StoreError::os("starting the runtime", error))?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let os = |error: std::io::Error| StoreError::os("waiting for signals", error);
            let (mut term, mut int) =
                (signal(SignalKind::terminate()).map_err(os)?, signal(SignalKind::interrupt()).map_err(os)?);
            tokio::select! {
                _ = term.recv() => tracing::info!("SIGTERM: stopping"),
                _ = int.recv() => tracing::info!("SIGINT: stopping"),
            }
            Ok(())
        })
    }
}

/// See `Node::hold_engine`.
#[doc(hidden)]
pub struct EngineHeld<'a>(#[expect(dead_code, reason = "held, not used")] parking_lot::MutexGuard<'a, Core>);

impl fmt::Debug for EngineHeld<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHeld").finish_non_exhaustive()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        let _ = self.jobs.send(Job::Stop);
        if let Some((stop, thread)) = self.ticker.take() {
            drop(stop);
            let _ = thread.join();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.fabrics.stop();
        // Copies that are under way end before the memory goes; what they report finds no engine at work any more.
        self.driver.tiers.stop();
    }
}

/// Runs the engine's timers.
fn start_ticker(
    driver: &Arc<Driver>,
) -> Result<(tokio::sync::oneshot::Sender<()>, JoinHandle<()>), StoreError> {
    let os = |error: std::io::Error| StoreError::os("starting the timers", error);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(os)?;
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let driver = Arc::clone(driver);
    let run = async move {
        loop {
            let pause = driver.next_timer().unwrap_or(TICK_MAX).clamp(TICK_MIN, TICK_MAX);
            tokio::select! {
                _ = &mut stopped => return,
                () = tokio::time::sleep(pause) => driver.tick(),
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("hetmem-timers".to_owned())
        .spawn(move || runtime.block_on(run))
        .map_err(os)?;
    Ok((stop, thread))
}

/// Waits until the first segments are there, or one could not be made.
fn wait_for_memory(driver: &Driver) -> Result<(), StoreError> {
    let started = Instant::now();
    loop {
        match driver.core.lock().engine.start_up() {
            hetmem_core::engine::StartUp::Ready => return Ok(()),
            hetmem_core::engine::StartUp::Failed(error) => return Err(error),
            hetmem_core::engine::StartUp::Making => {}
        }
        if started.elapsed() > Duration::from_secs(600) {
            return Err(StoreError::timed_out("serve", "reserving memory", 600_000));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Later incarnations have later epochs: nanoseconds since 1970 by the wall clock.
fn epoch() -> Epoch {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Epoch(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn default_name(address: &str) -> String {
    let host = rustix::system::uname();
    let port = address.rsplit(':').next().unwrap_or_default();
    format!("{}:{port}", host.nodename().to_string_lossy())
}

/// What peers are told to dial. A wildcard address is none: then it is the one from which this machine would reach
/// the nodes it joins, or any other machine.
fn advertised(listening: &str, join: &[String]) -> String {
    let Ok(address) = listening.parse::<std::net::SocketAddr>() else { return listening.to_owned() };
    if !address.ip().is_unspecified() {
        return listening.to_owned();
    }
    let towards = |target: &str| {
        // Connecting a datagram socket sends nothing; it only asks for the route.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect(target).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    // The way to an address of this machine is that address.
    let ip = join.iter().find_map(|target| towards(target)).or_else(|| towards("192.0.2.1:9"));
    match ip {
        Some(ip) => std::net::SocketAddr::new(ip, address.port()).to_string(),
        None => format!("127.0.0.1:{}", address.port()),
    }
}

/// Every segment, client and link takes a descriptor or two: takes as many as this user may have.
fn raise_descriptor_limit() -> Result<(), StoreError> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::debug!(%error, "RLIMIT_NOFILE stays as it is");
        }
    }
    match getrlimit(Resource::Nofile).current {
        Some(current) if current < DESCRIPTORS_MIN => {
            let why = format!(
                "RLIMIT_NOFILE is {current}, a node needs {DESCRIPTORS_MIN} at least, and more for clients and peers \
                 (raise it with `ulimit -n` or LimitNOFILE=)"
            );
            Err(StoreError::os("serve", why))
        }
        _ => Ok(()),
    }
}
