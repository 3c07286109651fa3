//! The table of small worlds: one row each. A new one is one row of [`WORLDS`].
//!
//! What must hold: names are unique; every world has two replicas and at most three clients; `BLOCK_A` and `BLOCK_B`
//! lie in one region, `BLOCK_C` in another.

use crate::sim::client::Asked;
use crate::sim::plan::{FaultKind, FaultRates, Mix, Plan};
use crate::units::{BLOCK_BYTES, MILLISECOND_NS, REGION_BYTES_MIN};

/// The first block of the volume.
pub const BLOCK_A: u64 = 0;
/// The block after it, in the same region.
pub const BLOCK_B: u64 = BLOCK_BYTES;
/// A block of the second region.
pub const BLOCK_C: u64 = REGION_BYTES_MIN;

/// One request of a client's script; it is sent when the one before it is answered.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What is asked.
    pub asked: Asked,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Durable before the answer.
    pub fua: bool,
}

const fn step(asked: Asked, offset: u64) -> Step {
    Step { asked, offset, len: BLOCK_BYTES, fua: false }
}

const fn write(offset: u64) -> Step {
    step(Asked::Write, offset)
}

const fn read(offset: u64) -> Step {
    step(Asked::Read, offset)
}

const FLUSH: Step = Step { asked: Asked::Flush, offset: 0, len: 0, fua: false };

/// How a world comes to the moment at which exploration begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// A new volume, open.
    Fresh,
    /// A new volume that has just been started: opening is explored, too.
    Opening,
    /// A kill caught a write to block A when it had reached one replica only (this one); open again, the region
    /// is unsynced.
    HalfWritten(usize),
    /// The second replica missed a write to block A; it is there again, the volume is open, the resync begins.
    Returned,
    /// The second replica is gone; the first is served alone, until the end, where the second one returns.
    Alone,
}

/// What may go wrong in a small world, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// A device operation fails, any one, in each way there is.
    Any,
    /// A flush fails, any one, and reads turn back at once to what it was to make durable, where another replica is in sync.
    TurnsBack,
}

/// One small world.
#[derive(Clone, Copy, Debug)]
pub struct SmallWorld {
    /// For `--world`.
    pub name: &'static str,
    /// What it is there for.
    pub about: &'static str,
    /// How it begins.
    pub setup: Setup,
    /// What each client sends.
    pub clients: &'static [&'static [Step]],
    /// How often the core's tick may come at any moment at which it is due. (Where nothing else moves, and
    /// requests wait, it comes anyway.)
    pub ticks: u32,
    /// What may go wrong, once.
    pub fault: Fault,
    /// Part of the quick run.
    pub quick: bool,
}

/// The world that the issue names comes first: it is explored whole in every run.
pub const WORLDS: &[SmallWorld] = &[
    SmallWorld {
        name: "basic",
        about: "two clients, two blocks, two writes, and the bits are cleared",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_B)]],
        ticks: 2,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "overlap",
        about: "two clients write the same block",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_A)]],
        ticks: 2,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "overlap-partly",
        about: "two writes share one block of two",
        setup: Setup::Fresh,
        clients: &[&[Step { len: 2 * BLOCK_BYTES, ..write(BLOCK_A) }], &[write(BLOCK_B)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "unaligned",
        about: "two writes of parts of one sector, filled from a replica",
        setup: Setup::Fresh,
        clients: &[&[Step { len: 300, ..write(100) }], &[Step { len: 300, ..write(300) }]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "regions",
        about: "two writes to different regions",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_C)]],
        ticks: 1,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "twice",
        about: "one client writes a block twice, the other writes it too",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A), write(BLOCK_A)], &[write(BLOCK_A)]],
        ticks: 1,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "flush",
        about: "a write, then a flush; another client's write beside it",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A), FLUSH], &[write(BLOCK_B)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "fua",
        about: "a write with FUA over another one",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[Step { fua: true, ..write(BLOCK_A) }]],
        ticks: 1,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "read",
        about: "two reads, one after the other, of a block that is being written",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[read(BLOCK_A), read(BLOCK_A)]],
        ticks: 1,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "write-flush",
        about: "a write and a flush beside it, then another flush",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[FLUSH, FLUSH]],
        ticks: 0,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "trim",
        about: "a trim of a block that is being written",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[step(Asked::Trim, BLOCK_A), read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "zero",
        about: "zeroes over a block that is being written",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[step(Asked::Zero, BLOCK_A)]],
        ticks: 1,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "fault",
        about: "two writes; any one operation fails",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_B)]],
        ticks: 0,
        fault: Fault::Any,
        quick: false,
    },
    SmallWorld {
        name: "fault-overlap",
        about: "two writes to one block; any one operation fails",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_A)]],
        ticks: 0,
        fault: Fault::Any,
        quick: true,
    },
    SmallWorld {
        name: "fault-flush",
        about: "a write, a flush, a write; any one operation fails",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A), FLUSH, write(BLOCK_A)]],
        ticks: 1,
        fault: Fault::Any,
        quick: true,
    },
    SmallWorld {
        name: "fault-clear",
        about: "a write whose bit is cleared; any one operation fails",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A)]],
        ticks: 3,
        fault: Fault::Any,
        quick: true,
    },
    SmallWorld {
        name: "turns-back-read",
        about: "a read while a flush fails and turns reads back",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A), FLUSH], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::TurnsBack,
        quick: true,
    },
    SmallWorld {
        name: "turns-back-unaligned",
        about: "a write of part of a sector while a flush fails and turns reads back",
        setup: Setup::Fresh,
        clients: &[&[write(BLOCK_A), FLUSH], &[Step { len: 300, ..write(100) }]],
        ticks: 0,
        fault: Fault::TurnsBack,
        quick: false,
    },
    SmallWorld {
        name: "opening",
        about: "two writes while the volume opens",
        setup: Setup::Opening,
        clients: &[&[write(BLOCK_A)], &[write(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "opening-fault",
        about: "a write while the volume opens; any one operation fails",
        setup: Setup::Opening,
        clients: &[&[write(BLOCK_A)]],
        ticks: 0,
        fault: Fault::Any,
        quick: false,
    },
    SmallWorld {
        name: "returned",
        about: "a write during the resync of a replica that missed one",
        setup: Setup::Returned,
        clients: &[&[write(BLOCK_A)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "returned-write",
        about: "one write during the resync of a replica that missed one",
        setup: Setup::Returned,
        clients: &[&[write(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "returned-fault",
        about: "a write during a resync; any one operation fails",
        setup: Setup::Returned,
        clients: &[&[write(BLOCK_B)]],
        ticks: 0,
        fault: Fault::Any,
        quick: false,
    },
    SmallWorld {
        name: "returned-read",
        about: "two reads during the resync of a replica that missed a write",
        setup: Setup::Returned,
        clients: &[&[read(BLOCK_A)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "alone",
        about: "a write and two flushes on the only replica; any one operation fails",
        setup: Setup::Alone,
        clients: &[&[write(BLOCK_A), FLUSH, FLUSH]],
        ticks: 0,
        fault: Fault::Any,
        quick: true,
    },
    SmallWorld {
        name: "alone-read",
        about: "a write and a read on the only replica; any one operation fails",
        setup: Setup::Alone,
        clients: &[&[write(BLOCK_A)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::Any,
        quick: true,
    },
    SmallWorld {
        name: "unsynced-first",
        about: "two clients read what a crash left on the first replica only",
        setup: Setup::HalfWritten(0),
        clients: &[&[read(BLOCK_A), read(BLOCK_A)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "unsynced-second",
        about: "two clients read what a crash left on the second replica only",
        setup: Setup::HalfWritten(1),
        clients: &[&[read(BLOCK_A), read(BLOCK_A)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: true,
    },
    SmallWorld {
        name: "unsynced-write",
        about: "a write and a read in a region that a crash left unsynced",
        setup: Setup::HalfWritten(0),
        clients: &[&[write(BLOCK_B)], &[read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::None,
        quick: false,
    },
    SmallWorld {
        name: "unsynced-fault",
        about: "reads of what a crash left on one replica; any one operation fails",
        setup: Setup::HalfWritten(1),
        clients: &[&[read(BLOCK_A), read(BLOCK_A)]],
        ticks: 0,
        fault: Fault::Any,
        quick: false,
    },
];

impl SmallWorld {
    /// The row of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        WORLDS.iter().find(|world| world.name == name)
    }

    /// What the simulator is to make: nothing in it is left to chance before the checks at the end.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let far = self.clients.iter().copied().flatten().any(|step| step.offset >= REGION_BYTES_MIN);
        Plan {
            seed: 1,
            volume_bytes: if far { BLOCK_C + BLOCK_BYTES } else { 2 * BLOCK_BYTES },
            region_bytes: REGION_BYTES_MIN,
            aligns: vec![512, 512],
            clients: self.clients.len(),
            depth: 1,
            requests: 0,
            think_ns: 1_000_000,
            mix: Mix {
                weights: [1, 1, 0, 0, 0],
                fua: 0,
                unit: BLOCK_BYTES,
                len_max: BLOCK_BYTES,
                hot_spots: 0,
                whole: 0,
                hostile: 0,
                status: 0,
                cache: 0,
                fast: 0,
            },
            latency_ns: 100_000,
            slow_factor: 1,
            write_mostly: 0,
            // A fault of the only replica is beyond the model: errors are legal, wrong data never.
            within_model: !(self.fault != Fault::None && self.setup == Setup::Alone),
            faults: FaultRates::NONE
                .with(FaultKind::FlushLosesCache, 1)
                .with(FaultKind::FlushTurnsBack, u64::from(self.fault == Fault::TurnsBack)),
            intent_idle_ns: 50 * MILLISECOND_NS,
            resync_jobs_max: 2,
            resync_burst_ns: 16_000_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_named_world_is_in_the_quick_run() {
        for (at, world) in WORLDS.iter().enumerate() {
            assert!(WORLDS[..at].iter().all(|other| other.name != world.name), "{}", world.name);
        }
        assert!(WORLDS[0].quick && WORLDS[0].clients.len() == 2);
    }
}
