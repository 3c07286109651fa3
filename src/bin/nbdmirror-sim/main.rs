//! The simulator's command: `nbdmirror-sim swarm --seeds N`, and one subcommand for each other way to simulate.
//!
//! A new way is a file here with its arguments, a variant of [`Command`] and a line in [`main`]; what it does lives
//! in `src/sim`. Flags without a subcommand are those of `swarm`. Exit codes: 0 all well, 1 something failed,
//! 2 wrong arguments.

mod bugs;
mod small;
mod steps;
mod swarm;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Runs the mirror's core in simulated worlds and checks its promises")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Worlds drawn from seeds, with faults of every kind.
    Swarm(swarm::SwarmArgs),
    /// Named scenarios, crashed after every event, and their recoveries crashed again.
    Steps(steps::StepsArgs),
    /// Small worlds in every order, crashed at every moment with every outcome.
    Small(small::SmallArgs),
    /// How many seeds each planted bug needs to be caught, and by which check.
    Bugs(bugs::BugsArgs),
}

fn main() -> ExitCode {
    let well = match Arguments::parse_from(with_subcommand(std::env::args_os())).command {
        Command::Swarm(args) => swarm::run(&args),
        Command::Steps(args) => steps::run(&args),
        Command::Small(args) => small::run(&args),
        Command::Bugs(args) => bugs::run(&args),
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
