//! The libFuzzer entry of `targets/nbd_client.rs`, which says what it checks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdmirror_fuzz::nbd_client::run(data));
