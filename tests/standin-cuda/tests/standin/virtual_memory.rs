//! Handles, addresses, mappings and rights in one process. Not what other processes do with them (`sharing`). Invariant: what
//! is refused here is what cuda.h says may be refused.

use crate::driver::{GRANULE, INVALID_VALUE, Location, OUT_OF_MEMORY, Prop, prop, start};
use crate::process::isolated;

#[test]
fn memory_lives_as_long_as_something_has_it() {
    isolated(&[("HETMEM_STANDIN_MEMORY", "6291456")], || {
        let driver = start();
        let (handle, all) = (driver.create(2 * GRANULE), driver.free_bytes() + 2 * GRANULE);
        let mut other = 0;
        assert_eq!(driver.create_into(&mut other, 2 * GRANULE, &prop(), 0), Err(OUT_OF_MEMORY));
        let pointer = driver.mapped(handle, 2 * GRANULE);
        driver.release(handle).expect("a handle");
        assert_eq!(driver.release(handle), Err(INVALID_VALUE));
        driver.write(pointer + 4090, &[1, 2, 3]).expect("it is mapped");
        let mut again = 0;
        driver.retain(&mut again, pointer + 5).expect("a handle is mapped there");
        driver.unmap(pointer, 2 * GRANULE).expect("a mapping");
        assert_eq!(driver.read(pointer, 1), Err(INVALID_VALUE));
        assert_eq!(driver.free_bytes(), all - 2 * GRANULE);
        driver.map(pointer, 2 * GRANULE, 0, again, 0).expect("the addresses are free again");
        driver.grant(pointer, 2 * GRANULE, 0, 3).expect("a mapping");
        assert_eq!(driver.read(pointer + 4090, 3), Ok(vec![1, 2, 3]));
        driver.release(again).expect("a handle");
        assert_eq!(driver.unreserve(pointer, 2 * GRANULE), Err(INVALID_VALUE));
        driver.unmap(pointer, 2 * GRANULE).expect("a mapping");
        driver.unreserve(pointer, 2 * GRANULE).expect("a reservation");
        assert_eq!(driver.free_bytes(), all);
        assert_eq!(driver.live(), 1, "the context alone");
    });
}

#[test]
fn one_memory_at_two_addresses_and_two_memories_side_by_side() {
    isolated(&[], || {
        let driver = start();
        let (first, second) = (driver.create(GRANULE), driver.create(GRANULE));
        let (view, both) = (driver.mapped(first, GRANULE), driver.reserve(2 * GRANULE));
        driver.map(both, GRANULE, 0, first, 0).expect("free addresses");
        driver.map(both + GRANULE, GRANULE, 0, second, 0).expect("free addresses");
        assert_eq!(driver.map(both, GRANULE, 0, second, 0), Err(INVALID_VALUE));
        driver.grant(both, 2 * GRANULE, 0, 3).expect("two mappings");
        // One copy across the border; and its first half through the other address.
        let bytes: Vec<u8> = (0..200).collect();
        driver.write(both + GRANULE - 100, &bytes).expect("mapped");
        assert_eq!(driver.read(view + GRANULE - 100, 100), Ok(bytes[..100].to_vec()));
        assert_eq!(driver.read(both + GRANULE - 100, 200), Ok(bytes.clone()));
        driver.d2d(both + GRANULE - 300, both + GRANULE - 100, 200).expect("mapped");
        assert_eq!(driver.read(view + GRANULE - 300, 200), Ok(bytes));
        let (mut base, mut size) = (0, 0);
        driver.range(&mut base, &mut size, both + GRANULE + 9).expect("mapped");
        assert_eq!((base, size), (both + GRANULE, GRANULE), "of one handle, not of the addresses");
        driver.unmap(both, 2 * GRANULE).expect("two mappings");
        assert_eq!(driver.read(both + GRANULE, 1), Err(INVALID_VALUE));
        assert_eq!(driver.read(view + GRANULE - 300, 1), Ok(vec![0]));
    });
}

#[test]
fn rights_are_kept_to() {
    isolated(&[], || {
        let driver = start();
        let handle = driver.create(GRANULE);
        let pointer = driver.reserve(GRANULE);
        driver.map(pointer, GRANULE, 0, handle, 0).expect("free addresses");
        assert_eq!(driver.read(pointer, 1), Err(INVALID_VALUE), "no rights yet");
        driver.grant(pointer, GRANULE, 0, 3).expect("a mapping");
        driver.write(pointer, &[8]).expect("writable");
        driver.grant(pointer, GRANULE, 0, 1).expect("a mapping");
        assert_eq!(driver.write(pointer, &[9]), Err(INVALID_VALUE));
        assert_eq!(driver.set(pointer, 9, 1), Err(INVALID_VALUE));
        assert_eq!(driver.read(pointer, 1), Ok(vec![8]));
        let rights = |device| {
            let mut flags = 99;
            driver.access_into(&mut flags, &Location { kind: 1, id: device }, pointer).map(|()| flags)
        };
        assert_eq!((rights(0), rights(1)), (Ok(1), Ok(0)));
        driver.use_device(1);
        assert_eq!(driver.read(pointer, 1), Err(INVALID_VALUE), "the other device has none");
        driver.grant(pointer, GRANULE, 1, 3).expect("a mapping");
        driver.write(pointer, &[7]).expect("now it has");
        driver.use_device(0);
        assert_eq!(driver.read(pointer, 1), Ok(vec![7]));
        driver.grant(pointer, GRANULE, 0, 0).expect("a mapping");
        assert_eq!(driver.read(pointer, 1), Err(INVALID_VALUE));
        assert_eq!(driver.grant(pointer, GRANULE, 0, 2), Err(INVALID_VALUE));
        assert_eq!(driver.grant(pointer, GRANULE / 2, 0, 3), Err(INVALID_VALUE));
    });
}

#[test]
fn sizes_and_properties_are_checked() {
    isolated(&[], || {
        let driver = start();
        let (mut handle, mut pointer, mut size) = (0, 0, 0);
        driver.granularity(&mut size, &prop(), 0).expect("known properties");
        assert_eq!(size, GRANULE);
        for len in [0, 1, GRANULE + 4096] {
            assert_eq!(driver.create_into(&mut handle, len, &prop(), 0), Err(INVALID_VALUE), "{len}");
            assert_eq!(driver.reserve_into(&mut pointer, len, 0, 0, 0), Err(INVALID_VALUE), "{len}");
        }
        let elsewhere = Prop { location: Location { kind: 1, id: 2 }, ..prop() };
        assert!(driver.create_into(&mut handle, GRANULE, &elsewhere, 0).is_err());
        let of_host = Prop { location: Location { kind: 2, id: 0 }, ..prop() };
        assert!(driver.create_into(&mut handle, GRANULE, &of_host, 0).is_err());
        let (handle, pointer) = (driver.create(GRANULE), driver.reserve(4 * GRANULE));
        assert_eq!(driver.map(pointer, GRANULE, GRANULE, handle, 0), Err(INVALID_VALUE), "an offset");
        assert_eq!(driver.map(pointer, 2 * GRANULE, 0, handle, 0), Err(INVALID_VALUE), "more than it has");
        assert_eq!(
            driver.map(pointer + 4 * GRANULE, GRANULE, 0, handle, 0),
            Err(INVALID_VALUE),
            "not reserved"
        );
        assert_eq!(driver.map(pointer + 4096, GRANULE, 0, handle, 0), Err(INVALID_VALUE), "not aligned");
        assert_eq!(driver.unmap(pointer, GRANULE), Err(INVALID_VALUE), "nothing there");
        let large = driver.create(2 * GRANULE);
        driver.map(pointer, 2 * GRANULE, 0, large, 0).expect("free addresses");
        assert_eq!(driver.unmap(pointer, GRANULE), Err(INVALID_VALUE), "half of a mapping");
        assert_eq!(driver.unmap(pointer + GRANULE, GRANULE), Err(INVALID_VALUE), "the other half");
        let mut found = Prop::default();
        driver.prop_into(&mut found, large).expect("a handle");
        assert_eq!(found, prop());
    });
}
