//! Listeners and connections: finding the way, queue pairs, and the work that is posted to them. Not what is sent.
//! Invariant: an identifier's context is its `Conn` for as long as the identifier lives.
//!
//! Holds unsafe code: librdmacm's and libibverbs' calls, on things that the host has opened and not closed.
#![allow(unsafe_code)]

use std::mem::zeroed;

use hetmem_transport::verbs_abi::{
    Address, Connection, Context, Device, FLAG_FENCE, FLAG_INLINE, FLAG_SIGNALED, Failure, Handshake, Piece,
    QueuePair, WORK_READ, WORK_WRITE, WORK_WRITE_TOLD, Work,
};
use rdma_sys::{
    ibv_post_send, ibv_qp_init_attr, ibv_qp_type, ibv_send_flags as flags, ibv_send_wr, ibv_sge, ibv_srq,
    ibv_wr_opcode as op, imm_data_invalidated_rkey_union_t, rdma_accept, rdma_bind_addr, rdma_cm_id,
    rdma_conn_param, rdma_connect, rdma_create_id, rdma_create_qp, rdma_destroy_id, rdma_destroy_qp,
    rdma_disconnect, rdma_get_src_port, rdma_listen, rdma_port_space, rdma_reject, rdma_resolve_addr, rdma_t,
};
use rustix::io::Errno;

use crate::context::Ctx;
use crate::device::Dev;
use crate::failure::{check, failed};
use crate::queue::Cq;

/// How long the way to a peer whose address is known may take, in milliseconds.
pub(crate) const ROUTE_TIMEOUT_MS: i32 = 2_000;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Behind the host's `Connection`.
pub(crate) struct Conn {
    pub(crate) id: *mut rdma_cm_id,
    pub(crate) token: u64,
    /// Made into what libibverbs takes; kept, so that posting allocates nothing.
    work: Vec<ibv_send_wr>,
    pieces: Vec<ibv_sge>,
}

impl Conn {
    /// Of an identifier that has none yet.
    pub(crate) fn of(id: *mut rdma_cm_id, token: u64) -> *mut Self {
        let connection = Box::into_raw(Box::new(Self { id, token, work: Vec::new(), pieces: Vec::new() }));
        // SAFETY: the identifier is there, and nobody else uses its context.
        unsafe { (*id).context = connection.cast() };
        connection
    }

    /// A new one on the context's channel.
    fn open(context: *mut Context, token: u64, failure: *mut Failure) -> Result<*mut Self, i32> {
        let mut id = std::ptr::null_mut();
        // SAFETY: the host has opened the context and not closed it.
        let made = unsafe {
            let channel = (*context.cast::<Ctx>()).channel;
            rdma_create_id(channel, &raw mut id, std::ptr::null_mut(), rdma_port_space::RDMA_PS_TCP)
        };
        check("rdma_create_id", made, failure)?;
        Ok(Self::of(id, token))
    }
}

/// An address as sockets have it, either version.
#[repr(C, align(8))]
pub(crate) struct SocketAddress([u8; 28]);

impl SocketAddress {
    /// Reads one that the system has; none of another family.
    ///
    /// # Safety
    /// The address is null, or as long as its family wants.
    pub(crate) unsafe fn read(address: *const libc::sockaddr) -> Option<Self> {
        // SAFETY: as the caller says.
        let len = match i32::from(unsafe { address.as_ref() }?.sa_family) {
            libc::AF_INET => size_of::<libc::sockaddr_in>(),
            libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
            _ => return None,
        };
        let mut bytes = [0; 28];
        // SAFETY: as the caller says, and none is longer than this.
        unsafe { std::ptr::copy_nonoverlapping(address.cast::<u8>(), bytes.as_mut_ptr(), len) };
        Some(Self(bytes))
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        self.0.as_mut_ptr().cast()
    }

    /// An identifier's address on this machine, with any free port.
    ///
    /// # Safety
    /// The identifier is there.
    pub(crate) unsafe fn own(id: *const rdma_cm_id) -> Self {
        // SAFETY: librdmacm keeps the address as long as the identifier lives, as a socket address of either version.
        let address = unsafe { &*(&raw const (*id).route.addr.src_addr_union).cast::<Self>() };
        let mut address = Self(address.0);
        address.0[2..4].fill(0);
        address
    }

    fn of(address: &Address) -> Self {
        let mut bytes = [0; 28];
        bytes[2..4].copy_from_slice(&address.port.to_be_bytes());
        if address.version == 6 {
            bytes[..2].copy_from_slice(&rustix::net::AddressFamily::INET6.as_raw().to_ne_bytes());
            bytes[8..24].copy_from_slice(&address.bytes);
            bytes[24..28].copy_from_slice(&address.scope.to_ne_bytes());
        } else {
            bytes[..2].copy_from_slice(&rustix::net::AddressFamily::INET.as_raw().to_ne_bytes());
            bytes[4..8].copy_from_slice(&address.bytes[..4]);
        }
        Self(bytes)
    }

    pub(crate) fn to_address(&self) -> Address {
        let bytes = &self.0;
        let family = u16::from_ne_bytes([bytes[0], bytes[1]]);
        let mut address = Address { port: u16::from_be_bytes([bytes[2], bytes[3]]), ..Address::default() };
        if family == rustix::net::AddressFamily::INET6.as_raw() {
            address.version = 6;
            address.bytes.copy_from_slice(&bytes[8..24]);
            address.scope = u32::from_ne_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        } else {
            address.version = 4;
            address.bytes[..4].copy_from_slice(&bytes[4..8]);
        }
        address
    }
}

pub(crate) unsafe extern "C" fn listen(
    context: *mut Context,
    address: *mut Address,
    token: u64,
    out: *mut *mut Connection,
    failure: *mut Failure,
) -> i32 {
    let connection = match Conn::open(context, token, failure) {
        Ok(connection) => connection,
        Err(errno) => return errno,
    };
    // SAFETY: the host gives an address, and the connection was just made.
    let listening = unsafe {
        let id = (*connection).id;
        let mut at = SocketAddress::of(&*address);
        check("rdma_bind_addr", rdma_bind_addr(id, (&raw mut at).cast()), failure)
            .and_then(|()| check("rdma_listen", rdma_listen(id, BACKLOG), failure))
            .map(|()| (*address).port = u16::from_be(rdma_get_src_port(id)))
    };
    // SAFETY: the connection was just made; the host gives room for the pointer.
    unsafe { finish(connection, listening, out) }
}

/// Hands a new connection out, or closes it.
///
/// # Safety
/// The connection was made and given to nobody.
unsafe fn finish(connection: *mut Conn, result: Result<(), i32>, out: *mut *mut Connection) -> i32 {
    match result {
        Ok(()) => {
            // SAFETY: the host gives room for the pointer.
            unsafe { *out = connection.cast() };
            0
        }
        Err(errno) => {
            // SAFETY: nobody has it.
            unsafe { close(connection.cast()) };
            errno
        }
    }
}

pub(crate) unsafe extern "C" fn resolve(
    context: *mut Context,
    from: *const Address,
    to: *const Address,
    timeout_ms: u32,
    token: u64,
    out: *mut *mut Connection,
    failure: *mut Failure,
) -> i32 {
    let connection = match Conn::open(context, token, failure) {
        Ok(connection) => connection,
        Err(errno) => return errno,
    };
    // SAFETY: the host gives the address to go to, and where to come from or null; the connection was just made.
    let begun = unsafe {
        let mut to = SocketAddress::of(&*to);
        let mut source = from.as_ref().map(SocketAddress::of);
        let source = source.as_mut().map_or(std::ptr::null_mut(), |source| (&raw mut *source).cast());
        let timeout = i32::try_from(timeout_ms).unwrap_or(i32::MAX);
        rdma_resolve_addr((*connection).id, source, (&raw mut to).cast(), timeout)
    };
    // SAFETY: as above.
    unsafe { finish(connection, check("rdma_resolve_addr", begun, failure), out) }
}

pub(crate) unsafe extern "C" fn name(connection: *mut Connection, token: u64) {
    // SAFETY: the host has the connection, and uses it on one thread at a time.
    unsafe { (*connection.cast::<Conn>()).token = token };
}

pub(crate) unsafe extern "C" fn peer(connection: *const Connection, out: *mut Address) {
    // SAFETY: the host has the connection and gives room for an address. librdmacm keeps the peer's in a socket address of
    // either version, which is at least as long as ours.
    unsafe {
        let id = (*connection.cast::<Conn>()).id;
        let address = &raw const (*id).route.addr.dst_addr_union.dst_storage;
        *out = (*address.cast::<SocketAddress>()).to_address();
    }
}

pub(crate) unsafe extern "C" fn queue_pair_open(
    device: *mut Device,
    connection: *mut Connection,
    with: *mut QueuePair,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has opened all of these and closed none, and gives the description.
    unsafe {
        let (device, id, with) = (&*device.cast::<Dev>(), (*connection.cast::<Conn>()).id, &mut *with);
        let queue = (*with.queue.cast::<Cq>()).queue;
        let mut init: ibv_qp_init_attr = zeroed();
        init.send_cq = queue;
        init.recv_cq = queue;
        init.srq = with.pool.cast::<ibv_srq>();
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        // Not all work is signalled, and that keeps mlx5 from putting what a short read brings into the completion, from
        // where its library would copy it with a processor: the target may be a GPU's. (mlx5dv_create_qp(3),
        // MLX5DV_QP_CREATE_ALLOW_SCATTER_TO_CQE.) Received messages are in host memory, always.
        init.sq_sig_all = 0;
        init.cap.max_send_wr = with.work_max;
        init.cap.max_send_sge = with.pieces_max;
        init.cap.max_inline_data = with.inline_bytes_max;
        if let Err(errno) = check("rdma_create_qp", rdma_create_qp(id, device.domain, &raw mut init), failure)
        {
            return errno;
        }
        with.work_max = init.cap.max_send_wr;
        with.pieces_max = init.cap.max_send_sge;
        with.inline_bytes_max = init.cap.max_inline_data;
        with.number = (*(*id).qp).qp_num;
    }
    0
}

/// # Safety
/// The host gives a handshake whose private data lives until the call is over.
unsafe fn parameters(with: *const Handshake) -> rdma_conn_param {
    // SAFETY: as above; all fields of the other are numbers and a pointer.
    let (with, mut param) = unsafe { (&*with, zeroed::<rdma_conn_param>()) };
    param.private_data = with.private.cast();
    param.private_data_len = u8::try_from(with.private_len).unwrap_or(u8::MAX);
    param.responder_resources = with.reads_in;
    param.initiator_depth = with.reads_out;
    param.flow_control = 1;
    param.retry_count = with.retries.min(7);
    param.rnr_retry_count = with.not_ready_retries.min(7);
    param
}

/// # Safety
/// The host has the connection and gives the handshake.
unsafe fn shake(
    call: (&str, unsafe extern "C" fn(*mut rdma_cm_id, *mut rdma_conn_param) -> i32),
    connection: *mut Connection,
    with: *const Handshake,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: as the caller says.
    let begun = unsafe {
        let mut param = parameters(with);
        call.1((*connection.cast::<Conn>()).id, &raw mut param)
    };
    check(call.0, begun, failure).err().unwrap_or(0)
}

pub(crate) unsafe extern "C" fn connect(
    connection: *mut Connection,
    with: *const Handshake,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has the connection and gives the handshake.
    unsafe { shake(("rdma_connect", rdma_connect), connection, with, failure) }
}

pub(crate) unsafe extern "C" fn accept(
    connection: *mut Connection,
    with: *const Handshake,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: as for `connect`.
    unsafe { shake(("rdma_accept", rdma_accept), connection, with, failure) }
}

pub(crate) unsafe extern "C" fn reject(connection: *mut Connection, private: *const u8, private_len: u32) {
    let len = u8::try_from(private_len).unwrap_or(u8::MAX);
    // SAFETY: the host has the connection and gives so many bytes.
    unsafe { rdma_reject((*connection.cast::<Conn>()).id, private.cast(), len) };
}

pub(crate) unsafe extern "C" fn disconnect(connection: *mut Connection) {
    // SAFETY: the host has the connection. It may have ended already, which is as well.
    unsafe { rdma_disconnect((*connection.cast::<Conn>()).id) };
}

pub(crate) unsafe extern "C" fn close(connection: *mut Connection) {
    // SAFETY: the host closes it once. All of its events are acknowledged when they are taken, so this waits for nobody.
    unsafe {
        let connection = Box::from_raw(connection.cast::<Conn>());
        if !(*connection.id).qp.is_null() {
            rdma_destroy_qp(connection.id);
        }
        rdma_destroy_id(connection.id);
    }
}

pub(crate) unsafe extern "C" fn post(
    connection: *mut Connection,
    work: *const Work,
    count: u32,
    failed_at: *mut u32,
    failure: *mut Failure,
) -> i32 {
    // SAFETY: the host has the connection, uses it on one thread at a time, and gives so much work, with its pieces.
    unsafe {
        let connection = &mut *connection.cast::<Conn>();
        let list = std::slice::from_raw_parts(work, count as usize);
        let Conn { id, work, pieces, .. } = connection;
        let queue_pair = (**id).qp;
        if list.is_empty() || queue_pair.is_null() {
            *failed_at = 0;
            return if list.is_empty() {
                0
            } else {
                failed("ibv_post_send", Errno::NOTCONN.raw_os_error(), failure)
            };
        }
        work.clear();
        pieces.clear();
        // All at once: what points into it must not move.
        pieces.reserve(list.iter().map(|work| work.piece_count as usize).sum());
        work.reserve(list.len());
        for asked in list {
            work.push(work_request(asked, pieces));
        }
        for at in 1..work.len() {
            let next = work.as_mut_ptr().add(at);
            work[at - 1].next = next;
        }
        let mut bad = std::ptr::null_mut();
        let posted = ibv_post_send(queue_pair, work.as_mut_ptr(), &raw mut bad);
        match check("ibv_post_send", posted, failure) {
            Ok(()) => 0,
            Err(errno) => {
                let at = if bad.is_null() { 0 } else { bad.offset_from(work.as_ptr()) };
                *failed_at = u32::try_from(at).unwrap_or(0);
                errno
            }
        }
    }
}

/// # Safety
/// The work's pieces are there, and `pieces` has room for them.
unsafe fn work_request(asked: &Work, pieces: &mut Vec<ibv_sge>) -> ibv_send_wr {
    let start = pieces.len();
    let given: &[Piece] = match asked.piece_count {
        0 => &[],
        // SAFETY: the caller says so.
        count => unsafe { std::slice::from_raw_parts(asked.pieces, count as usize) },
    };
    pieces.extend(given.iter().map(|piece| ibv_sge {
        addr: piece.address,
        length: piece.len_bytes,
        lkey: piece.key,
    }));
    // SAFETY: numbers, pointers and unions of them.
    let mut request: ibv_send_wr = unsafe { zeroed() };
    request.wr_id = asked.id;
    // SAFETY: inside of what was reserved.
    request.sg_list = unsafe { pieces.as_mut_ptr().add(start) };
    request.num_sge = i32::try_from(given.len()).unwrap_or(0);
    request.opcode = match asked.kind {
        WORK_READ => op::IBV_WR_RDMA_READ,
        WORK_WRITE => op::IBV_WR_RDMA_WRITE,
        WORK_WRITE_TOLD => op::IBV_WR_RDMA_WRITE_WITH_IMM,
        _ => op::IBV_WR_SEND,
    };
    for (asked_for, flag) in [
        (FLAG_SIGNALED, flags::IBV_SEND_SIGNALED),
        (FLAG_INLINE, flags::IBV_SEND_INLINE),
        (FLAG_FENCE, flags::IBV_SEND_FENCE),
    ] {
        if asked.flags & asked_for != 0 {
            request.send_flags |= flag.0;
        }
    }
    request.imm_data_invalidated_rkey_union =
        imm_data_invalidated_rkey_union_t { imm_data: asked.immediate.to_be() };
    request.wr.rdma = rdma_t { remote_addr: asked.remote_address, rkey: asked.remote_key };
    request
}
