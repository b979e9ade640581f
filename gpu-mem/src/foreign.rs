//! Memory and streams of strangers: what a framework in the same process has allocated and is still writing. Not the
//! store's own memory (`stream`). Invariant: an address is copied only if the driver says that it is device memory,
//! at both ends of the range, and whoever gives it keeps it.
//!
//! unsafe: takes addresses and handles that only the caller can vouch for.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};

use hetmem_core::StoreError;

use crate::context::Context;
use crate::copies;
use crate::failure::Failed;
use crate::gpus::lock;
use crate::pinned::Hold;
use crate::span::{Place, Span};
use crate::stream::{EVENT_FLAGS, Held, Stream};
use crate::table::{Address, Opaque};
use crate::{Device, Gpus};

/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE`, `_IS_MANAGED` and `_DEVICE_ORDINAL`.
const ATTRIBUTES: [c_uint; 3] = [2, 8, 9];
/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const TYPE_HOST: c_uint = 1;
const TYPE_DEVICE: c_uint = 2;
/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD` are 1 and 2; 0 is the legacy stream as well.
const SPECIAL_STREAMS: u64 = 2;

/// What the driver knows of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    memory_type: c_uint,
    managed: c_uint,
    ordinal: c_int,
}

/// Asks about an address; zeros where the driver knows nothing of it.
fn look_up(context: &Context, address: Address) -> Result<Known, Failed> {
    let mut known = Known { memory_type: 0, managed: 0, ordinal: -1 };
    let mut attributes = ATTRIBUTES;
    let mut values: [*mut c_void; 3] = [
        (&raw mut known.memory_type).cast(),
        (&raw mut known.managed).cast(),
        (&raw mut known.ordinal).cast(),
    ];
    let entered = context.enter()?;
    // SAFETY: three attributes and as many places of their types (an unsigned int, a boolean of at most that size, an
    // int), writable for the length of the call. The address is only looked up.
    let code = unsafe {
        (entered.calls().pointer_attributes)(3, attributes.as_mut_ptr(), values.as_mut_ptr(), address)
    };
    entered.calls().check("cuPointerGetAttributes", code)?;
    Ok(known)
}

impl Gpus {
    /// The ordinal of the device whose memory all of these bytes are.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for host memory, managed memory, or an address that the driver does not
    /// know, with what it is.
    pub fn device_of(&self, address: u64, len_bytes: u64) -> Result<u16, StoreError> {
        let invalid = |why: &str| {
            StoreError::invalid("GPU address", format!("{len_bytes} bytes at {address:#x}: {why}"))
        };
        let last = address.checked_add(len_bytes.max(1) - 1).ok_or_else(|| invalid("they wrap around"))?;
        let context = self.any_context()?;
        let ask = |address| look_up(&context, address).map_err(|failed| failed.error("look up GPU address"));
        let (first, last) = (ask(address)?, ask(last)?);
        if first.managed & 0xff != 0 {
            return Err(invalid("this is managed memory, which moves between host and device"));
        }
        match first.memory_type {
            TYPE_DEVICE => {}
            TYPE_HOST => return Err(invalid("this is host memory that the driver knows, not a device's")),
            _ => {
                return Err(invalid(
                    "the driver knows no memory there: is it of this process, and not freed?",
                ));
            }
        }
        if last != first {
            return Err(invalid("they do not all lie in memory of one device"));
        }
        u16::try_from(first.ordinal).map_err(|_| invalid("the driver does not say of which device it is"))
    }
}

impl Stream {
    /// Makes the work that is queued from now on wait for everything that is queued on another stream of this process
    /// now. `foreign` is its `CUstream`; 0 and 1 are the legacy default stream of this device, 2 the calling thread's.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Busy`] if that stream is recording a graph, [`hetmem_core::ErrorKind::Os`] if the
    /// driver refuses.
    ///
    /// # Safety
    /// `foreign` is one of 0, 1, 2, or a stream of this process that lives until this returns.
    pub unsafe fn wait_raw(&self, foreign: u64) -> Result<(), StoreError> {
        const OPERATION: &str = "wait for the producer's stream";
        let handle = Opaque::try_from(foreign)
            .map_err(|_| StoreError::invalid("stream", format!("{foreign:#x} is no address")))?;
        // SAFETY: the caller's promise.
        match unsafe { self.is_capturing(foreign, handle) } {
            Ok(false) => {}
            Ok(true) => {
                return Err(StoreError::busy(
                    OPERATION,
                    "it is recording a graph, whose work runs later (put the tensor outside the recording)",
                ));
            }
            Err(failed) => return Err(failed.error(OPERATION)),
        }
        // SAFETY: the caller's promise.
        unsafe { self.wait_handle(foreign, handle) }.map_err(|failed| failed.error(OPERATION))
    }

    /// # Safety
    /// As [`Stream::wait_raw`].
    unsafe fn is_capturing(&self, foreign: u64, handle: Opaque) -> Result<bool, Failed> {
        let entered = self.device().context().enter()?;
        let Some(stream_is_capturing) = entered.calls().stream_is_capturing.filter(|_| foreign != 0) else {
            return Ok(false);
        };
        let mut status: c_uint = 0;
        // SAFETY: a living stream, by the caller's promise; a writable place of an enumeration's size.
        let code = unsafe { stream_is_capturing(handle, &raw mut status) };
        entered.calls().check("cuStreamIsCapturing", code)?;
        Ok(status != 0)
    }

    /// # Safety
    /// As [`Stream::wait_raw`].
    unsafe fn wait_handle(&self, foreign: u64, handle: Opaque) -> Result<(), Failed> {
        let entered = self.device().context().enter()?;
        let calls = entered.calls();
        let mut context = self.device().context().raw();
        if foreign > SPECIAL_STREAMS {
            // SAFETY: a living stream, by the caller's promise; a writable place.
            let code = unsafe { (calls.stream_context)(handle, &raw mut context) };
            calls.check("cuStreamGetCtx", code)?;
        }
        // SAFETY: the context of a living stream, or this device's own, which is retained.
        let code = unsafe { (calls.push_current)(context) };
        calls.check("cuCtxPushCurrent_v2", code)?;
        let mut event: Opaque = 0;
        // SAFETY: a writable place; a context is current.
        let created = unsafe { (calls.event_create)(&raw mut event, EVENT_FLAGS) };
        let recorded = calls.check("cuEventCreate", created).and_then(|()| {
            // SAFETY: both are of the current context and live.
            calls.check("cuEventRecord", unsafe { (calls.event_record)(event, handle) })
        });
        let mut popped: Opaque = 0;
        // SAFETY: pushed above by this thread; a writable place.
        let _ = unsafe { (calls.pop_current)(&raw mut popped) };
        let waiting = recorded.and_then(|()| {
            // SAFETY: a stream and an event that live for the length of the call.
            calls.check("cuStreamWaitEvent", unsafe { (calls.stream_wait_event)(self.raw(), event, 0) })
        });
        if event != 0 {
            // SAFETY: created above, destroyed once; the driver keeps what the stream still waits for.
            let _ = unsafe { (calls.event_destroy)(event) };
        }
        waiting
    }

    /// Queues a copy of a caller's device memory, of this device or another, into a span.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if the driver does not know the address as a device's, or the lengths differ;
    /// else as [`Stream::copy`].
    ///
    /// # Safety
    /// The bytes stay allocated, and nobody writes them, until the stream is past the copy. Memory that another stream
    /// writes is waited for first ([`Stream::wait_raw`]).
    pub unsafe fn copy_from_address(
        &self,
        address: u64,
        len_bytes: u64,
        to: &Span,
    ) -> Result<(), StoreError> {
        to.check_writable()?;
        // SAFETY: the caller's promise.
        unsafe { self.copy_foreign(address, len_bytes, to, Way::FromAddress) }
    }

    /// Queues a copy of a span into a caller's device memory, of this device or another.
    ///
    /// # Errors
    /// As [`Stream::copy_from_address`].
    ///
    /// # Safety
    /// The bytes stay allocated, and nobody else reads or writes them, until the stream is past the copy.
    pub unsafe fn copy_to_address(
        &self,
        from: &Span,
        address: u64,
        len_bytes: u64,
    ) -> Result<(), StoreError> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_foreign(address, len_bytes, from, Way::ToAddress) }
    }

    /// # Safety
    /// As [`Stream::copy_from_address`] and [`Stream::copy_to_address`].
    unsafe fn copy_foreign(
        &self,
        address: u64,
        len_bytes: u64,
        span: &Span,
        way: Way,
    ) -> Result<(), StoreError> {
        if span.len_bytes() != len_bytes {
            return Err(StoreError::invalid(
                "copy",
                format!("{len_bytes} bytes at an address, and a span of {}", span.len_bytes()),
            ));
        }
        let ordinal = self.device().gpus().device_of(address, len_bytes)?;
        // The memory's device has a context already; this keeps it for the length of the copy.
        let owner = self.device().gpus().device(ordinal)?;
        let plan = copies::Planned::with_address(self.device(), address, &owner, span, way)?;
        let mut pins: Vec<Hold> = plan.pin().into_iter().collect();
        pins.push(std::sync::Arc::new(owner) as Hold);
        let mut kept = lock(self.kept());
        kept.hold(Held::new(1, vec![span.memory().clone()], pins));
        let entered = self.device().context().enter().map_err(|failed| failed.error("copy"))?;
        // SAFETY: the queue holds the span, the caller the other end, until the stream is past the copy.
        let issued = unsafe { copies::issue(&entered, self.raw(), vec![Ok(plan)], None) };
        issued.into_iter().try_for_each(|issued| issued.map(drop))
    }
}

/// Which end of a copy a bare address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    FromAddress,
    ToAddress,
}

impl copies::Planned {
    /// A copy one end of which is an address of `owner`'s memory.
    fn with_address(
        device: &Device,
        address: u64,
        owner: &Device,
        span: &Span,
        way: Way,
    ) -> Result<Self, StoreError> {
        let ordinal = device.ordinal();
        let far = owner.ordinal() != ordinal || !span.is_within_reach(ordinal);
        let contexts = match span.memory().device() {
            None if far => {
                return Err(StoreError::invalid(
                    "copy",
                    format!(
                        "the memory at {address:#x} is of gpu:{}, the stream of gpu:{ordinal} (use one of that device)",
                        owner.ordinal()
                    ),
                ));
            }
            Some(other) if far => Some((other.context().raw(), owner.context().raw())),
            _ => None,
        };
        let (own, bare) = (span.place(), Place::Device(address));
        let (from, to, contexts) = match way {
            Way::ToAddress => (own, bare, contexts),
            Way::FromAddress => (bare, own, contexts.map(|(span, bare)| (bare, span))),
        };
        Self::from_places(from, to, span, contexts, device.gpus())
    }
}
