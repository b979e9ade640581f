//! Joining: names that are taken, nodes that keep no directory, addresses where nobody is. Not losses (`kill_nodes`).

use hetmem_client::Store;
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Daemon, PATIENCE, Serve, eventually, free_port};

fn put(store: &Store, name: &str) {
    store.put_bytes(&key(name), &bytes_of(name, 100_000, 0)).expect("room");
}

fn is_found(store: &Store, name: &str) -> Result<(), String> {
    let object = store.get(&key(name)).map_err(|error| error.to_string())?;
    assert!(*object == *bytes_of(name, 100_000, 0), "{name} has other bytes");
    Ok(())
}

fn is_linked(node: &Daemon, store: &Store, count: usize) {
    node.settles(store, &format!("{count} linked peers"), |status| {
        status.peers.iter().filter(|peer| peer.linked).count() == count
    });
}

#[test]
fn two_nodes_of_one_name_are_told_apart_by_nobody_so_the_second_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "twin").start();
    let mut member = Serve::new(folder.path(), "member").join(&first.address).start();
    let (here, there) = (first.connect(), member.connect());
    is_linked(&first, &here, 1);
    put(&here, "on-the-first");
    let mut second = Serve::new(folder.path(), "twin")
        .socket(&folder.path().join("second.sock"))
        .join(&first.address)
        .start();
    second.says("twin");
    eventually("it says why", || {
        let said = second.said();
        if said.contains("give each its own name") { Ok(()) } else { Err(said) }
    });
    // It runs on alone, and the cluster does not notice.
    put(&second.connect(), "on-the-second");
    is_found(&second.connect(), "on-the-second").expect("it is here");
    is_found(&there, "on-the-first").expect("the cluster is whole");
    assert!(is_found(&here, "on-the-second").is_err(), "it is in no cluster");
    is_linked(&first, &here, 1);
    for node in [&mut first, &mut member, &mut second] {
        node.assert_sound();
    }
}

#[test]
fn of_two_members_of_one_name_the_first_stays_until_it_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "seed").start();
    let here = first.connect();
    let mut older = Serve::new(folder.path(), "member").join(&first.address).start();
    is_linked(&first, &here, 1);
    put(&older.connect(), "on-the-older");
    // A get would leave a copy here.
    here.wait(&key("on-the-older"), PATIENCE).expect("it is announced");
    let socket = folder.path().join("newer.sock");
    let mut newer = Serve::new(folder.path(), "member").socket(&socket).join(&first.address).start();
    newer.says("give each its own name");
    put(&newer.connect(), "on-the-newer");
    put(&here, "on-the-seed");
    is_found(&older.connect(), "on-the-seed").expect("the cluster works");
    assert!(is_found(&here, "on-the-newer").is_err(), "it is in no cluster");
    first.assert_sound();
    older.assert_sound();
    // A name is free when its node is gone; the other one has been trying since.
    older.kill();
    eventually("the later one is in", || is_found(&here, "on-the-newer"));
    is_found(&newer.connect(), "on-the-seed").expect("the cluster works");
    assert!(is_found(&here, "on-the-older").is_err(), "it went with its node");
    first.assert_sound();
    newer.assert_sound();
}

#[test]
fn joining_a_member_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = Serve::new(folder.path(), "keeper").start();
    let mut member = Serve::new(folder.path(), "plain").join(&first.address).start();
    let mut lost = Serve::new(folder.path(), "lost").join(&member.address).start();
    lost.says("does not keep the directory");
    put(&member.connect(), "on-the-member");
    eventually("the cluster works", || is_found(&first.connect(), "on-the-member"));
    put(&lost.connect(), "alone");
    is_found(&lost.connect(), "alone").expect("it is here");
    for node in [&mut first, &mut member, &mut lost] {
        node.assert_sound();
    }
}

#[test]
fn a_node_waits_for_the_one_that_it_is_to_join() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let mut early = Serve::new(folder.path(), "early").join(&format!("127.0.0.1:{port}")).start();
    early.says("it is being dialled");
    let there = early.connect();
    put(&there, "early");
    is_found(&there, "early").expect("it is here");
    let mut late = Serve::new(folder.path(), "late").listen(port).start();
    let here = late.connect();
    eventually("it joins, with what it has", || is_found(&here, "early"));
    put(&here, "late");
    eventually("both ways", || is_found(&there, "late"));
    early.assert_sound();
    late.assert_sound();
}

#[test]
fn names_of_hosts_are_looked_up_and_wrong_ones_do_no_harm() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let mut first = Serve::new(folder.path(), "named").listen(port).start();
    let mut member = Serve::new(folder.path(), "by-name").join(&format!("localhost:{port}")).start();
    put(&member.connect(), "by-name");
    eventually("a name will do", || is_found(&first.connect(), "by-name"));
    let mut alone = Serve::new(folder.path(), "alone").join("no-such-host.invalid:1").start();
    put(&alone.connect(), "alone");
    is_found(&alone.connect(), "alone").expect("it is here");
    for node in [&mut first, &mut member, &mut alone] {
        node.assert_sound();
    }
}
