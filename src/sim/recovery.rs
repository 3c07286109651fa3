//! What a crash would leave, judged from what stands on the disks: by the very assembly that a start runs, the
//! disks' bytes and the oracle.
//!
//! What must hold, of every assembly (promises 7 and 8): replicas that it calls in sync hold the same bytes outside
//! the regions it is going to sync; one that it is going to bring up to date holds them outside the regions it is
//! going to copy; and the source holds what clients may read. Nothing here asks the core.

use crate::format::superblock::MemberState;
use crate::format::{Assembly, Found};
use crate::units::{BLOCK_BYTES, ReplicaSlot};

use super::disk::{Disk, differing_blocks};
use super::world::{Checked, World, violated};

/// One in so many changes of durable metadata is followed by a judgement of what a crash would leave.
const CRASHES_JUDGED_ONE_IN: u64 = 12;
/// Of those, one in so many also by the oracle.
const ORACLES_ASKED_ONE_IN: u64 = 4;

impl World {
    /// Whether a replica shows that it lost what it was to flush, and would be trusted by a start now: it is about to be failed,
    /// or that is not on every disk in sync yet.
    pub(super) fn holder_turned_back(&self) -> bool {
        let in_sync = self.in_sync_disks();
        let recorded = |slot: ReplicaSlot| {
            in_sync.iter().filter_map(|holder| self.find(*holder).ok().flatten()).all(|found| {
                let member = found.superblock.members[slot.index()].as_ref();
                member.is_none_or(|member| member.state != MemberState::InSync)
            })
        };
        let trusted = |disk: usize| {
            let own = self.find(disk).ok().flatten();
            in_sync.contains(&disk) || own.is_some_and(|own| !recorded(own.superblock.slot))
        };
        let turned_back = |disk: &usize| self.disks[*disk].disk.has_turned_back(self.plan.volume_bytes);
        (0..self.disks.len()).filter(turned_back).any(trusted)
    }

    /// Promise 7: were the daemon killed or the power cut now, the next start would be right.
    pub(super) fn promise_7_recovery_now(&mut self) -> Checked {
        self.looks += 1;
        // What a kill leaves of one that turned back and is not recorded as failed yet: see `World::crash`.
        let judged = !self.split && !self.read_only && self.suspect.is_none() && !self.holder_turned_back();
        if !judged || !self.looks.is_multiple_of(CRASHES_JUDGED_ONE_IN) {
            return Ok(());
        }
        for disk in 0..self.disks.len() {
            self.refresh_meta(disk)?;
        }
        let there = |disk: &usize| !self.disks[*disk].gone && !self.disks[*disk].foreign;
        let found: Vec<(usize, Found)> = (0..self.disks.len())
            .filter(there)
            .filter_map(|disk| Some((disk, self.meta[disk].found()?.clone())))
            .collect();
        // Beyond the fault model every disk in sync may be gone or rotten: no start should go on without them.
        let in_sync = self.in_sync_disks();
        if !found.iter().any(|(disk, _)| in_sync.contains(disk)) {
            return Ok(());
        }
        // What is refused is judged when it is started.
        let Ok((assembly, index_of_found)) = self.assemble_found(found) else { return Ok(()) };
        self.counts.crash_images += 1;
        let name = "promise_7_recovery";
        self.is_sound(name, &assembly, &index_of_found, Cut::Power)?;
        self.is_sound(name, &assembly, &index_of_found, Cut::Kill)?;
        if self.looks.is_multiple_of(CRASHES_JUDGED_ONE_IN * ORACLES_ASKED_ONE_IN) {
            let Some(source) = disk_in(&assembly, &index_of_found, assembly.source) else { return Ok(()) };
            let (mut cut, mut killed) = (self.oracle.clone(), self.oracle.clone());
            cut.power_cut();
            killed.process_killed();
            let disk = &self.disks[source].disk;
            // Beyond the fault model the last replica may have lost its cache before an earlier restart.
            if self.plan.within_model || !disk.has_lost(self.plan.volume_bytes) {
                cut.check_image(disk.durable_image())
                    .or_else(|why| violated(name, format!("a power cut now: source disk {source}: {why}")))?;
            }
            killed
                .check_image(disk.image())
                .or_else(|why| violated(name, format!("a kill now: source disk {source}: {why}")))?;
        }
        Ok(())
    }

    /// Whether the replicas of an assembly differ only where it knows.
    fn is_sound(&mut self, name: &str, assembly: &Assembly, index_of_found: &[usize], cut: Cut) -> Checked {
        let Some(source) = disk_in(assembly, index_of_found, assembly.source) else { return Ok(()) };
        let regions = self.regions();
        let volume = self.plan.volume_bytes;
        let image_of = if cut == Cut::Power { Disk::durable_image } else { Disk::image };
        for slot in assembly.in_sync.union(assembly.resync).iter() {
            let Some(disk) = disk_in(assembly, index_of_found, slot) else { continue };
            let lost = |disk: usize| self.disks[disk].disk.has_lost(volume);
            if cut == Cut::Power && (lost(source) || lost(disk)) {
                continue;
            }
            if let Ok([source, disk]) = self.disks.get_disjoint_mut([source, disk]) {
                disk.disk.share_equal(&source.disk);
            }
            let (one, other) = (image_of(&self.disks[source].disk), image_of(&self.disks[disk].disk));
            for block in differing_blocks(one, other, volume) {
                let region = regions.of(block * BLOCK_BYTES).index();
                let stale = assembly.resync.contains(slot) && assembly.maps.stale[slot.index()][region];
                if !assembly.unsynced[region] && !stale {
                    return violated(
                        name,
                        format!(
                            "disks {source} (the source) and {disk} (slot {slot}) differ in block {block} of region \
                             {region}, which would not be synced; in sync {:?}, resync {:?}",
                            assembly.in_sync, assembly.resync
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    /// Promise 8, of each start: no stale map of a replica that is trusted is dropped by a "no resync needed", and
    /// replicas differ only where they are going to be synced, whatever their counters say.
    pub(super) fn promise_8_no_silent_rollback(
        &mut self,
        assembly: &Assembly,
        index_of_found: &[usize],
    ) -> Checked {
        let name = "promise_8_no_silent_rollback";
        for slot in assembly.in_sync.iter() {
            let Some(disk) = disk_in(assembly, index_of_found, slot) else { continue };
            let Some(found) = self.find(disk).ok().flatten() else { continue };
            for other in assembly.in_sync.iter().filter(|other| *other != slot) {
                let mut map = found.maps.stale[other.index()].clone();
                found.damaged_regions.iter().for_each(|regions| map[regions.clone()].fill(false));
                if map.any() {
                    return violated(
                        name,
                        format!("slot {other} counts as in sync; by disk {disk} it missed writes"),
                    );
                }
            }
        }
        // Beyond the fault model every disk in sync may have been put back to an older copy, one that fits the others.
        if !self.plan.within_model && self.suspect.is_some() {
            return Ok(());
        }
        self.is_sound(name, assembly, index_of_found, Cut::Kill)
    }

    /// Promise 8: a replica that knows it is not in sync is not started alone.
    pub(super) fn promise_8_stale_alone(&self) -> Checked {
        for disk in 0..self.disks.len() {
            let Some(found) = self.find(disk).ok().flatten().filter(|_| !self.disks[disk].foreign) else {
                continue;
            };
            let state = found.superblock.own_entry().map(|own| own.state);
            if state.is_some_and(|state| state != MemberState::InSync)
                && let Ok((assembly, _)) = self.assemble_found(vec![(disk, found)])
            {
                return violated(
                    "promise_8_no_silent_rollback",
                    format!(
                        "disk {disk}, which is {state:?}, is started alone: in sync {:?}",
                        assembly.in_sync
                    ),
                );
            }
        }
        Ok(())
    }
}

/// What a crash leaves of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// What is durable; of a disk that a failed flush has lost something on, nobody knows.
    Power,
    /// What it reads.
    Kill,
}

fn disk_in(assembly: &Assembly, index_of_found: &[usize], slot: ReplicaSlot) -> Option<usize> {
    assembly.found_of_slot[slot.index()].map(|found| index_of_found[found])
}
