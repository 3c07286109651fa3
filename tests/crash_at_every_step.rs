//! Crash at every step, in a reduced form, and planted bugs that the scenarios must notice.
//!
//! Needs the feature `sim`: `cargo test --features sim --test crash_at_every_step`.
#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test")]

use nbdmirror::planted::{BUGS, Bug, NOT_BY_CHANCE};
use nbdmirror::sim::steps::explore::{Address, Settings};
use nbdmirror::sim::steps::report::Report;
use nbdmirror::sim::steps::row::Scenario;
use nbdmirror::sim::steps::scenarios::{SCENARIOS, named};
use nbdmirror::sim::steps::{run, run_at};
use nbdmirror::sim::swarm::available_threads;

const SETTINGS: Settings = Settings { cap: 4, deep: 1, cap2: 1, seed: 1, bug: None, failures_max: 3 };

/// Bugs that some scenario must notice. The others need more trouble than one crash and one bad disk: the swarm
/// catches them.
const CAUGHT: &[Bug] = &[
    Bug::AckBeforeIntent,
    Bug::IntentOnOneReplica,
    Bug::AckBeforeMembership,
    Bug::DropStaleBit,
    Bug::OverlapRace,
    Bug::ClearBeforeFlush,
    Bug::ClearWithWriteInFlight,
    Bug::ReadStaleSide,
    Bug::ReadStaleReplica,
    Bug::FailTheLast,
    Bug::ResyncWrongDirection,
    Bug::ResyncWithoutFlush,
    Bug::EqualCountersEqualData,
    Bug::DivergenceIgnored,
    Bug::FlushOneReplicaOnly,
    Bug::FuaIgnored,
    Bug::ZeroOneReplica,
    Bug::BelieveAfterFailedFlush,
];

fn all() -> Vec<&'static Scenario> {
    SCENARIOS.iter().collect()
}

fn complain(report: &Report) {
    for failure in report.scenarios.iter().flat_map(|row| &row.failures) {
        println!("{} at {:?}: {}", failure.scenario, failure.at, failure.why);
        println!("  replay: nbdmirror-sim steps --scenario {} --at '{}'", failure.scenario, failure.at);
    }
    assert_eq!(report.failed, 0);
}

#[test]
fn promises_hold_whenever_a_scenario_or_its_recovery_is_crashed() {
    let report = run(&all(), SETTINGS, available_threads());
    print!("{}", report.table());
    complain(&report);
    for row in &report.scenarios {
        assert!(row.tally.depths.iter().all(|depth| depth.points > 0), "{} is not crashed", row.scenario);
    }
}

#[test]
fn equal_settings_cover_the_same() {
    let scenarios = [named("replica-returns").unwrap(), named("create").unwrap()];
    let depths = |threads| {
        let report = run(&scenarios, Settings { cap: 8, cap2: 3, ..SETTINGS }, threads);
        report.scenarios.iter().map(|row| row.tally.depths).collect::<Vec<_>>()
    };
    assert_eq!(depths(1), depths(3));
}

#[test]
fn a_failure_is_found_again_at_its_place() {
    let settings = Settings { bug: Some(Bug::ReadStaleSide), failures_max: 1, ..SETTINGS };
    let scenario = named("bit-clearing").unwrap();
    let found = run(&[scenario], settings, 1);
    let failure = &found.scenarios[0].failures[0];
    let at: Address = failure.at.parse().unwrap();
    let again = run_at(scenario, settings, at);
    assert_eq!(&again.scenarios[0].failures[0], failure);
}

/// A flush fails on one replica, and before that is recorded the daemon is killed: what that replica reads is in no
/// cache to be written any more. It was taken for durable after the sync, and rolled back by the next power cut.
#[test]
fn a_lost_cache_is_written_again_after_a_kill() {
    let settings = Settings { cap: 64, ..SETTINGS };
    complain(&run(&[named("flush-before-bit-clearing-fails").unwrap()], settings, 1));
}

/// Scenarios that notice `bug`: those that fail by themselves, and those that need the crash.
fn caught_by(bug: Option<Bug>) -> (Vec<&'static str>, Vec<&'static str>) {
    let settings = Settings { bug, deep: 0, failures_max: 1, ..SETTINGS };
    let failures = run(&all(), settings, available_threads()).scenarios.into_iter();
    let found = failures.filter_map(|row| row.failures.into_iter().next());
    let (alone, crashed): (Vec<_>, Vec<_>) = found.partition(|failure| failure.at.is_empty());
    let names = |failures: Vec<nbdmirror::sim::steps::report::Failure>| {
        failures.into_iter().map(|failure| failure.scenario).collect()
    };
    (names(alone), names(crashed))
}

#[test]
fn planted_bugs_are_caught_by_scenarios() {
    println!("{:<24} {:>6} {:>8}  for example", "planted bug", "alone", "crashed");
    assert_eq!(caught_by(None), (vec![], vec![]), "scenarios fail without a bug");
    let mut missed = Vec::new();
    for bug in BUGS {
        let (alone, crashed) = caught_by(Some(bug));
        let example = alone.first().or(crashed.first()).copied().unwrap_or("not caught");
        println!("{:<24} {:>6} {:>8}  {example}", format!("{bug:?}"), alone.len(), crashed.len());
        if alone.is_empty() && crashed.is_empty() && CAUGHT.contains(&bug) {
            missed.push(bug);
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
    assert!(NOT_BY_CHANCE.iter().all(|bug| CAUGHT.contains(bug)), "every bug is caught by something");
}
