//! The store's kernels on one device: PTX loaded when first needed, and launches. Not what a launch reads and writes, which
//! its caller answers for. Invariant: a module is loaded at most once in a context and unloaded before the context is
//! released; one that cannot be loaded stays an absence with its reason, and nobody asks the driver again.
//!
//! unsafe: calls the driver's functions for modules and launches.
#![allow(unsafe_code)]

use std::ffi::{CString, c_uint, c_void};
use std::sync::OnceLock;

use hetmem_kernels::cast::{self, Cast};
use hetmem_kernels::checksum::{self, parts};
use hetmem_kernels::ptx::{self, Module};
use hetmem_kernels::{moves, sum};

use crate::Unavailable;
use crate::context::{Context, Entered};
use crate::failure::Failed;
use crate::table::{Calls, Opaque};

/// What a kernel is launched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Many copies.
    Gather,
    /// Block values of many objects.
    Checksum,
    /// A conversion.
    Cast(Cast),
    /// The yardstick of the benches.
    Sum,
}

impl Kernel {
    fn module(self) -> Module {
        match self {
            Self::Gather => ptx::GATHER,
            Self::Checksum => ptx::CHECKSUM,
            Self::Cast(_) => ptx::CAST,
            Self::Sum => ptx::SUM,
        }
    }

    fn entry(self) -> &'static str {
        match self {
            Self::Gather => moves::GATHER,
            Self::Checksum => checksum::CHECKSUM,
            Self::Cast(cast) => cast.kernel(),
            Self::Sum => sum::SUM,
        }
    }

    /// Threads of a block, as the kernel is written for.
    fn threads(self) -> c_uint {
        match self {
            Self::Gather => moves::THREADS,
            Self::Checksum => parts::THREADS,
            Self::Cast(_) => cast::THREADS,
            Self::Sum => sum::THREADS,
        }
    }
}

/// The modules of a context, in the order of `ptx::MODULES`.
#[derive(Default)]
pub(crate) struct Kernels {
    modules: [OnceLock<Result<Loaded, Unavailable>>; ptx::MODULES.len()],
}

/// A module in the driver, with the handles of its kernels.
struct Loaded {
    module: Opaque,
    functions: Vec<(&'static str, Opaque)>,
}

/// A kernel that can be launched in the context that it was asked of, while that lives.
#[derive(Clone, Copy)]
pub(crate) struct Ready {
    kernel: Kernel,
    function: Opaque,
}

impl Context {
    /// A kernel, loaded if it is not yet.
    pub(crate) fn kernel(&self, kernel: Kernel) -> Result<Ready, Unavailable> {
        let wanted = kernel.module();
        let places = ptx::MODULES.iter().zip(&self.kernels().modules);
        let place = places.into_iter().find(|(module, _)| module.name == wanted.name).map(|(_, place)| place);
        let Some(loaded) = place.map(|place| place.get_or_init(|| self.load(&wanted))) else {
            return Err(no_such(kernel.entry()));
        };
        let mut functions = loaded.as_ref().map_err(Clone::clone)?.functions.iter();
        let found = functions.find(|(name, _)| *name == kernel.entry());
        let function = found.map(|(_, function)| *function).ok_or_else(|| no_such(kernel.entry()))?;
        Ok(Ready { kernel, function })
    }

    fn load(&self, wanted: &Module) -> Result<Loaded, Unavailable> {
        let absent = |failed: Failed| absence(wanted.name, &failed);
        let entered = self.enter().map_err(absent)?;
        let calls = entered.calls();
        let (Some(load), Some(function)) = (calls.module_load, calls.module_function) else {
            return Err(missing(wanted.name));
        };
        let Ok(text) = CString::new(wanted.text) else {
            return Err(no_such(wanted.name));
        };
        let mut loaded = Loaded { module: 0, functions: Vec::new() };
        // SAFETY: a writable place, and a text that ends in NUL and lives for the length of the call; a context is current.
        let code = unsafe { load(&raw mut loaded.module, text.as_ptr().cast::<c_void>()) };
        calls.check("cuModuleLoadData", code).map_err(absent)?;
        for entry in wanted.entries {
            let mut handle: Opaque = 0;
            let found = CString::new(*entry).map(|name| {
                // SAFETY: as above; the module was just loaded.
                let code = unsafe { function(&raw mut handle, loaded.module, name.as_ptr()) };
                calls.check("cuModuleGetFunction", code)
            });
            if let Ok(Err(failed)) = found {
                loaded.unload(calls);
                return Err(absent(failed));
            }
            loaded.functions.push((entry, handle));
        }
        Ok(loaded)
    }
}

/// Said where the tables of modules and kernels disagree, which their tests rule out.
fn no_such(name: &str) -> Unavailable {
    Unavailable {
        what: format!("GPU kernel {name}").into(),
        why: "this build has no such kernel".to_owned(),
        remedy: "build it anew from unchanged sources".into(),
    }
}

fn absence(name: &str, failed: &Failed) -> Unavailable {
    Unavailable {
        what: format!("GPU kernel {name}").into(),
        why: failed.reason(),
        remedy: "update the NVIDIA driver to 580 or newer, which takes the PTX of CUDA 13.0; until then the driver \
                 copies one by one, and the processor converts and compares"
            .into(),
    }
}

fn missing(name: &str) -> Unavailable {
    Unavailable {
        what: format!("GPU kernel {name}").into(),
        why: "the libcuda found has no functions for modules and launches".to_owned(),
        remedy: "install a complete NVIDIA driver".into(),
    }
}

impl Loaded {
    fn unload(&self, calls: &Calls) {
        if let Some(unload) = calls.module_unload {
            // SAFETY: loaded once, unloaded once, in the context that is current.
            let _ = unsafe { unload(self.module) };
        }
    }
}

impl Kernels {
    /// Unloads all, in their context, which is current. No launch is under way: streams hold the context.
    pub(crate) fn unload(&mut self, calls: &Calls) {
        for module in &mut self.modules {
            if let Some(Ok(loaded)) = module.take() {
                loaded.unload(calls);
            }
        }
    }
}

/// Starts a kernel on a stream of the entered context.
///
/// # Safety
/// The parameters are those of the kernel; all memory that they lead to is reached by the device and held by the caller
/// until the stream is past the kernel or its context is lost; `ready` is of the entered context, of which `stream` is a
/// living stream.
pub(crate) unsafe fn launch(
    entered: &Entered<'_>,
    stream: Opaque,
    ready: Ready,
    blocks: u32,
    mut parameters: [u64; 3],
) -> Result<(), Failed> {
    const CALL: &str = "cuLaunchKernel";
    let calls = entered.calls();
    let Some(launch) = calls.launch else {
        return Err(Failed { call: CALL, code: crate::failure::NOT_SUPPORTED, text: String::new() });
    };
    // As many as the kernel has are read: at most three.
    let mut pointers = parameters.each_mut().map(|parameter| (&raw mut *parameter).cast::<c_void>());
    let threads = ready.kernel.threads();
    // SAFETY: the driver reads the parameters before it returns; for the rest, the caller's promise.
    let code = unsafe {
        launch(
            ready.function,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            0,
            stream,
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    calls.check(CALL, code)
}
