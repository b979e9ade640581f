//! The conformance suite on TCP over loopback.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hetmem_core::wire::{FrameHeader, FrameKind, encode};
use hetmem_core::{Extent, LinkId, RemoteExtent, SegmentId, TransferId};
use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{
    Access, Fabric, FabricEvent, FabricSink, HeapRegion, Landing, SendToken, Sent, TcpConfig, TcpFabric,
    conformance_suite,
};

struct Loopback {
    streams: usize,
}

impl Bench for Loopback {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        // Short slices, so that reads are spread over the streams.
        let config = TcpConfig { streams: self.streams, slice_bytes: 256 << 10, ..TcpConfig::default() };
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

/// Where reads end.
#[derive(Default)]
struct Ends {
    up: AtomicBool,
    ended: AtomicU64,
    word: AtomicU64,
}

impl FabricSink for Ends {
    fn message(&self, _: LinkId, _: FrameHeader, _: &[u8]) -> Landing {
        Landing::Discard
    }

    fn event(&self, event: FabricEvent) {
        match event {
            FabricEvent::LinkUp { .. } => self.up.store(true, Ordering::SeqCst),
            FabricEvent::ReadDone { transfer, result } => {
                let word = result.expect("the link stays").word.expect("each read asks for one");
                self.word.store(word, Ordering::SeqCst);
                self.ended.store(transfer.0, Ordering::SeqCst);
            }
            _ => {}
        }
    }
}

/// An owner that goes on using the memory: it clears the word, writes other bytes, and sets the word to the next number.
/// Whoever found the same number before and behind the bytes has read that number's bytes.
#[test]
fn bytes_under_an_unchanged_word_are_whole() {
    const WORD_AT: usize = 4 << 20;
    const PATIENCE: Duration = Duration::from_secs(60);
    for len in [4_096, 3 << 20] {
        let (reader, owner) = (Arc::<Ends>::default(), Arc::<Ends>::default());
        let a = TcpFabric::start(TcpConfig::default(), Arc::clone(&reader) as _).expect("listen");
        let b = TcpFabric::start(TcpConfig::default(), owner).expect("listen");
        let (here, there) = (Arc::new(HeapRegion::new(4 << 20)), Arc::new(HeapRegion::new(5 << 20)));
        let segment = SegmentId(1);
        a.register(segment, Arc::clone(&here) as _, Access::Local).expect("register");
        let key = b.register(segment, Arc::clone(&there) as _, Access::RemoteRead).expect("register");
        let link = a.connect(&b.address()).expect("connect");
        assert!(a.progress(PATIENCE, &|| reader.up.load(Ordering::SeqCst)));
        let next = AtomicU64::new(1);
        let read = |bytes: Option<(RemoteExtent, Extent)>| {
            let transfer = TransferId(next.fetch_add(1, Ordering::SeqCst));
            let word = RemoteExtent { key, offset: WORD_AT as u64, len_bytes: 8 };
            a.read_checked(link, transfer, bytes, word).expect("begun");
            assert!(a.progress(PATIENCE, &|| reader.ended.load(Ordering::SeqCst) == transfer.0));
            reader.word.load(Ordering::SeqCst)
        };
        let (over, mut whole, mut changed) = (AtomicBool::new(false), 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0_u64;
                while !over.load(Ordering::SeqCst) {
                    there.write(WORD_AT, &0_u64.to_le_bytes());
                    std::sync::atomic::fence(Ordering::SeqCst);
                    number += 1;
                    there.write(0, &vec![number.to_le_bytes()[0]; len]);
                    std::sync::atomic::fence(Ordering::SeqCst);
                    there.write(WORD_AT, &number.to_le_bytes());
                    // Long enough for some reads, too short for others.
                    (0..number % 7 * 3_000).for_each(|_| std::hint::spin_loop());
                    std::thread::yield_now();
                }
            });
            let bytes = (
                RemoteExtent { key, offset: 0, len_bytes: len as u64 },
                Extent { segment, offset: 0, len_bytes: len as u64 },
            );
            while (whole < 20 || changed < 20) && next.load(Ordering::SeqCst) < 4_000 {
                let before = read(None);
                if before == 0 || read(Some(bytes)) != before {
                    changed += 1;
                    continue;
                }
                let byte = before.to_le_bytes()[0];
                let wrong = here.read(0, len).iter().position(|found| *found != byte);
                assert_eq!(wrong, None, "{len} bytes of number {before}");
                whole += 1;
            }
            over.store(true, Ordering::SeqCst);
        });
        assert!(whole > 0 && changed > 0, "{len} bytes: {whole} whole, {changed} changed meanwhile");
    }
}
