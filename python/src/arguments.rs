//! Arguments as Python users write them. Not their meaning (`hetmem_client`). Invariant: a word that is not known is an
//! error that names those that are.

use std::time::Duration;

use hetmem_client::{GetOptions, IfExists, Key, PutOptions, Range, StoreError, Tier, TierHint, ZeroCopy};
use pyo3::prelude::*;

use crate::errors::to_python;

/// The longest time that is told apart from for ever.
const SECONDS_MAX: f64 = 1e9;

/// Seconds as a duration.
pub(crate) fn seconds(what: &'static str, seconds: f64) -> Result<Duration, StoreError> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(StoreError::invalid(what, format!("{seconds} s: 0 or more seconds are accepted")));
    }
    Ok(Duration::from_secs_f64(seconds.min(SECONDS_MAX)))
}

/// Where bytes are wanted, as a user says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Host,
    /// A GPU as this process numbers it.
    Cuda(u16),
    /// A GPU as the node numbers it.
    Tier(u16),
}

impl Device {
    /// `"cpu"`, `"host"`, `"cuda"`, `"cuda:0"`, `"gpu:0"`, or an object that prints as one of them.
    pub(crate) fn parse(device: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(device) = device else { return Ok(Self::Host) };
        let text = device.str()?.to_string();
        let numbered = |prefix: &str| text.strip_prefix(prefix)?.parse().ok();
        match text.as_str() {
            "cpu" | "host" => return Ok(Self::Host),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        let known = numbered("cuda:").map(Self::Cuda).or_else(|| numbered("gpu:").map(Self::Tier));
        known.ok_or_else(|| {
            let why = format!("{text:?}: \"cpu\", \"cuda:N\" (as this process numbers devices) or \"gpu:N\" (as the node does) is accepted");
            to_python(device.py(), &StoreError::invalid("device", why))
        })
    }

    /// The tier of the node.
    pub(crate) fn tier(self, store: &hetmem_client::Store) -> Result<Tier, StoreError> {
        match self {
            Self::Host => Ok(Tier::Host),
            Self::Tier(ordinal) => Ok(Tier::Gpu(ordinal)),
            Self::Cuda(ordinal) => store.tier_of_device(ordinal),
        }
    }
}

/// `"preferred"` or `"required"`.
pub(crate) fn zero_copy(word: &str) -> Result<ZeroCopy, StoreError> {
    match word {
        "preferred" => Ok(ZeroCopy::Preferred),
        "required" => Ok(ZeroCopy::Required),
        _ => Err(StoreError::invalid(
            "zero_copy",
            format!("{word:?}: \"preferred\" or \"required\" is accepted"),
        )),
    }
}

/// A key of the store.
pub(crate) fn key(py: Python<'_>, name: &str) -> PyResult<Key> {
    Key::new(name).map_err(|error| to_python(py, &error))
}

/// How to get, as Python's keywords say it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Getting {
    pub(crate) timeout: Option<f64>,
    pub(crate) verify: bool,
    pub(crate) keep: bool,
}

impl Getting {
    pub(crate) fn options(self, word: &str, timeout: Duration) -> Result<GetOptions, StoreError> {
        Ok(GetOptions {
            timeout: self.timeout.map_or(Ok(timeout), |time| seconds("timeout", time))?,
            keep: self.keep,
            verify: self.verify,
            zero_copy: zero_copy(word)?,
            ..GetOptions::default()
        })
    }
}

/// The rows `start..stop` of an array of these dimensions, as bytes.
pub(crate) fn rows(
    key: &Key,
    meta: &hetmem_client::ObjectMeta,
    start: u64,
    stop: Option<u64>,
) -> Result<Range, StoreError> {
    let dims = meta.shape.dims();
    let invalid = |why: String| StoreError::invalid("rows", format!("get {key:?}: {why}"));
    let Some((rows, row)) = dims.split_first() else {
        return Err(invalid("an object without dimensions has no rows".to_owned()));
    };
    let stop = stop.unwrap_or(*rows).min(*rows);
    if start > stop {
        return Err(invalid(format!("rows {start} to {stop} of {rows}")));
    }
    let bits = row.iter().product::<u64>().saturating_mul(meta.dtype.bits());
    if !bits.is_multiple_of(8) {
        return Err(invalid(format!("rows of {} {} share bytes", row.iter().product::<u64>(), meta.dtype)));
    }
    Ok(Range { start: start * (bits / 8), len_bytes: (stop - start) * (bits / 8) })
}

/// How to put: the keywords that all puts share.
#[derive(Clone, Debug)]
pub(crate) struct Putting {
    pub(crate) options: PutOptions,
    pub(crate) device: Option<Device>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Putting {
    type Error = PyErr;

    fn extract(keywords: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let py = keywords.py();
        let mut putting = Self { options: PutOptions::default(), device: None };
        let options = &mut putting.options;
        let known = |error: StoreError| to_python(py, &error);
        for (name, value) in keywords.cast::<pyo3::types::PyDict>()?.iter() {
            let name: String = name.extract()?;
            match name.as_str() {
                "if_exists" => {
                    options.if_exists = match value.extract::<String>()?.as_str() {
                        "keep" => IfExists::Keep,
                        "error" => IfExists::Error,
                        word => {
                            let why = format!("{word:?}: \"keep\" or \"error\" is accepted");
                            return Err(known(StoreError::invalid("if_exists", why)));
                        }
                    }
                }
                "pin" => options.pin = value.extract()?,
                "cache" => options.cache = value.extract()?,
                "seal_copy" => options.seal_copy = value.extract()?,
                "checksum" => options.checksum = value.extract()?,
                "replicas" => options.replicas = value.extract()?,
                "ttl" => {
                    let ttl: Option<f64> = value.extract()?;
                    options.ttl = ttl.map(|time| seconds("ttl", time)).transpose().map_err(known)?;
                }
                "timeout" => {
                    if let Some(time) = value.extract::<Option<f64>>()? {
                        options.timeout = seconds("timeout", time).map_err(known)?;
                    }
                }
                "zero_copy" => options.zero_copy = zero_copy(&value.extract::<String>()?).map_err(known)?,
                "device" => {
                    putting.device = (!value.is_none()).then(|| Device::parse(Some(&value))).transpose()?;
                }
                _ => {
                    return Err(pyo3::exceptions::PyTypeError::new_err(format!(
                        "no keyword {name}: if_exists, device, pin, cache, ttl, replicas, checksum, seal_copy, zero_copy \
                         and timeout are accepted"
                    )));
                }
            }
        }
        Ok(putting)
    }
}

/// A hint for where a put's bytes are to be.
pub(crate) fn hint(
    device: Option<Device>,
    store: &hetmem_client::Store,
) -> Result<Option<TierHint>, StoreError> {
    device.map(|device| device.tier(store).map(TierHint::from)).transpose()
}
