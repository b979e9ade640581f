//! Conversions against those of the crate `half`: every 16-bit number, and of floats every exponent with all ties and
//! their neighbours. Not the kernels' memory accesses (`on_cpu.rs`). Invariant: results are compared as bits.

mod arena;

use arena::Random;
use half::{bf16, f16};
use hetmem_core::{DType, ErrorKind};
use hetmem_kernels::cast::{Cast, bf16_of_f32, convert, f16_of_f32, f32_of_bf16, f32_of_f16};

/// Floats of every sign and exponent, and for each the fractions at which rounding to 7 or 10 bits turns.
fn floats() -> impl Iterator<Item = u32> {
    let mut random = Random(7);
    let some: Vec<u32> = (0..64).map(|_| random.next().to_le_bytes()).map(low).collect();
    (0..512_u32).flat_map(move |sign_and_exponent| {
        let kept = [10_u32, 7].into_iter().flat_map(|kept| {
            // Of each last place kept, of a subnormal result too: the tie, one below and one above.
            (0..=23 - kept + 11).flat_map(move |shift| {
                let tie = 1_u32.checked_shl(shift).unwrap_or(0);
                (0..8_u32).flat_map(move |place| {
                    let base = place.checked_shl(shift + 1).unwrap_or(0).wrapping_add(tie);
                    [base.wrapping_sub(1), base, base.wrapping_add(1)]
                })
            })
        });
        let edges = [0, 1, 0x1fff, 0x2000, 0x3f_ffff, 0x40_0000, 0x7f_e000, 0x7f_efff, 0x7f_f000, 0x7f_ffff];
        let fractions: Vec<u32> = kept.chain(edges).chain(some.iter().copied()).collect();
        fractions.into_iter().map(move |fraction| sign_and_exponent << 23 | fraction & 0x7f_ffff)
    })
}

fn low(bytes: [u8; 8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[test]
fn every_half_becomes_the_float_that_it_is() {
    for half in 0..=u16::MAX {
        assert_eq!(f32_of_f16(half), f16::from_bits(half).to_f32().to_bits(), "float16 {half:#06x}");
        assert_eq!(f32_of_bf16(half), bf16::from_bits(half).to_f32().to_bits(), "bfloat16 {half:#06x}");
    }
}

#[test]
fn floats_are_rounded_to_the_nearest_and_ties_to_even() {
    let mut count = 0_u32;
    for bits in floats() {
        let float = f32::from_bits(bits);
        assert_eq!(f16_of_f32(bits), f16::from_f32(float).to_bits(), "{bits:#010x} ({float:e}) as float16");
        assert_eq!(
            bf16_of_f32(bits),
            bf16::from_f32(float).to_bits(),
            "{bits:#010x} ({float:e}) as bfloat16"
        );
        count += 1;
    }
    assert!(count > 500_000, "{count}");
}

/// Known values, so that not only agreement is tested.
#[test]
fn edges_are_where_the_formats_have_them() {
    for (float, half) in [
        (65_504.0, 0x7bff),
        (65_519.996, 0x7bff),
        (65_520.0, 0x7c00),
        (f32::INFINITY, 0x7c00),
        (6.103_515_6e-5, 0x0400),
        (5.960_464_5e-8, 0x0001),
        (2.980_232_2e-8, 0x0000),
        (2.980_232_5e-8, 0x0001),
        (-0.0, 0x8000),
        (f32::MIN_POSITIVE, 0),
    ] {
        assert_eq!(f16_of_f32(float.to_bits()), half, "{float}");
    }
    // NaN: sign, highest payload bits, quiet.
    assert_eq!(f16_of_f32(0xff80_0001), 0xfe00);
    assert_eq!(f16_of_f32(0x7fbf_ffff), 0x7fff);
    assert_eq!(bf16_of_f32(0xff80_0001), 0xffc0);
    assert_eq!(bf16_of_f32(0x7f7f_ffff), 0x7f80, "the largest float is nearer to infinity");
    assert_eq!(f32_of_f16(0x7d00), 0x7fe0_0000);
    assert_eq!(f32_of_bf16(0xff81), 0xffc1_0000);
}

#[test]
fn bytes_are_converted_and_what_cannot_be_is_refused() {
    let cast = Cast::new(DType::F32, DType::BF16).expect("a pair");
    let source: Vec<u8> = [1.0_f32, -2.5, f32::NAN].iter().flat_map(|float| float.to_le_bytes()).collect();
    let mut target = [0; 6];
    convert(cast, &source, &mut target).expect("fits");
    assert_eq!(target, [0x80, 0x3f, 0x20, 0xc0, 0xc0, 0x7f]);
    for (source, target) in [(&source[..11], &mut target[..]), (&source[..8], &mut [0; 6][..])] {
        let error = convert(cast, source, target).expect_err("lengths");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    for (from, to) in [(DType::F64, DType::F32), (DType::F32, DType::F32), (DType::BF16, DType::F8E4M3Fn)] {
        let error = Cast::new(from, to).expect_err("no pair");
        assert!(error.to_string().contains("bfloat16"), "{error}");
    }
}
