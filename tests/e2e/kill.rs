//! kill -9 in the middle of writes, again and again: nothing acknowledged is lost, dirty regions alone are resynced,
//! replicas end identical. And the proof that the checker would see it: a lost write planted on purpose.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::support::checker::{Checker, Counts, Plan};
use crate::support::daemon::{Daemon, Volume};
use crate::support::rng::Rng;

const VOLUME_BYTES: u64 = 96 << 20;
const REGION_BYTES: u64 = 64 << 10;
const WINDOW_BYTES: u64 = 8 << 20;
const CONNECTIONS: u64 = 4;
/// After so many kills the test waits until every intent bit is cleared, so that the bound on resync means something.
const KILLS_BETWEEN_RESTS: u64 = 5;

/// The number in an environment variable, or `default`.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: no number")))
}

fn new_volume() -> Volume {
    Volume::new(VOLUME_BYTES, &["--region-size", "64K"])
}

/// How the next round writes.
fn choose_plan(rng: &mut Rng) -> Plan {
    let start = rng.below((VOLUME_BYTES - WINDOW_BYTES) / 512) * 512;
    let stripe_bytes = rng.pick(&[4096 + 100, (24 << 10) + 100, (300 << 10) + 512 + 7, 1 << 20]);
    Plan { window: start..start + WINDOW_BYTES, connections: CONNECTIONS, stripe_bytes, seed: rng.next() }
}

/// Writes for `ms` milliseconds, and until something is acknowledged; then kills the daemon.
fn write_and_kill(daemon: Daemon, checker: &Checker, plan: &Plan, ms: u64) -> Counts {
    let socket = daemon.socket.clone();
    let never = AtomicBool::new(false);
    checker.count_anew();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| checker.write(&socket, plan, &never));
        std::thread::sleep(Duration::from_millis(ms));
        // On a busy machine the first answer may come later than that.
        while checker.counts().acknowledged == 0 && !writing.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        daemon.kill();
        writing.join().unwrap()
    })
}

fn assert_all_there(checker: &Checker, daemon: &Daemon, when: &str, seed: u64) {
    if let Err(violations) = checker.verify(&daemon.socket) {
        panic!("{when}, NBDMIRROR_KILL_SEED={seed}:\n{}\n{}", violations.join("\n"), daemon.printed());
    }
}

/// The unclean bytes that a restart reported are those of regions written, and of no other.
fn assert_resync_is_limited(daemon: &Daemon, checker: &Checker) -> (u64, u64) {
    let unclean = daemon.status().unclean_bytes_at_start;
    let bound = checker.touched_regions(REGION_BYTES) * REGION_BYTES;
    assert!(unclean > 0, "killed in mid-write, yet no region was found unclean\n{}", daemon.printed());
    assert!(unclean <= bound, "{unclean} bytes to resync, only {bound} in regions written");
    assert!(bound < VOLUME_BYTES, "the bound says nothing");
    (unclean, bound)
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let kills = from_environment("NBDMIRROR_KILL_CYCLES", 20);
    let seed = from_environment("NBDMIRROR_KILL_SEED", 1);
    let mut rng = Rng::new(seed);
    let volume = new_volume();
    let checker = Checker::new(VOLUME_BYTES);
    let mut daemon = volume.start();
    for kill in 1..=kills {
        if kill % KILLS_BETWEEN_RESTS == 1 {
            daemon.wait_until("without dirty regions", Duration::from_secs(60), |status| {
                status.dirty_bytes == 0
            });
            checker.forget_touched();
        }
        let ms = 30 + rng.below(400);
        let counts = write_and_kill(daemon, &checker, &choose_plan(&mut rng), ms);
        assert!(counts.acknowledged > 0, "nothing was written in {ms} ms");
        daemon = volume.start();
        if rng.chance(40) {
            // Once more, in the middle of recovery.
            std::thread::sleep(Duration::from_millis(rng.below(30)));
            daemon.kill();
            daemon = volume.start();
        }
        let (unclean, bound) = assert_resync_is_limited(&daemon, &checker);
        assert_all_there(&checker, &daemon, "during resync", seed);
        daemon.wait_in_sync();
        assert_all_there(&checker, &daemon, "after resync", seed);
        volume.assert_identical();
        println!(
            "kill {kill}: {} writes acknowledged ({} with FUA), {} flushes, {} in doubt; {} KiB resynced of at most {} KiB",
            counts.acknowledged,
            counts.fua,
            counts.flushes,
            counts.in_doubt,
            unclean >> 10,
            bound >> 10
        );
    }
    daemon.stop();
    volume.assert_identical();
    assert_files_hold(&volume, &checker);
}

/// Each replica file is a plain raw image of the volume.
fn assert_files_hold(volume: &Volume, checker: &Checker) {
    let image = checker.image();
    for path in &volume.replicas {
        let mut bytes = vec![0; image.len()];
        std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == image, "{} is not the volume", path.display());
    }
}

#[test]
fn the_checker_sees_a_planted_lost_write() {
    let mut rng = Rng::new(7);
    let volume = new_volume();
    let checker = Checker::new(VOLUME_BYTES);
    write_and_kill(volume.start(), &checker, &choose_plan(&mut rng), 300);
    let sector = checker.newest_durable_sector().expect("300 ms of writing make something durable");
    // The write is lost on both replicas behind the daemon's back: resync cannot mend it and reads agree.
    for path in &volume.replicas {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, sector).unwrap();
        file.write_all_at(&bytes.map(|byte| !byte), sector).unwrap();
    }
    let daemon = volume.start();
    let violations = checker.verify(&daemon.socket).expect_err("a lost write goes unseen");
    assert_eq!(violations.len(), 1, "{violations:?}");
    assert!(violations[0].starts_with(&format!("byte {sector}: lost, promise ")), "{violations:?}");
}

#[test]
fn sigterm_in_mid_write_leaves_a_clean_volume() {
    let mut rng = Rng::new(11);
    let volume = new_volume();
    let checker = Checker::new(VOLUME_BYTES);
    let daemon = volume.start();
    let socket = daemon.socket.clone();
    let (plan, never) = (choose_plan(&mut rng), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| checker.write(&socket, &plan, &never));
        std::thread::sleep(Duration::from_millis(200));
        daemon.terminate();
    });
    volume.assert_identical();
    let daemon = volume.start();
    assert_eq!(daemon.status().unclean_bytes_at_start, 0, "stopped in order, yet unclean");
    assert_all_there(&checker, &daemon, "after SIGTERM", 11);
}
