//! The payload of a frame that has come: on its way into its place, or dropped, and what is told of it at its end. Not how
//! its bytes come. Invariant: exactly one end is told of a landing that was promised, whatever becomes of its target.

use std::os::fd::BorrowedFd;

use hetmem_core::StoreError;

use crate::fabric::{Landing, LandingStats, LandingToken};
use crate::payload::Scatter;
use crate::region::{Regions, Unmoved};

pub(crate) struct Arriving {
    target: Option<(Scatter, LandingToken)>,
    /// Why it is dropped rather than landed, to be told at its end.
    failed: Option<(LandingToken, StoreError)>,
    left: u64,
    staged: u64,
}

impl Arriving {
    /// A payload of so many bytes that goes where the sink has said.
    pub(crate) fn of(len_bytes: u64, landing: Landing, regions: &Regions) -> Self {
        let mut payload = Self { target: None, failed: None, left: len_bytes, staged: 0 };
        if let Landing::Into { parts, token } = landing {
            match Scatter::of(regions, &parts, len_bytes) {
                Ok(scatter) => payload.target = Some((scatter, token)),
                Err(why) => payload.failed = Some((token, why)),
            }
        }
        payload
    }

    /// Bytes that have not come.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The next bytes have come in a buffer: no more than are left.
    pub(crate) fn stage(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() as u64 <= self.left);
        self.left = self.left.saturating_sub(bytes.len() as u64);
        if let Some((scatter, _)) = &mut self.target {
            if scatter.copy_in(bytes) {
                self.staged += bytes.len() as u64;
            } else {
                self.target_gone();
            }
        }
    }

    /// Receives the next bytes straight into their place, and what comes after them into `rest`: how many of each, and
    /// whether there was room for more. None if they have no place, or not any more.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        rest: &mut [u8],
    ) -> Option<Result<(usize, usize, bool), rustix::io::Errno>> {
        let (scatter, _) = self.target.as_mut()?;
        match scatter.receive(socket, rest) {
            Ok((landed, rest, drained)) => {
                self.left = self.left.saturating_sub(landed as u64);
                Some(Ok((landed, rest, drained)))
            }
            // No target is a device's (`Regions::targets`).
            Err(Unmoved::Closed | Unmoved::Device(_)) => {
                self.target_gone();
                None
            }
            Err(Unmoved::Os(error)) => Some(Err(error)),
        }
    }

    fn target_gone(&mut self) {
        if let Some((_, token)) = self.target.take() {
            let why = StoreError::stale("receive", "payload", "its target segment was deregistered");
            self.failed = Some((token, why));
        }
    }

    /// What is told once all has come; none if nobody waits for it.
    pub(crate) fn end(self) -> Option<(LandingToken, Result<LandingStats, StoreError>)> {
        match (self.target, self.failed) {
            (_, Some((token, why))) => Some((token, Err(why))),
            (Some((scatter, token)), None) => {
                let bytes = scatter.landing_len() as u64;
                Some((token, Ok(LandingStats { bytes, staged_bytes: self.staged })))
            }
            (None, None) => None,
        }
    }

    /// The landing that will not be complete.
    pub(crate) fn abandon(self) -> Option<LandingToken> {
        self.target.map(|(_, token)| token).or(self.failed.map(|(token, _)| token))
    }
}
