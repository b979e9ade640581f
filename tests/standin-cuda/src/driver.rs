//! The one driver of the process: its devices and all tables. Not what is done with them. Invariant: there is none before
//! a `cuInit` that succeeded, and from then on the same one until the process ends.

use std::io::Write as _;
use std::sync::OnceLock;

use crate::code::{Code, Outcome};
use crate::config::{self, Config};
use crate::device::Device;
use crate::event::Event;
use crate::handles::{Kind, Table};
use crate::module::{Function, Module};
use crate::physical::Unflushed;
use crate::pinned::Pinned;
use crate::space::Space;
use crate::stream::Stream;

pub(crate) struct Driver {
    pub(crate) config: &'static Config,
    pub(crate) devices: Vec<Device>,
    pub(crate) space: Space,
    pub(crate) pinned: Pinned,
    pub(crate) unflushed: Unflushed,
    pub(crate) streams: Table<Stream>,
    pub(crate) events: Table<Event>,
    pub(crate) modules: Table<Module>,
    pub(crate) functions: Table<Function>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// The driver, after `cuInit`.
pub(crate) fn get() -> Option<&'static Driver> {
    DRIVER.get()
}

/// What `cuInit` does.
///
/// # Errors
/// `INVALID_VALUE` for flags or switches that cannot be read, `NO_DEVICE` with no device.
pub(crate) fn init() -> Outcome {
    let config = config::get();
    if let Some(complaint) = config.complaint() {
        // Not a log line, which nobody may be looking at: the tests' environment is wrong.
        let _ = writeln!(std::io::stderr(), "stand-in libcuda: {complaint}");
        return Err(Code::INVALID_VALUE);
    }
    if config.devices == 0 {
        return Err(Code::NO_DEVICE);
    }
    DRIVER.get_or_init(|| Driver {
        config,
        devices: (0..config.devices).map(|ordinal| Device::new(ordinal, config.memory_bytes)).collect(),
        space: Space::default(),
        pinned: Pinned::default(),
        unflushed: Unflushed::default(),
        streams: Table::new(Kind::Stream),
        events: Table::new(Kind::Event),
        modules: Table::new(Kind::Module),
        functions: Table::new(Kind::Function),
    });
    Ok(())
}

impl Driver {
    /// # Errors
    /// `INVALID_DEVICE`.
    pub(crate) fn device(&self, ordinal: i32) -> Outcome<&Device> {
        usize::try_from(ordinal).ok().and_then(|at| self.devices.get(at)).ok_or(Code::INVALID_DEVICE)
    }

    /// # Errors
    /// `NOT_SUPPORTED` if `HETMEM_STANDIN_WITHOUT` names this part.
    pub(crate) fn need(&self, part: &str) -> Outcome {
        if self.config.has(part) { Ok(()) } else { Err(Code::NOT_SUPPORTED) }
    }

    /// How many objects are alive that a program has to end.
    pub(crate) fn live(&self) -> u64 {
        let contexts = self.devices.iter().filter(|device| device.is_retained()).count();
        let objects = self.streams.count() + self.events.count() + self.modules.count();
        (contexts + objects + self.space.count() + self.pinned.count()) as u64
    }
}
