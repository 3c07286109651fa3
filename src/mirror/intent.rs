//! Intent bits and stale maps: set before data, committed page by page, cleared when idle.
//!
//! What must hold:
//! - promise 1: a write goes on only when its regions' bits are durable on every metadata target;
//! - for a member that is not active, every dirty region is stale on it (set in the same commit);
//! - promise 4: a bit is cleared only where no write is in flight, no replica missed one, nothing is unsynced,
//!   and a flush of every active replica that began after the last write succeeded.
//!
//! A page's life; one commit in flight a page, everybody who waits for a page shares it:
//!
//! ```text
//!            bit changed                 commit issued (snapshot)
//!   clean ──────────────► dirty ───────────────────────────────► in flight ──all targets done──► clean
//!                           ▲                bit changed meanwhile    │
//!                           └─────────────────────────────────────────┘ (dirty again at once)
//! ```

use nix::errno::Errno;
use smallvec::SmallVec;

use super::event::{DeviceOp, NoticeLevel, RequestError};
use super::flush::FlushOwner;
use super::open::OpeningFlush;
use super::ops::OpOwner;
use super::slab::Key;
use super::{Mirror, Work};
use crate::buffer::Payload;
use crate::format::bitmap::{Bitmap, encode_page};
use crate::format::layout::REGIONS_PER_PAGE;
use crate::planted::{Bug, planted};
use crate::units::{
    BLOCK_BYTES, ByteRange, Nanos, REPLICAS_MAX, RegionIndex, ReplicaSet, ReplicaSlot, SECOND_NS,
};

/// Page commits in flight at the same time.
const COMMITS_MAX: usize = 32;
/// Changes that nobody waits for are committed after this long.
const LAZY_COMMIT_NS: u64 = SECOND_NS / 2;
const WORDS_PER_PAGE: usize = (REGIONS_PER_PAGE / 64) as usize;

/// One bitmap page.
#[derive(Default)]
struct Page {
    /// Changed since its last commit was issued.
    dirty: bool,
    /// In `urgent` already.
    queued: bool,
    /// A membership change is not recorded before this page is durable.
    settle: bool,
    /// Replicas that still need this page written before they may count as in sync.
    owed: ReplicaSet,
    /// Tasks to wake when the commit in flight, or the next one, is done.
    waiters: Vec<Key>,
    commit: Option<Commit>,
}

/// A page commit in flight.
struct Commit {
    remaining: ReplicaSet,
    ok: ReplicaSet,
    failed: SmallVec<[(ReplicaSlot, Errno); 2]>,
    settle: bool,
    owed: ReplicaSet,
    waiters: Vec<Key>,
    /// The intent bits that will be durable, with their stale bits, when it is done.
    intent: [u64; WORDS_PER_PAGE],
}

/// All bitmap pages and what is due on them.
pub(super) struct Pages {
    pages: Vec<Page>,
    urgent: std::collections::VecDeque<usize>,
    commits: usize,
    /// Empty lists of waiters, for their memory; fewer than `COMMITS_MAX`.
    spare_waiters: Vec<Vec<Key>>,
    /// Pages whose commit a membership change waits for.
    settling: usize,
    /// Pages that each replica still needs.
    owed: [usize; REPLICAS_MAX],
    /// When pages that nobody waits for are committed.
    lazy_at: Option<Nanos>,
    /// The last commit that ended was taken by no in-sync replica.
    pub(super) failing: bool,
}

impl Pages {
    pub(super) fn new(count: u64) -> Self {
        Self {
            pages: (0..count).map(|_| Page::default()).collect(),
            urgent: std::collections::VecDeque::new(),
            commits: 0,
            spare_waiters: Vec::new(),
            settling: 0,
            owed: [0; REPLICAS_MAX],
            lazy_at: None,
            failing: false,
        }
    }

    /// Whether a membership change still waits for a page.
    pub(super) fn settled(&self) -> bool {
        self.settling == 0
    }

    /// Whether the replica in `slot` has every page.
    pub(super) fn nothing_owed(&self, slot: ReplicaSlot) -> bool {
        self.owed[slot.index()] == 0
    }

    /// Whether no page is dirty or in flight.
    pub(super) fn all_clean(&self) -> bool {
        self.commits == 0 && self.pages.iter().all(|page| !page.dirty)
    }

    pub(super) fn deadline(&self) -> Option<Nanos> {
        self.lazy_at
    }

    /// The commit in flight of the page of `region` (if there is one) does not have all that is set there now.
    fn forget_in_commit(&mut self, region: RegionIndex) {
        if let Some(commit) = &mut self.pages[page_of(region)].commit {
            let bit = region.0 % REGIONS_PER_PAGE;
            commit.intent[(bit / 64) as usize] &= !(1 << (bit % 64));
        }
    }

    fn owe(&mut self, index: usize, slot: ReplicaSlot) {
        let page = &mut self.pages[index];
        if !page.owed.contains(slot) {
            page.owed.insert(slot);
            self.owed[slot.index()] += 1;
        }
    }
}

/// What a sweep for clearable bits is doing.
pub(super) enum Sweep {
    /// Nothing; the next one is due then (`None`: no region is dirty).
    Idle(Option<Nanos>),
    /// Waits for a flush of every active replica; these regions may be cleared then.
    Flushing(Vec<RegionIndex>),
}

fn page_of(region: RegionIndex) -> usize {
    (region.0 / REGIONS_PER_PAGE) as usize
}

fn words_of(index: usize, total_words: usize) -> std::ops::Range<usize> {
    index * WORDS_PER_PAGE..((index + 1) * WORDS_PER_PAGE).min(total_words)
}

impl Mirror {
    /// Marks a page to be committed: soon where somebody waits, else within `LAZY_COMMIT_NS`.
    pub(super) fn touch_page(&mut self, index: usize, urgent: bool) {
        let page = &mut self.pages.pages[index];
        page.dirty = true;
        if urgent && !page.queued {
            page.queued = true;
            self.pages.urgent.push_back(index);
        } else if !urgent && self.pages.lazy_at.is_none() {
            self.pages.lazy_at = Some(self.now.plus(LAZY_COMMIT_NS));
        }
    }

    /// Sets the intent bits of `range`. `None`: all are durable; else the task is woken when to ask again.
    pub(super) fn ensure_intent(&mut self, task: Key, range: ByteRange) -> bool {
        let mut wait_for = None;
        for region in self.regions.touched(range) {
            // A ready region costs a look at its word and no more.
            if self.region_words.touch(region) {
                continue;
            }
            let index = region.index();
            if !self.maps.intent[index] {
                self.maps.intent.set(index, true);
                for slot in self.inactive_members().iter() {
                    if !planted(Bug::DropStaleBit) {
                        self.set_stale(slot, region);
                        // A bit cleared here and not yet on disk is durable still; the stale bit beside it is not.
                        self.intent_durable.set(index, false);
                        self.pages.forget_in_commit(region);
                    }
                }
                self.touch_page(page_of(region), true);
            }
            if self.intent_durable[index] {
                self.region_words.set_ready(region, true);
            } else if wait_for.is_none() {
                wait_for = Some(page_of(region));
            }
        }
        if matches!(self.sweep, Sweep::Idle(None)) {
            self.sweep = Sweep::Idle(Some(self.now.plus(self.config.intent_idle_ns / 2)));
        }
        let Some(page) = wait_for else { return true };
        if planted(Bug::AckBeforeIntent) {
            return true;
        }
        // The bit is not durable: either its commit is in flight or the page is dirty; make sure it is queued.
        if self.pages.pages[page].commit.is_none() || self.pages.pages[page].dirty {
            self.touch_page(page, true);
        }
        self.pages.pages[page].waiters.push(task);
        false
    }

    /// Notes that the replica in `slot` misses something in `region`; the page is committed by the caller.
    pub(super) fn set_stale(&mut self, slot: ReplicaSlot, region: RegionIndex) {
        let map = &mut self.maps.stale[slot.index()];
        if !map[region.index()] {
            map.set(region.index(), true);
            self.stale_count[slot.index()] += 1;
            self.resync.exhausted = false;
        }
    }

    /// The replica in `slot` has `region` again, flushed.
    pub(super) fn clear_stale(&mut self, slot: ReplicaSlot, region: RegionIndex) {
        let map = &mut self.maps.stale[slot.index()];
        if map[region.index()] {
            map.set(region.index(), false);
            self.stale_count[slot.index()] -= 1;
            self.pages.owe(page_of(region), slot);
            self.touch_page(page_of(region), false);
            if self.stale_count[slot.index()] == 0 {
                self.hurry_owed(slot);
            }
        }
    }

    /// Sets the stale map of `slot` from `mark` (or wholly), counted anew.
    pub(super) fn widen_stale(&mut self, slot: ReplicaSlot, mark: Option<&Bitmap>) {
        let map = &mut self.maps.stale[slot.index()];
        match mark {
            Some(mark) => *map |= mark,
            None => map.fill(true),
        }
        self.stale_count[slot.index()] = map.count_ones() as u64;
        self.resync.exhausted = false;
    }

    /// Forgets the stale map of `slot`.
    pub(super) fn drop_stale(&mut self, slot: ReplicaSlot) {
        self.maps.stale[slot.index()].fill(false);
        self.stale_count[slot.index()] = 0;
    }

    /// A member left the active set: every dirty region is stale on it, and no write is answered before that
    /// is durable.
    pub(super) fn mark_dirty_regions_stale(&mut self, slot: ReplicaSlot) {
        if !planted(Bug::DropStaleBit) {
            let intent = std::mem::take(&mut self.maps.intent);
            self.widen_stale(slot, Some(&intent));
            self.maps.intent = intent;
        }
        for index in 0..self.pages.pages.len() {
            let owed = &mut self.pages.pages[index].owed;
            if owed.contains(slot) {
                owed.remove(slot);
                self.pages.owed[slot.index()] -= 1;
            }
            let words = words_of(index, self.maps.intent.as_raw_slice().len());
            if self.maps.intent.as_raw_slice()[words].iter().any(|word| *word != 0) {
                self.settle_page(index);
            }
        }
    }

    /// Commits a page before anything more is acknowledged.
    pub(super) fn settle_page(&mut self, index: usize) {
        self.touch_page(index, true);
        let page = &mut self.pages.pages[index];
        if !page.settle {
            page.settle = true;
            self.pages.settling += 1;
        }
    }

    /// Every page is to be written, and `slots` may not count as in sync before.
    pub(super) fn owe_every_page(&mut self, slots: ReplicaSet) {
        if planted(Bug::SkipPageOnResyncStart) {
            return;
        }
        for index in 0..self.pages.pages.len() {
            for slot in slots.iter() {
                self.pages.owe(index, slot);
            }
            if slots.is_empty() {
                self.touch_page(index, true);
            } else {
                // The stale bits come before the superblock that calls the replica current.
                self.settle_page(index);
            }
        }
    }

    /// At start: pages with any bit set are brought to every target.
    pub(super) fn settle_pages_in_use(&mut self) {
        for index in 0..self.pages.pages.len() {
            let maps = std::iter::once(&self.maps.intent).chain(&self.maps.stale);
            let used = maps
                .map(Bitmap::as_raw_slice)
                .any(|words| words[words_of(index, words.len())].iter().any(|word| *word != 0));
            if used {
                self.settle_page(index);
            }
        }
    }

    /// The pages that keep a replica from being in sync are committed now.
    fn hurry_owed(&mut self, slot: ReplicaSlot) {
        for index in 0..self.pages.pages.len() {
            if self.pages.pages[index].owed.contains(slot) && self.pages.pages[index].dirty {
                self.touch_page(index, true);
            }
        }
    }

    /// Every dirty page is committed now.
    pub(super) fn hurry_pages(&mut self) {
        for index in 0..self.pages.pages.len() {
            if self.pages.pages[index].dirty {
                self.touch_page(index, true);
            }
        }
    }

    /// Issues the commits that are due.
    pub(super) fn pump_pages(&mut self) {
        if self.opening_flush != OpeningFlush::Done {
            return;
        }
        if self.pages.lazy_at.is_some_and(|at| at <= self.now) {
            self.pages.lazy_at = None;
            self.hurry_pages();
        }
        while self.pages.commits < COMMITS_MAX
            && let Some(index) = self.pages.urgent.pop_front()
        {
            self.pages.pages[index].queued = false;
            // One commit at a time a page: the next is queued again when this one is done.
            if self.pages.pages[index].dirty && self.pages.pages[index].commit.is_none() {
                self.issue_page(index);
            }
        }
    }

    fn issue_page(&mut self, index: usize) {
        let mut targets = self.active();
        if planted(Bug::IntentOnOneReplica) {
            targets = targets.first().map(ReplicaSet::only).unwrap_or_default();
        }
        let mut buffer = self.pool.take(BLOCK_BYTES as usize);
        encode_page(self.head.volume_uuid, index as u64, &self.maps, &mut buffer);
        let data = Payload { buffer: buffer.share(), start: 0, len: BLOCK_BYTES as usize };
        let mut intent = [0; WORDS_PER_PAGE];
        let words = words_of(index, self.maps.intent.as_raw_slice().len());
        intent[..words.len()].copy_from_slice(&self.maps.intent.as_raw_slice()[words.clone()]);
        // A bit that this commit clears is not to be relied on from now; one it sets, from its completion.
        for (durable, new) in self.intent_durable.as_raw_mut_slice()[words].iter_mut().zip(&intent) {
            *durable &= new;
        }
        let page = &mut self.pages.pages[index];
        page.dirty = false;
        page.commit = Some(Commit {
            remaining: targets,
            ok: ReplicaSet::EMPTY,
            failed: SmallVec::new(),
            settle: std::mem::take(&mut page.settle),
            owed: std::mem::take(&mut page.owed),
            waiters: std::mem::replace(&mut page.waiters, self.pages.spare_waiters.pop().unwrap_or_default()),
            intent,
        });
        self.pages.commits += 1;
        for slot in targets.iter() {
            let offset = self.replica(slot).layout.page_offset(index as u64);
            let request = DeviceOp::Write { offset, data: data.clone(), durable: true };
            self.issue(slot, OpOwner::Page(index), request);
        }
        if targets.is_empty() {
            self.page_committed(index);
        }
    }

    /// One replica's part of a page commit has ended.
    pub(super) fn page_op_done(&mut self, index: usize, slot: ReplicaSlot, result: Result<(), Errno>) {
        let active = self.active().contains(slot);
        let Some(commit) = &mut self.pages.pages[index].commit else { unreachable!("a commit is in flight") };
        assert!(commit.remaining.contains(slot));
        commit.remaining.remove(slot);
        match result {
            Ok(()) => commit.ok.insert(slot),
            Err(errno) if active => commit.failed.push((slot, errno)),
            // Failed meanwhile.
            Err(_) => {}
        }
        if commit.remaining.is_empty() {
            self.page_committed(index);
        }
    }

    fn page_committed(&mut self, index: usize) {
        let Some(mut commit) = self.pages.pages[index].commit.take() else {
            unreachable!("it has just ended")
        };
        self.pages.commits -= 1;
        if commit.ok.intersection(self.in_sync).is_empty() {
            self.page_commit_failed(index, commit);
            return;
        }
        self.pages.failing = false;
        for (slot, errno) in commit.failed {
            self.fail_on_error(slot, errno, "a bitmap page could not be written");
        }
        self.intent_is_durable(index, &commit.intent);
        if commit.settle {
            self.pages.settling -= 1;
            // Marked again meanwhile: it was counted twice, once for each commit.
        }
        for slot in commit.owed.iter() {
            self.pages.owed[slot.index()] -= 1;
        }
        self.work.extend(commit.waiters.drain(..).map(Work::IntentDurable));
        self.pages.spare_waiters.push(commit.waiters);
        if self.pages.pages[index].dirty && !self.pages.pages[index].waiters.is_empty() {
            self.touch_page(index, true);
        } else if self.pages.pages[index].dirty {
            let urgent = self.pages.pages[index].settle || !self.pages.pages[index].owed.is_empty();
            self.touch_page(index, urgent);
        } else {
            // They came while the commit was in flight that had their bits already.
            self.work.extend(self.pages.pages[index].waiters.drain(..).map(Work::IntentDurable));
        }
    }

    /// The intent bits of a page are on every target as `committed`.
    fn intent_is_durable(&mut self, index: usize, committed: &[u64; WORDS_PER_PAGE]) {
        let words = words_of(index, self.intent_durable.as_raw_slice().len());
        for (at, new) in words.zip(committed) {
            let old = std::mem::replace(&mut self.intent_durable.as_raw_mut_slice()[at], *new);
            let mut changed = old ^ new;
            while changed != 0 {
                let region = at * 64 + changed.trailing_zeros() as usize;
                changed &= changed - 1;
                // The last word has bits that are no region's.
                if region < self.maps.intent.len() {
                    let ready = self.maps.intent[region] && self.intent_durable[region];
                    self.region_words.set_ready(RegionIndex(region as u64), ready);
                }
            }
        }
    }

    /// No in-sync replica took the page: what waited for it fails, and it is tried again.
    fn page_commit_failed(&mut self, index: usize, commit: Commit) {
        let errno = commit.failed.first().map_or(Errno::EIO, |(_, errno)| *errno);
        self.pages.failing = true;
        let page = &mut self.pages.pages[index];
        let settling = page.settle && commit.settle;
        page.settle |= commit.settle;
        let twice = page.owed.intersection(commit.owed);
        page.owed = page.owed.union(commit.owed);
        for slot in twice.iter() {
            self.pages.owed[slot.index()] -= 1;
        }
        if settling {
            self.pages.settling -= 1;
        }
        if self.pages.pages[index].settle {
            self.metadata_cannot_be_recorded(errno);
        }
        let error = if is_out_of_space(errno) { RequestError::NoSpace } else { RequestError::Io };
        self.work.extend(commit.waiters.into_iter().map(|task| Work::IntentFailed(task, error)));
        self.touch_page(index, false);
        if !self.pages.pages[index].waiters.is_empty() {
            self.touch_page(index, true);
        }
    }

    /// Looks for bits to clear when it is time.
    pub(super) fn pump_sweep(&mut self) {
        let Sweep::Idle(Some(at)) = self.sweep else { return };
        if at > self.now || self.config.read_only || !self.open {
            return;
        }
        let candidates = self.clearable(false);
        for region in self.maps.intent.iter_ones() {
            self.region_words.forget_recent(RegionIndex(region as u64));
        }
        if candidates.is_empty() {
            let again = self.maps.intent.any().then(|| self.now.plus(self.config.intent_idle_ns / 2));
            self.sweep = Sweep::Idle(again);
            return;
        }
        self.sweep = Sweep::Flushing(candidates);
        if planted(Bug::ClearBeforeFlush) {
            self.sweep_flushed(true);
        } else {
            self.request_flush(self.active(), FlushOwner::Sweep);
        }
    }

    /// Regions that are dirty and have no reason to stay so, but for the flush that is still to come.
    pub(super) fn clearable(&self, even_recent: bool) -> Vec<RegionIndex> {
        let dirty = self.maps.intent.iter_ones().map(|index| RegionIndex(index as u64));
        dirty.filter(|region| self.is_clearable(*region, even_recent)).collect()
    }

    fn is_clearable(&self, region: RegionIndex, even_recent: bool) -> bool {
        let index = region.index();
        (even_recent || !self.region_words.is_recent(region))
            && (!self.region_words.is_written(region) || planted(Bug::ClearWithWriteInFlight))
            && !self.unsynced[index]
            && self.maps.stale.iter().all(|map| !map[index])
    }

    /// The flush that a sweep waited for has ended.
    pub(super) fn sweep_flushed(&mut self, ok: bool) {
        let idle = Sweep::Idle(Some(self.now.plus(self.config.intent_idle_ns / 2)));
        let Sweep::Flushing(candidates) = std::mem::replace(&mut self.sweep, idle) else {
            unreachable!("a sweep flushes once")
        };
        if ok || planted(Bug::ClearAfterFailedFlush) {
            self.clear_intent(&candidates, false);
        }
    }

    /// Clears the bits of those `candidates` (covered by a flush) that have not been written since.
    pub(super) fn clear_intent(&mut self, candidates: &[RegionIndex], even_recent: bool) {
        for region in candidates {
            if self.maps.intent[region.index()] && self.is_clearable(*region, even_recent) {
                self.maps.intent.set(region.index(), false);
                self.region_words.set_ready(*region, false);
                self.touch_page(page_of(*region), false);
            }
        }
    }

    /// Says once that metadata cannot be recorded; writes fail until it can.
    pub(super) fn metadata_cannot_be_recorded(&mut self, errno: Errno) {
        if !self.broken {
            self.broken = true;
            let text = format!(
                "metadata cannot be recorded on any in-sync replica ({errno}): writes are answered with an error \
                 until it can; check the replicas' devices"
            );
            self.notice(NoticeLevel::Error, text);
        }
    }
}

/// Whether an error means that the backing is full.
pub(super) fn is_out_of_space(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)
}
