//! The command line against nodes that are there, gone, or spoilt: exit codes and words. Formats of files and tables
//! are tested beside the program.

use std::path::Path;
use std::process::{Command, Output};

use hetmem_client::{PutOptions, Reserved};
use hetmem_core::{Checksum, ObjectMeta};
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::{Serve, binary, free_port};

fn hetmem(socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(args).arg("--socket").arg(socket).output().expect("it runs")
}

/// The command fails with this code; returns its words.
fn fails(socket: &Path, args: &[&str], code: i32) -> String {
    let output = hetmem(socket, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    said
}

#[test]
fn exit_codes_and_words_tell_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Serve::new(folder.path(), "commands").start();
    let socket = node.socket.clone();
    let file = folder.path().join("out").to_string_lossy().into_owned();

    let said = fails(&socket, &["get", "no-such-key", "-o", &file], 3);
    assert!(said.contains("no-such-key") && said.contains("no such object"), "{said}");
    assert!(!Path::new(&file).exists(), "nothing is left of a file that could not be written");
    for args in [&["stat", "no-such-key"][..], &["rm", "no-such-key"], &["pin", "no-such-key"]] {
        assert!(fails(&socket, args, 3).contains("no-such-key"));
    }
    let said = fails(&socket, &["get", "", "-o", &file], 1);
    assert!(said.contains("empty"), "{said}");
    for args in [&["get", "k"][..], &["no-such-command"], &["serve", "--no-such-flag"], &["put"]] {
        assert!(fails(&socket, args, 2).contains("Usage"), "{args:?}");
    }
    let said = fails(&socket, &["get", "no-such-key", "-o", &file, "--json"], 3);
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((&said["error"]["kind"], &said["error"]["exit_code"]), (&"NotFound".into(), &3.into()));

    // An object whose producer gave a wrong checksum.
    let store = node.connect();
    let meta = ObjectMeta::bytes(100_000).expect("a length");
    let reserved = store.reserve(&key("spoilt"), meta, &PutOptions::default()).expect("room");
    let Reserved::Open(reservation) = reserved else { panic!("{reserved:?}") };
    reservation.seal_with_checksum(Checksum::Xxh3Blocks(1)).expect("sealed");
    let said = fails(&socket, &["get", "spoilt", "-o", &file], 5);
    assert!(said.contains("spoilt") && !Path::new(&file).exists(), "{said}");

    node.assert_sound();
    node.kill();
    let said = fails(&socket, &["status"], 4);
    assert!(said.contains("hetmem serve") && said.contains(&*socket.to_string_lossy()), "{said}");
    assert!(fails(&folder.path().join("nobody.sock"), &["ls"], 4).contains("hetmem serve"));
}

#[test]
fn a_get_that_nobody_can_answer_in_time_says_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let join = format!("127.0.0.1:{}", free_port());
    let mut node = Serve::new(folder.path(), "alone").join(&join).start();
    let file = folder.path().join("out").to_string_lossy().into_owned();
    let output = hetmem(&node.socket, &["get", "k", "-o", &file, "--timeout-ms", "300"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // The node that knows is not there: the object may exist.
    assert!(matches!(output.status.code(), Some(4 | 6)), "{}: {said}", output.status);
    assert!(said.contains('k') && !said.contains("no such object"), "{said}");
    node.connect().put_bytes(&key("k"), &bytes_of("k", 10, 0)).expect("room");
    assert!(hetmem(&node.socket, &["get", "k", "-o", &file]).status.success());
    assert_eq!(std::fs::read(&file).expect("written"), bytes_of("k", 10, 0));
    node.assert_sound();
}
