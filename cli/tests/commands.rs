//! The command line as its users see it: real processes, a node of the test's own, files in a folder of its own. Not GPU
//! tiers (`gpu`).

mod node;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use node::{Node, hetmem, safetensors_file, text};

#[test]
fn files_come_back_as_they_were_put() {
    let node = Node::start();
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    let plain = node.file("plain.bin", &bytes);
    let tensors = node.file("model.safetensors", &safetensors_file());
    let put = node.json(&["put", &plain]);
    assert_eq!((&put["objects"], &put["bytes"], &put["kept"]), (&1.into(), &200_000.into(), &0.into()));
    assert_eq!(node.json(&["put", &plain])["kept"], 1);
    assert_eq!(node.json(&["put", &tensors])["objects"], 3);
    assert_eq!(node.json(&["put", &plain, "--key", "named", "--pin"])["objects"], 1);

    let back = node.path("back.bin");
    let back = back.to_str().expect("UTF-8");
    assert_eq!(node.json(&["get", "plain.bin", "-o", back])["bytes"], 200_000);
    assert_eq!(fs::read(back).expect("written"), bytes);
    let standard = node.run(&["get", "named", "-o", "-"]);
    assert_eq!(standard.stdout, bytes);
    let model = node.path("back.safetensors");
    node.json(&["get", "model", "-o", model.to_str().expect("UTF-8")]);
    assert_eq!(fs::read(model).expect("written"), safetensors_file());
    let npy = node.path("a.npy");
    node.json(&["get", "model/a.weight", "-o", npy.to_str().expect("UTF-8")]);
    let npy = fs::read(npy).expect("written");
    assert!(npy.starts_with(b"\x93NUMPY") && npy.ends_with(&(1..=16).collect::<Vec<u8>>()));
}

#[test]
fn a_model_comes_through_a_node_that_has_room_for_few_of_its_tensors() {
    const TENSORS: usize = 24;
    const LEN: usize = 1 << 20;
    let owner = Node::start();
    let mut header = String::new();
    for number in 0..TENSORS {
        let (from, to) = (number * LEN, (number + 1) * LEN);
        let separator = if number == 0 { '{' } else { ',' };
        write!(
            header,
            r#"{separator}"t{number:02}":{{"dtype":"U8","shape":[{LEN}],"data_offsets":[{from},{to}]}}"#
        )
        .expect("to a String");
    }
    header.push('}');
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    for number in 0..TENSORS {
        bytes.extend(
            (0..=250).cycle().map(|at: u8| at ^ u8::try_from(number).expect("few tensors")).take(LEN),
        );
    }
    owner.json(&["put", &owner.file("model.safetensors", &bytes)]);
    let node = Node::start_with(&["--host", "8MiB", "--join", &owner.address]);
    let back = node.path("back.safetensors");
    assert_eq!(node.json(&["get", "model", "-o", back.to_str().expect("UTF-8")])["objects"], TENSORS);
    assert!(fs::read(back).expect("written") == bytes);
}

#[test]
fn keys_are_listed_described_pinned_and_removed() {
    let node = Node::start();
    let tensors = node.file("model.safetensors", &safetensors_file());
    node.json(&["put", &tensors, "--prefix", "m/v1"]);
    let listed = node.json(&["ls"]);
    let keys: Vec<&str> =
        listed.as_array().expect("rows").iter().filter_map(|row| row["key"].as_str()).collect();
    assert_eq!(keys, ["m/v1/__metadata__", "m/v1/a.weight", "m/v1/b"]);
    assert_eq!(node.json(&["ls", "m/v1/a"]).as_array().map(Vec::len), Some(1));
    let stat = node.json(&["stat", "m/v1/b"]);
    assert_eq!(
        (&stat["dtype"], &stat["bytes"], &stat["pinned"]),
        (&"bfloat16".into(), &6.into(), &false.into())
    );
    node.json(&["pin", "-r", "m"]);
    assert_eq!(node.json(&["stat", "m/v1/b"])["pinned"], true);
    node.json(&["unpin", "m/v1/b"]);
    assert_eq!(node.json(&["stat", "m/v1/b"])["pinned"], false);
    let status = node.json(&["status"]);
    assert_eq!((&status["objects"], &status["counters"]["puts"]), (&3.into(), &3.into()));
    let table = node.run(&["ls", "--long"]);
    let table = text(&table.stdout);
    assert!(table.contains("bfloat16") && table.contains("3 objects"), "{table}");
    assert_eq!(node.json(&["rm", "-r", "m/v1"])["deleted"].as_array().map(Vec::len), Some(3));
    assert_eq!(node.json(&["ls"]), Value::Array(Vec::new()));
}

#[test]
fn failures_say_what_to_do_and_exit_with_their_code() {
    let node = Node::start();
    let out = node.path("out.bin");
    let out = out.to_str().expect("UTF-8");
    assert!(node.refused(&["get", "missing", "-o", out], 3).contains("missing"));
    assert!(!Path::new(out).exists());
    assert!(node.refused(&["get", "missing", "-o", &format!("{out}.safetensors")], 3).contains("missing"));
    node.refused(&["stat", "missing"], 3);
    node.refused(&["rm", "missing"], 3);
    node.refused(&["rm", "-r", "missing"], 3);
    assert!(node.refused(&["stat", ""], 1).contains("empty"));
    assert!(node.refused(&["put", "/nonexistent/file"], 1).contains("/nonexistent/file"));
    let cut = node.file("cut.safetensors", &safetensors_file()[..100]);
    assert!(node.refused(&["put", &cut], 5).contains("truncated"));
    assert!(node.refused(&["put", &cut, "--key", "k"], 2).contains("--prefix"));
    let twice = node.file("twice.bin", b"bytes");
    node.json(&["put", &twice]);
    assert!(node.refused(&["put", &twice, "--error-if-exists"], 1).contains("exists"));
    let gone = hetmem(&node.path("gone.sock"), &["ls"]);
    assert_eq!(gone.status.code(), Some(4));
    assert!(text(&gone.stderr).contains("hetmem serve"), "{}", text(&gone.stderr));
    let json = hetmem(&node.path("gone.sock"), &["ls", "--json"]);
    let error: Value = serde_json::from_slice(&json.stderr).expect("an error in JSON");
    assert_eq!((&error["error"]["kind"], json.stdout.len()), (&"Unavailable".into(), 0));
    let usage = hetmem(&node.path("gone.sock"), &["frobnicate"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_live_socket_is_not_taken_over() {
    let node = Node::start();
    let said = node.refused(&["serve", "--listen", "127.0.0.1:0", "--host", "64MiB"], 1);
    assert!(said.contains("node.sock"), "{said}");
    node.json(&["status"]);
}

#[test]
fn doctor_has_a_word_on_everything() {
    let node = Node::start();
    let checks = node.json(&["doctor"]);
    let check = |name: &str| {
        let found = checks.as_array().expect("rows").iter().find(|check| check["capability"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {checks}")).clone()
    };
    for name in
        ["shared memory", "memory", "huge pages", "open files", "locked memory", "GPU driver", "RDMA verbs"]
    {
        assert!(!check(name)["why"].as_str().expect("why").is_empty(), "{name}");
    }
    assert_eq!(check("node")["available"], true);
    assert_eq!(check("shared memory")["available"], true);
    assert_eq!(check("RDMA verbs")["available"], false);
}

#[test]
fn the_demo_moves_a_file_between_two_nodes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    fs::write(&path, safetensors_file()).expect("a file");
    let path = path.to_str().expect("UTF-8");
    let nowhere = folder.path().join("unused.sock");
    let done = hetmem(&nowhere, &["demo", path, "--json"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let report: Value = serde_json::from_slice(&done.stdout).expect("JSON and nothing else");
    assert_eq!((&report["ok"], &report["tensors"], &report["bytes"]), (&true.into(), &2.into(), &22.into()));
    // Each tensor is compared after its fetch, on both nodes, and with all others at once.
    assert_eq!((&report["compared_bytes"], &report["eager"]), (&88.into(), &2.into()));
    let said = hetmem(&nowhere, &["demo", path, "--fabric", "verbs"]);
    assert_eq!(said.status.code(), Some(4));
    assert!(text(&said.stderr).contains("verbs"));
    let other = hetmem(&nowhere, &["demo", "Cargo.toml"]);
    assert_eq!(other.status.code(), Some(1 + i32::from(Path::new("Cargo.toml").exists())));
}
