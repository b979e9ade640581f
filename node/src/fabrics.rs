//! The fabrics of one node: TCP, and RDMA verbs where there is a device. Which of them a link is of, which is tried first,
//! and what happens when that fails. Not what goes over them. Invariant: with `fabric = verbs` nothing goes over TCP, and
//! wherever TCP stands in for verbs that is logged once for each peer and counted.
//!
//! A peer is dialled at one address, host and port. RDMA connections go to the port after it: RDMA over InfiniBand and
//! RoCE has ports of its own, but iWARP shares those of TCP.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hetmem_core::engine::{FabricId, FabricUse};
use hetmem_core::wire::Member;
use hetmem_core::{ErrorKind, LinkId, RemoteKey, SegmentId, StoreError, Tier, TransferId};
use hetmem_transport::{
    Access, Fabric, FabricKind, RegionMemory, Scratch, TcpConfig, TcpFabric, VerbsConfig, VerbsFabric,
    verbs_devices,
};
use parking_lot::Mutex;

use crate::config::{Config, FabricChoice};
use crate::peers::Sink;
use crate::tiers::Tiers;
use crate::visibility::Visibility;

pub(crate) const TCP: FabricId = FabricId(0);
pub(crate) const VERBS: FabricId = FabricId(1);

/// How long a peer that verbs did not reach is dialled over TCP.
const AVOIDED: Duration = Duration::from_secs(60);
/// How long after that it is remembered that this was logged.
const FORGOTTEN: Duration = Duration::from_secs(3600);
/// Free ports that are tried until the next one is free too.
const PORTS_TRIED: usize = 16;

pub(crate) struct Fabrics {
    tcp: Option<Arc<TcpFabric>>,
    verbs: Option<Arc<VerbsFabric>>,
    /// Verbs have failed in a way that does not mend itself.
    verbs_given_up: AtomicBool,
    /// Peers that verbs did not reach, and until when TCP is used instead.
    avoided: Mutex<HashMap<String, Instant>>,
    fallbacks: AtomicU64,
}

/// Which fabric a fabric of this kind is to the engine.
pub(crate) const fn id_of(link: LinkId) -> FabricId {
    match FabricKind::of_link(link) {
        FabricKind::Verbs => VERBS,
        _ => TCP,
    }
}

impl Fabrics {
    /// Starts the fabrics that the configuration asks for.
    ///
    /// # Errors
    /// Those of the fabric that has to be there; with `auto` that is TCP.
    pub(crate) fn start(config: &Config, sink: &Arc<Sink>, tiers: &Tiers) -> Result<Self, StoreError> {
        let (tcp, verbs) = match config.fabric {
            FabricChoice::Tcp => (Some(start_tcp(config, sink)?), None),
            FabricChoice::Verbs | FabricChoice::VerbsPush => {
                (None, Some(start_verbs(config, &config.listen, sink, &scratches(config, tiers))?))
            }
            FabricChoice::Auto => start_both(config, sink, &scratches(config, tiers))?,
        };
        Ok(Self {
            tcp,
            verbs,
            verbs_given_up: AtomicBool::new(false),
            avoided: Mutex::default(),
            fallbacks: AtomicU64::new(0),
        })
    }

    /// Where peers connect to.
    ///
    /// # Errors
    /// `Invalid` for an address that a fabric made up, which is a defect.
    pub(crate) fn address(&self) -> Result<String, StoreError> {
        match (&self.tcp, &self.verbs) {
            (Some(tcp), _) => Ok(tcp.address()),
            (None, Some(verbs)) => moved(&verbs.address(), -1),
            (None, None) => Err(no_fabric()),
        }
    }

    /// Says whose the fabrics are, before any peer is dialled.
    pub(crate) fn identify(&self, member: &Member) {
        if let Some(verbs) = &self.verbs {
            verbs.identify(member.node, member.epoch);
        }
    }

    fn verbs(&self) -> Option<&Arc<VerbsFabric>> {
        self.verbs.as_ref().filter(|_| !self.verbs_given_up.load(Ordering::Acquire))
    }

    fn all(&self) -> impl Iterator<Item = (FabricId, Arc<dyn Fabric>)> {
        let tcp = self.tcp.as_ref().map(|tcp| (TCP, Arc::clone(tcp) as Arc<dyn Fabric>));
        let verbs = self.verbs().map(|verbs| (VERBS, Arc::clone(verbs) as Arc<dyn Fabric>));
        tcp.into_iter().chain(verbs)
    }

    /// The fabric that carries a link.
    pub(crate) fn of(&self, link: LinkId) -> Option<&dyn Fabric> {
        match FabricKind::of_link(link) {
            FabricKind::Verbs => self.verbs.as_deref().map(|verbs| verbs as &dyn Fabric),
            _ => self.tcp.as_deref().map(|tcp| tcp as &dyn Fabric),
        }
    }

    /// Registers a segment with every fabric. With `auto`, verbs that cannot register it are given up: a segment that
    /// peers cannot read over a link would fail their gets.
    ///
    /// # Errors
    /// Those of [`Fabric::register`].
    pub(crate) fn register(
        &self,
        segment: SegmentId,
        memory: &Arc<dyn RegionMemory>,
        access: Access,
    ) -> Result<Vec<(FabricId, RemoteKey)>, StoreError> {
        let mut keys = Vec::new();
        for (id, fabric) in self.all() {
            match fabric.register(segment, Arc::clone(memory), access) {
                Ok(key) => keys.push((id, key)),
                Err(why) if id == VERBS && self.tcp.is_some() => {
                    tracing::warn!(%segment, %why, "RDMA is not used: its device did not take a segment");
                    self.verbs_given_up.store(true, Ordering::Release);
                    fabric.stop();
                }
                Err(why) => {
                    self.deregister(segment);
                    return Err(why);
                }
            }
        }
        Ok(keys)
    }

    /// Registers memory of a GPU with every fabric that reaches it. None is no reason to give anything up.
    pub(crate) fn register_device(
        &self,
        segment: SegmentId,
        ordinal: u16,
        memory: &Arc<dyn RegionMemory>,
        access: Access,
    ) -> Vec<(FabricId, RemoteKey)> {
        let mut keys = Vec::new();
        for (id, fabric) in self.all() {
            match fabric.register(segment, Arc::clone(memory), access) {
                Ok(key) => keys.push((id, key)),
                Err(why) => {
                    let fabric = fabric.kind();
                    tracing::info!(%segment, gpu = ordinal, %fabric, %why, "its bytes pass through host memory");
                }
            }
        }
        keys
    }

    pub(crate) fn deregister(&self, segment: SegmentId) {
        for (_, fabric) in self.all() {
            fabric.deregister(segment);
        }
    }

    /// What GPUs see of what adapters write into their memory.
    pub(crate) fn visibility(&self, tiers: &Tiers) -> Visibility {
        let Some(verbs) = self.verbs() else {
            return Visibility::default();
        };
        let nics = u32::try_from(verbs.adapters()).unwrap_or(u32::MAX);
        Visibility::of(tiers.described().filter(|device| verbs.reads_into(device.ordinal)), nics)
    }

    /// What the engine is to know, given the keys of the index.
    pub(crate) fn uses(
        &self,
        index_keys: &[(FabricId, RemoteKey)],
        tiers: &Tiers,
        visibility: &Visibility,
    ) -> Vec<FabricUse> {
        let key_of = |id| index_keys.iter().find(|(of, _)| *of == id).map(|(_, key)| *key);
        self.all()
            .filter_map(|(id, fabric)| {
                let (name, gather_max) = (fabric.kind().to_string().into(), fabric.gather_max());
                let stages_gpus = id == TCP;
                let tiers = match stages_gpus {
                    true => tiers.described().map(|device| Tier::Gpu(device.ordinal)).collect(),
                    false => visibility.gpus().map(Tier::Gpu).collect(),
                };
                Some(FabricUse { id, name, index_key: key_of(id)?, gather_max, tiers, stages_gpus })
            })
            .collect()
    }

    /// Dials a peer, over verbs first.
    ///
    /// # Errors
    /// Those of [`Fabric::connect`] of the fabric that was tried last.
    pub(crate) fn connect(&self, address: &str) -> Result<LinkId, StoreError> {
        if let Some(verbs) = self.verbs()
            && (self.tcp.is_none() || !self.is_avoided(address))
        {
            match moved(address, 1).and_then(|address| verbs.connect(&address)) {
                Ok(link) => return Ok(link),
                Err(why) => return self.connect_otherwise(address, &why),
            }
        }
        self.tcp.as_ref().ok_or_else(no_fabric)?.connect(address)
    }

    /// A link that was dialled over verbs did not come up: dials over TCP.
    ///
    /// # Errors
    /// The reason, if TCP is not to be used; those of [`Fabric::connect`].
    pub(crate) fn connect_otherwise(&self, address: &str, why: &StoreError) -> Result<LinkId, StoreError> {
        let Some(tcp) = &self.tcp else {
            return Err(why.clone());
        };
        let link = tcp.connect(address)?;
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let before = {
            let mut avoided = self.avoided.lock();
            avoided.retain(|_, until| *until + FORGOTTEN > now);
            avoided.insert(address.to_owned(), now + AVOIDED)
        };
        if before.is_none() {
            tracing::warn!(address, %why, "a peer is not reached over RDMA: TCP is used");
        }
        Ok(link)
    }

    fn is_avoided(&self, address: &str) -> bool {
        self.avoided.lock().get(address).is_some_and(|until| Instant::now() < *until)
    }

    pub(crate) fn cancel(&self, transfer: TransferId) {
        for (_, fabric) in self.all() {
            fabric.cancel(transfer);
        }
    }

    /// The fabric on which callers inside this process work while they wait. The others are worked on by their own
    /// threads, and what these bring is announced by [`Self::wake`].
    fn driven(&self) -> Option<&dyn Fabric> {
        let verbs = self.verbs().map(|verbs| &**verbs as &dyn Fabric);
        verbs.or(self.tcp.as_deref().map(|tcp| tcp as &dyn Fabric))
    }

    /// See [`Fabric::progress`].
    pub(crate) fn progress(&self, timeout: Duration, until: &dyn Fn() -> bool) {
        if let Some(fabric) = self.driven() {
            fabric.progress(timeout, until);
        }
    }

    /// Makes callers of `progress` look again, unless they will do so anyway because this thread is inside the sink of
    /// the fabric that they work on.
    pub(crate) fn wake(&self, in_sink_of: Option<FabricKind>) {
        if let Some(fabric) = self.driven()
            && in_sink_of != Some(fabric.kind())
        {
            fabric.wake();
        }
    }

    pub(crate) fn fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.all().map(|(_, fabric)| fabric.refused()).sum()
    }

    pub(crate) fn stop(&self) {
        for (_, fabric) in self.all() {
            fabric.stop();
        }
    }
}

fn no_fabric() -> StoreError {
    StoreError::unavailable("fabric", "this node has none")
}

fn start_tcp(config: &Config, sink: &Arc<Sink>) -> Result<Arc<TcpFabric>, StoreError> {
    let mut tcp = TcpConfig { listen: config.listen.clone(), ..TcpConfig::default() };
    if let Some(streams) = config.streams {
        tcp.streams = streams;
    }
    TcpFabric::start(tcp, sink.of(FabricKind::Tcp))
}

/// GPU memory to try RDMA devices with, where there are both. Costs a context on each of these GPUs.
fn scratches(config: &Config, tiers: &Tiers) -> Vec<Arc<dyn Scratch>> {
    let plugin = config.verbs_plugin.as_deref();
    if tiers.uses().is_empty() || !verbs_devices(plugin).is_ok_and(|devices| !devices.is_empty()) {
        return Vec::new();
    }
    tiers.scratches()
}

/// Verbs beside an address for TCP: at the port after it, or, if that is to be any, at any.
fn start_verbs(
    config: &Config,
    listen: &str,
    sink: &Arc<Sink>,
    scratches: &[Arc<dyn Scratch>],
) -> Result<Arc<VerbsFabric>, StoreError> {
    let listen = if listen.ends_with(":0") { listen.to_owned() } else { moved(listen, 1)? };
    let (plugin, push) = (config.verbs_plugin.clone(), config.fabric == FabricChoice::VerbsPush);
    let scratches = scratches.to_vec();
    let verbs = VerbsConfig { plugin, listen, push, scratches, ..VerbsConfig::default() };
    VerbsFabric::start(&verbs, sink.of(FabricKind::Verbs))
}

type Both = (Option<Arc<TcpFabric>>, Option<Arc<VerbsFabric>>);

/// TCP, and verbs at the port after it if there are any.
fn start_both(config: &Config, sink: &Arc<Sink>, scratches: &[Arc<dyn Scratch>]) -> Result<Both, StoreError> {
    let any_port = config.listen.ends_with(":0");
    for turn in 1.. {
        let tcp = start_tcp(config, sink)?;
        match start_verbs(config, &tcp.address(), sink, scratches) {
            Ok(verbs) => return Ok((Some(tcp), Some(verbs))),
            Err(why) if any_port && turn < PORTS_TRIED && is_in_use(&why) => tcp.stop(),
            Err(why) => {
                tracing::info!(%why, "RDMA is not used");
                return Ok((Some(tcp), None));
            }
        }
    }
    Err(no_fabric())
}

fn is_in_use(why: &StoreError) -> bool {
    why.kind() == ErrorKind::Os && why.to_string().contains("in use")
}

/// An address with another port.
fn moved(address: &str, by: i16) -> Result<String, StoreError> {
    let wrong =
        || StoreError::invalid("address", format!("{address:?} has no port beside which RDMA listens"));
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let port = port.checked_add_signed(by).filter(|port| *port > 0).ok_or_else(wrong)?;
    Ok(format!("{host}:{port}"))
}

/// Whether peers from other machines can reach an address.
pub(crate) fn is_exposed(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| !address.ip().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rdma_is_at_the_port_after() {
        assert_eq!(moved("10.0.0.1:7733", 1).as_deref(), Ok("10.0.0.1:7734"));
        assert_eq!(moved("[fe80::1]:7734", -1).as_deref(), Ok("[fe80::1]:7733"));
        for (wrong, by) in [("host", 1), ("host:", 1), ("host:65535", 1), ("host:1", -1), ("host:x", 1)] {
            let why = moved(wrong, by).expect_err(wrong).to_string();
            assert!(why.contains(wrong), "{why}");
        }
    }

    #[test]
    fn a_link_tells_its_fabric() {
        assert_eq!((id_of(LinkId(16)), id_of(LinkId(1 << 63))), (TCP, VERBS));
    }
}
