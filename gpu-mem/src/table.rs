//! The table of the CUDA driver's functions, looked up once in a library found at run time. Not what they are called
//! with: the files that own contexts, memory and streams call them. Invariant: a required function is present, an
//! optional one is `Some` only where the library has it, and a result is a plain integer.
//!
//! unsafe: looks up C functions by name and gives them their types.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::Unavailable;
use crate::failure::{Failed, SUCCESS};
use crate::system::System;

/// A context, stream or event, as the number that it is: the driver's pointer, which nobody here follows.
pub(crate) type Opaque = usize;
/// `CUdeviceptr`: an address in the unified address space that processors need not be able to follow.
pub(crate) type Address = c_ulonglong;
/// `CUmemGenericAllocationHandle`.
pub(crate) type Allocation = c_ulonglong;

/// Looks up one symbol. `None` if the library has no such function.
///
/// # Safety
/// A libcuda is present, and `F` is the C prototype of `name`, a NUL-terminated name.
pub(crate) unsafe fn symbol<F: Copy>(name: &CStr) -> Option<F> {
    // SAFETY: the caller vouches for the library's presence (cudarc panics otherwise) and for the type. The
    // library stays loaded for the life of the process, so a function pointer copied out of it stays good.
    unsafe { sys::culib().get::<F>(name.to_bytes_with_nul()) }.ok().map(|symbol| *symbol)
}

/// Whether there is a libcuda on the loader's path; loads it.
pub(crate) fn is_library_present() -> bool {
    // SAFETY: opens libcuda by its name, which runs its initialisers; whoever installs a library of that name on the
    // loader's path vouches for it.
    unsafe { sys::is_culib_present() }
}

/// A libcuda without a function that is needed.
pub(crate) fn missing_function(name: &str) -> Unavailable {
    Unavailable {
        what: "GPU".into(),
        why: format!("the libcuda found has no function {name}"),
        remedy:
            "install a complete NVIDIA driver (570 or newer); a libcuda.so of another origin may be first on \
                 LD_LIBRARY_PATH"
                .into(),
    }
}

/// Declares the table: each name with its prototype as in cuda.h, opaque handles as integers.
macro_rules! calls {
    (
        required { $($field:ident = $name:literal ($($arg:ty),*);)* }
        optional { $($may:ident = $may_name:literal ($($may_arg:ty),*);)* }
    ) => {
        /// The driver's functions.
        pub(crate) struct Calls {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
            $(pub(crate) $may: Option<unsafe extern "C" fn($($may_arg),*) -> c_int>,)*
        }

        impl Calls {
            /// Looks all of them up. A libcuda must be present.
            fn look_up() -> Result<Self, Unavailable> {
                Ok(Self {
                    $(
                        // SAFETY: the library is present, and the type is the prototype of cuda.h for this name.
                        $field: unsafe { symbol($name) }
                            .ok_or_else(|| missing_function(&$name.to_string_lossy()))?,
                    )*
                    // SAFETY: as above.
                    $($may: unsafe { symbol($may_name) },)*
                })
            }
        }
    };
}

calls! {
    required {
        device_get = c"cuDeviceGet" (*mut c_int, c_int);
        primary_retain = c"cuDevicePrimaryCtxRetain" (*mut Opaque, c_int);
        primary_release = c"cuDevicePrimaryCtxRelease_v2" (c_int);
        push_current = c"cuCtxPushCurrent_v2" (Opaque);
        pop_current = c"cuCtxPopCurrent_v2" (*mut Opaque);
        memory_info = c"cuMemGetInfo_v2" (*mut usize, *mut usize);
        granularity = c"cuMemGetAllocationGranularity" (*mut usize, *const sys::CUmemAllocationProp, c_uint);
        address_reserve = c"cuMemAddressReserve" (*mut Address, usize, usize, Address, c_ulonglong);
        address_free = c"cuMemAddressFree" (Address, usize);
        create = c"cuMemCreate" (*mut Allocation, usize, *const sys::CUmemAllocationProp, c_ulonglong);
        release = c"cuMemRelease" (Allocation);
        map = c"cuMemMap" (Address, usize, usize, Allocation, c_ulonglong);
        unmap = c"cuMemUnmap" (Address, usize);
        set_access = c"cuMemSetAccess" (Address, usize, *const sys::CUmemAccessDesc, usize);
        export = c"cuMemExportToShareableHandle" (*mut c_int, Allocation, c_uint, c_ulonglong);
        import = c"cuMemImportFromShareableHandle" (*mut Allocation, *mut c_void, c_uint);
        host_alloc = c"cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
        host_free = c"cuMemFreeHost" (*mut c_void);
        host_register = c"cuMemHostRegister_v2" (*mut c_void, usize, c_uint);
        host_unregister = c"cuMemHostUnregister" (*mut c_void);
        copy_to_device = c"cuMemcpyHtoDAsync_v2" (Address, *const c_void, usize, Opaque);
        copy_to_host = c"cuMemcpyDtoHAsync_v2" (*mut c_void, Address, usize, Opaque);
        copy_on_device = c"cuMemcpyDtoDAsync_v2" (Address, Address, usize, Opaque);
        copy_to_peer = c"cuMemcpyPeerAsync" (Address, Opaque, Address, Opaque, usize, Opaque);
        stream_create = c"cuStreamCreate" (*mut Opaque, c_uint);
        stream_destroy = c"cuStreamDestroy_v2" (Opaque);
        stream_synchronize = c"cuStreamSynchronize" (Opaque);
        stream_query = c"cuStreamQuery" (Opaque);
        stream_wait_event = c"cuStreamWaitEvent" (Opaque, Opaque, c_uint);
        stream_context = c"cuStreamGetCtx" (Opaque, *mut Opaque);
        event_create = c"cuEventCreate" (*mut Opaque, c_uint);
        event_record = c"cuEventRecord" (Opaque, Opaque);
        event_query = c"cuEventQuery" (Opaque);
        event_synchronize = c"cuEventSynchronize" (Opaque);
        event_destroy = c"cuEventDestroy_v2" (Opaque);
        pointer_attributes = c"cuPointerGetAttributes" (c_uint, *mut c_uint, *mut *mut c_void, Address);
    }
    optional {
        // Absent from nothing in use, but a reason must not depend on it.
        error_text = c"cuGetErrorString" (c_int, *mut *const c_char);
        // The form of CUDA 12.8, which later drivers keep under this name.
        copy_batch = c"cuMemcpyBatchAsync" (
            *mut Address, *mut Address, *mut usize, usize, *mut sys::CUmemcpyAttributes, *mut usize, usize,
            *mut usize, Opaque
        );
        range_handle = c"cuMemGetHandleForAddressRange" (*mut c_int, Address, usize, c_uint, c_ulonglong);
        flush_writes = c"cuFlushGPUDirectRDMAWrites" (c_uint, c_uint);
        // Absent from no driver; kernels are, where any of them is.
        module_load = c"cuModuleLoadData" (*mut Opaque, *const c_void);
        module_unload = c"cuModuleUnload" (Opaque);
        module_function = c"cuModuleGetFunction" (*mut Opaque, Opaque, *const c_char);
        launch = c"cuLaunchKernel" (
            Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut *mut c_void,
            *mut *mut c_void
        );
        event_elapsed = c"cuEventElapsedTime_v2" (*mut f32, Opaque, Opaque);
        host_address = c"cuMemHostGetDevicePointer_v2" (*mut Address, *mut c_void, c_uint);
        stream_is_capturing = c"cuStreamIsCapturing" (Opaque, *mut c_uint);
    }
}

/// What these structures measure in cuda.h on a 64-bit machine.
const _: () = {
    assert!(size_of::<sys::CUmemAllocationProp>() == 32);
    assert!(size_of::<sys::CUmemAccessDesc>() == 12);
    assert!(size_of::<sys::CUmemcpyAttributes>() == 24);
    assert!(size_of::<Opaque>() == size_of::<*mut c_void>());
};

impl Calls {
    /// The one table of this process.
    pub(crate) fn get() -> Result<&'static Self, Unavailable> {
        static TABLE: OnceLock<Calls> = OnceLock::new();
        if let Some(calls) = TABLE.get() {
            return Ok(calls);
        }
        if !is_library_present() {
            return Err(System::look().missing_libcuda());
        }
        let calls = Self::look_up()?;
        Ok(TABLE.get_or_init(|| calls))
    }

    /// Success, or the failure with the driver's words.
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), Failed> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(Failed { call, code, text: error_text(self.error_text, code) })
    }
}

/// The driver's words for a code; empty if it has none.
pub(crate) fn error_text(
    function: Option<unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int>,
    code: c_int,
) -> String {
    let mut text: *const c_char = std::ptr::null();
    if let Some(function) = function {
        // SAFETY: `text` is a writable pointer; for a code that it does not know the call leaves or makes it null.
        let _ = unsafe { function(code, &raw mut text) };
    }
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the driver returns a NUL-terminated string of its own, valid for the life of the library.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
