//! A segment of another process, mapped here. Not the descriptor's way here, and not what lies in the segment.
//! Invariant: the mapping has the rights that `rights` says, and is unmapped before the allocation is released.

use std::fmt;
use std::os::fd::BorrowedFd;

use hetmem_core::StoreError;

use crate::device::Device;
use crate::failure::{Failed, INVALID_VALUE, NOT_SUPPORTED};
use crate::physical::{AccessRights, Physical, Range};
use crate::segment::check_abilities;

const IMPORT: &str = "import GPU segment";

/// Another process's segment. The owner cannot take it away: the memory lives until this is dropped, whatever the
/// owner has put there meanwhile.
pub struct Imported {
    // Unmapped before the allocation is released, and both before the context.
    range: Range,
    _physical: Physical,
    device: Device,
    len_bytes: u64,
    rights: AccessRights,
}

impl Imported {
    /// See [`Device::import_segment`].
    pub(crate) fn import(
        device: &Device,
        fd: BorrowedFd<'_>,
        len_bytes: u64,
        wanted: AccessRights,
    ) -> Result<Self, StoreError> {
        check_abilities(device.info())?;
        let len = usize::try_from(len_bytes).ok().filter(|len| *len > 0);
        let len = len
            .ok_or_else(|| StoreError::invalid("segment", format!("{len_bytes} bytes cannot be imported")))?;
        let foreign = |failed: Failed| match failed.code {
            INVALID_VALUE => StoreError::invalid(
                "segment descriptor",
                format!(
                    "{}: it is no GPU memory of {len_bytes} bytes that gpu:{} can map",
                    failed.reason(),
                    device.ordinal()
                ),
            ),
            _ => failed.error(IMPORT),
        };
        let physical = Physical::import(device.context(), fd, len).map_err(foreign)?;
        let range = physical.map().map_err(foreign)?;
        let rights = give_access(device, &range, wanted)?;
        Ok(Self { range, _physical: physical, device: device.clone(), len_bytes, rights })
    }

    /// What the driver allows here. A reader on a driver that has no read-only mappings has all rights, and is
    /// trusted.
    #[must_use]
    pub fn rights(&self) -> AccessRights {
        self.rights
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The device that it was imported for.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address of its first byte on the device, in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.address()
    }
}

/// Read-only where that is wanted and the driver has it; a refusal is remembered per device.
fn give_access(device: &Device, range: &Range, wanted: AccessRights) -> Result<AccessRights, StoreError> {
    let (gpus, ordinal) = (device.gpus(), device.ordinal());
    let set = |rights| range.set_access(&[i32::from(ordinal)], rights);
    if wanted == AccessRights::ReadOnly && !gpus.is_read_only_refused(ordinal) {
        match set(AccessRights::ReadOnly) {
            Ok(()) => return Ok(AccessRights::ReadOnly),
            Err(failed) if matches!(failed.code, INVALID_VALUE | NOT_SUPPORTED) => {
                gpus.refuse_read_only(ordinal);
            }
            Err(failed) => return Err(failed.error(IMPORT)),
        }
    }
    set(AccessRights::ReadWrite).map_err(|failed| failed.error(IMPORT))?;
    Ok(AccessRights::ReadWrite)
}

impl fmt::Debug for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Imported")
            .field("device", &self.device.ordinal())
            .field("address", &format_args!("{:#x}", self.address()))
            .field("len_bytes", &self.len_bytes)
            .field("rights", &self.rights)
            .finish_non_exhaustive()
    }
}
