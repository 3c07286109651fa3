//! Writes, writes of zeroes and trims.
//!
//! ```text
//!  arrive ─► [wait for sync: only where edges must be read] ─► lock (exclusive) ─► fill edges ─► intent durable
//!     ─► data to every active replica ─► all answered:
//!          an in-sync one has it   ─► fail those that do not ─► [FUA flush] ─► hold until settled ─► reply, unlock
//!          no in-sync one has it   ─► regions unsynced ──────────────────────► hold until settled ─► error, unlock
//! ```
//!
//! What must hold: promises 1, 2 and 3. The lock is kept until the reply, so nobody reads data that is not
//! settled. A trim makes its inner whole blocks read as zeroes on every replica, or does nothing on any.

use nix::errno::Errno;
use smallvec::SmallVec;

use super::event::{Answer, DeviceOp, DeviceOutput, RequestError, RequestId};
use super::flush::FlushOwner;
use super::intent::is_out_of_space;
use super::ops::OpOwner;
use super::overlap::{LockId, Mode};
use super::slab::Key;
use super::{Mirror, Task};
use crate::buffer::{Buffer, Payload, UniquePayload};
use crate::planted::{Bug, planted};
use crate::units::{BLOCK_BYTES, ByteRange, RegionIndex, ReplicaSet, ReplicaSlot, VolumeOffset};

/// What is written.
pub(super) enum Content {
    /// These bytes, being put together.
    Filling(UniquePayload),
    /// These bytes, whole blocks, ready.
    Data(Payload),
    /// Zeroes.
    Zeroes {
        /// Whether the space may be given back.
        may_unmap: bool,
    },
}

/// What the client asked for, for the counters.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Write,
    Zeroes,
    Trim,
}

/// A block at the edge of a write that the write covers in part: the rest is read first.
pub(super) struct Edge {
    block: ByteRange,
    content: Option<Buffer>,
    tried: ReplicaSet,
}

/// A write on its way.
pub(super) struct WriteTask {
    id: RequestId,
    asked: Asked,
    /// What the client named.
    range: ByteRange,
    /// Whole blocks around it: what is locked and written.
    pub(super) span: ByteRange,
    content: Content,
    fua: bool,
    lock: Option<LockId>,
    edges: SmallVec<[Edge; 2]>,
    edges_to_read: usize,
    edge_error: bool,
    /// Counted in `region_words`.
    counted: bool,
    operations: usize,
    targets: ReplicaSet,
    failed: SmallVec<[(ReplicaSlot, Errno); 2]>,
    result: Result<(), RequestError>,
}

/// The blocks of `unit` bytes at the edges of `range` that it covers in part.
fn edge_blocks(range: ByteRange, unit: u64) -> SmallVec<[Edge; 2]> {
    let edge = |start| Edge { block: ByteRange::new(start, unit), content: None, tried: ReplicaSet::EMPTY };
    let mut edges = SmallVec::new();
    let span = range.expanded_to(unit);
    if range.offset != span.offset {
        edges.push(edge(span.offset));
    }
    let last = span.end() - unit;
    if range.end() != span.end() && (edges.is_empty() || last != span.offset) {
        edges.push(edge(last));
    }
    edges
}

impl Mirror {
    /// A client writes. Zero-length requests are answered at once.
    pub(super) fn start_write(&mut self, id: RequestId, offset: u64, data: UniquePayload, fua: bool) {
        let range = ByteRange::new(offset, data.len as u64);
        let unit = self.io_align;
        self.begin_write((id, Asked::Write), range, unit, Content::Filling(data), fua);
    }

    /// A client writes zeroes; `fast`: not at all rather than by writing them out on some replica.
    pub(super) fn start_zeroes(
        &mut self,
        id: RequestId,
        range: ByteRange,
        (may_unmap, fast): (bool, bool),
        fua: bool,
    ) {
        let refused = fast && !self.config.read_only && !self.broken && !self.zeroing_is_fast(may_unmap);
        if refused && !planted(Bug::FastZeroTooLate) {
            self.reply(id, Err(RequestError::NotSupported));
            return;
        }
        let content = Content::Zeroes { may_unmap };
        let begun = self.begin_write((id, Asked::Zeroes), range, BLOCK_BYTES, content, fua);
        if refused && let Some(key) = begun {
            // The planted bug: what it answers, once it is carried out.
            self.write_task(key).result = Err(RequestError::NotSupported);
        }
    }

    /// A client trims: whole blocks are zeroed where every replica can do that cheaply, else nothing happens.
    pub(super) fn start_trim(&mut self, id: RequestId, range: ByteRange, fua: bool) {
        let inner = if self.zeroing_is_cheap() { range.shrunk_to(BLOCK_BYTES) } else { ByteRange::new(0, 0) };
        self.begin_write((id, Asked::Trim), inner, BLOCK_BYTES, Content::Zeroes { may_unmap: true }, fua);
    }

    /// `None`: answered already.
    fn begin_write(
        &mut self,
        (id, asked): (RequestId, Asked),
        range: ByteRange,
        unit: u64,
        content: Content,
        fua: bool,
    ) -> Option<Key> {
        if self.config.read_only {
            self.reply(id, Err(RequestError::ReadOnly));
            return None;
        }
        if self.broken {
            self.reply(id, Err(RequestError::Io));
            return None;
        }
        if range.is_empty() {
            self.count_write(asked, 0);
            self.reply(id, Ok(Answer::Done));
            return None;
        }
        let edges = edge_blocks(range, unit);
        let task = WriteTask {
            id,
            asked,
            range,
            span: range.expanded_to(unit),
            content,
            fua,
            lock: None,
            edges_to_read: edges.len(),
            edges,
            edge_error: false,
            counted: false,
            operations: 0,
            targets: ReplicaSet::EMPTY,
            failed: SmallVec::new(),
            result: Ok(()),
        };
        let key = self.tasks.insert(Task::Write(task));
        self.write_lock(key);
        Some(key)
    }

    /// Waits for the sync of regions whose bytes must be read, then for the lock.
    pub(super) fn write_lock(&mut self, key: Key) {
        let task = self.write_task(key);
        let (span, reads) = (task.span, !task.edges.is_empty());
        if reads && self.wait_for_sync(key, span) {
            return;
        }
        let (lock, granted) = self.locks.acquire(span, Mode::Exclusive, key);
        self.write_task(key).lock = Some(lock);
        if granted || planted(Bug::OverlapRace) {
            self.write_granted(key);
        }
    }

    /// The lock is held.
    pub(super) fn write_granted(&mut self, key: Key) {
        let task = self.write_task(key);
        if task.operations > 0 || task.counted {
            assert!(planted(Bug::OverlapRace), "a lock is granted once");
            return;
        }
        let span = task.span;
        let edges: SmallVec<[ByteRange; 2]> = task.edges.iter().map(|edge| edge.block).collect();
        if edges.is_empty() {
            self.write_intent(key);
            return;
        }
        if self.any_unsynced(span) && !planted(Bug::ReadStaleSide) {
            // It became so while this waited. Waiting for a sync with the lock held could wait for ever.
            let Some(lock) = self.write_task(key).lock.take() else { unreachable!("granted just now") };
            self.unlock(lock);
            self.write_lock(key);
            return;
        }
        for edge in 0..edges.len() {
            self.read_edge(key, edge);
        }
    }

    fn read_edge(&mut self, key: Key, index: usize) {
        let edge = &self.write_task(key).edges[index];
        let (block, tried) = (edge.block, edge.tried);
        let candidates = self.readable().difference(tried);
        if candidates.is_empty() {
            let task = self.write_task(key);
            task.edge_error = true;
            self.edge_settled(key);
            return;
        }
        let slot = self.policy.choose(candidates, block);
        self.write_task(key).edges[index].tried.insert(slot);
        let buffer = self.pool.take(block.len as usize);
        let offset = VolumeOffset(block.offset).in_replica();
        self.issue(slot, OpOwner::Edge(key, index), DeviceOp::Read { offset, len: block.len, buffer });
    }

    /// An edge block was read, or not.
    pub(super) fn edge_done(
        &mut self,
        key: Key,
        index: usize,
        slot: ReplicaSlot,
        result: Result<DeviceOutput, Errno>,
    ) {
        match result {
            Ok(DeviceOutput::Read(_)) if !self.is_believed(slot) => self.read_edge(key, index),
            Ok(DeviceOutput::Read(buffer)) => {
                self.write_task(key).edges[index].content = Some(buffer);
                self.edge_settled(key);
            }
            Ok(_) => unreachable!("a read gives its buffer back"),
            Err(errno) => {
                self.note_read_error(slot, errno);
                self.read_edge(key, index);
            }
        }
    }

    fn edge_settled(&mut self, key: Key) {
        let task = self.write_task(key);
        task.edges_to_read -= 1;
        if task.edges_to_read > 0 {
            return;
        }
        if task.edge_error {
            task.result = Err(RequestError::Io);
            self.write_answer(key);
            return;
        }
        task.fill_edges();
        self.write_intent(key);
    }

    /// Sets intent bits and waits until they are durable.
    pub(super) fn write_intent(&mut self, key: Key) {
        let task = self.write_task(key);
        let (span, counted) = (task.span, task.counted);
        task.counted = true;
        if !counted {
            for region in self.regions.touched(span) {
                self.region_words.begin_write(region);
            }
        }
        if self.broken {
            self.write_intent_failed(key, RequestError::Io);
        } else if self.config.without_intent || self.ensure_intent(key, span) {
            self.write_dispatch(key);
        }
    }

    /// The bits could not be made durable: nothing was written.
    pub(super) fn write_intent_failed(&mut self, key: Key, error: RequestError) {
        self.write_task(key).result = Err(error);
        self.write_answer(key);
    }

    fn write_dispatch(&mut self, key: Key) {
        let targets = self.active();
        // Not `io_align`: that may be a coming replica's already.
        let align =
            targets.iter().map(|slot| u64::from(self.replica(slot).traits.io_align)).max().unwrap_or(1);
        let task = self.write_task(key);
        if let Content::Filling(_) = task.content {
            task.finish_data();
        }
        assert!(task.span.is_aligned(align.min(BLOCK_BYTES)), "a replica with a larger alignment waits");
        task.targets = targets;
        let durable = task.fua && !planted(Bug::FuaIgnored);
        let mut parts: SmallVec<[(ByteRange, Option<Payload>, bool); 3]> = SmallVec::new();
        match &task.content {
            Content::Data(data) => parts.push((task.span, Some(data.clone()), durable)),
            Content::Zeroes { may_unmap } => {
                let middle = task.range.shrunk_to(BLOCK_BYTES);
                if !middle.is_empty() {
                    parts.push((middle, None, *may_unmap));
                }
                for edge in &mut task.edges {
                    let Some(buffer) = edge.content.take() else { unreachable!("edges are filled") };
                    let data = Payload { buffer: buffer.share(), start: 0, len: edge.block.len as usize };
                    parts.push((edge.block, Some(data), false));
                }
            }
            Content::Filling(_) => unreachable!("finished above"),
        }
        task.operations = parts.len() * targets.len();
        if task.operations == 0 {
            self.write_settle(key);
            return;
        }
        for slot in targets.iter() {
            for (range, data, flag) in &parts {
                let offset = VolumeOffset(range.offset).in_replica();
                let request = match data {
                    Some(data) => DeviceOp::Write { offset, data: data.clone(), durable: *flag },
                    None if planted(Bug::ZeroOneReplica) && Some(slot) != targets.first() => {
                        DeviceOp::ProbeHole { offset, len: range.len }
                    }
                    None => DeviceOp::Zero { offset, len: range.len, may_unmap: *flag },
                };
                self.issue(slot, OpOwner::Write(key), request);
            }
        }
    }

    /// One replica's part (or a part of it) has ended.
    pub(super) fn write_op_done(&mut self, key: Key, slot: ReplicaSlot, result: Result<(), Errno>) {
        let active = self.active().contains(slot);
        let task = self.write_task(key);
        assert!(task.operations > 0);
        task.operations -= 1;
        match result {
            Ok(()) => {}
            // Failed meanwhile, and maybe taken back before this write is settled: no fault of its new self.
            Err(_) if !active => task.targets.remove(slot),
            Err(errno) if !task.failed.iter().any(|(failed, _)| *failed == slot) => {
                task.failed.push((slot, errno));
            }
            Err(_) => {}
        }
        if task.operations == 0 {
            self.write_settle(key);
        }
    }

    /// Every replica has answered.
    fn write_settle(&mut self, key: Key) {
        let active = self.active();
        let task = self.write_task(key);
        let failed: SmallVec<[(ReplicaSlot, Errno); 2]> =
            task.failed.iter().copied().filter(|(slot, _)| active.contains(*slot)).collect();
        let failed_set: ReplicaSet = task.failed.iter().map(|(slot, _)| *slot).collect();
        let ok = task.targets.difference(failed_set).intersection(active);
        let (span, fua) = (task.span, task.fua);
        let zeroes = matches!(task.content, Content::Zeroes { .. });
        if ok.intersection(self.in_sync).is_empty() {
            let error = self.write_failed_everywhere(span, ok, &failed);
            self.write_task(key).result = Err(error);
            self.write_answer(key);
            return;
        }
        for (slot, errno) in failed {
            self.fail_on_error(slot, errno, "a write failed");
        }
        let flush_lost = ok.intersection(self.in_sync).iter().all(|slot| self.replica(slot).flush_failed);
        if fua && flush_lost {
            // Nothing on these replicas can be vouched for any more.
            self.write_task(key).result = Err(RequestError::Io);
            self.write_answer(key);
        } else if fua && zeroes && !planted(Bug::FuaIgnored) {
            self.request_flush(ok, FlushOwner::Write(key));
        } else {
            self.write_answer(key);
        }
    }

    /// No in-sync replica has the write: nobody is better than the others, so nobody in sync is failed. What
    /// each holds now may differ.
    fn write_failed_everywhere(
        &mut self,
        span: ByteRange,
        ok: ReplicaSet,
        failed: &[(ReplicaSlot, Errno)],
    ) -> RequestError {
        for (slot, errno) in failed {
            if self.resyncing.contains(*slot) {
                self.fail_on_error(*slot, *errno, "a write failed");
            }
        }
        let regions: Vec<RegionIndex> = self.regions.touched(span).collect();
        for slot in ok.intersection(self.resyncing).iter() {
            for region in &regions {
                self.set_stale(slot, *region);
            }
        }
        self.mark_unsynced(&regions);
        let full = !failed.is_empty() && failed.iter().all(|(_, errno)| is_out_of_space(*errno));
        if full { RequestError::NoSpace } else { RequestError::Io }
    }

    /// The flush of a FUA write of zeroes has ended.
    pub(super) fn write_flushed(&mut self, key: Key, ok: bool) {
        if !ok {
            self.write_task(key).result = Err(RequestError::Io);
        }
        self.write_answer(key);
    }

    /// Answers, or holds the answer until every membership change is durable.
    fn write_answer(&mut self, key: Key) {
        if self.settled() || planted(Bug::AckBeforeMembership) {
            self.write_finish(key);
        } else {
            self.held.push(key);
        }
    }

    /// The change that a write waited for cannot be recorded.
    pub(super) fn write_unrecorded(&mut self, key: Key) {
        let task = self.write_task(key);
        if task.result.is_ok() {
            task.result = Err(RequestError::Io);
        }
        self.write_finish(key);
    }

    /// Replies and lets go.
    pub(super) fn write_finish(&mut self, key: Key) {
        let Some(Task::Write(task)) = self.tasks.remove(key) else { unreachable!("a write finishes once") };
        if task.counted {
            for region in self.regions.touched(task.span) {
                self.region_words.end_write(region);
            }
        }
        if task.result.is_ok() {
            self.count_write(task.asked, task.range.len);
        }
        self.reply(task.id, task.result.map(|()| Answer::Done));
        if let Some(lock) = task.lock {
            self.unlock(lock);
        }
    }

    fn count_write(&mut self, asked: Asked, bytes: u64) {
        match asked {
            Asked::Write => {
                self.counters.writes += 1;
                self.counters.write_bytes += bytes;
            }
            Asked::Zeroes => self.counters.zeroes += 1,
            Asked::Trim => self.counters.trims += 1,
        }
    }

    pub(super) fn write_task(&mut self, key: Key) -> &mut WriteTask {
        let Some(Task::Write(task)) = self.tasks.get_mut(key) else { unreachable!("a write in flight") };
        task
    }
}

impl WriteTask {
    /// Puts what was read around the client's bytes.
    fn fill_edges(&mut self) {
        match &mut self.content {
            Content::Filling(data) => {
                // `start` is the offset modulo 4096, so this is where the span begins in the buffer.
                let base = data.start - (self.range.offset - self.span.offset) as usize;
                for edge in &mut self.edges {
                    let Some(content) = edge.content.take() else { unreachable!("every edge was read") };
                    let head =
                        self.range.offset.saturating_sub(edge.block.offset).min(edge.block.len) as usize;
                    let at = base + (edge.block.offset - self.span.offset) as usize;
                    data.buffer[at..at + head].copy_from_slice(&content[..head]);
                    if self.range.end() < edge.block.end() {
                        let tail = (self.range.end() - edge.block.offset) as usize;
                        let end = edge.block.len as usize;
                        data.buffer[at + tail..at + end].copy_from_slice(&content[tail..end]);
                    }
                }
            }
            Content::Zeroes { .. } => {
                for edge in &mut self.edges {
                    let Some(content) = &mut edge.content else { unreachable!("every edge was read") };
                    let from = self.range.offset.max(edge.block.offset) - edge.block.offset;
                    let to = self.range.end().min(edge.block.end()) - edge.block.offset;
                    content[from as usize..to as usize].fill(0);
                }
            }
            Content::Data(_) => unreachable!("edges are filled before the data is shared"),
        }
    }

    /// Widens the payload to the span and shares it.
    fn finish_data(&mut self) {
        let Content::Filling(mut data) =
            std::mem::replace(&mut self.content, Content::Zeroes { may_unmap: false })
        else {
            unreachable!("asked once")
        };
        data.start -= (self.range.offset - self.span.offset) as usize;
        data.len = self.span.len as usize;
        assert!(data.start + data.len <= data.buffer.len());
        self.content = Content::Data(data.share());
    }
}
