//! Packets, descriptors, and sockets that are in the way.

use std::fs;
use std::io::{ErrorKind as Io, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;

use hetmem_core::ErrorKind;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::socket::{
    DESCRIPTORS_MAX, PACKET_LEN_MAX, accept, connect, listen, pair, recv, send, set_nonblocking,
};

fn file_with(text: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(text.as_bytes()).expect("written");
    file.into()
}

fn text_of(fd: OwnedFd) -> String {
    let mut file = fs::File::from(fd);
    std::io::Seek::rewind(&mut file).expect("a file");
    let mut text = String::new();
    file.read_to_string(&mut text).expect("readable");
    text
}

/// Descriptors of this process that lead to `fd`'s file.
fn links_to(fd: &OwnedFd) -> usize {
    let wanted = rustix::fs::fstat(fd).expect("a file");
    fs::read_dir("/proc/self/fd")
        .expect("descriptors")
        .filter_map(|entry| rustix::fs::stat(entry.ok()?.path()).ok())
        .filter(|stat| (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino))
        .count()
}

#[test]
fn packets_arrive_whole_with_their_descriptors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("deep/er/node.sock");
    let listener = listen(&path).expect("nobody is there");
    assert_eq!(fs::metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o600);
    let client = connect(&path).expect("a node is there");
    let accepted = accept(&listener).expect("a connection");
    assert_eq!((accepted.pid, accepted.uid), (std::process::id(), rustix::process::getuid().as_raw()));

    let files = [file_with("index"), file_with("page")];
    let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let longest = vec![7; PACKET_LEN_MAX - 5];
    send(&accepted.socket, &[IoSlice::new(b"hello"), IoSlice::new(&longest)], &descriptors).expect("fits");
    send(&accepted.socket, &[IoSlice::new(b"next")], &[]).expect("fits");
    let mut buffer = vec![0; PACKET_LEN_MAX];
    let mut received = Vec::new();
    assert_eq!(recv(&client, &mut buffer, &mut received).expect("a packet"), PACKET_LEN_MAX);
    assert!(buffer.starts_with(b"hello\x07") && buffer.ends_with(&[7]));
    assert!(received.iter().all(|fd| {
        rustix::io::fcntl_getfd(fd).is_ok_and(|flags| flags.contains(rustix::io::FdFlags::CLOEXEC))
    }));
    assert_eq!(received.drain(..).map(text_of).collect::<Vec<_>>(), ["index", "page"]);
    assert_eq!(recv(&client, &mut buffer, &mut received).expect("a packet"), 4);
    assert!(received.is_empty());
    drop(accepted);
    assert_eq!(recv(&client, &mut buffer, &mut received).expect("the end"), 0);
    let error = send(&client, &[IoSlice::new(b"late")], &[]).expect_err("nobody is there");
    assert_eq!(error.kind(), Io::BrokenPipe);
}

#[test]
fn what_does_not_fit_is_an_error_and_leaks_nothing() {
    let (left, right) = pair().expect("a pair");
    let file = file_with("x");
    let before = links_to(&file);
    let mut received = Vec::new();

    send(&left, &[IoSlice::new(b"longer than the buffer")], &[file.as_fd()]).expect("fits");
    let error = recv(&right, &mut [0; 8], &mut received).expect_err("truncated");
    assert_eq!((error.kind(), received.len(), links_to(&file)), (Io::InvalidData, 0, before));

    // More descriptors than any packet of ours has, as another program could send them.
    let many = [file.as_fd(); DESCRIPTORS_MAX + 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX + 4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    rustix::net::sendmsg(&left, &[IoSlice::new(b"many")], &mut control, SendFlags::empty()).expect("sent");
    let error = recv(&right, &mut [0; 8], &mut received).expect_err("too many");
    assert_eq!((error.kind(), received.len(), links_to(&file)), (Io::InvalidData, 0, before));

    for (len, descriptors) in [(0, 0), (PACKET_LEN_MAX + 1, 0), (1, DESCRIPTORS_MAX + 1)] {
        let error =
            send(&left, &[IoSlice::new(&vec![0; len])], &many[..descriptors]).expect_err("over the limits");
        assert_eq!(error.kind(), Io::InvalidInput);
    }
    send(&left, &[IoSlice::new(b"fine")], &[]).expect("fits");
    assert_eq!(recv(&right, &mut [0; 8], &mut received).expect("the next packet is whole"), 4);
}

#[test]
fn nothing_to_do_is_would_block() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("node.sock");
    let listener = listen(&path).expect("nobody is there");
    set_nonblocking(&listener, true).expect("a socket");
    assert_eq!(accept(&listener).expect_err("nobody connects").kind(), Io::WouldBlock);
    let client = connect(&path).expect("a node is there");
    set_nonblocking(&client, true).expect("a socket");
    assert_eq!(
        recv(&client, &mut [0; 8], &mut Vec::new()).expect_err("nothing there").kind(),
        Io::WouldBlock
    );
    let packet = vec![0; PACKET_LEN_MAX];
    let full =
        (0..1000).find_map(|_| send(&client, &[IoSlice::new(&packet)], &[]).err()).expect("nobody reads");
    assert_eq!(full.kind(), Io::WouldBlock);
    set_nonblocking(&client, false).expect("a socket");
}

#[test]
fn a_live_node_keeps_its_path_and_a_dead_one_loses_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("node.sock");
    let listener = listen(&path).expect("nobody is there");
    let error = listen(&path).expect_err("a node is there");
    assert!(
        error.kind() == ErrorKind::Denied && error.to_string().contains("another socket path"),
        "{error}"
    );
    connect(&path).expect("the first is unharmed");
    drop(listener);
    assert!(!path.exists());
    assert_eq!(connect(&path).expect_err("nobody").kind(), ErrorKind::Unavailable);

    // A node that was killed: the path is there, nobody answers, the lock is free.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists());
    let error = connect(&path).expect_err("nobody");
    assert!(error.to_string().contains("hetmem serve"), "{error}");
    let listener = listen(&path).expect("taken over");
    connect(&path).expect("a node is there");
    drop(listener);

    // Somebody else's socket, alive, without our lock.
    let other = std::os::unix::net::UnixListener::bind(&path).expect("bound");
    assert_eq!(listen(&path).expect_err("somebody is there").kind(), ErrorKind::Denied);
    drop(other);
    fs::remove_file(&path).expect("removed");
    fs::write(&path, b"precious").expect("written");
    let error = listen(&path).expect_err("no socket");
    assert!(
        error.kind() == ErrorKind::Denied && fs::read(&path).is_ok_and(|text| text == b"precious"),
        "{error}"
    );
}

#[test]
fn a_path_that_is_too_long_says_so() {
    let path = std::path::PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
    for error in [listen(&path).expect_err("too long"), connect(&path).expect_err("too long")] {
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("107"), "{error}");
    }
}
