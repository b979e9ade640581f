//! Micro-benchmarks of the parts that lie on every put and get. Not paths: sockets, processes and peers are measured
//! by `hetmem bench`. Invariant: each benchmark does the work that its name says, on data made before the clock runs.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use hetmem_core::alloc::Arena;
use hetmem_core::engine::{Engine, EngineConfig, FabricId, FabricUse, Input, Time};
use hetmem_core::wire::{
    ClientMessage, FrameKind, HEADER_LEN, IfExists, Member, PeerMessage, PutHints, decode, encode,
};
use hetmem_core::{
    ClientId, Epoch, Extent, Generation, Key, NodeId, ObjectId, ObjectMeta, RemoteKey, SegmentId, SlotId,
    Tier, checksum,
};
use hetmem_host_mem::{ClientPage, IndexEntry, IndexReader, IndexWriter, NodePage};

const MIB: usize = 1 << 20;

fn key(at: u32) -> Key {
    Key::new(&format!("model/layer.{at}.weight")).expect("a valid key")
}

fn allocation(c: &mut Criterion) {
    c.bench_function("arena: allocate and free 64 KiB among 10,000 live extents", |b| {
        let mut arena = Arena::new(4 << 30, 64);
        let live: Vec<u64> = (0..20_000).filter_map(|at| arena.allocate(4096 + at % 7 * 8192)).collect();
        for offset in live.iter().step_by(2) {
            arena.free(*offset).expect("live");
        }
        b.iter(|| {
            let offset = arena.allocate(black_box(65_536)).expect("room");
            arena.free(offset).expect("live");
        });
    });
}

fn checksums(c: &mut Criterion) {
    let bytes: Vec<u8> = (0..4 * MIB).map(|at| u8::try_from(at % 251).expect("small")).collect();
    let mut group = c.benchmark_group("checksum");
    for len in [1024, 64 * 1024, 4 * MIB] {
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} bytes"), |b| b.iter(|| checksum::of(black_box(&bytes[..len]))));
    }
    group.finish();
}

fn entry(at: u32) -> IndexEntry {
    IndexEntry {
        object: ObjectId { origin: NodeId(1), epoch: Epoch(1), number: u64::from(at) },
        meta: ObjectMeta::bytes(4096).expect("short"),
        generation: Generation(u64::from(at) + 1),
        extent: Extent { segment: SegmentId(1), offset: u64::from(at) * 4096, len_bytes: 4096 },
        tier: Tier::Host,
    }
}

fn index(c: &mut Criterion) {
    let mut group = c.benchmark_group("index");
    for count in [1_000_u32, 1_000_000] {
        let mut writer = IndexWriter::create(4 << 20).expect("an index");
        for at in 0..count {
            writer.publish(SlotId(at), &key(at), &entry(at)).expect("published");
        }
        let reader = IndexReader::map(writer.descriptor().try_clone_to_owned().expect("a descriptor"))
            .expect("mapped");
        let page = NodePage::create().expect("a page");
        let client =
            ClientPage::map(page.descriptor().try_clone_to_owned().expect("a descriptor")).expect("mapped");
        let keys: Vec<Key> = (0..1000).map(|at| key(at * (count / 1000))).collect();
        let mut at = 0;
        group.bench_function(format!("get, pin and unpin, 1,000 keys of {count}"), |b| {
            b.iter(|| {
                at = (at + 1) % keys.len();
                let found =
                    reader.get(&keys[at], keys[at].fingerprint(), &client).expect("sound").expect("there");
                client.unpin(black_box(found).pin);
            });
        });
    }
    group.finish();
}

fn wire(c: &mut Criterion) {
    let message = PeerMessage::Get { key: key(7), range: None, inline_max: 32 * 1024 };
    c.bench_function("wire: encode GET", |b| b.iter(|| encode(FrameKind::Peer, 1, black_box(&message), 0)));
    let frame = encode(FrameKind::Peer, 1, &message, 0).expect("short");
    let body = &frame.as_bytes()[HEADER_LEN..];
    c.bench_function("wire: decode GET", |b| b.iter(|| decode::<PeerMessage>(black_box(body))));
}

fn engine() -> Engine {
    let member =
        Member { node: NodeId(1), epoch: Epoch(1), name: "bench".to_owned(), address: String::new() };
    let mut engine = Engine::new(EngineConfig {
        member,
        join: Vec::new(),
        capacity_bytes: 1 << 30,
        client_quota_bytes: 1 << 30,
        objects_max: 1 << 20,
        fabrics: vec![FabricUse {
            id: FabricId(0),
            name: "none".into(),
            index_key: RemoteKey(1),
            gather_max: 1_023,
            tiers: Vec::new(),
            stages_gpus: false,
        }],
        generation_base: 0,
        generation_stride: 128,
        threshold_bytes: None,
        lease_ms: 10_000,
        heartbeat_ms: 1_000,
        gpus: Vec::new(),
        why_no_gpu: "none was configured".into(),
    });
    engine.handle(Time(0), Input::Start);
    for segment in 1..=4 {
        engine.handle(Time(0), Input::SegmentReady { segment: SegmentId(segment), keys: Vec::new() });
    }
    let client = ClientId(1);
    engine.handle(Time(0), Input::ClientJoined { client, trusted: true });
    let hello = ClientMessage::Hello { version_min: 1, version_max: 1 };
    engine
        .handle(Time(0), Input::ClientRequest { client, request: 1, message: hello, payload: Bytes::new() });
    engine
}

fn passes(c: &mut Criterion) {
    let payload = Bytes::from(vec![1; 1024]);
    let meta = ObjectMeta::bytes(1024).expect("short");
    let mut engine = engine();
    let mut at = 0;
    c.bench_function("engine: put of 1 KiB", |b| {
        b.iter_batched(
            || {
                at += 1;
                ClientMessage::Put {
                    key: key(at),
                    meta,
                    hints: PutHints::default(),
                    if_exists: IfExists::Keep,
                }
            },
            |message| {
                let payload = payload.clone();
                engine.handle(
                    Time(1),
                    Input::ClientRequest { client: ClientId(1), request: 2, message, payload },
                )
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, allocation, checksums, index, wire, passes);
criterion_main!(benches);
