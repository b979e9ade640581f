//! The conformance suite on RDMA verbs, where there is a device: `HETMEM_VERBS_ADDRESS` names an address of one, and
//! `HETMEM_VERBS_PLUGIN` the plugin. Not a test of any device's speed.
#![allow(clippy::print_stdout, reason = "says why nothing was tested")]

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hetmem_core::wire::FrameHeader;
use hetmem_core::{Epoch, Extent, LinkId, NodeId, RemoteExtent, RemoteKey, SegmentId, TransferId};
use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, VerbsConfig, VerbsFabric,
    conformance_suite, verbs_devices,
};

struct Device {
    push: bool,
}

fn address() -> Option<IpAddr> {
    std::env::var("HETMEM_VERBS_ADDRESS").ok()?.parse().ok()
}

fn plugin() -> Option<PathBuf> {
    std::env::var_os("HETMEM_VERBS_PLUGIN").map(PathBuf::from)
}

fn config() -> VerbsConfig {
    let listen = format!("{}:0", address().expect("looked at before"));
    VerbsConfig { plugin: plugin(), listen, ..VerbsConfig::default() }
}

/// Whether there is a device to test on; each test says why it is skipped.
fn is_ready() -> bool {
    if address().is_none() {
        println!("skipped: HETMEM_VERBS_ADDRESS names no address of an RDMA device");
        return false;
    }
    let devices = verbs_devices(plugin().as_deref()).expect("the plugin");
    assert!(!devices.is_empty(), "the machine has no RDMA device");
    true
}

impl Bench for Device {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        let config = VerbsConfig { push: self.push, ..config() };
        let a = VerbsFabric::start(&config, a).expect("listen");
        let b = VerbsFabric::start(&config, b).expect("listen");
        let killed = Arc::clone(&b);
        Pair { a, b, kill_b: Box::new(move || killed.stop()) }
    }

    /// It comes into a buffer before anyone knows where it belongs.
    fn staged_max(&self, payload_len: u64) -> u64 {
        payload_len
    }

    fn nobody(&self) -> String {
        format!("{}:1", address().expect("looked at before"))
    }
}

conformance_suite!(Device { push: false }, when is_ready());

/// The same where peers do not read: they have what they want written.
mod push {
    use std::sync::OnceLock;

    use super::{Device, Told, VerbsConfig, VerbsFabric, config, is_ready};

    /// On iWARP there is nothing to test but that it is refused.
    fn can_push() -> bool {
        static CAN: OnceLock<bool> = OnceLock::new();
        *CAN.get_or_init(|| {
            match VerbsFabric::start(&VerbsConfig { push: true, ..config() }, Told::new().0) {
                Ok(_) => true,
                Err(why) => {
                    println!("no pushes here: {why}");
                    assert!(why.to_string().contains("iWARP, which has no Write with immediate"), "{why}");
                    false
                }
            }
        })
    }

    hetmem_transport::conformance_reads!(Device { push: true }, when is_ready() && can_push());
}

/// Hands events on.
struct Told(Mutex<Sender<FabricEvent>>);

impl Told {
    fn new() -> (Arc<Self>, Receiver<FabricEvent>) {
        let (sender, events) = channel();
        (Arc::new(Self(Mutex::new(sender))), events)
    }
}

impl FabricSink for Told {
    fn message(&self, _: LinkId, _: FrameHeader, _: &[u8]) -> Landing {
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        // Nobody listens any more when a test is over.
        let _ = self.0.lock().expect("no panic under it").send(event);
    }
}

/// The next event that `wanted` knows.
fn await_event<T>(events: &Receiver<FabricEvent>, wanted: impl Fn(FabricEvent) -> Option<T>) -> T {
    loop {
        let event = events.recv_timeout(Duration::from_secs(60)).expect("an event");
        if let Some(found) = wanted(event) {
            return found;
        }
    }
}

/// A fabric whose region of `LEN` bytes of this value peers may read, and its key.
fn owner(told: Arc<Told>, value: u8, len: usize) -> (Arc<VerbsFabric>, RemoteKey) {
    let owner = VerbsFabric::start(&config(), told).expect("listen");
    let memory = Arc::new(HeapRegion::new(len));
    memory.write(0, &vec![value; len]);
    let key = owner.register(SegmentId(1), memory as _, Access::RemoteRead).expect("room");
    (owner, key)
}

#[test]
fn a_data_connection_is_taken_only_from_the_node_that_its_link_is_of() {
    const LEN: usize = 5_000;
    if !is_ready() {
        return;
    }
    let (told, _) = Told::new();
    let (owner, key) = owner(told, 7, LEN);
    owner.identify(NodeId(1), Epoch(1));
    let (told, events) = Told::new();
    let reader = VerbsFabric::start(&config(), told).expect("listen");
    reader.identify(NodeId(2), Epoch(1));
    reader.register(SegmentId(1), Arc::new(HeapRegion::new(LEN)), Access::Local).expect("room");
    let remote = RemoteExtent { key, offset: 0, len_bytes: LEN as u64 };
    let local = Extent { segment: SegmentId(1), offset: 0, len_bytes: LEN as u64 };
    let read = |epoch| {
        let link = reader.connect(&owner.address()).expect("a link");
        await_event(&events, |event| matches!(event, FabricEvent::LinkUp { .. }).then_some(()));
        // What is said from here on is said by another incarnation.
        reader.identify(NodeId(2), Epoch(epoch));
        reader.read(link, TransferId(epoch), remote, local).expect("a read");
        await_event(&events, |event| match event {
            FabricEvent::ReadDone { result, .. } => Some(result),
            _ => None,
        })
    };
    assert!(read(1).is_ok());
    assert_eq!(owner.refused(), 0);
    let why = read(2).expect_err("it is of another incarnation");
    println!("{why}");
    assert!(owner.refused() > 0);
}

#[test]
fn a_link_goes_through_the_device_that_its_route_says() {
    const LEN: usize = 5_000;
    if !is_ready() {
        return;
    }
    let Ok(second) = std::env::var("HETMEM_VERBS_ADDRESS_2") else {
        println!("skipped: HETMEM_VERBS_ADDRESS_2 names no address of a second RDMA device");
        return;
    };
    let (told, events) = Told::new();
    let reader = VerbsFabric::start(&config(), told).expect("listen");
    let target = Arc::new(HeapRegion::new(LEN));
    reader.register(SegmentId(1), Arc::clone(&target) as _, Access::Local).expect("room");
    let first = address().expect("looked at before").to_string();
    let mut owners = Vec::new();
    let mut through = Vec::new();
    for (number, at) in (1_u8..).zip([first, second]) {
        let config = VerbsConfig { listen: format!("{at}:0"), ..config() };
        let (told, _) = Told::new();
        let owner = VerbsFabric::start(&config, told).expect("listen");
        let memory = Arc::new(HeapRegion::new(LEN));
        memory.write(0, &[number; LEN]);
        let key = owner.register(SegmentId(1), memory as _, Access::RemoteRead).expect("room");
        let link = reader.connect(&owner.address()).expect("a link");
        await_event(&events, |event| match event {
            FabricEvent::LinkUp { .. } => Some(()),
            FabricEvent::LinkDown { why, .. } => panic!("{why}"),
            _ => None,
        });
        let remote = RemoteExtent { key, offset: 0, len_bytes: LEN as u64 };
        let local = Extent { segment: SegmentId(1), offset: 0, len_bytes: LEN as u64 };
        reader.read(link, TransferId(number.into()), remote, local).expect("a read");
        let result = await_event(&events, |event| match event {
            FabricEvent::ReadDone { result, .. } => Some(result),
            _ => None,
        });
        assert!(result.is_ok(), "{result:?}");
        assert!(target.read(0, LEN).iter().all(|byte| *byte == number));
        through.push(reader.connections_by_device());
        owners.push(owner);
    }
    println!("{through:?}");
    // A control and a data connection for each link.
    assert!(matches!(&through[..], [one, two] if one.len() == 1 && two.len() == 2), "{through:?}");
    assert!(through[1].iter().all(|(_, count)| *count == 2), "{through:?}");
}

#[test]
fn of_too_many_connections_the_one_for_reads_that_was_not_used_for_longest_is_closed() {
    const OWNERS: u8 = 3;
    const LEN: usize = 5_000;
    if !is_ready() {
        return;
    }
    // A connection for each link, and one for reads.
    let connections_max = usize::from(OWNERS) + 1;
    let (told, events) = Told::new();
    let few = VerbsConfig { connections_max, ..config() };
    let reader = VerbsFabric::start(&few, told).expect("listen");
    let target = Arc::new(HeapRegion::new(LEN));
    let segment = SegmentId(1);
    reader.register(segment, Arc::clone(&target) as _, Access::Local).expect("room");
    let mut owners = Vec::new();
    for number in 1..=OWNERS {
        let (told, _) = Told::new();
        let (owner, key) = owner(told, number, LEN);
        let link = reader.connect(&owner.address()).expect("a link");
        await_event(&events, |event| matches!(event, FabricEvent::LinkUp { .. }).then_some(()));
        owners.push((owner, key, link));
    }
    for (transfer, turn) in (1..).zip([0, 0, 1, 2, 1, 0, 2]) {
        let (_, key, link) = &owners[turn];
        target.write(0, &[0; LEN]);
        let remote = RemoteExtent { key: *key, offset: 0, len_bytes: LEN as u64 };
        let local = Extent { segment, offset: 0, len_bytes: LEN as u64 };
        reader.read(*link, TransferId(transfer), remote, local).expect("a read");
        let result = await_event(&events, |event| match event {
            FabricEvent::ReadDone { result, .. } => Some(result),
            FabricEvent::LinkDown { why, .. } => panic!("{why}"),
            _ => None,
        });
        assert!(result.is_ok(), "{result:?}");
        assert!(target.read(0, LEN).iter().all(|byte| usize::from(*byte) == turn + 1));
        assert!(reader.connections() <= connections_max, "{}", reader.connections());
    }
}
