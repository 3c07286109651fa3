//! The real binary at the ends of the scale: the largest volume, a thousand connections, more requests than there is memory.
//!
//! Figures are asserted with room to spare; `scripts/bench-scale` measures them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::daemon::{Daemon, Volume, folder, nbdmirror};
use support::nbd::Client;
use support::skip;
use tempfile::TempDir;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const HANG: Duration = Duration::from_secs(60);

/// A line of the daemon's `/proc/PID/status` that counts KiB, in bytes.
fn memory(daemon: &Daemon, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * KIB
}

fn assert_resident_under(daemon: &Daemon, bytes_max: u64) {
    let bytes = memory(daemon, "VmRSS:");
    assert!(bytes < bytes_max, "{} KiB resident, not under {}", bytes / KIB, bytes_max / KIB);
}

fn assert_used(client: &mut Client, offset: u64, fill: u8) {
    client.write(offset, &[fill; 4096]).unwrap();
    assert_eq!(client.read(offset, 4096).unwrap(), [fill; 4096]);
}

fn read_request(offset: u64, len: u32) -> Vec<u8> {
    let head = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    [&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// A client that sends all of `requests` at once (they fit the socket's buffer) and takes no answer.
fn greedy_client(daemon: &Daemon, requests: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    // Fixed newstyle without zeroes; EXPORT_NAME of the empty name.
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream.write_all(requests).unwrap();
    stream
}

/// A folder whose filesystem holds a file of so many bytes (ext4 ends at 16 TiB).
fn folder_for(bytes: u64) -> Option<TempDir> {
    let holds = |dir: &TempDir| std::fs::File::create(dir.path().join("probe"))?.set_len(bytes);
    let in_memory = || tempfile::Builder::new().prefix("nbdmirror-").tempdir_in(Path::new("/dev/shm")).ok();
    [Some(folder()), in_memory()].into_iter().flatten().find(|dir| holds(dir).is_ok())
}

#[test]
fn a_volume_of_64_tib_takes_little_memory_and_serves_its_far_end() {
    const SIZE: u64 = 64 * TIB;
    const RESIDENT_MAX: u64 = 64 * MIB;
    let Some(dir) = folder_for(SIZE + 64 * MIB) else {
        return skip("neither TMPDIR nor /dev/shm holds a file of 64 TiB");
    };
    let replicas = ["a.img", "b.img"].map(|name| dir.path().join(name)).to_vec();
    let mut volume = Volume::on(dir, SIZE, replicas, &[]);
    let places = [0, SIZE / 3 / 4096 * 4096, SIZE - 4096];
    let daemon = volume.start();
    let mut client = daemon.client();
    assert_eq!(client.size, SIZE);
    for (fill, offset) in (1..).zip(places) {
        assert_used(&mut client, offset, fill);
    }
    assert!(client.write(SIZE, &[1; 4096]).is_err() && client.read(SIZE - 4096, 8192).is_err());
    assert_resident_under(&daemon, RESIDENT_MAX);
    daemon.kill();
    // Three regions are dirty: they are synced, and nothing else is looked at.
    let daemon = volume.start();
    let mut client = daemon.client();
    for (fill, offset) in (1..).zip(places) {
        assert_eq!(client.read(offset, 4096).unwrap(), [fill; 4096]);
    }
    daemon.wait_in_sync();
    assert_resident_under(&daemon, RESIDENT_MAX);
    daemon.stop();
    volume.replicas.truncate(1);
    volume.serve_args.push("--degraded".to_owned());
    let daemon = volume.start();
    assert_used(&mut daemon.client(), SIZE - 8192, 9);
    assert_resident_under(&daemon, RESIDENT_MAX);
}

#[test]
fn more_regions_than_memory_is_meant_for_are_refused() {
    let dir = folder();
    let path = dir.path().join("a.img");
    let args = ["create", "--size", "1025G", "--region-size", "64K"].map(Path::new);
    let said = nbdmirror(args.iter().chain([&path.as_path()])).refused();
    assert!(said.contains("there may be 16777216") && said.contains("--region-size 128K"), "{said}");
    assert!(!path.exists());
}

#[test]
fn a_thousand_idle_connections_harm_nobody() {
    const COUNT: usize = 1000;
    const EACH_MAX: u64 = 7 * KIB;
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < 2048 {
        return skip("the limit of open files is under 2048");
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192), hard).unwrap();
    let mut volume = Volume::new(64 * MIB, &[]);
    volume.serve_args.extend(["--max-connections", "1001"].map(String::from));
    let daemon = volume.start();
    assert_used(&mut daemon.client(), 0, 1);
    let before = memory(&daemon, "VmRSS:");
    let mut idle: Vec<Client> = (0..COUNT).map(|_| daemon.client()).collect();
    for client in &mut idle {
        client.read(0, 512).unwrap();
    }
    assert_used(&mut daemon.client(), 4096, 2);
    assert_resident_under(&daemon, before + COUNT as u64 * EACH_MAX);
    for client in &mut idle {
        client.read(4096, 512).unwrap();
    }
    drop(idle);
    assert_used(&mut daemon.client(), 8192, 3);
}

#[test]
fn memory_stays_within_its_limit_and_goes_back_however_much_is_asked_for() {
    const LIMIT: u64 = 96 * MIB;
    /// Program, maps, connections and what stands beside each payload.
    const BESIDE_MAX: u64 = 32 * MIB;
    /// What is kept for reuse: a quarter, and a sixteenth of each of four small sizes.
    const KEPT_MAX: u64 = LIMIT / 2;
    let mut volume = Volume::new(64 * MIB, &[]);
    volume.serve_args.extend(["--memory".to_owned(), LIMIT.to_string()]);
    for (connections, requests, len) in [(50, 512, 4 * KIB), (8, 64, MIB)] {
        let daemon = volume.start();
        let asked = (0..requests).flat_map(|index| read_request(index * len % (32 * MIB), len as u32));
        let asked: Vec<u8> = asked.collect();
        let greedy: Vec<UnixStream> = (0..connections).map(|_| greedy_client(&daemon, &asked)).collect();
        // They take no answer: three quarters of the limit fill up.
        let begin = Instant::now();
        while memory(&daemon, "VmHWM:") < LIMIT * 5 / 8 {
            assert!(begin.elapsed() < HANG, "the load is not there: {}", memory(&daemon, "VmHWM:"));
            std::thread::sleep(Duration::from_millis(10));
        }
        for fill in 1..20 {
            assert_used(&mut daemon.client(), 48 * MIB, fill);
        }
        let peak = memory(&daemon, "VmHWM:");
        assert!(peak < LIMIT + BESIDE_MAX, "{} KiB resident with requests of {len}", peak / KIB);
        drop(greedy);
        let begin = Instant::now();
        while memory(&daemon, "VmRSS:") > KEPT_MAX + BESIDE_MAX {
            assert!(begin.elapsed() < HANG, "{} KiB stay resident", memory(&daemon, "VmRSS:") / KIB);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
