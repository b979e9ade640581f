//! The copier: every copy ends with one call of its `done`, whatever happens. Not which driver call copies (`copies.rs`).
//! Invariant: nothing here waits for a time; what must not hang would hang the test.

#![allow(clippy::print_stdout)]

mod stand_in;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use hetmem_core::{ErrorKind, StoreError};
use hetmem_gpu_mem::{Copied, Copier, Gpus, Span};
use stand_in::memory::Heap;
use stand_in::{MIB, bytes_of, hooks, on_device, on_gpu, on_host, on_stand_in, pattern, pinned, segment};

type Ended = Result<Copied, StoreError>;

/// Submits, and gives what `done` is called with.
fn submit(copier: &Copier, from: Span, to: Span) -> Receiver<Ended> {
    let (tell, ended) = channel();
    copier.submit(from, to, Box::new(move |result| tell.send(result).expect("the test waits")));
    ended
}

/// What `done` was called with, and that it was called once.
fn ended(receiver: &Receiver<Ended>) -> Ended {
    let first = receiver.recv().expect("done is called");
    assert!(receiver.recv().is_err(), "done is called once");
    first
}

#[test]
fn all_directions_arrive() {
    on_gpu("all_directions_arrive", |gpus| {
        let copier = Copier::new(gpus.clone());
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 4 * MIB);
        let bytes = pattern(50_000, 1);
        let (source, heap) = (pinned(&device, &bytes), Arc::new(Heap::new(&bytes)));
        let copied = ended(&submit(&copier, on_host(&source, 0, 50_000), on_device(&memory, 1, 50_000)));
        assert_eq!(copied.expect("copied"), Copied { staged_bytes: 0, pinned: true });
        let copied = ended(&submit(&copier, on_host(&heap, 0, 50_000), on_device(&memory, MIB, 50_000)));
        assert_eq!(copied.expect("copied"), Copied { staged_bytes: 0, pinned: false });
        let copied =
            ended(&submit(&copier, on_device(&memory, 1, 50_000), on_device(&memory, 2 * MIB, 50_000)));
        assert!(copied.expect("copied").pinned);
        let back = Arc::new(Heap::new(&[0; 50_000]));
        ended(&submit(&copier, on_device(&memory, 2 * MIB, 50_000), on_host(&back, 0, 50_000)))
            .expect("copied");
        assert_eq!(back.bytes(), bytes);
        if gpus.probe().devices.len() > 1 {
            let other = segment(&gpus.device(1).expect("gpu:1"), MIB);
            ended(&submit(&copier, on_device(&memory, 1, 50_000), on_device(&other, 0, 50_000)))
                .expect("copied");
            let stream = other.device().stream().expect("a stream");
            assert_eq!(bytes_of(&stream, &on_device(&other, 0, 50_000)), bytes);
        }
        drop((memory, source, device, copier));
    });
}

/// A `done` holds the lane's thread until a hundred copies wait: they go as one call.
#[test]
fn what_waits_goes_together_and_ends_in_order() {
    on_gpu("what_waits_goes_together_and_ends_in_order", |gpus| {
        let copier = Copier::new(gpus.clone());
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 4 * MIB);
        let bytes = pattern(100_000, 2);
        let source = pinned(&device, &bytes);
        let (release, held) = channel::<()>();
        let (arrived, arrival) = channel::<()>();
        let hold = move |_| {
            arrived.send(()).expect("the test waits");
            held.recv().expect("released");
        };
        copier.submit(on_host(&source, 0, 8), on_device(&memory, 3 * MIB, 8), Box::new(hold));
        arrival.recv().expect("the first has ended");
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiting: Vec<_> = (0..100_u64)
            .map(|at| {
                let (tell, ended) = channel();
                let order = Arc::clone(&order);
                let done = move |result: Ended| {
                    order.lock().expect("whole").push(at);
                    tell.send(result).expect("the test waits");
                };
                let from = on_host(&source, at * 1000, 1000);
                copier.submit(from, on_device(&memory, at * 3000, 1000), Box::new(done));
                ended
            })
            .collect();
        release.send(()).expect("the first waits");
        assert!(waiting.iter().all(|receiver| ended(receiver).is_ok()));
        assert_eq!(*order.lock().expect("whole"), (0..100).collect::<Vec<_>>());
        if !stand_in::is_real() {
            assert_eq!(hooks::calls("cuLaunchKernel"), Some(1));
        }
        let stream = device.stream().expect("a stream");
        for at in 0..100_u64 {
            let start = usize::try_from(at * 1000).expect("fits");
            assert_eq!(bytes_of(&stream, &on_device(&memory, at * 3000, 1000)), &bytes[start..][..1000]);
        }
    });
}

#[test]
fn a_refused_copy_spoils_no_other() {
    on_gpu("a_refused_copy_spoils_no_other", |gpus| {
        let copier = Copier::new(gpus.clone());
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let bytes = pattern(4096, 3);
        let (source, locked) = (pinned(&device, &bytes), Arc::new(Heap::read_only(&bytes)));
        let good = submit(&copier, on_host(&source, 0, 4096), on_device(&memory, 0, 4096));
        let uneven = submit(&copier, on_host(&source, 0, 9), on_device(&memory, 0, 8));
        let denied = submit(&copier, on_device(&memory, 0, 8), on_host(&locked, 0, 8));
        let nowhere = submit(&copier, on_host(&source, 0, 8), on_host(&locked, 0, 8));
        let last = submit(&copier, on_host(&source, 0, 96), on_device(&memory, 8192, 96));
        assert_eq!(ended(&uneven).expect_err("uneven").kind(), ErrorKind::Invalid);
        assert_eq!(ended(&denied).expect_err("read-only").kind(), ErrorKind::Denied);
        assert_eq!(ended(&nowhere).expect_err("no device").kind(), ErrorKind::Invalid);
        ended(&good).expect("copied");
        ended(&last).expect("copied");
    });
}

#[test]
fn dropping_it_finishes_what_was_submitted() {
    on_gpu("dropping_it_finishes_what_was_submitted", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 64 * MIB);
        let len = usize::try_from(8 * MIB).expect("fits");
        let bytes = pattern(len, 4);
        let source = pinned(&device, &bytes);
        let (count, good) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let copier = Copier::new(gpus.clone());
        for at in 0..8 {
            let (count, good) = (Arc::clone(&count), Arc::clone(&good));
            let done = move |result: Ended| {
                count.fetch_add(1, Ordering::AcqRel);
                good.fetch_add(usize::from(result.is_ok()), Ordering::AcqRel);
            };
            copier.submit(on_host(&source, 0, len), on_device(&memory, at * 8 * MIB, len), Box::new(done));
        }
        drop(copier);
        assert_eq!((count.load(Ordering::Acquire), good.load(Ordering::Acquire)), (8, 8));
        let stream = device.stream().expect("a stream");
        assert!(bytes_of(&stream, &on_device(&memory, 56 * MIB, len)) == bytes);
        drop((stream, memory, source, device));
        hooks::assert_nothing_left("the copier");
    });
}

/// A segment that is dropped under a copy is unmapped after it.
#[test]
fn memory_dropped_under_a_copy_goes_after_it() {
    on_gpu("memory_dropped_under_a_copy_goes_after_it", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let copier = Copier::new(gpus.clone());
        let len = usize::try_from(16 * MIB).expect("fits");
        let source = pinned(&device, &pattern(len, 5));
        for _ in 0..10 {
            let memory = segment(&device, 16 * MIB);
            let ending = submit(&copier, on_host(&source, 0, len), on_device(&memory, 0, len));
            drop(memory);
            ended(&ending).expect("copied");
        }
        drop((copier, source, device));
        hooks::assert_nothing_left("the copies");
    });
}

#[test]
fn a_done_may_panic_submit_and_drop_the_copier() {
    on_gpu("a_done_may_panic_submit_and_drop_the_copier", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let source = pinned(&device, &pattern(4096, 6));
        let (from, to) = (on_host(&source, 0, 8), on_device(&memory, 0, 8));
        let copier = Arc::new(Copier::new(gpus.clone()));
        copier.submit(from.clone(), to.clone(), Box::new(|_| panic!("this panic is part of the test")));
        ended(&submit(&copier, from.clone(), to.clone())).expect("the next is copied");
        let (tell, told) = channel();
        let inner = Arc::clone(&copier);
        let (again, there) = (from.clone(), to.clone());
        let done = move |_| {
            let done = move |result: Ended| tell.send(result.is_ok()).expect("the test waits");
            inner.submit(again, there, Box::new(done));
            // Perhaps the last reference: the thread does not wait for itself.
            drop(inner);
        };
        copier.submit(from, to, Box::new(done));
        drop(copier);
        assert!(told.recv().expect("done is called"));
    });
}

/// Nothing that a device does not answer keeps anybody waiting.
#[test]
fn a_lost_device_fails_everything_and_hangs_nothing() {
    let switches = [("FAIL", "cuEventQuery=ILLEGAL_ADDRESS")];
    on_stand_in("a_lost_device_fails_everything_and_hangs_nothing", &switches, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let source = pinned(&device, &pattern(4096, 7));
        let copier = Copier::new(gpus);
        for _ in 0..3 {
            let error = ended(&submit(&copier, on_host(&source, 0, 8), on_device(&memory, 0, 8)));
            let error = error.expect_err("the device is lost").to_string();
            assert!(error.contains("cuEventQuery returned 700") && error.contains("restart"), "{error}");
        }
        drop((copier, source, memory, device));
        hooks::assert_nothing_left("the lost device");
    });
}

/// Where the copier cannot have what it needs, each copy ends with the reason.
#[test]
fn what_cannot_be_issued_ends_with_the_reason() {
    let sets: [&[(&str, &str)]; 3] = [
        &[("FAIL", "cuStreamCreate=OUT_OF_MEMORY")],
        &[("FAIL", "cuMemcpyHtoDAsync_v2=999")],
        &[("FAIL", "cuEventCreate=999")],
    ];
    stand_in::on_each_stand_in("what_cannot_be_issued_ends_with_the_reason", &sets, || {
        let gpus = Gpus::open().expect("the stand-in");
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, MIB);
        let bytes = pattern(8, 8);
        let source = pinned(&device, &bytes);
        let copier = Copier::new(gpus);
        let result = ended(&submit(&copier, on_host(&source, 0, 8), on_device(&memory, 0, 8)));
        if hooks::calls("cuEventCreate") == Some(0) {
            let error = result.expect_err("not issued").to_string();
            assert!(error.contains("returned 2") || error.contains("returned 999"), "{error}");
        } else {
            // Without events the stream itself is waited for.
            result.expect("copied");
        }
        drop((copier, source, memory, device));
        hooks::assert_nothing_left("the failure");
    });
}

#[test]
fn many_threads_submit_at_once() {
    on_gpu("many_threads_submit_at_once", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (memory, copier) = (segment(&device, 8 * MIB), Copier::new(gpus.clone()));
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let (memory, copier, device) = (&memory, &copier, &device);
                scope.spawn(move || {
                    let at = u64::from(thread) * MIB;
                    for round in 0..20_u8 {
                        let bytes = pattern(3000, thread.wrapping_mul(29).wrapping_add(round));
                        let (source, back) = (pinned(device, &bytes), pinned(device, &[0; 3000]));
                        let there = on_device(memory, at, 3000);
                        ended(&submit(copier, on_host(&source, 0, 3000), there.clone())).expect("copied");
                        ended(&submit(copier, there, on_host(&back, 0, 3000))).expect("copied");
                        let mut read = vec![0; 3000];
                        back.read(0, &mut read).expect("inside");
                        assert_eq!(read, bytes);
                    }
                });
            }
        });
        drop((copier, memory, device));
        hooks::assert_nothing_left("the threads");
    });
}
