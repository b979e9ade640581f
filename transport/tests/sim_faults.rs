//! What only the simulated network can do on purpose: repeat itself, tear a read, partition, bring a name back.

use std::sync::Arc;

use hetmem_core::wire::{Frame, FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, SegmentId, TransferId};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, LandingToken, SendToken, SimFabric,
    SimFaults, SimNet,
};
use parking_lot::Mutex;

const SEGMENT: SegmentId = SegmentId(1);
const LEN: usize = 1 << 16;

/// Writes down what is heard, as text, with the time.
struct Sink {
    net: SimNet,
    heard: Mutex<Vec<String>>,
    links: Mutex<Vec<LinkId>>,
}

impl FabricSink for Sink {
    fn message(&self, link: LinkId, header: FrameHeader, _body: &[u8]) -> Landing {
        self.heard.lock().push(format!("{} message {} on {link}", self.net.now(), header.request));
        match header.payload_len {
            0 => Landing::Discard,
            len_bytes => {
                let extent = Extent { segment: SEGMENT, offset: 0, len_bytes };
                Landing::whole(extent, LandingToken(header.request))
            }
        }
    }

    fn event(&self, event: FabricEvent) {
        if let FabricEvent::LinkUp { link, .. } = &event {
            self.links.lock().push(*link);
        }
        self.heard.lock().push(format!("{} {event:?}", self.net.now()));
    }
}

struct Node {
    fabric: Arc<SimFabric>,
    sink: Arc<Sink>,
    memory: Arc<HeapRegion>,
    remote: RemoteExtent,
}

fn node(net: &SimNet, name: &str) -> Node {
    let sink = Arc::new(Sink { net: net.clone(), heard: Mutex::default(), links: Mutex::default() });
    let fabric = net.fabric(name, Arc::clone(&sink) as _).expect("a free name");
    let memory = Arc::new(HeapRegion::new(LEN));
    let key = fabric.register(SEGMENT, Arc::clone(&memory) as _, Access::RemoteRead).expect("register");
    Node { fabric, sink, memory, remote: RemoteExtent { key, offset: 0, len_bytes: LEN as u64 } }
}

fn whole() -> Extent {
    Extent { segment: SEGMENT, offset: 0, len_bytes: LEN as u64 }
}

fn frame(number: u64, payload_len: u64) -> Frame {
    encode(FrameKind::Peer, number, &number, payload_len).expect("small")
}

fn run(net: &SimNet) {
    while net.step() {}
}

fn connected(net: &SimNet) -> (Node, Node, LinkId) {
    let (a, b) = (node(net, "a"), node(net, "b"));
    let link = a.fabric.connect("b").expect("connect");
    while !a.sink.links.lock().contains(&link) {
        assert!(net.step(), "the link comes up");
    }
    (a, b, link)
}

/// Everything both nodes heard while frames, payloads, reads, a cancel and a kill went on.
fn history(seed: u64) -> Vec<String> {
    let net = SimNet::new(seed, SimFaults::default());
    let (a, b, link) = connected(&net);
    for number in 0..20 {
        let payload: Vec<Extent> = (number % 3 == 0).then(whole).into_iter().collect();
        let frame = frame(number, payload.iter().map(|extent| extent.len_bytes).sum());
        let _ = a.fabric.send(link, frame, &payload, SendToken(number));
        a.fabric.read(link, TransferId(number), b.remote, whole()).expect("read");
        if number % 5 == 0 {
            a.fabric.cancel(TransferId(number));
        }
        for _ in 0..10 {
            net.step();
        }
    }
    net.kill("b");
    run(&net);
    let (a, b) = (a.sink.heard.lock().clone(), b.sink.heard.lock().clone());
    a.into_iter().chain(b).collect()
}

#[test]
fn a_seed_repeats_itself_and_another_does_not() {
    assert_eq!(history(7), history(7));
    assert_ne!(history(7), history(8));
}

/// An owner that overwrites an extent while it is read is seen by the reader, somewhere in the middle of a byte run.
#[test]
fn reads_are_torn() {
    let mut torn = 0;
    for seed in 0..50 {
        let net = SimNet::new(seed, SimFaults::default());
        let (a, b, link) = connected(&net);
        b.memory.write(0, &[1; LEN]);
        a.fabric.read(link, TransferId(1), b.remote, whole()).expect("read");
        for _ in 0..4 {
            net.step();
        }
        b.memory.write(0, &[2; LEN]);
        run(&net);
        let bytes = a.memory.read(0, LEN);
        let old = bytes.iter().filter(|byte| **byte == 1).count();
        assert_eq!(old + bytes.iter().filter(|byte| **byte == 2).count(), LEN);
        torn += u32::from(old > 0 && old < LEN);
    }
    assert!(torn > 5, "{torn} of 50 reads were torn");
}

/// The same for payloads: what the sender overwrites before it may shows at the receiver.
#[test]
fn payloads_are_taken_over_late() {
    let mut mixed = 0;
    for seed in 0..50 {
        let net = SimNet::new(seed, SimFaults { busy_chance: 0, ..SimFaults::default() });
        let (a, b, link) = connected(&net);
        a.memory.write(0, &[1; LEN]);
        let sent = a.fabric.send(link, frame(1, LEN as u64), &[whole()], SendToken(1)).expect("send");
        net.step();
        a.memory.write(0, &[2; LEN]);
        run(&net);
        let late = b.memory.read(0, LEN).contains(&2);
        assert!(!late || sent == hetmem_transport::Sent::Pending, "what is done is taken over");
        mixed += u32::from(late);
    }
    assert!(mixed > 5, "{mixed} of 50 payloads were taken over late");
}

#[test]
fn a_partition_holds_back_and_heals() {
    let net = SimNet::new(3, SimFaults { busy_chance: 0, ..SimFaults::default() });
    let (a, b, link) = connected(&net);
    net.partition("b", "a");
    b.memory.write(0, &[5; LEN]);
    for number in 0..5 {
        let _ = a.fabric.send(link, frame(number, 0), &[], SendToken(number)).expect("send");
    }
    a.fabric.read(link, TransferId(1), b.remote, whole()).expect("read");
    run(&net);
    let heard =
        |node: &Node, word: &str| node.sink.heard.lock().iter().filter(|line| line.contains(word)).count();
    assert_eq!((heard(&b, "message"), heard(&a, "ReadDone")), (0, 0));
    net.heal("a", "b");
    run(&net);
    assert_eq!((heard(&b, "message"), heard(&a, "ReadDone")), (5, 1));
    assert!(a.memory.read(0, LEN) == [5; LEN]);
}

#[test]
fn connecting_through_a_partition_times_out() {
    let net = SimNet::new(4, SimFaults::default());
    let (a, _b) = (node(&net, "a"), node(&net, "b"));
    net.partition("a", "b");
    a.fabric.connect("b").expect("connect");
    run(&net);
    let heard = a.sink.heard.lock();
    assert!(heard.len() == 1 && heard[0].contains("LinkDown") && heard[0].contains("TimedOut"), "{heard:?}");
}

#[test]
fn a_name_comes_back_as_another_node() {
    let net = SimNet::new(5, SimFaults::default());
    let (a, b, link) = connected(&net);
    assert!(net.fabric("b", Arc::clone(&b.sink) as _).is_err(), "b lives");
    net.kill("b");
    let again = node(&net, "b");
    run(&net);
    assert!(a.fabric.send(link, frame(1, 0), &[], SendToken(1)).is_err(), "the old link is down");
    assert!(b.fabric.connect("a").is_err(), "the dead do nothing");
    let link = a.fabric.connect("b").expect("connect");
    run(&net);
    assert!(a.sink.links.lock().contains(&link));
    assert_eq!(again.sink.links.lock().len(), 1);
    a.fabric.read(link, TransferId(9), b.remote, whole()).expect("read");
    run(&net);
    let heard = a.sink.heard.lock();
    assert!(
        heard.iter().any(|line| line.contains("ReadDone") && line.contains("Stale")),
        "a key of the dead one"
    );
}
