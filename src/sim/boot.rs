//! Creating the volume and starting the daemon, through the very code that the real one uses: metadata is
//! created, read from the images and assembled by `format`.

use nix::errno::Errno;
use uuid::Uuid;

use crate::buffer::BufferPool;
use crate::format::assemble::{AssembleError, AssembleOptions, assemble};
use crate::format::create::{Created, NewReplica, NewVolume, new_volume};
use crate::format::layout::Layout;
use crate::format::read::{ReadError, read_found};
use crate::format::superblock::PARENTS_MAX;
use crate::format::{Assembly, Found};
use crate::mirror::event::DeviceTraits;
use crate::mirror::{Mirror, MirrorConfig};
use crate::units::{BLOCK_BYTES, MILLISECOND_NS, REPLICAS_MAX, ReplicaSet};

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
        let created = self.created()?;
        if self.rng.per_mille(50) {
            self.interrupted_create(&created)?;
        }
        for index in 0..self.disks.len() {
            for (offset, bytes) in created.writes(index) {
                let disk = &mut self.disks[index].disk;
                let write = disk.begin_write();
                disk.apply(write, offset.0, &bytes, |_| true);
                disk.complete_write(write);
            }
            let mark = self.disks[index].disk.flush_mark();
            self.disks[index].disk.flush(&mark);
        }
        Ok(())
    }

    /// Another blank disk.
    pub(super) fn add_disk(&mut self, bytes: u64, io_align: u32, slow_factor: u64) {
        let mut disk = Disk::new(bytes);
        disk.set_meta_from(bytes - Layout::metadata_bytes(self.regions()));
        let path = format!("disk-{}", self.next_disk());
        self.disks.push(SimDisk {
            disk,
            path,
            traits: DeviceTraits { device_bytes: bytes, io_align, cheap_zero: self.rng.coin() },
            gone: false,
            full: false,
            unseen_error: false,
            slow_factor,
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

    /// A `create` that the power cut ends: it must leave nothing that starts and lies.
    fn interrupted_create(&mut self, created: &Created) -> Checked {
        let stop_at = self.rng.below(4 * self.disks.len() as u64);
        let mut step = 0;
        for index in 0..self.disks.len() {
            for (offset, bytes) in created.writes(index) {
                step += 1;
                if step <= stop_at {
                    let disk = &mut self.disks[index].disk;
                    let write = disk.begin_write();
                    disk.apply(write, offset.0, &bytes, |_| true);
                }
            }
        }
        let mode = super::disk::CutMode::from_chance(&mut self.rng);
        for disk in &mut self.disks {
            disk.disk.power_cut(&mut self.rng, mode);
        }
        let found: Vec<Found> = (0..self.disks.len()).filter_map(|i| self.find(i).ok().flatten()).collect();
        match assemble(&found, AssembleOptions { degraded: true, ..AssembleOptions::default() }) {
            Ok(assembly) if assembly.resync.is_empty() => Ok(()),
            Ok(assembly) => violated("create", format!("resync of {:?} after a crash", assembly.resync)),
            Err(AssembleError::Empty) => Ok(()),
            Err(error) => violated("create", format!("after a crash: {error}")),
        }
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
        let mut found: Vec<(usize, Found)> = disks
            .iter()
            .filter(|index| !self.disks[**index].gone)
            .filter_map(|index| Some((*index, self.find(*index).ok().flatten()?)))
            .collect();
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
        let (assembly, index_of_found) = match self.assemble(disks) {
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
        let mut attached = [None; REPLICAS_MAX];
        let mut traits = [None; REPLICAS_MAX];
        for (slot, found) in assembly.found_of_slot.iter().enumerate() {
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
        let config = MirrorConfig {
            read_only: false,
            write_mostly: ReplicaSet::EMPTY,
            traits,
            entropy: u128::from(self.rng.next_u64()) << 64 | u128::from(self.rng.next_u64()),
            wall_clock_origin_ns: ORIGIN_UNIX_NS,
            intent_idle_ns: self.plan.intent_idle_ns,
            resync_jobs_max: self.plan.resync_jobs_max,
        };
        self.now = self.now.plus(self.rng.between(1, 100) * MILLISECOND_NS);
        let pool = BufferPool::new(64 << 20);
        let mirror = Mirror::new(config, assembly, pool.clone());
        self.begin_life(mirror, pool, attached)
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
