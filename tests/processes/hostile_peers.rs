//! Peers that break the rules over TCP: garbage, drips, lies. Whatever they send, their connection is all they lose: a
//! member of the cluster and a client of each node check after each.

use std::io::Write as _;
use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, ObjectMeta, Store};
use hetmem_core::wire::{Announced, Batch, Batched, FrameKind, Granted, Holder, PeerMessage, Role, encode};
use hetmem_core::{Epoch, Generation, LeaseId, NodeId, ObjectId, RemoteExtent, RemoteKey, fingerprint};
use hetmem_tests::content::{bytes_of, key, next};
use hetmem_tests::daemon::{Daemon, Serve, descriptors_of, eventually};
use hetmem_tests::packets::{RawPeer, hello};

struct Scene {
    node: Daemon,
    member: Daemon,
    here: Store,
    there: Store,
    checks: u64,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let node = Serve::new(folder.path(), name).start();
        let member = Serve::new(folder.path(), &format!("{name}-member")).join(&node.address).start();
        let (here, there) = (node.connect(), member.connect());
        node.settles(&here, "the member is linked", |status| status.peers.iter().any(|peer| peer.linked));
        Self { node, member, here, there, checks: 0, _folder: folder }
    }

    fn refused(&self) -> u64 {
        self.here.status().expect("it answers").counters.refused
    }

    /// Both nodes serve each other and their clients.
    fn is_unharmed(&mut self) {
        self.checks += 1;
        for len in [1000, 300_000] {
            for (from, to) in [(&self.here, &self.there), (&self.there, &self.here)] {
                let name = format!("check-{}-{len}", self.checks);
                let bytes = bytes_of(&name, len, 0);
                from.put_bytes(&key(&name), &bytes).expect("room");
                let object = to.get(&key(&name)).expect("it is on the other node");
                assert!(*object == *bytes, "{name} has other bytes");
                drop(object);
                assert!(from.delete(&key(&name)).expect("deleted"));
            }
        }
        self.node.assert_sound();
        self.member.assert_sound();
    }

    /// Nothing is held for anybody, and the member is the only peer.
    fn settles(&self) {
        self.node.settles(&self.here, "nothing is left of strangers", |status| {
            let linked = status.peers.iter().filter(|peer| peer.linked).count();
            let used: u64 = status.tiers.iter().map(|tier| tier.used_bytes).sum();
            (linked, used, status.reservations, status.draining, status.leases) == (1, 0, 0, 0, 0)
        });
    }
}

fn with(mut bytes: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    bytes[at] = value;
    bytes
}

fn peer_frame(message: &PeerMessage) -> Vec<u8> {
    encode(FrameKind::Peer, 1, message, 0).expect("short").into_bytes()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 5;
    (0..len).map(|_| next(&mut state).to_le_bytes()[0]).collect()
}

#[test]
fn connections_that_begin_with_garbage_are_closed_and_counted() {
    let mut scene = Scene::new("garbage");
    let open = RawPeer::open_frame((1, 1));
    let long = encode(FrameKind::Fabric, 0, &vec![0_u8; 5000], 0).expect("encoded").into_bytes();
    for (what, bytes, more_follows) in [
        ("noise", noise(4096), true),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n0123456789".to_vec(), true),
        ("an unknown kind", with(open.clone(), 6, 77), true),
        ("a peer's frame", peer_frame(&PeerMessage::Alive), true),
        ("a client's frame", with(open.clone(), 6, 2), true),
        ("reserved bits", with(open.clone(), 20, 1), true),
        ("a payload", with(open.clone(), 24, 1), true),
        ("an unknown message", with(open.clone(), 32, 9), true),
        ("a body over the limit", long, true),
        ("a body over every limit", with(open.clone(), 19, 0xff), true),
        ("an unknown token", RawPeer::stream_frame([9; 16]), true),
        ("half a header", open[..16].to_vec(), false),
        ("half a body", open[..open.len() - 3].to_vec(), false),
        ("nothing", Vec::new(), false),
    ] {
        let before = scene.refused();
        let mut peer = RawPeer::connect(&scene.node.address);
        peer.send(&bytes);
        if !more_follows {
            peer.0.shutdown(std::net::Shutdown::Write).expect("a connection");
        }
        peer.ends();
        eventually(what, || {
            let refused = scene.refused();
            if refused == before + 1 { Ok(()) } else { Err(format!("{refused} refused, {before} before")) }
        });
    }
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn peers_of_another_version_hear_both_versions() {
    let mut scene = Scene::new("versions");
    let mut fabric = RawPeer::connect(&scene.node.address);
    fabric.send(&RawPeer::open_frame((7, 9)));
    let said = String::from_utf8_lossy(&fabric.ends()).into_owned();
    assert!(said.contains("7 to 9") && said.contains("1 to 1"), "{said}");
    let (mut engine, _) = RawPeer::open(&scene.node.address);
    engine.say(0, &hello("newer", (7, 9)), 0);
    let failed = engine.hears(|message| matches!(message, PeerMessage::Failed { .. }));
    let Some((_, PeerMessage::Failed { error })) = failed else { panic!("{failed:?}") };
    assert!(error.to_string().contains("7 to 9") && error.to_string().contains("1 to 1"), "{error}");
    engine.ends();
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn drips_and_silence_before_the_handshake_are_closed_and_counted() {
    let mut scene = Scene::new("drips");
    let before = scene.refused();
    let mut silent: Vec<RawPeer> = (0..20).map(|_| RawPeer::connect(&scene.node.address)).collect();
    let mut drip = RawPeer::connect(&scene.node.address);
    let mut sender = drip.0.try_clone().expect("a descriptor is left");
    let dripping = std::thread::spawn(move || {
        for byte in RawPeer::open_frame((1, 1)) {
            if sender.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    scene.is_unharmed();
    drip.ends();
    silent.iter_mut().for_each(|peer| drop(peer.ends()));
    assert_eq!(scene.refused(), before + 21);
    dripping.join().expect("no panic");
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn more_connections_than_handshakes_at_once_are_refused_and_a_member_gets_in_after() {
    let mut scene = Scene::new("flood");
    // Grants and data streams that come with the first use stay.
    scene.is_unharmed();
    let before = (scene.refused(), descriptors_of(scene.node.pid()));
    let flood: Vec<RawPeer> = (0..300).map(|_| RawPeer::connect(&scene.node.address)).collect();
    eventually("those over the limit are refused", || {
        let refused = scene.refused() - before.0;
        if refused >= 44 { Ok(()) } else { Err(format!("{refused}")) }
    });
    scene.is_unharmed();
    let folder = tempfile::tempdir().expect("a folder");
    let late = Serve::new(folder.path(), "late-member").join(&scene.node.address).start();
    late.settles(&late.connect(), "it gets in", |status| status.peers.iter().any(|peer| peer.linked));
    drop(flood);
    drop(late);
    scene.settles();
    eventually("descriptors are closed", || {
        let now = descriptors_of(scene.node.pid());
        if now <= before.1 { Ok(()) } else { Err(format!("{now}, {} before", before.1)) }
    });
    scene.is_unharmed();
}

fn holder(address: &str) -> Holder {
    Holder { node: NodeId(fingerprint(b"liar")), address: address.to_owned() }
}

fn replicate(replicas: u8, holders: Vec<Holder>) -> PeerMessage {
    let (object, role) = (object("liar"), Role::Replica);
    let object =
        Announced { key: key("asked"), object, len_bytes: 1 << 20, role, replicas, ttl_ms: Some(u64::MAX) };
    PeerMessage::Replicate { object, holders }
}

#[test]
fn a_peer_that_asks_for_replicas_of_nothing_costs_no_memory() {
    let mut scene = Scene::new("replicas");
    let mut liar = RawPeer::join(&scene.node.address, "liar");
    // Of what only it has, and does not give; of what nobody has; of what cannot fit; of another node's claims.
    for number in 1..200 {
        let mut message = replicate(16, vec![holder("127.0.0.1:9")]);
        if let PeerMessage::Replicate { object, holders } = &mut message {
            object.key = key(&format!("asked/{number}"));
            object.len_bytes = if number % 3 == 0 { u64::MAX } else { 1 << 20 };
            if number % 5 == 0 {
                holders[0].node = NodeId(77);
            }
        }
        liar.say(number, &message, 0);
    }
    for number in 0..50 {
        let object = object("liar");
        let lasting = vec![(NodeId(number), Epoch(1))];
        liar.say(0, &PeerMessage::Surplus { key: key("check"), object, lasting }, 0);
        liar.say(0, &PeerMessage::Deletions { objects: vec![object; 100] }, 0);
        liar.say(0, &PeerMessage::Keeps { keeps: number % 2 == 0 }, 0);
        liar.say(0, &PeerMessage::Members { members: Vec::new() }, 0);
        liar.say(0, &PeerMessage::Leave, 0);
        liar.say(0, &PeerMessage::Join { heir: true }, 0);
    }
    let refused = liar.hears(|message| matches!(message, PeerMessage::Failed { .. }));
    assert!(refused.is_some(), "some of it at once");
    scene.is_unharmed();
    drop(liar);
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn frames_that_are_none_close_their_link_and_are_counted() {
    let mut scene = Scene::new("frames");
    let heartbeat = peer_frame(&PeerMessage::Alive);
    let get = |name: &str| PeerMessage::Get { key: key(name), range: None, inline_max: 0 };
    let other = hello("another", (1, 1));
    let batch = |messages: Vec<Batched>, payload_len| {
        encode(FrameKind::Batch, 0, &Batch(messages), payload_len).expect("encoded").into_bytes()
    };
    let plain = |message| Batched { request: 0, payload_len: 0, message };
    let beat = || plain(PeerMessage::Alive);
    let empty = batch(vec![beat(), beat()], 0);
    for (what, greeted, bytes) in [
        ("a question before HELLO", false, peer_frame(&get("k"))),
        ("a heartbeat before HELLO", false, heartbeat.clone()),
        ("noise before HELLO", false, noise(500)),
        ("noise", true, noise(500)),
        ("an unknown message", true, with(heartbeat.clone(), 32, 200)),
        ("a longer body than its message", true, with([&heartbeat[..], &[0]].concat(), 16, 2)),
        ("a client's frame", true, with(heartbeat.clone(), 6, 2)),
        ("a fabric frame", true, with(heartbeat.clone(), 6, 4)),
        ("a body over the limit", true, with(heartbeat.clone(), 19, 0xff)),
        ("a payload over the limit", true, with(heartbeat.clone(), 31, 0xff)),
        ("a payload where none belongs", true, with(heartbeat.clone(), 24, 9)),
        ("another name", true, peer_frame(&other)),
        ("a batch before HELLO", false, empty.clone()),
        ("a batch of nothing", true, batch(Vec::new(), 0)),
        ("a batch that is cut short", true, with(empty.clone(), 16, 5)),
        ("a batch with noise in it", true, with(empty, 35, 200)),
        ("a batch of too many", true, batch(vec![beat(); 1025], 0)),
        ("a batch with another HELLO", true, batch(vec![beat(), plain(other.clone())], 0)),
        ("a batch without its payload", true, batch(vec![Batched { payload_len: 9, ..plain(data(9)) }], 0)),
        ("a batch with a payload of nobody's", true, batch(vec![beat(), beat()], 9)),
        ("an empty list of holders", true, peer_frame(&PeerMessage::Located { holders: Vec::new() })),
        ("a list of replicas without holders", true, peer_frame(&replicate(2, Vec::new()))),
        ("more replicas than there may be", true, peer_frame(&replicate(17, vec![holder("127.0.0.1:9")]))),
        ("more holders than there may be", true, peer_frame(&replicate(2, vec![holder("127.0.0.1:9"); 17]))),
        ("an endless address", true, peer_frame(&replicate(2, vec![holder(&"9".repeat(300))]))),
    ] {
        let before = scene.refused();
        let mut peer = if greeted {
            RawPeer::join(&scene.node.address, "stranger")
        } else {
            RawPeer::open(&scene.node.address).0
        };
        peer.send(&bytes);
        peer.ends();
        eventually(what, || {
            let refused = scene.refused();
            if refused == before + 1 { Ok(()) } else { Err(format!("{refused} refused, {before} before")) }
        });
    }
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn links_that_fall_silent_or_drip_are_closed() {
    let mut scene = Scene::new("silence");
    // Five missed heartbeats of 200 ms are a death, with or without a HELLO.
    let (mut never_greeted, _) = RawPeer::open(&scene.node.address);
    let mut silent = RawPeer::join(&scene.node.address, "silent");
    let mut half = RawPeer::join(&scene.node.address, "half");
    half.send(&peer_frame(&PeerMessage::Alive)[..20]);
    // A payload that would take for ever, for a question that nobody asked.
    let mut endless = RawPeer::join(&scene.node.address, "endless");
    endless.say(77, &data(1 << 39), 1 << 39);
    let mut sender = endless.0.try_clone().expect("a descriptor is left");
    let dripping = std::thread::spawn(move || {
        while sender.write_all(&[0; 1000]).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    for peer in [&mut never_greeted, &mut silent, &mut half, &mut endless] {
        peer.ends();
    }
    dripping.join().expect("no panic");
    scene.is_unharmed();
    scene.settles();
}

fn object(name: &str) -> ObjectId {
    ObjectId { origin: NodeId(fingerprint(name.as_bytes())), epoch: Epoch(1), number: 1 }
}

fn data(len_bytes: u64) -> PeerMessage {
    PeerMessage::Data {
        object: object("liar"),
        meta: ObjectMeta::bytes(len_bytes).expect("a length"),
        origin: hetmem_core::wire::Origin::HOST,
    }
}

/// A peer that says it holds a key, and what it answers when it is asked for it. Returns what the get led to.
fn lie(
    scene: &Scene,
    name: &str,
    len_bytes: u64,
    answer: impl FnOnce(&mut RawPeer, u64),
) -> Option<ErrorKind> {
    let mut liar = RawPeer::join(&scene.node.address, "liar");
    let object = object("liar");
    let announced =
        Announced { key: key(name), object, len_bytes, role: Role::Original, replicas: 1, ttl_ms: None };
    liar.say(5, &PeerMessage::Announce { objects: vec![announced], exclusive: false }, 0);
    let kept = liar.hears(|message| matches!(message, PeerMessage::Announced { .. }));
    assert!(kept.is_some(), "the announcement is answered");
    std::thread::scope(|scope| {
        let get = scope.spawn(|| {
            let options =
                GetOptions { timeout: Duration::from_secs(2), verify: true, ..GetOptions::default() };
            scene.here.get_with(&key(name), &options).err().map(|error| error.kind())
        });
        let asked = liar.hears(|message| matches!(message, PeerMessage::Get { .. }));
        if let Some((request, _)) = asked {
            answer(&mut liar, request);
        }
        let result = get.join().expect("no panic");
        drop(liar);
        result
    })
}

fn grant(len_bytes: u64) -> PeerMessage {
    let extent = |len_bytes| RemoteExtent { key: RemoteKey(42), offset: 0, len_bytes };
    let granted = Granted {
        extent: extent(len_bytes),
        generation: Generation(7),
        generation_at: extent(8),
        lease: LeaseId(1),
        lease_ms: 10_000,
    };
    PeerMessage::Grant {
        object: object("liar"),
        meta: ObjectMeta::bytes(len_bytes).expect("a length"),
        granted: Box::new(granted),
        origin: hetmem_core::wire::Origin::HOST,
    }
}

#[test]
fn a_peer_that_lies_about_an_object_costs_an_error_and_no_memory() {
    let mut scene = Scene::new("lies");
    let clear = [
        ErrorKind::NotFound,
        ErrorKind::PeerLost,
        ErrorKind::TimedOut,
        ErrorKind::Unavailable,
        ErrorKind::Protocol,
        ErrorKind::Stale,
    ];
    type Lie = fn(&mut RawPeer, u64);
    let lies: [(&str, u64, Lie); 8] = [
        ("no answer", 1000, |_, _| {}),
        ("goes away", 1000, |liar, _| drop(liar.0.shutdown(std::net::Shutdown::Both))),
        ("less payload than it says", 1000, |liar, request| {
            liar.say(request, &data(1000), 1000);
            liar.send(&[1; 500]);
            drop(liar.0.shutdown(std::net::Shutdown::Write));
        }),
        ("a payload of another length than the object", 1000, |liar, request| {
            liar.say(request, &data(1000), 2000);
            liar.send(&[1; 2000]);
        }),
        ("an object that nobody can read there", 300_000, |liar, request| {
            liar.say(request, &grant(300_000), 0);
        }),
        ("another length than it is granted for", 300_000, |liar, request| {
            let PeerMessage::Grant { object, granted, .. } = grant(300_000) else { return };
            let meta = ObjectMeta::bytes(999).expect("a length");
            liar.say(
                request,
                &PeerMessage::Grant { object, meta, granted, origin: hetmem_core::wire::Origin::HOST },
                0,
            );
        }),
        ("an answer to another question", 1000, |liar, request| {
            liar.say(request, &PeerMessage::Dropped { existed: true }, 0);
        }),
        ("itself as the holder, again and again", 1000, |liar, request| {
            let holders = vec![Holder { node: object("liar").origin, address: "127.0.0.1:9".to_owned() }];
            let mut request = request;
            loop {
                liar.say(request, &PeerMessage::Located { holders: holders.clone() }, 0);
                match liar.hears(|message| matches!(message, PeerMessage::Get { .. })) {
                    Some((next, _)) => request = next,
                    None => return,
                }
            }
        }),
    ];
    for (what, len_bytes, answer) in lies {
        let kind = lie(&scene, what, len_bytes, answer);
        assert!(kind.is_some_and(|kind| clear.contains(&kind)), "{what}: {kind:?}");
        scene.settles();
    }
    // Longer than this node's whole store.
    let kind = lie(&scene, "too long", 1 << 40, |liar, request| liar.say(request, &grant(1 << 40), 0));
    assert!(matches!(kind, Some(ErrorKind::NoSpace | ErrorKind::TooLarge)), "{kind:?}");
    // Other bytes than their checksum says: the client's own check finds that.
    let kind = lie(&scene, "wrong bytes", 1000, |liar, request| {
        let checksum = hetmem_core::Checksum::Xxh3Blocks(12345);
        let meta = ObjectMeta::bytes(1000).expect("a length").with_checksum(checksum);
        liar.say(
            request,
            &PeerMessage::Data { object: object("liar"), meta, origin: hetmem_core::wire::Origin::HOST },
            1000,
        );
        liar.send(&[1; 1000]);
    });
    assert_eq!(kind, Some(ErrorKind::Corrupt));
    let _ = scene.here.evict(&key("wrong bytes"), true);
    scene.settles();
    scene.is_unharmed();
}

/// The same for batches: whatever a peer answers to questions about many keys, each has its own end, and none gets
/// another's bytes.
#[test]
fn a_peer_that_lies_about_many_objects_costs_errors_and_no_memory() {
    let mut scene = Scene::new("batches");
    type Lie = fn(&mut RawPeer, &[u64]);
    let lies: [(&str, Lie, [bool; 3]); 5] = [
        (
            "one of three",
            |liar, asked| {
                liar.say_batch(&Batch(vec![item(asked[1], 100), item(asked[1], 50)]), 150);
                liar.send(&[[1; 100].as_slice(), &[9; 50]].concat());
            },
            [false, true, false],
        ),
        (
            "all of them, backwards, with strangers between",
            |liar, asked| {
                let batch =
                    vec![item(asked[2], 100), item(777, 33), item(asked[1], 100), item(asked[0], 100)];
                liar.say_batch(&Batch(batch), 333);
                liar.send(&[[2; 100].as_slice(), &[9; 33], &[1; 100], &[0; 100]].concat());
            },
            [true, true, true],
        ),
        (
            "payloads of another length",
            |liar, asked| {
                let long = Batched { payload_len: 101, ..item(asked[0], 100) };
                let short = Batched { payload_len: 99, ..item(asked[1], 100) };
                liar.say_batch(&Batch(vec![long, short, item(asked[2], 100)]), 300);
                liar.send(&[[9; 200].as_slice(), &[2; 100]].concat());
            },
            [false, false, true],
        ),
        (
            "half of the payload, and then nothing",
            |liar, asked| {
                let batch = asked.iter().map(|asked| item(*asked, 100)).collect();
                liar.say_batch(&Batch(batch), 300);
                liar.send(&[0; 150]);
                drop(liar.0.shutdown(std::net::Shutdown::Write));
            },
            [false; 3],
        ),
        (
            "more payload than there is",
            |liar, asked| {
                let batch = asked.iter().map(|asked| item(*asked, 100)).collect();
                liar.say_batch(&Batch(batch), 299);
                liar.send(&[0; 299]);
            },
            [false; 3],
        ),
    ];
    for (what, answer, there) in lies {
        let mut liar = RawPeer::join(&scene.node.address, "liar");
        let keys = [0, 1, 2].map(|number| key(&format!("{what}/{number}")));
        let objects = keys.iter().map(|key| Announced {
            key: key.clone(),
            object: object("liar"),
            len_bytes: 100,
            role: Role::Original,
            replicas: 0,
            ttl_ms: None,
        });
        liar.say(0, &PeerMessage::Join { heir: false }, 0);
        liar.say(5, &PeerMessage::Announce { objects: objects.collect(), exclusive: false }, 0);
        assert!(liar.hears(|message| matches!(message, PeerMessage::Announced { .. })).is_some());
        let results = std::thread::scope(|scope| {
            let get = scope.spawn(|| {
                let timeout = Duration::from_secs(1);
                let options = GetOptions { timeout, keep: false, ..GetOptions::default() };
                scene.here.get_many_with(&keys, &options)
            });
            let asked: Vec<u64> = keys
                .iter()
                .filter_map(|_| liar.hears(|message| matches!(message, PeerMessage::Get { .. })))
                .map(|(request, _)| request)
                .collect();
            answer(&mut liar, &asked);
            get.join().expect("no panic")
        });
        for ((number, result), there) in (0..).zip(&results).zip(there) {
            match result {
                Ok(object) => assert!(there && **object == [number; 100], "{what}: {number}"),
                Err(error) => assert!(!there, "{what}: {number}: {error}"),
            }
        }
        drop((results, liar));
        scene.settles();
    }
    scene.is_unharmed();
}

fn item(request: u64, len_bytes: u64) -> Batched {
    Batched { request, payload_len: len_bytes, message: data(len_bytes) }
}

#[test]
fn a_peer_that_asks_and_never_reads_holds_nobody_up() {
    let mut scene = Scene::new("deaf");
    scene.here.put_bytes(&key("large"), &bytes_of("large", 2 << 20, 0)).expect("room");
    let mut deaf = RawPeer::join(&scene.node.address, "deaf");
    deaf.0.set_write_timeout(Some(Duration::from_millis(200))).expect("a socket");
    let get = PeerMessage::Get { key: key("large"), range: None, inline_max: u64::MAX };
    for request in 1..200 {
        deaf.say(request, &get, 0);
    }
    scene.is_unharmed();
    // Deleted while it is being sent: its memory comes back when the link goes.
    assert!(scene.here.delete(&key("large")).expect("deleted"));
    scene.is_unharmed();
    drop(deaf);
    scene.settles();
}

#[test]
fn data_streams_serve_what_is_registered_and_nothing_else() {
    let mut scene = Scene::new("streams");
    let (link, token) = RawPeer::open(&scene.node.address);
    let mut link = link;
    link.say(0, &hello("reader", (1, 1)), 0);
    let mut stream = RawPeer::connect(&scene.node.address);
    stream.send(&RawPeer::stream_frame(token));
    // A key that names nothing: an error in place of the bytes, and the stream goes on.
    for number in 0..3_u32 {
        let mut request = b"HTMR".to_vec();
        request.extend(number.to_le_bytes());
        request.extend([99_u64, 0, 4096].into_iter().flat_map(u64::to_le_bytes));
        stream.send(&request);
        let mut head = [0; 16];
        std::io::Read::read_exact(&mut stream.0, &mut head).expect("an answer");
        let status = u16::from_le_bytes([head[2], head[3]]);
        assert_eq!((&head[..2], status), (&b"HA"[..], ErrorKind::Stale.code()));
        let len = usize::from(head[8]) + 256 * usize::from(head[9]);
        std::io::Read::read_exact(&mut stream.0, &mut vec![0; len]).expect("the error");
    }
    let before = scene.refused();
    stream.send(&noise(32));
    stream.ends();
    eventually("it is counted", || if scene.refused() > before { Ok(()) } else { Err("not yet".to_owned()) });
    drop(link);
    scene.is_unharmed();
    scene.settles();
}
