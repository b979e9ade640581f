//! How much of a payload may pass through a link's buffer, whatever came before it. The other end is a raw socket, so
//! that everything is in the socket before any of it is received. Invariant: none.

mod raw;

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, SegmentId};
use hetmem_transport::{
    Access, Fabric as _, FabricEvent, FabricSink, HeapRegion, Landing, LandingStats, LandingToken, TcpConfig,
    TcpFabric,
};
use parking_lot::Mutex;
use raw::{Handshake, PATIENCE, hear, say};

const SEGMENT: SegmentId = SegmentId(3);
/// What the documents say may be staged.
const STAGED_MAX: u64 = 4096;

/// Payloads of odd requests land, others are dropped; the first frame waits until the test says so.
#[derive(Default)]
struct Sink {
    heard: AtomicBool,
    landed: Mutex<Vec<LandingStats>>,
    held: Mutex<()>,
}

impl FabricSink for Sink {
    fn message(&self, _: LinkId, header: FrameHeader, _: &[u8]) -> Landing {
        self.heard.store(true, Ordering::SeqCst);
        drop(self.held.lock());
        let len_bytes = header.payload_len;
        match header.request % 2 {
            0 => Landing::Discard,
            _ => Landing::whole(
                Extent { segment: SEGMENT, offset: 0, len_bytes },
                LandingToken(header.request),
            ),
        }
    }

    fn event(&self, event: FabricEvent) {
        if let FabricEvent::Landed { result, .. } = event {
            self.landed.lock().push(result.expect("landed"));
        }
    }
}

fn frame(request: u64, body_len: usize, payload_len: usize) -> Vec<u8> {
    let body = vec![7_u8; body_len];
    let mut bytes = encode(FrameKind::Peer, request, &body, payload_len as u64).expect("small").into_bytes();
    bytes.resize(bytes.len() + payload_len, 9);
    bytes
}

#[test]
fn neither_long_bodies_nor_dropped_payloads_make_more_of_the_next_payload_staged() {
    let sink = Arc::<Sink>::default();
    let fabric = TcpFabric::start(TcpConfig::default(), Arc::clone(&sink) as _).expect("listen");
    fabric.register(SEGMENT, Arc::new(HeapRegion::new(1 << 20)), Access::Local).expect("register");
    let mut stream = TcpStream::connect(fabric.address()).expect("connect");
    say(&mut stream, &Handshake::Open { version_min: 1, version_max: 1, listen_port: 9, token: [1; 16] });
    hear(&mut stream);
    let held = sink.held.lock();
    // The first goes out alone, so that all that follows waits in the socket.
    stream.write_all(&frame(0, 1, 0)).expect("write");
    while !sink.heard.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let all = [
        frame(2, 300_000, 0),
        frame(1, 3, 200_000),
        frame(3, 100_000, 300_000),
        frame(4, 5, 500_000),
        frame(5, 7, 70_000),
        frame(6, 8, 40_000),
        frame(7, 9, 3_000),
    ]
    .concat();
    std::thread::scope(|scope| {
        scope.spawn(|| stream.write_all(&all).expect("write"));
        drop(held);
        assert!(fabric.progress(PATIENCE, &|| sink.landed.lock().len() == 4));
    });
    for (stats, bytes) in sink.landed.lock().iter().zip([200_000, 300_000, 70_000, 3_000]) {
        assert_eq!(stats.bytes, bytes);
        assert!(stats.staged_bytes <= STAGED_MAX, "{stats:?}");
    }
}
