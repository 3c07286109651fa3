//! Exploration: every run of a small world, found by replaying vectors of choices.
//!
//! ```text
//!  stack of prefixes ──pop──► replay ──► go on with choice 0 to the end ──► the tail of checks
//!        ▲                                   │ at each moment after the prefix: crash (crash.rs), and
//!        └──────── prefix + other choice ◄───┘ one new prefix for each choice that was not taken
//! ```
//!
//! What must hold: every vector of choices is run exactly once, and every moment (every proper prefix of one, and the
//! end) is crashed exactly once, whichever thread takes what.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::planted::Bug;
use crate::sim::run::with_bug;
use crate::sim::world::{Checked, Violation};

use super::crash::{CrashName, Crashes};
use super::schedule::{Choice, Run};
use super::worlds::SmallWorld;
use super::{Failure, Figures, Limits};

/// A vector of choices: at each moment the index of the choice that is taken.
pub(super) type Choices = Vec<u16>;

/// The exploration of one world, shared by its threads.
pub(super) struct Exploration {
    pub(super) row: &'static SmallWorld,
    pub(super) bug: Option<Bug>,
    pub(super) limits: Limits,
    stack: Mutex<Vec<Choices>>,
    /// Threads that are running something: the stack may grow yet.
    busy: AtomicUsize,
    failures: Mutex<Vec<Failure>>,
    orders: AtomicU64,
    pub(super) crashes: Crashes,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exploration {
    pub(super) fn new(row: &'static SmallWorld, bug: Option<Bug>, limits: Limits) -> Self {
        Self {
            row,
            bug,
            limits,
            stack: Mutex::new(vec![vec![]]),
            busy: AtomicUsize::new(0),
            failures: Mutex::new(vec![]),
            orders: AtomicU64::new(0),
            crashes: Crashes::default(),
        }
    }

    /// Takes part in the exploration until nothing is left, or something failed, or a limit is reached.
    pub(super) fn work(&self) {
        loop {
            let next = {
                let mut stack = locked(&self.stack);
                let next = if self.is_over() { None } else { stack.pop() };
                self.busy.fetch_add(usize::from(next.is_some()), Ordering::SeqCst);
                next
            };
            match next {
                Some(prefix) => {
                    self.explore(prefix);
                    self.busy.fetch_sub(1, Ordering::SeqCst);
                }
                None if self.busy.load(Ordering::SeqCst) == 0 || self.is_over() => return,
                None => std::thread::yield_now(),
            }
        }
    }

    fn is_over(&self) -> bool {
        self.orders.load(Ordering::Relaxed) >= self.limits.orders_max || !locked(&self.failures).is_empty()
    }

    /// What was done, and what failed.
    pub(super) fn results(&self) -> (Figures, Vec<Failure>) {
        let mut figures = self.crashes.figures();
        figures.orders = self.orders.load(Ordering::Relaxed);
        let failures = locked(&self.failures).clone();
        figures.cut_off = failures.is_empty() && !locked(&self.stack).is_empty();
        (figures, failures)
    }

    /// Runs one vector: the prefix, then always the first choice.
    fn explore(&self, prefix: Choices) {
        let mut choices = prefix.clone();
        let mut crash = None;
        let lived = with_bug(self.bug, || self.live(prefix.len(), &mut choices, &mut crash));
        self.orders.fetch_add(1, Ordering::Relaxed);
        if let Err(what) = lived {
            locked(&self.failures).push(Failure { world: self.row.name, choices, crash, what });
        }
    }

    /// `crash` is left at the crash that did not end well.
    fn live(&self, replayed: usize, choices: &mut Choices, crash: &mut Option<CrashName>) -> Checked {
        let mut run = Run::new(self.row, false)?;
        for depth in 0.. {
            if depth >= replayed {
                self.crashes.all_here(&run, self.limits, crash)?;
            }
            let enabled = run.choices()?;
            if enabled.is_empty() {
                break;
            }
            if depth >= replayed {
                let mut stack = locked(&self.stack);
                for other in (1..enabled.len()).rev() {
                    let mut prefix = choices.clone();
                    prefix.push(other as u16);
                    stack.push(prefix);
                }
                choices.push(0);
            }
            run.take(enabled[usize::from(choices[depth])])?;
        }
        end_well(run, &self.crashes)
    }
}

/// The end of a run without a crash: the tail of checks.
fn end_well(mut run: Run, crashes: &Crashes) -> Checked {
    run.world.leave_manual()?;
    crashes.tail(&mut run.world)
}

/// Runs one vector of choices, printing what happens if `verbose`; gives the run at its last choice.
///
/// # Errors
/// The promise that was broken, or a choice that there is not.
pub(super) fn replay(row: &'static SmallWorld, choices: &[u16], verbose: bool) -> Result<Run, Violation> {
    let mut run = Run::new(row, verbose)?;
    for (depth, index) in choices.iter().enumerate() {
        let enabled: Vec<Choice> = run.choices()?;
        let Some(choice) = enabled.get(usize::from(*index)).copied() else {
            let what = format!("replay: choice {index} at {depth}: there are {} only", enabled.len());
            return Err(Violation(what));
        };
        run.world.trace(|| format!("--- {depth}: choice {index} of {enabled:?}: {choice:?}"));
        run.take(choice)?;
    }
    Ok(run)
}

/// Replays and goes through the tail of checks.
pub(super) fn replay_to_the_end(row: &'static SmallWorld, choices: &[u16], verbose: bool) -> Checked {
    let run = replay(row, choices, verbose)?;
    if run.choices()?.is_empty() { end_well(run, &Crashes::default()) } else { Ok(()) }
}
