//! The plugin that calls libibverbs and librdmacm for hetmem's verbs fabric. Not the fabric: which bytes move, when, and
//! what becomes of failures is decided in `hetmem-transport`, which opens this library at run time and speaks to it
//! through `hetmem_transport::verbs_abi` alone. Invariant: the rules of that module; nothing here blocks, starts a
//! thread, or remembers more than the objects that it was asked to open.
//!
//! Holds unsafe code: every function of the table is called by the host, who guarantees the rules of the seam.
#![allow(unsafe_code)]

mod connection;
mod context;
mod device;
mod failure;
mod queue;

use hetmem_transport::verbs_abi::{ABI_VERSION, Table};

#[allow(clippy::cast_possible_truncation, reason = "a table of some tens of pointers")]
const TABLE_LEN: u32 = size_of::<Table>() as u32;

static TABLE: Table = Table {
    abi_version: ABI_VERSION,
    size_bytes: TABLE_LEN,
    context_open: context::open,
    context_close: context::close,
    context_descriptor: context::descriptor,
    context_event: context::event,
    devices: device::all,
    listen: connection::listen,
    resolve: connection::resolve,
    devices_open: device::open_all,
    device_of: device::of,
    device_address: device::address,
    connection_name: connection::name,
    peer_of: connection::peer,
    queue_pair_open: connection::queue_pair_open,
    connect: connection::connect,
    accept: connection::accept,
    reject: connection::reject,
    disconnect: connection::disconnect,
    post: connection::post,
    connection_close: connection::close,
    device_limits: device::limits,
    device_close: device::close,
    queue_open: queue::open,
    queue_descriptor: queue::descriptor,
    queue_arm: queue::arm,
    queue_poll: queue::poll,
    queue_close: queue::close,
    pool_open: queue::pool_open,
    pool_post: queue::pool_post,
    pool_close: queue::pool_close,
    region_open: device::region_open,
    region_close: device::region_close,
    _reserved: std::ptr::null(),
};

/// See `hetmem_transport::verbs_abi::ENTRY_SYMBOL`.
#[unsafe(no_mangle)]
pub extern "C" fn hetmem_verbs_table() -> *const Table {
    &raw const TABLE
}
