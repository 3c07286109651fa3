//! `nbdmirror-sim bugs`: the table of planted bugs.

use clap::Args;
use nbdmirror::planted::Bug;
use nbdmirror::sim::bugs::Hunt;
use nbdmirror::sim::swarm::available_threads;

#[derive(Args)]
pub(crate) struct BugsArgs {
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

/// Runs it. False: something failed.
pub(crate) fn run(args: &BugsArgs) -> bool {
    let bugs = args.bug.map_or_else(Bug::found_by_chance, |bug| vec![bug]);
    let hunt = Hunt { hunts: args.hunts, limit: args.limit, first: args.first, threads: args.threads };
    let table = hunt.run(&bugs);
    if args.json {
        println!("{}", table.to_json());
    } else {
        print!("{table}");
    }
    table.missed().is_empty()
}
