//! `nbdmirror-sim steps`: crash at every step of named scenarios.

use clap::Args;
use nbdmirror::planted::Bug;
use nbdmirror::sim::steps;
use nbdmirror::sim::steps::explore::{Address, Settings};
use nbdmirror::sim::steps::row::Scenario;
use nbdmirror::sim::steps::scenarios::{self, SCENARIOS};
use nbdmirror::sim::swarm::available_threads;

#[derive(Args)]
pub(crate) struct StepsArgs {
    /// Only this scenario (without: all).
    #[arg(long, value_parser = scenario_named)]
    scenario: Option<&'static Scenario>,
    /// Joint outcomes at a crash point of a scenario: all where there are no more, else so many.
    #[arg(long, default_value_t = 16)]
    cap: u64,
    /// Of those the recoveries of so many are crashed after every event, too; 0: none.
    #[arg(long, default_value_t = 1)]
    deep: u64,
    /// Joint outcomes at a crash point of a recovery.
    #[arg(long, default_value_t = 2)]
    cap2: u64,
    /// Shifts latencies and samples.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads.
    #[arg(long, default_value_t = available_threads())]
    threads: usize,
    /// Plant this bug in the core.
    #[arg(long, value_parser = Bug::named)]
    bug: Option<Bug>,
    /// Crash at this place only, like 12/p5/30/knone, and print what happens then; empty: the scenario itself.
    #[arg(long, requires = "scenario")]
    at: Option<Address>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Print at most this many failures of a scenario.
    #[arg(long, default_value_t = 3)]
    show: usize,
}

/// Runs it. False: something failed.
pub(crate) fn run(args: &StepsArgs) -> bool {
    let StepsArgs { cap, deep, cap2, seed, bug, show, .. } = *args;
    let settings = Settings { cap, deep, cap2, seed, bug, failures_max: show };
    let report = match (args.scenario, &args.at) {
        (Some(scenario), Some(at)) => steps::run_at(scenario, settings, at.clone()),
        (Some(scenario), None) => steps::run(&[scenario], settings, args.threads),
        (None, _) => steps::run(&SCENARIOS.iter().collect::<Vec<_>>(), settings, args.threads),
    };
    if args.json {
        match serde_json::to_string(&report) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("cannot print the report: {error}"),
        }
        return report.failed == 0;
    }
    let bug = bug.map(|bug| format!(" --bug {bug:?}")).unwrap_or_default();
    for failure in report.scenarios.iter().flat_map(|row| row.failures.iter().take(show)) {
        println!("{} FAILED at {:?}: {}", failure.scenario, failure.at, failure.why);
        println!(
            "  replay: nbdmirror-sim steps --scenario {} --seed {seed}{bug} --at '{}'",
            failure.scenario, failure.at
        );
    }
    if args.at.is_none() {
        print!("{}", report.table());
    }
    println!("{} recoveries, {} failed", report.total.recoveries, report.failed);
    report.failed == 0
}

fn scenario_named(name: &str) -> Result<&'static Scenario, String> {
    scenarios::named(name).ok_or_else(|| {
        let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        format!("there is no scenario {name:?}; choose one of {}", names.join(", "))
    })
}
