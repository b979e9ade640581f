//! Completion queues with their channels, and pools of receive buffers. Not what completions mean. Invariant: events of a
//! channel are counted, and acknowledged before its queue is closed, which would wait for ever otherwise.
//!
//! Holds unsafe code: libibverbs' calls, on things that the host has opened and not closed.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use hetmem_transport::verbs_abi::{
    Completion, DONE_RECEIVED, DONE_WORK, DONE_WRITTEN, Device, Failure, Piece, Pool, Queue,
};
use rdma_sys::{
    ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq, ibv_create_srq,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_destroy_srq, ibv_get_cq_event, ibv_poll_cq,
    ibv_post_srq_recv, ibv_recv_wr, ibv_req_notify_cq, ibv_sge, ibv_srq, ibv_srq_attr, ibv_srq_init_attr,
    ibv_wc, ibv_wc_opcode,
};
use rustix::io::Errno;

use crate::device::Dev;
use crate::failure::{check, failed, last_errno};

/// Completions taken by one call.
const POLL_MAX: usize = 32;

/// Behind the host's `Queue`.
pub(crate) struct Cq {
    channel: *mut ibv_comp_channel,
    pub(crate) queue: *mut ibv_cq,
}

pub(crate) unsafe extern "C" fn open(
    device: *mut Device,
    entries: u32,
    out: *mut *mut Queue,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    let device = unsafe { &*device.cast::<Dev>() };
    // SAFETY: the device is open.
    let channel = unsafe { ibv_create_comp_channel(device.verbs) };
    if channel.is_null() {
        return failed("ibv_create_comp_channel", last_errno(), failure);
    }
    // SAFETY: the channel was just made, and its descriptor lives as long.
    let descriptor = unsafe { BorrowedFd::borrow_raw((*channel).fd) };
    let mut errno = 0;
    let mut call = "ioctl(FIONBIO)";
    let mut queue = std::ptr::null_mut();
    if let Err(error) = rustix::io::ioctl_fionbio(descriptor, true) {
        errno = error.raw_os_error();
    } else {
        call = "ibv_create_cq";
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: device and channel are open.
        queue = unsafe { ibv_create_cq(device.verbs, entries, std::ptr::null_mut(), channel, 0) };
        if queue.is_null() {
            errno = last_errno();
        }
    }
    if queue.is_null() {
        // SAFETY: it was just made, and nothing uses it.
        unsafe { ibv_destroy_comp_channel(channel) };
        return failed(call, errno, failure);
    }
    let queue = Box::new(Cq { channel, queue });
    // SAFETY: the host gives room for the pointer.
    unsafe { *out = Box::into_raw(queue).cast() };
    0
}

pub(crate) unsafe extern "C" fn descriptor(queue: *const Queue) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    unsafe { (*(*queue.cast::<Cq>()).channel).fd }
}

pub(crate) unsafe extern "C" fn arm(queue: *mut Queue, failure: *mut Failure) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    let queue = unsafe { &*queue.cast::<Cq>() };
    let mut events = 0;
    loop {
        let (mut of, mut about) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the channel is open and does not block.
        if unsafe { ibv_get_cq_event(queue.channel, &raw mut of, &raw mut about) } != 0 {
            break;
        }
        events += 1;
    }
    let errno = last_errno();
    if events > 0 {
        // SAFETY: so many events of this queue, the only one of its channel, were taken.
        unsafe { ibv_ack_cq_events(queue.queue, events) };
    }
    if errno != Errno::AGAIN.raw_os_error() && errno != Errno::INTR.raw_os_error() {
        return failed("ibv_get_cq_event", errno, failure);
    }
    // SAFETY: the queue is open.
    match check("ibv_req_notify_cq", unsafe { ibv_req_notify_cq(queue.queue, 0) }, failure) {
        Ok(()) => 0,
        Err(errno) => errno,
    }
}

pub(crate) unsafe extern "C" fn poll(queue: *mut Queue, out: *mut Completion, room: u32) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    let queue = unsafe { &*queue.cast::<Cq>() };
    // Not zeroed: mostly there is nothing, and that is looked for often.
    let mut taken = MaybeUninit::<[ibv_wc; POLL_MAX]>::uninit();
    let first = taken.as_mut_ptr().cast::<ibv_wc>();
    let room = i32::try_from(POLL_MAX.min(room as usize)).unwrap_or(0);
    // SAFETY: the queue is open, and there is room for so many.
    let count = unsafe { ibv_poll_cq(queue.queue, room, first) };
    // SAFETY: so many were written.
    let done = unsafe { std::slice::from_raw_parts(first, usize::try_from(count).unwrap_or(0)) };
    for (at, done) in done.iter().enumerate() {
        let kind = match done.opcode {
            ibv_wc_opcode::IBV_WC_RECV => DONE_RECEIVED,
            ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => DONE_WRITTEN,
            _ => DONE_WORK,
        };
        // SAFETY: both fields of the union are numbers of this size.
        let immediate = unsafe { done.imm_data_invalidated_rkey_union.imm_data };
        let completion = Completion {
            id: done.wr_id,
            status: done.status,
            vendor: done.vendor_err,
            kind,
            len_bytes: done.byte_len,
            immediate: u32::from_be(immediate),
            queue_pair: done.qp_num,
        };
        // SAFETY: the host gives room for `room` of them.
        unsafe { *out.add(at) = completion };
    }
    count
}

pub(crate) unsafe extern "C" fn close(queue: *mut Queue) {
    // SAFETY: the host closes it once, after the connections that use it.
    let queue = unsafe { Box::from_raw(queue.cast::<Cq>()) };
    // SAFETY: as above; all of its events were acknowledged when they were taken.
    unsafe {
        ibv_destroy_cq(queue.queue);
        ibv_destroy_comp_channel(queue.channel);
    }
}

pub(crate) unsafe extern "C" fn pool_open(
    device: *mut Device,
    buffers: u32,
    out: *mut *mut Pool,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    let device = unsafe { &*device.cast::<Dev>() };
    let attr = ibv_srq_attr { max_wr: buffers, max_sge: 1, srq_limit: 0 };
    let mut init = ibv_srq_init_attr { srq_context: std::ptr::null_mut(), attr };
    // SAFETY: the domain is there.
    let pool = unsafe { ibv_create_srq(device.domain, &raw mut init) };
    if pool.is_null() {
        return failed("ibv_create_srq", last_errno(), failure);
    }
    // SAFETY: the host gives room for the pointer.
    unsafe { *out = pool.cast() };
    0
}

pub(crate) unsafe extern "C" fn pool_post(
    pool: *mut Pool,
    id: u64,
    piece: *const Piece,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host gives one piece.
    let piece = unsafe { *piece };
    let mut place = ibv_sge { addr: piece.address, length: piece.len_bytes, lkey: piece.key };
    let mut work = ibv_recv_wr { wr_id: id, next: std::ptr::null_mut(), sg_list: &raw mut place, num_sge: 1 };
    let mut bad = std::ptr::null_mut();
    // SAFETY: the pool is open; the list is read before the call returns.
    let posted = unsafe { ibv_post_srq_recv(pool.cast::<ibv_srq>(), &raw mut work, &raw mut bad) };
    match check("ibv_post_srq_recv", posted, failure) {
        Ok(()) => 0,
        Err(errno) => errno,
    }
}

pub(crate) unsafe extern "C" fn pool_close(pool: *mut Pool) {
    // SAFETY: the host closes it once, after the connections that use it.
    unsafe { ibv_destroy_srq(pool.cast::<ibv_srq>()) };
}
