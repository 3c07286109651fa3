//! Creating the volume and starting the daemon, through the very code that the real one uses: metadata is
//! created, read from the images and assembled by `format`.

use nix::errno::Errno;
use uuid::Uuid;

use crate::buffer::BufferPool;
use crate::format::assemble::{AssembleError, AssembleOptions, assemble};
use crate::format::create::{Created, NewReplica, NewVolume, new_volume};
use crate::format::layout::{Layout, superblock_offset};
use crate::format::read::{ReadError, read_found};
use crate::format::superblock::PARENTS_MAX;
use crate::format::{Assembly, Found};
use crate::mirror::event::DeviceTraits;
use crate::mirror::{Mirror, MirrorConfig};
use crate::units::{BLOCK_BYTES, MILLISECOND_NS, Nanos, REPLICAS_MAX, ReplicaSet, ReplicaSlot};

use super::counts::FaultKind;
use super::disk::Disk;
use super::promises::MetaView;
use super::rng::Rng;
use super::world::{Checked, SimDisk, Violation, World, violated};

/// Wall-clock time at the simulation's beginning.
const ORIGIN_UNIX_NS: u64 = 1_700_000_000_000_000_000;

fn uuid(rng: &mut Rng) -> Uuid {
    Uuid::from_u64_pair(rng.next_u64(), rng.next_u64())
}

impl World {
    /// Makes blank disks and the volume on them, perhaps with a power cut on the way.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn create(&mut self) -> Checked {
        let regions = self.regions();
        let slow = self.rng.below(self.plan.aligns.len() as u64) as usize;
        for index in 0..self.plan.aligns.len() {
            let bytes = Layout::device_bytes_min(regions) + self.rng.pick(&[0, 0, 1, 3]) * BLOCK_BYTES;
            let slow_factor = if index == slow { self.plan.slow_factor } else { 1 };
            self.add_disk(bytes, self.plan.aligns[index], slow_factor);
        }
        while self.rng.per_mille(100) {
            self.interrupted_create()?;
        }
        let created = self.created()?;
        self.volume_uuid = created.superblocks[0].volume_uuid;
        for index in 0..self.disks.len() {
            self.write_created(index, &created, &mut { u64::MAX });
        }
        self.promise_10_create_writes_no_data()
    }

    /// Writes a new volume's metadata to one disk as the binary does: pages, flush, superblocks, flush. `steps`
    /// counts down with each write and flush; at 0 nothing more is done. Gives whether all was done.
    fn write_created(&mut self, index: usize, created: &Created, steps: &mut u64) -> bool {
        let target = &mut self.disks[index];
        let first_superblock = superblock_offset(target.traits.device_bytes, 0);
        let mut pages_are_durable = false;
        let mut step = || {
            *steps = steps.saturating_sub(1);
            *steps > 0
        };
        for (offset, bytes) in created.writes(index) {
            if offset >= first_superblock && !pages_are_durable {
                if !step() {
                    return false;
                }
                let mark = target.disk.flush_mark();
                target.disk.flush(&mark);
                pages_are_durable = true;
            }
            let write = target.disk.begin_write();
            if !step() {
                // The write that is interrupted lands in part.
                let rng = &mut self.rng;
                target.disk.apply(write, offset.0, &bytes, |_| rng.coin());
                target.disk.complete_write(write);
                return false;
            }
            target.disk.apply(write, offset.0, &bytes, |_| true);
            target.disk.complete_write(write);
        }
        let mark = target.disk.flush_mark();
        target.disk.flush(&mark);
        true
    }

    /// Another blank disk.
    pub(super) fn add_disk(&mut self, bytes: u64, io_align: u32, slow_factor: u64) {
        let mut disk = Disk::new(bytes);
        disk.set_meta_from(bytes - Layout::metadata_bytes(self.regions()));
        let path = format!("disk-{}", self.next_disk());
        let cheap_zero = self.rng.coin();
        let cheap_allocated_zero = cheap_zero && self.rng.coin();
        self.disks.push(SimDisk {
            disk,
            path,
            traits: DeviceTraits { device_bytes: bytes, io_align, cheap_zero, cheap_allocated_zero },
            gone: false,
            full: false,
            unseen_error: false,
            failed_alone: false,
            slow_factor,
            slow_until: Nanos(0),
            stuck_until: Nanos(0),
            foreign: false,
            rotten: false,
            copies: vec![],
        });
        self.meta.push(MetaView::default());
    }

    fn next_disk(&mut self) -> u64 {
        self.disks_made += 1;
        self.disks_made - 1
    }

    /// Puts a blank disk in the place of another one.
    pub(super) fn replace_disk(&mut self, index: usize) {
        let bytes = Layout::device_bytes_min(self.regions()) + self.rng.pick(&[0, 0, 2]) * BLOCK_BYTES;
        let (io_align, slow) = (self.disks[index].traits.io_align, self.disks[index].slow_factor);
        self.add_disk(bytes, io_align, slow);
        let last = self.disks.len() - 1;
        self.disks.swap_remove(index);
        self.meta.swap_remove(index);
        assert_eq!(self.disks.len(), last);
    }

    /// The metadata of a new volume on all disks.
    pub(super) fn created(&mut self) -> Result<Created, Violation> {
        let replicas = self
            .disks
            .iter()
            .map(|disk| NewReplica {
                uuid: uuid(&mut self.rng),
                path: disk.path.clone(),
                device_bytes: disk.traits.device_bytes,
            })
            .collect();
        let volume = NewVolume {
            name: "sim".to_owned(),
            regions: self.regions(),
            now_unix_ns: ORIGIN_UNIX_NS,
            volume_uuid: uuid(&mut self.rng),
            generation: uuid(&mut self.rng),
            replicas,
            in_sync: true,
        };
        new_volume(volume).or_else(|error| violated("create", error))
    }

    /// A `create` that a power cut, a kill or an I/O error ends: it must leave nothing that starts and lies.
    fn interrupted_create(&mut self) -> Checked {
        let created = self.created()?;
        let steps_in_all: u64 = (0..self.disks.len()).map(|i| created.writes(i).count() as u64 + 2).sum();
        let mut steps = self.rng.between(1, steps_in_all);
        for index in 0..self.disks.len() {
            if !self.write_created(index, &created, &mut steps) {
                break;
            }
        }
        if self.rng.coin() {
            self.counts.fault(FaultKind::CreateCrash);
            let mode = super::disk::CutMode::from_chance(&mut self.rng);
            for disk in &mut self.disks {
                disk.disk.power_cut(&mut self.rng, mode);
            }
        } else {
            // It says so and ends; what it wrote stays, as after a kill.
            self.counts.fault(FaultKind::CreateError);
        }
        let found: Vec<Found> = (0..self.disks.len()).filter_map(|i| self.find(i).ok().flatten()).collect();
        self.promise_10_create_writes_no_data()?;
        match assemble(&found, AssembleOptions { degraded: true, ..AssembleOptions::default() }) {
            Ok(assembly) if assembly.resync.is_empty() => Ok(()),
            // Of a torn slot nobody knows what was in it: another replica that is behind is copied, and nothing lost.
            Ok(_) if found.iter().any(|found| found.newer_may_be_lost) => Ok(()),
            Ok(assembly) => violated("create", format!("resync of {:?} after a crash", assembly.resync)),
            // Leftovers of an attempt before: they are two volumes.
            Err(AssembleError::Empty | AssembleError::Foreign(_)) => Ok(()),
            Err(error) => violated("create", format!("after a crash: {error}")),
        }
    }

    /// Another volume's replica, of the same shape, takes the place of a disk's content.
    pub(super) fn make_foreign(&mut self, index: usize) -> Checked {
        let mut created = self.created()?;
        created.superblocks.iter_mut().for_each(|superblock| superblock.event_count += self.rng.below(50));
        self.disks[index].disk.put_back(Default::default());
        self.write_created(index, &created, &mut { u64::MAX });
        self.disks[index].foreign = true;
        Ok(())
    }

    /// What stands on a disk, as the daemon would read it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn find(&self, index: usize) -> Result<Option<Found>, ReadError> {
        let disk = &self.disks[index];
        read_found(&disk.path, disk.traits.device_bytes, &mut |offset, out| {
            if disk.gone {
                return Err(Errno::ENODEV.into());
            }
            disk.disk.read(offset.0, out);
            Ok(())
        })
    }

    /// What `disks` assemble to, with the disk of each `Found`. Removed members are left out.
    ///
    /// # Errors
    /// The refusal.
    pub fn assemble(&self, disks: &[usize]) -> Result<(Assembly, Vec<usize>), AssembleError> {
        let found = disks
            .iter()
            .filter(|index| !self.disks[**index].gone)
            .filter_map(|index| Some((*index, self.find(*index).ok().flatten()?)))
            .collect();
        self.assemble_found(found)
    }

    /// What was found on these disks assembles to, with the disk of each. Removed members are left out.
    pub(super) fn assemble_found(
        &self,
        mut found: Vec<(usize, Found)>,
    ) -> Result<(Assembly, Vec<usize>), AssembleError> {
        let options = AssembleOptions { degraded: true, ..AssembleOptions::default() };
        loop {
            let list: Vec<Found> = found.iter().map(|(_, found)| found.clone()).collect();
            match assemble(&list, options) {
                Ok(assembly) => return Ok((assembly, found.iter().map(|(index, _)| *index).collect())),
                Err(AssembleError::NotMember { path, .. }) => {
                    let before = found.len();
                    found.retain(|(_, found)| found.path != path);
                    assert!(found.len() < before);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Starts the daemon on `disks`, as far as they are there.
    ///
    /// # Errors
    /// A promise was broken. Where more is lost than a mirror can bear, the run is marked as beyond repair.
    pub fn start(&mut self, disks: &[usize]) -> Checked {
        let disks = &self.without_foreign(disks)?[..];
        let readable = |disk: &usize| {
            let found = self.find(*disk).ok().flatten();
            found.is_some_and(|found| !self.disks[*disk].rotten || found.damaged_slot.is_none())
        };
        if !self.plan.within_model
            && !self.split
            && !self.holders.is_empty()
            && !self.holders.iter().any(readable)
        {
            // Whoever had the newest data has rotted. An operator who goes on with the others gives it up.
            self.trace(|| "no disk that was in sync can be read".to_owned());
            self.beyond_repair = true;
            return Ok(());
        }
        let (mut assembly, index_of_found) = match self.assemble(disks) {
            Ok(assembled) => assembled,
            Err(AssembleError::Diverged(why)) if self.suspect.is_some() => {
                // An old copy of a replica with another past may be refused; the operator takes a blank disk then.
                self.trace(|| format!("refused because of an old copy: {why}"));
                if let Some(disk) = self.suspect.take() {
                    self.replace_disk(disk);
                }
                return self.start(disks);
            }
            Err(AssembleError::Diverged(why)) if self.beyond_history(disks).is_some() => {
                // Away for more generations than the history holds: told from a diverged one by nobody. The
                // operator takes it for a blank disk.
                self.trace(|| format!("refused because the history is full: {why}"));
                if let Some(disk) = self.beyond_history(disks) {
                    self.replace_disk(disk);
                }
                return self.start(disks);
            }
            Err(error) if self.plan.within_model => {
                return violated("promise_8_assembly", format!("refused though a replica is well: {error}"));
            }
            Err(error) => {
                self.trace(|| format!("cannot start: {error}"));
                self.beyond_repair = true;
                return Ok(());
            }
        };
        self.promise_8_no_silent_rollback(&assembly, &index_of_found)?;
        let mut attached = [None; REPLICAS_MAX];
        let mut traits = [None; REPLICAS_MAX];
        for (slot, found) in assembly.found_of_slot.iter().enumerate() {
            // As the binary does: a replica may have moved.
            if let (Some(found), Some(member)) = (found, &mut assembly.head.members[slot]) {
                member.path.clone_from(&self.disks[index_of_found[*found]].path);
            }
            attached[slot] = found.map(|found| index_of_found[found]);
            traits[slot] = attached[slot].map(|disk| self.disks[disk].traits);
        }
        self.trace(|| {
            format!(
                "START: in sync {:?}, resync {:?}, missing {:?}, unsynced {}, dirty {}; {:?}",
                assembly.in_sync,
                assembly.resync,
                assembly.missing,
                assembly.unsynced.count_ones(),
                assembly.maps.intent.count_ones(),
                assembly.warnings
            )
        });
        let write_mostly: ReplicaSet =
            ReplicaSlot::all().filter(|_| self.rng.per_mille(self.plan.write_mostly)).collect();
        let config = MirrorConfig {
            read_only: self.read_only,
            write_mostly,
            traits,
            entropy: u128::from(self.rng.next_u64()) << 64 | u128::from(self.rng.next_u64()),
            wall_clock_origin_ns: ORIGIN_UNIX_NS,
            intent_idle_ns: self.plan.intent_idle_ns,
            resync_jobs_max: self.plan.resync_jobs_max,
            resync_burst_ns: self.plan.resync_burst_ns,
            without_intent: false,
        };
        self.now = self.now.plus(self.rng.between(1, 100) * MILLISECOND_NS);
        let pool = BufferPool::new(64 << 20);
        let mirror = Mirror::new(config, assembly, pool.clone());
        self.begin_life(mirror, pool, attached)
    }

    /// Those of `disks` that hold no other volume. Given together they have to be refused.
    fn without_foreign(&mut self, disks: &[usize]) -> Result<Vec<usize>, Violation> {
        // One that was given up (`add --force`) and not overwritten yet is another volume's still.
        for disk in disks {
            if let Ok(Some(found)) = self.find(*disk) {
                self.disks[*disk].foreign = found.superblock.volume_uuid != self.volume_uuid;
            }
        }
        let (foreign, own): (Vec<usize>, Vec<usize>) =
            disks.iter().partition(|disk| self.disks[**disk].foreign);
        let there = |disk: &usize| self.find(*disk).is_ok_and(|found| found.is_some());
        if foreign.iter().any(there) && own.iter().any(there) {
            match self.assemble(disks) {
                Err(AssembleError::Foreign(_)) => {}
                other => {
                    return violated(
                        "promise_8_foreign_untouched",
                        format!("two volumes in one, and not refused as such: {:?}", other.err()),
                    );
                }
            }
        }
        Ok(own)
    }

    /// A disk whose generation may have fallen out of the newest superblock's history, which is full.
    fn beyond_history(&self, disks: &[usize]) -> Option<usize> {
        let found = |disk: &usize| self.find(*disk).ok().flatten();
        let head =
            disks.iter().filter_map(found).max_by_key(|found| found.superblock.event_count)?.superblock;
        let known = |generation| head.generation == generation || head.parents.contains(&generation);
        let forgotten = |disk: &usize| found(disk).is_some_and(|found| !known(found.superblock.generation));
        (head.parents.len() == PARENTS_MAX).then(|| disks.iter().copied().find(forgotten)).flatten()
    }

    /// Whether every disk is a member in sync, and every superblock and stale map says so.
    #[must_use]
    pub fn all_recorded_in_sync(&self) -> bool {
        (0..self.disks.len()).all(|index| {
            let Ok(Some(found)) = self.find(index) else { return false };
            let states: Vec<_> = found.superblock.members().map(|(_, member)| member.state).collect();
            states.len() == self.disks.len()
                && !self.disks[index].foreign
                && found.damaged_sectors == 0
                && found.damaged_slot.is_none()
                && states.into_iter().all(|state| state == crate::format::superblock::MemberState::InSync)
                && found.maps.stale.iter().all(|map| map.not_any())
        })
    }

    /// A fresh identity.
    pub(super) fn fresh_uuid(&mut self) -> Uuid {
        uuid(&mut self.rng)
    }
}
