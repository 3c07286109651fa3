//! Answers to BLOCK_STATUS, and refusals of fast zeroing, judged against the disks and the oracle.
//!
//! What must hold:
//! - the answer is well formed: the contexts asked for, in order, each with extents from the first byte on, none empty,
//!   neighbours different, at most one where one was asked for, no more bytes than asked for;
//! - `base:allocation`: what is said to read as zeroes is an answer like a read's (promise 5);
//! - `nbdmirror:state`: a region with data on a replica in sync that is not flushed is dirty (promise 1);
//! - where the copy of a replica that takes writes differs from one in sync, beyond writes in flight, the region is
//!   stale on it or unsynced (promise 2);
//! - of the whole volume, where no replica is asked, as many bytes are dirty, unsynced and stale as the status says;
//! - fast zeroing is refused only where some replica has none, and then nothing has changed.

use crate::extent::{
    ALLOCATION_HOLE, ALLOCATION_ZERO, ContextExtents, Extent, STALE_STALE, STATE_DIRTY, STATE_OUT_OF_SYNC,
    STATE_SYNCING, STATE_UNSYNCED, StatusContext,
};
use crate::units::{BLOCK_BYTES, ByteRange, ReplicaSlot};

use super::client::{Asked, Pending};
use super::counts::RequestKind;
use super::disk::differing_blocks;
use super::world::{Checked, World, violated};

/// The flags of the extent that has the byte at `at`, where the answer (from `from` on) gets there.
fn flags_at(extents: &[Extent], from: u64, at: u64) -> Option<u32> {
    let mut end = from;
    let extent = extents.iter().find(|extent| {
        end += extent.len;
        at < end
    });
    extent.filter(|_| at >= from).map(|extent| extent.flags)
}

fn bytes_with(extents: &[Extent], flag: u32) -> u64 {
    extents.iter().filter(|extent| extent.flags & flag != 0).map(|extent| extent.len).sum()
}

fn legal_flags(context: StatusContext) -> u32 {
    match context {
        StatusContext::Allocation => ALLOCATION_HOLE | ALLOCATION_ZERO,
        StatusContext::State => STATE_DIRTY | STATE_OUT_OF_SYNC | STATE_SYNCING | STATE_UNSYNCED,
        StatusContext::Stale(_) => STALE_STALE,
    }
}

fn malformed(answer: &[ContextExtents], pending: &Pending) -> Option<String> {
    let (contexts, one) = pending.question;
    if !answer.iter().map(|element| element.context).eq(contexts.iter()) {
        return Some("contexts that were not asked for".to_owned());
    }
    answer.iter().find_map(|ContextExtents { context, extents }| {
        let lies = [
            (extents.is_empty() || extents.iter().any(|extent| extent.len == 0), "nothing"),
            (one && extents.len() != 1, "not one extent"),
            (extents.windows(2).any(|pair| pair[0].flags == pair[1].flags), "neighbours alike"),
            (extents.iter().map(|extent| extent.len).sum::<u64>() > pending.range.len, "too much"),
            (extents.iter().any(|extent| extent.flags & !legal_flags(*context) != 0), "unknown flags"),
        ];
        lies.into_iter().find(|(lie, _)| *lie).map(|(_, what)| format!("{context:?}: {what}"))
    })
}

impl World {
    /// A question for the status is answered.
    pub(super) fn judge_status(&mut self, id: u64, pending: &Pending, answer: &[ContextExtents]) -> Checked {
        if pending.asked != Asked::Status {
            return violated("protocol", format!("request {id} is answered with extents"));
        }
        if let Some(what) = malformed(answer, pending) {
            return violated("protocol", format!("status {id}: {what}: {answer:?}"));
        }
        let extents = |context| {
            answer.iter().find(|element| element.context == context).map(|element| element.extents.as_slice())
        };
        let from = pending.range.offset;
        if let Some(extents) = extents(StatusContext::Allocation) {
            self.promise_5_holes(id, pending, extents)?;
        }
        self.oracle.read_failed(pending.begin);
        if let Some(state) = extents(StatusContext::State) {
            self.promise_1_dirty_is_shown(id, from, state)?;
            for slot in ReplicaSlot::all() {
                if let Some(stale) = extents(StatusContext::Stale(slot)) {
                    self.promise_2_stale_is_shown(id, from, (state, slot, stale))?;
                }
            }
        }
        // An answer that waits for a replica comes in the middle of something, and more may change after it.
        let at_once = pending.was_open && extents(StatusContext::Allocation).is_none();
        if pending.range.len == self.plan.volume_bytes && at_once {
            return self.sums_are_the_status(id, answer);
        }
        Ok(())
    }

    fn promise_5_holes(&mut self, id: u64, pending: &Pending, extents: &[Extent]) -> Checked {
        let mut at = pending.range.offset;
        for extent in extents {
            if extent.flags & ALLOCATION_ZERO != 0 {
                self.counts.request(RequestKind::HoleShown);
                let range = ByteRange::new(at, extent.len);
                if let Err(why) = self.oracle.zeroes_seen(range, pending.begin) {
                    return violated("promise_5_one_answer", format!("status {id}, a hole: {why}"));
                }
            }
            at += extent.len;
        }
        Ok(())
    }

    fn promise_1_dirty_is_shown(&self, id: u64, from: u64, state: &[Extent]) -> Checked {
        if self.read_only {
            return Ok(());
        }
        for disk in self.in_sync_disks() {
            for block in self.disks[disk].disk.unflushed_blocks(self.plan.volume_bytes) {
                if flags_at(state, from, block * BLOCK_BYTES).is_some_and(|flags| flags & STATE_DIRTY == 0) {
                    return violated(
                        "promise_1_intent_before_data",
                        format!("status {id}: block {block} of disk {disk} is not flushed; shown as clean"),
                    );
                }
            }
        }
        Ok(())
    }

    /// Of the replicas that take writes; what others miss is in the sums. Nor is a disk judged that turned back what a failed
    /// flush of it was to keep: the replica leaves, and what it misses is known, when the flushes of the others have ended.
    fn promise_2_stale_is_shown(
        &self,
        id: u64,
        from: u64,
        (state, slot, stale): (&[Extent], ReplicaSlot, &[Extent]),
    ) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let Some(disk) = self.disk_of(slot).filter(|_| self.plan.within_model && !self.read_only) else {
            return Ok(());
        };
        if !daemon.in_sync.union(daemon.resyncing).contains(slot) {
            return Ok(());
        }
        let turned_back = |disk: usize| self.disks[disk].disk.has_turned_back(self.plan.volume_bytes);
        if turned_back(disk) {
            return Ok(());
        }
        let image = self.disks[disk].disk.image();
        for other in self.in_sync_disks().into_iter().filter(|other| !turned_back(*other)) {
            for block in differing_blocks(image, self.disks[other].disk.image(), self.plan.volume_bytes) {
                let range = ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES);
                let in_flight = daemon.ops.values().any(|op| op.writes() && op.range.overlaps(range))
                    || daemon.requests.values().any(|other| {
                        other.asked.writes() && other.range.expanded_to(BLOCK_BYTES).overlaps(range)
                    });
                let shown = flags_at(stale, from, range.offset) != Some(0)
                    || flags_at(state, from, range.offset).is_none_or(|flags| flags & STATE_UNSYNCED != 0);
                if !in_flight && !shown {
                    return violated(
                        "promise_2_failure_before_ack",
                        format!(
                            "status {id}: block {block} differs on slot {slot} and disk {other}; not shown"
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    fn sums_are_the_status(&self, id: u64, answer: &[ContextExtents]) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let status = daemon.mirror.status(self.now);
        let missed = |slot: ReplicaSlot| {
            status.replicas.iter().find(|replica| replica.slot == slot.index()).map_or(0, |r| r.stale_bytes)
        };
        for ContextExtents { context, extents } in answer {
            if bytes_with(extents, u32::MAX) + bytes_with_none(extents) != self.plan.volume_bytes {
                continue; // it ends early
            }
            let sums = match context {
                StatusContext::Allocation => vec![],
                StatusContext::State => {
                    vec![(STATE_DIRTY, status.dirty_bytes), (STATE_UNSYNCED, status.unsynced_bytes)]
                }
                StatusContext::Stale(slot) => vec![(STALE_STALE, missed(*slot))],
            };
            for (flag, bytes) in sums {
                let shown = bytes_with(extents, flag);
                if shown != bytes {
                    let what = format!("status {id}, {context:?}: {shown} bytes have {flag}; it is {bytes}");
                    return violated("status_is_true", what);
                }
            }
        }
        Ok(())
    }

    /// Whether some replica that takes writes has no fast zeroing.
    pub(super) fn zeroes_slowly(&self, may_unmap: bool) -> bool {
        let Some(daemon) = &self.daemon else { return false };
        let active = daemon.in_sync.union(daemon.resyncing);
        active.iter().filter_map(|slot| daemon.attached[slot.index()]).any(|disk| {
            let traits = &self.disks[disk].traits;
            !if may_unmap { traits.cheap_zero } else { traits.cheap_allocated_zero }
        })
    }

    /// A request is refused as not supported.
    pub(super) fn judge_refusal(&mut self, id: u64, pending: &Pending) -> Checked {
        // Of one sent before the volume was open it is decided later, over replicas that may be gone by now.
        if pending.fast.is_none() || pending.was_open && !pending.must_refuse {
            let asked = pending.asked;
            return violated("protocol", format!("request {id} ({asked:?}) is refused as not supported"));
        }
        self.counts.request(RequestKind::FastRefused);
        self.oracle.write_refused(pending.value);
        Ok(())
    }
}

fn bytes_with_none(extents: &[Extent]) -> u64 {
    extents.iter().filter(|extent| extent.flags == 0).map(|extent| extent.len).sum()
}
