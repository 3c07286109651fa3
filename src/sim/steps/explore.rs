//! Crashes a scenario after each of its events, recovers every world that may be left, and crashes those recoveries
//! after each of their events.
//!
//! ```text
//!  scenario ── event ── event ── event ──►                      depth 0
//!                 │ each joint outcome not met before
//!                 └─► start, reads, heal ── event ── event ──►  depth 1 ──► stop, images, start again
//!                                             │ each joint outcome not met before
//!                                             └─► start, reads, heal ──►  depth 2 ──► stop, images, start again
//! ```
//!
//! What must hold: which worlds are met depends on the scenario, the seed and the caps only, not on the threads: a
//! world's recovery follows from what stands on its disks and in its oracle. (Which of several places that leave the
//! same world is reported, and how often it is recovered, may depend on them.)

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use super::fork::{Crash, Outcome};
use super::report::{Failure, Tally};
use super::row::{Scenario, Step};
use super::script::{self, create, new_world, play, recover};
use crate::planted::{Bug, plant};
use crate::sim::rng::mix64;
use crate::sim::run::{finish, guarded};
use crate::sim::world::{Checked, Violation, World};

/// How thoroughly to look.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Joint outcomes at a crash point of the scenario: all where there are at most this many, else this many.
    pub cap: u64,
    /// Of those the recoveries of this many (chosen in the same way) are crashed, too; 0: none.
    pub deep: u64,
    /// The same as `cap` for a crash point of a recovery.
    pub cap2: u64,
    /// Shifts latencies and samples.
    pub seed: u64,
    /// Planted in the core.
    pub bug: Option<Bug>,
    /// Stop looking at a scenario after this many failures.
    pub failures_max: usize,
}

/// Where a crash is tried: a step and what became of the open writes, at each depth; written `12/p5/30/knone`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub Vec<(u64, Outcome)>);

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(step, outcome)| format!("{step}/{outcome}")).collect();
        f.write_str(&parts.join("/"))
    }
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
        let pair = |pair: &[&str]| match pair {
            [step, outcome] => {
                let step = step.parse().map_err(|_| format!("{step:?} is no step"))?;
                Ok((step, outcome.parse()?))
            }
            _ => Err(format!(
                "{text:?} is no place: a step and an outcome for each depth, like 12/p5/30/knone"
            )),
        };
        parts.chunks(2).map(pair).collect::<Result<_, _>>().map(Self)
    }
}

/// What the threads that look at one scenario share.
#[derive(Default)]
pub struct Shared {
    met: [Mutex<BTreeSet<u64>>; 2],
    /// Worlds whose recovery was crashed at every step.
    deep: Mutex<BTreeSet<u64>>,
    /// What was found.
    pub failures: Mutex<Vec<Failure>>,
}

impl Shared {
    /// Whether nobody has met this world at this depth.
    fn is_new(&self, depth: usize, identity: u64) -> bool {
        self.met[depth].lock().unwrap_or_else(PoisonError::into_inner).insert(identity)
    }

    fn is_new_deep(&self, identity: u64) -> bool {
        self.deep.lock().unwrap_or_else(PoisonError::into_inner).insert(identity)
    }

    fn fail(&self, failure: Failure) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
    }

    fn failures(&self) -> usize {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// What is looked at.
enum Goal {
    /// Every `of`-th crash point that differs from the one before, beginning with the `slice`-th.
    Slice { slice: u64, of: u64 },
    /// One crash at each depth, with a trace of the last recovery.
    Only(Address),
}

struct Explorer {
    scenario: &'static Scenario,
    settings: Settings,
    goal: Goal,
    shared: Arc<Shared>,
    tally: RefCell<Tally>,
    /// The scenario's `create` has ended well.
    created: Cell<bool>,
}

/// A run that is crashed after each of its steps.
struct Watched {
    /// Where the run itself came from.
    from: Address,
    /// The world's identity at its beginning.
    salt: u64,
    steps: u64,
    distinct: u64,
    epoch: Option<crate::sim::world::CrashEpoch>,
    /// `create` has not ended well, and no daemon has opened what it left: there need be no volume.
    creating: bool,
}

/// Looks at one slice of a scenario's crash points. Failures go to `shared`.
#[must_use]
pub fn explore_slice(
    scenario: &'static Scenario,
    settings: Settings,
    shared: &Arc<Shared>,
    slice: u64,
    of: u64,
) -> Tally {
    explore(scenario, settings, shared, Goal::Slice { slice, of })
}

/// Crashes at one place only and prints what happens after the last crash. Failures go to `shared`.
#[must_use]
pub fn replay(scenario: &'static Scenario, settings: Settings, shared: &Arc<Shared>, at: Address) -> Tally {
    explore(scenario, settings, shared, Goal::Only(at))
}

fn explore(scenario: &'static Scenario, settings: Settings, shared: &Arc<Shared>, goal: Goal) -> Tally {
    plant(settings.bug);
    let explorer = Rc::new(Explorer {
        scenario,
        settings,
        goal,
        shared: Arc::clone(shared),
        tally: RefCell::default(),
        created: Cell::new(false),
    });
    let played = guarded(|| explorer.play());
    if let Err(why) = played {
        // Every slice plays the scenario itself: one of them reports it.
        if !matches!(explorer.goal, Goal::Slice { slice: 1.., .. }) {
            explorer.failed(&Address::default(), why);
        }
    }
    plant(None);
    explorer.tally.take()
}

impl Explorer {
    fn play(self: &Rc<Self>) -> Checked {
        let verbose = matches!(&self.goal, Goal::Only(address) if address.0.is_empty());
        let seed = self.settings.seed;
        let mut world = new_world(self.scenario, seed, verbose);
        let watch_create = self.scenario.watches_create();
        if watch_create {
            self.watch(&mut world, Address::default(), 0, true);
        }
        create(&mut world)?;
        self.created.set(true);
        let disks = script::all(&world);
        world.start(&disks)?;
        play(&mut world, &[Step::Sync], |_| {})?;
        play(&mut world, self.scenario.script, |world| self.watch(world, Address::default(), 0, false))?;
        world.watch = None;
        finish(&mut world)
    }

    /// From now on the world is crashed after each of its steps.
    fn watch(self: &Rc<Self>, world: &mut World, from: Address, salt: u64, creating: bool) {
        let explorer = Rc::clone(self);
        let mut watched = Watched { from, salt, steps: 0, distinct: 0, epoch: None, creating };
        world.watch = Some(Rc::new(RefCell::new(move |world: &World| {
            explorer.look(&mut watched, world);
            Ok(())
        })));
    }

    /// After a step.
    fn look(self: &Rc<Self>, watched: &mut Watched, world: &World) {
        watched.steps += 1;
        let opened = world.daemon.as_ref().is_some_and(|daemon| daemon.mirror.is_open());
        watched.creating &= !self.created.get() && !opened;
        let depth = watched.from.0.len();
        if let Goal::Only(address) = &self.goal {
            if let Some((step, outcome)) = address.0.get(depth)
                && *step == watched.steps
            {
                self.one(watched, world, *outcome, address.0.len() == depth + 1);
            }
            return;
        }
        let epoch = world.crash_epoch();
        let same = watched.epoch.as_ref() == Some(&epoch);
        watched.epoch = Some(epoch);
        watched.distinct += u64::from(!same);
        if let Goal::Slice { slice, of } = self.goal
            && depth == 0
            && watched.distinct % of != slice
        {
            return;
        }
        self.tally.borrow_mut().depths[depth].points += 1;
        if same || self.shared.failures() >= self.settings.failures_max {
            return; // nothing can be left that the step before could not leave
        }
        self.crash_here(watched, world);
    }

    fn crash_here(self: &Rc<Self>, watched: &Watched, world: &World) {
        let depth = watched.from.0.len();
        let cap = if depth == 0 { self.settings.cap } else { self.settings.cap2 };
        for crash in Crash::judged(world) {
            let point = world.crash_point(crash);
            let (outcomes, all) = point.choose(cap);
            {
                let tally = &mut self.tally.borrow_mut().depths[depth];
                let outcomes = outcomes.len() as u64;
                tally.outcomes += outcomes;
                tally.enumerated += if all { outcomes } else { 0 };
                tally.sampled_points += u64::from(!all);
            }
            let deep = if depth == 0 { point.choose(self.settings.deep).0 } else { vec![] };
            let deep = if self.settings.deep == 0 { vec![] } else { deep };
            let others = outcomes.iter().filter(|outcome| !deep.contains(outcome));
            for outcome in deep.iter().chain(others) {
                let left = point.world(outcome.pick, self.salt(watched));
                let identity = left.identity();
                let is_new = self.shared.is_new(depth, identity);
                self.tally.borrow_mut().depths[depth].worlds += u64::from(is_new);
                let crash_again = deep.contains(outcome);
                if crash_again && self.shared.is_new_deep(identity) || is_new && !crash_again {
                    self.recovery(watched, left, *outcome, identity, crash_again);
                }
                if self.shared.failures() >= self.settings.failures_max {
                    return;
                }
            }
        }
    }

    fn salt(&self, watched: &Watched) -> u64 {
        mix64(watched.salt ^ self.settings.seed.rotate_left(32) ^ watched.steps)
    }

    /// The crash that is asked for.
    fn one(self: &Rc<Self>, watched: &Watched, world: &World, outcome: Outcome, last: bool) {
        let mut left = world.crash_point(outcome.crash).world(outcome.pick, self.salt(watched));
        left.verbose = last;
        left.trace(|| format!("crashed after step {}: {outcome}", watched.steps));
        let identity = left.identity();
        self.recovery(watched, left, outcome, identity, !last);
    }

    /// A world that a crash left: it is started, heals, stops clean, is identical on all disks, starts again.
    fn recovery(
        self: &Rc<Self>,
        watched: &Watched,
        mut left: World,
        outcome: Outcome,
        identity: u64,
        crash_again: bool,
    ) {
        let mut address = watched.from.clone();
        address.0.push((watched.steps, outcome));
        let depth = address.0.len();
        let creating = watched.creating;
        left.begin_depth(self.settings.seed, depth as u64);
        if crash_again {
            self.watch(&mut left, address.clone(), identity, creating);
        }
        let recovered = guarded(|| {
            recover(&mut left, self.scenario, creating)?;
            left.watch = None;
            finish(&mut left)?;
            if left.beyond_repair { Err(Violation("the world is beyond repair".to_owned())) } else { Ok(()) }
        });
        {
            let mut tally = self.tally.borrow_mut();
            tally.recoveries += 1;
            tally.events += left.counts.events;
            tally.starts += left.counts.starts;
        }
        if let Err(why) = recovered {
            self.failed(&address, why);
        }
    }

    fn failed(&self, address: &Address, why: String) {
        self.shared.fail(Failure { scenario: self.scenario.name, at: address.to_string(), why });
    }
}
