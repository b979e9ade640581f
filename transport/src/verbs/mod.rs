//! The verbs fabric: RDMA over InfiniBand, RoCE and iWARP, by way of a plugin opened at run time (docs/rdma.md).
//! Not the engine's protocol. Invariant: memory is registered once, when its segment is; a send or a read registers
//! nothing, but a read that the owner carries out by writing (`push`): its target, for as long as it takes.
//!
//! A link has a control connection, which carries frames with their payloads gathered from their extents, and up to two
//! data connections, one for the reads of each end: what goes wrong with a read ends its data connection and nothing else.

pub mod abi;
mod adapters;
mod completion;
mod ends;
mod incoming;
mod ladder;
#[cfg(test)]
mod ladder_tests;
mod links;
mod loopback;
mod patience;
mod plugin;
mod proof;
mod push;
#[cfg(test)]
mod seam_tests;
mod shared;
mod slots;
mod state;
#[cfg(test)]
mod steady_tests;
mod wire;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hetmem_core::wire::Frame;
use hetmem_core::{
    Epoch, Extent, LinkId, NodeId, RemoteExtent, RemoteKey, SegmentId, StoreError, TransferId,
};
use parking_lot::Mutex;

use self::adapters::Segment;
use self::links::{Read, Stage, stretches_of};
use self::plugin::{Context, Device, Plugin, device_name};
pub use self::proof::{Direction, MemoryKind, Outcome, Proof, Scratch};
use self::push::Wanted;
use self::shared::Shared;
use self::state::{State, prove_all};
use self::wire::{LinkToken, Owner};
use crate::fabric::{
    Access, Fabric, FabricEvent, FabricKind, FabricSink, SendToken, Sent, check_lengths, check_payload,
    check_word,
};
use crate::lookup::{self, Lookups};
use crate::memory::{HeapRegion, RegionMemory};
use crate::payload::Gather;

/// The most extents of one payload.
const GATHER_MAX: usize = 1023;

/// How a verbs fabric is set up.
#[derive(Clone)]
pub struct VerbsConfig {
    /// The plugin's file; none: looked for beside the program and in `../lib/hetmem`.
    pub plugin: Option<PathBuf>,
    /// Where to listen, as `host:port`; port 0 picks a free one.
    pub listen: String,
    /// Threads that call the sink, besides callers of `progress`.
    pub threads: usize,
    /// Bytes asked for in one piece of work.
    pub slice_bytes: u64,
    /// How long a caller of `progress`, or a thread that has just done something, looks on before it sleeps, at least: up
    /// to twenty times as long where what comes next has lately come in that time.
    pub busy_poll: Duration,
    /// Memory of other kinds than the host's, to try at start what adapters can do with it.
    pub scratches: Vec<Arc<dyn Scratch>>,
    /// Whether peers are to ask for large objects to be written into their memory, rather than read them.
    pub push: bool,
    /// The most links, in and out.
    pub links_max: usize,
    /// The most connections: one for each link, and more for reads. Beyond that, the one for reads that has not been used
    /// for longest is closed; it is made again when it is wanted.
    pub connections_max: usize,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            plugin: None,
            listen: "0.0.0.0:0".to_owned(),
            threads: 2,
            slice_bytes: 1 << 20,
            busy_poll: Duration::from_micros(50),
            scratches: Vec::new(),
            push: false,
            links_max: 1024,
            connections_max: 4096,
        }
    }
}

impl fmt::Debug for VerbsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerbsConfig").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Names of the RDMA devices of this machine.
///
/// # Errors
/// `Unavailable` naming what is missing.
pub fn verbs_devices(plugin: Option<&std::path::Path>) -> Result<Vec<String>, StoreError> {
    Ok(Plugin::load(plugin)?.devices().iter().map(device_name).collect())
}

/// Tries what the RDMA devices of this machine that have an address can do with the host's memory; of each its name and what
/// was found.
///
/// # Errors
/// `Unavailable` naming what is missing.
pub fn verbs_proofs(plugin: Option<&std::path::Path>) -> Result<Vec<(String, Vec<Proof>)>, StoreError> {
    let context = Context::open(Plugin::load(plugin)?)?;
    let scratches = scratches_with(&[]);
    let of = |raw| {
        let device = Device::own(&context, raw);
        let name = device_name(&device.limits()?);
        let proofs = prove_all(&context, &device, &name, &scratches);
        Ok((name, proofs))
    };
    context.devices().into_iter().map(of).collect()
}

/// The host's memory, and these.
fn scratches_with(others: &[Arc<dyn Scratch>]) -> Vec<Arc<dyn Scratch>> {
    let host: Arc<dyn Scratch> = Arc::new(Arc::new(HeapRegion::new(proof::LEN)));
    std::iter::once(host).chain(others.iter().cloned()).collect()
}

/// A fabric over RDMA verbs.
pub struct VerbsFabric {
    shared: Arc<Shared>,
    address: SocketAddr,
    lookups: Lookups,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for VerbsFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerbsFabric").field("address", &self.address).finish_non_exhaustive()
    }
}

impl VerbsFabric {
    /// Opens the plugin, listens and starts the threads. The sink is kept until the fabric is dropped.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing (the plugin, a library, a device), `Os` if the address cannot be listened on.
    pub fn start(config: &VerbsConfig, sink: Arc<dyn FabricSink>) -> Result<Arc<Self>, StoreError> {
        Self::start_over(Plugin::load(config.plugin.as_deref())?, config, sink)
    }

    fn start_over(
        plugin: Plugin,
        config: &VerbsConfig,
        sink: Arc<dyn FabricSink>,
    ) -> Result<Arc<Self>, StoreError> {
        let context = Context::open(plugin)?;
        let (listener, address) = context.listen(lookup::resolve(&config.listen, true)?, 0)?;
        let mut state = State::new(Arc::clone(&context), listener, address, config.threads.max(1));
        (state.slice_bytes, state.links_max) = (config.slice_bytes.max(1), config.links_max);
        (state.connections_max, state.push) = (config.connections_max, config.push);
        state.scratches = scratches_with(&config.scratches);
        state.open_adapters()?;
        state.scratches.clear();
        let shared = Arc::new(Shared::new(sink, context, state, config.busy_poll)?);
        let fabric =
            Arc::new(Self { shared, address, lookups: Lookups::default(), threads: Mutex::default() });
        for number in 0..config.threads.max(1) {
            let shared = Arc::clone(&fabric.shared);
            let thread = std::thread::Builder::new()
                .name(format!("verbs-fabric-{number}"))
                .spawn(move || shared.serve())
                .map_err(|error| StoreError::os("start a thread of the verbs fabric", error))?;
            fabric.threads.lock().push(thread);
        }
        Ok(fabric)
    }

    /// Says whose this fabric is: from now on its connections say so to peers, which then take a data connection only
    /// from the node, and the incarnation of it, that the link is of.
    pub fn identify(&self, node: NodeId, epoch: Epoch) {
        self.shared.state.lock().owner = Owner { node, epoch };
    }

    /// How many connections there are, those included that are being made.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.state.lock().connections()
    }

    /// How many of them go through each device, by its name.
    #[must_use]
    pub fn connections_by_device(&self) -> Vec<(String, usize)> {
        self.shared.state.lock().connections_by_device()
    }

    /// Whether reads may be given memory of the device with this number as their target: every adapter was seen to put bytes
    /// there when the fabric was started.
    #[must_use]
    pub fn reads_into(&self, device: u16) -> bool {
        let state = self.shared.state.lock();
        !state.adapters.is_empty() && state.adapters.values().all(|adapter| adapter.reads_into(device))
    }

    /// How many adapters there are.
    #[must_use]
    pub fn adapters(&self) -> usize {
        self.shared.state.lock().adapters.len()
    }

    fn begin_read(
        &self,
        link: LinkId,
        transfer: TransferId,
        bytes: Option<(RemoteExtent, Extent)>,
        word: Option<RemoteExtent>,
    ) -> Result<(), StoreError> {
        let mut local = None;
        if let Some((remote, extent)) = bytes {
            check_lengths(remote, extent)?;
            local = Some((remote, self.shared.regions.local("read", extent)?)).filter(|(_, it)| it.len() > 0);
        }
        let mut state = self.shared.state.lock();
        if state.transfers.contains_key(&transfer) {
            return Err(StoreError::invalid("read", format!("transfer {transfer} is in progress")));
        }
        let Some(found) = state.links.get_mut(&link).filter(|link| link.stage == Stage::Up) else {
            return Err(no_link("read", link));
        };
        let remote =
            local.as_ref().map_or(Ok((Vec::new(), false)), |(remote, _)| stretches_of(found, *remote));
        let place =
            word.map_or(Ok(None), |word| stretches_of(found, word).map(|(found, _)| found.first().copied()));
        let result = match (remote, place) {
            (Ok((stretches, by_push)), Ok(place)) if !stretches.is_empty() || place.is_some() => {
                let wanted = local.as_ref().filter(|_| by_push).map(|(remote, _)| *remote);
                let push = wanted.map(|from| Wanted::new(from, found.push_number()));
                let read = Read::new(transfer, local.map(|(_, local)| local), stretches, place, push);
                found.begin_read(read)?;
                state.transfers.insert(transfer, link);
                state.post(link);
                None
            }
            (Ok(_), Ok(_)) => Some(Ok(crate::fabric::ReadStats::default())),
            (Err(why), _) | (_, Err(why)) => Some(Err(why)),
        };
        if let Some(result) = result {
            state.report(link, FabricEvent::ReadDone { transfer, result });
        }
        self.look_after(state);
        Ok(())
    }

    /// Effects are carried out by whoever has the turn, which a caller of the fabric must not take.
    fn look_after(&self, state: parking_lot::MutexGuard<'_, State>) {
        let any = state.has_effects() || !state.unwatched.is_empty();
        drop(state);
        if any {
            self.shared.ring();
            self.shared.seats.announce();
        }
    }
}

fn no_link(operation: &'static str, link: LinkId) -> StoreError {
    StoreError::PeerLost {
        operation: operation.into(),
        subject: format!("link {link}"),
        peer: "(unknown)".to_owned(),
        why: "the link is down, or never was".into(),
    }
}

impl Fabric for VerbsFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Verbs
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
        let key = RemoteKey(crate::tcp::random_number()?);
        self.shared.regions.register(segment, key, Arc::clone(&memory), access)?;
        let mut state = self.shared.state.lock();
        if let Err(why) = state.register(segment, Segment { key, memory, access }) {
            drop(state);
            if let Some(region) = self.shared.regions.remove(segment) {
                region.close();
            }
            return Err(why);
        }
        state.post_all();
        self.look_after(state);
        Ok(key)
    }

    fn deregister(&self, segment: SegmentId) {
        let Some(region) = self.shared.regions.remove(segment) else {
            return;
        };
        let mut state = self.shared.state.lock();
        state.deregister(segment);
        self.look_after(state);
        region.close();
    }

    fn connect(&self, address: &str) -> Result<LinkId, StoreError> {
        lookup::check(address)?;
        let mine = LinkToken(crate::tcp::random_number()?);
        let link = self.shared.state.lock().new_link(address, mine)?;
        let shared = Arc::clone(&self.shared);
        let then = move |peer: Result<SocketAddr, StoreError>| {
            let mut state = shared.state.lock();
            if let Err(why) = peer.and_then(|peer| state.dial(link, peer)) {
                state.disconnect(link, &why);
            }
            drop(state);
            // Somebody has to look when it takes too long, and if it is over already.
            shared.ring();
        };
        if let Err(why) = self.lookups.start(address, self.address.is_ipv4(), then) {
            self.shared.state.lock().disconnect(link, &why);
            self.shared.ring();
        }
        Ok(link)
    }

    fn disconnect(&self, link: LinkId) {
        let mut state = self.shared.state.lock();
        state.disconnect(link, &StoreError::unavailable("link", "this node disconnected"));
        self.look_after(state);
    }

    fn gather_max(&self) -> usize {
        GATHER_MAX
    }

    fn send(
        &self,
        link: LinkId,
        frame: Frame,
        payload: &[Extent],
        token: SendToken,
    ) -> Result<Sent, StoreError> {
        check_payload(&frame, payload, GATHER_MAX)?;
        let gather = Gather::of(&self.shared.regions, payload)?;
        let sent = if gather.is_some() { Sent::Pending } else { Sent::Done };
        let mut state = self.shared.state.lock();
        let Some(found) = state.links.get_mut(&link).filter(|link| link.stage == Stage::Up) else {
            return Err(no_link("send", link));
        };
        found.queue(frame.into_bytes(), gather, token)?;
        state.post(link);
        self.look_after(state);
        Ok(sent)
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
        let mut state = self.shared.state.lock();
        let why = StoreError::stale("read", format!("transfer {transfer}"), "it was cancelled");
        state.give_up(transfer, &why);
        self.look_after(state);
    }

    fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) -> bool {
        self.shared.progress(timeout, until)
    }

    fn wake(&self) {
        self.shared.seats.announce();
    }

    fn stop(&self) {
        self.shared.stop();
        let mut inside = false;
        for thread in std::mem::take(&mut *self.threads.lock()) {
            if thread.thread().id() == std::thread::current().id() {
                inside = true;
            } else {
                // A thread that panicked has said so already.
                let _ = thread.join();
            }
        }
        self.shared.clear(inside);
    }

    fn refused(&self) -> u64 {
        self.shared.state.lock().refused
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        self.stop();
    }
}
