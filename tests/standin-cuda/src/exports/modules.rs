//! The C functions about modules and kernels. Not their running (`module`). Invariant: a function's handle lives as long as
//! its context; its module may go before it.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use crate::abi::Handle;
use crate::code::{Code, Outcome};
use crate::device;
use crate::driver::Driver;
use crate::exports::streams;
use crate::module::{Grid, Launch, Module};
use crate::pointers::{HostPtr, InParameters, InText, Out};
use crate::run::Work;

export! {
    fn cuModuleLoadData(module: Out<Handle>, image: InText) |driver| {
        load(driver, module, image)
    }

    fn cuModuleLoadDataEx(
        module: Out<Handle>,
        image: InText,
        option_count: c_uint,
        options: HostPtr,
        values: HostPtr,
    ) |driver| {
        // Options tune a compiler that is not here.
        let (_, _, _) = (option_count, options, values);
        load(driver, module, image)
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: InText) |driver| {
        let found = driver.modules.get(module)?.function(&name.get()?)?;
        function.put(driver.functions.add(Arc::new(found)))
    }

    fn cuModuleUnload(module: Handle) |driver| {
        driver.modules.remove(module).map(drop)
    }

    fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_int, function: Handle) |driver| {
        driver.functions.get(function)?;
        match attribute {
            // Threads of a block at most; registers; PTX and binary version.
            0 => value.put(1024),
            4 => value.put(32),
            5 => value.put(90),
            6 => value.put(90),
            1..16 => value.put(0),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        parameters: InParameters,
        extra: HostPtr,
    ) |driver| {
        let (function, stream) = (driver.functions.get(function)?, streams::find(driver, stream)?);
        // A stream of another device than the function's cannot run it.
        if function.device != stream.device().ordinal || extra.address() != 0 {
            return Err(Code::INVALID_HANDLE);
        }
        // cuda.h: without asking for more.
        if shared_bytes > 48 << 10 {
            return Err(Code::INVALID_VALUE);
        }
        let grid = Grid { blocks: [grid_x, grid_y, grid_z], threads: [block_x, block_y, block_z] };
        stream.submit(driver, Work::Launch(Launch::new(&function, grid, parameters)?))
    }
}

fn load(driver: &'static Driver, module: Out<Handle>, image: InText) -> Outcome {
    let device = device::current(driver)?;
    let loaded = Module::load(device.ordinal, image.bytes()?)?;
    module.put(driver.modules.add(Arc::new(loaded)))
}
