//! The libFuzzer entry of `targets/command_line.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::command_line::run(data));
