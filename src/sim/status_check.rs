//! The status is asked for at any moment, and compared with the disks, the operations in flight and the answers.
//!
//! What must hold: what `docs/status-json.md` says of each field.

use crate::mirror::status::{Health, ReplicaState, Status};
use crate::units::{BLOCK_BYTES, ReplicaSet, ReplicaSlot};

use super::world::{Checked, Daemon, World, violated};

impl World {
    /// The status tells the truth.
    pub(super) fn status_is_true(&mut self) -> Checked {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let status = daemon.mirror.status(self.now);
        self.counts.statuses += 1;
        let lie = self
            .volume_lie(&status, daemon)
            .or_else(|| clients_lie(&status, daemon))
            .or_else(|| status.replicas.iter().find_map(|replica| self.replica_lie(replica, daemon)))
            .or_else(|| write_mostly_lie(&status, daemon));
        match lie {
            None => Ok(()),
            Some(lie) => violated("status_is_true", format!("{lie}; {status:?}")),
        }
    }

    fn volume_lie(&self, status: &Status, daemon: &Daemon) -> Option<String> {
        let all_in_sync = daemon.in_sync == daemon.members;
        let inactive = daemon.members.difference(daemon.in_sync.union(daemon.resyncing));
        let shown: ReplicaSet = status.replicas.iter().map(|r| ReplicaSlot::new(r.slot)).collect();
        let shares: f64 = status.replicas.iter().map(|replica| replica.read_share).sum();
        let volume = self.plan.volume_bytes;
        let lies = [
            (status.size_bytes != volume, "size"),
            (status.region_bytes != self.plan.region_bytes, "region size"),
            (status.read_only != self.read_only, "read-only"),
            (shown != daemon.members, "replicas listed"),
            (status.health == Health::Healthy && !all_in_sync, "healthy with a replica not in sync"),
            (status.health == Health::Resyncing && !inactive.is_empty(), "resyncing with a replica away"),
            (
                matches!(status.health, Health::Healthy | Health::Resyncing) && daemon.members.len() < 2,
                "not degraded with one member",
            ),
            (status.dirty_bytes > volume || status.unsynced_bytes > status.dirty_bytes, "more than there is"),
            (status.resync.is_some_and(|resync| resync.remaining_bytes == 0), "a resync of nothing"),
            (shares != 0.0 && (shares - 1.0).abs() > 1e-6, "shares of reads"),
            (daemon.mirror.is_open() && status.dirty_bytes < self.dirty_bytes_min(daemon), "too few dirty"),
        ];
        lies.into_iter().find(|(lie, _)| *lie).map(|(_, what)| what.to_owned())
    }

    /// Bytes in regions whose data on a replica in sync is not flushed: at the least these are dirty.
    fn dirty_bytes_min(&self, daemon: &Daemon) -> u64 {
        if self.read_only {
            return 0;
        }
        let mut regions: Vec<_> = daemon
            .in_sync
            .iter()
            .filter_map(|slot| daemon.attached[slot.index()])
            .flat_map(|disk| self.disks[disk].disk.unflushed_blocks(self.plan.volume_bytes))
            .map(|block| self.regions().of(block * BLOCK_BYTES))
            .collect();
        regions.sort_unstable();
        regions.dedup();
        regions.into_iter().map(|region| self.regions().range(region).len).sum()
    }

    fn replica_lie(&self, replica: &crate::mirror::status::ReplicaStatus, daemon: &Daemon) -> Option<String> {
        let slot = ReplicaSlot::new(replica.slot);
        let (in_sync, resyncing) = (daemon.in_sync.contains(slot), daemon.resyncing.contains(slot));
        let on_it = daemon.ops.values().filter(|op| op.slot == slot).count() as u64;
        let path_lies =
            daemon.attached[slot.index()].is_some_and(|disk| self.disks[disk].path != replica.path);
        let lies = [
            (in_sync != (replica.state == ReplicaState::InSync), "in sync or not"),
            (resyncing != (replica.state == ReplicaState::Resyncing), "resyncing or not"),
            (in_sync && replica.stale_bytes != 0, "in sync and stale"),
            (replica.stale_bytes > self.plan.volume_bytes, "more stale than there is"),
            ((in_sync || resyncing) && replica.in_flight != on_it, "operations in flight"),
            (path_lies, "path"),
        ];
        lies.into_iter().find(|(lie, _)| *lie).map(|(_, what)| format!("replica {slot}: {what}"))
    }
}

fn clients_lie(status: &Status, daemon: &Daemon) -> Option<String> {
    let clients = &status.clients;
    let changes = clients.writes + clients.flushes + clients.trims + clients.zeroes;
    let answered = clients.reads + changes + clients.caches + clients.block_statuses + clients.errors;
    if answered != daemon.replies {
        return Some(format!("{answered} requests answered, it was {}", daemon.replies));
    }
    (clients.in_flight != daemon.requests.len() as u64).then(|| "requests in flight".to_owned())
}

/// A write-mostly replica answers no reads while another one is in sync and gives no errors.
fn write_mostly_lie(status: &Status, daemon: &Daemon) -> Option<String> {
    // Served read-only, where copies may differ, one fixed replica answers.
    let fixed = status.read_only && status.unsynced_bytes > 0;
    let sound = !fixed
        && status.replicas.iter().any(|replica| {
            !replica.write_mostly
                && replica.errors == 0
                && daemon.always_in_sync.contains(ReplicaSlot::new(replica.slot))
        });
    let reads = status.replicas.iter().find(|replica| replica.write_mostly && replica.reads > 0);
    reads.filter(|_| sound).map(|replica| format!("write-mostly replica {} was read", replica.slot))
}
