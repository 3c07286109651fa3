//! The simulator over the core: fresh seeds, the seeds of bugs that were found, and planted bugs.
//!
//! Needs the feature `sim`: `cargo test --features sim --test simulation`.
#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::run::run_seed;

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
];

/// Runs `seeds` on all cores until one fails, and gives the first failures in order of seeds.
fn failures(
    seeds: impl Iterator<Item = u64> + Send,
    bug: Option<Bug>,
    until_first: bool,
) -> Vec<(u64, String)> {
    let seeds = Mutex::new(seeds);
    let found = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let done = until_first && !found.lock().unwrap().is_empty();
                    let Some(seed) = seeds.lock().unwrap().next().filter(|_| !done) else { return };
                    if let Err(why) = run_seed(seed, bug, false) {
                        found.lock().unwrap().push((seed, why));
                    }
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap();
    found.sort();
    found
}

fn complain(failures: &[(u64, String)]) {
    for (seed, why) in failures {
        println!("seed {seed}: {why}\n  replay: scripts/simulate --seeds 1 --first {seed} --verbose");
    }
    assert!(failures.is_empty(), "{} seeds failed", failures.len());
}

#[test]
fn promises_hold_in_hundreds_of_worlds() {
    complain(&failures(1..=300, None, false));
}

#[test]
fn seeds_that_found_bugs_pass() {
    for (seed, what) in REGRESSIONS {
        if let Err(why) = run_seed(*seed, None, false) {
            panic!("seed {seed} ({what}): {why}");
        }
    }
}

#[test]
fn equal_seeds_do_equal_things() {
    for seed in [3, 5, 8] {
        let run = || run_seed(seed, None, false).map(|counts| counts.to_string());
        assert_eq!(run(), run(), "seed {seed}");
    }
}

/// Most seeds that a planted bug may need until it is noticed.
const SEEDS_TO_CATCH_MAX: u64 = 3000;

#[test]
fn planted_bugs_are_caught() {
    let seeds_run = AtomicU64::new(0);
    println!("{:<24} {:>6}  caught by", "planted bug", "seeds");
    let mut missed = Vec::new();
    for bug in BUGS {
        let seeds = (1..=SEEDS_TO_CATCH_MAX).inspect(|_| {
            seeds_run.fetch_add(1, Ordering::Relaxed);
        });
        match failures(seeds, Some(bug), true).first() {
            Some((seed, why)) => {
                let promise = why.split(':').next().unwrap_or_default();
                println!("{:<24} {seed:>6}  {promise}", format!("{bug:?}"));
            }
            None => {
                println!("{:<24}      -  not caught", format!("{bug:?}"));
                missed.push(bug);
            }
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}: the simulator proves too little");
}
