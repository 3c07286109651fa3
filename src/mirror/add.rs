//! `add`: a device comes (back) into the volume.
//!
//! ```text
//!  verdict on its history ─► attach ─► [full copy: wipe what stands in its superblock slots]
//!     ─► Resyncing (superblock, every page) ─► settled ─► answer; the resync goes on by itself
//! ```
//!
//! What must hold: a device is overwritten only where its history says that it has nothing this volume lacks, or
//! where the operator forces it; requests in flight never reach a replica whose alignment they do not keep.

use nix::errno::Errno;

use super::admin::Pending;
use super::event::{Action, AdminId, Candidate, DeviceOp, NoticeLevel};
use super::ops::OpOwner;
use super::replica::Replica;
use super::status::ReplicaState;
use super::{Mirror, Work};
use crate::buffer::Payload;
use crate::format::Found;
use crate::format::assemble::{Readmit, readmit};
use crate::format::layout::Layout;
use crate::format::superblock::{Member, MemberState};
use crate::units::{BLOCK_BYTES, ReplicaSet, ReplicaSlot};

/// A replica between `Attach` and its first superblock.
pub(super) struct Preparing {
    id: AdminId,
    slot: ReplicaSlot,
    why: String,
    operations: usize,
    error: Option<Errno>,
}

impl Mirror {
    pub(super) fn admin_add(&mut self, id: AdminId, candidate: Box<Candidate>) {
        let io_align = u64::from(candidate.traits.io_align);
        if !self.writes_are_aligned(io_align) {
            // New requests keep the larger alignment; the replica comes in when the others have ended.
            self.io_align = self.io_align.max(io_align);
            self.admin.waiting.push((id, candidate));
            return;
        }
        match self.place_candidate(&candidate) {
            Ok((slot, full)) => self.take_in(id, slot, full, *candidate),
            Err(text) => {
                self.refresh_alignment();
                self.refuse(id, &text);
            }
        }
    }

    /// Where a candidate goes, and, if everything has to be copied to it, why.
    fn place_candidate(&self, candidate: &Candidate) -> Result<(ReplicaSlot, Option<String>), String> {
        let need = Layout::device_bytes_min(self.regions);
        if candidate.traits.device_bytes < need {
            return Err(format!(
                "{} has {} bytes, the volume needs {need}: give a larger one",
                candidate.path, candidate.traits.device_bytes
            ));
        }
        let Some(found) = &candidate.found else {
            return self.free_slot().map(|slot| (slot, Some("it is new".to_owned())));
        };
        let current = self.current_superblock();
        let verdict = readmit(&current, found);
        let forced = |why: String| {
            if candidate.force {
                self.free_slot().map(|slot| (slot, Some(why)))
            } else {
                Err(format!("{why}; `nbdmirror add --force` overwrites it with this volume's data"))
            }
        };
        match verdict {
            Readmit::Member { slot, full } => {
                let replica = self.replica(slot);
                if self.active().contains(slot) {
                    return Err(format!("{} is in use already", self.describe(slot)));
                }
                if replica.attached {
                    return Err(format!(
                        "{} still has {} operations in flight from before it failed: try again when they ended",
                        self.describe(slot),
                        replica.in_flight
                    ));
                }
                Ok((slot, full))
            }
            Readmit::NewMember => {
                self.free_slot().map(|slot| (slot, Some("it was removed from this volume before".to_owned())))
            }
            Readmit::Foreign { name, uuid } => {
                forced(format!("{} belongs to another volume, {name} ({uuid})", candidate.path))
            }
            Readmit::Diverged { description } => match self.member_like(found) {
                Some(slot) if candidate.force => Ok((slot, Some(description))),
                _ => forced(description),
            },
        }
    }

    /// The member, not in use, whose identity `found` has.
    fn member_like(&self, found: &Found) -> Option<ReplicaSlot> {
        let uuid = found.superblock.own_entry()?.uuid;
        let idle =
            |slot: &ReplicaSlot| !self.replica(*slot).attached && self.replica(*slot).member.uuid == uuid;
        self.members().iter().find(idle)
    }

    fn free_slot(&self) -> Result<ReplicaSlot, String> {
        ReplicaSlot::all().find(|slot| self.replicas[slot.index()].is_none()).ok_or_else(|| {
            "the volume has eight replicas already: `nbdmirror remove` one that is gone for good".to_owned()
        })
    }

    /// Makes the candidate the replica in `slot` and begins its resync.
    fn take_in(&mut self, id: AdminId, slot: ReplicaSlot, full: Option<String>, candidate: Candidate) {
        let uuid = match self.replicas[slot.index()].as_ref() {
            Some(replica) => replica.member.uuid,
            None => candidate.fresh_uuid,
        };
        let layout = Layout { regions: self.regions, device_bytes: candidate.traits.device_bytes };
        let errors = self.replicas[slot.index()].as_ref().map_or(0, |replica| replica.errors);
        let recorded = self.replicas[slot.index()].as_ref().map(|replica| replica.member.clone());
        let (state, event_count) = recorded.map_or((MemberState::Stale, 0), |m| (m.state, m.event_count));
        let member = Member { uuid, state, event_count, path: candidate.path.clone() };
        // Not a member before it is prepared, unless it was one already.
        let removed = self.replicas[slot.index()].is_none();
        self.replicas[slot.index()] = Some(Replica {
            member,
            state: ReplicaState::Stale,
            reason: full.clone(),
            traits: candidate.traits,
            layout,
            attached: true,
            closing: false,
            removed,
            in_flight: 0,
            errors,
            read_errors: 0,
            flush_failed: false,
        });
        self.policy.forget(slot);
        self.out.push(Action::Attach { id, slot });
        if let Some(why) = full {
            self.wipe_candidate(id, slot, why);
            return;
        }
        if let Some(found) = &candidate.found {
            // What it says itself that it missed, or was writing when it left, counts as well.
            self.widen_stale(slot, Some(&found.maps.stale[slot.index()]));
            self.widen_stale(slot, Some(&found.maps.intent));
            self.widen_stale(slot, Some(&self.maps.intent.clone()));
        }
        self.begin_resync(id, slot, "what it missed");
    }

    /// Another volume's superblock (or an older one of this) must not stand in one slot while ours comes into
    /// the other: a crash then would leave a replica of two volumes.
    fn wipe_candidate(&mut self, id: AdminId, slot: ReplicaSlot, why: String) {
        self.admin.preparing.push(Preparing { id, slot, why, operations: 2, error: None });
        // New requests keep its alignment from now on.
        self.refresh_alignment();
        self.wipe_superblocks(slot, OpOwner::Prepare);
    }

    /// Both superblock slots become zeroes.
    pub(super) fn wipe_superblocks(&mut self, slot: ReplicaSlot, owner: OpOwner) {
        let layout = self.replica(slot).layout;
        for index in 0..2 {
            let mut buffer = self.pool.take(BLOCK_BYTES as usize);
            buffer.fill(0);
            let data = Payload { buffer: buffer.share(), start: 0, len: BLOCK_BYTES as usize };
            let offset = layout.superblock_offset(index);
            self.issue(slot, owner, DeviceOp::Write { offset, data, durable: true });
        }
    }

    /// One superblock slot of a new replica is wiped, or cannot be.
    pub(super) fn candidate_wiped(&mut self, slot: ReplicaSlot, result: Result<(), Errno>) {
        let Some(at) = self.admin.preparing.iter().position(|preparing| preparing.slot == slot) else {
            unreachable!("a replica is being prepared")
        };
        let preparing = &mut self.admin.preparing[at];
        preparing.operations -= 1;
        preparing.error = preparing.error.or(result.err());
        if preparing.operations > 0 {
            return;
        }
        let preparing = self.admin.preparing.remove(at);
        if let Some(errno) = preparing.error {
            let text = if self.stopping() {
                "the volume is stopping".to_owned()
            } else {
                format!("{} cannot be written: {errno}", self.describe(slot))
            };
            self.replica_mut(slot).closing = true;
            self.work.push_back(Work::DetachIfIdle(slot));
            self.refresh_alignment();
            self.refuse(preparing.id, &text);
            return;
        }
        self.replica_mut(slot).removed = false;
        self.widen_stale(slot, None);
        self.begin_resync(preparing.id, slot, &format!("everything, because {}", preparing.why));
    }

    /// The replica takes part from here on; what is stale on it is copied.
    fn begin_resync(&mut self, id: AdminId, slot: ReplicaSlot, how: &str) {
        let event_count = self.head.event_count;
        let replica = self.replica_mut(slot);
        replica.state = ReplicaState::Resyncing;
        replica.member.state = MemberState::Resyncing;
        replica.member.event_count = event_count;
        self.resyncing.insert(slot);
        self.refresh_alignment();
        self.owe_every_page(ReplicaSet::only(slot));
        self.meta.dirty = true;
        let bytes = self.bytes_in(&self.maps.stale[slot.index()]);
        let text = format!("{} is resyncing: {bytes} bytes to copy ({how})", self.describe(slot));
        self.notice(NoticeLevel::Info, text.clone());
        self.admin.pending.push(Pending::Answer(id, text));
    }

    /// The volume stops: candidates that wait or are being prepared (and may hang) are not taken in.
    pub(super) fn give_up_candidates(&mut self) {
        for (id, _) in std::mem::take(&mut self.admin.waiting) {
            self.refuse(id, "the volume is stopping");
        }
        for slot in self.slots_being_prepared().iter() {
            self.abandon_ops(slot);
        }
    }

    /// Whether `add` is still preparing the replica in `slot`.
    pub(super) fn is_being_prepared(&self, slot: ReplicaSlot) -> bool {
        self.admin.preparing.iter().any(|preparing| preparing.slot == slot)
    }

    /// The slots of replicas that `add` is still preparing.
    pub(super) fn slots_being_prepared(&self) -> ReplicaSet {
        self.admin.preparing.iter().map(|preparing| preparing.slot).collect()
    }

    /// Takes in candidates that waited for requests with a smaller alignment to end.
    pub(super) fn pump_waiting_candidates(&mut self) {
        if self.admin.waiting.is_empty() || !self.writes_are_aligned(self.io_align) {
            return;
        }
        for (id, candidate) in std::mem::take(&mut self.admin.waiting) {
            self.admin_add(id, candidate);
        }
    }

    /// Whether every write in flight keeps this alignment.
    fn writes_are_aligned(&self, io_align: u64) -> bool {
        self.tasks.iter().all(|(_, task)| match task {
            super::Task::Write(write) => write.span.is_aligned(io_align),
            _ => true,
        })
    }
}
