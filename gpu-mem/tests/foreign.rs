//! Tensors that a framework in the same process has allocated and is still writing. Not the store's own memory.
//! Invariant: each test runs on a real driver too where one is asked for.
//!
//! unsafe: vouches for addresses and streams that the test has made itself.
#![allow(unsafe_code, clippy::print_stdout)]

mod stand_in;

use std::sync::Arc;

use hetmem_core::ErrorKind;
use stand_in::hooks::{self, Framework};
use stand_in::memory::Heap;
use stand_in::{MIB, bytes_of, fill, on_device, on_gpu, pattern, segment};

use hetmem_gpu_mem::HostMemory;

const LEN: usize = 16 << 20;

#[test]
fn a_put_waits_for_the_producer() {
    on_gpu("a_put_waits_for_the_producer", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 32 * MIB));
        let producer = Framework::start(0, LEN);
        let current = hooks::current_context();
        for byte in 1..6 {
            producer.set(byte, LEN);
            // SAFETY: a stream and memory that live until the end of this test.
            unsafe {
                stream.wait_raw(producer.stream as u64).expect("accepted");
                stream
                    .copy_from_address(producer.address(), LEN as u64, &on_device(&memory, 0, LEN))
                    .expect("accepted");
            }
            stream.synchronize().expect("copied");
            let bytes = bytes_of(&stream, &on_device(&memory, 0, LEN));
            assert!(bytes.iter().all(|read| *read == byte), "the copy was too early");
        }
        // The stand-in has no default stream per thread.
        let specials = if hooks::live().is_none() { 0..3 } else { 0..2 };
        for special in specials {
            // SAFETY: the default streams always live.
            unsafe { stream.wait_raw(special).expect("accepted") };
        }
        assert_eq!(hooks::current_context(), current, "the framework's context is still current");
        drop(producer);
        drop((stream, memory, device));
        hooks::assert_nothing_left("the put");
    });
}

#[test]
fn a_get_fills_a_tensor_of_the_framework() {
    on_gpu("a_get_fills_a_tensor_of_the_framework", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let bytes = pattern(5000, 1);
        fill(&stream, &on_device(&memory, 8, 5000), &bytes);
        let tensor = Framework::start(0, 8192);
        tensor.set(7, 8192);
        // SAFETY: memory and stream that live until the end of this test.
        unsafe {
            stream.wait_raw(tensor.stream as u64).expect("accepted");
            stream
                .copy_to_address(&on_device(&memory, 8, 5000), tensor.address() + 100, 5000)
                .expect("accepted");
        }
        stream.synchronize().expect("copied");
        let read = tensor.bytes(8192);
        assert_eq!(&read[100..5100], &bytes[..]);
        assert!(read[..100].iter().chain(&read[5100..]).all(|byte| *byte == 7), "nothing beside it");
    });
}

#[test]
fn a_tensor_of_another_device_is_copied_too() {
    on_gpu("a_tensor_of_another_device_is_copied_too", |gpus| {
        if gpus.probe().devices.len() < 2 {
            println!("skipped: this needs two devices");
            return;
        }
        let device = gpus.device(0).expect("gpu:0");
        let (stream, memory) = (device.stream().expect("a stream"), segment(&device, 2 * MIB));
        let tensor = Framework::start(1, 8192);
        tensor.set(9, 8192);
        assert_eq!(gpus.device_of(tensor.address(), 8192).expect("known"), 1);
        // SAFETY: memory and stream that live until the end of this test.
        unsafe {
            stream.wait_raw(tensor.stream as u64).expect("accepted");
            stream.copy_from_address(tensor.address(), 8192, &on_device(&memory, 0, 8192)).expect("accepted");
        }
        stream.synchronize().expect("copied");
        assert_eq!(bytes_of(&stream, &on_device(&memory, 0, 8192)), vec![9; 8192]);
    });
}

#[test]
fn addresses_that_are_no_device_memory_are_refused() {
    on_gpu("addresses_that_are_no_device_memory_are_refused", |gpus| {
        let device = gpus.device(0).expect("gpu:0");
        let memory = segment(&device, 2 * MIB);
        let stream = device.stream().expect("a stream");
        assert_eq!(gpus.device_of(memory.address(), memory.len_bytes()).expect("known"), 0);
        let heap = Arc::new(Heap::new(&[0; 4096]));
        let host = heap.base().addr() as u64;
        for (address, len) in [(host, 8), (0x10, 8), (u64::MAX, 8), (memory.address(), 1 << 45)] {
            let error = gpus.device_of(address, len).expect_err("no device memory");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(&format!("{address:#x}")), "{error}");
        }
        let registration = gpus.register_host(Arc::clone(&heap) as Arc<dyn HostMemory>, false);
        let registration = registration.expect("registered");
        let known = gpus.device_of(host, 8).expect_err("host memory").to_string();
        assert!(known.contains("host memory"), "{known}");
        // SAFETY: refused, so nothing is copied.
        let refused = unsafe { stream.copy_from_address(host, 8, &on_device(&memory, 0, 8)) };
        assert_eq!(refused.expect_err("host memory").kind(), ErrorKind::Invalid);
        // SAFETY: as above.
        let refused = unsafe { stream.copy_from_address(memory.address(), 9, &on_device(&memory, 0, 8)) };
        assert_eq!(refused.expect_err("lengths differ").kind(), ErrorKind::Invalid);
        drop(registration);
    });
}
