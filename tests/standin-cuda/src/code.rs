//! The codes that functions answer with, their names and texts. Not a list of all that cuda.h has: of those that this
//! library or a `HETMEM_STANDIN_FAIL` switch may give. Invariant: names and texts are of static storage and end in NUL.

use std::ffi::{CStr, c_int};

use rustix::io::Errno;

/// A `CUresult`. Success among them only where C hands a code in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Code(pub(crate) c_int);

/// What every operation gives: `Err` holds a code other than success.
pub(crate) type Outcome<T = ()> = Result<T, Code>;

macro_rules! codes {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        impl Code {
            $(pub(crate) const $name: Self = Self($value);)*
        }

        /// Value, name and text, the latter two with their NUL.
        const TABLE: &[(c_int, &str, &str)] = &[$(
            ($value, concat!("CUDA_", codes!(@prefix $name), stringify!($name), "\0"), concat!($text, "\0")),
        )*];
    };
    (@prefix SUCCESS) => { "" };
    (@prefix $name:ident) => { "ERROR_" };
}

// Not every code is given by a function of its own: the rest are for `HETMEM_STANDIN_FAIL`.
#[allow(dead_code)]
mod table {
    use super::{Code, c_int};

    codes! {
        SUCCESS = 0, "no error";
        INVALID_VALUE = 1, "invalid argument";
        OUT_OF_MEMORY = 2, "out of memory";
        NOT_INITIALIZED = 3, "initialization error";
        DEINITIALIZED = 4, "driver shutting down";
        STUB_LIBRARY = 34, "CUDA driver is a stub library";
        NO_DEVICE = 100, "no CUDA-capable device is detected";
        INVALID_DEVICE = 101, "invalid device ordinal";
        INVALID_IMAGE = 200, "device kernel image is invalid";
        INVALID_CONTEXT = 201, "invalid device context";
        MAP_FAILED = 205, "mapping of buffer object failed";
        UNMAP_FAILED = 206, "unmapping of buffer object failed";
        ALREADY_MAPPED = 208, "resource already mapped";
        NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
        NOT_MAPPED = 211, "resource not mapped";
        ECC_UNCORRECTABLE = 214, "uncorrectable ECC error encountered";
        PEER_ACCESS_UNSUPPORTED = 217, "peer access is not supported between these two devices";
        INVALID_PTX = 218, "a PTX JIT compilation failed";
        UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain.";
        OPERATING_SYSTEM = 304, "OS call failed or operation not supported on this OS";
        INVALID_HANDLE = 400, "invalid resource handle";
        ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
        NOT_FOUND = 500, "named symbol not found";
        NOT_READY = 600, "device not ready";
        ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
        LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
        PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled";
        PEER_ACCESS_NOT_ENABLED = 705, "peer access has not been enabled";
        CONTEXT_IS_DESTROYED = 709, "context is destroyed";
        HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
        HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
        MISALIGNED_ADDRESS = 716, "misaligned address";
        LAUNCH_FAILED = 719, "unspecified launch failure";
        NOT_PERMITTED = 800, "operation not permitted";
        NOT_SUPPORTED = 801, "operation not supported";
        SYSTEM_NOT_READY = 802, "system not yet initialized";
        SYSTEM_DRIVER_MISMATCH = 803, "system has unsupported display driver / cuda driver combination";
        TIMEOUT = 909, "wait operation timed out";
        UNKNOWN = 999, "unknown error";
    }

    pub(super) fn find(accept: impl Fn(c_int, &str) -> bool) -> Option<(Code, &'static str, &'static str)> {
        let mut rows = TABLE.iter();
        let row = rows.find(|(value, name, _)| accept(*value, name.trim_end_matches('\0')));
        row.map(|(value, name, text)| (Code(*value), *name, *text))
    }
}

impl Code {
    /// The name in cuda.h; none for a number that is not in the table.
    pub(crate) fn name(self) -> Option<&'static CStr> {
        let (_, name, _) = table::find(|value, _| value == self.0)?;
        CStr::from_bytes_with_nul(name.as_bytes()).ok()
    }

    /// What it means in words.
    pub(crate) fn text(self) -> Option<&'static CStr> {
        let (_, _, text) = table::find(|value, _| value == self.0)?;
        CStr::from_bytes_with_nul(text.as_bytes()).ok()
    }

    /// From a number, or a name with or without its `CUDA_ERROR_`.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        if let Ok(number) = word.parse() {
            return Some(Self(number));
        }
        table::find(|_, name| name == word || name.strip_prefix("CUDA_ERROR_") == Some(word))
            .map(|(code, _, _)| code)
    }

    /// What the system refused, as the driver says it.
    pub(crate) fn of_system(errno: Errno) -> Self {
        match errno {
            Errno::NOMEM | Errno::NOSPC => Self::OUT_OF_MEMORY,
            Errno::BADF | Errno::INVAL => Self::INVALID_VALUE,
            _ => Self::OPERATING_SYSTEM,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_names_of_the_header() {
        assert_eq!(Code::SUCCESS.name(), Some(c"CUDA_SUCCESS"));
        assert_eq!(Code::ILLEGAL_ADDRESS.name(), Some(c"CUDA_ERROR_ILLEGAL_ADDRESS"));
        assert_eq!(Code(12_345).name(), None);
        assert_eq!(Code::OUT_OF_MEMORY.text(), Some(c"out of memory"));
    }

    #[test]
    fn codes_are_read_from_numbers_and_names() {
        for word in ["2", "OUT_OF_MEMORY", "CUDA_ERROR_OUT_OF_MEMORY"] {
            assert_eq!(Code::parse(word), Some(Code::OUT_OF_MEMORY), "{word}");
        }
        assert_eq!(Code::parse("OUT_OF_PATIENCE"), None);
    }
}
