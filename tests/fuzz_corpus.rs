//! Replays the fuzzers' corpora, and makes the first inputs of one from what honest programs send. Not fuzzing: that is
//! `cargo fuzz run --fuzz-dir tests/fuzz TARGET`. Invariant: an input that was once a finding stays in its corpus.
#![allow(clippy::print_stdout, reason = "the input that was running when a test failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hetmem_core::wire::{
    Announced, Batch, Batched, ClientMessage, FrameKind, Holder, IfExists, PROTOCOL_MAX, PROTOCOL_MIN,
    PeerMessage, PutHints, Range, Role, encode,
};
use hetmem_core::{Checksum, DType, Epoch, Generation, Key, NodeId, ObjectId, ObjectMeta, SegmentId};
use hetmem_tests::fuzz;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn replay(target: &str, run: fn(&[u8])) {
    let folder = corpus(target);
    let entries = fs::read_dir(&folder).expect("the corpus is checked in");
    let mut count = 0;
    for entry in entries {
        let path = entry.expect("a file").path();
        let bytes = fs::read(&path).expect("a file");
        println!("{} ({} bytes)", path.display(), bytes.len());
        run(&bytes);
        count += 1;
    }
    assert!(count >= 6, "{count} inputs in {}", folder.display());
}

#[test]
fn the_wire_decoder_stands_its_corpus() {
    replay("wire", fuzz::wire);
}

#[test]
fn a_node_stands_the_corpus_of_its_socket() {
    replay("client_socket", fuzz::client_socket);
}

#[test]
fn the_safetensors_reader_stands_its_corpus() {
    replay("safetensors", fuzz::safetensors);
}

fn key(name: &str) -> Key {
    Key::new(name).expect("a key")
}

fn tensor() -> ObjectMeta {
    ObjectMeta::tensor(DType::F32, &[4]).expect("a shape")
}

/// One session that does a bit of everything.
fn session() -> Vec<(ClientMessage, &'static [u8])> {
    let (hints, if_exists) = (PutHints::default(), IfExists::Keep);
    let reserve = ClientMessage::Reserve {
        key: key("r"),
        meta: tensor(),
        hints,
        if_exists,
        writes: hetmem_core::Tier::Host,
    };
    vec![
        (ClientMessage::Put { key: key("a"), meta: tensor(), hints, if_exists }, &[7; 16]),
        (reserve, &[]),
        (ClientMessage::Mapped { segment: SegmentId(3) }, &[]),
        (ClientMessage::Write { reservation: Generation(2), offset: 0 }, &[1; 16]),
        (ClientMessage::Seal { reservation: Generation(2), checksum: Checksum::None }, &[]),
        (ClientMessage::Abort { reservation: Generation(2) }, &[]),
        (
            ClientMessage::Get {
                key: key("a"),
                range: Some(Range { start: 1, len_bytes: 2 }),
                timeout_ms: 5,
                keep: true,
                threshold_bytes: None,
                tier: None,
            },
            &[],
        ),
        (ClientMessage::Segment { segment: SegmentId(1) }, &[]),
        (ClientMessage::Wait { key: key("a"), timeout_ms: 0 }, &[]),
        (ClientMessage::Stat { key: key("a"), timeout_ms: 0 }, &[]),
        (ClientMessage::List { prefix: String::new(), after: None, limit: 9 }, &[]),
        (ClientMessage::Pin { key: key("a"), pin: true }, &[]),
        (ClientMessage::Ahead { ring: true }, &[]),
        (ClientMessage::Drain, &[]),
        (ClientMessage::Status, &[]),
        (ClientMessage::Delete { key: key("a") }, &[]),
    ]
}

/// Inputs that reach every message, so that the fuzzer need not find them by chance.
#[test]
fn what_honest_programs_send_is_in_the_corpora() {
    let session = session();
    let mut inputs = vec![("client_socket", fuzz::client_input(&session))];
    for (at, (message, payload)) in session.iter().enumerate() {
        let first = &session[..usize::from(at > 0)];
        let pair = [first, &[(message.clone(), *payload)]].concat();
        inputs.push(("client_socket", fuzz::client_input(&pair)));
        let frame = encode(FrameKind::Client, 1, message, 0).expect("a short message");
        inputs.push(("wire", frame.into_bytes()));
    }
    let object = ObjectId { origin: NodeId(1), epoch: Epoch(2), number: 3 };
    let (role, ttl_ms) = (Role::Replica, Some(9));
    let announced = Announced { key: key("a"), object, len_bytes: 16, role, replicas: 2, ttl_ms };
    let holders = vec![Holder { node: NodeId(4), address: "a:1".to_owned() }];
    let said = [
        PeerMessage::Get { key: key("a"), range: None, inline_max: 9 },
        PeerMessage::Data { object, meta: tensor(), origin: hetmem_core::wire::Origin::HOST },
        PeerMessage::Drop { key: key("a"), object },
        PeerMessage::Heartbeat { room_bytes: 300, under_replicated: 1 },
        PeerMessage::Join { heir: true },
        PeerMessage::Deletions { objects: vec![object] },
        PeerMessage::Replicate { object: announced.clone(), holders },
        PeerMessage::Surplus { key: key("a"), object, lasting: vec![(NodeId(4), Epoch(5))] },
        PeerMessage::Announce { objects: vec![announced], exclusive: false },
    ];
    for message in &said {
        let frame = encode(FrameKind::Peer, 1, message, 0).expect("a short message");
        inputs.push(("wire", frame.into_bytes()));
    }
    for (header, data_len) in [
        (r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        (
            r#"{"a":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]},"n":{"dtype":"I64","shape":[0,3],"data_offsets":[2,2]}}"#,
            2,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F8_E4M3","shape":[],"data_offsets":[3,4]}}  "#,
            4,
        ),
        (
            r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}"#,
            2,
        ),
        (
            r#"{"\u00e4":{"dtype":"C64","shape":[1],"data_offsets":[0,8]},"z":{"dtype":"BOOL","shape":[2],"data_offsets":[8,10]}}"#,
            10,
        ),
        ("{}", 0),
    ] {
        let len = header.len() as u64;
        inputs.push(("safetensors", [&len.to_le_bytes(), header.as_bytes(), &vec![5; data_len]].concat()));
    }
    let batched = |(request, message): (u64, PeerMessage)| {
        let payload_len = if matches!(message, PeerMessage::Data { .. }) { 16 } else { 0 };
        Batched { request, payload_len, message }
    };
    let batch = Batch((1..).zip(said).map(batched).collect());
    let frame = encode(FrameKind::Batch, 0, &batch, 16).expect("a short batch");
    inputs.push(("wire", frame.into_bytes()));
    assert_eq!((PROTOCOL_MIN, PROTOCOL_MAX), (1, 1), "the corpus is of this version");
    let write = std::env::var_os("HETMEM_WRITE_CORPUS").is_some();
    let mut of_target = BTreeMap::new();
    for (target, bytes) in &inputs {
        let at = of_target.entry(target).or_insert(0);
        let path = corpus(target).join(format!("honest-{at:02}"));
        *at += 1;
        if write {
            fs::create_dir_all(corpus(target)).expect("a folder");
            fs::write(&path, bytes).expect("a file");
        }
        let there = fs::read(&path).unwrap_or_default();
        assert_eq!(&there, bytes, "{} (HETMEM_WRITE_CORPUS=1 writes it anew)", path.display());
    }
}
