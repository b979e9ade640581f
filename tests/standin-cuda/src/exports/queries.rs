//! The C functions that say what a pointer is. Not what may be done with it. Invariant: booleans are written as four bytes,
//! of which the lowest is the boolean, so that readers of one byte and of an integer see the same.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::abi::{DevicePtr, Handle, MEMORY_TYPE_DEVICE, MEMORY_TYPE_HOST};
use crate::code::{Code, Outcome};
use crate::driver::Driver;
use crate::pinned::Standing;
use crate::pointers::{In, OutAny};
use crate::space::Mapping;

export! {
    fn cuPointerGetAttribute(value: OutAny, attribute: c_int, pointer: DevicePtr) |driver| {
        let target = Target::find(driver, pointer).ok_or(Code::INVALID_VALUE)?;
        answer(driver, value, attribute, pointer, Some(&target))
    }

    fn cuPointerGetAttributes(
        count: c_uint,
        attributes: In<c_int>,
        values: In<OutAny>,
        pointer: DevicePtr,
    ) |driver| {
        let count = usize::try_from(count).map_err(|_| Code::INVALID_VALUE)?;
        let target = Target::find(driver, pointer);
        let attributes = attributes.get_all(count)?;
        let mut pairs = attributes.into_iter().zip(values.get_all(count)?);
        pairs.try_for_each(|(attribute, value)| {
            match answer(driver, value, attribute, pointer, target.as_ref()) {
                // What does not fit this pointer was left as zero.
                Err(Code::NOT_SUPPORTED) => Ok(()),
                outcome => outcome,
            }
        })
    }

    fn cuPointerSetAttribute(value: In<c_uint>, attribute: c_int, pointer: DevicePtr) |driver| {
        if attribute != SYNC_MEMOPS {
            return Err(Code::INVALID_VALUE);
        }
        let mapping = driver.space.mapping_at(pointer).ok_or(Code::INVALID_VALUE)?;
        // Of allocations only: for virtual memory it is not said that drivers take it.
        if !mapping.is_allocation() {
            return Err(Code::NOT_SUPPORTED);
        }
        mapping.sync_memops.store(value.get()? != 0, Ordering::Relaxed);
        Ok(())
    }
}

/// Numbers of `CUpointer_attribute`.
const CONTEXT: c_int = 1;
const MEMORY_TYPE: c_int = 2;
const DEVICE_POINTER: c_int = 3;
const HOST_POINTER: c_int = 4;
const SYNC_MEMOPS: c_int = 6;
const BUFFER_ID: c_int = 7;
const IS_MANAGED: c_int = 8;
const DEVICE_ORDINAL: c_int = 9;
const IS_LEGACY_IPC_CAPABLE: c_int = 10;
const RANGE_START: c_int = 11;
const RANGE_SIZE: c_int = 12;
const MAPPED: c_int = 13;
const ALLOWED_HANDLE_TYPES: c_int = 14;
const IS_RDMA_CAPABLE: c_int = 15;
const ACCESS_FLAGS: c_int = 16;

/// What a pointer points to.
enum Target {
    Device(Arc<Mapping>),
    Host { address: usize, start: usize, len: usize, device: usize },
}

impl Target {
    /// None for what the driver does not know.
    fn find(driver: &Driver, pointer: DevicePtr) -> Option<Self> {
        if let Some(mapping) = driver.space.mapping_at(pointer) {
            return Some(Self::Device(mapping));
        }
        let address = pointer.address().unwrap_or(pointer.0);
        match driver.pinned.standing(address, 1) {
            Standing::Pinned { start, len, device, .. } => Some(Self::Host { address, start, len, device }),
            _ => None,
        }
    }

    fn device(&self) -> usize {
        match self {
            Self::Device(mapping) => mapping.physical.traits.device,
            Self::Host { device, .. } => *device,
        }
    }

    fn range(&self) -> (DevicePtr, usize) {
        match self {
            Self::Device(mapping) => (DevicePtr::of_address(mapping.address), mapping.len),
            Self::Host { start, len, .. } => (DevicePtr::of_address(*start), *len),
        }
    }

    fn mapping(&self) -> Option<&Mapping> {
        match self {
            Self::Device(mapping) => Some(mapping),
            Self::Host { .. } => None,
        }
    }
}

fn answer(
    driver: &Driver,
    value: OutAny,
    attribute: c_int,
    pointer: DevicePtr,
    target: Option<&Target>,
) -> Outcome {
    let mapping = target.and_then(Target::mapping);
    let traits = mapping.map(|mapping| mapping.physical.traits);
    let device = target.and_then(|target| driver.devices.get(target.device()));
    let boolean = |truth: bool| value.put(c_uint::from(truth));
    let (start, len) = target.map_or((DevicePtr(0), 0), Target::range);
    match attribute {
        // Memory of handles belongs to no context.
        CONTEXT if mapping.is_some_and(|mapping| !mapping.is_allocation()) => value.put(Handle::default()),
        CONTEXT => value.put(device.map(crate::device::Device::context_handle).unwrap_or_default()),
        MEMORY_TYPE if target.is_none() => value.put::<c_uint>(0),
        MEMORY_TYPE => value.put(if mapping.is_some() { MEMORY_TYPE_DEVICE } else { MEMORY_TYPE_HOST }),
        DEVICE_POINTER => value.put(match target {
            Some(Target::Device(_)) => pointer,
            Some(Target::Host { address, .. }) => DevicePtr::of_address(*address),
            None => DevicePtr(0),
        }),
        HOST_POINTER => match target {
            Some(Target::Host { address, .. }) => value.put(*address),
            _ => value.put(0_usize).and(Err(Code::NOT_SUPPORTED)),
        },
        SYNC_MEMOPS => boolean(mapping.is_some_and(|mapping| mapping.sync_memops.load(Ordering::Relaxed))),
        BUFFER_ID => value.put(mapping.map_or(0, |mapping| mapping.id)),
        IS_MANAGED | IS_LEGACY_IPC_CAPABLE => boolean(false),
        DEVICE_ORDINAL => value.put(device.map_or(-2, crate::device::Device::number)),
        RANGE_START => value.put(start),
        RANGE_SIZE => value.put(len),
        MAPPED => boolean(target.is_some()),
        ALLOWED_HANDLE_TYPES => value.put(traits.map_or(0, |traits| i64::from(traits.handle_types))),
        IS_RDMA_CAPABLE => boolean(traits.is_some_and(|traits| traits.nic)),
        ACCESS_FLAGS => value.put(match (mapping, target) {
            (Some(mapping), Some(target)) => mapping.rights(target.device()),
            (None, Some(_)) => 3,
            _ => 0,
        }),
        _ => Err(Code::INVALID_VALUE),
    }
}
