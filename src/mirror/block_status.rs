//! BLOCK_STATUS: what the mirror knows of a range, as extents.
//!
//! `nbdmirror:state` and `nbdmirror:stale/N` come from the core's own maps at the moment of the answer. For
//! `base:allocation` a replica is asked, segment by segment:
//!
//! ```text
//!  ┌─► regions of whose content nobody may speak now ──► "data"                             (never waited for)
//!  │      (unsynced; or a membership change that is not recorded could take an answer back)
//!  ├─► the segment of others behind them ─► lock (shared) ─► ask a replica that may be read ─► unlock ──┐
//!  │                                                            │ error: ask another one; none: "data"  │
//!  └────────────────────────────────────────────────────────────────────────────────────────────────────┘
//!     the range's end, enough extents or enough questions ─► answer
//! ```
//!
//! What must hold: "data" is always true, for it promises nothing. "Reads as zero" is true like the answer to a read
//! (promise 5): it comes from a replica that reads may come from, under the same shared lock. Without the lock it
//! could come from a write of zeroes in flight, which may fail and be undone by a sync. The lock is held for one
//! question at a time: a long answer is put together from pieces, each true at a moment of its own.
//!
//! Bounds, whatever the volume: [`WALK_REGIONS_MAX`] regions and [`STEPS_MAX`] changes of the maps are looked at for one
//! answer, [`QUESTIONS_MAX`] times a replica is asked, [`EXTENTS_MAX`] extents are given; then the answer ends early.

use nix::errno::Errno;
use smallvec::SmallVec;

use super::event::{Answer, DeviceOp, DeviceOutput, RequestId};
use super::ops::OpOwner;
use super::overlap::{LockId, Mode};
use super::slab::Key;
use super::{Mirror, Task};
use crate::extent::{
    ContextExtents, ContextSet, EXTENTS_MAX, Extent, STALE_STALE, STATE_DIRTY, STATE_OUT_OF_SYNC,
    STATE_SYNCING, STATE_UNSYNCED, StatusContext, push_extent,
};
use crate::format::bitmap::Bitmap;
use crate::planted::{Bug, planted};
use crate::units::{ByteRange, RegionIndex, Regions, ReplicaSet, ReplicaSlot, VolumeOffset};

/// Regions looked at for one answer at the most: all of 64 TiB in regions of 64 MiB are 2^20, of 1 TiB in regions of
/// 64 KiB 2^24. A map of that many is 2 MiB, looked through by words.
const WALK_REGIONS_MAX: u64 = 1 << 24;
/// Changes in the maps that are followed for one answer, or for one segment of it.
const STEPS_MAX: usize = 1 << 18;
/// Replicas are asked so often for one answer.
const QUESTIONS_MAX: u32 = 64;

/// A BLOCK_STATUS that asks a replica.
pub(super) struct StatusTask {
    id: RequestId,
    range: ByteRange,
    contexts: ContextSet,
    one: bool,
    /// What is known of the allocation, from the range's first byte on.
    extents: Vec<Extent>,
    /// How far that reaches: a byte of the volume.
    known: u64,
    questions: u32,
    /// What is being asked for.
    segment: ByteRange,
    lock: Option<LockId>,
    tried: ReplicaSet,
}

/// One map, as runs of equal bits.
struct Runs<'a> {
    map: &'a Bitmap,
    /// What a set bit says.
    flag: u32,
    set: bool,
    /// The first region where it may change.
    until: u64,
}

/// Several maps at once, from region to region.
struct Walk<'a> {
    maps: SmallVec<[Runs<'a>; 4]>,
    /// Single regions, in order, and what is said of these.
    marked: SmallVec<[u64; 8]>,
    mark_flag: u32,
    at: u64,
    end: u64,
}

impl<'a> Walk<'a> {
    /// Over the regions that `range` (not empty) touches.
    fn new(regions: Regions, range: ByteRange) -> Self {
        let (at, end) = (regions.of(range.offset).0, regions.of(range.end() - 1).0 + 1);
        Self { maps: SmallVec::new(), marked: SmallVec::new(), mark_flag: 0, at, end }
    }

    fn add(&mut self, map: &'a Bitmap, flag: u32) {
        self.maps.push(Runs { map, flag, set: false, until: self.at });
    }
}

impl Iterator for Walk<'_> {
    /// Flags, and the first region behind those that have them.
    type Item = (u32, u64);

    fn next(&mut self) -> Option<(u32, u64)> {
        if self.at >= self.end {
            return None;
        }
        let (mut flags, mut until) = (0, self.end);
        for runs in &mut self.maps {
            if runs.until <= self.at {
                let rest = &runs.map[self.at as usize..self.end as usize];
                runs.set = rest[0];
                let len = if runs.set { rest.first_zero() } else { rest.first_one() };
                runs.until = len.map_or(self.end, |len| self.at + len as u64);
            }
            flags |= if runs.set { runs.flag } else { 0 };
            until = until.min(runs.until);
        }
        match self.marked.iter().find(|region| **region >= self.at) {
            Some(marked) if *marked == self.at => (flags, until) = (flags | self.mark_flag, self.at + 1),
            Some(marked) => until = until.min(*marked),
            None => {}
        }
        self.at = until;
        Some((flags, until))
    }
}

impl Mirror {
    /// A client asks for the status of a range.
    pub(super) fn start_block_status(
        &mut self,
        id: RequestId,
        range: ByteRange,
        contexts: ContextSet,
        one: bool,
    ) {
        if range.is_empty() {
            self.counters.block_statuses += 1;
            self.reply(id, Ok(Answer::Done));
            return;
        }
        let last = self.regions.of(range.offset).0.saturating_add(WALK_REGIONS_MAX - 1);
        let end = range.end().min(self.regions.range(RegionIndex(last.min(self.regions.count() - 1))).end());
        let task = StatusTask {
            id,
            range: ByteRange::new(range.offset, end - range.offset),
            contexts,
            one,
            extents: Vec::new(),
            known: range.offset,
            questions: 0,
            segment: ByteRange::new(range.offset, 0),
            lock: None,
            tried: ReplicaSet::EMPTY,
        };
        if contexts.contains(StatusContext::Allocation) {
            let key = self.tasks.insert(Task::Status(Box::new(task)));
            self.status_next(key);
        } else {
            self.status_reply(task);
        }
    }

    /// Regions of whose content nobody may speak now: a read of them would wait, or fail.
    fn opaque(&self, range: ByteRange) -> Walk<'_> {
        let mut walk = Walk::new(self.regions, range);
        if self.unsynced_count > 0 && !planted(Bug::UnsyncedAllocation) {
            walk.add(&self.unsynced, 1);
        }
        if self.shrinking || self.broken {
            walk.add(&self.maps.intent, 1);
        }
        walk
    }

    /// Goes on with what is not known yet.
    fn status_next(&mut self, key: Key) {
        let task = self.status_task(key);
        let (from, end) = (task.known, task.range.end());
        let enough = if task.one { 1 } else { EXTENTS_MAX };
        let mut segment = None;
        let mut known = from;
        if from < end && task.extents.len() <= enough && task.questions < QUESTIONS_MAX {
            let regions = self.regions;
            for (opaque, until) in self.opaque(ByteRange::new(from, end - from)).take(STEPS_MAX) {
                let until = (until * regions.region_bytes).min(end);
                if opaque == 0 {
                    segment = Some(ByteRange::new(known, until - known));
                    break;
                }
                known = until;
            }
        }
        let task = self.status_task(key);
        push_extent(&mut task.extents, known - from, 0);
        task.known = known;
        let Some(segment) = segment else {
            self.status_end(key);
            return;
        };
        (task.segment, task.tried) = (segment, ReplicaSet::EMPTY);
        let (lock, granted) = self.locks.acquire(segment, Mode::Shared, key);
        self.status_task(key).lock = Some(lock);
        if granted {
            self.status_granted(key);
        }
    }

    /// The segment is locked.
    pub(super) fn status_granted(&mut self, key: Key) {
        let task = self.status_task(key);
        let (segment, tried) = (task.segment, task.tried);
        if self.speakable(segment) == 0 {
            // It became so while this waited.
            self.status_unlock(key);
            self.status_next(key);
            return;
        }
        let all = if planted(Bug::AllocationOfResyncing) { self.active() } else { self.readable() };
        let candidates = all.difference(tried);
        if candidates.is_empty() {
            self.status_learn(key, &[Extent { len: segment.len, flags: 0 }]);
            return;
        }
        let mut slot = self.policy.prefer(candidates, segment);
        if planted(Bug::UnsyncedAllocation) {
            slot = candidates.iter().last().unwrap_or(slot);
        }
        let task = self.status_task(key);
        task.tried.insert(slot);
        task.questions += 1;
        let offset = VolumeOffset(segment.offset).in_replica();
        self.issue(slot, OpOwner::Status(key), DeviceOp::Allocation { offset, len: segment.len });
    }

    /// How many bytes from the beginning of `range` (not empty) somebody may speak of.
    fn speakable(&self, range: ByteRange) -> u64 {
        match self.opaque(range).next() {
            Some((0, until)) => (until * self.regions.region_bytes).min(range.end()) - range.offset,
            _ => 0,
        }
    }

    /// A replica has said where it has holes, or not. A failure is none of the replica: data that cannot be read will
    /// show that itself.
    pub(super) fn status_asked(&mut self, key: Key, slot: ReplicaSlot, result: Result<DeviceOutput, Errno>) {
        match result {
            // A hole where a write was: what a failed flush left. As for a read, another one is asked.
            Ok(DeviceOutput::Allocation(_)) if !self.is_believed(slot) => self.status_granted(key),
            Ok(DeviceOutput::Allocation(extents)) => self.status_learn(key, &extents),
            Ok(_) => unreachable!("a question for holes gives extents"),
            Err(_) => self.status_granted(key),
        }
    }

    /// What is known of the segment from its beginning on. Regions of which nobody may speak any more are left out.
    fn status_learn(&mut self, key: Key, extents: &[Extent]) {
        let segment = self.status_task(key).segment;
        let mut left = self.speakable(segment);
        let task = self.status_task(key);
        for extent in extents {
            let len = extent.len.min(left);
            push_extent(&mut task.extents, len, extent.flags);
            task.known += len;
            left -= len;
        }
        self.status_unlock(key);
        self.status_next(key);
    }

    fn status_unlock(&mut self, key: Key) {
        if let Some(lock) = self.status_task(key).lock.take() {
            self.unlock(lock);
        }
    }

    fn status_end(&mut self, key: Key) {
        let Some(Task::Status(task)) = self.tasks.remove(key) else { unreachable!("a status is told once") };
        assert!(task.lock.is_none());
        self.status_reply(*task);
    }

    fn status_reply(&mut self, task: StatusTask) {
        let StatusTask { id, range, contexts, one, extents, .. } = task;
        let enough = if one { 1 } else { EXTENTS_MAX };
        let mut allocation = Some(extents);
        let mut answers = Vec::new();
        for context in contexts.iter() {
            let mut extents = match context {
                StatusContext::Allocation => allocation.take().unwrap_or_default(),
                StatusContext::State => self.state_extents(range, enough),
                StatusContext::Stale(slot) => self.stale_extents(slot, range, enough),
            };
            extents.truncate(enough);
            assert!(!extents.is_empty(), "an answer gets on");
            answers.push(ContextExtents { context, extents });
        }
        self.counters.block_statuses += 1;
        self.reply(id, Ok(Answer::Status(answers)));
    }

    /// The mirror's health, from the maps.
    fn state_extents(&self, range: ByteRange, enough: usize) -> Vec<Extent> {
        let mut walk = Walk::new(self.regions, range);
        if !planted(Bug::DirtyNotShown) {
            walk.add(&self.maps.intent, STATE_DIRTY);
        }
        if self.unsynced_count > 0 {
            walk.add(&self.unsynced, STATE_UNSYNCED);
        }
        for slot in self.members().iter().filter(|slot| self.stale_count[slot.index()] > 0) {
            walk.add(&self.maps.stale[slot.index()], STATE_OUT_OF_SYNC);
        }
        let (first, end) = (RegionIndex(walk.at), RegionIndex(walk.end));
        walk.marked = self.resync.active.range(first..end).map(|(region, _)| region.0).collect();
        walk.mark_flag = STATE_SYNCING;
        self.extents_of(walk, range, enough)
    }

    /// What the replica in `slot` misses; nothing where there is none.
    fn stale_extents(&self, slot: ReplicaSlot, range: ByteRange, enough: usize) -> Vec<Extent> {
        let mut walk = Walk::new(self.regions, range);
        let hidden = planted(Bug::StaleMapNotShown) && !self.active().contains(slot);
        if self.members().contains(slot) && self.stale_count[slot.index()] > 0 && !hidden {
            walk.add(&self.maps.stale[slot.index()], STALE_STALE);
        }
        self.extents_of(walk, range, enough)
    }

    /// The walk as extents of `range`, as many as there are or one more than `enough`.
    fn extents_of(&self, walk: Walk<'_>, range: ByteRange, enough: usize) -> Vec<Extent> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        for (flags, until) in walk.take(STEPS_MAX) {
            let until = (until * self.regions.region_bytes).min(range.end());
            push_extent(&mut extents, until - at, flags);
            at = until;
            if extents.len() > enough {
                break;
            }
        }
        extents
    }

    fn status_task(&mut self, key: Key) -> &mut StatusTask {
        let Some(Task::Status(task)) = self.tasks.get_mut(key) else { unreachable!("a status in flight") };
        task
    }
}
