//! Small worlds, exhaustively: two replicas, two blocks, two clients, two writes, and variants of that, in every order
//! of completion, crashed at every moment, with every joint outcome of what was not flushed.
//!
//! - `worlds`: the table of worlds, one row each.
//! - `schedule`: one run: what may happen next, and making it happen.
//! - `explore`: every run, by replaying vectors of choices.
//! - `crash`: the crashes at one moment, recovery, and the checks after it.
//!
//! What is explored. At each moment any client that waits for no answer may send its next request, any device
//! operation in flight may end, whatever was submitted before it, the core's tick may come if it is due (a bounded
//! number of times), and in worlds with a fault one operation may fail, with or without an effect. No run is left out:
//! the figures say so, or say that a limit cut something off.
//!
//! What is not two choices, and why nothing is lost by that:
//!
//! - *An operation takes effect at the moment it is answered*, not at some moment before. Of an operation in flight
//!   nobody can tell which: no other operation in flight on that disk overlaps it where one of them writes
//!   (`schedule` checks that for each operation, metadata included), so a read returns the same and writes commute; a
//!   flush covers what was answered before it was submitted, whenever it takes effect; the core hears of it only
//!   when it is answered. What the crash of an earlier effect would leave is among the outcomes of a crash while it
//!   is in flight: a write lost, kept or torn; a flush that had its effect leaves a subset of those with the writes
//!   before it kept.
//! - *Equal crashed worlds are recovered once*, and what equal stops leave begins again once. What happens after a
//!   crash depends on what is left only: the disks' contents, cached and durable, and what reads may return (`crash`
//!   says what is compared). The daemon's memory is gone. Chance is seeded anew, so that the checks after a crash
//!   are a function of what is left.
//!
//! What holds within one world holds for its size only; what a world has not (three replicas, large volumes, two
//! faults) is for the swarm.

mod crash;
mod explore;
mod schedule;
pub mod worlds;

use std::fmt::{Display, Formatter};

use crate::planted::Bug;

use super::run::with_bug;
pub use crash::CrashName;
use explore::Exploration;
pub use worlds::{SmallWorld, WORLDS};

/// Where exploration stops though it is not over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// At most this many runs of one world.
    pub orders_max: u64,
    /// At most this many joint outcomes of one crash; where there are more they are drawn.
    pub outcomes_max: u64,
}

/// What was done in one world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Runs: different vectors of choices from the beginning to the end.
    pub orders: u64,
    /// Moments at which the world was crashed.
    pub crash_points: u64,
    /// Of those: with something else on the disks or in the clients' hands than at any other.
    pub distinct_points: u64,
    /// Joint outcomes of the crashes at those.
    pub outcomes: u64,
    /// Of those: different worlds to recover, each of which was recovered and checked.
    pub recoveries: u64,
    /// A limit was reached: not everything was explored.
    pub cut_off: bool,
}

/// A run that broke a promise, with what replays it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// In which world.
    pub world: &'static str,
    /// Indexes of the choices taken.
    pub choices: Vec<u16>,
    /// The crash after the last of them, where the failure is in a recovery.
    pub crash: Option<CrashName>,
    /// The promise, and what happened.
    pub what: String,
}

/// Explores `row` with `threads` threads, with `bug` planted in the core. Stops soon after the first failure.
#[must_use]
pub fn explore(
    row: &'static SmallWorld,
    bug: Option<Bug>,
    limits: Limits,
    threads: usize,
) -> (Figures, Vec<Failure>) {
    let exploration = Exploration::new(row, bug, limits);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| exploration.work());
        }
    });
    exploration.results()
}

/// Replays one failure; `verbose` prints everything that happens.
///
/// # Errors
/// The promise that was broken, as before; or `replay: ...` where there is no such choice.
pub fn replay(
    row: &'static SmallWorld,
    choices: &[u16],
    crash: Option<CrashName>,
    bug: Option<Bug>,
    verbose: bool,
) -> Result<(), String> {
    with_bug(bug, || match crash {
        None => explore::replay_to_the_end(row, choices, verbose),
        Some(crash) => crash::replay(&explore::replay(row, choices, verbose)?, crash),
    })
}

impl Figures {
    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        self.orders += other.orders;
        self.crash_points += other.crash_points;
        self.distinct_points += other.distinct_points;
        self.outcomes += other.outcomes;
        self.recoveries += other.recoveries;
        self.cut_off |= other.cut_off;
    }

    /// One JSON object, for reports.
    #[must_use]
    pub fn json(&self, world: &str) -> String {
        let Self { orders, crash_points, distinct_points, outcomes, recoveries, cut_off } = self;
        format!(
            "{{\"world\":\"{world}\",\"orders\":{orders},\"crash_points\":{crash_points},\"distinct_points\":\
             {distinct_points},\"joint_outcomes\":{outcomes},\"recoveries\":{recoveries},\"cut_off\":{cut_off}}}"
        )
    }
}

impl Display for Figures {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} orders, {} crash points ({} distinct), {} joint outcomes, {} recoveries{}",
            self.orders,
            self.crash_points,
            self.distinct_points,
            self.outcomes,
            self.recoveries,
            if self.cut_off { "; CUT OFF by a limit" } else { ", nothing cut off" }
        )
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let choices: Vec<String> = self.choices.iter().map(u16::to_string).collect();
        writeln!(f, "world {} FAILED: {}", self.world, self.what)?;
        write!(f, "  replay: nbdmirror-sim small --world {} --choices {}", self.world, choices.join(","))?;
        match self.crash {
            Some(crash) => write!(f, " {crash} --verbose"),
            None => write!(f, " --verbose"),
        }
    }
}
