//! The channel of connection events, and what each event means to the host. Not what the host does then. Invariant: every
//! event that was taken is acknowledged before the next one is.
//!
//! Holds unsafe code: librdmacm's calls, on things that the host has opened and not closed.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use hetmem_transport::verbs_abi::{
    Connection, ConnectionEvent, Context, Device, EVENT_DEVICE_REMOVED, EVENT_DISCONNECTED,
    EVENT_ESTABLISHED, EVENT_NONE, EVENT_REJECTED, EVENT_REQUEST, EVENT_ROUTED, EVENT_UNREACHABLE, Failure,
    PRIVATE_MAX,
};
use rdma_sys::{
    rdma_ack_cm_event, rdma_cm_event, rdma_cm_event_type as kind, rdma_create_event_channel,
    rdma_destroy_event_channel, rdma_event_channel, rdma_get_cm_event, rdma_resolve_route,
};
use rustix::io::Errno;

use crate::connection::Conn;
use crate::device::Dev;
use crate::failure::{failed, last_errno};

/// Behind the host's `Context`.
pub(crate) struct Ctx {
    pub(crate) channel: *mut rdma_event_channel,
    /// By the address of librdmacm's context of the device.
    pub(crate) devices: Mutex<BTreeMap<usize, *mut Dev>>,
}

pub(crate) unsafe extern "C" fn open(out: *mut *mut Context, failure: *mut Failure) -> i32 {
    // SAFETY: takes nothing.
    let channel = unsafe { rdma_create_event_channel() };
    if channel.is_null() {
        return failed("rdma_create_event_channel", last_errno(), failure);
    }
    // SAFETY: the channel was just made, and its descriptor lives as long.
    let descriptor = unsafe { BorrowedFd::borrow_raw((*channel).fd) };
    if let Err(errno) = rustix::io::ioctl_fionbio(descriptor, true) {
        // SAFETY: it was just made, and nothing uses it.
        unsafe { rdma_destroy_event_channel(channel) };
        return failed("ioctl(FIONBIO)", errno.raw_os_error(), failure);
    }
    let context = Box::new(Ctx { channel, devices: Mutex::default() });
    // SAFETY: the host gives room for the pointer.
    unsafe { *out = Box::into_raw(context).cast() };
    0
}

pub(crate) unsafe extern "C" fn close(context: *mut Context) {
    // SAFETY: the host closes what `open` has given it, once, and after all of its connections and devices.
    let context = unsafe { Box::from_raw(context.cast::<Ctx>()) };
    // SAFETY: as above.
    unsafe { rdma_destroy_event_channel(context.channel) };
}

pub(crate) unsafe extern "C" fn descriptor(context: *const Context) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    unsafe { (*(*context.cast::<Ctx>()).channel).fd }
}

pub(crate) unsafe extern "C" fn event(
    context: *mut Context,
    out: *mut ConnectionEvent,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened it and not closed it, and takes events on one thread at a time.
    let context = unsafe { &*context.cast::<Ctx>() };
    loop {
        let mut event = std::ptr::null_mut();
        // SAFETY: the channel is open.
        if unsafe { rdma_get_cm_event(context.channel, &raw mut event) } != 0 {
            let errno = last_errno();
            if errno != Errno::AGAIN.raw_os_error() && errno != Errno::INTR.raw_os_error() {
                return failed("rdma_get_cm_event", errno, failure);
            }
            // SAFETY: the host gives room for an event.
            unsafe { *out = nothing() };
            return 0;
        }
        // SAFETY: the event is ours until it is acknowledged, which is here.
        let told = unsafe { translate(context, &*event) };
        // SAFETY: as above.
        unsafe { rdma_ack_cm_event(event) };
        if let Some(told) = told {
            // SAFETY: the host gives room for an event.
            unsafe { *out = told };
            return 0;
        }
    }
}

fn nothing() -> ConnectionEvent {
    ConnectionEvent {
        kind: EVENT_NONE,
        status: 0,
        connection: std::ptr::null_mut(),
        listener: std::ptr::null_mut(),
        token: 0,
        device: std::ptr::null_mut(),
        private_len: 0,
        reads_out: 0,
        reads_in: 0,
        _reserved: [0; 2],
        private: [0; PRIVATE_MAX],
    }
}

/// What the host is told of an event; none if it is only a step on the way.
///
/// # Safety
/// The event is not acknowledged yet.
unsafe fn translate(context: &Ctx, event: &rdma_cm_event) -> Option<ConnectionEvent> {
    if event.event == kind::RDMA_CM_EVENT_DEVICE_REMOVAL {
        // Every identifier of the device has this event; its anchor's stands for all.
        let device = Dev::removed(context, event.id)?;
        return Some(ConnectionEvent { kind: EVENT_DEVICE_REMOVED, device, ..nothing() });
    }
    // SAFETY: the identifier of an event that is not acknowledged is there, and its context is what `Conn` has put there:
    // a new one has its listener's, and an anchor none.
    let owner = unsafe { (*event.id).context }.cast::<Conn>();
    if owner.is_null() {
        return None;
    }
    // SAFETY: as above.
    let token = unsafe { (*owner).token };
    let mut told = ConnectionEvent { token, connection: owner.cast(), ..nothing() };
    told.status = event.status.saturating_abs();
    told.kind = match event.event {
        kind::RDMA_CM_EVENT_ADDR_RESOLVED => {
            // SAFETY: the identifier is there, and its address is resolved.
            if unsafe { rdma_resolve_route(event.id, crate::connection::ROUTE_TIMEOUT_MS) } == 0 {
                return None;
            }
            told.status = last_errno();
            EVENT_UNREACHABLE
        }
        kind::RDMA_CM_EVENT_ROUTE_RESOLVED => EVENT_ROUTED,
        kind::RDMA_CM_EVENT_CONNECT_REQUEST => {
            told.listener = owner.cast();
            told.connection = Conn::of(event.id, told.token).cast::<Connection>();
            EVENT_REQUEST
        }
        kind::RDMA_CM_EVENT_ESTABLISHED => EVENT_ESTABLISHED,
        kind::RDMA_CM_EVENT_ADDR_ERROR
        | kind::RDMA_CM_EVENT_ROUTE_ERROR
        | kind::RDMA_CM_EVENT_CONNECT_ERROR
        | kind::RDMA_CM_EVENT_UNREACHABLE => EVENT_UNREACHABLE,
        kind::RDMA_CM_EVENT_REJECTED => EVENT_REJECTED,
        kind::RDMA_CM_EVENT_DISCONNECTED => EVENT_DISCONNECTED,
        _ => return None,
    };
    if matches!(told.kind, EVENT_REQUEST | EVENT_ESTABLISHED | EVENT_REJECTED) {
        // SAFETY: connections are of type RC, whose events have this part of the union.
        let param = unsafe { &event.param.conn };
        // What a peer may ask for is what this end answers, and the other way round.
        (told.reads_in, told.reads_out) = (param.initiator_depth, param.responder_resources);
        let len = usize::from(param.private_data_len).min(PRIVATE_MAX);
        if !param.private_data.is_null() {
            // SAFETY: librdmacm gives the pointer and the length until the event is acknowledged.
            let bytes = unsafe { std::slice::from_raw_parts(param.private_data.cast::<u8>(), len) };
            told.private[..len].copy_from_slice(bytes);
            told.private_len = u32::try_from(len).unwrap_or(0);
        }
    }
    Some(told)
}

impl Ctx {
    /// Forgets a device that is closed.
    pub(crate) fn forget(&self, device: *mut Device) {
        let mut devices = self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        devices.retain(|_, known| *known != device.cast());
    }
}
