//! The conformance suite on TCP over loopback.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hetmem_core::LinkId;
use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{
    Fabric, FabricEvent, FabricSink, Landing, SendToken, Sent, TcpConfig, TcpFabric, conformance_suite,
};

struct Loopback {
    streams: usize,
}

impl Bench for Loopback {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        let config = TcpConfig { streams: self.streams, ..TcpConfig::default() };
        let a = TcpFabric::start(config.clone(), a).expect("listen");
        let b = TcpFabric::start(config, b).expect("listen");
        let killed = Arc::clone(&b);
        Pair { a, b, kill_b: Box::new(move || killed.stop()) }
    }

    fn nobody(&self) -> String {
        "127.0.0.1:1".to_owned()
    }
}

mod one_stream {
    use super::*;

    conformance_suite!(Loopback { streams: 1 });
}

mod three_streams {
    use super::*;

    conformance_suite!(Loopback { streams: 3 });
}

/// Answers each frame, and remembers the highest answer to each asker.
#[derive(Default)]
struct Echo {
    fabric: std::sync::OnceLock<std::sync::Weak<TcpFabric>>,
    ups: AtomicU64,
    answered: [AtomicU64; 8],
}

impl FabricSink for Echo {
    fn message(&self, link: LinkId, header: FrameHeader, _body: &[u8]) -> Landing {
        match self.fabric.get().and_then(std::sync::Weak::upgrade) {
            Some(fabric) => {
                let frame = encode(FrameKind::Peer, header.request, &0_u8, 0).expect("small");
                let sent = fabric.send(link, frame, &[], SendToken(0)).expect("send");
                assert_eq!(sent, Sent::Done);
            }
            None => {
                let asker = usize::try_from(header.request % 8).expect("small");
                self.answered[asker].store(header.request / 8, Ordering::SeqCst);
            }
        }
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        if matches!(event, FabricEvent::LinkUp { .. }) {
            self.ups.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Every thread that waits in `progress` learns of its own answer, whichever thread has handled it.
#[test]
fn many_threads_wait_for_their_own() {
    let (asking, answering) = (Arc::<Echo>::default(), Arc::<Echo>::default());
    let a = TcpFabric::start(TcpConfig::default(), Arc::clone(&asking) as _).expect("listen");
    let b = TcpFabric::start(TcpConfig::default(), Arc::clone(&answering) as _).expect("listen");
    answering.fabric.set(Arc::downgrade(&b)).expect("once");
    let link = a.connect(&b.address()).expect("connect");
    let patience = Duration::from_secs(60);
    assert!(a.progress(patience, &|| asking.ups.load(Ordering::SeqCst) == 1));
    std::thread::scope(|scope| {
        for asker in 0..8_u64 {
            let (a, asking) = (&a, &asking);
            scope.spawn(move || {
                for round in 1..=500 {
                    let frame = encode(FrameKind::Peer, round * 8 + asker, &0_u8, 0).expect("small");
                    assert_eq!(a.send(link, frame, &[], SendToken(0)), Ok(Sent::Done));
                    let mine = &asking.answered[usize::try_from(asker).expect("small")];
                    let answered = a.progress(patience, &|| mine.load(Ordering::SeqCst) == round);
                    assert!(answered, "asker {asker} waited in vain for {round}");
                }
            });
        }
    });
}

/// What became true outside of the sink is noticed after `wake`.
#[test]
fn a_wake_makes_waiters_look() {
    let fabric = TcpFabric::start(TcpConfig::default(), Arc::<Echo>::default()).expect("listen");
    let (said, looked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                assert!(fabric.progress(Duration::from_secs(60), &|| {
                    looked.fetch_add(1, Ordering::SeqCst);
                    said.load(Ordering::SeqCst)
                }));
            });
        }
        while looked.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        said.store(true, Ordering::SeqCst);
        fabric.wake();
    });
}

/// Stopping ends every wait, whoever gets which bell.
#[test]
fn stopping_ends_all_waits() {
    for _ in 0..20 {
        let fabric = TcpFabric::start(TcpConfig::default(), Arc::<Echo>::default()).expect("listen");
        let looked = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let held = fabric.progress(Duration::from_secs(600), &|| {
                        looked.fetch_add(1, Ordering::SeqCst);
                        false
                    });
                    assert!(!held);
                });
            }
            while looked.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            fabric.stop();
        });
    }
}

#[test]
fn a_host_name_is_looked_up() {
    let (sink, peer) = (Arc::<Echo>::default(), Arc::<Echo>::default());
    let fabric = TcpFabric::start(TcpConfig::default(), Arc::clone(&sink) as _).expect("listen");
    let other = TcpFabric::start(TcpConfig::default(), peer).expect("listen");
    let port = other.address().rsplit_once(':').map(|(_, port)| port.to_owned()).expect("a port");
    fabric.connect(&format!("localhost:{port}")).expect("connect");
    assert!(fabric.progress(Duration::from_secs(60), &|| sink.ups.load(Ordering::SeqCst) == 1));
}
