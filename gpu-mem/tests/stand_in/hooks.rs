//! What the stand-in tells tests beyond cuda.h, and driver calls that a framework in the same process would make. Not the
//! store's own calls. Invariant: the library asked is the one that the store has loaded.
//!
//! unsafe: calls C functions that were looked up by name.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint};

use libloading::Library;

fn library() -> Library {
    // SAFETY: the loader gives the library that is loaded already under this name.
    unsafe { Library::new("libcuda.so.1") }.expect("a driver is loaded")
}

/// A function of the driver.
///
/// # Safety
/// `F` is its C prototype.
pub(crate) unsafe fn function<F: Copy>(name: &CStr) -> F {
    let library = library();
    // SAFETY: the caller's promise; the store keeps the library loaded.
    *unsafe { library.get::<F>(name.to_bytes_with_nul()) }.expect("the driver has it")
}

/// How often a function was called in this process; none on a real driver.
pub(crate) fn calls(name: &str) -> Option<u64> {
    let library = library();
    let name = CString::new(name).expect("a name");
    // SAFETY: the prototype of the stand-in's hook, which only reads the name.
    let hook =
        unsafe { library.get::<extern "C" fn(*const c_char) -> u64>(b"hetmem_standin_calls\0") }.ok()?;
    Some(hook(name.as_ptr()))
}

/// How many objects of this process the stand-in still has; none on a real driver.
pub(crate) fn live() -> Option<u64> {
    let library = library();
    // SAFETY: the prototype of the stand-in's hook.
    let hook = unsafe { library.get::<extern "C" fn() -> u64>(b"hetmem_standin_live\0") }.ok()?;
    Some(hook())
}

/// Asserts that nothing of this process is left in the driver.
pub(crate) fn assert_nothing_left(after: &str) {
    if let Some(live) = live() {
        assert_eq!(live, 0, "left after {after}");
    }
}

/// The current context of this thread, as a number; 0 if there is none.
pub(crate) fn current_context() -> usize {
    // SAFETY: the prototype of cuda.h.
    let get: unsafe extern "C" fn(*mut usize) -> c_int = unsafe { function(c"cuCtxGetCurrent") };
    let mut context = 0_usize;
    // SAFETY: a writable pointer-sized place.
    assert_eq!(unsafe { get(&raw mut context) }, 0);
    context
}

/// A primary context that a framework has made current for this thread, with memory and a stream of its own.
pub(crate) struct Framework {
    device: c_int,
    pub(crate) stream: usize,
    memory: u64,
}

impl Framework {
    pub(crate) fn start(ordinal: u16, len: usize) -> Self {
        let device = c_int::from(ordinal);
        let (mut context, mut stream, mut memory) = (0_usize, 0_usize, 0_u64);
        // SAFETY: the prototypes of cuda.h, writable places, handles that these calls have made.
        unsafe {
            let retain: unsafe extern "C" fn(*mut usize, c_int) -> c_int =
                function(c"cuDevicePrimaryCtxRetain");
            let set: unsafe extern "C" fn(usize) -> c_int = function(c"cuCtxSetCurrent");
            let create: unsafe extern "C" fn(*mut usize, c_uint) -> c_int = function(c"cuStreamCreate");
            let allocate: unsafe extern "C" fn(*mut u64, usize) -> c_int = function(c"cuMemAlloc_v2");
            assert_eq!(retain(&raw mut context, device), 0);
            assert_eq!(set(context), 0);
            assert_eq!(create(&raw mut stream, 1), 0);
            assert_eq!(allocate(&raw mut memory, len), 0);
        }
        Self { device, stream, memory }
    }

    /// The address of its memory.
    pub(crate) fn address(&self) -> u64 {
        self.memory
    }

    /// Sets its bytes, on its stream; nothing waits for it.
    pub(crate) fn set(&self, byte: u8, len: usize) {
        // SAFETY: the prototype of cuda.h; memory and stream of this framework, which live until it is dropped.
        unsafe {
            let set: unsafe extern "C" fn(u64, u8, usize, usize) -> c_int = function(c"cuMemsetD8Async");
            assert_eq!(set(self.memory, byte, len, self.stream), 0);
        }
    }

    /// Its bytes, after its stream's work.
    pub(crate) fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: the prototypes of cuda.h; memory of this framework, and as many bytes to write as said.
        unsafe {
            let wait: unsafe extern "C" fn(usize) -> c_int = function(c"cuStreamSynchronize");
            let copy: unsafe extern "C" fn(*mut u8, u64, usize) -> c_int = function(c"cuMemcpyDtoH_v2");
            assert_eq!(wait(self.stream), 0);
            assert_eq!(copy(bytes.as_mut_ptr(), self.memory, len), 0);
        }
        bytes
    }
}

impl Drop for Framework {
    fn drop(&mut self) {
        // SAFETY: the prototypes of cuda.h; what `start` has made, ended once, with nothing under way.
        unsafe {
            let free: unsafe extern "C" fn(u64) -> c_int = function(c"cuMemFree_v2");
            let destroy: unsafe extern "C" fn(usize) -> c_int = function(c"cuStreamDestroy_v2");
            let set: unsafe extern "C" fn(usize) -> c_int = function(c"cuCtxSetCurrent");
            let release: unsafe extern "C" fn(c_int) -> c_int = function(c"cuDevicePrimaryCtxRelease_v2");
            assert_eq!(destroy(self.stream), 0);
            assert_eq!(free(self.memory), 0);
            assert_eq!(set(0), 0);
            assert_eq!(release(self.device), 0);
        }
    }
}
