//! The core's snapshot for operators.

use super::Mirror;
use super::status::{Health, ReplicaStatus, ResyncStatus, Status};
use crate::format::bitmap::Bitmap;
use crate::units::{Nanos, RegionIndex, ReplicaSlot};

impl Mirror {
    /// Bytes in the regions that `map` marks.
    pub(super) fn bytes_in(&self, map: &Bitmap) -> u64 {
        map.iter_ones().map(|index| self.regions.range(RegionIndex(index as u64)).len).sum()
    }

    /// A snapshot for operators.
    #[must_use]
    pub fn status(&self, now: Nanos) -> Status {
        let reads: u64 = self.members().iter().map(|slot| self.policy.stats(slot).reads).sum();
        Status {
            volume_uuid: self.head.volume_uuid,
            name: self.head.name.clone(),
            size_bytes: self.regions.volume_bytes,
            region_bytes: self.regions.region_bytes,
            read_only: self.config.read_only,
            health: self.health(),
            event_count: self.head.event_count,
            generation: self.head.generation,
            dirty_bytes: self.bytes_in(&self.maps.intent),
            unclean_bytes_at_start: self.unclean_bytes_at_start,
            unsynced_bytes: self.bytes_in(&self.unsynced),
            replicas: self.members().iter().map(|slot| self.replica_status(slot, reads)).collect(),
            resync: self.resync_status(now),
            clients: self.counters,
        }
    }

    fn health(&self) -> Health {
        if self.broken || self.in_sync.iter().all(|slot| self.replica(slot).flush_failed) {
            Health::Failed
        } else if !self.inactive_members().is_empty() || self.members().len() < 2 {
            Health::Degraded
        } else if !self.config.read_only && self.anything_to_copy() || !self.resyncing.is_empty() {
            Health::Resyncing
        } else {
            Health::Healthy
        }
    }

    fn replica_status(&self, slot: ReplicaSlot, reads: u64) -> ReplicaStatus {
        let replica = self.replica(slot);
        let stats = self.policy.stats(slot);
        ReplicaStatus {
            slot: slot.index(),
            uuid: replica.member.uuid,
            path: replica.member.path.clone(),
            state: replica.state,
            reason: replica.reason.clone(),
            write_mostly: self.policy.is_write_mostly(slot),
            stale_bytes: self.bytes_in(&self.maps.stale[slot.index()]),
            read_latency_ewma_ns: stats.read_latency_ns(),
            write_latency_ewma_ns: stats.write_latency_ns,
            reads: stats.reads,
            read_bytes: stats.read_bytes,
            read_share: if reads == 0 { 0.0 } else { stats.reads as f64 / reads as f64 },
            writes: stats.writes,
            errors: replica.errors,
            in_flight: replica.in_flight,
        }
    }

    fn resync_status(&self, now: Nanos) -> Option<ResyncStatus> {
        if self.config.read_only || !self.anything_to_copy() {
            return None;
        }
        let remaining_bytes = self.bytes_to_copy();
        let rate_bytes_per_s = self.resync.rate_bytes_per_s(now);
        Some(ResyncStatus {
            remaining_bytes,
            done_bytes: self.resync.done_bytes,
            rate_bytes_per_s,
            time_left_s: remaining_bytes.div_ceil(1).checked_div(rate_bytes_per_s),
        })
    }
}
