//! Copies between all kinds of memory, byte for byte, and the order of streams. Not the copier (`copier.rs`). Invariant:
//! each test runs on a real driver too where one is asked for.

#![allow(clippy::print_stdout)]

mod stand_in;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hetmem_core::ErrorKind;
use hetmem_gpu_mem::{HostMemory, Memory, PinnedBuffer, Span};
use stand_in::memory::Heap;
use stand_in::on_each_stand_in;
use stand_in::{
    MIB, bytes_of, fill, hooks, on_device, on_gpu, on_host, on_stand_in, pattern, pinned, segment,
};

const LEN: usize = 3 * 4096 + 17;

#[test]
fn host_to_device_to_host_pinned_or_not() {
    on_gpu("host_to_device_to_host_pinned_or_not", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(LEN, 1);
        let heap = Arc::new(Heap::new(&bytes));
        let buffer = pinned(&device, &bytes);
        for (offset, source) in [(0, on_host(&heap, 0, LEN)), (65_537, on_host(&buffer, 0, LEN))] {
            stream.copy(&source, &on_device(&memory, offset, LEN)).expect("accepted");
            stream.synchronize().expect("copied");
            assert_eq!(bytes_of(&stream, &on_device(&memory, offset, LEN)), bytes);
        }
        let back = Arc::new(Heap::new(&[0; LEN]));
        stream.copy(&on_device(&memory, 65_537, LEN), &on_host(&back, 0, LEN)).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(back.bytes(), bytes);
        assert!(on_host(&buffer, 1, 2).is_pinned(gpus) && !on_host(&heap, 0, 1).is_pinned(gpus));
    });
}

#[test]
fn device_to_device_on_one_and_between_two() {
    on_gpu("device_to_device_on_one_and_between_two", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, one) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(LEN, 2);
        fill(&stream, &on_device(&one, 5, LEN), &bytes);
        stream.copy(&on_device(&one, 5, LEN), &on_device(&one, MIB, LEN)).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(bytes_of(&stream, &on_device(&one, MIB, LEN)), bytes);
        if gpus.probe().devices.len() < 2 {
            println!("skipped: copies between devices need two");
            return;
        }
        let other = gpus.device(1).expect("gpu:1");
        let (others, two) = (other.stream().expect("a stream"), segment(&other, 2 * MIB));
        stream.copy(&on_device(&one, 5, LEN), &on_device(&two, 3, LEN)).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(bytes_of(&others, &on_device(&two, 3, LEN)), bytes);
    });
}

/// Without access to each other's memory, devices copy by way of the driver, and a host copy needs the right stream.
#[test]
fn devices_out_of_reach_copy_all_the_same() {
    on_stand_in("devices_out_of_reach_copy_all_the_same", &[("WITHOUT", "peer")], || {
        let gpus = hetmem_gpu_mem::Gpus::open().expect("the stand-in");
        let (first, second) = (gpus.device(0).expect("gpu:0"), gpus.device(1).expect("gpu:1"));
        assert!(first.info().peers.is_empty());
        let (one, two) = (segment(&first, 2 * MIB), segment(&second, 2 * MIB));
        assert!(one.peers().is_empty());
        let (stream, others) = (first.stream().expect("a stream"), second.stream().expect("a stream"));
        let bytes = pattern(LEN, 3);
        fill(&stream, &on_device(&one, 0, LEN), &bytes);
        stream.copy(&on_device(&one, 0, LEN), &on_device(&two, 9, LEN)).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(hooks::calls("cuMemcpyPeerAsync"), Some(1));
        assert_eq!(bytes_of(&others, &on_device(&two, 9, LEN)), bytes);
        let buffer = pinned(&first, &bytes);
        let far = stream.copy(&on_host(&buffer, 0, LEN), &on_device(&two, 0, LEN));
        let far = far.expect_err("the stream is of the other device");
        assert!(far.kind() == ErrorKind::Invalid && far.to_string().contains("gpu:1"), "{far}");
    });
}

#[test]
fn many_copies_are_one_call() {
    on_gpu("many_copies_are_one_call", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(100 * 1000, 4);
        let source = pinned(&device, &bytes);
        let pairs: Vec<_> = (0..100)
            .map(|at| (on_host(&source, at * 1000, 1000), on_device(&memory, (99 - at) * 2000, 1000)))
            .collect();
        let before = hooks::calls("cuMemcpyHtoDAsync_v2");
        stream.copy_many(&pairs).expect("accepted");
        stream.synchronize().expect("copied");
        for (at, (_, to)) in pairs.iter().enumerate() {
            assert_eq!(bytes_of(&stream, to), &bytes[at * 1000..][..1000], "copy {at}");
        }
        if !stand_in::is_real() {
            assert_eq!(hooks::calls("cuLaunchKernel"), Some(1), "short ones go by a kernel");
            assert_eq!(hooks::calls("cuMemcpyHtoDAsync_v2"), before, "none goes by itself");
        }
        gpus.set_gather_from(usize::MAX);
        stream.copy_many(&pairs).expect("accepted");
        stream.synchronize().expect("copied");
        if !stand_in::is_real() {
            assert_eq!(hooks::calls("cuMemcpyBatchAsync"), Some(1), "the driver's own call");
            assert_eq!(hooks::calls("cuLaunchKernel"), Some(1));
        }
    });
}

/// Also what is not pinned goes by itself, and what is refused spoils no other.
#[test]
fn a_batch_is_of_what_can_be_batched() {
    on_gpu("a_batch_is_of_what_can_be_batched", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(4000, 5);
        let (buffer, heap) = (pinned(&device, &bytes), Arc::new(Heap::new(&bytes)));
        let locked = Arc::new(Heap::read_only(&bytes));
        let refused = stream.copy_many(&[
            (on_host(&buffer, 0, 1000), on_device(&memory, 0, 1000)),
            (on_host(&heap, 1000, 1000), on_device(&memory, 1000, 1000)),
            (on_device(&memory, 0, 10), on_host(&locked, 0, 10)),
            (on_host(&buffer, 2000, 1000), on_device(&memory, 2000, 1000)),
            (on_host(&buffer, 3000, 0), on_device(&memory, 3000, 0)),
        ]);
        assert_eq!(refused.expect_err("a read-only target").kind(), ErrorKind::Denied);
        stream.synchronize().expect("the others are copied");
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, 3000)), &bytes[..3000]);
        assert_eq!(locked.bytes(), bytes);
    });
}

#[test]
fn a_driver_without_batches_takes_one_call_each() {
    on_stand_in("a_driver_without_batches_takes_one_call_each", &[("WITHOUT", "batch")], || {
        let gpus = hetmem_gpu_mem::Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(3000, 6);
        let source = pinned(&device, &bytes);
        let pairs: Vec<_> = (0..3)
            .map(|at| (on_host(&source, at * 1000, 1000), on_device(&memory, at * 1000, 1000)))
            .collect();
        stream.copy_many(&pairs).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(hooks::calls("cuMemcpyHtoDAsync_v2"), Some(3));
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, 3000)), bytes);
    });
}

#[test]
fn spans_do_not_reach_outside() {
    on_gpu("spans_do_not_reach_outside", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 1));
        let len = memory.len_bytes();
        let span = |offset, len| Span::new(Memory::Device(Arc::clone(&memory)), offset, len);
        assert!(span(0, len).is_ok() && span(len, 0).is_ok());
        for (offset, len) in [(0, len + 1), (1, len), (len + 1, 0), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(span(offset, len).expect_err("outside").kind(), ErrorKind::Invalid);
        }
        let two = (span(0, 2).expect("inside"), span(2, 3).expect("inside"));
        assert_eq!(stream.copy(&two.0, &two.1).expect_err("lengths differ").kind(), ErrorKind::Invalid);
        let heap = Arc::new(Heap::new(&[1, 2]));
        let both = stream.copy(&on_host(&heap, 0, 1), &on_host(&heap, 1, 1));
        assert_eq!(both.expect_err("host to host").kind(), ErrorKind::Invalid);
    });
}

#[test]
fn streams_wait_for_events_of_others() {
    on_gpu("streams_wait_for_events_of_others", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (one, two) = (device.stream().expect("a stream"), device.stream().expect("a stream"));
        let memory = segment(&device, 64 * MIB);
        let big = usize::try_from(32 * MIB).expect("fits");
        for seed in 0..4 {
            let bytes = pattern(big, seed);
            let (source, back) = (pinned(&device, &bytes), pinned(&device, &vec![0; big]));
            one.copy(&on_host(&source, 0, big), &on_device(&memory, 0, big)).expect("accepted");
            let event = one.record().expect("an event");
            two.wait(&event).expect("accepted");
            two.copy(&on_device(&memory, 0, big), &on_host(&back, 0, big)).expect("accepted");
            two.synchronize().expect("copied");
            let mut read = vec![0; big];
            back.read(0, &mut read).expect("inside");
            assert!(read == bytes, "the second stream was too early");
            assert!(event.is_done().expect("an answer"));
        }
        assert!(one.is_idle().expect("an answer") && two.is_idle().expect("an answer"));
    });
}

/// What a copy reads lives until the stream was seen to be past it, whoever has dropped it.
#[test]
fn memory_is_held_until_the_copy_has_ended() {
    on_gpu("memory_is_held_until_the_copy_has_ended", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let stream = device.stream().expect("a stream");
        let memory = segment(&device, 2 * MIB);
        let heap = Heap::new(&pattern(LEN, 7));
        let gone = heap.gone();
        let registered = gpus.register_host(Arc::new(heap), false).expect("registered");
        let heap = Arc::new(Heap::new(&pattern(LEN, 8)));
        let heap_gone = heap.gone();
        stream.copy(&on_host(&heap, 0, LEN), &on_device(&memory, 0, LEN)).expect("accepted");
        drop((heap, registered));
        assert!(gone.load(Ordering::Acquire), "a registration that no copy needs holds nothing");
        assert!(!heap_gone.load(Ordering::Acquire));
        let weak = Arc::downgrade(&memory);
        drop(memory);
        assert!(weak.upgrade().is_some() && stream.held() == 1);
        let event = stream.record().expect("an event");
        event.synchronize().expect("done");
        assert!(heap_gone.load(Ordering::Acquire) && weak.upgrade().is_none() && stream.held() == 0);
        drop((event, stream, device));
        hooks::assert_nothing_left("all was dropped");
    });
}

#[test]
fn a_dropped_stream_waits_for_its_copies() {
    on_gpu("a_dropped_stream_waits_for_its_copies", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 32 * MIB));
        let len = usize::try_from(32 * MIB).expect("fits");
        let bytes = pattern(len, 11);
        let (source, back) = (pinned(&device, &bytes), pinned(&device, &vec![0; len]));
        stream.copy(&on_host(&source, 0, len), &on_device(&memory, 0, len)).expect("accepted");
        stream.copy(&on_device(&memory, 0, len), &on_host(&back, 0, len)).expect("accepted");
        let weak = Arc::downgrade(&memory);
        drop(memory);
        let waited = hooks::calls("cuStreamSynchronize");
        drop(stream);
        assert_eq!(hooks::calls("cuStreamSynchronize"), waited.map(|calls| calls + 1));
        assert!(weak.upgrade().is_none());
        let mut read = vec![0; len];
        back.read(0, &mut read).expect("inside");
        assert!(read == bytes, "the drop was too early");
    });
}

/// Where nobody knows whether a copy has ended, its memory is never given back; a lost context runs nothing.
#[test]
fn memory_of_copies_whose_end_is_unknown_stays() {
    let sets: [&[(&str, &str)]; 2] =
        [&[("FAIL", "cuStreamSynchronize=999")], &[("FAIL", "cuStreamSynchronize=ILLEGAL_ADDRESS")]];
    on_each_stand_in("memory_of_copies_whose_end_is_unknown_stays", &sets, || {
        let gpus = hetmem_gpu_mem::Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, MIB));
        let source = pinned(&device, &[1; 8]);
        stream.copy(&on_host(&source, 0, 8), &on_device(&memory, 0, 8)).expect("accepted");
        let error = stream.synchronize().expect_err("it fails").to_string();
        let weak = Arc::downgrade(&memory);
        drop((memory, stream));
        assert_eq!(weak.upgrade().is_none(), error.contains("returned 700"), "{error}");
    });
}

#[test]
fn registered_memory_is_pinned_until_it_is_unregistered() {
    on_gpu("registered_memory_is_pinned_until_it_is_unregistered", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(4 * 4096, 9);
        let heap = Arc::new(Heap::new(&bytes));
        let registration = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, false);
        let registration = registration.expect("registered");
        assert_eq!(registration.len_bytes(), heap.len_bytes());
        let source = on_host(&heap, 100, LEN);
        assert!(source.is_pinned(gpus));
        let twice = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, false);
        assert!(twice.expect_err("registered already").to_string().contains("drop that one first"));
        stream.copy(&source, &on_device(&memory, 0, LEN)).expect("accepted");
        // The copy keeps the memory registered, and alive.
        drop(registration);
        assert!(source.is_pinned(gpus));
        stream.synchronize().expect("copied");
        assert!(!source.is_pinned(gpus));
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, LEN)), &bytes[100..][..LEN]);
        let again = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, true);
        assert!(again.is_ok() && source.is_pinned(gpus));
    });
}

#[test]
fn refused_registration_leaves_copies_working() {
    let switches = [("FAIL", "cuMemHostRegister_v2=OUT_OF_MEMORY")];
    on_stand_in("refused_registration_leaves_copies_working", &switches, || {
        let gpus = hetmem_gpu_mem::Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(LEN, 10);
        let heap = Arc::new(Heap::new(&bytes));
        let refused = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, false);
        assert!(refused.expect_err("no memory may be locked").to_string().contains("ulimit -l"));
        assert!(!on_host(&heap, 0, LEN).is_pinned(&gpus));
        stream.copy(&on_host(&heap, 0, LEN), &on_device(&memory, 0, LEN)).expect("accepted");
        stream.synchronize().expect("copied");
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, LEN)), bytes);
    });
}

#[test]
fn pinned_buffers_keep_to_their_bounds() {
    on_gpu("pinned_buffers_keep_to_their_bounds", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let buffer = PinnedBuffer::new(&device, 10).expect("pinned memory");
        let mut bytes = [9; 4];
        buffer.read(6, &mut bytes).expect("inside");
        assert_eq!(bytes, [0; 4], "it is zeroed");
        buffer.write(7, &[1, 2, 3]).expect("inside");
        buffer.read(6, &mut bytes).expect("inside");
        assert_eq!(bytes, [0, 1, 2, 3]);
        for (offset, len) in [(8, 3), (11, 0), (u64::MAX, 1)] {
            assert_eq!(buffer.write(offset, &[0; 3][..len]).expect_err("outside").kind(), ErrorKind::Invalid);
        }
        assert_eq!(PinnedBuffer::new(&device, 0).expect_err("nothing").kind(), ErrorKind::Invalid);
    });
}

#[test]
fn threads_share_a_stream_and_leave_their_contexts_alone() {
    on_gpu("threads_share_a_stream_and_leave_their_contexts_alone", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let before = hooks::current_context();
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let (stream, memory, gpus) = (&stream, &memory, &gpus);
                scope.spawn(move || {
                    let at = u64::from(thread) * 100_000;
                    for round in 0..20_u8 {
                        let bytes = pattern(5000, thread.wrapping_mul(17).wrapping_add(round));
                        fill(stream, &on_device(memory, at, 5000), &bytes);
                        assert_eq!(bytes_of(stream, &on_device(memory, at, 5000)), bytes);
                        drop(gpus.device(0).expect("gpu:0"));
                    }
                    assert_eq!(hooks::current_context(), 0, "no call leaves a context behind");
                });
            }
        });
        assert_eq!(hooks::current_context(), before);
        stream.synchronize().expect("all is done");
        assert_eq!(stream.held(), 0);
    });
}
