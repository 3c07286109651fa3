//! A copy of a world without its daemon.

use std::collections::{BTreeSet, BinaryHeap};

use super::{Counts, World};
use crate::sim::promises::MetaView;

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
            beyond_repair: self.beyond_repair,
            disks_made: self.disks_made,
            counts: Counts::default(),
            verbose: self.verbose,
            manual: false,
            queue: BinaryHeap::new(),
            next_wake: self.next_wake,
            next_id: self.next_id,
            life: self.life,
            last_tick: self.last_tick,
            ticks_now: 0,
            split: self.split,
            troubled: BTreeSet::new(),
            suspect: self.suspect,
            holders,
            next_fails: vec![],
            watch: None,
        }
    }
}
