//! `nbdmirror-sim swarm`: worlds drawn from seeds.

use clap::Args;
use nbdmirror::planted::Bug;
use nbdmirror::sim::run::Options;
use nbdmirror::sim::swarm::{Swarm, available_threads};

#[derive(Args)]
pub(crate) struct SwarmArgs {
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

/// Runs it. False: something failed.
pub(crate) fn run(args: &SwarmArgs) -> bool {
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
