//! The bodies of the fuzz targets: `scripts/fuzz` runs them under libFuzzer, `tests/fuzz_corpus.rs` over the kept
//! corpus.
//!
//! Each target is one file with `pub fn run(data: &[u8])`, which panics where something does not hold; its header
//! says what must hold besides "no panic". What a target does follows from its bytes alone.
//!
//! A new target: its file here, its line in [`TARGETS`], its entry in `fuzz_targets/` and in `Cargo.toml`.

pub mod assemble;
pub mod bitmap;
pub mod command_line;
pub mod control;
pub mod handshake;
pub mod input;
pub mod mirror;
pub mod nbd_client;
pub mod register;
pub mod replica;
pub mod session;
pub mod superblock;
pub mod volume;
pub mod world;

/// A target's name and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 10] = [
    ("handshake", handshake::run),
    ("session", session::run),
    ("nbd_client", nbd_client::run),
    ("superblock", superblock::run),
    ("bitmap", bitmap::run),
    ("replica", replica::run),
    ("assemble", assemble::run),
    ("control", control::run),
    ("command_line", command_line::run),
    ("mirror", mirror::run),
];

/// Plants the bug that `NBDMIRROR_FUZZ_BUG` names, once a thread: to see that a target notices.
#[cfg(feature = "sim")]
pub fn plant_bug() {
    use nbdmirror::planted::{BUGS, plant};
    thread_local! {
        static PLANTED: () = {
            let name = std::env::var("NBDMIRROR_FUZZ_BUG").unwrap_or_default();
            let bug = BUGS.into_iter().find(|bug| format!("{bug:?}") == name);
            assert!(name.is_empty() || bug.is_some(), "no bug {name}");
            plant(bug);
        };
    }
    PLANTED.with(|()| ());
}

/// No bug can be planted in this build.
#[cfg(not(feature = "sim"))]
pub fn plant_bug() {}
