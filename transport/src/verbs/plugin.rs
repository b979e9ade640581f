//! The plugin as the fabric sees it: found, checked, and its things as values that close themselves in the right order.
//! Not what is done with them (`super`). Invariant: the rules of `abi`; whatever was opened of a thing keeps it open.
//!
//! Holds unsafe code: calls through the plugin's table. Each wrapper owns what it names and closes it once, on drop; that
//! the table does what `abi` says is the plugin's promise.
#![allow(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use hetmem_core::StoreError;

use super::abi;
use super::ladder::Way;
use crate::memory::RegionMemory;

/// What the plugin's file is called.
const PLUGIN_FILE: &str = "libhetmem_verbs.so";

/// The plugin, which stays loaded for as long as the process lives.
#[derive(Clone, Copy)]
pub(super) struct Plugin(&'static abi::Table);

impl Plugin {
    /// Loads the plugin: from `path`, or else from beside this program or from `../lib/hetmem` of that.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing: the plugin, a library that it needs, the version that it should have.
    pub(super) fn load(path: Option<&Path>) -> Result<Self, StoreError> {
        let candidates = path.map_or_else(beside_the_program, |path| vec![path.to_owned()]);
        let Some(found) = candidates.iter().find(|path| path.is_file()) else {
            let places: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
            return Err(absent(format!("its plugin is not installed: no {}", places.join(", no "))));
        };
        // SAFETY: the file is this project's plugin, whose initialisers do nothing, and those of the libraries that it
        // needs, which are the system's.
        let library = unsafe { libloading::Library::new(found) }
            .map_err(|error| absent(format!("{}: {error}", found.display())))?;
        let symbol = format!("{}\0", abi::ENTRY_SYMBOL);
        // SAFETY: the symbol is of this type in every version of the plugin.
        let table = unsafe {
            let entry: libloading::Symbol<'_, abi::Entry> = library
                .get(symbol.as_bytes())
                .map_err(|error| absent(format!("{} is not its plugin: {error}", found.display())))?;
            &*entry()
        };
        let checked = Self::check(table)
            .map_err(|why| absent(format!("{}: {why}; install that of this release", found.display())))?;
        // Its functions are called until the process ends, so it is never unloaded.
        let _ = std::mem::ManuallyDrop::new(library);
        Ok(checked)
    }

    fn check(table: &'static abi::Table) -> Result<Self, String> {
        if table.abi_version != abi::ABI_VERSION {
            return Err(format!("version {}, not {}", table.abi_version, abi::ABI_VERSION));
        }
        if (table.size_bytes as usize) < size_of::<abi::Table>() {
            return Err(format!("a table of {} bytes, not {}", table.size_bytes, size_of::<abi::Table>()));
        }
        Ok(Self(table))
    }

    /// What a test calls from a table of its own.
    #[cfg(test)]
    pub(super) fn table(self) -> &'static abi::Table {
        self.0
    }

    /// A table that is a test's own.
    #[cfg(test)]
    pub(super) fn stand_in(table: &'static abi::Table) -> Self {
        Self(table)
    }

    /// Devices of this machine.
    pub(super) fn devices(self) -> Vec<abi::DeviceLimits> {
        let mut devices = Vec::with_capacity(16);
        // SAFETY: there is room for so many.
        let count = unsafe { (self.0.devices)(devices.as_mut_ptr(), 16) };
        // SAFETY: the plugin has written so many of them.
        unsafe { devices.set_len((count as usize).min(16)) };
        devices
    }
}

fn beside_the_program() -> Vec<PathBuf> {
    let folder = std::env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let folders = folder.into_iter().flat_map(|folder| [folder.clone(), folder.join("../lib/hetmem")]);
    folders.map(|folder| folder.join(PLUGIN_FILE)).collect()
}

fn absent(why: String) -> StoreError {
    StoreError::unavailable("fabric verbs", why)
}

fn nothing_failed() -> abi::Failure {
    abi::Failure { call: [0; 32] }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// The name of a device.
pub(super) fn device_name(limits: &abi::DeviceLimits) -> String {
    text(&limits.name)
}

fn check(errno: i32, failure: &abi::Failure) -> Result<(), StoreError> {
    if errno == 0 {
        return Ok(());
    }
    let why = std::io::Error::from_raw_os_error(errno);
    let hint = match rustix::io::Errno::from_raw_os_error(errno) {
        rustix::io::Errno::NOMEM => {
            "; memory that is registered has to be locked: raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, LimitMEMLOCK=infinity)"
        }
        rustix::io::Errno::NODEV | rustix::io::Errno::NOSYS => {
            "; this machine has no RDMA device, or no rdma_ucm module"
        }
        _ => "",
    };
    Err(StoreError::os(text(&failure.call), format!("{why}{hint}")))
}

fn to_abi(address: SocketAddr) -> abi::Address {
    let mut told = abi::Address { port: address.port(), ..abi::Address::default() };
    match address {
        SocketAddr::V4(address) => {
            told.version = 4;
            told.bytes[..4].copy_from_slice(&address.ip().octets());
        }
        SocketAddr::V6(address) => {
            told.version = 6;
            told.bytes = address.ip().octets();
            told.scope = address.scope_id();
        }
    }
    told
}

fn from_abi(address: &abi::Address) -> SocketAddr {
    if address.version == 6 {
        let ip = Ipv6Addr::from(address.bytes);
        return SocketAddr::V6(SocketAddrV6::new(ip, address.port, 0, address.scope));
    }
    let [a, b, c, d, ..] = address.bytes;
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), address.port)
}

/// Declares a wrapper of a thing of the plugin's that may be used by any thread.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident of $raw:ty { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        pub(super) struct $name {
            table: &'static abi::Table,
            raw: *mut $raw,
            $($field: $type,)*
        }

        // SAFETY: the plugin's functions may be called by any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above; what may not be used by two threads at a time takes `&mut self`.
        unsafe impl Sync for $name {}
    };
}

owned! {
    /// What brings the events of connections.
    Context of abi::Context {}
}
owned! {
    /// A device that connections go through.
    Device of abi::Device { context: Arc<Context> }
}
owned! {
    /// Completions of a device.
    Queue of abi::Queue { _device: Arc<Device> }
}
owned! {
    /// Receive buffers of a device.
    Pool of abi::Pool { _device: Arc<Device> }
}
owned! {
    /// Memory that is registered with a device.
    Registered of abi::Region { _device: Arc<Device>, _memory: Option<Arc<dyn RegionMemory>>, keys: abi::Keys }
}
owned! {
    /// A listener or a connection.
    Connection of abi::Connection { _context: Arc<Context>, pair: Option<(Arc<Queue>, Arc<Pool>)> }
}

impl Context {
    /// # Errors
    /// `Unavailable` where there is no RDMA.
    pub(super) fn open(plugin: Plugin) -> Result<Arc<Self>, StoreError> {
        let (mut raw, mut failure) = (ptr::null_mut(), nothing_failed());
        // SAFETY: there is room for both.
        let errno = unsafe { (plugin.0.context_open)(&raw mut raw, &raw mut failure) };
        check(errno, &failure).map_err(|why| absent(why.to_string()))?;
        Ok(Arc::new(Self { table: plugin.0, raw }))
    }

    /// One more, with events of its own.
    pub(super) fn another(&self) -> Result<Arc<Self>, StoreError> {
        Self::open(Plugin(self.table))
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and its descriptor lives as long.
        unsafe { BorrowedFd::borrow_raw((self.table.context_descriptor)(self.raw)) }
    }

    /// The next event, if there is one. On one thread at a time.
    pub(super) fn event(&self) -> Result<Option<abi::ConnectionEvent>, StoreError> {
        let mut event = std::mem::MaybeUninit::uninit();
        let mut failure = nothing_failed();
        // SAFETY: the context is open, and there is room for both.
        let errno = unsafe { (self.table.context_event)(self.raw, event.as_mut_ptr(), &raw mut failure) };
        check(errno, &failure)?;
        // SAFETY: the plugin has written it.
        let event = unsafe { event.assume_init() };
        Ok((event.kind != abi::EVENT_NONE).then_some(event))
    }

    pub(super) fn listen(
        self: &Arc<Self>,
        at: SocketAddr,
        token: u64,
    ) -> Result<(Connection, SocketAddr), StoreError> {
        let (mut raw, mut failure, mut address) = (ptr::null_mut(), nothing_failed(), to_abi(at));
        // SAFETY: the context is open, and there is room for all.
        let errno =
            unsafe { (self.table.listen)(self.raw, &raw mut address, token, &raw mut raw, &raw mut failure) };
        check(errno, &failure)?;
        Ok((self.own(raw), from_abi(&address)))
    }

    pub(super) fn resolve(
        self: &Arc<Self>,
        to: SocketAddr,
        timeout_ms: u32,
        token: u64,
    ) -> Result<Connection, StoreError> {
        let (mut raw, mut failure, to) = (ptr::null_mut(), nothing_failed(), to_abi(to));
        // SAFETY: the context is open, and there is room for all.
        let errno = unsafe {
            let out = &raw mut raw;
            (self.table.resolve)(
                self.raw,
                ptr::null(),
                &raw const to,
                timeout_ms,
                token,
                out,
                &raw mut failure,
            )
        };
        check(errno, &failure)?;
        Ok(self.own(raw))
    }

    /// The new connection of an event of kind `EVENT_REQUEST`, whose events have this token from now on.
    pub(super) fn requested(self: &Arc<Self>, raw: *mut abi::Connection, token: u64) -> Connection {
        // SAFETY: the plugin has just handed it over.
        unsafe { (self.table.connection_name)(raw, token) };
        self.own(raw)
    }

    /// The devices that have an address of this machine.
    pub(super) fn devices(self: &Arc<Self>) -> Vec<*mut abi::Device> {
        let mut devices = [ptr::null_mut(); 64];
        // SAFETY: the context is open, and there is room for so many.
        let count = unsafe { (self.table.devices_open)(self.raw, devices.as_mut_ptr(), 64) };
        devices[..(count as usize).min(64)].to_vec()
    }

    fn own(self: &Arc<Self>, raw: *mut abi::Connection) -> Connection {
        Connection { table: self.table, raw, _context: Arc::clone(self), pair: None }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything that was opened of it holds an `Arc` of it.
        unsafe { (self.table.context_close)(self.raw) }
    }
}

impl Device {
    /// Where the plugin has it: the same for the same device.
    pub(super) fn raw_of(connection: &Connection) -> Result<*mut abi::Device, StoreError> {
        let (mut raw, mut failure) = (ptr::null_mut(), nothing_failed());
        let context = connection._context.raw;
        // SAFETY: both are open, and there is room for both.
        let errno =
            unsafe { (connection.table.device_of)(context, connection.raw, &raw mut raw, &raw mut failure) };
        check(errno, &failure)?;
        Ok(raw)
    }

    /// One that `raw_of` or `Context::devices` has named, and that has no owner yet.
    pub(super) fn own(context: &Arc<Context>, raw: *mut abi::Device) -> Arc<Self> {
        Arc::new(Self { table: context.table, raw, context: Arc::clone(context) })
    }

    pub(super) fn is(&self, raw: *mut abi::Device) -> bool {
        self.raw == raw
    }

    /// One of its addresses on this machine.
    pub(super) fn address(&self) -> SocketAddr {
        let mut address = abi::Address::default();
        // SAFETY: the device is open, and there is room for an address.
        unsafe { (self.table.device_address)(self.raw, &raw mut address) };
        from_abi(&address)
    }

    pub(super) fn limits(&self) -> Result<abi::DeviceLimits, StoreError> {
        let mut limits = std::mem::MaybeUninit::uninit();
        let mut failure = nothing_failed();
        // SAFETY: the device is open, and there is room for both.
        let errno = unsafe { (self.table.device_limits)(self.raw, limits.as_mut_ptr(), &raw mut failure) };
        check(errno, &failure)?;
        // SAFETY: the plugin has written it.
        Ok(unsafe { limits.assume_init() })
    }

    pub(super) fn queue(self: &Arc<Self>, entries: u32) -> Result<Arc<Queue>, StoreError> {
        let (mut raw, mut failure) = (ptr::null_mut(), nothing_failed());
        // SAFETY: the device is open, and there is room for both.
        let errno = unsafe { (self.table.queue_open)(self.raw, entries, &raw mut raw, &raw mut failure) };
        check(errno, &failure)?;
        Ok(Arc::new(Queue { table: self.table, raw, _device: Arc::clone(self) }))
    }

    pub(super) fn pool(self: &Arc<Self>, buffers: u32) -> Result<Arc<Pool>, StoreError> {
        let (mut raw, mut failure) = (ptr::null_mut(), nothing_failed());
        // SAFETY: the device is open, and there is room for both.
        let errno = unsafe { (self.table.pool_open)(self.raw, buffers, &raw mut raw, &raw mut failure) };
        check(errno, &failure)?;
        Ok(Arc::new(Pool { table: self.table, raw, _device: Arc::clone(self) }))
    }

    /// Registers `len_bytes` bytes of memory from `start` on, in this way.
    pub(super) fn register(
        self: &Arc<Self>,
        memory: &Arc<dyn RegionMemory>,
        (start, len_bytes): (u64, u64),
        way: Way,
        access: u32,
    ) -> Result<Registered, Refusal> {
        let (descriptor, offset) = match way {
            Way::DmaBuf { descriptor, offset } => (descriptor, offset + start),
            Way::Host | Way::Peer => (-1, 0),
        };
        let description = abi::Memory {
            kind: way.kind(),
            descriptor,
            offset,
            address: memory.base() as u64 + start,
            len_bytes,
            access,
            _reserved: 0,
        };
        let (mut raw, mut failure, mut keys) = (ptr::null_mut(), nothing_failed(), abi::Keys::default());
        // SAFETY: the device is open, and there is room for all. The memory stays where it is while the region holds it.
        let errno = unsafe {
            let (out, keys) = (&raw mut raw, &raw mut keys);
            (self.table.region_open)(self.raw, &raw const description, out, keys, &raw mut failure)
        };
        check(errno, &failure).map_err(|why| Refusal { errno, why })?;
        let (device, memory) = (Arc::clone(self), Some(Arc::clone(memory)));
        Ok(Registered { table: self.table, raw, _device: device, _memory: memory, keys })
    }
}

/// Why memory was not registered.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    pub(super) why: StoreError,
}

impl From<Refusal> for StoreError {
    fn from(refusal: Refusal) -> Self {
        refusal.why
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything that was opened of it holds an `Arc` of it.
        unsafe { (self.table.device_close)(self.context.raw, self.raw) }
    }
}

impl Registered {
    pub(super) fn keys(&self) -> abi::Keys {
        self.keys
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: it is closed once, before its device.
        unsafe { (self.table.region_close)(self.raw) }
    }
}

impl Queue {
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the queue is open, and its descriptor lives as long.
        unsafe { BorrowedFd::borrow_raw((self.table.queue_descriptor)(self.raw)) }
    }

    pub(super) fn arm(&self) -> Result<(), StoreError> {
        let mut failure = nothing_failed();
        // SAFETY: the queue is open.
        check(unsafe { (self.table.queue_arm)(self.raw, &raw mut failure) }, &failure)
    }

    /// Takes completions, as many as there is room for, in place of what is there.
    pub(super) fn poll(&self, out: &mut Vec<abi::Completion>) -> Result<(), StoreError> {
        out.clear();
        let room = u32::try_from(out.capacity()).unwrap_or(u32::MAX);
        // SAFETY: the queue is open, and there is room for so many.
        let count = unsafe { (self.table.queue_poll)(self.raw, out.as_mut_ptr(), room) };
        let broken = |_| StoreError::os("ibv_poll_cq", format!("{count}: the completion queue is broken"));
        let count = usize::try_from(count).map_err(broken)?;
        // SAFETY: the plugin has written so many, and no more than there is room for.
        unsafe { out.set_len(count.min(out.capacity())) };
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: connections that use it hold an `Arc` of it.
        unsafe { (self.table.queue_close)(self.raw) }
    }
}

impl Pool {
    /// Posts a receive buffer, which has to be in `memory`. On one thread at a time.
    pub(super) fn post(&self, id: u64, piece: &abi::Piece) -> Result<(), StoreError> {
        let mut failure = nothing_failed();
        // SAFETY: the pool is open; the caller owns the buffer, which is registered.
        let errno = unsafe { (self.table.pool_post)(self.raw, id, ptr::from_ref(piece), &raw mut failure) };
        check(errno, &failure)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: connections that use it hold an `Arc` of it.
        unsafe { (self.table.pool_close)(self.raw) }
    }
}

/// How a queue pair came out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub(super) number: u32,
    pub(super) work_max: u32,
    pub(super) pieces_max: u32,
    pub(super) inline_bytes_max: u32,
}

/// What both ends of a connection say of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Greeting<'a> {
    pub(super) private: &'a [u8],
    pub(super) reads_out: u8,
    pub(super) reads_in: u8,
    /// How often the adapter sends again what is not acknowledged, up to 7.
    pub(super) retries: u8,
    /// The same when the other end has no receive buffer; 7 is for ever.
    pub(super) not_ready_retries: u8,
}

impl<'a> Greeting<'a> {
    /// With all the patience that there is: a peer that has no buffer at the moment will have one, so that is back-pressure
    /// and no failure.
    pub(super) fn new(private: &'a [u8], (reads_out, reads_in): (u8, u8)) -> Self {
        Self { private, reads_out, reads_in, retries: 7, not_ready_retries: 7 }
    }

    fn to_abi(self) -> abi::Handshake {
        abi::Handshake {
            private: self.private.as_ptr(),
            private_len: u32::try_from(self.private.len()).unwrap_or(u32::MAX),
            reads_out: self.reads_out,
            reads_in: self.reads_in,
            retries: self.retries,
            not_ready_retries: self.not_ready_retries,
        }
    }
}

impl Connection {
    pub(super) fn peer(&self) -> SocketAddr {
        let mut address = abi::Address::default();
        // SAFETY: the connection is open, and there is room for an address.
        unsafe { (self.table.peer_of)(self.raw, &raw mut address) };
        from_abi(&address)
    }

    pub(super) fn queue_pair(
        &mut self,
        device: &Arc<Device>,
        queue: &Arc<Queue>,
        pool: &Arc<Pool>,
        asked: Made,
    ) -> Result<Made, StoreError> {
        let mut with = abi::QueuePair {
            queue: queue.raw,
            pool: pool.raw,
            work_max: asked.work_max,
            pieces_max: asked.pieces_max,
            inline_bytes_max: asked.inline_bytes_max,
            number: 0,
        };
        let mut failure = nothing_failed();
        // SAFETY: all are open and of this device, and stay so while this connection holds them.
        let errno =
            unsafe { (self.table.queue_pair_open)(device.raw, self.raw, &raw mut with, &raw mut failure) };
        check(errno, &failure)?;
        self.pair = Some((Arc::clone(queue), Arc::clone(pool)));
        let abi::QueuePair { work_max, pieces_max, inline_bytes_max, number, .. } = with;
        Ok(Made { number, work_max, pieces_max, inline_bytes_max })
    }

    pub(super) fn connect(&mut self, greeting: Greeting<'_>) -> Result<(), StoreError> {
        let (with, mut failure) = (greeting.to_abi(), nothing_failed());
        // SAFETY: the connection is open, and the private data lives beyond the call.
        check(unsafe { (self.table.connect)(self.raw, &raw const with, &raw mut failure) }, &failure)
    }

    pub(super) fn accept(&mut self, greeting: Greeting<'_>) -> Result<(), StoreError> {
        let (with, mut failure) = (greeting.to_abi(), nothing_failed());
        // SAFETY: as for `connect`.
        check(unsafe { (self.table.accept)(self.raw, &raw const with, &raw mut failure) }, &failure)
    }

    /// Refuses it, with private data of at most `PRIVATE_MAX` bytes.
    pub(super) fn reject(&mut self, private: &[u8]) {
        let len = u32::try_from(private.len()).unwrap_or(u32::MAX);
        // SAFETY: the connection is open, and the private data lives beyond the call.
        unsafe { (self.table.reject)(self.raw, private.as_ptr(), len) }
    }

    /// Ends it: all of its work comes back.
    pub(super) fn disconnect(&self) {
        // SAFETY: the connection is open; ending it twice is as well.
        unsafe { (self.table.disconnect)(self.raw) }
    }

    /// Posts work.
    ///
    /// # Safety
    /// The work's pieces are there until the call returns; what they name is registered memory that nobody else writes (for
    /// reads) until its completion, or the connection's end, was seen.
    ///
    /// # Errors
    /// The first that was not posted, and why; those before it were.
    pub(super) unsafe fn post(&mut self, work: &[abi::Work]) -> Result<(), (usize, StoreError)> {
        let (mut failed_at, mut failure) = (0, nothing_failed());
        let count = u32::try_from(work.len()).unwrap_or(u32::MAX);
        // SAFETY: the connection is open; the caller answers for the work.
        let errno = unsafe {
            (self.table.post)(self.raw, work.as_ptr(), count, &raw mut failed_at, &raw mut failure)
        };
        check(errno, &failure).map_err(|why| (failed_at as usize, why))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: it is closed once, before its queue and pool, which it holds.
        unsafe { (self.table.connection_close)(self.raw) }
    }
}
