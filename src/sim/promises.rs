//! The promises of the design, each a check that looks at disks and actions and not at the core's mind.
//!
//! | promise | checked |
//! |---|---|
//! | 1 intent before data | when a data write is submitted |
//! | 2 failure before ack | when a write is answered |
//! | 3 one order | when an operation is submitted; no buffer changes in flight (`device.rs`) |
//! | 4 clean means clean | whenever durable metadata or the set of in-sync replicas changes; after each stop (`run.rs`) |
//! | 5 one answer | when a read is answered (`oracle.rs`) |
//! | 6 never the last | after each step; no durable superblock is without one in sync; no request fails while a replica is well (`client.rs`) |
//! | 7 idempotent recovery | what a crash now would leave (`recovery.rs`), also during recovery and resync; what is written comes from a client or an in-sync replica |
//! | 8 no silent rollback | each start: stale maps, bytes (`recovery.rs`), stale replicas alone, splits, old copies, other volumes (`faults.rs`, `boot.rs`) |
//! | 9 a flush is a flush | when a flush or a FUA write is answered |
//! | 10 the data is yours | after each create and orderly stop; no operation crosses the end of the data (`device.rs`) |
//! | 11 bad input | when a wrong request is sent (`client.rs`); nothing panics (`run.rs`) |
//!
//! Besides: the status is true (`status_check.rs`), and after the faults everything heals within a bound (`run.rs`).

use std::io;

use crate::buffer::Payload;
use crate::format::Found;
use crate::format::read::read_found;
use crate::format::superblock::MemberState;
use crate::units::{BLOCK_BYTES, ByteRange, RegionIndex, ReplicaSet, ReplicaSlot};

use super::client::{Asked, Pending};
use super::counts::FaultKind;
use super::device::{Kind, Op};
use super::disk::{first_difference, image_holds, image_is_zero, read_image};
use super::world::{Checked, World, violated};

/// What stands durably in one disk's metadata, decoded when it changes.
#[derive(Default)]
pub struct MetaView {
    epoch: Option<u64>,
    found: Option<Found>,
    /// A bit may have been cleared, or somebody else counts now: look at everything.
    look: bool,
}

impl MetaView {
    /// The next check looks at everything.
    pub fn look_again(&mut self) {
        self.look = true;
    }

    /// The daemon is gone: what is read next is not compared with what was.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// What stands there.
    pub(super) fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    fn intent(&self, region: RegionIndex) -> bool {
        self.found.as_ref().is_none_or(|found| found.maps.intent[region.index()])
    }

    /// Whether the replica that says of itself what stands in `other`, in `slot`, counts as in sync by this one's word.
    fn counts_in_sync(&self, slot: ReplicaSlot, other: &Self) -> bool {
        let member = self.found.as_ref().and_then(|found| found.superblock.members[slot.index()].as_ref());
        let own = other.found.as_ref().and_then(|found| found.superblock.own_entry());
        member.is_some_and(|member| {
            member.state == MemberState::InSync && own.is_some_and(|own| own.uuid == member.uuid)
        })
    }

    fn stale(&self, slot: ReplicaSlot, region: RegionIndex) -> bool {
        self.found.as_ref().is_none_or(|found| found.maps.stale[slot.index()][region.index()])
    }
}

impl World {
    /// Brings the view of a disk's durable metadata up to date. A cleared intent bit is judged here, on disks in sync: the
    /// volume's bits are theirs. One that is taken in gets their pages in place of its own, which may have bits that no
    /// replica in sync ever had (of a write that failed because none could record them).
    pub(super) fn refresh_meta(&mut self, index: usize) -> Checked {
        let disk = &self.disks[index];
        let epoch = disk.disk.meta_epoch();
        if self.meta[index].epoch == Some(epoch) {
            return Ok(());
        }
        let mut read = |offset: crate::units::ReplicaOffset, out: &mut [u8]| -> io::Result<()> {
            disk.disk.read_durable(offset.0, out);
            Ok(())
        };
        let found = read_found(&disk.path, disk.traits.device_bytes, &mut read).ok().flatten();
        let in_sync = self.in_sync_disks().contains(&index);
        let view = &mut self.meta[index];
        let before = std::mem::replace(&mut view.found, found);
        view.epoch = Some(epoch);
        view.look = true;
        let Some(after) = &view.found else { return Ok(()) };
        if !after.superblock.members().any(|(_, member)| member.state == MemberState::InSync) {
            return violated(
                "promise_6_never_the_last",
                format!("disk {index}: by its superblock no replica is in sync"),
            );
        }
        let Some(before) = before.filter(|_| in_sync) else { return Ok(()) };
        let mut cleared = before.maps.intent.clone() & !after.maps.intent.clone();
        // Bits that were only read as set because their sector was rotten are not cleared by its mending.
        before.damaged_regions.iter().for_each(|regions| cleared[regions.clone()].fill(false));
        for region in cleared.iter_ones() {
            for (slot, _) in after.superblock.members() {
                // One that comes (or came) back says itself what it missed, in regions that were clean before too.
                let back = self.daemon.as_ref().is_some_and(|daemon| daemon.ever_resyncing.contains(slot));
                if !back && after.maps.stale[slot.index()][region] && before.maps.stale[slot.index()][region]
                {
                    return violated(
                        "promise_4_clean_means_clean",
                        format!(
                            "disk {index}: intent of region {region} cleared; slot {slot} missed a write"
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    fn data_regions(&self, range: ByteRange) -> impl Iterator<Item = RegionIndex> + use<> {
        let end = range.end().min(self.plan.volume_bytes);
        let data = ByteRange::new(range.offset.min(end), end - range.offset.min(end));
        self.regions().touched(data)
    }

    /// Promise 1: no data write reaches any replica before its region's intent bit is durable on every in-sync
    /// replica. A copy of what an in-sync replica holds, to one that is not in sync, may rely on that replica's stale
    /// bit instead, or on its not being counted as in sync, or on changing nothing: it brings nothing new.
    pub(super) fn promise_1_intent_before_data(&mut self, op: &Op) -> Checked {
        if !op.writes() || op.range.offset >= self.plan.volume_bytes {
            return Ok(());
        }
        let in_sync = self.daemon.as_ref().is_some_and(|daemon| daemon.in_sync.contains(op.slot));
        let news = in_sync || !self.in_sync_disks().iter().any(|disk| self.holds(*disk, op));
        let changes = news || !self.holds(op.disk, op);
        self.refresh_meta(op.disk)?;
        for disk in self.in_sync_disks() {
            self.refresh_meta(disk)?;
            let view = &self.meta[disk];
            for region in self.data_regions(op.range) {
                let counts = news || view.counts_in_sync(op.slot, &self.meta[op.disk]) && changes;
                if counts && !view.intent(region) && (news || !view.stale(op.slot, region)) {
                    return violated(
                        "promise_1_intent_before_data",
                        format!("write to slot {} in region {}: no bit on disk {disk}", op.slot, region.0),
                    );
                }
            }
        }
        Ok(())
    }

    /// Whether `disk` reads already as if `op` had been done on it.
    fn holds(&self, disk: usize, op: &Op) -> bool {
        let image = self.disks[disk].disk.image();
        match &op.kind {
            Kind::Write { data, .. } => image_holds(image, op.range.offset, data),
            _ => image_is_zero(image, op.range),
        }
    }

    /// What `disk` reads where `op` writes.
    fn read_like(&self, disk: usize, op: &Op) -> Vec<u8> {
        let mut now = vec![0; op.range.len as usize];
        read_image(self.disks[disk].disk.image(), op.range.offset, &mut now);
        now
    }

    /// Promises 5 and 7: data comes from clients or from a replica in sync, never from one that missed writes. What
    /// is written is what some in-sync replica holds, but for the bytes of client writes in flight.
    pub(super) fn promise_7_only_from_in_sync(&self, op: &Op) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if !op.writes() || op.range.offset >= self.plan.volume_bytes {
            return Ok(());
        }
        let in_sync = self.in_sync_disks();
        if in_sync.iter().any(|disk| self.holds(*disk, op)) {
            return Ok(());
        }
        let writes: Vec<&Pending> = daemon
            .requests
            .values()
            .filter(|pending| pending.asked.writes() && pending.range.overlaps(op.range))
            .collect();
        // Mostly it is one client's bytes and nothing else: no need to look at them one by one.
        if let Kind::Write { data, .. } = &op.kind
            && writes.iter().any(|pending| {
                let inside = pending.range.offset <= op.range.offset && op.range.end() <= pending.range.end();
                inside && pending.value.matches(op.range.offset, data)
            })
        {
            return Ok(());
        }
        let bases: Vec<Vec<u8>> = in_sync.iter().map(|disk| self.read_like(*disk, op)).collect();
        let from_client = |at: u64, byte: u8| {
            writes.iter().any(|pending| {
                let inside = pending.range.offset <= at && at < pending.range.end();
                inside && pending.value.matches(at, &[byte])
            })
        };
        // Most bytes are those of one client write as a whole.
        let whole: Vec<std::ops::Range<usize>> = writes.iter().filter_map(|p| op.part_of(p)).collect();
        let mut at = 0;
        let foreign = loop {
            if at >= op.range.len as usize {
                break None;
            }
            if let Some(part) = whole.iter().find(|part| part.contains(&at)) {
                at = part.end;
                continue;
            }
            let byte = op.byte(at);
            if !bases.iter().any(|base| base[at] == byte) && !from_client(op.range.offset + at as u64, byte) {
                break Some(at);
            }
            at += 1;
        };
        match foreign {
            None => Ok(()),
            Some(at) => violated(
                "promise_7_only_from_in_sync",
                format!(
                    "byte {} written to slot {} is no client's and on no in-sync replica",
                    op.range.offset + at as u64,
                    op.slot
                ),
            ),
        }
    }

    /// Promise 2: an answered write is on every in-sync replica; every other member is recorded as such on a
    /// survivor, durably and with a higher event count, and as stale in these regions (or has the data).
    pub(super) fn promise_2_failure_before_ack(&mut self, id: u64, pending: &Pending) -> Checked {
        let name = "promise_2_failure_before_ack";
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if pending.range.is_empty() {
            return Ok(());
        }
        let cheap = daemon.attached.iter().flatten().all(|disk| self.disks[*disk].traits.cheap_zero);
        if pending.asked == Asked::Trim && (!cheap || pending.range.shrunk_to(BLOCK_BYTES).is_empty()) {
            return Ok(()); // nothing was touched
        }
        let (members, in_sync) = (daemon.members, daemon.in_sync);
        for slot in in_sync.iter() {
            if pending.asked != Asked::Trim && !self.has_data(slot, pending) {
                return violated(name, format!("write {id} answered; in-sync slot {slot} has it not"));
            }
        }
        let survivors = self.in_sync_disks();
        // Beyond the fault model what was recorded may have rotted on all of them since.
        if !self.plan.within_model && survivors.iter().all(|disk| self.disks[*disk].rotten) {
            return Ok(());
        }
        for disk in 0..self.disks.len() {
            self.refresh_meta(disk)?;
        }
        for slot in members.difference(in_sync).iter() {
            let recorded = survivors.iter().any(|disk| self.records_absence(*disk, slot, pending));
            if !recorded {
                return violated(
                    name,
                    format!("write {id} answered; that slot {slot} missed it is not recorded"),
                );
            }
        }
        Ok(())
    }

    fn has_data(&self, slot: ReplicaSlot, pending: &Pending) -> bool {
        let Some(disk) = self.disk_of(slot) else { return false };
        if self.disks[disk].disk.has_turned_back(self.plan.volume_bytes) {
            return true; // it had it; it does not stay in sync
        }
        let mut bytes = vec![0; pending.range.len as usize];
        read_image(self.disks[disk].disk.image(), pending.range.offset, &mut bytes);
        pending.value.matches(pending.range.offset, &bytes)
    }

    fn records_absence(&self, survivor: usize, slot: ReplicaSlot, pending: &Pending) -> bool {
        let Some(found) = &self.meta[survivor].found else { return false };
        let Some(member) = &found.superblock.members[slot.index()] else { return true };
        if member.state == MemberState::InSync {
            return false;
        }
        let resyncing = self.daemon.as_ref().is_some_and(|daemon| daemon.resyncing.contains(slot));
        let range = match pending.asked {
            Asked::Trim => pending.range.shrunk_to(BLOCK_BYTES),
            _ => pending.range,
        };
        let stale = self.data_regions(range).all(|region| self.meta[survivor].stale(slot, region));
        if resyncing {
            return stale || pending.asked == Asked::Trim || self.has_data(slot, pending);
        }
        let higher = self.split
            || self.meta.iter().filter_map(|view| view.found.as_ref()).all(|other| {
                other.superblock.own_entry().is_none_or(|own| own.uuid != member.uuid)
                    || other.superblock.event_count < found.superblock.event_count
            });
        stale && higher
    }

    /// Promise 3: overlapping writes are never in flight together, nor a write and a read on one replica. Writes
    /// of the same bytes to several replicas are one write.
    pub(super) fn promise_3_one_order(&self, op: &Op) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if op.is_question_or_flush() || op.range.offset >= self.plan.volume_bytes {
            return Ok(());
        }
        let active = daemon.in_sync.union(daemon.resyncing);
        for (key, other) in &daemon.ops {
            let both_read = !op.writes() && !other.writes();
            let overlap = op.range.overlaps(other.range) && !other.is_question_or_flush();
            if both_read || !overlap || !active.contains(other.slot) {
                continue;
            }
            let same_write = op.writes() && other.writes() && same_bytes(op, other);
            if op.slot == other.slot || (op.writes() && other.writes() && !same_write) {
                return violated(
                    "promise_3_one_order",
                    format!(
                        "an operation on {:?} of slot {} while op {key} on {:?} of slot {} is in flight",
                        op.range, op.slot, other.range, other.slot
                    ),
                );
            }
        }
        Ok(())
    }

    /// What holds after every step.
    pub(super) fn check_promises(&mut self) -> Checked {
        if self.daemon.is_none() {
            return Ok(());
        }
        self.promise_6_never_the_last()?;
        if let Some(daemon) = self.daemon.as_ref().filter(|_| self.invariants)
            && (self.regions().count() <= 64 || self.counts.events.is_multiple_of(256))
        {
            daemon.mirror.check_invariants();
        }
        for disk in self.in_sync_disks() {
            self.refresh_meta(disk)?;
        }
        if self.meta.iter().any(|view| view.look) {
            self.meta.iter_mut().for_each(|view| view.look = false);
            self.promise_4_clean_means_clean()?;
            self.promise_7_recovery_now()?;
        }
        if self.counts.events.is_multiple_of(128) {
            self.status_is_true()?;
        }
        Ok(())
    }

    /// Promise 6: one replica is in sync, always.
    fn promise_6_never_the_last(&self) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if daemon.in_sync.is_empty() {
            return violated("promise_6_never_the_last", "no replica is in sync");
        }
        Ok(())
    }

    /// Promise 6: within the fault model only the disk that was hurt, or that a command named (the same one), stops being
    /// in sync. (In a script nobody is the victim.)
    pub(super) fn promise_6_the_well_stay(&self, left: ReplicaSet) -> Checked {
        let aimed = self.plan.within_model
            && self.chaos
            && !self.plan.faults.has(FaultKind::FullEverywhere)
            && !self.split;
        for disk in left.iter().filter(|_| aimed).filter_map(|slot| self.disk_of(slot)) {
            if self.victim.is_some_and(|victim| victim != disk) {
                return violated("promise_6_never_the_last", format!("disk {disk} is well and was failed"));
            }
        }
        Ok(())
    }

    /// Promise 4: where data on an in-sync replica is in flight or not flushed, the intent bit stands on every
    /// in-sync replica; on one of them at the least while the bits are being united, before the volume is open.
    fn promise_4_clean_means_clean(&self) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let in_sync = self.in_sync_disks();
        let name = "promise_4_clean_means_clean";
        let united = daemon.mirror.is_open() && !self.read_only;
        let check = |region: RegionIndex, what: &str, on: usize| -> Checked {
            let bare = in_sync.iter().find(|disk| !self.meta[**disk].intent(region));
            let somewhere = in_sync.iter().any(|disk| self.meta[*disk].intent(region));
            match bare.filter(|_| united || !somewhere) {
                None => Ok(()),
                Some(bare) => violated(
                    name,
                    format!("region {} has no bit on disk {bare} but {what} on disk {on}", region.0),
                ),
            }
        };
        for disk in &in_sync {
            let mut last = None;
            for block in self.disks[*disk].disk.unflushed_blocks(self.plan.volume_bytes) {
                let region = self.regions().of(block * BLOCK_BYTES);
                if last != Some(region) {
                    check(region, "unflushed data", *disk)?;
                    last = Some(region);
                }
            }
        }
        for op in daemon.ops.values().filter(|op| op.writes() && daemon.in_sync.contains(op.slot)) {
            for region in self.data_regions(op.range) {
                check(region, "a write in flight", op.disk)?;
            }
        }
        Ok(())
    }

    /// Promise 5: reads return what the oracle allows.
    pub(super) fn promise_5_one_answer(&mut self, id: u64, pending: &Pending, data: &Payload) -> Checked {
        self.oracle
            .read_end(pending.range.offset, data.bytes(), pending.begin)
            .or_else(|why| violated("promise_5_one_answer", format!("read {id}: {why}")))
    }

    /// Promise 9: what was answered before a flush was sent is durable on every in-sync replica when the flush
    /// is answered.
    pub(super) fn promise_9_a_flush_is_a_flush(&self, id: u64, pending: &Pending) -> Checked {
        for disk in self.in_sync_disks() {
            let Some(mark) = pending.marks.get(disk) else { continue };
            if let Some(block) = self.disks[disk].disk.unflushed_before(mark, self.plan.volume_bytes) {
                return violated(
                    "promise_9_a_flush_is_a_flush",
                    format!("flush {id} answered; block {block} of disk {disk} is not flushed"),
                );
            }
        }
        Ok(())
    }

    /// Promise 9: a FUA write is durable on every in-sync replica when it is answered.
    pub(super) fn promise_9_fua_is_durable(&self, id: u64, pending: &Pending) -> Checked {
        if !pending.fua || pending.asked == Asked::Trim || pending.range.is_empty() {
            return Ok(());
        }
        let lacks = |disk: &usize| {
            let mut bytes = vec![0; pending.range.len as usize];
            self.disks[*disk].disk.read_durable(pending.range.offset, &mut bytes);
            !pending.value.matches(pending.range.offset, &bytes)
        };
        match self.in_sync_disks().into_iter().find(lacks) {
            None => Ok(()),
            Some(disk) => violated(
                "promise_9_fua_is_durable",
                format!("FUA write {id} answered; not durable on disk {disk}"),
            ),
        }
    }

    /// Promise 10: `create` leaves alone what will be the volume's data.
    pub(super) fn promise_10_create_writes_no_data(&self) -> Checked {
        let blocks = self.plan.volume_bytes / BLOCK_BYTES;
        match self.disks.iter().find(|disk| disk.disk.image().range(..blocks).next().is_some()) {
            None => Ok(()),
            Some(disk) => violated(
                "promise_10_the_data_is_yours",
                format!("create wrote into the data of {}", disk.path),
            ),
        }
    }

    /// Promise 10: after an orderly stop each in-sync replica is the volume as a raw image, durably, and all are
    /// identical.
    ///
    /// # Errors
    /// They are not.
    pub fn promise_10_the_data_is_yours(&mut self) -> Checked {
        let name = "promise_10_the_data_is_yours";
        let disks = self.in_sync_disks();
        for disk in &disks {
            // Beyond the fault model a lone replica may have lost its cache without a power cut since: what it reads
            // is all there is. Nothing else may be missing.
            let target = &self.disks[*disk].disk;
            if let Some(byte) = target.first_not_durable() {
                return violated(name, format!("byte {byte} of disk {disk} is not durable after the stop"));
            }
            if self.plan.within_model && target.has_lost(self.plan.volume_bytes) {
                return violated(
                    name,
                    format!("disk {disk} lost data to a failed flush and counts as in sync"),
                );
            }
            let image = self.disks[*disk].disk.image().clone();
            self.oracle.check_image(&image).or_else(|why| violated(name, format!("disk {disk}: {why}")))?;
            let first = self.disks[disks[0]].disk.image();
            if let Some(byte) = first_difference(first, &image, self.plan.volume_bytes) {
                return violated(name, format!("disks {} and {disk} differ at byte {byte}", disks[0]));
            }
        }
        Ok(())
    }
}

fn same_bytes(a: &Op, b: &Op) -> bool {
    let start = a.range.offset.max(b.range.offset);
    let end = a.range.end().min(b.range.end());
    let part = |op: &Op| (start - op.range.offset) as usize..(end - op.range.offset) as usize;
    match (&a.kind, &b.kind) {
        (Kind::Write { data: x, .. }, Kind::Write { data: y, .. }) => x[part(a)] == y[part(b)],
        (Kind::Write { data, .. }, _) => data[part(a)].iter().all(|byte| *byte == 0),
        (_, Kind::Write { data, .. }) => data[part(b)].iter().all(|byte| *byte == 0),
        _ => true,
    }
}
