//! The libFuzzer entry of `targets/control.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::control::run(data));
