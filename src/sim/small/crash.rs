//! The crashes at one moment of a run, the recovery from each, and the checks after it.
//!
//! ```text
//!  moment ──► kill, power cut ──► joint outcomes (steps/fork.rs) ──► start ─► read at once ─┬─► the tail of checks
//!                                                                                           └─► power cut, one disk is
//!                                                     the tail of checks ◄── read again ◄────── gone; start without it
//! ```
//!
//! What must hold: a moment is left out only where one with the same identity has been crashed before, and a world is
//! not recovered only where one with the same identity has been. The identity covers all that recovery can depend on:
//! the disks' durable and cached contents and what is in between, their flags, what the oracle allows, and which disks
//! were in sync. (64 bits: with a million worlds the chance that two are mixed up is below one in ten million.)
//!
//! The number of recoveries differs by a few between runs of more than one thread: when a superblock was written does
//! not count for the identity, but half of one, torn, is no superblock, and its bytes count as they are.

use std::collections::HashSet;
use std::fmt::{self, Display};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sim::client::Asked;
use crate::sim::rng::Rng;
use crate::sim::run::{begin_again, stop_well};
use crate::sim::steps::fork::{Crash, CrashPoint, Outcome, Pick};
use crate::sim::world::{Checked, World, violated};
use crate::units::{BLOCK_BYTES, ByteRange, SECOND_NS};

use super::explore::locked;
use super::schedule::Run;
use super::worlds::{BLOCK_A, BLOCK_C};
use super::{Figures, Limits};

/// A crash and what comes after it, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashName {
    /// How the daemon ended, and what became of the writes that were open.
    pub outcome: Outcome,
    /// This disk is lost, and the power goes again, once the first reads are answered.
    pub lose: Option<usize>,
}

impl Display for CrashName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--crash {}", self.outcome)?;
        match self.lose {
            Some(disk) => write!(f, " --lose {disk}"),
            None => Ok(()),
        }
    }
}

/// The crashes of one small world, and what was seen in them.
#[derive(Default)]
pub(super) struct Crashes {
    points: AtomicU64,
    distinct_points: AtomicU64,
    outcomes: AtomicU64,
    recoveries: AtomicU64,
    /// Outcomes that a limit left out.
    left_out: AtomicU64,
    seen_points: Mutex<HashSet<u64>>,
    seen_worlds: Mutex<HashSet<u64>>,
    /// What orderly stops left.
    seen_stops: Mutex<HashSet<u64>>,
}

impl Crashes {
    pub(super) fn figures(&self) -> Figures {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Figures {
            crash_points: get(&self.points),
            distinct_points: get(&self.distinct_points),
            outcomes: get(&self.outcomes),
            recoveries: get(&self.recoveries),
            cut_off: get(&self.left_out) > 0,
            ..Figures::default()
        }
    }

    /// Crashes the world of `run` at this moment in every way. `name` is left at the one that did not end well.
    pub(super) fn all_here(&self, run: &Run, limits: Limits, name: &mut Option<CrashName>) -> Checked {
        for crash in Crash::judged(&run.world) {
            self.points.fetch_add(1, Ordering::Relaxed);
            let point = run.world.crash_point(crash);
            if locked(&self.seen_points).insert(point.identity()) {
                self.distinct_points.fetch_add(1, Ordering::Relaxed);
                self.outcomes_of(&point, limits, name)?;
            }
        }
        Ok(())
    }

    fn outcomes_of(&self, point: &CrashPoint, limits: Limits, name: &mut Option<CrashName>) -> Checked {
        let (outcomes, all) = point.choose(limits.outcomes_max);
        self.left_out.fetch_add(u64::from(!all), Ordering::Relaxed);
        for outcome in outcomes {
            self.outcomes.fetch_add(1, Ordering::Relaxed);
            let world = point.world(outcome.pick, 0);
            if !locked(&self.seen_worlds).insert(world.identity()) {
                continue;
            }
            for lose in [None, Some(0), Some(1)] {
                self.recoveries.fetch_add(1, Ordering::Relaxed);
                *name = Some(CrashName { outcome, lose });
                self.recover(world.without_daemon(), lose)?;
            }
        }
        *name = None;
        Ok(())
    }

    /// Starts what a crash left, reads at once, perhaps loses a disk, and goes through the tail of checks.
    fn recover(&self, mut world: World, lose: Option<usize>) -> Checked {
        (world.rng, world.next_id, world.looks) = (Rng::new(1), 1000, 0);
        world.start(&[0, 1])?;
        read_all(&mut world)?;
        if let Some(lost) = lose
            && world.in_sync_disks() == [0, 1]
        {
            world = world.crash_point(Crash::PowerCut).world(Pick::AllLost, 0);
            world.trace(|| format!("POWER CUT, all that is open is lost; disk {lost} is gone"));
            world.disks[lost].gone = true;
            world.start(&[0, 1])?;
            read_all(&mut world)?;
        }
        self.tail(&mut world)
    }

    /// The checks at the end: all heals, settles and stops; and what the stop leaves begins again. The latter depends on
    /// nothing but what it leaves, so it is done once for each.
    pub(super) fn tail(&self, world: &mut World) -> Checked {
        if !stop_well(world)? {
            return Ok(());
        }
        let left = world.crash_point(Crash::Kill).world(Pick::AllLost, 0);
        if !locked(&self.seen_stops).insert(left.identity()) {
            return Ok(());
        }
        (world.rng, world.looks) = (Rng::new(2), 0);
        begin_again(world)
    }
}

/// Recovers from one crash at the end of `run`.
pub(super) fn replay(run: &Run, name: CrashName) -> Checked {
    let point = run.world.crash_point(name.outcome.crash);
    run.world.trace(|| format!("CRASH {}", name.outcome));
    Crashes::default().recover(point.world(name.outcome.pick, 0), name.lose)
}

/// Two clients read all blocks that anybody writes; both are answered.
fn read_all(world: &mut World) -> Checked {
    let ranges = [BLOCK_A, BLOCK_C].map(|offset| ByteRange::new(offset, 2 * BLOCK_BYTES));
    let volume = world.plan.volume_bytes;
    for client in 0..2.min(world.clients.len()) {
        for range in ranges.into_iter().filter(|range| range.offset < volume) {
            let range = ByteRange::new(range.offset, range.len.min(volume - range.offset));
            world.send(client, Asked::Read, range, false)?;
        }
    }
    let answered = |world: &World| world.daemon.as_ref().is_none_or(|daemon| daemon.requests.is_empty());
    if !world.run_until(60 * SECOND_NS, answered)? {
        return violated("liveness", "reads after a crash are not answered");
    }
    Ok(())
}
