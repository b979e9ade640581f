//! A device: what of its memory is used, and its primary context with the error that it stays in. Not its streams, which
//! are in the driver's table. Invariant: bytes are counted from a `Charge`'s making to its end; a context's first error is
//! what every later use of it gives, until the context is destroyed.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::abi::Handle;
use crate::code::{Code, Outcome};
use crate::driver::Driver;
use crate::handles::Kind;
use crate::stream::{Position, Stream};

#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) ordinal: usize,
    pub(crate) memory_bytes: usize,
    used: Arc<AtomicUsize>,
    fault: AtomicI32,
    context: Mutex<Context>,
    /// Held while the context is retained or released, so that none is made while another is destroyed.
    turn: Mutex<()>,
}

#[derive(Debug, Default)]
struct Context {
    retained: u32,
    /// The legacy default stream, once something was submitted to it.
    null_stream: Option<Arc<Stream>>,
    /// Streams that were destroyed before their work was done.
    draining: Vec<Position>,
    peers: BTreeSet<usize>,
}

/// Bytes of a device that are in use.
#[derive(Debug)]
pub(crate) struct Charge {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

thread_local! {
    /// The ordinals of this thread's contexts, the current one last.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

impl Device {
    pub(crate) fn new(ordinal: usize, memory_bytes: usize) -> Self {
        let (used, fault) = (Arc::default(), AtomicI32::new(0));
        Self { ordinal, memory_bytes, used, fault, context: Mutex::default(), turn: Mutex::default() }
    }

    fn context(&self) -> MutexGuard<'_, Context> {
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of this device as C has it.
    pub(crate) fn number(&self) -> i32 {
        i32::try_from(self.ordinal).unwrap_or(i32::MAX)
    }

    pub(crate) fn context_handle(&self) -> Handle {
        Kind::Context.handle(self.ordinal + 1)
    }

    pub(crate) fn free_bytes(&self) -> usize {
        self.memory_bytes.saturating_sub(self.used.load(Ordering::Relaxed))
    }

    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub(crate) fn charge(&self, bytes: usize) -> Outcome<Charge> {
        let with = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.memory_bytes);
        let update = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with);
        update.map_err(|_| Code::OUT_OF_MEMORY)?;
        Ok(Charge { used: Arc::clone(&self.used), bytes })
    }

    /// Puts the context into this error, unless it is in one.
    pub(crate) fn fail(&self, code: Code) {
        let _ = self.fault.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// # Errors
    /// The error that the context is in.
    pub(crate) fn check(&self) -> Outcome {
        match Code(self.fault.load(Ordering::Acquire)) {
            Code::SUCCESS => Ok(()),
            code => Err(code),
        }
    }

    pub(crate) fn is_retained(&self) -> bool {
        self.context().retained > 0
    }

    pub(crate) fn retain(&self) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.context().retained += 1;
    }

    /// Ends one use of the context. With the last one it is destroyed, with all that is in it.
    ///
    /// # Errors
    /// `INVALID_CONTEXT` if it is not retained.
    pub(crate) fn release(&self, driver: &'static Driver) -> Outcome {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut context = self.context();
        match context.retained {
            0 => return Err(Code::INVALID_CONTEXT),
            1 => {}
            _ => {
                context.retained -= 1;
                return Ok(());
            }
        }
        drop(context);
        self.wait_for_all(driver);
        driver.streams.retain(|stream| stream.device().ordinal != self.ordinal);
        driver.events.retain(|event| event.device != self.ordinal);
        driver.modules.retain(|module| module.device != self.ordinal);
        driver.functions.retain(|function| function.device != self.ordinal);
        driver.space.free_all_of(self.ordinal);
        driver.pinned.remove_all_of(self.ordinal);
        *self.context() = Context::default();
        self.fault.store(0, Ordering::Release);
        Ok(())
    }

    /// The legacy default stream of this device's context.
    ///
    /// # Errors
    /// What the system refused.
    pub(crate) fn null_stream(&'static self) -> Outcome<Arc<Stream>> {
        let mut context = self.context();
        if let Some(stream) = &context.null_stream {
            return Ok(Arc::clone(stream));
        }
        let stream = Arc::new(Stream::start(self, true)?);
        context.null_stream = Some(Arc::clone(&stream));
        Ok(stream)
    }

    /// Everything submitted so far to streams that order themselves with the legacy default stream, or to all.
    pub(crate) fn positions(&self, driver: &Driver, all: bool) -> Vec<Position> {
        let streams = driver.streams.all();
        let own = streams.iter().filter(|stream| stream.device().ordinal == self.ordinal);
        let mut positions: Vec<Position> =
            own.filter(|stream| all || stream.is_blocking()).map(|stream| stream.position()).collect();
        let context = self.context();
        positions.extend(context.draining.iter().cloned());
        positions
    }

    /// The end of what was submitted to the legacy default stream so far, if anything was.
    pub(crate) fn null_position(&self) -> Option<Position> {
        self.context().null_stream.as_ref().map(|stream| stream.position())
    }

    /// Keeps in mind that a destroyed stream has work left.
    pub(crate) fn drain(&self, position: Position) {
        let mut context = self.context();
        context.draining.retain(|known| !known.is_reached());
        context.draining.push(position);
    }

    /// Waits until all streams of this device have done what was submitted to them.
    pub(crate) fn wait_for_all(&self, driver: &Driver) {
        let positions = self.positions(driver, true);
        positions.iter().chain(&self.null_position()).for_each(Position::wait);
    }

    /// # Errors
    /// `PEER_ACCESS_ALREADY_ENABLED`.
    pub(crate) fn enable_peer(&self, peer: usize) -> Outcome {
        if self.context().peers.insert(peer) { Ok(()) } else { Err(Code::PEER_ACCESS_ALREADY_ENABLED) }
    }
}

/// The device of a context.
///
/// # Errors
/// `INVALID_CONTEXT` for what is none, `CONTEXT_IS_DESTROYED` for one that nobody retains.
pub(crate) fn of_context(driver: &'static Driver, context: Handle) -> Outcome<&'static Device> {
    let ordinal = Kind::Context.number(context).and_then(|number| number.checked_sub(1));
    let device = ordinal.and_then(|ordinal| driver.devices.get(ordinal)).ok_or(Code::INVALID_CONTEXT)?;
    if device.is_retained() { Ok(device) } else { Err(Code::CONTEXT_IS_DESTROYED) }
}

/// The device of this thread's current context, whatever error that is in.
///
/// # Errors
/// `INVALID_CONTEXT` if there is none, `CONTEXT_IS_DESTROYED`.
pub(crate) fn current_or_failed(driver: &'static Driver) -> Outcome<&'static Device> {
    let ordinal = CURRENT.with_borrow(|stack| stack.last().copied()).ok_or(Code::INVALID_CONTEXT)?;
    let device = driver.devices.get(ordinal).ok_or(Code::INVALID_CONTEXT)?;
    if device.is_retained() { Ok(device) } else { Err(Code::CONTEXT_IS_DESTROYED) }
}

/// The device of this thread's current context.
///
/// # Errors
/// As [`current_or_failed`], and the error that the context is in.
pub(crate) fn current(driver: &'static Driver) -> Outcome<&'static Device> {
    let device = current_or_failed(driver)?;
    device.check()?;
    Ok(device)
}

/// Changes which contexts this thread has.
pub(crate) fn with_stack<T>(change: impl FnOnce(&mut Vec<usize>) -> T) -> T {
    CURRENT.with_borrow_mut(change)
}
