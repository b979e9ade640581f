//! What cargo says that it has built, as JSON, one message a line. Not the building. Invariant: only files that cargo
//! calls executable are named, each once, and a test program is told from an ordinary one by its profile.

use std::path::PathBuf;

use serde_json::Value;

/// An executable that cargo has built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The target's name: of a library, a file of tests or a program.
    pub(crate) target: String,
    /// `lib`, `test`, `bin`, ...
    pub(crate) kind: String,
    /// Whether it runs tests.
    pub(crate) is_test: bool,
    pub(crate) path: PathBuf,
}

/// The executables of cargo's messages, in their order. Lines that are no message are passed over: build scripts and
/// newer versions of cargo write others.
pub(crate) fn executables(messages: &str) -> Vec<Executable> {
    let mut found: Vec<Executable> = Vec::new();
    for line in messages.lines() {
        let Some(executable) = executable(line) else { continue };
        if !found.iter().any(|known| known.path == executable.path) {
            found.push(executable);
        }
    }
    found
}

fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let target = &message["target"];
    Some(Executable {
        target: target["name"].as_str()?.to_owned(),
        kind: target["kind"].get(0)?.as_str()?.to_owned(),
        is_test: message["profile"]["test"].as_bool()?,
        path: PathBuf::from(message["executable"].as_str()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_and_what_they_start_are_told_apart() {
        let messages = r#"
{"reason":"build-script-executed","out_dir":"/t/out"}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"some_crate"},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"some_crate"},"profile":{"test":true},"executable":"/t/deps/some_crate-1"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"client"},"profile":{"test":false},"executable":"/t/client"}
warning: not a message
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"gpu"},"profile":{"test":true},"executable":"/t/deps/gpu-2"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"gpu"},"profile":{"test":true},"executable":"/t/deps/gpu-2"}
{"reason":"build-finished","success":true}
"#;
        let found = executables(messages);
        let told: Vec<_> =
            found.iter().map(|one| (one.target.as_str(), one.kind.as_str(), one.is_test)).collect();
        assert_eq!(told, [("some_crate", "lib", true), ("client", "bin", false), ("gpu", "test", true)]);
        assert_eq!(found[2].path, PathBuf::from("/t/deps/gpu-2"));
    }
}
