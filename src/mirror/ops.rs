//! Device operations in flight: who waits for each.
//!
//! What must hold: every operation sent out is in the table until its completion comes. When a replica is
//! failed its operations are *abandoned*: their owners are told at once that the device is gone, and the late
//! completions are thrown away (buffers included), so a hung device holds up nobody.

use nix::errno::Errno;

use super::event::{Action, DeviceOp, DeviceOutput, OpId, RequestId};
use super::slab::Key;
use super::{Mirror, Work};
use crate::units::{Nanos, ReplicaSlot};

/// Who waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpOwner {
    /// A client's read.
    Read(Key),
    /// An edge block of a write that is not aligned.
    Edge(Key, usize),
    /// A client's write.
    Write(Key),
    /// A client asks where there are holes.
    Status(Key),
    /// A client's prefetch.
    Cache(RequestId),
    /// A region copy asks its source for holes.
    JobProbe(Key),
    /// A region copy reads its source.
    JobRead(Key),
    /// A region copy writes a target.
    JobWrite(Key),
    /// A bitmap page's commit.
    Page(usize),
    /// The superblock commit.
    Superblock,
    /// A flush round.
    Flush,
    /// The superblocks of a removed replica are wiped.
    Wipe,
    /// A replica that is one commit behind gets the head's superblock.
    CatchUp,
    /// The superblocks of a new replica are wiped before it gets its own.
    Prepare,
    /// Nobody: the replica was failed.
    Abandoned,
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) owner: OpOwner,
    pub(super) slot: ReplicaSlot,
    pub(super) issued: Nanos,
    pub(super) bytes: u64,
}

impl Mirror {
    /// Sends an operation to the replica in `slot`.
    pub(super) fn issue(&mut self, slot: ReplicaSlot, owner: OpOwner, request: DeviceOp) {
        let bytes = match &request {
            DeviceOp::Read { len, .. } => *len,
            DeviceOp::Write { data, .. } => data.len as u64,
            DeviceOp::Zero { .. }
            | DeviceOp::Flush
            | DeviceOp::Cache { .. }
            | DeviceOp::Allocation { .. }
            | DeviceOp::ProbeHole { .. } => 0,
        };
        let key = self.ops.insert(Op { owner, slot, issued: self.now, bytes });
        let replica = self.replica_mut(slot);
        assert!(replica.attached, "an operation goes to a replica that is open");
        replica.in_flight += 1;
        match owner {
            OpOwner::Read(_) => self.policy.read_sent(slot, bytes),
            OpOwner::Write(_) => self.policy.write_sent(slot, bytes),
            _ => {}
        }
        self.out.push(Action::Device { op: OpId(key), slot, request });
    }

    /// An operation has ended.
    pub(super) fn device_done(&mut self, op: OpId, result: Result<DeviceOutput, Errno>) {
        let Some(op) = self.ops.remove(op.0) else { unreachable!("an operation ends once") };
        let latency_ns = self.now.since(op.issued);
        let failed = result.is_err();
        match op.owner {
            OpOwner::Read(_) => self.policy.read_done(op.slot, op.bytes, latency_ns, failed),
            OpOwner::Write(_) => self.policy.write_done(op.slot, op.bytes, latency_ns),
            _ => {}
        }
        let replica = self.replica_mut(op.slot);
        assert!(replica.in_flight > 0);
        replica.in_flight -= 1;
        if failed && op.owner != OpOwner::Abandoned {
            replica.errors += 1;
        }
        self.complete(op.owner, op.slot, result);
        self.detach_if_idle(op.slot);
    }

    /// Tells the owner of an operation how it ended.
    pub(super) fn complete(
        &mut self,
        owner: OpOwner,
        slot: ReplicaSlot,
        result: Result<DeviceOutput, Errno>,
    ) {
        match owner {
            OpOwner::Read(task) => self.read_done(task, slot, result),
            OpOwner::Edge(task, edge) => self.edge_done(task, edge, slot, result),
            OpOwner::Write(task) => self.write_op_done(task, slot, result.map(|_| ())),
            OpOwner::Status(task) => self.status_asked(task, slot, result),
            OpOwner::Cache(id) => self.cached(id),
            OpOwner::JobProbe(task) => self.job_probed(task, slot, result),
            OpOwner::JobRead(task) => self.job_read_done(task, slot, result),
            OpOwner::JobWrite(task) => self.job_write_done(task, slot, result.map(|_| ())),
            OpOwner::Page(page) => self.page_op_done(page, slot, result.map(|_| ())),
            OpOwner::Superblock => self.superblock_op_done(slot, result.map(|_| ())),
            OpOwner::Flush => self.flush_op_done(slot, result.map(|_| ())),
            OpOwner::CatchUp => self.caught_up(slot, result.map(|_| ())),
            OpOwner::Prepare => self.candidate_wiped(slot, result.map(|_| ())),
            OpOwner::Wipe | OpOwner::Abandoned => {}
        }
    }

    /// The replica in `slot` is failed: its operations' owners go on without them.
    pub(super) fn abandon_ops(&mut self, slot: ReplicaSlot) {
        let keys: Vec<Key> = self
            .ops
            .iter()
            .filter(|(_, op)| op.slot == slot && op.owner != OpOwner::Abandoned)
            .map(|(key, _)| key)
            .collect();
        for key in keys {
            let Some(op) = self.ops.get_mut(key) else { unreachable!("listed just now") };
            let (owner, bytes) = (op.owner, op.bytes);
            op.owner = OpOwner::Abandoned;
            match owner {
                OpOwner::Read(_) => self.policy.read_lost(slot, bytes),
                OpOwner::Write(_) => self.policy.write_lost(slot, bytes),
                _ => {}
            }
            self.work.push_back(Work::Lost(owner, slot));
        }
    }

    /// Closes a replica that is not used any more once nothing is in flight on it.
    pub(super) fn detach_if_idle(&mut self, slot: ReplicaSlot) {
        let Some(replica) = self.replicas[slot.index()].as_mut() else { return };
        if replica.attached && replica.closing && replica.in_flight == 0 {
            replica.attached = false;
            replica.closing = false;
            let removed = replica.removed;
            self.out.push(Action::Detach { slot });
            if removed {
                self.replicas[slot.index()] = None;
            }
        }
    }
}
