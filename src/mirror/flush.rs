//! Flushes: rounds per replica, shared by everybody who asked before the round began.
//!
//! What must hold (promise 9): a ticket is good only if, on every replica it names that is still active, a
//! flush that *began after* the ticket was asked for has succeeded, and at least one of them is in sync.
//! After a flush of a replica failed no later flush of it vouches for anything: it counts as failed at
//! once, until the replica is taken in anew.
//!
//! ```text
//!  ticket asked ──round of replica idle──► rides on the round begun now ──┐
//!       └────────round under way─────────► waits for the next one ────────┴─► its replica is settled
//!  all replicas settled ──► all good: done │ some failed, an in-sync one good: those are failed, done │ none: error
//! ```

use nix::errno::Errno;

use super::Mirror;
use super::event::{DeviceOp, NoticeLevel, RequestId};
use super::ops::OpOwner;
use super::resync::Job;
use super::slab::{Key, Slab};
use crate::planted::{Bug, planted};
use crate::units::{REPLICAS_MAX, ReplicaSet, ReplicaSlot};

/// What an operator should know and do; `add` can still mend it now, since only this life knows which replica lost what.
const NOBODY_FLUSHED: &str = "no replica in sync can be flushed: what was written since the last good flush may be lost at a power cut, \
     and every flush is answered with an error until the volume is restarted. Add another replica before that \
     (`nbdmirror add`): it gets a copy of what is read now, and what cannot be flushed is failed";

/// Who asked for a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlushOwner {
    /// A client's FLUSH.
    Client(RequestId),
    /// A write with FUA whose operations cannot be durable by themselves.
    Write(Key),
    /// The sweep that clears intent bits.
    Sweep,
    /// A region copy.
    Job(Key),
    /// An orderly stop.
    Stop,
    /// The opening.
    Open,
    /// The last replica in sync, for what was copied to it from others that are gone.
    Alone,
}

struct Ticket {
    owner: FlushOwner,
    remaining: ReplicaSet,
    ok: ReplicaSet,
    failed: ReplicaSet,
    errno: Errno,
}

#[derive(Default)]
struct Rounds {
    in_flight: bool,
    current: Vec<Key>,
    next: Vec<Key>,
    /// An empty one, for its memory.
    spare: Vec<Key>,
}

/// Rounds of all replicas and the tickets on them.
pub(super) struct Flushes {
    tickets: Slab<Ticket>,
    rounds: [Rounds; REPLICAS_MAX],
}

impl Flushes {
    pub(super) fn new() -> Self {
        Self { tickets: Slab::new(), rounds: std::array::from_fn(|_| Rounds::default()) }
    }
}

impl Mirror {
    /// Asks for a flush of `slots`; the owner is told through `flush_finished`.
    pub(super) fn request_flush(&mut self, slots: ReplicaSet, owner: FlushOwner) {
        let mut slots = slots.intersection(self.active());
        if planted(Bug::FlushOneReplicaOnly) {
            slots = slots.first().map(ReplicaSet::only).unwrap_or_default();
        }
        let ticket = Ticket {
            owner,
            remaining: slots,
            ok: ReplicaSet::EMPTY,
            failed: ReplicaSet::EMPTY,
            errno: Errno::EIO,
        };
        let key = self.flushes.tickets.insert(ticket);
        for slot in slots.iter() {
            if self.replica(slot).flush_failed && !planted(Bug::FlushFailureForgotten) {
                self.ticket_settled(key, slot, Some(Err(Errno::EIO)));
            } else {
                self.flushes.rounds[slot.index()].next.push(key);
                self.begin_round(slot);
            }
        }
        if slots.is_empty() {
            self.ticket_finished(key);
        }
    }

    fn begin_round(&mut self, slot: ReplicaSlot) {
        let rounds = &mut self.flushes.rounds[slot.index()];
        if rounds.in_flight || rounds.next.is_empty() {
            return;
        }
        rounds.in_flight = true;
        rounds.current = std::mem::replace(&mut rounds.next, std::mem::take(&mut rounds.spare));
        self.issue(slot, OpOwner::Flush, DeviceOp::Flush);
    }

    /// A replica's flush has ended.
    pub(super) fn flush_op_done(&mut self, slot: ReplicaSlot, result: Result<(), Errno>) {
        let rounds = &mut self.flushes.rounds[slot.index()];
        assert!(rounds.in_flight);
        rounds.in_flight = false;
        let mut tickets = std::mem::take(&mut rounds.current);
        if !self.active().contains(slot) {
            // Failed meanwhile: whoever waits goes on without it.
            tickets.append(&mut self.flushes.rounds[slot.index()].next);
            for ticket in tickets {
                self.ticket_settled(ticket, slot, None);
            }
            return;
        }
        if let Err(errno) = result {
            self.replica_mut(slot).flush_failed = true;
            tickets.append(&mut self.flushes.rounds[slot.index()].next);
            self.notice(NoticeLevel::Error, format!("{}: flush failed: {errno}", self.describe(slot)));
            if self.in_sync.contains(slot) {
                self.source_lost_writes();
                if self.in_sync.iter().all(|slot| self.replica(slot).flush_failed) {
                    self.notice(NoticeLevel::Error, NOBODY_FLUSHED.to_owned());
                }
            }
        }
        // Tickets that will fail a replica come first: nothing is answered before that is known.
        for with_failures in [true, false] {
            for key in &tickets {
                let ticket = self.flushes.tickets.get(*key);
                if ticket.is_some_and(|ticket| ticket.failed.is_empty() != with_failures) {
                    self.ticket_settled(*key, slot, Some(result));
                }
            }
        }
        tickets.clear();
        self.flushes.rounds[slot.index()].spare = tickets;
        if self.active().contains(slot) {
            self.begin_round(slot);
        }
    }

    /// A replica in sync may have lost what it had not flushed; resyncing ones may have it still. Should that replica stay
    /// (the last in sync does), they must not join with something else than it reads.
    fn source_lost_writes(&mut self) {
        let intent = self.maps.intent.clone();
        for slot in self.resyncing.iter() {
            self.widen_stale(slot, Some(&intent));
        }
        self.spoil_jobs();
    }

    /// One replica's part of a ticket is known; `None` where the replica is not active any more.
    fn ticket_settled(&mut self, key: Key, slot: ReplicaSlot, result: Option<Result<(), Errno>>) {
        let Some(ticket) = self.flushes.tickets.get_mut(key) else { unreachable!("a ticket waits for it") };
        assert!(ticket.remaining.contains(slot));
        ticket.remaining.remove(slot);
        match result {
            Some(Ok(())) => ticket.ok.insert(slot),
            Some(Err(errno)) => {
                ticket.failed.insert(slot);
                ticket.errno = errno;
            }
            None => {}
        }
        if ticket.remaining.is_empty() {
            self.ticket_finished(key);
        }
    }

    fn ticket_finished(&mut self, key: Key) {
        let Some(ticket) = self.flushes.tickets.remove(key) else { unreachable!("it has just ended") };
        let nobody_is_left = ticket.ok.union(ticket.failed).intersection(self.in_sync).is_empty();
        if nobody_is_left && matches!(ticket.owner, FlushOwner::Client(_)) && !self.in_sync.is_empty() {
            // All that it asked left meanwhile; whoever is in sync now came later and can do it as well.
            self.request_flush(self.active(), ticket.owner);
            return;
        }
        let failed = ticket.failed.intersection(self.active());
        let only_targets = matches!(ticket.owner, FlushOwner::Job(_));
        // A region copy flushes its targets only; its source, which is in sync, stands behind it.
        let good = !ticket.ok.intersection(self.in_sync).is_empty() || only_targets;
        if good {
            // The source of a copy last: where a flush failed on all, the last one stays, and the copies on the others
            // may stand in their caches only. A power cut then would turn back what is read from now on.
            let source = match ticket.owner {
                FlushOwner::Job(task) => self.job(task).and_then(Job::source),
                _ => None,
            };
            let source = source.map(ReplicaSet::only).unwrap_or_default();
            for slot in failed.difference(source).iter().chain(failed.intersection(source).iter()) {
                self.fail_on_error(slot, ticket.errno, "a flush failed");
            }
        } else if !failed.is_empty() {
            self.flush_lost();
            // It may not join any more, and only a flush that is good would fail it.
            for slot in failed.intersection(self.resyncing).iter() {
                self.fail_on_error(slot, ticket.errno, "a flush failed");
            }
        }
        let covered = self.in_sync.intersection(failed).is_empty();
        self.flush_finished(ticket.owner, good && covered, ticket.ok);
    }

    /// A flush failed on every in-sync replica: acknowledged data may be lost on each, differently.
    fn flush_lost(&mut self) {
        let dirty: Vec<_> =
            self.maps.intent.iter_ones().map(|index| crate::units::RegionIndex(index as u64)).collect();
        self.mark_unsynced(&dirty);
    }

    /// Tells whoever asked.
    fn flush_finished(&mut self, owner: FlushOwner, ok: bool, flushed: ReplicaSet) {
        match owner {
            FlushOwner::Client(id) => self.client_flushed(id, ok),
            FlushOwner::Write(task) => self.write_flushed(task, ok),
            FlushOwner::Sweep => self.sweep_flushed(ok),
            FlushOwner::Job(task) => self.job_flushed(task, flushed),
            FlushOwner::Stop => self.stop_flushed(ok),
            FlushOwner::Open => self.opening_flushed(),
            FlushOwner::Alone => self.alone_flushed(),
        }
    }
}
