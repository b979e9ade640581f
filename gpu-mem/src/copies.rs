//! The driver's copy calls: which one for which pair of memories, and one call for many where the driver has it. Not
//! who holds the memory meanwhile (`stream`). Invariant: what is issued was checked for lengths, rights and reach.
//!
//! unsafe: hands addresses to the driver, which reads and writes there after the call.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::zeroed;

use cudarc::driver::sys;
use hetmem_core::StoreError;
use hetmem_kernels::moves::Move;

use crate::Gpus;
use crate::context::Entered;
use crate::device::Device;
use crate::failure::Failed;
use crate::launches::Gather;
use crate::pinned::Hold;
use crate::reach::{Access, Reacher};
use crate::span::{Place, Span};
use crate::table::{Address, Calls, Opaque};

/// A copy that may be issued on a stream of one device.
pub(crate) struct Planned {
    from: Place,
    to: Place,
    len: usize,
    /// The contexts of both ends, where neither device reads the other's memory by itself.
    contexts: Option<(Opaque, Opaque)>,
    /// What keeps the host's end pinned; none where there is no such end or it is not pinned.
    pin: Option<Hold>,
    /// It goes with others by a kernel.
    is_gathered: bool,
}

/// Bytes of a copy at most that goes by a kernel with others. One of 64 KiB takes a microsecond on the bus, about what a
/// copy engine takes to begin; of longer ones the driver's copies lose nothing, and leave the device's threads alone.
pub(crate) const SHORT_LEN_MAX: u64 = 64 << 10;

impl Planned {
    /// Checks a copy for a stream of `device`.
    pub(crate) fn new(device: &Device, from: &Span, to: &Span) -> Result<Self, StoreError> {
        if from.len_bytes() != to.len_bytes() {
            return Err(StoreError::invalid(
                "copy",
                format!("{} bytes are copied to a span of {}", from.len_bytes(), to.len_bytes()),
            ));
        }
        to.check_writable()?;
        let len = usize::try_from(from.len_bytes())
            .map_err(|_| StoreError::invalid("copy", format!("{} bytes", from.len_bytes())))?;
        let ordinal = device.ordinal();
        let contexts = match (from.memory().device(), to.memory().device()) {
            (None, None) => {
                return Err(StoreError::invalid("copy", "both ends are host memory, which no GPU copies"));
            }
            (Some(source), Some(target))
                if !(from.is_within_reach(ordinal) && to.is_within_reach(ordinal)) =>
            {
                Some((source.context().raw(), target.context().raw()))
            }
            (Some(memory), None) | (None, Some(memory))
                if !(from.is_within_reach(ordinal) && to.is_within_reach(ordinal)) =>
            {
                return Err(StoreError::invalid(
                    "copy",
                    format!(
                        "a stream of gpu:{ordinal} cannot reach memory of gpu:{} (use a stream of that device)",
                        memory.ordinal()
                    ),
                ));
            }
            _ => None,
        };
        let pin = from.pin(device.gpus()).or_else(|| to.pin(device.gpus()));
        Ok(Self { from: from.place(), to: to.place(), len, contexts, pin, is_gathered: false })
    }

    /// A copy of which one end is no span. `span` is the other, of the copy's length.
    pub(crate) fn from_places(
        from: Place,
        to: Place,
        span: &Span,
        contexts: Option<(Opaque, Opaque)>,
        gpus: &Gpus,
    ) -> Result<Self, StoreError> {
        let len = usize::try_from(span.len_bytes())
            .map_err(|_| StoreError::invalid("copy", format!("{} bytes", span.len_bytes())))?;
        Ok(Self { from, to, len, contexts, pin: span.pin(gpus), is_gathered: false })
    }

    /// What must be held beside the ends.
    pub(crate) fn pin(&self) -> Option<Hold> {
        self.pin.clone()
    }

    /// Whether no end is host memory that the driver must stage.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pin.is_some() || matches!((self.from, self.to), (Place::Device(_), Place::Device(_)))
    }

    /// The copy as a kernel of the device makes it, which it is left to from now on; none if it is long, or out of the
    /// device's reach.
    pub(crate) fn short_move(&mut self, reacher: &mut Reacher<'_>, from: &Span, to: &Span) -> Option<Move> {
        let len_bytes = self.len as u64;
        if !(1..=SHORT_LEN_MAX).contains(&len_bytes) || self.contexts.is_some() {
            return None;
        }
        // Both ends, and what pins the host's, are held with the plans.
        let (source, target) = (reacher.find(from, Access::Read)?, reacher.find(to, Access::Write)?);
        self.is_gathered = true;
        Some(Move { source, target, len_bytes })
    }

    pub(crate) fn leave_to_driver(&mut self) {
        self.is_gathered = false;
    }

    /// Whether it can go with others in one call.
    fn is_batchable(&self) -> bool {
        self.len > 0 && self.contexts.is_none() && self.is_pinned() && !self.is_gathered
    }
}

/// Issues copies on a stream of the entered context; one result for each, in order: whether all its memory is pinned.
///
/// # Safety
/// The caller holds both ends of every copy, what pins them, and what `gather` has to be held, until the stream is past
/// them or its context is lost; `stream` is a living stream of the entered context, and `gather`, made for its device, makes
/// those copies that are left to it.
pub(crate) unsafe fn issue(
    entered: &Entered<'_>,
    stream: Opaque,
    mut plans: Vec<Result<Planned, StoreError>>,
    gather: Option<&Gather>,
) -> Vec<Result<bool, StoreError>> {
    let calls = entered.calls();
    // SAFETY: the caller's promise.
    let launched = gather.is_some_and(|gather| unsafe { gather.launch(entered, stream) }.is_ok());
    if !launched {
        // A kernel that was refused has copied nothing.
        plans.iter_mut().flatten().for_each(Planned::leave_to_driver);
    }
    let batch: Vec<&Planned> =
        plans.iter().filter_map(|plan| plan.as_ref().ok()).filter(|plan| plan.is_batchable()).collect();
    // SAFETY: the caller's promise.
    let batched = batch.len() > 1 && unsafe { issue_batch(calls, stream, &batch) };
    let issued = plans.into_iter().map(|plan| {
        let plan = plan?;
        if !(plan.is_gathered || batched && plan.is_batchable()) {
            // SAFETY: the caller's promise.
            unsafe { issue_one(calls, stream, &plan) }.map_err(|failed| failed.error("copy"))?;
        }
        Ok(plan.is_pinned())
    });
    issued.collect()
}

/// Issues one copy.
///
/// # Safety
/// As [`issue`].
unsafe fn issue_one(calls: &Calls, stream: Opaque, plan: &Planned) -> Result<(), Failed> {
    let len = plan.len;
    if len == 0 {
        return Ok(());
    }
    let (call, code): (_, c_int) = match (plan.from, plan.to) {
        (Place::Host(from), Place::Device(to)) => {
            // SAFETY: both ends have `len` bytes that the caller holds; the stream's device reaches the target.
            ("cuMemcpyHtoDAsync_v2", unsafe { (calls.copy_to_device)(to, from.cast(), len, stream) })
        }
        (Place::Device(from), Place::Host(to)) => {
            // SAFETY: as above; the host memory is writable.
            ("cuMemcpyDtoHAsync_v2", unsafe { (calls.copy_to_host)(to.cast(), from, len, stream) })
        }
        (Place::Device(from), Place::Device(to)) => match plan.contexts {
            Some((source, target)) => {
                // SAFETY: as above; the contexts are those of the devices, retained while their memory is held.
                let code = unsafe { (calls.copy_to_peer)(to, target, from, source, len, stream) };
                ("cuMemcpyPeerAsync", code)
            }
            // SAFETY: as above.
            None => ("cuMemcpyDtoDAsync_v2", unsafe { (calls.copy_on_device)(to, from, len, stream) }),
        },
        (Place::Host(_), Place::Host(_)) => return Ok(()),
    };
    calls.check(call, code)
}

/// Issues all in one call. False if the driver has no such call or refused it: then each goes by itself, which says
/// which of them is refused. One that had been accepted is copied twice, to the same effect.
///
/// # Safety
/// As [`issue`].
unsafe fn issue_batch(calls: &Calls, stream: Opaque, batch: &[&Planned]) -> bool {
    let Some(copy_batch) = calls.copy_batch else {
        return false;
    };
    let address = |place: Place| match place {
        Place::Device(address) => address,
        Place::Host(base) => base.expose_provenance() as Address,
    };
    let mut targets: Vec<Address> = batch.iter().map(|plan| address(plan.to)).collect();
    let mut sources: Vec<Address> = batch.iter().map(|plan| address(plan.from)).collect();
    let mut lens: Vec<usize> = batch.iter().map(|plan| plan.len).collect();
    // SAFETY: a C structure of numbers, of whose enumerations all have a variant of value 0.
    let mut attributes: sys::CUmemcpyAttributes = unsafe { zeroed() };
    attributes.srcAccessOrder = sys::CUmemcpySrcAccessOrder_enum::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    let mut first = 0_usize;
    let mut failed_at = usize::MAX;
    // SAFETY: three arrays of as many elements as said; one set of attributes, which holds from copy 0 on; a writable
    // index. The driver keeps none of the arrays. Of the memory: the caller's promise.
    let code = unsafe {
        copy_batch(
            targets.as_mut_ptr(),
            sources.as_mut_ptr(),
            lens.as_mut_ptr(),
            batch.len(),
            &raw mut attributes,
            &raw mut first,
            1,
            &raw mut failed_at,
            stream,
        )
    };
    calls.check("cuMemcpyBatchAsync", code).is_ok()
}
