//! Machines that have too little: descriptors, memory. Not full stores (`bad_puts`).

use hetmem_client::{ErrorKind, Store};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Serve, descriptors_of, eventually};

/// Descriptors with which a node starts, and no fewer.
const ENOUGH: u64 = 64;

#[test]
fn too_few_descriptors_to_start_name_the_limit() {
    let folder = tempfile::tempdir().expect("a folder");
    let serve = Serve::new(folder.path(), "scarce");
    for limit in [8, 12, 20, 30, 40, ENOUGH - 1] {
        let end = serve.clone().descriptors_max(limit).try_start().expect_err("too few");
        assert_eq!(end.status.code(), Some(1), "{limit} descriptors: {}", end.said);
        let named = end.said.contains("RLIMIT_NOFILE") && end.said.contains(&limit.to_string());
        assert!(named, "{limit} descriptors: {}", end.said);
        assert!(!end.said.contains("panicked"), "{limit} descriptors: {}", end.said);
        assert!(!folder.path().join("scarce.sock").exists(), "nothing is left behind");
    }
    let mut node = serve.descriptors_max(ENOUGH).start();
    println!("a node without clients has {} descriptors open", descriptors_of(node.pid()));
    node.assert_sound();
}

#[test]
fn clients_beyond_the_descriptors_wait_and_the_others_go_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let serve = Serve::new(folder.path(), "crowded");
    let limit = ENOUGH;
    // Enough for a few clients; more come than that.
    let mut node = serve.descriptors_max(limit).start();
    let first = node.connect();
    first.put_bytes(&key("small"), &bytes_of("small", 1000, 0)).expect("room");
    let mut inside = vec![first];
    let mut refused = 0;
    for _ in 0..40 {
        let options = hetmem_client::ConnectOptions {
            socket: Some(node.socket.clone()),
            timeout: std::time::Duration::from_millis(50),
        };
        match Store::connect_with(&options) {
            Ok(store) => inside.push(store),
            Err(error) => {
                let clear = [ErrorKind::TimedOut, ErrorKind::PeerLost, ErrorKind::Unavailable];
                assert!(clear.contains(&error.kind()), "{error}");
                refused += 1;
            }
        }
    }
    println!("{} clients inside, {refused} not", inside.len());
    assert!(inside.len() > 1 && refused > 0);
    node.says("RLIMIT_NOFILE");
    // Those inside are served, also with what needs a descriptor that there is not.
    for store in &inside {
        assert!(*store.get(&key("small")).expect("it was put") == *bytes_of("small", 1000, 0));
    }
    let name = key("large");
    let put = inside[0].put_bytes(&name, &bytes_of("large", 300_000, 0));
    if let Err(error) = &put {
        assert!(matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Os), "{error}");
    }
    // Waiting for descriptors is quiet.
    let lines = node.said().lines().filter(|line| line.contains("RLIMIT_NOFILE")).count();
    assert!(lines < 200, "{lines} lines about it");
    let before = inside.len();
    inside.truncate(1);
    eventually("those who wait get in", || {
        let options = hetmem_client::ConnectOptions {
            socket: Some(node.socket.clone()),
            timeout: std::time::Duration::from_secs(2),
        };
        match Store::connect_with(&options) {
            Ok(store) => {
                inside.push(store);
                if inside.len() > before / 2 { Ok(()) } else { Err("few".to_owned()) }
            }
            Err(error) => Err(error.to_string()),
        }
    });
    assert!(descriptors_of(node.pid()) as u64 <= limit);
    assert!(node.is_running());
}

#[test]
fn more_memory_than_the_machine_has_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for size in ["100TiB", "9000000TB", "100%"] {
        let end = Serve::new(folder.path(), "huge").host(size).try_start();
        let Err(end) = end else {
            // All of a machine's memory is free only where nothing else runs.
            assert_eq!(size, "100%");
            continue;
        };
        assert_eq!(end.status.code(), Some(1), "{size}: {}", end.said);
        assert!(end.said.contains("memory") && end.said.contains("serve with less"), "{size}: {}", end.said);
        assert!(!end.said.contains("panicked"), "{size}: {}", end.said);
        assert!(!folder.path().join("huge.sock").exists(), "nothing is left behind");
    }
}

#[test]
fn configuration_that_is_none_is_refused_with_the_key() {
    let folder = tempfile::tempdir().expect("a folder");
    for (flag, value) in
        [("host", "much"), ("host", "0"), ("lease-ms", "-1"), ("fabric", "verbs"), ("listen", "nowhere")]
    {
        let end = Serve::new(folder.path(), "configured").flag(flag, value).try_start().expect_err("refused");
        assert_ne!(end.status.code(), Some(0), "{flag}={value}: {}", end.said);
        assert!(end.said.contains(value), "{flag}={value}: {}", end.said);
        assert!(!end.said.contains("panicked"), "{flag}={value}: {}", end.said);
    }
}
