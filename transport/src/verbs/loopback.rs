//! A connection of a device with itself: both of its ends are here, in one thread, on a channel of events of their own. For
//! what can be tried without a peer; the fabric's own connections are `state`'s. Invariant: nothing waits longer than it is
//! told to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::StoreError;

use super::abi;
use super::plugin::{Connection, Context, Device, Greeting, Made, Pool, Queue};

/// How long the way from a device to itself may be looked for, in milliseconds.
const RESOLVE_MS: u32 = 2_000;
/// How often something is looked at that is waited for.
const LOOK: Duration = Duration::from_micros(200);

/// Ends go before what they use.
#[cfg_attr(not(test), expect(dead_code, reason = "kept for as long as the connection; tests use them"))]
pub(super) struct Loopback {
    pub(super) a: Connection,
    pub(super) b: Option<Connection>,
    pub(super) pools: [Arc<Pool>; 2],
    pub(super) queues: [Arc<Queue>; 2],
    pub(super) device: Arc<Device>,
    pub(super) context: Arc<Context>,
}

impl Loopback {
    /// Connects the device that has this address.
    ///
    /// # Errors
    /// Why there is no such connection.
    pub(super) fn connect(
        context: &Arc<Context>,
        at: SocketAddr,
        greeting: Greeting<'_>,
        patience: Duration,
    ) -> Result<Self, StoreError> {
        let (_listener, at) = context.listen(SocketAddr::new(at.ip(), 0), 1)?;
        let mut a = context.resolve(at, RESOLVE_MS, 2)?;
        event(context, abi::EVENT_ROUTED, patience)?;
        let device = Device::own(context, Device::raw_of(&a)?);
        let open = || Ok::<_, StoreError>((device.queue(64)?, device.pool(16)?));
        let ((queue_a, pool_a), (queue_b, pool_b)) = (open()?, open()?);
        let asked = Made { number: 0, work_max: 16, pieces_max: 2, inline_bytes_max: 0 };
        a.queue_pair(&device, &queue_a, &pool_a, asked)?;
        a.connect(greeting)?;
        let requested = event(context, abi::EVENT_REQUEST, patience)?;
        let mut b = context.requested(requested.connection, 3);
        b.queue_pair(&device, &queue_b, &pool_b, asked)?;
        b.accept(greeting)?;
        event(context, abi::EVENT_ESTABLISHED, patience)?;
        event(context, abi::EVENT_ESTABLISHED, patience)?;
        let (queues, pools) = ([queue_a, queue_b], [pool_a, pool_b]);
        Ok(Self { a, b: Some(b), pools, queues, device, context: Arc::clone(context) })
    }

    /// The completion of end a's only work.
    ///
    /// # Errors
    /// `TimedOut` if there is none.
    pub(super) fn ended(&self, patience: Duration) -> Result<abi::Completion, StoreError> {
        waited(patience, "work of a device on itself", || {
            let mut done = Vec::with_capacity(1);
            self.queues[0].poll(&mut done)?;
            Ok(done.pop())
        })
    }
}

/// The next event, which is of this kind.
///
/// # Errors
/// `Unavailable` if it is of another kind, `TimedOut` if there is none.
pub(super) fn event(
    context: &Arc<Context>,
    kind: u32,
    patience: Duration,
) -> Result<abi::ConnectionEvent, StoreError> {
    let event = waited(patience, "a device's connection with itself", || context.event())?;
    if event.kind == kind {
        return Ok(event);
    }
    let why = format!("event {} (status {}) where {kind} was to come", event.kind, event.status);
    Err(StoreError::unavailable("a device's connection with itself", why))
}

fn waited<T>(
    patience: Duration,
    what: &'static str,
    mut look: impl FnMut() -> Result<Option<T>, StoreError>,
) -> Result<T, StoreError> {
    let since = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if since.elapsed() > patience {
            return Err(StoreError::timed_out(
                "wait",
                what,
                u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
            ));
        }
        std::thread::sleep(LOOK);
    }
}
