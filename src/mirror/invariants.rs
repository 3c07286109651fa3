//! What must hold between events, checked by the simulator after each step.

use super::Mirror;
use super::status::ReplicaState;
use crate::units::{RegionIndex, ReplicaSet};

impl Mirror {
    /// Checks the core against itself. Costs time in proportion to the volume and to what is in flight.
    ///
    /// # Panics
    /// Where something does not hold: a bug.
    pub fn check_invariants(&self) {
        self.locks.check();
        assert!(!self.in_sync.is_empty(), "the last in-sync replica is never failed");
        assert!(self.in_sync.intersection(self.resyncing).is_empty());
        for slot in self.members().iter() {
            let replica = self.replica(slot);
            assert_eq!(self.in_sync.contains(slot), replica.state == ReplicaState::InSync);
            let count = self.maps.stale[slot.index()].count_ones() as u64;
            assert_eq!(self.stale_count[slot.index()], count);
            assert!(!self.in_sync.contains(slot) || count == 0, "a replica in sync misses nothing");
        }
        assert_eq!(self.unsynced_count, self.unsynced.count_ones() as u64);
        for index in self.unsynced.iter_ones() {
            assert!(self.maps.intent[index], "an unsynced region is dirty");
        }
        if !self.config.read_only {
            self.check_stale_cover();
        }
        for index in 0..self.maps.intent.len() {
            let region = RegionIndex(index as u64);
            let ready = self.maps.intent[index] && self.intent_durable[index];
            assert_eq!(self.region_words.is_ready(region), ready, "{region:?}: the word and the maps differ");
            assert!(
                !self.region_words.is_written(region)
                    || self.maps.intent[index]
                    || self.broken
                    || self.config.without_intent,
                "a region being written is dirty"
            );
        }
        let held: ReplicaSet = self.active().iter().filter(|slot| self.replica(*slot).attached).collect();
        assert_eq!(held, if self.config.read_only { held } else { self.active() });
        assert!(self.locks.len() <= self.tasks.len());
    }

    /// A dirty region is stale on every member that takes no writes.
    fn check_stale_cover(&self) {
        for slot in self.inactive_members().iter() {
            for index in self.maps.intent.iter_ones() {
                let stale = self.maps.stale[slot.index()][index];
                assert!(stale, "{:?} is dirty and not stale on {slot}", RegionIndex(index as u64));
            }
        }
    }

    /// The newest superblock as it would be written now, for verdicts on candidates.
    pub(super) fn current_superblock(&self) -> crate::format::superblock::Superblock {
        let members = std::array::from_fn(|index| {
            self.replicas[index].as_ref().filter(|r| r.is_member()).map(|r| r.member.clone())
        });
        crate::format::superblock::Superblock { members, ..self.head.clone() }
    }
}
