//! In which order work is done, and that nobody waits who need not. Not what is moved (`copies`). Invariant: order is forced by
//! a host function that waits for the test, never by time.

use std::ffi::c_void;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::driver::{
    Driver, GRANULE, ILLEGAL_ADDRESS, INVALID_CONTEXT, INVALID_HANDLE, NOT_PERMITTED, NOT_READY, host_bytes,
    open, start,
};
use crate::process::isolated;

static OPEN: Mutex<bool> = Mutex::new(false);
static CHANGED: Condvar = Condvar::new();

extern "C" fn wait_at_gate(_: *mut c_void) {
    let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    drop(CHANGED.wait_while(open, |open| !*open));
}

fn open_gate() {
    *OPEN.lock().expect("no panic") = true;
    CHANGED.notify_all();
}

fn pinned(driver: &Driver, len: usize, byte: u8) -> usize {
    let mut host = 0;
    driver.host_alloc(&mut host, len, 0).expect("host memory");
    host_bytes(host, len).fill(byte);
    host
}

#[test]
fn work_waits_for_events_and_callers_for_nothing() {
    isolated(&[], || {
        let driver = start();
        let (first, second, event) = (driver.stream(1), driver.stream(1), driver.event());
        assert_eq!(driver.event_query(event), Ok(()));
        let (a, b) = (driver.alloc(4096), driver.alloc(4096));
        driver.set(a, 1, 4096).expect("fill");
        let (source, target) = (pinned(driver, 4096, 2), pinned(driver, 4096, 9));
        driver.launch_host(first, wait_at_gate, 0).expect("a stream");
        driver.h2d_async(a, source, 4096, first).expect("H2D");
        driver.event_record(event, first).expect("an event");
        driver.stream_wait(second, event, 0).expect("an event");
        driver.d2d_async(b, a, 4096, second).expect("D2D");
        driver.d2h_async(target, b, 4096, second).expect("D2H");
        for (stream, event) in [(first, event), (second, event)] {
            assert_eq!(driver.stream_query(stream), Err(NOT_READY));
            assert_eq!(driver.event_query(event), Err(NOT_READY));
        }
        // Not copied when it was submitted: what is there when it runs is what arrives.
        host_bytes(source, 4096).fill(3);
        assert_eq!(host_bytes(target, 4096)[0], 9);
        open_gate();
        driver.stream_synchronize(second).expect("no error");
        assert_eq!(driver.event_query(event), Ok(()));
        assert_eq!(host_bytes(target, 4096), &[3; 4096]);
    });
}

#[test]
fn pageable_memory_may_change_as_soon_as_the_copy_returns() {
    isolated(&[], || {
        let driver = start();
        let (stream, a, mut bytes) = (driver.stream(1), driver.alloc(4096), vec![5_u8; 4096]);
        driver.launch_host(stream, wait_at_gate, 0).expect("a stream");
        driver.h2d_async(a, bytes.as_ptr().expose_provenance(), 4096, stream).expect("H2D");
        bytes.fill(6);
        open_gate();
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.read(a, 4096), Ok(vec![5; 4096]));
    });
}

#[test]
fn the_null_stream_waits_for_blocking_streams_only() {
    isolated(&[], || {
        let driver = start();
        let (blocking, free, event) = (driver.stream(0), driver.stream(1), driver.event());
        let (a, target) = (driver.alloc(1), pinned(driver, 1, 0));
        driver.launch_host(free, wait_at_gate, 0).expect("a stream");
        driver.set(a, 1, 1).expect("does not wait for the other stream");
        driver.launch_host(blocking, wait_at_gate, 0).expect("a stream");
        driver.set_async(a, 2, 1, blocking).expect("fill");
        driver.d2h_async(target, a, 1, 0).expect("D2H");
        driver.event_record(event, 0).expect("an event");
        let later = driver.stream(0);
        driver.set_async(a, 3, 1, later).expect("fill");
        assert_eq!(driver.stream_query(0), Err(NOT_READY));
        assert_eq!(driver.stream_query(later), Err(NOT_READY));
        open_gate();
        driver.event_synchronize(event).expect("no error");
        assert_eq!(host_bytes(target, 1), &[2]);
        driver.synchronize().expect("no error");
        assert_eq!(driver.read(a, 1), Ok(vec![3]));
    });
}

#[test]
fn a_destroyed_stream_does_its_work() {
    isolated(&[], || {
        let driver = start();
        let (stream, a) = (driver.stream(0), driver.alloc(64));
        driver.launch_host(stream, wait_at_gate, 0).expect("a stream");
        driver.set_async(a, 7, 64, stream).expect("fill");
        driver.stream_destroy(stream).expect("a stream");
        assert_eq!(driver.stream_query(stream), Err(INVALID_HANDLE));
        open_gate();
        driver.synchronize().expect("no error");
        assert_eq!(driver.read(a, 64), Ok(vec![7; 64]));
    });
}

static SEEN: AtomicI32 = AtomicI32::new(0);

extern "C" fn call_the_driver(_: *mut c_void) {
    let mut event = 0;
    SEEN.store(open().event_into(&mut event, 0).err().unwrap_or(0), Ordering::SeqCst);
}

#[test]
fn host_functions_may_not_call_the_driver() {
    isolated(&[], || {
        let driver = start();
        driver.launch_host(0, call_the_driver, 0).expect("a stream");
        driver.stream_synchronize(0).expect("no error");
        assert_eq!(SEEN.load(Ordering::SeqCst), NOT_PERMITTED);
    });
}

#[test]
fn memory_that_goes_before_its_copy_is_an_error_that_stays() {
    isolated(&[], || {
        let driver = start();
        let handle = driver.create(GRANULE);
        let (stream, pointer) = (driver.stream(1), driver.mapped(handle, GRANULE));
        let source = pinned(driver, 4096, 1);
        driver.launch_host(stream, wait_at_gate, 0).expect("a stream");
        driver.h2d_async(pointer, source, 4096, stream).expect("it is mapped now");
        driver.unmap(pointer, GRANULE).expect("a mapping");
        open_gate();
        assert_eq!(driver.stream_synchronize(stream), Err(ILLEGAL_ADDRESS));
        let mut other = 0;
        assert_eq!(driver.alloc_into(&mut other, 1), Err(ILLEGAL_ADDRESS));
        assert_eq!(driver.synchronize(), Err(ILLEGAL_ADDRESS));
        // The other device's context is well, and so is a new one of this device.
        driver.use_device(1);
        assert_eq!(driver.synchronize(), Ok(()));
        driver.release_context(0).expect("retained");
        driver.use_device(0);
        assert_eq!(driver.alloc_into(&mut other, 1), Ok(()));
    });
}

#[test]
fn rights_that_go_before_a_copy_are_an_error() {
    isolated(&[], || {
        let driver = start();
        let handle = driver.create(GRANULE);
        let (stream, pointer) = (driver.stream(1), driver.mapped(handle, GRANULE));
        driver.launch_host(stream, wait_at_gate, 0).expect("a stream");
        driver.set_async(pointer, 1, 1, stream).expect("it is writable now");
        driver.grant(pointer, GRANULE, 0, 1).expect("a mapping");
        open_gate();
        assert_eq!(driver.stream_synchronize(stream), Err(ILLEGAL_ADDRESS));
    });
}

#[test]
fn events_take_the_time_and_contexts_are_per_thread() {
    isolated(&[], || {
        let driver = start();
        let (start_event, end, mut elapsed) = (driver.event(), driver.event(), -1.0);
        assert_eq!(driver.elapsed(&mut elapsed, start_event, end), Err(INVALID_HANDLE));
        driver.event_record(start_event, 0).expect("an event");
        driver.launch_host(0, wait_at_gate, 0).expect("a stream");
        driver.event_record(end, 0).expect("an event");
        assert_eq!(driver.elapsed(&mut elapsed, start_event, end), Err(NOT_READY));
        open_gate();
        driver.event_synchronize(end).expect("no error");
        driver.elapsed(&mut elapsed, start_event, end).expect("both are complete");
        assert!(elapsed >= 0.0);
        let other = std::thread::spawn(|| driver.synchronize());
        assert_eq!(other.join().expect("no panic"), Err(INVALID_CONTEXT));
        let (mut context, mut of_stream) = (0, 0);
        driver.stream_context(0, &mut of_stream).expect("a stream");
        driver.pop_current(&mut context).expect("a context");
        assert_eq!((context, driver.synchronize()), (of_stream, Err(INVALID_CONTEXT)));
        driver.push_current(context).expect("a context");
        assert_eq!(driver.synchronize(), Ok(()));
    });
}
