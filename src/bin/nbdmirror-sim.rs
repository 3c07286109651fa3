//! Runs simulated worlds by seed: `nbdmirror-sim --seeds N [--first S] [--threads T] [--bug NAME] [--verbose]`.
//!
//! Prints each failing seed with the command that replays it, and closes with `N passed, N failed`.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use nbdmirror::planted::{BUGS, Bug};
use nbdmirror::sim::run::run_seed;
use nbdmirror::sim::world::Counts;

#[derive(Parser)]
#[command(about = "Runs the mirror's core in simulated worlds and checks its promises")]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Threads (a world runs in one of them).
    #[arg(long, default_value_t = 2)]
    threads: u64,
    /// Plant this bug in the core.
    #[arg(long)]
    bug: Option<String>,
    /// Print everything that happens.
    #[arg(long)]
    verbose: bool,
    /// Print at most this many failures.
    #[arg(long, default_value_t = 20)]
    show: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let bug = match args.bug.as_deref().map(bug_named).transpose() {
        Ok(bug) => bug,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let next = AtomicU64::new(args.first);
    let failed = AtomicU64::new(0);
    let totals = Mutex::new(Counts::default());
    let end = args.first.saturating_add(args.seeds);
    std::thread::scope(|scope| {
        for _ in 0..args.threads.clamp(1, args.seeds.max(1)) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    match run_seed(seed, bug, args.verbose) {
                        Ok(counts) => {
                            if let Ok(mut totals) = totals.lock() {
                                totals.add(&counts);
                            }
                        }
                        Err(why) => {
                            if failed.fetch_add(1, Ordering::Relaxed) < args.show {
                                println!("seed {seed} FAILED: {why}");
                                println!("  replay: scripts/simulate --seeds 1 --first {seed} --verbose");
                            }
                        }
                    }
                }
            });
        }
    });
    if let Ok(totals) = totals.lock() {
        println!("{totals}");
    }
    let failed = failed.into_inner();
    println!("{} passed, {failed} failed", args.seeds - failed);
    ExitCode::from(u8::from(failed > 0))
}

fn bug_named(name: &str) -> Result<Bug, String> {
    BUGS.into_iter().find(|bug| format!("{bug:?}") == name).ok_or_else(|| {
        let names: Vec<String> = BUGS.iter().map(|bug| format!("{bug:?}")).collect();
        format!("there is no bug {name:?} to plant; choose one of {}", names.join(", "))
    })
}
