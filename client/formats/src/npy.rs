//! The .npy format: magic, version, a header that is a Python dictionary in text, one array's bytes.
//! Not a Python reader: the header's grammar is the small part that numpy writes. Invariant: an `Array` has as many
//! bytes as its shape fills, little-endian, row-major.

use std::fmt::Write as _;
use std::io::Write;

use hetmem_core::{DIMS_MAX, DType, ObjectMeta, StoreError};

/// The longest header in bytes. numpy itself writes a few hundred at most for plain arrays.
const HEADER_LEN_MAX: usize = 64 * 1024;
const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Element types and how a header describes them. Types that numpy lacks have no description.
const DESCRIPTIONS: [(DType, &str); 14] = [
    (DType::Bool, "|b1"),
    (DType::U8, "|u1"),
    (DType::I8, "|i1"),
    (DType::U16, "<u2"),
    (DType::I16, "<i2"),
    (DType::U32, "<u4"),
    (DType::I32, "<i4"),
    (DType::U64, "<u8"),
    (DType::I64, "<i8"),
    (DType::F16, "<f2"),
    (DType::F32, "<f4"),
    (DType::F64, "<f8"),
    (DType::C64, "<c8"),
    (DType::C128, "<c16"),
];

/// A file that was read and checked as a whole.
#[derive(Debug)]
pub struct Array<'a> {
    /// What the bytes mean.
    pub meta: ObjectMeta,
    /// The elements.
    pub bytes: &'a [u8],
}

/// Reads a file's bytes; `subject` is its name in errors.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Corrupt`] if the bytes are not such a file; [`hetmem_core::ErrorKind::Invalid`] for an
/// array that the store does not keep (column-major, big-endian, no plain numbers), with what to do.
pub fn parse<'a>(subject: &str, file: &'a [u8]) -> Result<Array<'a>, StoreError> {
    let corrupt = |why: String| StoreError::corrupt(subject, why);
    let refused = |why: String| StoreError::invalid(format!("array in {subject}"), why);
    let (header, bytes) = split(file).map_err(corrupt)?;
    let header = Header::parse(header).map_err(|why| corrupt(format!("the npy header: {why}")))?;
    let dtype = dtype_of(&header.descr).map_err(refused)?;
    let rows_matter = header.shape.iter().filter(|&&dim| dim > 1).count() > 1;
    if header.fortran_order && rows_matter {
        return Err(refused(
            "it is column-major (fortran_order), row-major is kept: np.save(path, np.ascontiguousarray(array))"
                .to_owned(),
        ));
    }
    if header.shape.len() > DIMS_MAX {
        return Err(refused(format!(
            "it has {} dimensions, at most {DIMS_MAX} are kept: reshape it",
            header.shape.len()
        )));
    }
    let meta = ObjectMeta::tensor(dtype, &header.shape).map_err(|error| corrupt(error.to_string()))?;
    match (bytes.len() as u64).cmp(&meta.len_bytes) {
        std::cmp::Ordering::Equal => Ok(Array { meta, bytes }),
        std::cmp::Ordering::Less => Err(corrupt(format!(
            "shape {:?} of {dtype} fills {} bytes, the file has {} (truncated?)",
            meta.shape,
            meta.len_bytes,
            bytes.len()
        ))),
        std::cmp::Ordering::Greater => Err(corrupt(format!(
            "{} bytes follow the array; one array per file is read",
            bytes.len() as u64 - meta.len_bytes
        ))),
    }
}

/// Cuts a file into header text and data.
fn split(file: &[u8]) -> Result<(&str, &[u8]), String> {
    let truncated = || format!("{} bytes are no npy file (truncated?)", file.len());
    let rest = match file.strip_prefix(MAGIC) {
        Some(rest) => rest,
        None if file.len() < MAGIC.len() => return Err(truncated()),
        None => return Err("it does not start as npy files do (\\x93NUMPY)".to_owned()),
    };
    let ([major, minor], rest) = rest.split_first_chunk::<2>().ok_or_else(truncated)?;
    let (len, rest) = match major {
        1 => {
            let (len, rest) = rest.split_first_chunk::<2>().ok_or_else(truncated)?;
            (usize::from(u16::from_le_bytes(*len)), rest)
        }
        2 | 3 => {
            let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(truncated)?;
            let len = u32::from_le_bytes(*len);
            (usize::try_from(len).unwrap_or(usize::MAX), rest)
        }
        _ => {
            return Err(format!("npy version {major}.{minor} is unknown, 1.0 to 3.0 are read"));
        }
    };
    if len > HEADER_LEN_MAX {
        return Err(format!("the npy header should have {len} bytes, at most {HEADER_LEN_MAX} are read"));
    }
    let Some((header, data)) = rest.split_at_checked(len) else {
        return Err(format!(
            "the npy header should have {len} bytes, the file has {} after its length (truncated?)",
            rest.len()
        ));
    };
    let header =
        std::str::from_utf8(header).map_err(|error| format!("the npy header is not UTF-8: {error}"))?;
    Ok((header, data))
}

fn dtype_of(descr: &str) -> Result<DType, String> {
    if let Some((dtype, _)) = DESCRIPTIONS.iter().find(|(_, known)| *known == descr) {
        return Ok(*dtype);
    }
    let mut chars = descr.chars();
    let order = chars.next();
    let element = chars.as_str();
    // A type of one byte has no order, and a file may still say one.
    let same = DESCRIPTIONS.iter().find(|(_, known)| known.get(1..) == Some(element));
    match (order, same) {
        (Some('<' | '>' | '='), Some((dtype, known))) if known.starts_with('|') => Ok(*dtype),
        (Some('>'), Some((dtype, _))) => Err(format!(
            "dtype {descr:?} is big-endian, little-endian is kept: np.save(path, array.astype('{dtype}'))"
        )),
        _ if element.starts_with('V') => Err(format!(
            "dtype {descr:?} is raw memory: npy has no bfloat16, float8 or records; save bfloat16 and float8 as \
             .safetensors"
        )),
        _ => Err(format!(
            "dtype {descr:?} is no plain number: bool, (u)int8 to (u)int64, float16 to float64, complex64 and \
             complex128 are kept"
        )),
    }
}

/// A header's three members.
#[derive(Debug, Default, PartialEq, Eq)]
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Header {
    /// `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, in any order, with any white space.
    fn parse(text: &str) -> Result<Self, String> {
        let mut words = Words { rest: text };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        words.expect('{')?;
        while !words.take('}') {
            let name = words.string()?;
            words.expect(':')?;
            let twice = match name {
                "descr" => descr.replace(words.descr()?).is_some(),
                "fortran_order" => fortran_order.replace(words.boolean()?).is_some(),
                "shape" => shape.replace(words.tuple()?).is_some(),
                _ => return Err(format!("it has a member {name:?} that npy headers do not have")),
            };
            if twice {
                return Err(format!("{name:?} comes twice"));
            }
            if !words.take(',') {
                words.expect('}')?;
                break;
            }
        }
        if !words.trim().is_empty() {
            return Err("text follows the dictionary".to_owned());
        }
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) => Ok(Self { descr, fortran_order, shape }),
            _ => Err("descr, fortran_order or shape is missing".to_owned()),
        }
    }
}

/// What is left to read of a header.
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn trim(&mut self) -> &'a str {
        self.rest = self.rest.trim_start();
        self.rest
    }

    fn take(&mut self, mark: char) -> bool {
        let rest = self.trim().strip_prefix(mark);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn expect(&mut self, mark: char) -> Result<(), String> {
        if self.take(mark) {
            return Ok(());
        }
        Err(format!("{mark:?} expected at {:?}", self.excerpt()))
    }

    fn excerpt(&self) -> String {
        self.rest.chars().take(24).collect()
    }

    /// Text in single or double quotes, without escapes: numpy needs none in plain headers.
    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.trim().starts_with('"') { '"' } else { '\'' };
        self.expect(quote)?;
        let Some((text, rest)) = self.rest.split_once(quote) else {
            return Err("a quote is not closed".to_owned());
        };
        self.rest = rest;
        Ok(text)
    }

    /// An element description; a list is a record of several.
    fn descr(&mut self) -> Result<String, String> {
        if self.trim().starts_with(['[', '(']) {
            return Err(
                "the elements are records (a structured dtype); save each field as an array".to_owned()
            );
        }
        self.string().map(str::to_owned)
    }

    fn boolean(&mut self) -> Result<bool, String> {
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.trim().strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(format!("True or False expected at {:?}", self.excerpt()))
    }

    fn tuple(&mut self) -> Result<Vec<u64>, String> {
        let mut dims = Vec::new();
        self.expect('(')?;
        while !self.take(')') {
            dims.push(self.number()?);
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(dims)
    }

    fn number(&mut self) -> Result<u64, String> {
        let text = self.trim();
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, rest) = text.split_at(end);
        let number = digits.parse::<u64>();
        let number = number.map_err(|_| format!("a dimension expected at {:?}", self.excerpt()))?;
        // Python 2 wrote long numbers with an L.
        self.rest = rest.strip_prefix('L').unwrap_or(rest);
        Ok(number)
    }
}

/// Writes everything before the array's bytes.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Invalid`] for an element type that the format lacks, with the remedy;
/// [`hetmem_core::ErrorKind::Os`] if writing fails.
pub fn write_header(out: &mut impl Write, meta: &ObjectMeta) -> Result<(), StoreError> {
    let known = DESCRIPTIONS.iter().find(|(dtype, _)| *dtype == meta.dtype);
    let Some((_, descr)) = known else {
        let remedy = if meta.dtype.safetensors().is_some() {
            "get it to a .safetensors file"
        } else {
            "get it to a file with another extension, as bytes"
        };
        return Err(StoreError::invalid(
            "array for a .npy file",
            format!("npy has no dtype {}: {remedy}", meta.dtype),
        ));
    };
    let mut shape = String::new();
    for dim in meta.shape.dims() {
        let _ = write!(shape, "{dim}, ");
    }
    if meta.shape.dims().len() > 1 {
        shape.truncate(shape.len() - 2);
    }
    let shape = shape.trim_end();
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    // The data starts at a multiple of 64 bytes, after magic, version, length, text and one newline.
    while !(MAGIC.len() + 4 + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    let len = u16::try_from(text.len())
        .map_err(|_| StoreError::invalid("array for a .npy file", "its header is too long"))?;
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&[1, 0]);
    header.extend_from_slice(&len.to_le_bytes());
    header.extend_from_slice(text.as_bytes());
    out.write_all(&header).map_err(|error| StoreError::os("write the npy header", error))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the tests' numbers are small")]
mod tests {
    use hetmem_core::ErrorKind;
    use proptest::prelude::*;

    use super::*;

    fn file(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[version, 0]);
        let len = header.len() as u32;
        let len_len = if version == 1 { 2 } else { 4 };
        bytes.extend_from_slice(&len.to_le_bytes()[..len_len]);
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn reads_what_numpy_writes() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }       \n";
        for version in [1, 2, 3] {
            let bytes = file(version, header, &[7; 24]);
            let array = parse("a.npy", &bytes).expect("numpy's own form");
            assert_eq!((array.meta.dtype, array.meta.shape.dims()), (DType::F32, &[2_u64, 3][..]));
            assert_eq!(array.bytes, [7; 24]);
        }
        for (header, dims, len) in [
            ("{'shape': (), 'fortran_order': True, 'descr': '<i8'}", &[][..], 8),
            ("{\"descr\":'>u1','fortran_order':True,'shape':(1,5,1)}", &[1, 5, 1][..], 5),
            ("{'descr': '|b1', 'fortran_order': False, 'shape': (0L,), }\n", &[0][..], 0),
        ] {
            let bytes = file(1, header, &vec![0; len]);
            let array = parse("a.npy", &bytes).expect(header);
            assert_eq!(array.meta.shape.dims(), dims, "{header}");
        }
    }

    #[test]
    fn hostile_and_foreign_files_are_refused_with_what_to_do() {
        let plain = |descr: &str| format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (2,), }}");
        let f4 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
        for (bytes, word) in [
            (vec![], "0 bytes"),
            (b"PK\x03\x04 an npz".to_vec(), "NUMPY"),
            (b"\x93NUMPY\x01".to_vec(), "truncated"),
            (b"\x93NUMPY\x04\x00\x00\x00\x00\x00".to_vec(), "version 4.0"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "4294967295"),
            (b"\x93NUMPY\x01\x00\x50\x00{".to_vec(), "80 bytes"),
            (file(1, f4, &[0; 7]), "truncated"),
            (file(1, f4, &[0; 9]), "1 bytes follow"),
            (file(1, &plain("'>f4'"), &[0; 8]), "astype('float32')"),
            (file(1, &plain("'<V2'"), &[0; 4]), ".safetensors"),
            (file(1, &plain("'|O'"), &[0; 16]), "no plain number"),
            (file(1, &plain("'\u{fc}'"), &[0; 16]), "no plain number"),
            (file(1, &plain("''"), &[0; 16]), "no plain number"),
            (file(1, &plain("[('x', '<f4')]"), &[0; 8]), "records"),
            (
                file(1, "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }", &[0; 16]),
                "ascontiguousarray",
            ),
            (
                file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1), }", &[0; 4]),
                "9 dimensions",
            ),
            (file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", &[0; 4]), "-1"),
            (
                file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", &[]),
                "dimension",
            ),
            (
                file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296,4294967296), }", &[]),
                "64-bit",
            ),
            (file(1, "{'descr': '<f4', 'fortran_order': False}", &[]), "missing"),
            (file(1, "{'descr': '<f4', 'descr': '<f4'}", &[]), "twice"),
            (file(1, "{'descr': '<f4'", &[]), "'}'"),
            (file(1, "{'descr': '<f4", &[]), "not closed"),
            (file(1, "{'other': 3}", &[]), "other"),
            (file(1, "import os", &[]), "'{'"),
            (file(1, &format!("{f4} + f()"), &[0; 8]), "follows"),
        ] {
            let error = parse("hostile.npy", &bytes).expect_err(word);
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "{error}");
            assert!(error.to_string().contains(word), "{error} should say {word:?}");
            assert!(error.to_string().contains("hostile.npy"), "{error}");
        }
    }

    #[test]
    fn every_dtype_returns_or_points_to_another_format() {
        for &dtype in DType::ALL {
            for shape in [&[][..], &[3], &[2, 5], &[0, 7]] {
                let meta = ObjectMeta::tensor(dtype, shape).expect("a tensor");
                let mut bytes = Vec::new();
                match write_header(&mut bytes, &meta) {
                    Ok(()) => {
                        assert_eq!(bytes.len() % 64, 0);
                        bytes.resize(bytes.len() + meta.len_bytes as usize, 9);
                        let array = parse("own.npy", &bytes).expect("our own file");
                        assert_eq!(array.meta, meta);
                    }
                    Err(error) => {
                        let word = if dtype.safetensors().is_some() { ".safetensors" } else { "as bytes" };
                        assert!(error.to_string().contains(word), "{error}");
                        assert!(!DESCRIPTIONS.iter().any(|(known, _)| *known == dtype));
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn mutated_files_never_panic(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }  \n", &[7; 24]);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
                if let Ok(array) = parse("mutated", bytes) {
                    prop_assert_eq!(array.bytes.len() as u64, array.meta.len_bytes);
                }
            }
        }

        #[test]
        fn any_header_text_is_survived(header in "\\PC{0,80}") {
            let bytes = file(3, &header, &[]);
            if let Ok(array) = parse("any", &bytes) {
                prop_assert_eq!(array.bytes.len() as u64, array.meta.len_bytes);
            }
        }
    }
}
