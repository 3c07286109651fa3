//! The scenarios: one row each, with a short script.
//!
//! What must hold: a script stays within the fault model (another replica is in sync and well whenever one is in
//! trouble), so that nothing may be lost, and no request may fail before [`Step::Excused`]. Rows play without chance: each has the same events in
//! every run.
//!
//! A new scenario is a row of [`SCENARIOS`]. Its script first builds what it needs; crashes begin at [`Step::Watch`].

use super::super::client::Asked::{self, Flush, Read, Trim, Write, Zero};
use super::super::world::FailNext;

/// Size of a region, bytes.
pub const REGION: u64 = 64 << 10;
/// Regions of the volume.
pub const REGIONS: u64 = 4;

/// One step of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// From here on a crash is tried after every event.
    Watch,
    /// A client asks: what, from which byte on, how many bytes. Nobody waits for the answer.
    Ask(Asked, u64, u64),
    /// The same with FUA.
    AskFua(Asked, u64, u64),
    /// This many events happen.
    Events(u64),
    /// Until every request and command is answered.
    Idle,
    /// Until every member is in sync and nothing is unsynced.
    Sync,
    /// Until every intent bit is cleared.
    Clean,
    /// A disk is gone.
    Gone(usize),
    /// It is there again.
    Back(usize),
    /// The next operation of this kind on a disk fails; a flush loses the cache.
    FailNext(usize, FailNext),
    /// From here on a disk is so many times slower.
    Slow(usize, u64),
    /// From here on requests may fail: no replica is well.
    Excused,
    /// A blank disk lies ready, as the last one.
    Blank,
    /// An operator fails the replica on a disk.
    Fail(usize),
    /// An operator removes it.
    Remove(usize),
    /// An operator offers a disk.
    Add(usize),
    /// An orderly stop; the daemon is gone then.
    Stop,
    /// A disk becomes blank (while the daemon is down).
    Wipe(usize),
    /// The daemon ends with this joint outcome.
    Crash(&'static str),
    /// The daemon starts with these disks.
    Start(&'static [usize]),
    /// It may not start with these disks alone (promise 8): not without `--degraded`, or not even with it.
    Refused(&'static [usize], Degraded),
}

/// How an operator tries to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degraded {
    /// As always.
    No,
    /// With `--degraded`.
    Yes,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// How it is called.
    pub name: &'static str,
    /// For each replica the alignment of its operations, bytes.
    pub aligns: &'static [u32],
    /// What happens.
    pub script: &'static [Step],
}

use Step::{
    Add, Ask, AskFua, Back, Blank, Clean, Events, Fail, Gone, Idle, Refused, Remove, Start, Stop, Sync, Watch,
};

const TWO: &[u32] = &[512, 512];
const THREE: &[u32] = &[512, 512, 512];

const fn row(name: &'static str, aligns: &'static [u32], script: &'static [Step]) -> Scenario {
    Scenario { name, aligns, script }
}

/// The name of the row in which `create` itself is crashed.
pub const CREATE: &str = "create";

/// All scenarios.
pub const SCENARIOS: &[Scenario] = &[
    // `create` is watched from its first write on, and so is the first start.
    row(CREATE, TWO, &[Sync]),
    row("create-three", THREE, &[Sync]),
    row("write-to-cold-region", TWO, &[Watch, Ask(Write, 4096, 1024), Idle]),
    row("write-to-warm-region", TWO, &[Ask(Write, 4096, 512), Idle, Watch, Ask(Write, 8192, 1024), Idle]),
    row(
        "write-after-clearing",
        TWO,
        &[Ask(Write, 4096, 512), Idle, Clean, Watch, Ask(Write, 4096, 512), Idle],
    ),
    row(
        "writes-to-two-cold-regions",
        TWO,
        &[Watch, Ask(Write, 0, 512), Ask(Write, REGION, 512), Idle, Ask(Write, 2 * REGION, 512), Idle],
    ),
    row(
        "overlapping-writes",
        TWO,
        &[
            Watch,
            Ask(Write, 4096, 1024),
            Ask(Write, 4608, 1024),
            Ask(Write, 4096, 512),
            Ask(Read, 4096, 2048),
            Idle,
        ],
    ),
    row(
        "flush",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Watch,
            Ask(Write, 4096, 512),
            Ask(Flush, 0, 0),
            Ask(Write, REGION, 512),
            Idle,
            Ask(Flush, 0, 0),
            Idle,
        ],
    ),
    row(
        "fua",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Watch,
            AskFua(Write, 4096, 1024),
            Idle,
            Ask(Write, 4096, 512),
            AskFua(Zero, 4096, 4096),
            Idle,
        ],
    ),
    row(
        "zeroes-and-trim",
        TWO,
        &[
            Ask(Write, 0, 16384),
            Ask(Flush, 0, 0),
            Idle,
            Watch,
            Ask(Zero, 0, 8192),
            Ask(Trim, 4096, 8192),
            Idle,
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "unaligned-writes",
        &[512, 4096],
        &[Ask(Write, 4000, 3000), Idle, Watch, Ask(Write, 4100, 700), Ask(Write, 4700, 10), Idle],
    ),
    row("unaligned-across-regions", TWO, &[Watch, Ask(Write, REGION - 300, 600), Idle]),
    row(
        "replica-fails-during-write",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Step::FailNext(1, FailNext::Write),
            Watch,
            Ask(Write, 4096, 1024),
            Ask(Write, REGION, 512),
            Idle,
        ],
    ),
    row(
        "replica-fails-while-region-is-cold",
        TWO,
        &[
            Step::FailNext(1, FailNext::Write),
            Watch,
            Ask(Write, 4096, 512),
            Idle,
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "first-replica-is-gone",
        TWO,
        &[Ask(Write, 4096, 512), Idle, Gone(0), Watch, Ask(Write, 4096, 512), Ask(Read, 4096, 512), Idle],
    ),
    row(
        "read-error",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Step::FailNext(0, FailNext::Read),
            Watch,
            Ask(Read, 4096, 512),
            Idle,
            Ask(Read, 4096, 512),
            Idle,
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "operator-fails-a-replica",
        TWO,
        &[Ask(Write, 4096, 512), Idle, Watch, Ask(Write, 4096, 1024), Events(2), Fail(1), Idle],
    ),
    row(
        "replica-returns",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Gone(1),
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Back(1),
            Watch,
            Add(1),
            Idle,
            Sync,
        ],
    ),
    row(
        "resync-while-clients-write",
        TWO,
        &[
            Gone(1),
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Back(1),
            Add(1),
            Watch,
            Ask(Write, 4096, 512),
            Events(6),
            Ask(Write, REGION + 512, 512),
            Events(6),
            Ask(Write, 2 * REGION, 512),
            Ask(Read, 4096, 512),
            Idle,
            Sync,
        ],
    ),
    row(
        "replica-fails-during-resync",
        TWO,
        &[
            Gone(1),
            Ask(Write, 4096, 512),
            Idle,
            Back(1),
            Add(1),
            Watch,
            Events(12),
            Gone(1),
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "the-other-replica-fails-after-resync",
        TWO,
        &[
            Gone(1),
            Ask(Write, 4096, 512),
            Idle,
            Back(1),
            Add(1),
            Idle,
            Sync,
            Gone(0),
            Watch,
            Ask(Write, 4096, 512),
            Idle,
            Ask(Read, 4096, 512),
            Idle,
        ],
    ),
    row("clean-stop", TWO, &[Ask(Write, 4096, 512), Idle, Watch, Ask(Write, 8192, 512), Stop]),
    row(
        "stop-while-resyncing",
        TWO,
        &[Gone(1), Ask(Write, 4096, 512), Idle, Back(1), Add(1), Events(10), Watch, Stop],
    ),
    row("bit-clearing", TWO, &[Ask(Write, 4096, 512), Ask(Write, REGION, 512), Idle, Watch, Clean]),
    row(
        "bit-clearing-while-clients-write",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Watch,
            Events(3),
            Ask(Write, 4096, 512),
            Events(2),
            Ask(Write, REGION, 512),
            Idle,
            Clean,
        ],
    ),
    row(
        "slow-write-outlasts-the-idle-time",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Step::Slow(1, 2000),
            Watch,
            Ask(Write, 4096, 512),
            Idle,
            Step::Slow(1, 1),
            Clean,
        ],
    ),
    row(
        "last-replica-errs",
        TWO,
        &[
            Gone(1),
            Ask(Write, 4096, 512),
            Idle,
            Step::Excused,
            Step::FailNext(0, FailNext::Write),
            Watch,
            Ask(Write, 4096, 512),
            Idle,
            Ask(Read, 4096, 512),
            Ask(Write, 4096, 512),
            Fail(0),
            Idle,
            Ask(Read, 4096, 512),
            Idle,
        ],
    ),
    row(
        "degraded-start",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Stop,
            Watch,
            Start(&[0]),
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
        ],
    ),
    row(
        "degraded-start-after-a-crash",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Step::Crash("pdisk1"),
            Watch,
            Start(&[1]),
            Ask(Read, 4096, 512),
            Idle,
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "read-of-an-unsynced-region",
        TWO,
        &[
            Ask(Write, 4096, 1024),
            Ask(Write, REGION, 512),
            Idle,
            Step::Crash("pdisk1"),
            Watch,
            Start(&[0, 1]),
            Ask(Read, 4096, 1024),
            Ask(Read, REGION, 512),
            Idle,
        ],
    ),
    row(
        "write-to-an-unsynced-region",
        TWO,
        &[
            Ask(Write, 4096, 1024),
            Ask(Write, REGION, 512),
            Idle,
            Step::Crash("pdisk0"),
            Watch,
            Start(&[0, 1]),
            Ask(Write, 4096, 512),
            Ask(Zero, REGION, 4096),
            Ask(Read, 4096, 1024),
            Idle,
        ],
    ),
    row(
        "blank-replica-is-added",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Ask(Write, 3 * REGION, 512),
            Idle,
            Blank,
            Watch,
            Add(2),
            Events(20),
            Ask(Write, 4096, 512),
            Idle,
            Sync,
        ],
    ),
    row(
        "replica-is-removed",
        THREE,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Watch,
            Ask(Write, 4096, 512),
            Events(2),
            Remove(1),
            Idle,
            Ask(Write, 4096, 512),
            Idle,
        ],
    ),
    row(
        "three-replicas-lose-one",
        THREE,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Watch,
            Ask(Write, 4096, 512),
            Events(3),
            Gone(2),
            Ask(Write, REGION, 512),
            Idle,
            Ask(Flush, 0, 0),
            Idle,
        ],
    ),
    row(
        "three-replicas-lose-two-in-turn",
        THREE,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Gone(2),
            Ask(Write, REGION, 512),
            Idle,
            Watch,
            Gone(1),
            Ask(Write, 2 * REGION, 512),
            Idle,
        ],
    ),
    row(
        "two-replicas-return",
        THREE,
        &[
            Gone(2),
            Ask(Write, REGION, 512),
            Idle,
            Gone(1),
            Ask(Write, 2 * REGION, 512),
            Idle,
            Back(1),
            Back(2),
            Watch,
            Add(1),
            Events(4),
            Add(2),
            Idle,
            Sync,
        ],
    ),
    row(
        "flush-fails-and-loses-the-cache",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Step::FailNext(1, FailNext::Flush),
            Watch,
            Ask(Flush, 0, 0),
            Idle,
            Ask(Write, 4096, 512),
            Ask(Flush, 0, 0),
            Idle,
        ],
    ),
    row(
        "flush-before-bit-clearing-fails",
        TWO,
        &[Ask(Write, 4096, 512), Idle, Step::FailNext(0, FailNext::Flush), Watch, Events(20)],
    ),
    row(
        "stale-replica-alone",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Gone(1),
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Step::Crash("knone"),
            Back(1),
            Refused(&[1], Degraded::No),
            Watch,
            Start(&[0, 1]),
            Ask(Read, 4096, 512),
            Idle,
            Sync,
        ],
    ),
    row(
        "each-side-alone",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Idle,
            Stop,
            Start(&[0]),
            Ask(Write, 4096, 512),
            Idle,
            Step::Crash("knone"),
            Start(&[1]),
            Events(20),
            Step::Crash("knone"),
            Refused(&[0, 1], Degraded::Yes),
            Step::Wipe(1),
            Watch,
            Start(&[0, 1]),
            Ask(Read, 4096, 512),
            Idle,
        ],
    ),
    row(
        "resyncing-replica-alone",
        TWO,
        &[
            Gone(1),
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Idle,
            Back(1),
            Add(1),
            Events(8),
            Step::Crash("kall"),
            Refused(&[1], Degraded::No),
            Refused(&[1], Degraded::Yes),
            Watch,
            Start(&[0]),
            Ask(Write, 4096, 512),
            Idle,
            Add(1),
            Idle,
            Sync,
        ],
    ),
    row(
        "crash-with-everything-dirty",
        TWO,
        &[
            Ask(Write, 4096, 512),
            Ask(Write, REGION, 512),
            Events(5),
            Step::Crash("pall"),
            Start(&[0, 1]),
            Ask(Write, 8192, 512),
            Events(8),
            Step::Crash("kdisk0"),
            Watch,
            Start(&[0, 1]),
            Ask(Write, 4096, 512),
            Ask(Flush, 0, 0),
            Idle,
            Clean,
        ],
    ),
];

/// The scenario called `name`.
#[must_use]
pub fn named(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

impl Scenario {
    /// Whether crashes begin with `create`.
    #[must_use]
    pub fn watches_create(&self) -> bool {
        !self.script.contains(&Watch)
    }

    /// For each region that the script touches the bytes from the first to the last that it touches: what recoveries
    /// read, as (offset, length).
    #[must_use]
    pub fn touched(&self) -> Vec<(u64, u64)> {
        let mut touched: Vec<Option<(u64, u64)>> = vec![None; REGIONS as usize];
        for step in self.script {
            let (Ask(_, offset, len) | AskFua(_, offset, len)) = *step else { continue };
            if len == 0 {
                continue;
            }
            for region in offset / REGION..(offset + len).div_ceil(REGION) {
                let (from, to) = (offset.max(region * REGION), (offset + len).min((region + 1) * REGION));
                let span = &mut touched[region as usize];
                let (first, last) = span.unwrap_or((from, to));
                *span = Some((first.min(from), last.max(to)));
            }
        }
        touched.into_iter().flatten().map(|(from, to)| (from, to - from)).collect()
    }
}
