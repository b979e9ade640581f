//! The store's operations over real shared memory and a node that is scripted. Not the socket (`session.rs`).

#[allow(dead_code, reason = "each test file uses its part")]
mod stand_in;

use std::sync::Arc;
use std::time::Duration;

use hetmem_client::{
    Checksum, DType, ErrorKind, GetOptions, IfExists, Key, Object, ObjectMeta, Path, PutOptions, Range,
    Reservation, Reserved, Store, StoreError,
};
use stand_in::{Fault, INLINE_PUT_MAX, StandIn};

fn connected() -> (Store, Arc<StandIn>) {
    let node = Arc::new(StandIn::new());
    let store = Store::over(Arc::clone(&node) as Arc<dyn hetmem_host_mem::Session>).expect("a store");
    assert_eq!(node.asked(), ["hello"]);
    (store, node)
}

fn key(name: &str) -> Key {
    Key::new(name).expect("a key")
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

fn open(reserved: Reserved) -> Reservation {
    match reserved {
        Reserved::Open(reservation) => reservation,
        Reserved::Kept(outcome) => panic!("{outcome:?}"),
    }
}

#[test]
fn values_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Store>();
    shared::<Object>();
    shared::<Reservation>();
}

#[test]
fn a_resident_object_is_got_without_asking() {
    let (store, node) = connected();
    let bytes = pattern(6);
    let meta = ObjectMeta::tensor(DType::U8, &[2, 3]).expect("a tensor");
    let outcome = store.put(&key("a"), meta, &bytes).expect("put");
    assert!(!outcome.kept);
    assert_eq!(node.asked(), ["put"]);
    let first = store.get(&key("a")).expect("get");
    assert_eq!(node.asked(), ["segment"], "the segment is fetched once");
    for _ in 0..1000 {
        let object = store.get(&key("a")).expect("get");
        assert_eq!((&*object, object.path()), (&bytes[..], Path::Local));
    }
    assert!(node.asked().is_empty());
    assert_eq!((first.meta().dtype, first.meta().shape.dims()), (DType::U8, &[2_u64, 3][..]));
    assert_eq!(first.id(), outcome.object.expect("it was asked"));
    assert_eq!(first.verify(), Ok(true));
}

#[test]
fn an_object_is_pinned_as_long_as_it_lives() {
    let (store, node) = connected();
    store.put_bytes(&key("a"), b"abc").expect("put");
    node.add_remote(&key("b"), b"remote");
    let objects = [store.get(&key("a")).expect("here"), store.get(&key("b")).expect("elsewhere")];
    assert_eq!(objects[1].path(), Path::Read);
    assert_eq!(node.pinned(), 2);
    // An object outlives the store's last handle.
    drop(store);
    assert_eq!((&*objects[0], &*objects[1]), (&b"abc"[..], &b"remote"[..]));
    drop(objects);
    assert_eq!(node.pinned(), 0);
}

#[test]
fn many_gets_keep_their_order_and_their_own_errors() {
    let (store, node) = connected();
    store.put_bytes(&key("here"), b"here").expect("put");
    let mut keys = vec![key("here"), key("missing")];
    for number in 0..20 {
        keys.push(key(&format!("far/{number}")));
        node.add_remote(keys.last().expect("one"), format!("far/{number}").as_bytes());
    }
    let results = store.get_many(&keys);
    assert_eq!(results.len(), keys.len());
    for (key, result) in keys.iter().zip(&results) {
        match result {
            Ok(object) => assert_eq!(&**object, key.as_str().as_bytes()),
            Err(error) => assert_eq!((key.as_str(), error.kind()), ("missing", ErrorKind::NotFound)),
        }
    }
    assert_eq!(node.pinned(), 21);
    drop(results);
    assert_eq!(node.pinned(), 0);
}

#[test]
fn parts_are_parts_and_ranges_outside_are_refused_without_a_pin() {
    let (store, node) = connected();
    let bytes = pattern(100);
    store.put_bytes(&key("near"), &bytes).expect("put");
    node.add_remote(&key("far"), &bytes);
    for name in ["near", "far"] {
        let part = store.get_range(&key(name), 10, 20).expect("inside");
        assert_eq!(&*part, &bytes[10..30]);
        assert_eq!((part.meta().len_bytes, part.is_whole()), (100, false));
        assert_eq!(part.verify(), Ok(false), "a part has no checksum");
        assert!(store.get_range(&key(name), 100, 0).expect("empty").is_empty());
        for (start, len) in [(90, 11), (101, 0), (u64::MAX, 2)] {
            let error = store.get_range(&key(name), start, len).expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        drop(part);
        assert_eq!(node.pinned(), 0, "{name}");
    }
}

#[test]
fn verify_catches_spoiled_bytes() {
    let (store, node) = connected();
    store.put_bytes(&key("a"), &pattern(50)).expect("put");
    node.spoil(&key("a"));
    let object = store.get(&key("a")).expect("not looked at");
    assert_eq!(object.verify().expect_err("spoiled").kind(), ErrorKind::Corrupt);
    let options = GetOptions { verify: true, ..GetOptions::default() };
    assert_eq!(store.get_with(&key("a"), &options).expect_err("spoiled").kind(), ErrorKind::Corrupt);
    drop(object);
    assert_eq!(node.pinned(), 0);
}

#[test]
fn large_puts_are_written_in_place_and_the_mapping_is_told_once() {
    let (store, node) = connected();
    let bytes = pattern(INLINE_PUT_MAX as usize + 1);
    store.put_bytes(&key("a"), &bytes).expect("put");
    assert_eq!(node.asked(), ["reserve", "mapped", "seal"]);
    store.put_bytes(&key("b"), &bytes).expect("put");
    assert_eq!(node.asked(), ["reserve", "seal"]);
    for name in ["a", "b"] {
        let object = store.get(&key(name)).expect("get");
        assert_eq!(&*object, &bytes[..]);
        assert_eq!(object.verify(), Ok(true));
    }
    let options = PutOptions { checksum: false, ..PutOptions::default() };
    let meta = ObjectMeta::bytes(bytes.len() as u64).expect("short");
    store.put_with(&key("c"), meta, &bytes, &options).expect("put");
    let object = store.get(&key("c")).expect("get");
    assert_eq!((object.meta().checksum, object.verify()), (Checksum::None, Ok(false)));
    assert_eq!(&*object, &bytes[..]);
}

#[test]
fn without_a_grant_the_node_writes() {
    let (store, node) = connected();
    node.grant_nothing();
    let bytes = pattern(200_000);
    store.put_bytes(&key("a"), &bytes).expect("put");
    assert_eq!(node.asked(), ["reserve", "write", "write", "write", "write", "seal"]);
    let meta = ObjectMeta::bytes(70_000).expect("short");
    let mut reservation = open(store.reserve(&key("b"), meta, &PutOptions::default()).expect("room"));
    assert!(!reservation.in_place());
    reservation.bytes_mut().copy_from_slice(&bytes[..70_000]);
    reservation.seal().expect("sealed");
    assert_eq!(node.asked(), ["reserve", "write", "write", "seal"]);
    for (name, len) in [("a", 200_000), ("b", 70_000)] {
        let object = store.get(&key(name)).expect("get");
        assert_eq!(&*object, &bytes[..len]);
        assert_eq!(object.verify(), Ok(true));
    }
}

#[test]
fn reservations_are_sealed_or_given_back() {
    let (store, node) = connected();
    let meta = ObjectMeta::tensor(DType::F32, &[4]).expect("a tensor");
    let options = PutOptions::default();
    let mut kept = open(store.reserve(&key("kept"), meta, &options).expect("room"));
    let dropped = open(store.reserve(&key("dropped"), meta, &options).expect("room"));
    assert!(kept.in_place() && dropped.in_place());
    assert_eq!((kept.bytes_mut().len(), node.reservations()), (16, 2));
    drop(dropped);
    assert_eq!(node.reservations(), 1);
    kept.bytes_mut().fill(9);
    kept.seal().expect("sealed");
    let object = store.get(&key("kept")).expect("get");
    assert_eq!((&*object, object.verify()), (&[9; 16][..], Ok(true)));
    let error = store.get(&key("dropped")).expect_err("never sealed");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let wrong = open(store.reserve(&key("wrong"), meta, &options).expect("room"));
    assert_eq!(wrong.fill(&[0; 15]).expect_err("too short").kind(), ErrorKind::Invalid);
    assert_eq!(node.reservations(), 0, "given back on the error's way out");
}

/// Threads share the one segment that was granted to all of them.
#[test]
fn threads_write_side_by_side() {
    let (store, _node) = connected();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let store = &store;
            scope.spawn(move || {
                for number in 0..20 {
                    let key = key(&format!("{thread}/{number}"));
                    store.put_bytes(&key, &vec![thread; 5000 + number]).expect("put");
                    let object = store.get(&key).expect("get");
                    assert_eq!(object.verify(), Ok(true));
                    assert!(object.len() == 5000 + number && object.iter().all(|&byte| byte == thread));
                }
            });
        }
    });
}

#[test]
fn existing_keys_are_kept_or_refused() {
    let (store, _node) = connected();
    for len in [3, 10_000] {
        let (key, bytes) = (key(&len.to_string()), pattern(len));
        let first = store.put_bytes(&key, &bytes).expect("put");
        let again = store.put_bytes(&key, &vec![0; len]).expect("kept");
        assert_eq!((again.kept, again.object), (true, first.object));
        let options = PutOptions { if_exists: IfExists::Error, ..PutOptions::default() };
        let meta = ObjectMeta::bytes(len as u64).expect("short");
        let error = store.put_with(&key, meta, &bytes, &options).expect_err("there");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(&*store.get(&key).expect("get"), &bytes[..]);
    }
}

#[test]
fn bytes_must_be_what_the_metadata_says() {
    let (store, node) = connected();
    let meta = ObjectMeta::tensor(DType::F32, &[3]).expect("a tensor");
    let error = store.put(&key("a"), meta, &[0; 11]).expect_err("one short");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("12") && error.to_string().contains("11"), "{error}");
    assert!(node.asked().is_empty());
}

#[test]
fn lists_come_page_by_page_and_end() {
    let (store, node) = connected();
    for number in 0..10 {
        store.put_bytes(&key(&format!("p/{number}")), b"x").expect("put");
    }
    store.put_bytes(&key("q"), b"x").expect("put");
    let keys = |prefix: &str| -> Vec<String> {
        store.list(prefix).map(|listed| listed.expect("listed").key.to_string()).collect()
    };
    let expected: Vec<String> = (0..10).map(|number| format!("p/{number}")).collect();
    assert_eq!(keys("p/"), expected);
    assert_eq!(keys("").len(), 11);
    assert!(keys("none").is_empty());
    node.fail_with(Fault::SamePage);
    assert!(keys("p/").len() < 10, "a page that does not move on ends the list");
    node.fail_with(Fault::WrongReply);
    let all: Vec<_> = store.list("").collect();
    assert!(matches!(all.as_slice(), [Err(StoreError::Protocol { .. })]));
}

#[test]
fn existence_and_deletion() {
    let (store, node) = connected();
    assert!(!store.exists(&key("a")).expect("asked"));
    let error = store.wait(&key("a"), Duration::from_millis(1)).expect_err("never");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    store.put_bytes(&key("a"), b"x").expect("put");
    node.asked();
    assert!(store.exists(&key("a")).expect("here"));
    store.wait(&key("a"), Duration::ZERO).expect("here");
    assert!(node.asked().is_empty(), "what is here is found without asking");
    store.pin(&key("a"), true).expect("pinned");
    assert!(store.delete(&key("a")).expect("deleted"));
    assert!(!store.delete(&key("a")).expect("gone"));
    assert!(!store.exists(&key("a")).expect("asked"));
}

/// Two threads are granted one segment of a GPU, and the descriptor comes with the later answer. There is no such GPU here,
/// which both are told of: not that one was granted what it cannot have.
#[test]
fn who_is_granted_gpu_memory_waits_for_its_descriptor() {
    let (store, node) = connected();
    node.fail_with(Fault::LateDescriptor);
    let reserve = |name: &str| {
        let meta = ObjectMeta::bytes(100).expect("a length");
        let options = PutOptions { timeout: Duration::from_secs(20), ..PutOptions::default() };
        store.reserve_gpu(&key(name), meta, 0, &options).expect_err("no such GPU").to_string()
    };
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| reserve("first"));
        while node.reservations() == 0 {
            std::thread::yield_now();
        }
        let second = reserve("second");
        (first.join().expect("a thread"), second)
    });
    assert!(!second.contains("without a descriptor"), "{second}");
    assert_eq!(first, second, "one import, and both hear what came of it");
    assert_eq!(node.reservations(), 0, "and give back what they cannot use");
}

/// What a node gets wrong is an error, and leaves no pin behind.
#[test]
fn wrong_answers_are_refused() {
    for (fault, kind) in [
        (Fault::Outside, ErrorKind::Protocol),
        (Fault::Short, ErrorKind::Protocol),
        (Fault::NoDescriptor, ErrorKind::Protocol),
        (Fault::Gpu, ErrorKind::Unavailable),
        (Fault::WrongReply, ErrorKind::Protocol),
    ] {
        let (store, node) = connected();
        node.add_remote(&key("far"), &pattern(100));
        node.fail_with(fault);
        let error = store.get(&key("far")).expect_err("a wrong answer");
        assert_eq!(error.kind(), kind, "{fault:?}: {error}");
        assert_eq!(node.pinned(), 0, "{fault:?}");
    }
    let (store, node) = connected();
    node.add_remote(&key("far"), &pattern(100));
    node.fail_with(Fault::Short);
    let range = Some(Range { start: 0, len_bytes: 10 });
    let options = GetOptions { range, ..GetOptions::default() };
    assert_eq!(store.get_with(&key("far"), &options).expect_err("short").kind(), ErrorKind::Protocol);
    node.fail_with(Fault::WrongReply);
    assert_eq!(store.put_bytes(&key("x"), b"x").expect_err("wrong").kind(), ErrorKind::Protocol);
    assert_eq!(store.put_bytes(&key("x"), &pattern(9000)).expect_err("wrong").kind(), ErrorKind::Protocol);
    assert!(Store::over(node as Arc<dyn hetmem_host_mem::Session>).is_err());
}

#[test]
fn wrong_answers_about_many_objects_leave_no_pin() {
    let keys: Vec<Key> = (0..5).map(|number| key(&number.to_string())).collect();
    for (fault, whole, word) in [
        (Fault::Outside, 0, "not inside"),
        (Fault::Short, 0, "belong"),
        (Fault::Gpu, 0, "gpu:0"),
        (Fault::WrongReply, 0, "get many with Exists"),
        (Fault::OneFewer, 4, "no answer"),
        (Fault::OneMore, 5, ""),
    ] {
        let (store, node) = connected();
        for key in &keys {
            node.add_remote(key, b"far");
        }
        node.fail_with(fault);
        let results = store.get_many(&keys);
        assert_eq!(results.len(), 5, "{fault:?}");
        assert!(results[..whole].iter().flatten().all(|object| **object == *b"far"), "{fault:?}");
        for result in &results[whole..] {
            let error = result.as_ref().expect_err("wrong");
            assert!(error.to_string().contains(word), "{fault:?}: {error}");
        }
        assert_eq!(node.pinned(), whole, "{fault:?}: what is handed out is pinned, nothing else");
        drop(results);
        assert_eq!(node.pinned(), 0, "{fault:?}");
    }
}
