//! The simulator's command: `nbdmirror-sim swarm --seeds N`, and one subcommand for each other way to simulate.
//!
//! A new way is a variant of [`Command`] with its arguments, and a line in [`main`]; what it does lives in
//! `src/sim`. Flags without a subcommand are those of `swarm`. Exit codes: 0 all well, 1 something failed,
//! 2 wrong arguments.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::steps;
use nbdmirror::sim::steps::explore::{Address, Settings};
use nbdmirror::sim::steps::row::Scenario;
use nbdmirror::sim::steps::scenarios::{self, SCENARIOS};
use nbdmirror::sim::swarm::{Swarm, available_threads};

#[derive(Parser)]
#[command(about = "Runs the mirror's core in simulated worlds and checks its promises")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Worlds drawn from seeds, with faults of every kind.
    Swarm(SwarmArgs),
    /// Named scenarios, crashed after every event, and their recoveries crashed again.
    Steps(StepsArgs),
}

#[derive(Args)]
struct SwarmArgs {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Threads (a world runs in one of them).
    #[arg(long, default_value_t = available_threads())]
    threads: usize,
    /// Plant this bug in the core.
    #[arg(long, value_parser = bug_named)]
    bug: Option<Bug>,
    /// Print everything that happens.
    #[arg(long)]
    verbose: bool,
    /// Print at most this many failures.
    #[arg(long, default_value_t = 20)]
    show: u64,
}

#[derive(Args)]
struct StepsArgs {
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
    #[arg(long, value_parser = bug_named)]
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

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm(&args),
        Command::Steps(args) => steps(&args),
    };
    ExitCode::from(u8::from(!well))
}

/// Flags without a subcommand are for `swarm`.
fn with_subcommand(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    let first = args.get(1).and_then(|first| first.to_str()).unwrap_or("--seeds=100");
    if first.starts_with("--") && first != "--help" {
        args.insert(1, "swarm".into());
    }
    args
}

fn swarm(args: &SwarmArgs) -> bool {
    let swarm = Swarm { bug: args.bug, verbose: args.verbose, threads: args.threads };
    let end = args.first.saturating_add(args.seeds);
    let mut shown = 0;
    let report = swarm.run(args.first..end, |seed, why| {
        shown += 1;
        if shown <= args.show {
            println!("seed {seed} FAILED: {why}");
            println!("  replay: scripts/simulate --seeds 1 --first {seed} --verbose");
        }
    });
    println!("{}", report.counts);
    println!("{} passed, {} failed", report.passed, report.failed);
    report.failed == 0
}

fn steps(args: &StepsArgs) -> bool {
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

fn bug_named(name: &str) -> Result<Bug, String> {
    BUGS.into_iter().find(|bug| format!("{bug:?}") == name).ok_or_else(|| {
        let names: Vec<String> = BUGS.iter().map(|bug| format!("{bug:?}")).collect();
        format!("there is no bug {name:?} to plant; choose one of {}", names.join(", "))
    })
}
