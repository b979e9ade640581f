//! Events: places in the order of a stream that others can wait for. Not streams. Invariant: an event is complete when as
//! many records were reached as were submitted, and one that was never recorded is complete.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::code::{Code, Outcome};

#[derive(Debug)]
pub(crate) struct Event {
    /// The ordinal of the context's device.
    pub(crate) device: usize,
    is_timed: bool,
    state: Mutex<State>,
    reached: Condvar,
}

#[derive(Debug, Default)]
struct State {
    recorded: u64,
    reached: u64,
    at: Option<Instant>,
}

impl Event {
    pub(crate) fn new(device: usize, is_timed: bool) -> Self {
        Self { device, is_timed, state: Mutex::default(), reached: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a record that is about to be submitted; the number is what `reach` is to be called with.
    pub(crate) fn record(&self) -> u64 {
        let mut state = self.state();
        state.recorded += 1;
        state.recorded
    }

    /// The latest record; 0 if there was none.
    pub(crate) fn latest(&self) -> u64 {
        self.state().recorded
    }

    pub(crate) fn reach(&self, record: u64) {
        let mut state = self.state();
        if record > state.reached {
            state.reached = record;
            state.at = Some(Instant::now());
        }
        self.reached.notify_all();
    }

    pub(crate) fn wait(&self, record: u64) {
        let wait = self.reached.wait_while(self.state(), |state| state.reached < record);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn is_complete(&self) -> bool {
        let state = self.state();
        state.reached >= state.recorded
    }

    /// Milliseconds from one event to another.
    ///
    /// # Errors
    /// `INVALID_HANDLE` if one takes no time or was never recorded, `NOT_READY` if one is not complete.
    pub(crate) fn elapsed_ms(&self, end: &Self) -> Outcome<f32> {
        let time = |event: &Self| {
            let state = event.state();
            match state.at {
                _ if !event.is_timed || state.recorded == 0 => Err(Code::INVALID_HANDLE),
                Some(at) if state.reached >= state.recorded => Ok(at),
                _ => Err(Code::NOT_READY),
            }
        };
        let (start, end) = (time(self)?, time(end)?);
        let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f32();
        Ok((seconds(start, end) - seconds(end, start)) * 1000.0)
    }
}
