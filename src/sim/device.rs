//! Device operations: submitted by the core, applied to the simulated disk at some moment, answered later.
//!
//! ```text
//!  submit ──(latency)──► apply: reads see, writes land, flushes settle ──(latency)──► complete: the core is told
//!    └── promises 1 and 3 are checked here        └── faults decide here
//! ```

use nix::errno::Errno;

use crate::buffer::Buffer;
use crate::extent::{ALLOCATION_HOLE, ALLOCATION_ZERO, Extent, push_extent};
use crate::mirror::event::{DeviceOp, DeviceOutput, Event, OpId};
use crate::units::{BLOCK_BYTES, ByteRange, ReplicaSlot, SECOND_NS};

use super::client::Pending;
use super::counts::{DeviceKind, FaultKind};
use super::disk::{Disk, FlushMark, WriteSeq};
use super::rng::Rng;
use super::world::{Checked, OpKey, Wake, World, op_key, violated};

/// What the operation does, with what it needs.
pub enum Kind {
    /// Read into the buffer.
    Read(Option<Buffer>),
    /// Write these bytes.
    Write {
        /// A copy of the payload at submission: it must not change afterwards.
        data: Vec<u8>,
        /// The payload itself, kept until completion as the kernel would.
        payload: crate::buffer::Payload,
        /// On stable storage when complete.
        durable: bool,
        /// Names it on the disk.
        seq: WriteSeq,
    },
    /// Zeroes.
    Zero(WriteSeq),
    /// Flush what this covers.
    Flush(FlushMark),
    /// Look for a hole.
    ProbeHole,
    /// Warm up: nothing happens.
    Cache,
    /// Look for holes: what was found.
    Allocation(Vec<Extent>),
}

/// A device operation in flight.
pub struct Op {
    /// On which replica.
    pub slot: ReplicaSlot,
    /// On which disk.
    pub disk: usize,
    /// Which bytes (empty for a flush).
    pub range: ByteRange,
    /// What.
    pub kind: Kind,
    /// Its result, once it took effect.
    pub result: Option<Result<bool, Errno>>,
}

impl Op {
    /// Whether it writes.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(self.kind, Kind::Write { .. } | Kind::Zero(_))
    }

    /// Whether it neither reads nor writes: a flush, a question for holes, a prefetch.
    #[must_use]
    pub fn is_question_or_flush(&self) -> bool {
        matches!(self.kind, Kind::Flush(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_))
    }

    /// The byte that it writes at `at` from its beginning.
    #[must_use]
    pub fn byte(&self, at: usize) -> u8 {
        match &self.kind {
            Kind::Write { data, .. } => data[at],
            _ => 0,
        }
    }

    /// The part of it (from its beginning) that `pending` names too, where all of that is what `pending` writes.
    pub(super) fn part_of(&self, pending: &Pending) -> Option<std::ops::Range<usize>> {
        let start = self.range.offset.max(pending.range.offset);
        let end = self.range.end().min(pending.range.end());
        let part = (start - self.range.offset) as usize..end.checked_sub(self.range.offset)? as usize;
        let same = match &self.kind {
            Kind::Write { data, .. } => pending.value.matches(start, data.get(part.clone())?),
            _ => pending.value.zero,
        };
        same.then_some(part)
    }

    fn counted(&self) -> DeviceKind {
        match &self.kind {
            Kind::Read(_) => DeviceKind::Read,
            Kind::Write { durable: true, .. } => DeviceKind::DurableWrite,
            Kind::Write { .. } => DeviceKind::Write,
            Kind::Zero(_) => DeviceKind::Zero,
            Kind::Flush(_) => DeviceKind::Flush,
            Kind::ProbeHole => DeviceKind::Probe,
            Kind::Cache => DeviceKind::Cache,
            Kind::Allocation(_) => DeviceKind::Allocation,
        }
    }

    pub(super) fn name(&self) -> String {
        let (at, len) = (self.range.offset, self.range.len);
        match &self.kind {
            Kind::Read(_) => format!("read {at}+{len}"),
            Kind::Write { durable, .. } => {
                format!("write {at}+{len}{}", if *durable { " durable" } else { "" })
            }
            Kind::Zero(_) => format!("zero {at}+{len}"),
            Kind::Flush(_) => "flush".to_owned(),
            Kind::ProbeHole => format!("probe {at}+{len}"),
            Kind::Cache => format!("cache {at}+{len}"),
            Kind::Allocation(_) => format!("allocation {at}+{len}"),
        }
    }
}

/// Where `range` has holes by the disk's word: it may call a hole data, and say less than it was asked for.
fn survey(disk: &Disk, range: ByteRange, rng: &mut Rng) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut at = range.offset;
    let ends = disk.present_blocks(range).map(|block| (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES));
    for (start, end) in ends.chain([(range.end(), range.end())]) {
        let (start, end) = (start.max(at), end.min(range.end()));
        let flags = if rng.per_mille(100) { 0 } else { ALLOCATION_HOLE | ALLOCATION_ZERO };
        push_extent(&mut extents, start - at, flags);
        push_extent(&mut extents, end - start, 0);
        at = end;
    }
    if rng.per_mille(100) {
        extents.truncate(rng.between(1, 4) as usize);
    }
    extents
}

/// A disk that is slow for a while is this many times slower.
const SLOW_FACTOR: u64 = 30;

/// How a write that is cut short lands.
#[derive(Clone, Copy)]
enum Landing {
    Whole,
    Nothing,
    Torn,
}

impl World {
    /// The core submits an operation.
    pub(super) fn submit(&mut self, id: OpId, slot: ReplicaSlot, request: DeviceOp) -> Checked {
        let Some(disk) = self.disk_of(slot) else {
            return violated("protocol", format!("operation on slot {slot}, which is not attached"));
        };
        let op = self.make_op(slot, disk, request);
        self.counts.device_op(op.counted());
        self.trace(|| format!("op {} on slot {slot} (disk {disk}): {}", id.0, op.name()));
        self.check_geometry(&op)?;
        self.promise_3_one_order(&op)?;
        self.promise_1_intent_before_data(&op)?;
        self.promise_7_only_from_in_sync(&op)?;
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let life = daemon.life;
        if daemon.ops.insert(op_key(id), op).is_some() {
            return violated("protocol", format!("op {} is in flight already", id.0));
        }
        if self.manual {
            return Ok(());
        }
        let (first, second) = self.latencies(disk);
        self.wake_in(first, Wake::Apply(life, op_key(id)));
        self.wake_in(first + second, Wake::Complete(life, op_key(id)));
        Ok(())
    }

    fn make_op(&mut self, slot: ReplicaSlot, disk: usize, request: DeviceOp) -> Op {
        let target = &mut self.disks[disk].disk;
        let (range, kind) = match request {
            DeviceOp::Read { offset, len, buffer } => {
                (ByteRange::new(offset.0, len), Kind::Read(Some(buffer)))
            }
            DeviceOp::Write { offset, data, durable } => {
                let seq = target.begin_write();
                let bytes = data.bytes().to_vec();
                let range = ByteRange::new(offset.0, bytes.len() as u64);
                (range, Kind::Write { data: bytes, payload: data, durable, seq })
            }
            DeviceOp::Zero { offset, len, .. } => {
                (ByteRange::new(offset.0, len), Kind::Zero(target.begin_write()))
            }
            DeviceOp::Flush => (ByteRange::new(0, 0), Kind::Flush(target.flush_mark())),
            DeviceOp::ProbeHole { offset, len } => (ByteRange::new(offset.0, len), Kind::ProbeHole),
            DeviceOp::Cache { offset, len } => (ByteRange::new(offset.0, len), Kind::Cache),
            DeviceOp::Allocation { offset, len } => (ByteRange::new(offset.0, len), Kind::Allocation(vec![])),
        };
        Op { slot, disk, range, kind, result: None }
    }

    fn check_geometry(&self, op: &Op) -> Checked {
        let align = match op.kind {
            Kind::Read(_) | Kind::Write { .. } => u64::from(self.disks[op.disk].traits.io_align),
            Kind::Zero(_) => BLOCK_BYTES,
            Kind::Flush(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => return Ok(()),
        };
        let fits = op.range.end() <= self.disks[op.disk].disk.bytes() && !op.range.is_empty();
        if op.writes() && (self.read_only || self.disks[op.disk].foreign) {
            let (name, why) = (op.name(), if self.read_only { "read-only" } else { "another volume's" });
            return violated("promise_8_foreign_untouched", format!("{name} on a replica that is {why}"));
        }
        let volume = self.plan.volume_bytes;
        if op.range.offset < volume && op.range.end() > volume {
            return violated("promise_10_the_data_is_yours", format!("{} is data and metadata", op.name()));
        }
        if !op.range.is_aligned(align) || !fits {
            return violated("protocol", format!("{} is not aligned to {align} or does not fit", op.name()));
        }
        Ok(())
    }

    fn latencies(&mut self, disk: usize) -> (u64, u64) {
        let target = &self.disks[disk];
        let stuck_ns = target.stuck_until.since(self.now);
        let slow_now = if target.slow_until > self.now { SLOW_FACTOR } else { 1 };
        let base = self.plan.latency_ns * target.slow_factor * slow_now;
        let rng = &mut self.rng;
        let (first, mut second) = (rng.between(1, base), rng.between(1, base));
        if rng.per_mille(10) {
            second += base * rng.between(1, 20);
        }
        if self.chaos && self.victim == Some(disk) && self.is_due(FaultKind::Hang) {
            second += self.rng.between(SECOND_NS / 10, 5 * SECOND_NS);
            self.counts.fault(FaultKind::Hang);
        }
        // A disk that is stuck takes some operations in at once and answers all of them late.
        if self.rng.coin() { (first + stuck_ns, second) } else { (first, second + stuck_ns) }
    }

    /// An operation takes effect.
    pub(super) fn apply_op(&mut self, key: OpKey) {
        let Some(mut op) = self.daemon.as_mut().and_then(|daemon| daemon.ops.remove(&key)) else { return };
        let result = match self.fault_for(&op) {
            Some((errno, kind)) => {
                self.counts.fault(kind);
                let touched = self.daemon.iter().flat_map(|daemon| daemon.requests.keys().copied());
                self.troubled.extend(touched);
                self.fail_op(&mut op, errno);
                Err(errno)
            }
            None => Ok(self.do_op(&mut op)),
        };
        op.result = Some(result);
        if let Some(daemon) = &mut self.daemon {
            daemon.ops.insert(key, op);
        }
    }

    fn do_op(&mut self, op: &mut Op) -> bool {
        let disk = &mut self.disks[op.disk].disk;
        match &mut op.kind {
            Kind::Read(buffer) => {
                if let Some(buffer) = buffer {
                    disk.read(op.range.offset, &mut buffer[..op.range.len as usize]);
                }
            }
            Kind::Write { data, durable, seq, .. } => {
                disk.apply(*seq, op.range.offset, data, |_| true);
                if *durable {
                    disk.make_durable(*seq);
                }
            }
            Kind::Zero(seq) => disk.apply_zero(*seq, op.range, |_| true),
            Kind::Flush(mark) => disk.flush(mark),
            Kind::Cache => {}
            Kind::Allocation(extents) => *extents = survey(disk, op.range, &mut self.rng),
            Kind::ProbeHole => return disk.is_hole(op.range) && (self.manual || self.rng.per_mille(900)),
        }
        false
    }

    fn fail_op(&mut self, op: &mut Op, errno: Errno) {
        let partly = errno == Errno::EIO || errno == Errno::ENOSPC;
        let landing =
            if partly { self.rng.pick(&[Landing::Nothing, Landing::Torn]) } else { Landing::Nothing };
        if let Kind::Flush(mark) = &op.kind {
            if errno == Errno::EIO && self.plan.faults.has(FaultKind::FlushLosesCache) {
                let lone = self.in_sync_disks().iter().all(|disk| *disk == op.disk);
                self.disks[op.disk].disk.lose_cache(mark);
                self.counts.fault(FaultKind::FlushLosesCache);
                if lone || !self.plan.within_model {
                    self.oracle.cache_lost();
                }
            }
        } else {
            self.land(op, landing);
        }
    }

    fn land(&mut self, op: &mut Op, landing: Landing) {
        if op.writes() && matches!(landing, Landing::Torn) {
            self.counts.fault(FaultKind::TornWrite);
        }
        let disk = &mut self.disks[op.disk].disk;
        let rng = &mut self.rng;
        let mut keep = |_| match landing {
            Landing::Whole => true,
            Landing::Nothing => false,
            Landing::Torn => rng.coin(),
        };
        match &op.kind {
            Kind::Write { data, seq, .. } => disk.apply(*seq, op.range.offset, data, &mut keep),
            Kind::Zero(seq) => disk.apply_zero(*seq, op.range, &mut keep),
            Kind::Read(_) | Kind::Flush(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => {}
        }
    }

    /// The daemon died while this was in flight: it may have happened, wholly or in part.
    pub(super) fn interrupt(&mut self, mut op: Op) {
        let lost = op.result == Some(Err(Errno::EIO)) && self.plan.faults.has(FaultKind::FlushLosesCache);
        let lost = lost && matches!(op.kind, Kind::Flush(_));
        self.disks[op.disk].unseen_error |= lost;
        self.disks[op.disk].failed_alone |= lost && self.holders == [op.disk];
        if op.result.is_some() || self.disks[op.disk].gone {
            return;
        }
        let landing = self.rng.pick(&[Landing::Nothing, Landing::Whole, Landing::Torn]);
        self.land(&mut op, landing);
    }

    /// A flush that lost what it was to flush may end with the pages dropped. Where another replica is in sync and well,
    /// nobody may read that: whoever hears of the failure answers from the other one.
    fn turn_back(&mut self, op: &Op) {
        let flush_failed = matches!(op.kind, Kind::Flush(_)) && op.result == Some(Err(Errno::EIO));
        let rates = &self.plan.faults;
        let turns_back = rates.has(FaultKind::FlushLosesCache) && rates.has(FaultKind::FlushTurnsBack);
        let turns_back = turns_back && self.plan.within_model;
        if flush_failed && turns_back && self.in_sync_disks().iter().any(|disk| *disk != op.disk) {
            self.disks[op.disk].disk.turn_back();
            self.counts.fault(FaultKind::FlushTurnsBack);
        }
    }

    /// An operation is answered.
    pub(super) fn complete_op(&mut self, key: OpKey) -> Checked {
        let Some(op) = self.daemon.as_mut().and_then(|daemon| daemon.ops.remove(&key)) else {
            return Ok(());
        };
        self.trace(|| format!("op {key} on slot {}: {} -> {:?}", op.slot, op.name(), op.result));
        if let Kind::Write { seq, .. } | Kind::Zero(seq) = &op.kind {
            self.disks[op.disk].disk.complete_write(*seq);
        }
        self.turn_back(&op);
        let flush_failed = matches!((&op.kind, &op.result), (Kind::Flush(_), Some(Err(_))));
        // Now and not when it was sent: others may have left since.
        if flush_failed && self.in_sync_disks().iter().all(|disk| *disk == op.disk) {
            self.oracle.copies_not_vouched_for();
            let lost = op.result == Some(Err(Errno::EIO)) && self.plan.faults.has(FaultKind::FlushLosesCache);
            self.disks[op.disk].failed_alone |= lost;
        }
        if let Kind::Write { data, payload, .. } = &op.kind
            && payload.bytes() != data
        {
            return violated("protocol", format!("the buffer of op {key} changed while it was in flight"));
        }
        let result = match op.result.unwrap_or(Ok(false)) {
            Err(errno) => Err(errno),
            Ok(hole) => Ok(match op.kind {
                Kind::Read(Some(buffer)) => DeviceOutput::Read(buffer),
                Kind::ProbeHole => DeviceOutput::Hole(hole),
                Kind::Allocation(extents) => DeviceOutput::Allocation(extents),
                _ => DeviceOutput::Done,
            }),
        };
        self.deliver(Event::DeviceDone { op: OpId(key), result })
    }
}
