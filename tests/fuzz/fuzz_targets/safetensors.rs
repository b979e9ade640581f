//! The safetensors reader under libFuzzer. Not the target itself (`hetmem_tests::fuzz`). Invariant: a crash is a finding.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hetmem_tests::fuzz::safetensors(data));
