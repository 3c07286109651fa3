//! Resync and sync after a crash: one machine that copies regions.
//!
//! A region needs a copy where it is unsynced (the in-sync replicas may differ) or stale on a resyncing
//! replica. One job copies one region from one in-sync source to every replica that needs it:
//!
//! ```text
//!  lock (shared: reads go on, writes wait; unsynced: exclusive) ─► for each chunk: hole? ──yes──► zero the targets ──┐
//!                                                 └─no─► read ─► write data, zero runs of zeroes ┤
//!     ┌────────────────────────────────── next chunk ◄──────────────────────────────────────────┘
//!     └─► flush the targets ─► Done: unsynced mark and stale bits cleared, waiters woken
//!  source lost, or its read failed ─► Retry with another source; none can read it ─► Failed: waiters get EIO, later again
//! ```
//!
//! What must hold: promise 5 (a region counts as synced only when the copies are flushed, so that not even the
//! loss of the source can turn an answer back) and promise 7 (marks are cleared last: a crash anywhere
//! starts that region again).

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;

use super::event::{DeviceOp, DeviceOutput, NoticeLevel};
use super::flush::FlushOwner;
use super::ops::OpOwner;
use super::overlap::{LockId, Mode};
use super::pace::Pace;
use super::slab::Key;
use super::{Mirror, Task, Work};
use crate::buffer::{Payload, SharedBuffer};
use crate::format::bitmap::Bitmap;
use crate::planted::{Bug, planted};
use crate::units::{ByteRange, Nanos, RegionIndex, ReplicaSet, ReplicaSlot, SECOND_NS, VolumeOffset};

/// Bytes copied at a time within a job.
const CHUNK_BYTES: u64 = 1 << 20;
/// Runs of zeroes of at least this size (and aligned to it) become holes again.
const ZERO_RUN_BYTES: u64 = 64 << 10;
/// A region that could not be read is tried again after this long.
const BACKOFF_NS: u64 = 5 * SECOND_NS;
/// The rate shown is over this many marks, one a second.
const MARKS_MAX: usize = 10;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobEnd {
    /// The region is synced (or does not need to be any more).
    Done,
    /// The world changed: whoever needs it asks again.
    Retry,
    /// No source could be read.
    Failed,
}

/// A region copy on its way.
pub(super) struct Job {
    region: RegionIndex,
    lock: LockId,
    /// Reads in flight are over, so in-sync replicas may be written to.
    exclusive: bool,
    source: Option<ReplicaSlot>,
    /// Sources that could not be read.
    unreadable: ReplicaSet,
    pub(super) targets: ReplicaSet,
    /// What was read may not be what the source reads now: the region is copied again.
    spoiled: bool,
    chunk: ByteRange,
    operations: usize,
}

impl Job {
    /// The replica that is copied from, while it is in use.
    pub(super) fn source(&self) -> Option<ReplicaSlot> {
        self.source
    }
}

/// Where the flush is that the last replica in sync owes for what was copied to it. No job begins before it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AloneFlush {
    Idle,
    UnderWay,
    /// Under way, and another one is due: more has been copied since it began.
    Again,
}

/// What the resync machine remembers.
pub(super) struct ResyncState {
    /// Regions that a reader waits for.
    wanted: VecDeque<RegionIndex>,
    pub(super) waiters: BTreeMap<RegionIndex, Vec<Key>>,
    pub(super) active: BTreeMap<RegionIndex, Key>,
    backoff: BTreeMap<RegionIndex, Nanos>,
    /// When the first of those is due (or was, before a reader wanted it).
    backoff_due: Option<Nanos>,
    /// The maps were searched and no region can be begun; until a mark is set, a job ends or a back-off is over they
    /// are not searched again at each event.
    pub(super) exhausted: bool,
    /// The flush of the last replica in sync.
    pub(super) alone_flush: AloneFlush,
    pub(super) pace: Pace,
    cursor: u64,
    /// Bytes copied since there was nothing to copy.
    pub(super) done_bytes: u64,
    marks: VecDeque<(Nanos, u64)>,
}

impl ResyncState {
    pub(super) fn new(burst_ns: u64) -> Self {
        Self {
            wanted: VecDeque::new(),
            waiters: BTreeMap::new(),
            active: BTreeMap::new(),
            backoff: BTreeMap::new(),
            backoff_due: None,
            exhausted: false,
            alone_flush: AloneFlush::Idle,
            pace: Pace::new(burst_ns),
            cursor: 0,
            done_bytes: 0,
            marks: VecDeque::new(),
        }
    }

    /// When a region that could not be read is due again, or clients' turn is over.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        self.pace.deadline().into_iter().chain(self.backoff_due).min()
    }

    fn pass_deadlines(&mut self, now: Nanos) {
        self.pace.pass(now);
        if self.backoff_due.is_some_and(|at| at <= now) {
            self.backoff.retain(|_, at| *at > now);
            self.backoff_due = self.backoff.values().min().copied();
            self.exhausted = false;
        }
    }

    /// Bytes a second over the last marks.
    pub(super) fn rate_bytes_per_s(&self, now: Nanos) -> u64 {
        let Some((then, bytes)) = self.marks.front() else { return 0 };
        let ns = now.since(*then);
        if ns == 0 {
            0
        } else {
            (u128::from(self.done_bytes - bytes) * 1_000_000_000 / u128::from(ns)) as u64
        }
    }

    fn mark(&mut self, now: Nanos) {
        if self.marks.back().is_none_or(|(then, _)| now.since(*then) >= SECOND_NS) {
            self.marks.push_back((now, self.done_bytes));
            if self.marks.len() > MARKS_MAX {
                self.marks.pop_front();
            }
        }
    }
}

fn next_one(map: &Bitmap, from: u64) -> Option<u64> {
    map.get(from as usize..)?.first_one().map(|index| from + index as u64)
}

impl Mirror {
    /// Whether something has to be copied into `region`.
    fn needs_copy(&self, region: RegionIndex) -> bool {
        self.unsynced[region.index()]
            || self.resyncing.iter().any(|slot| self.maps.stale[slot.index()][region.index()])
    }

    /// Whether any region has to be copied.
    pub(super) fn anything_to_copy(&self) -> bool {
        self.unsynced_count > 0 || self.resyncing.iter().any(|slot| self.stale_count[slot.index()] > 0)
    }

    /// Bytes that are still to be copied.
    pub(super) fn bytes_to_copy(&self) -> u64 {
        let mut need = self.unsynced.clone();
        for slot in self.resyncing.iter() {
            need |= &self.maps.stale[slot.index()];
        }
        self.bytes_in(&need)
    }

    /// A reader waits for `region`: it goes to the front.
    pub(super) fn want_region(&mut self, region: RegionIndex) {
        self.resync.wanted.push_back(region);
        self.resync.backoff.remove(&region);
        self.resync.exhausted = false;
    }

    fn next_region(&mut self) -> Option<RegionIndex> {
        while let Some(region) = self.resync.wanted.pop_front() {
            if self.resync.active.contains_key(&region) {
                continue;
            }
            if self.needs_copy(region) {
                return Some(region);
            }
            self.wake_waiters(region, JobEnd::Done);
        }
        if self.stopping() {
            // Only what a request in flight waits for; the rest is left to the next start.
            return None;
        }
        if self.resync.exhausted {
            return None;
        }
        let start = self.resync.cursor;
        let found = self.scan(start, self.regions.count()).or_else(|| self.scan(0, start));
        self.resync.exhausted = found.is_none();
        found
    }

    /// The first region from `from` to `to` that needs a copy, is not being copied and may be tried.
    fn scan(&mut self, from: u64, to: u64) -> Option<RegionIndex> {
        let mut at = from;
        while at < to {
            let maps = self.resyncing.iter().map(|slot| &self.maps.stale[slot.index()]);
            let next = maps.chain([&self.unsynced]).filter_map(|map| next_one(map, at)).min()?;
            let region = RegionIndex(next);
            if next >= to {
                return None;
            }
            if !self.resync.active.contains_key(&region) && !self.resync.backoff.contains_key(&region) {
                self.resync.cursor = next + 1;
                return Some(region);
            }
            at = next + 1;
        }
        None
    }

    /// Starts jobs while there are regions to copy and room for jobs.
    pub(super) fn pump_resync(&mut self) {
        let now = self.now;
        self.resync.pass_deadlines(now);
        if !self.open || self.config.read_only || self.in_sync.is_empty() {
            return;
        }
        if self.resync.alone_flush != AloneFlush::Idle {
            return;
        }
        if !self.anything_to_copy() {
            if self.resync.active.is_empty() {
                self.resync.done_bytes = 0;
                self.resync.marks.clear();
                self.resync.pace.end();
            }
            if self.resync.wanted.is_empty() {
                return;
            }
        }
        while self.job_may_begin()
            && let Some(region) = self.next_region()
        {
            self.resync.mark(now);
            self.start_job(region);
        }
    }

    /// Clients go first: while their requests are in flight there are half the jobs (but always one), and while they are
    /// busy copies and they take turns. Who waits for a region is a client: neither holds it up.
    fn job_may_begin(&mut self) -> bool {
        let (active, jobs_max) = (self.resync.active.len(), self.config.resync_jobs_max.max(1));
        if !self.resync.wanted.is_empty() {
            return active < jobs_max;
        }
        let in_flight = self.tasks.len() > active;
        let jobs_max = if in_flight { jobs_max.div_ceil(2) } else { jobs_max };
        active < jobs_max && !self.resync.exhausted && self.resync.pace.may_begin(self.now, active, in_flight)
    }

    fn start_job(&mut self, region: RegionIndex) {
        let range = self.regions.range(region);
        // The key is known only after the insertion, and the lock wants it: a placeholder goes first.
        let key = self.tasks.insert(Task::Starting);
        // Reads that come now wait for the sync of an unsynced region; those that came before it was unsynced may still
        // be in flight on the replicas that are written to.
        let exclusive = self.unsynced[region.index()];
        let mode = if exclusive { Mode::Exclusive } else { Mode::Shared };
        let (lock, granted) = self.locks.acquire(range, mode, key);
        let job = Job {
            region,
            lock,
            exclusive,
            source: None,
            unreadable: ReplicaSet::EMPTY,
            targets: ReplicaSet::EMPTY,
            spoiled: false,
            chunk: ByteRange::new(range.offset, 0),
            operations: 0,
        };
        if let Some(place) = self.tasks.get_mut(key) {
            *place = Task::Job(Box::new(job));
        }
        self.resync.active.insert(region, key);
        if granted {
            self.job_granted(key);
        }
    }

    /// The region is locked: choose source and targets.
    pub(super) fn job_granted(&mut self, key: Key) {
        let job = self.job_mut(key);
        let (region, unreadable, exclusive) = (job.region, job.unreadable, job.exclusive);
        let sources = self.readable().difference(unreadable);
        let unsynced = exclusive && self.unsynced[region.index()];
        let stale: ReplicaSet =
            self.resyncing.iter().filter(|slot| self.maps.stale[slot.index()][region.index()]).collect();
        if !unsynced && stale.is_empty() {
            self.job_end(key, JobEnd::Done);
            return;
        }
        if unsynced {
            // It writes to replicas in sync. The bit may not be durable where a flush failed everywhere.
            let range = self.regions.range(region);
            if self.broken {
                self.job_unrecorded(key);
                return;
            }
            if !self.ensure_intent(key, range) {
                return;
            }
        }
        let preferred: ReplicaSet =
            sources.iter().filter(|slot| !self.policy.is_write_mostly(*slot)).collect();
        // A read-only start may have answered from `self.source` before: that content is the one to keep.
        let kept = Some(self.source).filter(|slot| unsynced && sources.contains(*slot));
        let Some(mut source) = kept.or(preferred.first()).or(sources.first()) else {
            self.job_end(key, JobEnd::Failed);
            return;
        };
        let mut targets = stale;
        if unsynced {
            // Resyncing ones as well: an earlier copy of theirs may have come from another source. And the source: a
            // flush of it may have failed, and lost what it was to flush, just before a crash kept that from being
            // recorded. It still reads right, but only a new write makes that durable.
            targets = self.active();
        }
        if planted(Bug::ResyncWrongDirection)
            && let Some(wrong) = targets.difference(ReplicaSet::only(source)).first()
        {
            targets.remove(wrong);
            targets.insert(source);
            source = wrong;
        }
        let start = self.regions.range(region).offset;
        let job = self.job_mut(key);
        (job.source, job.targets, job.chunk) = (Some(source), targets, ByteRange::new(start, 0));
        self.job_next_chunk(key);
    }

    /// The region's intent bit cannot be recorded: nothing is written to it, nothing in it is read.
    pub(super) fn job_unrecorded(&mut self, key: Key) {
        self.job_end(key, JobEnd::Failed);
    }

    fn job_next_chunk(&mut self, key: Key) {
        if !self.job_can_go_on(key) {
            self.job_end(key, JobEnd::Retry);
            return;
        }
        let end = self.regions.range(self.job_mut(key).region).end();
        let job = self.job_mut(key);
        let start = job.chunk.end();
        if start == end {
            let targets = job.targets;
            if planted(Bug::ResyncWithoutFlush) {
                self.job_flushed(key, targets);
            } else {
                self.request_flush(targets, FlushOwner::Job(key));
            }
            return;
        }
        job.chunk = ByteRange::new(start, CHUNK_BYTES.min(end - start));
        let (chunk, Some(source)) = (job.chunk, job.source) else { unreachable!("chosen when granted") };
        let offset = VolumeOffset(chunk.offset).in_replica();
        self.issue(source, OpOwner::JobProbe(key), DeviceOp::ProbeHole { offset, len: chunk.len });
    }

    /// Whether the job still has a source in sync that is believed, and a target that takes part.
    fn job_can_go_on(&mut self, key: Key) -> bool {
        let (readable, active) = (self.readable(), self.active());
        let job = self.job_mut(key);
        job.targets = job.targets.intersection(active);
        let source_ok =
            job.source.is_some_and(|slot| readable.contains(slot) || planted(Bug::ResyncWrongDirection));
        source_ok && !job.targets.is_empty()
    }

    /// The source said whether the chunk is a hole.
    pub(super) fn job_probed(&mut self, key: Key, slot: ReplicaSlot, result: Result<DeviceOutput, Errno>) {
        if !self.job_can_go_on(key) {
            self.job_end(key, JobEnd::Retry);
            return;
        }
        let chunk = self.job_mut(key).chunk;
        if matches!(result, Ok(DeviceOutput::Hole(true))) {
            self.job_write_targets(key, None);
            return;
        }
        let buffer = self.pool.take(chunk.len as usize);
        let offset = VolumeOffset(chunk.offset).in_replica();
        self.issue(slot, OpOwner::JobRead(key), DeviceOp::Read { offset, len: chunk.len, buffer });
    }

    /// The source was read, or not.
    pub(super) fn job_read_done(&mut self, key: Key, slot: ReplicaSlot, result: Result<DeviceOutput, Errno>) {
        match result {
            Ok(DeviceOutput::Read(buffer)) => {
                if self.job_can_go_on(key) {
                    self.job_write_targets(key, Some(buffer.share()));
                } else {
                    self.job_end(key, JobEnd::Retry);
                }
            }
            Ok(_) => unreachable!("a read gives its buffer back"),
            Err(errno) => {
                self.note_read_error(slot, errno);
                // Begin again with another source: the copy must come from one.
                self.job_mut(key).unreadable.insert(slot);
                self.job_granted(key);
            }
        }
    }

    /// Sends a chunk to the targets; `None`: it is a hole.
    fn job_write_targets(&mut self, key: Key, data: Option<SharedBuffer>) {
        let job = self.job_mut(key);
        let (chunk, targets) = (job.chunk, job.targets);
        let runs = match &data {
            Some(buffer) => runs_of(&buffer[..chunk.len as usize]),
            None => vec![(ByteRange::new(0, chunk.len), true)],
        };
        self.job_mut(key).operations = runs.len() * targets.len();
        for slot in targets.iter() {
            let cheap_zero = self.replica(slot).traits.cheap_zero;
            for (run, zero) in &runs {
                let offset = VolumeOffset(chunk.offset + run.offset).in_replica();
                let request = match &data {
                    Some(buffer) if !(*zero && cheap_zero) => {
                        let (start, len) = (run.offset as usize, run.len as usize);
                        DeviceOp::Write {
                            offset,
                            data: Payload { buffer: buffer.clone(), start, len },
                            durable: false,
                        }
                    }
                    _ => DeviceOp::Zero { offset, len: run.len, may_unmap: true },
                };
                self.issue(slot, OpOwner::JobWrite(key), request);
            }
        }
    }

    /// A target took its part, or not.
    pub(super) fn job_write_done(&mut self, key: Key, slot: ReplicaSlot, result: Result<(), Errno>) {
        if let Err(errno) = result
            && self.active().contains(slot)
        {
            self.fail_on_error(slot, errno, "a resync write failed");
            if self.active().contains(slot) {
                self.job_mut(key).targets.remove(slot);
            }
        }
        let job = self.job_mut(key);
        assert!(job.operations > 0);
        job.operations -= 1;
        if job.operations == 0 {
            let bytes = job.chunk.len;
            self.resync.done_bytes += bytes;
            self.resync.mark(self.now);
            self.job_next_chunk(key);
        }
    }

    /// The targets are flushed: those in `flushed` have the region.
    pub(super) fn job_flushed(&mut self, key: Key, flushed: ReplicaSet) {
        if !self.job_can_go_on(key) || self.job_mut(key).spoiled {
            self.job_end(key, JobEnd::Retry);
            return;
        }
        let job = self.job_mut(key);
        let (region, done) = (job.region, job.targets.intersection(flushed));
        let Some(source) = job.source else { unreachable!("chosen when granted") };
        for slot in done.intersection(self.resyncing).iter() {
            self.clear_stale(slot, region);
        }
        let mut same = done;
        same.insert(source);
        if self.unsynced[region.index()] && self.in_sync.difference(same).is_empty() {
            self.unsynced.set(region.index(), false);
            self.unsynced_count -= 1;
        }
        self.job_end(key, JobEnd::Done);
    }

    /// A source may have lost what it had not flushed: what was copied from it proves nothing.
    pub(super) fn spoil_jobs(&mut self) {
        let keys: Vec<Key> = self.resync.active.values().copied().collect();
        for key in keys {
            self.job_mut(key).spoiled = true;
        }
    }

    /// The replica in `slot` leaves. Should it (or another one in its slot) be back before a job ends, what it has of
    /// that job's region is not known.
    pub(super) fn leave_jobs(&mut self, slot: ReplicaSlot) {
        let keys: Vec<Key> = self.resync.active.values().copied().collect();
        for key in keys {
            let job = self.job_mut(key);
            job.targets.remove(slot);
            job.source = job.source.filter(|source| *source != slot);
        }
    }

    fn job_end(&mut self, key: Key, end: JobEnd) {
        let Some(Task::Job(job)) = self.tasks.remove(key) else { unreachable!("a job ends once") };
        self.resync.active.remove(&job.region);
        self.resync.exhausted = false;
        if end == JobEnd::Failed {
            let due = self.now.plus(BACKOFF_NS);
            self.resync.backoff.insert(job.region, due);
            self.resync.backoff_due.get_or_insert(due);
            let range = self.regions.range(job.region);
            if !self.broken {
                let text =
                    format!("bytes {}..{} can be read from no in-sync replica", range.offset, range.end());
                self.notice(NoticeLevel::Error, text);
            }
        }
        // The replica it may have differed from may be gone; what was copied so far stays.
        self.forget_unsynced_if_alone();
        self.unlock(job.lock);
        self.wake_waiters(job.region, end);
        self.work.push_back(Work::Pump);
    }

    pub(super) fn wake_waiters(&mut self, region: RegionIndex, end: JobEnd) {
        if let Some(tasks) = self.resync.waiters.remove(&region) {
            self.work.extend(tasks.into_iter().map(|task| Work::SyncEnded(task, end)));
        }
    }

    pub(super) fn job(&self, key: Key) -> Option<&Job> {
        match self.tasks.get(key) {
            Some(Task::Job(job)) => Some(job),
            _ => None,
        }
    }

    fn job_mut(&mut self, key: Key) -> &mut Job {
        let Some(Task::Job(job)) = self.tasks.get_mut(key) else { unreachable!("a job in flight") };
        job
    }
}

/// Cuts `bytes` into runs that are all zero (in units of `ZERO_RUN_BYTES`) and runs that are not.
fn runs_of(bytes: &[u8]) -> Vec<(ByteRange, bool)> {
    let mut runs: Vec<(ByteRange, bool)> = Vec::new();
    let mut offset = 0;
    for unit in bytes.chunks(ZERO_RUN_BYTES as usize) {
        let (words, rest) = unit.as_chunks::<16>();
        let zero = words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0);
        let len = unit.len() as u64;
        match runs.last_mut() {
            Some((run, same)) if *same == zero => run.len += len,
            _ => runs.push((ByteRange::new(offset, len), zero)),
        }
        offset += len;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_bytes_and_tell_zeroes() {
        let mut bytes = vec![0; 5 * ZERO_RUN_BYTES as usize];
        bytes[2 * ZERO_RUN_BYTES as usize + 77] = 1;
        let runs = runs_of(&bytes);
        let unit = ZERO_RUN_BYTES;
        let expected = [(0, 2, true), (2, 1, false), (3, 2, true)];
        let expected = expected.map(|(at, len, zero)| (ByteRange::new(at * unit, len * unit), zero));
        assert_eq!(runs, expected);
    }
}
