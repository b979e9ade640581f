//! Memory that other processes and NICs have. Not how it is mapped (`virtual_memory`). Invariant: a second process is a real
//! one, and gets its descriptors over a Unix socket.

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::driver::{GRANULE, INVALID_VALUE, NOT_SUPPORTED, Nic, Prop, owned, prop, start};
use crate::process::{again, isolated, role};

const SOCKET: &str = "HETMEM_STANDIN_SOCKET";

fn send_descriptor(socket: &UnixStream, descriptor: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(socket, &[IoSlice::new(b"d")], &mut ancillary, SendFlags::empty()).expect("a descriptor is sent");
}

fn receive_descriptor(socket: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .expect("a descriptor is received");
    let mut messages = ancillary.drain();
    let Some(RecvAncillaryMessage::ScmRights(mut descriptors)) = messages.next() else {
        panic!("no descriptor came");
    };
    descriptors.next().expect("one descriptor")
}

/// Starts this test once more, connected. `talk` has to be a closure in the test's own closure.
fn with_second<F: FnOnce(UnixStream)>(talk: F) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut command = again(std::any::type_name::<F>(), Some("second"), &[]);
    let mut second = command.env(SOCKET, &path).spawn().expect("this program starts");
    talk(listener.accept().expect("the second process connects").0);
    assert!(second.wait().expect("it ends").success());
}

fn connect() -> UnixStream {
    UnixStream::connect(std::env::var_os(SOCKET).expect("the first process says where"))
        .expect("a connection")
}

fn tell(mut socket: &UnixStream) {
    socket.write_all(b"!").expect("the other process reads");
}

fn hear(mut socket: &UnixStream) {
    socket.read_exact(&mut [0]).expect("the other process writes");
}

fn second_process_imports() {
    let (driver, socket) = (start(), connect());
    let descriptor = receive_descriptor(&socket);
    let handle = driver.import(descriptor.as_raw_fd()).expect("an exported handle");
    drop(descriptor);
    let mut found = Prop::default();
    driver.prop_into(&mut found, handle).expect("a handle");
    assert_eq!(found, prop());
    let pointer = driver.reserve(GRANULE);
    driver.map(pointer, GRANULE, 0, handle, 0).expect("free addresses");
    driver.release(handle).expect("a handle");
    driver.grant(pointer, GRANULE, 0, 1).expect("read-only");
    assert_eq!(driver.free_bytes(), 1 << 30, "an import costs nothing");
    assert_eq!(driver.read(pointer + 12_345, 4), Ok(vec![1, 2, 3, 4]));
    assert_eq!(driver.write(pointer, &[1]), Err(INVALID_VALUE));
    driver.grant(pointer, GRANULE, 0, 3).expect("a mapping");
    driver.write(pointer + GRANULE - 3, &[7, 8, 9]).expect("writable");
    tell(&socket);
    // The first process has given everything back; the memory is still there.
    hear(&socket);
    assert_eq!(driver.read(pointer + 12_345, 4), Ok(vec![1, 2, 3, 4]));
    driver.unmap(pointer, GRANULE).expect("a mapping");
    driver.unreserve(pointer, GRANULE).expect("a reservation");
    assert_eq!(driver.live(), 1, "the context alone");
}

#[test]
fn two_processes_see_each_others_bytes() {
    let body = || {
        if role().is_some() {
            second_process_imports();
            return;
        }
        let driver = start();
        let handle = driver.create(GRANULE);
        let pointer = driver.mapped(handle, GRANULE);
        driver.write(pointer + 12_345, &[1, 2, 3, 4]).expect("mapped");
        let descriptor = owned(driver.export(handle));
        assert!(fcntl_getfd(&descriptor).expect("open").contains(FdFlags::CLOEXEC));
        with_second(|socket| {
            send_descriptor(&socket, &descriptor);
            drop(descriptor);
            hear(&socket);
            assert_eq!(driver.read(pointer + GRANULE - 3, 3), Ok(vec![7, 8, 9]));
            driver.unmap(pointer, GRANULE).expect("a mapping");
            driver.release(handle).expect("a handle");
            assert_eq!(driver.free_bytes(), 1 << 30);
            tell(&socket);
        });
    };
    isolated(&[], body);
}

#[test]
fn only_handles_for_descriptors_travel() {
    isolated(&[], || {
        let driver = start();
        let (mut handle, mut descriptor) = (0, -1);
        driver.create_into(&mut handle, GRANULE, &Prop { handle_types: 0, ..prop() }, 0).expect("a handle");
        assert_eq!(driver.export_into(&mut descriptor, handle, 1, 0), Err(INVALID_VALUE));
        let pointer = driver.mapped(handle, GRANULE);
        let dma_buf = owned(driver.dma_buf(pointer, GRANULE).expect("memory for NICs"));
        let exported = driver.create(GRANULE);
        let nic_only = driver.mapped(exported, GRANULE);
        let other = owned(driver.dma_buf(nic_only, GRANULE).expect("memory for NICs"));
        let file = std::fs::File::open("/dev/null").expect("a file");
        let memory =
            rustix::fs::memfd_create("other", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
        for wrong in [dma_buf.as_raw_fd(), other.as_raw_fd(), file.as_raw_fd(), memory.as_raw_fd(), 9_999, -1]
        {
            assert_eq!(driver.import(wrong), Err(INVALID_VALUE), "{wrong}");
        }
        let right = owned(driver.export(exported));
        assert!(driver.import(right.as_raw_fd()).is_ok());
    });
}

#[test]
fn nics_and_devices_see_each_others_bytes() {
    isolated(&[], || {
        let driver = start();
        let handle = driver.create(2 * GRANULE);
        let pointer = driver.mapped(handle, 2 * GRANULE);
        driver.write(pointer + 4096, &[1, 2, 3]).expect("mapped");
        let descriptor = owned(driver.dma_buf(pointer, 2 * GRANULE).expect("memory for NICs"));
        let nic = Nic::map(&descriptor, 2 * GRANULE);
        assert_eq!(nic.read(4096, 3), [1, 2, 3]);
        nic.write(2 * GRANULE - 2, &[4, 5]);
        assert_eq!(driver.read(pointer + 2 * GRANULE - 2, 2), Ok(vec![4, 5]));
        let plain = driver.alloc(8192);
        let descriptor = owned(driver.dma_buf(plain, 8192).expect("plain memory is for NICs too"));
        Nic::map(&descriptor, 8192).write(8191, &[6]);
        assert_eq!(driver.read(plain + 8191, 1), Ok(vec![6]));
        assert_eq!(driver.dma_buf(pointer, 100), Err(INVALID_VALUE), "not whole pages");
        assert_eq!(driver.dma_buf(pointer + 10, 4096), Err(INVALID_VALUE), "not at a page");
        assert_eq!(driver.dma_buf(pointer, 3 * GRANULE), Err(INVALID_VALUE), "more than is mapped");
        let mut other = 0;
        driver.create_into(&mut other, GRANULE, &Prop { rdma: 0, ..prop() }, 0).expect("a handle");
        let not_for_nics = driver.mapped(other, GRANULE);
        assert_eq!(driver.dma_buf(not_for_nics, GRANULE), Err(NOT_SUPPORTED));
    });
}

#[test]
fn late_writes_are_seen_after_a_flush_and_not_before() {
    isolated(&[("HETMEM_STANDIN_STALE", "1")], || {
        let driver = start();
        assert_eq!((driver.attribute(118), driver.attribute(117)), (0, 1));
        let (handle, stream) = (driver.create(GRANULE), driver.stream(1));
        let pointer = driver.mapped(handle, GRANULE);
        let descriptor = owned(driver.dma_buf(pointer, GRANULE).expect("memory for NICs"));
        let nic = Nic::map(&descriptor, GRANULE);
        driver.write(pointer + 10, &[1, 1, 1]).expect("mapped");
        assert_eq!(nic.read(10, 3), [1, 1, 1], "NICs see what devices write");
        nic.write(11, &[2]);
        nic.write(GRANULE - 1, &[3]);
        driver.set_async(pointer + 4096, 9, 1, stream).expect("mapped");
        driver.stream_synchronize(stream).expect("no error");
        driver.synchronize().expect("no error");
        assert_eq!(driver.read(pointer + 10, 3), Ok(vec![1, 1, 1]), "nothing but a flush");
        driver.flush(0, 100).expect("it can be flushed");
        assert_eq!(driver.read(pointer + 10, 3), Ok(vec![1, 2, 1]));
        assert_eq!(driver.read(pointer + GRANULE - 1, 1), Ok(vec![3]));
        assert_eq!(driver.read(pointer + 4096, 1), Ok(vec![9]));
        assert_eq!(driver.flush(1, 100), Err(INVALID_VALUE));
    });
}

fn second_process_reads_late() {
    let (driver, socket) = (start(), connect());
    let descriptor = receive_descriptor(&socket);
    let handle = driver.import(descriptor.as_raw_fd()).expect("an exported handle");
    let pointer = driver.mapped(handle, GRANULE);
    assert_eq!(driver.read(pointer, 2), Ok(vec![5, 0]), "written by the device, and not by the NIC");
    tell(&socket);
    hear(&socket);
    assert_eq!(driver.read(pointer, 2), Ok(vec![5, 6]), "the first process has flushed");
}

#[test]
fn a_flush_is_for_all_processes() {
    let body = || {
        if role().is_some() {
            second_process_reads_late();
            return;
        }
        let driver = start();
        let handle = driver.create(GRANULE);
        let pointer = driver.mapped(handle, GRANULE);
        driver.write(pointer, &[5]).expect("mapped");
        let nic = Nic::map(&owned(driver.dma_buf(pointer, GRANULE).expect("memory for NICs")), GRANULE);
        nic.write(1, &[6]);
        with_second(|socket| {
            send_descriptor(&socket, &owned(driver.export(handle)));
            hear(&socket);
            driver.flush(0, 200).expect("it can be flushed");
            tell(&socket);
        });
    };
    isolated(&[("HETMEM_STANDIN_STALE", "1")], body);
}
