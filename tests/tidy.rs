//! What every source file of this repository keeps to, beyond what compiler and linter check: an opening that says
//! what it is, its length, its words, and where `unsafe` may stand. Not a parser: it knows comments, strings and
//! braces. Invariant: each finding names the file, and the line where there is one.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file, and of a function with its braces.
const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 100;

/// Words that say nothing about what a thing is.
const EMPTY_WORDS: &[&str] = &["util", "utils", "common", "helper", "helpers", "manager", "handler", "misc"];

/// The files that may hold `unsafe`, each of which says so in its header. Add one only with a reason why safe code
/// cannot do it; the sources of core and kernels have none, whatever the reason.
const UNSAFE_FILES: &[&str] = &[
    // C functions of a library that was found at run time.
    "gpu-mem/src/context.rs",
    "gpu-mem/src/copies.rs",
    "gpu-mem/src/driver.rs",
    "gpu-mem/src/foreign.rs",
    "gpu-mem/src/host.rs",
    "gpu-mem/src/kernels.rs",
    "gpu-mem/src/launches.rs",
    "gpu-mem/src/physical.rs",
    "gpu-mem/src/reach.rs",
    "gpu-mem/src/stream.rs",
    "gpu-mem/src/table.rs",
    // Mappings, and memory that other processes write.
    "host-mem/src/alive.rs",
    "host-mem/src/copy.rs",
    "host-mem/src/file.rs",
    "host-mem/src/mapping.rs",
    "host-mem/src/private.rs",
    "host-mem/src/segment.rs",
    "host-mem/src/view.rs",
    // Registered regions that the kernel and peers read and write.
    "transport/src/memory.rs",
    "transport/src/region.rs",
    // The verbs plugin's functions, memory that adapters write, work that names it.
    "transport/src/verbs/abi.rs",
    "transport/src/verbs/ends.rs",
    "transport/src/verbs/ladder_tests.rs",
    "transport/src/verbs/plugin.rs",
    "transport/src/verbs/proof.rs",
    "transport/src/verbs/seam_tests.rs",
    "transport/src/verbs/steady_tests.rs",
    "transport/src/verbs/slots.rs",
    // libibverbs and librdmacm.
    "transport/tests/tcp_device.rs",
    "transport/verbs/src/connection.rs",
    "transport/verbs/src/context.rs",
    "transport/verbs/src/device.rs",
    "transport/verbs/src/failure.rs",
    "transport/verbs/src/lib.rs",
    "transport/verbs/src/queue.rs",
    // The promise that a segment's mapping outlives its registration.
    "node/src/memory.rs",
    // Python's buffer protocol and DLPack: structures that C reads and writes, memory of others, forked children.
    "python/src/dlpack.rs",
    "python/src/fork.rs",
    "python/src/gpu.rs",
    "python/src/source.rs",
    "python/src/tensor.rs",
    "python/src/writer.rs",
    // The stand-in libcuda: names for C, pointers from C, mappings, copies, an ioctl; its tests call it.
    "tests/standin-cuda/src/call.rs",
    "tests/standin-cuda/src/dma_buf.rs",
    "tests/standin-cuda/src/pointers.rs",
    "tests/standin-cuda/src/raw.rs",
    "tests/standin-cuda/src/run.rs",
    "tests/standin-cuda/tests/standin/driver.rs",
    // Calls that a framework would make, and memory of a test that nobody has pinned.
    "gpu-mem/tests/foreign.rs",
    "gpu-mem/tests/stand_in/hooks.rs",
    "gpu-mem/tests/stand_in/memory.rs",
    // Cells that the model checker watches, an allocator that counts, a copy measured beside its ceiling: no part of
    // any program.
    "core/tests/wire/memory.rs",
    "host-mem/examples/measure.rs",
    "host-mem/src/index/model.rs",
    "host-mem/src/ring/model.rs",
];

/// Folders of machines, which nobody else has. Cut in two so that this file does not find itself.
const MACHINE_FOLDERS: &[&str] = &[concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/wo", "rk/")];

/// Kinds of text files that are searched for them.
const TEXT_KINDS: &[&str] = &["rs", "toml", "md", "py", "c", "cu", "sh", "yml"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of this repository, as paths from its root: no build output, no hidden folder but `.ci` and `.cargo`.
fn files() -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("a folder of this repository") {
            let entry = entry.expect("an entry of this repository");
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            let hidden = name.starts_with('.') && name != ".ci" && name != ".cargo";
            if hidden || name == "target" || name == "__pycache__" {
                continue;
            }
            match entry.file_type().expect("an entry's type") {
                kind if kind.is_dir() => folders.push(path),
                kind if kind.is_file() => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn read(path: &str) -> String {
    String::from_utf8_lossy(&fs::read(root().join(path)).expect("a file just listed")).into_owned()
}

fn rust_files() -> Vec<(String, String)> {
    let sources = files().into_iter().filter(|path| path.ends_with(".rs")).map(|path| {
        let source = read(&path);
        (path, source)
    });
    sources.collect()
}

/// The header: the `//!` lines at the very top.
fn header(source: &str) -> String {
    let lines = source.lines().take_while(|line| line.starts_with("//!"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The source with comments, strings and character literals blanked; lines stay where they are.
fn code_of(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        match literal_or_comment_len(&chars, at) {
            0 => {
                code.push(chars[at]);
                at += 1;
            }
            len => {
                let blanked = &chars[at..at + len];
                code.extend(blanked.iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
                at += len;
            }
        }
    }
    code
}

/// How many characters from `at` on belong to one comment or literal; 0 if code stands there.
fn literal_or_comment_len(chars: &[char], at: usize) -> usize {
    let rest = &chars[at..];
    let starts = |text: &str| text.chars().enumerate().all(|(i, c)| rest.get(i) == Some(&c));
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    if starts("//") {
        rest.iter().position(|&c| c == '\n').unwrap_or(rest.len())
    } else if starts("/*") {
        block_comment_len(rest)
    } else if rest[0] == 'r' && (!in_word || matches!(chars[at - 1], 'b' | 'c')) {
        raw_string_len(rest)
    } else if rest[0] == '"' || is_character(rest) {
        quoted_len(rest)
    } else {
        0
    }
}

/// A character literal; a lifetime has no second quote.
fn is_character(rest: &[char]) -> bool {
    rest[0] == '\'' && (rest.get(1) == Some(&'\\') || rest.get(2) == Some(&'\''))
}

/// A string or character literal, from its quote to the same quote that no backslash escapes.
fn quoted_len(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != rest[0] {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

/// `r"..."` or `r#"..."#` with as many marks; 0 if `r` begins something else.
fn raw_string_len(rest: &[char]) -> usize {
    let marks = rest[1..].iter().take_while(|&&c| c == '#').count();
    if rest.get(1 + marks) != Some(&'"') {
        return 0;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', marks)).collect();
    let body = &rest[marks + 2..];
    let len = body.windows(end.len()).position(|window| window == end);
    len.map_or(rest.len(), |len| marks + 2 + len + end.len())
}

fn block_comment_len(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match (rest[at], rest.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// The words and marks of blanked code, each with its line from 1. A word is an identifier or a number.
fn tokens(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line;
        while let Some(first) = rest.chars().next() {
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let len = if word > 0 { word } else { first.len_utf8() };
            if !first.is_whitespace() {
                found.push((number + 1, &rest[..len]));
            }
            rest = &rest[len..];
        }
    }
    found
}

/// Name, first line and length in lines of every function with a body.
fn functions<'a>(tokens: &[(usize, &'a str)]) -> Vec<(&'a str, usize, usize)> {
    let mut found = Vec::new();
    for (at, (line, token)) in tokens.iter().enumerate() {
        // A function pointer type has a parenthesis where a function has its name.
        let Some((_, name)) = tokens.get(at + 1).filter(|(_, next)| *token == "fn" && *next != "(") else {
            continue;
        };
        let mut depth = 0_usize;
        // Brackets before the body can hold a `;`, as in `[u8; 4]`.
        let mut brackets = 0_usize;
        for (end, token) in &tokens[at..] {
            match *token {
                "{" => depth += 1,
                "}" if depth == 1 => {
                    found.push((*name, *line, end - line + 1));
                    break;
                }
                "}" => depth = depth.saturating_sub(1),
                "[" | "(" => brackets += 1,
                "]" | ")" => brackets = brackets.saturating_sub(1),
                ";" if depth == 0 && brackets == 0 => break,
                _ => {}
            }
        }
    }
    found
}

/// Whether the code holds an unsafe block, function, implementation, trait, foreign block or attribute.
fn has_unsafe(tokens: &[(usize, &str)]) -> bool {
    let words: Vec<&str> = tokens.iter().map(|(_, word)| *word).collect();
    let mut after =
        words.iter().enumerate().filter(|(_, word)| **word == "unsafe").map(|(at, _)| {
            match &words[at + 1..] {
                ["extern", rest @ ..] | rest => rest,
            }
        });
    after.any(|rest| match rest {
        // The type of a pointer, whose calls need a block anyway.
        ["fn", "(", ..] => false,
        [first, ..] => matches!(*first, "{" | "fn" | "impl" | "trait" | "("),
        [] => false,
    })
}

/// The parts of a name: `snake_case`, `CamelCase` and `kebab-case` alike, in lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in name.chars() {
        if !c.is_alphanumeric() || c.is_uppercase() {
            words.push(String::new());
        }
        if c.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.extend(c.to_lowercase());
        }
    }
    words
}

fn empty_word(name: &str) -> Option<String> {
    words(name).into_iter().find(|word| EMPTY_WORDS.contains(&word.as_str()))
}

/// Fails with all of them, if there are any.
fn report(findings: &[String]) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let mut findings = Vec::new();
    for (path, source) in rust_files() {
        let header = header(&source);
        if header.is_empty() {
            findings.push(format!("{path}: does not open with `//!`"));
        } else if header.contains("Placeholder") {
            findings.push(format!("{path}: is a placeholder"));
        }
    }
    report(&findings);
}

#[test]
fn files_and_functions_are_short() {
    let mut findings = Vec::new();
    for (path, source) in rust_files() {
        let lines = source.lines().count();
        if lines > FILE_LINES_MAX {
            findings.push(format!(
                "{path}: {lines} lines, at most {FILE_LINES_MAX}: split it by the state that is owned"
            ));
        }
        for (name, line, len) in functions(&tokens(&code_of(&source))) {
            if len > FUNCTION_LINES_MAX {
                findings
                    .push(format!("{path}:{line}: fn {name} has {len} lines, at most {FUNCTION_LINES_MAX}"));
            }
        }
    }
    report(&findings);
}

#[test]
fn names_say_something() {
    const DECLARES: [&str; 6] = ["struct", "enum", "trait", "mod", "type", "union"];
    let mut findings = Vec::new();
    for path in files() {
        if let Some(word) = empty_word(&path) {
            findings.push(format!("{path}: the name says {word:?}"));
        }
    }
    for (path, source) in rust_files() {
        let code = code_of(&source);
        for pair in tokens(&code).windows(2) {
            let ((_, keyword), (line, name)) = (pair[0], pair[1]);
            if let Some(word) = empty_word(name).filter(|_| DECLARES.contains(&keyword)) {
                findings.push(format!("{path}:{line}: {keyword} {name} says {word:?}"));
            }
        }
    }
    report(&findings);
}

#[test]
fn unsafe_stands_where_the_list_says() {
    let mut findings = Vec::new();
    let mut holders = Vec::new();
    for (path, source) in rust_files() {
        if !has_unsafe(&tokens(&code_of(&source))) {
            continue;
        }
        if !UNSAFE_FILES.contains(&path.as_str()) {
            findings.push(format!("{path}: holds `unsafe` and is not in tests/tidy.rs"));
        }
        if !header(&source).contains("unsafe") {
            findings.push(format!("{path}: holds `unsafe` and its `//!` header does not say so"));
        }
        holders.push(path);
    }
    for path in UNSAFE_FILES {
        if !holders.iter().any(|holder| holder == path) {
            findings.push(format!("{path}: is in tests/tidy.rs and holds no `unsafe`"));
        }
    }
    report(&findings);
}

#[test]
fn no_file_names_a_folder_of_one_machine() {
    let mut findings = Vec::new();
    for path in files() {
        let kind = path.rsplit_once('.').map_or("", |(_, kind)| kind);
        if !TEXT_KINDS.contains(&kind) && !path.starts_with(".ci/") {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            if let Some(folder) = MACHINE_FOLDERS.iter().find(|folder| line.contains(**folder)) {
                findings.push(format!("{path}:{}: names {folder}", number + 1));
            }
        }
    }
    report(&findings);
}

/// The checks themselves see what they are for, and are not misled by text.
#[test]
fn the_checks_see_code_and_not_text() {
    let source = concat!(
        "//! Opens. /* not a comment\n",
        "fn short<'a>(x: [u8; 4], c: char) -> &'a str { if c == '{' || c == '\\'' { r#\"}\"{\"# } else { \"\\\"}\" } }\n",
        "/* unsafe { /* nested */ } */ type F = unsafe extern \"C\" fn(u8);\n",
        "trait T { fn none(&self, x: [u8; 4]); }\n",
        "fn long() {\n\n// }\n}\n",
    );
    let code = code_of(source);
    assert_eq!(code.lines().count(), source.lines().count());
    let tokens_found = tokens(&code);
    assert_eq!(functions(&tokens_found), [("short", 2, 1), ("long", 5, 4)]);
    assert!(!has_unsafe(&tokens_found));
    for holds in
        ["unsafe { x() }", "unsafe impl Send for X {}", "pub unsafe fn f(){}", "unsafe extern \"C\" { }"]
    {
        assert!(has_unsafe(&tokens(&code_of(holds))), "{holds}");
    }
    assert_eq!(empty_word("SegmentManager"), Some("manager".to_owned()));
    assert_eq!(empty_word("tests/common/mod.rs"), Some("common".to_owned()));
    assert_eq!(empty_word("commonly_utilised"), None);
    assert_eq!(header("//! a\n//! b\n\n//! c"), "//! a\n//! b");
}
