//! Tensors that others have in GPU memory, into the store. Not gets, which are in place (`tensor`). Invariant: an object is
//! sealed when the copy into it has ended, and the copy waits for what its producer had queued.
//!
//! Holds unsafe code: the promise that an address stays a tensor's until the copy has ended.
#![allow(unsafe_code)]

use hetmem_client::{Checksum, GpuReserved, Key, PutOptions, PutOutcome, Store, StoreError, Tier};

use crate::arguments::{self, Putting};
use crate::source::{LEGACY_STREAM, Source};

/// Puts a tensor of GPU memory; it stays on that GPU, unless the options name another place. It has no checksum: that
/// is computed in host memory only.
pub(crate) fn put(
    store: &Store,
    key: &Key,
    source: &Source,
    putting: &Putting,
) -> Result<PutOutcome, StoreError> {
    let wrong = |why: String| StoreError::invalid("tensor", format!("put {key:?}: {why}"));
    let (kind, ordinal) = source.device;
    let device = u16::try_from(ordinal).ok().filter(|_| kind == crate::dlpack::CUDA);
    let device = device.ok_or_else(|| {
        wrong(format!("it is on DLPack device {kind}:{ordinal}: the host and CUDA devices are supported"))
    })?;
    let address = source
        .device_address()
        .ok_or_else(|| wrong("it is not row-major on its GPU: put tensor.contiguous()".to_owned()))?;
    let Tier::Gpu(tier) = store.tier_of_device(device)? else {
        return Err(StoreError::protocol("a device of this process is in host memory"));
    };
    let options = PutOptions { tier: arguments::hint(putting.device, store)?, ..putting.options };
    let reservation = match store.reserve_gpu(key, source.meta()?, tier, &options)? {
        GpuReserved::Open(reservation) => reservation,
        GpuReserved::Kept(outcome) => return Ok(outcome),
        GpuReserved::Host(_) => return Err(StoreError::protocol("host memory where a GPU's was asked for")),
    };
    let stream = reservation.device().stream()?;
    if source.len() > 0 {
        // SAFETY: `Source` has asked the producer to order its work before the legacy stream, which always lives; the
        // source holds the tensor beyond the end of this function, which waits for the copy, and whoever writes to a
        // tensor that is being put writes to what is put.
        unsafe {
            stream.wait_raw(LEGACY_STREAM)?;
            stream.copy_from_address(address, source.len() as u64, &reservation.span()?)?;
        }
    }
    reservation.seal_after(&stream, Checksum::None)
}
