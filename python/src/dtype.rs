//! Element types as others name them: DLPack's codes, the struct module's letters, numpy's and torch's words. Not what
//! an element is (`hetmem_core`). Invariant: what one table gives, the other direction takes back.

use std::ffi::CStr;

use hetmem_client::DType;

/// DLPack's `DLDataType` without its lanes, which are 1: type code and bits.
pub(crate) fn to_dlpack(dtype: DType) -> Option<(u8, u8)> {
    let bits = u8::try_from(dtype.bits()).ok()?;
    DLPACK.iter().find(|(known, _)| *known == dtype).map(|(_, code)| (*code, bits))
}

/// The element type of a DLPack tensor.
pub(crate) fn from_dlpack(code: u8, bits: u8, lanes: u16) -> Option<DType> {
    let found = DLPACK.iter().find(|(dtype, known)| *known == code && dtype.bits() == u64::from(bits));
    found.filter(|_| lanes == 1).map(|(dtype, _)| *dtype)
}

const DLPACK: [(DType, u8); 26] = [
    (DType::I8, 0),
    (DType::I16, 0),
    (DType::I32, 0),
    (DType::I64, 0),
    (DType::U8, 1),
    (DType::U16, 1),
    (DType::U32, 1),
    (DType::U64, 1),
    (DType::F16, 2),
    (DType::F32, 2),
    (DType::F64, 2),
    (DType::BF16, 4),
    (DType::C64, 5),
    (DType::C128, 5),
    (DType::Bool, 6),
    (DType::F8E3M4, 7),
    (DType::F8E4M3, 8),
    (DType::F8E4M3B11Fnuz, 9),
    (DType::F8E4M3Fn, 10),
    (DType::F8E4M3Fnuz, 11),
    (DType::F8E5M2, 12),
    (DType::F8E5M2Fnuz, 13),
    (DType::F8E8M0Fnu, 14),
    (DType::F6E2M3Fn, 15),
    (DType::F6E3M2Fn, 16),
    (DType::F4E2M1Fn, 17),
];

/// The buffer protocol's format, for the types that it has.
pub(crate) fn to_format(dtype: DType) -> Option<&'static CStr> {
    Some(match dtype {
        DType::Bool => c"?",
        DType::U8 => c"B",
        DType::I8 => c"b",
        DType::U16 => c"H",
        DType::I16 => c"h",
        DType::U32 => c"I",
        DType::I32 => c"i",
        // Eight bytes on every platform that this runs on, and what numpy calls int64.
        DType::U64 => c"L",
        DType::I64 => c"l",
        DType::F16 => c"e",
        DType::F32 => c"f",
        DType::F64 => c"d",
        DType::C64 => c"Zf",
        DType::C128 => c"Zd",
        _ => return None,
    })
}

/// The element type of a buffer.
pub(crate) fn from_format(format: &str, item_len: usize) -> Result<DType, String> {
    let (order, letters) = match format.split_at_checked(1) {
        Some((order @ ("@" | "=" | "<" | ">" | "!"), letters)) => (order, letters),
        _ => ("@", format),
    };
    if matches!(order, ">" | "!") && item_len > 1 {
        return Err(format!("format {format:?} is big-endian, little-endian is kept: array.astype('<...')"));
    }
    let dtype = match (letters, item_len) {
        ("?", 1) => DType::Bool,
        ("b", 1) => DType::I8,
        ("B" | "c", 1) => DType::U8,
        ("h" | "i" | "l" | "q" | "n", 2) => DType::I16,
        ("H" | "I" | "L" | "Q" | "N", 2) => DType::U16,
        ("h" | "i" | "l" | "q" | "n", 4) => DType::I32,
        ("H" | "I" | "L" | "Q" | "N", 4) => DType::U32,
        ("h" | "i" | "l" | "q" | "n", 8) => DType::I64,
        ("H" | "I" | "L" | "Q" | "N", 8) => DType::U64,
        ("e", 2) => DType::F16,
        ("f", 4) => DType::F32,
        ("d", 8) => DType::F64,
        ("Zf", 8) => DType::C64,
        ("Zd", 16) => DType::C128,
        _ => {
            return Err(format!(
                "format {format:?} of {item_len} bytes is no plain number: bool, (u)int8 to (u)int64, float16 to \
                 float64, bfloat16, float8 and complex are kept"
            ));
        }
    };
    Ok(dtype)
}

/// The element type of a user's word: `float32`, `F32`, `torch.float32`, or what `numpy.dtype` prints.
pub(crate) fn parse(name: &str) -> Result<DType, hetmem_client::StoreError> {
    let name = name.strip_prefix("torch.").unwrap_or(name);
    DType::parse(match name {
        "half" => "float16",
        "float" => "float32",
        "double" => "float64",
        name => name,
    })
}
