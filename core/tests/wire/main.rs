//! The decoders of everything that comes over a socket. Every variant of every message returns as it was; arbitrary,
//! cut, flipped and lying bytes give a message or an error, never a panic, and never hold more memory than a small
//! multiple of what was received.

mod memory;
mod messages;

use std::collections::BTreeSet;
use std::fmt::Debug;

use hetmem_core::wire::{
    Announced, BODY_LEN_MAX, Batch, ClientMessage, ClientReply, FrameHeader, FrameKind, HEADER_LEN, Holder,
    KEYS_PER_MESSAGE_MAX, Listed, MAGIC, Member, NODE_TEXT_LEN_MAX, PROTOCOL_MAX, PROTOCOL_MIN, PeerMessage,
    Present, REPLICAS_MAX, Role, decode, encode,
};
use hetmem_core::{Epoch, ErrorKind, KEY_LEN_MAX, Key, NodeId, OBJECT_LEN_MAX, ObjectId, StoreError};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde::Serialize;
use serde::de::DeserializeOwned;

use memory::measured;
use messages::{
    answer, batch, client_message, client_reply, client_variant, error, peer_message, peer_variant,
    reply_variant,
};

/// The most that decoding `len` bytes may hold: serde gives a list that claims to be long up to 1 MiB ahead, and
/// the smallest entry of any list (one byte: an empty string) takes 24 bytes in memory, twice while it grows.
const fn held_max(len: usize) -> usize {
    64 * len + (1 << 20) + 4096
}

/// Decodes as everything that a socket may carry; whatever comes out, it ends well and within bounds. Returns the
/// most that one of them held.
fn decode_as_everything(body: &[u8]) -> usize {
    fn one<T: DeserializeOwned + Debug>(body: &[u8]) -> usize {
        let (result, held) = measured(|| decode::<T>(body));
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
        assert!(held <= held_max(body.len()), "{held} bytes held to decode {}", body.len());
        held
    }
    if let Ok(message) = decode::<PeerMessage>(body) {
        // What `check` says does not matter here, that it returns does.
        let _ = message.check();
    }
    let held = [
        one::<PeerMessage>(body),
        one::<Batch>(body),
        one::<ClientMessage>(body),
        one::<Result<ClientReply, StoreError>>(body),
    ];
    held.into_iter().max().unwrap_or(0)
}

/// The body of any message that a socket may carry.
fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        peer_message().prop_map(|message| body_of(&message)),
        client_message().prop_map(|message| body_of(&message)),
        answer().prop_map(|answer| body_of(&answer)),
        batch().prop_map(|batch| body_of(&batch)),
    ]
}

fn body_of<T: Serialize>(message: &T) -> Vec<u8> {
    encode(FrameKind::Peer, 1, message, 0).expect("small").as_bytes()[HEADER_LEN..].to_vec()
}

fn config(cases: u32) -> Config {
    Config { failure_persistence: None, ..Config::with_cases(cases) }
}

/// Calls `look` on many values of a strategy, the same ones in every run.
fn for_samples<T: Debug>(strategy: &BoxedStrategy<T>, count: usize, mut look: impl FnMut(T)) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..count {
        look(strategy.new_tree(&mut runner).expect("a value").current());
    }
}

fn returns<T: Serialize + DeserializeOwned + PartialEq + Debug>(kind: FrameKind, message: &T) {
    let frame = encode(kind, 77, message, 5).expect("small").into_bytes();
    let header = frame[..HEADER_LEN].try_into().expect("32 bytes");
    let header = FrameHeader::parse(header).expect("own header");
    assert_eq!((header.kind, header.request, header.payload_len), (kind, 77, 5));
    assert_eq!(header.body_len as usize, frame.len() - HEADER_LEN);
    assert_eq!(decode::<T>(&frame[HEADER_LEN..]).as_ref(), Ok(message));
}

proptest! {
    #![proptest_config(config(1024))]

    #[test]
    fn peer_messages_return(message in peer_message()) {
        returns(FrameKind::Peer, &message);
    }

    #[test]
    fn no_message_is_longer_than_it_is_taken_for(message in peer_message()) {
        let len = body_of(&message).len();
        prop_assert!(message.len_max().is_none_or(|most| len <= most), "{len} bytes: {message:?}");
    }

    #[test]
    fn batches_return(batch in batch()) {
        returns(FrameKind::Batch, &batch);
    }

    #[test]
    fn client_messages_return(message in client_message()) {
        returns(FrameKind::Client, &message);
    }

    #[test]
    fn answers_return(answer in answer()) {
        returns(FrameKind::Reply, &answer);
    }

    #[test]
    fn arbitrary_bytes_end_well(bytes in vec(any::<u8>(), 0..400)) {
        decode_as_everything(&bytes);
    }

    /// Bytes that start as a message of each kind does, so that more than the first byte is looked at.
    #[test]
    fn arbitrary_bytes_after_a_variant_end_well(variant in 0..24_u8, bytes in vec(any::<u8>(), 0..400)) {
        decode_as_everything(&[&[variant][..], &bytes].concat());
    }

    #[test]
    fn cut_messages_are_errors(body in body()) {
        for end in 0..body.len() {
            decode_as_everything(&body[..end]);
        }
        for kind in 0..4 {
            let (whole, cut) = (&body[..], &body[..body.len() - 1]);
            let both = match kind {
                0 => decode::<PeerMessage>(whole).is_ok() && decode::<PeerMessage>(cut).is_ok(),
                3 => decode::<Batch>(whole).is_ok() && decode::<Batch>(cut).is_ok(),
                1 => decode::<ClientMessage>(whole).is_ok() && decode::<ClientMessage>(cut).is_ok(),
                _ => {
                    type Answer = Result<ClientReply, StoreError>;
                    decode::<Answer>(whole).is_ok() && decode::<Answer>(cut).is_ok()
                }
            };
            prop_assert!(!both, "the last byte was not needed");
        }
        let longer = [&body[..], &[0]].concat();
        let accepted = |bytes: &[u8]| decode::<PeerMessage>(bytes).is_ok();
        prop_assert!(!(accepted(&body) && accepted(&longer)), "a byte after the message was accepted");
    }

    #[test]
    fn flipped_bits_end_well(body in body(), flips in vec((any::<usize>(), 0..8_u8), 1..6)) {
        let mut body = body;
        for (at, bit) in flips {
            let at = at % body.len();
            body[at] ^= 1 << bit;
        }
        decode_as_everything(&body);
    }

    /// Whatever number in a message is a length: it claims to be huge, and what follows does not bear it out.
    #[test]
    fn lying_lengths_end_well(body in body()) {
        let claims: [&[u8]; 4] = [
            &[0xff, 0xff, 0x03],
            &[0xff, 0xff, 0xff, 0xff, 0x0f],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        ];
        for at in 0..body.len() {
            for claim in claims {
                decode_as_everything(&[&body[..at], claim, &body[at + 1..]].concat());
                decode_as_everything(&[&body[..at], claim].concat());
            }
        }
    }

    #[test]
    fn any_32_bytes_are_a_header_within_the_limits_or_an_error(bytes in any::<[u8; HEADER_LEN]>()) {
        check_header(&bytes);
    }

    #[test]
    fn likely_headers_too(bytes in likely_header()) {
        check_header(&bytes);
    }
}

/// Headers with the parts that random bytes never meet: magic, version, kind and lengths are right, or near it.
fn likely_header() -> BoxedStrategy<[u8; HEADER_LEN]> {
    let reserved = prop_oneof![9 => Just(0_u32), 1 => any::<u32>()];
    let body_len = prop_oneof![4 => 0..=BODY_LEN_MAX + 1, 1 => any::<u32>()];
    let payload_len = prop_oneof![4 => 0..=OBJECT_LEN_MAX + 1, 1 => any::<u64>()];
    (0..3_u16, 0..6_u16, any::<u64>(), body_len, reserved, payload_len)
        .prop_map(|(version, kind, request, body_len, reserved, payload_len)| {
            let mut bytes = [0; HEADER_LEN];
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&version.to_le_bytes());
            bytes[6..8].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&request.to_le_bytes());
            bytes[16..20].copy_from_slice(&body_len.to_le_bytes());
            bytes[20..24].copy_from_slice(&reserved.to_le_bytes());
            bytes[24..].copy_from_slice(&payload_len.to_le_bytes());
            bytes
        })
        .boxed()
}

/// A header that is accepted is within every limit and is written back as it was read. Whether it was.
fn check_header(bytes: &[u8; HEADER_LEN]) -> bool {
    match FrameHeader::parse(bytes) {
        Ok(header) => {
            assert!((PROTOCOL_MIN..=PROTOCOL_MAX).contains(&header.version));
            assert!(header.body_len <= BODY_LEN_MAX && header.payload_len <= OBJECT_LEN_MAX);
            assert_eq!(&header.to_bytes(), bytes);
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Protocol);
            false
        }
    }
}

/// The properties above say something only if this holds: each variant, and headers of both sorts, do come up.
#[test]
fn every_variant_is_generated() {
    let mut seen = BTreeSet::new();
    for_samples(&peer_message(), 2_000, |message| {
        seen.insert(peer_variant(&message));
    });
    assert_eq!(seen, (0..30).collect());
    seen.clear();
    for_samples(&client_message(), 2_000, |message| {
        seen.insert(client_variant(&message));
    });
    assert_eq!(seen, (0..20).collect());
    seen.clear();
    for_samples(&client_reply(), 2_000, |reply| {
        seen.insert(reply_variant(&reply));
    });
    assert_eq!(seen, (0..13).collect());
    let mut kinds = BTreeSet::new();
    for_samples(&error(), 2_000, |error| {
        kinds.insert(error.kind().code());
    });
    assert_eq!(kinds, ErrorKind::ALL.into_iter().map(ErrorKind::code).collect());
    let mut accepted = 0;
    for_samples(&likely_header(), 2_000, |bytes| {
        accepted += u32::from(check_header(&bytes));
    });
    assert!((100..1_900).contains(&accepted), "{accepted} of 2000 headers accepted");
}

/// Messages and keys of the greatest length that is accepted, cheapest entries first: what an attacker would send to
/// make a megabyte large. Measured, so that a change to a message that makes it worse is seen.
#[test]
fn full_bodies_of_the_smallest_entries_stay_within_bounds() {
    let len = BODY_LEN_MAX as usize;
    let filled = |head: &[u8], entry: &[u8]| {
        let count = (len - head.len() - 8) / entry.len();
        let mut body = head.to_vec();
        body.extend(postcard::to_stdvec(&count).expect("a number"));
        body.extend(entry.repeat(count));
        body
    };
    let object = [1, b'k', 0, 0, 0, 0, 0, 0, 0];
    // Variant numbers as in `peer_variant` and `reply_variant`; a reply follows a 0 (it is no error).
    let bodies = [
        ("MEMBERS", filled(&[1], &[0, 0, 0, 0, 0])),
        ("LOCATED", filled(&[6], &[0, 0])),
        ("ANNOUNCE", [filled(&[9], &object), vec![0]].concat()),
        ("ANNOUNCED", filled(&[10], &[1, b'k'])),
        ("WITHDRAW", filled(&[11], &object)),
        ("LISTED", [filled(&[20], &object), vec![0]].concat()),
        ("DELETIONS", filled(&[25], &[0, 0, 0])),
        ("REPLICATE", filled(&[&[26][..], &object].concat(), &[0, 0])),
        ("SURPLUS", filled(&[28, 1, b'k', 0, 0, 0], &[0, 0])),
        ("reply: listed", [filled(&[0, 8], &[1, b'k', 0, 0]), vec![0]].concat()),
        ("reply: listed, one object, many holders", [filled(&[0, 8, 1, 1, b'k', 0], &[0]), vec![0]].concat()),
        ("batch", filled(&[], &[0, 0, 2])),
        ("batch of GET", filled(&[], &[0, 0, 3, 1, b'k', 0, 0])),
        ("get many", [filled(&[19], &[1, b'k']), vec![0, 0, 0]].concat()),
        ("reply: located many, all of them errors", [filled(&[0, 12, 0], &[1, 1, 0]), vec![0]].concat()),
        // Dimensions: refused after all of them were read.
        ("put: dimensions", filled(&[1, 1, b'k', 1], &[0])),
        ("DATA: dimensions", filled(&[4, 0, 0, 0, 1], &[0])),
    ];
    for (name, body) in bodies {
        assert!(body.len() <= len);
        let held = decode_as_everything(&body);
        println!("{name}: {held} bytes held for {} received", body.len());
        if name.chars().next().is_some_and(char::is_uppercase)
            && let Ok(message) = decode::<PeerMessage>(&body)
        {
            assert_eq!(message.check().expect_err("too many entries").kind(), ErrorKind::Protocol);
        }
    }
}

/// What decoding alone lets through.
#[test]
fn absurd_counts_and_lengths_are_refused() {
    let key = Key::new("k").expect("a key");
    let object = ObjectId { origin: NodeId(1), epoch: Epoch(1), number: 1 };
    let announced =
        Announced { key: key.clone(), object, len_bytes: 1, role: Role::Replica, replicas: 2, ttl_ms: None };
    let absurd = Announced { replicas: REPLICAS_MAX + 1, ..announced.clone() };
    let text = "n".repeat(NODE_TEXT_LEN_MAX + 1);
    let holder = |address: &str| Holder { node: NodeId(1), address: address.to_owned() };
    let member = |name: &str, address: &str| Member {
        node: NodeId(1),
        epoch: Epoch(1),
        name: name.to_owned(),
        address: address.to_owned(),
    };
    let hello = |member| PeerMessage::Hello { member, version_min: 1, version_max: 1, keeps: true };
    let members = |member| PeerMessage::Members { members: vec![Present { member, room_bytes: 1 }] };
    let many = vec![holder("a"); usize::from(REPLICAS_MAX) + 1];
    for message in [
        PeerMessage::Announce { objects: vec![announced.clone(), absurd.clone()], exclusive: false },
        PeerMessage::Asked { object: Some(absurd.clone()) },
        PeerMessage::Listed { objects: vec![absurd.clone()], more: false },
        PeerMessage::Replicate { object: absurd, holders: vec![holder("a")] },
        PeerMessage::Replicate { object: announced.clone(), holders: Vec::new() },
        PeerMessage::Replicate { object: announced.clone(), holders: many },
        PeerMessage::Replicate { object: announced, holders: vec![holder(&text)] },
        PeerMessage::Surplus { key: key.clone(), object, lasting: Vec::new() },
        PeerMessage::Surplus { key, object, lasting: vec![(NodeId(1), Epoch(1)); 17] },
        hello(member(&text, "a")),
        hello(member("n", &text)),
        members(member(&text, "a")),
        members(member("n", &text)),
    ] {
        let error = message.check().expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Protocol, "{}: {error}", message.name());
    }
}

/// A list that is as long as is accepted, with the longest keys, fits a frame or is refused when it is encoded.
#[test]
fn full_lists_fit_or_are_refused() {
    let key = Key::new(&"k".repeat(KEY_LEN_MAX)).expect("the longest");
    let object = ObjectId { origin: NodeId(u64::MAX), epoch: Epoch(u64::MAX), number: u64::MAX };
    let announced = Announced {
        key: key.clone(),
        object,
        len_bytes: OBJECT_LEN_MAX,
        role: Role::Copy,
        replicas: REPLICAS_MAX,
        ttl_ms: Some(u64::MAX),
    };
    let objects = vec![announced.clone(); KEYS_PER_MESSAGE_MAX];
    let message = PeerMessage::Announce { objects, exclusive: false };
    assert_eq!(message.check(), Ok(()));
    returns(FrameKind::Peer, &message);
    let text = "n".repeat(NODE_TEXT_LEN_MAX);
    let member =
        Member { node: NodeId(u64::MAX), epoch: Epoch(u64::MAX), name: text.clone(), address: text.clone() };
    let members = vec![Present { member, room_bytes: u64::MAX }; KEYS_PER_MESSAGE_MAX];
    let message = PeerMessage::Members { members };
    assert_eq!(message.check(), Ok(()));
    returns(FrameKind::Peer, &message);
    let holder = Holder { node: NodeId(u64::MAX), address: text };
    let holders = vec![holder; usize::from(REPLICAS_MAX)];
    let message = PeerMessage::Replicate { object: announced, holders };
    assert_eq!(message.check(), Ok(()));
    returns(FrameKind::Peer, &message);
    let objects =
        vec![Listed { key, len_bytes: 1, holders: vec!["n".repeat(1 << 10); 3] }; KEYS_PER_MESSAGE_MAX];
    let reply: Result<_, StoreError> = Ok(ClientReply::Listed { objects, more: true });
    let error = encode(FrameKind::Reply, 1, &reply, 0).expect_err("three megabytes");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}
