//! The simulator's command: `nbdmirror-sim swarm --seeds N`, and one subcommand for each other way to simulate.
//!
//! A new way is a variant of [`Command`] with its arguments, and a line in [`main`]; what it does lives in
//! `src/sim`. Flags without a subcommand are those of `swarm`. Exit codes: 0 all well, 1 something failed,
//! 2 wrong arguments.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::bugs::Hunt;
use nbdmirror::sim::run::Options;
use nbdmirror::sim::steps;
use nbdmirror::sim::steps::explore::{Address, Settings};
use nbdmirror::sim::steps::scenarios::{self, SCENARIOS, Scenario};
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
    /// How many seeds each planted bug needs to be caught, and by which check.
    Bugs(BugsArgs),
}

#[derive(Args)]
struct BugsArgs {
    /// Hunts of each bug, each from a first seed of its own; odd, so that there is a median.
    #[arg(long, default_value_t = 9)]
    hunts: u64,
    /// Seeds after which a hunt gives up.
    #[arg(long, default_value_t = 3000)]
    limit: u64,
    /// The first seed of the first hunt.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Threads (a hunt runs in one of them).
    #[arg(long, default_value_t = available_threads())]
    threads: usize,
    /// Only this bug.
    #[arg(long, value_parser = Bug::named)]
    bug: Option<Bug>,
    /// Print one line of JSON instead of a table.
    #[arg(long)]
    json: bool,
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
    #[arg(long, value_parser = Bug::named)]
    bug: Option<Bug>,
    /// Print everything that happens.
    #[arg(long)]
    verbose: bool,
    /// Leave out the core's own checks: only the promises' checks judge.
    #[arg(long)]
    no_invariants: bool,
    /// Close with one line of JSON instead of words: counts, `passed`, `failed`, `failing_seeds`.
    #[arg(long)]
    json: bool,
    /// Print at most this many failures.
    #[arg(long, default_value_t = 20)]
    show: usize,
}

#[derive(Args)]
struct StepsArgs {
    /// Only this scenario (without: all).
    #[arg(long, value_parser = scenario_named)]
    scenario: Option<&'static Scenario>,
    /// Joint outcomes at a crash point of a scenario: all where there are no more, else so many.
    #[arg(long, default_value_t = 32)]
    cap: u64,
    /// The same at a crash point of a recovery; 0: recoveries are not crashed.
    #[arg(long, default_value_t = 4)]
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

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm(&args),
        Command::Steps(args) => steps(&args),
        Command::Bugs(args) => bugs(&args),
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
    let options = Options { bug: args.bug, verbose: args.verbose, invariants: !args.no_invariants };
    let swarm = Swarm { options, threads: args.threads };
    let end = args.first.saturating_add(args.seeds);
    let mut failing = Vec::new();
    let report = swarm.run(args.first..end, |seed, why| {
        failing.push(seed);
        if failing.len() <= args.show && !args.json {
            println!("seed {seed} FAILED: {why}");
            println!("  replay: scripts/simulate --seeds 1 --first {seed} --verbose");
        }
    });
    if args.json {
        failing.sort_unstable();
        failing.truncate(args.show);
        let mut json = report.counts.to_json();
        json.insert("passed".to_owned(), report.passed.into());
        json.insert("failed".to_owned(), report.failed.into());
        json.insert("failing_seeds".to_owned(), failing.into());
        println!("{}", serde_json::Value::Object(json));
    } else {
        println!("{}", report.counts);
        println!("{} passed, {} failed", report.passed, report.failed);
    }
    report.failed == 0
}

fn steps(args: &StepsArgs) -> bool {
    let StepsArgs { cap, cap2, seed, bug, show, .. } = *args;
    let settings = Settings { cap, cap2, seed, bug, failures_max: show };
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
    for failure in report.scenarios.iter().flat_map(|row| row.failures.iter().take(show)) {
        println!("{} FAILED at {:?}: {}", failure.scenario, failure.at, failure.why);
        println!(
            "  replay: nbdmirror-sim steps --scenario {} --seed {seed} --at '{}'",
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

fn bugs(args: &BugsArgs) -> bool {
    let bugs = args.bug.map_or_else(|| BUGS.to_vec(), |bug| vec![bug]);
    let hunt = Hunt { hunts: args.hunts, limit: args.limit, first: args.first, threads: args.threads };
    let table = hunt.run(&bugs);
    if args.json {
        println!("{}", table.to_json());
    } else {
        print!("{table}");
    }
    table.missed().is_empty()
}
