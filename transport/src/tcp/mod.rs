//! The TCP fabric: frames over one control stream per link, reads served by the owner over data streams that the
//! reader opens (docs/tcp-fabric.md). Not the engine's protocol. Invariant: a fixed number of threads, and callers
//! of `progress`, do all the work; no number of peers or of bytes they send adds a thread.
//!
//! There are two epolls. Threads that may call the sink, and callers of `progress`, share the one with control streams
//! and the streams on which this end reads. Threads that never call the sink share the other, with the listener and the
//! data streams on which peers read: a sink that is held up holds up no peer's read, nor a new stream for one. While a
//! caller of `progress` waits, the threads beside it are not woken (`seats`).
//!
//! Control streams are watched edge-triggered: the next frame needs no further system call to be noticed. Data
//! streams are watched for one event at a time: while one thread receives or sends at length, what arrives meanwhile
//! wakes no other.

mod answers;
mod inbound;
mod inbox;
mod link;
mod outbox;
mod reading;
mod reads;
mod serve;
mod shared;
mod stream;
mod sys;
mod wire;

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hetmem_core::wire::Frame;
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId};
use parking_lot::Mutex;

use self::link::Link;
use self::shared::{Conn, Shared, Task};
use crate::fabric::{
    Access, Fabric, FabricEvent, FabricKind, FabricSink, ReadStats, SendToken, Sent, check_lengths,
    check_payload, check_word,
};
use crate::lookup::{self, Lookups};
use crate::memory::RegionMemory;
use crate::payload::Gather;
use crate::region::PARTS_MAX;

/// The shortest slice: below, a request costs more than what it asks for.
const SLICE_BYTES_MIN: usize = 256 << 10;

/// How a TCP fabric is set up.
#[derive(Clone, Debug)]
pub struct TcpConfig {
    /// Where to listen, as `host:port`; port 0 picks a free one.
    pub listen: String,
    /// Threads that call the sink, besides callers of `progress`.
    pub threads: usize,
    /// Threads that serve peers' reads and accept connections, and never call the sink.
    pub serving_threads: usize,
    /// The most data streams that reads of one link are spread over.
    pub streams: usize,
    /// Bytes asked for in one request, at least 256 KiB.
    pub slice_bytes: usize,
    /// The send buffer of data streams in bytes; 0 leaves it to the system.
    pub send_buffer_bytes: usize,
    /// The receive buffer of data streams in bytes; 0 leaves it to the system.
    pub receive_buffer_bytes: usize,
    /// How long a caller of `progress` goes on looking for events before it sleeps; zero: not at all. The fabric's own
    /// threads sleep at once.
    pub busy_poll: Duration,
    /// How long connecting and the handshake may take together.
    pub handshake_timeout: Duration,
    /// The most connections that have not introduced themselves.
    pub handshakes_max: usize,
    /// The most links, in and out.
    pub links_max: usize,
    /// The most data streams that one peer may open to this node.
    pub streams_per_peer_max: usize,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".to_owned(),
            threads: 2,
            serving_threads: 2,
            // 64 MiB over loopback on 2 cores, in GiB/s, with slices of 1 and of 4 MiB: over 1 stream 5.6 and 6.0, over 2
            // 6.0 and 6.1 (medians of 15 runs of the example `loopback` in turn; a bare blocking loop 3.0). Sending and
            // receiving take a core each: a second stream has nothing to gain before there are two more.
            streams: if processors() < 4 { 1 } else { 2 },
            slice_bytes: 4 << 20,
            // The same over 1 stream with buffers of 512 KiB: 4.4, of 2 MiB: 5.3; the system's own sizes do as well.
            send_buffer_bytes: 0,
            receive_buffer_bytes: 0,
            // With 0, 20 and 50 us, on 2 cores (medians of 7 runs of the same example in turn, `busy_us`): a round trip of
            // 1 KiB 47, 22 and 25 us, reads of 1 MiB 5.0, 5.8 and 5.4 GiB/s. If the owner's threads looked too, gets through
            // a daemon would take longer, as three processes have two cores.
            busy_poll: Duration::from_micros(50),
            handshake_timeout: Duration::from_secs(5),
            handshakes_max: 256,
            links_max: 1024,
            streams_per_peer_max: 16,
        }
    }
}

/// A number that nobody can guess.
pub(crate) fn random_number() -> Result<u64, StoreError> {
    Ok(u64::from_le_bytes(sys::random()?))
}

/// Processors that this process may use.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// A fabric over TCP sockets.
pub struct TcpFabric {
    shared: Arc<Shared>,
    address: SocketAddr,
    threads: Mutex<Vec<JoinHandle<()>>>,
    lookups: Lookups,
}

impl fmt::Debug for TcpFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpFabric").field("address", &self.address).finish_non_exhaustive()
    }
}

impl TcpFabric {
    /// Listens and starts the threads. The sink is kept until the fabric is dropped.
    ///
    /// # Errors
    /// `Os` naming the address if it cannot be listened on (in use, not this machine's), `Invalid` for a
    /// configuration that cannot work.
    pub fn start(config: TcpConfig, sink: Arc<dyn FabricSink>) -> Result<Arc<Self>, StoreError> {
        check(&config)?;
        let listen = lookup::resolve(&config.listen, true)?;
        let (listener, address) = sys::listen(listen)?;
        let (threads, serving_threads) = (config.threads, config.serving_threads);
        let shared = Arc::new(Shared::new(config, sink, listener, address.port())?);
        let fabric =
            Arc::new(Self { shared, address, threads: Mutex::default(), lookups: Lookups::default() });
        for number in 0..threads {
            fabric.start_thread(format!("tcp-fabric-{number}"), Shared::serve)?;
        }
        for number in 0..serving_threads {
            fabric.start_thread(format!("tcp-serving-{number}"), Shared::serve_reads)?;
        }
        Ok(fabric)
    }

    fn start_thread(&self, name: String, life: fn(&Arc<Shared>)) -> Result<(), StoreError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || life(&shared))
            .map_err(|error| StoreError::os("start a thread of the TCP fabric", error))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    fn link(&self, operation: &'static str, link: LinkId) -> Result<Arc<Link>, StoreError> {
        let found = self.shared.links.read().get(&link).map(Arc::clone);
        found.ok_or_else(|| StoreError::PeerLost {
            operation: operation.into(),
            subject: format!("link {link}"),
            peer: "(unknown)".to_owned(),
            why: "the link is down, or never was".into(),
        })
    }

    fn begin_read(
        &self,
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: Option<RemoteExtent>,
    ) -> Result<(), StoreError> {
        let bytes = match bytes {
            Some((remote, local)) => {
                check_lengths(remote, local)?;
                let piece = self.shared.regions.local("read", local)?;
                Some((remote, piece)).filter(|(_, piece)| piece.len() > 0)
            }
            None => None,
        };
        let link = self.link("read", link)?;
        {
            let mut transfers = self.shared.transfers.lock();
            if transfers.contains_key(&transfer) {
                return Err(StoreError::invalid("read", format!("transfer {transfer} is in progress")));
            }
            transfers.insert(transfer, Arc::clone(&link));
        }
        if bytes.is_none() && word.is_none() {
            let result = Ok(ReadStats::default());
            self.shared.transfers.lock().remove(&transfer);
            self.shared.later(Task::Report(FabricEvent::ReadDone { transfer, result }));
            return Ok(());
        }
        link.read(&self.shared, transfer, bytes, word).inspect_err(|_| {
            self.shared.transfers.lock().remove(&transfer);
        })
    }
}

fn check(config: &TcpConfig) -> Result<(), StoreError> {
    if config.threads == 0 || config.serving_threads == 0 || config.streams == 0 {
        let what = format!(
            "{} and {} threads, {} streams: at least 1 of each is needed",
            config.threads, config.serving_threads, config.streams
        );
        return Err(StoreError::invalid("TCP fabric", what));
    }
    if config.slice_bytes < SLICE_BYTES_MIN {
        let what = format!("slices of {} bytes, at least {SLICE_BYTES_MIN} are needed", config.slice_bytes);
        return Err(StoreError::invalid("TCP fabric", what));
    }
    Ok(())
}

impl Fabric for TcpFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Tcp
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn register(
        &self,
        segment: SegmentId,
        memory: Arc<dyn RegionMemory>,
        access: Access,
    ) -> Result<RemoteKey, StoreError> {
        let key = RemoteKey(u64::from_le_bytes(sys::random()?));
        self.shared.regions.register(segment, key, memory, access)?;
        Ok(key)
    }

    fn deregister(&self, segment: SegmentId) {
        let Some(region) = self.shared.regions.remove(segment) else {
            return;
        };
        let links: Vec<Arc<Link>> = self.shared.links.read().values().map(Arc::clone).collect();
        for link in links {
            let transfers = link.reads.lock().of_segment(segment);
            for transfer in transfers {
                let subject = format!("transfer {transfer}");
                let why =
                    StoreError::stale("read", subject, format!("local segment {segment} was deregistered"));
                link.cancel(&self.shared, transfer, &why);
            }
        }
        region.close();
    }

    fn connect(&self, address: &str) -> Result<LinkId, StoreError> {
        lookup::check(address)?;
        let link = Link::outbound(&self.shared, address)?;
        let (resolved, shared) = (Arc::clone(&link), Arc::clone(&self.shared));
        let then = move |address| resolved.resolved(&shared, address);
        if let Err(why) = self.lookups.start(address, self.address.is_ipv4(), then) {
            link.fail(&self.shared, why);
        }
        Ok(link.id)
    }

    fn disconnect(&self, link: LinkId) {
        let link = self.shared.links.read().get(&link).map(Arc::clone);
        if let Some(link) = link {
            let why = StoreError::unavailable("link", "this node disconnected");
            link.fail(&self.shared, link.lost_because("disconnect", &why));
        }
    }

    /// One system call takes so many, beside the frame.
    fn gather_max(&self) -> usize {
        PARTS_MAX - 1
    }

    fn send(
        &self,
        link: LinkId,
        frame: Frame,
        payload: &[Extent],
        token: SendToken,
    ) -> Result<Sent, StoreError> {
        check_payload(&frame, payload, self.gather_max())?;
        let gather = Gather::of(&self.shared.regions, payload)?;
        self.link("send", link)?.send(&self.shared, frame, gather, token)
    }

    fn read(
        &self,
        link: LinkId,
        transfer: TransferId,
        remote: RemoteExtent,
        local: Extent,
    ) -> Result<(), StoreError> {
        self.begin_read(link, transfer, Some((remote, local)), None)
    }

    fn read_checked(
        &self,
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: RemoteExtent,
    ) -> Result<(), StoreError> {
        check_word(word)?;
        self.begin_read(link, transfer, bytes, Some(word))
    }

    fn cancel(&self, transfer: TransferId) {
        let link = self.shared.transfers.lock().get(&transfer).map(Arc::clone);
        if let Some(link) = link {
            let why = StoreError::stale("read", format!("transfer {transfer}"), "it was cancelled");
            link.cancel(&self.shared, transfer, &why);
        }
    }

    fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        self.shared.progress(timeout, until)
    }

    fn wake(&self) {
        self.shared.seats.announce();
    }

    fn refused(&self) -> u64 {
        self.shared.refused()
    }

    fn stop(&self) {
        self.shared.stop();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() {
                // A thread that panicked has said so already.
                let _ = thread.join();
            }
        }
        for conn in self.shared.take_conns() {
            match conn {
                Conn::Inbound(inbound) => inbound.shut_down(),
                Conn::Link(link) => link.forget(&self.shared),
                Conn::Read(stream) => stream.shut_down(),
                Conn::Serve(stream) => stream.shut_down(),
            }
        }
        self.shared.clear();
        self.shared.regions.close_all();
    }
}

impl Drop for TcpFabric {
    fn drop(&mut self) {
        self.stop();
    }
}
