//! Devices, what they can do, and memory that is registered with them. Not which of them is used: the route to a peer
//! says that. Invariant: one `Dev` for each device that a connection goes through, whoever asks.
//!
//! Holds unsafe code: libibverbs' calls, on things that the host has opened and not closed.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use hetmem_transport::verbs_abi::{
    ACCESS_LOCAL_WRITE, ACCESS_REMOTE_READ, ACCESS_REMOTE_WRITE, Address, Connection, Context, Device,
    DeviceLimits, Failure, Keys, MEMORY_DMA_BUF, Memory, Region, TRANSPORT_INFINIBAND, TRANSPORT_IWARP,
};
use rdma_sys::{
    ibv_access_flags as flags, ibv_alloc_pd, ibv_close_device, ibv_context, ibv_dealloc_pd, ibv_dereg_mr,
    ibv_device_attr, ibv_free_device_list, ibv_get_device_list, ibv_get_device_name, ibv_mr, ibv_open_device,
    ibv_pd, ibv_query_device, ibv_reg_dmabuf_mr, ibv_reg_mr, ibv_transport_type, rdma_bind_addr, rdma_cm_id,
    rdma_create_id, rdma_destroy_id, rdma_port_space,
};
use rustix::io::Errno;

use crate::connection::{Conn, SocketAddress};
use crate::context::Ctx;
use crate::failure::{failed, last_errno};

/// The most devices that are opened unasked.
const DEVICES_MAX: usize = 64;

/// Behind the host's `Device`.
pub(crate) struct Dev {
    pub(crate) verbs: *mut ibv_context,
    pub(crate) domain: *mut ibv_pd,
    /// Bound to the device for as long as this lives: librdmacm keeps the device open meanwhile, and tells of its removal.
    anchor: *mut rdma_cm_id,
    removed: bool,
}

impl Dev {
    /// The device that an anchor is bound to, which it then owns, unless it is known already.
    ///
    /// # Safety
    /// The identifier is on the context's channel, bound to an address, and nobody else's.
    unsafe fn anchored(
        context: &Ctx,
        anchor: *mut rdma_cm_id,
        failure: *mut Failure,
    ) -> Result<*mut Self, i32> {
        // SAFETY: as the caller says.
        let verbs = unsafe { (*anchor).verbs };
        let mut devices = context.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = devices.get(&(verbs as usize)).copied();
        let result = match known {
            Some(device) => Ok(device),
            None if verbs.is_null() => Err(failed("rdma_bind_addr", Errno::NODEV.raw_os_error(), failure)),
            // SAFETY: librdmacm keeps the device open while the anchor is there.
            None => match unsafe { ibv_alloc_pd(verbs) } {
                domain if domain.is_null() => Err(failed("ibv_alloc_pd", last_errno(), failure)),
                domain => Ok(Box::into_raw(Box::new(Self { verbs, domain, anchor, removed: false }))),
            },
        };
        match result {
            Ok(device) if known.is_none() => {
                devices.insert(verbs as usize, device);
                Users::enter(verbs);
            }
            // SAFETY: nobody has it.
            _ => drop(unsafe { rdma_destroy_id(anchor) }),
        }
        result
    }

    /// Notes that the device whose anchor this is goes away.
    pub(crate) fn removed(context: &Ctx, anchor: *mut rdma_cm_id) -> Option<*mut Device> {
        let devices = context.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: devices are forgotten before they are closed.
        let of_it = |device: &&*mut Self| unsafe { (***device).anchor == anchor };
        let device = *devices.values().find(of_it)?;
        // SAFETY: as above; nothing else looks at the field before the device is closed.
        unsafe { (*device).removed = true };
        Some(device.cast())
    }
}

/// An identifier that is bound to an address; none if the address is of no RDMA device.
fn anchor_at(context: &Ctx, address: *mut libc::sockaddr) -> Option<*mut rdma_cm_id> {
    let mut anchor = std::ptr::null_mut();
    // SAFETY: the channel is open, there is room for the pointer, and the caller gives an address.
    unsafe {
        let port = rdma_port_space::RDMA_PS_TCP;
        if rdma_create_id(context.channel, &raw mut anchor, std::ptr::null_mut(), port) != 0 {
            return None;
        }
        if rdma_bind_addr(anchor, address.cast()) == 0 && !(*anchor).verbs.is_null() {
            return Some(anchor);
        }
        rdma_destroy_id(anchor);
    }
    None
}

pub(crate) unsafe extern "C" fn of(
    context: *mut Context,
    connection: *mut Connection,
    out: *mut *mut Device,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened both and closed neither.
    let (context, connection) = unsafe { (&*context.cast::<Ctx>(), &*connection.cast::<Conn>()) };
    // SAFETY: the connection's identifier is there until the connection is closed.
    let verbs = unsafe { (*connection.id).verbs };
    let known = {
        let devices = context.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        devices.get(&(verbs as usize)).copied()
    };
    let device = match known {
        Some(device) => Ok(device),
        // SAFETY: as above.
        None => match anchor_at(context, unsafe { SocketAddress::own(connection.id) }.as_mut_ptr()) {
            // SAFETY: it was just made.
            Some(anchor) if !verbs.is_null() => unsafe { Dev::anchored(context, anchor, failure) },
            _ => Err(failed("rdma_bind_addr", Errno::NODEV.raw_os_error(), failure)),
        },
    };
    match device {
        Ok(device) => {
            // SAFETY: the host gives room for the pointer.
            unsafe { *out = device.cast() };
            0
        }
        Err(errno) => errno,
    }
}

pub(crate) unsafe extern "C" fn address(device: *const Device, out: *mut Address) {
    // SAFETY: the host has opened the device and not closed it, and gives room for an address.
    unsafe { *out = SocketAddress::own((*device.cast::<Dev>()).anchor).to_address() };
}

pub(crate) unsafe extern "C" fn open_all(context: *mut Context, out: *mut *mut Device, room: u32) -> u32 {
    // SAFETY: the host has opened it and not closed it.
    let context = unsafe { &*context.cast::<Ctx>() };
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: there is room for the pointer.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return 0;
    }
    let mut found: Vec<*mut Dev> = Vec::new();
    let mut next = list;
    // SAFETY: the list is ours until it is given back, which is below.
    while let Some(interface) = unsafe { next.as_ref() } {
        next = interface.ifa_next;
        // SAFETY: an interface's address is null or as long as its family wants.
        let Some(mut address) = (unsafe { SocketAddress::read(interface.ifa_addr.cast()) }) else { continue };
        let anchor = anchor_at(context, address.as_mut_ptr());
        // SAFETY: it was just made.
        let device = anchor.and_then(|it| unsafe { Dev::anchored(context, it, std::ptr::null_mut()) }.ok());
        if let Some(device) = device.filter(|device| found.len() < DEVICES_MAX && !found.contains(device)) {
            found.push(device);
        }
    }
    // SAFETY: as above.
    unsafe { libc::freeifaddrs(list) };
    for (at, device) in found.iter().take(room as usize).enumerate() {
        // SAFETY: the host gives room for so many.
        unsafe { *out.add(at) = device.cast() };
    }
    u32::try_from(found.len()).unwrap_or(u32::MAX)
}

pub(crate) unsafe extern "C" fn close(context: *mut Context, device: *mut Device) {
    // SAFETY: the host has opened it and not closed it.
    unsafe { &*context.cast::<Ctx>() }.forget(device);
    // SAFETY: the host closes it once, after all that was opened of it.
    let device = unsafe { Box::from_raw(device.cast::<Dev>()) };
    // SAFETY: as above.
    unsafe {
        ibv_dealloc_pd(device.domain);
        rdma_destroy_id(device.anchor);
    }
    let left = Users::leave(device.verbs, device.removed);
    if left == Some(Users { count: 0, removed: true }) {
        // SAFETY: librdmacm keeps it open, and no other device of ours is on it.
        unsafe { let_go(device.verbs) };
    }
}

/// How many `Dev` of all contexts of this process are on one device of librdmacm's, and whether it goes away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Users {
    count: usize,
    removed: bool,
}

static USERS: Mutex<BTreeMap<usize, Users>> = Mutex::new(BTreeMap::new());

impl Users {
    fn enter(verbs: *mut ibv_context) {
        let mut all = USERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.entry(verbs as usize).or_default().count += 1;
    }

    fn leave(verbs: *mut ibv_context, removed: bool) -> Option<Self> {
        let mut all = USERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let left = all.get_mut(&(verbs as usize))?;
        (left.count, left.removed) = (left.count.saturating_sub(1), left.removed | removed);
        let left = *left;
        if left.count == 0 {
            all.remove(&(verbs as usize));
        }
        Some(left)
    }
}

/// Lets the kernel's side of a device go that is being removed. librdmacm keeps a device open until it sees another one
/// come or, with none left, until the process ends (rdma-core 44 to 64, `sync_devices_list`); a driver that cannot take a
/// device away from its users waits for just that. So its descriptors are replaced by ones that do nothing, which
/// librdmacm closes in its own time.
///
/// # Safety
/// The device is open, and nothing of it is used any more.
unsafe fn let_go(verbs: *mut ibv_context) {
    let Ok(nothing) = std::fs::File::open("/dev/null") else { return };
    // SAFETY: as the caller says; both descriptors are the device's own.
    unsafe {
        for descriptor in [(*verbs).cmd_fd, (*verbs).async_fd] {
            libc::dup3(nothing.as_raw_fd(), descriptor, libc::O_CLOEXEC);
        }
    }
}

pub(crate) unsafe extern "C" fn limits(
    device: *const Device,
    out: *mut DeviceLimits,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened it and not closed it.
    let device = unsafe { &*device.cast::<Dev>() };
    // SAFETY: the device is open.
    match unsafe { limits_of(device.verbs) } {
        Ok(limits) => {
            // SAFETY: the host gives room for them.
            unsafe { *out = limits };
            0
        }
        Err(errno) => failed("ibv_query_device", errno, failure),
    }
}

pub(crate) unsafe extern "C" fn all(out: *mut DeviceLimits, room: u32) -> u32 {
    let mut count = 0;
    // SAFETY: the list is ours until it is given back, which is here.
    let list = unsafe { ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return 0;
    }
    let mut found = 0;
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` devices, and each can be opened, and closed again.
        let limits = unsafe {
            let verbs = ibv_open_device(*list.add(at));
            if verbs.is_null() {
                continue;
            }
            let limits = limits_of(verbs);
            ibv_close_device(verbs);
            limits
        };
        if let Ok(limits) = limits {
            if found < room {
                // SAFETY: the host gives room for so many.
                unsafe { *out.add(found as usize) = limits };
            }
            found += 1;
        }
    }
    // SAFETY: it was given by `ibv_get_device_list`, and no device of it is used any more.
    unsafe { ibv_free_device_list(list) };
    found
}

/// # Safety
/// The device is open.
unsafe fn limits_of(verbs: *mut ibv_context) -> Result<DeviceLimits, i32> {
    // SAFETY: all of its fields are numbers.
    let mut attr: ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open.
    match unsafe { ibv_query_device(verbs, &raw mut attr) } {
        0 => {}
        errno => return Err(if errno > 0 { errno } else { last_errno() }),
    }
    // SAFETY: as above; its device's name is a C string that lives as long.
    let (name, transport) = unsafe {
        let device = (*verbs).device;
        (std::ffi::CStr::from_ptr(ibv_get_device_name(device)).to_bytes(), (*device).transport_type)
    };
    // SAFETY: an array of C characters of that length.
    let firmware =
        unsafe { std::slice::from_raw_parts(attr.fw_ver.as_ptr().cast::<u8>(), attr.fw_ver.len()) };
    let firmware = firmware.split(|byte| *byte == 0).next().unwrap_or_default();
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    Ok(DeviceLimits {
        name: text(name),
        firmware: text(firmware),
        region_bytes_max: attr.max_mr_size,
        vendor: attr.vendor_id,
        part: attr.vendor_part_id,
        transport: match transport {
            ibv_transport_type::IBV_TRANSPORT_IWARP => TRANSPORT_IWARP,
            _ => TRANSPORT_INFINIBAND,
        },
        pieces_max: number(attr.max_sge),
        read_pieces_max: number(attr.max_sge_rd).max(1),
        work_max: number(attr.max_qp_wr),
        completions_max: number(attr.max_cqe),
        buffers_max: number(attr.max_srq_wr),
        reads_out_max: number(attr.max_qp_init_rd_atom),
        reads_in_max: number(attr.max_qp_rd_atom),
    })
}

fn text(bytes: &[u8]) -> [u8; 64] {
    let mut text = [0; 64];
    let len = bytes.len().min(text.len() - 1);
    text[..len].copy_from_slice(&bytes[..len]);
    text
}

pub(crate) unsafe extern "C" fn region_open(
    device: *mut Device,
    memory: *const Memory,
    out: *mut *mut Region,
    keys: *mut Keys,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened the device and not closed it, and gives a description.
    let (device, memory) = unsafe { (&*device.cast::<Dev>(), &*memory) };
    let mut access = 0;
    for (asked, flag) in [
        (ACCESS_LOCAL_WRITE, flags::IBV_ACCESS_LOCAL_WRITE),
        (ACCESS_REMOTE_READ, flags::IBV_ACCESS_REMOTE_READ),
        (ACCESS_REMOTE_WRITE, flags::IBV_ACCESS_REMOTE_WRITE),
    ] {
        if memory.access & asked != 0 {
            access |= flag.0;
        }
    }
    let access = access.cast_signed();
    let len = usize::try_from(memory.len_bytes).unwrap_or(usize::MAX);
    let (call, region) = if memory.kind == MEMORY_DMA_BUF {
        let Memory { offset, address, descriptor, .. } = *memory;
        // SAFETY: the domain is there; the kernel checks the rest.
        ("ibv_reg_dmabuf_mr", unsafe {
            ibv_reg_dmabuf_mr(device.domain, offset, len, address, descriptor, access)
        })
    } else {
        let address = std::ptr::without_provenance_mut(usize::try_from(memory.address).unwrap_or(0));
        // SAFETY: the domain is there. The host keeps the memory mapped until it closes the region; what an address of a
        // GPU means the kernel knows.
        ("ibv_reg_mr", unsafe { ibv_reg_mr(device.domain, address, len, access) })
    };
    if region.is_null() {
        return failed(call, last_errno(), failure);
    }
    // SAFETY: it was just made; the host gives room for both.
    unsafe {
        *keys = Keys { local: (*region).lkey, remote: (*region).rkey };
        *out = region.cast();
    }
    0
}

pub(crate) unsafe extern "C" fn region_close(region: *mut Region) {
    // SAFETY: the host closes it once, and it was given by `region_open`.
    unsafe { ibv_dereg_mr(region.cast::<ibv_mr>()) };
}
