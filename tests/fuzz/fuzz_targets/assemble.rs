//! The libFuzzer entry of `targets/assemble.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::assemble::run(data));
