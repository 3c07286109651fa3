//! Many worlds: runs the seeds of a range on several threads and sums up what happened in them.
//!
//! What must hold: which seeds fail, and why, depends on the seeds only and never on the threads.

use std::ops::Range;
use std::sync::Mutex;

use super::counts::Counts;
use super::run::{Options, run_seed};

/// How seeds are run.
#[derive(Clone, Copy, Debug)]
pub struct Swarm {
    /// How each is run.
    pub options: Options,
    /// Threads, at least 1; each world runs in one of them.
    pub threads: usize,
}

/// What became of the seeds.
#[derive(Debug, Default)]
pub struct Report {
    /// Seeds without a violation.
    pub passed: u64,
    /// Seeds with one.
    pub failed: u64,
    /// What happened in those that passed, summed up.
    pub counts: Counts,
}

/// Threads to use where nothing else is said: one a core.
#[must_use]
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

impl Swarm {
    /// Runs `seeds`; `failed(seed, why)` is called for each that fails, one at a time, in no order.
    pub fn run(&self, seeds: Range<u64>, failed: impl FnMut(u64, &str) + Send) -> Report {
        let threads = self.threads.clamp(1, (seeds.end.saturating_sub(seeds.start)).max(1) as usize);
        let next = Mutex::new(seeds);
        let shared = Mutex::new((Report::default(), failed));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(seed) = next.lock().ok().and_then(|mut seeds| seeds.next()) {
                        let result = run_seed(seed, self.options);
                        let Ok(mut shared) = shared.lock() else { return };
                        match result {
                            Ok(counts) => {
                                shared.0.passed += 1;
                                shared.0.counts.add(&counts);
                            }
                            Err(why) => {
                                shared.0.failed += 1;
                                (shared.1)(seed, &why);
                            }
                        }
                    }
                });
            }
        });
        shared.into_inner().map(|(report, _)| report).unwrap_or_default()
    }
}
