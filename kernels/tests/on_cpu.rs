//! The kernels' sources, made into programs for the CPU by a C++ compiler (`cuda/on_cpu.h`), against the twins: bit for
//! bit, at every alignment and many lengths. Not what a GPU does: `tests/` of gpu-mem, on one. Invariant: both begin with
//! the same memory, and all of it is compared afterwards.

#![allow(clippy::print_stdout)]

mod arena;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use arena::{Arena, BASE, Random};
use hetmem_core::DType;
use hetmem_kernels::cast::{self, Cast};
use hetmem_kernels::checksum::{self, parts};
use hetmem_kernels::launch::Launch;
use hetmem_kernels::moves::{self, Move};
use hetmem_kernels::sum;

/// The program of one source, or none where there is no compiler.
fn program(name: &str) -> Option<PathBuf> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err()
    {
        let required = std::env::var("HETMEM_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|part| part == "kernels"), "no C++ compiler");
        println!("skipped: no C++ compiler (on Debian: apt install g++; another one than c++: CXX)");
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda").join(format!("{name}.cu"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-on-cpu"));
    let built = Command::new(compiler)
        .args(["-x", "c++", "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-rdynamic"])
        .args(["-DHETMEM_ON_CPU", "-o"])
        .args([&program, &source])
        .arg("-ldl")
        .output()
        .expect("the compiler runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Some(program)
}

/// Runs the kernel and its twin, and compares all memory. Returns it.
fn both(program: &Path, before: &Arena, kernel: &str, launch: &Launch<'_>, what: &str) -> Arena {
    let Launch { blocks, threads, parameters } = *launch;
    let mut twins = before.clone();
    twins.run(kernel, blocks, threads, parameters).unwrap_or_else(|fault| panic!("{what}: {fault}"));
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("piped");
    let parameters: Vec<String> = parameters.iter().map(u64::to_string).collect();
    let line = format!("{kernel} {blocks} {threads} {} {}\n", before.0.len(), parameters.join(" "));
    stdin.write_all(line.as_bytes()).and_then(|()| stdin.write_all(&before.0)).expect("written");
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    assert!(output.status.success(), "{what}: {}", output.status);
    assert_eq!(output.stdout.len(), twins.0.len(), "{what}");
    if let Some(at) = output.stdout.iter().zip(&twins.0).position(|(kernel, twin)| kernel != twin) {
        panic!("{what}: byte {at} is {:#x} by the kernel, {:#x} by its twin", output.stdout[at], twins.0[at]);
    }
    twins
}

#[test]
fn gather_moves_what_its_twin_moves_at_every_alignment() {
    let Some(program) = program("gather") else { return };
    let half = 4 << 20;
    let mut arena = Arena::random(2 * half + (1 << 20), 1);
    let mut random = Random(2);
    let (mut source, mut target, mut wanted) = (0_u64, half as u64, Vec::new());
    let mut add = |source_at: u64, target_at: u64, len_bytes: u64| {
        // Sources and targets each in a row, at the wanted distance from a multiple of 16.
        source = source.next_multiple_of(16) + source_at;
        target = target.next_multiple_of(16) + target_at;
        wanted.push(Move { source: BASE + source, target: BASE + target, len_bytes });
        (source, target) = (source + len_bytes, target + len_bytes);
    };
    for source_at in 0..16 {
        for target_at in 0..16 {
            for len in [0, 1, 15, 16, 17, 31, 33, 100, 4096 + random.below(64)] {
                add(source_at, target_at, len);
            }
        }
    }
    for len in [16_384, 65_536, 65_537, 200_003] {
        add(random.below(16), random.below(16), len);
        add(3, 3, len);
    }
    let cut: Vec<Move> = moves::cut(wanted.iter().copied()).collect();
    let list = moves::list(cut.iter().copied());
    arena.put(2 * half, &list);
    let list = BASE + 2 * half as u64;
    let count = cut.len() as u64;
    let blocks = u32::try_from(count).expect("few");
    let launch = Launch { blocks, threads: moves::THREADS, parameters: &[list, count] };
    let after = both(&program, &arena, moves::GATHER, &launch, "cut");
    for one in &wanted {
        let at = |address: u64| usize::try_from(address - BASE).expect("inside");
        let len = usize::try_from(one.len_bytes).expect("inside");
        assert_eq!(after.0[at(one.target)..][..len], arena.0[at(one.source)..][..len], "{one:?}");
    }
    // Blocks beyond the list do nothing, and a move needs no cutting.
    let mut uncut = arena.clone();
    uncut.put(2 * half, &moves::list(wanted.iter().copied()));
    let count = wanted.len() as u64;
    let blocks = u32::try_from(count).expect("few") + 3;
    let launch = Launch { blocks, threads: moves::THREADS, parameters: &[list, count] };
    let whole = both(&program, &uncut, moves::GATHER, &launch, "uncut");
    assert_eq!(whole.0[..2 * half], after.0[..2 * half]);
}

#[test]
fn checksum_finds_what_its_twin_finds_at_every_length_and_alignment() {
    let Some(program) = program("checksum") else { return };
    let (lists, values) = (8 << 20, (8 << 20) + (1 << 20));
    let mut arena = Arena::random(values + (1 << 20), 3);
    let mut random = Random(4);
    let mut objects = Vec::new();
    let mut lengths: Vec<u64> = (0..=1100).collect();
    lengths.extend([2047, 2048, 2049, 16_383, 16_384, 16_385, 65_536, 65_537, 100_000, 300_001, 0, 5]);
    for (at, len) in lengths.iter().enumerate() {
        let aligned = random.below((lists as u64 - len) / 16 - 1) * 16;
        objects.push((BASE + aligned, *len));
        objects.push((BASE + aligned + at as u64 % 16, *len));
    }
    let cut: Vec<parts::Part> = parts::cut(objects.iter().copied()).collect();
    arena.put(lists, &parts::list(cut.iter().copied()));
    let parameters = [BASE + lists as u64, cut.len() as u64, BASE + values as u64];
    let blocks = u32::try_from(cut.len()).expect("few") + 1;
    let launch = Launch { blocks, threads: parts::THREADS, parameters: &parameters };
    let after = both(&program, &arena, checksum::CHECKSUM, &launch, "checksums");
    let words = after.0[values..].as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let found = parts::roots(objects.iter().map(|(_, len)| *len), words);
    for ((address, len), found) in objects.iter().zip(found) {
        let start = usize::try_from(address - BASE).expect("inside");
        let bytes = &arena.0[start..][..usize::try_from(*len).expect("inside")];
        assert_eq!(found, hetmem_core::checksum::of(bytes), "{len} bytes at {start}");
    }
}

#[test]
fn casts_give_what_their_twins_give_at_every_alignment() {
    let Some(program) = program("cast") else { return };
    let types = [DType::F32, DType::BF16, DType::F16];
    let half = 1 << 20;
    let mut arena = Arena::random(2 * half, 5);
    // Random bytes have few subnormal numbers, ties and NaN of either format.
    for (at, word) in arena.0[..half].as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let number = u32::try_from(at).expect("few");
        match at % 4 {
            0 => *word = (number << 15 ^ number << 11 & 0x3000).to_le_bytes(),
            1 => *word = (0x3300_0000 + (number << 12)).to_le_bytes(),
            _ => {}
        }
    }
    for (from, to) in types.iter().flat_map(|from| types.iter().map(move |to| (*from, *to))) {
        let Ok(cast) = Cast::new(from, to) else { continue };
        let whole = half as u64 / cast.source_element_len() / 2;
        for (source_at, target_at, count) in [
            (0, 0, whole),
            (1, 0, 10_001),
            (0, 1, 4095),
            (2, 2, 4097),
            (3, 3, 8192 + 5),
            (1, 3, 77),
            (3, 1, 3),
            (0, 3, 2),
            (0, 0, 1),
            (2, 1, 0),
        ] {
            let source = BASE + source_at * cast.source_element_len();
            let target = BASE + half as u64 + target_at * cast.target_element_len();
            let what =
                format!("{from} to {to}, {count} elements, {source_at} and {target_at} from the boundary");
            let blocks = u32::try_from(cast::blocks(count)).expect("few");
            let parameters = [source, target, count];
            let launch = Launch { blocks, threads: cast::THREADS, parameters: &parameters };
            let after = both(&program, &arena, cast.kernel(), &launch, &what);
            let read = usize::try_from(source - BASE).expect("inside");
            let bytes = usize::try_from(count * cast.source_element_len()).expect("inside");
            let mut expected = vec![0; bytes / from_len(cast) * to_len(cast)];
            cast::convert(cast, &arena.0[read..][..bytes], &mut expected).expect("fits");
            let written = usize::try_from(target - BASE).expect("inside");
            assert_eq!(after.0[written..][..expected.len()], expected, "{what}");
        }
    }
}

fn from_len(cast: Cast) -> usize {
    usize::try_from(cast.source_element_len()).expect("small")
}

fn to_len(cast: Cast) -> usize {
    usize::try_from(cast.target_element_len()).expect("small")
}

#[test]
fn sums_are_what_their_twin_adds_up() {
    let Some(program) = program("sum") else { return };
    let sums = 2 << 20;
    let mut arena = Arena::random(sums + 512, 6);
    arena.put(sums, &[0; 512]);
    for vectors in [0, 1, 255, 4096, 4097, 100_000] {
        let parameters = [BASE, vectors, BASE + sums as u64];
        let blocks = u32::try_from(vectors.div_ceil(sum::TILE).max(1)).expect("few");
        let launch = Launch { blocks, threads: sum::THREADS, parameters: &parameters };
        let after = both(&program, &arena, sum::SUM, &launch, &format!("{vectors} vectors"));
        let words = |bytes: &[u8]| {
            let words = bytes.as_chunks::<8>().0.iter();
            words.map(|word| u64::from_le_bytes(*word)).fold(0, u64::wrapping_add)
        };
        let len = usize::try_from(vectors * sum::VECTOR_LEN).expect("inside");
        assert_eq!(words(&after.0[sums..]), words(&arena.0[..len]));
    }
}
