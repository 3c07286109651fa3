//! The simulator's command: `nbdmirror-sim swarm --seeds N`, and one subcommand for each other way to simulate.
//!
//! A new way is a variant of [`Command`] with its arguments, and a line in [`main`]; what it does lives in
//! `src/sim`. Flags without a subcommand are those of `swarm`. Exit codes: 0 all well, 1 something failed,
//! 2 wrong arguments.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::small::{self, CrashName, Figures, Limits, SmallWorld, WORLDS};
use nbdmirror::sim::steps;
use nbdmirror::sim::steps::explore::{Address, Settings};
use nbdmirror::sim::steps::fork::Outcome;
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
    /// Small worlds in every order, crashed at every moment with every outcome.
    Small(SmallArgs),
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

#[derive(Args)]
struct SmallArgs {
    /// This world only.
    #[arg(long, value_parser = world_named)]
    world: Option<&'static SmallWorld>,
    /// Only the worlds of the quick run.
    #[arg(long)]
    quick: bool,
    /// Replay these choices.
    #[arg(long, requires = "world", value_delimiter = ',')]
    choices: Option<Vec<u16>>,
    /// After the choices: this crash, and its recovery.
    #[arg(long, requires = "choices")]
    crash: Option<Outcome>,
    /// With --crash: once the first reads are answered the power goes and this disk is lost.
    #[arg(long, requires = "crash")]
    lose: Option<usize>,
    /// Threads.
    #[arg(long, default_value_t = available_threads())]
    threads: usize,
    /// Plant this bug in the core.
    #[arg(long, value_parser = bug_named)]
    bug: Option<Bug>,
    /// At most this many orders of a world.
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    orders_max: u64,
    /// At most this many joint outcomes of a crash.
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    outcomes_max: u64,
    /// Print figures as JSON, one line a world.
    #[arg(long)]
    json: bool,
    /// Print everything that happens in a replay.
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm(&args),
        Command::Steps(args) => steps(&args),
        Command::Small(args) => small(&args),
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

fn small(args: &SmallArgs) -> bool {
    if let (Some(world), Some(choices)) = (args.world, &args.choices) {
        let crash = args.crash.map(|outcome| CrashName { outcome, lose: args.lose });
        return match small::replay(world, choices, crash, args.bug, args.verbose) {
            Ok(()) => true,
            Err(what) => {
                println!("FAILED: {what}");
                false
            }
        };
    }
    let chosen = |world: &&SmallWorld| match args.world {
        Some(only) => only.name == world.name,
        None => world.quick || !args.quick,
    };
    let (mut total, mut failed) = (Figures::default(), 0);
    for world in WORLDS.iter().filter(chosen) {
        let begun = std::time::Instant::now();
        let (figures, failures) = small::explore(
            world,
            args.bug,
            Limits { orders_max: args.orders_max, outcomes_max: args.outcomes_max },
            args.threads,
        );
        let seconds = begun.elapsed().as_secs_f64();
        if args.json {
            println!("{}", figures.json(world.name));
        } else {
            println!("{:<16} {figures} ({seconds:.1} s)", world.name);
        }
        failures.iter().for_each(|failure| println!("{failure}"));
        failed += failures.len();
        total.add(&figures);
    }
    if args.json {
        println!("{}", total.json("total"));
    } else {
        println!("total: {total}; {failed} failed");
    }
    failed == 0
}

fn world_named(name: &str) -> Result<&'static SmallWorld, String> {
    SmallWorld::named(name).ok_or_else(|| {
        let names: Vec<&str> = WORLDS.iter().map(|world| world.name).collect();
        format!("there is no world {name:?}; choose one of {}", names.join(", "))
    })
}

fn bug_named(name: &str) -> Result<Bug, String> {
    BUGS.into_iter().find(|bug| format!("{bug:?}") == name).ok_or_else(|| {
        let names: Vec<String> = BUGS.iter().map(|bug| format!("{bug:?}")).collect();
        format!("there is no bug {name:?} to plant; choose one of {}", names.join(", "))
    })
}
