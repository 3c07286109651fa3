//! Opening: from an assembly to a volume that takes requests.
//!
//! What must hold: before anything is written, what was read at start is on stable storage: after a kill it may
//! stand in a cache only, and a superblock written beside one that a power cut takes away would be the last one
//! lost, too. Before the first data write, (1) every page with a bit set is the same on every active
//! replica, (2) *two* superblock commits are durable, so that a copy of a replica taken before is at least two
//! events behind and is never taken for current (three where the newest superblock may be lost: the first has the
//! event count of that one then, as such a copy may), (3) members that are not there are recorded as such.

use std::collections::VecDeque;

use nix::errno::Errno;

use super::admin::AdminState;
use super::event::NoticeLevel;
use super::flush::{FlushOwner, Flushes};
use super::intent::{Pages, Sweep};
use super::membership::Meta;
use super::ops::OpOwner;
use super::overlap::OverlapTable;
use super::read_policy::ReadPolicy;
use super::region_words::RegionWords;
use super::replica::{NO_TRAITS, Replica, inactive_state};
use super::resync::ResyncState;
use super::slab::Slab;
use super::status::{ClientCounters, ReplicaState};
use super::{Mirror, MirrorConfig};
use crate::buffer::BufferPool;
use crate::format::assemble::Assembly;
use crate::format::bitmap::{Bitmap, RegionMaps};
use crate::format::layout::Layout;
use crate::format::superblock::{Member, MemberState, Superblock};
use crate::units::{Nanos, ReplicaSet, ReplicaSlot};

/// Superblock commits before a volume opens for writing.
const OPENING_COMMITS: u32 = 2;

/// Where the flush that opening begins with is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpeningFlush {
    Due,
    UnderWay,
    /// Replicas in sync that are one commit behind get the head's superblock, as it is: so the next commit, which
    /// falls on the slot of the one they have, leaves them a whole one whatever happens. Operations left.
    CatchingUp(usize),
    Done,
}

impl Mirror {
    /// A volume as assembled. `handle` must be called once with `Event::Tick` to start it.
    ///
    /// # Panics
    /// Where the assembly has no in-sync replica, or `config.traits` does not go with it.
    #[must_use]
    pub fn new(config: MirrorConfig, assembly: Assembly, pool: BufferPool) -> Self {
        let head = assembly.head;
        let regions = head.regions;
        let count = regions.count() as usize;
        assert!(!assembly.in_sync.is_empty() && assembly.maps.intent.len() == count);
        let replicas = std::array::from_fn(|index| {
            let slot = ReplicaSlot::new(index);
            let member = head.members[index].clone()?;
            Some(start_replica(&config, &assembly.in_sync, &assembly.resync, slot, member, regions))
        });
        let alone = assembly.in_sync.len() < 2;
        let unsynced = if alone { Bitmap::repeat(false, count) } else { assembly.unsynced };
        let mut mirror = Self {
            policy: ReadPolicy::new(config.write_mostly),
            regions,
            now: Nanos(0),
            out: Vec::new(),
            work: VecDeque::new(),
            pool,
            replicas,
            in_sync: assembly.in_sync,
            resyncing: if config.read_only { ReplicaSet::EMPTY } else { assembly.resync },
            source: assembly.source,
            io_align: 1,
            stale_count: assembly.maps.stale.each_ref().map(|map| map.count_ones() as u64),
            maps: RegionMaps { intent: assembly.maps.intent, stale: assembly.maps.stale },
            intent_durable: Bitmap::repeat(false, count),
            unsynced_count: unsynced.count_ones() as u64,
            unsynced,
            region_words: RegionWords::new(count),
            ops: Slab::new(),
            tasks: Slab::new(),
            locks: OverlapTable::new(),
            pages: Pages::new(Layout::pages(regions)),
            sweep: Sweep::Idle(None),
            meta: Meta::new(),
            flushes: Flushes::new(),
            resync: ResyncState::new(config.resync_burst_ns),
            admin: AdminState::new(),
            held: Vec::new(),
            held_flushes: Vec::new(),
            shrinking: false,
            broken: false,
            open: config.read_only,
            laggards: assembly.laggards,
            assembled_head: head.clone(),
            opening_flush: if config.read_only { OpeningFlush::Done } else { OpeningFlush::Due },
            opening_commits: OPENING_COMMITS + u32::from(assembly.in_doubt),
            early: VecDeque::new(),
            unclean_bytes_at_start: 0,
            counters: ClientCounters::default(),
            head,
            config,
        };
        mirror.refresh_alignment();
        mirror.unclean_bytes_at_start = mirror.bytes_in(&mirror.unsynced);
        if !mirror.config.read_only {
            mirror.begin_opening(assembly.forced);
        }
        for text in assembly.warnings {
            mirror.notice(NoticeLevel::Warning, text);
        }
        mirror.work.push_back(super::Work::Pump);
        mirror
    }

    /// What has to be recorded before the volume opens.
    fn begin_opening(&mut self, forced: bool) {
        let inactive = self.inactive_members();
        let intent = self.maps.intent.clone();
        let mut shrunk = forced;
        for slot in inactive.iter() {
            // A dirty region is stale on everybody who will not take part.
            self.widen_stale(slot, Some(&intent));
            let member = &mut self.replica_mut(slot).member;
            if matches!(member.state, MemberState::InSync | MemberState::Resyncing) {
                member.state = MemberState::Stale;
                shrunk = true;
            }
        }
        for slot in self.resyncing.iter() {
            self.widen_stale(slot, Some(&intent));
            let member = &mut self.replica_mut(slot).member;
            shrunk |= member.state == MemberState::InSync;
            member.state = MemberState::Resyncing;
        }
        for slot in self.in_sync.iter() {
            self.replica_mut(slot).member.state = MemberState::InSync;
        }
        for slot in ReplicaSlot::all() {
            if self.replicas[slot.index()].is_none() {
                self.drop_stale(slot);
            }
        }
        // A replica that is in sync misses nothing, whatever an old map says (assembly has looked at it).
        for slot in self.in_sync.iter() {
            self.drop_stale(slot);
        }
        if shrunk {
            self.begin_generation();
        }
        self.meta.dirty = true;
        self.settle_pages_in_use();
        if !self.resyncing.is_empty() || forced {
            self.owe_every_page(self.resyncing);
        }
        if self.maps.intent.any() {
            self.sweep = Sweep::Idle(Some(self.now.plus(self.config.intent_idle_ns / 2)));
        }
    }

    /// What was read at start is durable, or (every flush failed) as durable as it can be.
    pub(super) fn opening_flushed(&mut self) {
        let laggards = self.laggards.intersection(self.in_sync);
        self.opening_flush =
            if laggards.is_empty() { OpeningFlush::Done } else { OpeningFlush::CatchingUp(laggards.len()) };
        for slot in laggards.iter() {
            let layout = self.replica(slot).layout;
            let superblock =
                Superblock { slot, device_bytes: layout.device_bytes, ..self.assembled_head.clone() };
            self.send_superblock(slot, &superblock, OpOwner::CatchUp);
        }
        self.work.push_back(super::Work::Pump);
    }

    /// A replica has the head's superblock, or could not take it.
    pub(super) fn caught_up(&mut self, slot: ReplicaSlot, result: Result<(), Errno>) {
        let OpeningFlush::CatchingUp(left) = self.opening_flush else {
            unreachable!("a replica is catching up")
        };
        self.opening_flush = if left == 1 { OpeningFlush::Done } else { OpeningFlush::CatchingUp(left - 1) };
        if let Err(errno) = result {
            self.fail_on_error(slot, errno, "its superblock could not be written");
        }
        self.work.push_back(super::Work::Pump);
    }

    /// Opens when everything is recorded.
    pub(super) fn pump_opening(&mut self) {
        if self.open {
            return;
        }
        if self.opening_flush == OpeningFlush::Due {
            self.opening_flush = OpeningFlush::UnderWay;
            self.request_flush(self.active(), FlushOwner::Open);
        }
        if self.opening_flush != OpeningFlush::Done || !self.settled() {
            return;
        }
        self.opening_commits -= 1;
        if self.opening_commits > 0 {
            self.meta.dirty = true;
            self.work.push_back(super::Work::Pump);
            return;
        }
        self.open = true;
        for (id, request) in std::mem::take(&mut self.early) {
            self.start_request(id, request);
        }
        for (id, command) in std::mem::take(&mut self.admin.early) {
            self.admin_command(id, command);
        }
        self.work.push_back(super::Work::Pump);
    }
}

fn start_replica(
    config: &MirrorConfig,
    in_sync: &ReplicaSet,
    resync: &ReplicaSet,
    slot: ReplicaSlot,
    member: Member,
    regions: crate::units::Regions,
) -> Replica {
    let attached = in_sync.contains(slot) || resync.contains(slot);
    let traits = config.traits[slot.index()];
    assert!(attached == traits.is_some(), "exactly the replicas found are open");
    let state = if in_sync.contains(slot) {
        ReplicaState::InSync
    } else if !attached {
        ReplicaState::Missing
    } else if config.read_only {
        inactive_state(member.state)
    } else {
        ReplicaState::Resyncing
    };
    let traits = traits.unwrap_or(NO_TRAITS);
    let layout = Layout { regions, device_bytes: traits.device_bytes };
    Replica {
        member,
        state,
        reason: None,
        traits,
        layout,
        attached,
        closing: false,
        removed: false,
        in_flight: 0,
        errors: 0,
        read_errors: 0,
        flush_failed: false,
    }
}
