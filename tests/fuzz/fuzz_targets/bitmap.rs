//! The libFuzzer entry of `targets/bitmap.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::bitmap::run(data));
