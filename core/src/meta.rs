//! What an object's bytes mean: element type, shape, length, checksum. Not the bytes, and not where they are.
//! Invariant: an `ObjectMeta` that was built by `ObjectMeta::new` has a shape whose elements fill `len_bytes`.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::checksum::Checksum;
use crate::error::StoreError;

/// The most dimensions a shape has.
pub const DIMS_MAX: usize = 8;

/// The longest object, in bytes: offsets and lengths stay far from overflow everywhere.
pub const OBJECT_LEN_MAX: u64 = 1 << 44;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal, $safetensors:expr, $bits:literal;)*) => {
        /// The type of one element: every type of DLPack 1.1 and of safetensors that has a fixed width.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])* $name = $code,)*
        }

        impl DType {
            /// Every element type, in the order of the wire codes.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name that users write and see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Bits of one element; less than 8 where elements share a byte.
            #[must_use]
            pub const fn bits(self) -> u64 {
                match self { $(Self::$name => $bits,)* }
            }

            /// The name in a safetensors header, where that format has the type.
            #[must_use]
            pub const fn safetensors(self) -> Option<&'static str> {
                match self { $(Self::$name => $safetensors,)* }
            }

            /// The type of a wire code.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool = 1, "bool", Some("BOOL"), 8;
    /// Unsigned 8-bit integer; also what raw bytes are.
    U8 = 2, "uint8", Some("U8"), 8;
    /// Signed 8-bit integer.
    I8 = 3, "int8", Some("I8"), 8;
    /// Unsigned 16-bit integer.
    U16 = 4, "uint16", Some("U16"), 16;
    /// Signed 16-bit integer.
    I16 = 5, "int16", Some("I16"), 16;
    /// Unsigned 32-bit integer.
    U32 = 6, "uint32", Some("U32"), 32;
    /// Signed 32-bit integer.
    I32 = 7, "int32", Some("I32"), 32;
    /// Unsigned 64-bit integer.
    U64 = 8, "uint64", Some("U64"), 64;
    /// Signed 64-bit integer.
    I64 = 9, "int64", Some("I64"), 64;
    /// IEEE 754 half precision.
    F16 = 10, "float16", Some("F16"), 16;
    /// bfloat16.
    BF16 = 11, "bfloat16", Some("BF16"), 16;
    /// IEEE 754 single precision.
    F32 = 12, "float32", Some("F32"), 32;
    /// IEEE 754 double precision.
    F64 = 13, "float64", Some("F64"), 64;
    /// Two single-precision numbers.
    C64 = 14, "complex64", Some("C64"), 64;
    /// Two double-precision numbers.
    C128 = 15, "complex128", None, 128;
    /// FP8, 4 exponent bits, finite, one NaN (OCP E4M3).
    F8E4M3Fn = 16, "float8_e4m3fn", Some("F8_E4M3"), 8;
    /// FP8, 5 exponent bits (OCP E5M2).
    F8E5M2 = 17, "float8_e5m2", Some("F8_E5M2"), 8;
    /// FP8 E4M3, no negative zero.
    F8E4M3Fnuz = 18, "float8_e4m3fnuz", Some("F8_E4M3FNUZ"), 8;
    /// FP8 E5M2, no negative zero.
    F8E5M2Fnuz = 19, "float8_e5m2fnuz", Some("F8_E5M2FNUZ"), 8;
    /// FP8 E4M3, IEEE-style infinities.
    F8E4M3 = 20, "float8_e4m3", None, 8;
    /// FP8 E4M3, exponent bias 11, no negative zero.
    F8E4M3B11Fnuz = 21, "float8_e4m3b11fnuz", None, 8;
    /// FP8 with 3 exponent bits.
    F8E3M4 = 22, "float8_e3m4", None, 8;
    /// An 8-bit power of two (OCP E8M0), the scale of microscaling formats.
    F8E8M0Fnu = 23, "float8_e8m0fnu", Some("F8_E8M0"), 8;
    /// FP6 E2M3 (OCP), four elements in three bytes.
    F6E2M3Fn = 24, "float6_e2m3fn", Some("F6_E2M3"), 6;
    /// FP6 E3M2 (OCP), four elements in three bytes.
    F6E3M2Fn = 25, "float6_e3m2fn", Some("F6_E3M2"), 6;
    /// FP4 E2M1 (OCP), two elements in a byte.
    F4E2M1Fn = 26, "float4_e2m1fn", Some("F4"), 4;
    /// Unsigned 4-bit integer, two elements in a byte.
    U4 = 27, "uint4", None, 4;
    /// Signed 4-bit integer, two elements in a byte.
    I4 = 28, "int4", None, 4;
}

impl DType {
    /// The number that stands for this type in shared memory and on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The type of a user's name for it (`float32`) or a safetensors name (`F32`).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] naming what was given.
    pub fn parse(name: &str) -> Result<Self, StoreError> {
        let known = |dtype: &&Self| dtype.name() == name || dtype.safetensors() == Some(name);
        Self::ALL.iter().find(known).copied().ok_or_else(|| {
            StoreError::invalid(
                "dtype",
                format!("{name:?} is not an element type (float32, bfloat16, F32, ...)"),
            )
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Up to [`DIMS_MAX`] dimensions; none is a scalar.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    dims: [u64; DIMS_MAX],
    count: u8,
}

impl Shape {
    /// A shape of these dimensions.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for more than [`DIMS_MAX`] of them.
    pub fn new(dims: &[u64]) -> Result<Self, StoreError> {
        let mut shape = Self::default();
        let Some(places) = shape.dims.get_mut(..dims.len()) else {
            return Err(StoreError::invalid(
                "shape",
                format!("{} dimensions, at most {DIMS_MAX} are kept", dims.len()),
            ));
        };
        places.copy_from_slice(dims);
        shape.count = dims.len().try_into().unwrap_or_default();
        Ok(shape)
    }

    /// A shape of `count` dimensions, each from its position; `None` for more than [`DIMS_MAX`] of them.
    #[must_use]
    #[inline]
    pub fn from_fn(count: usize, mut dim: impl FnMut(usize) -> u64) -> Option<Self> {
        let mut shape = Self::default();
        for (position, place) in shape.dims.get_mut(..count)?.iter_mut().enumerate() {
            *place = dim(position);
        }
        shape.count = u8::try_from(count).ok()?;
        Some(shape)
    }

    /// The dimensions.
    #[must_use]
    #[inline]
    pub fn dims(&self) -> &[u64] {
        &self.dims[..usize::from(self.count)]
    }

    /// The number of elements, unless that overflows 64 bits.
    #[must_use]
    #[inline]
    pub fn elements(&self) -> Option<u64> {
        self.dims().iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim))
    }
}

/// A list of dimensions, written without one on the heap: metadata is in every message about an object.
impl Serialize for Shape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.dims())
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;

        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {DIMS_MAX} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Shape::default();
                while let Some(dim) = seq.next_element()? {
                    let Some(place) = shape.dims.get_mut(usize::from(shape.count)) else {
                        return Err(A::Error::invalid_length(DIMS_MAX + 1, &self));
                    };
                    *place = dim;
                    shape.count += 1;
                }
                Ok(shape)
            }
        }

        deserializer.deserialize_seq(Dims)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

/// What an object's bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectMeta {
    /// The type of one element.
    pub dtype: DType,
    /// The dimensions, outermost first; row-major.
    pub shape: Shape,
    /// Length in bytes.
    pub len_bytes: u64,
    /// What the producer computed over the bytes.
    pub checksum: Checksum,
}

impl ObjectMeta {
    /// Metadata of a tensor, without a checksum.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if shape times element size is not `len_bytes`, or overflows;
    /// [`crate::ErrorKind::TooLarge`] over [`OBJECT_LEN_MAX`].
    pub fn new(dtype: DType, shape: &[u64], len_bytes: u64) -> Result<Self, StoreError> {
        let meta = Self { dtype, shape: Shape::new(shape)?, len_bytes, checksum: Checksum::None };
        meta.check()?;
        Ok(meta)
    }

    /// Metadata of a tensor whose length follows from its shape.
    ///
    /// # Errors
    /// As [`ObjectMeta::new`].
    pub fn tensor(dtype: DType, shape: &[u64]) -> Result<Self, StoreError> {
        Self::new(dtype, shape, len_bytes_of(dtype, &Shape::new(shape)?)?)
    }

    /// Metadata of plain bytes: a `uint8` vector.
    ///
    /// # Errors
    /// [`crate::ErrorKind::TooLarge`] over [`OBJECT_LEN_MAX`].
    pub fn bytes(len_bytes: u64) -> Result<Self, StoreError> {
        Self::new(DType::U8, &[len_bytes], len_bytes)
    }

    /// The same with a checksum.
    #[must_use]
    pub fn with_checksum(mut self, checksum: Checksum) -> Self {
        self.checksum = checksum;
        self
    }

    /// Checks the invariant on metadata that came from outside this process.
    ///
    /// # Errors
    /// As [`ObjectMeta::new`].
    #[inline]
    pub fn check(&self) -> Result<(), StoreError> {
        if self.is_consistent() {
            return Ok(());
        }
        self.fault()
    }

    /// Whether [`ObjectMeta::check`] finds nothing wrong, without saying what: every get asks this.
    #[must_use]
    #[inline]
    pub fn is_consistent(&self) -> bool {
        self.len_bytes <= OBJECT_LEN_MAX && len_bytes_in(self.dtype, &self.shape) == Some(self.len_bytes)
    }

    #[cold]
    fn fault(&self) -> Result<(), StoreError> {
        if self.len_bytes > OBJECT_LEN_MAX {
            return Err(StoreError::too_large(
                "put",
                "object length in bytes",
                self.len_bytes,
                OBJECT_LEN_MAX,
            ));
        }
        let filled = len_bytes_of(self.dtype, &self.shape)?;
        if filled == self.len_bytes {
            return Ok(());
        }
        Err(StoreError::invalid(
            "metadata",
            format!(
                "shape {:?} of {} fills {filled} bytes, the object has {}",
                self.shape, self.dtype, self.len_bytes
            ),
        ))
    }
}

/// What elements of this shape fill, unless their bits overflow 64 bits.
#[inline]
fn len_bytes_in(dtype: DType, shape: &Shape) -> Option<u64> {
    let bits = shape.elements()?.checked_mul(dtype.bits())?;
    Some(bits.div_ceil(8))
}

fn len_bytes_of(dtype: DType, shape: &Shape) -> Result<u64, StoreError> {
    len_bytes_in(dtype, shape).ok_or_else(|| {
        StoreError::invalid(
            "shape",
            format!("{shape:?} of {dtype} has more bits than a 64-bit number counts"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn codes_return_and_names_parse() {
        for &dtype in DType::ALL {
            assert_eq!(DType::from_code(dtype.code()), Some(dtype));
            assert_eq!(DType::parse(dtype.name()), Ok(dtype));
            if let Some(name) = dtype.safetensors() {
                assert_eq!(DType::parse(name), Ok(dtype));
            }
        }
        assert!(DType::parse("F31").expect_err("unknown").to_string().contains("F31"));
        assert_eq!(DType::from_code(0), None);
    }

    #[test]
    fn shape_must_fill_the_bytes() {
        assert!(ObjectMeta::new(DType::F32, &[2, 3], 24).is_ok());
        assert!(ObjectMeta::new(DType::F32, &[], 4).is_ok());
        assert!(ObjectMeta::new(DType::U4, &[3], 2).is_ok());
        assert!(ObjectMeta::new(DType::F32, &[0, 7], 0).is_ok());
        for (shape, len_bytes) in [(&[2, 3][..], 23), (&[u64::MAX, 2][..], 0), (&[1 << 60, 1][..], 4)] {
            let error = ObjectMeta::new(DType::F32, shape, len_bytes).expect_err("does not fit");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        assert_eq!(ObjectMeta::bytes(u64::MAX).expect_err("too long").kind(), ErrorKind::TooLarge);
        assert_eq!(Shape::new(&[1; 9]).expect_err("nine dimensions").kind(), ErrorKind::Invalid);
        assert_eq!(Shape::from_fn(9, |_| 1), None);
        assert_eq!(Shape::from_fn(3, |at| [5, 6, 7][at]), Shape::new(&[5, 6, 7]).ok());
    }
}
