//! A copy of a world without its daemon.

use std::collections::{BTreeSet, BinaryHeap};

use super::{Counts, World};
use crate::sim::promises::MetaView;
use crate::sim::rng::Rng;
use crate::units::{Nanos, SECOND_NS};

impl World {
    /// Everything but the daemon and what was to happen: as if it had died just now and nobody had touched the disks.
    /// Neither the disks nor the oracle know of the end yet.
    #[must_use]
    pub fn without_daemon(&self) -> Self {
        let holders = if self.daemon.is_some() { self.in_sync_disks() } else { self.holders.clone() };
        let mut clients = self.clients.clone();
        clients.iter_mut().for_each(crate::sim::client::Client::forget);
        Self {
            plan: self.plan.clone(),
            rng: self.rng.clone(),
            now: self.now,
            disks: self.disks.clone(),
            meta: self.disks.iter().map(|_| MetaView::default()).collect(),
            daemon: None,
            clients,
            requests_left: 0,
            oracle: self.oracle.clone(),
            chaos: self.chaos,
            victim: self.victim,
            excused: self.excused,
            last_full: self.last_full,
            beyond_repair: self.beyond_repair,
            disks_made: self.disks_made,
            counts: Counts::default(),
            verbose: self.verbose,
            invariants: self.invariants,
            volume_uuid: self.volume_uuid,
            manual: false,
            queue: BinaryHeap::new(),
            next_wake: self.next_wake,
            next_id: self.next_id,
            life: self.life,
            last_tick: self.last_tick,
            ticks_now: 0,
            read_only: false,
            looks: self.looks,
            must_refuse: BTreeSet::new(),
            split: self.split,
            troubled: BTreeSet::new(),
            suspect: self.suspect,
            holders,
            next_fails: vec![],
            events_max: self.events_max,
            watch: None,
        }
    }

    /// Gives time, chance and ids that depend on `seed` and on `depth` (how many crashes came before) and on nothing
    /// else, so that equal worlds go on equally, whatever led to them.
    ///
    /// # Panics
    /// Where the world is older than a depth may last.
    pub fn begin_depth(&mut self, seed: u64, depth: u64) {
        let begin = Nanos(depth * 100_000 * SECOND_NS);
        assert!(self.daemon.is_none() && self.now <= begin && self.next_id < depth * 1_000_000);
        (self.now, self.last_tick) = (begin, begin);
        self.next_id = depth * 1_000_000;
        self.rng = Rng::new(seed ^ depth << 48);
    }

    /// Whether no daemon ever ran, here or in the world that this is a copy of.
    #[must_use]
    pub fn never_started(&self) -> bool {
        self.life == 0
    }

    /// A number that changes whenever a crash might leave something else than before.
    #[must_use]
    pub fn crash_epoch(&self) -> CrashEpoch {
        let changes = self.disks.iter().map(|disk| disk.disk.changes()).sum();
        let ops = self.daemon.iter().flat_map(|daemon| daemon.ops.values());
        let waiting = ops.filter(|op| op.writes() && op.result.is_none()).count();
        let gone = self.disks.iter().map(|disk| disk.gone).collect();
        CrashEpoch { changes, clock: self.oracle.clock(), waiting, in_sync: self.in_sync_disks(), gone }
    }
}

/// What a crash depends on, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashEpoch {
    changes: u64,
    clock: u64,
    waiting: usize,
    in_sync: Vec<usize>,
    gone: Vec<bool>,
}
