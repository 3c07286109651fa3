//! Who is trusted at start: from what stands on the replicas found to a volume ready to run, or a refusal that
//! says what to do.
//!
//! What must hold:
//! - Equal counters never imply equal data: everything in doubt is refused, copied in full, or united.
//! - A stale bit that any trusted replica has is never dropped. Only the damaged sectors of bitmaps, which read as
//!   all bits set, accuse no replica that the table counts as in sync.
//! - `--force` starts from stale replicas; it never mixes volumes and never settles diverged histories.
//!
//! ```text
//! found ─► one volume? ─► head: newest generation, highest event count ─► verdict for each (see `verdict`)
//!       ─► in-sync replicas accused by another's stale map are demoted ─► none left? --force ─► missing? --degraded
//!       ─► intent bits and stale maps united
//! ```

use std::ops::Range;

use super::bitmap::{Bitmap, RegionMaps, unite};
use super::describe::{describe, printable};
use super::refuse;
use super::superblock::{MemberState, Superblock};
use super::verdict::{Lineage, Verdict, level, lineage, verdict};
use crate::planted::{Bug, planted};
use crate::units::{REPLICAS_MAX, ReplicaSet, ReplicaSlot};

pub use super::refuse::AssembleError;
pub use super::verdict::{Readmit, readmit};

/// What stands on one replica, as read by the shell.
#[derive(Clone, Debug)]
pub struct Found {
    /// Path, for messages.
    pub path: String,
    /// Size of the backing now, bytes, a multiple of 4096.
    pub device_bytes: u64,
    /// The newest valid superblock.
    pub superblock: Superblock,
    /// The other superblock slot is damaged (torn or rotten): its number.
    pub damaged_slot: Option<u64>,
    /// What stands there may be the rest of a newer superblock. (A blank slot was never written: the newest one is here.)
    pub newer_may_be_lost: bool,
    /// Its bitmaps; damaged sectors have all their bits set.
    pub maps: RegionMaps,
    /// Number of damaged bitmap sectors.
    pub damaged_sectors: u64,
    /// The regions whose bits are set because their sector is damaged, in order. Their stale bits accuse nobody.
    pub damaged_regions: Vec<Range<usize>>,
    /// Read-only compatible features that this program does not know: not 0 means that it must not be written.
    pub read_only_features: u64,
}

impl Found {
    /// A replica in good order with `superblock` and `maps`.
    #[must_use]
    pub fn new(path: &str, superblock: Superblock, maps: RegionMaps) -> Self {
        Self {
            path: path.to_owned(),
            device_bytes: superblock.device_bytes,
            superblock,
            damaged_slot: None,
            newer_may_be_lost: false,
            maps,
            damaged_sectors: 0,
            damaged_regions: Vec::new(),
            read_only_features: 0,
        }
    }

    /// One line for operators: what its superblock says.
    #[must_use]
    pub fn describe(&self) -> String {
        describe(&self.superblock)
    }

    /// Whether it says, outside damaged sectors, that the replica in `slot` missed a write.
    fn accuses(&self, slot: ReplicaSlot) -> bool {
        let map = &self.maps.stale[slot.index()];
        if self.damaged_regions.is_empty() {
            return map.any();
        }
        let mut sound = map.clone();
        for regions in &self.damaged_regions {
            sound[regions.clone()].fill(false);
        }
        sound.any()
    }

    /// Whether it may have said in what is lost that another one missed a write: a newer superblock than the head may be lost
    /// on it, and so may be some of what its stale maps said. It took part in that commit itself.
    fn may_have_accused(&self, head: &Superblock) -> bool {
        self.newer_may_be_lost && !self.damaged_regions.is_empty() && level(head, &self.superblock)
    }
}

/// What the operator allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssembleOptions {
    /// Start though members are missing.
    pub degraded: bool,
    /// Start though no replica is in sync: from the best of the stale ones.
    pub force: bool,
    /// The volume is only read: nothing will be written, metadata included.
    pub read_only: bool,
}

/// A volume ready to be run: what the core starts from.
///
/// The bits of `maps` may be more than those on any one replica; the core makes them durable before it clears an
/// intent bit.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// The head superblock: the newest table, event count and generation. Its `slot`, `device_bytes` and
    /// `written_unix_ns` are those of the replica it came from. Where `forced`, the entries of missing members
    /// have event count 0 (keep that): it refuses them as diverged when they come back.
    pub head: Superblock,
    /// Which of the `Found` given (by index) is the replica in each slot; `None`: free or not found.
    pub found_of_slot: [Option<usize>; REPLICAS_MAX],
    /// Found and trusted to have every acknowledged write outside `unsynced`.
    pub in_sync: ReplicaSet,
    /// Found, a known member, to be brought up to date where `maps.stale` says.
    pub resync: ReplicaSet,
    /// In the table and not found.
    pub missing: ReplicaSet,
    /// Start values of the intent bits and stale maps (union over the trusted replicas).
    pub maps: RegionMaps,
    /// Regions whose copies on the in-sync replicas may differ; empty of bits where fewer than two are in sync.
    pub unsynced: Bitmap,
    /// The replica that unsynced regions are copied from.
    pub source: ReplicaSlot,
    /// The operator used `--force` to start from stale replicas: a new generation is due even where no
    /// replica is missing.
    pub forced: bool,
    /// A newer superblock than the head may be lost on everybody who is found: its event count may be used again, and
    /// an old copy may have it too.
    pub in_doubt: bool,
    /// Those in sync whose newest superblock is older than the head (by one: a crash fell between).
    pub laggards: ReplicaSet,
    /// What an operator should be told (damaged slots, replicas that need a full copy and why).
    pub warnings: Vec<String>,
}

/// Decides who is trusted among `found`, the replicas that were given, in any order.
///
/// # Errors
/// See [`AssembleError`]; each text says what to do.
pub fn assemble(found: &[Found], options: AssembleOptions) -> Result<Assembly, AssembleError> {
    refuse::check_one_volume(found)?;
    refuse::check_copies(found)?;
    refuse::check_features(found, options)?;
    let (head, verdicts) = choose_head(found)?;
    refuse::check_members(found, head, &verdicts)?;
    let mut roles = Roles::sort(head, &verdicts);
    if in_doubt(found, head) {
        // What is lost may have taken one of them in again, and cleared its stale map.
        roles.full = roles.full.union(roles.missing);
    }
    roles.demote_accused(found, head)?;
    let forced = roles.in_sync.is_empty();
    if forced {
        if !options.force && !planted(Bug::ForceNotNeeded) {
            return Err(refuse::none_in_sync(found, head, roles.missing));
        }
        roles.force_best(found, head);
    }
    if !roles.missing.is_empty() && !options.degraded {
        return Err(refuse::missing(found, head, roles.missing, forced));
    }
    Ok(roles.into_assembly(found, head, forced))
}

/// The head and what each found is to it. The newest generation comes first, then the highest event count; where
/// several stand level and differ, the one that the others' histories bow to.
fn choose_head(found: &[Found]) -> Result<(&Superblock, Vec<Verdict>), AssembleError> {
    let superblocks = || found.iter().map(|found| &found.superblock);
    let is_newest = |one: &&Superblock| !superblocks().any(|other| lineage(one, other) == Lineage::Older);
    let Some(first) = superblocks().filter(is_newest).max_by_key(|one| one.event_count) else {
        return Err(refuse::diverged(found));
    };
    superblocks()
        .filter(|one| level(first, one))
        .map(|head| (head, judge(found, head)))
        .find(|(_, verdicts)| !verdicts.iter().any(|v| matches!(v, Verdict::Diverged(_))))
        .ok_or_else(|| refuse::diverged(found))
}

/// Whether one of the newest lacks its other superblock, and that may have been a newer one, and not just torn.
fn in_doubt(found: &[Found], head: &Superblock) -> bool {
    found.iter().any(|one| one.newer_may_be_lost && level(head, &one.superblock))
}

/// What each found is to `head`. A head in doubt lets nobody be behind by one, if there is somebody in sync beside that: where
/// not, those that are behind are the best there is.
fn judge(found: &[Found], head: &Superblock) -> Vec<Verdict> {
    let verdicts: Vec<_> = found.iter().map(|one| verdict(head, &one.superblock)).collect();
    let is_anchor = |(one, verdict): (&Found, &Verdict)| {
        level(head, &one.superblock) && matches!(verdict, Verdict::InSync(_))
    };
    if !in_doubt(found, head) || !found.iter().zip(&verdicts).any(is_anchor) {
        return verdicts;
    }
    found.iter().zip(verdicts).map(|(one, verdict)| verdict.in_doubt(head, &one.superblock)).collect()
}

/// The members' roles, while they are being decided.
struct Roles {
    found_of_slot: [Option<usize>; REPLICAS_MAX],
    /// In sync by the table and current: their maps count, also those of replicas demoted later.
    trusted: ReplicaSet,
    in_sync: ReplicaSet,
    resync: ReplicaSet,
    /// Of `resync` and `missing`: its stale map does not say all.
    full: ReplicaSet,
    missing: ReplicaSet,
    warnings: Vec<String>,
}

impl Roles {
    fn sort(head: &Superblock, verdicts: &[Verdict]) -> Self {
        let mut roles = Self {
            found_of_slot: [None; REPLICAS_MAX],
            trusted: ReplicaSet::EMPTY,
            in_sync: ReplicaSet::EMPTY,
            resync: ReplicaSet::EMPTY,
            full: ReplicaSet::EMPTY,
            missing: head.members().map(|(slot, _)| slot).collect(),
            warnings: Vec::new(),
        };
        for (index, verdict) in verdicts.iter().enumerate() {
            let slot = match verdict {
                Verdict::InSync(slot) => {
                    roles.in_sync.insert(*slot);
                    *slot
                }
                Verdict::Delta(slot) => {
                    roles.resync.insert(*slot);
                    *slot
                }
                Verdict::Full(slot, why) => {
                    roles.resync.insert(*slot);
                    roles.full.insert(*slot);
                    roles.warnings.push(format!("replica {slot}: {why}; all of it will be copied"));
                    *slot
                }
                // Refused before.
                Verdict::Foreign | Verdict::Diverged(_) | Verdict::NotMember => continue,
            };
            // One identity was found once (`check_copies`), so each slot is filled once.
            assert!(roles.missing.contains(slot));
            roles.missing.remove(slot);
            roles.found_of_slot[slot.index()] = Some(index);
        }
        roles.trusted = roles.in_sync;
        roles
    }

    fn found<'a>(&self, found: &'a [Found], slot: ReplicaSlot) -> Option<&'a Found> {
        self.found_of_slot[slot.index()].map(|index| &found[index])
    }

    /// A trusted replica's stale map counts even against a replica that the table calls in sync: the superblock that
    /// demoted it may be lost. Where nobody would be left, they accuse each other and nobody can be believed.
    fn demote_accused(&mut self, found: &[Found], head: &Superblock) -> Result<(), AssembleError> {
        let mut accused = ReplicaSet::EMPTY;
        let mut by_another = false;
        for accuser in self.trusted.iter() {
            let Some(witness) = self.found(found, accuser) else { continue };
            for slot in self.trusted.iter().filter(|slot| witness.accuses(*slot)) {
                accused.insert(slot);
                by_another |= slot != accuser;
            }
        }
        for (accuser, slot) in self.accused_by_tables(found, head) {
            accused.insert(slot);
            by_another |= slot != accuser;
            // Its stale map may not tell all.
            self.full.insert(slot);
        }
        if accused == self.trusted && by_another {
            return Err(refuse::accuse_each_other(found));
        }
        for slot in accused.iter() {
            self.in_sync.remove(slot);
            self.resync.insert(slot);
            self.warnings.push(format!(
                "replica {slot} counts as in sync, but the bitmaps or another superblock say that it missed writes (the \
                 newest superblock may be lost); it will be brought up to date"
            ));
        }
        Ok(())
    }

    /// Who is in sync by the head and not by another superblock of the same commit, with the slot of that one. No sequence of
    /// commits is known to leave two that differ; but equal counters never imply equal data (promise 8).
    fn accused_by_tables(&self, found: &[Found], head: &Superblock) -> Vec<(ReplicaSlot, ReplicaSlot)> {
        let witness = |slot: &ReplicaSlot| {
            let superblock = &self.found(found, *slot)?.superblock;
            level(head, superblock).then_some((*slot, superblock))
        };
        let denies = |superblock: &Superblock, slot: ReplicaSlot| {
            let entry = superblock.members[slot.index()].as_ref();
            let uuid = head.members[slot.index()].as_ref().map(|member| member.uuid);
            !entry.is_some_and(|entry| Some(entry.uuid) == uuid && entry.state == MemberState::InSync)
        };
        ReplicaSlot::all()
            .filter_map(|slot| witness(&slot))
            .flat_map(|(accuser, superblock)| {
                self.in_sync
                    .iter()
                    .filter(|slot| denies(superblock, *slot))
                    .map(move |slot| (accuser, slot))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// `--force`: the best of the stale replicas becomes the volume's content. First those that were whole once over one whose
    /// copy was not finished; then newest history, highest event count, fewest stale bits of its own, lowest slot.
    fn force_best(&mut self, found: &[Found], head: &Superblock) {
        let rank = |slot: &ReplicaSlot| {
            self.found(found, *slot).map(|found| {
                let generation = found.superblock.generation;
                let age = head.parents.iter().position(|parent| *parent == generation).map_or(0, |at| at + 1);
                let age = if generation == head.generation { 0 } else { age };
                let stale = found.maps.stale[slot.index()].count_ones();
                let own = found.superblock.own_entry().map(|entry| entry.state);
                let is_half_a_copy = own != Some(MemberState::InSync) && stale > 0;
                (is_half_a_copy, age, std::cmp::Reverse(found.superblock.event_count), stale, *slot)
            })
        };
        let best = self.resync.iter().min_by_key(rank);
        // At least one was found, and none of them is in sync.
        assert!(best.is_some());
        if let Some(slot) = best {
            self.resync.remove(slot);
            self.in_sync = ReplicaSet::only(slot);
            self.warnings.push(format!("started from replica {slot}, which missed writes (--force)"));
        }
        self.trusted = self.in_sync;
        self.full = self.resync.union(self.missing);
    }

    fn into_assembly(mut self, found: &[Found], found_head: &Superblock, forced: bool) -> Assembly {
        let in_doubt = in_doubt(found, found_head);
        let mut head = found_head.clone();
        let regions = head.regions.count() as usize;
        let maps = self.united_maps(found, regions);
        if forced {
            let event_counts = found.iter().map(|found| found.superblock.event_count);
            head.event_count = event_counts.fold(head.event_count, u64::max);
            // They may hold what this start gives up: when they come back they are beyond this count, so diverged.
            for slot in self.missing.iter() {
                if let Some(entry) = &mut head.members[slot.index()] {
                    entry.event_count = 0;
                }
            }
        }
        // In doubt it was not stopped in order: everybody who has the newest commit says that it was.
        let denies = |slot| {
            self.found(found, slot).is_some_and(|found| {
                !found.superblock.clean && found.superblock.event_count == head.event_count
            })
        };
        head.clean &= !self.in_sync.iter().any(denies);
        // The regions of damaged sectors count as dirty. Who may have said there that another one missed a write has what
        // is right; where nobody missed one, its copy is as good as any.
        let witness = self
            .in_sync
            .iter()
            .find(|slot| self.found(found, *slot).is_some_and(|found| found.may_have_accused(found_head)));
        // After an orderly stop the in-sync replicas hold the same bytes, whatever bits had to stay set (a replica
        // that is away keeps them).
        let may_differ = self.in_sync.len() >= 2
            && (!head.clean || witness.is_some())
            && !planted(Bug::EqualCountersEqualData);
        let unsynced = if may_differ { maps.intent.clone() } else { Bitmap::repeat(false, regions) };
        let Some(source) = witness.or(self.in_sync.first()) else {
            unreachable!("assemble refuses or forces where none is in sync")
        };
        let lags = |slot: &ReplicaSlot| {
            self.found(found, *slot).is_some_and(|found| found.superblock.event_count < head.event_count)
        };
        let laggards = if forced { ReplicaSet::EMPTY } else { self.in_sync.iter().filter(lags).collect() };
        self.warn_of_damage(found);
        self.warn_of_missing(&head);
        Assembly {
            in_doubt,
            head,
            found_of_slot: self.found_of_slot,
            in_sync: self.in_sync,
            resync: self.resync,
            missing: self.missing,
            maps,
            unsynced,
            source,
            forced,
            laggards,
            warnings: self.warnings,
        }
    }

    fn united_maps(&self, found: &[Found], regions: usize) -> RegionMaps {
        let mut maps = RegionMaps::clear(regions);
        for slot in self.trusted.iter() {
            if let Some(found) = self.found(found, slot) {
                maps.unite(&found.maps);
            }
        }
        for slot in ReplicaSlot::all() {
            let stale = &mut maps.stale[slot.index()];
            if self.full.contains(slot) {
                stale.fill(true);
            } else if self.resync.contains(slot) || self.missing.contains(slot) {
                if planted(Bug::StaleMapForgotten) {
                    stale.fill(false);
                    continue;
                }
                // A crash may fall between a replica's loss and the commit of the stale bits for what was dirty
                // then; all of that is dirty still.
                unite(stale, &maps.intent);
                if let Some(found) = self.found(found, slot) {
                    unite(stale, &found.maps.intent);
                }
            } else {
                // In sync: only damaged sectors have bits. No member: bits of one that was removed.
                stale.fill(false);
            }
        }
        maps
    }

    fn warn_of_damage(&mut self, found: &[Found]) {
        for found in found {
            let path = printable(&found.path);
            if let Some(slot) = found.damaged_slot {
                self.warnings.push(format!(
                    "{path}: superblock slot {slot} is damaged; the other one is used and the next change mends it"
                ));
            }
            if found.damaged_sectors > 0 {
                self.warnings.push(format!(
                    "{path}: {} bitmap sectors are damaged; the regions they describe are synced to be safe",
                    found.damaged_sectors
                ));
            }
        }
    }

    fn warn_of_missing(&mut self, head: &Superblock) {
        for (slot, member) in head.members().filter(|(slot, _)| self.missing.contains(*slot)) {
            let path = printable(&member.path);
            self.warnings.push(format!("replica {slot} ({path}) is missing: the volume runs degraded"));
        }
    }
}
