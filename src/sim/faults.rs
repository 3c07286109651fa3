//! Misfortune: what goes wrong, when, and on which disk.
//!
//! What must hold: within the fault model faults hit one disk at a time (the victim), and only while another one
//! is in sync and well; the victim changes only when every replica is in sync and recorded so. Which faults there are is
//! in [`table`]: a new one is one row there.

use nix::errno::Errno;

use crate::mirror::event::{AdminCommand, AdminError, AdminId, Candidate, Event};
use crate::units::{BLOCK_BYTES, MILLISECOND_NS, ReplicaSlot, SECOND_NS, SECTOR_BYTES};

use super::device::{Kind, Op};
use super::disk::{CutMode, differing_blocks};
use super::rng::Rng;
use super::world::{Checked, Daemon, FailNext, SimDisk, Wake, World, violated};

pub mod table;
use table::{FaultKind, How};

impl CutMode {
    /// What a power cut does this time.
    pub fn from_chance(rng: &mut Rng) -> Self {
        rng.pick(&[Self::DropAll, Self::KeepAll, Self::Mixed, Self::Mixed])
    }
}

impl World {
    /// Every fault of the plan that has its time gets the first one.
    pub fn arm_faults(&mut self) {
        let timed = |kind: &&FaultKind| matches!(kind.row().how, How::AtItsTime(_));
        FaultKind::ALL.iter().filter(timed).for_each(|kind| self.rearm(*kind));
    }

    fn rearm(&mut self, fault: FaultKind) {
        let pause_ns = self.plan.faults.of(fault);
        if pause_ns > 0 {
            let delay = self.rng.between(1, 2 * pause_ns);
            self.wake_in(delay, Wake::Fault(fault));
        }
    }

    /// A fault strikes.
    pub(super) fn fault_strikes(&mut self, fault: FaultKind) -> Checked {
        self.rearm(fault);
        if !self.chaos || self.daemon.is_none() || self.read_only {
            return Ok(());
        }
        let How::AtItsTime(strike) = fault.row().how else { unreachable!("{fault:?} has no time") };
        if strike(self)? {
            self.counts.fault(fault);
        }
        Ok(())
    }

    /// Whether a fault whose rate is per mille strikes this time. Chance is asked for some in
    /// worlds without them, too ([`table::Row::always_asked`]).
    pub(super) fn is_due(&mut self, kind: FaultKind) -> bool {
        let rate = self.plan.faults.of(kind);
        (rate > 0 || kind.row().always_asked()) && self.rng.per_mille(rate)
    }

    fn aim(&mut self) {
        let disks = self.disks.len() as u64;
        let pending_error = self
            .daemon
            .as_ref()
            .is_some_and(|daemon| daemon.ops.values().any(|op| matches!(op.result, Some(Err(_)))));
        // A command that waits may be about to fail a replica.
        let pending_error = pending_error || self.daemon.as_ref().is_some_and(|d| !d.admins.is_empty());
        let requests = self.daemon.as_ref().map(|daemon| &daemon.requests);
        self.troubled.retain(|id| requests.is_some_and(|requests| requests.contains_key(id)));
        let pending_error = pending_error || !self.troubled.is_empty();
        // Nor is a disk well whose flush has failed, which no request may have asked for, before the daemon has seen how the
        // others' flushes end.
        let pending_error =
            pending_error || self.daemon.as_ref().is_some_and(|d| !d.mirror.reads_from_all_in_sync());
        // A disk whose cache was lost is not well before that is written anew, whether the daemon that heard of it
        // lived to record it or not.
        let well = |disk: &SimDisk| {
            let lost = disk.disk.has_lost(self.plan.volume_bytes);
            !(disk.gone || disk.full || disk.foreign || disk.unseen_error || lost)
        };
        let quiet = self.disks.iter().all(well) && !pending_error;
        let all_in_sync = self.in_sync_disks().len() == self.disks.len();
        let settled = quiet && all_in_sync && self.all_recorded_in_sync();
        if settled && (self.plan.within_model || self.are_equal()) {
            self.suspect = None;
        }
        if settled || !self.plan.within_model {
            self.victim = Some(self.rng.below(disks) as usize);
        }
    }

    /// Whether all disks read the same.
    fn are_equal(&self) -> bool {
        let volume = self.plan.volume_bytes;
        self.disks.iter().all(|disk| {
            differing_blocks(self.disks[0].disk.image(), disk.disk.image(), volume).next().is_none()
        })
    }

    /// The disk to hurt now, if one may be hurt.
    fn target(&mut self) -> Option<usize> {
        if !self.plan.within_model {
            return Some(self.rng.below(self.disks.len() as u64) as usize);
        }
        self.victim.filter(|disk| self.another_is_well(*disk))
    }

    /// Whether a replica other than `disk` is in sync and has no trouble.
    fn another_is_well(&self, disk: usize) -> bool {
        self.in_sync_disks()
            .into_iter()
            .any(|other| other != disk && !self.disks[other].gone && !self.disks[other].full)
    }

    /// False: no disk may be hurt now.
    fn fill_up(&mut self) -> bool {
        let mut hit = false;
        if self.plan.faults.has(FaultKind::FullEverywhere) {
            self.trace(|| "all disks are full".to_owned());
            hit = true;
            for disk in 0..self.disks.len() {
                self.disks[disk].full = true;
            }
        } else if let Some(disk) = self.target() {
            self.trace(|| format!("disk {disk} is full"));
            hit = true;
            self.disks[disk].full = true;
        }
        for disk in 0..self.disks.len() {
            if self.disks[disk].full {
                let back = self.rng.between(MILLISECOND_NS, SECOND_NS);
                self.wake_in(back, Wake::Better(disk));
            }
        }
        hit
    }

    /// Whether an operation fails, and how.
    pub(super) fn fault_for(&mut self, op: &Op) -> Option<(Errno, FaultKind)> {
        let disk = &self.disks[op.disk];
        if disk.gone {
            return Some((Errno::ENODEV, FaultKind::NoDevice));
        }
        if let Some(kind) = self.script_says_no(op) {
            return Some((Errno::EIO, kind));
        }
        let disk = &self.disks[op.disk];
        if disk.full && op.writes() && op.range.offset < self.plan.volume_bytes {
            self.last_full = self.now;
            return Some((Errno::ENOSPC, FaultKind::NoSpace));
        }
        if disk.unseen_error && matches!(op.kind, Kind::Flush(_)) {
            self.disks[op.disk].unseen_error = false;
            return Some((Errno::EIO, FaultKind::LateFlushError));
        }
        let aimed = if self.plan.within_model {
            self.victim == Some(op.disk) && self.another_is_well(op.disk)
        } else {
            true
        };
        if !(self.chaos && aimed) {
            return None;
        }
        FaultKind::ALL.iter().find_map(|kind| match kind.row().how {
            How::Operation(errno, fits) if fits(op) && self.is_due(*kind) => Some((errno, *kind)),
            _ => None,
        })
    }

    /// Whether a scripted fault waits for this operation; it strikes once.
    fn script_says_no(&mut self, op: &Op) -> Option<FaultKind> {
        let (next, kind) = match op.kind {
            Kind::Read(_) => (FailNext::Read, FaultKind::ReadError),
            Kind::Write { .. } | Kind::Zero(_) => (FailNext::Write, FaultKind::WriteError),
            Kind::Flush(_) => (FailNext::Flush, FaultKind::FlushError),
            Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => return None,
        };
        let waits = self.next_fails.iter().position(|fail| *fail == (op.disk, next))?;
        self.next_fails.remove(waits);
        Some(kind)
    }

    /// The daemon dies, things happen to its disks, it starts again.
    pub(super) fn crash_and_restart(&mut self, cut: bool) -> Checked {
        let victim = self.target();
        let all_in_sync = self.in_sync_disks().len() == self.disks.len();
        self.count_crash();
        self.crash(cut);
        self.back_up(victim, all_in_sync)
    }

    /// In the middle of what the crash falls.
    fn count_crash(&mut self) {
        let Some(daemon) = &self.daemon else { return };
        let metadata = |op: &Op| op.writes() && op.range.offset >= self.plan.volume_bytes;
        let resync = !daemon.resyncing.is_empty() || daemon.mirror.status(self.now).unsynced_bytes > 0;
        let moments = [
            (resync, FaultKind::CrashInResync),
            (!daemon.mirror.is_open(), FaultKind::CrashInOpening),
            (daemon.ops.values().any(metadata), FaultKind::CrashInMetadata),
            (daemon.stopping && daemon.stopped.is_none(), FaultKind::CrashInStop),
        ];
        moments.into_iter().filter(|(so, _)| *so).for_each(|(_, kind)| self.counts.fault(kind));
    }

    /// What happens while the daemon is down, and its start.
    pub(super) fn back_up(&mut self, victim: Option<usize>, all_in_sync: bool) -> Checked {
        if self.beyond_repair {
            return Ok(());
        }
        let mut forgotten = None;
        // What nobody else has is not touched: there is no telling a lone copy from an old one.
        let lone = |victim: &usize| self.holders.iter().all(|holder| holder == victim);
        if let Some(victim) = victim.filter(|victim| !self.disks[*victim].gone && !lone(victim)) {
            self.holders.retain(|holder| *holder != victim);
            let own = !self.disks[victim].foreign;
            let starts = self.counts.starts;
            let copy = self.disks[victim].disk.snapshot();
            // History goes back a number of generations; an older copy is refused (rightly).
            self.disks[victim].copies.retain(|(taken, _)| starts - taken < 12);
            self.strike_while_down(victim)?;
            if self.disks[victim].copies.len() < 3 && own {
                self.disks[victim].copies.push((starts, copy));
            }
            forgotten = self.is_due(FaultKind::Forgotten).then_some(victim);
            if forgotten.is_some() {
                self.counts.fault(FaultKind::Forgotten);
            }
        }
        self.promise_8_stale_alone()?;
        if all_in_sync && self.suspect.is_none() && self.is_due(FaultKind::Split) {
            return self.split_brain();
        }
        let disks: Vec<usize> = (0..self.disks.len()).filter(|disk| Some(*disk) != forgotten).collect();
        // An operator who starts without every disk that has the newest data asks for a split; that has its
        // own test.
        if self.holders.iter().all(|disk| self.disks[*disk].gone) {
            self.disks.iter_mut().for_each(|disk| disk.gone = false);
        }
        if self.is_due(FaultKind::ReadOnly) {
            self.counts.fault(FaultKind::ReadOnly);
            self.read_only_run(&disks)?;
        }
        if self.beyond_repair { Ok(()) } else { self.start(&disks) }
    }

    /// Something happens to a disk while the daemon is down, or nothing.
    fn strike_while_down(&mut self, disk: usize) -> Checked {
        for kind in FaultKind::ALL {
            if let How::WhileDown(strike) = kind.row().how
                && self.is_due(*kind)
                && strike(self, disk)?
            {
                self.counts.fault(*kind);
                break;
            }
        }
        Ok(())
    }

    /// The volume is served read-only for some requests and killed.
    fn read_only_run(&mut self, disks: &[usize]) -> Checked {
        let holders = self.holders.clone();
        let source = |world: &Self| world.assemble(disks).ok().map(|(assembly, _)| assembly.source);
        self.read_only = true;
        // A disk that is refused may be replaced by a blank one here.
        self.start(disks)?;
        let source_before = source(self);
        // Nothing of what it answers in dirty regions is recorded: the next start will have the same source, but if
        // that is lost before these regions are synced, another answer is legal (see docs/design.md).
        let dirty = |daemon: &Daemon| daemon.mirror.status(self.now).dirty_bytes > 0;
        let before = self.daemon.as_ref().is_some_and(dirty).then(|| self.oracle.clone());
        if self.daemon.is_some() {
            let left = std::mem::replace(&mut self.requests_left, 10);
            let done = self.run_until(600 * SECOND_NS, |world| {
                world.requests_left == 0
                    && world.daemon.as_ref().is_none_or(|daemon| daemon.requests.is_empty())
            })?;
            self.requests_left = left;
            if !done {
                return violated("liveness", "requests to a volume served read-only are not answered");
            }
            self.crash(false);
        }
        if let Some(before) = before {
            self.oracle = before;
        }
        if source(self) != source_before {
            return violated(
                "read_only",
                "the source of unsynced regions changed though nothing was written",
            );
        }
        self.read_only = false;
        self.holders = holders;
        Ok(())
    }

    fn rot(&mut self, disk: usize) {
        let bytes = self.disks[disk].disk.bytes();
        let meta = bytes - crate::format::layout::Layout::metadata_bytes(self.regions());
        let sector = self.rng.between(meta / SECTOR_BYTES, (bytes - 1) / SECTOR_BYTES);
        self.trace(|| {
            format!("disk {disk}: sector {sector} rots ({} of metadata)", sector - meta / SECTOR_BYTES)
        });
        self.disks[disk].disk.rot_sector(sector, &mut self.rng);
        assert!(meta.is_multiple_of(BLOCK_BYTES));
    }

    fn admin_strikes(&mut self) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if daemon.stopping {
            return Ok(());
        }
        let attached: Vec<usize> = daemon.attached.iter().flatten().copied().collect();
        let spare: Vec<usize> =
            (0..self.disks.len()).filter(|d| !attached.contains(d) && !self.disks[*d].gone).collect();
        match self.rng.below(10) {
            0..=4 if !spare.is_empty() => {
                let disk = spare[self.rng.below(spare.len() as u64) as usize];
                let force = self.rng.coin();
                self.counts.fault(FaultKind::AdminAdd);
                self.admin_add(disk, force)
            }
            5 => {
                self.counts.fault(FaultKind::AdminStop);
                self.stop_and_restart()
            }
            choice => {
                let Some(disk) = self.target() else { return Ok(()) };
                let Some(slot) = self.slot_of(disk) else { return Ok(()) };
                let (command, kind) = if choice < 8 {
                    (AdminCommand::Fail(slot), FaultKind::AdminFail)
                } else {
                    (AdminCommand::Remove(slot), FaultKind::AdminRemove)
                };
                self.counts.fault(kind);
                self.admin(command, None)
            }
        }
    }

    fn slot_of(&self, disk: usize) -> Option<ReplicaSlot> {
        ReplicaSlot::all().find(|slot| self.disk_of(*slot) == Some(disk))
    }

    /// An operator offers a disk.
    pub(super) fn admin_add(&mut self, disk: usize, force: bool) -> Checked {
        let (found, force) = match self.find(disk) {
            Ok(found) => (found, force),
            Err(_) => (None, true),
        };
        let candidate = Candidate {
            found,
            traits: self.disks[disk].traits,
            path: self.disks[disk].path.clone(),
            fresh_uuid: self.fresh_uuid(),
            force,
        };
        self.admin(AdminCommand::Add(Box::new(candidate)), Some(disk))
    }

    /// An operator's command goes to the core.
    pub(super) fn admin(&mut self, command: AdminCommand, offered: Option<usize>) -> Checked {
        let id = self.fresh_id();
        self.trace(|| format!("admin {id}: {command:?}").chars().take(150).collect());
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        if offered.is_some() && daemon.admins.values().any(|other| *other == offered) {
            return Ok(()); // it is locked by the command before
        }
        if let AdminCommand::Add(candidate) = &command
            && !candidate.force
            && offered.is_some_and(|disk| self.disks[disk].foreign)
        {
            self.must_refuse.insert(id);
        }
        daemon.admins.insert(id, offered);
        if matches!(command, AdminCommand::Stop) {
            (daemon.stopping, daemon.stop_id) = (true, id);
        }
        self.deliver(Event::Admin { id: AdminId(id), command })
    }

    /// The core answers an operator.
    pub(super) fn admin_done(&mut self, id: AdminId, result: &Result<String, AdminError>) -> Checked {
        self.trace(|| format!("admin {}: answered {result:?}", id.0));
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        if daemon.admins.remove(&id.0).is_none() {
            return violated("protocol", format!("admin command {} is answered twice", id.0));
        }
        if self.must_refuse.remove(&id.0) && result.is_ok() {
            return violated(
                "promise_8_foreign_untouched",
                "another volume's replica is added without --force",
            );
        }
        if daemon.stopping && daemon.stop_id == id.0 {
            daemon.stopped = Some(result.is_ok());
        }
        Ok(())
    }

    /// An orderly stop in the middle of everything, and a start after it.
    fn stop_and_restart(&mut self) -> Checked {
        let victim = self.target();
        let Some(clean) = self.stop()? else { return Ok(()) };
        if clean {
            self.promise_10_the_data_is_yours()?;
        }
        let all_in_sync = self.in_sync_disks().len() == self.disks.len();
        self.crash(false);
        self.back_up(victim, all_in_sync)
    }

    /// Stops the daemon: whether it was clean; `None` where it died on the way.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn stop(&mut self) -> Result<Option<bool>, super::world::Violation> {
        let starts = self.counts.starts;
        let unsynced = |world: &Self| {
            world.daemon.as_ref().is_some_and(|daemon| daemon.mirror.status(world.now).unsynced_bytes > 0)
        };
        let unsynced_before = unsynced(self);
        self.admin(AdminCommand::Stop, None)?;
        let over = self.run_until(300 * SECOND_NS, |world| {
            world.counts.starts != starts
                || world.daemon.as_ref().is_none_or(|daemon| daemon.stopped.is_some())
        })?;
        if self.counts.starts != starts {
            return Ok(None);
        }
        let Some(daemon) = &self.daemon else { return Ok(None) };
        if !over {
            return violated("liveness", "stop is not answered within 300 s");
        }
        if !daemon.requests.is_empty() {
            return violated(
                "liveness",
                format!("stopped with {} requests unanswered", daemon.requests.len()),
            );
        }
        // Unsynced regions stay: nobody waits for a resync to stop.
        let abandoned = unsynced_before || unsynced(self);
        if daemon.stopped != Some(true) && self.plan.within_model && !self.excused && !abandoned {
            return violated("promise_4_clean_means_clean", "a stop was not clean though a replica was well");
        }
        Ok(daemon.stopped)
    }

    /// Promise 8: each side is run without the other; together they must be refused.
    fn split_brain(&mut self) -> Checked {
        // A side alone is to be well: it is not where it hears of a flush that failed before, or did not live to record it.
        let volume = self.plan.volume_bytes;
        let unwell = self.disks.iter().any(|disk| disk.unseen_error || disk.disk.has_lost(volume));
        if self.disks.len() < 2 || !self.all_recorded_in_sync() || unwell {
            let all: Vec<usize> = (0..self.disks.len()).collect();
            return self.start(&all);
        }
        self.counts.fault(FaultKind::Split);
        self.trace(|| "SPLIT: each side is started without the other".to_owned());
        let all: Vec<usize> = (0..self.disks.len()).collect();
        let (left, right) = all.split_at(1 + self.rng.below(all.len() as u64 - 1) as usize);
        self.chaos = false;
        self.disks.iter_mut().for_each(|disk| (disk.gone, disk.full) = (false, false));
        self.split = true;
        let before = self.oracle.clone();
        self.run_side(left)?;
        let left_oracle = std::mem::replace(&mut self.oracle, before);
        self.run_side(right)?;
        self.chaos = true;
        self.split = false;
        if let Ok((assembly, _)) = self.assemble(&all) {
            let (in_sync, resync) = (assembly.in_sync, assembly.resync);
            return violated(
                "promise_8_no_silent_rollback",
                format!("both sides were written alone; assembled: in sync {in_sync:?}, resync {resync:?}"),
            );
        }
        let keep_left = self.rng.coin();
        if keep_left {
            self.oracle = left_oracle;
        }
        let (kept, dropped) = if keep_left { (left, right) } else { (right, left) };
        let (kept, dropped) = (kept.to_vec(), dropped.to_vec());
        self.victim = None;
        for disk in dropped {
            self.disks[disk].copies.clear();
            self.disks[disk].disk.put_back(Default::default());
        }
        kept.iter().for_each(|disk| self.disks[*disk].copies.clear());
        self.start(&kept)
    }

    fn run_side(&mut self, side: &[usize]) -> Checked {
        let left = std::mem::replace(&mut self.requests_left, 10);
        self.start(side)?;
        let done = self.run_until(600 * SECOND_NS, |world| {
            world.requests_left == 0 && world.daemon.as_ref().is_none_or(|daemon| daemon.requests.is_empty())
        })?;
        self.requests_left = left;
        if !done {
            return violated("liveness", "requests to one side alone are not answered");
        }
        self.crash(false);
        Ok(())
    }
}
