//! Floating-point numbers of one format into those of another: the twin of `cuda/cast.cu`, and the same for memory of the
//! CPU ([`convert`]). Not other element types. Invariant: rounded to the nearest, ties to even; subnormal numbers are
//! kept, what is too large is infinite; NaN stays NaN, with its sign, the highest bits of its payload and the quiet bit.

use hetmem_core::{DType, StoreError};

use crate::launch::{Fault, Launch, Memory};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Elements that a thread takes at a time.
const GROUP: u64 = 4;
/// Elements that a block of threads takes.
pub const TILE: u64 = 256 * GROUP * 4;

/// The float that a bfloat16 is, as bits.
#[must_use]
pub fn f32_of_bf16(half: u16) -> u32 {
    let quiet = if half & 0x7fff > 0x7f80 { 0x40 } else { 0 };
    u32::from(half | quiet) << 16
}

/// The bfloat16 nearest to a float.
#[must_use]
pub fn bf16_of_f32(bits: u32) -> u16 {
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return high(bits) | 0x40;
    }
    high(bits + 0x7fff + (bits >> 16 & 1))
}

/// The float that a half-precision number is, as bits.
#[must_use]
pub fn f32_of_f16(half: u16) -> u32 {
    let half = u32::from(half);
    let (sign, magnitude) = ((half & 0x8000) << 16, half & 0x7fff);
    sign | match magnitude {
        0x7c01.. => 0x7fc0_0000 | magnitude << 13,
        0x7c00 => 0x7f80_0000,
        // A subnormal number is a count of 2^-24, which are the last places of 0.5.
        ..0x400 => (f32::from_bits(0x3f00_0000 | magnitude) - 0.5).to_bits(),
        _ => (magnitude << 13) + 0x3800_0000,
    }
}

/// The half-precision number nearest to a float.
#[must_use]
pub fn f16_of_f32(bits: u32) -> u16 {
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let half = match magnitude {
        0x7f80_0001.. => 0x7e00 | magnitude >> 13 & 0x3ff,
        0x4780_0000.. => 0x7c00,
        // Below the smallest normal number: the last places of 0.5 count 2^-24, and the addition rounds.
        ..0x3880_0000 => (f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000,
        _ => (magnitude - 0x3800_0000 + 0xfff + (magnitude >> 13 & 1)) >> 13,
    };
    high((sign | half) << 16)
}

/// The upper half of a word.
fn high(bits: u32) -> u16 {
    let [_, _, low, high] = bits.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// A pair of formats between which there is a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cast {
    from: Format,
    to: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    BF16,
    F16,
}

impl Format {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::BF16 => Some(Self::BF16),
            DType::F16 => Some(Self::F16),
            _ => None,
        }
    }

    const fn len_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    /// An element as the bits of a float, which holds every number of the other formats.
    fn widen(self, bytes: &[u8]) -> u32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            (Self::BF16, &[a, b]) => f32_of_bf16(u16::from_le_bytes([a, b])),
            (Self::F16, &[a, b]) => f32_of_f16(u16::from_le_bytes([a, b])),
            _ => 0,
        }
    }

    fn narrow(self, bits: u32, bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes.copy_from_slice(&bits.to_le_bytes()),
            Self::BF16 => bytes.copy_from_slice(&bf16_of_f32(bits).to_le_bytes()),
            Self::F16 => bytes.copy_from_slice(&f16_of_f32(bits).to_le_bytes()),
        }
    }
}

impl Cast {
    /// From one element type to another.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] for a pair that is not converted, naming those that are.
    pub fn new(from: DType, to: DType) -> Result<Self, StoreError> {
        match (Format::of(from), Format::of(to)) {
            (Some(from), Some(to)) if from != to => Ok(Self { from, to }),
            _ => Err(StoreError::invalid(
                "dtype",
                format!(
                    "{from} is not converted to {to}: only float32, bfloat16 and float16 are, to each other"
                ),
            )),
        }
    }

    /// The kernel's entry.
    #[must_use]
    pub fn kernel(self) -> &'static str {
        match (self.from, self.to) {
            (Format::F32, Format::F16) => "hetmem_cast_f32_f16",
            (Format::BF16, Format::F32) => "hetmem_cast_bf16_f32",
            (Format::F16, Format::F32) => "hetmem_cast_f16_f32",
            (Format::BF16, Format::F16) => "hetmem_cast_bf16_f16",
            (Format::F16, Format::BF16) => "hetmem_cast_f16_bf16",
            // A pair of equals cannot be made.
            _ => "hetmem_cast_f32_bf16",
        }
    }

    /// Bytes of an element that is read, and so what its address must be a multiple of.
    #[must_use]
    pub fn source_element_len(self) -> u64 {
        self.from.len_bytes()
    }

    /// Bytes of an element that is written.
    #[must_use]
    pub fn target_element_len(self) -> u64 {
        self.to.len_bytes()
    }

    /// Bytes of the target for `len_bytes` of the source.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if the source is no whole number of elements.
    pub fn target_len(self, len_bytes: u64) -> Result<u64, StoreError> {
        let element = self.source_element_len();
        if !len_bytes.is_multiple_of(element) {
            let why = format!("{len_bytes} bytes are no whole number of elements of {element} bytes");
            return Err(StoreError::invalid("cast", why));
        }
        Ok(len_bytes / element * self.target_element_len())
    }
}

/// Converts all elements of `source` into `target`, both little-endian, as the kernel does.
///
/// # Errors
/// [`hetmem_core::ErrorKind::Invalid`] if `source` is no whole number of elements, or `target` has not room for exactly
/// as many.
pub fn convert(cast: Cast, source: &[u8], target: &mut [u8]) -> Result<(), StoreError> {
    let wanted = cast.target_len(source.len() as u64)?;
    if wanted != target.len() as u64 {
        let why = format!("the target has {} bytes, {wanted} are written", target.len());
        return Err(StoreError::invalid("cast", why));
    }
    // One loop for each pair, so that the compiler sees what it converts.
    let f32_of = |half| f32_of_bf16(u16::from_le_bytes(half));
    match (cast.from, cast.to) {
        (Format::F32, Format::F16) => map(source, target, |word| f16_of_f32(u32::from_le_bytes(word))),
        (Format::BF16, Format::F32) => map(source, target, f32_of),
        (Format::F16, Format::F32) => map(source, target, |half| f32_of_f16(u16::from_le_bytes(half))),
        (Format::BF16, Format::F16) => map(source, target, |half| f16_of_f32(f32_of(half))),
        (Format::F16, Format::BF16) => {
            map(source, target, |half| bf16_of_f32(f32_of_f16(u16::from_le_bytes(half))));
        }
        // A pair of equals cannot be made.
        _ => map(source, target, |word| bf16_of_f32(u32::from_le_bytes(word))),
    }
    Ok(())
}

/// The bits of an element as they lie in memory.
trait Bits<const LEN: usize> {
    fn bytes(self) -> [u8; LEN];
}

impl Bits<4> for u32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl Bits<2> for u16 {
    fn bytes(self) -> [u8; 2] {
        self.to_le_bytes()
    }
}

fn map<const FROM: usize, const TO: usize, To: Bits<TO>>(
    source: &[u8],
    target: &mut [u8],
    element: impl Fn([u8; FROM]) -> To,
) {
    let targets = target.as_chunks_mut::<TO>().0;
    for (from, to) in source.as_chunks::<FROM>().0.iter().zip(targets) {
        *to = element(*from).bytes();
    }
}

/// Blocks of threads that `count` elements need.
#[must_use]
pub fn blocks(count: u64) -> u64 {
    count.div_ceil(TILE).max(1)
}

/// What the kernel does: parameters are the addresses of source and target, and how many elements there are.
fn twin(cast: Cast, memory: &mut dyn Memory, launch: &Launch<'_>) -> Result<(), Fault> {
    let [source, target, count] = launch.of(THREADS)?;
    let (from_len, to_len) = (cast.from.len_bytes(), cast.to.len_bytes());
    for (address, len) in [(source, from_len), (target, to_len)] {
        if !address.is_multiple_of(len) {
            return Err(Fault::Misaligned { address });
        }
    }
    // What is before the first group of the target that is whole.
    let head = (target.wrapping_neg() % (GROUP * to_len) / to_len).min(count);
    let singly = !source.wrapping_add(head * from_len).is_multiple_of(GROUP * from_len);
    let mut take = |first: u64, end: u64| elements(cast, memory, (source, target), first..end);
    for block in 0..u64::from(launch.blocks) {
        if singly {
            take(block * TILE, (block * TILE + TILE).min(count))?;
            continue;
        }
        let groups = (count - head) / GROUP;
        let (first, end) = (block * TILE / GROUP, ((block + 1) * TILE / GROUP).min(groups));
        take(head + first * GROUP, head + end * GROUP)?;
        if block == 0 {
            take(0, head)?;
            take(head + groups * GROUP, count)?;
        }
    }
    Ok(())
}

/// What threads do for a row of elements, of which each is one thread's.
fn elements(
    cast: Cast,
    memory: &mut dyn Memory,
    (source, target): (u64, u64),
    row: std::ops::Range<u64>,
) -> Result<(), Fault> {
    let (from_len, to_len) = (cast.from.len_bytes(), cast.to.len_bytes());
    let count = row.end.saturating_sub(row.start);
    if count == 0 {
        return Ok(());
    }
    let bytes = |len: u64| vec![0; usize::try_from(count * len).unwrap_or_default()];
    let (mut read, mut written) = (bytes(from_len), bytes(to_len));
    memory.read(source.wrapping_add(row.start * from_len), &mut read)?;
    let chunk = |len: u64| usize::try_from(len).unwrap_or(1);
    for (from, to) in read.chunks(chunk(from_len)).zip(written.chunks_mut(chunk(to_len))) {
        cast.to.narrow(cast.from.widen(from), to);
    }
    memory.write(target.wrapping_add(row.start * to_len), &written)
}

macro_rules! twins {
    ($($name:ident = $from:ident, $to:ident;)*) => { $(
        pub(crate) fn $name(memory: &mut dyn Memory, launch: &Launch<'_>) -> Result<(), Fault> {
            twin(Cast { from: Format::$from, to: Format::$to }, memory, launch)
        }
    )* };
}

twins! {
    twin_f32_bf16 = F32, BF16;
    twin_f32_f16 = F32, F16;
    twin_bf16_f32 = BF16, F32;
    twin_f16_f32 = F16, F32;
    twin_bf16_f16 = BF16, F16;
    twin_f16_bf16 = F16, BF16;
}
