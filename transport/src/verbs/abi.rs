//! The function table between the verbs fabric and the plugin that calls libibverbs and librdmacm: what either side may
//! assume of the other. Not the fabric (`super`), and not the calls themselves (`hetmem-verbs`). Invariant: everything
//! here has one layout in C, and a change of any of it changes `ABI_VERSION` or lengthens the table.
//!
//! Rules of the seam:
//! - A function that returns `i32` returns 0, or the errno of what failed; then it has described that in `Failure`.
//! - No function blocks, except that closing a thing waits until the hardware is done with it.
//! - Everything that is opened is closed once, and before what it was opened of: connections before queues and pools,
//!   regions, queues and pools before their device, devices and connections before the context.
//! - Any function may be called on any thread; no two at a time on one connection or pool, and `close` of a thing not
//!   beside any other use of it.
//!
//! Holds unsafe code: C functions, each of which is called by the rules above.

use std::ffi::c_void;

/// Of this table. Host and plugin must have the same.
pub const ABI_VERSION: u32 = 2;
/// The symbol that the plugin exports: an [`Entry`].
pub const ENTRY_SYMBOL: &str = "hetmem_verbs_table";
/// The most bytes of private data in a connection's request and answer: what RoCE and iWARP both carry.
pub const PRIVATE_MAX: usize = 56;

/// What the plugin exports; never null, and valid for as long as the plugin is loaded.
pub type Entry = unsafe extern "C" fn() -> *const Table;

/// The channel that brings the events of connections.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    _opaque: [u8; 0],
}

/// One adapter that a connection goes through.
#[repr(C)]
#[derive(Debug)]
pub struct Device {
    _opaque: [u8; 0],
}

/// Completions, and the descriptor that tells of new ones.
#[repr(C)]
#[derive(Debug)]
pub struct Queue {
    _opaque: [u8; 0],
}

/// Receive buffers that all connections of one device share.
#[repr(C)]
#[derive(Debug)]
pub struct Pool {
    _opaque: [u8; 0],
}

/// Memory that is registered with one device.
#[repr(C)]
#[derive(Debug)]
pub struct Region {
    _opaque: [u8; 0],
}

/// A listener, or one end of a queue pair.
#[repr(C)]
#[derive(Debug)]
pub struct Connection {
    _opaque: [u8; 0],
}

/// Which call failed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// Its name, as the manual has it, up to the first zero byte.
    pub call: [u8; 32],
}

/// An IP address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// 4 or 6.
    pub version: u16,
    /// In the order of this machine.
    pub port: u16,
    /// Of a link-local address of version 6: the interface.
    pub scope: u32,
    /// In network order; the first four of version 4.
    pub bytes: [u8; 16],
}

/// What has happened to a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ConnectionEvent {
    /// One of `EVENT_*`.
    pub kind: u32,
    /// Of a failure: an errno, or for `EVENT_REJECTED` the reason that the fabric's connection manager names.
    pub status: i32,
    /// Whom it is about; null of `EVENT_DEVICE_REMOVED`. Of `EVENT_REQUEST`: the new connection, which is to be accepted or
    /// closed.
    pub connection: *mut Connection,
    /// Of `EVENT_REQUEST`: who was listening.
    pub listener: *mut Connection,
    /// The number that was given to `resolve` or `listen`; of a request, the listener's.
    pub token: u64,
    /// Of `EVENT_DEVICE_REMOVED`: which device.
    pub device: *mut Device,
    /// How many bytes of `private` the peer has sent.
    pub private_len: u32,
    /// Of `EVENT_REQUEST` and `EVENT_ESTABLISHED`: how many reads the peer lets this end have under way.
    pub reads_out: u8,
    /// Of `EVENT_REQUEST`: how many reads the peer wants to have under way.
    pub reads_in: u8,
    /// Zero.
    pub _reserved: [u8; 2],
    /// What it has sent.
    pub private: [u8; PRIVATE_MAX],
}

/// There is no event.
pub const EVENT_NONE: u32 = 0;
/// It is known by which device the peer is reached: queue pairs can be opened.
pub const EVENT_ROUTED: u32 = 1;
/// A peer connects.
pub const EVENT_REQUEST: u32 = 2;
/// The connection can be used.
pub const EVENT_ESTABLISHED: u32 = 3;
/// The peer is not reached.
pub const EVENT_UNREACHABLE: u32 = 4;
/// The peer refuses.
pub const EVENT_REJECTED: u32 = 5;
/// The connection has ended; its work is being flushed.
pub const EVENT_DISCONNECTED: u32 = 6;
/// A device goes away, which waits until everything that was opened of it is closed: connections and listeners too.
pub const EVENT_DEVICE_REMOVED: u32 = 7;

/// What a device can do.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceLimits {
    /// Up to the first zero byte.
    pub name: [u8; 64],
    /// Its version, in the same way.
    pub firmware: [u8; 64],
    /// The longest region.
    pub region_bytes_max: u64,
    /// Who made it.
    pub vendor: u32,
    /// The maker's number of it.
    pub part: u32,
    /// One of `TRANSPORT_*`.
    pub transport: u32,
    /// Pieces of one send or write.
    pub pieces_max: u32,
    /// Pieces of one read.
    pub read_pieces_max: u32,
    /// Work under way on one connection.
    pub work_max: u32,
    /// Entries of a queue.
    pub completions_max: u32,
    /// Buffers of a pool.
    pub buffers_max: u32,
    /// Reads under way that an end of a connection may have asked for.
    pub reads_out_max: u32,
    /// Reads under way that an end of a connection answers.
    pub reads_in_max: u32,
}

/// InfiniBand, or RoCE of either version.
pub const TRANSPORT_INFINIBAND: u32 = 1;
/// iWARP: the target of a read has to be open to remote writes.
pub const TRANSPORT_IWARP: u32 = 2;

/// Memory to be registered.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// One of `MEMORY_*`.
    pub kind: u32,
    /// Of `MEMORY_DMA_BUF`: its descriptor.
    pub descriptor: i32,
    /// Of `MEMORY_DMA_BUF`: where in it the memory starts.
    pub offset: u64,
    /// Where work names it: an address of this process, or of the GPU.
    pub address: u64,
    /// How long it is.
    pub len_bytes: u64,
    /// Any of `ACCESS_*`.
    pub access: u32,
    /// Zero.
    pub _reserved: u32,
}

/// Mapped in this process.
pub const MEMORY_HOST: u32 = 1;
/// Exported by another driver.
pub const MEMORY_DMA_BUF: u32 = 2;
/// An address of a GPU, whose driver knows what it means (nvidia-peermem).
pub const MEMORY_PEER: u32 = 3;

/// This end may receive and read into it.
pub const ACCESS_LOCAL_WRITE: u32 = 1;
/// Peers may read it.
pub const ACCESS_REMOTE_READ: u32 = 2;
/// Peers may write it.
pub const ACCESS_REMOTE_WRITE: u32 = 4;

/// The keys of a region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// For this end's pieces.
    pub local: u32,
    /// For peers.
    pub remote: u32,
}

/// A part of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Inside of a region.
    pub address: u64,
    /// How long it is.
    pub len_bytes: u32,
    /// The region's local key.
    pub key: u32,
}

/// One piece of work for a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Comes back in its completion.
    pub id: u64,
    /// What is sent or written, or where what is read goes.
    pub pieces: *const Piece,
    /// How many.
    pub piece_count: u32,
    /// One of `WORK_*`.
    pub kind: u32,
    /// Any of `FLAG_*`.
    pub flags: u32,
    /// Of `WORK_WRITE_TOLD`.
    pub immediate: u32,
    /// Of reads and writes: where in the peer's memory.
    pub remote_address: u64,
    /// The remote key of the peer's region.
    pub remote_key: u32,
    /// Zero.
    pub _reserved: u32,
}

/// Sends the pieces into the peer's next receive buffer.
pub const WORK_SEND: u32 = 1;
/// Reads the peer's memory into the pieces.
pub const WORK_READ: u32 = 2;
/// Writes the pieces into the peer's memory.
pub const WORK_WRITE: u32 = 3;
/// The same, and the immediate number, which takes one of the peer's receive buffers, comes when all that was written
/// before it is there. iWARP has none.
pub const WORK_WRITE_TOLD: u32 = 4;

/// A completion follows also if it succeeds.
pub const FLAG_SIGNALED: u32 = 1;
/// The bytes are taken before the call returns; the pieces' keys do not matter.
pub const FLAG_INLINE: u32 = 2;
/// Begins only when all reads before it are over.
pub const FLAG_FENCE: u32 = 4;

/// How a connection's queue pair is to be made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QueuePair {
    /// For all of its completions.
    pub queue: *mut Queue,
    /// Where it takes its receive buffers from.
    pub pool: *mut Pool,
    /// Work under way.
    pub work_max: u32,
    /// Pieces of each.
    pub pieces_max: u32,
    /// Asked for; what there is comes back.
    pub inline_bytes_max: u32,
    /// Comes back: names the queue pair in completions.
    pub number: u32,
}

/// How a connection is made or accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Handshake {
    /// What the peer is told; at most `PRIVATE_MAX` bytes.
    pub private: *const u8,
    /// How many.
    pub private_len: u32,
    /// Reads under way that this end may ask for.
    pub reads_out: u8,
    /// Reads under way that this end answers.
    pub reads_in: u8,
    /// How often the adapter sends again what is not acknowledged, up to 7.
    pub retries: u8,
    /// The same when the peer had no receive buffer; 7 is for ever.
    pub not_ready_retries: u8,
}

/// Work that is over, or a buffer that something was received into.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Of the work, or of the buffer.
    pub id: u64,
    /// 0, or a code of `enum ibv_wc_status`.
    pub status: u32,
    /// What the adapter's maker says beside that.
    pub vendor: u32,
    /// One of `DONE_*`; nothing is meant by it if the status is not 0.
    pub kind: u32,
    /// Bytes received.
    pub len_bytes: u32,
    /// The number that came with it.
    pub immediate: u32,
    /// Whose it is.
    pub queue_pair: u32,
}

/// Sent, read or written.
pub const DONE_WORK: u32 = 0;
/// A send of the peer has come.
pub const DONE_RECEIVED: u32 = 1;
/// A write of the peer has come, and took a buffer for its number.
pub const DONE_WRITTEN: u32 = 2;

/// The plugin's functions.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// `ABI_VERSION` of who made it.
    pub abi_version: u32,
    /// Of the table: a plugin may have more functions than the host knows.
    pub size_bytes: u32,

    /// Opens what brings events. Fails with `ENODEV` or `ENOSYS` where there is no RDMA at all.
    pub context_open: unsafe extern "C" fn(out: *mut *mut Context, failure: *mut Failure) -> i32,
    /// Closes it.
    pub context_close: unsafe extern "C" fn(context: *mut Context),
    /// Readable when there may be events.
    pub context_descriptor: unsafe extern "C" fn(context: *const Context) -> i32,
    /// Takes the next event, `EVENT_NONE` if there is none.
    pub context_event:
        unsafe extern "C" fn(context: *mut Context, out: *mut ConnectionEvent, failure: *mut Failure) -> i32,
    /// Describes up to `room` devices of the machine, whether used or not; returns how many there are.
    pub devices: unsafe extern "C" fn(out: *mut DeviceLimits, room: u32) -> u32,

    /// Listens; with port 0, `address.port` comes back.
    pub listen: unsafe extern "C" fn(
        context: *mut Context,
        address: *mut Address,
        token: u64,
        out: *mut *mut Connection,
        failure: *mut Failure,
    ) -> i32,
    /// Begins to look for the way to a peer. `EVENT_ROUTED` or `EVENT_UNREACHABLE` follows.
    pub resolve: unsafe extern "C" fn(
        context: *mut Context,
        from: *const Address,
        to: *const Address,
        timeout_ms: u32,
        token: u64,
        out: *mut *mut Connection,
        failure: *mut Failure,
    ) -> i32,
    /// Opens the devices that have an IP address of this machine, up to `room` of them; returns how many. The same pointer
    /// for the same device, also from `device_of`.
    pub devices_open: unsafe extern "C" fn(context: *mut Context, out: *mut *mut Device, room: u32) -> u32,
    /// The device that a routed or requested connection goes through, or that a listener is bound to, opened if it is not;
    /// the same pointer for the same device.
    pub device_of: unsafe extern "C" fn(
        context: *mut Context,
        connection: *mut Connection,
        out: *mut *mut Device,
        failure: *mut Failure,
    ) -> i32,
    /// An address of this machine that is the device's, with port 0.
    pub device_address: unsafe extern "C" fn(device: *const Device, out: *mut Address),
    /// Gives a requested connection a token of its own: the events that follow name it.
    pub connection_name: unsafe extern "C" fn(connection: *mut Connection, token: u64),
    /// The address of the peer of a connection that was requested.
    pub peer_of: unsafe extern "C" fn(connection: *const Connection, out: *mut Address),
    /// Makes the queue pair of a routed or requested connection.
    pub queue_pair_open: unsafe extern "C" fn(
        device: *mut Device,
        connection: *mut Connection,
        with: *mut QueuePair,
        failure: *mut Failure,
    ) -> i32,
    /// `EVENT_ESTABLISHED`, `EVENT_REJECTED` or `EVENT_UNREACHABLE` follows.
    pub connect: unsafe extern "C" fn(
        connection: *mut Connection,
        with: *const Handshake,
        failure: *mut Failure,
    ) -> i32,
    /// `EVENT_ESTABLISHED` or `EVENT_UNREACHABLE` follows.
    pub accept: unsafe extern "C" fn(
        connection: *mut Connection,
        with: *const Handshake,
        failure: *mut Failure,
    ) -> i32,
    /// Refuses a requested connection, which is then to be closed.
    pub reject: unsafe extern "C" fn(connection: *mut Connection, private: *const u8, private_len: u32),
    /// Ends a connection: all its work is flushed, with a completion for each piece.
    pub disconnect: unsafe extern "C" fn(connection: *mut Connection),
    /// Posts a list; all before `*failed_at` are posted if it fails.
    pub post: unsafe extern "C" fn(
        connection: *mut Connection,
        work: *const Work,
        count: u32,
        failed_at: *mut u32,
        failure: *mut Failure,
    ) -> i32,
    /// Closes a listener, or a connection with its queue pair: nothing of it touches memory any more.
    pub connection_close: unsafe extern "C" fn(connection: *mut Connection),

    /// What the device can do.
    pub device_limits:
        unsafe extern "C" fn(device: *const Device, out: *mut DeviceLimits, failure: *mut Failure) -> i32,
    /// Closes it; whoever asks for it next opens it again.
    pub device_close: unsafe extern "C" fn(context: *mut Context, device: *mut Device),
    /// Opens a queue of at least so many entries.
    pub queue_open: unsafe extern "C" fn(
        device: *mut Device,
        entries: u32,
        out: *mut *mut Queue,
        failure: *mut Failure,
    ) -> i32,
    /// Readable when the queue was armed and there are completions.
    pub queue_descriptor: unsafe extern "C" fn(queue: *const Queue) -> i32,
    /// Takes what the descriptor told of, and arms the queue for the next completion. Poll once more afterwards.
    pub queue_arm: unsafe extern "C" fn(queue: *mut Queue, failure: *mut Failure) -> i32,
    /// Takes up to `room` completions; returns how many, or less than 0 if the queue is broken.
    pub queue_poll: unsafe extern "C" fn(queue: *mut Queue, out: *mut Completion, room: u32) -> i32,
    /// Closes it.
    pub queue_close: unsafe extern "C" fn(queue: *mut Queue),
    /// Opens a pool for so many buffers.
    pub pool_open: unsafe extern "C" fn(
        device: *mut Device,
        buffers: u32,
        out: *mut *mut Pool,
        failure: *mut Failure,
    ) -> i32,
    /// Posts a receive buffer.
    pub pool_post:
        unsafe extern "C" fn(pool: *mut Pool, id: u64, piece: *const Piece, failure: *mut Failure) -> i32,
    /// Closes it; its buffers are the host's again.
    pub pool_close: unsafe extern "C" fn(pool: *mut Pool),
    /// Registers memory.
    pub region_open: unsafe extern "C" fn(
        device: *mut Device,
        memory: *const Memory,
        out: *mut *mut Region,
        keys: *mut Keys,
        failure: *mut Failure,
    ) -> i32,
    /// Deregisters it: nothing touches the memory any more.
    pub region_close: unsafe extern "C" fn(region: *mut Region),
    /// Kept for later versions.
    pub _reserved: *const c_void,
}

// SAFETY: a table is constant data; the pointer in it is null.
#[allow(unsafe_code, reason = "a table of functions is shared by all threads of the host")]
unsafe impl Sync for Table {}
