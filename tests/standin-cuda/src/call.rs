//! What every exported function does before and after its own work: it is counted, may be made to fail, is written
//! down, and does not panic into C. unsafe: gives functions the names that C looks for. Not their work. Invariant: a
//! call that `HETMEM_STANDIN_FAIL` names has no effect.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crate::code::{Code, Outcome};
use crate::config;
use crate::driver::{self, Driver};
use crate::pointers::InText;

/// Defines C functions of libcuda. The body gives an [`Outcome`]; a body after `|driver|` is handed the driver, and so
/// fails before `cuInit`.
macro_rules! export {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) |$driver:ident| $body:block)*) => { $(
        export! { fn $name($($arg: $type),*) {
            let $driver = $crate::call::driver()?;
            $body
        } }
    )* };
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => { $(
        #[allow(unsafe_code, non_snake_case, clippy::too_many_arguments)]
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $type),*) -> ::std::ffi::c_int {
            let arguments = || {
                let parts: &[String] = &[$(format!(concat!(stringify!($arg), "={:?}"), $arg)),*];
                parts.join(" ")
            };
            $crate::call::run(stringify!($name), &arguments, move || -> $crate::code::Outcome { $body })
        }
    )* };
}

static COUNTS: Mutex<Option<HashMap<&'static str, u64>>> = Mutex::new(None);

thread_local! {
    /// Whether this thread is inside a function that the caller gave to `cuLaunchHostFunc`.
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// The driver, for a function that needs `cuInit` before it.
///
/// # Errors
/// `NOT_INITIALIZED`.
pub(crate) fn driver() -> Outcome<&'static Driver> {
    driver::get().ok_or(Code::NOT_INITIALIZED)
}

/// Runs one exported function.
pub(crate) fn run(
    name: &'static str,
    arguments: &dyn Fn() -> String,
    body: impl FnOnce() -> Outcome,
) -> c_int {
    // What a panic of a body leaves behind is behind locks that do not mind.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let count = counted(name);
        let outcome = match config::injected(name, count) {
            Some(code) => Err(code),
            None if IN_HOST_FUNCTION.get() => Err(Code::NOT_PERMITTED),
            None => body(),
        };
        config::log(name, arguments, outcome.err().unwrap_or(Code::SUCCESS));
        outcome
    }));
    match outcome {
        Ok(Ok(())) => Code::SUCCESS.0,
        Ok(Err(code)) => code.0,
        Err(_) => Code::UNKNOWN.0,
    }
}

/// Runs what a caller gave to `cuLaunchHostFunc`, which may call nothing of this library.
pub(crate) fn as_host_function(act: impl FnOnce()) {
    IN_HOST_FUNCTION.set(true);
    act();
    IN_HOST_FUNCTION.set(false);
}

fn counted(name: &'static str) -> u64 {
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.get_or_insert_default().entry(name).or_default();
    *count += 1;
    *count
}

/// How often the function of this name was called in this process; 0 for a null pointer or another name.
#[unsafe(no_mangle)]
extern "C" fn hetmem_standin_calls(name: InText) -> u64 {
    let Ok(name) = name.get() else { return 0 };
    let counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    counts.as_ref().and_then(|counts| counts.get(name.as_str())).copied().unwrap_or(0)
}

/// How many contexts, streams, events, modules, allocations, handles, reservations, mappings and ranges of pinned host
/// memory are alive in this process.
#[unsafe(no_mangle)]
extern "C" fn hetmem_standin_live() -> u64 {
    catch_unwind(|| driver::get().map_or(0, Driver::live)).unwrap_or(u64::MAX)
}
