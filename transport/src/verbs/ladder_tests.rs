//! What an adapter is asked to register, on a stand-in for the plugin that writes it down and refuses what a test wants it
//! to. Not a test of any adapter: none was ever asked.
//!
//! Holds unsafe code: functions of the plugin's table, and memory that says it is a device's.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;
use std::sync::Arc;

use hetmem_core::{ErrorKind, RemoteKey, SegmentId};
use rustix::io::Errno;

use super::abi;
use super::adapters::{Adapter, Segment};
use super::plugin::{Context, Device, Plugin};
use super::wire::Described;
use crate::fabric::Access;
use crate::memory::{DeviceMemory, RegionMemory};

/// Where work would name the memory. No test touches it.
const ADDRESS: usize = 0x7f00_0000_0000;
const CHUNK: u64 = 1 << 20;

/// What a test's thread has asked for, and what it is refused.
#[derive(Default)]
struct Book {
    asked: Vec<abi::Memory>,
    open: usize,
    /// By kind: how many are taken before the others are refused, and with what.
    refused: BTreeMap<u32, (usize, Errno)>,
}

thread_local! {
    static BOOK: RefCell<Book> = RefCell::default();
}

unsafe extern "C" fn region_open(
    _: *mut abi::Device,
    memory: *const abi::Memory,
    out: *mut *mut abi::Region,
    keys: *mut abi::Keys,
    failure: *mut abi::Failure,
) -> i32 {
    BOOK.with_borrow_mut(|book| {
        // SAFETY: the host gives a description and room for all.
        unsafe {
            let (memory, failure) = (*memory, &mut *failure);
            failure.call[..10].copy_from_slice(b"ibv_reg_mr");
            if memory.kind == abi::MEMORY_HOST {
                // The adapter's own buffers.
                (*keys, *out) = (abi::Keys { local: 1, remote: 2 }, ptr::without_provenance_mut(8));
                return 0;
            }
            book.asked.push(memory);
            let before = book.asked.iter().filter(|asked| asked.kind == memory.kind).count() - 1;
            if let Some((_, errno)) = book.refused.get(&memory.kind).filter(|(most, _)| before >= *most) {
                return errno.raw_os_error();
            }
            book.open += 1;
            let number = u32::try_from(book.asked.len()).expect("few");
            *keys = abi::Keys { local: number, remote: 100 + number };
            *out = ptr::without_provenance_mut(16);
        }
        0
    })
}

unsafe extern "C" fn region_close(region: *mut abi::Region) {
    if region.addr() == 16 {
        BOOK.with_borrow_mut(|book| book.open -= 1);
    }
}

unsafe extern "C" fn limits(_: *const abi::Device, out: *mut abi::DeviceLimits, _: *mut abi::Failure) -> i32 {
    let limits = abi::DeviceLimits {
        name: [0; 64],
        firmware: [0; 64],
        region_bytes_max: CHUNK,
        vendor: 0,
        part: 0,
        transport: abi::TRANSPORT_INFINIBAND,
        pieces_max: 4,
        read_pieces_max: 1,
        work_max: 16,
        completions_max: 16,
        buffers_max: 4,
        reads_out_max: 1,
        reads_in_max: 1,
    };
    // SAFETY: the host gives room for them.
    unsafe { *out = limits };
    0
}

/// Functions that do nothing and succeed, or hand out a thing that is never looked at.
mod nothing {
    use super::super::abi::{
        Address, Completion, Connection, ConnectionEvent, Context, Device, DeviceLimits, Failure, Handshake,
        Piece, Pool, Queue, QueuePair, Work,
    };

    fn thing<T>(out: *mut *mut T) -> i32 {
        // SAFETY: the host gives room for the pointer.
        unsafe { *out = std::ptr::without_provenance_mut(64) };
        0
    }

    pub(super) unsafe extern "C" fn context_open(out: *mut *mut Context, _: *mut Failure) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn context_close(_: *mut Context) {}
    pub(super) unsafe extern "C" fn context_descriptor(_: *const Context) -> i32 {
        -1
    }
    pub(super) unsafe extern "C" fn context_event(
        _: *mut Context,
        _: *mut ConnectionEvent,
        _: *mut Failure,
    ) -> i32 {
        1
    }
    pub(super) unsafe extern "C" fn devices(_: *mut DeviceLimits, _: u32) -> u32 {
        0
    }
    pub(super) unsafe extern "C" fn listen(
        _: *mut Context,
        _: *mut Address,
        _: u64,
        out: *mut *mut Connection,
        _: *mut Failure,
    ) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn resolve(
        _: *mut Context,
        _: *const Address,
        _: *const Address,
        _: u32,
        _: u64,
        out: *mut *mut Connection,
        _: *mut Failure,
    ) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn devices_open(_: *mut Context, _: *mut *mut Device, _: u32) -> u32 {
        0
    }
    pub(super) unsafe extern "C" fn device_of(
        _: *mut Context,
        _: *mut Connection,
        out: *mut *mut Device,
        _: *mut Failure,
    ) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn connection_name(_: *mut Connection, _: u64) {}
    pub(super) unsafe extern "C" fn peer_of(_: *const Connection, _: *mut Address) {}
    pub(super) unsafe extern "C" fn queue_pair_open(
        _: *mut Device,
        _: *mut Connection,
        _: *mut QueuePair,
        _: *mut Failure,
    ) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn shake(_: *mut Connection, _: *const Handshake, _: *mut Failure) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn reject(_: *mut Connection, _: *const u8, _: u32) {}
    pub(super) unsafe extern "C" fn connection(_: *mut Connection) {}
    pub(super) unsafe extern "C" fn post(
        _: *mut Connection,
        _: *const Work,
        _: u32,
        _: *mut u32,
        _: *mut Failure,
    ) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn device_close(_: *mut Context, _: *mut Device) {}
    pub(super) unsafe extern "C" fn queue_open(
        _: *mut Device,
        _: u32,
        out: *mut *mut Queue,
        _: *mut Failure,
    ) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn queue_descriptor(_: *const Queue) -> i32 {
        -1
    }
    pub(super) unsafe extern "C" fn queue_arm(_: *mut Queue, _: *mut Failure) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn queue_poll(_: *mut Queue, _: *mut Completion, _: u32) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn queue_close(_: *mut Queue) {}
    pub(super) unsafe extern "C" fn pool_open(
        _: *mut Device,
        _: u32,
        out: *mut *mut Pool,
        _: *mut Failure,
    ) -> i32 {
        thing(out)
    }
    pub(super) unsafe extern "C" fn pool_post(_: *mut Pool, _: u64, _: *const Piece, _: *mut Failure) -> i32 {
        0
    }
    pub(super) unsafe extern "C" fn pool_close(_: *mut Pool) {}
    pub(super) unsafe extern "C" fn device_address(_: *const Device, _: *mut Address) {}
}

static STAND_IN: abi::Table = abi::Table {
    abi_version: abi::ABI_VERSION,
    size_bytes: 0,
    context_open: nothing::context_open,
    context_close: nothing::context_close,
    context_descriptor: nothing::context_descriptor,
    context_event: nothing::context_event,
    devices: nothing::devices,
    listen: nothing::listen,
    resolve: nothing::resolve,
    devices_open: nothing::devices_open,
    device_of: nothing::device_of,
    device_address: nothing::device_address,
    connection_name: nothing::connection_name,
    peer_of: nothing::peer_of,
    queue_pair_open: nothing::queue_pair_open,
    connect: nothing::shake,
    accept: nothing::shake,
    reject: nothing::reject,
    disconnect: nothing::connection,
    post: nothing::post,
    connection_close: nothing::connection,
    device_limits: limits,
    device_close: nothing::device_close,
    queue_open: nothing::queue_open,
    queue_descriptor: nothing::queue_descriptor,
    queue_arm: nothing::queue_arm,
    queue_poll: nothing::queue_poll,
    queue_close: nothing::queue_close,
    pool_open: nothing::pool_open,
    pool_post: nothing::pool_post,
    pool_close: nothing::pool_close,
    region_open,
    region_close,
    _reserved: ptr::null(),
};

/// Says that it is a device's.
struct Foreign {
    len_bytes: u64,
    dma_buf: Option<(std::fs::File, u64)>,
}

// SAFETY: no adapter and no processor is ever led to it.
unsafe impl RegionMemory for Foreign {
    fn base(&self) -> *mut u8 {
        ptr::without_provenance_mut(ADDRESS)
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn device(&self) -> Option<DeviceMemory<'_>> {
        let dma_buf = self.dma_buf.as_ref().map(|(file, offset)| (file.as_fd(), *offset));
        Some(DeviceMemory { number: 0, dma_buf, staging: None })
    }
}

const SEGMENT: SegmentId = SegmentId(3);

fn adapter() -> Adapter {
    let context = Context::open(Plugin::stand_in(&STAND_IN)).expect("a stand-in");
    let device = Device::own(&context, ptr::without_provenance_mut(64));
    Adapter::open(device, &BTreeMap::new(), 1, (false, Vec::new())).expect("a stand-in")
}

fn foreign(len_bytes: u64, with_dma_buf: bool) -> Segment {
    let file = || std::fs::File::open("/dev/null").expect("a descriptor");
    let dma_buf = with_dma_buf.then(|| (file(), 4096));
    Segment {
        key: RemoteKey(9),
        memory: Arc::new(Foreign { len_bytes, dma_buf }),
        access: Access::RemoteRead,
    }
}

fn refuse(kind: u32, after: usize, errno: Errno) {
    BOOK.with_borrow_mut(|book| book.refused.insert(kind, (after, errno)));
}

fn asked() -> Vec<(u32, u64, u64, u64)> {
    BOOK.with_borrow(|book| {
        let of = |memory: &abi::Memory| {
            (memory.kind, memory.offset, memory.address - ADDRESS as u64, memory.len_bytes)
        };
        book.asked.iter().map(of).collect()
    })
}

#[test]
fn a_dma_buf_is_registered_by_its_descriptor_offset_and_address() {
    let (mut adapter, segment) = (adapter(), foreign(CHUNK + 4096, true));
    let descriptor = segment.memory.device().and_then(|it| it.dma_buf).expect("one").0.as_raw_fd();
    adapter.register(SEGMENT, &segment).expect("the first way");
    let dma_buf = abi::MEMORY_DMA_BUF;
    assert_eq!(asked(), [(dma_buf, 4096, 0, CHUNK), (dma_buf, 4096 + CHUNK, CHUNK, 4096)]);
    let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ;
    BOOK.with_borrow(|book| {
        assert!(book.asked.iter().all(|it| it.descriptor == descriptor && it.access == access));
    });
    let Described::Readable { chunks, .. } = adapter.describe(SEGMENT, &segment) else { panic!("readable") };
    let places: Vec<_> =
        chunks.iter().map(|it| (it.address - ADDRESS as u64, it.len_bytes, it.key)).collect();
    assert_eq!(places, [(0, CHUNK, 101), (CHUNK, 4096, 102)]);
    adapter.deregister(SEGMENT);
    assert_eq!(BOOK.with_borrow(|book| book.open), 0);
}

#[test]
fn where_there_is_no_dma_buf_the_address_is_registered() {
    let mut adapter = adapter();
    adapter.register(SEGMENT, &foreign(4096, false)).expect("the second way");
    assert_eq!(asked(), [(abi::MEMORY_PEER, 0, 0, 4096)]);
    refuse(abi::MEMORY_DMA_BUF, 0, Errno::OPNOTSUPP);
    adapter.register(SegmentId(4), &foreign(4096, true)).expect("the second way");
    let kinds: Vec<u32> = asked().into_iter().map(|(kind, ..)| kind).collect();
    assert_eq!(kinds, [abi::MEMORY_PEER, abi::MEMORY_DMA_BUF, abi::MEMORY_PEER]);
}

#[test]
fn what_is_refused_half_way_leaves_nothing_registered() {
    let mut adapter = adapter();
    refuse(abi::MEMORY_DMA_BUF, 2, Errno::NOMEM);
    refuse(abi::MEMORY_PEER, 1, Errno::FAULT);
    let why = adapter.register(SEGMENT, &foreign(3 * CHUNK, true)).expect_err("no way");
    assert_eq!((asked().len(), BOOK.with_borrow(|book| book.open)), (5, 0));
    assert!(adapter.stretch(SEGMENT, ADDRESS as u64, 0, 1).is_none());
    assert_eq!(why.kind(), ErrorKind::Unavailable);
}

#[test]
fn every_way_that_is_none_is_explained() {
    let mut adapter = adapter();
    refuse(abi::MEMORY_DMA_BUF, 0, Errno::OPNOTSUPP);
    refuse(abi::MEMORY_PEER, 0, Errno::FAULT);
    let why = adapter.register(SEGMENT, &foreign(4096, true)).expect_err("no way").to_string();
    for part in ["takes no dma-buf", "load nvidia-peermem", "staged through host memory"] {
        assert!(why.contains(part), "{why}");
    }
    let why = adapter.register(SEGMENT, &foreign(4096, false)).expect_err("no way").to_string();
    assert!(why.contains("its driver exports none"), "{why}");
}
