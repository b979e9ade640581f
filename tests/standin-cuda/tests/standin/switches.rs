//! The environment variables, the hooks for tests, and what programs ask before they do anything. Not memory. Invariant: each
//! switch is seen to change what the library does without it.

use std::os::unix::process::ExitStatusExt as _;

use crate::driver::{
    GRANULE, Given, INVALID_HANDLE, INVALID_VALUE, NO_DEVICE, NOT_FOUND, NOT_INITIALIZED, NOT_SUPPORTED,
    OUT_OF_MEMORY, PEER_UNSUPPORTED, Prop, c, load, open, open_by_name, prop, start,
};
use crate::process::{again, isolated, role};

#[test]
fn nothing_works_before_init() {
    isolated(&[], || {
        let (driver, mut count) = (open(), 0);
        assert_eq!(driver.device_count(&mut count), Err(NOT_INITIALIZED));
        assert_eq!(driver.name_of_code(3), Ok("CUDA_ERROR_NOT_INITIALIZED".to_owned()));
        assert_eq!(driver.name_of_code(12_345), Err(INVALID_VALUE));
        assert_eq!(driver.init(1), Err(INVALID_VALUE));
        driver.init(0).expect("cuInit");
        assert_eq!((driver.device_count(&mut count), count), (Ok(()), 2));
    });
}

#[test]
fn opened_by_its_path_it_is_found_by_name() {
    isolated(&[], || {
        open().init(0).expect("cuInit");
        let by_name = open_by_name().expect("the library that is open already");
        assert_eq!(by_name.calls("cuInit"), 1, "the same library, not another one");
    });
}

#[test]
fn devices_say_that_they_are_stand_ins_and_differ() {
    isolated(&[("HETMEM_STANDIN_DEVICES", "3")], || {
        let driver = start();
        let mut uuids = std::collections::HashSet::new();
        for device in 0..3 {
            let (mut name, mut uuid) = ([0; 64], [0; 16]);
            driver.name_into(&mut name, 64, device).expect("a device");
            assert!(name.starts_with(format!("hetmem stand-in GPU {device}\0").as_bytes()));
            driver.uuid(&mut uuid, device).expect("a device");
            assert!(uuids.insert(uuid));
        }
        assert!(driver.uuid(&mut [0; 16], 3).is_err());
        let mut value = 0;
        assert_eq!(driver.attribute_into(&mut value, 9999, 0), Err(INVALID_VALUE));
        assert_eq!(
            [75, 102, 103, 110, 116, 117, 118, 124].map(|it| driver.attribute(it)),
            [9, 1, 1, 1, 1, 1, 100, 1]
        );
    });
}

#[test]
fn without_a_device_init_fails() {
    isolated(&[("HETMEM_STANDIN_DEVICES", "0")], || assert_eq!(open().init(0), Err(NO_DEVICE)));
}

#[test]
fn a_wrong_switch_fails_init() {
    isolated(&[("HETMEM_STANDIN_WITHOUT", "gravity")], || assert_eq!(open().init(0), Err(INVALID_VALUE)));
}

#[test]
fn without_virtual_memory() {
    isolated(&[("HETMEM_STANDIN_WITHOUT", "vmm")], || {
        let (driver, mut handle) = (start(), 0);
        assert_eq!([102, 103, 110].map(|it| driver.attribute(it)), [0; 3]);
        assert_eq!(driver.create_into(&mut handle, GRANULE, &prop(), 0), Err(NOT_SUPPORTED));
        assert_eq!(driver.reserve_into(&mut 0, GRANULE, 0, 0, 0), Err(NOT_SUPPORTED));
    });
}

#[test]
fn without_descriptors_nics_and_rights() {
    isolated(&[("HETMEM_STANDIN_WITHOUT", "posix-fd,rdma-vmm,read-only,peer,batch")], || {
        let (driver, mut handle, mut can) = (start(), 0, 9);
        assert_eq!([102, 103, 110, 116].map(|it| driver.attribute(it)), [1, 0, 0, 1]);
        let create =
            |handle: &mut u64, prop: Prop| -> Given { driver.create_into(handle, GRANULE, &prop, 0) };
        assert_eq!(create(&mut handle, Prop { rdma: 0, ..prop() }), Err(NOT_SUPPORTED));
        assert_eq!(create(&mut handle, Prop { handle_types: 0, ..prop() }), Err(NOT_SUPPORTED));
        create(&mut handle, Prop { handle_types: 0, rdma: 0, ..prop() }).expect("a plain handle");
        let pointer = driver.mapped(handle, GRANULE);
        assert_eq!(driver.grant(pointer, GRANULE, 0, 1), Err(NOT_SUPPORTED));
        assert_eq!(driver.grant(pointer, GRANULE, 1, 3), Err(PEER_UNSUPPORTED));
        driver.can_access_peer(&mut can, 0, 1).expect("two devices");
        assert_eq!(can, 0);
        let second = driver.use_device(1);
        driver.use_device(0);
        assert_eq!(driver.enable_peer(second, 0), Err(PEER_UNSUPPORTED));
        let (none, mut failed) = (std::ptr::null(), 0);
        let batch =
            driver.batch(none, none, none, 1, std::ptr::null(), none, 1, &mut failed, driver.stream(1));
        assert_eq!((batch, failed), (Err(NOT_SUPPORTED), usize::MAX));
        assert!(driver.dma_buf(driver.alloc(4096), 4096).is_ok(), "plain memory is for NICs");
    });
}

#[test]
fn without_rdma_and_dma_buf() {
    isolated(&[("HETMEM_STANDIN_WITHOUT", "rdma")], || {
        let (driver, mut handle) = (start(), 0);
        assert_eq!([110, 116, 117, 118, 124].map(|it| driver.attribute(it)), [0, 0, 0, 0, 1]);
        assert_eq!(driver.create_into(&mut handle, GRANULE, &prop(), 0), Err(NOT_SUPPORTED));
        assert_eq!(driver.dma_buf(driver.alloc(4096), 4096), Err(NOT_SUPPORTED));
        assert_eq!(driver.flush(0, 100), Err(NOT_SUPPORTED));
    });
}

#[test]
fn without_dma_buf() {
    isolated(&[("HETMEM_STANDIN_WITHOUT", "dma-buf")], || {
        let driver = start();
        assert_eq!([110, 116, 124].map(|it| driver.attribute(it)), [1, 1, 0]);
        let handle = driver.create(GRANULE);
        assert_eq!(driver.dma_buf(driver.mapped(handle, GRANULE), GRANULE), Err(NOT_SUPPORTED));
    });
}

#[test]
fn calls_fail_when_they_are_told_to() {
    let switch = "cuMemCreate=OUT_OF_MEMORY@2,cuStreamCreate=999";
    isolated(&[("HETMEM_STANDIN_FAIL", switch)], || {
        let (driver, mut handle) = (start(), 0);
        driver.create(GRANULE);
        let before = (driver.live(), driver.free_bytes());
        assert_eq!(driver.create_into(&mut handle, GRANULE, &prop(), 0), Err(OUT_OF_MEMORY));
        assert_eq!((driver.live(), driver.free_bytes()), before, "it did nothing");
        driver.create(GRANULE);
        for _ in 0..2 {
            assert_eq!(driver.stream_into(&mut 0, 0), Err(999));
        }
        assert_eq!(
            (driver.calls("cuMemCreate"), driver.calls("cuStreamCreate"), driver.calls("cuX")),
            (3, 2, 0)
        );
    });
}

#[test]
fn calls_are_written_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    isolated(&[("HETMEM_STANDIN_LOG", path.to_str().expect("a path of text"))], || {
        let driver = start();
        driver.alloc(4096);
        assert_eq!(driver.free(12), Err(INVALID_VALUE));
        let path = std::env::var("HETMEM_STANDIN_LOG").expect("set by the parent");
        let log = std::fs::read_to_string(path).expect("a log");
        let lines: Vec<&str> = log.lines().collect();
        let own = std::process::id();
        assert_eq!(lines[0], format!("{own} cuInit flags=0 CUDA_SUCCESS"));
        assert!(
            lines
                .iter()
                .any(|line| line.contains(" cuMemAlloc_v2 pointer=0x") && line.contains(" len=4096 "))
        );
        assert_eq!(lines.last(), Some(&&*format!("{own} cuMemFree_v2 pointer=0xc CUDA_ERROR_INVALID_VALUE")));
    });
}

#[test]
fn functions_are_looked_up_and_without_a_twin_not_run() {
    isolated(&[], || {
        let (driver, mut module, mut function) = (start(), 0, 0);
        assert!(driver.load_module(&mut module, &c("no code")).is_err());
        let text = ".version 9.0\n.target sm_80\n.visible .entry gather(.param .u64 a)\n{ ret; }\n";
        driver.load_module(&mut module, &c(text)).expect("PTX");
        assert_eq!(driver.function_into(&mut function, module, &c("gathe")), Err(NOT_FOUND));
        driver.function_into(&mut function, module, &c("gather")).expect("it is there");
        assert_eq!(driver.launch(function, 1, 1, 1, 32, 1, 1, 0, 0, 0, 0), Err(NOT_SUPPORTED));
        driver.unload_module(module).expect("a module");
        assert_eq!(driver.unload_module(module), Err(INVALID_HANDLE));
    });
}

#[test]
fn a_device_pointer_faults_on_the_cpu() {
    isolated(&[], || {
        if role().is_some() {
            let driver = start();
            let pointer = driver.alloc(4096);
            driver.write(pointer, &[1]).expect("it is good for copies");
            load(pointer);
            return;
        }
        let name = concat!(module_path!(), "::a_device_pointer_faults_on_the_cpu");
        let status = again(name, Some("loads"), &[]).output().expect("this program starts").status;
        assert_eq!(status.signal(), Some(11), "{status}");
    });
}
