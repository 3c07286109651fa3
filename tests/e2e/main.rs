//! Tests on the real binary with real clients: kill -9 under load, other people's NBD tools, faulty disks.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod bench;
mod clients;
mod clients_libnbd;
mod clients_qemu;
mod faults;
mod fio;
mod kill;
mod power;
mod power_scenarios;
mod stand_in;
#[path = "../support/mod.rs"]
mod support;
