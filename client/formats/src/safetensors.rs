//! The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes without gaps.
//! Not the official crate, whose errors name neither the tensor nor the values, and which keeps the last of two
//! tensors of one name; the tests compare with it. Invariant: the tensors of a `SafeTensors` lie inside its bytes,
//! one after another, and each shape fills its bytes.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;

use hetmem_core::{DIMS_MAX, DType, ObjectMeta, StoreError};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

/// The longest header in bytes: the official readers' limit.
pub const HEADER_LEN_MAX: u64 = 100_000_000;
/// The header's name for what is no tensor: a map of text to text.
pub const METADATA: &str = "__metadata__";

const LEN_LEN: usize = 8;

/// What `__metadata__` holds.
pub type Metadata = BTreeMap<String, String>;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// What its bytes mean.
    pub meta: ObjectMeta,
    span: Range<usize>,
}

/// A file that was read and checked as a whole.
#[derive(Debug)]
pub struct SafeTensors<'a> {
    /// In the order of their bytes.
    pub tensors: Vec<Tensor>,
    /// The file's `__metadata__`, if it has one.
    pub metadata: Option<Metadata>,
    data: &'a [u8],
}

impl<'a> SafeTensors<'a> {
    /// Reads a file's bytes; `subject` is its name in errors.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Corrupt`] if the bytes are not such a file, [`hetmem_core::ErrorKind::Invalid`]
    /// for a tensor that this store cannot hold.
    pub fn parse(subject: &str, file: &'a [u8]) -> Result<Self, StoreError> {
        let corrupt = |why: String| StoreError::corrupt(subject, why);
        let (header, data) = split(file).map_err(corrupt)?;
        let header = std::str::from_utf8(header)
            .map_err(|error| corrupt(format!("the safetensors header is not UTF-8: {error}")))?;
        let header: Header = serde_json::from_str(header)
            .map_err(|error| corrupt(format!("the safetensors header is not what it should be: {error}")))?;
        let mut tensors = Vec::with_capacity(header.tensors.len());
        for (name, stated) in header.tensors {
            tensors.push(stated.check(name, data.len() as u64).map_err(corrupt)?);
        }
        tensors.sort_by_key(|tensor| (tensor.span.start, tensor.span.end));
        check_cover(&tensors, data.len()).map_err(corrupt)?;
        Ok(Self { tensors, metadata: header.metadata, data })
    }

    /// The bytes of one of this file's tensors; none for a tensor of another file.
    pub fn bytes_of(&self, tensor: &Tensor) -> &'a [u8] {
        self.data.get(tensor.span.clone()).unwrap_or_default()
    }
}

/// Cuts a file into header and data.
fn split(file: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let Some((len, rest)) = file.split_first_chunk::<LEN_LEN>() else {
        return Err(format!(
            "{} bytes are no safetensors file: the header's length alone takes {LEN_LEN}",
            file.len()
        ));
    };
    let len = u64::from_le_bytes(*len);
    if len > HEADER_LEN_MAX {
        return Err(format!(
            "the safetensors header should have {len} bytes, at most {HEADER_LEN_MAX} are read (is this a \
             safetensors file?)"
        ));
    }
    let header_and_data = usize::try_from(len).ok().and_then(|len| rest.split_at_checked(len));
    header_and_data.ok_or_else(|| {
        format!(
            "the safetensors header should have {len} bytes, the file has {} after its length (truncated?)",
            rest.len()
        )
    })
}

/// The header as JSON says it; nothing is checked yet but its form, and that no name comes twice.
struct Header {
    tensors: Vec<(String, Stated)>,
    metadata: Option<Metadata>,
}

/// What a header says of one tensor.
#[derive(serde::Deserialize)]
struct Stated {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Stated {
    fn check(self, name: String, data_len: u64) -> Result<Tensor, String> {
        let dtype = DType::ALL.iter().find(|dtype| dtype.safetensors() == Some(self.dtype.as_str()));
        let Some(&dtype) = dtype else {
            return Err(format!("tensor {name:?} has the unknown dtype {:?}", self.dtype));
        };
        let (start, end) = self.data_offsets;
        if start > end || end > data_len {
            return Err(format!(
                "tensor {name:?} is said to be at bytes {start} to {end}, the file has {data_len} bytes of data \
                 (truncated?)"
            ));
        }
        if self.shape.len() > DIMS_MAX {
            return Err(format!(
                "tensor {name:?} has {} dimensions, at most {DIMS_MAX} are kept (reshape it)",
                self.shape.len()
            ));
        }
        let meta = ObjectMeta::new(dtype, &self.shape, end - start)
            .map_err(|error| format!("tensor {name:?}: {error}"))?;
        if !whole_bytes(&meta) {
            return Err(format!("tensor {name:?}: shape {:?} of {dtype} ends inside a byte", meta.shape));
        }
        match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) => Ok(Tensor { name, meta, span: start..end }),
            _ => Err(format!("tensor {name:?} is beyond this machine's addresses")),
        }
    }
}

/// Whether the elements end where a byte ends, which the format asks for.
fn whole_bytes(meta: &ObjectMeta) -> bool {
    let bits = meta.shape.elements().and_then(|elements| elements.checked_mul(meta.dtype.bits()));
    bits.is_some_and(|bits| bits.is_multiple_of(8))
}

/// The format allows neither gaps nor overlaps, so that a file has one meaning and hides nothing.
fn check_cover(tensors: &[Tensor], data_len: usize) -> Result<(), String> {
    let mut end = 0;
    for tensor in tensors {
        if tensor.span.start != end {
            let what = if tensor.span.start < end {
                "overlaps the one before it, which ends"
            } else {
                "leaves a gap after the one before it, which ends"
            };
            return Err(format!(
                "tensor {:?} at byte {} {what} at byte {end}",
                tensor.name, tensor.span.start
            ));
        }
        end = tensor.span.end;
    }
    if end != data_len {
        return Err(format!("the tensors end at byte {end}, the file has {data_len} bytes of data"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensor names to {dtype, shape, data_offsets}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: Vec::new(), metadata: None };
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("the name {name:?} comes twice")));
            }
            let of_name = |error: A::Error| A::Error::custom(format!("{name:?}: {error}"));
            if name == METADATA {
                header.metadata = Some(map.next_value().map_err(of_name)?);
            } else {
                let stated = map.next_value().map_err(of_name)?;
                header.tensors.push((name, stated));
            }
        }
        Ok(header)
    }
}

/// The order in which a file holds these tensors: wider elements first, so that each is aligned where the data is,
/// then by name. The official writer's order.
pub fn file_order(tensors: &mut [(String, ObjectMeta)]) {
    tensors.sort_by(|(left, left_meta), (right, right_meta)| {
        let widths = right_meta.dtype.bits().cmp(&left_meta.dtype.bits());
        widths.then_with(|| left.cmp(right))
    });
}

/// Writes length and header; the tensors' bytes follow in the order given.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Invalid`] for a tensor that the format cannot hold, named with the remedy;
/// [`hetmem_core::ErrorKind::Os`] if writing fails.
pub fn write_header(
    out: &mut impl Write,
    tensors: &[(String, ObjectMeta)],
    metadata: Option<&Metadata>,
) -> Result<(), StoreError> {
    let header = header_text(tensors, metadata)?;
    let len = header.len() as u64;
    let write = |out: &mut dyn Write| -> io::Result<()> {
        out.write_all(&len.to_le_bytes())?;
        out.write_all(header.as_bytes())
    };
    write(out).map_err(|error| StoreError::os("write the safetensors header", error))
}

fn header_text(tensors: &[(String, ObjectMeta)], metadata: Option<&Metadata>) -> Result<String, StoreError> {
    let json = |error: serde_json::Error| StoreError::invalid("safetensors header", error.to_string());
    let mut members = Vec::with_capacity(tensors.len() + 1);
    if let Some(metadata) = metadata {
        let metadata = serde_json::to_string(metadata).map_err(json)?;
        members.push(format!("\"{METADATA}\":{metadata}"));
    }
    let mut start = 0_u64;
    for (name, meta) in tensors {
        let dtype = file_dtype(name, meta)?;
        let end = start.saturating_add(meta.len_bytes);
        let name = serde_json::to_string(name).map_err(json)?;
        let dims = serde_json::to_string(meta.shape.dims()).map_err(json)?;
        members.push(format!(
            "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{dims},\"data_offsets\":[{start},{end}]}}"
        ));
        start = end;
    }
    let mut text = format!("{{{}}}", members.join(","));
    // Spaces at the end align the data that follows.
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    if text.len() as u64 > HEADER_LEN_MAX {
        let len = text.len() as u64;
        return Err(StoreError::too_large("write", "safetensors header in bytes", len, HEADER_LEN_MAX));
    }
    Ok(text)
}

fn file_dtype(name: &str, meta: &ObjectMeta) -> Result<&'static str, StoreError> {
    let refused = |why: &str| {
        StoreError::invalid(
            "tensor for a .safetensors file",
            format!(
                "{name:?} is {} of shape {:?}: {why} (get it alone to a file with another extension)",
                meta.dtype, meta.shape
            ),
        )
    };
    if name == METADATA {
        return Err(refused("that name is not for tensors"));
    }
    if !whole_bytes(meta) {
        return Err(refused("the format holds whole bytes only"));
    }
    meta.dtype.safetensors().ok_or_else(|| refused("the format has no such dtype"))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the tests' numbers are small")]
mod tests {
    use hetmem_core::ErrorKind;
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn good() -> Vec<u8> {
        file(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"BF16","shape":[1,1],"data_offsets":[8,10]},"none":{"dtype":"I64","shape":[0,3],"data_offsets":[10,10]}}   "#,
            &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        )
    }

    #[test]
    fn reads_names_shapes_bytes_and_metadata() {
        let bytes = good();
        let read = SafeTensors::parse("t", &bytes).expect("a good file");
        let names: Vec<&str> = read.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "a", "none"]);
        assert_eq!(read.bytes_of(&read.tensors[1]), [9, 10]);
        assert_eq!(read.tensors[1].meta.dtype, DType::BF16);
        assert_eq!(read.tensors[1].meta.shape.dims(), [1, 1]);
        assert!(read.bytes_of(&read.tensors[2]).is_empty());
        assert_eq!(read.metadata.as_ref().map(|map| map["format"].as_str()), Some("pt"));
    }

    /// Each hostile file, and the word its error must say.
    #[test]
    fn hostile_files_are_refused_with_what_is_wrong() {
        let one = |info: &str| file(&format!("{{\"t\":{info}}}"), &[0; 8]);
        let cases = [
            (vec![], "0 bytes"),
            (vec![1, 0, 0], "3 bytes"),
            (u64::MAX.to_le_bytes().to_vec(), "18446744073709551615"),
            (100_000_001_u64.to_le_bytes().to_vec(), "100000001"),
            (good()[..40].to_vec(), "truncated"),
            (good()[..good().len() - 1].to_vec(), "truncated"),
            (file("", b""), "EOF"),
            (file("[]", b""), "a map of tensor names"),
            (file("{\"t\":7}", b""), "\"t\""),
            ([&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(), "UTF-8"),
            (one(r#"{"dtype":"F31","shape":[2],"data_offsets":[0,8]}"#), "\"F31\""),
            (one(r#"{"dtype":"float32","shape":[2],"data_offsets":[0,8]}"#), "\"float32\""),
            (one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), "12 bytes"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "8 to 0"),
            (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#), "8 to 16"),
            (
                one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}"#),
                "8 bytes of data",
            ),
            (one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), "-2"),
            (one(r#"{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}"#), "2.5"),
            (one(r#"{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}"#), "64-bit"),
            (one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}"#), "9 dimensions"),
            (one(r#"{"dtype":"F4","shape":[15],"data_offsets":[0,8]}"#), "inside a byte"),
            (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), "end at byte 4"),
            (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), "gap"),
            (one(r#"{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), "duplicate"),
            (one(r#"{"dtype":"F32","shape":[2]}"#), "data_offsets"),
            (file("{\"__metadata__\":{\"a\":7}}", b""), "__metadata__"),
            (file("{\"__metadata__\":{},\"__metadata__\":{}}", b""), "twice"),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
                    &[0; 8],
                ),
                "overlaps",
            ),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
                    &[0; 8],
                ),
                "twice",
            ),
        ];
        for (bytes, word) in cases {
            let error = SafeTensors::parse("hostile.safetensors", &bytes).expect_err(word);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            let text = error.to_string();
            assert!(text.contains(word), "{text:?} should say {word:?}");
            assert!(text.starts_with("hostile.safetensors: "), "{text:?}");
        }
    }

    #[test]
    fn every_dtype_of_the_format_returns() {
        let mut tensors: Vec<(String, ObjectMeta)> = Vec::new();
        for &dtype in DType::ALL {
            if dtype.safetensors().is_some() {
                let meta = ObjectMeta::tensor(dtype, &[2, 4]).expect("a tensor");
                tensors.push((format!("t.{dtype}\n\"\u{fc}"), meta));
            }
        }
        file_order(&mut tensors);
        let metadata = Metadata::from([("k\"".to_owned(), "v\\".to_owned())]);
        let mut bytes = Vec::new();
        write_header(&mut bytes, &tensors, Some(&metadata)).expect("written");
        assert_eq!(bytes.len() % 8, 0);
        for (at, (_, meta)) in tensors.iter().enumerate() {
            bytes.extend(std::iter::repeat_n(at as u8, meta.len_bytes as usize));
        }
        let read = SafeTensors::parse("t", &bytes).expect("our own file");
        assert_eq!(read.metadata, Some(metadata));
        for (at, (name, meta)) in tensors.iter().enumerate() {
            let tensor = &read.tensors[at];
            assert_eq!((&tensor.name, &tensor.meta), (name, meta));
            assert!(read.bytes_of(tensor).iter().all(|&byte| byte == at as u8));
        }
        let official = ::safetensors::SafeTensors::deserialize(&bytes).expect("the official reader agrees");
        assert_eq!(official.len(), tensors.len());
        for tensor in &read.tensors {
            let view = official.tensor(&tensor.name).expect("named alike");
            assert_eq!(view.data(), read.bytes_of(tensor));
            assert_eq!(Some(view.dtype().to_string().as_str()), tensor.meta.dtype.safetensors());
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_named() {
        for (name, dtype, shape, word) in [
            ("x", DType::C128, &[2_u64][..], "no such dtype"),
            ("x", DType::F4E2M1Fn, &[3][..], "whole bytes"),
            (METADATA, DType::U8, &[3][..], "not for tensors"),
        ] {
            let meta = ObjectMeta::tensor(dtype, shape).expect("a tensor");
            let error = write_header(&mut Vec::new(), &[(name.to_owned(), meta)], None).expect_err(word);
            assert!(error.to_string().contains(word), "{error} should say {word:?}");
        }
    }

    proptest! {
        /// Whatever is done to a good file, reading it ends in a value or an error, and what the official reader
        /// refuses is never taken (it reads one thing more: a name that comes twice at the same place).
        #[test]
        fn mutated_files_never_panic_nor_pass_where_the_official_reader_refuses(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
            cuts in any::<bool>(),
        ) {
            let mut bytes = good();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(read) = SafeTensors::parse("mutated", &bytes) {
                prop_assert!(::safetensors::SafeTensors::deserialize(&bytes).is_ok());
                for tensor in &read.tensors {
                    prop_assert_eq!(read.bytes_of(tensor).len() as u64, tensor.meta.len_bytes);
                }
            }
        }

        #[test]
        fn any_header_text_is_survived(header in "[{}\\[\\]:,\"a-z0-9 ]{0,60}", data in proptest::collection::vec(any::<u8>(), 0..16)) {
            let bytes = file(&header, &data);
            if let Ok(read) = SafeTensors::parse("any", &bytes) {
                prop_assert_eq!(read.tensors.iter().map(|tensor| tensor.meta.len_bytes).sum::<u64>(), data.len() as u64);
            }
        }
    }
}
