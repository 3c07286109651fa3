//! The simulator's command: `nbdmirror-sim swarm --seeds N`, and one subcommand for each other way to simulate.
//!
//! A new way is a variant of [`Command`] with its arguments, and a line in [`main`]; what it does lives in
//! `src/sim`. Flags without a subcommand are those of `swarm`. Exit codes: 0 all well, 1 something failed,
//! 2 wrong arguments.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use nbdmirror::planted::{BUGS, Bug};
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

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm(&args),
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

fn bug_named(name: &str) -> Result<Bug, String> {
    BUGS.into_iter().find(|bug| format!("{bug:?}") == name).ok_or_else(|| {
        let names: Vec<String> = BUGS.iter().map(|bug| format!("{bug:?}")).collect();
        format!("there is no bug {name:?} to plant; choose one of {}", names.join(", "))
    })
}
