//! Crash at every step: named scenarios, each crashed after every event, and its recoveries crashed again.
//!
//! - `fork`: a crash here and now, and the worlds that it may leave.
//! - `scenarios`: the table of scenarios, of which each is a `row`. `script`: plays one.
//! - `explore`: crashes, recoveries, crashes of recoveries. `report`: what was covered.
//!
//! What must hold: two runs with the same settings cover the same and find the same.

pub mod explore;
pub mod fork;
pub mod report;
pub mod row;
pub mod scenarios;
pub mod script;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use explore::{Address, Settings, Shared, explore_slice, replay};
use report::{Report, Row, Tally};
use row::Scenario;

/// Parts that a scenario's crash points are dealt out in.
const SLICES: usize = 8;

/// Looks at `scenarios` on `threads` threads.
#[must_use]
pub fn run(scenarios: &[&'static Scenario], settings: Settings, threads: usize) -> Report {
    let shared: Vec<Arc<Shared>> = scenarios.iter().map(|_| Arc::default()).collect();
    let tallies: Vec<Mutex<Tally>> = scenarios.iter().map(|_| Mutex::default()).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    let (index, slice) = (job / SLICES, (job % SLICES) as u64);
                    let Some(scenario) = scenarios.get(index) else { return };
                    let tally = explore_slice(scenario, settings, &shared[index], slice, SLICES as u64);
                    tallies[index].lock().unwrap_or_else(PoisonError::into_inner).add(&tally);
                }
            });
        }
    });
    let rows = scenarios.iter().zip(&shared).zip(tallies).map(|((scenario, shared), tally)| {
        let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
        row(scenario, shared, tally)
    });
    Report::new(rows.collect())
}

fn row(scenario: &'static Scenario, shared: &Shared, tally: Tally) -> Row {
    let mut failures = std::mem::take(&mut *shared.failures.lock().unwrap_or_else(PoisonError::into_inner));
    failures.sort();
    Row { scenario: scenario.name, tally, failures }
}

/// Crashes `scenario` at one place and prints what happens then; with an empty address the scenario alone.
#[must_use]
pub fn run_at(scenario: &'static Scenario, settings: Settings, at: Address) -> Report {
    let shared = Arc::default();
    let tally = replay(scenario, settings, &shared, at);
    Report::new(vec![row(scenario, &shared, tally)])
}
