//! What copies move, and what they refuse. Not their order (`streams`). Invariant: bytes are compared one by one.

use crate::driver::{
    ALREADY_REGISTERED, BatchAttributes, Given, INVALID_VALUE, NOT_REGISTERED, OUT_OF_MEMORY, host_bytes,
    start,
};
use crate::process::isolated;

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + seed * 7 + at / 251) % 256).expect("below 256")).collect()
}

fn address(bytes: &[u8]) -> usize {
    bytes.as_ptr().expose_provenance()
}

#[test]
fn every_direction_moves_every_byte() {
    isolated(&[], || {
        let driver = start();
        let (stream, len) = (driver.stream(1), 1_000_003);
        let (a, b, bytes) = (driver.alloc(len), driver.alloc(len), pattern(len, 1));
        driver.write(a, &bytes).expect("H2D");
        driver.d2d(b, a, len).expect("D2D");
        assert_eq!(driver.read(b, len), Ok(bytes));

        let bytes = pattern(len, 2);
        driver.h2d_async(a, address(&bytes), len, stream).expect("H2D");
        driver.d2d_async(b + 5, a + 3, len - 5, stream).expect("D2D");
        let mut back = vec![0; len];
        driver.d2h_async(back.as_mut_ptr().expose_provenance(), b, len, stream).expect("D2H");
        assert_eq!(back[5..], bytes[3..len - 2]);
        assert_eq!(back[..5], pattern(len, 1)[..5]);

        let bytes = pattern(len, 3);
        driver.copy(a, address(&bytes), len).expect("from host by its address");
        driver.copy_async(b, a, len, stream).expect("between devices' addresses");
        driver.stream_synchronize(stream).expect("no error");
        driver.copy(back.as_mut_ptr().expose_provenance(), b, len).expect("to host");
        assert_eq!(back, bytes);

        driver.set(a + 10, 0xAB, 20).expect("fill");
        driver.set_async(a + 15, 0xCD, 5, stream).expect("fill");
        driver.stream_synchronize(stream).expect("no error");
        let found = driver.read(a + 9, 22).expect("D2H");
        let wanted = [&bytes[9..10], &[0xAB; 5], &[0xCD; 5], &[0xAB; 10], &bytes[30..31]].concat();
        assert_eq!(found, wanted);
    });
}

#[test]
fn devices_copy_to_each_other() {
    isolated(&[], || {
        let driver = start();
        let (len, bytes) = (100_000, pattern(100_000, 4));
        let second = driver.use_device(1);
        let b = driver.alloc(len);
        let first = driver.use_device(0);
        let (a, stream) = (driver.alloc(len), driver.stream(1));
        driver.write(a, &bytes).expect("H2D");
        driver.peer_async(b, second, a, first, len, stream).expect("peer copy");
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.read(b, len), Ok(bytes));
        let mut ordinal = -1;
        driver.pointer_ordinal(&mut ordinal, 9, b + 1).expect("a device pointer");
        assert_eq!(ordinal, 1);
    });
}

#[test]
fn a_batch_is_all_of_its_copies_or_says_which_is_wrong() {
    isolated(&[], || {
        let driver = start();
        let (stream, len) = (driver.stream(1), 4096);
        let (a, b, mut bytes) = (driver.alloc(len), driver.alloc(len), pattern(len, 5));
        driver.set(b, 0, len).expect("fill");
        let run =
            |targets: &[usize], sources: &[usize], lens: &[usize], failed: &mut usize, stream| -> Given {
                let during_call = BatchAttributes { order: 2, ..BatchAttributes::default() };
                let (targets, sources, count) = (targets.as_ptr(), sources.as_ptr(), lens.len());
                driver.batch(
                    targets,
                    sources,
                    lens.as_ptr(),
                    count,
                    &raw const during_call,
                    &raw const ZERO,
                    1,
                    failed,
                    stream,
                )
            };
        static ZERO: usize = 0;
        let mut failed = 0;
        let host = address(&bytes);
        run(&[a, a + 100], &[host, host + 500], &[100, 50], &mut failed, stream).expect("H2D batch");
        let wanted = [&bytes[..100], &bytes[500..550]].concat();
        bytes.fill(0);
        run(&[b + 7, b + 200], &[a, a + 100], &[100, 50], &mut failed, stream).expect("D2D batch");
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.read(b + 7, 100), Ok(wanted[..100].to_vec()));
        assert_eq!(driver.read(b + 200, 50), Ok(wanted[100..].to_vec()));

        driver.set(b, 0, len).expect("fill");
        let wrong = run(&[b, b + len - 1], &[a, a], &[1, 2], &mut failed, stream);
        assert_eq!((wrong, failed), (Err(INVALID_VALUE), 1));
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.read(b, 1), Ok(vec![0]));
        assert_eq!(run(&[b], &[a], &[1], &mut failed, 0), Err(INVALID_VALUE));
        assert_eq!(failed, usize::MAX);
    });
}

#[test]
fn one_byte_past_the_end_is_refused() {
    isolated(&[], || {
        let driver = start();
        // In its last page there is room, and another allocation may lie behind it.
        let (len, bytes) = (5000, pattern(5001, 6));
        let (a, b) = (driver.alloc(len), driver.alloc(len));
        assert_eq!(driver.write(a, &bytes), Err(INVALID_VALUE));
        assert_eq!(driver.write(a + 1, &bytes[1..]), Err(INVALID_VALUE));
        assert_eq!(driver.read(a + len, 1), Err(INVALID_VALUE));
        assert_eq!(driver.read(a - 1, 1), Err(INVALID_VALUE));
        assert_eq!(driver.d2d(b, a, len + 1), Err(INVALID_VALUE));
        assert_eq!(driver.set(b + 1, 1, len), Err(INVALID_VALUE));
        assert_eq!(driver.write(a, &bytes[..len]), Ok(()));
        // A host pointer where a device pointer belongs, and the other way round.
        assert_eq!(driver.d2d(a, address(&bytes), 1), Err(INVALID_VALUE));
        assert_eq!(driver.h2d(a, b, 1), Err(INVALID_VALUE));
        driver.free(b).expect("an allocation");
        assert_eq!(driver.read(b, 1), Err(INVALID_VALUE));
        assert_eq!(driver.free(b), Err(INVALID_VALUE));
        assert_eq!(driver.free(a + 4096), Err(INVALID_VALUE));
        let (mut base, mut size) = (0, 0);
        driver.range(&mut base, &mut size, a + 1000).expect("inside");
        assert_eq!((base, size), (a, len));
    });
}

#[test]
fn memory_is_counted() {
    isolated(&[("HETMEM_STANDIN_MEMORY", "1048576")], || {
        let driver = start();
        let (a, mut b) = (driver.alloc(1 << 19), 0);
        assert_eq!(driver.free_bytes(), 1 << 19);
        assert_eq!(driver.alloc_into(&mut b, (1 << 19) + 1), Err(OUT_OF_MEMORY));
        driver.alloc_into(&mut b, 1 << 19).expect("the other half");
        driver.free(a).expect("an allocation");
        let stream = driver.stream(0);
        driver.free_async(b, stream).expect("an allocation");
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.free_bytes(), 1 << 20);
        driver.alloc_async(&mut b, 1 << 20, stream).expect("all of it");
        assert_eq!(driver.free_bytes(), 0);
        assert_eq!(driver.alloc_into(&mut b, 0), Err(INVALID_VALUE));
    });
}

#[test]
fn pinned_memory_has_device_pointers_and_bounds() {
    isolated(&[], || {
        let driver = start();
        let (mut host, mut pointer) = (0, 0);
        driver.host_alloc(&mut host, 8192, 0).expect("host memory");
        host_bytes(host, 8192).copy_from_slice(&pattern(8192, 7));
        let a = driver.alloc(8192);
        driver.host_pointer(&mut pointer, host, 0).expect("it is pinned");
        assert_ne!(pointer, host);
        driver.d2d(a, pointer + 1, 8191).expect("from host by its device pointer");
        assert_eq!(driver.read(a, 8191), Ok(pattern(8192, 7)[1..].to_vec()));
        assert_eq!(driver.h2d(a, host + 1, 8192), Err(INVALID_VALUE));
        assert_eq!(driver.host_register(host, 4096, 0), Err(ALREADY_REGISTERED));
        assert_eq!(driver.host_unregister(host), Err(INVALID_VALUE));
        driver.host_free(host).expect("host memory");
        assert_eq!(driver.host_pointer(&mut pointer, host, 0), Err(INVALID_VALUE));
        assert_eq!(driver.host_register(host, 4096, 0), Err(INVALID_VALUE));

        let own = vec![1_u8; 10_000];
        driver.host_register(address(&own), own.len(), 8).expect("memory of this process");
        assert_eq!(driver.d2h(address(&own), a, 1), Err(INVALID_VALUE));
        driver.h2d(a, address(&own), own.len()).expect_err("longer than its target");
        driver.h2d(a, address(&own), 8192).expect("from read-only memory");
        driver.host_unregister(address(&own)).expect("it is registered");
        assert_eq!(driver.host_unregister(address(&own)), Err(NOT_REGISTERED));
        assert_eq!(driver.read(a, 8192), Ok(vec![1; 8192]));
    });
}
