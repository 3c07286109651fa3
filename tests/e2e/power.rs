//! Power cuts on the real binary: what its disks were told is recorded, and it is started on what a cut leaves of it.
//!
//! ```text
//!  scenario ──► Log ──► cuts (each flush boundary, random ones) ──► images ──► daemon ──► judge
//! ```
//!
//! What must hold after a cut, also where one disk is lost with it: the daemon starts, what was durable is there, no byte has an older value than it may, two
//! reads agree, and after the sync and a clean stop both replicas are what was read. A log is not the same twice (the
//! daemon's threads and the kernel have their own time), so one that fails is kept and replayed from there.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::power_scenarios::{Recording, SCENARIOS, Scenario, VOLUME_BYTES, record_plain};
use crate::support::checker::unique_bytes;
use crate::support::daemon::{Daemon, Volume, folder};
use crate::support::nbd::{Command, FUA};
use crate::support::recorder::{DISKS, DiskOp, Event, Log, Request};
use crate::support::recorder_disk::RecordedDisk;
use crate::support::recorder_judge::Judge;
use crate::support::recorder_replay::{Choice, Cut, Lie, images, joint_prefix, overlaps_in_flight};
use crate::support::rng::Rng;
use crate::support::skip;

/// Replays at the same time.
const THREADS: usize = 2;
/// Cuts at flush boundaries and random cuts of one scenario in an ordinary test run.
const CUTS: usize = 20;

/// What was replayed.
#[derive(Clone, Copy, Debug, Default)]
struct Replayed {
    cuts: usize,
    boundaries: usize,
    joint_prefixes: usize,
    one_disk_lost: usize,
}

/// Which cuts of a log are replayed: at most `boundaries` flush boundaries (all, if there are no more), and `random` others.
fn choose_cuts(log: &Log, may_lose: &[usize], (boundaries, random): (usize, usize), seed: u64) -> Vec<Cut> {
    let mut rng = Rng::new(seed);
    let (first, last) = (log.powered_on(log.events.len()) + 1, log.events.len());
    let mut all = log.flush_boundaries(first..last + 1);
    while all.len() > boundaries {
        all.swap_remove(rng.below(all.len() as u64) as usize);
    }
    let others = (0..random).map(|_| first + rng.below((last - first) as u64 + 1) as usize);
    let others: Vec<usize> = others.collect();
    let cut = |at: usize| {
        let choice = match rng.below(8) {
            0 => Choice::None,
            1 => Choice::All,
            2 => Choice::OnlyA,
            3 => Choice::OnlyB,
            4..6 => Choice::Torn(rng.next()),
            _ => joint_prefix(log, at, &mut rng),
        };
        let lost = if rng.chance(25) { Some(rng.pick(may_lose)) } else { None };
        Cut { at, choice, lost }
    };
    all.into_iter().chain(others).map(cut).collect()
}

/// A folder in memory where there is one: the replays write a lot, and what is durable is the log's matter.
fn folder_in_memory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("nbdmirror-").tempdir_in("/dev/shm").unwrap_or_else(|_| folder())
}

/// A volume whose replicas are to be overwritten with images.
fn volume_for_replays() -> Volume {
    let dir = folder_in_memory();
    Volume { dir, size_bytes: VOLUME_BYTES, replicas: Vec::new(), serve_args: Vec::new() }
}

fn read_all(daemon: &Daemon) -> Vec<u8> {
    daemon.client().read(0, VOLUME_BYTES as usize).unwrap()
}

/// Starts the daemon on what a cut leaves, and says what is wrong.
fn replay(volume: &mut Volume, log: &Log, judge: &Judge, cut: Cut, lie: Lie) -> Result<(), String> {
    volume.replicas.clear();
    for (disk, image) in images(log, cut, lie).iter().enumerate() {
        if cut.lost != Some(disk) {
            let path = volume.path(["a.img", "b.img"][disk]);
            fs::write(&path, image).unwrap();
            volume.replicas.push(path);
        }
    }
    let args: &[&str] = if cut.lost.is_some() { &["--degraded"] } else { &[] };
    let daemon =
        volume.try_start(args).map_err(|said| format!("does not start: {}{}", said.out, said.err))?;
    let first = read_all(&daemon);
    judge.check(cut.at, 0, &first).map_err(|wrong| wrong.join("\n"))?;
    if read_all(&daemon) != first {
        return Err("a second read differs".into());
    }
    if cut.lost.is_none() {
        daemon.wait_in_sync();
    }
    if read_all(&daemon) != first {
        return Err("a read after the sync differs".into());
    }
    daemon.terminate();
    for path in &volume.replicas {
        if fs::read(path).unwrap()[..VOLUME_BYTES as usize] != first[..] {
            return Err(format!("{} is not what was read", path.display()));
        }
    }
    Ok(())
}

/// [`replay`], where a panic (a daemon that hangs or dies) is a failure as well.
fn try_replay(volume: &mut Volume, log: &Log, judge: &Judge, cut: Cut, lie: Lie) -> Result<(), String> {
    let caught = catch_unwind(AssertUnwindSafe(|| replay(volume, log, judge, cut, lie)));
    caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_owned())
    })
}

/// Replays all cuts, on several threads; those that fail, with what is wrong.
fn replay_all(log: &Log, cuts: &[Cut], lie: Lie) -> Vec<(Cut, String)> {
    let judge = Judge::new(log, VOLUME_BYTES);
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut volume = volume_for_replays();
                while let Some(cut) = cuts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(wrong) = try_replay(&mut volume, log, &judge, *cut, lie) {
                        failed.lock().unwrap().push((*cut, wrong));
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

/// Records a scenario and replays its cuts; fails the test, with how to replay the failure, where one is lost.
fn record_and_replay(scenario: &Scenario, sizes: (usize, usize), seed: u64) -> Replayed {
    let log = (scenario.record)(seed);
    let overlaps = overlaps_in_flight(&log, VOLUME_BYTES);
    let cuts = choose_cuts(&log, scenario.may_lose, sizes, seed);
    let failed = replay_all(&log, &cuts, Lie::Nothing);
    if !failed.is_empty() || !overlaps.is_empty() {
        let kept = keep(&log, scenario.name, seed);
        for (cut, wrong) in &failed {
            eprintln!("LOST: seed {seed}, scenario {}, cut {cut}: {wrong}", scenario.name);
            eprintln!("  again: scripts/power-cuts --replay {} {cut}", kept.display());
        }
        panic!(
            "{} of {} cuts lost; overlapping writes in flight on a disk: {overlaps:?}",
            failed.len(),
            cuts.len()
        );
    }
    let ended = |cut: &&Cut| !log.flush_boundaries(cut.at..cut.at + 1).is_empty();
    let joint = |cut: &&Cut| matches!(cut.choice, Choice::Prefixes(_));
    let replayed = Replayed {
        cuts: cuts.len(),
        boundaries: cuts.iter().filter(ended).count(),
        joint_prefixes: cuts.iter().filter(joint).count(),
        one_disk_lost: cuts.iter().filter(|cut| cut.lost.is_some()).count(),
    };
    println!("{} (seed {seed}): {} events, {replayed:?}", scenario.name, log.events.len());
    replayed
}

/// Keeps a log after the test, to replay it alone.
fn keep(log: &Log, scenario: &str, seed: u64) -> PathBuf {
    let name = format!("nbdmirror-power-{scenario}-{seed}-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    log.save(&path).unwrap();
    path
}

/// The number in an environment variable, or `default`.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: no number")))
}

fn seed() -> u64 {
    from_environment("NBDMIRROR_POWER_SEED", 1)
}

/// One row of the table, as an ordinary test does it.
fn short(name: &str) {
    if let Some(reason) = RecordedDisk::unavailable() {
        return skip(&reason);
    }
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap();
    record_and_replay(scenario, (CUTS, CUTS), seed());
}

#[test]
fn nothing_durable_is_lost_by_power_cuts() {
    short("plain");
}

#[test]
fn nothing_durable_is_lost_by_power_cuts_while_a_replica_goes_and_returns() {
    short("fail-and-add");
}

#[test]
fn nothing_durable_is_lost_by_power_cuts_around_kills() {
    short("killed");
}

#[test]
fn nothing_durable_is_lost_by_power_cuts_in_recovery() {
    short("cut-twice");
}

#[test]
fn nothing_durable_is_lost_by_power_cuts_around_the_clearing_of_bits() {
    short("bits-cleared");
}

/// How many of these replays, with disks that lie, the judge refuses.
fn noticed(log: &Log, cuts: &[Cut], lie: Lie) -> usize {
    let failed = replay_all(log, cuts, lie);
    failed.iter().filter(|(_, wrong)| wrong.contains("durable since")).count()
}

#[test]
fn disks_that_ignore_flushes_are_noticed() {
    if let Some(reason) = RecordedDisk::unavailable() {
        return skip(&reason);
    }
    let log = record_plain(seed());
    let judge = Judge::new(&log, VOLUME_BYTES);
    let boundaries = log.flush_boundaries(1..log.events.len() + 1);
    // Few durable writes may happen to be overwritten, or zeroes.
    let telling = boundaries.into_iter().filter(|at| judge.durable(*at) >= 8);
    let cut = |at| Cut { at, choice: Choice::None, lost: None };
    let cuts: Vec<Cut> = telling.step_by(4).map(cut).collect();
    assert!(cuts.len() >= 10, "{} cuts", cuts.len());
    assert_eq!(noticed(&log, &cuts, Lie::FlushesIgnored), cuts.len());
}

#[test]
fn one_durable_write_that_both_disks_drop_is_noticed() {
    if let Some(reason) = RecordedDisk::unavailable() {
        return skip(&reason);
    }
    let recording = Recording::new(seed());
    let daemon = recording.volume.start();
    recording.load(&daemon, 20, seed());
    let request = Request::Write { offset: 28_672, len: 4096, fua: true };
    let asked = recording.recorder.log().push(Event::Asked(request));
    let bytes = unique_bytes(asked as u64, 28_672, 4096);
    daemon.client().call(Command::Write, FUA, 28_672, 4096, &bytes).unwrap();
    let at = recording.recorder.log().push(Event::Answered { asked, error: 0, data: None }) + 1;
    daemon.kill();
    let log = recording.finish();
    let cuts = [Choice::None, Choice::All, Choice::Torn(1)].map(|choice| Cut { at, choice, lost: None });
    assert_eq!(replay_all(&log, &cuts, Lie::Nothing), []);
    assert_eq!(noticed(&log, &cuts, Lie::NewestDurableDropped { below: VOLUME_BYTES }), cuts.len());
}

/// Linux forgets `RWF_DSYNC` on FUSE when the direct write is asynchronous: FUA, intents and superblocks were not
/// durable on such files.
#[test]
fn a_durable_write_is_flushed_on_fuse() {
    if let Some(reason) = RecordedDisk::unavailable() {
        return skip(&reason);
    }
    let recording = Recording::new(seed());
    let daemon = recording.volume.start();
    let begin = recording.recorder.log().events.len();
    daemon.client().call(Command::Write, FUA, 0, 4096, &[7; 4096]).unwrap();
    let log = recording.recorder.log().clone();
    for disk in 0..DISKS {
        let began = |of: fn(&DiskOp) -> bool| {
            let mine =
                |event: &Event| matches!(event, Event::DiskBegan { disk: its, op } if *its == disk && of(op));
            log.events[begin..].iter().rposition(mine).map(|index| begin + index).unwrap()
        };
        let write = began(|op| matches!(op, DiskOp::Write { offset: 0, .. }));
        let flush = began(|op| matches!(op, DiskOp::Flush));
        let ended = |op: usize| {
            log.events
                .iter()
                .position(|event| matches!(event, Event::DiskEnded { began, .. } if *began == op))
        };
        assert!(ended(write).unwrap() < flush, "disk {disk}: the write is not flushed");
        assert!(ended(flush).is_some(), "disk {disk}: answered before the flush ended");
    }
    daemon.stop();
}

#[test]
#[ignore = "long: scripts/power-cuts CUTS [SEED]"]
fn soak() {
    if let Some(reason) = RecordedDisk::unavailable() {
        return skip(&reason);
    }
    let (wanted, seed) = (from_environment("NBDMIRROR_POWER_CUTS", 500) as usize, seed());
    let mut total = Replayed::default();
    for round in 0.. {
        let scenario = &SCENARIOS[round as usize % SCENARIOS.len()];
        // Every flush boundary of a log, and half as many random cuts.
        let left = wanted - total.cuts;
        let replayed = record_and_replay(scenario, (left, left.min(100)), seed + round);
        total.cuts += replayed.cuts;
        total.boundaries += replayed.boundaries;
        total.joint_prefixes += replayed.joint_prefixes;
        total.one_disk_lost += replayed.one_disk_lost;
        if total.cuts >= wanted {
            break;
        }
    }
    let Replayed { cuts, boundaries, joint_prefixes, one_disk_lost } = total;
    println!("{one_disk_lost} of the cuts with one disk lost for good");
    println!("{cuts} cuts replayed ({boundaries} flush boundaries, {joint_prefixes} joint prefixes), 0 lost");
}

#[test]
#[ignore = "replays one cut of a kept log: scripts/power-cuts --replay LOG CUT"]
fn replay_one() {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let log = Log::load(Path::new(&variable("NBDMIRROR_POWER_LOG"))).unwrap();
    let cut = variable("NBDMIRROR_POWER_CUT").parse().unwrap();
    let judge = Judge::new(&log, VOLUME_BYTES);
    replay(&mut volume_for_replays(), &log, &judge, cut, Lie::Nothing).unwrap();
    println!("1 cuts replayed, 0 lost");
}
