//! fio's nbd engine with verify: 4 KiB to 1 MiB, 32 requests in flight on each of 4 connections, over a healthy volume,
//! over one that loses a replica half-way and over one that gets it back half-way.

use std::time::Duration;

use nbdmirror::mirror::status::{Health, ReplicaState};

use crate::support::daemon::{Daemon, Volume};
use crate::support::skip;
use crate::support::tools::{Beside, missing};

const JOBS: u64 = 4;
const JOB_BYTES: u64 = 32 << 20;
const VOLUME_BYTES: u64 = JOBS * JOB_BYTES;
/// Each job's writes, so that there is a half-way: 32 MiB in some 4 s.
const JOB_RATE_BYTES_PER_S: u64 = 8 << 20;
/// Longest that one run of fio may take.
const FIO_MAX: Duration = Duration::from_secs(120);

/// Starts fio writing the whole volume and verifying it, some of it while it writes and all of it afterwards.
fn start_fio(volume: &Volume, daemon: &Daemon, rate_bytes_per_s: u64) -> Beside {
    let job = format!(
        "[verify]\nioengine=nbd\nuri={}\nrw=randwrite\nbssplit=4k/40:16k/20:64k/20:256k/10:1M/10\niodepth=32\n\
         numjobs={JOBS}\nsize={JOB_BYTES}\noffset_increment={JOB_BYTES}\nrate=,{rate_bytes_per_s}\nfsync=64\n\
         verify=crc32c\ndo_verify=1\nverify_fatal=1\nverify_backlog=128\nrandseed=20\ngroup_reporting=1\n",
        daemon.uri()
    );
    let path = volume.path("verify.fio");
    std::fs::write(&path, job).unwrap();
    // In the volume's folder: fio leaves its verify state where it runs.
    let args = ["--aux-path".as_ref(), volume.dir.path().as_os_str(), path.as_os_str()];
    Beside::start("fio", args, &volume.path("fio.log"))
}

fn assert_verified(volume: &Volume, mut fio: Beside) {
    let success = fio.wait(FIO_MAX);
    let log = std::fs::read_to_string(volume.path("fio.log")).unwrap();
    assert!(success && log.contains("err= 0"), "fio is not content:\n{log}");
}

fn wait_half_way(daemon: &Daemon) {
    daemon.wait_until("half-way", FIO_MAX, |status| status.clients.write_bytes >= VOLUME_BYTES / 2);
}

fn unavailable() -> bool {
    let tool = missing(&["fio"]);
    if tool.is_some() {
        skip("fio is not installed");
    }
    tool.is_some()
}

#[test]
fn healthy() {
    if unavailable() {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    assert_verified(&volume, start_fio(&volume, &daemon, 1 << 30));
    let status = daemon.wait_in_sync();
    assert_eq!(status.clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn loses_a_replica_half_way() {
    if unavailable() {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let fio = start_fio(&volume, &daemon, JOB_RATE_BYTES_PER_S);
    wait_half_way(&daemon);
    daemon.verb("fail", &volume.replicas[1]).ok();
    assert_verified(&volume, fio);
    let status = daemon.status();
    assert_eq!((status.health, status.clients.errors), (Health::Degraded, 0));
    let failed = daemon.replica("b.img");
    assert_eq!(failed.state, ReplicaState::Faulty);
    assert!(failed.stale_bytes > 0 && failed.stale_bytes <= VOLUME_BYTES, "{failed:?}");
    // At the next start it is there again and is brought up to date by itself.
    daemon.stop();
    let daemon = volume.start();
    daemon.wait_in_sync();
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn gets_a_replica_back_half_way() {
    if unavailable() {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    daemon.verb("fail", &volume.replicas[1]).ok();
    let fio = start_fio(&volume, &daemon, JOB_RATE_BYTES_PER_S);
    wait_half_way(&daemon);
    daemon.verb("add", &volume.replicas[1]).ok();
    assert_verified(&volume, fio);
    let status = daemon.wait_in_sync();
    assert_eq!(status.clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}
