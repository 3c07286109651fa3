//! The ways to make a write log: one row of [`SCENARIOS`] each.
//!
//! ```text
//!  create ──► RecordedDisk A, B ──► daemon ◄── clients, operator, kills ──► stop ──► Log
//! ```
//!
//! What must hold: every request is served (faults here are kills and power cuts, not errors), and the log ends with a
//! clean stop, so that its last cut must be whole.

use std::fs;
use std::ops::Range;
use std::time::Duration;

use crate::support::daemon::{Daemon, Volume, folder};
use crate::support::recorder::{DISKS, Event, Log, Recorder};
use crate::support::recorder_disk::RecordedDisk;
use crate::support::recorder_judge::Judge;
use crate::support::recorder_load::{Load, ask, read};
use crate::support::recorder_replay::{Choice, Cut, Lie, images, joint_prefix};
use crate::support::rng::{Rng, mix};
use crate::support::tools::wait_for;

/// Size of every recorded volume.
pub(crate) const VOLUME_BYTES: u64 = 2 << 20;
const REGION_SIZE: &str = "64K";

/// A recorded daemon: its disks, its log, and how it is served.
pub(crate) struct Recording {
    pub(crate) recorder: Recorder,
    pub(crate) volume: Volume,
    disks: Vec<RecordedDisk>,
}

impl Recording {
    /// A new volume.
    pub(crate) fn new(seed: u64) -> Self {
        let created = Volume::new(VOLUME_BYTES, &["--region-size", REGION_SIZE]);
        let images = [0, 1].map(|disk| fs::read(&created.replicas[disk]).unwrap());
        Self::on(Log::new(&images), images, seed)
    }

    /// A volume that a log left in this state.
    fn on(log: Log, images: [Vec<u8>; DISKS], seed: u64) -> Self {
        let recorder = Recorder::new(log);
        let disks = images.into_iter().enumerate();
        let disks: Vec<_> =
            disks.map(|(disk, content)| RecordedDisk::new(disk, content, &recorder, seed)).collect();
        let replicas = disks.iter().map(|disk| disk.path.clone()).collect();
        let volume = Volume { dir: folder(), size_bytes: VOLUME_BYTES, replicas, serve_args: Vec::new() };
        Self { recorder, volume, disks }
    }

    pub(crate) fn load(&self, daemon: &Daemon, requests: usize, seed: u64) {
        self.load_within(daemon, requests, seed, 0..VOLUME_BYTES);
    }

    fn load_within(&self, daemon: &Daemon, requests: usize, seed: u64, window: Range<u64>) {
        ask(&self.recorder, &daemon.socket, &Load { connections: 3, requests, window, seed });
    }

    fn operate(&self, daemon: &Daemon, verb: &str) {
        self.recorder.note(verb);
        daemon.verb(verb, &self.volume.replicas[1]).ok();
    }

    fn stop(&self, daemon: Daemon) {
        self.recorder.note("stop");
        daemon.stop();
        self.recorder.log().push(Event::DaemonGone);
    }

    /// The log; every request in it was served.
    pub(crate) fn finish(self) -> Log {
        drop(self.disks);
        let log = std::mem::take(&mut *self.recorder.log());
        let refused = log.events.iter().filter(|event| matches!(event, Event::Answered { error: 1.., .. }));
        assert_eq!(refused.count(), 0, "requests were answered with errors");
        log
    }
}

/// One way to make a log.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) record: fn(u64) -> Log,
    /// The disks that may be lost for good at any cut: the other must be in sync all the time.
    pub(crate) may_lose: &'static [usize],
}

pub(crate) const SCENARIOS: [Scenario; 5] = [
    Scenario { name: "plain", record: record_plain, may_lose: &[0, 1] },
    Scenario { name: "fail-and-add", record: record_fail_and_add, may_lose: &[1] },
    Scenario { name: "killed", record: record_killed, may_lose: &[0, 1] },
    Scenario { name: "cut-twice", record: record_cut_twice, may_lose: &[0, 1] },
    Scenario { name: "bits-cleared", record: record_bits_cleared, may_lose: &[0, 1] },
];

/// Writes on several connections, then a clean stop.
pub(crate) fn record_plain(seed: u64) -> Log {
    let recording = Recording::new(seed);
    let daemon = recording.volume.start();
    recording.load(&daemon, 60, seed);
    recording.stop(daemon);
    recording.finish()
}

/// A replica is failed in the middle of writes, misses some, and comes back in the middle of others.
fn record_fail_and_add(seed: u64) -> Log {
    let recording = Recording::new(seed);
    let daemon = recording.volume.start();
    for (round, verb) in ["fail", "add"].into_iter().enumerate() {
        std::thread::scope(|scope| {
            scope.spawn(|| recording.load(&daemon, 40, mix(seed + round as u64)));
            let answers = recording.recorder.log().answers();
            wait_for("answers", Duration::from_secs(30), || {
                recording.recorder.log().answers() > answers + 20
            });
            recording.operate(&daemon, verb);
        });
    }
    daemon.wait_in_sync();
    recording.load(&daemon, 10, mix(seed + 2));
    recording.stop(daemon);
    recording.finish()
}

/// kill -9 in the middle of writes, and recovery, with writes during it.
fn record_killed(seed: u64) -> Log {
    let recording = Recording::new(seed);
    let mut daemon = recording.volume.start();
    for round in 0..2 {
        std::thread::scope(|scope| {
            let socket = daemon.socket.clone();
            let load =
                Load { connections: 3, requests: 10_000, window: 0..VOLUME_BYTES, seed: mix(seed + round) };
            let recorder = &recording.recorder;
            let answers = recorder.log().answers();
            scope.spawn(move || ask(recorder, &socket, &load));
            wait_for("answers", Duration::from_secs(30), || recorder.log().answers() > answers + 60);
            daemon.kill();
        });
        recording.recorder.log().push(Event::DaemonGone);
        daemon = recording.volume.start();
    }
    recording.load(&daemon, 15, mix(seed + 3));
    daemon.wait_in_sync();
    recording.stop(daemon);
    recording.finish()
}

/// The power is cut in the middle of writes, and again during and after the recovery from that.
fn record_cut_twice(seed: u64) -> Log {
    let mut log = record_plain(seed);
    let mut rng = Rng::new(mix(seed));
    let half = log.events.len() / 2;
    let at = half + rng.below((log.events.len() - half) as u64 * 3 / 4) as usize;
    let choice = match rng.below(4) {
        0 => Choice::OnlyA,
        1 => Choice::OnlyB,
        2 => Choice::Torn(rng.next()),
        _ => joint_prefix(&log, at, &mut rng),
    };
    let left = images(&log, Cut { at, choice, lost: None }, Lie::Nothing);
    log.cut_short(at);
    log.power_on(&left);
    let recording = Recording::on(log, left, seed);
    let daemon = recording.volume.start();
    let mut client = daemon.client();
    let offsets = (0..VOLUME_BYTES).step_by(64 << 10);
    let answers = offsets.map(|offset| (offset, read(&recording.recorder, &mut client, offset, 64 << 10)));
    let answers: Vec<_> = answers.collect();
    let judge = Judge::new(&recording.recorder.log(), VOLUME_BYTES);
    for (offset, (asked, bytes)) in answers {
        judge.check(asked, offset, &bytes).unwrap();
    }
    recording.load(&daemon, 20, mix(seed + 1));
    daemon.wait_in_sync();
    recording.stop(daemon);
    recording.finish()
}

/// Regions rest until their intent bits are cleared, and are written again.
fn record_bits_cleared(seed: u64) -> Log {
    let recording = Recording::new(seed);
    let daemon = recording.volume.start();
    recording.load(&daemon, 20, seed);
    daemon.wait_until("without dirty regions", Duration::from_secs(60), |status| {
        // One region stays busy: its page is written while others' bits are cleared in it.
        recording.load_within(&daemon, 1, mix(seed ^ status.dirty_bytes), 0..64 << 10);
        status.dirty_bytes <= 64 << 10
    });
    recording.load(&daemon, 20, mix(seed + 1));
    recording.stop(daemon);
    recording.finish()
}
