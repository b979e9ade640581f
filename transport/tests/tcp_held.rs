//! A TCP fabric whose sink is held up: nothing that peers read waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, SegmentId, StoreError, TransferId};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, ReadStats, SendToken, TcpConfig, TcpFabric,
};
use parking_lot::Mutex;

const PATIENCE: Duration = Duration::from_secs(60);
const LEN: usize = 3 << 20;

/// Every message waits until the test lets it go.
#[derive(Default)]
struct Held {
    gate: Mutex<()>,
    waiting: AtomicUsize,
    ups: AtomicUsize,
    done: Mutex<Vec<(TransferId, Result<ReadStats, StoreError>)>>,
}

impl FabricSink for Held {
    fn message(&self, _: LinkId, _: FrameHeader, _: &[u8]) -> Landing {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _gate = self.gate.lock();
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        match event {
            FabricEvent::LinkUp { .. } => {
                self.ups.fetch_add(1, Ordering::SeqCst);
            }
            FabricEvent::ReadDone { transfer, result } => self.done.lock().push((transfer, result)),
            _ => {}
        }
    }
}

/// As many links as the owner has threads for its sink each bring a message that is not answered, and one more, so
/// that every thread is held up; reads go on, on the data streams that there are and on new ones.
#[test]
fn reads_are_served_while_every_thread_waits_in_the_sink() {
    let (sink, asker) = (Arc::<Held>::default(), Arc::<Held>::default());
    let config = TcpConfig::default();
    let owner = TcpFabric::start(config.clone(), Arc::clone(&sink) as _).expect("listen");
    let reader = TcpFabric::start(config.clone(), Arc::clone(&asker) as _).expect("listen");
    let memory = Arc::new(HeapRegion::new(LEN));
    let bytes: Vec<u8> = (0..LEN).map(|at| u8::try_from(at % 251).expect("small")).collect();
    memory.write(0, &bytes);
    let key = owner.register(SegmentId(1), memory, Access::RemoteRead).expect("register");
    let target = Arc::new(HeapRegion::new(LEN));
    reader.register(SegmentId(1), Arc::clone(&target) as _, Access::Local).expect("register");
    let links: Vec<LinkId> =
        (0..config.threads + 2).map(|_| reader.connect(&owner.address()).expect("connect")).collect();
    assert!(reader.progress(PATIENCE, &|| asker.ups.load(Ordering::SeqCst) == links.len()));
    let (used, fresh) = (links[0], links[1]);
    let next = AtomicUsize::new(1);
    let read = |link: LinkId, len: usize| {
        let number = next.fetch_add(1, Ordering::SeqCst);
        target.write(0, &vec![0; LEN]);
        let len_bytes = len as u64;
        let remote = RemoteExtent { key, offset: 0, len_bytes };
        let local = Extent { segment: SegmentId(1), offset: 0, len_bytes };
        reader.read(link, TransferId(number as u64), remote, local).expect("a read");
        assert!(reader.progress(PATIENCE, &|| asker.done.lock().len() == number), "{len} bytes over {link}");
        let (transfer, result) = asker.done.lock().last().cloned().expect("just done");
        assert_eq!(transfer, TransferId(number as u64));
        assert_eq!(result.expect("a success").bytes, len_bytes);
        assert_eq!(target.read(0, len), bytes[..len]);
    };
    read(used, LEN);
    let gate = sink.gate.lock();
    for &link in &links {
        let frame = encode(FrameKind::Peer, 1, &0_u8, 0).expect("small");
        let _ = reader.send(link, frame, &[], SendToken(0)).expect("send");
    }
    while sink.waiting.load(Ordering::SeqCst) < config.threads {
        std::thread::yield_now();
    }
    for len in [LEN, 8, 4096] {
        read(used, len);
        read(fresh, len);
    }
    assert_eq!(sink.waiting.load(Ordering::SeqCst), config.threads, "all of them still wait");
    drop(gate);
    while sink.waiting.load(Ordering::SeqCst) < links.len() {
        std::thread::yield_now();
    }
}
