//! Kernels on a device: batches of copies, checksums, conversions, and what takes their place where they cannot be had. Not
//! what they compute bit by bit on every input (`hetmem-kernels`). Invariant: each test runs on a real driver too where one is
//! asked for, and there compares the kernels with their twins.

#![allow(clippy::print_stdout)]

mod stand_in;

use std::sync::Arc;

use hetmem_core::{DType, ErrorKind, checksum};
use hetmem_gpu_mem::{AccessRights, Cast, Device, Gpus, HostMemory, Memory, Segment, Span, Stream};
use hetmem_kernels::cast::convert;
use stand_in::memory::Heap;
use stand_in::{
    MIB, bytes_of, fill, hooks, on_device, on_each_stand_in, on_gpu, on_host, on_stand_in, pattern, pinned,
    segment,
};

fn open() -> (Gpus, Device, Stream) {
    let gpus = Gpus::open().expect("a driver");
    let device = gpus.device(0).expect("gpu:0");
    let stream = device.stream().expect("a stream");
    (gpus, device, stream)
}

/// Bytes without a short period.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// Lengths around every boundary of the kernels: vectors, stripes, rounds, blocks, moves.
const LENGTHS: &[usize] = &[
    0, 1, 3, 4, 8, 15, 16, 17, 63, 64, 65, 128, 129, 240, 241, 1023, 1024, 1025, 4096, 16_383, 16_384,
    16_385, 65_535, 65_536, 65_537, 200_001,
];

/// Between device memory, imported memory and pinned host memory, at odd places, in one launch.
#[test]
fn gather_copies_between_all_memories_at_every_alignment() {
    on_gpu("gather_copies_between_all_memories_at_every_alignment", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let stream = device.stream().expect("a stream");
        let (one, two) = (segment(&device, 4 * MIB), segment(&device, 8 * MIB));
        let bytes = noise(4 << 20, 1);
        fill(&stream, &on_device(&one, 0, bytes.len()), &bytes);
        let imported = device
            .import_segment(one.descriptor(), one.len_bytes(), AccessRights::ReadOnly)
            .expect("imported");
        let imported = Memory::Imported(Arc::new(imported));
        let host = pinned(&device, &bytes);
        let mut pairs = Vec::new();
        let (mut source, mut target) = (0_u64, 0_u64);
        for (at, len) in LENGTHS.iter().cycle().take(16 * LENGTHS.len()).enumerate() {
            let from = match at % 3 {
                0 => on_device(&one, source, *len),
                1 => Span::new(imported.clone(), source, *len as u64).expect("inside"),
                _ => on_host(&host, source, *len),
            };
            pairs.push((from, on_device(&two, target, *len)));
            source = (source + *len as u64 + 7) % (3 << 20);
            target += *len as u64 + at as u64 % 16;
        }
        let before = hooks::calls("cuLaunchKernel");
        stream.gather(&pairs).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(hooks::calls("cuLaunchKernel"), before.map(|calls| calls + 1));
        for (from, to) in &pairs {
            let start = usize::try_from(from.offset()).expect("inside");
            let len = usize::try_from(from.len_bytes()).expect("inside");
            if len > 0 {
                assert!(bytes_of(&stream, to) == bytes[start..][..len], "{from:?} to {to:?}");
            }
        }
        // The other way: one source, many places of the host's memory.
        let back = Arc::new(Heap::new(&vec![0; 1 << 20]));
        let _registered =
            gpus.register_host(Arc::clone(&back) as Arc<dyn HostMemory>, false).expect("pinned");
        let scatter: Vec<_> = (0..100)
            .map(|at| (on_device(&one, at * 1000, 1000), on_host(&back, (99 - at) * 1003, 1000)))
            .collect();
        stream.gather(&scatter).expect("accepted");
        stream.synchronize().expect("copied");
        let found = back.bytes();
        assert!((0..100).all(|at| found[(99 - at) * 1003..][..1000] == bytes[at * 1000..][..1000]));
    });
}

/// Of a batch the short copies within reach go by a kernel, the others as they would alone; lists are used again.
#[test]
fn short_copies_of_a_batch_are_one_launch() {
    on_gpu("short_copies_of_a_batch_are_one_launch", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 4 * MIB));
        let bytes = pattern(1 << 20, 3);
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        let (back, heap) = (pinned(&device, &vec![0; 1 << 20]), Arc::new(Heap::new(&[0; 500])));
        let mut pairs: Vec<_> =
            (0..200).map(|at| (on_device(&memory, at * 1000, 999), on_host(&back, at * 1001, 999))).collect();
        pairs.push((on_device(&memory, 200_000, 300_000), on_host(&back, 300_000, 300_000)));
        pairs.push((on_device(&memory, 7, 500), on_host(&heap, 0, 500)));
        for round in 1..=3 {
            let copies = hooks::calls("cuMemcpyDtoHAsync_v2");
            let pinnings = hooks::calls("cuMemHostAlloc");
            stream.copy_many(&pairs).expect("accepted");
            stream.synchronize().expect("copied");
            if !stand_in::is_real() {
                assert_eq!(hooks::calls("cuLaunchKernel"), Some(round));
                assert_eq!(
                    hooks::calls("cuMemcpyDtoHAsync_v2"),
                    copies.map(|calls| calls + 2),
                    "the long, the pageable"
                );
                let more = u64::from(round == 1);
                assert_eq!(
                    hooks::calls("cuMemHostAlloc"),
                    pinnings.map(|calls| calls + more),
                    "one list for all"
                );
                assert_eq!(hooks::calls("cuModuleLoadData"), Some(1));
            }
        }
        assert_eq!(stream.held(), 0);
        let mut found = vec![0; 1 << 20];
        back.read(0, &mut found).expect("inside");
        assert!((0..200).all(|at| found[at * 1001..][..999] == bytes[at * 1000..][..999]));
        assert_eq!(found[300_000..][..300_000], bytes[200_000..][..300_000]);
        assert_eq!(heap.bytes(), bytes[7..507]);
    });
}

/// PTX that the driver does not take, a kernel that is not in it, a launch that is refused: the driver copies.
#[test]
fn without_kernels_the_driver_copies() {
    let sets: [&[(&str, &str)]; 3] = [
        &[("FAIL", "cuModuleLoadData=UNSUPPORTED_PTX_VERSION")],
        &[("FAIL", "cuModuleGetFunction=NOT_FOUND")],
        &[("FAIL", "cuLaunchKernel=LAUNCH_OUT_OF_RESOURCES")],
    ];
    on_each_stand_in("without_kernels_the_driver_copies", &sets, || {
        let (gpus, device, stream) = open();
        let memory = segment(&device, 2 * MIB);
        let bytes = pattern(50_000, 4);
        let source = pinned(&device, &bytes);
        let pairs: Vec<_> = (0..50)
            .map(|at| (on_host(&source, at * 1000, 1000), on_device(&memory, at * 2000, 1000)))
            .collect();
        for _ in 0..2 {
            stream.copy_many(&pairs).expect("accepted");
            stream.synchronize().expect("copied");
        }
        assert_eq!(hooks::calls("cuMemcpyBatchAsync"), Some(2));
        assert_eq!(hooks::calls("cuModuleLoadData"), Some(1), "asked once");
        assert!((0..50).all(|at| {
            let start = usize::try_from(at * 1000).expect("inside");
            bytes_of(&stream, &on_device(&memory, at * 2000, 1000)) == bytes[start..][..1000]
        }));
        // The processor takes the kernel's place; where only a kernel will do, the error says what is missing.
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        assert_eq!(stream.checksum(&on_device(&memory, 3, 49_000)), Ok(checksum::of(&bytes[3..49_003])));
        let error = stream.checksums(&[on_device(&memory, 0, 1000)]).expect_err("no kernel");
        let refused = error.to_string();
        assert!(
            refused.contains("GPU kernel checksum") && refused.contains("580")
                || refused.contains("cuLaunchKernel"),
            "{refused}"
        );
        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Os), "{error}");
        drop((stream, memory, source, pairs, device, gpus));
        hooks::assert_nothing_left("all was dropped");
    });
}

#[test]
fn checksums_are_those_of_the_core() {
    on_gpu("checksums_are_those_of_the_core", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 8 * MIB));
        let bytes = noise(7 << 20, 5);
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        let host = pinned(&device, &bytes[..100_000]);
        let mut spans = Vec::new();
        let mut expected = Vec::new();
        let mut start = 0_usize;
        for (at, len) in LENGTHS.iter().enumerate() {
            for start in [start, start + 1 + at % 15] {
                spans.push(on_device(&memory, start as u64, *len));
                expected.push(checksum::of(&bytes[start..][..*len]));
            }
            start = (start + len).next_multiple_of(16);
        }
        spans.push(on_host(&host, 5, 99_995));
        expected.push(checksum::of(&bytes[5..100_000]));
        spans.push(on_device(&memory, 1 << 20, 5_000_000));
        expected.push(checksum::of(&bytes[1 << 20..][..5_000_000]));
        let before = hooks::calls("cuLaunchKernel");
        let found = stream.checksums(&spans).expect("accepted").wait().expect("computed");
        assert_eq!(found, expected);
        assert_eq!(hooks::calls("cuLaunchKernel"), before.map(|calls| calls + 1), "one launch for all");
        assert_eq!(stream.checksum(&spans[40]).expect("computed"), expected[40]);
        assert!(stream.checksums(&[]).expect("nothing").wait().expect("nothing").is_empty());
        let heap = Arc::new(Heap::new(&[1; 64]));
        let error = stream.checksum(&on_host(&heap, 0, 64)).expect_err("not pinned");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("pinned"), "{error}");
    });
}

/// What a launch reads lives until the stream was seen to be past it, whoever has dropped it.
#[test]
fn memory_is_held_until_the_kernel_has_ended() {
    on_gpu("memory_is_held_until_the_kernel_has_ended", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let stream = device.stream().expect("a stream");
        let (memory, target) = (segment(&device, 2 * MIB), segment(&device, 2 * MIB));
        let bytes = pattern(100_000, 6);
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        let pairs: Vec<_> = (0..100)
            .map(|at| (on_device(&memory, at * 1000, 1000), on_device(&target, at * 1000, 1000)))
            .collect();
        stream.copy_many(&pairs).expect("accepted");
        let sums = stream.checksums(&[on_device(&memory, 0, bytes.len())]).expect("accepted");
        let weak = Arc::downgrade(&memory);
        drop((memory, pairs));
        assert!(weak.upgrade().is_some() && stream.held() > 100);
        assert_eq!(sums.wait().expect("computed"), [checksum::of(&bytes)]);
        assert!(weak.upgrade().is_none() && stream.held() == 0);
        assert_eq!(bytes_of(&stream, &on_device(&target, 0, bytes.len())), bytes);
        drop((stream, target, device));
        hooks::assert_nothing_left("all was dropped");
    });
}

/// Every pair of formats, random bits with all kinds of numbers among them, aligned and not.
#[test]
fn casts_agree_with_their_twins() {
    on_gpu("casts_agree_with_their_twins", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 8 * MIB));
        let types = [DType::F32, DType::BF16, DType::F16];
        let mut bytes = noise(1 << 20, 7);
        for (at, word) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate().filter(|(at, _)| at % 3 == 0) {
            // Around the subnormal numbers of half precision, with every fraction; ties among them.
            let place = u32::try_from(at).expect("few");
            *word = (0x3300_0000 + (place << 11)).to_le_bytes();
        }
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        for (from, to) in types.iter().flat_map(|from| types.iter().map(move |to| (*from, *to))) {
            let Ok(cast) = Cast::new(from, to) else { continue };
            let (read, written) = (cast.source_element_len(), cast.target_element_len());
            for (source_at, target_at, count) in
                [(0, 0, 200_000), (1, 3, 10_007), (2, 2, 4097), (0, 1, 5), (0, 0, 0)]
            {
                let len = usize::try_from(count * read).expect("small");
                let source = on_device(&memory, source_at * read, len);
                let target_len = usize::try_from(count * written).expect("small");
                let target = on_device(&memory, 4 * MIB + target_at * written, target_len);
                stream.cast(&source, &target, cast).expect("accepted");
                stream.synchronize().expect("converted");
                let start = usize::try_from(source_at * read).expect("small");
                let mut expected = vec![0; target_len];
                convert(cast, &bytes[start..][..len], &mut expected).expect("lengths");
                if count > 0 {
                    assert!(bytes_of(&stream, &target) == expected, "{from} to {to}, {count} elements");
                }
            }
            let refused =
                |source: Span, target: Span| stream.cast(&source, &target, cast).expect_err("wrong").kind();
            let target_len = usize::try_from(8 * written).expect("small");
            let source_len = usize::try_from(8 * read).expect("small");
            let target = on_device(&memory, 4 * MIB, target_len);
            assert_eq!(
                refused(on_device(&memory, 1, source_len), target.clone()),
                ErrorKind::Invalid,
                "misaligned"
            );
            assert_eq!(refused(on_device(&memory, 0, source_len + 1), target.clone()), ErrorKind::Invalid);
            assert_eq!(refused(on_device(&memory, 0, 2 * source_len), target), ErrorKind::Invalid);
        }
    });
}

#[test]
fn the_yardstick_adds_up_what_it_reads() {
    on_gpu("the_yardstick_adds_up_what_it_reads", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 4 * MIB));
        let bytes = noise(3 << 20, 8);
        fill(&stream, &on_device(&memory, 0, bytes.len()), &bytes);
        let sums = pinned(&device, &[0; 512]);
        stream.sum(&on_device(&memory, 16, 2_000_000), &on_host(&sums, 0, 512)).expect("accepted");
        stream.synchronize().expect("summed up");
        let mut found = vec![0; 512];
        sums.read(0, &mut found).expect("inside");
        let sum = |bytes: &[u8]| {
            let words = bytes.as_chunks::<8>().0.iter();
            words.map(|word| u64::from_le_bytes(*word)).fold(0, u64::wrapping_add)
        };
        assert_eq!(sum(&found), sum(&bytes[16..2_000_016]));
    });
}

/// Memory that is registered for reading alone is a source of kernels, and no target of theirs.
#[test]
fn kernels_do_not_write_what_is_registered_for_reading() {
    on_stand_in("kernels_do_not_write_what_is_registered_for_reading", &[], || {
        let (gpus, device, stream) = open();
        let memory: Arc<Segment> = segment(&device, 2 * MIB);
        let heap = Arc::new(Heap::new(&pattern(4096, 9)));
        let _registered = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, true).expect("pinned");
        stream.gather(&[(on_host(&heap, 1, 4000), on_device(&memory, 0, 4000))]).expect("it is read");
        let error =
            stream.gather(&[(on_device(&memory, 0, 9), on_host(&heap, 0, 9))]).expect_err("it would fault");
        assert!(error.to_string().contains("read-only"), "{error}");
        stream.synchronize().expect("no fault");
    });
}
