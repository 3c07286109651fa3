//! Operators' commands: fail, add, remove, stop.
//!
//! ```text
//!  fail    replica leaves ─► settled ─► answer
//!  add     verdict on its history ─► attach ─► Resyncing (superblock, every page) ─► settled ─► answer; resync goes on
//!  remove  leaves, slot out of the table ─► settled ─► wipe its superblocks ─► close, answer
//!  stop    drain requests ─► drain jobs ─► flush all ─► clear bits ─► pages clean ─► superblock "clean" ─► answer
//! ```

use super::event::{Action, AdminCommand, AdminError, AdminId, Candidate, DeviceOp, NoticeLevel, RequestId};
use super::flush::FlushOwner;
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

/// Where an orderly stop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopStage {
    /// Requests and jobs in flight end.
    Draining,
    /// Every replica is being flushed.
    Flushing,
    /// Pages with cleared bits go out.
    Pages,
    /// The superblock that says "clean" goes out.
    Superblock,
    /// Over; whether it was clean.
    Stopped(bool),
}

/// Answers that wait for the change to be durable.
pub(super) enum Pending {
    /// Answer with this text.
    Answer(AdminId, String),
    /// Wipe the removed replica, then answer.
    Removed(AdminId, ReplicaSlot, String),
}

/// Commands under way.
pub(super) struct AdminState {
    pub(super) pending: Vec<Pending>,
    /// Candidates whose alignment is larger than that of requests in flight.
    waiting: Vec<(AdminId, Box<Candidate>)>,
    pub(super) stop: Option<(AdminId, StopStage)>,
}

impl AdminState {
    pub(super) fn new() -> Self {
        Self { pending: Vec::new(), waiting: Vec::new(), stop: None }
    }
}

impl Mirror {
    pub(super) fn admin_command(&mut self, id: AdminId, command: AdminCommand) {
        if self.config.read_only && !matches!(command, AdminCommand::Stop) {
            self.refuse(
                id,
                "the volume is served read-only: start it without --read-only to change its replicas",
            );
            return;
        }
        if !self.open && !matches!(command, AdminCommand::Stop) {
            self.refuse(id, "the volume is still being opened: try again in a moment");
            return;
        }
        if self.stopping() {
            self.refuse(id, "the volume is stopping");
            return;
        }
        match command {
            AdminCommand::Fail(slot) => self.admin_fail(id, slot),
            AdminCommand::Add(candidate) => self.admin_add(id, candidate),
            AdminCommand::Remove(slot) => self.admin_remove(id, slot),
            AdminCommand::Stop => self.admin.stop = Some((id, StopStage::Draining)),
        }
    }

    fn refuse(&mut self, id: AdminId, text: &str) {
        self.out.push(Action::AdminDone { id, result: Err(AdminError(text.to_owned())) });
    }

    fn admin_fail(&mut self, id: AdminId, slot: ReplicaSlot) {
        if !self.members().contains(slot) {
            self.refuse(id, "no such replica: `nbdmirror status` lists them");
        } else if !self.active().contains(slot) {
            let text = format!("{} is not in use already", self.describe(slot));
            self.refuse(id, &text);
        } else if self.fail_replica(slot, MemberState::Faulty, "failed by the operator".to_owned()) {
            let text = format!("{} is failed; `nbdmirror add` takes it back", self.describe(slot));
            self.admin.pending.push(Pending::Answer(id, text));
        } else {
            let text = format!(
                "{} is the last replica in sync and is never failed; add another one first, or stop the volume",
                self.describe(slot)
            );
            self.refuse(id, &text);
        }
    }

    fn admin_remove(&mut self, id: AdminId, slot: ReplicaSlot) {
        if !self.members().contains(slot) {
            self.refuse(id, "no such replica: `nbdmirror status` lists them");
            return;
        }
        let attached = self.active().contains(slot);
        let text = self.describe(slot);
        if attached && !self.fail_replica(slot, MemberState::Faulty, "removed by the operator".to_owned()) {
            let text =
                format!("{text} is the last replica in sync and cannot be removed; add another one first");
            self.refuse(id, &text);
            return;
        }
        let replica = self.replica_mut(slot);
        replica.removed = true;
        // Kept open until its superblocks are wiped.
        replica.closing = !attached;
        let gone = !replica.attached;
        if gone {
            self.replicas[slot.index()] = None;
        }
        self.drop_stale(slot);
        self.owe_every_page(ReplicaSet::EMPTY);
        self.meta.dirty = true;
        if attached {
            self.admin.pending.push(Pending::Removed(id, slot, text));
        } else {
            self.admin.pending.push(Pending::Answer(id, format!("{text} is removed from the volume")));
        }
    }

    fn admin_add(&mut self, id: AdminId, candidate: Box<Candidate>) {
        let misaligned =
            u64::from(candidate.traits.io_align) > self.io_align && self.tasks.iter().next().is_some();
        if misaligned {
            // New requests keep the larger alignment; the replica comes in when the others have ended.
            self.io_align = u64::from(candidate.traits.io_align);
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
        let event_count = self.head.event_count;
        let member =
            Member { uuid, state: MemberState::Resyncing, event_count, path: candidate.path.clone() };
        self.replicas[slot.index()] = Some(Replica {
            member,
            state: ReplicaState::Resyncing,
            reason: full.clone(),
            traits: candidate.traits,
            layout,
            attached: true,
            closing: false,
            removed: false,
            in_flight: 0,
            errors,
            read_errors: 0,
            flush_failed: false,
        });
        self.policy.forget(slot);
        if full.is_some() {
            self.widen_stale(slot, None);
        } else if let Some(found) = &candidate.found {
            // What it says itself that it missed, or was writing when it left, counts as well.
            self.widen_stale(slot, Some(&found.maps.stale[slot.index()]));
            self.widen_stale(slot, Some(&found.maps.intent));
            self.widen_stale(slot, Some(&self.maps.intent.clone()));
        }
        self.resyncing.insert(slot);
        self.refresh_alignment();
        self.owe_every_page(ReplicaSet::only(slot));
        self.meta.dirty = true;
        self.out.push(Action::Attach { id, slot });
        let bytes = self.bytes_in(&self.maps.stale[slot.index()]);
        let how =
            full.map_or_else(|| "what it missed".to_owned(), |why| format!("everything, because {why}"));
        let text = format!("{} is resyncing: {bytes} bytes to copy ({how})", self.describe(slot));
        self.notice(NoticeLevel::Info, text.clone());
        self.admin.pending.push(Pending::Answer(id, text));
    }

    /// Answers what waited for the change to be durable, and goes on with stopping.
    pub(super) fn pump_admin(&mut self) {
        if !self.admin.waiting.is_empty() && self.alignment_is_free() {
            for (id, candidate) in std::mem::take(&mut self.admin.waiting) {
                self.admin_add(id, candidate);
            }
        }
        if !self.admin.pending.is_empty() && self.settled() {
            for pending in std::mem::take(&mut self.admin.pending) {
                match pending {
                    Pending::Answer(id, text) => self.out.push(Action::AdminDone { id, result: Ok(text) }),
                    Pending::Removed(id, slot, text) => self.wipe_and_close(id, slot, &text),
                }
            }
        }
        if self.admin.stop.is_some() {
            self.pump_stop();
        }
    }

    /// Whether every request in flight keeps the alignment that is asked for now.
    fn alignment_is_free(&self) -> bool {
        self.tasks.iter().all(|(_, task)| match task {
            super::Task::Write(write) => write.span.is_aligned(self.io_align),
            _ => true,
        })
    }

    fn wipe_and_close(&mut self, id: AdminId, slot: ReplicaSlot, name: &str) {
        let replica = self.replica_mut(slot);
        replica.closing = true;
        let layout = replica.layout;
        for index in 0..2 {
            let mut buffer = self.pool.take(BLOCK_BYTES as usize);
            buffer.fill(0);
            let data = Payload { buffer: buffer.share(), start: 0, len: BLOCK_BYTES as usize };
            let offset = layout.superblock_offset(index);
            self.issue(slot, OpOwner::Wipe, DeviceOp::Write { offset, data, durable: true });
        }
        let text = format!("{name} is removed from the volume; its data stays, its superblocks are wiped");
        self.out.push(Action::AdminDone { id, result: Ok(text) });
    }

    /// Whether an orderly stop is under way.
    pub(super) fn stopping(&self) -> bool {
        self.admin.stop.is_some()
    }

    fn pump_stop(&mut self) {
        let Some((id, stage)) = self.admin.stop else { return };
        let next = match stage {
            StopStage::Draining if !self.open || !self.drained() => return,
            StopStage::Draining if self.config.read_only => StopStage::Stopped(true),
            StopStage::Draining => {
                self.admin.stop = Some((id, StopStage::Flushing));
                self.request_flush(self.active(), FlushOwner::Stop);
                return;
            }
            StopStage::Pages if self.pages.all_clean() => {
                // "Clean" says that the in-sync replicas hold the same bytes.
                self.meta.clean = self.unsynced_count == 0;
                self.meta.dirty = true;
                StopStage::Superblock
            }
            StopStage::Superblock if self.settled() => StopStage::Stopped(self.meta.clean),
            _ if self.broken => StopStage::Stopped(false),
            _ => return,
        };
        self.admin.stop = Some((id, next));
        if let StopStage::Stopped(clean) = next {
            let result = if clean {
                Ok("stopped, clean".to_owned())
            } else {
                Err(AdminError(
                    "stopped, but not clean: the next start will resync what was dirty".to_owned(),
                ))
            };
            self.out.push(Action::AdminDone { id, result });
        } else {
            self.work.push_back(Work::Pump);
        }
    }

    fn drained(&self) -> bool {
        self.tasks.len() == 0 && self.held.is_empty() && self.held_flushes.is_empty()
    }

    /// The flush of an orderly stop has ended.
    pub(super) fn stop_flushed(&mut self, ok: bool) {
        let Some((id, StopStage::Flushing)) = self.admin.stop else { unreachable!("asked once") };
        if ok {
            let candidates = self.clearable(true);
            self.clear_intent(&candidates, true);
            self.hurry_pages();
            self.admin.stop = Some((id, StopStage::Pages));
        } else {
            self.admin.stop = Some((id, StopStage::Stopped(false)));
            let text = "stopped, but the last flush failed: data written since the flush before may be lost";
            self.out.push(Action::AdminDone { id, result: Err(AdminError(text.to_owned())) });
        }
    }

    /// A client's flush has ended: answered when every membership change is durable.
    pub(super) fn client_flushed(&mut self, id: RequestId, ok: bool) {
        if !ok {
            self.reply_flush(id, false);
        } else if self.settled() {
            self.reply_flush(id, true);
        } else {
            self.held_flushes.push(id);
        }
    }
}
