//! Clients that break the rules on the Unix socket, with their page, or with granted memory. Whatever they do, they
//! lose their own session at most: a bystander checks after each.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hetmem_client::{ErrorKind, GetOptions, Store, UnixSession};
use hetmem_core::wire::{ClientMessage, ClientReply, IfExists, PutHints};
use hetmem_core::{Checksum, Extent, Generation, ObjectMeta, SegmentId, StoreError, checksum};
use hetmem_host_mem::{Answer, Session as _, WriteMapping, socket};
use hetmem_tests::content::{below, bytes_of, key, next};
use hetmem_tests::daemon::{Daemon, Serve, descriptors_of, eventually};
use hetmem_tests::packets::{HELLO, RawClient, packet};

/// A node, and a client of it that keeps the rules.
struct Scene {
    node: Daemon,
    bystander: Store,
    checks: u64,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let node = Serve::new(folder.path(), name).start();
        let bystander = node.connect();
        bystander.put_bytes(&key("precious"), &bytes_of("precious", 500_000, 0)).expect("room");
        Self { node, bystander, checks: 0, _folder: folder }
    }

    fn refused(&self) -> u64 {
        self.bystander.status().expect("it answers").counters.refused
    }

    /// Others are served as before, and what was stored is what it was.
    fn is_unharmed(&mut self) {
        self.checks += 1;
        for len in [100, 200_000] {
            let name = format!("check-{}-{len}", self.checks);
            self.bystander.put_bytes(&key(&name), &bytes_of(&name, len, 0)).expect("room");
            assert!(*self.bystander.get(&key(&name)).expect("it was put") == *bytes_of(&name, len, 0));
            assert!(self.bystander.delete(&key(&name)).expect("deleted"));
        }
        let fresh = self.node.connect();
        let object = fresh.get(&key("precious")).expect("it is still there");
        assert!(object.verify().expect("its checksum agrees"));
        assert!(*object == *bytes_of("precious", 500_000, 0));
        drop(object);
        drop(fresh);
        self.node.assert_sound();
    }

    /// Only the bystander is left.
    fn settles(&self) {
        self.node.settles(&self.bystander, "only the bystander is left", |status| {
            (status.clients, status.reservations, status.draining) == (1, 0, 0)
        });
    }
}

/// A message that names the key "aaaa", with other bytes in its place.
fn stat_of(name: &[u8]) -> Vec<u8> {
    let timeout_ms = 0;
    let mut bytes = packet(3, &ClientMessage::Stat { key: key("aaaa"), timeout_ms });
    let at = bytes.windows(4).position(|four| four == b"aaaa").expect("the key");
    // The length before it is one byte for short keys, two for long ones.
    let mut length = Vec::new();
    let mut left = name.len();
    while left > 127 {
        length.push(u8::try_from(left % 128).expect("seven bits") | 128);
        left /= 128;
    }
    length.push(u8::try_from(left).expect("seven bits"));
    bytes.splice(at - 1..at + 4, [&length, name].concat());
    let body_len = u32::try_from(bytes.len() - 32).expect("short");
    bytes[16..20].copy_from_slice(&body_len.to_le_bytes());
    bytes
}

fn with(mut bytes: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    bytes[at] = value;
    bytes
}

fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let status = packet(2, &ClientMessage::Status);
    let mut state = 3;
    let mut noise = |len: usize| (0..len).map(|_| next(&mut state).to_le_bytes()[0]).collect::<Vec<u8>>();
    vec![
        ("one byte", noise(1)),
        ("less than a header", noise(31)),
        ("no header", noise(32)),
        ("a long packet of noise", noise(100_000)),
        ("a header without its body", status[..32].to_vec()),
        ("more body than it says", [&status[..], &[0; 9]].concat()),
        ("a body over the limit", with(status.clone(), 19, 0xff)),
        ("a payload over the limit", with(status.clone(), 31, 0xff)),
        ("a payload that is not there", with(status.clone(), 24, 5)),
        ("reserved bits", with(status.clone(), 20, 1)),
        ("a peer's frame", with(status.clone(), 6, 1)),
        ("an unknown kind", with(status.clone(), 6, 99)),
        ("an unknown message", with(status.clone(), 32, 200)),
        ("a key that is not UTF-8", stat_of(b"\xff\xfe\xfd")),
        ("an empty key", stat_of(b"")),
        ("a key with a NUL byte", stat_of(b"a\0b")),
        ("a key that is too long", stat_of(&[b'k'; 513])),
        ("longer than any packet", noise(socket::PACKET_LEN_MAX + 1)),
    ]
}

#[test]
fn packets_that_are_none_close_their_session_and_are_counted() {
    let mut scene = Scene::new("garbage");
    for (what, bytes) in garbage() {
        for greeted in [false, true] {
            let before = scene.refused();
            let client = if greeted {
                RawClient::greet(&scene.node.socket).0
            } else {
                RawClient::connect(&scene.node.socket)
            };
            client.send(&bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
            let errors = client.ends();
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::Protocol, "{what}: {error}");
            }
            assert_eq!(scene.refused(), before + 1, "{what}, greeted: {greeted}");
        }
    }
    // A message that is one, too early.
    let before = scene.refused();
    let client = RawClient::connect(&scene.node.socket);
    client.send(&packet(1, &ClientMessage::Status)).expect("the node reads");
    assert!(client.receive().is_none(), "no answer before hello");
    assert_eq!(scene.refused(), before + 1);
    scene.is_unharmed();
    scene.settles();
}

#[test]
fn a_client_of_another_version_hears_both_versions() {
    let mut scene = Scene::new("version");
    // Its hello says so, in a frame that this version can read.
    let client = RawClient::connect(&scene.node.socket);
    let hello = ClientMessage::Hello { version_min: 7, version_max: 9 };
    client.send(&packet(5, &hello)).expect("the node reads");
    let (request, reply, _) = client.receive().expect("an answer");
    let error = reply.expect_err("no common version");
    assert_eq!((request, error.kind()), (5, ErrorKind::Protocol));
    assert!(error.to_string().contains("7 to 9") && error.to_string().contains("1 to 1"), "{error}");
    // Its frames are of that version already.
    let client = RawClient::connect(&scene.node.socket);
    client.send(&with(packet(6, &hello), 4, 9)).expect("the node reads");
    let (request, reply, _) = client.receive().expect("an answer");
    let error = reply.expect_err("no common version");
    assert_eq!((request, error.kind()), (6, ErrorKind::Protocol));
    assert!(error.to_string().contains("protocol 9") && error.to_string().contains("1 to 1"), "{error}");
    assert!(client.receive().is_none(), "it is closed then");
    scene.is_unharmed();
}

#[test]
fn a_client_that_says_nothing_is_closed_and_counted() {
    let mut scene = Scene::new("silent");
    let before = scene.refused();
    let silent: Vec<_> = (0..5).map(|_| RawClient::connect(&scene.node.socket)).collect();
    let (quiet_later, ..) = RawClient::greet(&scene.node.socket);
    scene.is_unharmed();
    for client in &silent {
        assert!(client.receive().is_none());
    }
    assert_eq!(scene.refused(), before + 5);
    // Who has introduced itself may be silent for as long as it likes.
    quiet_later.send(&packet(2, &ClientMessage::Status)).expect("the node reads");
    assert!(matches!(quiet_later.receive(), Some((2, Ok(ClientReply::Status(_)), _))));
    drop(quiet_later);
    scene.settles();
}

#[test]
fn a_client_that_never_reads_is_closed_and_a_slow_one_gets_all_its_answers() {
    let mut scene = Scene::new("unread");
    let (slow, ..) = RawClient::greet(&scene.node.socket);
    let asked: u64 = 3000;
    for request in 2..asked + 2 {
        slow.send(&packet(request, &ClientMessage::Status)).expect("the node reads");
    }
    let before = scene.refused();
    let (deaf, ..) = RawClient::greet(&scene.node.socket);
    let mut sent = 0_u64;
    let end = loop {
        match deaf.send(&packet(2, &ClientMessage::Status)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    println!("closed after {sent} questions");
    assert!(matches!(end, rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET), "{end}");
    assert!(sent > asked);
    assert_eq!(scene.refused(), before + 1);
    scene.is_unharmed();
    for request in 2..asked + 2 {
        let (answered, reply, _) = slow.receive().expect("an answer");
        assert!(answered == request && reply.is_ok(), "{request}: {answered} {reply:?}");
    }
    drop((slow, deaf));
    scene.settles();
}

#[test]
fn clients_that_come_and_go_at_once_leave_nothing() {
    let mut scene = Scene::new("flood");
    let before = descriptors_of(scene.node.pid());
    for round in 0..300 {
        let client = RawClient::connect(&scene.node.socket);
        if round % 3 == 0 {
            client.send(&packet(1, &HELLO)).expect("the node reads");
        }
    }
    scene.settles();
    scene.is_unharmed();
    eventually("descriptors are closed", || {
        let now = descriptors_of(scene.node.pid());
        if now <= before { Ok(()) } else { Err(format!("{now}, {before} before")) }
    });
}

#[test]
fn descriptors_that_a_client_sends_are_closed() {
    let mut scene = Scene::new("descriptors");
    let before = descriptors_of(scene.node.pid());
    let (client, ..) = RawClient::greet(&scene.node.socket);
    let file = File::open("/dev/null").expect("a file");
    let status = packet(2, &ClientMessage::Status);
    for _ in 0..50 {
        let four = [file.as_fd(), file.as_fd(), file.as_fd(), file.as_fd()];
        socket::send(&client.0, &[std::io::IoSlice::new(&status)], &four).expect("the node reads");
        assert!(matches!(client.receive(), Some((2, Ok(_), _))));
    }
    drop(client);
    scene.settles();
    assert_eq!(descriptors_of(scene.node.pid()), before);
    scene.is_unharmed();
}

/// Whether anything can be changed through a descriptor, or one opened anew from it.
fn is_read_only(fd: &OwnedFd) {
    let again = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own = File::from(fd.try_clone().expect("a descriptor is left"));
    let mut ways = vec![("as it came", own)];
    if let Ok(opened) = OpenOptions::new().read(true).write(true).open(again) {
        ways.push(("opened again", opened));
    }
    let len = ways[0].1.metadata().expect("a file").len();
    for (how, file) in &ways {
        assert!(file.write_at(b"scribble", 0).is_err(), "{how}: it can be written");
        assert!(file.set_len(0).is_err() && file.set_len(2 * len).is_err(), "{how}: it can be resized");
        let mapped = WriteMapping::map(file.try_clone().expect("a descriptor is left").into(), len);
        assert!(mapped.is_err(), "{how}: it can be mapped writable");
    }
}

#[test]
fn clients_cannot_write_to_the_index_or_to_others_segments() {
    let mut scene = Scene::new("read-only");
    let session = Granted::connect(&scene.node);
    is_read_only(&session.index);
    // The bystander's large object is in a segment that was granted to it, the small ones in the node's own.
    let name = key("precious");
    let located = session.ask(&ClientMessage::Get {
        key: name,
        range: None,
        timeout_ms: 1000,
        keep: false,
        threshold_bytes: None,
        tier: None,
    });
    let Ok(Answer { reply: ClientReply::Located(located), .. }) = located else { panic!("{located:?}") };
    for segment in [located.extent.segment, SegmentId(1)] {
        let answer = session.ask(&ClientMessage::Segment { segment }).expect("a descriptor");
        is_read_only(&answer.descriptors[0]);
    }
    // What is not his is not handed out, and cannot be ended.
    let theirs = Granted::connect(&scene.node);
    let (reservation, extent, _) = theirs.reserve("theirs", 300_000).expect("room");
    let segment = extent.segment;
    for (message, kind) in [
        (ClientMessage::Segment { segment }, ErrorKind::Denied),
        (ClientMessage::Mapped { segment }, ErrorKind::Denied),
        (ClientMessage::Return { segment }, ErrorKind::Denied),
        (ClientMessage::Abort { reservation }, ErrorKind::Stale),
        (ClientMessage::Write { reservation, offset: 0 }, ErrorKind::Stale),
        (ClientMessage::Seal { reservation, checksum: Checksum::None }, ErrorKind::Stale),
        (ClientMessage::Segment { segment: SegmentId(u32::MAX) }, ErrorKind::Stale),
    ] {
        let error = session.ask(&message).expect_err("not his");
        assert_eq!(error.kind(), kind, "{}: {error}", message.name());
    }
    assert_eq!(scene.bystander.status().expect("it answers").reservations, 1);
    drop((session, theirs));
    scene.settles();
    scene.is_unharmed();
}

/// What a reservation came with: its number, its place, and the descriptor and length of a granted segment.
type Reservation = (Generation, Extent, Option<(OwnedFd, u64)>);

/// A session that asks what it likes.
struct Granted {
    session: UnixSession,
    index: OwnedFd,
    page: OwnedFd,
}

impl Granted {
    fn connect(node: &Daemon) -> Self {
        let session = UnixSession::connect(&node.socket).expect("a node listens");
        let answer = session.call(&HELLO, &[], Duration::from_secs(30)).expect("welcome");
        let [index, page] = <[OwnedFd; 2]>::try_from(answer.descriptors).expect("index and page");
        Self { session, index, page }
    }

    fn ask(&self, message: &ClientMessage) -> Result<Answer, StoreError> {
        self.session.call(message, &[], Duration::from_secs(30))
    }

    fn reserve(&self, name: &str, len: u64) -> Result<Reservation, StoreError> {
        let message = ClientMessage::Reserve {
            key: key(name),
            meta: ObjectMeta::bytes(len).expect("a length"),
            hints: PutHints::default(),
            if_exists: IfExists::Keep,
            writes: hetmem_core::Tier::Host,
        };
        let mut answer = self.ask(&message)?;
        let ClientReply::Reserved { reservation, extent, map, .. } = answer.reply else {
            panic!("{answer:?}")
        };
        Ok((reservation, extent, answer.descriptors.pop().zip(map)))
    }

    /// Puts an object in place and keeps its writable mapping.
    fn put(&self, name: &str, bytes: &[u8], hints: PutHints) -> (Arc<WriteMapping>, Extent) {
        let message = ClientMessage::Reserve {
            key: key(name),
            meta: ObjectMeta::bytes(bytes.len() as u64).expect("a length"),
            hints,
            if_exists: IfExists::Keep,
            writes: hetmem_core::Tier::Host,
        };
        let mut answer = self.ask(&message).expect("room");
        let ClientReply::Reserved { reservation, extent, map, .. } = answer.reply else {
            panic!("{answer:?}")
        };
        let (fd, len) = (answer.descriptors.pop().expect("granted"), map.expect("granted"));
        let mapping = Arc::new(WriteMapping::map(fd, len).expect("writable, for now"));
        mapping.fill(extent.offset, bytes).expect("inside");
        self.ask(&ClientMessage::Mapped { segment: extent.segment }).expect("it was granted");
        let checksum = Checksum::Xxh3Blocks(checksum::of(bytes));
        self.ask(&ClientMessage::Seal { reservation, checksum }).expect("sealed");
        (mapping, extent)
    }
}

#[test]
fn a_reservation_that_is_never_mapped_or_sealed_goes_with_its_client() {
    let mut scene = Scene::new("unmapped");
    let used = scene.bystander.status().expect("it answers").tiers[0].used_bytes;
    let idle = Granted::connect(&scene.node);
    let (reservation, _, granted) = idle.reserve("never-mapped", 300_000).expect("room");
    assert!(granted.is_some(), "memory to write into");
    let error = idle
        .ask(&ClientMessage::Seal { reservation, checksum: Checksum::None })
        .expect_err("it has not said that it maps the segment");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    for number in 0..20 {
        idle.reserve(&format!("never-sealed-{number}"), 300_000).expect("room");
    }
    assert_eq!(
        scene.bystander.get(&key("never-mapped")).expect_err("not sealed").kind(),
        ErrorKind::NotFound
    );
    assert_eq!(scene.bystander.status().expect("it answers").reservations, 21);
    scene.is_unharmed();
    drop(idle);
    scene.settles();
    assert_eq!(scene.bystander.status().expect("it answers").tiers[0].used_bytes, used);
    // The memory of a segment whose descriptor is out was writable: nobody else gets it while this process lives.
    drop(granted);
    scene.is_unharmed();
}

#[test]
fn a_client_that_writes_after_seal_spoils_its_own_object_only() {
    let mut scene = Scene::new("scribbler");
    let (name, bytes) = ("spoilt", bytes_of("spoilt", 400_000, 0));
    let scribbler = Granted::connect(&scene.node);
    let (mapping, extent) = scribbler.put(name, &bytes, PutHints::default());
    let verified = GetOptions { verify: true, ..GetOptions::default() };
    assert!(*scene.bystander.get_with(&key(name), &verified).expect("whole") == *bytes);
    mapping.fill(extent.offset + 1000, b"scribble").expect("its mapping is still writable");
    let error = scene.bystander.get_with(&key(name), &verified).expect_err("spoilt");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(name), "{error}");
    scene.is_unharmed();
    // With a copy at seal it cannot: for those who do not trust producers.
    let copier = Granted::connect(&scene.node);
    let hints = PutHints { seal_copy: true, ..PutHints::default() };
    let copied = bytes_of("copied", 400_000, 0);
    let (copy_mapping, _) = copier.put("copied", &copied, hints);
    copy_mapping
        .fill(0, &vec![0xee; usize::try_from(copy_mapping.len_bytes()).expect("fits")])
        .expect("inside");
    assert!(*scene.bystander.get_with(&key("copied"), &verified).expect("not spoilt") == *copied);
    // Its sessions end and its objects go, but the process with the mappings lives: others never get that memory.
    for name in [name, "copied"] {
        assert!(scene.bystander.delete(&key(name)).expect("deleted"));
    }
    drop((scribbler, copier));
    scene.settles();
    let mut names = Vec::new();
    loop {
        let name = format!("fill-{}", names.len());
        match scene.bystander.put_bytes(&key(&name), &bytes_of(&name, 1 << 20, 0)) {
            Ok(_) => names.push(name),
            Err(error) => break assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
    }
    for mapping in [mapping, copy_mapping] {
        mapping.fill(0, &vec![0x5a; usize::try_from(mapping.len_bytes()).expect("fits")]).expect("inside");
    }
    for name in &names {
        let object = scene.bystander.get_with(&key(name), &verified).expect("nobody else writes there");
        assert!(*object == *bytes_of(name, 1 << 20, 0), "{name} was written to by a client that has left");
    }
    for name in &names {
        assert!(scene.bystander.delete(&key(name)).expect("deleted"));
    }
    scene.is_unharmed();
}

#[test]
fn whatever_a_client_writes_into_its_page_harms_nobody_else() {
    let mut scene = Scene::new("pins");
    let hostile = Granted::connect(&scene.node);
    let page = File::from(hostile.page.try_clone().expect("a descriptor is left"));
    let len = page.metadata().expect("a file").len();
    assert!(page.set_len(0).is_err(), "it cannot be truncated");
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let scribble = std::thread::spawn(move || {
        let mut state = 11;
        while !told.load(Ordering::Relaxed) {
            // Words that could be generations, and words that could not.
            let value =
                if next(&mut state).is_multiple_of(2) { next(&mut state) % 400 } else { next(&mut state) };
            let words: Vec<u8> = (0..512).flat_map(|add| value.wrapping_add(add).to_le_bytes()).collect();
            let at = below(&mut state, usize::try_from(len / 8 - 512).expect("fits")) as u64 * 8;
            page.write_all_at(&words, at).expect("its own page");
        }
        page
    });
    for _ in 0..30 {
        scene.is_unharmed();
    }
    stop.store(true, Ordering::Relaxed);
    let page = scribble.join().expect("no panic");
    // All of it at once: every word says that some generation is pinned.
    for value in [0, 1, u64::MAX, u64::MAX / 3] {
        let words: Vec<u8> =
            std::iter::repeat_n(value.to_le_bytes(), usize::try_from(len / 8).expect("fits"))
                .flatten()
                .collect();
        page.write_all_at(&words, 0).expect("its own page");
        scene.is_unharmed();
    }
    // It can ask for nothing that needs a pin any more, and that is its own loss.
    let get = ClientMessage::Get {
        key: key("precious"),
        range: None,
        timeout_ms: 1000,
        keep: false,
        threshold_bytes: None,
        tier: None,
    };
    let error = hostile.ask(&get).expect_err("no pin is left");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    drop((hostile, page));
    scene.settles();
    scene.is_unharmed();
}
