//! Small worlds, exhaustively: those of the quick run hold, and planted bugs are found in them.
//!
//! Needs the feature `sim`: `cargo test --features sim --test small_worlds`.
#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use nbdmirror::planted::Bug;
use nbdmirror::sim::small::{CrashName, Limits, SmallWorld, WORLDS, explore, replay};

const ALL: Limits = Limits { orders_max: u64::MAX, outcomes_max: u64::MAX };

/// Planted bugs and the smallest world that has what it takes to show each. (The others need more than a small
/// world has: several pages, two histories, two faults; `tests/simulation.rs` catches those.)
const CAUGHT_IN: &[(Bug, &str)] = &[
    (Bug::AckBeforeIntent, "basic"),
    (Bug::IntentOnOneReplica, "basic"),
    (Bug::AckBeforeMembership, "fault-overlap"),
    (Bug::DropStaleBit, "fault-overlap"),
    (Bug::OverlapRace, "overlap"),
    (Bug::ClearBeforeFlush, "basic"),
    (Bug::ClearWithWriteInFlight, "basic"),
    (Bug::ReadStaleSide, "unsynced-second"),
    (Bug::ReadStaleReplica, "returned-read"),
    (Bug::ResyncWrongDirection, "unsynced-first"),
    (Bug::ResyncWithoutFlush, "overlap-partly"),
    (Bug::EqualCountersEqualData, "overlap-partly"),
    (Bug::FlushOneReplicaOnly, "write-flush"),
    (Bug::FuaIgnored, "fua"),
    (Bug::ZeroOneReplica, "zero"),
    (Bug::FlushFailureForgotten, "alone"),
    (Bug::BelieveAfterFailedFlush, "turns-back-read"),
];

fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

#[test]
fn promises_hold_in_every_order_and_crash_of_the_quick_worlds() {
    for world in WORLDS.iter().filter(|world| world.quick) {
        let (figures, failures) = explore(world, None, ALL, threads());
        println!("{:<16} {figures}", world.name);
        for failure in &failures {
            println!("{failure}");
        }
        assert!(failures.is_empty(), "world {}", world.name);
        assert!(!figures.cut_off, "world {} is explored whole", world.name);
        assert!(figures.orders > 1 && figures.recoveries > 1);
    }
}

#[test]
fn planted_bugs_are_found_and_replayed() {
    for (bug, name) in CAUGHT_IN {
        let world = SmallWorld::named(name).expect("a world of the table");
        let (figures, failures) = explore(world, Some(*bug), ALL, 1);
        let failure = failures.first().unwrap_or_else(|| panic!("{bug:?} is not found in {name}: {figures}"));
        println!("{bug:?}: {failure}");
        let again = replay(world, &failure.choices, failure.crash, Some(*bug), false);
        assert_eq!(again.unwrap_err(), failure.what, "{bug:?}: the same when replayed");
        let without: Result<(), String> = replay(world, &failure.choices, failure.crash, None, false);
        if let Err(why) = without {
            assert!(why.starts_with("replay: "), "{bug:?}: without the bug all is well: {why}");
        }
    }
}

/// Vectors of choices that found a bug once, with what it was. They need not find it again when the core does more or
/// less than it did then; the worlds do.
const REGRESSIONS: &[(&str, &[u16], &str, &str)] = &[(
    "fault-clear",
    &[0, 0, 1, 0, 0, 0, 0, 0, 0, 2],
    "k0",
    "a flush fails and loses the cache, and a kill keeps that from being recorded: a sync leaves its source as it is",
)];

#[test]
fn choices_that_found_bugs_pass() {
    for (name, choices, outcome, what) in REGRESSIONS {
        let world = SmallWorld::named(name).expect("a world of the table");
        let crash = CrashName { outcome: outcome.parse().unwrap(), lose: None };
        if let Err(why) = replay(world, choices, Some(crash), None, false) {
            panic!("{name} ({what}): {why}");
        }
    }
}
