//! What the core knows of one replica, and the sets that follow from it.
//!
//! ```text
//!              found at start, trusted                       error, or `fail`
//!   (start) ──────────────────────────► InSync ───────────────────────────────► Faulty
//!      │                                  ▲                                       │ ▲
//!      │ found, missed writes             │ nothing stale, all pages written,     │ │ error
//!      ├────────────────► Resyncing ──────┘ superblock commit done          `add` │ │
//!      │                      ▲ └─────────────────────────────────────────────────┼─┘
//!      │ not found            └───────────────────────────────────────────────────┤
//!      └────────────────► Missing ──────────────────── `add` ─────────────────────┘
//! ```

use super::Mirror;
use super::event::DeviceTraits;
use super::status::ReplicaState;
use crate::format::layout::Layout;
use crate::format::superblock::{Member, MemberState};
use crate::planted::{Bug, planted};
use crate::units::{ReplicaSet, ReplicaSlot};

/// One member of the volume.
#[derive(Debug)]
pub(super) struct Replica {
    /// Its entry in the member table, as the next superblock will say it.
    pub(super) member: Member,
    /// Its state now.
    pub(super) state: ReplicaState,
    /// Why, where there is something to say.
    pub(super) reason: Option<String>,
    /// What its backing can do, and where its metadata stands; meaningless while not attached.
    pub(super) traits: DeviceTraits,
    pub(super) layout: Layout,
    /// The shell holds it open.
    pub(super) attached: bool,
    /// To be closed when nothing is in flight on it.
    pub(super) closing: bool,
    /// Not a member any more; its place is freed when it is closed.
    pub(super) removed: bool,
    /// Operations in flight, abandoned ones included.
    pub(super) in_flight: u64,
    /// Operations that failed since start.
    pub(super) errors: u64,
    /// Read errors that count towards the budget.
    pub(super) read_errors: u64,
    /// Its last flush failed: what it was to cover may be lost, so no later flush can vouch for it.
    pub(super) flush_failed: bool,
}

impl Replica {
    /// Whether it is a member of the volume (a removed one that is still open is not).
    pub(super) fn is_member(&self) -> bool {
        !self.removed
    }
}

/// Device traits of a replica that is not there.
pub(super) const NO_TRAITS: DeviceTraits =
    DeviceTraits { device_bytes: 0, io_align: 1, cheap_zero: true, cheap_allocated_zero: true };

/// How a recorded state shows for a replica that is not active.
pub(super) fn inactive_state(recorded: MemberState) -> ReplicaState {
    match recorded {
        MemberState::Faulty => ReplicaState::Faulty,
        MemberState::InSync | MemberState::Resyncing | MemberState::Stale => ReplicaState::Stale,
    }
}

impl Mirror {
    /// Replicas that take client writes and metadata: those in sync and those resyncing.
    pub(super) fn active(&self) -> ReplicaSet {
        self.in_sync.union(self.resyncing)
    }

    /// The replicas in sync that reads may come from: one whose flush failed may have lost what it was given, and shows it
    /// at once or later (when a page is evicted). Where that is so of all, all.
    pub(super) fn readable(&self) -> ReplicaSet {
        let good: ReplicaSet = self.in_sync.iter().filter(|slot| !self.replica(*slot).flush_failed).collect();
        if good.is_empty() { self.in_sync } else { good }
    }

    /// Whether reads may come from every replica in sync. Not so from when the flush of one has failed until it is known whether
    /// the others' succeed, and that one is failed; meanwhile the others are all there is to read from.
    #[must_use]
    pub fn reads_from_all_in_sync(&self) -> bool {
        self.readable() == self.in_sync
    }

    /// Whether what the replica in `slot` has just read counts: a flush of it may have failed while it was reading, and it may
    /// have read what was left then. One that is not in sync (a planted bug reads it) is nobody's to judge here.
    pub(super) fn is_believed(&self, slot: ReplicaSlot) -> bool {
        !self.in_sync.contains(slot)
            || self.readable().contains(slot)
            || planted(Bug::BelieveAfterFailedFlush)
    }

    /// Members of the volume that take no writes.
    pub(super) fn inactive_members(&self) -> ReplicaSet {
        self.members().difference(self.active())
    }

    /// The replicas in sync, those resyncing, and all members: `status` in short.
    #[must_use]
    pub fn replica_sets(&self) -> (ReplicaSet, ReplicaSet, ReplicaSet) {
        (self.in_sync, self.resyncing, self.members())
    }

    /// Every slot that has a member.
    pub(super) fn members(&self) -> ReplicaSet {
        ReplicaSlot::all()
            .filter(|slot| self.replicas[slot.index()].as_ref().is_some_and(Replica::is_member))
            .collect()
    }

    pub(super) fn replica(&self, slot: ReplicaSlot) -> &Replica {
        let Some(replica) = &self.replicas[slot.index()] else { unreachable!("slot {slot} has a replica") };
        replica
    }

    pub(super) fn replica_mut(&mut self, slot: ReplicaSlot) -> &mut Replica {
        let Some(replica) = &mut self.replicas[slot.index()] else {
            unreachable!("slot {slot} has a replica")
        };
        replica
    }

    /// Works out the alignment that every active replica can do, and every candidate that is about to be one.
    pub(super) fn refresh_alignment(&mut self) {
        let coming = self.slots_being_prepared();
        let slots = self.active().union(coming);
        let aligns = slots.iter().map(|slot| u64::from(self.replica(slot).traits.io_align));
        let waiting = self.admin.waiting.iter().map(|(_, candidate)| u64::from(candidate.traits.io_align));
        self.io_align = aligns.chain(waiting).max().unwrap_or(1).max(1);
    }

    /// Whether every active replica can zero without writing.
    pub(super) fn zeroing_is_cheap(&self) -> bool {
        self.active().iter().all(|slot| self.replica(slot).traits.cheap_zero)
    }

    /// Whether every active replica can zero a range without writing all of it out, leaving the space allocated where
    /// it may not be given back.
    pub(super) fn zeroing_is_fast(&self, may_unmap: bool) -> bool {
        let fast = |slot| {
            let traits = &self.replica(slot).traits;
            if may_unmap { traits.cheap_zero } else { traits.cheap_allocated_zero }
        };
        self.active().iter().all(fast)
    }

    /// Name of a replica for messages.
    pub(super) fn describe(&self, slot: ReplicaSlot) -> String {
        format!("replica {slot} ({})", self.replica(slot).member.path)
    }
}
