//! What the tests on the real binary share: a daemon in a folder of its own, a small NBD client, the checker of
//! acknowledged writes, and the tools of others.
//!
//! What must hold: nothing outlives the test that started it (daemons are killed and folders removed on drop, mounts are
//! undone), nothing is written outside the test's folder, and a test that cannot run says so (see [`skip`]).
#![allow(dead_code, reason = "each test binary uses its own part of this module")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

pub(crate) mod checker;
pub(crate) mod daemon;
pub(crate) mod image;
pub(crate) mod nbd;
pub(crate) mod nbd_chunks;
pub(crate) mod recorder;
pub(crate) mod recorder_disk;
pub(crate) mod recorder_judge;
pub(crate) mod recorder_load;
pub(crate) mod recorder_replay;
pub(crate) mod rng;
pub(crate) mod tools;

/// Notes that the running test is skipped and why. Returns so that the caller can return.
///
/// The reason goes to standard error and, where `NBDMIRROR_SKIP_LOG` names a file, onto that file's end, since test
/// runners hide what passing tests print. With `CI=true` a skip is a failure.
pub(crate) fn skip(reason: &str) {
    use std::io::Write as _;
    assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped test fails under CI=true: {reason}");
    eprintln!("SKIP: {reason}");
    if let Some(path) = std::env::var_os("NBDMIRROR_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.expect("NBDMIRROR_SKIP_LOG can be written"), "{reason}").expect("skip noted");
    }
}
