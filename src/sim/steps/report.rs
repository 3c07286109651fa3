//! What was covered and what was found, in numbers and as text.

use serde::Serialize;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Failure {
    /// In which scenario.
    pub scenario: &'static str,
    /// After which crashes; empty: in the scenario itself.
    pub at: String,
    /// The promise and what was wrong.
    pub why: String,
}

/// What was covered at one depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// Steps after which a crash was tried.
    pub points: u64,
    /// Joint outcomes tried, of power cuts and kills.
    pub outcomes: u64,
    /// Those of them that were tried where every joint outcome was.
    pub enumerated: u64,
    /// Crash points with more joint outcomes than the cap: sampled.
    pub sampled_points: u64,
    /// Different worlds that were left, each recovered once.
    pub worlds: u64,
}

/// What was covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Crashes of the scenario, and crashes of the recoveries after those.
    pub depths: [Depth; 2],
    /// Recoveries run to the end.
    pub recoveries: u64,
    /// Events that the core handled in recoveries.
    pub events: u64,
    /// Starts of the daemon in recoveries.
    pub starts: u64,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        for (depth, other) in self.depths.iter_mut().zip(other.depths) {
            depth.points += other.points;
            depth.outcomes += other.outcomes;
            depth.enumerated += other.enumerated;
            depth.sampled_points += other.sampled_points;
            depth.worlds += other.worlds;
        }
        self.recoveries += other.recoveries;
        self.events += other.events;
        self.starts += other.starts;
    }
}

/// What a scenario gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name.
    pub scenario: &'static str,
    /// What was covered.
    #[serde(flatten)]
    pub tally: Tally,
    /// What was found, in order.
    pub failures: Vec<Failure>,
}

/// The whole of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// One for each scenario, in the order of the table.
    pub scenarios: Vec<Row>,
    /// All together.
    pub total: Tally,
    /// Number of failures.
    pub failed: usize,
}

impl Report {
    /// Sums up.
    #[must_use]
    pub fn new(scenarios: Vec<Row>) -> Self {
        let mut total = Tally::default();
        scenarios.iter().for_each(|row| total.add(&row.tally));
        let failed = scenarios.iter().map(|row| row.failures.len()).sum();
        Self { scenarios, total, failed }
    }

    /// A table of what was covered.
    #[must_use]
    pub fn table(&self) -> String {
        let columns = |name: &str, tally: &Tally| {
            let depth = |depth: &Depth| {
                let Depth { points, outcomes, enumerated, worlds, .. } = *depth;
                format!("{points:>8} {outcomes:>9} {enumerated:>9} {worlds:>8}")
            };
            format!("{name:<38} {} │ {}\n", depth(&tally.depths[0]), depth(&tally.depths[1]))
        };
        let half = format!("{:>8} {:>9} {:>9} {:>8}", "points", "outcomes", "enumer.", "worlds");
        let mut table = format!("{:<38} {half} │ {half}\n", "crashes of: scenario │ its recoveries");
        for row in &self.scenarios {
            table += &columns(row.scenario, &row.tally);
        }
        table + &columns("all", &self.total)
    }
}
