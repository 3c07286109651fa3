//! The core: RAID-1 as a pure state machine. Events in, actions out; no I/O, no clock, no randomness.
//!
//! (The state diagram and the promises stand here; see `docs/design.md`.)

pub mod event;
pub mod planted;
pub mod status;

use crate::buffer::BufferPool;
use crate::format::Assembly;
use crate::units::{Nanos, REPLICAS_MAX, ReplicaSet};
use event::{Action, DeviceTraits, Event};
use status::Status;

/// How a volume is run; nothing in here is on disk.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// Refuse all writes and write no metadata.
    pub read_only: bool,
    /// Replicas to read only when nothing else can answer.
    pub write_mostly: ReplicaSet,
    /// What each attached replica's backing can do; `Some` for exactly the slots with an open device.
    pub traits: [Option<DeviceTraits>; REPLICAS_MAX],
    /// Where generations come from: random bits, different at each start.
    pub entropy: u128,
    /// Wall-clock time (nanoseconds since 1970) at `Nanos(0)`, for the superblock's "last written".
    pub wall_clock_origin_ns: u64,
    /// A region's intent bit is cleared after this long without a write, nanoseconds (default 5 s).
    pub intent_idle_ns: u64,
    /// Regions copied at the same time by a resync (default 4).
    pub resync_jobs_max: usize,
}

/// The core. One owner drives it with [`Mirror::handle`].
pub struct Mirror {}

impl Mirror {
    /// A volume as assembled. `handle` must be called once with `Event::Tick` to start it.
    #[must_use]
    pub fn new(_config: MirrorConfig, _assembly: Assembly, _pool: BufferPool) -> Self {
        Self {}
    }

    /// Takes one event and appends what is to be done to `out`.
    pub fn handle(&mut self, _now: Nanos, _event: Event, _out: &mut Vec<Action>) {}

    /// When `Event::Tick` is wanted next; changed only by `handle`.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Nanos> {
        None
    }

    /// Whether requests are taken: false until the opening superblock commits are done; requests sent before
    /// are queued.
    #[must_use]
    pub fn is_open(&self) -> bool {
        true
    }

    /// A snapshot for operators.
    #[must_use]
    pub fn status(&self, _now: Nanos) -> Status {
        unreachable!()
    }
}
