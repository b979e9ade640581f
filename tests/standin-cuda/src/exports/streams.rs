//! The C functions about streams, events and host functions. Not their order (`stream`, `event`). Invariant: the handle 0,
//! and `CU_STREAM_LEGACY`, is the legacy default stream of the current context.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use crate::abi::{EVENT_DISABLE_TIMING, EVENT_FLAGS, Handle, IpcEventHandle, STREAM_NON_BLOCKING};
use crate::code::{Code, Outcome};
use crate::device;
use crate::driver::Driver;
use crate::event::Event;
use crate::pointers::{HostPtr, Out};
use crate::run::{HostCall, Work};
use crate::stream::Stream;

export! {
    fn cuStreamCreate(stream: Out<Handle>, flags: c_uint) |driver| {
        create(driver, stream, flags)
    }

    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: c_uint, priority: c_int) |driver| {
        // Every stream has a thread of its own; none goes before another.
        let _ = priority;
        create(driver, stream, flags)
    }

    fn cuStreamDestroy_v2(stream: Handle) |driver| {
        let stream = driver.streams.remove(stream)?;
        stream.device().drain(stream.position());
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) |driver| {
        find_or_failed(driver, stream)?.synchronize()
    }

    fn cuStreamQuery(stream: Handle) |driver| {
        let stream = find(driver, stream)?;
        if stream.position().is_reached() { stream.device().check() } else { Err(Code::NOT_READY) }
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) |driver| {
        let (stream, event) = (find(driver, stream)?, driver.events.get(event)?);
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let latest = event.latest();
        stream.submit(driver, Work::Until(event, latest))
    }

    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) |driver| {
        context.put(find(driver, stream)?.device().context_handle())
    }

    fn cuLaunchHostFunc(
        stream: Handle,
        function: Option<extern "C" fn(*mut c_void)>,
        argument: *mut c_void,
    ) |driver| {
        let stream = find(driver, stream)?;
        let function = function.ok_or(Code::INVALID_VALUE)?;
        stream.submit(driver, Work::Call(HostCall { function, argument }))
    }

    fn cuEventCreate(event: Out<Handle>, flags: c_uint) |driver| {
        let device = device::current(driver)?;
        // Interprocess events have to be without timing.
        if flags & !EVENT_FLAGS != 0 || flags & (4 | EVENT_DISABLE_TIMING) == 4 {
            return Err(Code::INVALID_VALUE);
        }
        let is_timed = flags & EVENT_DISABLE_TIMING == 0;
        event.put(driver.events.add(Arc::new(Event::new(device.ordinal, is_timed))))
    }

    fn cuEventRecord(event: Handle, stream: Handle) |driver| {
        let (event, stream) = (driver.events.get(event)?, find(driver, stream)?);
        if event.device != stream.device().ordinal {
            return Err(Code::INVALID_HANDLE);
        }
        let record = event.record();
        let submitted = stream.submit(driver, Work::Record(Arc::clone(&event), record));
        if submitted.is_err() {
            // Nobody must wait for a record that no stream will reach.
            event.reach(record);
        }
        submitted
    }

    fn cuEventQuery(event: Handle) |driver| {
        let event = driver.events.get(event)?;
        driver.devices.get(event.device).ok_or(Code::INVALID_HANDLE)?.check()?;
        if event.is_complete() { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuEventSynchronize(event: Handle) |driver| {
        let event = driver.events.get(event)?;
        event.wait(event.latest());
        driver.devices.get(event.device).ok_or(Code::INVALID_HANDLE)?.check()
    }

    fn cuEventDestroy_v2(event: Handle) |driver| {
        driver.events.remove(event).map(drop)
    }

    fn cuEventElapsedTime(elapsed_ms: Out<f32>, start: Handle, end: Handle) |driver| {
        let (start, end) = (driver.events.get(start)?, driver.events.get(end)?);
        elapsed_ms.put(start.elapsed_ms(&end)?)
    }

    fn cuEventElapsedTime_v2(elapsed_ms: Out<f32>, start: Handle, end: Handle) |driver| {
        let (start, end) = (driver.events.get(start)?, driver.events.get(end)?);
        elapsed_ms.put(start.elapsed_ms(&end)?)
    }

    fn cuIpcGetEventHandle(handle: HostPtr, event: Handle) |driver| {
        let (_, _) = (handle, driver.events.get(event)?);
        Err(Code::NOT_SUPPORTED)
    }

    fn cuIpcOpenEventHandle(event: HostPtr, handle: IpcEventHandle) |driver| {
        let (_, _, _) = (driver, event, handle.reserved);
        Err(Code::NOT_SUPPORTED)
    }
}

fn create(driver: &'static Driver, stream: Out<Handle>, flags: c_uint) -> Outcome {
    let device = device::current(driver)?;
    if flags & !STREAM_NON_BLOCKING != 0 {
        return Err(Code::INVALID_VALUE);
    }
    let blocking = flags & STREAM_NON_BLOCKING == 0;
    let started = Stream::start(device, blocking)?;
    stream.put(driver.streams.add(Arc::new(started)))
}

/// The stream of a handle.
///
/// # Errors
/// `INVALID_HANDLE`, and the error that the context is in.
pub(crate) fn find(driver: &'static Driver, stream: Handle) -> Outcome<Arc<Stream>> {
    let stream = find_or_failed(driver, stream)?;
    stream.device().check()?;
    Ok(stream)
}

fn find_or_failed(driver: &'static Driver, stream: Handle) -> Outcome<Arc<Stream>> {
    match stream {
        Handle(0 | 1) => device::current_or_failed(driver)?.null_stream(),
        _ => driver.streams.get(stream),
    }
}
