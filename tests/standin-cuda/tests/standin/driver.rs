//! The library's functions for tests, as methods. unsafe: calls C functions, and touches memory by address. Not a binding
//! for programs. Invariant: prototypes are those of cuda.h; addresses are those of memory that the test keeps.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use libloading::Library;

use crate::library;

pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const NOT_INITIALIZED: i32 = 3;
pub(crate) const NO_DEVICE: i32 = 100;
pub(crate) const INVALID_CONTEXT: i32 = 201;
pub(crate) const PEER_UNSUPPORTED: i32 = 217;
pub(crate) const INVALID_HANDLE: i32 = 400;
pub(crate) const NOT_FOUND: i32 = 500;
pub(crate) const NOT_READY: i32 = 600;
pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const ALREADY_REGISTERED: i32 = 712;
pub(crate) const NOT_REGISTERED: i32 = 713;
pub(crate) const NOT_PERMITTED: i32 = 800;
pub(crate) const NOT_SUPPORTED: i32 = 801;

pub(crate) const GRANULE: usize = 2 << 20;

pub(crate) type Given<T = ()> = Result<T, i32>;
/// A function for `cuLaunchHostFunc`.
pub(crate) type HostFunction = extern "C" fn(*mut c_void);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prop {
    pub(crate) kind: i32,
    pub(crate) handle_types: i32,
    pub(crate) location: Location,
    pub(crate) win32: usize,
    pub(crate) compression: u8,
    pub(crate) rdma: u8,
    pub(crate) usage: u16,
    pub(crate) reserved: [u8; 4],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub(crate) location: Location,
    pub(crate) flags: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BatchAttributes {
    pub(crate) order: i32,
    pub(crate) source: Location,
    pub(crate) target: Location,
    pub(crate) flags: u32,
}

/// Properties of memory of device 0 for descriptors and NICs.
pub(crate) fn prop() -> Prop {
    Prop { kind: 1, handle_types: 1, location: Location { kind: 1, id: 0 }, rdma: 1, ..Prop::default() }
}

/// Opens the library by its path and keeps it.
pub(crate) fn open() -> &'static Driver {
    // SAFETY: the library's initialisers do nothing but what Rust's do.
    let library = unsafe { Library::new(library::path()) }.expect("the library opens");
    Box::leak(Box::new(Driver { library }))
}

/// The same by the name that programs look for; none if the loader finds no library of that name.
pub(crate) fn open_by_name() -> Option<&'static Driver> {
    // SAFETY: as above; no test runs where a real driver is asked for by this name before the stand-in is open.
    let library = unsafe { Library::new("libcuda.so.1") }.ok()?;
    Some(Box::leak(Box::new(Driver { library })))
}

/// The same as `open`, after `cuInit`, with the context of device 0 current.
pub(crate) fn start() -> &'static Driver {
    let driver = open();
    driver.init(0).expect("cuInit");
    driver.use_device(0);
    driver
}

pub(crate) struct Driver {
    library: Library,
}

macro_rules! calls {
    ($(fn $method:ident = $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        impl Driver { $(
            #[allow(clippy::too_many_arguments)]
            pub(crate) fn $method(&self, $($arg: $type),*) -> Given {
                // SAFETY: the prototype is that of cuda.h; references and addresses are of memory that the test keeps.
                let code = unsafe {
                    let name = concat!(stringify!($name), "\0").as_bytes();
                    let function = self.library.get::<unsafe extern "C" fn($($type),*) -> i32>(name);
                    function.expect("the library has the function")($($arg),*)
                };
                if code == 0 { Ok(()) } else { Err(code) }
            }
        )* }
    };
}

calls! {
    fn init = cuInit(flags: u32);
    fn device_count = cuDeviceGetCount(count: &mut i32);
    fn name_into = cuDeviceGetName(name: &mut [u8; 64], len: i32, device: i32);
    fn uuid = cuDeviceGetUuid_v2(uuid: &mut [u8; 16], device: i32);
    fn attribute_into = cuDeviceGetAttribute(value: &mut i32, attribute: i32, device: i32);
    fn can_access_peer = cuDeviceCanAccessPeer(can: &mut i32, device: i32, peer: i32);
    fn error_name = cuGetErrorName(code: i32, name: &mut *const c_char);
    fn retain_context = cuDevicePrimaryCtxRetain(context: &mut usize, device: i32);
    fn release_context = cuDevicePrimaryCtxRelease_v2(device: i32);
    fn set_current = cuCtxSetCurrent(context: usize);
    fn pop_current = cuCtxPopCurrent_v2(context: &mut usize);
    fn push_current = cuCtxPushCurrent_v2(context: usize);
    fn enable_peer = cuCtxEnablePeerAccess(context: usize, flags: u32);
    fn synchronize = cuCtxSynchronize();
    fn info = cuMemGetInfo_v2(free: &mut usize, total: &mut usize);
    fn alloc_into = cuMemAlloc_v2(pointer: &mut usize, len: usize);
    fn free = cuMemFree_v2(pointer: usize);
    fn alloc_async = cuMemAllocAsync(pointer: &mut usize, len: usize, stream: usize);
    fn free_async = cuMemFreeAsync(pointer: usize, stream: usize);
    fn host_alloc = cuMemHostAlloc(address: &mut usize, len: usize, flags: u32);
    fn host_free = cuMemFreeHost(address: usize);
    fn host_register = cuMemHostRegister_v2(address: usize, len: usize, flags: u32);
    fn host_unregister = cuMemHostUnregister(address: usize);
    fn host_pointer = cuMemHostGetDevicePointer_v2(pointer: &mut usize, address: usize, flags: u32);
    fn copy = cuMemcpy(target: usize, source: usize, len: usize);
    fn copy_async = cuMemcpyAsync(target: usize, source: usize, len: usize, stream: usize);
    fn h2d = cuMemcpyHtoD_v2(target: usize, source: usize, len: usize);
    fn d2h = cuMemcpyDtoH_v2(target: usize, source: usize, len: usize);
    fn d2d = cuMemcpyDtoD_v2(target: usize, source: usize, len: usize);
    fn h2d_async = cuMemcpyHtoDAsync_v2(target: usize, source: usize, len: usize, stream: usize);
    fn d2h_async = cuMemcpyDtoHAsync_v2(target: usize, source: usize, len: usize, stream: usize);
    fn d2d_async = cuMemcpyDtoDAsync_v2(target: usize, source: usize, len: usize, stream: usize);
    fn peer_async = cuMemcpyPeerAsync(
        target: usize, target_context: usize, source: usize, source_context: usize, len: usize, stream: usize);
    fn batch = cuMemcpyBatchAsync(
        targets: *const usize, sources: *const usize, lens: *const usize, count: usize,
        attributes: *const BatchAttributes, starts: *const usize, attribute_count: usize,
        failed: &mut usize, stream: usize);
    fn set = cuMemsetD8_v2(target: usize, byte: u8, len: usize);
    fn set_async = cuMemsetD8Async(target: usize, byte: u8, len: usize, stream: usize);
    fn stream_into = cuStreamCreate(stream: &mut usize, flags: u32);
    fn stream_destroy = cuStreamDestroy_v2(stream: usize);
    fn stream_synchronize = cuStreamSynchronize(stream: usize);
    fn stream_query = cuStreamQuery(stream: usize);
    fn stream_wait = cuStreamWaitEvent(stream: usize, event: usize, flags: u32);
    fn stream_context = cuStreamGetCtx(stream: usize, context: &mut usize);
    fn launch_host = cuLaunchHostFunc(stream: usize, function: HostFunction, argument: usize);
    fn event_into = cuEventCreate(event: &mut usize, flags: u32);
    fn event_record = cuEventRecord(event: usize, stream: usize);
    fn event_query = cuEventQuery(event: usize);
    fn event_synchronize = cuEventSynchronize(event: usize);
    fn event_destroy = cuEventDestroy_v2(event: usize);
    fn elapsed = cuEventElapsedTime_v2(elapsed_ms: &mut f32, start: usize, end: usize);
    fn reserve_into = cuMemAddressReserve(pointer: &mut usize, len: usize, alignment: usize, hint: usize, flags: u64);
    fn unreserve = cuMemAddressFree(pointer: usize, len: usize);
    fn create_into = cuMemCreate(handle: &mut u64, len: usize, prop: &Prop, flags: u64);
    fn release = cuMemRelease(handle: u64);
    fn map = cuMemMap(pointer: usize, len: usize, offset: usize, handle: u64, flags: u64);
    fn unmap = cuMemUnmap(pointer: usize, len: usize);
    fn set_access = cuMemSetAccess(pointer: usize, len: usize, access: &Access, count: usize);
    fn access_into = cuMemGetAccess(flags: &mut u64, location: &Location, pointer: usize);
    fn export_into = cuMemExportToShareableHandle(descriptor: &mut i32, handle: u64, kind: i32, flags: u64);
    fn import_into = cuMemImportFromShareableHandle(handle: &mut u64, descriptor: usize, kind: i32);
    fn prop_into = cuMemGetAllocationPropertiesFromHandle(prop: &mut Prop, handle: u64);
    fn retain = cuMemRetainAllocationHandle(handle: &mut u64, pointer: usize);
    fn dma_buf_into = cuMemGetHandleForAddressRange(descriptor: &mut i32, pointer: usize, len: usize, kind: i32, flags: u64);
    fn granularity = cuMemGetAllocationGranularity(granularity: &mut usize, prop: &Prop, option: i32);
    fn pointer_ordinal = cuPointerGetAttribute(value: &mut i32, attribute: i32, pointer: usize);
    fn range = cuMemGetAddressRange_v2(base: &mut usize, len: &mut usize, pointer: usize);
    fn flush = cuFlushGPUDirectRDMAWrites(target: i32, scope: i32);
    fn load_module = cuModuleLoadData(module: &mut usize, image: &CStrBytes);
    fn function_into = cuModuleGetFunction(function: &mut usize, module: usize, name: &CStrBytes);
    fn unload_module = cuModuleUnload(module: usize);
    fn launch = cuLaunchKernel(
        function: usize, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32,
        shared: u32, stream: usize, parameters: usize, extra: usize);
}

/// The bytes of a text with its NUL, whose reference is a thin pointer.
pub(crate) type CStrBytes = [u8; 128];

/// A text for C.
pub(crate) fn c(text: &str) -> CStrBytes {
    let mut bytes = [0; 128];
    assert!(text.len() < bytes.len());
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

impl Driver {
    /// Makes the context of a device current on this thread, and gives it.
    pub(crate) fn use_device(&self, device: i32) -> usize {
        let mut context = 0;
        self.retain_context(&mut context, device).expect("a device");
        self.set_current(context).expect("a context");
        context
    }

    pub(crate) fn alloc(&self, len: usize) -> usize {
        let mut pointer = 0;
        self.alloc_into(&mut pointer, len).expect("device memory");
        pointer
    }

    pub(crate) fn stream(&self, flags: u32) -> usize {
        let mut stream = 0;
        self.stream_into(&mut stream, flags).expect("a stream");
        stream
    }

    pub(crate) fn event(&self) -> usize {
        let mut event = 0;
        self.event_into(&mut event, 0).expect("an event");
        event
    }

    pub(crate) fn attribute(&self, attribute: i32) -> i32 {
        let mut value = -1;
        self.attribute_into(&mut value, attribute, 0).expect("an attribute");
        value
    }

    pub(crate) fn create(&self, len: usize) -> u64 {
        let mut handle = 0;
        self.create_into(&mut handle, len, &prop(), 0).expect("a handle");
        handle
    }

    pub(crate) fn reserve(&self, len: usize) -> usize {
        let mut pointer = 0;
        self.reserve_into(&mut pointer, len, 0, 0, 0).expect("addresses");
        pointer
    }

    /// Sets the rights of a device in mapped memory: 0, 1 (read) or 3 (read and write).
    pub(crate) fn grant(&self, pointer: usize, len: usize, device: i32, flags: i32) -> Given {
        self.set_access(pointer, len, &Access { location: Location { kind: 1, id: device }, flags }, 1)
    }

    /// Reserves addresses and maps a whole handle there, readable and writable by device 0.
    pub(crate) fn mapped(&self, handle: u64, len: usize) -> usize {
        let pointer = self.reserve(len);
        self.map(pointer, len, 0, handle, 0).expect("a mapping");
        self.grant(pointer, len, 0, 3).expect("rights");
        pointer
    }

    pub(crate) fn export(&self, handle: u64) -> i32 {
        let mut descriptor = -1;
        self.export_into(&mut descriptor, handle, 1, 0).expect("a descriptor");
        descriptor
    }

    pub(crate) fn import(&self, descriptor: i32) -> Given<u64> {
        let mut handle = 0;
        let descriptor = usize::try_from(descriptor).unwrap_or(usize::MAX);
        self.import_into(&mut handle, descriptor, 1).map(|()| handle)
    }

    pub(crate) fn dma_buf(&self, pointer: usize, len: usize) -> Given<i32> {
        let mut descriptor = -1;
        self.dma_buf_into(&mut descriptor, pointer, len, 1, 0).map(|()| descriptor)
    }

    pub(crate) fn write(&self, pointer: usize, bytes: &[u8]) -> Given {
        self.h2d(pointer, bytes.as_ptr().addr(), bytes.len())
    }

    pub(crate) fn read(&self, pointer: usize, len: usize) -> Given<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.d2h(bytes.as_mut_ptr().expose_provenance(), pointer, len).map(|()| bytes)
    }

    pub(crate) fn free_bytes(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        self.info(&mut free, &mut total).expect("a context");
        free
    }

    pub(crate) fn calls(&self, function: &str) -> u64 {
        // SAFETY: the hook's prototype; the name is a text with its NUL.
        unsafe {
            let hook = self.library.get::<unsafe extern "C" fn(&CStrBytes) -> u64>(b"hetmem_standin_calls\0");
            hook.expect("the hook")(&c(function))
        }
    }

    pub(crate) fn live(&self) -> u64 {
        // SAFETY: the hook's prototype.
        unsafe {
            let hook = self.library.get::<unsafe extern "C" fn() -> u64>(b"hetmem_standin_live\0");
            hook.expect("the hook")()
        }
    }

    pub(crate) fn name_of_code(&self, code: i32) -> Given<String> {
        let mut text = std::ptr::null();
        self.error_name(code, &mut text)?;
        // SAFETY: the call gave a text of static storage.
        Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A descriptor of a memory file or dma-buf as a NIC has it: mapped whole.
pub(crate) struct Nic(usize, usize);

impl Nic {
    pub(crate) fn map(descriptor: &std::os::fd::OwnedFd, len: usize) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free range; it stays until the process ends.
        let start = unsafe { mmap(std::ptr::null_mut(), len, rights, MapFlags::SHARED, descriptor, 0) };
        Self(start.expect("the descriptor can be mapped").expose_provenance(), len)
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.1);
        let target = std::ptr::with_exposed_provenance_mut::<u8>(self.0 + at);
        // SAFETY: inside the mapping, which stays.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.1);
        // SAFETY: inside the mapping, which stays; nothing writes while a test looks.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.0 + at), len) }.to_vec()
    }
}

/// Memory of `cuMemHostAlloc`, as the program sees it.
pub(crate) fn host_bytes(address: usize, len: usize) -> &'static mut [u8] {
    // SAFETY: the test allocated it and frees it after its last use of the slice.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), len) }
}

/// Loads a byte on the CPU.
pub(crate) fn load(address: usize) -> u8 {
    // SAFETY: none can be given: the test is that this faults.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// A descriptor that a call gave.
pub(crate) fn owned(descriptor: i32) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd as _;
    assert!(descriptor >= 0);
    // SAFETY: the call made it for the caller alone.
    unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) }
}
