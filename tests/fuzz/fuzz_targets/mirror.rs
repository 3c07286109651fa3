//! The libFuzzer entry of `targets/mirror.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::mirror::run(data));
