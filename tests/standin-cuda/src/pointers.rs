//! Pointers that C callers hand in, each of a type that says what may be done with it. unsafe: they are read and
//! written here and nowhere else. Not device pointers. Invariant: only C makes a value of these types, and so vouches
//! for what cuda.h demands of that argument: null, or good for the length of the call.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};
use std::fmt;

use crate::code::{Code, Outcome};

/// Where one `T` is written.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Out<T>(*mut T);

/// Where one or more `T` are read. `T` is made of integers.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct In<T>(*const T);

/// Where a value is written whose type another argument says.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct OutAny(*mut c_void);

/// Where a text is written, cut to a length.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct OutText(*mut c_char);

/// A text that ends in NUL.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct InText(*const c_char);

/// The parameters of a kernel: a pointer to each.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct InParameters(*const *const c_void);

/// Memory of the caller, for longer than the call: what a copy reads or writes. An address, until `run` uses it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct HostPtr(*mut c_void);

macro_rules! shown_as_addresses {
    ($([$($bound:tt)*] $name:ty),*) => { $(
        impl<$($bound)*> fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0.addr())
            }
        }
    )* };
}
shown_as_addresses!([T] Out<T>, [T] In<T>, [] OutAny, [] OutText, [] InText, [] InParameters, [] HostPtr);

impl<T> Out<T> {
    /// # Errors
    /// `INVALID_VALUE` for a null pointer.
    pub(crate) fn put(self, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so C vouches for room for one `T`, until this call returns; nothing is asked of alignment.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    pub(crate) fn put_if_wanted(self, value: T) {
        // Null says that the caller does not want it.
        let _ = self.put(value);
    }
}

impl<T: Copy> In<T> {
    /// # Errors
    /// `INVALID_VALUE` for a null pointer.
    pub(crate) fn get(self) -> Outcome<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so C vouches for one `T`, until this call returns; any bytes are one.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// # Errors
    /// `INVALID_VALUE` for a null pointer with a count above 0.
    pub(crate) fn get_all(self, count: usize) -> Outcome<Vec<T>> {
        if count > 0 && self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: C vouches for `count` values in a row, until this call returns; any bytes are such values.
        Ok((0..count).map(|at| unsafe { self.0.add(at).read_unaligned() }).collect())
    }
}

impl OutAny {
    /// # Errors
    /// `INVALID_VALUE` for a null pointer.
    pub(crate) fn put<T>(self, value: T) -> Outcome {
        Out::<T>(self.0.cast()).put(value)
    }
}

impl OutText {
    /// Writes as much as fits into `len` bytes with a NUL at the end.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a null pointer or no room.
    pub(crate) fn put(self, text: &str, len: usize) -> Outcome {
        if self.0.is_null() || len == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let kept = text.len().min(len - 1);
        // SAFETY: not null, so C vouches for `len` writable bytes until this call returns; `kept` + 1 are at most those.
        unsafe {
            self.0.copy_from_nonoverlapping(text.as_ptr().cast(), kept);
            self.0.add(kept).write(0);
        }
        Ok(())
    }
}

impl InText {
    /// What precedes the first NUL.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a null pointer.
    pub(crate) fn bytes(self) -> Outcome<Vec<u8>> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so C vouches for a text that ends in NUL, until this call returns.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_bytes().to_vec())
    }

    /// # Errors
    /// `INVALID_VALUE` for a null pointer or what is not UTF-8.
    pub(crate) fn get(self) -> Outcome<String> {
        String::from_utf8(self.bytes()?).map_err(|_| Code::INVALID_VALUE)
    }
}

impl InParameters {
    /// Numbers of these many bytes each, at most 8.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a null pointer where there are parameters.
    pub(crate) fn get_all(self, lens: &[usize]) -> Outcome<Vec<u64>> {
        let pointers = In(self.0).get_all(lens.len())?;
        let each = pointers.into_iter().zip(lens).map(|(pointer, len)| {
            let bytes = In(pointer.cast::<u8>()).get_all((*len).min(8))?;
            Ok(bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
        });
        each.collect()
    }
}

impl HostPtr {
    /// A pointer to memory at this address.
    pub(crate) fn of_address(address: usize) -> Self {
        Self(std::ptr::with_exposed_provenance_mut(address))
    }

    pub(crate) fn address(self) -> usize {
        self.0.expose_provenance()
    }
}
