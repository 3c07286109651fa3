//! `nbdmirror-sim small`: small worlds, exhaustively.

use clap::Args;
use nbdmirror::planted::Bug;
use nbdmirror::sim::small::{self, CrashName, Figures, Limits, SmallWorld, WORLDS};
use nbdmirror::sim::steps::fork::Outcome;
use nbdmirror::sim::swarm::available_threads;

#[derive(Args)]
pub(crate) struct SmallArgs {
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
    #[arg(long, value_parser = Bug::named)]
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

/// Runs it. False: something failed.
pub(crate) fn run(args: &SmallArgs) -> bool {
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
