//! The C functions that copy and fill. Not what they may touch (`copy`). Invariant: a function without a stream has done its
//! work when it returns.

use std::ffi::{c_int, c_uchar};
use std::sync::Arc;

use crate::abi::{DevicePtr, Handle, MemcpyAttributes};
use crate::code::{Code, Outcome};
use crate::copy::{self, End, Plan, Return};
use crate::device;
use crate::driver::Driver;
use crate::exports::streams;
use crate::pointers::{HostPtr, In, Out};
use crate::stream::Stream;

/// `CU_STREAM_LEGACY` as a handle, like 0.
const STREAM_LEGACY: Handle = Handle(1);
/// `CU_MEMCPY_SRC_ACCESS_ORDER_...`: stream, during the call, any.
const ORDERS: [c_int; 3] = [1, 2, 3];
const ORDER_DURING_CALL: c_int = 2;

export! {
    fn cuMemcpy(target: DevicePtr, source: DevicePtr, len: usize) |driver| {
        let (stream, at) = (null(driver)?, device::current(driver)?.ordinal);
        copy::submit(driver, &stream, (End::of_any(target, at), End::of_any(source, at)), len, Return::Done)
    }

    fn cuMemcpyAsync(target: DevicePtr, source: DevicePtr, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        let at = stream.device().ordinal;
        copy::submit(driver, &stream, (End::of_any(target, at), End::of_any(source, at)), len, Return::Safe)
    }

    fn cuMemcpyHtoD_v2(target: DevicePtr, source: HostPtr, len: usize) |driver| {
        let stream = null(driver)?;
        let target = End::Device(target, stream.device().ordinal);
        copy::submit(driver, &stream, (target, End::Host(source)), len, Return::Done)
    }

    fn cuMemcpyDtoH_v2(target: HostPtr, source: DevicePtr, len: usize) |driver| {
        let stream = null(driver)?;
        let source = End::Device(source, stream.device().ordinal);
        copy::submit(driver, &stream, (End::Host(target), source), len, Return::Done)
    }

    fn cuMemcpyDtoD_v2(target: DevicePtr, source: DevicePtr, len: usize) |driver| {
        let stream = null(driver)?;
        let at = stream.device().ordinal;
        copy::submit(driver, &stream, (End::Device(target, at), End::Device(source, at)), len, Return::Done)
    }

    fn cuMemcpyHtoDAsync_v2(target: DevicePtr, source: HostPtr, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        let target = End::Device(target, stream.device().ordinal);
        copy::submit(driver, &stream, (target, End::Host(source)), len, Return::Safe)
    }

    fn cuMemcpyDtoHAsync_v2(target: HostPtr, source: DevicePtr, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        let source = End::Device(source, stream.device().ordinal);
        copy::submit(driver, &stream, (End::Host(target), source), len, Return::Safe)
    }

    fn cuMemcpyDtoDAsync_v2(target: DevicePtr, source: DevicePtr, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        let at = stream.device().ordinal;
        copy::submit(driver, &stream, (End::Device(target, at), End::Device(source, at)), len, Return::Safe)
    }

    fn cuMemcpyPeerAsync(
        target: DevicePtr,
        target_context: Handle,
        source: DevicePtr,
        source_context: Handle,
        len: usize,
        stream: Handle,
    ) |driver| {
        let stream = streams::find(driver, stream)?;
        let target = End::Device(target, device::of_context(driver, target_context)?.ordinal);
        let source = End::Device(source, device::of_context(driver, source_context)?.ordinal);
        copy::submit(driver, &stream, (target, source), len, Return::Safe)
    }

    fn cuMemcpyBatchAsync(
        targets: In<DevicePtr>,
        sources: In<DevicePtr>,
        lens: In<usize>,
        count: usize,
        attributes: In<MemcpyAttributes>,
        attribute_starts: In<usize>,
        attribute_count: usize,
        failed: Out<usize>,
        stream: Handle,
    ) |driver| {
        failed.put(usize::MAX)?;
        driver.need("batch")?;
        if stream == Handle::default() || stream == STREAM_LEGACY || count == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let stream = streams::find(driver, stream)?;
        let returns = returns_of(&attributes.get_all(attribute_count)?, &attribute_starts.get_all(attribute_count)?, count)?;
        let (targets, sources, lens) = (targets.get_all(count)?, sources.get_all(count)?, lens.get_all(count)?);
        let at = stream.device().ordinal;
        let mut plans = Vec::with_capacity(count);
        for (index, (((target, source), len), wanted)) in targets.into_iter().zip(sources).zip(lens).zip(returns).enumerate() {
            let ends = (End::of_any(target, at), End::of_any(source, at));
            // cuda.h has no copy of nothing in a batch.
            let plan = if len == 0 { Err(Code::INVALID_VALUE) } else { Plan::new(driver, ends, len, wanted) };
            if plan.is_err() {
                failed.put(index)?;
            }
            plans.push((plan?, wanted));
        }
        plans.into_iter().try_for_each(|(plan, wanted)| plan.submit(driver, &stream, wanted))
    }

    fn cuMemsetD8_v2(target: DevicePtr, byte: c_uchar, len: usize) |driver| {
        let stream = null(driver)?;
        copy::fill(driver, &stream, target, byte, len)?;
        stream.synchronize()
    }

    fn cuMemsetD8Async(target: DevicePtr, byte: c_uchar, len: usize, stream: Handle) |driver| {
        let stream = streams::find(driver, stream)?;
        copy::fill(driver, &stream, target, byte, len)
    }
}

fn null(driver: &'static Driver) -> Outcome<Arc<Stream>> {
    device::current(driver)?.null_stream()
}

/// When each copy of a batch lets the caller go. An attribute holds from its start to that of the next.
fn returns_of(attributes: &[MemcpyAttributes], starts: &[usize], count: usize) -> Outcome<Vec<Return>> {
    let is_ascending = starts.windows(2).all(|pair| pair[0] < pair[1]);
    let is_inside = starts.first() == Some(&0) && starts.last().is_some_and(|last| *last < count);
    let is_known = attributes.iter().all(|attribute| ORDERS.contains(&attribute.source_order));
    if !is_ascending || !is_inside || !is_known {
        return Err(Code::INVALID_VALUE);
    }
    let of_copy = |index: usize| {
        let at = starts.iter().take_while(|start| **start <= index).count() - 1;
        let during_call = attributes.get(at).is_some_and(|one| one.source_order == ORDER_DURING_CALL);
        if during_call { Return::Read } else { Return::Safe }
    };
    Ok((0..count).map(of_copy).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Location;

    #[test]
    fn attributes_hold_until_the_next_begins() {
        let nowhere = Location { kind: 0, id: 0 };
        let with = |source_order| MemcpyAttributes {
            source_order,
            source_hint: nowhere,
            target_hint: nowhere,
            flags: 0,
        };
        let returns = returns_of(&[with(1), with(2)], &[0, 2], 3);
        assert_eq!(returns, Ok(vec![Return::Safe, Return::Safe, Return::Read]));
        for (attributes, starts) in [
            (vec![], vec![]),
            (vec![with(1)], vec![1]),
            (vec![with(0)], vec![0]),
            (vec![with(1); 2], vec![0, 3]),
        ] {
            assert_eq!(returns_of(&attributes, &starts, 3), Err(Code::INVALID_VALUE), "{starts:?}");
        }
    }
}
