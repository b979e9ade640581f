//! Nothing but the place of the micro-benchmarks (`micro.rs`): `cargo bench -p hetmem-benches`. Whole paths are
//! measured by `hetmem bench`, beside the bare thing that bounds them. Invariant: run as tests, they finish at once.

#![forbid(unsafe_code)]
