//! The simulator over the core: fresh seeds, the seeds of bugs that were found, and planted bugs.
//!
//! Needs the feature `sim`: `cargo test --features sim --test simulation`.
#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test")]

use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::bugs::Hunt;
use nbdmirror::sim::counts::{Counts, FaultKind, RequestKind};
use nbdmirror::sim::run::{Options, run_seed};
use nbdmirror::sim::swarm::{Swarm, available_threads};

/// Seeds that found a bug once, with what it was. They need not find it again (each seed's world changes with the
/// simulator); the bugs' own tests are in `src/mirror/tests.rs` where they could be made small.
const REGRESSIONS: &[(u64, &str)] = &[
    (2, "a write that waits for a bit which the commit in flight has is never woken"),
    (23, "ticks are asked for at a time that has passed while the volume opens"),
    (24, "a resyncing replica alone has the newest superblock; the other's is torn then"),
    (31, "a superblock that stands in a cache only is believed, and the other slot is torn"),
    (38, "the superblock that takes a replica in is durable before its stale bits"),
    (45, "the read policy overflows after an error on the last replica"),
    (85, "a write in flight meets the larger alignment of a replica that is coming"),
    (1049, "a replica joins though a write failed on it while the joining commit was in flight"),
    (1430, "a write does not wait for a new stale bit because its intent bit is on disk still"),
    (2148, "a stop is answered before flushes that came before it"),
    (2965, "a read does not wait for a copy in flight whose source has just failed"),
    (39196, "a second candidate is taken in with misaligned writes in flight"),
    (483, "a stop is answered twice where its flush fails while metadata cannot be recorded"),
    (1156, "new requests do not keep the alignment of a replica that is being prepared"),
    (5127, "a commit falls on the only whole superblock of a replica that is one commit behind"),
    (107_613, "a stop is called unclean for a replica that failed while it was recorded"),
    (7_004_690, "a replica that moved, and is a commit behind at a start that dies, is refused as diverged"),
    (
        7_001_717,
        "a copy is answered from the last replica before it is flushed there (its source was failed)",
    ),
    (7_017_040, "the same, where the source's flush failed"),
    (8_001_072, "the same, where the copy lands while that flush is under way"),
    (7_013_271, "a source whose failed flush was heard of and not recorded is not written anew"),
    (7_002_053, "a flush fails because the replica it was asked of was failed, with another in sync by then"),
    (8_007_564, "a sync writes before its region's intent bit is durable"),
    (
        20_060_055,
        "a replica that missed nothing joins in the commit that takes it in; a third one, a commit behind, is refused",
    ),
    (
        20_015_462,
        "where no replica can flush a copied region, its source is failed and one that has the copy in its cache stays",
    ),
    (20_015_550, "the same, after flushes that failed at the start"),
    (
        20_072_369,
        "no bug: a resyncing replica's own bit, of a write that failed, goes when it gets the volume's pages",
    ),
    (
        20_093_535,
        "no bug: one that joined by a commit which did not reach it is lost with the replica that has it",
    ),
    (
        925_514_547_695,
        "no bug: a disk turns back while the other flushes go on; what it misses is not known before they end",
    ),
    (
        925_515_647_126,
        "no bug: a kill after a disk turned back, before it is recorded as failed: nobody can know",
    ),
    (
        21_000_249,
        "a read that was in flight when its replica's flush failed is believed, though the cache has been dropped",
    ),
    (
        41_044_987,
        "an old copy counts as one commit behind a head that has lost its newest superblock, and is in sync",
    ),
    (41_032_557, "the same; the head is lost then, and the copy is all there is"),
    (
        41_014_025,
        "no bug: after many crashes in a row every region is unsynced, and one slow disk takes minutes",
    ),
    (53_001_359, "no bug: the disk that would be the source is refused by a read-only start and replaced"),
    (53_003_225, "no bug: a create that tore a superblock leaves a replica that is behind, which is copied"),
    (
        189_142_843_410,
        "no bug: one replica's flush failed, and before the other's had ended that gave a read error: two bad disks",
    ),
    (
        70_053_442,
        "no bug: the last stop is told of a flush that failed when the daemon was killed, and fails that replica",
    ),
    (70_092_178, "the same"),
    (
        70_052_068,
        "a copy with the count of a superblock that rotted on every replica, used again, counts as in sync",
    ),
    (
        91_004_134,
        "who lost its newest superblock and its stale bits accuses nobody, and is not what is synced from",
    ),
    (
        110_055_980,
        "what was copied to a resyncing replica from one that then left the last one alone is kept",
    ),
    (
        110_048_463,
        "no bug: a sync's copy that the last replica could not flush, read, and turned back by a power cut",
    ),
    (120_023_586, "no bug: one side of a split, alone, is told of a flush that failed before"),
    (150_086_028, "no bug: one side of a split, alone, lost a flush; it died before it had recorded that"),
    (
        171_000_200,
        "no bug: a replica is added in the slot of one that was removed, and an old superblock comes to light",
    ),
    (
        140_003_574,
        "no bug: what the last replica lost before a restart comes to light while another one is in sync with a copy",
    ),
    (110_012_298, "no bug that was released: a disk that rots demotes all the others"),
    (41_040_502, "a torn superblock is made whole by a torn later one with the same member table"),
    (
        41_025_547,
        "no bug: an old copy is refused at a read-only start and replaced; before, there was no source to compare",
    ),
];

/// Runs `seeds` on all cores and gives the failures in order of seeds, and what happened.
fn run(seeds: std::ops::Range<u64>) -> (Vec<(u64, String)>, Counts) {
    let swarm = Swarm { options: Options::default(), threads: available_threads() };
    let mut failures = Vec::new();
    let report = swarm.run(seeds, |seed, why| failures.push((seed, why.to_owned())));
    failures.sort();
    (failures, report.counts)
}

fn complain(failures: &[(u64, String)]) {
    for (seed, why) in failures {
        println!("seed {seed}: {why}\n  replay: scripts/simulate --seeds 1 --first {seed} --verbose");
    }
    assert!(failures.is_empty(), "{} seeds failed", failures.len());
}

/// Also: every kind of fault and request comes up, or the promises were not put to that test.
#[test]
fn promises_hold_in_hundreds_of_worlds_with_faults_of_every_kind() {
    let (failures, counts) = run(1..301);
    complain(&failures);
    let faults = FaultKind::counted().filter(|kind| counts.faults_of(*kind) == 0);
    let requests = RequestKind::ALL.iter().filter(|kind| counts.requests_of(**kind) == 0);
    let never: Vec<&str> = faults.map(|kind| kind.word()).chain(requests.map(|kind| kind.word())).collect();
    assert!(never.is_empty(), "never drawn: {never:?}");
}

#[test]
fn seeds_that_found_bugs_pass() {
    for (seed, what) in REGRESSIONS {
        if let Err(why) = run_seed(*seed, Options::default()) {
            panic!("seed {seed} ({what}): {why}");
        }
    }
}

#[test]
fn equal_seeds_do_equal_things() {
    for seed in [3, 5, 8] {
        let run = || run_seed(seed, Options::default()).map(|counts| counts.to_string());
        assert_eq!(run(), run(), "seed {seed}");
    }
}

/// Most seeds that a planted bug may need until it is noticed.
const SEEDS_TO_CATCH_MAX: u64 = 400;

/// The core's own invariants are not checked here: a promise's check, the oracle or an assertion has to notice. The
/// table with medians over many first seeds: `nbdmirror-sim bugs`. (Bugs that chance does not find are caught by scenarios
/// and small worlds: `tests/crash_at_every_step.rs`, `tests/small_worlds.rs`.)
#[test]
fn planted_bugs_are_caught() {
    let hunt = Hunt { hunts: 1, limit: SEEDS_TO_CATCH_MAX, first: 1, threads: available_threads() };
    let table = hunt.run(&Bug::found_by_chance());
    println!("{table}");
    let missed = table.missed();
    assert!(missed.is_empty(), "not caught: {missed:?}: the simulator proves too little");
}

#[test]
fn every_promise_has_a_planted_bug() {
    for promise in 1..=11 {
        assert!(BUGS.iter().any(|bug| bug.promise() == promise), "promise {promise}");
    }
}
