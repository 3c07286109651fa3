//! Operators' commands: fail, add, remove, stop.
//!
//! ```text
//!  fail    replica leaves ─► settled ─► answer
//!  add     see `add`
//!  remove  leaves, slot out of the table ─► settled ─► wipe its superblocks ─► close, answer
//!  stop    drain requests ─► drain jobs ─► flush all ─► clear bits ─► pages clean ─► superblock ─► superblock "clean"
//!          ─► answer
//! ```

use super::add::Preparing;
use super::event::{Action, AdminCommand, AdminError, AdminId, Candidate, RequestError, RequestId};
use super::flush::FlushOwner;
use super::ops::OpOwner;
use super::{Mirror, Work};
use crate::format::superblock::MemberState;
use crate::planted::{Bug, planted};
use crate::units::{ReplicaSet, ReplicaSlot};

/// Where an orderly stop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopStage {
    /// Requests and jobs in flight end.
    Draining,
    /// Every replica is being flushed.
    Flushing,
    /// Pages with cleared bits go out.
    Pages,
    /// One more superblock goes out: with the last one a copy of a replica taken while the volume ran is two events
    /// behind, and so never taken for current.
    Count,
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
    /// Forget what the removed replica missed, then answer.
    Forgotten(AdminId, ReplicaSlot, String),
}

/// Commands under way.
pub(super) struct AdminState {
    pub(super) pending: Vec<Pending>,
    /// Candidates whose alignment is larger than that of requests in flight.
    pub(super) waiting: Vec<(AdminId, Box<Candidate>)>,
    /// Replicas whose superblock slots are being wiped before they get this volume's.
    pub(super) preparing: Vec<Preparing>,
    /// Commands that came while the volume was being opened; carried out, in order, once it is.
    pub(super) early: Vec<(AdminId, AdminCommand)>,
    pub(super) stop: Option<(AdminId, StopStage)>,
}

impl AdminState {
    pub(super) fn new() -> Self {
        Self {
            pending: Vec::new(),
            waiting: Vec::new(),
            preparing: Vec::new(),
            early: Vec::new(),
            stop: None,
        }
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
        // A replica that hangs would hold up the stop: it can be failed until the end.
        let may_fail = matches!(command, AdminCommand::Fail(_)) && !self.stopped();
        if self.stopping() && !may_fail {
            self.refuse(id, "the volume is stopping");
            return;
        }
        if !self.open && !matches!(command, AdminCommand::Stop) {
            self.admin.early.push((id, command));
            return;
        }
        match command {
            AdminCommand::Fail(slot) => self.admin_fail(id, slot),
            AdminCommand::Add(candidate) => self.admin_add(id, candidate),
            AdminCommand::Remove(slot) => self.admin_remove(id, slot),
            AdminCommand::Stop => {
                self.admin.stop = Some((id, StopStage::Draining));
                self.give_up_candidates();
                for (id, _) in std::mem::take(&mut self.early) {
                    self.reply(id, Err(RequestError::Stopping));
                }
            }
        }
    }

    pub(super) fn refuse(&mut self, id: AdminId, text: &str) {
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
        let text = self.describe(slot);
        if self.is_being_prepared(slot) {
            self.refuse(id, &format!("{text} is just being added: try again in a moment"));
            return;
        }
        let attached = self.active().contains(slot);
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
        self.meta.dirty = true;
        if attached {
            self.admin.pending.push(Pending::Removed(id, slot, text));
        } else {
            self.admin.pending.push(Pending::Forgotten(
                id,
                slot,
                format!("{text} is removed from the volume"),
            ));
        }
    }

    /// Answers what waited for the change to be durable, and goes on with stopping.
    pub(super) fn pump_admin(&mut self) {
        self.pump_waiting_candidates();
        if !self.admin.pending.is_empty() && self.settled() {
            for pending in std::mem::take(&mut self.admin.pending) {
                match pending {
                    Pending::Answer(id, text) => self.out.push(Action::AdminDone { id, result: Ok(text) }),
                    Pending::Removed(id, slot, text) => {
                        self.forget_stale(slot);
                        self.wipe_and_close(id, slot, &text);
                    }
                    Pending::Forgotten(id, slot, text) => {
                        self.forget_stale(slot);
                        self.out.push(Action::AdminDone { id, result: Ok(text) });
                    }
                }
            }
        }
        if self.admin.stop.is_some() {
            self.pump_stop();
        }
    }

    /// The slot's member is gone, durably: what it missed matters no more. Not before: a crash would bring the
    /// member back without its stale bits. (A new member in the slot misses everything anyway.)
    fn forget_stale(&mut self, slot: ReplicaSlot) {
        if !self.members().contains(slot) {
            self.drop_stale(slot);
            self.owe_every_page(ReplicaSet::EMPTY);
        }
    }

    fn wipe_and_close(&mut self, id: AdminId, slot: ReplicaSlot, name: &str) {
        let replica = self.replica_mut(slot);
        replica.closing = true;
        self.wipe_superblocks(slot, OpOwner::Wipe);
        let text = format!("{name} is removed from the volume; its data stays, its superblocks are wiped");
        self.out.push(Action::AdminDone { id, result: Ok(text) });
    }

    /// Whether an orderly stop is under way.
    pub(super) fn stopping(&self) -> bool {
        self.admin.stop.is_some()
    }

    fn stopped(&self) -> bool {
        matches!(self.admin.stop, Some((_, StopStage::Stopped(_))))
    }

    fn pump_stop(&mut self) {
        let Some((id, stage)) = self.admin.stop else { return };
        let next = match stage {
            StopStage::Stopped(_) => return,
            StopStage::Draining if !self.open && self.broken => StopStage::Stopped(false),
            StopStage::Draining if !self.open || !self.drained() => return,
            StopStage::Draining if self.config.read_only => StopStage::Stopped(true),
            StopStage::Draining => {
                self.admin.stop = Some((id, StopStage::Flushing));
                if planted(Bug::StopWithoutFlush) {
                    self.stop_flushed(true);
                    self.work.push_back(Work::Pump);
                    return;
                }
                self.request_flush(self.active(), FlushOwner::Stop);
                return;
            }
            // The flush ends by itself, and says how.
            StopStage::Flushing => return,
            StopStage::Pages if self.pages.all_clean() => {
                self.meta.dirty = true;
                StopStage::Count
            }
            StopStage::Count if self.settled() => {
                self.meta.clean = true;
                self.meta.dirty = true;
                StopStage::Superblock
            }
            StopStage::Superblock if self.settled() => StopStage::Stopped(self.unsynced_count == 0),
            _ if self.broken || self.pages.failing => StopStage::Stopped(false),
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
            self.answer_stop(id, result);
        } else {
            self.work.push_back(Work::Pump);
        }
    }

    fn answer_stop(&mut self, id: AdminId, result: Result<String, AdminError>) {
        for (id, _) in std::mem::take(&mut self.admin.early) {
            self.refuse(id, "the volume is stopping");
        }
        for pending in std::mem::take(&mut self.admin.pending) {
            let (Pending::Answer(id, _) | Pending::Removed(id, ..) | Pending::Forgotten(id, ..)) = pending;
            self.refuse(id, "the volume stopped before this was recorded: look at it after the next start");
        }
        self.out.push(Action::AdminDone { id, result });
    }

    fn drained(&self) -> bool {
        self.admin.preparing.is_empty()
            && self.tasks.len() == 0
            && self.counters.in_flight == 0
            && self.held.is_empty()
            && self.held_flushes.is_empty()
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
            self.answer_stop(id, Err(AdminError(text.to_owned())));
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
