//! Host memory that the node holds but has not made a segment of yet. Not a place for bytes: nothing maps it.
//! Invariant: `len_bytes` bytes of memory are this process's, so a segment of that size can be made.

use std::os::fd::OwnedFd;

use hetmem_core::StoreError;
use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use crate::pages::{self, PagePolicy};
use crate::{memfd, os};

/// Host memory that is reserved but not yet part of a segment: a memory file of pages that nobody uses. It exists so
/// that the configured capacity is the node's from its start, and not only when clients ask.
#[derive(Debug)]
pub struct Reserve {
    fd: OwnedFd,
    len_bytes: u64,
    /// What the file's length must be a multiple of.
    page_bytes: u64,
}

impl Reserve {
    /// Reserves `len_bytes` bytes (0 is allowed), physically, on reserved huge pages if there are enough.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Os`] when there is not so much memory, with what there is and the remedy.
    pub fn new(len_bytes: u64, pages: PagePolicy) -> Result<Self, StoreError> {
        let huge = pages::reserved_for(len_bytes).filter(|_| pages != PagePolicy::Off);
        let mut reserve = Self {
            fd: memfd::create("hetmem-reserve", 0, huge)?,
            len_bytes: 0,
            page_bytes: huge.unwrap_or(1),
        };
        reserve.put_back(len_bytes)?;
        Ok(reserve)
    }

    /// Bytes held now.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Gives `len_bytes` bytes back to the system, right before a segment of that size is created.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if it holds less.
    pub fn take(&mut self, len_bytes: u64) -> Result<(), StoreError> {
        let Some(left) = self.len_bytes.checked_sub(len_bytes) else {
            return Err(StoreError::invalid(
                "reserve",
                format!("{len_bytes} bytes asked for, {} are reserved", self.len_bytes),
            ));
        };
        let file_len = left.next_multiple_of(self.page_bytes);
        ftruncate(&self.fd, file_len).map_err(|errno| os::error("shrink reserve", errno))?;
        self.len_bytes = left;
        Ok(())
    }

    /// Reserves `len_bytes` bytes more, as after a segment of that size was dropped. On an error it holds what it held.
    ///
    /// # Errors
    /// As [`Reserve::new`].
    pub fn put_back(&mut self, len_bytes: u64) -> Result<(), StoreError> {
        let held = self.len_bytes.next_multiple_of(self.page_bytes);
        let wanted = self
            .len_bytes
            .checked_add(len_bytes)
            .and_then(|wanted| wanted.checked_next_multiple_of(self.page_bytes))
            .filter(|wanted| i64::try_from(*wanted).is_ok())
            .ok_or_else(|| StoreError::invalid("reserve", format!("{len_bytes} bytes cannot be reserved")))?;
        if wanted > held {
            if self.page_bytes == 1 {
                memfd::check_available("reserve host memory", wanted - held)?;
            }
            fallocate(&self.fd, FallocateFlags::empty(), held, wanted - held).map_err(|errno| {
                // Some of it may be there already; what was held before stays.
                let _ = ftruncate(&self.fd, held);
                os::error("reserve host memory", errno)
            })?;
        }
        self.len_bytes += len_bytes;
        Ok(())
    }

    /// Bytes of memory that the kernel says the file has.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> u64 {
        let stat = rustix::fs::fstat(&self.fd).expect("a file");
        u64::try_from(stat.st_blocks).expect("not negative") * 512
    }
}
