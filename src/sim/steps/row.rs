//! What a row of the table of scenarios is made of: steps, and what recoveries read.

use super::super::client::Asked;
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
    /// From here on reads show at once what a flush that fails has lost, while another replica is in sync.
    TurnsBack,
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

impl Scenario {
    /// Whether crashes begin with `create`.
    #[must_use]
    pub fn watches_create(&self) -> bool {
        !self.script.contains(&Step::Watch)
    }

    /// For each region that the script touches the bytes from the first to the last that it touches: what recoveries
    /// read, as (offset, length).
    #[must_use]
    pub fn touched(&self) -> Vec<(u64, u64)> {
        let mut touched: Vec<Option<(u64, u64)>> = vec![None; REGIONS as usize];
        for step in self.script {
            let (Step::Ask(_, offset, len) | Step::AskFua(_, offset, len)) = *step else { continue };
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
