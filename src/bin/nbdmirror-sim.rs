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

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm(&args),
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
