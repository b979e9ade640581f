//! The kernels' PTX, as it is checked in: for compute capability 8.0 and newer, made by the compiler of CUDA 13.0. Not made
//! here, and not checked here beyond its names. Invariant: every entry of [`crate::launch::TWINS`] is in exactly one
//! module.

/// One PTX text and what is in it.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// What its source is called: `cuda/NAME.cu`.
    pub name: &'static str,
    /// The text. Ends without a NUL.
    pub text: &'static str,
    /// The kernels in it.
    pub entries: &'static [&'static str],
}

/// Copies.
pub const GATHER: Module =
    Module { name: "gather", text: include_str!("../ptx/gather.ptx"), entries: &[crate::moves::GATHER] };
/// Checksums.
pub const CHECKSUM: Module = Module {
    name: "checksum",
    text: include_str!("../ptx/checksum.ptx"),
    entries: &[crate::checksum::CHECKSUM],
};
/// Conversions.
pub const CAST: Module = Module {
    name: "cast",
    text: include_str!("../ptx/cast.ptx"),
    entries: &[
        "hetmem_cast_f32_bf16",
        "hetmem_cast_f32_f16",
        "hetmem_cast_bf16_f32",
        "hetmem_cast_f16_f32",
        "hetmem_cast_bf16_f16",
        "hetmem_cast_f16_bf16",
    ],
};
/// The yardstick.
pub const SUM: Module =
    Module { name: "sum", text: include_str!("../ptx/sum.ptx"), entries: &[crate::sum::SUM] };

/// All of them.
pub const MODULES: &[Module] = &[GATHER, CHECKSUM, CAST, SUM];
