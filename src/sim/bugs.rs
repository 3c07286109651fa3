//! Would the simulation notice? Each planted bug is hunted with fresh seeds until a check fails.
//!
//! What must hold: the core's own `check_invariants` does not take part, so that what catches a bug is a promise's
//! check, the oracle, or an assertion in the code itself.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Mutex;

use crate::planted::Bug;

use super::run::{Options, run_seed};

/// First seeds of two hunts are so far from each other.
const SEEDS_BETWEEN_HUNTS: u64 = 1_000_000;

/// How bugs are hunted.
#[derive(Clone, Copy, Debug)]
pub struct Hunt {
    /// Hunts of each bug, each from a first seed of its own.
    pub hunts: u64,
    /// Seeds after which a hunt gives up.
    pub limit: u64,
    /// The first seed of the first hunt.
    pub first: u64,
    /// Threads, at least 1; each hunt runs in one of them.
    pub threads: usize,
}

/// What the hunts of one bug gave.
#[derive(Clone, Debug)]
pub struct Catch {
    /// The bug.
    pub bug: Bug,
    /// Seeds that each hunt took, in order of their size; above the limit: not caught.
    pub seeds: Vec<u64>,
    /// Which checks caught it, and how often.
    pub checks: BTreeMap<String, u64>,
}

/// What the hunts of all bugs gave.
#[derive(Clone, Debug)]
pub struct Table {
    catches: Vec<Catch>,
    limit: u64,
}

/// Hunts `bug` from `first`: the number of seeds that it took and the check that caught it.
#[must_use]
pub fn hunt(bug: Bug, first: u64, limit: u64) -> Option<(u64, String)> {
    let options = Options { bug: Some(bug), invariants: false, ..Options::default() };
    (first..first.saturating_add(limit)).find_map(|seed| {
        let why = run_seed(seed, options).err()?;
        Some((seed - first + 1, why.split(':').next().unwrap_or_default().to_owned()))
    })
}

impl Hunt {
    /// Hunts all of `bugs`.
    #[must_use]
    pub fn run(&self, bugs: &[Bug]) -> Table {
        let jobs: Vec<(Bug, u64)> =
            bugs.iter().flat_map(|bug| (0..self.hunts).map(|hunt| (*bug, hunt))).collect();
        let next = Mutex::new(jobs.into_iter());
        let catches = bugs.iter().map(|bug| Catch { bug: *bug, seeds: vec![], checks: BTreeMap::new() });
        let catches = Mutex::new(catches.collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    while let Some((bug, number)) = next.lock().ok().and_then(|mut jobs| jobs.next()) {
                        let caught = hunt(bug, self.first + number * SEEDS_BETWEEN_HUNTS, self.limit);
                        let Ok(mut catches) = catches.lock() else { return };
                        let Some(entry) = catches.iter_mut().find(|entry| entry.bug == bug) else { return };
                        match caught {
                            Some((seeds, check)) => {
                                entry.seeds.push(seeds);
                                *entry.checks.entry(check).or_default() += 1;
                            }
                            None => entry.seeds.push(self.limit + 1),
                        }
                    }
                });
            }
        });
        let mut catches = catches.into_inner().unwrap_or_default();
        catches.iter_mut().for_each(|entry| entry.seeds.sort_unstable());
        Table { catches, limit: self.limit }
    }
}

impl Catch {
    /// The median number of seeds.
    #[must_use]
    pub fn median(&self) -> u64 {
        self.seeds.get(self.seeds.len() / 2).copied().unwrap_or(u64::MAX)
    }

    fn checks_in_words(&self) -> String {
        let mut checks: Vec<(&String, &u64)> = self.checks.iter().collect();
        checks.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        checks.iter().map(|(check, count)| format!("{check} ({count})")).collect::<Vec<_>>().join(", ")
    }
}

impl Table {
    /// Bugs that at least half of the hunts missed.
    #[must_use]
    pub fn missed(&self) -> Vec<Bug> {
        self.catches.iter().filter(|entry| entry.median() > self.limit).map(|entry| entry.bug).collect()
    }

    /// The median of all bugs' medians.
    #[must_use]
    pub fn median_of_medians(&self) -> u64 {
        let mut medians: Vec<u64> = self.catches.iter().map(Catch::median).collect();
        medians.sort_unstable();
        medians.get(medians.len() / 2).copied().unwrap_or(0)
    }

    /// One JSON object: `median_of_medians` and, for each bug, `promise`, `median_seeds`, `seeds`, `checks`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let bugs: Vec<serde_json::Value> = self
            .catches
            .iter()
            .map(|entry| {
                serde_json::json!({
                    "bug": format!("{:?}", entry.bug), "promise": entry.bug.promise(),
                    "median_seeds": entry.median(), "seeds": entry.seeds, "checks": entry.checks,
                })
            })
            .collect();
        serde_json::json!({ "median_of_medians": self.median_of_medians(), "limit": self.limit, "bugs": bugs })
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hunts = self.catches.first().map_or(0, |entry| entry.seeds.len());
        writeln!(
            f,
            "{:<24} {:>7} {:>7} {:>7}  caught by (of {hunts} hunts)",
            "planted bug", "promise", "median", "worst"
        )?;
        for entry in &self.catches {
            let in_words = |seeds: u64| if seeds > self.limit { "-".to_owned() } else { seeds.to_string() };
            writeln!(
                f,
                "{:<24} {:>7} {:>7} {:>7}  {}",
                format!("{:?}", entry.bug),
                entry.bug.promise(),
                in_words(entry.median()),
                in_words(entry.seeds.last().copied().unwrap_or(0)),
                entry.checks_in_words()
            )?;
        }
        writeln!(f, "median of medians: {} seeds", self.median_of_medians())
    }
}
