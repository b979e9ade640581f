//! Many threads at once, and what is left after them. Not a measurement. Invariant: when everything was given back, nothing is
//! alive and all memory is free.

use crate::driver::{Driver, GRANULE, start};
use crate::process::isolated;

fn one_thread(driver: &Driver, number: u8) {
    let device = i32::from(number % 2);
    driver.use_device(device);
    let stream = driver.stream(u32::from(number / 2 % 2));
    let event = driver.event();
    for round in 0..20_u8 {
        let byte = number.wrapping_mul(31).wrapping_add(round);
        let (a, len) = (driver.alloc(70_000), 70_000);
        driver.set_async(a, byte, len, stream).expect("fill");
        driver.event_record(event, stream).expect("an event");
        driver.stream_wait(0, event, 0).expect("an event");
        assert_eq!(driver.read(a, len), Ok(vec![byte; len]));
        let mut prop = crate::driver::prop();
        prop.location.id = device;
        let mut handle = 0;
        driver.create_into(&mut handle, GRANULE, &prop, 0).expect("a handle");
        let pointer = driver.reserve(GRANULE);
        driver.map(pointer, GRANULE, 0, handle, 0).expect("free addresses");
        driver.release(handle).expect("a handle");
        driver.grant(pointer, GRANULE, device, 3).expect("a mapping");
        driver.d2d_async(pointer + 99, a, len, stream).expect("D2D");
        driver.stream_synchronize(stream).expect("no error");
        assert_eq!(driver.read(pointer + 99, len), Ok(vec![byte; len]));
        driver.unmap(pointer, GRANULE).expect("a mapping");
        driver.unreserve(pointer, GRANULE).expect("a reservation");
        driver.free(a).expect("an allocation");
    }
    driver.event_destroy(event).expect("an event");
    driver.stream_destroy(stream).expect("a stream");
    driver.release_context(device).expect("retained");
}

#[test]
fn threads_do_not_disturb_each_other_and_leave_nothing() {
    isolated(&[], || {
        let driver = start();
        std::thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || one_thread(driver, number));
            }
        });
        assert_eq!(driver.live(), 1, "the context of this thread");
        assert_eq!(driver.free_bytes(), 1 << 30);
        driver.release_context(0).expect("retained");
        assert_eq!(driver.live(), 0);
    });
}

#[test]
fn a_context_takes_what_is_in_it_along() {
    isolated(&[], || {
        let driver = start();
        let (stream, event, mut host) = (driver.stream(0), driver.event(), 0);
        let pointer = driver.alloc(1000);
        driver.host_alloc(&mut host, 1000, 0).expect("host memory");
        driver.set_async(pointer, 1, 1000, stream).expect("fill");
        driver.event_record(event, stream).expect("an event");
        assert_eq!(driver.live(), 5);
        driver.release_context(0).expect("retained");
        assert_eq!(driver.live(), 0);
        assert!(driver.stream_query(stream).is_err() && driver.event_query(event).is_err());
        driver.use_device(0);
        assert_eq!(driver.free_bytes(), 1 << 30);
        assert!(driver.read(pointer, 1).is_err());
    });
}
