//! Replicas that fail, stay away, come back, are replaced, are slow: service goes on and the data stays right.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nbdmirror::mirror::status::{Health, ReplicaState};

use crate::support::daemon::{Daemon, Volume, assert_same_bytes, folder, nbdmirror};
use crate::support::rng::Rng;
use crate::support::skip;
use crate::support::tools::{FaultyDisk, SmallFilesystem, is_root};

const MIB: u64 = 1 << 20;
/// The region size of volumes created without `--region-size` at these sizes.
const REGION_BYTES: u64 = MIB;

/// Writes `mib` MiB from `offset`, each with its own byte.
fn fill(daemon: &Daemon, offset: u64, mib: u64) {
    let mut client = daemon.client();
    for index in 0..mib {
        client.write(offset + index * MIB, &[pattern(offset / MIB + index); MIB as usize]).unwrap();
    }
    client.flush().unwrap();
}

fn pattern(mib: u64) -> u8 {
    (mib % 255) as u8 + 1
}

fn assert_filled(daemon: &Daemon, offset: u64, mib: u64) {
    let mut client = daemon.client();
    for index in 0..mib {
        let bytes = client.read(offset + index * MIB, MIB as usize).unwrap();
        let expected = pattern(offset / MIB + index);
        assert!(bytes.iter().all(|byte| *byte == expected), "MiB {} is wrong", offset / MIB + index);
    }
}

/// The whole of a file, to see that it was not touched.
fn bytes_of(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn a_full_filesystem_fails_one_replica_and_no_client() {
    if !is_root() {
        return skip("a small filesystem cannot be mounted: not root");
    }
    let small = SmallFilesystem::new(24);
    let dir = folder();
    let replicas = vec![dir.path().join("a.img"), small.path().join("b.img")];
    let volume = Volume::on(dir, 64 * MIB, replicas, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 48);
    assert_filled(&daemon, 0, 48);
    let status = daemon.status();
    assert_eq!((status.health, status.clients.errors), (Health::Degraded, 0), "{status:#?}");
    let failed = daemon.replica("b.img");
    assert_eq!(failed.state, ReplicaState::Faulty);
    assert!(failed.reason.is_some() && failed.errors > 0 && failed.stale_bytes > 0, "{failed:?}");
    // The loss was recorded: it is known after a crash.
    daemon.kill();
    let daemon = volume.start();
    assert_filled(&daemon, 0, 48);
    assert_ne!(daemon.replica("b.img").state, ReplicaState::InSync);
}

#[test]
fn a_disk_that_gives_errors_is_failed_and_comes_back() {
    if let Some(reason) = FaultyDisk::unavailable() {
        return skip(&reason);
    }
    let switch = |dir: &Path| format!("error-file={}", dir.join("broken").display());
    let disk = FaultyDisk::new(80 * MIB, &["error"], |dir| {
        vec!["error=EIO".into(), "error-rate=100%".into(), switch(dir)]
    });
    let dir = folder();
    let replicas = vec![dir.path().join("a.img"), disk.path.clone()];
    let volume = Volume::on(dir, 64 * MIB, replicas, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 16);
    File::create(disk.beside("broken")).unwrap();
    // Reads alone: each is answered, from the other replica where this one cannot.
    assert_filled(&daemon, 0, 16);
    fill(&daemon, 8 * MIB, 4);
    daemon.wait_until("degraded", Duration::from_secs(10), |status| status.health == Health::Degraded);
    let failed = daemon.replica("disk.img");
    assert_eq!(failed.state, ReplicaState::Faulty);
    assert!(failed.reason.is_some(), "{failed:?}");
    assert_filled(&daemon, 0, 16);
    assert_eq!(daemon.status().clients.errors, 0);
    fs::remove_file(disk.beside("broken")).unwrap();
    daemon.verb("add", &disk.path).ok();
    daemon.wait_in_sync();
    daemon.stop();
    assert_same_bytes(&volume.replicas[0], &disk.backing, volume.size_bytes);
}

#[test]
fn a_replica_that_is_cut_short_never_gives_wrong_data() {
    let volume = Volume::new(32 * MIB, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 32);
    OpenOptions::new().write(true).open(&volume.replicas[1]).unwrap().set_len(4096).unwrap();
    for _ in 0..3 {
        assert_filled(&daemon, 0, 32);
    }
    fill(&daemon, 4 * MIB, 4);
    assert_filled(&daemon, 0, 32);
    let status = daemon.status();
    assert_eq!(status.clients.errors, 0);
    assert_eq!(status.replicas[1].state, ReplicaState::Faulty);
    let bytes = fs::metadata(&volume.replicas[1]).unwrap().len();
    assert_eq!(bytes, 4096, "nothing makes it long again, with a hole");
}

#[test]
fn the_last_replica_cannot_be_failed() {
    let volume = Volume::new(16 * MIB, &[]);
    let daemon = volume.start();
    daemon.verb("fail", &volume.replicas[0]).ok();
    daemon.verb("fail", &volume.replicas[1]).refused();
    fill(&daemon, 0, 2);
    assert_filled(&daemon, 0, 2);
}

#[test]
fn a_missing_replica_is_refused_unless_degraded() {
    let mut volume = Volume::new(16 * MIB, &[]);
    let missing = volume.replicas.pop().unwrap();
    let Err(said) = volume.try_start(&[]) else { panic!("served without a replica") };
    let message = said.refused();
    assert!(message.contains("--degraded"), "{message}");
    let daemon = volume.try_start(&["--degraded"]).unwrap();
    assert_eq!(daemon.status().health, Health::Degraded);
    fill(&daemon, 5 * MIB, 2);
    daemon.stop();
    // Back again: only what it missed is copied.
    volume.replicas.push(missing);
    let daemon = volume.start();
    daemon.wait_in_sync();
    assert!(daemon.printed().len() < 10_000, "a start should be told in a few lines");
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn replicas_that_diverged_are_refused_and_untouched() {
    let volume = Volume::new(16 * MIB, &[]);
    for (index, replica) in volume.replicas.iter().enumerate() {
        let alone = Alone::new(&volume, replica);
        let daemon = alone.start();
        fill(&daemon, index as u64 * 4 * MIB, 1);
        daemon.stop();
    }
    let before = volume.replicas.each_bytes();
    let Err(said) = volume.try_start(&[]) else { panic!("served diverged replicas") };
    let message = said.refused();
    assert!(message.contains("a.img") && message.contains("b.img"), "both are described: {message}");
    assert!(before == volume.replicas.each_bytes(), "a refused start changed a replica");
    let Err(said) = volume.try_start(&["--degraded"]) else { panic!("served diverged replicas") };
    said.refused();
    assert!(before == volume.replicas.each_bytes(), "a refused start changed a replica");
}

/// One replica of a volume, served without the others.
struct Alone<'a>(&'a Path, Volume);

impl<'a> Alone<'a> {
    fn new(volume: &Volume, replica: &'a Path) -> Self {
        let copy = Volume {
            dir: folder(),
            size_bytes: volume.size_bytes,
            replicas: vec![replica.to_owned()],
            serve_args: vec!["--degraded".into()],
        };
        Self(replica, copy)
    }

    fn start(&self) -> Daemon {
        self.1.start()
    }
}

trait EachBytes {
    fn each_bytes(&self) -> Vec<Vec<u8>>;
}

impl EachBytes for Vec<std::path::PathBuf> {
    fn each_bytes(&self) -> Vec<Vec<u8>> {
        self.iter().map(|path| bytes_of(path)).collect()
    }
}

/// Resyncs that may be over before the kill.
const KILLS_MAX: u32 = 20;

/// The state that a replica's own superblock says it is in; nobody serves it.
fn own_state(replica: &Path) -> String {
    let said = nbdmirror(["examine".as_ref(), "--json".as_ref(), replica.as_os_str()]).ok();
    let examined: serde_json::Value = serde_json::from_str(&said).unwrap();
    let facts = &examined[0]["replica"];
    let mut members = facts["members"].as_array().unwrap().iter();
    let own = members.find(|member| member["slot"] == facts["slot"]).unwrap();
    own["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_stale_replica_alone_is_refused() {
    const MIBS: u64 = 192;
    let volume = Volume::new(MIBS * MIB, &[]);
    // Its own superblock says that it is not in sync only while a resync is under way: killed in the middle of one. Each
    // try that comes too late (what stands on it says so) is followed by another one.
    let is_resyncing = (0..KILLS_MAX).any(|_| {
        let daemon = volume.start();
        daemon.wait_in_sync();
        daemon.verb("fail", &volume.replicas[1]).ok();
        fill(&daemon, 0, MIBS);
        daemon.verb("add", &volume.replicas[1]).ok();
        daemon.kill();
        own_state(&volume.replicas[1]) == "resyncing"
    });
    assert!(is_resyncing, "each of {KILLS_MAX} resyncs of {MIBS} MiB was over before the kill");
    let before = bytes_of(&volume.replicas[1]);
    let alone = Alone::new(&volume, &volume.replicas[1]);
    let Err(said) = alone.1.try_start(&[]) else { panic!("a stale replica alone is served") };
    said.refused();
    assert!(before == bytes_of(alone.0), "a refused start changed the replica");
    // Together they go on where they were.
    let daemon = volume.start();
    assert_filled(&daemon, 0, MIBS);
    daemon.wait_in_sync();
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn only_missed_regions_are_copied_to_a_replica_that_was_away() {
    let volume = Volume::new(64 * MIB, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 32);
    daemon.wait_until("without dirty regions", Duration::from_secs(60), |status| status.dirty_bytes == 0);
    daemon.verb("fail", &volume.replicas[1]).ok();
    let mut client = daemon.client();
    for offset in [3 * MIB + 511, 20 * MIB, 63 * MIB] {
        client.write(offset, &[0xee; 700]).unwrap();
    }
    assert_eq!(daemon.replica("b.img").stale_bytes, 3 * REGION_BYTES);
    let before = daemon.replica("b.img").writes;
    daemon.verb("add", &volume.replicas[1]).ok();
    daemon.wait_in_sync();
    assert!(daemon.replica("b.img").writes >= before);
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn a_blank_replacement_is_filled_and_keeps_the_holes() {
    let mut volume = Volume::new(512 * MIB, &[]);
    let daemon = volume.start();
    for mib in [0, 100, 300, 511] {
        fill(&daemon, mib * MIB, 1);
    }
    let lost = volume.replicas.pop().unwrap();
    daemon.verb("fail", &lost).ok();
    daemon.verb("remove", &lost).ok();
    let replacement = volume.path("c.img");
    File::create(&replacement).unwrap().set_len(4 * MIB).unwrap();
    daemon.verb("add", &replacement).refused();
    let size = fs::metadata(&volume.replicas[0]).unwrap().len();
    OpenOptions::new().write(true).open(&replacement).unwrap().set_len(size).unwrap();
    daemon.verb("add", &replacement).ok();
    let status = daemon.wait_in_sync();
    assert_eq!(status.replicas.len(), 2);
    volume.replicas.push(replacement);
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
    let (old, new) = (blocks(&volume.replicas[0]), blocks(&volume.replicas[1]));
    assert!(new <= old + 8 * MIB / 512, "holes were filled: {new} blocks against {old}");
    daemon.stop();
    volume.assert_identical();
    let daemon = volume.start();
    assert_eq!(daemon.status().health, Health::Healthy);
}

#[test]
fn a_write_mostly_replica_is_read_only_when_nothing_else_can_answer() {
    let mut volume = Volume::new(16 * MIB, &[]);
    volume.serve_args = vec!["--write-mostly".into(), volume.replicas[1].display().to_string()];
    let daemon = volume.start();
    fill(&daemon, 0, 8);
    let mut client = daemon.client();
    for index in 0..400 {
        client.read(index * 4096, 4096).unwrap();
    }
    let spared = daemon.replica("b.img");
    assert!(spared.write_mostly && spared.writes > 0);
    assert_eq!(spared.reads, 0);
    daemon.verb("fail", &volume.replicas[0]).ok();
    assert_filled(&daemon, 0, 8);
    assert!(daemon.replica("b.img").reads > 0);
}

/// Random 4 KiB reads on four connections, one in flight on each, for a while.
fn read_randomly(daemon: &Daemon, blocks: u64, duration: Duration) -> u64 {
    std::thread::scope(|scope| {
        let readers = [1, 2, 3, 4].map(|seed| {
            scope.spawn(move || {
                let (mut client, mut rng, mut reads) = (daemon.client(), Rng::new(seed), 0);
                let end = Instant::now() + duration;
                while Instant::now() < end {
                    client.read(rng.below(blocks) * 4096, 4096).unwrap();
                    reads += 1;
                }
                reads
            })
        });
        readers.into_iter().map(|reader| reader.join().unwrap()).sum()
    })
}

#[test]
fn reads_avoid_a_slow_replica() {
    if let Some(reason) = FaultyDisk::unavailable() {
        return skip(&reason);
    }
    let disk = FaultyDisk::new(80 * MIB, &["delay"], |_| vec!["delay-read=3ms".into()]);
    let dir = folder();
    let replicas = vec![dir.path().join("a.img"), disk.path.clone()];
    let volume = Volume::on(dir, 64 * MIB, replicas, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 32);
    let reads = read_randomly(&daemon, 32 * MIB / 4096, Duration::from_secs(3));
    let (fast, slow) = (daemon.replica("a.img"), daemon.replica("disk.img"));
    println!("{reads} reads; share of the fast {:.4}, of the slow {:.4}", fast.read_share, slow.read_share);
    assert!(fast.read_share >= 0.95, "{fast:#?} {slow:#?}");
    assert!(slow.reads > 0, "the slow replica is never probed, so it could not win again");
    assert!(slow.read_latency_ewma_ns > fast.read_latency_ewma_ns);
}

#[test]
fn equal_replicas_share_the_reads() {
    let volume = Volume::new(64 * MIB, &[]);
    let daemon = volume.start();
    fill(&daemon, 0, 32);
    read_randomly(&daemon, 32 * MIB / 4096, Duration::from_secs(2));
    for name in ["a.img", "b.img"] {
        let replica = daemon.replica(name);
        assert!(replica.read_share >= 0.2, "{replica:#?}");
    }
}
