//! Reads.
//!
//! ```text
//!  arrive ─► wait for the sync of unsynced regions ─► lock (shared) ─► one replica ──ok──► reply, unlock
//!                  ▲                                     │ unsynced      │  ▲
//!                  └───────────── unlock ────────────────┘ meanwhile     └──┘ error: the next replica; none left: EIO
//! ```
//!
//! What must hold (promise 5): no byte of an unsynced region is answered; no read overlaps a write in
//! flight (the shared lock); only in-sync replicas are read. While a replica's leaving is not durable no read of a
//! dirty region begins: the region may have been unsynced when it left, and after a crash now the one that left
//! could be trusted again, even be the source.

use nix::errno::Errno;

use super::event::{Answer, DeviceOp, DeviceOutput, RequestError, RequestId};
use super::ops::OpOwner;
use super::overlap::{LockId, Mode};
use super::resync::JobEnd;
use super::slab::Key;
use super::{Mirror, Task};
use crate::buffer::Payload;
use crate::planted::{Bug, planted};
use crate::units::{ByteRange, ReplicaSet, ReplicaSlot, VolumeOffset};

/// A read on its way.
pub(super) struct ReadTask {
    id: RequestId,
    range: ByteRange,
    lock: Option<LockId>,
    tried: ReplicaSet,
    /// What was read from the replica: whole blocks around `range`.
    span: ByteRange,
}

impl Mirror {
    /// A client reads.
    pub(super) fn start_read(&mut self, id: RequestId, range: ByteRange) {
        if range.is_empty() {
            self.counters.reads += 1;
            self.reply(id, Ok(Answer::Done));
            return;
        }
        let task = ReadTask { id, range, lock: None, tried: ReplicaSet::EMPTY, span: range };
        let key = self.tasks.insert(Task::Read(task));
        self.read_lock(key);
    }

    /// Whether copies of some region that `range` touches may differ.
    pub(super) fn any_unsynced(&self, range: ByteRange) -> bool {
        self.unsynced_count > 0 && self.regions.touched(range).any(|region| self.unsynced[region.index()])
    }

    /// Queues the task for the first unsynced region in `range`, if there is one, and moves that to the front.
    pub(super) fn wait_for_sync(&mut self, key: Key, range: ByteRange) -> bool {
        if self.unsynced_count == 0 || self.config.read_only || planted(Bug::ReadStaleSide) {
            return false;
        }
        let Some(region) = self.regions.touched(range).find(|region| self.unsynced[region.index()]) else {
            return false;
        };
        self.resync.waiters.entry(region).or_default().push(key);
        self.want_region(region);
        true
    }

    pub(super) fn read_lock(&mut self, key: Key) {
        let range = self.read_task(key).range;
        if self.wait_for_sync(key, range) {
            return;
        }
        let (lock, granted) = self.locks.acquire(range, Mode::Shared, key);
        self.read_task(key).lock = Some(lock);
        if granted {
            self.read_granted(key);
        }
    }

    /// The lock is held.
    pub(super) fn read_granted(&mut self, key: Key) {
        let range = self.read_task(key).range;
        if self.any_unsynced(range) && !self.config.read_only && !planted(Bug::ReadStaleSide) {
            let Some(lock) = self.read_task(key).lock.take() else { unreachable!("granted just now") };
            self.unlock(lock);
            self.read_lock(key);
            return;
        }
        let unrecorded = (self.shrinking || self.broken)
            && self.regions.touched(range).any(|region| self.maps.intent[region.index()]);
        if !unrecorded {
            self.read_next(key);
        } else if self.broken {
            self.read_unrecorded(key);
        } else {
            self.held.push(key);
        }
    }

    /// Another replica may be trusted after a restart: an answer now might be taken back.
    pub(super) fn read_unrecorded(&mut self, key: Key) {
        self.read_finish(key, Err(RequestError::Io));
    }

    fn read_candidates(&self, range: ByteRange) -> ReplicaSet {
        if self.config.read_only && self.any_unsynced(range) {
            // Nothing is synced in a read-only volume: one fixed source answers.
            return ReplicaSet::only(self.source).intersection(self.in_sync);
        }
        if planted(Bug::ReadStaleReplica) { self.active() } else { self.readable() }
    }

    fn read_next(&mut self, key: Key) {
        let task = self.read_task(key);
        let (range, tried) = (task.range, task.tried);
        let candidates = self.read_candidates(range).difference(tried);
        if candidates.is_empty() {
            self.read_finish(key, Err(RequestError::Io));
            return;
        }
        let slot = self.policy.choose(candidates, range);
        let span = range.expanded_to(u64::from(self.replica(slot).traits.io_align));
        let task = self.read_task(key);
        task.tried.insert(slot);
        task.span = span;
        let buffer = self.pool.take(span.len as usize);
        let offset = VolumeOffset(span.offset).in_replica();
        self.issue(slot, OpOwner::Read(key), DeviceOp::Read { offset, len: span.len, buffer });
    }

    /// A replica answered, or not.
    pub(super) fn read_done(&mut self, key: Key, slot: ReplicaSlot, result: Result<DeviceOutput, Errno>) {
        match result {
            Ok(DeviceOutput::Read(_)) if !self.is_believed(slot) => self.read_granted(key),
            Ok(DeviceOutput::Read(buffer)) => {
                let task = self.read_task(key);
                let start = (task.range.offset - task.span.offset) as usize;
                let payload = Payload { buffer: buffer.share(), start, len: task.range.len as usize };
                self.read_finish(key, Ok(payload));
            }
            Ok(_) => unreachable!("a read gives its buffer back"),
            Err(errno) => {
                self.note_read_error(slot, errno);
                // The same questions as at first: the region may be unsynced by now, a replica's leaving not recorded.
                self.read_granted(key);
            }
        }
    }

    /// A region that the read waited for is synced, or cannot be.
    pub(super) fn read_sync_ended(&mut self, key: Key, end: JobEnd) {
        if end == JobEnd::Failed {
            self.read_finish(key, Err(RequestError::Io));
        } else {
            self.read_lock(key);
        }
    }

    fn read_finish(&mut self, key: Key, result: Result<Payload, RequestError>) {
        let Some(Task::Read(task)) = self.tasks.remove(key) else { unreachable!("a read finishes once") };
        if result.is_ok() {
            self.counters.reads += 1;
            self.counters.read_bytes += task.range.len;
        }
        self.reply(task.id, result.map(Answer::Data));
        if let Some(lock) = task.lock {
            self.unlock(lock);
        }
    }

    fn read_task(&mut self, key: Key) -> &mut ReadTask {
        let Some(Task::Read(task)) = self.tasks.get_mut(key) else { unreachable!("a read in flight") };
        task
    }
}
