//! The test's own tools against another server (nbdkit): an error that shows here too is the tool's, not the mirror's.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::checker::{Checker, Plan};
use crate::support::nbd::Client;
use crate::support::tools::{Beside, missing, wait_for};
use crate::support::{daemon, skip};

const VOLUME_BYTES: u64 = 32 << 20;

fn nbdkit(dir: &Path) -> (Beside, std::path::PathBuf) {
    let (socket, disk) = (dir.join("s"), dir.join("disk.img"));
    // A killed server leaves its socket behind.
    let _ = std::fs::remove_file(&socket);
    let args = ["-f", "-U"].map(std::ffi::OsStr::new);
    let args = args.into_iter().chain([socket.as_os_str(), "file".as_ref(), disk.as_os_str()]);
    let server = Beside::start("nbdkit", args, &dir.join("nbdkit.log"));
    wait_for("nbdkit", Duration::from_secs(10), || Client::connect(&socket, "").is_ok());
    (server, socket)
}

#[test]
fn the_checker_judges_another_server_rightly() {
    if let Some(tool) = missing(&["nbdkit"]) {
        return skip(&format!("{tool} is not installed"));
    }
    let dir = daemon::folder();
    let disk = std::fs::File::create(dir.path().join("disk.img")).unwrap();
    disk.set_len(VOLUME_BYTES).unwrap();
    let (mut server, socket) = nbdkit(dir.path());
    let checker = Checker::new(VOLUME_BYTES);
    let plan = Plan { window: 4096..VOLUME_BYTES, connections: 4, stripe_bytes: 24_676, seed: 3 };
    let stop = AtomicBool::new(false);
    let counts = std::thread::scope(|scope| {
        let writing = scope.spawn(|| checker.write(&socket, &plan, &stop));
        std::thread::sleep(Duration::from_millis(200));
        server.0.kill().unwrap();
        writing.join().unwrap()
    });
    assert!(counts.acknowledged > 0 && counts.fua > 0 && counts.flushes > 0, "{counts:?}");
    let (server, socket) = nbdkit(dir.path());
    checker.verify(&socket).expect("nbdkit loses nothing by kill -9: its page cache is the kernel's");
    stop.store(true, Ordering::Relaxed);
    let sector = checker.newest_durable_sector().expect("something was flushed");
    disk.write_all_at(&[0; 512], sector).unwrap();
    let violations = checker.verify(&socket).expect_err("a lost write goes unseen");
    assert_eq!(violations.len(), 1, "{violations:?}");
    drop(server);
}
