//! Measures the TCP fabric between two processes on loopback against bare blocking loops over one TCP stream that
//! move the same bytes, alternating in one run. Not a test: it asserts nothing. The answering process is this
//! program again, started with `owner`.
//!
//! `cargo run --release -p hetmem-transport --example loopback -- [KEY=VALUE ...]` with the keys `rounds`, `streams`,
//! `slice_kib`, `send_kib`, `receive_kib`, `threads`, `len_mib`, `pings`, `busy_us`, `bare_reno` (1: the bare streams use the
//! congestion control that the fabric chooses on one machine, rather than the system's).

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hetmem_core::wire::{Frame, FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, RemoteKey, SegmentId, TransferId};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, LandingToken, SendToken, TcpConfig,
    TcpFabric,
};

const SEGMENT: SegmentId = SegmentId(1);
const PING_BODY: [u8; 64] = [7; 64];
const PONG_LEN: usize = 1024;
const WAIT: Duration = Duration::from_secs(30);

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy)]
struct Options {
    rounds: usize,
    streams: usize,
    slice_kib: usize,
    send_kib: usize,
    receive_kib: usize,
    threads: usize,
    len_mib: usize,
    pings: usize,
    busy_us: u64,
    bare_reno: usize,
}

impl Options {
    fn parse(arguments: &[String]) -> Outcome<Self> {
        let defaults = TcpConfig::default();
        let mut options = Self {
            rounds: 15,
            streams: defaults.streams,
            slice_kib: defaults.slice_bytes >> 10,
            send_kib: defaults.send_buffer_bytes >> 10,
            receive_kib: defaults.receive_buffer_bytes >> 10,
            threads: defaults.threads,
            len_mib: 64,
            pings: 2000,
            busy_us: u64::try_from(defaults.busy_poll.as_micros())?,
            bare_reno: 0,
        };
        for argument in arguments {
            let (key, value) = argument.split_once('=').ok_or("arguments are KEY=VALUE")?;
            let value: usize = value.parse()?;
            match key {
                "rounds" => options.rounds = value,
                "streams" => options.streams = value,
                "slice_kib" => options.slice_kib = value,
                "send_kib" => options.send_kib = value,
                "receive_kib" => options.receive_kib = value,
                "threads" => options.threads = value,
                "len_mib" => options.len_mib = value,
                "pings" => options.pings = value,
                "busy_us" => options.busy_us = value as u64,
                "bare_reno" => options.bare_reno = value,
                _ => return Err(format!("unknown key {key}").into()),
            }
        }
        Ok(options)
    }

    fn prepare(self, bare: &TcpStream) -> Outcome<()> {
        bare.set_nodelay(true)?;
        if self.bare_reno == 1 {
            rustix::net::sockopt::set_tcp_congestion(bare, "reno")?;
        }
        Ok(())
    }

    fn config(self) -> TcpConfig {
        TcpConfig {
            streams: self.streams,
            slice_bytes: self.slice_kib << 10,
            send_buffer_bytes: self.send_kib << 10,
            receive_buffer_bytes: self.receive_kib << 10,
            threads: self.threads,
            busy_poll: Duration::from_micros(self.busy_us),
            ..TcpConfig::default()
        }
    }
}

/// Answers every frame with `PONG_LEN` bytes of payload, or notes what it is told.
#[derive(Default)]
struct Sink {
    answers_through: OnceLock<Arc<TcpFabric>>,
    ups: AtomicU64,
    reads: AtomicU64,
    landed: AtomicU64,
}

impl FabricSink for Sink {
    fn message(&self, link: LinkId, header: FrameHeader, _body: &[u8]) -> Landing {
        if header.payload_len > 0 {
            let extent = Extent { segment: SEGMENT, offset: 0, len_bytes: header.payload_len };
            return Landing::whole(extent, LandingToken(header.request));
        }
        if let Some(fabric) = self.answers_through.get() {
            let payload = Extent { segment: SEGMENT, offset: 0, len_bytes: PONG_LEN as u64 };
            if let Ok(frame) = ping(header.request, PONG_LEN as u64) {
                let _ = fabric.send(link, frame, &[payload], SendToken(0));
            }
        }
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        match event {
            FabricEvent::LinkUp { .. } => self.ups.fetch_add(1, Ordering::Release),
            FabricEvent::ReadDone { result: Ok(_), .. } => self.reads.fetch_add(1, Ordering::Release),
            FabricEvent::Landed { result: Ok(_), .. } => self.landed.fetch_add(1, Ordering::Release),
            FabricEvent::LinkDown { .. }
            | FabricEvent::ReadDone { .. }
            | FabricEvent::Landed { .. }
            | FabricEvent::SendDone { .. } => 0,
        };
    }
}

fn ping(request: u64, payload_len: u64) -> Result<Frame, hetmem_core::StoreError> {
    encode(FrameKind::Peer, request, &PING_BODY.as_slice(), payload_len)
}

fn warm_region(len: usize) -> Arc<HeapRegion> {
    let region = Arc::new(HeapRegion::new(len));
    region.write(0, &vec![0x5a; len]);
    region
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("owner") => owner(Options::parse(&arguments[1..])?),
        _ => measure(Options::parse(&arguments)?, &arguments),
    }
}

#[allow(clippy::print_stdout, reason = "how the other process learns where to connect")]
fn owner(options: Options) -> Outcome<()> {
    let len = options.len_mib << 20;
    let sink = Arc::<Sink>::default();
    let fabric = TcpFabric::start(options.config(), Arc::clone(&sink) as _)?;
    let key = fabric.register(SEGMENT, warm_region(len), Access::RemoteRead)?;
    let _ = sink.answers_through.set(Arc::clone(&fabric));
    let bare = TcpListener::bind("127.0.0.1:0")?;
    println!("{} {} {}", fabric.address(), key, bare.local_addr()?);
    let (mut stream, _) = bare.accept()?;
    options.prepare(&stream)?;
    let bytes = vec![0x5a_u8; len];
    let pong = vec![0; ping(0, 0)?.as_bytes().len() + PONG_LEN];
    let mut request = vec![0; ping(0, 0)?.as_bytes().len()];
    while stream.read_exact(&mut request).is_ok() {
        if request[0] == 0 {
            stream.write_all(&pong)?;
        } else {
            stream.write_all(&bytes)?;
        }
    }
    Ok(())
}

struct Reader {
    fabric: Arc<TcpFabric>,
    sink: Arc<Sink>,
    link: LinkId,
    remote: RemoteExtent,
    bare: TcpStream,
    bare_target: Vec<u8>,
    request: Vec<u8>,
}

impl Reader {
    fn fabric_read(&self, number: u64) -> Outcome<Duration> {
        let local = Extent { segment: SEGMENT, offset: 0, len_bytes: self.remote.len_bytes };
        let before = self.sink.reads.load(Ordering::Acquire);
        let start = Instant::now();
        self.fabric.read(self.link, TransferId(number), self.remote, local)?;
        let done = || self.sink.reads.load(Ordering::Acquire) > before;
        if !self.fabric.progress(WAIT, &done) {
            return Err("a read did not end".into());
        }
        Ok(start.elapsed())
    }

    fn bare_read(&mut self) -> Outcome<Duration> {
        let start = Instant::now();
        self.request[0] = 1;
        self.bare.write_all(&self.request)?;
        self.bare.read_exact(&mut self.bare_target)?;
        Ok(start.elapsed())
    }

    fn fabric_ping(&self, number: u64) -> Outcome<Duration> {
        let before = self.sink.landed.load(Ordering::Acquire);
        let start = Instant::now();
        let _ = self.fabric.send(self.link, ping(number, 0)?, &[], SendToken(0))?;
        let done = || self.sink.landed.load(Ordering::Acquire) > before;
        if !self.fabric.progress(WAIT, &done) {
            return Err("an answer did not come".into());
        }
        Ok(start.elapsed())
    }

    fn bare_ping(&mut self) -> Outcome<Duration> {
        let start = Instant::now();
        self.request[0] = 0;
        self.bare.write_all(&self.request)?;
        let len = self.request.len() + PONG_LEN;
        self.bare.read_exact(&mut self.bare_target[..len])?;
        Ok(start.elapsed())
    }
}

#[allow(clippy::print_stdout, reason = "the figures")]
fn measure(options: Options, arguments: &[String]) -> Outcome<()> {
    let len = options.len_mib << 20;
    let mut child =
        Command::new(std::env::current_exe()?).arg("owner").args(arguments).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let [address, key, bare] = line.split_whitespace().collect::<Vec<_>>()[..] else {
        return Err("the owner did not start".into());
    };
    let sink = Arc::<Sink>::default();
    let fabric = TcpFabric::start(options.config(), Arc::clone(&sink) as _)?;
    fabric.register(SEGMENT, warm_region(len), Access::Local)?;
    let link = fabric.connect(address)?;
    fabric.progress(WAIT, &|| sink.ups.load(Ordering::Acquire) > 0);
    let bare = TcpStream::connect(bare)?;
    options.prepare(&bare)?;
    let remote = RemoteExtent { key: RemoteKey(key.parse()?), offset: 0, len_bytes: len as u64 };
    let request = vec![0; ping(0, 0)?.as_bytes().len()];
    let mut reader = Reader { fabric, sink, link, remote, bare, bare_target: vec![1; len], request };

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for number in 0..=options.rounds as u64 {
        ours.push(reader.fabric_read(number)?);
        theirs.push(reader.bare_read()?);
    }
    let (ours, theirs) = (median(&ours[1..]), median(&theirs[1..]));
    let gib = |time: Duration| len as f64 / (1_u64 << 30) as f64 / time.as_secs_f64();
    println!(
        "read {} MiB: fabric {:.2} GiB/s, bare {:.2} GiB/s, ratio {:.3}",
        options.len_mib,
        gib(ours),
        gib(theirs),
        theirs.as_secs_f64() / ours.as_secs_f64()
    );

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..10_u64 {
        for number in 0..options.pings as u64 / 10 {
            ours.push(reader.fabric_ping(round * 1_000_000 + number)?);
        }
        for _ in 0..options.pings / 10 {
            theirs.push(reader.bare_ping()?);
        }
    }
    let (ours, theirs) = (median(&ours), median(&theirs));
    println!(
        "ping {PONG_LEN} B: fabric {:.1} us, bare {:.1} us, ratio {:.3}",
        ours.as_secs_f64() * 1e6,
        theirs.as_secs_f64() * 1e6,
        ours.as_secs_f64() / theirs.as_secs_f64()
    );
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
